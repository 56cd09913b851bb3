"""Content queries: the protocol of their sources, the hosts' own learned table, and groups of queries in one decoder pass.

PaQ's `paqdetr.paq.PatternQueries` is another source. A new idea is a module with these two methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from paqdetr.models.denoising import DenoisingQueries
from paqdetr.paq import Mixture, PatternQueries, StaticMixtures


@runtime_checkable
class QuerySource(Protocol):
    """Makes the content half of the decoder's queries."""

    def __call__(
        self,
        tokens: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
        proposals: Tensor | None = None,
        query_features: Tensor | None = None,
    ) -> Mixture:
        """Encoder memory (B, S, d), its layout, its mask (B, S), the chosen boxes (B, n, 4), and what each query looks at
        (B, n, d), where the settings ask for it -> content (B, n, d)."""
        ...

    def aux_losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the source, unweighted, by name."""
        ...


class StaticQueries(nn.Module):
    """One learned vector per query, the same for every image (DINO's mixed query selection).

    Args:
        std: initial standard deviation; 0 leaves the start to the positions; None is the Xavier-uniform start of DINO's code,
            0.04 at 900 x 256.
    """

    def __init__(self, *, num_queries: int, dim: int, std: float | None = 1.0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_queries, dim) * (1.0 if std is None else std))
        if std is None:
            nn.init.xavier_uniform_(self.table)

    def forward(self, tokens: Tensor, *others: object) -> Mixture:
        """The table, for each image: content (B, n, d), no weights."""
        return Mixture(content=self.table.expand(tokens.shape[0], -1, -1), weights=None)

    def aux_losses(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class FeatureQueries(nn.Module):
    """What each query looks at, through a LayerNorm and a linear layer: what mixtures from query features are without patterns.

    Args:
        dim: width of the features.
        content_dim: width d of the content.
    """

    def __init__(self, *, dim: int, content_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, content_dim)

    def forward(
        self,
        tokens: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
        proposals: Tensor | None = None,
        query_features: Tensor | None = None,
    ) -> Mixture:
        """Content (B, n, d) of query features (B, n, dim), no weights."""
        assert query_features is not None
        return Mixture(content=self.linear(self.norm(query_features)), weights=None)

    def aux_losses(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class ResidualMixtures(nn.Module):
    """A learned table, and mixtures that are added to it through a gate of one number per channel.

    The gate starts at zero, as ReZero's (arXiv 2003.04887): a training begins as that of the host with static content, and takes
    from the patterns what helps. A trained table of a host can be put in, and then the detector begins as it was. Ours; the
    form that `paqdetr.integrations.transformers` has as `mode="residual"`.

    Args:
        static: the table; its `table` becomes this module's.
        mixtures: the source of (B, n, d) mixtures, or of other content that depends on the image.
    """

    def __init__(self, *, static: StaticQueries, mixtures: PatternQueries | StaticMixtures | FeatureQueries) -> None:
        super().__init__()
        self.table = static.table
        self.gate = nn.Parameter(torch.zeros(self.table.shape[1]))
        self.mixtures = mixtures

    def forward(self, *inputs: Any) -> Mixture:
        """Content (B, n, d) is table + gate * mixture; the weights (B, n, m) are the mixture's, if it has any."""
        mixture = self.mixtures(*inputs)
        return replace(mixture, content=self.table + self.gate * mixture.content)

    @property
    def patterns(self) -> Tensor | None:
        """(m, d), those of the mixtures; None if they have none."""
        return None if isinstance(self.mixtures, FeatureQueries) else self.mixtures.patterns

    def aux_losses(self) -> dict[str, Tensor]:
        """Those of the mixtures."""
        return self.mixtures.aux_losses()


@dataclass(frozen=True, slots=True)
class QueryGroup:
    """Queries that go through the decoder together with others.

    Attributes:
        content: (B, N, d).
        reference: (B, N, 4) cxcywh, or (B, N, 2) xy, in [0, 1].
        position: (B, N, d) if fixed over the layers; None where each layer makes it from the boxes.
    """

    content: Tensor
    reference: Tensor
    position: Tensor | None = None

    def __len__(self) -> int:
        return self.content.shape[1]

    @staticmethod
    def join(groups: Sequence[QueryGroup]) -> QueryGroup:
        """One after the other; either all have a fixed position or none has."""
        positions = [group.position for group in groups if group.position is not None]
        return QueryGroup(
            content=torch.cat([group.content for group in groups], dim=1),
            reference=torch.cat([group.reference for group in groups], dim=1),
            position=torch.cat(positions, dim=1) if positions else None,
        )


def attention_mask(
    denoising: DenoisingQueries | None, num_queries: int, num_hybrid: int, device: torch.device
) -> Tensor | None:
    """Who may not look at whom, in the order denoising, matching, hybrid.

    Matching queries see each other alone, so that they do in training what they do in use; so do hybrid ones.

    Returns:
        (N, N) bool, True where attention is forbidden; None if there are only matching queries.
    """
    if denoising is None and not num_hybrid:
        return None
    seen = num_queries + (0 if denoising is None else len(denoising))
    mask = torch.zeros(seen + num_hybrid, seen + num_hybrid, dtype=torch.bool, device=device)
    if denoising is not None:
        mask[:seen, :seen] = denoising.attention_mask(num_queries, device)
    mask[:seen, seen:] = True
    mask[seen:, :seen] = True
    return mask
