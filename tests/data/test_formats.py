"""What each format's reader makes of files written by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paqdetr.data.annotations import Issues
from paqdetr.data.check import check_dataset
from paqdetr.data.convert import convert_dataset
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits, find_layout, find_split
from paqdetr.data.stats import dataset_stats
from paqdetr.errors import DataError

FORMATS = ("coco", "voc", "yolo", "cityscapes", "crowdhuman")


@pytest.fixture
def copy_of(tiny_data: dict[str, Path], tmp_path: Path) -> Any:
    def copied(form: str) -> Path:
        return Path(shutil.copytree(tiny_data[form], tmp_path / form))

    return copied


def boxes(split: DetectionDataset) -> dict[str, list[tuple[str, list[float]]]]:
    """Plain name of every image -> its classes and boxes."""
    return {
        Path(split.file_names[i]).stem.removesuffix("_leftImg8bit"): [
            (split.classes.names[label], box.tolist())
            for label, box in zip(split.labels(i), split.boxes(i), strict=True)
        ]
        for i in range(len(split))
    }


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_boxes(tiny_data: dict[str, Path], form: str) -> None:
    assert find_layout(tiny_data[form]).format == form
    assert available_splits(tiny_data[form]) == ["train", "val"]
    train, val = (open_split(tiny_data[form], split) for split in ("train", "val"))
    second = "person" if form == "crowdhuman" else "rider"
    assert boxes(train) == {
        "a": [("person", [4, 6, 14, 14]), (second, [20, 2, 28, 10])],
        "b": [("person", [2, 2, 12, 22])],
        "c": [],
    }
    assert boxes(val) == {"d": [(second, [1, 1, 7, 7])]}
    assert train.sizes.tolist() == [[24, 32], [32, 24], [24, 32]]
    assert train.image(1).size == (24, 32)
    assert train.skipped == 0 and train.name == "train"
    assert len(set(train.image_ids)) == 3
    truth = train.ground_truth()
    assert [image["id"] for image in truth["images"]] == list(train.image_ids)
    assert [a["bbox"] for a in truth["annotations"]] == [[4, 6, 10, 8], [20, 2, 8, 8], [2, 2, 10, 20]]
    assert [a["area"] for a in truth["annotations"]] == [80, 64, 200]


# ----------------------------------------------------------------------------------------------- COCO


@pytest.mark.parametrize(
    ("own", "ids"),
    [
        ([1, 90, 13], (1, 13, 90)),  # COCO's own: 80 classes with ids up to 90
        ([0, 1, 2], (0, 1, 2)),
        (["7", "3", "11"], (3, 7, 11)),
        (["cat", "dog", "7"], (1, 2, 3)),
    ],
)
def test_category_ids_of_all_kinds(tmp_path: Path, own: list[Any], ids: tuple[int, ...]) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}],
        "categories": [{"id": i, "name": f"name of {i}"} for i in own],
        "annotations": [{"image_id": 1, "category_id": i, "bbox": [n, 0, 5, 5]} for n, i in enumerate(own)],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    data = DetectionDataset.from_json(tmp_path / "x.json", tmp_path)
    assert data.classes.ids == ids
    for label, box in zip(data.labels(0).tolist(), data.boxes(0).tolist(), strict=True):
        assert data.classes.names[label] == f"name of {own[int(box[0])]}"


def test_crowds_and_areas_are_kept_for_evaluation(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    rows = [
        {"bbox": [0, 0, 5, 5], "area": 12.5},
        {"bbox": [1, 1, 5, 4], "iscrowd": 1, "segmentation": {"counts": "x"}},
        {"bbox": [-3, 0, 9, 2], "area": None},
        {"bbox": [3, 3, 0, 2]},
    ]
    content = {
        "images": [{"id": "x", "file_name": "./a.png", "width": 20, "height": 20}],
        "categories": [{"id": 5, "name": "a"}],
        "annotations": [{"image_id": "x", "category_id": 5, **row} for row in rows],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    data = DetectionDataset.from_json(tmp_path / "x.json", tmp_path)
    assert data.boxes(0).tolist() == [[0, 0, 5, 5], [0, 0, 6, 2]] and data.skipped == 2
    assert data.annotations.masks == 1
    truth = data.ground_truth()["annotations"]
    assert [(a["bbox"], a["area"], a["iscrowd"]) for a in truth] == [
        ([0, 0, 5, 5], 12.5, 0),
        ([1, 1, 5, 4], 20, 1),
        ([-3, 0, 9, 2], 18, 0),
        ([3, 3, 0, 2], 0, 0),
    ]
    assert {(a["image_id"], a["category_id"]) for a in truth} == {("x", 5)}


@pytest.mark.parametrize("folder", ["train2017", "images/train2017", "images", "train"])
def test_lvis_names_images_by_their_urls(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / folder / "7.png")
    content = {
        "images": [{"id": 7, "coco_url": "http://images.cocodataset.org/train2017/7.png", "width": 20, "height": 20}],
        "categories": [{"id": 5, "name": "a", "frequency": "r"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4]}],
    }
    (tmp_path / "lvis_v1_train.json").write_text(json.dumps(content))
    train = open_split(tmp_path, "train")
    assert train.image(0).size == (20, 20) and train.boxes(0).tolist() == [[1, 2, 4, 6]]


# ---------------------------------------------------------------------------------------- Pascal VOC


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_voc_difficult_objects_are_not_trained_on(copy_of: Any) -> None:
    root = copy_of("voc")
    edit(root / "Annotations" / "a.xml", "<name>rider</name>", "<name>rider</name><difficult>1</difficult>")
    train = open_split(root, "train")
    assert boxes(train)["a"] == [("person", [4, 6, 14, 14])]
    assert [a["iscrowd"] for a in train.ground_truth()["annotations"]] == [0, 1, 0]


def test_voc_without_size_or_xml(copy_of: Any) -> None:
    root = copy_of("voc")
    edit(root / "Annotations" / "b.xml", "<size><width>24</width><height>32</height></size>", "")
    (root / "Annotations" / "c.xml").unlink()
    train = open_split(root, "train")
    assert train.sizes.tolist() == [[24, 32], [32, 24], [24, 32]]
    assert boxes(train)["c"] == []


def test_voc_in_a_devkit_and_beside_the_images(copy_of: Any, tmp_path: Path) -> None:
    root = copy_of("voc")
    expected = boxes(open_split(root, "train"))
    (root / "ImageSets" / "Main" / "person_train.txt").write_text("a 1\nb -1\n")
    (tmp_path / "kit").mkdir()
    root.rename(tmp_path / "kit" / "VOC2012")
    assert available_splits(tmp_path / "kit") == ["train", "val"]
    assert boxes(open_split(tmp_path / "kit", "train")) == expected
    for split, stems in (("train", "abc"), ("valid", "d")):
        for stem in stems:
            for folder, ending in (("JPEGImages", "png"), ("Annotations", "xml")):
                (tmp_path / "flat" / split).mkdir(parents=True, exist_ok=True)
                file = tmp_path / "kit" / "VOC2012" / folder / f"{stem}.{ending}"
                shutil.copy(file, tmp_path / "flat" / split)
    assert available_splits(tmp_path / "flat") == ["train", "val"]
    assert boxes(open_split(tmp_path / "flat", "train")) == expected


def test_voc_with_a_list_for_training_and_validation_together(copy_of: Any) -> None:
    root = copy_of("voc")
    lists = root / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    assert available_splits(root) == ["train", "val"]
    assert len(open_split(root, "train")) == 3
    (lists / "trainval.txt").unlink()
    (lists / "val.txt").unlink()
    assert available_splits(root) == ["train"] and len(open_split(root, "train")) == 4


def test_voc_classes_are_those_of_all_splits(copy_of: Any) -> None:
    root = copy_of("voc")
    edit(root / "Annotations" / "d.xml", "rider", "aardvark")
    for split in ("train", "val"):
        assert open_split(root, split).classes.names == ("aardvark", "person", "rider")


def test_voc_classes_are_those_of_all_years(copy_of: Any, tmp_path: Path) -> None:
    root = copy_of("voc")
    shutil.copytree(root, tmp_path / "kit" / "VOC2007")
    edit(root / "Annotations" / "d.xml", "rider", "aardvark")
    root.rename(tmp_path / "kit" / "VOC2012")
    for split in ("train", "val", "train2007", "val2007"):
        assert open_split(tmp_path / "kit", split).classes.names == ("aardvark", "person", "rider")


def test_voc_in_another_encoding(copy_of: Any) -> None:
    root = copy_of("voc")
    text = (root / "Annotations" / "d.xml").read_text().replace("rider", "vélo")
    declared = f"<?xml version='1.0' encoding='latin-1'?>{text}"
    (root / "Annotations" / "d.xml").write_bytes(declared.encode("latin-1"))
    assert boxes(open_split(root, "val"))["d"][0][0] == "vélo"


# ---------------------------------------------------------------------------------------------- YOLO


def test_yolo_segments_become_boxes(copy_of: Any) -> None:
    root = copy_of("yolo")
    (root / "labels" / "train" / "b.txt").write_text("1 0.25 0.5 0.75 0.125 0.5 0.875\n\n")
    assert boxes(open_split(root, "train"))["b"] == [("rider", [6, 4, 18, 28])]


def test_yolo_named_by_its_yaml_file(copy_of: Any, tmp_path: Path) -> None:
    root = copy_of("yolo")
    expected = boxes(open_split(root, "train"))
    assert boxes(open_split(root / "data.yaml", "train")) == expected
    # the user's own file may lie elsewhere and say where the data are
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"path: {root}\ntrain: images/train\nnames: {{0: person, 1: rider}}\nnc: 2\n")
    assert boxes(open_split(mine, "train")) == expected


@pytest.mark.parametrize(
    "written", ["[no, 0x1F, 010, 1.10]", "[~, null, true, 1_000]", "{0: 12:30, 1: 1e3, 2: .inf, 3: 2024-01-02}"]
)
def test_yolo_classes_are_named_as_they_stand_in_the_file(copy_of: Any, tmp_path: Path, written: str) -> None:
    root = copy_of("yolo")
    (root / "data.yaml").write_text(f"train: images/train\ntest: ~\nval: null\nnc: 4\nnames: {written}\n")
    names = re.findall(r"[^ \[\]{},]+(?=[,\]}])", written)
    assert open_split(root, "train").classes.names == tuple(names)
    assert available_splits(root) == ["train"]
    convert_dataset(root, tmp_path / "again", to="yolo")
    assert open_split(tmp_path / "again", "train").classes.names == tuple(names)


def test_yolo_as_roboflow_exports_it(copy_of: Any) -> None:
    root = copy_of("yolo")
    for split, theirs in (("train", "train"), ("val", "valid")):
        for folder in ("images", "labels"):
            (root / theirs).mkdir(exist_ok=True)
            (root / folder / split).rename(root / theirs / folder)
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [person, rider]\n")
    assert boxes(open_split(root, "val"))["d"] == [("rider", [1, 1, 7, 7])]


def test_yolo_as_roboflow_downloads_it(copy_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its paths are relative to where the download was started, beside the folder."""
    root = copy_of("yolo").rename(tmp_path / "My-Data-3")
    (root / "data.yaml").write_text("train: My-Data-3/images/train\nnames: [person, rider]\n")
    assert len(boxes(open_split(root, "train"))["a"]) == 2
    monkeypatch.chdir(root)
    assert len(boxes(open_split(".", "train"))["a"]) == 2
    (root / "My-Data-3/images").mkdir(parents=True)
    (root / "images/val").rename(root / "My-Data-3/images/train")  # what is there counts
    assert list(open_split(root, "train").file_names) == ["d.png"]


