"""What goes into a conversion comes out of it: exactly, and the same for training and evaluation."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paqdetr.cli import run as cli
from paqdetr.config import load_config
from paqdetr.data.convert import convert_dataset
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits, find_layout
from paqdetr.data.loader import Batch, training_loader
from paqdetr.errors import ConfigError, DataError
from paqdetr.metrics import evaluate_detections
from paqdetr.preprocessing import Normalization, Preprocessing

TARGETS = ("coco", "voc", "yolo")


def same(one: DetectionDataset, other: DetectionDataset) -> None:
    """Everything detection uses, to the last bit."""
    assert other.classes == one.classes
    assert other.image_ids == one.image_ids and other.file_names == one.file_names
    assert np.array_equal(other.sizes, one.sizes)
    for index in range(len(one)):
        assert np.array_equal(other.boxes(index), one.boxes(index))
        assert np.array_equal(other.labels(index), one.labels(index))
        assert other.path(index).read_bytes() == one.path(index).read_bytes()
    mine, its = one.ground_truth(), other.ground_truth()
    assert its["images"] == mine["images"] and its["categories"] == mine["categories"]

    def rows(truth: dict[str, Any]) -> list[tuple[Any, ...]]:
        keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
        return sorted(tuple(str(a[key]) for key in keys) for a in truth["annotations"])

    assert rows(its) == rows(mine)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO with everything the other formats have no words for."""
    root = tmp_path_factory.mktemp("source") / "coco"
    rng = np.random.default_rng(0)
    categories = [
        {"id": i, "name": name} for i, name in ((90, "zebra"), (0, "a b"), (13, "unused"), (7, "m & n"))
    ]
    for split, own in (("train", [5, "x/y", 3]), ("val", [10**12])):
        images, annotations = [], []
        for number, image_id in enumerate(own):
            name = f"{'sub/' if number == 1 else ''}{9 - number}.jpg"
            width, height = int(rng.integers(30, 90)), int(rng.integers(30, 90))
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / split / name)
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for _ in range(4 * (number != 2)):
                x, y = rng.uniform(-3, 20, 2).round(2).tolist()
                w, h = rng.uniform(4, 40, 2).round(2).tolist()
                row = {"image_id": image_id, "category_id": int(rng.choice([90, 0, 7])), "bbox": [x, y, w, h]}
                row["iscrowd"] = int(rng.random() < 0.3)
                if rng.random() < 0.6:
                    row["area"] = round(w * h * 0.61, 3)
                annotations.append({"id": len(annotations), **row})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    for to in TARGETS:
        convert_dataset(source, folder / to, to=to)
    return {to: folder / to for to in TARGETS}


@pytest.mark.parametrize("to", TARGETS)
def test_nothing_is_lost(source: Path, converted: dict[str, Path], to: str) -> None:
    assert find_layout(converted[to]).format == to
    assert available_splits(converted[to]) == ["train", "val"]
    for split in ("train", "val"):
        same(open_split(source, split), open_split(converted[to], split))
    assert sum(a["iscrowd"] for a in open_split(source, "train").ground_truth()["annotations"]) > 0


@pytest.mark.parametrize(("first", "second"), list(itertools.product(TARGETS, repeat=2)))
def test_nor_on_the_way_back(
    source: Path, converted: dict[str, Path], tmp_path: Path, first: str, second: str
) -> None:
    convert_dataset(converted[first], tmp_path / "x", to=second)
    convert_dataset(tmp_path / "x", tmp_path / "back", to="coco")
    for split in ("train", "val"):
        same(open_split(source, split), open_split(tmp_path / "back", split))


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("form", ["coco", "voc", "yolo", "cityscapes", "crowdhuman"])
def test_from_every_format(tiny_data: dict[str, Path], tmp_path: Path, form: str, to: str) -> None:
    done = convert_dataset(tiny_data[form], tmp_path / "out", to=to)
    assert (done.format, done.images, done.boxes, done.masks) == (
        form,
        {"train": 3, "val": 1},
        {"train": 3, "val": 1},
        0,
    )
    for split in ("train", "val"):
        same(open_split(tiny_data[form], split), open_split(tmp_path / "out", split))


