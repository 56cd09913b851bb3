"""Where queries begin: at proposals of the encoder (two-stage), at learned boxes, or at learned points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from paqdetr.models.encoder import MLP
from paqdetr.models.tokens import Tokens, at_least_float32, inverse_sigmoid, sine_proposals
from paqdetr.ops import ms_deform_attn


@dataclass(frozen=True, slots=True)
class AllTokens:
    """Predictions of every token, for a loss over all of them.

    Attributes:
        logits: (B, S, 1).
        boxes: (B, S, 4) cxcywh in [0, 1].
        valid: (B, S) bool; False at padding and where the anchor would leave the image.
    """

    logits: Tensor
    boxes: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class Proposals:
    """The n best tokens of every image, best first.

    Attributes:
        logits: (B, n, C), or (B, n, 1) if class-agnostic.
        boxes: (B, n, 4) cxcywh in [0, 1], with gradient for the encoder's loss.
        indices: (B, n) int64, which token each came from.
        tokens: (B, n, d) what class and box were read off: the tokens at `indices`, projected and normed.
        all_tokens: all tokens, where the loss wants them (class-agnostic proposals in training); else None.
    """

    logits: Tensor
    boxes: Tensor
    indices: Tensor
    tokens: Tensor
    all_tokens: AllTokens | None = None

    def part(self, first: int, end: int | None) -> Proposals:
        """Those of the ranks first..end - 1."""
        rows = slice(first, end)
        return Proposals(
            self.logits[:, rows], self.boxes[:, rows], self.indices[:, rows], self.tokens[:, rows], self.all_tokens
        )


class ProposalHead(nn.Module):
    """Scores every token and regresses a box from an anchor at its place.

    Args:
        class_agnostic: one logit, "an object" (Deformable DETR); otherwise one for each class, and tokens are ranked by
            the likeliest.
        distinct: a proposal that overlaps a better one by more than this IoU is chosen only after all others; None: as ranked.
        hybrid: a second pair of heads for the proposals of hybrid queries, which exist in training alone.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_classes: int,
        class_agnostic: bool = False,
        distinct: float | None = None,
        hybrid: bool = False,
    ) -> None:
        super().__init__()
        self.distinct = distinct
        self.for_graph = False  # as of `distinct`
        self.class_agnostic = class_agnostic
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, 1 if class_agnostic else num_classes)
        self.box_head = MLP((dim, dim, dim, 4))
        self.hybrid_class_head = nn.Linear(dim, num_classes) if hybrid else None
        self.hybrid_box_head = MLP((dim, dim, dim, 4)) if hybrid else None

    def forward(self, memory: Tokens, count: int, extra: int = 0) -> Proposals:
        """Tokens -> the `count` best proposals of each image, and behind them `extra` more for hybrid queries: those that follow,
        or, with heads of their own, the best by these."""
        if self.hybrid_class_head is None:
            count, extra = count + extra, 0
        anchors = _anchors(memory)  # (B, S, 4)
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1)  # (B, S)
        valid = usable if memory.padding_mask is None else usable & ~memory.padding_mask
        x = self.norm(self.project(memory.values.masked_fill(~valid[..., None], 0.0)))
        logits = self.class_head(x)  # (B, S, C or 1)

        def regress(tokens: Tensor, starts: Tensor) -> Tensor:
            return (at_least_float32(self.box_head(tokens)) + inverse_sigmoid(starts)).sigmoid()

        @torch.no_grad()
        def boxes_of(chosen: Tensor) -> Tensor:
            return regress(_pick(x, chosen), _pick(anchors, chosen))

        scores = logits.detach().amax(-1)  # (B, S)
        if self.distinct is None:
            indices = _best_tokens(scores, valid, count)  # (B, n)
        else:
            indices = _distinct_tokens(scores, valid, count, boxes_of, self.distinct, self.for_graph)

        chosen = _pick(x, indices)  # (B, n, d)
        if self.class_agnostic and self.training:  # its loss is over all tokens
            boxes = regress(x, anchors)
            all_tokens = AllTokens(logits=logits, boxes=boxes, valid=valid)
            return Proposals(_pick(logits, indices), _pick(boxes, indices), indices, chosen, all_tokens)
        # Boxes are regressed for the selected tokens alone: the rest would be thrown away.
        boxes, logits = regress(chosen, _pick(anchors, indices)), _pick(logits, indices)
        if extra and self.hybrid_class_head is not None and self.hybrid_box_head is not None:
            hybrid_logits = self.hybrid_class_head(x)
            others = _best_tokens(hybrid_logits.detach().amax(-1), valid, extra)  # (B, extra)
            tokens, starts = _pick(x, others), inverse_sigmoid(_pick(anchors, others))
            boxes = torch.cat([boxes, (at_least_float32(self.hybrid_box_head(tokens)) + starts).sigmoid()], dim=1)
            logits = torch.cat([logits, _pick(hybrid_logits, others)], dim=1)
            indices, chosen = torch.cat([indices, others], dim=1), torch.cat([chosen, tokens], dim=1)
        return Proposals(logits=logits, boxes=boxes, indices=indices, tokens=chosen)


