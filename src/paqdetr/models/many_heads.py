"""Heads that exist in training alone: they learn several positives a box, so that the decoder's own need not."""

from __future__ import annotations

from torch import Tensor, nn

from paqdetr.models.attention import MLP


class OneToManyHeads(nn.Module):
    """One more class head and box head for each of the first decoder layers.

    Source: MS-DETR (arXiv 2401.03989), section 3.2: one-to-many supervision of the queries that are used for detection, by
    predictors of its own, beside the one-to-one supervision. There every layer has them, and their assignment is another.

    Args:
        num_layers: how many layers have them.
        share: one pair of heads for all layers, where the decoder has it so.
    """

    def __init__(self, *, num_layers: int, dim: int, num_classes: int, share: bool) -> None:
        super().__init__()
        self.num_layers = num_layers
        heads = min(1, num_layers) if share else num_layers
        self.class_heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(MLP((dim, dim, dim, 4)) for _ in range(heads))

    def forward(self, layer: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, d) of a layer, from 0 -> class logits (B, N, C) and box offsets in logits (B, N, 4)."""
        which = layer % len(self.class_heads)
        return self.class_heads[which](state), self.box_heads[which](state)
