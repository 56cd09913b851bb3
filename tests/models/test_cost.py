from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from paqdetr.config import known_figures, list_configs, load_config
from paqdetr.models.backbone import Uninitialised
from paqdetr.models.cost import ModelCost, model_cost
from paqdetr.models.detector import Detector
from paqdetr.models.zoo import create_model

D, FFN, CLASSES, QUERIES = 256, 2048, 80, 900
# Offsets and weights of deformable attention: 8 heads, 4 levels, 4 points, two coordinates and one weight.
SAMPLES = 8 * 4 * 4 * 3


@cache
def cost_of(name: str, height: int = 800, width: int = 1333) -> ModelCost:
    return model_cost(name, height=height, width=width)


@cache
def shapes(name: str) -> Detector:
    """The model without weights."""
    with torch.device("meta"), Uninitialised():
        return create_model(name)


def parameters(name: str) -> int:
    return sum(p.numel() for p in shapes(name).parameters())


def linear(fan_in: int, fan_out: int) -> int:
    return fan_in * fan_out + fan_out


def attention() -> int:
    return 2 * linear(D, D) + linear(D, SAMPLES)


def ffn() -> int:
    return linear(D, FFN) + linear(FFN, D) + 2 * D  # with its norm


def box_head() -> int:
    return 2 * linear(D, D) + linear(D, 4)


def dino_parameters(heads: int) -> int:
    """DINO with ResNet-50, counted from the papers' description."""
    resnet50 = 25_557_032 - linear(2048, 1000) - 53_120  # its batch norms are frozen: no parameters
    neck = sum(linear(c, D) for c in (512, 1024, 2048)) + linear(2048 * 9, D) + 4 * 2 * D
    encoder = 6 * (attention() + 2 * D + ffn()) + 4 * D
    self_attention = 4 * linear(D, D)
    decoder = 6 * (self_attention + attention() + 2 * 2 * D + ffn()) + 2 * D
    decoder += linear(2 * D, D) + linear(D, D) + heads * (linear(D, CLASSES) + box_head())
    proposals = linear(D, D) + 2 * D + linear(D, CLASSES) + box_head()
    return resnet50 + neck + encoder + decoder + proposals + QUERIES * D + CLASSES * D


@pytest.mark.parametrize("name", ["dino_r50", "dino_nano"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    cost = cost_of(name)
    assert cost.parameters == parameters(name)
    assert cost.trainable == sum(p.numel() for p in shapes(name).parameters() if p.requires_grad)
    assert (cost.height, cost.width) == (800, 1333)


@pytest.mark.parametrize("name", ["dino_r50", "dino_nano", "paq_deformable_detr_plus_nano"])
def test_known_costs_are_those_of_the_models(name: str) -> None:
    """If it fails: `python tools/docs.py count`."""
    known, cost = known_figures("costs"), cost_of(name)
    assert known[name] == {"parameters": cost.parameters, "trainable": cost.trainable, "flops": cost.flops}
    assert sorted(known) == list_configs("model")


def test_parameters_by_hand() -> None:
    heads = 1 if load_config("dino_r50").model.share_heads else 6
    cost = cost_of("dino_r50")
    assert cost.parameters == dino_parameters(heads)
    assert 46e6 < cost.parameters < 48e6  # the original has 47 M
    stem, first, shortcut = 64 * 3 * 49, 64 * 64 + 9 * 64 * 64 + 64 * 256, 64 * 256
    later = 256 * 64 + 9 * 64 * 64 + 64 * 256
    assert cost.parameters - cost.trainable == stem + first + shortcut + 2 * later  # up to stride 4


def test_what_pattern_queries_add() -> None:
    plain, paq = (parameters(name) for name in ("dino_r50", "paq_dino_r50"))
    m, levels = 64, 4
    weights = D * QUERIES * m + QUERIES * m + linear(D, D) + 2 * D + m * D
    branch = linear(D, D) + 9 * D + 2 * D  # 1x1, depthwise 3x3, norm
    fusion = linear(D, D // 16) + linear(D // 16, D) + 2 * 49 + 1
    assert paq - plain == weights + levels * branch + (levels - 1) * fusion - QUERIES * D


def test_operations_by_hand() -> None:
    height, width = 800, 1344  # 1333 rounded up to a multiple of 32
    cells = [(height // s) * (width // s) for s in (8, 16, 32)] + [13 * 21]
    tokens = sum(cells)
    attend = lambda queries: tokens * D * D + queries * (D * SAMPLES + D * D)  # noqa: E731
    feed = lambda queries: queries * 2 * D * FFN  # noqa: E731
    heads = D * CLASSES + 2 * D * D + 4 * D
    neck = sum(n * c * D for n, c in zip(cells, (512, 1024, 2048), strict=False)) + cells[3] * 9 * 2048 * D
    encoder = 6 * (attend(tokens) + feed(tokens))
    proposals = tokens * (D * D + D * CLASSES) + QUERIES * (2 * D * D + 4 * D)
    itself = QUERIES * 4 * D * D + 2 * QUERIES * QUERIES * D
    position = QUERIES * (2 * D * D + D * D)
    decoder = 6 * (itself + attend(QUERIES) + feed(QUERIES) + position + QUERIES * heads)
    decoder += 5 * QUERIES * (2 * D * D + 4 * D)  # the box heads a second time, for the next layer's boxes
    resnet50 = 4_087_136_256 * (height * width) / 224**2  # 4.09 GMAC at 224 x 224, without its classifier
    expected = resnet50 + neck + encoder + proposals + decoder
    found = cost_of("dino_r50").flops
    assert found == pytest.approx(expected, rel=0.002)
    assert 275e9 < found < 295e9  # the original reports 279 at a slightly smaller size


def test_more_pixels_cost_more() -> None:
    small, large = cost_of("dino_nano", 300, 310), cost_of("dino_nano")
    assert small.parameters == large.parameters
    ratio = (800 * 1344) / (320 * 320)
    assert 0.5 * ratio < large.flops / small.flops < ratio
    assert small.flops == cost_of("dino_nano", 320, 320).flops  # sides are rounded up


def test_distinct_proposals_are_counted_without_values(tmp_path: Path) -> None:
    """Which proposals overlap depends on values; what is multiplied does not."""
    file = tmp_path / "distinct.yaml"
    file.write_text(
        "base: dino_nano\nname: distinct\nmodel: {distinct_proposals: null, distinct_queries: null}\n", encoding="utf-8"
    )
    assert cost_of(str(file), 320, 320) == cost_of("dino_nano", 320, 320)
