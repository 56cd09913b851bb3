"""Mixtures computed from what each query looks at: the promises of pattern queries, and those that only these can keep."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paqdetr.paq import Mixture, PatternQueries

DIM, SIZES = 16, [(6, 8), (3, 4)]
TOKENS = sum(height * width for height, width in SIZES)
with_features = pytest.mark.parametrize("mixture_input", ["query", "both"])
seeds = st.integers(0, 2**31)
inputs = st.sampled_from(["query", "both"])


def make(mixture_input: Literal["image", "query", "both"], **changes: Any) -> PatternQueries:
    sizes: dict[str, Any] = dict(num_queries=7, num_patterns=5, dim=DIM, num_levels=2, extractor="pooled")
    return PatternQueries(**(sizes | changes), mixture_input=mixture_input)


def mixed(queries: PatternQueries, tokens: Tensor, features: Tensor | None, **more: Any) -> Mixture:
    return queries(tokens, SIZES, query_features=features, **more)


def centred(weights: Tensor | None) -> Tensor:
    """Logits less their mean over the patterns, which the weights do not tell."""
    assert weights is not None
    return weights.log() - weights.log().mean(-1, keepdim=True)


# --- the paper's form


@pytest.mark.parametrize("head", ["dense", "factorised"])
def test_from_the_image_alone_it_is_what_it_was_before_there_was_a_choice(head: Any) -> None:
    """The same draws in the same order, the same names, the same operations: to the last bit."""
    from paqdetr.paq.extractor import FusedExtractor

    tokens, mask = torch.randn(2, TOKENS, DIM, requires_grad=True), torch.zeros(2, TOKENS, dtype=torch.bool)
    torch.manual_seed(3)
    queries = make("image", extractor="fused", head=head, bias_std=None, head_rank=3)
    torch.manual_seed(3)
    patterns = torch.randn(5, DIM)
    extractor = FusedExtractor(dim=DIM, num_levels=2)
    hidden = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), torch.nn.LayerNorm(DIM), torch.nn.ReLU())
    if head == "dense":
        last = torch.nn.Linear(DIM, 7 * 5)
        logits = last(hidden(extractor(tokens, SIZES, mask))).view(2, 7, 5)
        names = ["head.linear.weight", "head.linear.bias"]
    else:
        table = torch.nn.Parameter(torch.randn(7, 3) / math.sqrt(3))
        factors = torch.nn.Linear(DIM, 3 * 5)
        bias = torch.empty(7, 5).uniform_(-0.25, 0.25)
        logits = table @ factors(hidden(extractor(tokens, SIZES, mask))).view(2, 3, 5) + bias
        names = ["head.queries", "head.bias", "head.factors.weight", "head.factors.bias"]
    for features in (None, torch.randn(2, 7, DIM)):  # features are not looked at
        mix = mixed(queries, tokens, features, padding_mask=mask)
        assert mix.weights is not None and torch.equal(mix.weights, logits.softmax(-1))
        assert torch.equal(mix.content, logits.softmax(-1) @ patterns)
    own = [f"extractor.{name}" for name, _ in extractor.named_parameters()]
    own += [f"hidden.{name}" for name, _ in hidden.named_parameters()]
    assert list(queries.state_dict()) == ["patterns", *own, *names]


# --- a convex mixture, of shared patterns


@with_features
def test_logits_by_hand(mixture_input: Any) -> None:
    queries = make(mixture_input, temperature=0.5)
    assert queries.query_head is not None
    tokens, features = torch.randn(2, TOKENS, DIM), torch.randn(2, 7, DIM)
    mix = mixed(queries, tokens, features)
    first, norm, _, last = queries.query_head
    for image in range(2):
        for i in range(7):
            hidden = norm(first(features[image, i])).clamp(min=0)  # type: ignore[operator]
            logits = hidden @ last.weight.T + last.bias  # type: ignore[operator, union-attr]
            if queries.head is not None:
                summary = queries.hidden(queries.extractor(tokens[image : image + 1], SIZES, None))
                logits = logits + queries.head(summary)[0, i]
            weights = (logits / 0.5).softmax(0)
            content = sum(weights[j] * queries.patterns[j] for j in range(5))
            assert mix.weights is not None
            torch.testing.assert_close(mix.weights[image, i], weights)
            torch.testing.assert_close(mix.content[image, i], content)


@settings(max_examples=20)
@given(seed=seeds, mixture_input=inputs, query=st.integers(0, 6), bias_std=st.sampled_from([None, 2.0]))
def test_rows_are_convex_and_one_query_teaches_all_patterns(
    seed: int, mixture_input: Any, query: int, bias_std: float | None
) -> None:
    torch.manual_seed(seed)
    queries = make(mixture_input, bias_std=bias_std, pattern_dim=9)
    mix = mixed(queries, torch.randn(2, TOKENS, DIM), torch.randn(2, 7, DIM))
    assert mix.weights is not None and (mix.weights > 0).all()
    torch.testing.assert_close(mix.weights.sum(-1), torch.ones(2, 7))
    torch.testing.assert_close(mix.content, mix.weights @ queries.patterns)
    mix.content[0, query].square().sum().backward()
    assert queries.patterns.grad is not None
    assert (queries.patterns.grad.abs().amax(1) > 0).all()
    for name, parameter in queries.named_parameters():
        assert parameter.grad is not None, name


# --- of each query's own features


@settings(max_examples=20)
@given(seed=seeds, permutation=st.permutations(range(7)))
def test_permuted_features_permute_the_queries(seed: int, permutation: list[int]) -> None:
    torch.manual_seed(seed)
    order = torch.tensor(permutation)
    tokens, features = torch.randn(2, TOKENS, DIM), torch.randn(2, 7, DIM)
    own = make("query")
    before = mixed(own, tokens, features)
    torch.testing.assert_close(mixed(own, tokens, features[:, order]).content, before.content[:, order])
    # Of the sum of two logits, those from the image stay with the index: only together with its rows.
    both = make("both")
    before = mixed(both, tokens, features)
    both.resize(7, rows=order)
    torch.testing.assert_close(mixed(both, tokens, features[:, order]).content, before.content[:, order])


@with_features
def test_a_query_hears_its_own_features_alone(mixture_input: Any) -> None:
    queries = make(mixture_input)
    tokens, features = torch.randn(2, TOKENS, DIM), torch.randn(2, 7, DIM, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixed(queries, tokens, features).content[1, 4].square().sum(), features)
    heard = gradient.abs().amax(-1) > 0
    assert heard.nonzero().tolist() == [[1, 4]]


def test_from_features_alone_the_image_does_not_matter() -> None:
    queries, features = make("query"), torch.randn(1, 7, DIM)
    expected = mixed(queries, torch.randn(1, TOKENS, DIM), features)
    found = queries(torch.full((1, 5, DIM), math.nan), [(1, 5)], query_features=features)
    assert torch.equal(found.content, expected.content)


def test_features_move_the_logits_by_the_same_amount_whatever_the_image_says() -> None:
    queries, tokens = make("both"), torch.randn(2, TOKENS, DIM)
    one, other = torch.randn(2, 1, 7, DIM).expand(-1, 2, -1, -1)
    moved = centred(mixed(queries, tokens, one).weights) - centred(mixed(queries, tokens, other).weights)
    torch.testing.assert_close(moved[0], moved[1], atol=1e-4, rtol=0)
    assert moved.abs().amax() > 0.1
    assert queries.query_head is not None
    torch.nn.init.zeros_(queries.query_head[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(queries.query_head[-1].bias)  # type: ignore[arg-type]
    paper = make("image")
    paper.load_state_dict({k: v for k, v in queries.state_dict().items() if not k.startswith("query_head")})
    assert torch.equal(mixed(queries, tokens, one).content, mixed(paper, tokens, None).content)


@with_features
def test_padding_does_not_matter(mixture_input: Any) -> None:
    queries, features = make(mixture_input, extractor="fused"), torch.randn(1, 7, DIM)
    levels = [torch.randn(1, *size, DIM) for size in SIZES]
    expected = mixed(queries, torch.cat([x.flatten(1, 2) for x in levels], dim=1), features)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 3, 0, 2), value=math.nan) for x in levels]
    shapes = [(height + 2, width + 3) for height, width in SIZES]
    tokens = torch.cat([x.flatten(1, 2) for x in padded], dim=1)
    found = queries(tokens, shapes, tokens[..., 0].isnan(), query_features=features)
    torch.testing.assert_close(found.content, expected.content, atol=1e-5, rtol=0)


@with_features
def test_half_precision(mixture_input: Any) -> None:
    queries = make(mixture_input)
    tokens, features = torch.randn(2, TOKENS, DIM), torch.randn(2, 7, DIM)
    expected = mixed(queries, tokens, features)
    found = mixed(queries.bfloat16(), tokens.bfloat16(), features.bfloat16())
    assert found.weights is not None and expected.weights is not None
    assert found.content.dtype == torch.bfloat16 and found.weights.dtype == torch.float32
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 7))
    torch.testing.assert_close(found.weights, expected.weights, atol=0.1, rtol=0)


# --- sizes, and the start


@pytest.mark.parametrize("count", [1, 7, 40])
def test_any_number_of_queries(count: int) -> None:
    queries, tokens = make("query"), torch.randn(2, TOKENS, DIM)
    features = torch.randn(2, max(count, 7), DIM)
    before = mixed(queries, tokens, features)
    torch.testing.assert_close(mixed(queries, tokens, features[:, :count]).content, before.content[:, :count])
    parameters = dict(queries.named_parameters())
    queries.resize(count)
    assert queries.num_queries == count
    assert all(parameters[name] is parameter for name, parameter in queries.named_parameters())


def test_its_size_does_not_depend_on_the_number_of_queries() -> None:
    """What docs/plugin.md says it costs at d = 256, m = 64: d d + 3 d + d m + m beside the patterns, and n d (d + m)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        small, large = (PatternQueries(n, 64, 256, mixture_input="query") for n in (1, 900))
        for queries in (small, large):
            total = sum(parameter.numel() for parameter in queries.parameters())
            assert total - 64 * 256 == 256 * 256 + 3 * 256 + 256 * 64 + 64 == 82_752
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert large.query_head is not None
            large.query_head(torch.zeros(1, 900, 256))
    assert counter.get_total_flops() // 2 == 900 * 256 * (256 + 64) == 73_728_000