def test_folders_called_images(source: Path, tmp_path: Path) -> None:
    """YOLO finds labels by that word in the path."""
    (tmp_path / "in" / "train" / "images").mkdir(parents=True)
    for name in ("images/9.jpg", "8.jpg"):
        shutil.copy(source / "train" / "9.jpg", tmp_path / "in" / "train" / name)
    content = json.loads((source / "train.json").read_text())
    image = content["images"][0]
    content["images"] = [image | {"file_name": "images/9.jpg"}, image | {"file_name": "8.jpg", "id": 1}]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == image["id"]]
    (tmp_path / "in" / "train.json").write_text(json.dumps(content))
    for to in TARGETS:
        convert_dataset(tmp_path / "in", tmp_path / to, to=to)
        same(open_split(tmp_path / "in", "train"), open_split(tmp_path / to, "train"))


COORDINATES = st.floats(-20, 100).map(lambda value: round(value, 4))
SIDES = st.floats(0.01, 90).map(lambda value: round(value, 4))


@settings(max_examples=80, deadline=None)
@given(
    boxes=st.lists(st.tuples(COORDINATES, COORDINATES, SIDES, SIDES), min_size=1, max_size=4),
    to=st.sampled_from(TARGETS),
)
def test_any_box_of_some_decimals_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, boxes: list[tuple[float, ...]], to: str
) -> None:
    root = tmp_path_factory.mktemp("box")
    (root / "in" / "train").mkdir(parents=True)
    Image.new("RGB", (97, 61)).save(root / "in" / "train" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 97, "height": 61}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": list(box)} for box in boxes],
    }
    (root / "in" / "train.json").write_text(json.dumps(content))
    convert_dataset(root / "in", root / "out", to=to)
    truth = open_split(root / "out", "train").ground_truth()
    assert [tuple(a["bbox"]) for a in truth["annotations"]] == boxes
    shutil.rmtree(root)


def batches(root: Path) -> list[Batch]:
    preprocessing = Preprocessing(64, 32, Normalization(mean=(127.0,) * 3, std=(128.0,) * 3))
    config = load_config("paq_dino_nano", {"batch_size": 2, "workers": 0})
    loader, sampler = training_loader(config, open_split(root, "train"), preprocessing)
    found = []
    for sampler.epoch in range(3):
        found += list(loader)
    return found


def test_training_sees_the_same(source: Path, converted: dict[str, Path]) -> None:
    expected = batches(source)
    for root in converted.values():
        for one, other in zip(expected, batches(root), strict=True):
            assert torch.equal(one.images, other.images)
            for mine, its in zip(one.targets, other.targets, strict=True):
                assert torch.equal(mine.boxes, its.boxes) and torch.equal(mine.labels, its.labels)
                assert mine.image_id == its.image_id and mine.size == its.size


def test_ap_is_the_same(source: Path, converted: dict[str, Path]) -> None:
    truth = open_split(source, "train").ground_truth()
    rng = np.random.default_rng(1)
    results = [
        {
            "image_id": row["image_id"],
            "category_id": row["category_id"],
            "bbox": (np.array(row["bbox"]) + rng.normal(0, 2, 4)).clip(0.1).tolist(),
            "score": float(rng.random()),
        }
        for row in truth["annotations"] * 3
    ]
    expected = evaluate_detections(source / "train.json", results).to_json()
    assert 0 < expected["AP"] < 1
    for root in converted.values():
        assert evaluate_detections(open_split(root, "train").ground_truth(), results).to_json() == expected


def test_a_model_has_the_same_ap(tiny_digits: Path, tiny_run: Any, tmp_path: Path) -> None:
    from paqdetr.engine.evaluate import evaluate
    from paqdetr.models import load

    model = load(tiny_run.best)
    found = {"coco": evaluate(model, data=tiny_digits)}
    for to in ("voc", "yolo"):
        convert_dataset(tiny_digits, tmp_path / to, to=to)
        found[to] = evaluate(model, data=tmp_path / to)
    for to in ("voc", "yolo"):
        assert found[to].results == found["coco"].results
        assert found[to].figures.to_json() == found["coco"].figures.to_json()


