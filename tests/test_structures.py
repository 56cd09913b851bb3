from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from paqdetr.structures import ClassTable, Detections, Targets


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
    assert rows[2]["category_name"] == "99"  # a class without a name shows its id
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


def test_numbered_class_table() -> None:
    table = ClassTable.numbered(3)
    assert table.ids == (0, 1, 2) and table.names == ("class 0", "class 1", "class 2")
    assert len(ClassTable.numbered(0)) == 0
