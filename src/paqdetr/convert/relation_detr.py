"""xiuqhou/Relation-DETR, and its DINO. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import resnet, torchvision_swin
from paqdetr.convert.keymap import (
    DEFORMABLE_MAP,
    DINO_CODE,
    Layout,
    Take,
    drop,
    encoder_and_decoder,
    mlp,
    move,
    proposal_projection,
    split,
)

_RELATION = "transformer.decoder.position_relation_embedding.pos_proj.0"
_AS_MATRIX = Take("a convolution of 1 x 1 as a matrix", lambda tensor: tensor.flatten(1))


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    hybrid = any(key.startswith("transformer.hybrid_class_head.") for key in keys)
    queries = {"hybrid_ratio": 0.0, "hybrid_heads": "encoder" if hybrid else "shared"}
    return DINO_CODE | DEFORMABLE_MAP | queries


RELATION_DETR = Layout(
    title="xiuqhou/Relation-DETR",
    rules=(
        *resnet("backbone."),
        *torchvision_swin("backbone.0."),
        move("neck.convs.{i}.0.{p}", "level.{i}.0.{p}"),
        move("neck.convs.{i}.1.{p}", "level.{i}.1.{p}"),
        move("transformer.level_embeds", "encoder.level_embed"),
        move("transformer.encoder.memory_fusion.{k}.{p}", "encoder.fusion.{k}.{p}"),
        *encoder_and_decoder("transformer."),
        *proposal_projection("transformer."),
        move("transformer.encoder_class_head.{p}", "start.head.class_head.{p}"),
        mlp("transformer.encoder_bbox_head", "start.head.box_head"),
        move("transformer.tgt_embed.weight", "query_source.table"),
        move("transformer.hybrid_class_head.{p}", "start.head.hybrid_class_head.{p}"),
        mlp("transformer.hybrid_bbox_head", "start.head.hybrid_box_head"),
        move("transformer.hybrid_tgt_embed.weight", "hybrid_source.table"),
        move("transformer.decoder.norm.{p}", "decoder.norm.{p}"),
        mlp("transformer.decoder.ref_point_head", "decoder.position_head"),
        mlp("transformer.decoder.query_scale", "decoder.position_scale"),
        split(f"{_RELATION}.weight", ("decoder.relation.project.weight", _AS_MATRIX)),
        move(f"{_RELATION}.bias", "decoder.relation.project.bias"),
        move("transformer.decoder.class_head.{i}.{p}", "class_head.{i}.{p}"),
        mlp("transformer.decoder.bbox_head.{i}", "box_head.{i}"),
        move("denoising_generator.label_encoder.weight", "denoising.label_embed.weight"),
        drop("_classes_", "names of the classes as numbers; give them by classes="),
    ),
    settings=_settings,
    num_queries=900,
    preprocessing={"resize": "relation_detr", "pad_divisor": 32},
    level_bias=False,
)
