"""xiuqhou/Relation-DETR: its DINO, without the position relation. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import resnet, torchvision_swin
from paqdetr.convert.keymap import (
    DAB_CONVENTIONS,
    DEFORMABLE_MAP,
    KEEP_300,
    Layout,
    drop,
    encoder_and_decoder,
    mlp,
    move,
    proposal_projection,
)


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **DAB_CONVENTIONS,
        **KEEP_300,
        **DEFORMABLE_MAP,
        "refine_from": "raw",
        "look_forward_twice": True,
        "label_noise": 0.5,
        "box_noise": 1.0,
    }


RELATION_DETR = Layout(
    title="xiuqhou/Relation-DETR (DINO)",
    rules=(
        *resnet("backbone."),
        *torchvision_swin("backbone.0."),
        move("neck.convs.{i}.0.{p}", "level.{i}.0.{p}"),
        move("neck.convs.{i}.1.{p}", "level.{i}.1.{p}"),
        move("transformer.level_embeds", "encoder.level_embed"),
        *encoder_and_decoder("transformer."),
        *proposal_projection("transformer."),
        move("transformer.encoder_class_head.{p}", "start.head.class_head.{p}"),
        mlp("transformer.encoder_bbox_head", "start.head.box_head"),
        move("transformer.tgt_embed.weight", "query_source.table"),
        move("transformer.decoder.norm.{p}", "decoder.norm.{p}"),
        mlp("transformer.decoder.ref_point_head", "decoder.position_head"),
        move("transformer.decoder.class_head.{i}.{p}", "class_head.{i}.{p}"),
        mlp("transformer.decoder.bbox_head.{i}", "box_head.{i}"),
        move("denoising_generator.label_encoder.weight", "denoising.label_embed.weight"),
        drop("_classes_", "names of the classes as numbers; give them by classes="),
    ),
    settings=_settings,
    num_queries=900,
    preprocessing={"resize": "relation_detr", "pad_divisor": 32},
    unsupported={
        "position_relation_embedding": "it has the position relation, an attention bias between boxes that no host here has; "
        "what is left without it predicts something else",
    },
    level_bias=False,
)
