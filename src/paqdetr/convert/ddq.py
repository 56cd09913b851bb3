"""DDQ-DETR, of jshilong/DDQ and of mmdetection, which share their names. Conventions and their evidence: docs/convert.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from paqdetr.convert.keymap import move, same
from paqdetr.convert.mmdet import MMDET_DINO, MMDET_RULES, dino_settings


def _settings(keys: Collection[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    dense = any(key.startswith("bbox_head.aux_cls_branches.") for key in keys)
    return {
        **dino_settings(keys, hints),
        "distinct_proposals": 0.8,
        "distinct_queries": 0.8,
        "distinct_restart": True,
        "hybrid_ratio": 1.5 if dense else 0.0,
        "hybrid_heads": "all" if dense else "shared",
    }


# A training makes the dense heads of the decoder's layers a part of the decoder as well.
DDQ = replace(
    MMDET_DINO,
    title="DDQ-DETR",
    rules=(
        *MMDET_RULES,
        move("query_map.{p}", "query_source.linear.{p}"),
        same("decoder.aux_reg_branches.{rest}", "bbox_head.aux_reg_branches.{rest}"),
        move("bbox_head.aux_cls_branches.{i}.{p}", "hybrid_heads.class_heads.{i}.{p}"),
        move("bbox_head.aux_reg_branches.{i}.{k}.{p}", "hybrid_heads.box_heads.{i}.{k}.{p}"),
    ),
    settings=_settings,
)
