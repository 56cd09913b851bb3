from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from paqdetr.models.encoder import DeformableAttention
from paqdetr.models.tokens import Neck, Tokens, downsample_mask
from paqdetr.paq import PatternQueries


def test_layout_is_level_after_level_row_by_row() -> None:
    fine = torch.arange(24.0).view(1, 4, 2, 3)
    coarse = 100 + torch.arange(4.0).view(1, 4, 1, 1)
    tokens = Tokens.from_maps([fine, coarse], None, temperature=20)
    assert tokens.spatial_shapes == [(2, 3), (1, 1)]
    assert tokens.values.shape == (1, 7, 4)
    assert tokens.values[0, 0].tolist() == [0, 6, 12, 18]
    assert tokens.values[0, 4].tolist() == [4, 10, 16, 22]  # second row, second column
    assert tokens.values[0, 6].tolist() == [100, 101, 102, 103]
    assert tokens.level_index.tolist() == [0] * 6 + [1]
    assert tokens.padding_mask is None
    assert tokens.valid_ratios.tolist() == [[[1, 1], [1, 1]]]
    expected = [[1 / 6, 1 / 4], [3 / 6, 1 / 4], [5 / 6, 1 / 4], [1 / 6, 3 / 4], [3 / 6, 3 / 4], [5 / 6, 3 / 4]]
    assert tokens.centers[0].flatten().tolist() == pytest.approx([v for xy in expected for v in xy] + [0.5, 0.5])


def test_padding_by_hand() -> None:
    image_mask = torch.zeros(2, 4, 8, dtype=torch.bool)
    image_mask[1, 2:] = True
    image_mask[1, :, 4:] = True  # the second image is 2 x 4 of 4 x 8 pixels
    maps = [torch.zeros(2, 4, 2, 4), torch.zeros(2, 4, 1, 2)]
    tokens = Tokens.from_maps(maps, image_mask, temperature=20)
    assert tokens.padding_mask is not None
    assert not tokens.padding_mask[0].any()
    # The first row has two valid cells; the coarse level one.
    assert tokens.padding_mask[1].tolist() == [False, False, True, True] + [True] * 4 + [False, True]
    assert tokens.valid_ratios[1].tolist() == [[0.5, 0.5], [0.5, 1.0]]
    # In units of the image alone: the first two cells lie at a quarter and three quarters of its width.
    assert tokens.centers[1, :4].tolist() == [[0.25, 0.5], [0.75, 0.5], [1.25, 0.5], [1.75, 0.5]]
    assert tokens.centers[1, 8].tolist() == [0.5, 0.5]


def test_a_mask_without_padding_counts_as_none() -> None:
    tokens = Tokens.from_maps([torch.zeros(1, 4, 2, 2)], torch.zeros(1, 8, 8, dtype=torch.bool), temperature=20)
    assert tokens.padding_mask is None


def test_no_device_is_waited_for_to_look_for_padding() -> None:
    with FakeTensorMode():
        maps, mask = [torch.zeros(1, 4, 2, 2, device="cuda")], torch.zeros(1, 8, 8, device="cuda").bool()
        tokens = Tokens.from_maps(maps, mask, temperature=20)
    assert tokens.padding_mask is not None and tokens.padding_mask.shape == (1, 4)


def test_a_mask_without_padding_that_is_kept_changes_nothing() -> None:
    """As on a device, where nobody looks whether it is empty."""
    torch.manual_seed(0)
    values, shapes = torch.randn(2, 6 * 4 + 3 * 2, 8), [(6, 4), (3, 2)]
    empty = [torch.zeros(2, *shape, dtype=torch.bool) for shape in shapes]
    kept, none = (Tokens.from_values(values, shapes, masks, temperature=20) for masks in (empty, None))
    for name in ("values", "centers", "valid_ratios"):
        assert torch.equal(getattr(kept, name), getattr(none, name)), name
    assert none.position.shape == (1, 30, 8) and torch.equal(kept.position, none.position.expand(2, -1, -1))
    torch.manual_seed(1)
    queries = PatternQueries(num_queries=5, num_patterns=3, dim=8, num_levels=2).eval()
    attention = DeformableAttention(dim=8, num_heads=2, num_levels=2, num_points=2)
    reference = torch.rand(2, 5, 2, 4)
    for call in (
        lambda tokens: queries(tokens.values, tokens.spatial_shapes, tokens.padding_mask).content,
        lambda tokens: attention(values[:, :5], reference, tokens.values, shapes, tokens.padding_mask),
    ):
        torch.testing.assert_close(call(kept), call(none))


def test_with_values_changes_nothing_else() -> None:
    tokens = Tokens.from_maps([torch.zeros(1, 4, 2, 2)], None, temperature=20)
    changed = tokens.with_values(torch.ones(1, 4, 4))
    assert changed.values.sum() == 16
    assert changed.centers is tokens.centers
    assert tokens.values.sum() == 0


