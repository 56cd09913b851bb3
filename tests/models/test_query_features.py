"""What each query looks at, and detectors whose content is computed from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paqdetr.config import load_config
from paqdetr.errors import ConfigError
from paqdetr.models.files import resize_queries
from paqdetr.models.proposals import QueryInit, query_features
from paqdetr.models.queries import FeatureQueries, QuerySource

TWO_STAGE = ["paq_dino_r50", "paq_deformable_detr_r50", "paq_hybrid_deformable_detr_r50"]
FORMS: dict[str, dict[str, Any]] = {
    "query": {"model.mixture_input": "query"},
    "query_residual": {"model.mixture_input": "query", "model.mixture": "residual"},
    "features": {"model.queries": "features"},
}


def slow_reading(levels: list[Tensor], x: float, y: float) -> Tensor:
    """Mean over the levels (d, h, w) of a bilinear reading at (x, y) in [0, 1] of the valid map, zero outside."""
    found = []
    for level in levels:
        _, height, width = level.shape
        column, row = x * width - 0.5, y * height - 0.5
        total = torch.zeros(len(level))
        for r in range(height):
            for c in range(width):
                total += level[:, r, c] * max(0.0, 1 - abs(r - row)) * max(0.0, 1 - abs(c - column))
        found.append(total)
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("wide", [2, 4])
def test_memory_at_a_point_equals_a_plain_loop(padding: int, wide: int, make_tokens: Callable) -> None:
    levels = [torch.randn(2, 8, 5, 7), torch.randn(2, 8, 3, 4), torch.randn(2, 8, 1, 1)]
    memory = make_tokens(levels, padding)
    reference = torch.rand(2, 6, wide)
    reference[0, 0, :2] = torch.tensor([1 / 14, 0.1])  # the centre of the first cell of the finest level
    reference[0, 1, :2] = torch.tensor([1.0, 1.0])  # the corner of the valid part: beyond it is zero, padded or not
    found = query_features(QueryInit(reference=reference), memory, num_heads=2)
    for image in range(2):
        for i in range(6):
            x, y = reference[image, i, :2].tolist()
            expected = slow_reading([level[image] for level in levels], x, y)
            torch.testing.assert_close(found[image, i], expected, atol=1e-5, rtol=0)


def test_the_gradient_reaches_the_memory_and_not_the_points(make_tokens: Callable) -> None:
    memory = make_tokens([torch.randn(1, 8, 5, 7)])
    values, reference = memory.values.requires_grad_(), torch.full((1, 1, 2), 0.5, requires_grad=True)
    features = query_features(QueryInit(reference=reference), memory.with_values(values), num_heads=4)
    to_values, to_points = torch.autograd.grad(features.sum(), [values, reference], allow_unused=True)
    assert to_values.abs().sum() == pytest.approx(8, rel=1e-5) and to_points is None


def test_content_of_features_without_patterns() -> None:
    source = FeatureQueries(dim=8, content_dim=7)
    assert isinstance(source, QuerySource) and source.aux_losses() == {}
    features = 3 + 5 * torch.randn(2, 4, 8)
    found = source(torch.zeros(2, 1, 8), [(1, 1)], query_features=features)
    unit = (features - features.mean(-1, keepdim=True)) / features.var(-1, correction=0, keepdim=True).sqrt()
    assert found.weights is None
    torch.testing.assert_close(found.content, unit @ source.linear.weight.T + source.linear.bias)


# --- in every kind of host


@torch.no_grad()
@pytest.mark.parametrize("name", TWO_STAGE)
def test_content_belongs_to_the_proposal_and_not_to_its_rank(
    name: str, tiny_model: Callable, make_tokens: Callable, stir: Callable
) -> None:
    """The same tokens in another order, as other scores would rank them, get the same content."""
    model = tiny_model(name, **FORMS["query"]).eval()
    stir(model.start)
    features = make_tokens([torch.randn(1, 32, *size) for size in [(11, 9), (6, 5), (3, 3), (2, 2)]])
    before = model.detect(features)
    stir(model.start.head.class_head)
    after = model.detect(features)
    assert before.proposals is not None and after.proposals is not None
    one = dict(zip(before.proposals.indices[0].tolist(), before.mixture.content[0], strict=True))
    other = dict(zip(after.proposals.indices[0].tolist(), after.mixture.content[0], strict=True))
    common = sorted(one.keys() & other.keys())
    assert common and before.proposals.indices.tolist() != after.proposals.indices.tolist()
    for token in common:
        torch.testing.assert_close(one[token], other[token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["paq_dino_r50", "paq_dn_detr_r50"])
@pytest.mark.parametrize("form", ["query", "features"])
@pytest.mark.parametrize("detach", [True, False])
def test_detached_features_send_no_gradient_to_the_encoder(
    name: str, form: str, detach: bool, tiny_model: Callable
) -> None:
    model = tiny_model(name, **FORMS[form], **{"model.detach_query_features": detach}).train()
    content = model(torch.randn(1, 3, 64, 64)).mixture.content
    content.square().sum().backward()
    assert all(p.grad is not None for p in model.query_source.parameters())
    assert any(p.grad is not None for p in model.encoder.parameters()) is not detach
    if model.config.positions == "anchors":
        assert model.start.boxes.grad is None


@torch.no_grad()
@pytest.mark.parametrize("form", ["query", "query_residual"])
def test_other_numbers_of_queries(form: str, tiny_model: Callable, stir: Callable) -> None:
    model = tiny_model("paq_dino_r50", **FORMS[form]).eval()
    stir(model)
    features = model.extract(torch.randn(1, 3, 96, 96))
    expected = model.detect(features).mixture.content
    for count in (8, 27):
        other, _ = resize_queries(model, count)
        kept = min(count, 20)
        found = other.detect(features).mixture.content
        assert found.shape[1] == count
        torch.testing.assert_close(found[:, :kept], expected[:, :kept], atol=1e-5, rtol=0)
        if form == "query":  # no tensor of the source has a row for each query
            own = {key: value.shape for key, value in model.query_source.state_dict().items()}
            assert own == {key: value.shape for key, value in other.query_source.state_dict().items()}


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="mixture=residual needs queries=patterns, static_mixture or features"):
        load_config("dino_nano", {"model.mixture": "residual"})
    with pytest.raises(ConfigError, match=r"model\.mixture_input"):
        load_config("paq_dino_nano", {"model.mixture_input": "queries"})
