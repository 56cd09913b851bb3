"""Losses of denoising queries as published, on every host that has them.

Sources: `prepare_for_loss`, `tgt_loss_labels`, `tgt_loss_boxes` of IDEA-Research/DN-DETR,
models/dn_dab_deformable_detr/dn_components.py 206fa26: only slots that hold a box are gathered, sums are divided by their
number. `SetCriterion.forward` of IDEA-Research/DINO, models/dino/dino.py 66d7173: all slots count, sums are divided by boxes x
groups. Neither has a denoising loss on a batch without boxes. `cls_loss_coef`: main.py of fundamentalvision/Deformable-DETR
48092c5 (2), of DN-DETR 61f5d6a (1); config/DINO/DINO_4scale.py 67bbcd9 (1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from paqdetr.config import load_config
from paqdetr.losses import build_criterion
from paqdetr.models import create_model
from paqdetr.models.detector import Detector
from paqdetr.models.outputs import DetectorOutput
from paqdetr.structures import Targets

DN_HOSTS = ["dn_detr_r50", "paq_dn_detr_r50"]
DINO_HOSTS = ["dino_r50", "dino_5scale_r50", "paq_dino_r50"]
TINY: dict[str, Any] = dict(
    num_classes=5, backbone="test_resnet", dim=32, num_heads=4, ffn_dim=32, encoder_layers=1, decoder_layers=2
)


def step(name: str, *counts: int) -> tuple[Detector, DetectorOutput, list[Targets]]:
    torch.manual_seed(0)
    model = create_model(name, **TINY, num_queries=12, denoising_queries=50).train()
    targets = [
        Targets(torch.randint(5, (count,)), torch.cat([torch.rand(count, 2), torch.rand(count, 2) / 2], dim=1))
        for count in counts
    ]
    return model, model(torch.randn(len(counts), 3, 64, 64), None, targets), targets


def denoising_loss(name: str, output: DetectorOutput, targets: list[Targets], kind: str = "class") -> Tensor:
    terms = build_criterion(load_config(name).loss)(output, targets).terms
    return torch.stack([terms[f"denoising{layer}/{kind}"] for layer in (1, 2)])


def empty_slots(output: DetectorOutput, image: int, boxes: int) -> Tensor:
    """(N,) bool of an image with so many boxes, group by group and kind by kind."""
    assert output.denoising is not None
    place = torch.arange(len(output.denoising)) % output.denoising.boxes
    return place >= boxes


@pytest.mark.parametrize("name", [*DN_HOSTS, *DINO_HOSTS])
def test_empty_slots_count_in_dino_alone(name: str) -> None:
    _, output, targets = step(name, 5, 3)
    assert output.denoised is not None
    empty = empty_slots(output, 1, 3)
    assert empty.any() and not empty.all()
    logits = output.denoised.logits.detach().requires_grad_()
    output = replace(output, denoised=replace(output.denoised, logits=logits))
    loss = denoising_loss(name, output, targets)
    loss.sum().backward()
    changed = logits.detach().clone()
    changed[:, 1, empty] += 1
    other = replace(output, denoised=replace(output.denoised, logits=changed))  # type: ignore[type-var]
    counts = bool((denoising_loss(name, other, targets) != loss).any())
    assert counts is (name in DINO_HOSTS)
    assert logits.grad is not None and bool(logits.grad[:, 1, empty].any()) is counts
    assert logits.grad[:, 1, ~empty].all() and logits.grad[:, 0].all()


def focal(logits: Tensor, goal: Tensor) -> Tensor:
    p = logits.sigmoid()
    return -0.25 * goal * (1 - p) ** 2 * p.log() - 0.75 * (1 - goal) * p**2 * (1 - p).log()


@pytest.mark.parametrize("name", ["dn_detr_r50", "dino_r50", "dino_5scale_r50"])
def test_denoising_losses_by_a_plain_loop(name: str) -> None:
    """Focal, L1 and GIoU with their published weights, slot after slot in float64."""
    _, output, targets = step(name, 4, 0, 2)
    layout, predicted = output.denoising, output.denoised
    assert layout is not None and predicted is not None
    sums = {"class": [0.0, 0.0], "l1": [0.0, 0.0], "giou": [0.0, 0.0]}
    for layer in range(2):
        for b, target in enumerate(targets):
            for slot in range(len(layout)):
                kind, place = slot // layout.boxes % layout.kinds, slot % layout.boxes
                logits, box = (predicted.logits[layer, b, slot].double(), predicted.boxes[layer, b, slot].double())
                goal = torch.zeros(5, dtype=torch.float64)
                if place < len(target) and kind == 0:
                    goal[target.labels[place]] = 1
                    truth = target.boxes[place].double()
                    corners = [box_convert(x[None], "cxcywh", "xyxy") for x in (box, truth)]
                    sums["l1"][layer] += 5 * (box - truth).abs().sum().item()
                    sums["giou"][layer] += 2 * (1 - generalized_box_iou(*corners)).item()
                if place < len(target) or name != "dn_detr_r50":
                    sums["class"][layer] += focal(logits, goal).sum().item()
    for kind, values in sums.items():
        found = denoising_loss(name, output, targets, kind)
        expected = [value / (6 * layout.groups) for value in values]
        assert found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [*DN_HOSTS, *DINO_HOSTS])
def test_without_a_box_there_is_no_denoising_loss(name: str) -> None:
    """All the same every parameter has a gradient, as data parallelism wants it."""
    model, output, targets = step(name, 0, 0)
    report = build_criterion(load_config(name).loss)(output, targets)
    denoising = [term for key, term in report.terms.items() if key.startswith("denoising")]
    assert len(denoising) == 6 and not torch.stack(denoising).any()
    aux = {key: 0 * value for key, value in model.aux_losses().items()}
    (report.total + sum(aux.values())).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.denoising is not None and not model.denoising.label_embed.weight.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("deformable_detr_one_stage_r50", 2),
        ("deformable_detr_refine_r50", 2),
        ("deformable_detr_r50", 2),
        ("deformable_detr_static_r50", 2),
        ("deformable_detr_plus_r50", 2),
        ("hybrid_deformable_detr_r50", 2),
        ("dab_deformable_detr_r50", 1),
        ("dn_detr_r50", 1),
        ("dino_r50", 1),
        ("paq_deformable_detr_r50", 2),  # its host's
        ("paq_dino_r50", 1),
    ],
)
def test_weights_of_the_losses(name: str, weight: float) -> None:
    loss = load_config(name).loss
    assert (loss.class_weight, loss.l1_weight, loss.giou_weight) == (weight, 5, 2)
    assert (loss.class_cost, loss.l1_cost, loss.giou_cost) == (2, 5, 2)
