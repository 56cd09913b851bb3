"""What a model costs: parameters, and floating-point operations of one image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from paqdetr.config import Config, load_config
from paqdetr.models.backbone import Uninitialised
from paqdetr.models.proposals import ProposalStart
from paqdetr.models.zoo import build_model


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Attributes:
    parameters: all of them, those used in training alone included.
    trainable: those that are not frozen.
    flops: multiply-adds of matrix products, convolutions and attention for one image, each counted once, as papers do. The
        bilinear sampling of deformable attention is left out: it is memory traffic rather than arithmetic.
    height, width: of that image in pixels.
    """

    parameters: int
    trainable: int
    flops: int
    height: int
    width: int


def model_cost(model: str | Config, *, height: int = 800, width: int = 1333) -> ModelCost:
    """Cost of a model, without allocating its weights or computing anything.

    Args:
        model: one of `list_models()`, a YAML file, or settings.
        height, width: of the image; rounded up to multiples of 32, as batches are.
    """
    with torch.device("meta"):
        with Uninitialised():
            detector = build_model(model if isinstance(model, Config) else load_config(model)).eval()
        # Suppression needs values, which a meta tensor has not, and no multiplication that is counted.
        detector.decoder.distinct = None
        if isinstance(detector.start, ProposalStart):
            detector.start.head.distinct = None
        parameters = list(detector.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        detector.requires_grad_(False)  # the counter's hooks want no half-differentiable graph
        padded = [-(-side // 32) * 32 for side in (height, width)]
        images = torch.empty(1, 3, *padded)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            detector(images)
    return ModelCost(
        parameters=sum(p.numel() for p in parameters),
        trainable=trainable,
        flops=counter.get_total_flops() // 2,
        height=height,
        width=width,
    )
