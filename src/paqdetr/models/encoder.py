"""The deformable encoder: tokens of all levels look at a few places of every level."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paqdetr.models.attention import DeformableAttention, FeedForward
from paqdetr.models.tokens import Tokens


class Recomputing(nn.Module):
    """A stack of layers that can do so.

    Attributes:
        checkpoint_activations: whether it does, in training. The second pass sees the dropout of the first, so gradients are the
            same to the last bit where the layers' kernels are deterministic.
    """

    checkpoint_activations: bool = False

    def run(self, layer: Callable[..., Tensor], *inputs: object) -> Tensor:
        """`layer(*inputs)`."""
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return layer(*inputs)


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, norm after each."""

    def __init__(
        self, *, dim: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim=dim, hidden=ffn_dim, dropout=dropout)

    def forward(self, x: Tensor, fine: Tensor, position: Tensor, reference: Tensor, tokens: Tokens) -> Tensor:
        """x, position: (B, Q, d) the tokens to update; fine: (B, S - Q, d) those before them; reference: (B, Q, L, 2)."""
        memory = torch.cat([fine, x], dim=1)
        attended = self.attention(x + position, reference, memory, tokens.spatial_shapes, tokens.padding_mask)
        return self.ffn(self.norm(x + self.dropout(attended)))


class DeformableEncoder(Recomputing):
    """A stack of encoder layers.

    Args:
        query_levels: how many of the coarsest levels are updated; the finer ones are read only. None updates all. The finest
            level has three quarters of the tokens, so leaving it out saves most of the time.
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
        query_levels: int | None = None,
    ) -> None:
        super().__init__()
        self.query_levels = query_levels or num_levels
        self.level_embed = nn.Parameter(torch.randn(num_levels, dim))
        self.layers = nn.ModuleList(
            EncoderLayer(
                dim=dim,
                num_heads=num_heads,
                num_levels=num_levels,
                num_points=num_points,
                ffn_dim=ffn_dim,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )

    def forward(self, tokens: Tokens) -> Tokens:
        """Neck tokens -> memory, in the same layout."""
        updated = sum(height * width for height, width in tokens.spatial_shapes[-self.query_levels :])
        fine, x = tokens.values[:, :-updated], tokens.values[:, -updated:]
        position = (tokens.position + self.level_embed[tokens.level_index])[:, -updated:]
        reference = tokens.centers[:, -updated:, None] * tokens.valid_ratios[:, None]  # (B, Q, L, 2)
        for layer in self.layers:
            x = self.run(layer, x, fine, position, reference, tokens)
        return tokens.with_values(torch.cat([fine, x], dim=1))
