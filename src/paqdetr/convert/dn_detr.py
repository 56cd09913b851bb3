"""IDEA-Research/DN-DETR, its deformable model. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import resnet
from paqdetr.convert.keymap import DN_CODE, ORIGINAL_HINTS, Layout, mlp, move, original_rules


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    return DN_CODE


DN_DETR = Layout(
    title="IDEA-Research/DN-DETR (dn_dab_deformable_detr)",
    rules=(
        *original_rules(*resnet("backbone.0.body.")),
        move("tgt_embed.weight", "query_source.table"),
        move("refpoint_embed.weight", "start.boxes"),
        mlp("transformer.decoder.ref_point_head", "decoder.position_head"),
        mlp("transformer.decoder.query_scale", "decoder.position_scale"),
        move("label_enc.weight", "denoising.label_embed.weight"),
    ),
    settings=_settings,
    hints={
        **ORIGINAL_HINTS,
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
