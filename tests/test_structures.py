from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paqdetr.data.annotations import Annotations, Issues
from paqdetr.data.layout import find_layout
from paqdetr.errors import BackendError, ConfigError, DataError
from paqdetr.metrics import evaluate_detections
from paqdetr.structures import ClassTable, Detection, Detections, Targets


@pytest.fixture
def found() -> Detections:
    return Detections(
        boxes=np.array([[10, 20, 30, 60], [0, 0, 5, 5.5], [1, 2, 3, 4]], dtype=np.float32),
        scores=np.array([0.9, 0.5, 0.25], dtype=np.float32),
        labels=np.array([7, 3, 99]),
        names={7: "cat", 3: "dog"},
        image_id=42,
        query_indices=np.array([4, 0, 2]),
    )


def test_above(found: Detections) -> None:
    kept = found.above(0.5)  # at least
    assert len(kept) == 2 and len(found) == 3
    assert kept.boxes.tolist() == [[10, 20, 30, 60], [0, 0, 5, 5.5]]
    assert kept.labels.tolist() == [7, 3] and kept.image_id == 42 and kept.names == found.names
    assert kept.query_indices is not None and kept.query_indices.tolist() == [4, 0]
    assert len(found.above(1.0)) == 0 and len(found.above(0.0)) == 3
    found.query_indices = None
    assert found.above(0.5).query_indices is None


def test_to_coco(found: Detections) -> None:
    rows = found.to_coco()
    assert rows[0] == {
        "image_id": 42,
        "category_id": 7,
        "category_name": "cat",
        "bbox": [10.0, 20.0, 20.0, 40.0],
        "score": pytest.approx(0.9),
    }
    assert rows[1]["bbox"] == [0.0, 0.0, 5.0, 5.5] and rows[2]["category_id"] == 99
    assert "category_name" not in rows[2]  # a class without a name: its id is none
    assert json.loads(json.dumps(rows)) == rows  # plain numbers, no numpy
    assert found.above(1.0).to_coco() == []


def test_to_coco_rounded(found: Detections) -> None:
    found.boxes[0] = [10 / 3, 20, 30, 60]
    found.scores[0] = 2 / 3
    found.file_name = "street.jpg"
    (row,) = found.above(0.6).to_coco(rounded=True)
    assert list(row) == ["image_id", "file_name", "category_id", "category_name", "bbox", "score"]
    assert row["file_name"] == "street.jpg"
    assert json.dumps(row["bbox"]) == "[3.33, 20.0, 26.67, 40.0]" and json.dumps(row["score"]) == "0.66667"
    (exact,) = found.above(0.6).to_coco()
    assert exact["score"] == float(np.float32(2 / 3))


def test_to_supervision(found: Detections) -> None:
    other = found.to_supervision()
    assert other.xyxy.tolist() == found.boxes.tolist()
    assert other.confidence is not None and other.confidence.tolist() == found.scores.tolist()
    assert other.class_id is not None and other.class_id.tolist() == [7, 3, 99]
    assert other.data["class_name"].tolist() == ["cat", "dog", "99"]  # a class without a name shows its id
    empty = found.above(1.0).to_supervision()
    assert len(empty) == 0 and empty.xyxy.shape == (0, 4)


# ------------------------------------------------------------------------------------------ rows and classes


NAMES = {7: "cat", 3: "dog", 8: "a bird"}


@st.composite
def some_detections(draw: st.DrawFn, least: int = 0) -> Detections:
    """Of an image of 64 x 48, whole or cut off at the border."""
    count = draw(st.integers(least, 6))
    side = st.floats(0, 1, width=32)
    corners = np.array([[draw(side) for _ in range(4)] for _ in range(count)], np.float32).reshape(-1, 2, 2)
    boxes = np.concatenate([corners.min(1) * [60, 44], corners.max(1) * [60, 44] + [4, 4]], axis=1)
    return Detections(
        boxes=boxes.astype(np.float32),
        scores=np.array([draw(side) for _ in range(count)], np.float32),
        labels=np.array([draw(st.sampled_from(list(NAMES))) for _ in range(count)], np.int64),
        names=NAMES,
        image_id=1,
        query_indices=np.arange(count),
        file_name="a.png",
        size=(48, 64),
    )


