"""Sense-X/Co-DETR and mmdetection's projects/CO-DETR: Co-DINO. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from paqdetr.convert.backbones import mmdet_swin, resnet, swin
from paqdetr.convert.keymap import Layout, Rule, Take, drop, move, proposal_projection, split
from paqdetr.convert.mmdet import branches, channel_mapper, listed_layers, mmdet_settings

_QUERIES, _TRANSFORMER = "query_head.", "query_head.transformer."
_RCNN, _ATSS = "auxiliary.heads.faster_rcnn.", "auxiliary.heads.atss."
_CLASSES = Take("all rows but that of background", lambda tensor: tensor[:-1])
_BACKGROUND = Take("the row of background", lambda tensor: tensor[-1:])


def _auxiliary() -> tuple[Rule, ...]:
    """What training alone has: head 0 is Faster R-CNN, head 1 ATSS."""
    rules = [
        move(f"{_QUERIES}downsample.{{i}}.{{p}}", "auxiliary.downsample.{i}.{p}"),
        drop(
            f"{_TRANSFORMER}pos_feats_{{rest}}",
            "embeds features of auxiliary positives, which published Co-DINO does not",
        ),
        move("rpn_head.rpn_conv.{p}", f"{_RCNN}rpn.head.conv.0.0.{{p}}"),
        move("rpn_head.rpn_cls.{p}", f"{_RCNN}rpn.head.cls_logits.{{p}}"),
        move("rpn_head.rpn_reg.{p}", f"{_RCNN}rpn.head.bbox_pred.{{p}}"),
        move("roi_head.0.bbox_head.shared_fcs.{k}.{p}", f"{_RCNN}shared.{{2k}}.{{p}}"),
        split(
            "roi_head.0.bbox_head.fc_cls.{p}",
            (f"{_RCNN}class_head.{{p}}", _CLASSES),
            (f"{_RCNN}background_head.{{p}}", _BACKGROUND),
        ),
        move("roi_head.0.bbox_head.fc_reg.{p}", f"{_RCNN}box_head.{{p}}"),
        move("bbox_head.0.scales.{i}.scale", f"{_ATSS}scales.{{i}}"),
    ]
    for index, head in enumerate(("faster_rcnn", "atss")):
        rules += [
            move(f"{_TRANSFORMER}aux_pos_trans.{index}.{{p}}", f"auxiliary.embed.{head}.0.{{p}}"),
            move(f"{_TRANSFORMER}aux_pos_trans_norm.{index}.{{p}}", f"auxiliary.embed.{head}.1.{{p}}"),
        ]
    for theirs, ours in (("cls", "classify"), ("reg", "regress")):
        rules += [
            move(f"bbox_head.0.{theirs}_convs.0.conv.{{p}}", f"{_ATSS}{ours}.0.{{p}}"),
            move(f"bbox_head.0.{theirs}_convs.0.gn.{{p}}", f"{_ATSS}{ours}.1.{{p}}"),
        ]
    for theirs, ours in (("cls", "class"), ("reg", "box"), ("centerness", "centerness")):
        rules.append(move(f"bbox_head.0.atss_{theirs}.{{p}}", f"{_ATSS}{ours}_head.{{p}}"))
    return tuple(rules)


CO_DETR = Layout(
    title="Co-DETR (Co-DINO)",
    rules=(
        *resnet("backbone."),
        *mmdet_swin("backbone."),
        *swin("backbone."),
        *channel_mapper(),
        move(f"{_TRANSFORMER}level_embeds", "encoder.level_embed"),
        *listed_layers(_TRANSFORMER),
        *proposal_projection(_TRANSFORMER),
        move(f"{_TRANSFORMER}query_embed.weight", "query_source.table"),
        move(f"{_TRANSFORMER}decoder.norm.{{p}}", "decoder.norm.{p}"),
        move(f"{_TRANSFORMER}decoder.ref_point_head.{{k}}.{{p}}", "decoder.position_head.{k}.{p}"),
        *branches(_QUERIES),
        move(f"{_QUERIES}label_embedding.weight", "denoising.label_embed.weight"),
        move(f"{_QUERIES}dn_generator.label_embedding.weight", "denoising.label_embed.weight"),
        *_auxiliary(),
    ),
    settings=mmdet_settings,
    num_queries=900,
    level_bias=False,
    preprocessing={"resize": "detectron2"},
    unsupported={
        "head_pos_embed": "it is a Co-Deformable-DETR, whose auxiliary queries have other positions; only Co-DINO is known",
        "mask_head": "it has a mask head",
    },
)
