"""Two classic detectors on the encoder's maps, each with its own one-to-many assignment and its losses: ATSS and Faster R-CNN.

Sources: ATSS (arXiv 1912.02424), Faster R-CNN (arXiv 1506.01497), and their use as auxiliary heads in Co-DETR (arXiv 2211.12860),
whose published code the constants are of. Boxes are xyxy in pixels of the image without its padding, whose sides are counted in
whole cells of the finest map. Only training has these heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import box_iou, generalized_box_iou_loss, roi_align
from torchvision.ops.poolers import LevelMapper

from paqdetr.models.encoder import MLP
from paqdetr.models.tokens import at_least_float32
from paqdetr.paq import focal_loss
from paqdetr.paq.extractor import norm_groups

# What `Matcher` says of a candidate that has no box: it is background, or overlaps one too much for that and is left out.
BACKGROUND, LEFT_OUT = Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS

# So many boxes at a time are compared with all anchors. There are 800,000 at 800 x 1333: all boxes of a crowd would take GiBs.
_BOXES_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Truth:
    """Boxes of one image.

    Attributes:
        labels: (G,) int64 in [0, C).
        boxes: (G, 4) xyxy in pixels.
        size: (height, width) in pixels.
    """

    labels: Tensor
    boxes: Tensor
    size: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Samples:
    """What a head learned from in one image.

    Attributes:
        boxes: (P, 4) xyxy in pixels: anchors or proposals.
        matched: (P,) int64: the box that each learned, `BACKGROUND` or `LEFT_OUT`.
    """

    boxes: Tensor
    matched: Tensor


@dataclass(frozen=True, slots=True)
class Maps:
    """The encoder's output as maps, and one more level.

    Attributes:
        features: per level (B, d, h, w), zero at padding.
        valid: per level (B, h, w) bool, False at padding.
        strides: pixels per cell, of each level.
    """

    features: list[Tensor]
    valid: list[Tensor]
    strides: tuple[int, ...]

    def anchors(self, generator: AnchorGenerator) -> tuple[list[Tensor], Tensor]:
        """Anchors of each level (h * w * A, 4), and which of all are at a valid cell, (B, anchors)."""
        first = self.features[0]
        generator.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)
        sizes = [list(x.shape[-2:]) for x in self.features]
        levels = generator.grid_anchors(sizes, [[stride, stride] for stride in self.strides])  # type: ignore[misc]
        counts = generator.num_anchors_per_location()
        valid = [x.flatten(1).repeat_interleave(n, dim=1) for x, n in zip(self.valid, counts, strict=True)]
        return levels, torch.cat(valid, dim=1)


def learned(samples: Sequence[Samples], truth: Sequence[Truth]) -> tuple[Tensor, Tensor]:
    """Label (P,) and box (P, 4) of all positives, image by image."""
    chosen = [one.matched[one.matched >= 0] for one in samples]
    labels = torch.cat([one.labels[index] for one, index in zip(truth, chosen, strict=True)])
    return labels, torch.cat([one.boxes[index] for one, index in zip(truth, chosen, strict=True)])


class AtssHead(nn.Module):
    """One anchor per cell, 8 cells wide; a box's positives are those of its nearest anchors that overlap it better than is usual.

    Args:
        levels: maps that it is applied to.
        strides: of these, in pixels.
    """

    def __init__(self, *, dim: int, num_classes: int, strides: Sequence[int], top_k: int = 9) -> None:
        super().__init__()
        self.top_k = top_k
        self.generator = AnchorGenerator(tuple((8 * stride,) for stride in strides), ((1.0,),) * len(strides))
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.classify, self.regress = (
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(norm_groups(dim), dim), nn.ReLU())
            for _ in range(2)
        )
        self.class_head = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.box_head = nn.Conv2d(dim, 4, 3, padding=1)
        self.centerness_head = nn.Conv2d(dim, 1, 3, padding=1)
        self.scales = nn.ParameterList(torch.ones(()) for _ in strides)

    def forward(self, maps: Maps, truth: Sequence[Truth]) -> tuple[dict[str, Tensor], list[Samples]]:
        """Losses by name, and what they were computed from in each image."""
        levels, valid = maps.anchors(self.generator)
        anchors = torch.cat(levels)
        logits, deltas, centerness = self._predict(maps.features)
        matched = torch.stack(
            [
                atss_matches(levels, valid[i], image.boxes, top_k=self.top_k).masked_fill(~valid[i], LEFT_OUT)
                for i, image in enumerate(truth)
            ]
        )  # (B, A)
        samples = [Samples(anchors, row) for row in matched]
        image, place = torch.where(matched >= 0)
        labels, boxes = learned(samples, truth)
        goal = torch.zeros_like(logits)
        goal[image, place, labels] = 1.0
        count = max(len(image), 1)
        by_class = focal_loss(logits, goal).masked_fill(~valid[..., None], 0.0).sum()
        chosen = anchors[place]
        target = _centerness(chosen, boxes)
        predicted = self.coder.decode_single(deltas[image, place], chosen)
        giou = generalized_box_iou_loss(predicted, boxes)
        centered = F.binary_cross_entropy_with_logits(centerness[image, place], target, reduction="sum")
        losses = {
            "atss/class": by_class / count,
            "atss/giou": 2.0 * (giou * target).sum() / target.sum().clamp(min=1.0),
            "atss/centerness": centered / count,
        }
        return losses, samples

    def _predict(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, A, C), box deltas (B, A, 4), logits of centerness (B, A)."""
        rows = []
        for x, scale in zip(features, self.scales, strict=True):
            inner = self.regress(x)
            parts = (self.class_head(self.classify(x)), self.box_head(inner) * scale, self.centerness_head(inner))
            rows.append([at_least_float32(part).flatten(2).transpose(1, 2) for part in parts])
        logits, deltas, centerness = (torch.cat(column, dim=1) for column in zip(*rows, strict=True))
        return logits, deltas, centerness[..., 0]


