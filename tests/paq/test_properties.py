"""What pattern queries promise, over random sizes, settings and paddings."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paqdetr.paq import PatternQueries, StaticMixtures

DIM = 16
Size = tuple[int, int]


@st.composite
def pyramids(draw: Any) -> list[Size]:
    """Sizes of one to four levels, each about half of the one before."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    levels = draw(st.integers(1, 4))
    return [(max(height >> level, 1), max(width >> level, 1)) for level in range(levels)]


settings_of_queries = st.fixed_dictionaries(
    dict(
        num_queries=st.integers(1, 9),
        num_patterns=st.integers(2, 7),
        extractor=st.sampled_from(["fused", "pooled"]),
        head=st.sampled_from(["dense", "factorised"]),
        conv=st.sampled_from(["depthwise", "full"]),
        pattern_dim=st.sampled_from([None, 5]),
        temperature=st.sampled_from([0.5, 1.0, 3.0]),
        bias_std=st.sampled_from([None, 0.5, 2.0]),
    )
)
seeds = st.integers(0, 2**31)


def make(sizes: list[Size], seed: int, chosen: dict[str, Any]) -> PatternQueries:
    torch.manual_seed(seed)
    return PatternQueries(dim=DIM, num_levels=len(sizes), head_rank=3, **chosen)


def random_tokens(sizes: list[Size], images: int = 1) -> Tensor:
    """Each image has a look of its own, as a mean, or pooling would see no difference."""
    return torch.randn(images, 1, DIM) + torch.randn(images, sum(h * w for h, w in sizes), DIM)


def embed(tokens: Tensor, sizes: list[Size], outer: list[Size], corners: list[Size]) -> tuple[Tensor, Tensor]:
    """One image (1, S, d) laid into larger maps at `corners`, garbage around it: tokens and mask."""
    found, masks, start = [], [], 0
    for (height, width), (high, wide), (top, left) in zip(sizes, outer, corners, strict=True):
        plane, mask = 100 * torch.randn(high, wide, DIM), torch.ones(high, wide, dtype=torch.bool)
        inside = tokens[0, start : start + height * width].view(height, width, DIM)
        plane[top : top + height, left : left + width] = inside
        mask[top : top + height, left : left + width] = False
        found.append(plane.flatten(0, 1))
        masks.append(mask.flatten())
        start += height * width
    return torch.cat(found)[None], torch.cat(masks)[None]


@settings(max_examples=60)
@given(sizes=pyramids(), chosen=settings_of_queries, seed=seeds)
def test_rows_are_convex_and_images_are_told_apart(sizes: list[Size], chosen: dict[str, Any], seed: int) -> None:
    queries = make(sizes, seed, chosen)
    mix = queries(random_tokens(sizes, 2), sizes)
    assert mix.weights is not None
    assert (mix.weights >= 0).all()
    torch.testing.assert_close(mix.weights.sum(-1), torch.ones(2, chosen["num_queries"]))
    torch.testing.assert_close(mix.content, mix.weights @ queries.patterns, atol=1e-5, rtol=0)
    assert not torch.equal(mix.weights[0], mix.weights[1])


@settings(max_examples=60)
@given(sizes=pyramids(), chosen=settings_of_queries, seed=seeds, query=seeds)
def test_the_loss_of_one_query_teaches_every_pattern(
    sizes: list[Size], chosen: dict[str, Any], seed: int, query: int
) -> None:
    queries = make(sizes, seed, chosen)
    query %= chosen["num_queries"]
    content = queries(random_tokens(sizes), sizes).content
    (gradient,) = torch.autograd.grad(content[0, query].sum(), queries.patterns)
    assert (gradient.abs().amax(1) > 0).all()


