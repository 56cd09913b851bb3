"""Sections on mistakes: what they show is what the metrics say, for one result set and for two."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from paqdetr.analysis.errors import calibration_section, confusion_section, curve_section, mistake_section
from paqdetr.analysis.subject import ResultSet
from paqdetr.metrics.diagnosis import MISTAKES, confusion, error_split
from paqdetr.metrics.matches import MatchTable
from paqdetr.report.section import Figure, Section, Table

NAMES = ("cat", "dog", "<bird>")


def problem(classes: tuple[str, ...] = NAMES) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Images with three objects each; every third detection is off, every fourth of the next class."""
    rng = np.random.default_rng(0)
    truth: dict[str, Any] = {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(12)],
        "categories": [{"id": c, "name": name} for c, name in enumerate(classes)],
        "annotations": [],
    }
    results = []
    for number in range(36):
        box = [float(200 * (number % 3)), 10.0, *rng.uniform(20, 120, 2).tolist()]
        category = int(rng.integers(len(classes)))
        truth["annotations"].append({"image_id": number // 3, "category_id": category, "bbox": box})
        place = [box[0] + (0.6 * box[2] if number % 3 == 0 else 0), *box[1:]]
        told = category if number % 4 else (category + 1) % len(classes)
        results.append({"image_id": number // 3, "category_id": told, "bbox": place, "score": float(rng.random())})
    return truth, results


def judged(label: str, truth: dict[str, Any], results: list[dict[str, Any]]) -> ResultSet:
    return ResultSet(label, truth, results, MatchTable.match(truth, results))


def part(section: Section, name: str) -> Any:
    return next(one for one in section.parts if one.name == name)


def sections_of(sets: list[ResultSet]) -> tuple[Section, ...]:
    return tuple(make(sets) for make in (curve_section, mistake_section, confusion_section, calibration_section))


def check(sections: tuple[Section, ...]) -> None:
    """What every report asks of sections."""
    parts = [one for section in sections for one in section.parts]
    names = [one.name for one in parts]
    assert len(set(names)) == len(names) and len({section.key for section in sections}) == len(sections)
    for one in parts:
        if isinstance(one, Figure):
            assert ElementTree.fromstring(one.svg).tag.endswith("svg")
            json.dumps(one.data, allow_nan=False)
        else:
            assert isinstance(one, Table)
            keys = {column.key for column in one.columns}
            assert all(row.keys() == keys for row in one.rows)
            json.dumps(one.rows, allow_nan=False)


def test_one_and_two_result_sets() -> None:
    truth, results = problem()
    one = judged("first", truth, results)
    check(sections_of([one]))
    two = sections_of([one, judged("second", truth, results[::2])])
    check(two)
    curves = two[0]
    assert part(curves, "f1").data.keys() == {"first", "second"}
    assert [column.heading for column in part(curves, "best_thresholds").columns] == [
        *("class", "threshold A", "F1 A", "threshold B", "F1 B")
    ]
    rows = part(curves, "best_thresholds").rows
    assert [row["class"] for row in rows] == [*NAMES, "all together"]
    assert rows[-1]["a_f1"] == pytest.approx(one.curves.best_f1[-1]) and rows[-1]["a_threshold"] == one.confident
    right = part(two[3], "reliability").data["second"]["right at IoU .50"]
    assert sum(row["detections"] for row in right["bins"]) == sum(r["score"] >= 0.05 for r in results[::2])


def test_mistakes_and_confusion_are_those_of_the_metrics() -> None:
    truth, results = problem()
    own = judged("mine", truth, results)
    section = mistake_section([own])
    split = error_split(truth, results)
    assert part(section, "mistakes").data == {"mine": split.to_json()}
    rows = part(section, "mistake_counts").rows
    assert {row["kind"]: row["a_gain"] for row in rows} == split.gains and list(split.gains) == list(MISTAKES)
    confident = error_split(truth, results, score_threshold=own.confident)
    assert {row["kind"]: row["a_count"] for row in rows} == confident.counts

    found = confusion(truth, results, score_threshold=own.confident)
    section = confusion_section([own])
    assert part(section, "confusion_a").data == found.to_json()
    confused = {(row["object"], row["detected"]): row["count"] for row in part(section, "confused_a").rows}
    expected = {
        (NAMES[i], NAMES[j]): int(found.matrix[i, j])
        for i in range(3)
        for j in range(3)
        if i != j and found.matrix[i, j]
    }
    assert confused == expected and expected


def test_many_classes() -> None:
    truth, results = problem(tuple(f"class {i}" for i in range(40)))
    section = confusion_section([judged("mine", truth, results)])
    check((section,))
    shown = part(section, "confusion_a")
    assert "the 30 classes with the most confusions of 40" in shown.caption
    assert len(shown.data["matrix"]) == 41  # the json has all


def test_nothing_found_and_nothing_to_find() -> None:
    truth, results = problem()
    check(sections_of([judged("nothing found", truth, [])]))
    check(sections_of([judged("nothing there", truth | {"annotations": []}, results)]))
