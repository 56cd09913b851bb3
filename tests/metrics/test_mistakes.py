"""Error split and confusion matrix, each on cases small enough to count by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paqdetr.errors import ConfigError, DataError
from paqdetr.metrics import evaluate_detections
from paqdetr.metrics.diagnosis import MISTAKES, confusion, error_split
from paqdetr.metrics.matches import MatchTable

CAT, DOG = 1, 2
BOX = [10.0, 10.0, 100.0, 100.0]
FAR = [300.0, 10.0, 100.0, 100.0]
QUARTER = [70.0, 10.0, 100.0, 100.0]  # 40 of 160 columns are shared with BOX: IoU 1/4
FAR_QUARTER = [360.0, 10.0, 100.0, 100.0]  # the same of FAR; of a crowd .4 of the detection


def truth(*objects: tuple[int, int, list[float]], crowds: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "images": [{"id": i, "width": 640, "height": 480} for i in (1, 2)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": box, "iscrowd": int(n in crowds)}
            for n, (image, category, box) in enumerate(objects)
        ],
    }


def found(*detections: tuple[int, int, list[float], float]) -> list[dict[str, Any]]:
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in detections
    ]


# Ground truth, results, AP at IoU .5, counts that are not 0, gains that are not 0.
SPLITS = {
    "nothing wrong": (truth((1, CAT, BOX)), found((1, CAT, BOX, 0.9)), 1.0, {}, {}),
    # The cat is called a dog, which also stands above the dog found: AP 0 and 1/2. Mended: both 1.
    "class": (
        truth((1, CAT, BOX), (2, DOG, BOX)),
        found((1, DOG, BOX, 0.9), (2, DOG, BOX, 0.5)),
        0.25,
        {"classification": 1},
        {"classification": 0.75},
    ),
    "place": (truth((1, CAT, BOX)), found((1, CAT, QUARTER, 0.9)), 0.0, {"localisation": 1}, {"localisation": 1.0}),
    # The dog of image 1 is neither at the right place nor a dog, and stands above the true one.
    "both": (
        truth((1, CAT, BOX), (2, DOG, BOX)),
        found((1, DOG, QUARTER, 0.9), (1, CAT, BOX, 0.8), (2, DOG, BOX, 0.5)),
        0.75,
        {"both": 1},
        {"both": 0.25},
    ),
    # Precision 1 up to recall 1/2, then 2/3: 51 and 50 of the 101 places.
    "copy": (
        truth((1, CAT, BOX), (2, CAT, BOX)),
        found((1, CAT, BOX, 0.95), (1, CAT, BOX, 0.9), (2, CAT, BOX, 0.5)),
        (51 + 50 * 2 / 3) / 101,
        {"duplicate": 1},
        {"duplicate": 1 - (51 + 50 * 2 / 3) / 101},
    ),
    "invented": (
        truth((1, CAT, BOX)),
        found((1, CAT, FAR, 0.9), (1, CAT, BOX, 0.5)),
        0.5,
        {"background": 1},
        {"background": 0.5},
    ),
    "not found": (
        truth((1, CAT, BOX), (2, CAT, BOX)),
        found((1, CAT, BOX, 0.9)),
        51 / 101,
        {"missed": 1},
        {"missed": 50 / 101},
    ),
    "crowd": (
        truth((1, CAT, BOX), (1, CAT, FAR), crowds=(1,)),
        found((1, CAT, FAR, 0.9), (1, CAT, FAR, 0.8), (1, CAT, BOX, 0.5)),
        1.0,
        {},
        {},
    ),
    # Partly in the crowd: it hits no object badly.
    "beside a crowd": (
        truth((1, CAT, BOX), (1, DOG, FAR), crowds=(1,)),
        found((1, CAT, BOX, 0.9), (1, DOG, FAR_QUARTER, 0.8)),
        1.0,
        {"background": 1},
        {},
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_split_by_hand(case: str) -> None:
    gt, results, ap, counts, gains = SPLITS[case]
    split = error_split(gt, results)
    assert split.ap == pytest.approx(ap) == evaluate_detections(gt, results).AP50
    assert split.counts == dict.fromkeys(MISTAKES, 0) | counts
    assert split.gains == pytest.approx(dict.fromkeys(MISTAKES, 0.0) | gains)


def test_split_settings_and_oracles() -> None:
    gt = truth((1, CAT, BOX), (2, CAT, BOX))
    results = found((1, CAT, QUARTER, 0.9), (1, CAT, BOX, 0.8), (1, CAT, FAR, 0.1))
    # The first box overlaps, but what it overlaps is found by the second: mending it would make it a copy.
    split = error_split(gt, results)
    assert (split.counts["localisation"], split.counts["background"], split.counts["missed"]) == (1, 1, 1)
    # AP 1/2 up to recall 1/2; without false positives 1 there; with one object asked for 1/2 everywhere.
    assert split.ap == pytest.approx(0.5 * 51 / 101)
    assert split.false_positives == pytest.approx(0.5 * 51 / 101)
    assert split.false_negatives == pytest.approx(0.5 - 0.5 * 51 / 101)
    assert error_split(gt, results, score_threshold=0.5).counts["background"] == 0
    # Below IoU .3 with everything is now background.
    assert error_split(gt, results, background=0.3).counts["background"] == 2
    written = error_split(gt, results).to_json()
    assert list(written["gains"]) == list(MISTAKES) and written["foreground"] == 0.5


@pytest.mark.parametrize(
    ("dog", "cats", "kinds"),
    [
        # IoU 1/4 with the cat, .82 with the dog: a cat at a wrong place before a dog of the wrong class.
        (80.0, [70.0], {"localisation": 1, "missed": 1}),
        # A copy of the cat, and on the dog as well (IoU .90): a dog of the wrong class before a copy.
        (15.0, [10.0, 10.0], {"classification": 1}),
        # The second overlaps the dog alone, at .43: both wrong. It leaves the dog missed.
        (80.0, [10.0, 120.0], {"both": 1, "missed": 1}),
    ],
)
def test_split_takes_the_first_kind_that_fits(dog: float, cats: list[float], kinds: dict[str, int]) -> None:
    gt = truth((1, CAT, BOX), (1, DOG, [dog, *BOX[1:]]))
    results = found(*((1, CAT, [x, *BOX[1:]], 0.9 - i / 10) for i, x in enumerate(cats)))
    assert error_split(gt, results).counts == dict.fromkeys(MISTAKES, 0) | kinds


def test_detections_on_a_crowd_count_among_the_hundred_of_an_image() -> None:
    """90 on a crowd and then 20 right ones, of which COCO looks at ten."""
    spots = [[4.0 * x, 300.0, 3.0, 3.0] for x in range(20)]
    gt = truth((1, CAT, BOX), *((1, CAT, spot) for spot in spots), crowds=(0,))
    inside = [[10.0 + x, 10.0, 20.0, 20.0] for x in range(80)] + [[10.0, 20.0 + y, 20.0, 20.0] for y in range(10)]
    scores = np.linspace(0.9, 0.1, 110)
    rows = found(*((1, CAT, box, score) for box, score in zip(inside + spots, scores.tolist(), strict=True)))
    split = error_split(gt, rows)
    assert split.ap == pytest.approx(evaluate_detections(gt, rows).AP50) and split.counts["missed"] == 10


def test_split_without_objects_or_detections() -> None:
    assert math.isnan(error_split(truth(), found((1, CAT, BOX, 0.9))).ap)
    nothing = error_split(truth((1, CAT, BOX)), [])
    assert (nothing.ap, nothing.counts["missed"]) == (0.0, 1)
    with pytest.raises(DataError, match="image_id 7"):
        error_split(truth(), found((7, CAT, BOX, 0.9)))


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [
        ({"foreground": 0.63}, r"0\.63: expected one of 0\.50, 0\.55"),
        ({"background": 0.5}, "background IoU threshold 0.5: expected 0 to below"),
        ({"background": -0.1}, "background IoU threshold -0.1: expected 0 to below"),
    ],
)
def test_split_at_thresholds_that_are_none(thresholds: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        error_split(truth((1, CAT, BOX)), [], **thresholds)


CONFUSIONS = {
    "right": (truth((1, CAT, BOX)), found((1, CAT, BOX, 0.9)), [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),
    "class": (truth((1, CAT, BOX)), found((1, DOG, BOX, 0.9)), [[0, 1, 0], [0, 0, 0], [0, 0, 0]]),
    "place": (truth((1, CAT, BOX)), found((1, CAT, QUARTER, 0.9)), [[0, 0, 1], [0, 0, 0], [1, 0, 0]]),
    "copy": (truth((1, CAT, BOX)), found((1, CAT, BOX, 0.9), (1, CAT, BOX, 0.8)), [[1, 0, 0], [0, 0, 0], [1, 0, 0]]),
    "not confident": (truth((1, CAT, BOX)), found((1, CAT, BOX, 0.2)), [[0, 0, 1], [0, 0, 0], [0, 0, 0]]),
    # A wrong class with a better score does not take the object from the right one.
    "right one second": (
        truth((1, CAT, BOX)),
        found((1, DOG, BOX, 0.9), (1, CAT, BOX, 0.8)),
        [[1, 0, 0], [0, 0, 0], [0, 1, 0]],
    ),
    # A cat and a dog almost on top of each other, each found a little off, towards the other.
    "overlapping": (
        truth((1, CAT, BOX), (1, DOG, [15.0, 10.0, 100.0, 100.0])),
        found((1, CAT, [15.0, 10.0, 100.0, 100.0], 0.9), (1, DOG, BOX, 0.8)),
        [[1, 0, 0], [0, 1, 0], [0, 0, 0]],
    ),
    "crowd": (
        truth((1, CAT, BOX), (1, CAT, FAR), crowds=(1,)),
        found((1, CAT, FAR, 0.9), (1, DOG, FAR, 0.8), (1, CAT, BOX, 0.5)),
        [[1, 0, 0], [0, 0, 0], [0, 1, 0]],
    ),
    "nothing": (truth(), [], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
}


@pytest.mark.parametrize("case", CONFUSIONS)
def test_confusion_by_hand(case: str) -> None:
    gt, results, matrix = CONFUSIONS[case]
    own = confusion(gt, results)
    assert own.matrix.tolist() == matrix
    assert own.to_json() == {
        "class_names": ["cat", "dog"],
        "matrix": matrix,
        "iou_threshold": 0.5,
        "score_threshold": 0.3,
    }


@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_confusion_counts_everything_once(make_problem: Callable[..., Any], iou: float) -> None:
    for seed in range(5):
        gt, results = make_problem(seed)
        table = MatchTable.match(gt, results)
        own = confusion(gt, results, iou_threshold=iou, score_threshold=0.3)
        rows = own.matrix[:-1].sum(axis=1)  # every object is found, taken for something else, or not found
        np.testing.assert_array_equal(rows, table.positives[0].sum(axis=1))
        t = table.threshold_index(iou)
        counted = ((table.scores >= 0.3) & ~table.ignored[0, t]).sum()
        assert own.matrix[:, :-1].sum() == counted  # and so is every detection
        assert np.trace(own.matrix) == (table.true_positive[0, t] & (table.scores >= 0.3)).sum()


def test_confusion_at_an_unknown_iou() -> None:
    with pytest.raises(ConfigError, match=r"0\.52: expected one of 0\.50, 0\.55"):
        confusion(truth(), [], iou_threshold=0.52)
