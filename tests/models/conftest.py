"""Small models and made-up features that the model tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paqdetr.config import load_config
from paqdetr.models.detector import Detector
from paqdetr.models.tokens import Tokens
from paqdetr.models.zoo import build_model

# Four levels, six plus six layers made two plus three: `dino_r50` at the size of a test.
TINY = {
    "model.backbone": "test_resnet",
    "model.num_classes": 5,
    "model.dim": 32,
    "model.num_heads": 4,
    "model.ffn_dim": 64,
    "model.encoder_layers": 2,
    "model.decoder_layers": 3,
    "model.num_queries": 20,
    "model.num_patterns": 6,
    "model.denoising_queries": 6,
}


@pytest.fixture
def tiny_model() -> Callable[..., Detector]:
    """`tiny_model("paq_dino_r50", **{"model.dim": 64})` is that model made small, with random weights."""

    def build(name: str = "dino_r50", **overrides: Any) -> Detector:
        return build_model(load_config(name, TINY | overrides))

    return build


@pytest.fixture
def stir() -> Callable[[nn.Module], None]:
    """Adds noise to every parameter, so that nothing is hidden behind what starts at zero."""

    def add_noise(module: nn.Module) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)

    return add_noise


@pytest.fixture
def make_tokens() -> Callable[..., Tokens]:
    """The same features with any amount of padding.

    `make_tokens(levels, padding, garbage=..)`: `levels` are the valid maps (B, d, h, w); every level gets `padding` more rows
    and columns, full of random numbers.
    """

    def build(levels: Sequence[Tensor], padding: int = 0, *, temperature: float = 20.0) -> Tokens:
        rows, masks, shapes = [], [], []
        for x in levels:
            batch, dim, height, width = x.shape
            padded = 100 * torch.randn(batch, dim, height + padding, width + padding, dtype=x.dtype)
            padded[:, :, :height, :width] = x
            mask = torch.ones(batch, height + padding, width + padding, dtype=torch.bool)
            mask[:, :height, :width] = False
            rows.append(padded.flatten(2).transpose(1, 2))
            masks.append(mask)
            shapes.append((height + padding, width + padding))
        return Tokens.from_values(torch.cat(rows, dim=1), shapes, masks if padding else None, temperature=temperature)

    return build
