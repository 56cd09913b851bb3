"""The deformable encoder, whose tokens look at a few places of every level, and the attention that it shares with the decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paqdetr.models.tokens import Tokens
from paqdetr.ops import ms_deform_attn

_VECTOR = 16  # float32 numbers of the widest vectors there are


class DeformableAttention(nn.Module):
    """Every query looks at `num_points` places of each level around its reference.

    Source: Deformable DETR (arXiv 2010.04159), equation 3 and appendix A.1.
    """

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, samples * 2)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Start as uniform attention: head h looks along direction h, point p at p + 1 cells' distance."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (H, 2), on the unit square
        distance = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None] * distance[:, None]  # (H, 1, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: list[tuple[int, int]],
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Attend from queries to memory.

        Args:
            query: (B, Q, d), position already added.
            reference_points: (B, Q, L, 2) xy, or (B, Q, L, 4) cxcywh, in [0, 1] of the padded level.
            memory: (B, S, d).
            spatial_shapes: L pairs (height, width).
            padding_mask: (B, S) bool, True at padding, which then reads zero.

        Returns:
            (B, Q, d)
        """
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill_(padding_mask[..., None], 0.0)  # nobody else holds it
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, H, D)
        locations, weights = self.sampling(query, reference_points, spatial_shapes)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights))

    def sampling(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Where queries look, and with what weight. Arguments as of `forward`.

        Returns:
            locations (B, Q, H, L, P, 2), xy in [0, 1] of the padded level; weights (B, Q, H, L, P), which sum to 1 over L and P.
        """
        batch, queries, _ = query.shape
        grid = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        weights = softmax(self.attention_weights(query).view(batch, queries, self.num_heads, -1)).reshape(grid)
        # Levels, points and coordinates as one axis: torch is several times slower where the last axis has two numbers.
        reference = reference_points[:, :, None].repeat_interleave(self.num_points, dim=3)  # (B, Q, 1, L P, 2 or 4)
        center = reference[..., :2].flatten(3)  # (B, Q, 1, L P 2)
        flat = (batch, queries, self.num_heads, center.shape[-1])
        if reference.shape[-1] == 2:
            locations = center + self._offsets_in_levels(query, spatial_shapes).view(flat)
        else:
            # An offset of `num_points` reaches the edge of the box.
            reach = (reference[..., 2:] * (0.5 / self.num_points)).flatten(3)
            locations = center + self.sampling_offsets(query).view(flat) * reach
        locations = locations.view(*grid, 2)
        return locations, weights

    def _offsets_in_levels(self, query: Tensor, spatial_shapes: list[tuple[int, int]]) -> Tensor:
        """`sampling_offsets(query)` over the width or height of their level: (B, Q, H * L * P * 2).

        The parameters are divided and not the result, which has a number for every query and takes longer than the attention.
        """
        linear = self.sampling_offsets
        # Filled where it is needed: a list that is copied to a GPU waits for it, in every layer.
        sizes = torch.cat([linear.weight.new_full((1,), side) for shape in spatial_shapes for side in reversed(shape)])
        shares = (1 / sizes).view(-1, 1, 2).expand(self.num_heads, -1, self.num_points, -1).flatten()
        return F.linear(query, linear.weight * shares[:, None], linear.bias * shares)


def softmax(logits: Tensor) -> Tensor:
    """Over the last axis, of any length: torch on a CPU takes up to ten times as long where no vectors cover it."""
    length = logits.shape[-1]
    missing = -length % _VECTOR
    worth = 0 < 2 * missing <= length and logits.device.type == "cpu"
    if not worth or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return logits.softmax(-1)
    return F.pad(logits, (0, missing), value=-torch.inf).softmax(-1)[..., :length]


class FeedForward(nn.Module):
    """Linear, ReLU, Linear with a skip and the norm after it."""

    def __init__(self, *, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)"""
        return self.norm(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class MLP(nn.Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(pairwise(dims)):
            layers += [nn.ReLU()] if i else []
            layers.append(nn.Linear(fan_in, fan_out))
        super().__init__(*layers)


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
        fusion: memory is computed from the tokens after every layer, and before the first (Relation-DETR's code).
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
        fusion: bool = False,
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
        self.fusion: nn.Sequential | None = None
        if fusion:
            self.fusion = nn.Sequential(
                nn.Linear((num_layers + 1) * dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.LayerNorm(dim)
            )

    def forward(self, tokens: Tokens) -> Tokens:
        """Neck tokens -> memory, in the same layout."""
        updated = sum(height * width for height, width in tokens.spatial_shapes[-self.query_levels :])
        fine, x = tokens.values[:, :-updated], tokens.values[:, -updated:]
        position = (tokens.position + self.level_embed[tokens.level_index])[:, -updated:]
        reference = tokens.centers[:, -updated:, None] * tokens.valid_ratios[:, None]  # (B, Q, L, 2)
        after = [tokens.values]
        for layer in self.layers:
            x = self.run(layer, x, fine, position, reference, tokens)
            if self.fusion is not None:
                after.append(torch.cat([fine, x], dim=1))
        if self.fusion is not None:
            return tokens.with_values(self.fusion(torch.cat(after, dim=-1)))
        return tokens.with_values(torch.cat([fine, x], dim=1))
