"""Pattern queries: a mixture, made anew for each image, from tokens of every level and from nothing else."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from plain import Maps, pad_batch
from torch import Tensor

from paqdetr.paq import Mixture, PatternQueries, pattern_diversity_loss

DIM = 16
SIZES = [(6, 8), (3, 4), (2, 2)]
KINDS = {
    f"{extractor}-{head}-{conv}": dict(extractor=extractor, head=head, conv=conv)
    for extractor, head, conv in itertools.product(("fused", "pooled"), ("dense", "factorised"), ("depthwise", "full"))
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str = "fused-dense-depthwise", **changes: Any) -> PatternQueries:
    settings: dict[str, Any] = dict(num_queries=7, num_patterns=5, dim=DIM, num_levels=3, head_rank=3)
    return PatternQueries(**(settings | KINDS[kind] | changes))


def random_image(sizes: list[tuple[int, int]] = SIZES) -> Maps:
    """Each image has a look of its own, as a mean, or pooling would see no difference."""
    look = torch.randn(DIM, 1, 1)
    return [look + torch.randn(DIM, height, width) for height, width in sizes]


def assert_same(found: Mixture, expected: Mixture, rows: slice = slice(None)) -> None:
    assert found.weights is not None and expected.weights is not None
    torch.testing.assert_close(found.content[rows], expected.content, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.weights[rows], expected.weights, atol=1e-5, rtol=0)


# --- a convex mixture


def test_shapes_may_be_a_tensor_and_the_mask_absent() -> None:
    queries = make()
    tokens, shapes, mask = pad_batch([random_image()])
    expected = queries(tokens, shapes, mask)
    assert_same(queries(tokens, torch.tensor(shapes)), expected)
    assert_same(queries(tokens, torch.tensor(shapes), mask, torch.rand(1, 7, 4)), expected)


# --- from the image, from all of it


@every_kind
def test_one_query_teaches_every_pattern_and_every_weight(kind: str) -> None:
    queries = make(kind)
    before = queries(*pad_batch([random_image()])).content
    before[0, 4].square().sum().backward()
    assert queries.patterns.grad is not None
    assert (queries.patterns.grad.abs().amax(1) > 0).all()
    for name, parameter in queries.named_parameters():
        assert parameter.grad is not None, name


def test_one_query_moves_all_others() -> None:
    queries = make()
    inputs = pad_batch([random_image()])
    before = queries(*inputs).content
    (gradient,) = torch.autograd.grad(before[0, 4].square().sum(), queries.patterns)
    with torch.no_grad():
        queries.patterns -= 0.1 * gradient
    assert ((queries(*inputs).content - before).abs().amax(-1) > 1e-5).all()


# --- blind to padding and to batch mates


@pytest.mark.parametrize("extra", [0, 1, 7])
@every_kind
def test_neither_amount_nor_content_of_padding_matters(kind: str, extra: int) -> None:
    queries = make(kind)
    image = random_image()
    tokens, shapes, mask = pad_batch([image])
    assert not mask.any()
    expected = queries(tokens, shapes)
    padded, shapes, mask = pad_batch([image], extra)
    assert_same(queries(padded, shapes, mask), expected)
    garbage = torch.where(mask[..., None], -1e4 * torch.rand_like(padded), padded)
    assert_same(queries(garbage, shapes, mask), expected)
    broken = torch.where(mask[..., None], torch.tensor(math.nan), padded)
    assert_same(queries(broken, shapes, mask), expected)


@every_kind
def test_no_gradient_reaches_the_padding(kind: str) -> None:
    tokens, shapes, mask = pad_batch([random_image()], extra=2)
    tokens.requires_grad_()
    make(kind)(tokens, shapes, mask).content.square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad[mask] == 0).all() and (tokens.grad[~mask] != 0).any()


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kind
def test_half_precision_tokens(kind: str, dtype: torch.dtype) -> None:
    """The weights are mixed in float32: their rows still sum to 1."""
    queries = make(kind)
    inputs = pad_batch([random_image(), random_image([(5, 5), (3, 3), (2, 2)])], extra=3)
    expected = queries(*inputs)
    mix = queries.to(dtype)(inputs[0].to(dtype), *inputs[1:])
    assert mix.weights is not None and expected.weights is not None
    assert mix.content.dtype == dtype and mix.weights.dtype == torch.float32
    torch.testing.assert_close(mix.weights.sum(-1), torch.ones(2, 7))
    torch.testing.assert_close(mix.weights, expected.weights, atol=0.05, rtol=0)


@every_kind
def test_autocast(kind: str) -> None:
    queries = make(kind)
    inputs = pad_batch([random_image(), random_image([(5, 5), (3, 3), (2, 2)])], extra=3)
    expected = queries(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        plain, half = queries(*inputs), queries(inputs[0].bfloat16(), *inputs[1:])
    assert expected.weights is not None
    for mix in (plain, half):
        assert mix.weights is not None and mix.weights.dtype == torch.float32
        torch.testing.assert_close(mix.weights.sum(-1), torch.ones(2, 7))
        torch.testing.assert_close(mix.weights, expected.weights, atol=0.05, rtol=0)
    mix.content.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in queries.parameters())


def test_float64_is_kept() -> None:
    tokens, shapes, mask = pad_batch([random_image()], extra=1)
    mix = make().double()(tokens.double(), shapes, mask)
    assert mix.weights is not None and mix.weights.dtype == mix.content.dtype == torch.float64


# --- heads and settings


def head_parameters(**settings: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in PatternQueries(**settings).head.parameters())


def test_the_factorised_head_is_a_fraction_of_the_dense_one() -> None:
    # n = 900, m = 64, d = 256: dense 256 * 57,600 weights and as many biases as logits. Factorised of rank 32: a table
    # 900 * 32, factors 256 * 2,048 + 2,048, biases 57,600.
    sizes: dict[str, Any] = dict(num_queries=900, num_patterns=64, dim=256)
    assert head_parameters(**sizes) == 256 * 57_600 + 57_600 == 14_803_200
    small = head_parameters(**sizes, head="factorised")
    assert small == 900 * 32 + 256 * 2_048 + 2_048 + 57_600 == 612_736
    assert head_parameters(num_queries=900, num_patterns=150, dim=256) == 34_695_000


def test_full_convolutions_cost_more() -> None:
    def extractor_parameters(conv: Any) -> int:
        return sum(p.numel() for p in make(conv=conv).extractor.parameters())

    per_level = 9 * DIM * DIM - 9 * DIM
    assert extractor_parameters("full") - extractor_parameters("depthwise") == 3 * per_level


def test_the_factorised_head_has_at_most_its_rank() -> None:
    queries = make("pooled-factorised-full", num_queries=20, num_patterns=10)
    tokens, shapes, _ = pad_batch([random_image()])
    logits = queries(tokens, shapes).weights.log()[0]  # up to a constant a row
    logits = logits - queries.head.bias
    centred = logits - logits.mean(1, keepdim=True)
    assert torch.linalg.matrix_rank(centred, atol=1e-4) == 3


@pytest.mark.parametrize("head", ["dense", "factorised"])
def test_bias_std_spreads_the_logits(head: Any) -> None:
    def bias_of(bias_std: float | None) -> Tensor:
        queries = make(num_queries=200, num_patterns=30, head=head, bias_std=bias_std)
        return (queries.head.linear.bias if head == "dense" else queries.head.bias).detach()

    assert bias_of(2.0).std().item() == pytest.approx(2.0, rel=0.05)
    assert bias_of(0.5).std().item() == pytest.approx(0.5, rel=0.05)
    assert (bias_of(0.0) == 0).all()
    bound = 1 / math.sqrt(DIM)  # torch's own: uniform in +- 1 / sqrt(d)
    assert bias_of(None).abs().max().item() == pytest.approx(bound, rel=0.01)
    assert bias_of(None).std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def mean_cosine(content: Tensor) -> float:
    unit = torch.nn.functional.normalize(content[0], dim=-1)
    count = unit.shape[0]
    return ((unit @ unit.T).sum() - count).item() / (count * (count - 1))


@pytest.mark.parametrize("head", ["dense", "factorised"])
def test_a_bias_keeps_queries_apart_at_the_start(head: Any) -> None:
    """Without it all queries start as near copies of the mean pattern."""
    tokens, shapes, _ = pad_batch([random_image()])
    sizes: dict[str, Any] = dict(num_queries=50, num_patterns=32, head=head, head_rank=32)
    plain, spread = (make(**sizes, bias_std=std)(tokens, shapes).content for std in (None, 2.0))
    assert mean_cosine(spread) < 0.5 < 0.7 < mean_cosine(plain)


@every_kind
def test_gain_scales_how_much_the_image_counts(kind: str) -> None:
    """The spread of the logits between two images grows in proportion."""
    inputs = pad_batch([random_image(), random_image()])

    def difference(gain: float) -> Tensor:
        torch.manual_seed(1)
        # From log weights, free of the rows' normalisers.
        logits = make(kind, gain=gain, bias_std=0.0)(*inputs).weights.log()
        logits = logits - logits.mean(-1, keepdim=True)
        return (logits[0] - logits[1]).detach()

    torch.testing.assert_close(difference(3.0), 3 * difference(1.0), atol=1e-4, rtol=1e-3)


@every_kind
def test_temperature_divides_the_logits(kind: str) -> None:
    inputs = pad_batch([random_image()])

    def weights(temperature: float) -> Tensor:
        torch.manual_seed(1)
        return make(kind, temperature=temperature)(*inputs).weights.detach()

    base = weights(1.0)
    for temperature in (0.5, 4.0):
        torch.testing.assert_close(weights(temperature), (base.log() / temperature).softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("std", [0.0, 0.02, 1.0])
def test_pattern_std(std: float) -> None:
    queries = make(num_patterns=100, pattern_dim=200, pattern_std=std)
    assert queries.patterns.std().item() == pytest.approx(std, rel=0.03)
    content = queries(*pad_batch([random_image()])[:2]).content
    assert content.abs().max() <= queries.patterns.abs().max() + 1e-6


# --- another number of queries


@every_kind
def test_fewer_ranked_queries_are_the_first_ones(kind: str) -> None:
    assert make(kind).resize(3, ranked=True).tolist() == [0, 1, 2] != make(kind).resize(3).tolist()


@every_kind
def test_resize_makes_what_a_new_module_of_that_size_has(kind: str) -> None:
    """Names, shapes and gradients, so that a resized module saves and loads as any other."""
    queries, fresh, inputs = make(kind), make(kind, num_queries=12), pad_batch([random_image()])
    queries.resize(12)
    fresh.load_state_dict(queries.state_dict())
    assert_same(fresh(*inputs), queries(*inputs))
    queries(*inputs).content.square().sum().backward()
    for name, parameter in queries.named_parameters():
        assert parameter.is_leaf and parameter.grad is not None, name


@pytest.mark.parametrize("head", ["dense", "factorised"])
def test_resize_takes_the_rows_it_is_given_and_keeps_what_is_frozen(head: Any) -> None:
    queries, inputs = make(head=head).double(), pad_batch([random_image()])
    queries.head.requires_grad_(False)
    tokens = inputs[0].double()
    before = queries(tokens, *inputs[1:]).content
    rows = torch.tensor([6, 0, 0, 2])
    assert queries.resize(4, rows=rows) is rows
    torch.testing.assert_close(queries(tokens, *inputs[1:]).content, before[:, rows])
    assert not any(parameter.requires_grad for parameter in queries.head.parameters())
    assert all(parameter.dtype == torch.float64 for parameter in queries.parameters())


@pytest.mark.parametrize(
    ("count", "rows", "message"),
    [
        (0, None, "num_queries: expected at least 1, found 0"),
        (2, torch.tensor([0]), r"rows: expected \(2,\) int64, found \(1,\)"),
        (2, torch.tensor([0.0, 1.0]), "int64, found .*float32"),
        (2, torch.tensor([0, 7]), r"rows: expected indices in \[0, 7\), found 0 to 7"),
        (2, torch.tensor([-1, 3]), r"found -1 to 3"),
    ],
)
def test_resize_says_what_is_wrong(count: int, rows: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().resize(count, rows=rows)


def test_the_public_signature_stays() -> None:
    parameters = inspect.signature(PatternQueries).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    expected = dict(
        num_patterns=64,
        dim=256,
        num_levels=4,
        extractor="fused",
        head="dense",
        pattern_dim=None,
        temperature=1.0,
        gain=1.0,
        bias_std=2.0,
        pattern_std=1.0,
    )
    assert list(defaults)[:11] == ["num_queries", *expected]
    assert expected.items() <= defaults.items()


def test_the_patterns_owe_their_diversity() -> None:
    queries = make()
    owed = queries.aux_losses()
    assert list(owed) == ["diversity"]
    assert owed["diversity"].item() == pattern_diversity_loss(queries.patterns).item()
    owed["diversity"].backward()
    assert [name for name, p in queries.named_parameters() if p.grad is not None] == ["patterns"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_patterns", 1),
        ("extractor", "fussed"),
        ("head", "sparse"),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("num_queries", 0),
        ("num_levels", 0),
        ("head_rank", 0),
        ("conv", "dense"),
    ],
)
def test_wrong_settings(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}: expected.*found {value!r}"):
        make(**{setting: value})


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((2, 64, DIM + 1), SIZES, r"tokens: expected \(B, S, 16\), found \(2, 64, 17\)"),
        ((64, DIM), SIZES, r"tokens: expected \(B, S, 16\), found \(64, 16\)"),
        ((2, 60, DIM), SIZES[:2], r"expected 3 levels with 60 tokens in all, found \[\(6, 8\), \(3, 4\)\] with 60"),
        ((2, 63, DIM), SIZES, r"expected 3 levels with 63 tokens in all, found .* with 64"),
    ],
)
def test_tokens_of_another_model(shape: tuple[int, ...], sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(shape), sizes)


def alike_images(count: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Tokens of images that share nearly everything: (B, S, d)."""
    shared, own = torch.randn(1, 1, DIM), 0.05 * torch.randn(count, 1, DIM)
    sizes = sum(height * width for height, width in SIZES)
    return shared + own + 0.01 * torch.randn(count, sizes, DIM), SIZES