def columns(found: Detections) -> list[np.ndarray]:
    assert found.query_indices is not None
    return [found.boxes, found.scores, found.labels, found.query_indices]


@given(some_detections(), st.data())
def test_brackets_are_those_of_numpy(found: Detections, data: st.DataObject) -> None:
    """Every kind of key, against the same key on each array."""
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found))), bool)
    places = data.draw(st.lists(st.integers(-len(found), len(found) - 1), max_size=8)) if len(found) else []
    cut = data.draw(st.slices(len(found)))
    for key, same in (
        (mask, mask),
        (mask.tolist(), mask),
        (torch.from_numpy(mask), mask),
        (found.scores > 0.5, found.scores > 0.5),
        (places, np.array(places, int)),
        (np.array(places, np.int32), np.array(places, int)),
        (cut, cut),
        ("cat", found.labels == 7),
        (["dog", "a bird"], np.isin(found.labels, [3, 8])),
    ):
        some = found[key]
        for a, b in zip(columns(some), columns(found), strict=True):
            assert a.tolist() == b[same].tolist()
        assert (some.names, some.image_id, some.file_name, some.size) == (NAMES, 1, "a.png", (48, 64))
    assert list(found) == [found[i] for i in range(len(found))] and len(list(found)) == len(found)
    assert sum(len(found[name]) for name in NAMES.values()) == len(found)
    assert found.of("cat", 3) == found[(found.labels == 7) | (found.labels == 3)]
    assert found.above(0.5) == found[found.scores >= 0.5]


def test_one_of_them_is_plain_numbers(found: Detections) -> None:
    assert found[0] == found[np.int64(-3)] == Detection((10.0, 20.0, 30.0, 60.0), pytest.approx(0.9), 7, "cat")
    assert [one.name for one in found] == ["cat", "dog", "99"] == found.class_names
    for box, score, label, name in found[:1]:
        assert (type(box[0]), type(score), type(label), name) == (float, float, int, "cat")
    assert len(found["99"]) == len(found.of(99)) == 1  # a class without a name shows its id


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        (3, IndexError, "position 3 does not exist, there are 3"),
        (-4, IndexError, "position -4 does not exist"),
        ([0, 3], IndexError, "out of bounds"),
        ([True, False], IndexError, "or a mask of 3 bool"),
        (np.zeros(4, bool), IndexError, "or a mask of 3 bool"),
        (np.zeros((3, 1), bool), IndexError, "expected a position"),
        (np.True_, IndexError, "expected a position"),
        (0.5, IndexError, "found 0.5 in brackets"),
        (None, IndexError, "found None in brackets"),
        ([0.0, 1.0], IndexError, "expected a position"),
        ("cta", ConfigError, "no class 'cta' .*did you mean 'cat'"),
        (["cat", "bird"], ConfigError, "no class 'bird'"),
    ],
)
def test_keys_that_are_none(found: Detections, key: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        found[key]


@given(some_detections(least=1))
def test_copies_are_equal_and_others_are_not(found: Detections) -> None:
    found.source = np.zeros((48, 64, 3), np.uint8)
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), found[:]):
        assert other == found
    assert found[:-1] != found and found != "cat"
    moved = copy.deepcopy(found)
    moved.boxes[0, 0] += 1
    assert moved != found


# -------------------------------------------------------------------------------------------- other forms


def xywh(found: Detections) -> np.ndarray:
    return np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], axis=1)


def read_back(folder: Path) -> Annotations:
    return find_layout(folder).splits["train"].read(Issues())


def same_boxes(read: Annotations, found: Detections, tolerance: float) -> None:
    """In the same order, under the same names."""
    assert [read.classes.names[label] for label in read.labels] == found.class_names
    assert np.abs(read.boxes.reshape(-1, 4) - xywh(found)).max(initial=0) <= tolerance


def fresh(folder: Path) -> Path:
    """A folder of its own for each example."""
    place = folder / str(sum(1 for _ in folder.iterdir()))
    place.mkdir()
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forms")


