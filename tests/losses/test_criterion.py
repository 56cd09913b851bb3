"""The whole loss of a real training step, and each of its terms computed a second time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paqdetr.config import LossConfig
from paqdetr.losses import LossReport, build_criterion
from paqdetr.models import Detector, create_model
from paqdetr.models.outputs import Decoded, DetectorOutput
from paqdetr.paq import OneToOneAssigner, QualityAwareAssigner
from paqdetr.structures import Targets

CLASSES, QUERIES, LAYERS = 5, 20, 3
PAQ: dict[str, Any] = dict(classification="varifocal", assigner="quality_aware", one_to_many_until=0.5)


def tiny_detector(**changes: Any) -> Detector:
    settings: dict[str, Any] = dict(
        num_classes=CLASSES,
        backbone="tf_efficientnet_lite0",
        dim=32,
        num_heads=4,
        ffn_dim=64,
        encoder_layers=1,
        decoder_layers=3,
        num_queries=QUERIES,
        num_patterns=6,
        denoising_queries=8,
        **changes,
    )
    return create_model("paq_dino_nano", pretrained_backbone=False, **settings).train()


def random_targets(*counts: int) -> list[Targets]:
    made = []
    for i, count in enumerate(counts):
        boxes = torch.cat([0.3 + 0.4 * torch.rand(count, 2), 0.2 + 0.2 * torch.rand(count, 2)], dim=1)
        made.append(Targets(torch.randint(CLASSES, (count,)), boxes, image_id=f"image {i}"))
    return made


@pytest.fixture(scope="module")
def model() -> Detector:
    torch.manual_seed(0)
    return tiny_detector()


def run(model: Detector, targets: list[Targets]) -> DetectorOutput:
    return model(torch.randn(len(targets), 3, 96, 96), None, targets)


def near_the_targets(output: DetectorOutput, targets: list[Targets]) -> DetectorOutput:
    """The output with predictions of all layers and of the encoder moved onto the boxes, give or take a little."""

    def move(boxes: Tensor) -> Tensor:
        boxes = boxes.clone()
        for b, target in enumerate(targets):
            if len(target):
                chosen = target.boxes[torch.arange(boxes.shape[-2]) % len(target)]
                noise = 0.01 * torch.randn(*boxes.shape[:-3], *boxes.shape[-2:])
                boxes[..., b, :, :] = chosen + noise
        return boxes

    layers = replace(output.layers, boxes=move(output.layers.boxes.detach()))
    proposals = replace(output.proposals, boxes=move(output.proposals.boxes.detach()))
    return replace(output, layers=layers, proposals=proposals)


def focal(logits: Tensor, goal: Tensor) -> Tensor:
    p = logits.sigmoid()
    return -0.25 * goal * (1 - p) ** 2 * p.log() - 0.75 * (1 - goal) * p**2 * (1 - p).log()


def varifocal(logits: Tensor, goal: Tensor) -> Tensor:
    p = logits.sigmoid()
    weight = torch.where(goal > 0, goal, 0.75 * p**2)
    return -weight * (goal * p.log() + (1 - goal) * (1 - p).log())


def expected_terms(
    logits: Tensor,
    boxes: Tensor,
    pairs: list[list[tuple[int, int]]],
    targets: list[Targets],
    normalizer: float,
    classification: str,
) -> dict[str, float]:
    """Class, L1 and GIoU of one layer, (B, N, C) and (B, N, 4), image by image and pair by pair, in float64."""
    logits, boxes = logits.detach().double(), boxes.detach().double()
    sums = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for b, target in enumerate(targets):
        goal = torch.zeros_like(logits[b])
        for query, j in pairs[b]:
            found, truth = boxes[b, query], target.boxes[j].double()
            sums["l1"] += (found - truth).abs().sum().item()
            low, high = found[:2] - found[2:] / 2, found[:2] + found[2:] / 2
            truth_low, truth_high = truth[:2] - truth[2:] / 2, truth[:2] + truth[2:] / 2
            sides = (torch.minimum(high, truth_high) - torch.maximum(low, truth_low)).clamp(min=0)
            union = found[2:].prod() + truth[2:].prod() - sides.prod()
            hull = (torch.maximum(high, truth_high) - torch.minimum(low, truth_low)).prod()
            iou = sides.prod() / union
            sums["giou"] += (1 - iou + (hull - union) / hull).item()
            goal[query, target.labels[j]] = iou if classification == "varifocal" else 1.0
        loss = varifocal if classification == "varifocal" else focal
        sums["class"] += loss(logits[b], goal).sum().item()
    weights = {"class": 1.0, "l1": 5.0, "giou": 2.0}
    return {kind: weights[kind] * value / normalizer for kind, value in sums.items()}


def as_lists(pairs: Any) -> list[list[tuple[int, int]]]:
    return [list(zip(found.query_indices.tolist(), found.target_indices.tolist(), strict=True)) for found in pairs]


def check_terms(report: LossReport, name: str, expected: dict[str, float]) -> None:
    for kind, value in expected.items():
        assert report.terms[f"{name}/{kind}"].item() == pytest.approx(value, rel=1e-4, abs=1e-6), (name, kind)


# --- the sum and its terms


@pytest.mark.parametrize("classification", ["varifocal", "focal"])
@pytest.mark.parametrize("encoder_assigner", ["one_to_one", "quality_aware"])
def test_every_term_and_the_total(model: Detector, classification: Any, encoder_assigner: Any) -> None:
    targets = random_targets(3, 0, 1)
    output = near_the_targets(run(model, targets), targets)
    config = LossConfig(**(PAQ | dict(classification=classification, encoder_assigner=encoder_assigner)))
    report = build_criterion(config)(output, targets, aux_losses=model.aux_losses())

    one_to_one, one_to_many = OneToOneAssigner(), QualityAwareAssigner()
    for layer in range(LAYERS):
        logits, boxes = output.layers.logits[layer], output.layers.boxes[layer]
        assigner = one_to_one if layer == LAYERS - 1 else one_to_many
        pairs = as_lists(assigner(logits, boxes, targets))
        assert as_lists(report.pairs[layer]) == pairs
        check_terms(report, f"layer{layer + 1}", expected_terms(logits, boxes, pairs, targets, 4, classification))

    logits, boxes = output.proposals.logits, output.proposals.boxes
    assigner = one_to_one if encoder_assigner == "one_to_one" else one_to_many
    pairs = as_lists(assigner(logits, boxes, targets))
    assert (sum(map(len, pairs)) == 4) == (encoder_assigner == "one_to_one")
    check_terms(report, "encoder", expected_terms(logits, boxes, pairs, targets, 4, classification))

    # 8 denoising queries, at most 3 boxes: 2 groups, each 3 slots of positives and 3 of negatives.
    assert output.denoised is not None and output.denoising is not None
    assert (output.denoising.groups, output.denoising.boxes, len(output.denoising)) == (2, 3, 12)
    fixed = [[(0, 0), (1, 1), (2, 2), (6, 0), (7, 1), (8, 2)], [], [(0, 0), (6, 0)]]
    for layer in range(LAYERS):
        logits, boxes = output.denoised.logits[layer], output.denoised.boxes[layer]
        check_terms(
            report, f"denoising{layer + 1}", expected_terms(logits, boxes, fixed, targets, 4 * 2, classification)
        )

    names = [f"layer{i + 1}" for i in range(LAYERS)] + ["encoder"]
    names += [f"denoising{i + 1}" for i in range(LAYERS)]
    every_name = {f"{name}/{kind}" for name in names for kind in ("class", "l1", "giou")} | {"diversity"}
    assert set(report.terms) == every_name
    assert report.total.item() == pytest.approx(math.fsum(term.item() for term in report.terms.values()), rel=1e-6)


def test_class_loss_differs_between_focal_and_varifocal(model: Detector) -> None:
    """Box terms are the same; the baseline can take either."""
    targets = random_targets(2, 2)
    output = run(model, targets)
    focal_terms, varifocal_terms = (
        build_criterion(LossConfig(classification=kind))(output, targets).terms for kind in ("focal", "varifocal")
    )
    for name, value in focal_terms.items():
        same = value.item() == varifocal_terms[name].item()
        assert same != name.endswith("/class"), name


def test_weights_scale_their_terms(model: Detector) -> None:
    targets = random_targets(2, 1)
    output = run(model, targets)
    base = build_criterion(LossConfig())(output, targets).terms
    scaled = build_criterion(LossConfig(class_weight=3.0, l1_weight=0.5, giou_weight=7.0))(output, targets)
    factor = {"class": 3.0, "l1": 0.1, "giou": 3.5}
    for name, value in base.items():
        expected = value.item() * factor[name.partition("/")[2]]
        assert scaled.terms[name].item() == pytest.approx(expected, rel=1e-5)


def test_diversity_term(model: Detector) -> None:
    targets = random_targets(1, 1)
    output = run(model, targets)
    owed = model.query_source.aux_losses()
    patterns = model.query_source.patterns.detach().double()
    unit = patterns / patterns.norm(dim=1, keepdim=True)
    mean = ((unit @ unit.T).abs().sum() - len(unit)).item() / (len(unit) * (len(unit) - 1))
    assert mean > 0.01

    def term(**settings: float) -> float:
        report = build_criterion(LossConfig(**settings))(output, targets, aux_losses=owed)
        return report.terms["diversity"].item()

    assert term() == pytest.approx(0.2 * mean, rel=1e-5)
    assert term(diversity_weight=0.3, div_scale=600.0) == pytest.approx(0.3 * 600 * mean, rel=1e-5)
    assert term(diversity_weight=0.0) == 0
    assert "diversity" not in build_criterion(LossConfig())(output, targets).terms


# --- who is assigned what, and when


def test_positives_of_each_layer_and_the_schedule(model: Detector) -> None:
    targets = random_targets(3, 1)
    output = near_the_targets(run(model, targets), targets)
    criterion = build_criterion(LossConfig(**PAQ))
    many = criterion(output, targets, progress=0.49)
    claims = [
        sum(int(k.sum()) for k in QualityAwareAssigner().num_positives(*layer, targets)) / 4
        for layer in zip(output.layers.logits, output.layers.boxes, strict=True)
    ]
    assert many.positives_per_box == [*claims[:-1], 1.0]
    assert min(claims) > 1.5
    for progress in (0.5, 0.9, 1.0):
        off = criterion(output, targets, progress=progress)
        assert off.positives_per_box == [1.0] * LAYERS
    baseline = build_criterion(LossConfig(classification="varifocal"))(output, targets)
    assert {k: v.item() for k, v in baseline.terms.items()} == {k: v.item() for k, v in off.terms.items()}
    assert [criterion.one_to_many(p) for p in (0.0, 0.4999, 0.5, 1.0)] == [True, True, False, False]


@pytest.mark.parametrize(("until", "expected"), [(0.0, [False] * 3), (1.0, [True, True, False])])
def test_never_and_always(until: float, expected: list[bool]) -> None:
    criterion = build_criterion(LossConfig(**(PAQ | dict(one_to_many_until=until))))
    assert [criterion.one_to_many(p) for p in (0.0, 0.999, 1.0)] == expected


def test_the_encoder_follows_its_switch_and_the_schedule(model: Detector) -> None:
    targets = random_targets(3, 2)
    output = near_the_targets(run(model, targets), targets)
    plain = build_criterion(LossConfig(**PAQ))
    both = build_criterion(LossConfig(**PAQ, encoder_assigner="quality_aware"))
    alone = build_criterion(LossConfig(**(PAQ | dict(assigner="one_to_one", encoder_assigner="quality_aware"))))
    on, off = ({"progress": p} for p in (0.0, 0.5))
    l1 = "encoder/l1"
    assert both(output, targets, **on).terms[l1] > 1.3 * plain(output, targets, **on).terms[l1]
    assert both(output, targets, **off).terms[l1] == plain(output, targets, **off).terms[l1]
    assert alone(output, targets, **on).terms[l1] == both(output, targets, **on).terms[l1]
    assert alone(output, targets, **on).positives_per_box == [1.0] * LAYERS


def test_several_positives_begin_and_end(model: Detector) -> None:
    targets = random_targets(3, 1)
    output = near_the_targets(run(model, targets), targets)
    criterion = build_criterion(LossConfig(**PAQ, encoder_assigner="quality_aware", one_to_many_from=0.25))
    always = build_criterion(LossConfig(**PAQ, encoder_assigner="quality_aware"))
    assert [criterion.one_to_many(p) for p in (0.0, 0.249, 0.25, 0.499, 0.5)] == [False, False, True, True, False]
    before, begun, after = (criterion(output, targets, progress=p) for p in (0.0, 0.25, 0.5))
    assert before.terms == after.terms and before.positives_per_box == [1.0] * LAYERS
    assert begun.terms == always(output, targets, progress=0.0).terms != before.terms


def test_the_encoder_has_a_lower_bound_of_its_own(model: Detector) -> None:
    targets = random_targets(2)
    output = run(model, targets)  # no prediction is near: every box gets the fewest there are
    rules = dict(assigner="quality_aware", encoder_assigner="quality_aware", min_positives=1)
    own, both = (build_criterion(LossConfig(**rules, **more)) for more in ({"encoder_min_positives": 3}, {}))
    assert (own.intermediate.min_positives, own.encoder.min_positives) == (1, 3)  # type: ignore[attr-defined]
    assert (both.intermediate.min_positives, both.encoder.min_positives) == (1, 1)  # type: ignore[attr-defined]
    one, three = (c(output, targets).terms for c in (both, own))
    assert {key for key in one if one[key] != three[key]} == {f"encoder/{kind}" for kind in ("class", "l1", "giou")}


def test_extra_positives_need_an_overlap(model: Detector) -> None:
    targets = random_targets(3, 1)
    output = run(model, targets)
    rules = dict(assigner="quality_aware", min_positives=3)
    for min_iou, expected in ((0.0, 3.0), (1.0, 1.0)):
        criterion = build_criterion(LossConfig(**rules, min_iou=min_iou))
        assert criterion(output, targets).positives_per_box == [*[expected] * (LAYERS - 1), 1.0]


def test_settings_reach_the_assigner() -> None:
    config = LossConfig(
        assigner="quality_aware",
        min_iou=0.3,
        gamma=0.1,
        top_k=7,
        min_positives=2,
        select="score",
        confidence="max",
        class_cost=1.0,
        l1_cost=2.0,
        giou_cost=3.0,
    )
    criterion = build_criterion(config)
    rule = criterion.intermediate
    assert isinstance(rule, QualityAwareAssigner) and isinstance(criterion.last, OneToOneAssigner)
    assert isinstance(criterion.encoder, OneToOneAssigner)
    assert rule.min_iou == 0.3
    assert (rule.gamma, rule.top_k, rule.min_positives, rule.select, rule.confidence) == (0.1, 7, 2, "score", "max")
    for weights in (criterion.cost_weights, rule.cost_weights, criterion.last.cost_weights):
        assert (weights.classification, weights.l1, weights.giou) == (1.0, 2.0, 3.0)
        assert (weights.alpha, weights.gamma) == (0.25, 2.0)


# --- the normaliser


def test_normalizer(model: Detector) -> None:
    """Boxes in the batch, at least 1; or what the caller says, for several processes."""
    targets = random_targets(3, 1)
    output = run(model, targets)
    criterion = build_criterion(LossConfig())
    own = criterion(output, targets)
    for num_boxes in (10.0, 2.5):
        given = criterion(output, targets, num_boxes=num_boxes)
        for name, value in own.terms.items():
            assert given.terms[name].item() == pytest.approx(value.item() * 4 / num_boxes, rel=1e-5)
        assert given.positives_per_box == own.positives_per_box
    least = criterion(output, targets, num_boxes=0.5)
    assert least.total.item() == pytest.approx(own.total.item() * 4, rel=1e-5)


def test_more_boxes_than_queries(model: Detector) -> None:
    targets = random_targets(QUERIES + 4)
    report = build_criterion(LossConfig(**PAQ))(run(model, targets), targets)
    assert report.positives_per_box == [pytest.approx(20 / 24)] * LAYERS
    assert report.total.isfinite()


# --- gradients


def test_a_batch_without_boxes(model: Detector) -> None:
    targets = random_targets(0, 0)
    output = run(model, targets)
    report = build_criterion(LossConfig(**PAQ))(output, targets)
    for name, value in report.terms.items():
        assert (value.item() == 0) == (not name.endswith("/class") or name.startswith("denoising")), name
    assert all(math.isnan(x) for x in report.positives_per_box)
    negatives = varifocal(output.layers.logits[0].double(), torch.zeros(2, QUERIES, CLASSES)).sum().item()
    assert report.terms["layer1/class"].item() == pytest.approx(negatives, rel=1e-4)  # divided by 1


def test_quality_is_a_target_and_not_a_prediction(model: Detector) -> None:
    """The class loss has no gradient to boxes."""
    targets = random_targets(2, 2)
    output = run(model, targets)
    boxes = output.layers.boxes.detach().requires_grad_()
    output = replace(output, layers=replace(output.layers, boxes=boxes))
    terms = build_criterion(LossConfig(**PAQ))(output, targets).terms
    (gradient,) = torch.autograd.grad(terms["layer1/class"], boxes, retain_graph=True, allow_unused=True)
    assert gradient is None
    (gradient,) = torch.autograd.grad(terms["layer1/giou"], boxes)
    assert (gradient[0] != 0).any() and (gradient[1:] == 0).all()


# --- precision, and what breaks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(model: Detector, dtype: torch.dtype) -> None:
    targets = random_targets(2, 1)
    output = run(model, targets)
    assert output.denoised is not None

    def cast(output: DetectorOutput, to: torch.dtype) -> DetectorOutput:
        return replace(
            output,
            layers=replace(output.layers, logits=output.layers.logits.to(dtype).to(to)),
            proposals=replace(output.proposals, logits=output.proposals.logits.to(dtype).to(to)),
            denoised=replace(output.denoised, logits=output.denoised.logits.to(dtype).to(to)),
        )

    criterion = build_criterion(LossConfig(**PAQ))
    found, expected = (criterion(cast(output, to), targets) for to in (dtype, torch.float32))
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)


def test_without_denoising() -> None:
    model = tiny_detector().eval()
    targets = random_targets(1, 1)
    report = build_criterion(LossConfig(**PAQ))(run(model, targets), targets)
    assert not any(name.startswith("denoising") for name in report.terms)
    assert report.total.isfinite()


# --- what is not right


def test_an_auxiliary_loss_without_a_weight_is_named(model: Detector) -> None:
    targets = random_targets(2)
    criterion = build_criterion(LossConfig(**PAQ))
    with pytest.raises(ValueError, match=r"'balance' has no weight, known are \['diversity'\]"):
        criterion(run(model, targets), targets, aux_losses={"balance": torch.tensor(1.0)})


def test_class_agnostic_proposals_want_training_mode() -> None:
    torch.manual_seed(0)
    targets = random_targets(2)
    output = tiny_detector()(torch.randn(1, 3, 96, 96), None, targets)
    assert output.proposals is not None
    agnostic = replace(output, proposals=replace(output.proposals, logits=output.proposals.logits[..., :1]))
    with pytest.raises(ValueError, match=r"call model.train\(\) before the forward pass"):
        build_criterion(LossConfig(**PAQ))(agnostic, targets)


@pytest.mark.parametrize("denoise", [True, False])
def test_wrong_labels_are_named_where_they_enter(denoise: bool) -> None:
    torch.manual_seed(0)
    good, bad = random_targets(2, 1)
    bad = replace(bad, labels=torch.tensor([CLASSES]))
    model = tiny_detector()
    with pytest.raises(ValueError, match=f"labels of image 'image 1' hold {CLASSES}, and there are {CLASSES}"):
        if denoise:
            run(model, [good, bad])
        build_criterion(LossConfig(**PAQ))(run(model, [good, good]), [good, bad])


class Waits(TorchDispatchMode):
    """Operators whose result the host would wait for, on a GPU: numbers, and tensors of a length that depends on content."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        if name in ("_local_scalar_dense", "bincount", "masked_select", "nonzero"):
            self.seen.append(name)
        return operator(*args, **(kwargs or {}))


