from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from paqdetr.data.dataset import open_split
from paqdetr.data.digits import make_digits
from paqdetr.data.digits.scenes import SceneSpec, compose_scene
from paqdetr.data.layout import available_splits
from paqdetr.errors import ConfigError, DataError

TINY = {"size": 96, "train": 6, "val": 3, "test": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("digits") / "tiny", **TINY)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout(tiny: Path) -> None:
    assert available_splits(tiny) == ["train", "val", "test"]
    for split in ("train", "val", "test"):
        data = open_split(tiny, split)
        assert len(data) == TINY[split] and data.skipped == 0
        assert data.classes.names == tuple("0123456789") and data.classes.ids == tuple(range(1, 11))
        assert data.image(0).size == (96, 96)
        scene = compose_scene(SceneSpec(size=96), seed=0, split=split, index=1)
        assert data.labels(1).tolist() == scene.digits.tolist()
        assert data.boxes(1).tolist() == scene.boxes.tolist()


def test_annotations_are_what_they_were_before(tiny: Path) -> None:
    """If this fails after a change of ours, raise the edition format in edition.py."""
    digests = {s: hashlib.sha256((tiny / f"{s}.json").read_bytes()).hexdigest()[:16] for s in ("train", "val", "test")}
    assert digests == {"train": "7d16540c650515e2", "val": "34ba9681be5ddaa1", "test": "5545fe92f4edc609"}


@pytest.mark.integration
def test_byte_identical_on_every_run_and_with_more_processes(tiny: Path, tmp_path: Path) -> None:
    assert files_of(make_digits(tmp_path / "again", **TINY)) == files_of(tiny)
    assert files_of(make_digits(tmp_path / "two", workers=2, **TINY)) == files_of(tiny)


def test_a_smaller_edition_is_the_beginning_of_a_larger_one(tiny: Path, tmp_path: Path) -> None:
    small = make_digits(tmp_path / "small", **{**TINY, "train": 2})
    for name in ("000000.jpg", "000001.jpg"):
        assert (small / "train" / name).read_bytes() == (tiny / "train" / name).read_bytes()
    assert not (small / "train" / "000002.jpg").exists()
    few, many = (json.loads((d / "train.json").read_text())["annotations"] for d in (small, tiny))
    assert few == many[: len(few)]
    assert (small / "val.json").read_bytes() == (tiny / "val.json").read_bytes()


def test_another_seed_gives_other_images(tiny: Path, tmp_path: Path) -> None:
    other = files_of(make_digits(tmp_path / "other", seed=1, size=96, train=1, val=1, test=1))
    assert other["train/000000.jpg"] != (tiny / "train" / "000000.jpg").read_bytes()


def test_idempotent(tiny: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in tiny.rglob("*")}
    calls: list[tuple[int, int]] = []
    assert make_digits(tiny, **TINY, progress=lambda *c: calls.append(c)) == tiny
    assert {p: p.stat().st_mtime_ns for p in tiny.rglob("*")} == before and calls == []


def test_nothing_is_overwritten(tiny: Path, tmp_path: Path) -> None:
    before = files_of(tiny)
    with pytest.raises(DataError, match=r"another edition.*seed=0 \(asked for 5\)"):
        make_digits(tiny, **TINY, seed=5)
    assert files_of(tiny) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        make_digits(tmp_path, **TINY)
    with pytest.raises(DataError, match="is a file"):
        make_digits(tmp_path / "notes.txt", **TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert total == 13
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_digits(tmp_path / "out", **TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    calls: list[tuple[int, int]] = []
    make_digits(tmp_path / "out", size=64, train=1, val=1, test=1, progress=lambda *c: calls.append(c))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"train": 0}, {"workers": 0}, {"size": 10}])
def test_arguments_out_of_range(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make_digits(tmp_path / "out", **{**TINY, **wrong})
    assert not (tmp_path / "out").exists()
