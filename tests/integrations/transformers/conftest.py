"""Small detectors of transformers with random weights, built from configs alone: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

CLASSES, QUERIES, DIM = 3, 20, 32
KINDS = [
    "deformable",
    "deformable-refine",
    "deformable-two-stage",
    "conditional",
    "dab",
    "dab-patterns",
    "rt",
    "rt-v2",
    "d-fine",
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each host in turn."""
    return request.param


@pytest.fixture
def all_kinds() -> list[str]:
    """What `kind` takes its turns through."""
    return KINDS


@pytest.fixture
def make_host() -> Callable[..., Any]:
    """`make_host(kind, **settings)`: the detector, in evaluation mode, the same for the same arguments."""
    return _make_host


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two images, the second with padding on the right, and labels as an image processor of transformers gives them."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 64, 96, dtype=torch.int64)
    mask[1, :, 64:] = 0
    return {
        "pixel_values": torch.randn(2, 3, 64, 96, generator=generator),
        "pixel_mask": mask,
        "labels": [
            _labels([0, 2], [[0.3, 0.4, 0.3, 0.4], [0.7, 0.6, 0.4, 0.5]], 11),
            _labels([1], [[0.5, 0.5, 0.5, 0.6]], 12),
        ],
    }


def _labels(classes: list[int], boxes: list[list[float]], image_id: int) -> dict[str, Tensor]:
    return {"class_labels": torch.tensor(classes), "boxes": torch.tensor(boxes), "image_id": torch.tensor([image_id])}


def _make_host(kind: str, **settings: Any) -> Any:
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    stages: dict[str, Any] = dict(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic"
    )
    sizes: dict[str, Any] = dict(
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_layers=1,
        decoder_layers=3,
        num_labels=CLASSES,
        num_queries=QUERIES,
        auxiliary_loss=True,
        dropout=0.0,
    )
    # Early releases of 5 take a backbone of timm by default, with weights.
    no_timm: dict[str, Any] = dict(backbone=None, use_timm_backbone=False, use_pretrained_backbone=False)
    torch.manual_seed(0)
    if kind.startswith("deformable"):
        config = hf.DeformableDetrConfig(
            backbone_config=hf.ResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"]),
            d_model=DIM,
            num_feature_levels=4,
            with_box_refine=kind != "deformable",
            two_stage=kind == "deformable-two-stage",
            two_stage_num_proposals=QUERIES,
            **(sizes | no_timm | settings),
        )
        return hf.DeformableDetrForObjectDetection(config).eval()
    if kind == "conditional" or kind.startswith("dab"):
        last = hf.ResNetConfig(**stages, out_features=["stage4"])
        sizes |= no_timm
        if kind == "conditional":
            config = hf.ConditionalDetrConfig(backbone_config=last, d_model=DIM, **(sizes | settings))
            return hf.ConditionalDetrForObjectDetection(config).eval()
        patterns = 2 if kind == "dab-patterns" else 0
        config = hf.DabDetrConfig(backbone_config=last, hidden_size=DIM, num_patterns=patterns, **(sizes | settings))
        return hf.DabDetrForObjectDetection(config).eval()
    config_class, model_class = {
        "rt": (hf.RTDetrConfig, hf.RTDetrForObjectDetection),
        "rt-v2": (hf.RTDetrV2Config, hf.RTDetrV2ForObjectDetection),
        "d-fine": (hf.DFineConfig, hf.DFineForObjectDetection),
    }[kind]
    config = config_class(
        backbone_config=hf.RTDetrResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"]),
        d_model=DIM,
        encoder_hidden_dim=DIM,
        encoder_in_channels=[12, 16, 24],
        decoder_in_channels=[DIM] * 3,
        num_denoising=8,
        **(sizes | settings),
    )
    return model_class(config).eval()
