"""The decoder: queries talk to each other, look at the memory around their boxes, and refine the boxes layer by layer.

Sources: Deformable DETR (arXiv 2010.04159) for the layers and iterative refinement, DAB-DETR (arXiv 2201.12329) for boxes as
positions, DINO (arXiv 2203.03605) for look-forward-twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paqdetr.models.attention import MLP, DeformableAttention, FeedForward
from paqdetr.models.position import inverse_sigmoid, sine_boxes
from paqdetr.models.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Decoded:
    """Predictions of all K layers, first to last.

    Attributes:
        logits: (K, B, N, C).
        boxes: (K, B, N, 4) cxcywh in [0, 1].
    """

    logits: Tensor
    boxes: Tensor


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


class Decoder(nn.Module):
    """Layers and the heads that read them.

    Args:
        look_forward_twice: a layer's box offsets are trained by the next layer's loss too.
        share_heads: one class head and one box head for all layers.
        class_bias: initial bias of the class heads.
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
        look_forward_twice: bool,
        share_heads: bool,
        class_bias: float,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.look_forward_twice = look_forward_twice
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
        self.norm = nn.LayerNorm(dim)
        self.position_head = MLP((2 * dim, dim, dim))
        heads = 1 if share_heads else num_layers
        self.class_heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(MLP((dim, dim, dim, 4)) for _ in range(heads))
        for class_head, box_head in zip(self.class_heads, self.box_heads, strict=True):
            nn.init.constant_(class_head.bias, class_bias)  # type: ignore[arg-type]
            nn.init.zeros_(box_head[-1].weight)  # type: ignore[index]
            nn.init.zeros_(box_head[-1].bias)  # type: ignore[index]

    def forward(
        self, content: Tensor, reference: Tensor, memory: Tokens, attention_mask: Tensor | None = None
    ) -> Decoded:
        """Refine boxes layer by layer.

        Args:
            content: (B, N, d).
            reference: (B, N, 4) cxcywh in [0, 1], the boxes to start from; no gradient flows into them.
            memory: the encoder's tokens.
            attention_mask: (N, N) bool, True where attention is forbidden.
        """
        ratios = torch.cat([memory.valid_ratios, memory.valid_ratios], dim=-1)  # (B, L, 4)
        x, reference = content, reference.detach().float()
        previous = reference  # the same boxes, with the gradient of the layer that made them
        logits, boxes = [], []
        for i, layer in enumerate(self.layers):
            # A quarter of the channels for each of cy, cx, w, h, twice over for sine and cosine.
            embedding = sine_boxes(reference, self.dim // 2)  # (B, N, 2 d)
            position = self.position_head(embedding.to(x.dtype))
            x = layer(x, position, reference[:, :, None] * ratios[:, None], memory, attention_mask)
            state = self.norm(x)
            offset = self.box_heads[i % len(self.box_heads)](state).float()
            logits.append(self.class_heads[i % len(self.class_heads)](state))
            boxes.append((offset + inverse_sigmoid(previous)).sigmoid())
            refined = (offset + inverse_sigmoid(reference)).sigmoid()
            reference = refined.detach()
            previous = refined if self.look_forward_twice else reference
        return Decoded(logits=torch.stack(logits), boxes=torch.stack(boxes))
