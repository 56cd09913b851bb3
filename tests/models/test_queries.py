from __future__ import annotations

import pytest
import torch

from paqdetr.models.queries import QuerySource, StaticQueries
from paqdetr.paq import PatternQueries


def test_every_image_gets_the_same_table() -> None:
    queries = StaticQueries(num_queries=4, dim=8)
    mixture = queries(torch.randn(3, 10, 8), [(2, 5)])
    assert mixture.weights is None
    assert mixture.content.shape == (3, 4, 8)
    for image in mixture.content:
        assert torch.equal(image, queries.table)
    assert queries.aux_losses() == {}


@pytest.mark.parametrize("std", [0.0, 0.02, 1.0])
def test_initial_spread(std: float) -> None:
    table = StaticQueries(num_queries=200, dim=64, std=std).table.detach()
    assert float(table.std()) == pytest.approx(std, rel=0.05)
    assert float(table.mean()) == pytest.approx(0, abs=0.05 * std + 1e-9)


def test_gradients_of_all_images_add_up() -> None:
    queries = StaticQueries(num_queries=4, dim=8)
    queries(torch.randn(3, 10, 8), [(2, 5)]).content.sum().backward()
    assert queries.table.grad is not None and (queries.table.grad == 3).all()


def test_both_sources_follow_the_protocol() -> None:
    assert isinstance(StaticQueries(num_queries=4, dim=8), QuerySource)
    assert isinstance(PatternQueries(num_queries=4, num_patterns=3, dim=8, num_levels=1), QuerySource)
