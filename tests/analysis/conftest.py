"""Small detectors of every host, and a picture for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from paqdetr.config import load_config
from paqdetr.models import Detector
from paqdetr.models.zoo import build_model

TINY = {
    "image_size": 96,
    "pretrained_backbone": False,
    "model.backbone": "test_resnet",
    "model.num_classes": 5,
    "model.dim": 32,
    "model.num_heads": 4,
    "model.ffn_dim": 64,
    "model.encoder_layers": 2,
    "model.decoder_layers": 3,
    "model.num_queries": 20,
}


@pytest.fixture
def tiny_model() -> Callable[..., Detector]:
    """`tiny_model("dino_r50", **overrides)`: that model made small, with noise on all weights: nothing hides at zero."""

    def build(name: str, **overrides: Any) -> Detector:
        known = load_config(name).model
        smaller = dict(TINY)
        if known.queries == "patterns":
            smaller["model.num_patterns"] = 6
        if known.denoising != "none":
            smaller["model.denoising_queries"] = 6
        model = build_model(load_config(name, smaller | overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """90 x 70 of noise: a size that needs padding where sides are not rounded."""
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    return Image.fromarray(noise)
