"""The report's own sections: numbers worked out by hand, and marks that are where they should be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from paqdetr.analysis.examples import _choice, draw_outcome
from paqdetr.analysis.subject import Outcome, outcome, run_folder
from paqdetr.analysis.training import training_section
from paqdetr.metrics.matches import MatchTable
from paqdetr.report.overlay import MARKS, Overlay, mark
from paqdetr.report.section import Figure


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


def test_images_whose_ids_are_not_in_order() -> None:
    """As in COCO's own files: counts and drawings are those of the split's image, wherever the table has it."""
    truth, results = truth_and_results()
    truth["images"].reverse()
    table = MatchTable.match(truth, results)
    assert outcome(table, 0.5, (3, 2, 1)).right.tolist() == [0, 0, 1]
    blank = Image.new("RGB", (100, 100), "white")
    split = SimpleNamespace(image_ids=(3, 2, 1), image_or_blank=lambda _: blank.copy())
    evaluation = SimpleNamespace(results=results)
    subject: Any = SimpleNamespace(table=table, split=split, truth=truth, evaluation=evaluation)
    empty, busy = (np.asarray(draw_outcome(subject, index, 0.5)) for index in (0, 2))
    assert (empty == 255).all() and not (busy == 255).all()


def test_each_image_is_shown_once_and_empty_ones_are_not_the_best() -> None:
    def made(right: list[int], wrong: list[int], missed: list[int]) -> Outcome:
        return Outcome(0.5, np.array(right), np.array(wrong), np.array(missed))

    first = made([0, 3, 1, 0, 2], [0, 0, 1, 4, 0], [0, 0, 1, 2, 1])
    second = made([0, 1, 1, 1, 3], [0, 2, 1, 0, 0], [0, 2, 1, 1, 0])
    assert _choice([first], 1) == [("Best", 1), ("Worst", 3)]
    shown = _choice([first, second], 1)
    assert shown == [("Best", 1), ("Worst", 3), ("B ahead", 4)]
    everything = _choice([first], 9)
    assert sorted(index for _, index in everything) == [0, 1, 2, 3, 4]


def close(pixel: tuple[int, ...], colour: str) -> bool:
    return max(abs(a - b) for a, b in zip(pixel, ImageColor.getrgb(colour), strict=True)) < 40


def test_marks_are_where_they_should_be() -> None:
    overlay = Overlay(Image.new("RGB", (50, 25), "#808080"), size=200)
    overlay.box([0.25, 0.2, 0.75, 0.8], mark(0), width=4)
    overlay.dots([[0.5, 0.5], [2.0, 2.0]], mark(1), radii=[6, 6])
    overlay.label([0.9, 0.0], "beyond the edge", mark(3))
    picture = overlay.picture()
    assert picture.size == (200, 100) and picture.mode == "RGB"
    for place in ((50, 50), (149, 50), (100, 20), (100, 79)):
        assert close(picture.getpixel(place), mark(0)), place  # type: ignore[arg-type]
    assert close(picture.getpixel((100, 50)), mark(1))  # type: ignore[arg-type]
    assert picture.getpixel((70, 50)) == (128, 128, 128)
    assert close(picture.getpixel((198, 2)), mark(3)), "a label is moved into the picture"  # type: ignore[arg-type]
    assert mark(len(MARKS)) == mark(0)


def test_labels_move_apart() -> None:
    overlay = Overlay(Image.new("RGB", (200, 100), "#808080"), size=200)
    overlay.label([0.1, 0.5], "one", MARKS[0])
    overlay.label([0.1, 0.5], "two", MARKS[1])
    picture = np.asarray(overlay.picture())
    for colour in MARKS[:2]:
        assert (np.abs(picture.astype(int) - ImageColor.getrgb(colour)).max(-1) < 3).sum() > 100


def test_curves_are_the_runs(tmp_path: Path) -> None:
    assert run_folder(None) is None and run_folder(tmp_path / "x.safetensors") is None
    assert training_section([("a", None)]) is None
    rows = [
        {"kind": "train", "step": 1, "loss": 4.0, "positives_per_box": [2.0, 1.0]},
        {"kind": "train", "step": 2, "loss": 0.0, "positives_per_box": [3.0, 1.0]},  # no place on a log scale
        {"kind": "train", "step": 3, "loss": 2.0, "positives_per_box": [float("nan"), 1.0]},
        {"kind": "eval", "step": 3, "AP": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_folder(tmp_path) == run_folder(tmp_path / "best.safetensors") == tmp_path
    section = training_section([("a", None), ("b", tmp_path)])
    assert section is not None and "a: its checkpoint lies in no run folder" in section.lead
    parts = {part.name: part for part in section.parts}
    assert set(parts) == {"training_ap", "training_loss", "training_positives"}
    loss, positives = parts["training_loss"], parts["training_positives"]
    assert isinstance(loss, Figure) and isinstance(positives, Figure)
    assert loss.data["b"]["step"].tolist() == [1, 3] and loss.data["b"]["value"].tolist() == [4, 2]
    assert positives.data["b"]["layer 1"]["value"].tolist() == [2, 3]
    assert "#e69f00" in loss.svg and "#0072b2" not in loss.svg  # b is orange, alone too


@pytest.mark.parametrize("side", [1, 3000])
def test_pictures_of_any_size_are_drawn_on(side: int) -> None:
    overlay = Overlay(Image.new("RGB", (side, 1)), size=64)
    overlay.box([-1, -1, 2, 2], mark(0), dashed=True)
    assert max(overlay.picture().size) == 64
