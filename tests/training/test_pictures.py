"""The pictures of a run folder, from synthetic data."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image, ImageColor

from paqdetr.drawing import mark
from paqdetr.errors import DataError
from paqdetr.runs import Run, read_metrics
from paqdetr.structures import ClassTable, Detections, OperatingPoint
from paqdetr.training import curves
from paqdetr.training.curves import contact_sheet, training_curves

NAMES = {1: "cat", 2: "dog"}


def item(width: int = 200, height: int = 150, scores: tuple[float, ...] = (0.9, 0.1)) -> tuple:
    n = len(scores)
    boxes = np.tile(np.array([[20, 40, 120, 110]], np.float32), (n, 1))
    detections = Detections(boxes, np.array(scores, np.float32), np.ones(n, np.int64), NAMES, "some_image.jpg")
    image = Image.new("RGB", (width, height), (40, 90, 160))
    return image, detections, (boxes[:1], np.ones(len(boxes[:1]), np.int64))


def train_record(step: int, **more: object) -> dict:
    decay = math.exp(-step / 300)
    return {
        "kind": "train",
        "step": step,
        "epoch": step / 100,
        "loss": 10 + 20 * decay,
        "loss_class": 1 + decay,
        "loss_l1": 0.4 + decay,
        "loss_giou": 0.5 + decay,
        "lr": 4e-4 * decay,
        "images_per_second": 9.8,
        **more,
    }


def write(path: Path, records: list[dict], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
    return path


def titles(svg: Path) -> str:
    return " ".join(
        re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8"))
    )  # matplotlib notes each text in a comment


# ------------------------------------------------------------------------------------------ contact sheet


def test_sheet_has_each_image_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "_SIDE", 100)
    output = tmp_path / "new" / "sheet.png"
    contact_sheet([item() for _ in range(3)], NAMES, output=output)
    with Image.open(output) as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    # A pair is two pictures of 100 x 75 with 4 pixels between; gaps are 16; captions 17.
    sheet, key = np.split(sheet, [2 * (75 + 17) + 3 * 16])
    assert sheet.shape[:2] == (2 * (75 + 17) + 3 * 16, 2 * 204 + 3 * 16)
    assert (np.abs(key - ImageColor.getrgb(mark(1))).max(-1) < 6).sum() > 60, "the colour of the class"
    left, right = sheet[33:108, 16:116], sheet[33:108, 120:220]
    background = (np.abs(left - [40, 90, 160]).max(axis=2) < 25).mean()
    assert background > 0.5
    assert (np.abs(left - right).max(axis=2) > 25).mean() < 0.2, "the same image, boxes at the same place"
    last = sheet[16 + 92 + 16 :, 16 + 204 + 16 :]
    assert (last > 250).all(), "the fourth place is empty"
    assert output.stat().st_size < 40_000


def test_sheet_leaves_out_low_scores(tmp_path: Path) -> None:
    def drawn(scores: tuple[float, ...], threshold: float) -> bytes:
        contact_sheet([item(scores=scores)], NAMES, output=tmp_path / "s.png", threshold=threshold)
        with Image.open(tmp_path / "s.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        return pixels[40:333, :420].tobytes()  # below the caption, the found side

    assert drawn((0.9, 0.1), 0.3) == drawn((0.9,), 0.3)
    assert drawn((0.9, 0.1), 0.05) != drawn((0.9,), 0.05)
    assert drawn((0.9, 0.1), 0.95) == drawn((), 0.3)


@pytest.mark.parametrize(("threshold", "named"), [(None, "0.3"), (0.0, "0"), (0.5634, "0.56")])
def test_sheet_of_a_model_names_the_threshold_that_it_predicts_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float | None, named: str
) -> None:
    image, detections, (boxes, _) = item(scores=(0.9, 0.7))
    model: Any = SimpleNamespace(
        operating_point=OperatingPoint(threshold=threshold), predict=lambda image: [detections]
    )
    split = MagicMock(**{"__len__.return_value": 1, "labels.return_value": np.zeros(1, np.int64)})
    split.classes = ClassTable((1,), ("cat",))
    split.image_or_blank.return_value, split.boxes.return_value = image, boxes
    captions: list[str] = []
    monkeypatch.setattr(curves, "captioned", lambda image, text: captions.append(text) or image)
    curves.draw_predictions(model, split, tmp_path / "s.png")
    assert captions == [f"some_image.jpg: found 2 with score ≥ {named}", "ground truth 1"]


def test_sheet_of_odd_images(tmp_path: Path) -> None:
    image, detections, _ = item(scores=())
    detections.image_id = None
    wide = (np.zeros((3, 900, 3), np.uint8), item()[1], (np.zeros((0, 4)), []))
    detections_before = wide[1].boxes.copy()
    contact_sheet([(image.convert("L"), detections, ([], [])), wide], NAMES, output=tmp_path / "s.jpg")
    with Image.open(tmp_path / "s.jpg") as sheet:
        assert sheet.format == "JPEG"
        assert sheet.width == 2 * 804 + 3 * 16
    assert (wide[1].boxes == detections_before).all(), "the detections are not changed"


# ------------------------------------------------------------------------------------------------- curves


def test_curves_of_a_whole_run(tmp_path: Path) -> None:
    records = []
    for step in range(10, 401, 10):
        more = {"positives_per_box": [1.9, 1.7, 1.0], "mixture_entropy": 0.8, "query_cosine": 0.3}
        records.append(train_record(step, **more, loss_diversity=0.0))
        if step % 100 == 0:
            figures = {"AP": step / 1000, "AP50": step / 600, "APs": None, "loss": 3 - step / 400}
            records.append({"kind": "eval", "step": step, "epoch": step / 100, "split": "val", **figures})
    path = write(tmp_path / "metrics.jsonl", records)
    training_curves(path, tmp_path / "plots" / "curves.svg")
    text = titles(tmp_path / "plots" / "curves.svg")
    for part in ("Average precision", "AP50 val", "0.400", "Training loss", "GIoU", "layer 3 (last)"):
        assert part in text, part
    for part in ("Learning rate", "entropy / log m", "cosine", "images per second", "epoch", "validation"):
        assert part in text, part
    assert "diversity" not in text, "a term that is 0 throughout has no line on a log scale"
    training_curves(path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1419, 1089), "nine panels in three columns"
        assert np.asarray(image.convert("L")).std() > 5


def test_absent_figures_have_no_panel(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", [train_record(10), train_record(20)])
    training_curves(path, tmp_path / "curves.svg")
    text = titles(tmp_path / "curves.svg")
    assert "Training loss" in text
    for part in ("Average precision", "Positive queries", "entropy", "cosine"):
        assert part not in text, part


@pytest.mark.parametrize(
    "records",
    [
        [train_record(10)],  # one point
        [{"kind": "eval", "step": 5, "epoch": 1, "AP": 0.0, "AP50": 0.0}],
        [train_record(10, loss=math.nan, lr=None), train_record(20)],
        [train_record(10, positives_per_box=[]), train_record(20, positives_per_box=[1.5, math.nan, 1.0])],
        [train_record(step) for step in range(1, 5000)],
    ],
)
def test_thin_and_long_runs_draw(tmp_path: Path, records: list[dict]) -> None:
    training_curves(write(tmp_path / "metrics.jsonl", records), tmp_path / "curves.svg")
    assert 5_000 < (tmp_path / "curves.svg").stat().st_size < 1_000_000


def test_a_cut_line_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", [train_record(10), train_record(20)], tail='{"kind": "train", "st')
    assert [record["step"] for record in read_metrics(path)] == [10, 20]
    with path.open("ab") as file:
        file.write(b"\xc3\n" + json.dumps(train_record(30)).encode() + b"\n[1]\n{}\n")
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 30]
    training_curves(path, tmp_path / "curves.png")


def test_a_run_that_goes_on_with_fewer_images_keeps_its_history(tmp_path: Path) -> None:
    """Its steps fall, its epochs do not."""
    records = [train_record(step) for step in (10, 20, 30, 40, 25, 35)]
    assert read_metrics(write(tmp_path / "metrics.jsonl", records)) == Run(tmp_path).records() == records


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        training_curves(tmp_path / "absent.jsonl", tmp_path / "c.png")
    with pytest.raises(DataError, match="no record in 1 lines"):
        training_curves(write(tmp_path / "m.jsonl", [], tail='{"kin'), tmp_path / "c.png")
    with pytest.raises(DataError, match="none with a figure"):
        training_curves(write(tmp_path / "m.jsonl", [{"kind": "train", "step": 1}]), tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
