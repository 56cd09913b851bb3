"""detrex: DINO and DN-Deformable-DETR. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import detectron2_resnet, swin
from paqdetr.convert.keymap import DEFORMABLE_MAP, DINO_CODE, DN_CODE, Layout, heads, mlp, move, proposal_projection
from paqdetr.convert.mmdet import channel_mapper, listed_layers


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """DINO has a norm behind its decoder; DN-Deformable-DETR scales positions."""
    own = DINO_CODE if "transformer.decoder.norm.weight" in keys else DN_CODE
    return own | DEFORMABLE_MAP | {"clamp_boxes": True}


DETREX = Layout(
    title="IDEA-Research/detrex",
    rules=(
        *detectron2_resnet("backbone."),
        *swin("backbone."),
        *channel_mapper("norm"),
        move("transformer.level_embeds", "encoder.level_embed"),
        *listed_layers("transformer."),
        *proposal_projection("transformer."),
        move("transformer.tgt_embed.weight", "query_source.table"),
        move("tgt_embed.weight", "query_source.table"),
        move("refpoint_embed.weight", "start.boxes"),
        move("transformer.decoder.norm.{p}", "decoder.norm.{p}"),
        mlp("transformer.decoder.ref_point_head", "decoder.position_head"),
        mlp("transformer.decoder.query_scale", "decoder.position_scale"),
        *heads(),
        move("label_enc.weight", "denoising.label_embed.weight"),
        move("label_encoder.weight", "denoising.label_embed.weight"),
        move("denoising_generator.label_encoder.weight", "denoising.label_embed.weight"),
    ),
    settings=_settings,
    num_queries=900,
    preprocessing={"resize": "detectron2"},
)
