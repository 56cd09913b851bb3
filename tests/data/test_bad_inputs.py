"""Bad inputs, one a row: what is wrong with which file, what is said, and the exit code.

Every row goes through the doctor. Where the doctor says that training would fail, reading the data as training does must
fail too, with one line that says what, one that helps, no traceback, and no file of the user's changed.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paqdetr import files
from paqdetr.cli import run
from paqdetr.errors import DataError

# format, what is wrong (the name), how it is made, what is said, exit code, and the split it is in
Case = tuple[str, Callable[[Path], object], str, int, str]
CASES: dict[str, Case] = {}


def case(form: str, said: str, *, code: int = 2, split: str = "train") -> Callable[[Callable[[Path], object]], Any]:
    def keep(make: Callable[[Path], object]) -> Callable[[Path], object]:
        assert make.__name__ not in CASES
        CASES[make.__name__] = (form, make, said, code, split)
        return make

    return keep


def row(
    form: str, name: str, said: str, make: Callable[[Path], object], *, code: int = 2, split: str = "train"
) -> None:
    assert name not in CASES
    CASES[name] = (form, make, said, code, split)


# ----------------------------------------------------------------------------------------------- COCO json


def change(where: str, **values: Any) -> Callable[[Path], None]:
    """Sets values of `key` or `key/position` in train.json."""

    def make(root: Path) -> None:
        content = json.loads((root / "train.json").read_text())
        target = content
        for part in where.split("/"):
            target = target[int(part) if part.isdigit() else part] if part else target
        target.update(values)
        (root / "train.json").write_text(json.dumps(content))

    return make


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def without(key: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        content = json.loads((root / "train.json").read_text())
        del content[key]
        (root / "train.json").write_text(json.dumps(content))

    return make


BOX, IMAGE, CLASS = "annotations/1", "images/1", "categories/1"
row("coco", "json_cut_short", "train.json: no valid json at line 1, column 13", text("train.json", '{"images": ['))
row("coco", "json_that_is_empty", "no valid json at line 1, column 1", text("train.json", ""))
row("coco", "json_in_another_encoding", "no UTF-8 text at byte 12", text("train.json", b'{"images": "\xe9"}'))
row("coco", "json_of_results", "holds a list, expected images", text("train.json", "[]"))
row("coco", "json_object_that_is_empty", "has no `categories`, found nothing", text("train.json", "{}"))
row("coco", "json_nested_without_end", "the json is nested too deeply", text("train.json", "[" * 200_000))
row("coco", "json_with_an_endless_number", "no usable json", text("train.json", '{"images": ' + "9" * 9999 + "}"))
row("coco", "json_larger_than_is_read", "more than the 49 that are read", text("train.json", " " * 70_000 + "{}"))
row("coco", "json_without_categories", "has no `categories`, found annotations, images", without("categories"))
row("coco", "json_without_images", "has no `images`", without("images"))
row("coco", "json_with_no_image", "`images` is empty", change("", images=[]))
row("coco", "json_with_no_class", "`categories` is empty", change("", categories=[]))
row("coco", "annotations_that_are_no_list", "`annotations` is a dict, expected a list", change("", annotations={}))
row("coco", "annotation_that_is_a_number", "annotations[0] is 7, expected an object", change("", annotations=[7]))
row("coco", "box_of_an_unknown_image", "belongs to image 99, which `images` does not list", change(BOX, image_id=99))
row("coco", "box_of_no_image", "belongs to image [1]", change(BOX, image_id=[1]))
row("coco", "box_of_an_unknown_class", "image 1 has category_id 91, which `categories`", change(BOX, category_id=91))
row("coco", "box_whose_class_is_a_text", "has category_id '2', which `categories`", change(BOX, category_id="2"))
row("coco", "box_of_three_numbers", "has bbox [1, 2, 3], expected four finite numbers", change(BOX, bbox=[1, 2, 3]))
row("coco", "box_with_nan", "has bbox [1, 2, nan, 4]", change(BOX, bbox=[1, 2, float("nan"), 4]))
row("coco", "box_that_is_infinite", "has bbox [1, 2, inf, 4]", change(BOX, bbox=[1, 2, float("inf"), 4]))
row("coco", "box_no_float_can_hold", "expected four finite numbers", change(BOX, bbox=[1, 2, 10**400, 4]))
row("coco", "box_of_texts", "has bbox ['1', '2', '3', '4']", change(BOX, bbox=["1", "2", "3", "4"]))
row("coco", "box_that_is_missing", "has bbox None", change(BOX, bbox=None))
row("coco", "area_that_is_a_text", "has area 'big', expected a number", change(BOX, area="big"))
row("coco", "image_id_given_twice", "image id 1 is given twice", change(IMAGE, id=1))
row("coco", "image_without_an_id", "images[1] has id None", change(IMAGE, id=None))
row("coco", "image_without_a_name", "image 2 has file_name None, expected a name", change(IMAGE, file_name=None))
row("coco", "image_of_no_width", "image 2 has height 32 and width 0, expected pixels", change(IMAGE, width=0))
row("coco", "image_whose_height_is_a_text", "image 2 has height '32'", change(IMAGE, height="32"))
row("coco", "image_without_a_size", "image 2 has height None", change(IMAGE, height=None, width=None))
row(
    "coco",
    "image_that_leads_out",
    "file_name '../val/d.png', which is no name inside",
    change(IMAGE, file_name="../val/d.png"),
)
row(
    "coco",
    "image_with_an_absolute_path",
    "file_name '/etc/passwd', which is no name",
    change(IMAGE, file_name="/etc/passwd"),
)
row("coco", "image_of_a_windows_drive", "which is no name inside", change(IMAGE, file_name="C:\\data\\b.png"))
row(
    "coco",
    "image_with_a_null_character",
    r"file_name 'b\x00.png', which is no name",
    change(IMAGE, file_name="b\0.png"),
)
row("coco", "image_with_half_a_character", "which is no name inside", change(IMAGE, file_name="\ud800.png"))
row("coco", "image_with_backslashes", "missing, though", change(IMAGE, file_name="sub\\b.png"))
row("coco", "class_id_given_twice", "category id 1 is given twice", change(CLASS, id=1))
row("coco", "class_without_an_id", "categories[1] has id None, expected an integer", change(CLASS, id=None))
row("coco", "class_ids_of_two_kinds", "some category ids are integers and some are texts", change(CLASS, id="b"))
row("coco", "class_without_a_name", "categories[1] is {'id': 2, 'name': None}", change(CLASS, name=None))
row("coco", "class_of_an_empty_name", "categories[1] is {'id': 2, 'name': ' '}", change(CLASS, name=" "))


@case("coco", "b.png: missing, though")
def image_that_is_missing(root: Path) -> None:
    (root / "train" / "b.png").unlink()


@case("coco", "class rider: has id 1, which is 'person' in train", split="")
def classes_in_another_order_in_val(root: Path) -> None:
    content = json.loads((root / "val.json").read_text())
    content["categories"] = [{"id": 1, "name": "rider"}, {"id": 2, "name": "person"}]
    (root / "val.json").write_text(json.dumps(content))


@case("coco", "class tram: has id 3, which train does not list", split="")
def class_that_train_does_not_have(root: Path) -> None:
    content = json.loads((root / "val.json").read_text())
    content["categories"].append({"id": 3, "name": "tram"})
    (root / "val.json").write_text(json.dumps(content))


# -------------------------------------------------------------------------------------------------- images

B = "train/b.png"
row("coco", "image_that_is_text", "b.png: not an image in a known format (8 bytes)", text(B, "no image"))
row("coco", "image_that_is_empty", "b.png: not an image in a known format (0 bytes)", text(B, b""))
row(
    "coco",
    "image_that_is_a_program",
    "b.png: not an image in a known format",
    text(B, "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 32\n"),
)


@case("coco", "b.png: the image does not decode")
def image_cut_short(root: Path) -> None:
    whole = (root / B).read_bytes()
    (root / B).write_bytes(whole[: len(whole) // 2])


@case("coco", "b.png: the image does not decode")
def jpeg_cut_short(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "jpeg.jpg", quality=95)
    (root / B).write_bytes((root / "jpeg.jpg").read_bytes()[:-300])
    (root / "jpeg.jpg").unlink()


@case("coco", "b.png: is 50x40 pixels")
def image_of_another_size(root: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(root / B)


@case("coco", "b.png: is 32x24 pixels")
def image_whose_turn_the_sizes_do_not_know(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(root / B) as image:
        image.save(root / B, exif=exif)


def png_header(width: int, height: int) -> bytes:
    """A PNG of some bytes that claims any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


