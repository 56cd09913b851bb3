"""Where queries begin: at proposals of the encoder, at learned boxes, or at learned points.

A host differs from another first of all in this. Each module here takes the encoder's memory and gives a `Start`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paqdetr.models.position import sine_proposals
from paqdetr.models.proposals import ProposalHead, Proposals
from paqdetr.models.tokens import Tokens
from paqdetr.ops import ms_deform_attn


@dataclass(frozen=True, slots=True)
class Start:
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

    def forward(self, memory: Tokens) -> Start:
        """The same points for every image."""
        batch = memory.values.shape[0]
        points = self.point_head(self.position).sigmoid()  # (n, 2)
        return Start(reference=points.expand(batch, -1, -1), position=self.position.expand(batch, -1, -1))


class LearnedAnchors(nn.Module):
    """Learned boxes (DAB-DETR, arXiv 2201.12329, section 4.1)."""

    def __init__(self, *, num_queries: int) -> None:
        super().__init__()
        self.boxes = nn.Parameter(torch.randn(num_queries, 4))  # logits of cxcywh

    def forward(self, memory: Tokens) -> Start:
        """The same boxes for every image."""
        return Start(reference=self.boxes.sigmoid().expand(memory.values.shape[0], -1, -1))


class ProposalStart(nn.Module):
    """The encoder's best proposals, detached: the decoder's losses do not reach the encoder's head.

    Args:
        head: scores and regresses tokens.
        num_queries: how many proposals become queries.
        fixed_position: make the position embedding once, from the proposals (Deformable DETR); otherwise the decoder does.
        with_content: make content from the proposals as well (Deformable DETR without mixed query selection).
    """

    def __init__(
        self,
        *,
        head: ProposalHead,
        num_queries: int,
        dim: int,
        fixed_position: bool,
        with_content: bool,
    ) -> None:
        super().__init__()
        self.head = head
        self.num_queries, self.dim = num_queries, dim
        self.with_content = with_content
        self.embed: nn.Sequential | None = None
        if fixed_position:
            width = 2 * dim if with_content else dim
            self.embed = nn.Sequential(nn.Linear(2 * dim, width), nn.LayerNorm(width))

    def forward(self, memory: Tokens, extra: int = 0) -> Start:
        """Boxes of the best `num_queries + extra` tokens."""
        proposals = self.head(memory, self.num_queries + extra)
        reference = proposals.boxes.detach()
        if self.embed is None:
            return Start(reference=reference, proposals=proposals)
        sine = sine_proposals(reference, self.dim // 2)  # (B, n, 2 d)
        embedded = self.embed(sine.to(memory.values.dtype))
        position, content = embedded.split(self.dim, dim=-1) if self.with_content else (embedded, None)
        return Start(reference=reference, position=position, content=content, proposals=proposals)


QueryStart = LearnedPoints | LearnedAnchors | ProposalStart


def query_features(start: Start, memory: Tokens, *, num_heads: int) -> Tensor:
    """What each query looks at: the token of its proposal; in one-stage hosts the memory at its reference point.

    Args:
        start: of the queries.
        memory: the encoder's tokens. At a point each level is read bilinearly, zero at padding and beyond the map, and the levels
            are averaged.
        num_heads: parts of a token that are read one by one, as the attention kernels like it; the result is the same.

    Returns:
        (B, n, d). Its gradient reaches the tokens, not the points: positions stay the host's own.
    """
    if start.proposals is not None:
        return start.proposals.tokens
    value = memory.values
    if memory.padding_mask is not None:
        value = value.masked_fill(memory.padding_mask[..., None], 0.0)
    points = start.reference[..., :2].detach()  # (B, n, 2)
    places = points[:, :, None] * memory.valid_ratios[:, None]  # (B, n, L, 2)
    batch, queries, levels, _ = places.shape
    places = places[:, :, None, :, None].expand(-1, -1, num_heads, -1, -1, -1)  # (B, n, H, L, 1, 2)
    weights = places.new_full((batch, queries, num_heads, levels, 1), 1 / levels)
    return ms_deform_attn(value.unflatten(-1, (num_heads, -1)), memory.spatial_shapes, places, weights)
