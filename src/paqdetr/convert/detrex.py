"""detrex: DINO and DN-Deformable-DETR. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from paqdetr.convert.backbones import detectron2_resnet, swin
from paqdetr.convert.keymap import DAB_CONVENTIONS, DEFORMABLE_MAP, Layout, heads, mlp, move, proposal_projection


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """DINO has a norm behind its decoder; DN-Deformable-DETR scales positions."""
    common = {**DAB_CONVENTIONS, **DEFORMABLE_MAP, "clamp_boxes": True}
    if "transformer.decoder.norm.weight" in keys:
        refine = {"refine_from": "raw", "look_forward_twice": True}
        return {**common, **refine, "label_noise": 0.5, "box_noise": 1.0, "max_detections": 300}
    return {
        **common,
        "look_forward_twice": False,
        "label_noise": 0.2,
        "box_noise": 0.4,
        "max_detections": 100,
    }


_ENCODER, _DECODER = "transformer.encoder.layers.{i}.", "transformer.decoder.layers.{i}."

DETREX = Layout(
    title="IDEA-Research/detrex",
    rules=(
        *detectron2_resnet("backbone."),
        *swin("backbone."),
        move("neck.convs.{i}.conv.{p}", "neck.lateral.{i}.0.{p}"),
        move("neck.convs.{i}.norm.{p}", "neck.lateral.{i}.1.{p}"),
        move("neck.extra_convs.{i}.conv.{p}", "neck.extra.{i}.0.{p}"),
        move("neck.extra_convs.{i}.norm.{p}", "neck.extra.{i}.1.{p}"),
        move("transformer.level_embeds", "encoder.level_embed"),
        move(f"{_ENCODER}attentions.0.{{rest}}", "encoder.layers.{i}.attention.{rest}"),
        move(f"{_ENCODER}norms.0.{{p}}", "encoder.layers.{i}.norm.{p}"),
        move(f"{_ENCODER}ffns.0.layers.0.0.{{p}}", "encoder.layers.{i}.ffn.linear1.{p}"),
        move(f"{_ENCODER}ffns.0.layers.1.{{p}}", "encoder.layers.{i}.ffn.linear2.{p}"),
        move(f"{_ENCODER}norms.1.{{p}}", "encoder.layers.{i}.ffn.norm.{p}"),
        move(f"{_DECODER}attentions.0.attn.{{rest}}", "decoder.layers.{i}.self_attention.{rest}"),
        move(f"{_DECODER}norms.0.{{p}}", "decoder.layers.{i}.self_norm.{p}"),
        move(f"{_DECODER}attentions.1.{{rest}}", "decoder.layers.{i}.cross_attention.{rest}"),
        move(f"{_DECODER}norms.1.{{p}}", "decoder.layers.{i}.cross_norm.{p}"),
        move(f"{_DECODER}ffns.0.layers.0.0.{{p}}", "decoder.layers.{i}.ffn.linear1.{p}"),
        move(f"{_DECODER}ffns.0.layers.1.{{p}}", "decoder.layers.{i}.ffn.linear2.{p}"),
        move(f"{_DECODER}norms.2.{{p}}", "decoder.layers.{i}.ffn.norm.{p}"),
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