@settings(max_examples=25)
@given(found=some_detections(least=1))
def test_coco_is_read_back(folder: Path, found: Detections) -> None:
    """Results as the annotations of a data set, and against themselves: AP is 1."""
    place = fresh(folder)
    (place / "train").mkdir()
    Image.new("RGB", (64, 48)).save(place / "train" / "a.png")
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "categories": [{"id": i, "name": name} for i, name in NAMES.items()],
        "annotations": [{"id": i, **row} for i, row in enumerate(found.to_coco(), start=1)],
    }
    (place / "train.json").write_text(json.dumps(truth))
    same_boxes(read_back(place), found, 1e-5)
    one = found[:1]
    assert evaluate_detections({**truth, "annotations": truth["annotations"][:1]}, one.to_coco()).AP == pytest.approx(1)


@settings(max_examples=25)
@given(found=some_detections())
def test_yolo_is_read_back(folder: Path, found: Detections) -> None:
    place = fresh(folder)
    (place / "images").mkdir()
    (place / "labels").mkdir()
    Image.new("RGB", (64, 48)).save(place / "images" / "a.png")
    (place / "labels" / "a.txt").write_text(found.to_yolo())
    (place / "data.yaml").write_text(json.dumps({"train": "images", "names": list(found.names.values())}))
    same_boxes(read_back(place), found, 1e-4)
    with_scores = [line.split() for line in found.to_yolo(scores=True).splitlines()]
    assert [float(words[5]) for words in with_scores] == pytest.approx(found.scores.tolist(), abs=1e-6)


@settings(max_examples=25)
@given(found=some_detections(least=1))
def test_voc_is_read_back(folder: Path, found: Detections) -> None:
    place = fresh(folder)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (place / name).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(place / "JPEGImages" / "a.png")
    (place / "Annotations" / "a.xml").write_text(found.to_voc(), encoding="utf-8")
    (place / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    read = read_back(place)
    same_boxes(read, found, 0.011)
    assert read.sizes.tolist() == [[48, 64]] and read.file_names == ("a.png",)


@given(some_detections())
def test_supervision_and_pandas_have_the_same(found: Detections) -> None:
    other, table = found.to_supervision(), found.to_pandas()
    assert other.xyxy.tolist() == found.boxes.tolist() == table[["x1", "y1", "x2", "y2"]].to_numpy().tolist()
    assert list(other.data["class_name"]) == table["name"].tolist() == found.class_names
    assert table["score"].tolist() == found.scores.tolist() and table["label"].tolist() == found.labels.tolist()
    assert len(table) == len(found) and set(table["image_id"]) <= {1}


@given(some_detections())
def test_fiftyone(found: Detections) -> None:
    """Against its documented form: [left, top, width, height] as shares of the image."""
    made = SimpleNamespace(Detection=lambda **own: own, Detections=lambda detections: detections)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fiftyone", made)
        rows = found.to_fiftyone()
    boxes = np.array([row["bounding_box"] for row in rows]).reshape(-1, 4) * [64, 48, 64, 48]
    assert np.abs(boxes - xywh(found)).max(initial=0) < 1e-4
    assert [row["label"] for row in rows] == found.class_names
    assert [row["confidence"] for row in rows] == found.scores.tolist()


@pytest.mark.parametrize(("package", "form"), [("pandas", "to_pandas"), ("fiftyone", "to_fiftyone")])
def test_a_package_that_is_missing(found: Detections, package: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=f"{package}.* \\(pip install {package}\\)"):
        getattr(found, form)()


@pytest.mark.parametrize("form", ["to_yolo", "to_voc", "to_fiftyone"])
def test_a_size_that_is_missing(found: Detections, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fiftyone", SimpleNamespace())
    with pytest.raises(DataError, match=r"size of the image is not known .*detections\.size"):
        getattr(found, form)()


def test_yolo_has_no_number_for_a_class_without_a_name(found: Detections) -> None:
    found.size = (100, 100)
    with pytest.raises(DataError, match="label 99 is not among `names`"):
        found.to_yolo()
    assert found[:2].to_yolo(scores=True) == (
        "0 0.200000 0.400000 0.200000 0.400000 0.900000\n1 0.025000 0.027500 0.050000 0.055000 0.500000\n"
    )


# ------------------------------------------------------------------------------------------------- shown


def test_repr_is_a_line_and_str_a_table(found: Detections) -> None:
    assert repr(found) == "Detections(3 in 42: cat (1), dog (1), 99 (1))"
    assert str(found).splitlines()[1:] == [
        "  cat  0.90  [10.0, 20.0, 30.0, 60.0]",
        "  dog  0.50  [0.0, 0.0, 5.0, 5.5]",
        "  99   0.25  [1.0, 2.0, 3.0, 4.0]",
    ]
    many = found[np.zeros(500, int)]
    many.file_name, many.image_id = "a\x1b.jpg", None
    assert repr(many) == r"Detections(500 in a\x1b.jpg: cat (500))"
    assert len(str(many).splitlines()) == 22 and "480 more" in str(many)
    assert str(found.above(1.0)) == repr(found.above(1.0)) == "Detections(0 in 42)"


def test_html_escapes_what_files_say(found: Detections) -> None:
    found.names = {7: "<script>alert(1)</script>", 3: 'a "b" & c'}
    page = found._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "&amp; c" in page and "<img" not in page
    found.source = Image.new("RGB", (2000, 100))
    assert found._repr_html_().startswith('<div><img src="data:image/')
    assert len(found.above(1.0)._repr_html_()) > 100


def test_draw_leaves_the_picture_alone(found: Detections) -> None:
    picture = Image.new("RGB", (80, 80), (10, 10, 10))
    drawn = found.draw(picture)
    assert drawn.size == (80, 80) and drawn is not picture
    assert picture.getcolors() == [(6400, (10, 10, 10))]
    assert len(drawn.getcolors() or []) > 1


def test_targets() -> None:
    targets = Targets(torch.tensor([1, 2]), torch.rand(2, 4), image_id="x", size=(480, 640))
    assert len(targets) == 2
    moved = targets.to("cpu")
    assert torch.equal(moved.labels, targets.labels) and torch.equal(moved.boxes, targets.boxes)
    assert (moved.image_id, moved.size) == ("x", (480, 640))
    assert len(Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))) == 0