def atss_matches(levels: Sequence[Tensor], valid: Tensor, boxes: Tensor, *, top_k: int) -> Tensor:
    """ATSS, algorithm 1: which box each anchor learns.

    Candidates of a box are the `top_k` anchors of each level whose centres are nearest to its own. Positives are those whose IoU
    reaches the mean of all candidates plus their standard deviation, and whose centre is inside of the box. An anchor of several
    boxes learns the one that it overlaps most.

    Args:
        levels: anchors of each level, xyxy.
        valid: (A,) bool, anchors of all levels that may be chosen.
        boxes: (G, 4) xyxy.

    Returns:
        (A,) int64, `BACKGROUND` for those of no box.
    """
    anchors = torch.cat(list(levels))
    result = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    usable = valid.split([len(level) for level in levels])
    if not len(boxes) or not bool(valid.any()):
        return result
    iou = box_iou(boxes, anchors).nan_to_num(0.0)  # (G, A)
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    distance = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, center)
    candidates, start = [], 0
    for level in usable:
        inside = start + level.nonzero()[:, 0]
        nearest = distance[:, inside].topk(min(top_k, len(inside)), dim=1, largest=False).indices
        candidates.append(inside[nearest])
        start += len(level)
    rows = torch.cat(candidates, dim=1)  # (G, K)
    overlap = iou.gather(1, rows)
    spread = overlap.std(1) if rows.shape[1] > 1 else torch.zeros_like(overlap[:, 0])
    low, high = center[rows] - boxes[:, None, :2], boxes[:, None, 2:] - center[rows]
    inside = torch.cat([low, high], dim=-1).amin(-1) > 0.01
    positive = inside & (overlap >= (overlap.mean(1) + spread)[:, None])
    quality = torch.full_like(iou, -1.0).scatter(1, rows, torch.where(positive, overlap, -1.0))
    best, box = quality.max(dim=0)
    return torch.where(best >= 0, box, result)


