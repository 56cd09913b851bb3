"""IDEA-Research/DN-DETR, its deformable model. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import resnet
from paqdetr.convert.keymap import (
    DAB_CONVENTIONS,
    DEFORMABLE_MAP,
    KEEP_100,
    LEVELS,
    Layout,
    encoder_and_decoder,
    heads,
    mlp,
    move,
)


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **DAB_CONVENTIONS,
        **KEEP_100,
        **DEFORMABLE_MAP,
        "look_forward_twice": False,
        "label_noise": 0.2,
        "box_noise": 0.4,
    }


DN_DETR = Layout(
    title="IDEA-Research/DN-DETR (dn_dab_deformable_detr)",
    rules=(
        *resnet("backbone.0.body."),
        *LEVELS,
        move("transformer.level_embed", "encoder.level_embed"),
        *encoder_and_decoder("transformer."),
        move("tgt_embed.weight", "query_source.table"),
        move("refpoint_embed.weight", "start.boxes"),
        mlp("transformer.decoder.ref_point_head", "decoder.position_head"),
        mlp("transformer.decoder.query_scale", "decoder.position_scale"),
        *heads(),
        move("label_enc.weight", "denoising.label_embed.weight"),
    ),
    settings=_settings,
    hints={
        "nheads": "num_heads",
        "enc_n_points": "num_points",
        "dec_n_points": "num_points",
        "dropout": "dropout",
        "num_queries": "num_queries",
        "scalar": "denoising_groups",
        "label_noise_scale": "label_noise",
        "box_noise_scale": "box_noise",
    },
    required={
        "modelname": ("dn_dab_deformable_detr", "dab_deformable_detr"),  # the latter in its README
        "position_embedding": ("sine",),
        "dilation": (False,),
        "two_stage": (False,),
        "num_patterns": (0,),
        "masks": (False,),
    },
)
