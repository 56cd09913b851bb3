"""What a conversion writes, what it reports as lost, and that other programs read it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paqdetr.cli import run as cli
from paqdetr.data.convert import convert_dataset
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits, find_layout
from paqdetr.data.split import split_dataset
from paqdetr.errors import ConfigError, DataError, StorageError

TARGETS = ("coco", "voc", "yolo")


def by_image(split: DetectionDataset) -> dict[str, list[tuple[str, list[float]]]]:
    """Name of every image -> its classes and boxes."""
    return {
        name: sorted(
            (split.classes.names[label], [round(side, 3) for side in box])
            for label, box in zip(split.labels(index), split.boxes(index).tolist(), strict=True)
        )
        for index, name in enumerate(split.file_names)
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO with what other formats have no place for."""
    root = tmp_path_factory.mktemp("source") / "coco"
    rows = {
        "train": [
            {"image_id": 5, "category_id": 90, "bbox": [4, 6, 10, 8], "area": 33.5},
            {"image_id": 5, "category_id": 0, "bbox": [20.25, 2.5, 8.125, 8]},
            {"image_id": 5, "category_id": 90, "bbox": [0, 0, 32, 24], "iscrowd": 1, "area": 600},
            {"image_id": "x/y", "category_id": 7, "bbox": [-2, 2, 10, 40], "segmentation": [[1, 2, 3, 4, 5, 6]]},
            {"image_id": "x/y", "category_id": 7, "bbox": [3, 3, 9, 9]},
            {"image_id": "x/y", "category_id": 7, "bbox": [3, 3, 9, 9]},
            {"image_id": "x/y", "category_id": 7, "bbox": [50, 3, 9, 9]},
            {"image_id": "x/y", "category_id": 7, "bbox": [5, 3, 0, 9]},
        ],
        "val": [{"image_id": 10**12, "category_id": 0, "bbox": [1, 1, 6, 6]}],
    }
    images = {
        "train": [(5, "9.jpg", 32, 24), ("x/y", "sub/8.jpg", 24, 32), (3, "7.jpg", 32, 24)],
        "val": [(10**12, "9.jpg", 32, 24)],
    }
    categories = [{"id": i, "name": n} for i, n in ((90, "zebra"), (0, "a b"), (13, "unused"), (7, "m & n"))]
    rng = np.random.default_rng(0)
    for split, own in images.items():
        for _, name, width, height in own:
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / split / name)
        content = {
            "images": [{"id": i, "file_name": n, "width": w, "height": h} for i, n, w, h in own],
            "annotations": [{"id": n, **row} for n, row in enumerate(rows[split])],
            "categories": categories,
        }
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("form", ["coco", "voc", "yolo", "cityscapes", "crowdhuman"])
def test_from_every_format(tiny_data: dict[str, Path], tmp_path: Path, form: str, to: str) -> None:
    done = convert_dataset(tiny_data[form], tmp_path / "out", to=to)
    assert (done.format, done.images, done.boxes) == (form, {"train": 3, "val": 1}, {"train": 3, "val": 1})
    assert find_layout(tmp_path / "out").format == to
    for split in ("train", "val"):
        before, after = open_split(tiny_data[form], split), open_split(tmp_path / "out", split)
        assert by_image(after) == by_image(before)
        assert after.sizes.tolist() == before.sizes.tolist()
        assert [after.path(i).read_bytes() for i in range(len(after))] == [
            before.path(i).read_bytes() for i in range(len(before))
        ]


LOST = {
    "coco": {
        "segmentations left out": 1,
        "duplicate boxes left out": 1,
        "images numbered anew, their old ids under `original_id`": 3,
    },
    "voc": {
        "segmentations left out": 1,
        "duplicate boxes left out": 1,
        "areas left out": 2,
        "image ids replaced by the file name": 4,
        "boxes without area left out": 1,
        "classes without boxes left out": 1,
        "category ids changed": 3,
    },
    "yolo": {
        "segmentations left out": 1,
        "duplicate boxes left out": 1,
        "areas left out": 2,
        "image ids replaced by the file name": 4,
        "crowds left out": 1,
        "boxes without area inside their image left out": 2,
        "boxes clipped to their image": 1,
        "category ids changed": 3,
    },
}


NUMBERED = {"images numbered anew, their old ids under `original_id`": 4}


