"""Where content queries come from: the protocol, and the hosts' own learned table.

PaQ's `paqdetr.paq.PatternQueries` is the other source. A new idea is a module with these two methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from paqdetr.paq import Mixture


@runtime_checkable
class QuerySource(Protocol):
    """Makes the content half of the decoder's queries."""

    def __call__(
        self,
        tokens: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
        proposals: Tensor | None = None,
    ) -> Mixture:
        """Encoder memory (B, S, d), its layout, its mask (B, S), the chosen boxes (B, n, 4) -> content (B, n, d)."""
        ...

    def aux_losses(self) -> dict[str, Tensor]:
        """Losses the source owes for itself, by name."""
        ...


class StaticQueries(nn.Module):
    """One learned vector a query, the same for every image (DINO's mixed query selection).

    Args:
        std: initial standard deviation; 1 is customary, 0 leaves the start to the positions.
    """

    def __init__(self, *, num_queries: int, dim: int, std: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_queries, dim) * std)

    def forward(
        self,
        tokens: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
        proposals: Tensor | None = None,
    ) -> Mixture:
        """The table, once an image: content (B, n, d), no weights."""
        return Mixture(content=self.table.expand(tokens.shape[0], -1, -1), weights=None)

    def aux_losses(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}
