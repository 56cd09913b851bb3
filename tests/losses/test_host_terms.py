"""Terms of the criterion that only some hosts have, computed a second time by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from paqdetr.config import LossConfig
from paqdetr.losses import build_criterion
from paqdetr.models import create_model
from paqdetr.models.detector import Detector
from paqdetr.models.outputs import DetectorOutput
from paqdetr.structures import Targets

TINY: dict[str, Any] = dict(
    num_classes=5, backbone="resnet18", dim=32, num_heads=4, ffn_dim=64, encoder_layers=1, num_queries=20
)


def tiny(name: str, **changes: Any) -> Detector:
    torch.manual_seed(0)
    return create_model(name, **TINY | changes).train()


def run(model: Detector, targets: list[Targets]) -> DetectorOutput:
    output = model(torch.randn(len(targets), 3, 96, 96), None, targets)
    # Away from the start, where all boxes of a level are alike.
    return output


def random_targets(*counts: int) -> list[Targets]:
    made = []
    for count in counts:
        boxes = torch.cat([0.3 + 0.4 * torch.rand(count, 2), 0.2 + 0.2 * torch.rand(count, 2)], dim=1)
        made.append(Targets(torch.randint(5, (count,)), boxes))
    return made


def focal(logits: Tensor, goal: Tensor) -> Tensor:
    p = logits.sigmoid()
    return -0.25 * goal * (1 - p) ** 2 * p.log() - 0.75 * (1 - goal) * p**2 * (1 - p).log()


def expected_terms(logits: Tensor, boxes: Tensor, targets: list[Targets], normalizer: float) -> dict[str, float]:
    """One-to-one match and focal, L1 and GIoU losses of (B, N, C) and (B, N, 4), in float64."""
    sums = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for image_logits, image_boxes, target in zip(logits.double(), boxes.double(), targets, strict=True):
        truth = target.boxes.double()
        p = image_logits.sigmoid()[:, target.labels]
        giou = generalized_box_iou(box_convert(image_boxes, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy"))
        cost = 2 * (-0.25 * (1 - p) ** 2 * (p + 1e-8).log() + 0.75 * p**2 * (1 - p + 1e-8).log())
        cost = cost + 5 * torch.cdist(image_boxes, truth, p=1) - 2 * giou
        rows, columns = linear_sum_assignment(cost.detach().numpy())
        goal = torch.zeros_like(image_logits)
        goal[rows, target.labels[columns]] = 1.0
        sums["class"] += focal(image_logits, goal).sum().item()
        sums["l1"] += 5 * (image_boxes[rows] - truth[columns]).abs().sum().item()
        sums["giou"] += 2 * (1 - giou[rows, columns]).sum().item()
    return {kind: value / normalizer for kind, value in sums.items()}


def test_the_encoder_of_deformable_detr_learns_objects_from_all_tokens() -> None:
    model, targets = tiny("deformable_detr_r50"), random_targets(3, 0, 1)
    output = run(model, targets)
    assert output.proposals is not None and output.proposals.all_tokens is not None
    all_tokens = output.proposals.all_tokens
    assert all_tokens.valid.any() and all_tokens.logits.shape[-1] == 1
    report = build_criterion(LossConfig())(output, targets)
    # Only tokens that can be chosen, and each box is just "an object".
    expected = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for b, target in enumerate(targets):
        keep = all_tokens.valid[b]
        objects = [replace(target, labels=torch.zeros_like(target.labels))]
        terms = expected_terms(all_tokens.logits[b, keep][None], all_tokens.boxes[b, keep][None], objects, 4)
        expected = {kind: expected[kind] + terms[kind] for kind in expected}
    for kind, value in expected.items():
        assert report.terms[f"encoder/{kind}"].item() == pytest.approx(value, rel=1e-4)
    assert [len(row) for row in report.pairs] == [3] * model.config.decoder_layers


def test_tokens_that_cannot_be_chosen_get_no_gradient() -> None:
    model, targets = tiny("deformable_detr_r50"), random_targets(2)
    output = run(model, targets)
    assert output.proposals is not None and output.proposals.all_tokens is not None
    all_tokens = output.proposals.all_tokens
    logits = all_tokens.logits.detach().requires_grad_()
    boxes = all_tokens.boxes.detach().requires_grad_()
    valid = all_tokens.valid.clone()
    valid[:, ::2] = False
    changed = replace(all_tokens, logits=logits, boxes=boxes, valid=valid)
    output = replace(output, proposals=replace(output.proposals, all_tokens=changed))
    report = build_criterion(LossConfig())(output, targets)
    sum(report.terms[f"encoder/{kind}"] for kind in ("class", "l1", "giou")).backward()  # type: ignore[union-attr]
    assert logits.grad is not None and boxes.grad is not None
    assert not logits.grad[~valid].any() and logits.grad[valid].all()
    assert not boxes.grad[~valid].any() and boxes.grad.any()


def test_one_stage_hosts_have_no_encoder_terms() -> None:
    model, targets = tiny("dab_deformable_detr_r50"), random_targets(2, 1)
    report = build_criterion(LossConfig())(run(model, targets), targets)
    assert not any(name.startswith("encoder") for name in report.terms)
    assert len(report.terms) == 3 * model.config.decoder_layers


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_hybrid_branch_counts_every_box_several_times(weight: float) -> None:
    model = tiny("hybrid_deformable_detr_r50", hybrid_queries=15, decoder_layers=2)
    targets = random_targets(3, 0, 1)
    output = run(model, targets)
    assert output.hybrid is not None and output.hybrid.boxes.shape == (2, 3, 15, 4)
    config = LossConfig(hybrid_repeat=4, hybrid_weight=weight)
    report = build_criterion(config)(output, targets)
    repeated = [Targets(t.labels.repeat(4), t.boxes.repeat(4, 1)) for t in targets]
    for layer in range(2):
        expected = expected_terms(output.hybrid.logits[layer], output.hybrid.boxes[layer], repeated, 16 / weight)
        for kind, value in expected.items():
            assert report.terms[f"hybrid{layer + 1}/{kind}"].item() == pytest.approx(value, rel=1e-4)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 96, 96)).hybrid is None
