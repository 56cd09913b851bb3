"""How data sets are laid out: what each folder's splits are, and which folders are ambiguous."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from paqdetr.cli import run as cli
from paqdetr.data.dataset import open_split
from paqdetr.data.files import name_splits
from paqdetr.data.layout import available_splits, find_layout
from paqdetr.errors import DataError

Content = dict[str, list[str]]  # split -> stems of its images, each of which has one box of class "cat"


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), (sum(map(ord, path.stem)) % 256, 9, 9)).save(path)


def coco(file: Path, images: Path, stems: list[str], *, prefix: str = "") -> None:
    """One json, and its images in a folder."""
    for stem in stems:
        picture(images / f"{stem}.png")
    content = {
        "info": {},
        "images": [
            {"id": n, "file_name": f"{prefix}{stem}.png", "width": 32, "height": 24} for n, stem in enumerate(stems)
        ],
        "annotations": [{"image_id": n, "category_id": 1, "bbox": [2, 3, 8, 9]} for n in range(len(stems))],
        "categories": [{"id": 1, "name": "cat"}],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def voc(xml: Path, images: Path, stems: list[str]) -> None:
    for stem in stems:
        picture(images / f"{stem}.png")
        xml.mkdir(parents=True, exist_ok=True)
        frame = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>10</xmax><ymax>12</ymax></bndbox>"
        (xml / f"{stem}.xml").write_text(f"<annotation><object><name>cat</name>{frame}</object></annotation>")


def voc_lists(root: Path, lists: dict[str, str], folder: str = "ImageSets/Main") -> None:
    voc(root / "Annotations", root / "JPEGImages", list("abcd"))
    (root / folder).mkdir(parents=True)
    for name, stems in lists.items():
        (root / folder / f"{name}.txt").write_text("\n".join(stems.split()) if "\n" not in stems else stems)


def yolo(root: Path, folders: dict[str, str], yaml: str) -> None:
    """`folders`: folder of images -> stems."""
    for folder, stems in folders.items():
        for stem in stems:
            picture(root / folder / f"{stem}.png")
            label = root / folder.replace("images", "labels") / f"{stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(f"0 {6 / 32} {7.5 / 24} {8 / 32} {9 / 24}")
    (root / "data.yaml").write_text(f"{yaml}\nnames: [cat]\n")


LAYOUTS: dict[str, tuple[Callable[[Path], Any], Content]] = {
    # COCO
    "json of CVAT, capital names": (
        lambda r: [
            coco(r / f"annotations/instances_{name}.json", r / f"images/{name}", stems)
            for name, stems in (("Train", ["a", "b"]), ("Validation", ["c"]))
        ],
        {"train": ["a", "b"], "val": ["c"]},
    ),
    "json in folders with capitals": (
        lambda r: coco(r / "Annotations/instances_train2017.json", r / "Images/Train2017", ["a"]),
        {"train": ["a"]},
    ),
    "json of CVAT, one set": (
        lambda r: coco(r / "annotations/instances_default.json", r / "images", ["a", "b"]),
        {"train": ["a", "b"]},
    ),
    "json of CVAT, one set in a folder": (
        lambda r: coco(r / "annotations/instances_default.json", r / "images/default", ["a"]),
        {"train": ["a"]},
    ),
    "json of CVAT, merged images": (
        lambda r: [
            coco(r / f"annotations/instances_{name}.json", r / "images", stems)
            for name, stems in (("Train", ["a", "b"]), ("Test", ["c"]))
        ],
        {"train": ["a", "b"], "test": ["c"]},
    ),
    "json beside images, other case": (
        lambda r: [
            coco(r / "Train.json", r / "train", ["a"]),
            coco(r / "VALID.json", r / "Valid", ["b"]),
        ],
        {"train": ["a"], "val": ["b"]},
    ),
    "one json beside images": (
        lambda r: coco(r / "result.json", r / "images", ["a"], prefix="images/"),
        {"train": ["a"]},
    ),
    "one json among images": (lambda r: coco(r / "_annotations.coco.json", r, ["a", "b"]), {"train": ["a", "b"]}),
    "one json beside a folder of any name": (
        lambda r: coco(r / "labels.json", r / "photographs", ["a"]),
        {"train": ["a"]},
    ),
    "one json of a test set": (lambda r: coco(r / "test_annotations.json", r / "img", ["a"]), {"test": ["a"]}),
    "json for each split, one folder of images": (
        lambda r: [coco(r / f"{name}.json", r / "images", [stem]) for name, stem in (("train", "a"), ("val", "b"))],
        {"train": ["a"], "val": ["b"]},
    ),
    "json with names of their own": (
        lambda r: [
            coco(r / f"annotations/my_{name}_v2.json", r / "images", [stem])
            for name, stem in (("train", "a"), ("val", "b"))
        ],
        {"train": ["a"], "val": ["b"]},
    ),
    "a folder for each split with json and images": (
        lambda r: [
            coco(r / name / "labels.json", r / name / "data", [stem])
            for name, stem in (("train", "a"), ("validation", "b"))
        ],
        {"train": ["a"], "val": ["b"]},
    ),
    "json named otherwise than its folder of images": (
        lambda r: [
            coco(r / "train.json", r / "train", ["a"]),
            coco(r / "validation.json", r / "val", ["b"]),
            coco(r / "instances_test.json", r / "images" / "testing", ["c"]),
        ],
        {"train": ["a"], "val": ["b"], "test": ["c"]},
    ),
    "json of instances, and a folder that means the split": (
        lambda r: [
            coco(r / f"annotations/instances_{name}.json", r / f"images/{name}ing", [stem])
            for name, stem in (("train", "a"), ("test", "a"))
        ],
        {"train": ["a"], "test": ["a"]},
    ),
    "json beside images, another whose images are in images": (
        lambda r: [coco(r / "train.json", r / "train", ["a"]), coco(r / "val.json", r / "images", ["b"])],
        {"train": ["a"], "val": ["b"]},
    ),
    "json of instances, and one that is not called so": (
        lambda r: [
            coco(r / f"annotations/{name}.json", r / "images", [stem])
            for name, stem in (("instances_default", "a"), ("val", "b"))
        ],
        {"train": ["a"], "val": ["b"]},
    ),
    "json of Roboflow, and one that is not called so": (
        lambda r: [
            coco(r / name / file, r / name, [stem])
            for name, file, stem in (("train", "_annotations.coco.json", "a"), ("valid", "annotations.json", "b"))
        ],
        {"train": ["a"], "val": ["b"]},
    ),
    "json that is no split beside those that are": (
        lambda r: [
            coco(r / "annotations/instances_train2017.json", r / "train2017", ["a"]),
            *(coco(r / f"annotations/{name}.json", r / "train2017", ["a"]) for name in
              ("train", "trainval", "everything", "person_keypoints_val2017", "captions_val2017", "panoptic_val2017")),
            (r / "annotations/val_predictions.json").write_text("[]"),
            (r / "val.json").write_text('{"model": "x", "AP": 0.5}'),
        ],
        {"train": ["a"]},
    ),
    "json one folder down": (
        lambda r: [coco(r / "pets" / "train.json", r / "pets" / "train", ["a"]), (r / "__MACOSX").mkdir()],
        {"train": ["a"]},
    ),
    # Pascal VOC
    "lists with names of their own": (
        lambda r: voc_lists(r, {"my_train": "a b", "my_val": "c"}),
        {"train": ["a", "b"], "val": ["c"]},
    ),
    "lists in capitals": (
        lambda r: voc_lists(r, {"Train": "a", "Validation": "b c"}),
        {"train": ["a"], "val": ["b", "c"]},
    ),
    "lists of CVAT": (lambda r: voc_lists(r, {"default": "a b c"}), {"train": ["a", "b", "c"]}),
    "lists without Main": (
        lambda r: voc_lists(r, {"train": "a", "val": "b"}, "ImageSets"),
        {"train": ["a"], "val": ["b"]},
    ),
    "lists of single classes": (
        lambda r: voc_lists(r, {"train": "a b", "val": "c", "cat_train": "a  1\nb -1\n"}),
        {"train": ["a", "b"], "val": ["c"]},
    ),
    "lists whose names look like those of a single class": (
        lambda r: [
            voc(r / "Annotations", r / "JPEGImages", ["photo 1", "photo_2"]),
            voc_lists(r, {"train": "photo_2", "val": "photo 1\n", "minival": "photo 1\nphoto_2\n"}),
        ],
        {"train": ["photo_2"], "val": ["photo 1"], "minival": ["photo 1", "photo_2"]},
    ),
    "another list beside the usual ones": (
        lambda r: voc_lists(r, {"train": "a b", "val": "c", "train_small": "a"}),
        {"train": ["a", "b"], "val": ["c"], "train_small": ["a"]},
    ),
    "a list of train and val together": (
        lambda r: voc_lists(r, {"trainval": "a b c", "val": "c", "test": "d"}),
        {"train": ["a", "b"], "val": ["c"], "test": ["d"]},
    ),
    "xml in annotations": (lambda r: voc(r / "annotations", r / "images", ["a", "b"]), {"train": ["a", "b"]}),
    "xml in annotations/xmls": (lambda r: voc(r / "annotations/xmls", r / "images", ["a"]), {"train": ["a"]}),
    "xml in labels": (lambda r: voc(r / "Labels", r / "Images", ["a"]), {"train": ["a"]}),
    "xml in folders of splits": (
        lambda r: [voc(r / f"annotations/{s}", r / f"images/{s.lower()}", [s]) for s in ("Train", "Val")],
        {"train": ["Train"], "val": ["Val"]},
    ),
    "xml in folders of splits, merged images": (
        lambda r: [voc(r / f"annotations/{s}", r / "images", [s]) for s in ("train", "test")],
        {"train": ["train"], "test": ["test"]},
    ),
    "folders of splits with images and annotations": (
        lambda r: [voc(r / s / "annotations", r / s / "images", [s]) for s in ("train", "valid")],
        {"train": ["train"], "val": ["valid"]},
    ),
    "xml among images": (lambda r: voc(r, r, ["a", "b"]), {"train": ["a", "b"]}),
    "two years": (
        lambda r: [voc_lists(r / f"VOC{year}", {"train": "a b", "val": "c"}) for year in (2007, 2012)],
        {"train": ["a", "b"], "val": ["c"], "train2007": ["a", "b"], "val2007": ["c"]},
    ),
    "xml one folder down": (lambda r: voc_lists(r / "kit", {"train": "a", "val": "b"}), {"train": ["a"], "val": ["b"]}),
    # YOLO
    "yaml with keys of other spellings": (
        lambda r: yolo(r, {"images/a": "ab", "images/b": "c"}, "Train: images/a\nvalidation: images/b"),
        {"train": ["a", "b"], "val": ["c"]},
    ),
    "yaml with valid": (
        lambda r: yolo(r, {"train/images": "a", "valid/images": "b"}, "train: train/images\nvalid: valid/images\ntest:"),
        {"train": ["a"], "val": ["b"]},
    ),
    "yaml beside images": (lambda r: yolo(r, {".": "ab"}, "train: ."), {"train": ["a", "b"]}),
    "yaml beside images, with its own absolute path": (lambda r: yolo(r, {"": "ab"}, f"train: {r}"), {"train": ["a", "b"]}),
    "yaml of Windows": (
        lambda r: yolo(r, {"a/x/images": "a", "a/y/images": "b"}, "path: .\\a\ntrain: x\\images\nval: ..\\y\\images"),
        {"train": ["a"], "val": ["b"]},
    ),
    "yaml of one set": (lambda r: yolo(r, {"images": "ab"}, "default: images"), {"train": ["a", "b"]}),
    "yaml one folder down": (lambda r: yolo(r / "export", {"images": "a"}, "train: images"), {"train": ["a"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(tmp_path: Path, name: str) -> None:
    make, expected = LAYOUTS[name]
    make(tmp_path)
    assert available_splits(tmp_path) == list(expected)
    for split, stems in expected.items():
        opened = open_split(tmp_path, split)
        assert [Path(file).stem for file in opened.file_names] == stems
        assert [opened.boxes(index).tolist() for index in range(len(opened))] == [[[2, 3, 10, 12]]] * len(stems)


AMBIGUOUS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "json: val and valid": (
        lambda r: [coco(r / s / "_annotations.coco.json", r / s, [s]) for s in ("train", "val", "valid")],
        "'val' and 'valid' mean the same split, 'val'",
    ),
    "json: two files of one split": (
        lambda r: [coco(r / "train.json", r / "train", ["a"]), coco(r / "train" / "_annotations.coco.json", r / "train", ["a"])],
        "train.json and .*_annotations.coco.json mean the same split, 'train'",
    ),
    "json: Train and train": (
        lambda r: [coco(r / f"annotations/instances_{s}.json", r / "images", [s]) for s in ("Train", "train")],
        "'Train' and 'train' mean the same split, 'train'",
    ),
    "xml: val and validation": (
        lambda r: [voc(r / s, r / s, [s]) for s in ("train", "val", "validation")],
        "'val' and 'validation' mean the same split, 'val'",
    ),
    "xml: two lists to train on": (
        lambda r: voc_lists(r, {"my_train": "a", "your_train": "b"}),
        "'my_train' and 'your_train' mean the same split, 'train'",
    ),
    "xml: files beside the folders of splits": (
        lambda r: [voc(r / "annotations/train", r / "images/train", ["a"]), voc(r / "annotations", r / "images", ["b"])],
        "annotations: holds XML files beside the folders of the splits train",
    ),
    "yaml: val and valid": (
        lambda r: yolo(r, {"images": "a"}, "train: images\nval: images\nvalid: images"),
        "'val' and 'valid' mean the same split, 'val'",
    ),
    "yaml: two files": (
        lambda r: [yolo(r, {"images": "a"}, "train: images"), (r / "data.yaml").rename(r / "x.yaml"),
                   shutil.copy(r / "x.yaml", r / "y.yaml")],
        "x.yaml and y.yaml describe data sets",
    ),
    "cityscapes: val and Valid": (
        lambda r: [(r / "gtFine" / s).mkdir(parents=True) for s in ("train", "val", "Valid")],
        "'Valid' and 'val' mean the same split, 'val'",
    ),
    "several data sets one folder down": (
        lambda r: [coco(r / s / "train.json", r / s / "train", ["a"]) for s in ("cats", "dogs")],
        "holds several data sets, cats, dogs",
    ),
    "yolo without a yaml": (
        lambda r: [yolo(r, {"images": "a"}, ""), (r / "data.yaml").unlink()],
        "has YOLO's `labels` and `images`, but there is no data.yaml",
    ),
    "yolo of Label Studio": (
        lambda r: [yolo(r, {"images": "a"}, ""), (r / "data.yaml").unlink(),
                   (r / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}], "info": {"year": 2024}}')],
        "has YOLO's `labels` and `images`, but there is no data.yaml",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_layouts_are_an_error_that_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, message = AMBIGUOUS[name]
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        find_layout(tmp_path)
    assert cli(["data", "check", str(tmp_path)]) == 2
    assert f"help: {caught.value.remedy}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Train", "VAL", "Testing"], {"train": "Train", "val": "VAL", "test": "Testing"}),
        (["my_train", "my-valid", "my.test.2"], {"train": "my_train", "val": "my-valid", "test": "my.test.2"}),
        (["train2017", "val2014", "val2017"], {"train": "train2017", "val": "val2017", "val2014": "val2014"}),
        (["train", "train_aug", "minival"], {"train": "train", "minival": "minival", "train_aug": "train_aug"}),
        (["default"], {"train": "default"}),
        (["TrainVal", "test"], {"train": "TrainVal", "test": "test"}),
        (["trainval", "train"], {"train": "train", "trainval": "trainval"}),
        (["cats"], {"train": "cats"}),
        (["cats", "dogs"], {"cats": "cats", "dogs": "dogs"}),
        (["train_val", "test"], {"train": "train_val", "test": "test"}),
    ],
)
def test_names_of_splits(names: list[str], expected: dict[str, str]) -> None:
    found = name_splits({name: name for name in names}, Path("x"))
    assert found == expected and list(found) == list(expected)


def test_a_split_is_asked_for_by_any_of_its_names(tmp_path: Path) -> None:
    for name, stem in (("train", "a"), ("valid", "b")):
        coco(tmp_path / f"{name}.json", tmp_path / name, [stem])
    for name in ("val", "valid", "Validation"):
        assert list(open_split(tmp_path, name).file_names) == ["b.png"]


def test_images_of_another_split_are_not_taken_for_those_that_are_missing(tmp_path: Path) -> None:
    """Every split begins with 000000.jpg."""
    coco(tmp_path / "train.json", tmp_path / "train2017", ["a"])
    coco(tmp_path / "val.json", tmp_path / "elsewhere", ["a"])
    assert open_split(tmp_path, "val").annotations.image_dir == tmp_path / "elsewhere"
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"a\.png: missing, though .*val\.json lists it"):
        open_split(tmp_path, "val")


def test_without_train_the_help_is_to_rename(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        coco(tmp_path / f"{name}.json", tmp_path / name, ["a"])
    with pytest.raises(DataError, match="has no split 'train', found cats, dogs") as caught:
        open_split(tmp_path, "train")
    assert caught.value.remedy == "Rename one of them to 'train'."
