"""What each stage of a detector finds: planted predictions with known figures, and the last layer as the evaluation has it."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paqdetr.analysis.curves import layer_section
from paqdetr.config import load_config
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.evaluation.evaluate import evaluate_split
from paqdetr.evaluation.layers import LayerCollector, StageFigures
from paqdetr.models.zoo import build_model
from paqdetr.report.section import Figure, Table
from paqdetr.structures import Targets

CLASSES = 10


@pytest.fixture(scope="module")
def split(tiny_digits: Path) -> DetectionDataset:
    return open_split(tiny_digits, "val")


def predictions(boxes: Tensor, labels: Tensor, *, score: float) -> tuple[Tensor, Tensor]:
    """(G, C) logits that are sure of one class each, and the boxes."""
    logits = torch.full((len(labels), CLASSES), -9.0)
    logits[torch.arange(len(labels)), labels] = torch.tensor(score).logit()
    return logits, boxes


def planted(target: Targets) -> Any:
    """Proposals of half the width (IoU 1/2) without classes, a first layer with a copy of each box that is off by a tenth of
    the width and surer than the good one (IoU 0.9 / 1.1), and a last layer that is right."""
    half = target.boxes * torch.tensor([1, 1, 0.5, 1])
    moved = target.boxes + torch.cat([target.boxes[:, 2:] * torch.tensor([0.1, 0]), torch.zeros(len(target), 2)], 1)
    # What the clamp at the picture's edge would cut off is not moved.
    fits = ((target.boxes[:, 0] + 0.6 * target.boxes[:, 2]) <= 1)[:, None]
    moved = torch.where(fits, moved, target.boxes)
    good, good_boxes = predictions(target.boxes, target.labels, score=0.6)
    bad, bad_boxes = predictions(moved, target.labels, score=0.8)
    nothing = torch.full_like(good, -9.0)
    logits = torch.stack([torch.cat([good, bad]), torch.cat([good, nothing])])
    boxes = torch.stack([torch.cat([good_boxes, bad_boxes]), torch.cat([good_boxes, torch.zeros_like(good_boxes)])])
    return SimpleNamespace(
        proposals=SimpleNamespace(logits=torch.zeros(1, len(half), 1), boxes=half[None]),
        layers=SimpleNamespace(logits=logits[:, None], boxes=boxes[:, None]),
    )


def collected(split: DetectionDataset, indices: list[int]) -> LayerCollector:
    collector = LayerCollector(split.classes)
    for index in indices:
        target = split.targets(index)
        collector.see(planted(target), [target], [index])
    return collector


def test_planted_predictions_have_the_figures_they_must_have(split: DetectionDataset) -> None:
    proposals, first, last = collected(split, list(range(len(split)))).figures(split)
    boxes = sum(len(split.targets(index)) for index in range(len(split)))
    assert [one.stage for one in (proposals, first, last)] == ["proposals", "layer 1", "layer 2"]
    assert proposals.best_iou == pytest.approx(0.5, abs=1e-4)
    assert np.isnan(proposals.AP) and np.isnan(proposals.duplicates) and np.isnan(proposals.predictions_per_image)
    assert (last.AP, last.AP_nms, last.duplicates) == (1, 1, 0) and last.best_iou == pytest.approx(1, abs=1e-5)
    assert last.found == 1 and last.predictions_per_image == pytest.approx(boxes / len(split))
    # The surer copy with IoU 0.82 takes what lies below .85; above, the right box counts. NMS leaves the surer one alone.
    assert (
        first.best_iou == pytest.approx(1, abs=1e-5) and first.predictions_per_image == 2 * last.predictions_per_image
    )
    assert first.AP_nms < first.AP < 1
    assert proposals.to_json() == {
        "stage": "proposals", "best_iou": pytest.approx(0.5, abs=1e-4), "found": pytest.approx(proposals.found, abs=1e-6),
        "AP": None, "AP_nms": None, "duplicates": None, "predictions_per_image": None,
    }  # fmt: skip


def test_neither_order_nor_processes_matter(split: DetectionDataset) -> None:
    everything = list(range(len(split)))
    expected = collected(split, everything).figures(split)
    one = collected(split, everything[::-2])
    one.merge(pickle.loads(pickle.dumps(collected(split, everything[-2::-2]))))
    for found, wanted in zip(one.figures(split), expected, strict=True):
        assert found.to_json() == wanted.to_json()
    with pytest.raises(ValueError, match="1 were seen"):
        collected(split, [0]).figures(split)


@pytest.mark.parametrize("name", ["paq_dino_nano", "deformable_detr_nano", "deformable_detr_one_stage_nano"])
def test_the_last_layer_is_the_detector(name: str, split: DetectionDataset) -> None:
    settings = {
        "image_size": 96, "pretrained_backbone": False, "model.num_classes": CLASSES, "model.dim": 32, "model.ffn_dim": 64,
        "model.num_queries": 20, "model.encoder_layers": 1,
    }  # fmt: skip
    config = load_config(name, settings | ({"model.num_patterns": 8} if name.startswith("paq") else {}))
    model = build_model(config, classes=split.classes).eval()
    collector = LayerCollector(model.classes)
    evaluation = evaluate_split(model, split, observers=[collector])
    stages = collector.figures(split)
    layers = config.model.decoder_layers
    assert [one.stage for one in stages][-layers:] == [f"layer {k}" for k in range(1, layers + 1)]
    assert (stages[0].stage == "proposals") == ("one_stage" not in name)
    assert np.isnan(stages[0].AP) == (name == "deformable_detr_nano")  # its encoder tells no classes apart
    assert stages[-1].AP == pytest.approx(evaluation.figures.AP, abs=1e-9)
    assert stages[-1].AP_nms == pytest.approx(evaluation.figures_nms.AP, abs=1e-9)
    assert stages[-1].predictions_per_image == pytest.approx(evaluation.predictions_per_image)


def test_images_without_boxes(split: DetectionDataset) -> None:
    nothing = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), size=(96, 96))
    collector = LayerCollector(split.classes)
    for index in range(len(split)):
        collector.see(planted(nothing), [nothing], [index])
    for one in collector.figures(split):
        assert np.isnan(one.best_iou) and np.isnan(one.found)


def test_the_chapter_has_both_models_side_by_side() -> None:
    nan = float("nan")
    ours = [StageFigures("proposals", 0.5, 0.4, 0.1, 0.2, 3.0), StageFigures("layer 1", 0.6, 0.7, 0.3, 0.35, 2.0)]
    other = [StageFigures("proposals", 0.4, 0.3, nan, nan, nan), StageFigures("layer 1", 0.5, 0.6, 0.2, 0.2, 1.0)]
    section = layer_section([("ours", ours), ("other", other)])
    figure, table = section.parts
    assert isinstance(figure, Figure) and figure.data["ours"][1]["duplicates"] == pytest.approx(0.05)
    assert isinstance(table, Table) and [row["model"] for row in table.rows] == ["ours", "ours", "other", "other"]
    assert table.rows[2]["AP"] is None and table.columns[0].key == "model"
    alone = layer_section([("ours", ours)])
    assert isinstance(alone.parts[1], Table) and alone.parts[1].columns[0].key == "stage"
