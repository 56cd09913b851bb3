"""How the authors of the hosts train, in the recipes that say so.

Sources: main.py of fundamentalvision/Deformable-DETR 48092c5, and its README.md for 32 images a step; main.py of
IDEA-Research/DN-DETR 61f5d6a; config/DINO/DINO_4scale.py 67bbcd9 and `get_param_dict` of IDEA-Research/DINO,
util/get_param_dicts.py (read at 6135190, in a copy under dino/). None of them warms up or averages weights; `use_ema` is off.
"""

from __future__ import annotations

from typing import Any

import pytest

from paqdetr.config import load_config
from paqdetr.models import create_model
from paqdetr.training.optim import lr_factor, parameter_groups

TINY: dict[str, Any] = dict(
    num_classes=3, backbone="test_resnet", dim=32, num_heads=4, ffn_dim=32, encoder_layers=1, decoder_layers=2
)
SLOW = ("reference_points", "sampling_offsets", "point_head")  # the first is called the last here

# recipe: (epochs, epochs at the full rate, images a step, lr, of the backbone, of sampling offsets, FFN, dropout)
DEFORMABLE = (50, 40, 32, 2e-4, 2e-5, 2e-5, 1024, 0.1)
RECIPES = {
    "deformable_detr_one_stage_r50_50e": DEFORMABLE,
    "deformable_detr_refine_r50_50e": DEFORMABLE,
    "deformable_detr_r50_50e": DEFORMABLE,
    "dn_detr_r50_50e": (50, 40, 16, 1e-4, 1e-5, 1e-4, 2048, 0.0),
    "dino_r50_12e": (12, 11, 16, 1e-4, 1e-5, 1e-4, 2048, 0.0),
}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_recipe(recipe: str) -> None:
    epochs, full, images, lr, backbone, offsets, ffn, dropout = RECIPES[recipe]
    config = load_config(recipe)
    assert config.epochs == epochs
    assert config.batch_size * config.accumulate * 8 == images  # on eight GPUs
    assert (config.clip_norm, config.weight_decay, config.ema_decay) == (0.1, 1e-4, 0)
    assert (config.model.ffn_dim, config.model.dropout) == (ffn, dropout)
    # The step schedule: no warm-up, x 0.1 at the first step of the epoch after the drop.
    steps = 7393  # an epoch of COCO with 16 images a step
    factors = [lr_factor(config, step, epochs * steps) for step in (0, full * steps - 1, full * steps)]
    assert factors == [1.0, 1.0, 0.1]

    model = create_model(recipe.rpartition("_")[0], **TINY)
    of = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, config)
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = any(word in name for word in SLOW)
            rate = backbone if "backbone" in name else offsets if slow else lr
            assert of[id(parameter)] == (pytest.approx(rate), 1e-4), name  # norms and biases too


@pytest.mark.parametrize("recipe", ["dino_r50_12e", "dn_detr_r50_50e"])
def test_boxes_are_embedded_as_they_stand_in_the_padded_image(recipe: str) -> None:
    """`valid_ratios` in the decoders of models/dino/deformable_transformer.py 2a4df86 and of DN-DETR 61f5d6a."""
    assert load_config(recipe).model.padded_positions


def test_dinos_layers_share_their_heads() -> None:
    """`dec_pred_class_embed_share`, `dec_pred_bbox_embed_share`."""
    assert load_config("dino_r50_12e").model.share_heads
