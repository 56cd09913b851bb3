"""What every parameter starts with, host by host."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from paqdetr.models import list_models
from paqdetr.models.encoder import DeformableAttention


@pytest.mark.parametrize("name", [name for name in list_models("*_r50") if "5scale" not in name])
def test_heads(name: str, tiny_model: Callable) -> None:
    model = tiny_model(name)
    two_stage = model.config.positions == "proposals"
    assert two_stage is not any(part in name for part in ("one_stage", "refine", "dab", "dn_detr"))
    class_heads, box_heads = list(model.decoder.class_heads), list(model.decoder.box_heads)
    if two_stage:
        class_heads.append(model.start.head.class_head)
        box_heads.append(model.start.head.box_head)
    for i, (class_head, box_head) in enumerate(zip(class_heads, box_heads, strict=True)):
        assert torch.allclose(class_head.bias.sigmoid(), torch.tensor(0.01))
        last = box_head[-1]
        assert not last.weight.any() and not last.bias[:2].any()
        assert last.bias[2:].tolist() == ([-2.0, -2.0] if i == 0 and not two_stage else [0.0, 0.0])


def test_a_two_stage_decoder_repeats_its_proposals_at_first(tiny_model: Callable) -> None:
    model = tiny_model("dino_r50").eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 96, 96))
    for boxes in output.layers.boxes:
        assert (boxes - output.proposals.boxes).abs().max() < 2e-3  # but for what is nearer to 0 or 1 than box_eps


@pytest.mark.parametrize("name", ["dino_r50", "dn_detr_r50", "deformable_detr_r50"])
def test_matrices_are_xavier_uniform(name: str, tiny_model: Callable) -> None:
    model = tiny_model(name, **{"model.dim": 64, "model.ffn_dim": 128})
    own = [model.encoder, model.decoder.layers, model.decoder.position_head, model.decoder.position_scale]
    matrices = [m for part in own if part is not None for m in part.modules() if isinstance(m, nn.Linear)]
    matrices += [layer for layer in model.neck.modules() if isinstance(layer, nn.Conv2d)]
    assert len(matrices) > 20
    for layer in matrices:
        fan_out, fan_in = layer.weight.shape[:2]
        area = layer.weight[0, 0].numel()
        bound = math.sqrt(6 / ((fan_in + fan_out) * area))
        largest = float(layer.weight.detach().abs().max())
        assert largest == 0 or 0.95 * bound < largest <= bound * 1.0001


def test_deformable_attention_keeps_its_ring(tiny_model: Callable) -> None:
    parts = [part for part in tiny_model("dino_r50").modules() if isinstance(part, DeformableAttention)]
    assert len(parts) == 5
    for part in parts:
        assert not part.sampling_offsets.weight.any() and part.sampling_offsets.bias.any()
        assert not part.attention_weights.weight.any() and not part.attention_weights.bias.any()
