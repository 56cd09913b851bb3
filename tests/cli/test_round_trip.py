"""What `predict` writes is read by `eval` and by the programs that read COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paqdetr.cli import run
from paqdetr.runs import Run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def truth(tiny_digits: Path) -> Path:
    return tiny_digits / "val.json"


@pytest.fixture(scope="module")
def written(tiny_run: Run, tiny_digits: Path, truth: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """predictions.json with the ids of the annotations, and with file names alone."""
    folder = tmp_path_factory.mktemp("predicted")
    arguments = ["predict", str(tiny_run.best), str(tiny_digits / "val"), "--threshold", "0.01"]
    assert run([*arguments, "--output", str(folder / "ids"), "--annotations", str(truth)]) == 0
    assert run([*arguments, "--output", str(folder / "names")]) == 0
    # The model has hardly learnt: one detection of each image is put where an object is, so that the figures are not all zero.
    objects = {row["image_id"]: row for row in json.loads(truth.read_text(encoding="utf-8"))["annotations"]}
    names = {row["id"]: row["name"] for row in json.loads(truth.read_text(encoding="utf-8"))["categories"]}
    images = {row["file_name"]: row["id"] for row in json.loads(truth.read_text(encoding="utf-8"))["images"]}
    for name in ("ids", "names"):
        file = folder / name / "predictions.json"
        rows = json.loads(file.read_text())
        for image, number in images.items():
            best = next(row for row in rows if row["file_name"] == image)
            category = objects[number]["category_id"]
            best |= {"bbox": objects[number]["bbox"], "category_id": category, "category_name": names[category]}
        file.write_text(json.dumps(rows))
    return {name: folder / name / "predictions.json" for name in ("ids", "names")}


@pytest.fixture(scope="module")
def rows(written: dict[str, Path]) -> list[dict[str, Any]]:
    found = json.loads(written["ids"].read_text())
    assert len(found) > 20 and {row["image_id"] for row in found} == {1, 2, 3, 4}
    return found


def test_eval(
    written: dict[str, Path], truth: Path, tiny_digits: Path, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    """By id, by file name, against a json and against a data set; and the same if a row has only one of the two."""
    reduced = {}
    for key in ("image_id", "file_name"):
        reduced[key] = tmp_path / f"{key}.json"
        reduced[key].write_text(json.dumps([{k: v for k, v in row.items() if k != key} for row in rows]))
    figures = []
    for results in (*written.values(), *reduced.values()):
        for against in (["--annotations", str(truth)], ["--data", str(tiny_digits)]):
            out = tmp_path / "out.json"
            assert run(["eval", "--results", str(results), *against, "--json", str(out)]) == 0
            figures.append(json.loads(out.read_text()))
            assert figures[-1].pop("source")["results"] == str(results)
    assert len(figures) == 8 and all(one == figures[0] for one in figures)
    assert figures[0]["AR100"] > 0


def test_pycocotools(written: dict[str, Path], truth: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    out = tmp_path / "out.json"
    arguments = ["--annotations", str(truth), "--json", str(out)]
    assert run(["eval", "--results", str(written["ids"]), *arguments]) == 0
    expected = json.loads(out.read_text())
    annotations = COCO(str(truth))
    evaluation = COCOeval(annotations, annotations.loadRes(str(written["ids"])), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(expected["AP"], abs=1e-12)
    assert evaluation.stats[8] == pytest.approx(expected["AR100"], abs=1e-12) and expected["AR100"] > 0


@pytest.fixture(scope="module")
def as_annotations(written: dict[str, Path], truth: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The predictions as a data set of their own, as pycocotools completes them."""
    from pycocotools.coco import COCO

    path = tmp_path_factory.mktemp("annotations") / "predicted.json"
    path.write_text(json.dumps(COCO(str(truth)).loadRes(str(written["ids"])).dataset))
    return path


def test_supervision(as_annotations: Path, tiny_digits: Path, rows: list[dict[str, Any]]) -> None:
    import supervision

    data = supervision.DetectionDataset.from_coco(str(tiny_digits / "val"), str(as_annotations))
    assert len(data) == 4
    for path, _, found in data:
        own = [row for row in rows if row["file_name"] == Path(path).name]
        x, y, width, height = np.array([row["bbox"] for row in own]).T
        assert np.allclose(found.xyxy, np.stack([x, y, x + width, y + height], axis=1), atol=1e-3)
        assert [data.classes[label] for label in found.class_id] == [row["category_name"] for row in own]


def test_torchvision_and_transformers(as_annotations: Path, tiny_digits: Path, rows: list[dict[str, Any]]) -> None:
    from torchvision.datasets import CocoDetection
    from transformers import DetrImageProcessor

    data = CocoDetection(str(tiny_digits / "val"), str(as_annotations))
    processor = DetrImageProcessor(do_resize=False, do_pad=False)
    for (picture, found), image_id in zip(data, data.ids, strict=True):
        target = {"image_id": image_id, "annotations": found}
        encoded = processor(images=picture, annotations=target, format="coco_detection", return_tensors="pt")
        own = [row for row in rows if row["image_id"] == image_id and min(row["bbox"][2:]) > 0]
        (labels,) = encoded["labels"]
        boxes = labels["boxes"].numpy() * 96  # cxcywh
        boxes[:, :2] -= boxes[:, 2:] / 2
        assert np.allclose(boxes, [row["bbox"] for row in own], atol=0.01)
        assert labels["class_labels"].tolist() == [row["category_id"] for row in own]
