"""The report's own sections: numbers worked out by hand, and marks that are where they should be."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paqdetr.analysis.curves import training_section
from paqdetr.analysis.examples import choose, marks_of, tags, wrong_kinds
from paqdetr.analysis.subject import ModelUnderTest, Outcome, outcome
from paqdetr.metrics.diagnosis import error_split
from paqdetr.metrics.matches import MatchTable
from paqdetr.report.section import Figure
from paqdetr.runs import Record


def truth_and_results() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Image 1: a cat found, a dog missed, a cat of nothing. Image 2: a crowd covered, nothing else. Image 3: empty."""
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [50, 50, 10, 10], "area": 100, "iscrowd": 0},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0, 0, 90, 90], "area": 8100, "iscrowd": 1},
    ]
    truth = {
        "images": [{"id": i, "width": 100, "height": 100, "file_name": f"{i}.jpg"} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": annotations,
    }
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 9], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [70, 0, 10, 9], "score": 0.6},
        {"image_id": 1, "category_id": 2, "bbox": [50, 50, 10, 10], "score": 0.2},  # below the threshold
        {"image_id": 2, "category_id": 1, "bbox": [0, 0, 50, 50], "score": 0.8},  # within the crowd
    ]
    return truth, results


def test_right_wrong_and_missed_by_image() -> None:
    found = outcome(MatchTable.match(*truth_and_results()), 0.5, (1, 2, 3))
    assert found.right.tolist() == [1, 0, 0] and found.wrong.tolist() == [1, 0, 0]
    assert found.missed.tolist() == [1, 0, 0] and found.f1.tolist() == [0.5, 1.0, 1.0]


def subject(truth: dict[str, Any], results: list[dict[str, Any]], ids: tuple[int, ...]) -> Any:
    table = MatchTable.match(truth, results)
    return SimpleNamespace(table=table, split=SimpleNamespace(image_ids=ids), truth=truth, results=results)


def test_images_whose_ids_are_not_in_order() -> None:
    """As in COCO's own files: counts and marks are those of the split's image, wherever the table has it."""
    truth, results = truth_and_results()
    truth["images"].reverse()
    table = MatchTable.match(truth, results)
    assert outcome(table, 0.5, (3, 2, 1)).right.tolist() == [0, 0, 1]
    empty, crowd, busy = marks_of(subject(truth, results, (3, 2, 1)), 0.5, {1: "cat", 2: "dog"})
    assert empty == crowd == []
    assert [(mark.kind, mark.name, mark.score) for mark in busy] == [
        ("missed", "dog", None), ("background", "cat", 0.6), ("", "cat", 0.9),
    ]  # fmt: skip
    assert tags(busy) == {
        ("dog", ""), ("dog", "missed"), ("", "missed"), ("cat", ""), ("cat", "background"), ("", "background"),
    }  # fmt: skip


# A cat at [0, 0, 10, 10] and a dog at [50, 50, 10, 10], both found already.
@pytest.mark.parametrize(
    ("category", "bbox", "kind", "about"),
    [
        (1, [0, 0, 10, 8], "duplicate", 1),
        (1, [0, 0, 10, 3], "localisation", 1),  # IoU .3
        (1, [0, 0, 10, 0.5], "background", None),  # .05
        (1, [50, 50, 10, 9], "classification", 2),
        (1, [50, 50, 10, 4], "both", 2),
        (2, [20, 20, 5, 5], "background", None),
        (3, [0, 0, 10, 10], "classification", 1),
    ],
)
def test_the_kind_of_a_mistake(category: int, bbox: list[float], kind: str, about: int | None) -> None:
    truth = truth_and_results()[0]["annotations"][:2]
    assert list(wrong_kinds([{"category_id": category, "bbox": bbox}], truth)) == [(kind, about)]
    assert list(wrong_kinds([{"category_id": category, "bbox": bbox}], [])) == [("background", None)]


def test_kinds_are_counted_as_in_the_error_split() -> None:
    truth, _ = truth_and_results()
    boxes = np.random.default_rng(0).uniform([0, 0, 4, 4], [60, 60, 30, 30], (200, 4)).round(1).tolist()
    results = [
        {"image_id": 1 + 2 * (i % 2), "category_id": 1 + i // 2 % 2, "bbox": box, "score": round(0.9 - i / 500, 3)}
        for i, box in enumerate(boxes)
    ]
    found = marks_of(subject(truth, results, (1, 2, 3)), 0.0, {1: "cat", 2: "dog"})
    counts = Counter(mark.kind for own in found for mark in own)
    expected = error_split(truth, results).counts
    wrong = ("classification", "localisation", "both", "duplicate", "background")
    assert {kind: counts[kind] for kind in wrong} == {kind: expected[kind] for kind in wrong}


def test_each_image_is_shown_once_and_empty_ones_are_not_the_best() -> None:
    def made(right: list[int], wrong: list[int], missed: list[int]) -> Outcome:
        return Outcome(0.5, np.array(right), np.array(wrong), np.array(missed))

    first = made([0, 3, 1, 0, 2], [0, 0, 1, 4, 0], [0, 0, 1, 2, 1])
    second = made([0, 1, 1, 1, 3], [0, 2, 1, 0, 0], [0, 2, 1, 1, 0])
    plain: list[frozenset[Any]] = [frozenset()] * 5
    assert choose([first], plain, 1) == [3]
    assert choose([first], plain, 2) == [3, 1], "the worst, and the best"
    assert choose([first, second], plain, 3)[:2] == [3, 1], "the worst, and where the two differ most"
    assert sorted(choose([first], plain, 9)) == [0, 1, 2, 3, 4]
    rare = [*plain[:4], frozenset({("axolotl", "missed")})]
    assert choose([first], rare, 4) == [3, 2, 4, 1], "what no other image shows, before the best"


def test_curves_are_the_runs(tmp_path: Path) -> None:
    def records(checkpoint: Path | None) -> list[Record]:
        rest: dict[str, Any] = dict.fromkeys(field.name for field in fields(ModelUnderTest))
        return ModelUnderTest(**rest | {"checkpoint": checkpoint}).records

    assert records(None) == records(tmp_path / "x.safetensors") == []
    assert training_section([("a", [])]) is None
    rows = [
        {"kind": "train", "step": 1, "epoch": 0.5, "loss_class": 1.0, "loss_l1": 1.0, "loss_giou": 2.0},
        {"kind": "train", "step": 2, "epoch": 1.0, "loss_class": float("nan"), "loss_l1": 1.0, "loss_giou": 2.0},
        {"kind": "train", "step": 3, "epoch": 1.5, "loss_class": 0.5, "loss_l1": 0.5, "loss_giou": 1.0},
        {"kind": "eval", "step": 3, "epoch": 2, "AP": 0.25, "loss": 1.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(records(tmp_path)) == len(records(tmp_path / "best.safetensors")) == 4
    section = training_section([("a", []), ("b", records(tmp_path))])
    assert section is not None and "a: its checkpoint lies in no run folder" in section.lead
    parts = {part.name: part for part in section.parts}
    assert set(parts) == {"training_ap", "training_loss"}
    loss = parts["training_loss"]
    assert isinstance(loss, Figure)
    assert loss.data["b"]["training"]["epoch"].tolist() == [0.5, 1.5]
    assert loss.data["b"]["training"]["value"].tolist() == [4, 2]
    assert loss.data["b"]["validation"]["value"].tolist() == [1.75]