@pytest.mark.usefixtures("no_pictures", "one_thread")
def test_a_training_is_the_same(tiny_digits: Path, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """The door that `paqdetr train --data` goes through, with a folder and with a data.yaml."""
    from paqdetr.engine import train

    convert_dataset(tiny_digits, tmp_path / "yolo", to="yolo")
    settings = tiny_settings | {"augment.mosaic": 0.5, "augment.keep_small": 12.0, "augment.color": 0.2}
    records = []
    for number, data in enumerate((tiny_digits, tmp_path / "yolo" / "data.yaml")):
        output = tmp_path / f"run{number}"
        run = train("paq_dino_nano", data=data, output=output, device="cpu", epochs=1, settings=settings)
        kept = [{k: v for k, v in row.items() if k.startswith("loss") or k == "AP"} for row in run.records()]
        records.append([row for row in kept if row])
    assert records[0] == records[1] and len(records[0]) == 3


def test_without_the_side_file_the_boxes_are_the_same(
    source: Path, converted: dict[str, Path], tmp_path: Path
) -> None:
    """Other programs know nothing of it: what they read must be right too."""
    expected = open_split(source, "val")
    named = [
        (expected.classes.names[i], box)
        for i, box in zip(expected.labels(0), expected.boxes(0).tolist(), strict=True)
    ]
    for to in ("voc", "yolo"):
        root = Path(shutil.copytree(converted[to], tmp_path / to))
        (root / "paqdetr.json").unlink()
        found = open_split(root, "val")
        assert found.image_ids == ["9.jpg"]
        assert [
            (found.classes.names[i], b) for i, b in zip(found.labels(0), found.boxes(0).tolist(), strict=True)
        ] == named


# ---------------------------------------------------------------------------------------------- mistakes


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(DataError, match="is there already, and nothing is overwritten"):
            convert_dataset(source, target, to="yolo")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="found 'createml', expected coco, voc or yolo"):
        convert_dataset(source, tmp_path / "x", to="createml")


def failing(source: Path, tmp_path: Path, to: str, change: Any) -> str:
    """The error's message; no trace of the attempt is left."""
    root = Path(shutil.copytree(source, tmp_path / "in"))
    content = json.loads((root / "train.json").read_text())
    change(root, content)
    (root / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        convert_dataset(root, tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    return caught.value.message


def test_what_a_format_cannot_hold_is_named(source: Path, tmp_path: Path) -> None:
    def far(root: Path, content: Any) -> None:
        content["annotations"][0] |= {"bbox": [900, 1, 5, 5], "iscrowd": 0}

    assert "yolo cannot hold this data: labels/train/9.txt" in failing(source, tmp_path, "yolo", far)


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    for to in TARGETS:
        with pytest.raises(DataError, match="out: cannot be written: No space left on device"):
            convert_dataset(source, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_images_that_share_a_label_file(source: Path, tmp_path: Path) -> None:
    def twin(root: Path, content: Any) -> None:
        shutil.copy(root / "train" / "9.jpg", root / "train" / "9.png")
        content["images"].append(content["images"][0] | {"id": 77, "file_name": "9.png"})

    assert "differs in its ending alone" in failing(source, tmp_path, "voc", twin)


def test_classes_of_one_name(source: Path, tmp_path: Path) -> None:
    def twins(root: Path, content: Any) -> None:
        for category in content["categories"]:
            category["name"] = "one"
        other = json.loads((root / "val.json").read_text()) | {"categories": content["categories"]}
        (root / "val.json").write_text(json.dumps(other))

    assert "two categories have the same name" in failing(source, tmp_path, "yolo", twins)


def test_splits_of_other_classes(source: Path, tmp_path: Path) -> None:
    def fewer(root: Path, content: Any) -> None:
        content["categories"] = [c for c in content["categories"] if c["name"] != "unused"]

    assert "has other categories than" in failing(source, tmp_path, "voc", fewer)


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["data", "convert", str(source), str(tmp_path / "voc"), "--to", "voc", "--link"]) == 0
    assert "voc from coco: train 3 images 8 boxes, val 1 images 4 boxes" in capsys.readouterr().out
    image = "JPEGImages/train/9.jpg"
    assert (tmp_path / "voc" / image).stat().st_ino == (source / "train" / "9.jpg").stat().st_ino
    assert cli(["data", "convert", str(source), str(tmp_path / "voc"), "--to", "voc"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
