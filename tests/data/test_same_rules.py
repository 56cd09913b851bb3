"""Rules that hold in every format: names of files, links, flags, ids, byte order marks."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paqdetr.data.annotations import Issues, Problem
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import find_split
from paqdetr.errors import DataError
from paqdetr.values import as_flag, as_id

FORMATS = ("coco", "voc", "yolo", "cityscapes", "crowdhuman")
# Where each format has the pictures of train and the annotations of image a.
PICTURES = {
    "coco": "train",
    "voc": "JPEGImages",
    "yolo": "images/train",
    "cityscapes": "leftImg8bit/train/ulm",
    "crowdhuman": "Images",
}
ANNOTATIONS = {
    "coco": "train.json",
    "voc": "Annotations/a.xml",
    "yolo": "labels/train/a.txt",
    "cityscapes": "gtFine/train/ulm/a_gtFine_polygons.json",
    "crowdhuman": "annotation_train.odgt",
}


@pytest.fixture
def copy_of(tiny_data: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda form: Path(shutil.copytree(tiny_data[form], tmp_path / form))


def checked(root: Path, split: str = "train") -> list[Problem]:
    """What the check finds while it reads."""
    issues = Issues(collect=True, split=split)
    find_split(root, split).read(issues)
    return issues.found


def box_counts(root: Path) -> dict[str, int]:
    train = open_split(root, "train")
    return {
        Path(name).name.split(".")[0].removesuffix("_leftImg8bit"): len(train.boxes(index))
        for index, name in enumerate(train.file_names)
    }


def edit(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ file names


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_name_finds_its_file_in_any_unicode_form(copy_of: Any, form: str, on_disk: Any) -> None:
    """Annotations and pictures in different forms; é is one character in NFC and two in NFD."""
    root = copy_of(form)
    picture, text = (unicodedata.normalize(kind, "é") for kind in (on_disk, "NFD" if on_disk == "NFC" else "NFC"))
    for path in list((root / PICTURES[form]).iterdir()):
        if path.name.startswith("a"):
            path.rename(path.with_name(path.name.replace("a", picture, 1)))
    if form in ("coco", "crowdhuman"):
        edit(root / ANNOTATIONS[form], '"a', f'"{text}')
    else:
        path = root / ANNOTATIONS[form]
        path.rename(path.with_name(path.name.replace("a", text, 1)))
    if form == "voc":
        edit(root / "ImageSets/Main/train.txt", "a\n", f"{text}\n")
    train = open_split(root, "train")
    index = next(i for i, name in enumerate(train.file_names) if picture in name)
    assert len(train.boxes(index)) == 2 and train.path(index).exists() and len(train) == 3


@pytest.mark.parametrize("name", ["._b.png", "__MACOSX/b.png", "__MACOSX/._a.png"])
@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_leftovers_in_folders_are_skipped_and_counted(copy_of: Any, form: str, name: str) -> None:
    root = copy_of(form)
    (root / "ImageSets/Main/train.txt").unlink(missing_ok=True)  # all pictures count then
    (root / "ImageSets/Main/val.txt").unlink(missing_ok=True)
    expected = box_counts(root)
    for ending in (PICTURES[form], str(Path(ANNOTATIONS[form]).parent)):
        leftover = root / ending / name
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_bytes(b"\x00\x05\x16\x07")
        leftover.with_suffix(Path(ANNOTATIONS[form]).suffix).write_bytes(b"\x00\x05\x16\x07")
    assert box_counts(root) == expected
    found = checked(root)
    assert {problem.kind for problem in found} == {"skipped file"} and found[0].severity == "warning"


@pytest.mark.parametrize("form", FORMATS)
def test_leftovers_in_archives_of_any_format(copy_of: Any, form: str) -> None:
    root = copy_of(form)
    expected = box_counts(root)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\xff")
    shutil.copytree(root, root / "__MACOSX")
    assert box_counts(root) == expected


@pytest.mark.parametrize("name", ["._b.png", "__MACOSX/b.png", "sub/._b.png"])
@pytest.mark.parametrize("form", ["coco", "yolo", "voc", "crowdhuman"])
def test_leftovers_that_annotations_list_are_skipped(copy_of: Any, form: str, name: str) -> None:
    root = copy_of(form)
    stem = name.removesuffix(".png")
    if form == "coco":
        edit(root / "train.json", '"b.png"', f'"{name}"')
    elif form == "yolo":
        (root / "list.txt").write_text(f"images/train/a.png\nimages/train/c.png\nimages/train/{name}\n")
        edit(root / "data.yaml", "images/train", "list.txt")
    elif form == "voc":
        edit(root / "ImageSets/Main/train.txt", "b\n", f"{stem}\n")
    else:
        edit(root / "annotation_train.odgt", '"b"', f'"{stem}"')
    assert box_counts(root) == {"a": 2, "c": 0}
    assert [problem.kind for problem in checked(root)] == ["skipped file"]


@pytest.mark.parametrize("name", ["b.gif", "sub/x.HEIC", "y.jxl"])
@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_pictures_that_are_not_read_are_counted(copy_of: Any, form: str, name: str) -> None:
    root = copy_of(form)
    (root / PICTURES[form] / name).parent.mkdir(exist_ok=True)
    (root / PICTURES[form] / name).write_bytes(b"")
    ((subject, message),) = [(p.subject, p.message) for p in checked(root) if p.kind == "skipped file"]
    assert subject.endswith(name) and message.startswith("left out: only .bmp, .jpeg, ")


@pytest.mark.parametrize("name", ["zebra.txt", "sub/a.txt", "a.b.txt"])
def test_label_files_without_an_image_are_counted(copy_of: Any, name: str) -> None:
    root = copy_of("yolo")
    (root / "labels/train" / name).parent.mkdir(exist_ok=True)
    (root / "labels/train" / name).write_text("0 .5 .5 .1 .1")
    (root / "labels/train/classes.txt").write_text("person")
    (problem,) = checked(root)
    assert problem.subject.endswith(name) and problem.kind == "skipped file"
    assert problem.message == "left out: no image is called like it"


@pytest.mark.parametrize("form", FORMATS)
def test_a_byte_order_mark_does_no_harm(copy_of: Any, form: str) -> None:
    root = copy_of(form)
    expected = box_counts(root)
    texts = [p for p in root.rglob("*") if p.suffix in (".json", ".xml", ".txt", ".yaml", ".odgt")]
    for path in texts:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert texts and box_counts(root) == expected


# ----------------------------------------------------------------------------------------------------- links


def link_folder(root: Path, form: str, tmp_path: Path) -> None:
    """Image a, and its annotations where they lie beside, move behind links to folders elsewhere."""
    folders = [PICTURES[form]]
    if form != "coco" and form != "crowdhuman":
        folders.append(str(Path(ANNOTATIONS[form]).parent))
    for number, folder in enumerate(folders):
        away = tmp_path / f"away{number}"
        away.mkdir()
        for path in list((root / folder).iterdir()):
            if path.name.startswith("a"):
                path.rename(away / path.name)
        (root / folder / "linked").symlink_to(away, target_is_directory=True)


@pytest.mark.parametrize("form", FORMATS)
def test_links_to_folders_are_followed(copy_of: Any, tmp_path: Path, form: str) -> None:
    root = copy_of(form)
    expected = box_counts(root)
    link_folder(root, form, tmp_path)
    if form == "coco":
        edit(root / "train.json", '"a.png"', '"linked/a.png"')
    elif form == "crowdhuman":
        edit(root / "annotation_train.odgt", '"a"', '"linked/a"')
    elif form == "voc":
        edit(root / "ImageSets/Main/train.txt", "a\n", "linked/a\n")
    assert box_counts(root) == expected


@pytest.mark.parametrize("target", [".", "..", "../.."])
@pytest.mark.parametrize("form", ["voc", "yolo", "cityscapes"])
def test_links_that_lead_back_are_refused(copy_of: Any, form: str, target: str) -> None:
    root = copy_of(form)
    folder = Path(ANNOTATIONS[form]).parent if form == "cityscapes" else Path(PICTURES[form])
    above = os.path.normpath(folder / target)
    (root / folder / "again").symlink_to(target, target_is_directory=True)
    problems = [problem for problem in checked(root) if problem.kind == "link"]
    assert len(problems) == 1 and problems[0].severity == "error"
    with pytest.raises(DataError, match=r"again.*: a link that leads back to .*, in which it lies") as caught:
        open_split(root, "train")
    assert "again" in caught.value.message and caught.value.remedy == "Remove the link.", above


def test_links_to_nothing_and_to_themselves(copy_of: Any) -> None:
    root = copy_of("yolo")
    (root / "images/train/self").symlink_to("self")
    (root / "images/train/gone").symlink_to("nowhere")
    assert box_counts(root) == {"a": 2, "b": 1, "c": 0}  # neither is a picture
    (root / "images/train/x.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"x\.png: no such file"):
        open_split(root, "train")


# ----------------------------------------------------------------------------------------------- equal stems


@pytest.mark.parametrize("ending", [".jpg", ".PNG", ".jpeg"])
def test_two_pictures_of_one_label_file(copy_of: Any, caplog: pytest.LogCaptureFixture, ending: str) -> None:
    root = copy_of("yolo")
    shutil.copy(root / "images/train/a.png", root / f"images/train/a{ending}")
    (problem,) = checked(root)
    assert (problem.severity, problem.kind) == ("error", "two images of one label file")
    with caplog.at_level(logging.WARNING):
        assert len(open_split(root, "train")) == 4
    assert "has the same label file as a" in caplog.text and "lists all of these" in caplog.text


def test_two_images_of_one_file_name(copy_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = copy_of("coco")
    edit(root / "train.json", "b.png", "./a.png")
    edit(root / "train.json", '"width": 24, "height": 32', '"width": 32, "height": 24')
    (problem,) = checked(root)
    assert (problem.severity, problem.kind) == ("error", "file_name given twice")
    with caplog.at_level(logging.WARNING):
        assert len(open_split(root, "train")) == 3
    assert "image 2 has the same file_name as image 1, 'a.png'; `paqdetr data check` lists all of these" in caplog.text


@pytest.mark.parametrize("named", ["a.jpg", "a.png", "some/folder/a.jpg", "C:\\pictures\\a.jpg"])
@pytest.mark.parametrize("with_list", [True, False])
def test_the_picture_that_an_xml_file_names_wins(
    copy_of: Any, caplog: pytest.LogCaptureFixture, named: str, with_list: bool
) -> None:
    root = copy_of("voc")
    if not with_list:
        shutil.rmtree(root / "ImageSets")
    shutil.copy(root / "JPEGImages/a.png", root / "JPEGImages/a.jpg")
    edit(root / "Annotations/a.xml", "<annotation>", f"<annotation><filename>{named}</filename>")
    with caplog.at_level(logging.WARNING):
        train = open_split(root, "train")
    winner = re.split(r"[/\\]", named)[-1]
    assert [name for name in train.file_names if name[0] == "a"] == [winner]
    assert len(train.boxes(list(train.file_names).index(winner))) == 2
    assert f"left out: it and {winner} would have the same XML file, a.xml" in caplog.text
    assert [problem.kind for problem in checked(root)] == ["two images of one label file"]


@pytest.mark.parametrize("named", [None, "zebra.jpg", ""])
def test_of_two_pictures_that_no_xml_file_names_the_first_is_taken(copy_of: Any, named: str | None) -> None:
    root = copy_of("voc")
    shutil.copy(root / "JPEGImages/a.png", root / "JPEGImages/a.jpg")
    if named is not None:
        edit(root / "Annotations/a.xml", "<annotation>", f"<annotation><filename>{named}</filename>")
    assert list(open_split(root, "train").file_names) == ["a.jpg", "b.png", "c.png"]
    assert [problem.severity for problem in checked(root)] == ["error"]


@pytest.mark.parametrize("with_list", [True, False])
def test_an_xml_file_whose_picture_is_called_otherwise(copy_of: Any, with_list: bool) -> None:
    root = copy_of("voc")
    if not with_list:
        shutil.rmtree(root / "ImageSets")
    (root / "JPEGImages/a.png").rename(root / "JPEGImages/IMG_7.png")
    edit(root / "Annotations/a.xml", "<annotation>", "<annotation><filename>IMG_7.png</filename>")
    counts = box_counts(root)
    assert counts["IMG_7"] == 2 and "a" not in counts and len(counts) == (3 if with_list else 4)
    # a picture with an XML file of its own is not taken from it
    edit(root / "Annotations/a.xml", "IMG_7.png", "b.png")
    with pytest.raises(DataError, match="a: no image of this name"):
        open_split(root, "train")


# ----------------------------------------------------------------------------------------------- flags, ids

NO = (0, 0.0, False, None, "", "0", "0.0", "false", "False", "NO", "n", "Unspecified", " off ")
YES = (1, 1.0, True, "1", "1.0", "true", "YES", "y", "On")
NEITHER = (2, -1, 0.5, "2", "maybe", "nan", "0x1", [], {}, [1], float("nan"))


def test_spellings_of_no_and_yes() -> None:
    assert [as_flag(value) for value in (*NO, *YES)] == [False] * len(NO) + [True] * len(YES)
    assert [as_flag(value) for value in NEITHER] == [None] * len(NEITHER)


def set_flag(root: Path, form: str, value: Any) -> None:
    """Of the first object of image a."""
    if form == "coco":
        content = json.loads((root / "train.json").read_text())
        content["annotations"][0]["iscrowd"] = value
        (root / "train.json").write_text(json.dumps(content))
    elif form == "voc":
        edit(root / "Annotations/a.xml", "<object>", f"<object><difficult>{value}</difficult>")
    elif form == "crowdhuman":
        edit(root / "annotation_train.odgt", '{"box_id": 0}', json.dumps({"ignore": value}))
    else:
        path = root / ANNOTATIONS["cityscapes"]
        content = json.loads(path.read_text())
        content["objects"][1]["deleted"] = value
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("form", ["coco", "voc", "crowdhuman", "cityscapes"])
@pytest.mark.parametrize(
    ("value", "left"), [("0", 2), ("False", 2), ("Unspecified", 2), (0.0, 2), ("1", 1), ("yes", 1)]
)
def test_flags_in_files(copy_of: Any, form: str, value: Any, left: int) -> None:
    root = copy_of(form)
    set_flag(root, form, value)
    assert box_counts(root)["a"] == left


@pytest.mark.parametrize("form", ["coco", "voc", "crowdhuman", "cityscapes"])
@pytest.mark.parametrize("value", ["perhaps", 2, "0.5"])
def test_flags_that_are_neither_name_the_place(copy_of: Any, form: str, value: Any) -> None:
    root = copy_of(form)
    set_flag(root, form, value)
    place = {
        "coco": "annotation 1 of image 1 has iscrowd",
        "voc": r"a\.xml: object 1 \(person\) has <difficult>",
        "crowdhuman": r"line 1: gtboxes\[0\] of a has ignore",
        "cityscapes": r"objects\[1\] \(person\) has deleted",
    }[form]
    with pytest.raises(DataError, match=rf"{place} '?{value}'?, expected 0 or 1"):
        open_split(root, "train")
    assert [problem.kind for problem in checked(root)] == ["flag"]


@pytest.mark.parametrize("value", ["Unspecified", "True", "0.0"])
def test_truncated_is_a_flag_too(copy_of: Any, value: str) -> None:
    root = copy_of("voc")
    edit(root / "Annotations/a.xml", "<object>", f"<object><truncated>{value}</truncated>")
    assert box_counts(root)["a"] == 2
    edit(root / "Annotations/a.xml", value, "rather")
    with pytest.raises(DataError, match="has <truncated> 'rather', expected 0 or 1"):
        open_split(root, "train")


@pytest.mark.parametrize(
    ("value", "own"),
    [(1, 1), (1.0, 1), (-(2**63), -(2**63)), ("1.0", "1.0"), (2**53 + 0.0, 2**53)]
    + [(value, None) for value in (True, None, 0.5, 2**63, -(2**63) - 1, 1e400, float("nan"), [1], 10**400)],
)  # fmt: skip
def test_ids(value: Any, own: int | str | None) -> None:
    found = as_id(value)
    assert found == own and type(found) is type(own)


def as_floats(root: Path, form: str) -> None:
    """Every id and count with a point, as pandas writes it."""
    if form == "coco":
        for key in ("id", "image_id", "category_id", "width", "height", "iscrowd"):
            text = (root / "train.json").read_text()
            (root / "train.json").write_text(re.sub(rf'("{key}": \d+)\b', r"\1.0", text))
    elif form == "voc":
        text = (root / "Annotations/a.xml").read_text()
        (root / "Annotations/a.xml").write_text(re.sub(r">(\d+)<", r">\1.0<", text))
    elif form == "yolo":
        edit(root / "labels/train/a.txt", "0 ", "0.0 ")
        (root / "data.yaml").write_text("train: images/train\nnc: 2.0\nnames: {0.0: person, 1.0: rider}\n")
    elif form == "cityscapes":
        edit(root / ANNOTATIONS[form], '"imgHeight": 24', '"imgHeight": 24.0')
    else:
        edit(root / ANNOTATIONS[form], '"ID": "a"', '"ID": 7.0')
        (root / "Images/a.jpg").rename(root / "Images/7.jpg")


@pytest.mark.parametrize("form", FORMATS)
def test_whole_numbers_may_have_a_point(copy_of: Any, form: str) -> None:
    root = copy_of(form)
    before = open_split(root, "train")
    as_floats(root, form)
    after = open_split(root, "train")
    assert after.classes == before.classes and after.sizes.tolist() == before.sizes.tolist()
    assert [after.boxes(i).tolist() for i in range(3)] == [before.boxes(i).tolist() for i in range(3)]
    assert [type(own) for own in after.image_ids] == [type(own) for own in before.image_ids]


@pytest.mark.parametrize("own", [2**63, 10**30, -(2**63) - 1, 1e300])
@pytest.mark.parametrize("where", ["categories", "images"])
def test_ids_past_64_bits_are_refused_with_their_place(copy_of: Any, where: str, own: Any) -> None:
    root = copy_of("coco")
    content = json.loads((root / "train.json").read_text())
    content[where][1]["id"] = own
    (root / "train.json").write_text(json.dumps(content))
    expected = rf"train\.json: {where}\[1\] has id .*, expected an integer of at most 64 bits, or a text"
    with pytest.raises(DataError, match=expected):
        open_split(root, "train")


# ------------------------------------------------------------------------------------------------ YOLO labels


def labels(root: Path, line: str, shape: str | None = None) -> DetectionDataset:
    (root / "labels/train/a.txt").write_text(f"0 .5 .5 .5 .5\n{line}\n" if shape is None else f"{line}\n")
    if shape is not None:
        (root / "data.yaml").write_text(f"train: images/train\nnames: [person, rider]\nkpt_shape: {shape}\n")
    return open_split(root, "train")


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ("[2, 3]", "1 .5 .5 .25 .5 .1 .1 2 .9 .9 0"),
        ("[3, 2]", "1 .5 .5 .25 .5 .1 .1 .2 .2 .9 .9"),
        ("[1.0, 3]", "1 .5 .5 .25 .5 640 480 1"),  # keypoints are not read
        ("[17, 3]", "1 .5 .5 .25 .5" + " 0" * 51),
        ("[2, 2]", "1 .5 .5 .25 .5"),  # a person without keypoints
    ],
)
def test_of_a_pose_the_box_is_read(copy_of: Any, shape: str, line: str) -> None:
    train = labels(copy_of("yolo"), line, shape)
    assert train.boxes(0).tolist() == [[12, 6, 20, 18]] and train.labels(0).tolist() == [1]


@pytest.mark.parametrize(
    ("shape", "line", "expected"),
    [
        (None, "0 .5 .5 .1", "line 2: 4 numbers, expected 5 \\(box"),
        (None, "0 .5 .5 .1 .1 .9", "line 2: 6 numbers"),
        (None, "0 .5 .5 .25 .5 .1 .1 2", "line 2: 8 numbers.*an odd number from 7 on \\(polygon.*`kpt_shape`"),
        ("[2, 3]", "0 .5 .5 .25 .5 .1 .1", "line 1: 7 numbers.*or 11 \\(pose"),
        ("[2, 2]", "9 .5 .5 .1 .1 .2", "line 1: 6 numbers.*or 9 \\(pose"),
        ("[4, 2]", "0 .1 .1 .9 .1 .9 .9", "line 1: 7 numbers.*beside which there are no polygons"),
    ],
)
def test_labels_that_fit_no_reading(copy_of: Any, shape: str | None, line: str, expected: str) -> None:
    root = copy_of("yolo")
    with pytest.raises(DataError, match=rf"a\.txt: {expected}"):
        labels(root, line, shape)
    assert [problem.kind for problem in checked(root)] == ["malformed box"]


@pytest.mark.parametrize("shape", ["17", "[17]", "[17, 4]", "[0, 2]", "[a, 2]", "[1.5, 2]"])
def test_shapes_of_keypoints(copy_of: Any, shape: str) -> None:
    with pytest.raises(DataError, match=r"data\.yaml: `kpt_shape` is .*, expected \[keypoints, 2 or 3\]"):
        labels(copy_of("yolo"), "0 .5 .5 .25 .5", shape)
