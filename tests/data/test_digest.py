"""A resumption notices that its data are not those that the run was started with, and says what is different."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from paqdetr.data.dataset import open_split
from paqdetr.data.digest import DataDigest, SplitDigest, data_changes

Content = dict[str, Any]


def digest(root: Path) -> DataDigest:
    return {name: SplitDigest.of(open_split(root, name)) for name in ("train", "val")}


def changed_json(split: str, change: Callable[[Content], object]) -> Callable[[Path], object]:
    def apply(root: Path) -> None:
        file = root / f"{split}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def move_box(content: Content) -> None:
    content["annotations"][0]["bbox"][0] += 0.5


def relabel(content: Content) -> None:
    first = content["annotations"][0]
    first["category_id"] = first["category_id"] % 10 + 1


def swap_names(content: Content) -> None:
    """Boxes of the first two images change places."""
    one, two = content["images"][:2]
    one["file_name"], two["file_name"] = two["file_name"], one["file_name"]


def drop_image(content: Content) -> None:
    ident = content["images"].pop(2)["id"]
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != ident]


def add_image(root: Path) -> None:
    shutil.copy(root / "train" / "000000.jpg", root / "train" / "new.jpg")
    new = {"id": 99, "file_name": "new.jpg", "width": 96, "height": 96}
    changed_json("train", lambda content: content["images"].append(new))(root)


def replace_picture(root: Path) -> None:
    Image.new("RGB", (96, 96)).save(root / "train" / "000003.jpg")


def rename_class(content: Content) -> None:
    content["categories"][2]["name"] = "drei"


def add_class(content: Content) -> None:
    content["categories"].append({"id": 11, "name": "ten"})


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a box moved": (changed_json("train", move_box), "train: 1 image with other boxes (000000.jpg)"),
    "a box of another class": (changed_json("train", relabel), "train: 1 image with other boxes (000000.jpg)"),
    "an annotation dropped": (
        changed_json("val", lambda content: content["annotations"].pop()),
        "val: 1 image with other boxes (000003.jpg)",
    ),
    "a crowd": (
        changed_json("train", lambda content: content["annotations"][0].update(iscrowd=1)),
        "train: 1 image with other boxes (000000.jpg)",
    ),
    "names swapped": (
        changed_json("train", swap_names),
        "train: 2 images with other boxes (000001.jpg), images in another order",
    ),
    "another order": (
        changed_json("train", lambda content: content["images"].reverse()),
        "train: images in another order",
    ),
    "an image removed": (changed_json("train", drop_image), "train: 1 image removed"),
    "an image added": (add_image, "train: 1 image added (new.jpg)"),
    "another picture": (replace_picture, "train: 1 image of another size in bytes (000003.jpg)"),
    "a class renamed": (changed_json("val", rename_class), "val: class 3 is 'drei', was '2'"),
    "a class added": (changed_json("train", add_class), "train: class 11 is 'ten', was none"),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_changes_are_named(tmp_path: Path, tiny_digits: Path, change: Callable[[Path], object], expected: str) -> None:
    root = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    before = digest(root)
    assert data_changes(before, digest(root)) == ""
    change(root)
    assert data_changes(before, digest(root)) == expected


def test_the_folder_and_the_annotation_file_s_look_do_not_matter(tmp_path: Path, tiny_digits: Path) -> None:
    root = Path(shutil.copytree(tiny_digits, tmp_path / "elsewhere"))
    content = json.loads((root / "train.json").read_text())
    content["info"] = {"description": "copied"}
    (root / "train.json").write_text(json.dumps(content, indent=2))
    assert data_changes(digest(tiny_digits), digest(root)) == ""


def test_a_split_that_comes_or_goes(tiny_digits: Path) -> None:
    both = digest(tiny_digits)
    train = {"train": both["train"]}
    assert data_changes(train, both) == "val: the split is new"
    assert data_changes(both, train) == "val: the split is gone"


def test_an_image_that_is_listed_twice(tiny_digits: Path) -> None:
    one = digest(tiny_digits)["train"]
    again = SplitDigest(one.classes, torch.cat([one.images, one.images[:1]]), [*(one.file_names or []), "a"])
    assert list(again.changes_from(one)) == ["images are listed more or less often than before"]
