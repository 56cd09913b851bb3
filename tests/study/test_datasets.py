"""Data that a study makes: once, and folds that leave no image out and show none twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from paqdetr.data.dataset import open_split
from paqdetr.errors import DataError
from paqdetr.files import Busy, held
from paqdetr.study.datasets import folder_of, prepare, training_images
from paqdetr.study.spec import DataSet


def test_folds_divide_the_images(tmp_path: Path, tiny_digits: Path) -> None:
    data = DataSet.model_validate({"folder": tiny_digits.name, "folds": 3})
    cache, root = tmp_path / "cache", tiny_digits.parent
    prepare(data, cache=cache, root=root)
    boxes = sum(len(open_split(tiny_digits, split).annotations.boxes) for split in ("train", "val"))
    held_out: list[bytes] = []
    for fold in range(3):
        folder = folder_of(data, cache=cache, root=root, fold=fold)
        train, val = open_split(folder, "train"), open_split(folder, "val")
        assert len(train) + len(val) == 12 and len(val) == 4
        assert len(train.annotations.boxes) + len(val.annotations.boxes) == boxes
        pixels = [[split.image(i).tobytes() for i in range(len(split))] for split in (train, val)]
        assert not set(pixels[0]) & set(pixels[1])
        held_out += pixels[1]
        assert len(open_split(folder, "test")) == 4
    assert len(set(held_out)) == 12
    assert training_images(data, root=root) == 8
    before = sorted(path.stat().st_mtime_ns for path in cache.rglob("*.json"))
    prepare(data, cache=cache, root=root)
    assert sorted(path.stat().st_mtime_ns for path in cache.rglob("*.json")) == before


def test_digits_of_equal_arguments_are_made_once(tmp_path: Path) -> None:
    sets = [
        DataSet.model_validate({"make": {"train": 2, "val": 1, "test": 1, "size": 64}, "epochs": n}) for n in (1, 2)
    ]
    folders = {folder_of(data, cache=tmp_path, root=tmp_path) for data in sets}
    for data in sets:
        prepare(data, cache=tmp_path, root=tmp_path)
    assert len(folders) == 1 and len(open_split(folders.pop(), "train")) == 2 == training_images(sets[0], root=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the digits and the lock


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        prepare(DataSet.model_validate({"folder": "fish"}), cache=tmp_path, root=tmp_path)


def test_a_lock_keeps_others_out_until_it_is_let_go(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no such locks on Windows")
    with held(tmp_path / "lock"), pytest.raises(Busy), held(tmp_path / "lock"):
        pass
    with held(tmp_path / "lock"):
        pass