@pytest.mark.parametrize("width", [1, 3, 50, 167])
def test_centers_are_the_same_to_the_last_bit_whatever_the_padding(width: int, make_tokens: Callable) -> None:
    # 50 cells are the case that matters: the first centre is exactly the 0.01 below which a token proposes nothing.
    level = torch.zeros(1, 4, 2, width)
    expected = make_tokens([level]).centers
    for padding in range(1, 30):
        tokens = make_tokens([level], padding)
        assert torch.equal(tokens.centers[~tokens.padding_mask][None], expected)


def test_mask_takes_the_nearest_pixel() -> None:
    mask = torch.rand(1, 37, 53) > 0.5
    small = downsample_mask(mask, (5, 7))
    assert small.dtype == torch.bool
    for row in range(5):
        for column in range(7):
            assert small[0, row, column] == mask[0, row * 37 // 5, column * 53 // 7]


@pytest.mark.parametrize("dim", [32, 24])
def test_neck_shapes(dim: int) -> None:
    neck = Neck(in_channels=(8, 16, 32), dim=dim, num_levels=5)
    maps = [torch.randn(2, 8, 16, 20), torch.randn(2, 16, 8, 10), torch.randn(2, 32, 4, 5)]
    shapes = [tuple(x.shape) for x in neck(maps)]
    assert shapes == [(2, dim, 16, 20), (2, dim, 8, 10), (2, dim, 4, 5), (2, dim, 2, 3), (2, dim, 1, 2)]


def test_neck_makes_the_first_extra_level_from_the_backbone_and_the_next_from_the_level() -> None:
    neck = Neck(in_channels=(8, 16), dim=32, num_levels=4)
    first, second = neck.extra
    assert isinstance(first, nn.Sequential) and isinstance(second, nn.Sequential)
    assert first[0].in_channels == 16  # type: ignore[union-attr]
    assert second[0].in_channels == 32  # type: ignore[union-attr]
    maps = [torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)]
    levels = neck(maps)
    assert torch.equal(levels[2], first(maps[1]))
    assert torch.equal(levels[3], second(levels[2]))


def test_every_level_is_normed() -> None:
    levels = Neck(in_channels=(8,), dim=32, num_levels=2)([100 + 50 * torch.randn(1, 8, 12, 12)])
    for level in levels:
        groups = level.view(8, -1)  # of four channels
        assert groups.mean(1).abs().max() < 1e-5
        assert (groups.std(1, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize(("dim", "groups"), [(256, 32), (128, 32), (64, 16), (32, 8), (24, 4), (9, 1)])
def test_groups_of_the_norm(dim: int, groups: int) -> None:
    neck = Neck(in_channels=(8,), dim=dim, num_levels=2)
    assert [part.num_groups for part in neck.modules() if isinstance(part, nn.GroupNorm)] == [groups] * 2


def test_a_level_of_one_cell_still_says_something() -> None:
    neck = Neck(in_channels=(8,), dim=32, num_levels=1)
    one, other = neck([torch.randn(1, 8, 1, 1)])[0], neck([torch.randn(1, 8, 1, 1)])[0]
    assert (one - other).abs().max() > 0.1


def test_neck_without_extra_levels() -> None:
    neck = Neck(in_channels=(8, 16, 32), dim=32, num_levels=3)
    assert len(neck.extra) == 0


@torch.no_grad()
def test_masked_neck_gives_the_levels_of_the_maps_without_padding() -> None:
    neck = Neck(in_channels=(8, 16), dim=32, num_levels=4, masked_norm=True)
    sizes, padded_sizes = [(8, 12), (4, 6)], [(16, 20), (8, 10)]  # of 64 x 96 pixels, in 128 x 160
    maps = [torch.randn(1, c, *size) for c, size in zip((8, 16), sizes, strict=True)]
    padded = [100 * torch.randn(1, x.shape[1], *size) for x, size in zip(maps, padded_sizes, strict=True)]
    for x, wide in zip(maps, padded, strict=True):
        wide[..., : x.shape[2], : x.shape[3]] = x
    mask = torch.ones(1, 128, 160, dtype=torch.bool)
    mask[:, :64, :96] = False
    for found, expected in zip(neck(padded, mask), neck(maps), strict=True):
        height, width = expected.shape[2:]
        assert (found[..., :height, :width] - expected).abs().max() < 1e-5
        assert not found[..., height:, :].any() and not found[..., width:].any()
    plain = Neck(in_channels=(8, 16), dim=32, num_levels=4)
    plain.load_state_dict(neck.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain(maps), neck(maps), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain(padded, mask), plain(padded), strict=True))
