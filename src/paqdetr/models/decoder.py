"""The decoder: queries talk to each other, look at the memory around their boxes, and refine the boxes layer by layer.

Sources: Deformable DETR (arXiv 2010.04159) for the layers and iterative refinement, DAB-DETR (arXiv 2201.12329) for boxes as
positions, DINO (arXiv 2203.03605) for look-forward-twice.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paqdetr.models.attention import MLP, DeformableAttention, FeedForward
from paqdetr.models.encoder import Recomputing
from paqdetr.models.outputs import Decoded
from paqdetr.models.position import at_least_float32, inverse_sigmoid, sine_boxes
from paqdetr.models.queries import QueryGroup
from paqdetr.models.tokens import Tokens


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
        """x, position: (B, N, d); reference: (B, N, L, 4); attention_mask: (N, N) bool, True forbids. -> (B, N, d)"""
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
        padded_positions: embed boxes as they stand in the padded image, as published codes do; then padding changes the result.
    """

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
    ) -> None:
        super().__init__()
        self.dim = dim
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
        # The first layer does not scale, and weights that nothing reads would stop a distributed training.
        self.position_scale = MLP((dim, dim, dim)) if scale_positions and num_layers > 1 else None
        heads = 1 if share_heads else num_layers
        self.class_heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(MLP((dim, dim, dim, 4)) for _ in range(heads))

    def forward(self, queries: QueryGroup, memory: Tokens, attention_mask: Tensor | None = None) -> Decoded:
        """Refine boxes layer by layer.

        Args:
            queries: content (B, N, d), the boxes or points to start from, and their position embedding if it is fixed.
            memory: the encoder's tokens.
            attention_mask: (N, N) bool, True where attention is forbidden.
        """
        x, reference = queries.content, at_least_float32(queries.reference)
        previous = reference  # the same places, with the gradient of the layer that made them
        logits, boxes = [], []
        for i, layer in enumerate(self.layers):
            position = queries.position
            if position is None:
                position = self._embed(reference, x if i else None, memory)
            ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)  # (B, L, 2 or 4)
            places = reference[:, :, None] * ratios[:, None]  # (B, N, L, 2 or 4)
            x = self.run(layer, x, position, places, memory, attention_mask)
            state = self.norm(x)
            box_head = self.box_heads[i % len(self.box_heads)]
            offset = at_least_float32(box_head(state))  # (B, N, 4)
            logits.append(self.class_heads[i % len(self.class_heads)](state))
            boxes.append(self._shift(previous, offset))
            if self.box_refinement and i + 1 < len(self.layers):
                if self.refine_raw:
                    offset = at_least_float32(box_head(x))
                refined = self._shift(reference, offset)
                reference = refined.detach()
                previous = refined if self.look_forward_twice else reference
        return Decoded(torch.stack(logits), torch.stack(boxes))

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

    def _shift(self, reference: Tensor, offset: Tensor) -> Tensor:
        """Boxes (B, N, 4) from boxes or points and offsets (B, N, 4) in logits; a point says nothing of width and height."""
        known = inverse_sigmoid(reference, self.box_eps)
        return (offset + F.pad(known, (0, 4 - known.shape[-1]))).sigmoid()