@pytest.mark.parametrize("opened", ["real", "link"])
@pytest.mark.parametrize("written", ["real", "link"])
def test_yolo_with_absolute_paths_and_links(copy_of: Any, tmp_path: Path, opened: str, written: str) -> None:
    copy_of("yolo").rename(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    entry = tmp_path / written / "images/train"
    (tmp_path / "real/data.yaml").write_text(f"train: {entry}\nnames: [person, rider]\n")
    assert len(boxes(open_split(tmp_path / opened, "train"))["a"]) == 2
    assert len(boxes(open_split(tmp_path / opened / "data.yaml", "train"))["a"]) == 2


def test_yolo_says_where_path_does_not_count(
    copy_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of("yolo")
    text = (root / "data.yaml").read_text()
    for path, why in (
        ("/datasets/v2", "`path` is '/datasets/v2', which is no folder"),
        ("v2", "`path` is 'v2', which is no folder"),
        (str(tmp_path), f"`path` is '{tmp_path}', outside of its folder, and counts only if the file itself is named"),
    ):
        (root / "data.yaml").write_text(f"path: {path}\n{text}")
        caplog.clear()
        assert len(open_split(root, "train")) == 3
        assert caplog.messages == [f"{root / 'data.yaml'}: {why}: the images are looked for in {root}"]
        (problem,) = [p for p in check_dataset(root).problems if p.kind == "path of data.yaml" and p.split == "train"]
        assert problem.severity == "warning" and problem.message.startswith(why)
    (tmp_path / "here/v2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    (root / "data.yaml").write_text(f"path: v2\n{text}")
    caplog.clear()
    assert len(open_split(root, "train")) == 3
    assert "which is no folder, though one in the folder that the command runs in: " in caplog.text
    for path in (".", "./", "~", str(root), "../yolo"):
        (root / "data.yaml").write_text(f"path: {path}\n{text}")
        caplog.clear()
        assert len(open_split(root, "train")) == 3 and not caplog.messages
    (root / "data.yaml").write_text("path: /datasets/v2\ntrain: gone\nnames: [person, rider]\n")
    with pytest.raises(DataError, match="gone does not exist; `path` is '/datasets/v2', which is no folder"):
        open_split(root, "train")


@pytest.mark.parametrize("entry", ["../test/images", "labels"])
def test_yolo_with_a_test_split_that_is_not_there(copy_of: Any, tmp_path: Path, entry: str) -> None:
    """Training does not read it; what reads all splits says what to do."""
    root = copy_of("yolo")
    with (root / "data.yaml").open("a") as file:
        file.write(f"test: {entry}\n")
    report = check_dataset(root)
    ((severity, sentence),) = [found for found in report.summary() if "`test" in found[1]]
    assert severity == "warning" and not report.errors and "or remove the line `test:`" in sentence
    for read in (dataset_stats, lambda data: convert_dataset(data, tmp_path / "out", to="coco")):
        with pytest.raises(DataError) as caught:
            read(root)
        assert caught.value.remedy.endswith(", or remove the line `test:`.")
    (root / "images/val").rename(root / "images/elsewhere")
    with pytest.raises(DataError) as caught:
        open_split(root, "val")
    assert caught.value.remedy.endswith(", or remove the line `val:`.")
    assert check_dataset(root).errors  # training reads it


def test_yolo_without_names(copy_of: Any) -> None:
    root = copy_of("yolo")
    (root / "data.yaml").write_text("train: images/train\nnc: 2\n")
    with pytest.raises(DataError, match="has no `names`, found 'train, nc'"):
        find_layout(root / "data.yaml")
    with pytest.raises(DataError, match=r"there is no data\.yaml with `names` of the classes"):
        find_layout(root)


@pytest.mark.parametrize("empty", ["train:\nval:\n", "train: []\n", "train: ~\n"])
def test_yolo_that_names_no_images(copy_of: Any, empty: str) -> None:
    root = copy_of("yolo")
    (root / "data.yaml").write_text(f"names: [person, rider]\n{empty}")
    with pytest.raises(DataError, match="has no `train` that names images, found 'names, train"):
        find_layout(root / "data.yaml")
    with pytest.raises(DataError, match="no data set of a known layout"):
        find_layout(root)


def test_yolo_with_a_list_of_images(copy_of: Any) -> None:
    root = copy_of("yolo")
    (root / "some.txt").write_text("./images/train/b.png\nimages/val/d.png\n")
    (root / "data.yaml").write_text("train: [some.txt, images/train]\nnames: [person, rider]\n")
    train = open_split(root, "train")
    assert list(train.file_names) == ["train/b.png", "val/d.png", "train/a.png", "train/c.png"]
    assert len(train.boxes(1)) == 1


def test_yolo_sizes_have_the_exif_turn_applied(copy_of: Any) -> None:
    root = copy_of("yolo")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "b.jpg"):
        with Image.open(root / "images" / "train" / f"{name[0]}.png") as image:
            image.save(root / "images" / "train" / name, exif=exif)
    (root / "images" / "train" / "b.png").unlink()
    train = open_split(root, "train")
    assert train.sizes.tolist() == [[32, 24], [24, 32], [24, 32]]
    assert [train.image(i).size for i in range(2)] == [(24, 32), (32, 24)]


# ------------------------------------------------------------------------------- Cityscapes, CrowdHuman


def test_cityscapes_groups_are_crowds_and_other_classes_have_no_box(copy_of: Any) -> None:
    root = copy_of("cityscapes")
    path = root / "gtFine" / "train" / "ulm" / "c_gtFine_polygons.json"
    triangle = [[0, 0], [10, 0], [0, 10]]
    objects = [{"label": name, "polygon": triangle} for name in ("cargroup", "car", "caravan", "bicyclegroup")]
    objects.append({"label": "car", "polygon": triangle, "deleted": 1})  # type: ignore[dict-item]
    path.write_text(json.dumps({"imgHeight": 24, "imgWidth": 32, "objects": objects}))
    train = open_split(root, "train")
    assert boxes(train)["c"] == [("car", [0, 0, 10, 10])]
    assert train.classes.ids == (24, 25, 26, 27, 28, 31, 32, 33)
    rows = [a for a in train.ground_truth()["annotations"] if a["image_id"] == "c"]
    assert [(a["category_id"], a["iscrowd"], a["area"]) for a in rows] == [(26, 1, 50), (26, 0, 50), (33, 1, 50)]


def test_crowdhuman_ignored_people_and_masks_are_crowds(copy_of: Any) -> None:
    root = copy_of("crowdhuman")
    people = [
        {"tag": "person", "fbox": [-4, -4, 20, 20], "extra": {"ignore": 1}},
        {"tag": "mask", "fbox": [0, 0, 9, 9], "extra": {"ignore": 1}},
        {"tag": "person", "fbox": [-4, 10, 20, 20]},
    ]
    (root / "annotation_val.odgt").write_text(json.dumps({"ID": "d", "gtboxes": people}) + "\n\n")
    val = open_split(root, "val")
    assert boxes(val)["d"] == [("person", [0, 10, 16, 24])]
    assert [a["iscrowd"] for a in val.ground_truth()["annotations"]] == [1, 1, 0]
    assert val.ground_truth()["annotations"][2]["bbox"] == [-4, 10, 20, 20]  # as the benchmark has it


# --------------------------------------------------------------------------------------------- safety


def test_links_are_followed_but_names_do_not_lead_out(copy_of: Any, tmp_path: Path) -> None:
    root = copy_of("coco")
    (root / "train" / "a.png").rename(tmp_path / "elsewhere.png")
    (root / "train" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert open_split(root, "train").image(0).size == (32, 24)
    text = (root / "train.json").read_text()
    (root / "train.json").write_text(text.replace('"a.png"', '"../../elsewhere.png"'))
    with pytest.raises(DataError, match=r"which is no name inside"):
        open_split(root, "train")


def test_what_is_collected_does_not_stop_the_reader(copy_of: Any) -> None:
    root = copy_of("yolo")
    (root / "labels" / "train" / "a.txt").write_text("9 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.5 0.5\n0 nan 1 1 1\n")
    issues = Issues(collect=True, split="train")
    found = find_split(root, "train").read(issues)
    assert np.diff(found.starts).tolist() == [1, 1, 0]
    assert [(p.kind, p.message.split(":")[0]) for p in issues.found] == [
        ("unknown class", "line 1"),
        ("malformed box", "line 3"),
    ]


def test_problems_of_a_kind_are_counted_beyond_those_kept() -> None:
    issues = Issues(collect=True)
    for number in range(1500):
        issues.warn("file", str(number), kind="many")
    assert len(issues.found) == 1000 and issues.counts["warning", "many"] == 1500
    Issues().warn("file", "nobody listens", kind="many")


def test_yaml_of_other_programs_is_no_data_set(copy_of: Any) -> None:
    root = copy_of("voc")
    (root / "docker.yaml").write_text("version: [1\n{{ template }}")
    (root / "names.yml").write_text("names: [a]\nversion: 3\n")
    assert find_layout(root).format == "voc"
    (root / "aquarium.yaml").write_text("names: [person, rider]\ntrain: JPEGImages\n")
    assert find_layout(root).format == "yolo"


@pytest.mark.parametrize("form", FORMATS)
def test_newlines_of_windows(tiny_data: dict[str, Path], copy_of: Any, form: str) -> None:
    root = copy_of(form)
    for path in root.rglob("*"):
        if path.suffix in (".json", ".xml", ".txt", ".yaml", ".odgt"):
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    for split in ("train", "val"):
        assert boxes(open_split(root, split)) == boxes(open_split(tiny_data[form], split))


def slashes_in_coco(root: Path) -> None:
    content = json.loads((root / "train.json").read_text(encoding="utf-8"))
    (root / "train" / "sub").mkdir()
    for image in content["images"]:
        (root / "train" / image["file_name"]).rename(root / "train" / "sub" / image["file_name"])
        image["file_name"] = f"sub\\{image['file_name']}"
    (root / "train.json").write_text(json.dumps(content), encoding="utf-8")


def slashes_in_yolo_list(root: Path) -> None:
    names = (f".\\images\\train\\{path.name}" for path in (root / "images" / "train").iterdir())
    (root / "train.txt").write_text("\r\n".join(names), encoding="utf-8")
    (root / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [person, rider]\n", encoding="utf-8")


def a_backslash_in_a_name(root: Path) -> None:
    content = json.loads((root / "train.json").read_text(encoding="utf-8"))
    for image in content["images"]:
        (root / "train" / image["file_name"]).rename(root / "train" / f"x\\{image['file_name']}")
        image["file_name"] = f"x\\{image['file_name']}"
    (root / "train.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("form", "change"), [("coco", slashes_in_coco), ("yolo", slashes_in_yolo_list), ("coco", a_backslash_in_a_name)]
)
def test_paths_of_windows(tiny_data: dict[str, Path], copy_of: Any, form: str, change: Any) -> None:
    root = copy_of(form)
    change(root)
    found = {name.rpartition("\\")[2]: own for name, own in boxes(open_split(root, "train")).items()}
    assert found == boxes(open_split(tiny_data[form], "train"))