def test_nothing_is_waited_for_but_the_costs(model: Detector) -> None:
    targets = random_targets(3, 0, 2)
    output = run(model, targets)
    criterion = build_criterion(LossConfig(**PAQ))
    with Waits() as waits:
        report = criterion(output, targets, aux_losses=model.aux_losses())
        assert waits.seen == []
        float(report.total.detach())
    assert waits.seen == ["_local_scalar_dense"]


def test_float64_is_kept(model: Detector) -> None:
    """A difference that float32 cannot hold reaches the total."""
    targets = [replace(target, boxes=target.boxes.double()) for target in random_targets(3, 2)]
    output = run(model, targets)
    double = Decoded(output.layers.logits.double(), output.layers.boxes.double())
    output = replace(
        output,
        pred_logits=double.logits[-1],
        pred_boxes=double.boxes[-1],
        layers=double,
        proposals=None,
        denoised=None,
        denoising=None,
    )
    moved = replace(output, layers=Decoded(double.logits, double.boxes * (1 + 1e-10)))
    criterion = build_criterion(LossConfig(**PAQ))
    totals = [criterion(found, targets).total for found in (output, moved)]
    assert totals[0].dtype == torch.float64 and 0 < float((totals[0] - totals[1]).detach().abs()) < 1e-7
