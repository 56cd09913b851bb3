from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits
from paqdetr.errors import DataError

CONTENT: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "b.png", "width": 20, "height": 10},
        {"id": "x", "file_name": "sub/a.png", "width": 8.0, "height": 8},
        {"id": 3, "file_name": "c.png", "width": 5, "height": 5},
    ],
    "annotations": [
        {"id": 1, "image_id": "x", "category_id": 90, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 7, "category_id": 0, "bbox": [-2, 1.5, 30, 4], "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 4, "bbox": [0, 0, 20, 10], "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 4, "bbox": [3, 3, 0, 5]},
        {"id": 5, "image_id": 7, "category_id": 4, "bbox": [25, 3, 5, 5]},
        {"id": 6, "image_id": "x", "category_id": 4, "bbox": [0, 0, 8, 8]},
    ],
    "categories": [{"id": 90, "name": "z"}, {"id": 0, "name": "a"}, {"id": 4, "name": "m"}],
}


def write(annotations: Path, images: Path, content: object = CONTENT) -> None:
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    (images / "sub").mkdir(parents=True, exist_ok=True)
    for entry in CONTENT["images"]:
        Image.new("RGB", (int(entry["width"]), entry["height"])).save(images / entry["file_name"])


def read(tmp_path: Path, content: object) -> DetectionDataset:
    write(tmp_path / "train.json", tmp_path / "train", content)
    return open_split(tmp_path, "train")


def test_images_boxes_and_labels_by_position(tmp_path: Path) -> None:
    data = read(tmp_path, CONTENT)
    assert len(data) == 3 and data.name == "train"
    assert data.image_ids == [7, "x", 3]
    assert data.sizes.tolist() == [[10, 20], [8, 8], [5, 5]] and data.sizes.dtype == np.int64
    assert data.classes.ids == (0, 4, 90) and data.classes.names == ("a", "m", "z")
    assert data.boxes(0).tolist() == [[0, 1.5, 20, 5.5]] and data.labels(0).tolist() == [0]
    assert data.boxes(1).tolist() == [[1, 2, 4, 6], [0, 0, 8, 8]] and data.labels(1).tolist() == [2, 1]
    assert data.boxes(2).shape == (0, 4) and data.labels(2).shape == (0,)
    assert data.boxes(2).dtype == np.float32 and data.labels(2).dtype == np.int64
    assert data.skipped == 3
    assert data.path(1) == tmp_path / "train" / "sub" / "a.png"
    assert data.image(0).size == (20, 10)
    assert data.labels(-1).shape == (0,)
    with pytest.raises(IndexError):
        data.boxes(3)


def test_callers_cannot_change_the_data(tmp_path: Path) -> None:
    data = read(tmp_path, CONTENT)
    data.boxes(1)[:] = 0
    assert data.boxes(1).tolist() == [[1, 2, 4, 6], [0, 0, 8, 8]]


def test_no_annotations_at_all(tmp_path: Path) -> None:
    data = read(tmp_path, {**CONTENT, "annotations": []})
    assert [len(data.boxes(i)) for i in range(3)] == [0, 0, 0]


def test_layout_of_coco(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / "annotations" / f"instances_{split}2017.json", tmp_path / f"{split}2017")
    assert available_splits(tmp_path) == ["train", "val"]
    assert open_split(tmp_path, "val").path(0) == tmp_path / "val2017" / "b.png"


def test_layout_of_coco_with_two_years(tmp_path: Path) -> None:
    for split in ("val2014", "val2017"):
        write(tmp_path / "annotations" / f"instances_{split}.json", tmp_path / "images" / split)
    assert available_splits(tmp_path) == ["val", "val2014"]
    assert open_split(tmp_path, "val").image_dir.name == "val2017"


def test_layout_of_roboflow(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path / split / "_annotations.coco.json", tmp_path / split)
    assert available_splits(tmp_path) == ["train", "val", "test"]
    for name in ("val", "valid"):
        assert open_split(tmp_path, name).image_dir == tmp_path / "valid"


def test_folders_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        available_splits(tmp_path / "absent")
    with pytest.raises(DataError, match="is empty"):
        available_splits(tmp_path)
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match="no data set of a known layout"):
        open_split(tmp_path, "train")
    with pytest.raises(DataError, match="is a file"):
        open_split(tmp_path / "readme.txt", "train")


def test_missing_split_names_those_that_exist(tmp_path: Path) -> None:
    read(tmp_path, CONTENT)
    with pytest.raises(DataError, match="no split 'test', found train"):
        open_split(tmp_path, "test")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json: no such file"):
        DetectionDataset.from_json(tmp_path / "absent.json", tmp_path)
    data = read(tmp_path, CONTENT)
    data.path(2).unlink()
    with pytest.raises(
        DataError, match=r"c\.png: missing, though .*train\.json lists it \(1 of 3 images are missing\)"
    ):
        open_split(tmp_path, "train")
