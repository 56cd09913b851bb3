"""transformers' Deformable DETR, as `save_pretrained` writes it. Conventions and their evidence: docs/convert.md.

Files keep the names of version 4 (`fc1`, `out_proj`, `conv_encoder`) whatever version wrote them; the names that version 5 uses
in memory are known as well. Tensors that are tied in memory are left out of the file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import resnet
from paqdetr.convert.keymap import (
    DEFORMABLE_CODE,
    FIRST_HALF,
    SECOND_HALF,
    Layout,
    heads,
    move,
    pack,
    proposal_projection,
    split,
)


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    refined = any(key.startswith("model.decoder.bbox_embed.") for key in keys)
    two_stage = "model.enc_output.weight" in keys
    settings = {
        **DEFORMABLE_CODE,
        "box_refinement": bool(hints.get("with_box_refine", refined)),
        "class_agnostic_proposals": two_stage,
    }
    if two_stage and "two_stage_num_proposals" in hints:
        settings["num_queries"] = hints["two_stage_num_proposals"]
    return settings


_ENCODER, _DECODER = "model.encoder.layers.{i}.", "model.decoder.layers.{i}."
_ATTENTION = "decoder.layers.{i}.self_attention."

TRANSFORMERS = Layout(
    title="transformers' Deformable DETR",
    rules=(
        *resnet("model.backbone.conv_encoder.model."),
        *resnet("model.backbone.model."),
        move("model.input_proj.{i}.0.{p}", "level.{i}.0.{p}"),
        move("model.input_proj.{i}.1.{p}", "level.{i}.1.{p}"),
        move("model.level_embed", "encoder.level_embed"),
        move(f"{_ENCODER}self_attn.{{rest}}", "encoder.layers.{i}.attention.{rest}"),
        move(f"{_ENCODER}self_attn_layer_norm.{{p}}", "encoder.layers.{i}.norm.{p}"),
        move(f"{_ENCODER}fc{{k}}.{{p}}", "encoder.layers.{i}.ffn.linear{k}.{p}"),
        move(f"{_ENCODER}mlp.fc{{k}}.{{p}}", "encoder.layers.{i}.ffn.linear{k}.{p}"),
        move(f"{_ENCODER}final_layer_norm.{{p}}", "encoder.layers.{i}.ffn.norm.{p}"),
        *pack((f"{_DECODER}self_attn.{x}_proj.weight" for x in "qkv"), f"{_ATTENTION}in_proj_weight"),
        *pack((f"{_DECODER}self_attn.{x}_proj.bias" for x in "qkv"), f"{_ATTENTION}in_proj_bias"),
        move(f"{_DECODER}self_attn.out_proj.{{p}}", f"{_ATTENTION}out_proj.{{p}}"),
        move(f"{_DECODER}self_attn.o_proj.{{p}}", f"{_ATTENTION}out_proj.{{p}}"),
        move(f"{_DECODER}self_attn_layer_norm.{{p}}", "decoder.layers.{i}.self_norm.{p}"),
        move(f"{_DECODER}encoder_attn.{{rest}}", "decoder.layers.{i}.cross_attention.{rest}"),
        move(f"{_DECODER}encoder_attn_layer_norm.{{p}}", "decoder.layers.{i}.cross_norm.{p}"),
        move(f"{_DECODER}fc{{k}}.{{p}}", "decoder.layers.{i}.ffn.linear{k}.{p}"),
        move(f"{_DECODER}mlp.fc{{k}}.{{p}}", "decoder.layers.{i}.ffn.linear{k}.{p}"),
        move(f"{_DECODER}final_layer_norm.{{p}}", "decoder.layers.{i}.ffn.norm.{p}"),
        *proposal_projection("model."),
        move("model.pos_trans.{p}", "start.embed.0.{p}"),
        move("model.pos_trans_norm.{p}", "start.embed.1.{p}"),
        split(
            "model.query_position_embeddings.weight",
            ("start.position", FIRST_HALF),
            ("query_source.table", SECOND_HALF),
        ),
        move("model.reference_points.{p}", "start.point_head.{p}"),
        *heads(decoder="model.decoder."),
    ),
    settings=_settings,
    preprocessing={"resize": "transformers"},
    hints={
        "encoder_attention_heads": "num_heads",
        "decoder_attention_heads": "num_heads",
        "encoder_n_points": "num_points",
        "decoder_n_points": "num_points",
        "dropout": "dropout",
    },
    required={
        "model_type": ("deformable_detr",),
        "activation_function": ("relu",),
        "position_embedding_type": ("sine",),
        "dilation": (False,),
    },
)
