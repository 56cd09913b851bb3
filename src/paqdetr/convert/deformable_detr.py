"""fundamentalvision/Deformable-DETR: one-stage, with box refinement, two-stage. Conventions and evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import resnet
from paqdetr.convert.keymap import (
    DEFORMABLE_CODE,
    FIRST_HALF,
    ORIGINAL_HINTS,
    SECOND_HALF,
    Layout,
    move,
    original_rules,
    proposal_projection,
    split,
)


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder knows the box heads if, and only if, it refines."""
    return {
        **DEFORMABLE_CODE,
        "box_refinement": any(key.startswith("transformer.decoder.bbox_embed.") for key in keys),
        "class_agnostic_proposals": "transformer.enc_output.weight" in keys,
    }


DEFORMABLE_DETR = Layout(
    title="fundamentalvision/Deformable-DETR",
    rules=(
        *original_rules(*resnet("backbone.0.body.")),
        *proposal_projection("transformer."),
        move("transformer.pos_trans.{p}", "start.embed.0.{p}"),
        move("transformer.pos_trans_norm.{p}", "start.embed.1.{p}"),
        split("query_embed.weight", ("start.position", FIRST_HALF), ("query_source.table", SECOND_HALF)),
        move("transformer.reference_points.{p}", "start.point_head.{p}"),
    ),
    settings=_settings,
    hints=ORIGINAL_HINTS,
    required={"position_embedding": ("sine", "v2"), "dilation": (False,), "masks": (False,)},
)
