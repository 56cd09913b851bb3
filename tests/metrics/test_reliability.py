"""Calibration by hand, of made-up detectors that are calibrated, and against hotcoco's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import hotcoco
import numpy as np
import pytest

from paqdetr.errors import ConfigError, DataError
from paqdetr.metrics.coco import CocoRecords
from paqdetr.metrics.diagnosis import calibration
from paqdetr.metrics.matches import MatchTable

BOX, FAR = [0.0, 0.0, 100.0, 100.0], [300.0, 0.0, 100.0, 100.0]


def table(rows: list[tuple[list[float], float]], crowd: int = 0) -> MatchTable:
    """An object BOX in each image, and one detection (box, score) in each."""
    truth = {
        "images": [{"id": i} for i in range(len(rows))],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"image_id": i, "category_id": 1, "bbox": BOX, "iscrowd": int(i < crowd)} for i in range(len(rows))
        ],
    }
    results = [{"image_id": i, "category_id": 1, "bbox": box, "score": score} for i, (box, score) in enumerate(rows)]
    return MatchTable.match(truth, results)


def test_by_hand() -> None:
    # Scores .9 and 1: both right. Scores .5 and .55: one right. Score .2: matched to a crowd, it does not count.
    own = calibration(table([(BOX, 0.2), (BOX, 0.9), (BOX, 1.0), (BOX, 0.5), (FAR, 0.55)], crowd=1), bins=10)
    assert own.counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert own.confidence[[5, 9]] == pytest.approx([0.525, 0.95])
    assert own.accuracy[[5, 9]] == pytest.approx([0.5, 1.0])
    assert own.error == pytest.approx((2 * 0.025 + 2 * 0.05) / 4)
    assert own.largest_error == pytest.approx(0.05)
    assert own.chance == pytest.approx(math.sqrt(1 / math.pi) * (math.sqrt(0.525 * 0.475) + math.sqrt(0.95 * 0.05)) / 2)
    written = own.to_json()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert written["bins"][0] == {"low": 0.0, "high": 0.1, "detections": 0, "confidence": None, "accuracy": None}


def test_localisation_counts_where_it_is_asked_for() -> None:
    shifted = [20.0, 0.0, 100.0, 100.0]  # IoU 2/3: right at 4 of the 10 thresholds
    own = table([(shifted, 0.4), (shifted, 0.4)])
    assert calibration(own).error == pytest.approx(0.6)
    assert calibration(own, iou_threshold=None).error == pytest.approx(0.0)
    assert calibration(own, iou_threshold=0.75).error == pytest.approx(0.4)


def test_what_lies_in_a_crowd_is_about_no_object() -> None:
    """IoU .92 with a crowd: ignored at nine of the ten thresholds."""
    own = table([([0.0, 0.0, 92.0, 100.0], 0.95)] * 4 + [(BOX, 0.95)], crowd=4)
    for iou in (0.5, None):
        found = calibration(own, iou_threshold=iou)
        assert found.counts.sum() == 1 and found.error == pytest.approx(0.05)


def test_a_calibrated_detector() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(1500)
    right = rng.random(1500) < scores
    rows = [(BOX if hit else FAR, float(score)) for hit, score in zip(right, scores, strict=True)]
    # 150 in a bin: accuracy is known to about .035, and the mean distance is .8 of that.
    assert calibration(table(rows)).error < 0.045
    overconfident = [(box, math.sqrt(score)) for box, score in rows]
    # E[sqrt(s) - s] = 2/3 - 1/2
    assert calibration(table(overconfident)).error == pytest.approx(1 / 6, abs=0.03)
    for count in (30, 100, 1000):  # exact scores have the error that chance gives them
        errors, chances = [], []
        for _ in range(30):
            scores = rng.uniform(0.3, 1, count)
            hits = rng.random(count) < scores
            rows = [(BOX if hit else FAR, float(score)) for hit, score in zip(hits, scores, strict=True)]
            found = calibration(table(rows))
            errors.append(found.error)
            chances.append(found.chance)
        assert np.mean(errors) == pytest.approx(np.mean(chances), rel=0.15)


def test_score_threshold_and_nothing() -> None:
    own = table([(BOX, 0.9), (FAR, 0.1)])
    assert calibration(own, score_threshold=0.5).counts.sum() == 1
    assert math.isnan(calibration(own, score_threshold=0.95).error)


def test_equal_to_hotcoco(make_problem: Callable[..., Any]) -> None:
    truth, results = make_problem(7, images=20)
    records = CocoRecords.open(truth, "bbox")
    dataset = hotcoco.COCO(records.ground_truth())
    evaluation = hotcoco.COCOeval(dataset, dataset.load_res(records.results(results)), "bbox")
    evaluation.evaluate()
    for iou in (0.5, 0.75):
        expected = evaluation.calibration(n_bins=10, iou_threshold=iou)
        own = calibration(MatchTable.match(truth, results), iou_threshold=iou)
        assert own.counts.tolist() == [row["count"] for row in expected["bins"]]
        assert (own.error, own.largest_error) == pytest.approx((expected["ece"], expected["mce"]))


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="0 bins"):
        calibration(table([(BOX, 0.5)]), bins=0)
    with pytest.raises(DataError, match=r"scores lie between 0\.5 and 7"):
        calibration(table([(BOX, 0.5), (BOX, 7.0)]))