row("coco", "image_that_is_a_bomb", "b.png: the image is too large", text(B, png_header(60_000, 60_000)))


@case("coco", "b.png: is a folder")
def image_that_is_a_folder(root: Path) -> None:
    (root / B).unlink()
    (root / B).mkdir()


@case("coco", "b.png: no such file")
def image_that_is_a_link_to_nothing(root: Path) -> None:
    (root / B).unlink()
    (root / B).symlink_to(root / "nothing.png")


def mode(name: str, said: str, convert: Callable[[Image.Image], Image.Image], ending: str = "png") -> None:
    """An image out of the ordinary is no mistake: it is converted, and mentioned."""

    def make(root: Path) -> None:
        with Image.open(root / B) as image:
            changed = convert(image)
        changed.save(root / f"x.{ending}")
        (root / f"x.{ending}").replace(root / B)

    row("coco", name, said, make, code=0)


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


mode("image_with_a_palette", "train: 1 palette", lambda image: image.convert("P"))
mode("image_with_alpha", "train: 1 alpha", lambda image: image.convert("RGBA"))
mode("image_for_print", "train: 1 CMYK", lambda image: image.convert("CMYK"), "tif")
mode("image_of_16_bits", "train: 1 16 bit, 1 grey", sixteen_bits)
mode("image_in_grey", "train: 1 grey", lambda image: image.convert("L"))


