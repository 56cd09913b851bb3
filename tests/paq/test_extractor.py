"""F_w's extractors against a plainly written reference on cropped maps, and their norm against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain import Maps, pad_batch
from torch import Tensor, nn
from torch.autograd import gradcheck

from paqdetr.paq.extractor import FusedExtractor, MaskedGroupNorm, PooledExtractor, _enlarge


def random_image(sizes: list[tuple[int, int]], dim: int = 16, dtype=torch.float64) -> Maps:
    return [torch.randn(dim, height, width, dtype=dtype) for height, width in sizes]


def slow_fused(extractor: FusedExtractor, image: Maps) -> Tensor:
    """The fused extractor of one image without padding, written out."""
    levels = []
    for branch, x in zip(extractor.levels, image, strict=True):
        point, context, norm = branch.point, branch.context, branch.norm
        x = F.conv2d(x[None], point.weight, point.bias)
        x = F.conv2d(x, context.weight, padding=context.dilation, dilation=context.dilation, groups=context.groups)
        levels.append(F.relu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)))
    fused = levels.pop()
    for attention in extractor.attention:
        if levels:
            x = levels.pop()
            fused = x + F.interpolate(fused, size=x.shape[-2:], mode="bilinear", align_corners=False)
        squeeze = [F.adaptive_avg_pool2d(fused, 1), F.adaptive_max_pool2d(fused, 1)]
        channel = torch.sigmoid(attention.channel(squeeze[0]) + attention.channel(squeeze[1])) * fused
        places = torch.stack([channel.mean(1), channel.max(1).values], dim=1)
        fused = fused + channel * torch.sigmoid(attention.spatial(places))
    assert not levels
    return fused.mean((2, 3))[0]


SIZES = {
    "three levels": [(9, 12), (5, 6), (3, 3)],
    "odd": [(7, 3), (2, 5)],
    "ends in 1x1": [(3, 4), (2, 2), (1, 1)],
    "one level": [(4, 6)],
}


@pytest.mark.parametrize("conv", ["depthwise", "full"])
@pytest.mark.parametrize("name", SIZES)
def test_fused_equals_the_plain_reference(name: str, conv: str) -> None:
    sizes = SIZES[name]
    extractor = FusedExtractor(dim=16, num_levels=len(sizes), conv=conv).double()
    image = random_image(sizes)
    tokens, shapes, mask = pad_batch([image])
    expected = slow_fused(extractor, image)
    assert not mask.any()
    torch.testing.assert_close(extractor(tokens, shapes, None)[0], expected)
    torch.testing.assert_close(extractor(tokens, shapes, mask)[0], expected, atol=1e-6, rtol=0)
    tokens, shapes, mask = pad_batch([image], extra=5)
    torch.testing.assert_close(extractor(tokens, shapes, mask)[0], expected, atol=1e-6, rtol=0)


def test_dilation_doubles_with_each_level() -> None:
    extractor = FusedExtractor(dim=8, num_levels=4, conv="full")
    assert [branch.context.dilation for branch in extractor.levels] == [(1, 1), (2, 2), (4, 4), (8, 8)]
    assert [branch.context.groups for branch in extractor.levels] == [1] * 4
    assert [branch.context.groups for branch in FusedExtractor(dim=8, num_levels=2).levels] == [8, 8]


def test_pooled_equals_the_plain_reference() -> None:
    extractor = PooledExtractor(dim=16).double()
    images = [random_image([(4, 5), (2, 3)]), random_image([(3, 2), (1, 1)])]
    tokens, shapes, mask = pad_batch(images, extra=2)
    found = extractor(tokens, shapes, mask)
    for row, image in zip(found, images, strict=True):
        mean = torch.cat([x.flatten(1) for x in image], dim=1).mean(1)
        torch.testing.assert_close(row, extractor.mlp(mean))
    linears = [layer for layer in extractor.mlp if isinstance(layer, nn.Linear)]
    assert len(linears) == 1  # the second, before the norm, is PatternQueries' own


@pytest.mark.parametrize("extractor", [PooledExtractor(dim=8), FusedExtractor(dim=8, num_levels=2)])
def test_gradients(extractor: nn.Module) -> None:
    tokens, shapes, mask = pad_batch([random_image([(3, 2), (1, 2)], dim=8)], extra=1)
    tokens = (tokens / 10).requires_grad_()
    extractor.double()

    def run(x: Tensor) -> Tensor:
        return extractor(x, shapes, mask)

    assert gradcheck(run, (tokens,))
    (gradient,) = torch.autograd.grad(run(tokens).square().sum(), tokens)
    assert (gradient[mask] == 0).all()


@pytest.mark.parametrize("make", [lambda: PooledExtractor(dim=8), lambda: FusedExtractor(dim=8, num_levels=2)])
def test_an_image_with_no_valid_cell_on_a_level_is_finite(make) -> None:
    tokens, shapes, mask = pad_batch([random_image([(3, 3), (2, 2)], dim=8, dtype=torch.float32)] * 2)
    mask = mask.clone()
    mask[1, 9:] = True
    tokens.requires_grad_()
    found = make()(tokens, shapes, mask)
    found.sum().backward()
    assert found.isfinite().all() and tokens.grad is not None and tokens.grad.isfinite().all()


def test_sums_over_many_cells_do_not_overflow_a_half() -> None:
    """70,000 tokens of 5.0: their sum and their number are both beyond float16."""
    extractor = PooledExtractor(dim=4)
    nn.init.eye_(extractor.mlp[0].weight)  # type: ignore[arg-type]
    nn.init.zeros_(extractor.mlp[0].bias)  # type: ignore[arg-type]
    tokens = torch.full((1, 70_001, 4), 5.0, dtype=torch.float16)
    mask = torch.zeros(1, 70_001, dtype=torch.bool)
    mask[:, -1] = True
    assert extractor.half()(tokens, [(1, 70_001)], mask).tolist() == [[5.0] * 4]


def test_levels_and_setting_are_checked() -> None:
    with pytest.raises(ValueError, match=r"conv.*'ful'"):
        FusedExtractor(dim=8, num_levels=2, conv="ful")
    with pytest.raises(ValueError, match="expected 3 levels with 5 tokens in all, found"):
        FusedExtractor(dim=8, num_levels=3)(torch.zeros(1, 5, 8), [(2, 2), (1, 1)], None)


# --- the parts


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_masked_norm_without_padding_is_group_norm(groups: int) -> None:
    ours, theirs = MaskedGroupNorm(groups, 8), nn.GroupNorm(groups, 8)
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = 5 + 3 * torch.randn(3, 8, 5, 4)
    assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, torch.ones(3, 1, 5, 4)), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_norm_of_a_padded_map_is_group_norm_of_the_crop(dtype: torch.dtype) -> None:
    norm = MaskedGroupNorm(4, 8)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    norm.to(dtype)
    sizes = [(5, 4), (2, 3), (1, 1), (5, 1)]
    x = 5 + 3 * torch.randn(4, 8, 5, 4).to(dtype)
    valid = torch.zeros(4, 1, 5, 4, dtype=dtype)
    for i, (height, width) in enumerate(sizes):
        valid[i, :, :height, :width] = 1
    found = norm(torch.where(valid.bool(), x, torch.full_like(x, 1000.0)), valid)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    for i, (height, width) in enumerate(sizes):
        crop = F.group_norm(x[i : i + 1, :, :height, :width], 4, norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(found[i : i + 1, :, :height, :width], crop, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_norm_is_not_rounded_by_autocast(dtype: torch.dtype) -> None:
    """Sums of squares over this map are 16 times what float16 holds."""
    norm, x = MaskedGroupNorm(2, 8), 16 * torch.randn(1, 8, 64, 64)
    valid = torch.ones(1, 1, 64, 64)
    valid[..., 60:] = 0
    expected = norm(x, valid)
    with torch.autocast("cpu", dtype):
        assert torch.equal(norm(x, valid), expected)
    assert float(expected[..., :60].std()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("coarse", [(1, 1), (3, 4), (4, 1), (6, 7)])
@pytest.mark.parametrize("fine", [(6, 7), (5, 9), (1, 1)])
def test_enlarging_a_padded_map_is_enlarging_the_crop(coarse: tuple[int, int], fine: tuple[int, int]) -> None:
    x = torch.zeros(1, 3, coarse[0] + 4, coarse[1] + 2)
    x[..., : coarse[0], : coarse[1]] = torch.randn(1, 3, *coarse)
    valid = torch.zeros_like(x[:, :1])
    valid[..., : coarse[0], : coarse[1]] = 1
    fine_valid = torch.zeros(1, 1, fine[0] + 1, fine[1] + 3)
    fine_valid[..., : fine[0], : fine[1]] = 1
    found = _enlarge(x, valid, fine_valid.shape[-2:], fine_valid)
    expected = F.interpolate(x[..., : coarse[0], : coarse[1]], size=fine, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[..., : fine[0], : fine[1]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("corner", [(0, 0), (4, 2), (1, 1), (2, 0)])
@pytest.mark.parametrize("fine_corner", [(0, 0), (1, 3), (0, 2)])
def test_enlarging_reads_the_valid_part_wherever_it_lies(corner: tuple[int, int], fine_corner: tuple[int, int]) -> None:
    (top, left), (fine_top, fine_left) = corner, fine_corner
    image = torch.randn(1, 3, 3, 4)
    x, valid, fine_valid = torch.zeros(1, 3, 7, 6), torch.zeros(1, 1, 7, 6), torch.zeros(1, 1, 7, 10)
    x[..., top : top + 3, left : left + 4] = image
    valid[..., top : top + 3, left : left + 4] = 1
    fine_valid[..., fine_top : fine_top + 6, fine_left : fine_left + 7] = 1
    found = _enlarge(x, valid, (7, 10), fine_valid)
    expected = F.interpolate(image, size=(6, 7), mode="bilinear", align_corners=False)
    cut = found[..., fine_top : fine_top + 6, fine_left : fine_left + 7]
    torch.testing.assert_close(cut, expected, atol=1e-5, rtol=0)
    assert (found * (1 - fine_valid) == 0).all()


def test_enlarging_in_half_precision_rounds_values_alone() -> None:
    """Positions kept in bfloat16 would be off by half a cell here."""
    x = torch.linspace(-1, 1, 200).view(1, 1, 1, 200).bfloat16()
    valid, fine_valid = torch.ones_like(x), torch.ones(1, 1, 1, 400, dtype=x.dtype)
    found = _enlarge(x, valid, (1, 400), fine_valid)
    expected = F.interpolate(x.float(), size=(1, 400), mode="bilinear", align_corners=False)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=2**-8)