def _anchors(memory: Tokens) -> Tensor:
    """A square on every token, 5 % of the image on the finest level, doubling with each: (B, S, 4) cxcywh."""
    side = 0.05 * 2.0 ** memory.level_index.to(memory.centers.dtype)  # (S,)
    sides = side[None, :, None].expand(memory.centers.shape[0], -1, 2)
    return torch.cat([memory.centers, sides], dim=-1)


def _best_tokens(scores: Tensor, valid: Tensor, count: int) -> Tensor:
    """Indices of the `count` best valid tokens of each image, (B, S) -> (B, count).

    An image with fewer valid tokens than queries repeats its ranking, so that the result never depends on padding.
    """
    order = scores.masked_fill(~valid, -torch.inf).topk(min(count, scores.shape[1]), dim=1).indices
    return _repeated(order, valid, count)


def _repeated(order: Tensor, valid: Tensor, count: int) -> Tensor:
    """The first `count` of a ranking (B, M), which starts anew where an image has no more valid tokens."""
    available = valid.sum(1, keepdim=True).clamp(1, order.shape[1])
    ranks = torch.arange(count, device=order.device)[None] % available  # (B, count)
    return order.gather(1, ranks)


def _distinct_tokens(
    scores: Tensor,
    valid: Tensor,
    count: int,
    boxes_of: Callable[[Tensor], Tensor],
    threshold: float,
    for_graph: bool = False,
) -> Tensor:
    """As `_best_tokens`, but tokens whose box overlaps that of a better one by more than `threshold` come after all others.

    Which tokens survive non-maximum suppression depends on better ones alone. So only as many of the best are looked at as are
    needed for `count` survivors, and the result is that of suppression among all tokens. A graph has no such loop: it looks at
    the best 4 * `count` tokens, and where too few of them survive, suppressed ones fill up.
    """
    ranked = scores.masked_fill(~valid, -torch.inf)
    available = valid.sum(1)  # (B,)
    looked_at = min((4 if for_graph else 2) * count, scores.shape[1])
    while True:
        order = ranked.topk(looked_at, dim=1).indices  # (B, M)
        ranks = torch.arange(looked_at, device=scores.device)
        usable = ranks < available[:, None]  # (B, M)
        kept = distinct(boxes_of(order), -ranks.expand_as(order), usable, threshold, for_graph)
        ended = for_graph or looked_at == scores.shape[1]
        if ended or bool(((kept.sum(1) >= count) | (available <= looked_at)).all()):
            last = 2 - usable.int() - kept.int()  # 0 survives, 1 is suppressed, 2 is no valid token
            places = (last * looked_at + ranks).argsort(dim=1)  # not a stable sort, which ONNX does not have
            return _repeated(order.gather(1, places), valid, count)
        looked_at = min(2 * looked_at, scores.shape[1])


@torch.no_grad()
def distinct(boxes: Tensor, scores: Tensor, among: Tensor, threshold: float, for_graph: bool = False) -> Tensor:
    """Class-agnostic non-maximum suppression.

    Args:
        boxes: (B, n, 4) cxcywh.
        scores: (B, n), of any type.
        among: (B, n) bool, which take part.
        threshold: a box that overlaps a better one that stays by more than this IoU goes.
        for_graph: without a loop over the images, whose number may be unknown where a graph is recorded.

    Returns:
        (B, n) bool, which stay. It is computed image by image: what an image is batched with does not matter.
    """
    corners = box_convert(boxes, "cxcywh", "xyxy")
    if for_graph:  # images are put side by side, boxes that take no part last of all
        apart = corners + 2.0 * torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None, None]
        order = scores.to(boxes.dtype).masked_fill(~among, -torch.inf)
        kept = torch.zeros_like(among).flatten()
        kept[nms(apart.flatten(0, 1), order.flatten(), threshold)] = True
        return kept.view_as(among) & among
    kept = torch.zeros_like(among)
    for image, taking_part in enumerate(among):
        rows = taking_part.nonzero()[:, 0]
        kept[image, rows[nms(corners[image, rows], scores[image, rows].to(corners.dtype), threshold)]] = True
    return kept