# ------------------------------------------------------------------------- boxes that training leaves out


row("coco", "box_without_area", "box [3, 3, 0, 5] of class 'rider' has no area", change(BOX, bbox=[3, 3, 0, 5]), code=0)
row(
    "coco",
    "box_of_negative_size",
    "bbox [9, 9, -4, 5], expected four finite numbers [x, y, w, h], w and h not below 0",
    change(BOX, bbox=[9, 9, -4, 5]),
)
row("coco", "area_below_0", "area -5, expected a number that is not below 0", change(BOX, area=-5))
row("coco", "area_of_400_digits", "area 1000", change(BOX, area=10**400))
row(
    "coco",
    "polygon_with_nan",
    "segmentation [[1, 2, nan",
    change(BOX, segmentation=[[1, 2, float("nan"), 4, 5, 6]]),
    code=0,
)
row(
    "coco", "polygon_past_a_double", "segmentation [[1, 2, 1000", change(BOX, segmentation=[[1, 2, 10**400, 4]]), code=0
)
row("coco", "polygon_of_words", "segmentation [['a'", change(BOX, segmentation=[["a", "b"]]), code=0)
row(
    "coco", "run_length_code_without_counts", "segmentation {'size'", change(BOX, segmentation={"size": [1, 2]}), code=0
)
row(
    "coco",
    "polygons_in_lists_of_lists",
    "segmentation [[[1, 2]]], expected",
    change(BOX, segmentation=[[[1, 2]]]),
    code=0,
)
row("coco", "annotation_id_given_twice", "annotation id 1 is given twice", change(BOX, id=1), code=0)
row("coco", "box_outside_its_image", "is outside the image of 32x24", change(BOX, bbox=[40, 3, 5, 5]), code=0)
row(
    "coco",
    "box_over_the_edge",
    "is 6 pixels over the edge of the image of 32x24",
    change(BOX, bbox=[28, 3, 10, 5]),
    code=0,
)
row(
    "coco",
    "box_given_twice",
    "is there twice; training leaves one out",
    change(BOX, bbox=[4, 6, 10, 8], category_id=1),
    code=0,
)
row("coco", "box_in_no_image", "no image has boxes to train on", change("", annotations=[]), split="")


@case("coco", "d.png: the same file as train/a.png", code=0)
def the_same_image_in_two_splits(root: Path) -> None:
    shutil.copy(root / "train" / "a.png", root / "val" / "d.png")


