"""Figures made by hand, and the sentences that must follow from them: which, in which order, with which numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paqdetr.analysis.advice import RULES, ClassFacts, Duplicates, Facts, TrainingFacts, advice, compare
from paqdetr.metrics.intervals import Comparison, Difference, FigureIntervals, Interval

GAINS = dict.fromkeys(("classification", "localisation", "both", "duplicate", "background", "missed"), 0.0)
CLASSES = [ClassFacts("cat", 0.62, 300, 2000), ClassFacts("dog", 0.58, 200, 1500)]
# Nothing is wrong with it.
GOOD = Facts(
    split="val",
    images=400,
    boxes=500,
    ap=Interval(0.60, 0.58, 0.62),
    sizes={"small": (0.6, 200), "medium": (0.6, 200), "large": (0.65, 100)},
    duplicates_cost=0.001,
    gains=GAINS,
    classes=CLASSES,
    threshold=0.31,
    f1=0.85,
    precision=0.9,
    recall=0.81,
    default_f1=0.849,
    calibration_error=0.02,
    calibration_chance=0.02,
    confidence=0.6,
    accuracy=0.61,
    covered=0.99,
    image_size=640,
    near_duplicates=Duplicates(0),
    training=TrainingFacts(12, 12, True, [(e, v) for e, v in enumerate((0.3, 0.5, 0.59, 0.598, 0.599, 0.6), 1)]),
)


def rising(*values: float, finished: bool = True, done: float = 12, loss: tuple[float, ...] = ()) -> TrainingFacts:
    points = list(enumerate(values, 1))
    return TrainingFacts(12, done, finished, points, list(enumerate(loss, 1)))


def sentences(facts: Facts, kind: str) -> list[str]:
    return [f"{one.text} {one.advice}".strip() for one in advice(facts) if one.kind == kind]


def test_a_good_model_is_praised_alone() -> None:
    assert sentences(GOOD, "bad") == [] and sentences(GOOD, "note") == []
    praised = (
        "Few duplicates", "told apart", "Boxes fit", "Best at 'cat' (AP 0.620)", "converged", "probabilities",
        "nearly as well as large ones", "90% of the detections are right and 81% of the objects",
    )  # fmt: skip
    for part in praised:
        assert any(part in text for text in sentences(GOOD, "good")), part


BAD: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("duplicates", {"duplicates_cost": 0.19},
     ("Duplicate detections cost 0.190 AP", "Train longer", "`--nms 0.7`")),
    ("duplicates that predict removes", {"duplicates_cost": 0.19, "removes_duplicates": True},
     ("cost 0.190 AP", "`predict` removes them")),
    ("confused classes",
     {"gains": GAINS | {"classification": 0.08}, "confused": [("3", "8", 40, 100), ("1", "7", 9, 90), ("5", "6", 1, 80)]},
     ("Confused classes cost 0.080 AP50: 40 of 100 '3' as '8', 9 of 90 '1' as '7'.", "label them by one rule")),
    ("one class swallowed by another", {"confused": [("tram", "bus", 8, 20)]}, ("8 of 20 'tram' as 'bus'",)),
    ("classes wrong here and there", {"gains": GAINS | {"classification": 0.08}, "confused": [("3", "8", 2, 100)]},
     ("Wrong classes cost 0.080 AP50, spread",)),
    ("loose boxes", {"gains": GAINS | {"localisation": 0.07}}, ("Loose boxes cost 0.070 AP50", "image_size (now 640)")),
    ("background", {"gains": GAINS | {"background": 0.05}}, ("nothing is annotated cost 0.050", "label what was forgotten")),
    ("missed, out of reach", {"gains": GAINS | {"missed": 0.2}, "covered": 0.7},
     ("Missed objects cost 0.200 AP50: 30% of the objects have no query's box near them", "model.num_queries")),
    ("missed, within reach", {"gains": GAINS | {"missed": 0.2}}, ("their scores are too low", "Train longer")),
    ("small objects", {"sizes": {"small": (0.12, 205), "medium": (0.5, 200), "large": (0.55, 95)}},
     ("Small objects (below 32 x 32 pixels, 41% of all)", "AP 0.120, large ones 0.550", "`--tiles 640`")),
    ("near-duplicates", {"near_duplicates": Duplicates(12, 0.45)},
     ("12 of 400 images of val have a near-duplicate in train: AP 0.600, 0.450 without them", "`paqdetr data split`")),
    ("only near-duplicates", {"near_duplicates": Duplicates(400)},
     ("All 400 images of val have a near-duplicate in train: these figures say nothing", "`paqdetr data split`")),
    ("a class with few examples", {"classes": [*CLASSES, ClassFacts("puffin", 0.1, 40, 12)]},
     ("Too few examples in train of 'puffin' (12 boxes, AP 0.100)", "Collect more")),
    ("far fewer than the others", {"classes": [*CLASSES, ClassFacts("ray", 0.2, 40, 300)]}, ("'ray' (300 boxes, AP 0.200)",)),
    ("a weak class", {"classes": [*CLASSES, ClassFacts("ray", 0.2, 40, 1500)]},
     ("weakest classes, not for lack of examples: 'ray' (1500 boxes, AP 0.200)",)),
    ("threshold", {"default_f1": 0.70, "default_threshold": 0.3, "threshold": 0.55},
     ("At a score of 0.55 90% of the detections", "At 0.30, where `predict` begins, F1 is 0.700", "`--threshold 0.55`")),
    ("unfinished", {"training": rising(0.3, 0.4, 0.5, finished=False, done=4.5)},
     ("unfinished: 4.5 of 12 epochs", "`paqdetr train RUN --resume`")),
    ("still rising", {"training": rising(0.3, 0.4, 0.5, 0.56)},
     ("AP still rose when the training ended, by 0.060 in the last 1 of 4 evaluations", "epochs=24")),
    ("fallen", {"training": rising(0.3, 0.6, 0.55, 0.5)}, ("AP fell from 0.600 in epoch 2 to 0.500", "best.safetensors")),
    ("overfitting", {"training": rising(0.5, 0.6, 0.6, 0.6, loss=(3.0, 2.0, 2.2, 2.5))},
     ("Overfitting: the validation loss was lowest in epoch 2 and 25% higher at the end", "augmentation")),
    ("more boxes than queries", {"crowding": ["3 of 400 images have more than 100 boxes"]}, ("3 of 400 images have more",)),
    ("nothing found", {"ap": Interval(0.01, 0.0, 0.02)}, ("finds next to nothing: AP 0.010", "`paqdetr data preview`")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "parts"), BAD, ids=[row[0] for row in BAD])
def test_each_weakness_is_named_alone_and_with_its_figures(
    name: str, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    found = sentences(replace(GOOD, **changes), "bad")
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"ap": Interval(0.6, 0.5, 0.7)}, "400 images of val say little: AP lies between 0.500 and 0.700"),
        ({"calibration_error": 0.2, "confidence": 0.7, "accuracy": 0.5}, "Scores are too high"),
        ({"calibration_error": 0.2, "confidence": 0.5, "accuracy": 0.7}, "Scores are too low"),
        ({"calibration_error": 0.2, "confidence": 0.6, "accuracy": 0.62}, "Scores cannot be read as probabilities"),
        ({"classes": [*CLASSES, ClassFacts("tram", 0.5, 4, 900)]}, "AP of 'tram' rests on fewer than 10 boxes"),
        ({"precision": 0.9, "recall": 0.5}, "50% of the objects are found"),
        ({"near_duplicates": None, "unread": "train.json: no images"}, "what needs it is left out: train.json: no images."),
    ],
)  # fmt: skip
def test_notes(changes: dict[str, Any], part: str) -> None:
    facts = replace(GOOD, **changes)
    assert sentences(facts, "bad") == []
    assert sum(part in text for text in sentences(facts, "note")) == 1


def test_what_costs_most_stands_first() -> None:
    facts = replace(GOOD, duplicates_cost=0.03, gains=GAINS | {"background": 0.02, "missed": 0.1})
    first, second, third = sentences(facts, "bad")
    assert (
        first.startswith("Missed") and second.startswith("Duplicate") and third.startswith("Detections where nothing")
    )


def test_costs_of_ap_and_of_ap50_have_one_order() -> None:
    """At AP 0.4 and AP50 0.8 a gain of 0.16 AP50 stands for 0.08 AP, less than 0.1 AP."""
    facts = replace(GOOD, duplicates_cost=0.1, gains=GAINS | {"missed": 0.16}, ap=Interval(0.4, 0.39, 0.41), ap50=0.8)
    costs = {one.text.split()[0]: one.cost for one in advice(facts) if one.kind == "bad"}
    assert list(costs) == ["Duplicate", "Missed"] and list(costs.values()) == pytest.approx([0.1, 0.08])


def test_what_is_not_known_is_not_spoken_of() -> None:
    bare = Facts(split="test", images=100, boxes=100, ap=Interval(0.4, 0.37, 0.43))
    assert advice(bare) == ()


NUMBER = st.floats(0, 1) | st.just(math.nan)


@given(
    values=st.lists(NUMBER, min_size=21, max_size=21),
    counts=st.lists(st.integers(0, 500), min_size=8, max_size=8),
    curve=st.lists(st.floats(0, 1), max_size=12),
)
def test_no_figures_stop_it_and_no_sentence_has_a_nan(
    values: list[float], counts: list[int], curve: list[float]
) -> None:
    v, n = iter(values), iter(counts)
    facts = Facts(
        split="val", images=next(n), boxes=next(n), ap=Interval(next(v), next(v), next(v)),
        sizes={name: (next(v), next(n)) for name in ("small", "medium", "large")}, duplicates_cost=next(v),
        gains={kind: next(v) for kind in GAINS}, classes=[ClassFacts("cat", next(v), next(n), next(n))],
        threshold=0.5, precision=0.5, recall=0.5, ap50=next(v), f1=next(v), default_f1=next(v), calibration_error=next(v),
        confidence=0.5, accuracy=0.5, covered=next(v), training=rising(*curve, loss=tuple(curve)),
    )  # fmt: skip
    for one in advice(facts):
        assert "nan" not in one.text and one.text[-1] in ".:" and not one.cost < 0
    assert len(RULES) == 13


def test_two_models_differ_by_b_minus_a() -> None:
    nothing = FigureIntervals({}, {}, {}, 10, 0, 0.95)
    figures = {"AP": Difference(0.03, 0.01, 0.05, 0.99), "APs": Difference(0.1, 0.05, 0.2, 1.0),
               "APm": Difference(0.0, -0.1, 0.1, 0.5), "APl": Difference(-0.04, -0.06, -0.01, 0.0)}  # fmt: skip
    classes = {"cat": Difference(-0.2, -0.3, -0.1, 0.0), "dog": Difference(0.02, -0.1, 0.1, 0.6)}
    chance = "in brackets AP of B - A. Of 5 sizes and classes, 0.3 would stand in such lines by chance."
    texts = [one.text for one in compare(Comparison(nothing, nothing, figures, classes, {}, 10, 0, 0.95))]
    assert texts == [
        "B is better: AP of B - A is +0.030, 95 % interval +0.010 to +0.050.",
        f"A is better at class cat (-0.200), large objects (-0.040); {chance}",
        f"B is better at small objects (+0.100); {chance}",
    ]
