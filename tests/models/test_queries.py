from __future__ import annotations

import pytest
import torch

from paqdetr.models.denoising import DenoisingQueries
from paqdetr.models.queries import QueryGroup, StaticQueries, attention_mask


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


def test_xavier_start() -> None:
    table = StaticQueries(num_queries=900, dim=256, std=None).table.detach()
    bound = (6 / (900 + 256)) ** 0.5
    assert float(table.abs().max()) <= bound and float(table.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_groups_are_joined_in_order() -> None:
    groups = [QueryGroup(torch.full((1, n, 2), float(n)), torch.full((1, n, 4), float(n))) for n in (2, 3)]
    joined = QueryGroup.join(groups)
    assert len(joined) == 5 and joined.position is None
    assert joined.content[0, :, 0].tolist() == joined.reference[0, :, 0].tolist() == [2, 2, 3, 3, 3]


def test_who_may_look_at_whom() -> None:
    cpu = torch.device("cpu")
    assert attention_mask(None, 3, [], cpu) is None
    copies = DenoisingQueries(torch.zeros(1, 2, 1), torch.zeros(1, 2, 4), groups=2, boxes=1, kinds=1)
    rows = {
        (True, ()): [".x..", "x...", "xx..", "xx.."],
        (False, (1,)): ["..x", "..x", "xx."],
        # copy, copy, matching, matching, hybrid
        (True, (1,)): [".x..x", "x...x", "xx..x", "xx..x", "xxxx."],
        # matching, two of one head, one of another
        (False, (2, 1)): ["..xxx", "..xxx", "xx..x", "xx..x", "xxxx."],
    }
    for (denoising, further), expected in rows.items():
        mask = attention_mask(copies if denoising else None, 2, further, cpu)
        assert mask is not None
        assert mask.tolist() == [[cell == "x" for cell in row] for row in expected]