# ---------------------------------------------------------------------------------------------- Pascal VOC

XML = "Annotations/a.xml"
BOMB = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'
FOREIGN = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>'


def xml(old: str, new: str, times: int = 1) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        content = (root / XML).read_text()
        assert old in content
        (root / XML).write_text(content.replace(old, new, times))

    return make


row("voc", "xml_cut_short", "a.xml: no valid XML at line 2", text(XML, "<annotation>\n<object>"))
row("voc", "xml_that_is_empty", "a.xml: no valid XML at line 1", text(XML, ""))
row("voc", "xml_with_a_bomb", "a.xml: has a document type or entities", text(XML, BOMB))
row("voc", "xml_that_names_another_file", "a.xml: has a document type or entities", text(XML, FOREIGN))
row(
    "voc",
    "xml_of_no_known_encoding",
    "a.xml: no valid XML",
    text(XML, "<?xml version='1.0' encoding='klingon'?><annotation/>"),
)
row("voc", "object_without_a_box", "object 1 (person) has no <bndbox>", xml("bndbox>", "box>", 2))
row("voc", "box_with_a_text", "object 1 (person) has <bndbox> ['left', '7'", xml("<xmin>5</xmin>", "<xmin>left</xmin>"))
row("voc", "box_of_nan", "expected xmin, ymin, xmax and ymax", xml("<xmin>5</xmin>", "<xmin>NaN</xmin>"))
row("voc", "box_without_a_side", "expected xmin, ymin, xmax and ymax", xml("<xmin>5</xmin>", ""))
row(
    "voc",
    "box_whose_corners_are_swapped",
    "from 15.5, 7 to 14, 14, expected the left upper",
    xml("<xmin>5</xmin>", "<xmin>15.5</xmin>"),
)
row("voc", "object_without_a_name", "object 1 has <name> ''", xml("<name>person</name>", ""))
row("voc", "size_of_zero", "<size> has height '24' and width '0'", xml("<width>32</width>", "<width>0</width>"))
row("voc", "size_of_another_image", "a.png: is 32x24 pixels", xml("<width>32</width>", "<width>33</width>"))
row("voc", "list_that_leads_out", "line 1: '../a' is no name inside", text("ImageSets/Main/train.txt", "../a\n"))
row(
    "voc",
    "list_with_an_unknown_image",
    "zebra: no image of this name, though line 2 of",
    text("ImageSets/Main/train.txt", "a\nzebra\n"),
)


# ---------------------------------------------------------------------------------------------------- YOLO