def _pick(tokens: Tensor, indices: Tensor) -> Tensor:
    """(B, S, c) rows of the tokens (B, n) -> (B, n, c)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


@dataclass(frozen=True, slots=True)
class QueryInit:
    """What the decoder begins with, besides content.

    Attributes:
        reference: (B, n, 4) cxcywh or (B, n, 2) xy in [0, 1], of the image without its padding.
        position: (B, n, d), the position embedding of all decoder layers; None where each layer makes it from the boxes.
        content: (B, n, d) where the host computes it from the proposals; else None, and a query source makes it.
        proposals: what the encoder proposed; None in one-stage hosts.
    """

    reference: Tensor
    position: Tensor | None = None
    content: Tensor | None = None
    proposals: Proposals | None = None


class LearnedPoints(nn.Module):
    """Learned position embeddings, and a layer that reads a point off each (Deformable DETR, arXiv 2010.04159, section 4.1)."""

    def __init__(self, *, num_queries: int, dim: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(num_queries, dim))
        self.point_head = nn.Linear(dim, 2)

    def forward(self, memory: Tokens) -> QueryInit:
        """The same points for every image."""
        batch = memory.values.shape[0]
        points = self.point_head(self.position).sigmoid()  # (n, 2)
        return QueryInit(reference=points.expand(batch, -1, -1), position=self.position.expand(batch, -1, -1))


class LearnedAnchors(nn.Module):
    """Learned boxes (DAB-DETR, arXiv 2201.12329, section 4.1)."""

    def __init__(self, *, num_queries: int) -> None:
        super().__init__()
        self.boxes = nn.Parameter(torch.randn(num_queries, 4))  # logits of cxcywh

    def forward(self, memory: Tokens) -> QueryInit:
        """The same boxes for every image."""
        return QueryInit(reference=self.boxes.sigmoid().expand(memory.values.shape[0], -1, -1))


class ProposalStart(nn.Module):
    """The encoder's best proposals, detached: the decoder's losses do not reach the encoder's head.

    Args:
        head: scores and regresses tokens.
        num_queries: how many proposals become queries.
        fixed_position: make the position embedding once, from the proposals (Deformable DETR); otherwise the decoder does.
        with_content: make content from the proposals as well (Deformable DETR without mixed query selection).
    """

    def __init__(
        self, *, head: ProposalHead, num_queries: int, dim: int, fixed_position: bool, with_content: bool
    ) -> None:
        super().__init__()
        self.head = head
        self.num_queries, self.dim = num_queries, dim
        self.with_content = with_content
        self.embed: nn.Sequential | None = None
        if fixed_position:
            width = 2 * dim if with_content else dim
            self.embed = nn.Sequential(nn.Linear(2 * dim, width), nn.LayerNorm(width))

    def forward(self, memory: Tokens, extra: int = 0) -> QueryInit:
        """Boxes of the best `num_queries` tokens, and behind them `extra` more for hybrid queries."""
        proposals = self.head(memory, self.num_queries, extra)
        reference = proposals.boxes.detach()
        if self.embed is None:
            return QueryInit(reference=reference, proposals=proposals)
        sine = sine_proposals(reference, self.dim // 2)  # (B, n, 2 d)
        embedded = self.embed(sine.to(memory.values.dtype))
        position, content = embedded.split(self.dim, dim=-1) if self.with_content else (embedded, None)
        return QueryInit(reference=reference, position=position, content=content, proposals=proposals)


Initializer = LearnedPoints | LearnedAnchors | ProposalStart


def query_features(start: QueryInit, memory: Tokens, *, num_heads: int, raw: bool = False) -> Tensor:
    """What each query looks at: the token of its proposal; in one-stage hosts the memory at its reference point.

    Args:
        start: of the queries.
        memory: the encoder's tokens. At a point each level is read bilinearly, zero at padding and beyond the map, and the levels
            are averaged.
        num_heads: parts of a token that are read one by one, as the attention kernels like it; the result is the same.
        raw: the tokens of proposals as the encoder gives them, not as their head projects them.

    Returns:
        (B, n, d). Its gradient reaches the tokens, not the points: positions stay the host's own.
    """
    if start.proposals is not None:
        return _pick(memory.values, start.proposals.indices) if raw else start.proposals.tokens
    value = memory.values
    if memory.padding_mask is not None:
        value = value.masked_fill(memory.padding_mask[..., None], 0.0)
    points = start.reference[..., :2].detach()  # (B, n, 2)
    places = points[:, :, None] * memory.valid_ratios[:, None]  # (B, n, L, 2)
    batch, queries, levels, _ = places.shape
    places = places[:, :, None, :, None].expand(-1, -1, num_heads, -1, -1, -1)  # (B, n, H, L, 1, 2)
    weights = places.new_full((batch, queries, num_heads, levels, 1), 1 / levels)
    return ms_deform_attn(value.unflatten(-1, (num_heads, -1)), memory.spatial_shapes, places, weights)