class FasterRcnn(nn.Module):
    """A region proposal network, and two linear layers on what RoIAlign reads at its proposals.

    Args:
        strides: of the maps, in pixels; the proposals are read from all but the last.
        samples: proposals per image that the second stage learns from, a quarter of them positives at most. The first stage keeps
            eight times as many of each level before suppression and twice as many after it, 4000 and 1000 at most.
    """

    def __init__(self, *, dim: int, num_classes: int, strides: Sequence[int], samples: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        sizes = tuple(tuple(4 * stride * 2 ** (k / 3) for k in range(3)) for stride in strides)
        generator = AnchorGenerator(cast("tuple[tuple[int]]", sizes), ((0.5, 1.0, 2.0),) * len(strides))
        before, after = min(4000, 8 * samples), min(1000, 2 * samples)
        self.rpn = RegionProposalNetwork(
            generator,
            RPNHead(dim, generator.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": before, "testing": before},
            post_nms_top_n={"training": after, "testing": after},
            nms_thresh=0.7,
            score_thresh=1e-12,  # above that of anchors at padding
        )
        self.matcher = Matcher(0.5, 0.5)
        self.sampler = BalancedPositiveNegativeSampler(samples, 0.25)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.shared = MLP((dim * 49, 4 * dim, 4 * dim))
        self.class_head = nn.Linear(4 * dim, num_classes)
        self.background_head = nn.Linear(4 * dim, 1)
        self.box_head = nn.Linear(4 * dim, 4 * num_classes)

    def forward(self, maps: Maps, truth: Sequence[Truth]) -> tuple[dict[str, Tensor], list[Samples]]:
        """Losses by name, and the proposals that the second stage learned from in each image, positives first."""
        losses, proposals = self._propose(maps, truth)
        samples = []
        for found, image in zip(proposals, truth, strict=True):
            candidates = torch.cat([found, image.boxes])  # true boxes too, so that there are positives from the start
            matched = matches(self.matcher, image.boxes, candidates)
            rows = torch.cat(drawn(self.sampler, matched))
            samples.append(Samples(candidates[rows], matched[rows]))
        pooled = pool(maps, [image.boxes for image in samples])  # (R, d, 7, 7)
        x = self.shared(pooled.flatten(1)).relu()
        logits = at_least_float32(torch.cat([self.class_head(x), self.background_head(x)], dim=1))
        deltas = at_least_float32(self.box_head(x)).unflatten(1, (self.num_classes, 4))
        matched = torch.cat([image.matched for image in samples])
        rois = torch.cat([image.boxes for image in samples])
        place = (matched >= 0).nonzero()[:, 0]
        labels, boxes = learned(samples, truth)
        goal = torch.full_like(matched, self.num_classes)
        goal[place] = labels
        predicted = self.coder.decode_single(deltas[place, labels], rois[place])
        count = max(len(matched), 1)
        losses["rcnn/class"] = F.cross_entropy(logits, goal, reduction="sum") / count
        losses["rcnn/giou"] = 10.0 * generalized_box_iou_loss(predicted, boxes).sum() / count
        return losses, samples

    def _propose(self, maps: Maps, truth: Sequence[Truth]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses of the first stage, and the boxes it keeps of each image, best first."""
        levels, valid = maps.anchors(self.rpn.anchor_generator)
        anchors, batch = torch.cat(levels), len(truth)
        objectness, deltas = concat_box_prediction_layers(*self.rpn.head(maps.features))
        logits = at_least_float32(objectness).view(batch, -1)  # (B, A)
        deltas = at_least_float32(deltas).view(batch, -1, 4)
        with torch.no_grad():
            decoded = self.rpn.box_coder.decode(deltas.flatten(0, 1), [anchors] * batch).view(batch, -1, 4)
            scores = logits.masked_fill(~valid, -torch.inf).flatten()[:, None]
            shapes = cast("list[tuple[int, int]]", [image.size for image in truth])
            proposals, _ = self.rpn.filter_proposals(decoded, scores, shapes, [len(level) for level in levels])
        by_class, distance, count = logits.sum() * 0.0, deltas.sum() * 0.0, 0
        for i, image in enumerate(truth):
            inside = valid[i].nonzero()[:, 0]
            matched = torch.full((len(anchors),), LEFT_OUT, device=anchors.device)
            matched[inside] = matches(self.rpn.proposal_matcher, image.boxes, anchors[inside])
            positive, negative = drawn(self.rpn.fg_bg_sampler, matched)
            rows = torch.cat([positive, negative])
            goal = (torch.arange(len(rows), device=rows.device) < len(positive)).to(logits.dtype)
            by_class = by_class + F.binary_cross_entropy_with_logits(logits[i, rows], goal, reduction="sum")
            wanted = self.rpn.box_coder.encode_single(image.boxes[matched[positive]], anchors[positive])
            distance = distance + (deltas[i, positive] - wanted).abs().sum()
            count += len(rows)
        return {"rpn/class": by_class / max(count, 1), "rpn/l1": distance / max(count, 1)}, proposals


def matches(matcher: Matcher, boxes: Tensor, candidates: Tensor) -> Tensor:
    """(A,) int64, which of the boxes (G, 4) each candidate (A, 4) learns, `BACKGROUND` or `LEFT_OUT`.

    The rule of Co-DETR's code: the box of highest IoU, at `matcher.high_threshold` or more; below `low_threshold` background.
    With `allow_low_quality_matches` a box also gets the candidates that are its best, of `low_threshold` or more, whichever box
    these would learn by themselves; of several such boxes the last. torchvision's own rule keeps a candidate's box there, so that
    a box beside another may go without any.
    """
    best = candidates.new_zeros(len(candidates))
    found = torch.full((len(candidates),), BACKGROUND, device=candidates.device)
    by_box = torch.full_like(found, BACKGROUND)
    if not len(candidates):
        return found
    for first in range(0, len(boxes), _BOXES_AT_ONCE):
        iou = box_iou(boxes[first : first + _BOXES_AT_ONCE], candidates).nan_to_num(0.0)
        value, row = iou.max(0)
        found = torch.where(value > best, first + row, found)
        best = torch.maximum(best, value)
        if matcher.allow_low_quality_matches:
            own = iou.amax(1, keepdim=True)
            row, place = ((iou == own) & (own >= matcher.low_threshold)).nonzero().unbind(1)
            by_box.scatter_reduce_(0, place, first + row, "amax")
    kind = torch.where(best >= matcher.high_threshold, found, LEFT_OUT)
    kind = torch.where(best < matcher.low_threshold, BACKGROUND, kind)
    return torch.where(by_box >= 0, by_box, kind)


def drawn(sampler: BalancedPositiveNegativeSampler, matched: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the candidates to learn from: positives, and background."""
    kinds = torch.where(matched >= 0, 1, torch.where(matched == BACKGROUND, 0, -1))
    (positive,), (negative,) = sampler([kinds])
    return positive.nonzero()[:, 0], negative.nonzero()[:, 0]


def pool(maps: Maps, boxes: Sequence[Tensor]) -> Tensor:
    """RoIAlign, 7 x 7, each box on the level of its size, never on the last: (R, d, 7, 7), image by image."""
    features, strides = maps.features[:-1], maps.strides[:-1]
    rois = torch.cat([torch.cat([box.new_full((len(box), 1), i), box], dim=1) for i, box in enumerate(boxes)])  # (R, 5)
    # Boxes below 28 cells, four for each place that is read, are on the finest level; each further one doubles that.
    mapper = LevelMapper(0, len(strides) - 1, canonical_scale=14 * strides[0], canonical_level=0)
    level = mapper(list(boxes))
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], 7, 7)
    for i, (x, stride) in enumerate(zip(features, strides, strict=True)):
        rows = (level == i).nonzero()[:, 0]
        x = at_least_float32(x)
        read = roi_align(x, rois[rows].to(x.dtype), 7, spatial_scale=1 / stride, sampling_ratio=0, aligned=True)
        pooled = pooled.index_put((rows,), read.to(pooled.dtype))
    return pooled


def _centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """(P,) in [0, 1]: how far in the middle of its box the centre of an anchor is (FCOS, arXiv 1904.01355, equation 3)."""
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    low, high = center - boxes[:, :2], boxes[:, 2:] - center
    return (torch.minimum(low, high) / torch.maximum(low, high)).clamp(min=0).prod(1).sqrt()