def test_class_table() -> None:
    table = ClassTable.from_categories(
        [{"id": 90, "name": "cat", "supercategory": "x"}, {"id": 3, "name": "dog"}, {"id": 17, "name": 5}]
    )
    assert table == ClassTable((3, 17, 90), ("dog", "5", "cat"))
    assert len(table) == 3
    assert table.id_to_index == {3: 0, 17: 1, 90: 2}
    assert table.id_to_name == {3: "dog", 17: "5", 90: "cat"}
    assert [table.ids[table.id_to_index[category]] for category in table.ids] == [3, 17, 90]


@pytest.mark.parametrize(
    ("own", "other", "rows"),
    [
        ([(1, "cat"), (2, "dog")], [(7, "Dog"), (8, "CAT")], [(1, 0), (0, 1)]),
        ([(0, "A"), (1, "a"), (2, "b")], [(0, "a"), (1, "A"), (2, "c")], [(1, 0), (0, 1)]),
        ([(0, "A"), (1, "a")], [(0, "a")], [(1, 0)]),
        ([(0, "A"), (1, "a")], [(0, "a"), (1, "á")], [(1, 0)]),
        ([(0, "Car"), (1, "car")], [(0, "CAR")], []),  # which of the two, nobody knows
        ([(0, "red"), (1, "red"), (2, "blue")], [(0, "red"), (1, "red"), (2, "blue")], [(0, 0), (1, 1), (2, 2)]),
        ([(0, "red"), (1, "red")], [(1, "red"), (5, "red")], [(1, 0), (0, 1)]),
        ([], [(1, "cat")], []),
    ],
)
def test_rows_of_the_same_classes(
    own: list[tuple[int, str]], other: list[tuple[int, str]], rows: list[tuple[int, int]]
) -> None:
    tables = [ClassTable(tuple(i for i, _ in side), tuple(name for _, name in side)) for side in (own, other)]
    assert tables[0].rows_in(tables[1]) == rows
    assert sorted((its, mine) for mine, its in tables[1].rows_in(tables[0])) == sorted(rows)
    for table in tables:
        assert table.rows_in(table) == [(row, row) for row in range(len(table))]


def test_numbered_class_table() -> None:
    table = ClassTable.numbered(3)
    assert table.ids == (0, 1, 2) and table.names == ("class 0", "class 1", "class 2")
    assert len(ClassTable.numbered(0)) == 0
