"""Terms of the criterion that only some hosts have, computed a second time by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from paqdetr.config import LossConfig
from paqdetr.losses import build_criterion
from paqdetr.models import create_model
from paqdetr.models.detector import Detector
from paqdetr.models.outputs import Decoded, DetectorOutput
from paqdetr.paq import AlignedAssigner, OneToOneAssigner, QualityAwareAssigner, match_layers
from paqdetr.structures import BACKGROUND_LOGIT, Targets

TINY: dict[str, Any] = dict(
    num_classes=5, backbone="test_resnet", dim=32, num_heads=4, ffn_dim=64, encoder_layers=1, num_queries=20
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


# DDQ's dense queries, and hybrid queries with proposals of their own


def corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


def cost_of(logits: Tensor, boxes: Tensor, target: Targets) -> Tensor:
    p = logits.sigmoid()[:, target.labels]
    cost = 2 * (-0.25 * (1 - p) ** 2 * (p + 1e-8).log() + 0.75 * p**2 * (1 - p + 1e-8).log())
    cost = cost + 5 * torch.cdist(boxes, target.boxes.to(boxes), p=1)
    return cost - 2 * generalized_box_iou(corners(boxes), corners(target.boxes.to(boxes)))


def dense_terms(logits: Tensor, boxes: Tensor, targets: list[Targets], k: int) -> tuple[float, float]:
    """Class and GIoU loss of one layer, (B, n, C) and (B, n, 4), in float64, pair by pair."""
    logits, boxes = logits.detach(), boxes.detach()
    class_loss, giou_loss, alignment_sum = 0.0, 0.0, 0.0
    for image_logits, image_boxes, target in zip(logits.double(), boxes.double(), targets, strict=True):
        if not len(target):
            continue
        k_here = max(min(k, len(image_logits) // len(target)), 1)
        columns = [j for j in range(len(target)) for _ in range(k_here)]
        rows, chosen = linear_sum_assignment(cost_of(image_logits, image_boxes, target)[:, columns].detach().numpy())
        pairs = [(int(i), columns[c]) for i, c in zip(rows, chosen, strict=True)]
        iou = box_iou(corners(image_boxes), corners(target.boxes.double()))
        giou = generalized_box_iou(corners(image_boxes), corners(target.boxes.double()))
        p = image_logits.sigmoid()
        goal = torch.zeros_like(p)
        for j in range(len(target)):
            mine = [i for i, box in pairs if box == j]
            if not mine:
                continue
            align = {i: float(p[i, target.labels[j]] * iou[i, j] ** 6) for i in mine}
            for i in mine:
                share = align[i] / (max(align.values()) + 1e-7) * max(float(iou[m, j]) for m in mine)
                goal[i, target.labels[j]] = share
                alignment_sum += share
                giou_loss += 2 * share * (1 - float(giou[i, j]))
        entropy = -(goal * p.log() + (1 - goal) * (1 - p).log())
        class_loss += float(((p - goal).abs() ** 2 * entropy).sum())
    return class_loss / max(alignment_sum, 1.0), giou_loss / max(alignment_sum, 1.0)


@pytest.mark.parametrize("counts", [(3, 0, 1), (1,), (12, 2)], ids=str)
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_dense_queries_learn_by_alignment(weight: float, counts: tuple[int, ...]) -> None:
    model = tiny("ddq_detr_r50", decoder_layers=2)
    with torch.no_grad():
        for part in (model.hybrid_heads, model.start.head):
            for parameter in part.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    targets = random_targets(*counts)
    output = run(model, targets)
    assert output.hybrid is not None and output.hybrid_proposals is not None
    assert output.hybrid.boxes.shape == (2, len(counts), 30, 4) and output.hybrid.counted is None
    config = LossConfig(hybrid_loss="aligned", hybrid_repeat=4, hybrid_weight=weight)
    report = build_criterion(config)(output, targets)
    layers = {f"hybrid{i + 1}": (output.hybrid.logits[i], output.hybrid.boxes[i]) for i in range(2)}
    layers["hybrid_encoder"] = (output.hybrid_proposals.logits, output.hybrid_proposals.boxes)
    for name, (logits, boxes) in layers.items():
        by_class, by_giou = dense_terms(logits, boxes, targets, 4)
        assert report.terms[f"{name}/class"].item() == pytest.approx(weight * by_class, rel=1e-4)
        assert report.terms[f"{name}/giou"].item() == pytest.approx(weight * by_giou, rel=1e-4)
        assert f"{name}/l1" not in report.terms


@pytest.mark.parametrize("boxes", [0, 1, 40])
def test_no_box_one_box_and_more_boxes_than_queries(boxes: int) -> None:
    model = tiny("ddq_detr_r50", decoder_layers=2)
    targets = random_targets(boxes, 0)
    report = build_criterion(LossConfig(hybrid_loss="aligned", hybrid_repeat=4))(run(model, targets), targets)
    assert torch.isfinite(report.total)
    report.total.backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    if not boxes:
        assert all(not report.terms[name] for name in report.terms if name.startswith("hybrid"))


def test_gradients_of_the_step_are_those_of_its_batches() -> None:
    """Alike batches: twice the boxes in the step, half the loss in each."""
    model, targets = tiny("ddq_detr_r50", decoder_layers=2), random_targets(2)
    output, criterion = run(model, targets), build_criterion(LossConfig(hybrid_loss="aligned", hybrid_repeat=8))
    with torch.no_grad():  # on their boxes, so that their alignment exceeds the least normaliser of 1
        output.hybrid.boxes[:, 0] = targets[0].boxes.repeat(15, 1)  # type: ignore[union-attr]
    alone, of_two = criterion(output, targets), criterion(output, targets, num_boxes=4)
    assert of_two.terms["hybrid1/class"].item() == pytest.approx(alone.terms["hybrid1/class"].item() / 2)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_proposals_of_hybrid_queries_have_the_loss_of_their_layers(weight: float) -> None:
    model = tiny("relation_detr_r50", hybrid_queries=15, decoder_layers=2)
    targets = random_targets(3, 0, 1)
    output = run(model, targets)
    assert output.hybrid_proposals is not None
    config = LossConfig(hybrid_repeat=4, hybrid_weight=weight)
    report = build_criterion(config)(output, targets)
    repeated = [Targets(t.labels.repeat(4), t.boxes.repeat(4, 1)) for t in targets]
    found = output.hybrid_proposals
    for kind, value in expected_terms(found.logits, found.boxes, repeated, 16 / weight).items():
        assert report.terms[f"hybrid_encoder/{kind}"].item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("assigner", [OneToOneAssigner(), QualityAwareAssigner(), AlignedAssigner(3)])
@pytest.mark.parametrize("boxes", [0, 2, 9])
def test_queries_that_have_left_are_never_matched(assigner: Any, boxes: int) -> None:
    logits, places = torch.randn(2, 1, 12, 5), torch.rand(2, 1, 12, 4) / 2 + 0.25
    counted = torch.ones(2, 1, 12, dtype=torch.bool)
    counted[1, 0, ::2] = False
    targets = random_targets(boxes)
    found = match_layers(logits, places, targets, [assigner] * 2, counted=counted)
    alone = match_layers(logits[1:, :, 1::2], places[1:, :, 1::2], targets, [assigner])
    assert torch.equal(found[1][0].query_indices, 2 * alone[0][0].query_indices + 1)
    assert torch.equal(found[1][0].target_indices, alone[0][0].target_indices)
    assert len(found[1][0]) >= min(boxes, 6) or boxes == 0
    every = match_layers(logits[:1], places[:1], targets, [assigner])
    assert torch.equal(found[0][0].query_indices, every[0][0].query_indices)


def test_the_loss_of_queries_that_have_left_is_nothing() -> None:
    model = tiny("ddq_detr_r50", decoder_layers=3)
    with torch.no_grad():
        model.decoder.box_heads[0][-1].bias[2:] += 6.0  # the first layer makes all boxes large, and they overlap
    targets = random_targets(2, 1)
    output = run(model, targets)
    counted = output.layers.counted
    assert counted is not None and not counted.all() and counted[0].all()
    logits = output.layers.logits.detach().requires_grad_()
    boxes = output.layers.boxes.detach().requires_grad_()
    layers = Decoded(logits.masked_fill(~counted[..., None], BACKGROUND_LOGIT), boxes, counted)
    report = build_criterion(LossConfig())(replace(output, layers=layers), targets)
    sum(report.terms[f"layer{i}/{kind}"] for i in (2, 3) for kind in ("class", "l1", "giou")).backward()  # type: ignore[union-attr]
    assert logits.grad is not None and boxes.grad is not None
    assert not logits.grad[~counted].any() and not boxes.grad[~counted].any()
    assert logits.grad[1:][counted[1:]].all() and boxes.grad[1:].any()


def test_weights_of_a_box_with_two_positives_by_hand() -> None:
    truth = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.2], [0.1, 0.1, 0.1, 0.1]]])
    logits = torch.zeros(1, 3, 2)
    (pairs,) = AlignedAssigner(2)(logits, boxes, [Targets(torch.tensor([1]), truth)])
    assert pairs.query_indices.tolist() == [0, 1] and pairs.weights is not None
    # p = 1/2 for both; IoU 1 and 1/2: 1/2 and 1/128, over the larger one, times the best IoU.
    assert pairs.weights.tolist() == pytest.approx([1.0, 1 / 64], rel=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        AlignedAssigner(0)
