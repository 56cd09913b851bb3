"""Curves by hand, and against the figures they are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paqdetr.metrics import evaluate_detections
from paqdetr.metrics.diagnosis import precision_recall, threshold_curves
from paqdetr.metrics.matches import MatchTable

BOX, FAR = [10.0, 10.0, 50.0, 50.0], [300.0, 10.0, 50.0, 50.0]


@pytest.fixture
def small() -> MatchTable:
    """Three cats, one dog nobody finds, no bird. Scores of cats: right .9, wrong .7, right .6, right .2."""
    truth = {
        "images": [{"id": i} for i in range(3)],
        "categories": [{"id": c, "name": name} for c, name in enumerate(("cat", "dog", "bird"))],
        "annotations": [
            *({"image_id": i, "category_id": 0, "bbox": BOX} for i in range(3)),
            {"image_id": 0, "category_id": 1, "bbox": FAR},
        ],
    }
    rows = [(0, 0, BOX, 0.9), (0, 0, FAR, 0.7), (1, 0, BOX, 0.6), (2, 0, BOX, 0.2)]
    keys = ("image_id", "category_id", "bbox", "score")
    return MatchTable.match(truth, [dict(zip(keys, row, strict=True)) for row in rows])


def test_thresholds_by_hand(small: MatchTable) -> None:
    own = threshold_curves(small)
    at = [20, 21, 60, 61, 90, 91]  # .20, .21, ...: a detection that scores exactly the threshold is kept
    assert own.thresholds[at] == pytest.approx([0.2, 0.21, 0.6, 0.61, 0.9, 0.91])
    cat, dog, bird, everything = range(4)
    nan = np.nan
    np.testing.assert_allclose(own.precision[cat, at], [3 / 4, 2 / 3, 2 / 3, 1 / 2, 1, nan])
    np.testing.assert_allclose(own.recall[cat, at], [1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(own.f1[cat, at], [6 / 7, 4 / 6, 4 / 6, 2 / 5, 2 / 4, 0])
    np.testing.assert_allclose(own.f1[everything, at], [6 / 8, 4 / 7, 4 / 7, 2 / 6, 2 / 5, 0])
    assert (own.recall[dog] == 0).all() and np.isnan(own.precision[dog]).all()
    assert np.isnan(own.f1[bird]).all() and np.isnan(own.best_f1[bird])
    np.testing.assert_allclose(own.best_threshold, [0.2, nan, nan, 0.2])
    np.testing.assert_allclose(own.best_f1, [6 / 7, 0, nan, 6 / 8])
    written = own.to_json()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert [row["name"] for row in written["classes"]] == ["cat", "dog", "bird", None]


def test_equal_scores_stay_together(small: MatchTable) -> None:
    # Right and wrong with one score: keeping the right one alone is no choice anybody has.
    truth = {
        "images": [{"id": 0}, {"id": 1}],
        "categories": [{"id": 0, "name": "cat"}],
        "annotations": [{"image_id": i, "category_id": 0, "bbox": BOX} for i in range(2)],
    }
    rows = [{"image_id": 0, "category_id": 0, "bbox": box, "score": 0.5} for box in (BOX, FAR)]
    own = threshold_curves(MatchTable.match(truth, rows))
    assert own.best_f1[0] == pytest.approx(2 / 4) and own.best_threshold[0] == 0.5


def test_precision_recall_by_hand(small: MatchTable) -> None:
    own = precision_recall(small)
    np.testing.assert_allclose(own[0], np.where(np.arange(101) <= 33, 1.0, 3 / 4))
    assert (own[1] == 0).all() and np.isnan(own[2]).all()


def test_curves_against_figures(make_problem: Callable[..., Any]) -> None:
    for seed in range(4):
        truth, results = make_problem(seed, images=10)
        table, figures = MatchTable.match(truth, results), evaluate_detections(truth, results)
        ap50 = precision_recall(table, 0.5).mean(axis=1)
        np.testing.assert_allclose(ap50, list(figures.per_class_AP50.values()), atol=1e-12)
        ap = precision_recall(table, None).mean(axis=1)
        np.testing.assert_allclose(ap, list(figures.per_class.values()), atol=1e-12)
        # The best threshold is the best of all there are, tried one by one.
        curves = threshold_curves(table)
        tried = []
        for threshold in np.unique(table.scores):
            kept = (table.scores >= threshold) & ~table.ignored[0, 0]
            hits = (kept & table.true_positive[0, 0]).sum()
            tried.append((2 * hits / (kept.sum() + table.positives[0].sum()), threshold))
        assert (curves.best_f1[-1], curves.best_threshold[-1]) == pytest.approx(max(tried))
