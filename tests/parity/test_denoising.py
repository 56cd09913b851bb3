"""Denoising queries as published.

Sources: `prepare_for_cdn` of IDEA-Research/DINO, models/dino/dn_components.py (read at 5d2b5bf, in a copy under dino/);
`prepare_for_dn` of IDEA-Research/DN-DETR, models/dn_dab_deformable_detr/dn_components.py 206fa26.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from paqdetr.models.denoising import ContrastiveDenoising, DenoisingQueries, PlainDenoising
from paqdetr.structures import Targets


def build(
    *, num_queries: int = 100, num_classes: int = 10, label_noise: float = 0.5, box_noise: float = 1.0
) -> ContrastiveDenoising:
    """Content is the one-hot label, so that tests can read it back."""
    denoising = ContrastiveDenoising(
        num_queries=num_queries, num_classes=num_classes, dim=num_classes, label_noise=label_noise, box_noise=box_noise
    )
    with torch.no_grad():
        denoising.label_embed.weight.copy_(torch.eye(num_classes))
    return denoising


def layout(groups: int, boxes: int) -> DenoisingQueries:
    count = groups * 2 * boxes
    return DenoisingQueries(torch.zeros(1, count, 1), torch.zeros(1, count, 4), groups, boxes)


def grid(x: Tensor, queries: DenoisingQueries) -> Tensor:
    """(B, N, ...) -> (B, groups, 2, boxes, ...): positives then negatives of every group."""
    return x.unflatten(1, (queries.groups, 2, queries.boxes))


@pytest.mark.parametrize(
    ("counts", "groups", "boxes"),
    [((3, 1), 33, 3), ((7,), 14, 7), ((1,), 100, 1), ((120, 4), 1, 120), ((0, 0), 1, 1), ((0, 2), 50, 2)],
)
def test_positive_queries_are_shared_out_over_groups(
    counts: tuple[int, ...], groups: int, boxes: int, make_targets: Callable
) -> None:
    queries = build()(make_targets(*counts))
    assert (queries.groups, queries.boxes) == (groups, boxes)
    assert len(queries) == groups * 2 * boxes
    assert queries.content.shape == (len(counts), len(queries), 10)
    assert queries.reference.shape == (len(counts), len(queries), 4)


@pytest.mark.parametrize("most", [1, 2, 7, 30, 99, 100, 101, 250])
@pytest.mark.parametrize("number", [50, 64, 100, 300, 10, 49])
def test_number_of_groups(number: int, most: int, make_targets: Callable) -> None:
    """DINO's `dn_number`: twice the number is shared out over the positives and negatives of the fullest image, and at least one
    group remains. Below 50 its code makes twice that many groups whatever the boxes; ours goes on sharing out (docs/hosts.md).
    """
    groups = build(num_queries=number)(make_targets(most, 1)).groups
    doubled = number * 2
    if doubled >= 100:
        assert groups == max(doubled // (most * 2), 1)
    else:
        assert groups == max(number // most, 1) <= doubled


def test_positives_by_hand() -> None:
    # Two groups with three slots of a kind: 0-2 positive, 3-5 negative, 6-8 positive, 9-11 negative.
    query, target = layout(2, 3).positives(2)
    assert query.tolist() == [0, 1, 6, 7]
    assert target.tolist() == [0, 1, 0, 1]
    assert [x.tolist() for x in layout(2, 3).positives(0)] == [[], []]


def test_attention_mask_by_hand() -> None:
    mask = layout(2, 1).attention_mask(2, torch.device("cpu"))
    rows = [
        "..xx..",  # group 1 sees itself and the matching queries
        "..xx..",
        "xx....",
        "xx....",
        "xxxx..",  # matching queries see each other alone
        "xxxx..",
    ]
    assert mask.tolist() == [[cell == "x" for cell in row] for row in rows]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_attention_mask_by_its_rule(groups: int, boxes: int, matching: int) -> None:
    queries = layout(groups, boxes)
    mask = queries.attention_mask(matching, torch.device("cpu"))
    size = 2 * boxes
    for row in range(len(queries) + matching):
        for column in range(len(queries) + matching):
            copy = column < len(queries)
            same_group = row < len(queries) and row // size == column // size
            assert bool(mask[row, column]) == (copy and not same_group)


@torch.no_grad()
def test_without_noise_the_copies_are_the_truth(make_targets: Callable) -> None:
    targets = make_targets(2, 3, num_classes=10)
    queries = build(num_queries=12, label_noise=0.0, box_noise=0.0)(targets)
    boxes, content = grid(queries.reference, queries), grid(queries.content, queries)
    for i, target in enumerate(targets):
        count = len(target)
        expected = target.boxes.expand(4, 2, count, 4)
        assert (boxes[i, :, :, :count] - expected).abs().max() < 1e-6
        assert (content[i, :, :, :count].argmax(-1) == target.labels).all()
        # Slots of boxes that the image does not have.
        assert not content[i, :, :, count:].any()
        assert (boxes[i, :, :, count:] == 0.5).all()


@torch.no_grad()
@pytest.mark.parametrize("box_noise", [1.0, 0.4])
def test_positives_move_less_than_negatives(box_noise: float) -> None:
    # Small boxes in the middle: nothing is cut off at the image's border.
    truth = torch.tensor([[0.5, 0.5, 0.1, 0.04], [0.4, 0.6, 0.02, 0.1]])
    queries = build(num_queries=4000, box_noise=box_noise)([Targets(torch.tensor([1, 2]), truth)])
    moved = grid(queries.reference, queries)[0]
    assert (moved[..., 2:] >= 0).all()
    half = (truth[:, 2:] / 2).repeat(1, 2)
    old = box_convert(truth, "cxcywh", "xyxy")
    near = (box_convert(moved[:, 0], "cxcywh", "xyxy") - old).abs() / half / box_noise
    assert near.max() < 1 + 1e-4
    assert near.max() > 0.99 and near.min() < 0.01
    assert near.mean() == pytest.approx(0.5, abs=0.01)
    # A negative's centre and sides are those of its two moved corners, unless a side collapsed.
    far = moved[:, 1]
    whole = far[..., 2:].min(-1).values > 2e-3
    corners = (box_convert(far, "cxcywh", "xyxy") - old).abs() / half / box_noise
    assert corners[whole].min() > 1 - 1e-4 and corners[whole].max() < 2 + 1e-4
    assert (whole.float().mean() == 1) == (box_noise < 0.5)  # corners meet from twice half a side on


@torch.no_grad()
def test_negatives_are_not_laid_over_their_own_object() -> None:
    """DINO's code at box noise 1: where both corners of an axis move inwards (1 in 4), that side collapses; sorted corners would
    reach an IoU of 0.9 with the object."""
    truth = torch.tensor([[0.5, 0.5, 0.1, 0.04], [0.4, 0.6, 0.02, 0.1]])
    queries = build(num_queries=100_000)([Targets(torch.tensor([1, 2]), truth)])
    negatives = grid(queries.reference, queries)[0, :, 1]  # (groups, boxes, 4)
    assert negatives.shape[0] * negatives.shape[1] == 100_000
    for boxes, own in zip(negatives.unbind(1), truth, strict=True):
        iou = box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(own[None], "cxcywh", "xyxy"))
        assert 0.2 < iou.max() <= 0.25
        assert iou.mean() == pytest.approx(0.04, abs=0.005)
        collapsed = (boxes[:, 2:] <= 1e-3).any(-1).float().mean()
        assert collapsed == pytest.approx(1 - 0.75**2, abs=0.01)


@torch.no_grad()
def test_each_corner_moves_either_way_as_often() -> None:
    truth = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    queries = build(num_queries=4000)([Targets(torch.tensor([0]), truth)])
    near = box_convert(grid(queries.reference, queries)[0, :, 0, 0], "cxcywh", "xyxy")
    outward = (near > box_convert(truth, "cxcywh", "xyxy")).float().mean(0)
    assert (outward - 0.5).abs().max() < 0.03


@torch.no_grad()
def test_boxes_stay_in_the_image() -> None:
    truth = torch.tensor([[0.05, 0.95, 0.1, 0.1], [0.5, 0.5, 1.0, 1.0]])
    queries = build(num_queries=2000)([Targets(torch.tensor([0, 1]), truth)])
    # Centre and sides are held in [0.001, 0.999], as in the published codes.
    assert queries.reference.min() > 0.00099 and queries.reference.max() < 0.99901
    corners = box_convert(queries.reference, "cxcywh", "xyxy")
    assert corners.min() >= -1e-3 and corners.max() <= 1 + 1e-3


@torch.no_grad()
def test_share_of_flipped_labels() -> None:
    # Half of the noise is drawn anew, and one in ten draws hits the old label: 0.25 * 0.9.
    targets = [Targets(torch.randint(10, (20,)), torch.full((20, 4), 0.2)) for _ in range(4)]
    queries = build(num_queries=4000)(targets)
    labels = grid(queries.content, queries).argmax(-1)  # (B, groups, 2, boxes)
    truth = torch.stack([target.labels for target in targets])[:, None, None]
    flipped = (labels != truth).float()
    assert flipped.mean() == pytest.approx(0.225, abs=0.01)
    assert flipped[:, :, 0].mean() == pytest.approx(float(flipped[:, :, 1].mean()), abs=0.02)


def test_gradient_reaches_the_embedding_without_a_single_box(make_targets: Callable) -> None:
    denoising = build()
    queries = denoising(make_targets(0, 0))
    assert not queries.content.any() and (queries.reference == 0.5).all()
    queries.content.sum().backward()
    assert denoising.label_embed.weight.grad is not None
    assert not denoising.label_embed.weight.grad.any()


def test_only_embeddings_of_labels_in_use_get_a_gradient(make_targets: Callable) -> None:
    denoising = build(label_noise=0.0)
    target = Targets(torch.tensor([3, 7]), torch.full((2, 4), 0.3))
    denoising([target]).content.sum().backward()
    grad = denoising.label_embed.weight.grad
    assert grad is not None and grad.abs().sum(1).nonzero().flatten().tolist() == [3, 7]


# --- both kinds against the papers' words, one slot after the other in float64, with the very same random draws


def slow_slots(targets: list[Targets], copies: int) -> list[list[tuple[int, list[float]] | None]]:
    """Per image: (label, box) of every slot, None where the image has no such box; `copies` rounds over the boxes."""
    most = max(len(target) for target in targets)
    images = []
    for target in targets:
        row = [(int(target.labels[j]), target.boxes[j].tolist()) if j < len(target) else None for j in range(most)]
        images.append(row * copies)
    return images


def held(value: float) -> float:
    """Through the logit of the published codes and back: `log(max(x, eps) / max(1 - x, eps))`, then the sigmoid."""
    odds = max(value, 1e-3) / max(1 - value, 1e-3)
    return odds / (1 + odds)


@torch.no_grad()
def test_contrastive_copies_equal_a_plain_loop(make_targets: Callable) -> None:
    targets = [Targets(t.labels, t.boxes.double()) for t in make_targets(3, 1, num_classes=10)]
    denoising = build(num_queries=7, label_noise=0.6, box_noise=0.8).double()
    torch.manual_seed(5)
    queries = denoising(targets)
    slots = slow_slots(targets, 2 * 2)  # 7 // 3 groups of positives and negatives
    count = len(slots[0])
    torch.manual_seed(5)
    flip, label = torch.rand(2, count), torch.randint(10, (2, count))
    amount, sign = torch.rand(2, count, 4, dtype=torch.float64), torch.randint(2, (2, count, 4)).double()
    for i, row in enumerate(slots):
        for n, slot in enumerate(row):
            if slot is None:
                assert queries.reference[i, n].tolist() == [0.5] * 4 and not queries.content[i, n].any()
                continue
            name, (cx, cy, w, h) = slot
            if flip[i, n] < 0.6 / 2:
                name = int(label[i, n])
            assert queries.content[i, n].argmax() == name and queries.content[i, n].sum() == 1
            corners = []
            for k, (value, half) in enumerate(
                [(cx - w / 2, w / 2), (cy - h / 2, h / 2), (cx + w / 2, w / 2), (cy + h / 2, h / 2)]
            ):
                reach = float(amount[i, n, k]) + (n // 3 % 2)  # a second round of three slots is negative
                direction = 2 * float(sign[i, n, k]) - 1
                corners.append(min(max(value + direction * reach * half * 0.8, 0.0), 1.0))
            x0, y0, x1, y1 = corners
            box = [(x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, 0.0), max(y1 - y0, 0.0)]
            expected = [held(value) for value in box]
            assert queries.reference[i, n].tolist() == pytest.approx(expected, abs=1e-10)


@torch.no_grad()
def test_plain_copies_equal_a_plain_loop(make_targets: Callable) -> None:
    targets = [Targets(t.labels, t.boxes.double()) for t in make_targets(3, 1, num_classes=10)]
    denoising = PlainDenoising(groups=5, num_classes=10, dim=11, label_noise=0.3, box_noise=0.4).double()
    denoising.label_embed.weight.copy_(torch.eye(10))
    torch.manual_seed(6)
    queries = denoising(targets)
    assert (queries.groups, queries.boxes, queries.kinds, len(queries)) == (5, 3, 1, 15)
    slots = slow_slots(targets, 5)
    torch.manual_seed(6)
    flip, label = torch.rand(2, 15), torch.randint(10, (2, 15))
    amount = torch.rand(2, 15, 4, dtype=torch.float64)
    for i, row in enumerate(slots):
        for n, slot in enumerate(row):
            if slot is None:
                assert queries.reference[i, n].tolist() == [0.5] * 4 and not queries.content[i, n].any()
                continue
            name, (cx, cy, w, h) = slot
            if flip[i, n] < 0.3:
                name = int(label[i, n])
            # The label, then the indicator: this is a copy.
            assert queries.content[i, n].tolist() == [float(k == name) for k in range(10)] + [1.0]
            expected = [
                held(min(max(value + (2 * float(amount[i, n, k]) - 1) * reach * 0.4, 0.0), 1.0))
                for k, (value, reach) in enumerate([(cx, w / 2), (cy, h / 2), (w, w), (h, h)])
            ]
            assert queries.reference[i, n].tolist() == pytest.approx(expected, abs=1e-10)


def test_plain_positives_and_mask_by_hand() -> None:
    # Two groups of two slots, no negatives.
    queries = DenoisingQueries(torch.zeros(1, 4, 1), torch.zeros(1, 4, 4), groups=2, boxes=2, kinds=1)
    query, target = queries.positives(1)
    assert (query.tolist(), target.tolist()) == ([0, 2], [0, 0])
    rows = ["..xx.", "..xx.", "xx...", "xx...", "xxxx."]
    mask = queries.attention_mask(1, torch.device("cpu"))
    assert mask.tolist() == [[cell == "x" for cell in row] for row in rows]


def test_plain_denoising_without_a_single_box(make_targets: Callable) -> None:
    denoising = PlainDenoising(groups=5, num_classes=10, dim=8)
    queries = denoising(make_targets(0, 0))
    assert len(queries) == 5 and not queries.content.any() and (queries.reference == 0.5).all()
    queries.content.sum().backward()
    assert denoising.label_embed.weight.grad is not None
