"""IDEA-Research/DINO. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import resnet, swin
from paqdetr.convert.keymap import DINO_CODE, ORIGINAL_HINTS, Layout, mlp, move, original_rules, proposal_projection


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    forward = not hints.get("use_detached_boxes_dec_out", False)
    return DINO_CODE | {"look_forward_twice": forward}


DINO = Layout(
    title="IDEA-Research/DINO",
    rules=(
        *original_rules(*resnet("backbone.0.body."), *swin("backbone.0.")),
        *proposal_projection("transformer."),
        move("transformer.enc_out_class_embed.{p}", "start.head.class_head.{p}"),
        mlp("transformer.enc_out_bbox_embed", "start.head.box_head"),
        move("transformer.tgt_embed.weight", "query_source.table"),
        move("transformer.decoder.norm.{p}", "decoder.norm.{p}"),
        mlp("transformer.decoder.ref_point_head", "decoder.position_head"),
        move("label_enc.weight", "denoising.label_embed.weight"),
    ),
    settings=_settings,
    hints={
        **ORIGINAL_HINTS,
        "pe_temperatureH": "position_temperature",
        "pe_temperatureW": "position_temperature",
        "dn_number": "denoising_queries",
        "dn_label_noise_ratio": "label_noise",
        "dn_box_noise_scale": "box_noise",
        "num_select": "max_detections",
    },
    required={
        "position_embedding": ("sine", "v2"),
        "transformer_activation": ("relu",),
        "pre_norm": (False,),
        "dilation": (False,),
        "two_stage_type": ("standard",),
        "two_stage_pat_embed": (0,),
        "two_stage_add_query_num": (0,),
        "two_stage_learn_wh": (False,),
        "embed_init_tgt": (True,),
        "decoder_sa_type": ("sa",),
        "decoder_module_seq": (["sa", "ca", "ffn"],),
        "dec_layer_number": (None,),
        "num_patterns": (0,),
        "use_deformable_box_attn": (False,),
        "add_channel_attention": (False,),
        "masks": (False,),
    },
    num_queries=900,
)
