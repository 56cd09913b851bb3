"""Weighted AP against evaluating the data set that has the images as often as their weights say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paqdetr.errors import ConfigError, DataError
from paqdetr.metrics import FIGURE_NAMES, CocoFigures, evaluate_detections, read_results
from paqdetr.metrics.matches import MatchTable, WeightedFigures

Problem = tuple[dict[str, Any], list[dict[str, Any]]]


def copied(problem: Problem, weights: np.ndarray, image_ids: tuple) -> Problem:
    """The data set with `weights` copies of each image, under ids of their own."""
    truth, results = problem
    made: dict[str, Any] = {"images": [], "categories": truth["categories"], "annotations": []}
    found: list[dict[str, Any]] = []
    for image_id, weight in zip(image_ids, weights.tolist(), strict=True):
        entry = next(image for image in truth["images"] if image["id"] == image_id)
        for _ in range(weight):
            new = len(made["images"]) + 1
            made["images"].append(entry | {"id": new})
            for annotation in truth["annotations"]:
                if annotation["image_id"] == image_id:
                    number = len(made["annotations"]) + 1
                    made["annotations"].append(annotation | {"id": number, "image_id": new})
            found += [result | {"image_id": new} for result in results if result["image_id"] == image_id]
    return made, found


def assert_equal(figures: WeightedFigures, row: int, expected: CocoFigures) -> None:
    for name in FIGURE_NAMES:
        assert figures.figures[name][row] == pytest.approx(getattr(expected, name), abs=1e-12, nan_ok=True), name
    np.testing.assert_allclose(figures.per_class[row], list(expected.per_class.values()), atol=1e-12)
    np.testing.assert_allclose(figures.per_class_AP50[row], list(expected.per_class_AP50.values()), atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_weights_are_copies(make_problem: Callable[..., Problem], seed: int) -> None:
    problem = make_problem(seed)
    table = MatchTable.match(*problem)
    assert_equal(table.figures(), 0, evaluate_detections(*problem))
    weights = np.random.default_rng(seed).integers(0, 4, (4, len(table.image_ids)))
    weights[3] = 0  # nothing is left: nothing is defined
    figures = table.figures(weights)
    for row in range(4):
        assert_equal(figures, row, evaluate_detections(*copied(problem, weights[row], table.image_ids)))
    assert all(math.isnan(values[3]) for values in figures.figures.values())


def test_blocks_of_samples_change_nothing(
    make_problem: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = MatchTable.match(*make_problem(3))
    weights = np.random.default_rng(0).integers(0, 3, (50, len(table.image_ids)))
    whole = table.average_precision(weights)
    monkeypatch.setattr("paqdetr.metrics.matches._BLOCK", 100)
    np.testing.assert_array_equal(table.average_precision(weights), whole)
    monkeypatch.setattr("paqdetr.metrics.matches._PAIRS_AT_ONCE", 2)
    np.testing.assert_array_equal(MatchTable.match(*make_problem(3)).average_precision(weights), whole)


def test_more_detections_than_count(make_problem: Callable[..., Problem]) -> None:
    """The hundred best of a class and image count, also where the image has no object of that class."""
    truth, _ = make_problem(5, images=3, classes=2)
    rng = np.random.default_rng(0)
    category = truth["annotations"][0]["category_id"]
    results = [
        {"image_id": image["id"], "category_id": category, "bbox": own["bbox"], "score": float(rng.random())}
        for image in truth["images"]
        for own in truth["annotations"]
        for _ in range(40)
    ]
    table = MatchTable.match(truth, results)
    assert np.bincount(table.images).max() == 100
    assert_equal(table.figures(), 0, evaluate_detections(truth, results))


def test_equal_scores_keep_the_order_of_coco(make_problem: Callable[..., Problem]) -> None:
    truth, results = make_problem(8)
    tied = [result | {"score": round(result["score"], 1)} for result in results]
    assert_equal(MatchTable.match(truth, tied).figures(), 0, evaluate_detections(truth, tied))


def test_by_hand() -> None:
    """Two images with an object each; in the second one something false scores best."""
    truth = {
        "images": [{"id": "a"}, {"id": "b"}],
        "categories": [{"id": 4, "name": "cat"}],
        "annotations": [{"image_id": image, "category_id": 4, "bbox": [0, 0, 50, 50]} for image in ("a", "b")],
    }
    results = [
        {"image_id": "a", "category_id": 4, "bbox": [0, 0, 50, 50], "score": 0.5},
        {"image_id": "b", "category_id": 4, "bbox": [100, 0, 50, 50], "score": 0.9},
    ]
    table = MatchTable.match(truth, results)
    assert (table.image_ids, table.category_ids, table.class_names) == (("a", "b"), (4,), ("cat",))
    assert table.scores.tolist() == [0.9, 0.5] and table.images.tolist() == [1, 0]
    assert table.detections.tolist() == [1, 0] and table.ranks.tolist() == [0, 0]
    assert table.true_positive[0, :, 1].all() and not table.true_positive[0, :, 0].any()
    # 50 x 50 is of medium size: among the small ones both are ignored and nothing is to be found.
    assert table.ignored[1].all() and table.positives[:, 0].tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    # u copies of a, v of b: recall u / (u + v), at a precision of u / (u + v).
    weights = np.array([[1, 1], [1, 0], [0, 1], [3, 1]])
    found = table.average_precision(weights)[:, 0, 0, 0]
    assert found == pytest.approx([0.5 * 51 / 101, 1.0, 0.0, 0.75 * 76 / 101])
    assert table.recall(weights)[:, 0, 0, 0] == pytest.approx([0.5, 1.0, 0.0, 0.75])


def test_nothing_detected_and_nothing_to_detect() -> None:
    truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    assert np.isnan(MatchTable.match(truth, []).figures().figures["AP"]).all()
    truth["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}]
    found = MatchTable.match(truth, []).figures().figures
    assert found["AP"].tolist() == [0.0] and found["AR100"].tolist() == [0.0] and np.isnan(found["APl"]).all()


def test_mistakes(make_problem: Callable[..., Problem]) -> None:
    truth, results = make_problem(1)
    with pytest.raises(ConfigError, match="oks"):
        MatchTable.match(truth, results, iou_type="oks")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="image_id 'none'"):
        MatchTable.match(truth, [results[0] | {"image_id": "none"}])
    for wrong in (np.ones(6, int), np.ones((2, 5), int), np.ones((2, 6))):
        with pytest.raises(ValueError, match="expected integers"):
            MatchTable.match(truth, results).figures(wrong)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_coco_fixture(shared_data: Callable[[str], Path], iou_type: Any) -> None:
    folder = shared_data("cocoeval_fixture")
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = read_results(folder / f"instances_val2014_fake{iou_type}100_results.json")
    table = MatchTable.match(truth, results, iou_type)
    expected = evaluate_detections(truth, results, iou_type=iou_type)
    assert_equal(table.figures(), 0, expected)
    assert table.figures().figures["AP"][0] == pytest.approx({"bbox": 0.504581, "segm": 0.319545}[iou_type], abs=1e-6)