LABELS = "labels/train/a.txt"
YAML = "data.yaml"
row(
    "yolo",
    "class_out_of_range",
    "a.txt: line 2: the class is 2, expected an integer from 0 to 1",
    text(LABELS, "0 .5 .5 .1 .1\n2 .5 .5 .1 .1"),
)
row("yolo", "class_below_zero", "line 1: the class is -1", text(LABELS, "-1 .5 .5 .1 .1"))
row("yolo", "class_that_is_a_fraction", "line 1: the class is 0.5", text(LABELS, "0.5 .5 .5 .1 .1"))
row(
    "yolo", "class_by_name", "line 1: 'person .5 .5 .1 .1' is not a line of numbers", text(LABELS, "person .5 .5 .1 .1")
)
row("yolo", "label_in_pixels", "is in pixels, expected shares of the image's sides", text(LABELS, "0 16 12 10 8"))
row("yolo", "label_of_four_numbers", "4 numbers, expected 5", text(LABELS, "0 .5 .5 .1"))
row("yolo", "label_with_a_score", "6 numbers, expected 5", text(LABELS, "0 .5 .5 .1 .1 .9"))
row("yolo", "label_with_nan", "has numbers that are not finite", text(LABELS, "0 .5 .5 nan .1"))
row("yolo", "label_of_negative_size", "the box has the size -0.1 x 0.1", text(LABELS, "0 .5 .5 -.1 .1"))
row("yolo", "label_that_is_an_image", "a.txt: no UTF-8 text", text(LABELS, b"\xff\xd8\xff\xe0"))
row(
    "yolo",
    "yaml_that_is_none",
    "data.yaml: line 2, column 6: not valid YAML",
    text(YAML, "names: [a, b\ntrain: ["),
    split="",
)
row("yolo", "yaml_that_is_a_list", "data.yaml: holds a list", text(YAML, "- a\n- b"), split="")
row(
    "yolo",
    "classes_with_a_gap",
    "`names` has the keys ['0', '2'], expected 0 to 1",
    text(YAML, "train: images/train\nnames: {0: a, 2: b}"),
)
row("yolo", "classes_that_are_a_number", "`names` is '7', expected a list", text(YAML, "train: images/train\nnames: 7"))
row(
    "yolo", "class_without_a_text", "names[1] is '', expected a text", text(YAML, "train: images/train\nnames:\n- a\n-")
)
row(
    "yolo",
    "another_number_of_classes",
    "`nc` is '3', but `names` has 2 classes",
    text(YAML, "train: images/train\nnames: [a, b]\nnc: 3"),
)
row("yolo", "folder_that_is_missing", "does not exist", text(YAML, "train: images/trian\nnames: [a, b]"))
row("yolo", "folder_without_images", "holds no images", text(YAML, "train: labels\nnames: [a, b]"))
row("yolo", "folder_that_leads_out", "`train` is '/etc', which is not inside", text(YAML, "train: /etc\nnames: [a, b]"))
row("yolo", "folder_that_leads_out_later", "which is not inside", text(YAML, "train: images/../../x\nnames: [a, b]"))
row("yolo", "class_that_is_tagged", "line 2, column 9: the tag", text(YAML, "train: a\nnames: [!!bool x, b]"), split="")
row(
    "yolo",
    "class_twice",
    "line 2, column 15: the key '0' stands there twice",
    text(YAML, "train: a\nnames: {0: a, 0: b}"),
    split="",
)
row("yolo", "folder_that_is_a_number", "`train` is '5', but", text(YAML, "train: 5\nnames: [a, b]"))
row(
    "yolo",
    "folder_that_is_a_mapping",
    "`train` is {'a': 'b'}, expected a path",
    text(YAML, "train: {a: b}\nnames: [a]"),
)


@case("yolo", "line 2: '../secret.png' is no name inside")
def list_of_images_that_leads_out(root: Path) -> None:
    (root / "list.txt").write_text("images/train/a.png\n../secret.png\n")
    (root / YAML).write_text("train: list.txt\nnames: [a, b]")


@case("yolo", "missing, though line 2 of")
def list_of_images_that_are_missing(root: Path) -> None:
    (root / "list.txt").write_text("images/train/a.png\nimages/train/zebra.png\n")
    (root / YAML).write_text("train: list.txt\nnames: [person, rider]")


@case("yolo", "a.png: not an image in a known format")
def yolo_image_that_is_text(root: Path) -> None:
    (root / "images/train/a.png").write_text("no image")


# ---------------------------------------------------------------------------------- Cityscapes, CrowdHuman

POLYGONS = "gtFine/train/ulm/a_gtFine_polygons.json"


def objects(*items: Any) -> Callable[[Path], None]:
    return text(POLYGONS, json.dumps({"imgHeight": 24, "imgWidth": 32, "objects": list(items)}))


row("cityscapes", "polygons_cut_short", "polygons.json: no valid json at line 1", text(POLYGONS, '{"imgHeight"'))
row("cityscapes", "polygons_without_a_size", "has imgHeight None and imgWidth None", text(POLYGONS, '{"objects": []}'))
row(
    "cityscapes",
    "polygons_in_a_list",
    "polygons.json: holds a list, expected imgHeight, imgWidth and objects",
    text(POLYGONS, "[]"),
)
row(
    "cityscapes",
    "polygons_without_objects",
    "`objects` is None, expected a list",
    text(POLYGONS, '{"imgHeight": 24, "imgWidth": 32}'),
)
row(
    "cityscapes",
    "polygon_of_two_points",
    "objects[0] (car) has the polygon [[0, 0], [1, 1]]",
    objects({"label": "car", "polygon": [[0, 0], [1, 1]]}),
)
row(
    "cityscapes",
    "polygon_of_texts",
    "expected at least three points",
    objects({"label": "car", "polygon": [["a", 0], [1, 1], [2, 0]]}),
)
row("cityscapes", "object_without_a_label", "objects[0] is {}, expected a label and a polygon", objects({}))


