"""What is measured of a run: by hand, and against the images that each figure belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.metrics import resample_images
from paqdetr.metrics.diagnosis import MISTAKES
from paqdetr.models import load
from paqdetr.runs import Run
from paqdetr.structures import Detections
from paqdetr.study.measure import learning_curve, measure_detections, measure_model
from paqdetr.study.results import RunResult, read_result
from paqdetr.study.runs import RunKey

BOX = (10.0, 10.0, 50.0, 50.0)


def test_the_loss_of_a_curve_weighs_records_by_their_steps(tmp_path: Path) -> None:
    """Records each 4 steps in epochs of 5, evaluated every second one: the last of an epoch is of a single step."""
    run = Run(tmp_path)
    for step, loss in ((4, 2.0), (5, 7.0), (8, 1.0), (10, 4.0)):
        run.append({"kind": "train", "step": step, "loss": loss})
    run.append({"kind": "eval", "step": 10, "AP": 0.5})
    run.append({"kind": "train", "step": 12, "loss": 6.0})
    run.append({"kind": "eval", "step": 12, "AP": None})
    run.append({"kind": "eval", "step": 13, "AP": 0.25})
    rows = [(row["step"], row["AP"], row["loss"]) for row in learning_curve(run.records())]
    assert rows == [(10, 0.5, (4 * 2 + 7 + 3 * 1 + 2 * 4) / 10), (12, None, 6.0), (13, 0.25, None)]


def test_what_is_measured_of_a_model_agrees_with_itself(tiny_run: Run, tiny_digits: Path) -> None:
    split = open_split(tiny_digits, "val")
    model = load(tiny_run.last)
    figures, _ = measure_model(model, split, replicates=5, seed=0)
    stages = figures["layers"]
    assert stages[0]["stage"] == "proposals" and len(stages) == 1 + len(model.decoder.layers)
    for name in ("AP", "AP_nms", "predictions_per_image"):
        assert stages[-1][name] == pytest.approx(figures[name], abs=1e-4), name
    assert 0 <= figures["queries"]["query_share"] <= figures["queries"]["image_share"] <= 1
    assert set(figures["mistakes"]) == set(MISTAKES)
    json.dumps(figures, allow_nan=False)


def split_of(folder: Path, boxes: dict[int, int]) -> DetectionDataset:
    """Images with these ids, in this order, each with so many boxes, all of them `BOX` in size and apart."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 512} for i in boxes],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 100 * i + n, "image_id": i, "category_id": 1, "bbox": [10 + 60 * n, 10, 40, 40]}
            for i, count in boxes.items()
            for n in range(count)
        ],
    }
    for i in boxes:
        (folder / f"{i}.jpg").touch()
    file = folder / "val.json"
    file.write_text(json.dumps(content))
    return DetectionDataset.from_json(file, folder)


def detected(image: int, scores: list[float]) -> Detections:
    """The first box of an image, found so many times."""
    count = len(scores)
    boxes = np.tile(np.array([BOX], dtype=np.float32), (count, 1))
    return Detections(boxes, np.array(scores, dtype=np.float32), np.ones(count, int), {1: "thing"}, image)


def test_figures_of_a_resample_are_of_the_same_images(tmp_path: Path) -> None:
    """Ids do not ascend, as in COCO's own files. Nothing but the box of image 30 is found, so AP and the number of
    predictions of a resample both follow from how often it was drawn."""
    split = split_of(tmp_path, {30: 1, 10: 1, 20: 1})
    found = [detected(image, [0.9] if image == 30 else []) for image in (10, 30, 20)]
    figures, values = measure_detections(split, found, replicates=40, seed=0)
    assert figures["predictions_per_image"] == 0.3333 and figures["AP"] == pytest.approx(34 / 101, abs=1e-6)
    drawn = resample_images(3, 40, 0)[:, 2]  # the largest id is the last
    assert set(drawn.tolist()) == {0, 1, 2, 3}
    assert values["predictions_per_image"] == pytest.approx(drawn / 3)
    assert values["AP"] == pytest.approx(np.array([0, 34, 67, 101])[drawn] / 101)


@pytest.mark.filterwarnings("error")
def test_a_resample_without_an_object_has_no_ap(tmp_path: Path) -> None:
    split = split_of(tmp_path, {1: 0, 2: 1, 3: 0})
    found = [detected(image, [0.9]) for image in (1, 2, 3)]
    _, values = measure_detections(split, found, replicates=30, seed=0)
    absent = resample_images(3, 30, 0)[:, 1] == 0
    assert 0 < absent.sum() < 29
    for name in ("AP", "AP50", "AP_nms"):
        assert np.array_equal(np.isnan(values[name]), absent), name
    assert values["predictions_per_image"] == pytest.approx(1)
    result = RunResult(RunKey("digits", "new", 0), None, {}, replicates={"last": values})
    file = tmp_path / "result.json"
    file.write_text(result.to_text())
    again = read_result(file)
    assert again is not None
    for name, kept in again.replicates["last"].items():
        assert kept == pytest.approx(values[name], abs=1e-5, nan_ok=True), name
