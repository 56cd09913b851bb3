"""Pattern queries: every content query is a convex mixture of a few shared patterns, mixed anew for each image.

Source: PaQ-DETR (arXiv 2603.06917): Q^C = W Q^P with W = softmax(F_w(Z)). One matched query's gradient reaches every
pattern it mixes, and through them every other query. Weights from each query's own features are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from paqdetr.paq.extractor import FusedExtractor, PooledExtractor
from paqdetr.paq.losses import pattern_diversity_loss


@dataclass(frozen=True, slots=True)
class Mixture:
    """Content queries of a batch, and how they were mixed.

    Attributes:
        content: (B, n, d).
        weights: (B, n, m), rows non-negative and summing to 1; None where content is not a mixture.
    """

    content: Tensor
    weights: Tensor | None


class PatternQueries(nn.Module):
    """m shared patterns and the network F_w that mixes them into n content queries for each image.

    Args:
        num_queries: n.
        num_patterns: m, at least 2.
        dim: width of the encoder's tokens.
        num_levels: levels of the encoder's memory.
        extractor: "fused" (the paper's top-down fusion) or "pooled" (mean of the tokens).
        head: "dense", one linear layer to n * m logits; or "factorised", a rank-r product of a table of queries (n, r) with
            factors (r, m) computed from the image, which has a fraction of the parameters.
        pattern_dim: width d of patterns and content; `dim` if None.
        temperature: logits are divided by it.
        gain: factor on the initial weight of the last layer: larger, and W depends more on the image from the start.
        bias_std: initial std of the logits' bias; None keeps torch's own initialisation. Without a spread all queries start as
            the mean pattern and a training can collapse. With `mixture_input="query"`, where all queries share one
            bias, it is the initial std of the logits themselves, by the weights of the last layer.
        pattern_std: initial std of the patterns.
        head_rank: r of the factorised head.
        conv: dilated convolutions of the fused extractor, "depthwise" or "full".
        normalize_summary: take the extractor's vector less its mean over past training images, over its spread between them. What
            images share otherwise outweighs what tells them apart, and mixtures hardly depend on the image. Ours.
        mixture_input: what the weights are computed from. "image" (the paper's): one vector for the image, and for each query
            its own rows of the head. "query": each query's own features, by one network for all queries; they can be any number,
            and permuting them permutes the queries. "both": the sum of the two logits. Ours, except for "image".
    """

    def __init__(
        self,
        num_queries: int,
        num_patterns: int = 64,
        dim: int = 256,
        num_levels: int = 4,
        extractor: Literal["fused", "pooled"] = "fused",
        head: Literal["dense", "factorised"] = "dense",
        pattern_dim: int | None = None,
        temperature: float = 1.0,
        gain: float = 1.0,
        bias_std: float | None = 2.0,
        pattern_std: float = 1.0,
        *,
        head_rank: int = 32,
        conv: Literal["depthwise", "full"] = "depthwise",
        normalize_summary: bool = False,
        mixture_input: Literal["image", "query", "both"] = "image",
    ) -> None:
        super().__init__()
        if num_patterns < 2:
            raise ValueError(f"num_patterns: expected at least 2, found {num_patterns}")
        if mixture_input not in ("image", "query", "both"):
            raise ValueError(f"mixture_input: expected 'image', 'query' or 'both', found {mixture_input!r}")
        if extractor not in ("fused", "pooled"):
            raise ValueError(f"extractor: expected 'fused' or 'pooled', found {extractor!r}")
        if head not in ("dense", "factorised"):
            raise ValueError(f"head: expected 'dense' or 'factorised', found {head!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, found {temperature}")
        for name, count in (("num_queries", num_queries), ("num_levels", num_levels), ("head_rank", head_rank)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, found {count}")
        self.num_queries, self.dim = num_queries, dim
        self.temperature = temperature
        self.patterns = nn.Parameter(torch.randn(num_patterns, pattern_dim or dim) * pattern_std)
        self.head: _DenseHead | _FactorisedHead | None = None
        self.query_head: nn.Sequential | None = None
        if mixture_input != "query":
            self.extractor = (
                FusedExtractor(dim=dim, num_levels=num_levels, conv=conv)
                if extractor == "fused"
                else PooledExtractor(dim=dim)
            )
            self.summary_norm = _RunningNorm(dim) if normalize_summary else nn.Identity()
            self.hidden = _hidden_layer(dim)
            make_head = _DenseHead if head == "dense" else partial(_FactorisedHead, rank=head_rank)
            self.head = make_head(
                dim=dim, num_queries=num_queries, num_patterns=num_patterns, gain=gain, bias_std=bias_std
            )
        if mixture_input != "image":
            last = nn.Linear(dim, num_patterns)
            with torch.no_grad():
                if self.head is None and bias_std is not None:
                    last.weight.normal_(std=bias_std * math.sqrt(2 / dim))  # half of the hidden units are 0
                last.weight.mul_(gain)
            self.query_head = nn.Sequential(*_hidden_layer(dim), last)

    def forward(
        self,
        tokens: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
        proposals: Tensor | None = None,
        query_features: Tensor | None = None,
    ) -> Mixture:
        """Mix the patterns for a batch of images.

        Args:
            tokens: (B, S, d) encoder memory, levels one after another, finest first.
            spatial_shapes: (L, 2) int64 or L pairs (height, width), S = sum of height * width.
            padding_mask: (B, S) bool, True at padding, the rest of each level a rectangle; None if there is none.
            proposals: ignored; every source of content queries is offered them.
            query_features: (B, n, d) what each query looks at: the token of its proposal, or memory read at its reference point.
                Ignored with `mixture_input="image"`; with "query" alone n is free.

        Returns:
            Mixture with content (B, n, pattern_dim) and weights (B, n, m).

        Raises:
            ValueError: tokens or shapes of another width or number than the module was made for, or query features that are
                missing or of another shape.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.dim:
            raise ValueError(f"tokens: expected (B, S, {self.dim}), found {tuple(tokens.shape)}")
        # float32 at least: in half precision the weights of 64 patterns would not sum to 1.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        logits = []
        if self.head is not None:
            rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
            shapes = [(int(height), int(width)) for height, width in rows]
            summary = self.hidden(self.summary_norm(self.extractor(tokens, shapes, padding_mask)))  # (B, d)
            logits.append(self.head(summary).to(dtype))  # (B, n, m)
        if self.query_head is not None:
            features = self._checked_features(query_features, tokens)
            logits.append(self.query_head(features).to(dtype))
        return _mix(sum(logits[1:], logits[0]) / self.temperature, self.patterns)

    def _checked_features(self, features: Tensor | None, tokens: Tensor) -> Tensor:
        """(B, n, d) of as many queries as the head has rows for."""
        if features is None:
            raise ValueError(
                "mixture_input asks for query_features (B, n, d), and there are none: give them in the call"
            )
        count = "n" if self.head is None else self.num_queries
        wanted = (tokens.shape[0], count, tokens.shape[2])
        found = tuple(features.shape)
        if features.ndim != 3 or found[::2] != wanted[::2] or count not in ("n", found[1]):
            raise ValueError(f"query_features: expected ({wanted[0]}, {count}, {wanted[2]}), found {found}")
        return features

    def resize(self, num_queries: int, *, ranked: bool = False, rows: Tensor | None = None) -> Tensor:
        """Change the number of queries of a trained module, in place: the rows of its weight head.

        A query is only a row of mixing weights; patterns and extractor stay as they are. With `mixture_input="query"` there are
        no such rows, and nothing changes but `num_queries`.
        Parameters whose shape changes are new objects afterwards: make the optimiser after this, not before.

        Args:
            num_queries: the new n, at least 1.
            ranked: whether the place of a query is the rank of its proposal, as in two-stage hosts: fewer are the first ones.
            rows: (num_queries,) int64 in [0, old n), the old row of each new query; None takes those of `resized_rows`.

        Returns:
            The old row that each new query is, or of two that it lies between the first: (num_queries,) int64.

        Raises:
            ValueError: `num_queries` below 1, or rows of another shape, dtype or range.
        """
        taken = _checked_rows(rows, num_queries, self.num_queries, ranked=ranked)
        if self.head is not None:
            self.head.take_rows(taken)
        self.num_queries = num_queries
        return taken.low

    def aux_losses(self) -> dict[str, Tensor]:
        """Auxiliary losses, unweighted: {"diversity": scalar}."""
        return {"diversity": pattern_diversity_loss(self.patterns)}


class StaticMixtures(nn.Module):
    """Patterns mixed by learned weights that no image changes: what pattern queries are without their network.

    An ablation between a learned table of queries and `PatternQueries`: gradients are shared, nothing adapts to the image.

    Args:
        num_queries: n.
        num_patterns: m, at least 2.
        dim: width d of patterns and content.
        temperature: logits are divided by it.
        bias_std: initial std of the logits; None draws them as the bias of a linear layer of width `dim`.
        pattern_std: initial std of the patterns.
    """

    def __init__(
        self,
        num_queries: int,
        num_patterns: int = 64,
        dim: int = 256,
        *,
        temperature: float = 1.0,
        bias_std: float | None = 2.0,
        pattern_std: float = 1.0,
    ) -> None:
        super().__init__()
        if num_patterns < 2:
            raise ValueError(f"num_patterns: expected at least 2, found {num_patterns}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, found {temperature}")
        if num_queries < 1:
            raise ValueError(f"num_queries: expected at least 1, found {num_queries}")
        self.temperature = temperature
        self.patterns = nn.Parameter(torch.randn(num_patterns, dim) * pattern_std)
        bound = 1 / math.sqrt(dim)
        logits = torch.empty(num_queries, num_patterns).uniform_(-bound, bound)
        self.logits = nn.Parameter(logits if bias_std is None else logits.normal_(std=bias_std))

    def forward(
        self,
        tokens: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
        proposals: Tensor | None = None,
        query_features: Tensor | None = None,
    ) -> Mixture:
        """As `PatternQueries.forward`; of the tokens (B, S, d) only the number of images counts."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        mix = _mix(logits / self.temperature, self.patterns)
        assert mix.weights is not None
        batch = tokens.shape[0]
        return Mixture(mix.content.expand(batch, -1, -1), mix.weights.expand(batch, -1, -1))

    @property
    def num_queries(self) -> int:
        """n."""
        return self.logits.shape[0]

    def resize(self, num_queries: int, *, ranked: bool = False, rows: Tensor | None = None) -> Tensor:
        """See `PatternQueries.resize`."""
        taken = _checked_rows(rows, num_queries, self.num_queries, ranked=ranked)
        self.logits = _taken(self.logits, taken)
        return taken.low

    def aux_losses(self) -> dict[str, Tensor]:
        """Auxiliary losses, unweighted: {"diversity": scalar}."""
        return {"diversity": pattern_diversity_loss(self.patterns)}


def _mix(logits: Tensor, patterns: Tensor) -> Mixture:
    """(..., n, m) logits, at least float32, and (m, d) patterns -> content (..., n, d) and weights (..., n, m)."""
    weights = logits.softmax(-1)
    return Mixture(content=weights.to(patterns.dtype) @ patterns, weights=weights)


def _hidden_layer(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU())


class _RunningNorm(nn.Module):
    """(B, d) -> (B, d): every channel less its mean over past training images, over its standard deviation between them.

    The figures are those of earlier batches in training too, so that no image sees what it is batched with. Each of several
    processes adds its own images alone; the first one's figures are kept.
    """

    mean: Tensor
    variance: Tensor
    images: Tensor
    _LEAST_SHARE = 0.02  # of a batch in the figures: they follow an encoder that learns
    _EPS = 1e-5

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    def forward(self, summary: Tensor) -> Tensor:
        working = summary.to(torch.promote_types(summary.dtype, torch.float32))
        normed = (working - self.mean) * (self.variance + self._EPS).rsqrt()
        if self.training:
            self._take_in(working.detach())
        return normed.to(summary.dtype)

    @torch.no_grad()
    def _take_in(self, summary: Tensor) -> None:
        self.images += len(summary)
        share = (len(summary) / self.images).clamp(min=self._LEAST_SHARE).to(self.mean)  # 1 for the first batch
        self.mean.lerp_(summary.mean(0).to(self.mean), share)
        self.variance.lerp_((summary - self.mean).square().mean(0).to(self.variance), share)


class _DenseHead(nn.Module):
    """(B, d) -> (B, n, m) logits by one linear layer."""

    def __init__(self, *, dim: int, num_queries: int, num_patterns: int, gain: float, bias_std: float | None) -> None:
        super().__init__()
        self.num_patterns = num_patterns
        self.linear = nn.Linear(dim, num_queries * num_patterns)
        with torch.no_grad():
            self.linear.weight.mul_(gain)
            if bias_std is not None:
                self.linear.bias.normal_(std=bias_std)

    def forward(self, summary: Tensor) -> Tensor:
        return self.linear(summary).unflatten(1, (-1, self.num_patterns))

    def take_rows(self, rows: Rows) -> None:
        for name, parameter in list(self.linear.named_parameters()):
            setattr(self.linear, name, _taken(parameter, rows, self.num_patterns))
        self.linear.out_features = len(self.linear.weight)


class _FactorisedHead(nn.Module):
    """(B, d) -> (B, n, m) logits as a product of rank r, plus a bias of its own for every query and pattern."""

    def __init__(
        self, *, dim: int, num_queries: int, num_patterns: int, rank: int, gain: float, bias_std: float | None
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, rank) / math.sqrt(rank))
        self.factors = nn.Linear(dim, rank * num_patterns)
        bound = 1 / math.sqrt(dim)  # what a linear layer of this width starts with
        self.bias = nn.Parameter(torch.empty(num_queries, num_patterns).uniform_(-bound, bound))
        with torch.no_grad():
            self.factors.weight.mul_(gain)
            if bias_std is not None:
                self.bias.normal_(std=bias_std)

    def forward(self, summary: Tensor) -> Tensor:
        factors = self.factors(summary).unflatten(1, (self.queries.shape[1], -1))  # (B, r, m)
        return self.queries @ factors + self.bias

    def take_rows(self, rows: Rows) -> None:
        self.queries, self.bias = _taken(self.queries, rows), _taken(self.bias, rows)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which old rows the rows of a table for another number of queries come from.

    Attributes:
        low, high: (n,) int64, the two old rows that each new one lies between.
        share: (n,) float in [0, 1), how far from the first; 0 where a row is kept.
    """

    low: Tensor
    high: Tensor
    share: Tensor

    def of(self, table: Tensor, per_query: int = 1) -> Tensor:
        """(old n * per_query, ...) -> (n * per_query, ...), detached."""
        by_query = table.detach().unflatten(0, (-1, per_query))
        low, high = (by_query[rows.to(table.device)] for rows in (self.low, self.high))
        weight = self.share.to(by_query).view(-1, *[1] * (by_query.ndim - 1))
        return torch.lerp(low, high, weight).flatten(0, 1)


def resized_rows(old: int, new: int, *, ranked: bool = False) -> Rows:
    """The rows for `new` queries in the place of `old` ones.

    Fewer are spread evenly over the old ones, or the first ones where a query is a rank. More are all the old ones, then new ones
    interpolated between neighbours, shared out over the gaps.

    Args:
        old, new: at least 1.
        ranked: whether the place of a query is the rank of its proposal.
    """
    if new <= old:
        kept = torch.arange(new) if ranked else torch.arange(new) * old // new
        return Rows(kept, kept, torch.zeros(new))
    gaps, extra = max(old - 1, 1), new - old
    edges = torch.arange(gaps + 1) * extra // gaps
    counts = edges.diff()
    low = torch.arange(gaps).repeat_interleave(counts)
    place = torch.arange(extra) - edges[low] + 1
    kept = torch.arange(old)
    return Rows(
        torch.cat([kept, low]),
        torch.cat([kept, (low + 1).clamp(max=old - 1)]),
        torch.cat([torch.zeros(old), place / (counts[low] + 1)]),
    )


def _checked_rows(rows: Tensor | None, new: int, old: int, *, ranked: bool) -> Rows:
    if new < 1:
        raise ValueError(f"num_queries: expected at least 1, found {new}")
    if rows is None:
        return resized_rows(old, new, ranked=ranked)
    if rows.dtype != torch.int64 or rows.shape != (new,):
        raise ValueError(f"rows: expected ({new},) int64, found {tuple(rows.shape)} {rows.dtype}")
    if rows.min() < 0 or rows.max() >= old:
        raise ValueError(f"rows: expected indices in [0, {old}), found {int(rows.min())} to {int(rows.max())}")
    return Rows(rows, rows, torch.zeros(new))


def _taken(parameter: nn.Parameter, rows: Rows, per_query: int = 1) -> nn.Parameter:
    return nn.Parameter(rows.of(parameter, per_query), parameter.requires_grad)