def test_resizing_keeps_the_rows_of_the_images_half() -> None:
    queries, tokens, features = make("both"), torch.randn(1, TOKENS, DIM), torch.randn(1, 7, DIM)
    before = mixed(queries, tokens, features)
    rows = queries.resize(3)
    torch.testing.assert_close(mixed(queries, tokens, features[:, rows]).content, before.content[:, rows])


@pytest.mark.parametrize(("bias_std", "gain", "low", "high"), [(2.0, 1.0, 1.4, 2.2), (0.5, 2.0, 0.7, 1.1)])
def test_queries_of_different_features_start_apart(bias_std: float, gain: float, low: float, high: float) -> None:
    """All share one bias, so the weights have to do it: logits spread as they do from the image."""
    torch.manual_seed(0)
    queries = PatternQueries(1, 64, 64, mixture_input="query", bias_std=bias_std, gain=gain)
    weights = queries(torch.zeros(1, 1, 64), [], query_features=torch.randn(1, 500, 64)).weights
    spread = centred(weights).std(1)  # between queries, of every pattern
    assert low < spread.mean() < high


def test_the_plain_start_is_that_of_a_linear_layer() -> None:
    for mixture_input, bias_std in (("query", None), ("both", None), ("both", 2.0)):
        last = make(mixture_input, bias_std=bias_std, gain=3.0).query_head[-1]  # type: ignore[index, arg-type]
        bound = 1 / math.sqrt(DIM)
        assert last.weight.abs().max() <= 3 * bound  # type: ignore[union-attr, operator]
        assert last.weight.std().item() == pytest.approx(3 * bound / math.sqrt(3), rel=0.2)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("mixture_input", "shape", "message"),
    [
        ("query", None, r"asks for query_features \(B, n, d\), and there are none"),
        ("query", (2, 7, 9), r"expected \(2, n, 16\), found \(2, 7, 9\)"),
        ("query", (1, 7, 16), r"expected \(2, n, 16\), found \(1, 7, 16\)"),
        ("query", (7, 16), r"expected \(2, n, 16\), found \(7, 16\)"),
        ("both", (2, 6, 16), r"expected \(2, 7, 16\), found \(2, 6, 16\)"),
        ("sideways", None, "mixture_input: expected 'image', 'query' or 'both', found 'sideways'"),
    ],
)
def test_what_is_refused(mixture_input: Any, shape: tuple[int, ...] | None, message: str) -> None:
    features = None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        mixed(make(mixture_input), torch.zeros(2, TOKENS, DIM), features)
