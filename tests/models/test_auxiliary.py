"""The auxiliary heads of Co-DETR against slow readings of the papers: who learns what, each loss, and the queries they give.

Sources: ATSS (arXiv 1912.02424), algorithm 1; Faster R-CNN (arXiv 1506.01497), section 3.1.2; constants of Sense-X/Co-DETR,
projects/configs/co_dino/co_dino_5scale_r50_1x_coco.py 2bc657a.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher

from paqdetr.config import LossConfig
from paqdetr.losses import build_criterion
from paqdetr.models import create_model
from paqdetr.models.auxiliary import AuxiliaryHeads
from paqdetr.models.auxiliary_heads import (
    BACKGROUND,
    LEFT_OUT,
    AtssHead,
    FasterRcnn,
    Maps,
    Truth,
    atss_matches,
    drawn,
    matches,
    pool,
)
from paqdetr.models.backbone import Uninitialised
from paqdetr.models.cost import model_cost
from paqdetr.models.detector import Detector
from paqdetr.models.files import reshape_classes, start_from
from paqdetr.structures import Targets

STRIDES, CLASSES, DIM = (8, 16, 32), 4, 16


def iou(a: Tensor, b: Tensor) -> float:
    """Of two xyxy boxes."""
    width = min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0]))
    height = min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1]))
    inside = max(width, 0.0) * max(height, 0.0)
    areas = [float((x[2] - x[0]) * (x[3] - x[1])) for x in (a, b)]
    return inside / (sum(areas) - inside) if sum(areas) > inside else 0.0


def giou_loss(a: Tensor, b: Tensor) -> float:
    hull = (max(float(a[2]), float(b[2])) - min(float(a[0]), float(b[0]))) * (
        max(float(a[3]), float(b[3])) - min(float(a[1]), float(b[1]))
    )
    width = min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0]))
    height = min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1]))
    inside = max(width, 0.0) * max(height, 0.0)
    union = sum(float((x[2] - x[0]) * (x[3] - x[1])) for x in (a, b)) - inside
    return 1 - inside / union + (hull - union) / hull


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def decoded(delta: Tensor, anchor: Tensor, scale: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)) -> Tensor:
    """A box from an anchor: its centre moved in sides, its sides multiplied."""
    dx, dy, dw, dh = (float(x) * s for x, s in zip(delta, scale, strict=True))
    width, height = float(anchor[2] - anchor[0]), float(anchor[3] - anchor[1])
    x, y = float(anchor[0]) + width / 2 + dx * width, float(anchor[1]) + height / 2 + dy * height
    w, h = width * math.exp(dw), height * math.exp(dh)
    return torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dtype=torch.float64)


def some_maps(*, batch: int = 2, cells: int = 6, padded: int = 0) -> Maps:
    """Levels of cells x cells, half of it, a quarter; the last rows and columns of the finest are padding in the last image."""
    features, valid = [], []
    for level in range(3):
        side, free = math.ceil(cells / 2**level), math.ceil((cells - padded) / 2**level)
        mask = torch.ones(batch, side, side, dtype=torch.bool)
        mask[-1, free:], mask[-1, :, free:] = False, False
        features.append(torch.randn(batch, DIM, side, side, dtype=torch.float64) * mask[:, None])
        valid.append(mask)
    return Maps(features, valid, STRIDES)


def some_truth(*counts: int, size: float = 48.0) -> list[Truth]:
    made = []
    for count in counts:
        low = torch.rand(count, 2, dtype=torch.float64) * size * 0.6
        boxes = torch.cat([low, low + 4 + torch.rand(count, 2, dtype=torch.float64) * size * 0.35], dim=1)
        made.append(Truth(torch.randint(CLASSES, (count,)), boxes, (size, size)))
    return made


# Who learns what


def slow_atss(levels: list[Tensor], valid: Tensor, boxes: Tensor, top_k: int) -> list[int]:
    anchors, place = torch.cat(levels), [i for i, level in enumerate(levels) for _ in level]
    claims: list[list[tuple[float, int]]] = [[] for _ in anchors]
    for g, box in enumerate(boxes):
        center = (box[:2] + box[2:]) / 2
        candidates = []
        for level in range(len(levels)):
            own = [i for i in range(len(anchors)) if place[i] == level and valid[i]]
            own.sort(key=lambda i: float(((anchors[i, :2] + anchors[i, 2:]) / 2 - center).norm()))
            candidates += own[:top_k]
        overlaps = [iou(box, anchors[i]) for i in candidates]
        mean = sum(overlaps) / len(overlaps)
        spread = math.sqrt(sum((x - mean) ** 2 for x in overlaps) / (len(overlaps) - 1)) if len(overlaps) > 1 else 0.0
        for i, overlap in zip(candidates, overlaps, strict=True):
            x, y = ((anchors[i, :2] + anchors[i, 2:]) / 2).tolist()
            inside = box[0] + 0.01 < x < box[2] - 0.01 and box[1] + 0.01 < y < box[3] - 0.01
            if overlap >= mean + spread - 1e-12 and inside:
                claims[i].append((overlap, -g))
    return [-max(claim)[1] if claim else BACKGROUND for claim in claims]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 5), padded=st.integers(0, 3))
def test_atss_learns_as_its_paper_says(seed: int, count: int, padded: int) -> None:
    torch.manual_seed(seed)
    head = AtssHead(dim=DIM, num_classes=CLASSES, strides=STRIDES).double()
    levels, valid = some_maps(padded=padded).anchors(head.generator)
    (truth,) = some_truth(count)
    # Centres in general position: ties between anchors at one distance have no order.
    levels = [level + 0.3 * torch.rand(len(level), 1, dtype=torch.float64) for level in levels]
    found = atss_matches(levels, valid[-1], truth.boxes, top_k=3)
    assert found.tolist() == slow_atss(levels, valid[-1], truth.boxes, 3)


def test_atss_of_a_box_on_a_single_anchor() -> None:
    """By hand: 4 anchors of 8 x 8 in a row, a box on the second; the two nearest have IoU 1 and 0, mean .5, std .71: none."""
    anchors = torch.tensor([[8.0 * i, 0.0, 8.0 * i + 8, 8.0] for i in range(4)])
    everything = torch.ones(4, dtype=torch.bool)
    box = torch.tensor([[8.0, 0.0, 16.0, 8.0]])
    assert atss_matches([anchors], everything, box, top_k=2).tolist() == [BACKGROUND] * 4
    # Four candidates: mean .25, std .5, and the box itself reaches .75.
    assert atss_matches([anchors], everything, box, top_k=4).tolist() == [BACKGROUND, 0, BACKGROUND, BACKGROUND]


def slow_matches(matcher: Matcher, boxes: Tensor, candidates: Tensor) -> list[int]:
    overlaps = [[iou(box, candidate) for candidate in candidates] for box in boxes]
    result = []
    for i in range(len(candidates)):
        best, g = max(((row[i], -g) for g, row in enumerate(overlaps)), default=(0.0, 1))
        owners = [g for g, row in enumerate(overlaps) if row[i] == max(row) >= matcher.low_threshold]
        if matcher.allow_low_quality_matches and owners:
            result.append(owners[-1])
        elif best < matcher.low_threshold:
            result.append(BACKGROUND)
        elif best >= matcher.high_threshold:
            result.append(-g)
        else:
            result.append(LEFT_OUT)
    return result


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.sampled_from([0, 1, 2, 5, 20]),
    flat=st.booleans(),
    rule=st.sampled_from([(0.7, 0.3, True), (0.5, 0.5, False)]),
)
def test_proposals_learn_by_iou(seed: int, count: int, flat: bool, rule: tuple[float, float, bool]) -> None:
    """Thresholds, the best candidate of a box where none is good, and boxes without an area, which nothing learns."""
    torch.manual_seed(seed)
    (truth,) = some_truth(count)
    boxes = truth.boxes
    if flat and count:
        boxes[0, 2] = boxes[0, 0]
    moved = boxes.repeat(4, 1) + 6 * torch.randn(4 * count, 4, dtype=torch.float64)
    candidates = torch.cat([moved, some_truth(8)[0].boxes])
    candidates = torch.cat([candidates[:, :2], torch.maximum(candidates[:, :2] + 1, candidates[:, 2:])], dim=1)
    matcher = Matcher(*rule)
    assert matches(matcher, boxes, candidates).tolist() == slow_matches(matcher, boxes, candidates)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), positives=st.integers(0, 40), background=st.integers(0, 60))
def test_samples_are_a_share_of_positives_filled_with_background(seed: int, positives: int, background: int) -> None:
    torch.manual_seed(seed)
    matched = torch.tensor([3] * positives + [BACKGROUND] * background + [LEFT_OUT] * 7)[
        torch.randperm(positives + background + 7)
    ]
    chosen, rest = drawn(BalancedPositiveNegativeSampler(32, 0.25), matched)
    assert len(chosen) == min(positives, 8) and len(rest) == min(background, 32 - len(chosen))
    assert (matched[chosen] == 3).all() and (matched[rest] == BACKGROUND).all()
    assert len({*chosen.tolist(), *rest.tolist()}) == len(chosen) + len(rest)


def test_constants_are_the_published_ones() -> None:
    with torch.device("meta"), Uninitialised():
        heads = create_model("co_dino_r50").auxiliary
    assert heads is not None and list(heads.heads) == ["faster_rcnn", "atss"]
    assert heads.strides == (4, 8, 16, 32, 64, 128)
    rcnn, atss = heads.heads["faster_rcnn"], heads.heads["atss"]
    assert isinstance(rcnn, FasterRcnn) and isinstance(atss, AtssHead)
    assert [size for (size,) in atss.generator.sizes] == [32, 64, 128, 256, 512, 1024] and atss.top_k == 9
    rpn = rcnn.rpn
    assert rpn.anchor_generator.sizes[0] == pytest.approx((16, 16 * 2 ** (1 / 3), 16 * 2 ** (2 / 3)))
    assert rpn.anchor_generator.num_anchors_per_location() == [9] * 6
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert (rcnn.sampler.batch_size_per_image, rcnn.sampler.positive_fraction) == (512, 0.25)
    assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n(), rpn.nms_thresh) == (4000, 1000, 0.7)
    assert rcnn.shared[0].weight.shape == (1024, 256 * 49) and rcnn.box_head.weight.shape == (320, 1024)


# Losses


def test_losses_of_atss() -> None:
    torch.manual_seed(0)
    head = AtssHead(dim=DIM, num_classes=CLASSES, strides=STRIDES).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    maps, truth = some_maps(padded=2), some_truth(3, 1, size=32.0)
    losses, samples = head(maps, truth)
    with torch.no_grad():
        logits, deltas, centerness = head._predict(maps.features)
    by_class = giou = middle = weights = 0.0
    positives = 0
    for i, image in enumerate(samples):
        for a, g in enumerate(image.matched.tolist()):
            if g == LEFT_OUT:
                continue
            for c in range(CLASSES):
                x = float(logits[i, a, c])
                p = 1 / (1 + math.exp(-x))
                hit = g >= 0 and c == int(truth[i].labels[g])
                by_class += 0.25 * (1 - p) ** 2 * softplus(-x) if hit else 0.75 * p**2 * softplus(x)
            if g < 0:
                continue
            positives += 1
            box, anchor = truth[i].boxes[g], image.boxes[a]
            x, y = ((anchor[:2] + anchor[2:]) / 2).tolist()
            left, top, right, bottom = x - float(box[0]), y - float(box[1]), float(box[2]) - x, float(box[3]) - y
            share = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
            giou += share * giou_loss(decoded(deltas[i, a], anchor), box)
            weights += share
            x = float(centerness[i, a])
            middle += share * softplus(-x) + (1 - share) * softplus(x)
    assert positives > 5
    assert losses["atss/class"].item() == pytest.approx(by_class / positives)
    assert losses["atss/giou"].item() == pytest.approx(2 * giou / max(weights, 1.0), rel=1e-5)
    assert losses["atss/centerness"].item() == pytest.approx(middle / positives)


@pytest.fixture
def exhaustive() -> FasterRcnn:
    """Faster R-CNN that learns from everything it may learn from, so that nothing is drawn."""
    torch.manual_seed(0)
    head = FasterRcnn(dim=DIM, num_classes=CLASSES, strides=STRIDES, samples=64).double()
    head.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    head.sampler.batch_size_per_image = 10**6
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return head


def test_losses_of_the_first_stage(exhaustive: FasterRcnn) -> None:
    maps, truth = some_maps(padded=2), some_truth(3, 1, size=32.0)
    # Large enough for the anchors, of which the smallest is 32 pixels wide.
    large = torch.tensor([[4.0, 4, 38, 36], [10, 0, 41, 40], [0, 20, 30, 47]], dtype=torch.float64)
    truth = [replace(truth[0], boxes=large), replace(truth[1], boxes=large[:1] - 4)]
    losses, _ = exhaustive(maps, truth)
    levels, valid = maps.anchors(exhaustive.rpn.anchor_generator)
    anchors = torch.cat(levels)
    with torch.no_grad():
        objectness, deltas = exhaustive.rpn.head(maps.features)
    logits = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in objectness], dim=1)
    moves = torch.cat([x.unflatten(1, (9, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas], dim=1)
    by_class = distance = 0.0
    count = 0
    for i, image in enumerate(truth):
        for a, g in enumerate(slow_matches(exhaustive.rpn.proposal_matcher, image.boxes, anchors)):
            if not valid[i, a] or g == LEFT_OUT:
                continue
            count += 1
            x = float(logits[i, a])
            by_class += softplus(-x) if g >= 0 else softplus(x)
            if g >= 0:
                box, anchor = image.boxes[g], anchors[a]
                sides, own = box[2:] - box[:2], anchor[2:] - anchor[:2]
                wanted = torch.cat([((box[:2] + box[2:]) - (anchor[:2] + anchor[2:])) / 2 / own, (sides / own).log()])
                distance += float((moves[i, a] - wanted).abs().sum())
    assert distance > 0
    assert losses["rpn/class"].item() == pytest.approx(by_class / count, rel=1e-5)
    assert losses["rpn/l1"].item() == pytest.approx(distance / count, rel=1e-5)


def test_losses_of_the_second_stage(exhaustive: FasterRcnn) -> None:
    maps, truth = some_maps(padded=2), some_truth(3, 1, size=32.0)
    losses, samples = exhaustive(maps, truth)
    x = exhaustive.shared(pool(maps, [image.boxes for image in samples]).flatten(1)).relu()
    logits = torch.cat([exhaustive.class_head(x), exhaustive.background_head(x)], dim=1)
    moves = exhaustive.box_head(x)
    by_class = giou = 0.0
    row = 0
    for image, target in zip(samples, truth, strict=True):
        assert {g for g in image.matched.tolist() if g >= 0} == set(range(len(target.labels))), (
            "true boxes are proposals too"
        )
        assert image.matched.tolist() == slow_matches(exhaustive.matcher, target.boxes, image.boxes)
        for box, g in zip(image.boxes, image.matched.tolist(), strict=True):
            label = int(target.labels[g]) if g >= 0 else CLASSES
            by_class += float(logits[row].logsumexp(0) - logits[row, label])
            if g >= 0:
                giou += giou_loss(decoded(moves[row, 4 * label : 4 * label + 4], box), target.boxes[g])
            row += 1
    assert losses["rcnn/class"].item() == pytest.approx(by_class / row)
    assert losses["rcnn/giou"].item() == pytest.approx(10 * giou / row, rel=1e-5)


def test_boxes_are_read_at_their_place_from_the_level_of_their_size() -> None:
    """On a ramp RoIAlign reads the centre of a box; each level says which it is."""
    maps = some_maps(batch=1, cells=40)
    ramps = []
    for i, (x, stride) in enumerate(zip(maps.features, STRIDES, strict=True)):
        column = (torch.arange(x.shape[-1], dtype=torch.float64) + 0.5) * stride  # pixels at the middle of each cell
        ramps.append(torch.stack([column.expand(x.shape[-2], -1), torch.full(x.shape[-2:], float(i)).double()])[None])
    boxes = torch.tensor([[96.0, 96, 140, 150], [40, 40, 150, 160], [30, 30, 290, 280]], dtype=torch.float64)
    read = pool(Maps(ramps, maps.valid, STRIDES), [boxes]).mean((2, 3))
    assert read[:, 0].tolist() == pytest.approx(((boxes[:, 0] + boxes[:, 2]) / 2).tolist())
    # 28 cells of 8 pixels are 224: boxes of about 49, 115 and 255 are of levels 0, 0 and 1.
    assert read[:, 1].tolist() == pytest.approx([0, 0, 1])


# Queries


def heads(**changes: Any) -> AuxiliaryHeads:
    options: dict[str, Any] = dict(
        names=("faster_rcnn", "atss"), dim=DIM, num_classes=CLASSES, strides=STRIDES, samples=32, queries=20
    )
    return AuxiliaryHeads(**options | changes)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0), (30, 0)])
def test_customised_queries_begin_at_positives_and_know_their_box(
    counts: tuple[int, ...], make_tokens: Callable
) -> None:
    torch.manual_seed(0)
    tokens = make_tokens([torch.randn(2, DIM, side, side) for side in (12, 6, 3)])
    targets = []
    for count in counts:
        boxes = torch.cat([0.2 + 0.6 * torch.rand(count, 2), 0.1 + 0.3 * torch.rand(count, 2)], dim=1)
        targets.append(Targets(torch.randint(CLASSES, (count,)), boxes))
    for queries in heads()(tokens, targets).customised:
        content, boxes = queries.queries.content, queries.queries.reference
        most = max(len(pairs) for pairs in queries.pairs)
        assert content.shape == (2, max(most, 9), DIM) and boxes.shape == (2, max(most, 9), 4)
        assert (max(most, 9) <= 20) and (most > 0) is any(counts)
        for image, (pairs, target) in enumerate(zip(queries.pairs, targets, strict=True)):
            assert pairs.query_indices.tolist() == list(range(len(pairs)))
            assert len(target) or not len(pairs)
            for query, g in zip(pairs.query_indices.tolist(), pairs.target_indices.tolist(), strict=True):
                assert queries.counted[image, query]
                corners = [
                    torch.cat([x[:2] - x[2:] / 2, x[:2] + x[2:] / 2]) for x in (boxes[image, query], target.boxes[g])
                ]
                assert queries.name == "atss" or iou(*corners) >= 0.49
            empty = ~queries.counted[image]
            assert not content[image, empty].any() and (boxes[image, empty] == 0.5).all()


def test_customised_queries_embed_their_box(make_tokens: Callable) -> None:
    """Sine of cx, cy, w, h with temperature 10000, linear layer, norm: `get_proposal_pos_embed` and `aux_pos_trans`."""
    tokens = make_tokens([torch.randn(1, DIM, side, side) for side in (12, 6, 3)])
    module = heads()
    queries = module(tokens, [Targets(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.3]]))]).customised[1]
    for slot in range(9):
        waves = []
        for value in queries.queries.reference[0, slot].tolist():
            for i in range(DIM // 4):
                angle = value * 2 * math.pi / 10000 ** (2 * i / (DIM // 2))
                waves += [math.sin(angle), math.cos(angle)]
        expected = module.embed["atss"](torch.tensor(waves))
        torch.testing.assert_close(queries.queries.content[0, slot], expected, atol=1e-5, rtol=1e-4)


def test_customised_queries_can_be_switched_off(make_tokens: Callable) -> None:
    tokens = make_tokens([torch.randn(1, DIM, side, side) for side in (12, 6, 3)])
    module = heads(queries=0)
    found = module(tokens, [Targets(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.4, 0.3]]))])
    assert found.customised == [] and not len(module.embed)
    assert set(found.losses) == {
        "rpn/class",
        "rpn/l1",
        "rcnn/class",
        "rcnn/giou",
        "atss/class",
        "atss/giou",
        "atss/centerness",
    }


def test_their_loss_is_quality_focal_over_positives_and_background(make_targets: Callable) -> None:
    model = tiny()
    targets = make_targets(3, 1)
    output = model(torch.randn(2, 3, 96, 128), None, targets)
    assert output.auxiliary is not None and len(output.customised) == 2
    report = build_criterion(LossConfig(classification="quality_focal", customised_weight=0.5, auxiliary_weight=3.0))(
        output, targets, share=0.25
    )
    for name, value in output.auxiliary.losses.items():
        assert report.terms[name].item() == pytest.approx(3.0 * 3 * 0.25 * float(value.detach()), rel=1e-5)
    for queries, predicted in zip(output.auxiliary.customised, output.customised, strict=True):
        assert predicted.logits.shape[0] == 3
        sums = {"class": 0.0, "l1": 0.0, "giou": 0.0}
        for image, pairs in enumerate(queries.pairs):
            goal = torch.zeros_like(predicted.logits[-1, image])
            for q, g in zip(pairs.query_indices.tolist(), pairs.target_indices.tolist(), strict=True):
                box, truth = predicted.boxes[-1, image, q].detach(), targets[image].boxes[g]
                corners = [torch.cat([x[:2] - x[2:] / 2, x[:2] + x[2:] / 2]) for x in (box, truth)]
                goal[q, targets[image].labels[g]] = iou(*corners)
                sums["l1"] += 5 * float((box - truth).abs().sum())
                sums["giou"] += 2 * giou_loss(*corners)
            logits = predicted.logits[-1, image]
            cross = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
            losses = (goal - logits.sigmoid()) ** 2 * cross
            sums["class"] += float(losses[queries.counted[image]].sum())
        positives = sum(map(len, queries.pairs))
        assert positives > 0
        for kind, value in sums.items():
            term = report.terms[f"customised_{queries.name}3/{kind}"].item()
            assert term == pytest.approx(0.5 * 0.25 * value / positives, rel=1e-3, abs=1e-6), (queries.name, kind)


# The whole


def tiny(name: str = "co_dino_r50", **changes: Any) -> Detector:
    torch.manual_seed(0)
    options: dict[str, Any] = dict(num_classes=5, backbone="test_resnet", dim=32, num_heads=4, ffn_dim=64)
    options |= dict(encoder_layers=1, decoder_layers=3, num_queries=20, denoising_queries=6)
    return create_model(name, **options | changes).train()


def test_nothing_of_them_at_inference(make_targets: Callable) -> None:
    """The same weights without the heads give the same, and a model with them computes no more."""
    model, plain = tiny().eval(), tiny("dino_5scale_r50").eval()
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith("auxiliary.")}
    plain.load_state_dict(kept)  # strictly: nothing else is missing or too much
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        found, expected = model(images, None, make_targets(2, 1)), plain(images)
    assert torch.equal(found.layers.boxes, expected.layers.boxes) and torch.equal(
        found.pred_logits, expected.pred_logits
    )
    assert found.auxiliary is None and found.customised == ()
    costs = [model_cost(name, height=64, width=64) for name in ("co_dino_nano", "dino_nano")]
    assert costs[0].flops == costs[1].flops and costs[0].parameters > costs[1].parameters


def test_padding_is_neither_positive_nor_background(make_tokens: Callable, make_targets: Callable) -> None:
    """Anchors and proposals stay the same whatever lies beyond the image. What is read at them does not quite: beyond a map
    RoIAlign repeats the last cell, and beyond the image it finds zeros."""
    torch.manual_seed(0)
    levels = [torch.randn(2, DIM, side, side) for side in (12, 6, 3)]
    module = heads(names=("faster_rcnn",)).eval()
    rcnn = module.heads["faster_rcnn"]
    assert isinstance(rcnn, FasterRcnn)
    rcnn.rpn.fg_bg_sampler.batch_size_per_image = rcnn.sampler.batch_size_per_image = 10**6
    targets = make_targets(2, 1, num_classes=CLASSES)
    # The further level is normed over all of its cells, and the network in front of the proposals sees one cell around.
    module.downsample = torch.nn.Sequential(torch.nn.Conv2d(DIM, DIM, 1, stride=2))
    found = [module(make_tokens(levels, padding), targets).losses for padding in (0, 2)]
    for name, value in found[0].items():
        assert found[1][name].item() == pytest.approx(value.item(), rel=1e-2 if "rcnn" in name else 1e-5), name


@pytest.mark.parametrize("name", ["co_dino_nano", "paq_co_dino_nano"])
def test_more_boxes_than_queries(name: str, make_targets: Callable) -> None:
    model = create_model(name, num_classes=5, num_queries=30, customised_queries=10, backbone="test_resnet").train()
    targets = make_targets(40, 0)
    output = model(torch.randn(2, 3, 96, 96), None, targets)
    report = build_criterion(LossConfig())(output, targets)
    assert torch.isfinite(report.total) and all(predicted.boxes.shape[2] == 10 for predicted in output.customised)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_wrong_label_is_left_to_the_matching_to_name(label: int) -> None:
    model = create_model("co_dino_nano", num_classes=3, image_size=64, backbone="test_resnet", decoder_layers=2).train()
    targets = [Targets(torch.tensor([label]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]))]
    output = model(torch.rand(1, 3, 64, 64), None, targets)
    with pytest.raises(ValueError, match=rf"labels of batch position 0 hold {label}"):
        build_criterion(LossConfig())(output, targets)


def test_half_precision_leaves_boxes_and_losses_in_float32(make_targets: Callable) -> None:
    model, targets = tiny(), make_targets(3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 3, 96, 128), None, targets)
    assert output.auxiliary is not None
    assert all(value.dtype == torch.float32 and value.isfinite() for value in output.auxiliary.losses.values())


# Other classes, and weights with or without the heads


def test_classes_go_over_by_name() -> None:
    model = tiny()
    other, report = reshape_classes(model, ["class 3", "forklift", "class 1"])
    assert report.known_classes == ("class 3", "class 1") and report.new_classes == ("forklift",)
    old, new = model.state_dict(), other.state_dict()
    rcnn, atss = "auxiliary.heads.faster_rcnn.", "auxiliary.heads.atss."
    for key in (f"{rcnn}class_head.weight", f"{rcnn}class_head.bias", f"{atss}class_head.weight"):
        assert torch.equal(new[key][[0, 2]], old[key][[3, 1]]) and len(new[key]) == 3
    for leaf in ("weight", "bias"):  # four rows a class
        rows, before = (x[f"{rcnn}box_head.{leaf}"] for x in (new, old))
        assert torch.equal(rows[:4], before[12:16]) and torch.equal(rows[8:], before[4:8]) and len(rows) == 12
        assert torch.equal(new[f"{rcnn}background_head.{leaf}"], old[f"{rcnn}background_head.{leaf}"])


def test_a_training_may_start_from_weights_without_them_and_with_them(tmp_path: Path) -> None:
    with_heads, without = tiny(), tiny("dino_5scale_r50")
    for name, model in (("with", with_heads), ("without", without)):
        with torch.no_grad():
            model.encoder.level_embed.fill_(7.0)
        model.save(str(tmp_path / f"{name}.safetensors"))
    fresh = tiny()
    start = {key: value.clone() for key, value in fresh.state_dict().items() if key.startswith("auxiliary.")}
    start_from(fresh, tmp_path / "without.safetensors")
    assert (fresh.encoder.level_embed == 7.0).all()
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in start.items())
    plain = tiny("dino_5scale_r50")
    start_from(plain, tmp_path / "with.safetensors")
    assert (plain.encoder.level_embed == 7.0).all()
