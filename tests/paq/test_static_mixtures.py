"""The ablation between a table of queries and pattern queries: shared patterns, weights that no image changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paqdetr.paq import StaticMixtures


def make(**changes: Any) -> StaticMixtures:
    return StaticMixtures(**(dict(num_queries=6, num_patterns=4, dim=8) | changes))


def test_a_convex_mixture_that_is_the_same_for_every_image() -> None:
    source = make()
    mix = source(torch.randn(3, 5, 8), [(1, 5)])
    assert mix.weights is not None and mix.content.shape == (3, 6, 8) and mix.weights.shape == (3, 6, 4)
    torch.testing.assert_close(mix.weights.sum(-1), torch.ones(3, 6))
    assert torch.equal(mix.content[0], mix.content[2])
    torch.testing.assert_close(mix.content[1], source.logits.softmax(-1) @ source.patterns)


def test_one_query_teaches_all_patterns_and_its_own_weights_alone() -> None:
    source = make()
    source(torch.zeros(1, 5, 8), [(1, 5)]).content[0, 2].square().sum().backward()
    assert source.patterns.grad is not None and source.logits.grad is not None
    assert (source.patterns.grad.abs().amax(1) > 0).all()
    assert source.logits.grad.abs().amax(1).nonzero().flatten().tolist() == [2]


def test_settings_of_the_start() -> None:
    wide: dict[str, Any] = dict(num_queries=200, num_patterns=50, dim=100)
    assert make(**wide).logits.std().item() == pytest.approx(2, rel=0.05)
    assert make(**wide, bias_std=None).logits.abs().max().item() == pytest.approx(0.1, rel=0.01)
    assert make(**wide, pattern_std=0.02).patterns.std().item() == pytest.approx(0.02, rel=0.05)
    cold, warm = make(bias_std=0.0, temperature=0.5), make(bias_std=0.0)
    with torch.no_grad():
        for source in (cold, warm):
            source.logits[:] = torch.arange(4.0)
    tokens = torch.zeros(1, 5, 8)
    torch.testing.assert_close(cold(tokens, []).weights, (2 * warm.logits).softmax(-1)[None], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    mix = make().to(dtype)(torch.zeros(2, 5, 8, dtype=dtype), [(1, 5)])
    assert mix.weights is not None and mix.weights.dtype == torch.float32 and mix.content.dtype == dtype
    torch.testing.assert_close(mix.weights.sum(-1), torch.ones(2, 6))


def test_resize() -> None:
    source = make()
    before = source.logits.detach().clone()
    assert source.resize(3).tolist() == [0, 2, 4]
    assert source.num_queries == 3 and torch.equal(source.logits, before[[0, 2, 4]])
    source.resize(5, rows=torch.tensor([2, 2, 1, 0, 0]))
    assert torch.equal(source.logits, before[[4, 4, 2, 0, 0]]) and source.logits.is_leaf
    with pytest.raises(ValueError, match="num_queries"):
        source.resize(0)


def test_the_patterns_owe_their_diversity() -> None:
    source = make()
    source.aux_losses()["diversity"].backward()
    assert source.patterns.grad is not None and source.logits.grad is None


@pytest.mark.parametrize(("setting", "value"), [("num_patterns", 1), ("temperature", 0.0), ("num_queries", 0)])
def test_wrong_settings(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}: expected.*found {value!r}"):
        make(**{setting: value})