@settings(max_examples=60)
@given(sizes=pyramids(), chosen=settings_of_queries, seed=seeds)
def test_every_level_counts(sizes: list[Size], chosen: dict[str, Any], seed: int) -> None:
    """In float64 and for the sum of random multiples: a single weight may be saturated."""
    queries = make(sizes, seed, chosen).double()
    tokens = random_tokens(sizes).double().requires_grad_()
    weights = queries(tokens, sizes).weights
    assert weights is not None
    (gradient,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), tokens)
    for level in gradient.split([h * w for h, w in sizes], dim=1):
        assert level.abs().amax() > 0


@settings(max_examples=80)
@given(data=st.data(), sizes=pyramids(), chosen=settings_of_queries, seed=seeds)
def test_padding_on_any_side_changes_nothing(data: Any, sizes: list[Size], chosen: dict[str, Any], seed: int) -> None:
    queries = make(sizes, seed, chosen)
    tokens = random_tokens(sizes)
    margins = [[data.draw(st.integers(0, 4)) for _ in range(4)] for _ in sizes]
    outer = [(h + m[0] + m[1], w + m[2] + m[3]) for (h, w), m in zip(sizes, margins, strict=True)]
    padded, mask = embed(tokens, sizes, outer, [(m[0], m[2]) for m in margins])
    expected, found = queries(tokens, sizes), queries(padded, outer, mask)
    assert found.weights is not None and expected.weights is not None
    torch.testing.assert_close(found.weights, expected.weights, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.content, expected.content, atol=1e-4, rtol=0)


@settings(max_examples=60)
@given(sizes=pyramids(), other=pyramids(), chosen=settings_of_queries, seed=seeds)
def test_batch_mates_change_nothing(sizes: list[Size], other: list[Size], chosen: dict[str, Any], seed: int) -> None:
    other = (other + other[-1:] * len(sizes))[: len(sizes)]
    queries = make(sizes, seed, chosen)
    outer = [(max(a, c), max(b, d)) for (a, b), (c, d) in zip(sizes, other, strict=True)]
    corners = [(0, 0)] * len(sizes)
    first, mate = random_tokens(sizes), random_tokens(other)
    rows = [embed(first, sizes, outer, corners), embed(mate, other, outer, corners)]
    tokens, mask = (torch.cat(parts) for parts in zip(*rows, strict=True))
    together = queries(tokens, outer, mask).content
    torch.testing.assert_close(together[:1], queries(first, sizes).content, atol=1e-4, rtol=0)
    torch.testing.assert_close(together[1:], queries(mate, other).content, atol=1e-4, rtol=0)


@settings(max_examples=60)
@given(sizes=pyramids(), chosen=settings_of_queries, seed=seeds, count=st.integers(1, 20), static=st.booleans())
def test_resized_queries_are_rows_of_the_old_ones_or_lie_between_two(
    sizes: list[Size], chosen: dict[str, Any], seed: int, count: int, static: bool
) -> None:
    queries: Any = make(sizes, seed, chosen)
    if static:
        queries = StaticMixtures(chosen["num_queries"], chosen["num_patterns"], DIM)
    tokens = random_tokens(sizes)
    before = queries(tokens, sizes)
    rows = queries.resize(count)
    after, old = queries(tokens, sizes), before.content.shape[1]
    kept = rows[:old]
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == min(count, old)
    torch.testing.assert_close(after.content[:, : len(kept)], before.content[:, kept], atol=1e-5, rtol=0)
    if count > old:  # logits between those of two neighbours
        low = rows[old:]
        logits = [torch.log(weights).double() for weights in (before.weights, after.weights)]
        first, second, between = logits[0][:, low], logits[0][:, (low + 1).clamp(max=old - 1)], logits[1][:, old:]
        way, done = (x - x.mean(2, keepdim=True) for x in (second - first, between - first))
        share = (way * done).sum(2, keepdim=True) / (way * way).sum(2, keepdim=True).clamp(min=1e-12)
        torch.testing.assert_close(done, share * way, atol=1e-3, rtol=0)
        assert ((share > -1e-3) & (share < 1 + 1e-3)).all()
