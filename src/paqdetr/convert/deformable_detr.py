"""fundamentalvision/Deformable-DETR: one-stage, with box refinement, two-stage. Conventions and evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import resnet
from paqdetr.convert.keymap import (
    DEFORMABLE_MAP,
    FIRST_HALF,
    KEEP_100,
    LEVELS,
    SECOND_HALF,
    Layout,
    encoder_and_decoder,
    heads,
    move,
    proposal_projection,
    split,
)


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder knows the box heads if, and only if, it refines."""
    return {
        **DEFORMABLE_MAP,
        **KEEP_100,
        "box_eps": 1e-5,
        "look_forward_twice": False,
        "box_refinement": any(key.startswith("transformer.decoder.bbox_embed.") for key in keys),
        "class_agnostic_proposals": "transformer.enc_output.weight" in keys,
    }


DEFORMABLE_DETR = Layout(
    title="fundamentalvision/Deformable-DETR",
    rules=(
        *resnet("backbone.0.body."),
        *LEVELS,
        move("transformer.level_embed", "encoder.level_embed"),
        *encoder_and_decoder("transformer."),
        *proposal_projection("transformer."),
        move("transformer.pos_trans.{p}", "start.embed.0.{p}"),
        move("transformer.pos_trans_norm.{p}", "start.embed.1.{p}"),
        split(
            "query_embed.weight",
            ("start.position", FIRST_HALF),
            ("query_source.table", SECOND_HALF),
        ),
        move("transformer.reference_points.{p}", "start.point_head.{p}"),
        *heads(),
    ),
    settings=_settings,
    hints={
        "nheads": "num_heads",
        "enc_n_points": "num_points",
        "dec_n_points": "num_points",
        "dropout": "dropout",
        "num_queries": "num_queries",
    },
    required={
        "position_embedding": ("sine", "v2"),
        "dilation": (False,),
        "masks": (False,),
    },
)