@pytest.mark.parametrize("to", TARGETS)
def test_what_the_target_cannot_hold_is_reported(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    assert cli(["data", "convert", str(source), str(tmp_path / to), "--to", to]) == 0
    said = " ".join(capsys.readouterr().err.split())
    for what, count in LOST[to].items():
        assert f"note: {what}: {count}" in said
    assert convert_dataset(source, tmp_path / "again", to=to).losses == LOST[to]
    assert available_splits(tmp_path / to) == ["train", "val"]
    for split in available_splits(source):
        assert by_image(open_split(tmp_path / to, split)) == by_image(open_split(source, split))


def test_polygons_and_keypoints_are_counted(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    assert convert_dataset(tiny_data["cityscapes"], tmp_path / "c", to="coco").losses["segmentations left out"] == 4
    root = Path(shutil.copytree(tiny_data["yolo"], tmp_path / "yolo"))
    (root / "labels/train/b.txt").write_text("0 .5 .5 .2 .2\n1 .25 .5 .75 .125 .5 .875\n1 .2 .5 .7 .1 .5 .8\n")
    assert convert_dataset(root, tmp_path / "y", to="coco").losses == {"segmentations left out": 2} | NUMBERED
    with (root / "data.yaml").open("a") as file:
        file.write("kpt_shape: [1, 2]\n")
    (root / "labels/train/b.txt").write_text("0 .5 .5 .2 .2 .5 .5\n")
    assert convert_dataset(root, tmp_path / "k", to="coco").losses == {"keypoints left out": 1} | NUMBERED
    coco = Path(shutil.copytree(tiny_data["coco"], tmp_path / "coco"))
    content = json.loads((coco / "train.json").read_text())
    for row, keypoints in zip(content["annotations"], ([3, 4, 2], [], None), strict=True):
        row["keypoints"] = keypoints
    (coco / "train.json").write_text(json.dumps(content))
    assert convert_dataset(coco, tmp_path / "p", to="coco").losses == {"keypoints left out": 1}
    assert split_dataset(coco, tmp_path / "s", val=0, test=0.4).losses == {"keypoints left out": 1}


def test_the_files_of_coco(source: Path, tmp_path: Path) -> None:
    convert_dataset(source, tmp_path / "out", to="coco")
    train = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [(i["id"], i["original_id"], i["file_name"]) for i in train["images"]] == [
        (1, 5, "9.jpg"),
        (2, "x/y", "sub/8.jpg"),
        (3, 3, "7.jpg"),
    ]
    assert [(a["image_id"], a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in train["annotations"]] == [
        (1, 90, [4, 6, 10, 8], 33.5, 0),
        (1, 0, [20.25, 2.5, 8.125, 8], 65, 0),
        (1, 90, [0, 0, 32, 24], 600, 1),
        (2, 7, [-2, 2, 10, 40], 400, 0),
        (2, 7, [3, 3, 9, 9], 81, 0),
        (2, 7, [50, 3, 9, 9], 81, 0),
        (2, 7, [5, 3, 0, 9], 0, 0),
    ]
    val = json.loads((tmp_path / "out" / "val.json").read_text())  # integers stay as they are
    assert val["images"] == [{"id": 10**12, "file_name": "9.jpg", "width": 32, "height": 24}]


def test_the_files_of_yolo(source: Path, tmp_path: Path) -> None:
    convert_dataset(source, tmp_path / "out", to="yolo")
    labels = tmp_path / "out" / "labels" / "train"
    # (4 + 10 / 2) / 32, (6 + 8 / 2) / 24, 10 / 32, 8 / 24; classes in the order of their ids: a b, m & n, unused, zebra
    assert labels.joinpath("9.txt").read_text() == (
        "3 0.28125 0.4166666667 0.3125 0.3333333333\n0 0.759765625 0.2708333333 0.25390625 0.3333333333\n"
    )
    assert labels.joinpath("sub/8.txt").read_text() == "1 0.1666666667 0.53125 0.3333333333 0.9375\n" + (
        "1 0.3125 0.234375 0.375 0.28125\n"
    )
    assert labels.joinpath("7.txt").read_text() == ""


def test_the_files_of_voc(source: Path, tmp_path: Path) -> None:
    convert_dataset(source, tmp_path / "out", to="voc")
    xml = (tmp_path / "out" / "Annotations" / "train" / "9.xml").read_text()
    assert "<name>a b</name>\n    <difficult>0</difficult>" in xml
    corners = "<xmin>21.25</xmin>\n      <ymin>3.5</ymin>\n      <xmax>28.375</xmax>\n      <ymax>10.5</ymax>"
    assert corners in xml  # the last pixel belongs to the box
    assert xml.count("<difficult>1</difficult>") == 1
    assert (tmp_path / "out" / "ImageSets" / "Main" / "train.txt").read_text().split() == [
        "train/9", "train/sub/8", "train/7",
    ]  # fmt: skip


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
    expected = by_image(open_split(tmp_path / "in", "train"))
    assert len(expected["images/9.jpg"]) == 2
    for to in TARGETS:
        convert_dataset(tmp_path / "in", tmp_path / to, to=to)
        assert by_image(open_split(tmp_path / to, "train")) == expected


@pytest.mark.parametrize(
    ("to", "name"),
    [(to, name) for name in ("soft\xadhyphen", "rtl\u200fx", "x\u200by", "<&\"'>") for to in TARGETS]
    + [("yolo", "\x85n"), ("yolo", "a\u2028b"), ("yolo", "tab\t")],
)
def test_names_are_written_as_they_are(source: Path, tmp_path: Path, to: str, name: str) -> None:
    root = Path(shutil.copytree(source, tmp_path / "in"))
    content = json.loads((root / "train.json").read_text())
    class_named(name)(root, content)
    (root / "train.json").write_text(json.dumps(content))
    convert_dataset(root, tmp_path / "out", to=to)
    assert name in open_split(tmp_path / "out", "train").classes.names


def test_hard_links(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["data", "convert", str(source), str(tmp_path / "voc"), "--to", "voc", "--link"]) == 0
    assert "voc from coco: train 3 images 6 boxes, val 1 images 1 boxes" in capsys.readouterr().out
    image = "JPEGImages/train/9.jpg"
    assert (tmp_path / "voc" / image).stat().st_ino == (source / "train" / "9.jpg").stat().st_ino
    assert cli(["data", "convert", str(source), str(tmp_path / "voc"), "--to", "voc"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.EXDEV, "the two folders are on different file systems"), (errno.EMLINK, os.strerror(errno.EMLINK))],
)
def test_links_that_cannot_be_made(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def refuse(*names: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(DataError, match="cannot be linked") as caught:
        convert_dataset(source, tmp_path / "out", to="coco", link=True)
    assert caught.value.message.endswith(f".jpg: cannot be linked: {reason}")
    assert caught.value.remedy == "Leave --link out."


def test_coco_keeps_the_categories_of_every_split(source: Path, tmp_path: Path) -> None:
    """Two of one name, and a split that lists fewer."""
    root = Path(shutil.copytree(source, tmp_path / "in"))
    for split, categories in (("train", {0: "one", 7: "one", 13: "unused", 90: "zebra"}), ("val", {0: "one"})):
        content = json.loads((root / f"{split}.json").read_text())
        content["categories"] = [{"id": own, "name": name} for own, name in categories.items()]
        (root / f"{split}.json").write_text(json.dumps(content))
    convert_dataset(root, tmp_path / "out", to="coco")
    split_dataset(root, tmp_path / "cut", val=0, test=0.4)
    before = open_split(root, "train")
    for made, splits in (("out", ["train"]), ("cut", ["train", "test"])):
        written = [open_split(tmp_path / made, split) for split in splits]
        assert all(split.classes == before.classes for split in written)
        labels = {name: own.labels(i).tolist() for own in written for i, name in enumerate(own.file_names)}
        assert labels == {name: before.labels(i).tolist() for i, name in enumerate(before.file_names)}
        assert open_split(tmp_path / made, "val").classes.id_to_name == {0: "one"}


# ---------------------------------------------------------------------------------------------- mistakes


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for target, found in (
        (tmp_path, r"such as mine\.txt, and nothing is overwritten"),
        (tmp_path / "mine.txt", "in the way"),
    ):
        with pytest.raises(ConfigError, match=found):
            convert_dataset(source, target, to="yolo")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="found 'createml', expected coco, voc or yolo"):
        convert_dataset(source, tmp_path / "x", to="createml")


Change = Callable[[Path, Any], None]


def twin(root: Path, content: Any) -> None:
    shutil.copy(root / "train" / "9.jpg", root / "train" / "9.png")
    content["images"].append(content["images"][0] | {"id": 77, "file_name": "9.png"})


def named(name: str) -> Change:
    """The first image is called so."""

    def change(root: Path, content: Any) -> None:
        (root / "train" / "9.jpg").rename(root / "train" / name)
        content["images"][0]["file_name"] = name

    return change


def one_name(root: Path, content: Any) -> None:
    for category in content["categories"]:
        category["name"] = "one"
    other = json.loads((root / "val.json").read_text()) | {"categories": content["categories"]}
    (root / "val.json").write_text(json.dumps(other))


def fewer_classes(root: Path, content: Any) -> None:
    content["categories"] = [c for c in content["categories"] if c["name"] != "unused"]


def class_named(name: str) -> Change:
    def change(root: Path, content: Any) -> None:
        content["categories"][0]["name"] = name
        other = json.loads((root / "val.json").read_text()) | {"categories": content["categories"]}
        (root / "val.json").write_text(json.dumps(other))

    return change


def other_size(root: Path, content: Any) -> None:
    content["images"][0] |= {"width": 64, "height": 48}


def renamed(to: str) -> Change:
    def change(root: Path, content: Any) -> None:
        (root / "val").rename(root / to)
        (root / "val.json").rename(root / f"{to}.json")

    return change


@pytest.mark.parametrize(
    ("to", "change", "message"),
    [
        ("voc", twin, "train/9.png: another image of train differs in its ending alone"),
        ("coco", named("7.jpg"), "train.json: 2 images have the file_name '7.jpg'"),
        ("yolo", named("7.jpg"), "train.json: 2 images have the file_name '7.jpg'"),
        ("yolo", twin, "train/9.png: another image of train differs in its ending alone"),
        ("voc", named("9.gif"), "train/9.gif: VOC and YOLO are read with images that end in .bmp, .jpeg, "),
        ("yolo", named("9"), "train/9: VOC and YOLO are read with images that end in .bmp, .jpeg, "),
        ("yolo", one_name, "train.json: two categories have the same name"),
        ("voc", fewer_classes, "has other categories than"),
        ("voc", class_named("a\x0bb"), "VOC has no place for the name 'a\\x0bb'"),
        ("yolo", class_named("\ud800"), "train.json: YOLO has no place for the class name '\\ud800'"),
        ("yolo", other_size, "train/9.jpg: is 32x24 pixels, the annotations say 64x48"),
        (
            "yolo",
            renamed("minival"),
            "minival.json: YOLO has no place for the split 'minival', only for train, val, test",
        ),
        ("yolo", renamed("night"), "night.json: YOLO has no place for the split 'night'"),
        ("yolo", renamed("fold 3"), "fold 3.json: YOLO has no place for the split 'fold 3'"),
    ],
)
def test_what_cannot_be_written_is_named(source: Path, tmp_path: Path, to: str, change: Change, message: str) -> None:
    root = Path(shutil.copytree(source, tmp_path / "in"))
    content = json.loads((root / "train.json").read_text())
    change(root, content)
    (root / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        convert_dataset(root, tmp_path / "out", to=to)
    assert message in caught.value.message and ".out." not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("to", TARGETS)
def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match=r"out: cannot be written \(No space left on device\)"):
        convert_dataset(source, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"out: .* is a file, not a folder"):
        convert_dataset(source, tmp_path / "file" / "out", to="coco")


# --------------------------------------------------------------------------------- read by other programs

# File name -> (x, y, width, height, class) of its boxes, as every one of the five sources has them.
EXPECTED = {"a": [(4, 6, 10, 8, "person"), (20, 2, 8, 8, "rider")], "b": [(2, 2, 10, 20, "person")], "c": []}


@pytest.fixture(params=["coco", "voc", "yolo", "cityscapes", "crowdhuman"])
def as_coco(request: pytest.FixtureRequest, tiny_data: dict[str, Path], tmp_path: Path) -> Path:
    convert_dataset(tiny_data[request.param], tmp_path / "out", to="coco")
    return tmp_path / "out"


def expected_of(name: str, names: set[str]) -> list[tuple[Any, ...]]:
    """CrowdHuman has people alone."""
    rows = EXPECTED[Path(name).stem.removesuffix("_leftImg8bit")]
    return sorted((*row[:4], row[4] if row[4] in names else "person") for row in rows)


@pytest.mark.integration
def test_pycocotools_reads_what_is_written(as_coco: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(as_coco / "train.json"))
    names = {category["id"]: category["name"] for category in truth.loadCats(truth.getCatIds())}
    for image_id in truth.getImgIds():
        (image,) = truth.loadImgs(image_id)
        rows = truth.loadAnns(truth.getAnnIds(imgIds=image_id))
        found = sorted((*row["bbox"], names[row["category_id"]]) for row in rows)
        assert found == expected_of(image["file_name"], set(names.values()))
    results = [
        {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"], "score": 0.9}
        for row in truth.dataset["annotations"]
    ]
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


@pytest.mark.integration
def test_torchvision_and_transformers_read_what_is_written(as_coco: Path) -> None:
    from torchvision.datasets import CocoDetection
    from transformers import DetrImageProcessor

    data = CocoDetection(str(as_coco / "train"), str(as_coco / "train.json"))
    processor = DetrImageProcessor(do_resize=False, do_pad=False)
    names = {category["id"]: category["name"] for category in data.coco.dataset["categories"]}
    assert len(data) == 3
    for (picture, rows), image_id in zip(data, data.ids, strict=True):
        target = {"image_id": image_id, "annotations": rows}
        encoded = processor(images=picture, annotations=target, format="coco_detection", return_tensors="pt")
        (labels,) = encoded["labels"]
        assert labels["image_id"].tolist() == [image_id]
        boxes = labels["boxes"].numpy() * np.array([picture.width, picture.height] * 2)  # cxcywh
        boxes[:, :2] -= boxes[:, 2:] / 2
        found = sorted(
            (*box, names[label]) for box, label in zip(boxes.round(3).tolist(), labels["class_labels"].tolist(), strict=True)
        )  # fmt: skip
        expected = expected_of(data.coco.imgs[image_id]["file_name"], set(names.values()))
        assert [row[4] for row in found] == [row[4] for row in expected]
        assert np.allclose([row[:4] for row in found], [row[:4] for row in expected], atol=0.01)


@pytest.mark.integration
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("form", ["coco", "yolo", "crowdhuman"])
def test_supervision_reads_what_is_written(tiny_data: dict[str, Path], tmp_path: Path, form: str, to: str) -> None:
    import supervision

    root = tmp_path / "out"
    convert_dataset(tiny_data[form], root, to=to)
    if to == "coco":
        data = supervision.DetectionDataset.from_coco(str(root / "train"), str(root / "train.json"))
    elif to == "yolo":
        data = supervision.DetectionDataset.from_yolo(
            str(root / "images/train"), str(root / "labels/train"), str(root / "data.yaml")
        )
    else:
        data = supervision.DetectionDataset.from_pascal_voc(
            str(root / "JPEGImages/train"), str(root / "Annotations/train")
        )
    assert len(data) == 3
    for path, _, found in data:
        corners = sorted(
            (*box, data.classes[label]) for box, label in zip(found.xyxy.tolist(), found.class_id, strict=True)
        )
        expected = expected_of(path, {"person"} if form == "crowdhuman" else {"person", "rider"})
        assert [row[4] for row in corners] == [row[4] for row in expected]
        boxes = [(x, y, x + w, y + h) for x, y, w, h, _ in expected]
        assert np.allclose([row[:4] for row in corners], boxes, atol=1.01 if to == "voc" else 0.01)


@pytest.mark.integration
@pytest.mark.parametrize("to", ["coco", "yolo", "voc"])
def test_what_is_lost_breaks_nothing_for_others(source: Path, tmp_path: Path, to: str) -> None:
    """Texts as ids, crowds, boxes over the edge and outside."""
    import supervision
    from torchvision.datasets import CocoDetection

    convert_dataset(source, tmp_path / "x", to=to)
    convert_dataset(tmp_path / "x", tmp_path / "back", to="coco")
    data = CocoDetection(str(tmp_path / "back/train"), str(tmp_path / "back/train.json"))
    assert all(isinstance(own, int) for own in data.ids) and len(data) == 3
    assert all(isinstance(row["image_id"], int) for _, rows in data for row in rows)
    read = supervision.DetectionDataset.from_coco(str(tmp_path / "back/train"), str(tmp_path / "back/train.json"))
    assert len(read) == 3
