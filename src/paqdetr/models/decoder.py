"""The decoder: queries talk to each other, look at the memory around their boxes, and refine the boxes layer by layer.

Sources: Deformable DETR (arXiv 2010.04159) for the layers and iterative refinement, DAB-DETR (arXiv 2201.12329) for boxes as
positions, DINO (arXiv 2203.03605) for look-forward-twice, DDQ (arXiv 2303.12776) for the selection of distinct queries between
layers, Relation-DETR (arXiv 2407.11699) for attention by the relation of boxes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paqdetr.models.encoder import MLP, DeformableAttention, FeedForward, Recomputing
from paqdetr.models.outputs import Decoded
from paqdetr.models.proposals import distinct
from paqdetr.models.queries import QueryGroup
from paqdetr.models.tokens import Tokens, at_least_float32, inverse_sigmoid, sine_boxes, sine_proposals
from paqdetr.structures import BACKGROUND_LOGIT

_EPS = 1e-5
_WIDTH = 16  # channels of each of the four numbers that relate two boxes
_SCALE = 100.0


class PositionRelation(nn.Module):
    """From pairs of boxes to a number for each head of an attention, at least 0.

    Query i attends to query j with the bias ReLU(linear(sine(r_ij))), where r_ij = (log(|x_i - x_j| / w_i + 1),
    log(|y_i - y_j| / h_i + 1), log(w_i / w_j), log(h_i / h_j)). Its gradient reaches the linear layer, not the boxes.
    """

    def __init__(self, *, num_heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(4 * _WIDTH, num_heads)

    def forward(self, boxes: Tensor, others: Tensor) -> Tensor:
        """Boxes of the queries (B, N, 4), and of those they attend to (B, M, 4), cxcywh in [0, 1] -> (B, heads, N, M)."""
        with torch.no_grad():
            related = relate(at_least_float32(boxes), at_least_float32(others))
            embedded = sine_proposals(related * (_SCALE / (2 * math.pi)), _WIDTH)  # (B, N, M, 64)
        return self.project(embedded.to(self.project.weight.dtype)).relu().permute(0, 3, 1, 2)


def relate(boxes: Tensor, others: Tensor) -> Tensor:
    """r_ij of (B, N, 4) and (B, M, 4) boxes: (B, N, M, 4)."""
    center, size = boxes[:, :, None].split(2, dim=-1)  # (B, N, 1, 2)
    other_center, other_size = others[:, None].split(2, dim=-1)  # (B, 1, M, 2)
    distance = ((center - other_center).abs() / (size + _EPS) + 1).log()
    return torch.cat([distance, ((size + _EPS) / (other_size + _EPS)).log()], dim=-1)


class LayerHeads(nn.Module):
    """A class head and a box head for each of some decoder layers."""

    def __init__(self, *, num_layers: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.class_heads, self.box_heads = _heads(num_layers, dim, num_classes)


def _heads(count: int, dim: int, num_classes: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    return (
        nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(count)),
        nn.ModuleList(MLP((dim, dim, dim, 4)) for _ in range(count)),
    )


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward, norm after each."""

    def __init__(
        self, *, dim: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(
            dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.cross_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim=dim, hidden=ffn_dim, dropout=dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: Tokens, attention_mask: Tensor | None
    ) -> Tensor:
        """x, position: (B, N, d); reference: (B, N, L, 4); attention_mask: (N, N) or (B * heads, N, N), bool, of which True
        forbids, or added to the logits. -> (B, N, d)"""
        query = x + position
        attended, _ = self.self_attention(query, query, x, attn_mask=attention_mask, need_weights=False)
        x = self.self_norm(x + self.dropout(attended))
        attended = self.cross_attention(
            x + position, reference, memory.values, memory.spatial_shapes, memory.padding_mask
        )
        x = self.cross_norm(x + self.dropout(attended))
        return self.ffn(x)


class Decoder(Recomputing):
    """Layers and the heads that read them.

    Args:
        norm: a LayerNorm between a layer and its heads (DINO); Deformable DETR has none.
        share_heads: one class head and one box head for all layers.
        fixed_position: queries bring a position embedding; otherwise each layer makes it from their boxes.
        scale_positions: from layer 2 on, multiply that embedding by an MLP of the content (DAB-DETR, section 4.2).
        box_refinement: each layer starts from the last one's boxes; otherwise all from the first reference.
        look_forward_twice: a layer's box offsets are trained by the next layer's loss too (DINO, section 3.5).
        refine_from: "raw" computes the next layer's boxes from the output before the norm, as DINO's code does.
        box_eps: logits of boxes are taken of values at least this far from 0 and 1.
        report_eps: the same for the boxes that a layer reports, where it differs (mmdetection); None: `box_eps`.
        padded_positions: embed boxes as they stand in the padded image, as published codes do; then padding changes the result.
        distinct: after each layer, matching queries whose box overlaps a better one by more than this IoU leave; None: all stay.
            A query that has left still attends to those that stay, and these to it (DDQ's code), but it is neither matched nor
            detected.
        distinct_restart: in an image whose first query has not left, all take part again, as in DDQ's code.
        relation: from layer 2 on, bias self-attention by how the boxes of the last layer lie to those of the one before.

    Attributes:
        last_only: predictions of the last layer alone are returned, K = 1, so that an exported graph computes no others.
    """

    last_only: bool = False

    def __init__(
        self,
        *,
        num_layers: int,
        dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
        num_classes: int,
        norm: bool,
        share_heads: bool,
        fixed_position: bool,
        scale_positions: bool,
        box_refinement: bool,
        look_forward_twice: bool,
        refine_from: Literal["normed", "raw"],
        box_eps: float,
        padded_positions: bool,
        report_eps: float | None = None,
        distinct: float | None = None,
        distinct_restart: bool = False,
        relation: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.distinct, self.distinct_restart = distinct, distinct_restart
        self.for_graph = False  # as of `proposals.distinct`
        self.report_eps = report_eps or box_eps
        self.box_refinement, self.look_forward_twice = box_refinement, look_forward_twice
        self.refine_raw, self.box_eps, self.padded_positions = refine_from == "raw", box_eps, padded_positions
        self.layers = nn.ModuleList(
            DecoderLayer(
                dim=dim,
                num_heads=num_heads,
                num_levels=num_levels,
                num_points=num_points,
                ffn_dim=ffn_dim,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.position_head = None if fixed_position else MLP((2 * dim, dim, dim))
        # The first layer does neither, and weights that nothing reads would stop a distributed training.
        self.position_scale = MLP((dim, dim, dim)) if scale_positions and num_layers > 1 else None
        self.relation = PositionRelation(num_heads=num_heads) if relation and num_layers > 1 else None
        self.class_heads, self.box_heads = _heads(1 if share_heads else num_layers, dim, num_classes)

    def forward(
        self,
        queries: QueryGroup,
        memory: Tokens,
        attention_mask: Tensor | None = None,
        *,
        matching: slice | None = slice(0, None),
        heads: LayerHeads | None = None,
    ) -> Decoded:
        """Refine boxes layer by layer.

        Args:
            queries: content (B, N, d), the boxes or points to start from, and their position embedding if it is fixed.
            memory: the encoder's tokens.
            attention_mask: (N, N) bool, True where attention is forbidden.
            matching: which queries are matching ones; None: none, then there is neither selection nor relation.
            heads: in place of the decoder's own.
        """
        class_heads, box_heads = (heads or self).class_heads, (heads or self).box_heads
        x, reference = queries.content, at_least_float32(queries.reference)
        previous = reference  # the same places, with the gradient of the layer that made them
        logits, boxes = [], []
        forbidden, counted = attention_mask, [torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)]
        for i, layer in enumerate(self.layers):
            position = queries.position
            if position is None:
                position = self._embed(reference, x if i else None, memory)
            ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)  # (B, L, 2 or 4)
            places = reference[:, :, None] * ratios[:, None]  # (B, N, L, 2 or 4)
            x = self.run(layer, x, position, places, memory, forbidden)
            state = self.norm(x)
            class_head, box_head = class_heads[i % len(class_heads)], box_heads[i % len(box_heads)]
            offset = at_least_float32(box_head(state))  # (B, N, 4)
            logits.append(class_head(state))
            boxes.append(_shift(previous, offset, self.report_eps))
            if self.box_refinement and i + 1 < len(self.layers):
                if self.refine_raw:
                    offset = at_least_float32(box_head(x))
                refined = _shift(reference, offset, self.box_eps)
                reference = refined.detach()
                previous = refined if self.look_forward_twice else reference
                if matching is None:
                    continue
                kept, bias = None, None
                if self.distinct is not None:
                    scores = logits[i] if not self.refine_raw else class_head(x.detach())
                    kept, taking_part = self._select(reference, scores, counted[i], matching)
                    counted.append(taking_part)
                if self.relation is not None:
                    first = queries.reference if queries.reference.shape[-1] == 4 else boxes[0]
                    bias = self.run(self.relation, boxes[i - 1] if i else first, boxes[i])
                forbidden = self._mask(attention_mask, kept, bias)
        if self.last_only:
            logits, boxes, counted = logits[-1:], boxes[-1:], counted[-1:]
        if matching is None or self.distinct is None or not self.box_refinement:
            return Decoded(torch.stack(logits), torch.stack(boxes))
        taking_part = torch.stack(counted)  # (K, B, N)
        scores = torch.stack(logits).masked_fill(~taking_part[..., None], BACKGROUND_LOGIT)
        return Decoded(scores, torch.stack(boxes), taking_part)

    def _select(self, boxes: Tensor, logits: Tensor, counted: Tensor, matching: slice) -> tuple[Tensor, Tensor]:
        """Distinct ones among the matching queries that took part so far, and all other queries: which stay, and which take part
        in the next layer, (B, N) each. Boxes (B, N, 4), logits (B, N, C), counted (B, N)."""
        assert self.distinct is not None
        others = torch.ones_like(counted)
        others[:, matching] = False
        kept = distinct(boxes, logits.detach().amax(-1), counted & ~others, self.distinct, self.for_graph) | others
        return kept, kept | kept[:, matching.start, None] if self.distinct_restart else kept

    def _mask(self, forbidden: Tensor | None, kept: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """Of the next self-attention: `forbidden` (N, N); where neither of two queries stays, `kept` (B, N); and what is added
        to the logits, `bias` (B, heads, N, N)."""
        if kept is not None:
            unseen = ~(kept[:, :, None] | kept[:, None])  # (B, N, N)
            forbidden = unseen if forbidden is None else forbidden | unseen
            if bias is None:
                return forbidden.repeat_interleave(self.num_heads, dim=0)
            forbidden = forbidden[:, None]
        if bias is None:
            return forbidden
        return (bias if forbidden is None else bias.masked_fill(forbidden, -torch.inf)).flatten(0, 1)

    def _embed(self, reference: Tensor, content: Tensor | None, memory: Tokens) -> Tensor:
        """Position embedding (B, N, d) of boxes (B, N, 4), scaled by the content if there is any and the host does that."""
        assert self.position_head is not None, "fixed positions come with the queries"
        if self.padded_positions:
            reference = reference * memory.valid_ratios[:, :1].repeat(1, 1, 2)
        # A quarter of the channels for each of cy, cx, w, h, twice over for sine and cosine.
        embedding = sine_boxes(reference, self.dim // 2).to(memory.values.dtype)  # (B, N, 2 d)
        position = self.position_head(embedding)
        if self.position_scale is not None and content is not None:
            position = position * self.position_scale(content)
        return position


def _shift(reference: Tensor, offset: Tensor, eps: float) -> Tensor:
    """Boxes (B, N, 4) from boxes or points and offsets (B, N, 4) in logits; a point says nothing of width and height."""
    known = inverse_sigmoid(reference, eps)
    return (offset + (known if known.shape[-1] == 4 else F.pad(known, (0, 2)))).sigmoid()