@case("cityscapes", "a_leftImg8bit.png: missing, though")
def city_without_its_image(root: Path) -> None:
    (root / "leftImg8bit/train/ulm/a_leftImg8bit.png").unlink()


ODGT = "annotation_train.odgt"


def person(**values: Any) -> Callable[[Path], None]:
    entry = {"ID": "a", "gtboxes": [{"tag": "person", "fbox": [1, 1, 5, 5], **values}]}
    return text(ODGT, json.dumps(entry))


GOOD = '{"ID": "a", "gtboxes": []}\n'
row("crowdhuman", "line_that_is_no_json", "line 2: no valid json at line 1", text(ODGT, f"{GOOD}oops"))
row(
    "crowdhuman",
    "line_without_an_id",
    "line 1: {'gtboxes': []}, expected an ID and gtboxes",
    text(ODGT, '{"gtboxes": []}'),
)
row("crowdhuman", "line_that_is_a_list", "line 1: [], expected an ID and gtboxes", text(ODGT, "[]"))
row("crowdhuman", "lines_with_one_id", "line 2: ID 'a' is given twice, first in line 1", text(ODGT, GOOD * 2))
row(
    "crowdhuman",
    "line_that_leads_out",
    "line 1: ID '../../x' is no name inside",
    text(ODGT, '{"ID": "../../x", "gtboxes": []}'),
)
row(
    "crowdhuman",
    "line_of_a_missing_image",
    "zebra.jpg: missing, though line 1 of",
    text(ODGT, '{"ID": "zebra", "gtboxes": []}'),
)
row("crowdhuman", "file_without_lines", "lists no image", text(ODGT, "\n\n"))
row("crowdhuman", "person_without_a_box", "has fbox None, expected four finite numbers", person(fbox=None))
row("crowdhuman", "person_of_unknown_kind", "has the tag 'dog', expected person or mask", person(tag="dog"))


# ------------------------------------------------------------------------------------------------- folders


@case("coco", "has no split 'train', found val")
def folder_without_train(root: Path) -> None:
    (root / "train.json").unlink()


@case("coco", "no data set of a known layout", split="")
def folder_of_something_else(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()
    (root / "notes.txt").write_text("nothing here")


@case("coco", "is empty", split="")
def folder_that_is_empty(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


@case("coco", "no such data folder", split="")
def folder_that_is_missing_altogether(root: Path) -> None:
    shutil.rmtree(root)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line_each(said: str) -> tuple[str, str]:
    """The last two lines: the error and the help."""
    error, remedy = said.splitlines()[-2:]
    assert error.startswith("error: ") and remedy.startswith("help: ") and len(remedy) > 9, said
    assert "Traceback" not in said
    return error, remedy


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form, make, expected, code, split = CASES[name]
    root = Path(shutil.copytree(tiny_data[form], tmp_path / form))
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 50_000 if name == "json_larger_than_is_read" else 10**9)
    make(root)
    before = snapshot(root)

    assert run(["data", "check", str(root)]) == code
    said = capsys.readouterr()
    assert expected in said.out + said.err
    if code:
        one_line_each(said.err)
    assert "Traceback" not in said.out + said.err
    assert snapshot(root) == before

    # What training reads: the whole split, then its pictures.
    command = f"data preview {root} batch_size=1 image_size=64 --batches 9 --output {tmp_path / 'p.png'}"
    if split or code == 0:
        assert run([*command.split(), "--split", split or "train"]) == code
        said = capsys.readouterr()
        if code:
            assert expected in one_line_each(said.err)[0]
            assert not (tmp_path / "p.png").exists()
        assert snapshot(root) == before


def test_a_key_that_is_there_twice_is_found_at_once() -> None:
    """Among many: a server reads what anybody sends."""
    text = "{" + "".join(f'"{number}": 0, ' for number in range(50_000)) + '"49999": 0}'
    started = time.process_time()
    with pytest.raises(DataError, match="the request: an object has the key '49999' twice"):
        files.parse_json(text, "the request")
    assert time.process_time() - started < 2