@pytest.mark.parametrize("head", ["dense", "factorised"])
def test_a_normalized_summary_tells_alike_images_apart(head: str) -> None:
    torch.manual_seed(0)
    tokens, shapes = alike_images(64)

    def moved(normalize: bool) -> float:
        """How far mixtures of different images are from one another."""
        torch.manual_seed(1)
        model = make(f"pooled-{head}-depthwise", normalize_summary=normalize)
        for first in range(0, 64, 4):
            model(tokens[first : first + 4], shapes)
        weights = model.eval()(tokens, shapes).weights
        assert weights is not None
        return float(weights.detach().std(0).mean())

    assert moved(True) > 5 * moved(False)


def test_a_normalized_summary_is_of_past_images_alone() -> None:
    torch.manual_seed(0)
    tokens, shapes = alike_images(12)
    model = make("pooled-dense-depthwise", normalize_summary=True)
    seen = []
    model.extractor.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    first = model(tokens[:4], shapes)  # nothing is known yet: as it is
    torch.testing.assert_close(model.summary_norm.mean, seen[0].mean(0))
    torch.testing.assert_close(model.summary_norm.variance, seen[0].var(0, unbiased=False))
    plain = make("pooled-dense-depthwise")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("summary_norm")})
    torch.testing.assert_close(first.content, plain(tokens[:4], shapes).content, atol=1e-4, rtol=1e-4)
    # In training as in use, whoever else is in the batch; and use changes nothing.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = model.eval()(tokens[4:5], shapes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_same(model.train()(tokens[4:8], shapes), alone, slice(0, 1))
    torch.testing.assert_close(model.summary_norm.mean, (seen[0].mean(0) + seen[-1].mean(0)) / 2)
    # Gradients reach what makes the summary.
    content = model(tokens[8:], shapes).content
    content.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.extractor.parameters())


def test_by_default_and_in_the_paper_the_summary_is_as_it_is() -> None:
    assert not [name for name, _ in make().named_buffers()]
