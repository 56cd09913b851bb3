"""mmdetection: the names that its DETRs share, and its DINO. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import mmdet_swin, resnet
from paqdetr.convert.keymap import DINO_CODE, Layout, Rule, mlp, move


def listed_layers(
    prefix: str, *, self_attention: str = "attentions.0", cross_attention: str = "attentions.1", ffn: str = "ffns.0"
) -> tuple[Rule, ...]:
    """Layers of mmcv, whose norms are a list in the order of use: decoder norms 0, 1, 2 follow self-attention, cross-attention
    and feed-forward block. In mmdetection 2 and in detrex attentions and feed-forward blocks are lists as well."""
    encoder, decoder = f"{prefix}encoder.layers.{{i}}.", f"{prefix}decoder.layers.{{i}}."
    ours, theirs = "encoder.layers.{i}.", "decoder.layers.{i}."
    return (
        # The decoder's self-attention is torch's inside a wrapper; the encoder's is deformable attention itself.
        move(f"{decoder}{self_attention}.attn.{{rest}}", f"{theirs}self_attention.{{rest}}"),
        move(f"{decoder}{cross_attention}.{{rest}}", f"{theirs}cross_attention.{{rest}}"),
        move(f"{decoder}{ffn}.layers.0.0.{{p}}", f"{theirs}ffn.linear1.{{p}}"),
        move(f"{decoder}{ffn}.layers.1.{{p}}", f"{theirs}ffn.linear2.{{p}}"),
        move(f"{decoder}norms.0.{{p}}", f"{theirs}self_norm.{{p}}"),
        move(f"{decoder}norms.1.{{p}}", f"{theirs}cross_norm.{{p}}"),
        move(f"{decoder}norms.2.{{p}}", f"{theirs}ffn.norm.{{p}}"),
        move(f"{encoder}{self_attention}.{{rest}}", f"{ours}attention.{{rest}}"),
        move(f"{encoder}{ffn}.layers.0.0.{{p}}", f"{ours}ffn.linear1.{{p}}"),
        move(f"{encoder}{ffn}.layers.1.{{p}}", f"{ours}ffn.linear2.{{p}}"),
        move(f"{encoder}norms.0.{{p}}", f"{ours}norm.{{p}}"),
        move(f"{encoder}norms.1.{{p}}", f"{ours}ffn.norm.{{p}}"),
    )


def channel_mapper(norm: str = "gn") -> tuple[Rule, ...]:
    """The neck: a convolution and its norm for each map, then for each further level."""
    return (
        move("neck.convs.{i}.conv.{p}", "neck.lateral.{i}.0.{p}"),
        move(f"neck.convs.{{i}}.{norm}.{{p}}", "neck.lateral.{i}.1.{p}"),
        move("neck.extra_convs.{i}.conv.{p}", "neck.extra.{i}.0.{p}"),
        move(f"neck.extra_convs.{{i}}.{norm}.{{p}}", "neck.extra.{i}.1.{p}"),
    )


def branches(prefix: str) -> tuple[Rule, ...]:
    """Heads of the decoder layers and, past the last, of the proposals."""
    return (
        move(f"{prefix}cls_branches.{{i}}.{{p}}", "class_head.{i}.{p}"),
        move(f"{prefix}reg_branches.{{i}}.{{k}}.{{p}}", "box_head.{i}.{k}.{p}"),
    )


MMDET_RULES = (
    *resnet("backbone."),
    *mmdet_swin("backbone."),
    *channel_mapper(),
    move("level_embed", "encoder.level_embed"),
    *listed_layers("", self_attention="self_attn", cross_attention="cross_attn", ffn="ffn"),
    move("memory_trans_fc.{p}", "start.head.project.{p}"),
    move("memory_trans_norm.{p}", "start.head.norm.{p}"),
    move("query_embedding.weight", "query_source.table"),
    move("decoder.norm.{p}", "decoder.norm.{p}"),
    mlp("decoder.ref_point_head", "decoder.position_head"),
    *branches("bbox_head."),
    move("dn_query_generator.label_embedding.weight", "denoising.label_embed.weight"),
)
"""Of a DINO of mmdetection 3, and of what is built on it."""


def mmdet_settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """What the code of mmdetection's DINO, and of what is built on it, implies."""
    return DINO_CODE | {"clamp_boxes": True}


def dino_settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """What mmdetection 3 adds: reported boxes are clamped less than those that the next layer starts from."""
    return {**mmdet_settings(keys, hints), "report_eps": 1e-5}


MMDET_DINO = Layout(
    title="mmdetection (DINO)",
    rules=MMDET_RULES,
    settings=dino_settings,
    num_queries=900,
    level_bias=False,
    preprocessing={"resize": "detectron2"},
)
