"""What a key map of another program consists of, and the rules that several of them share.

Rules lead to our names, but for what the names alone cannot say. `level.{i}.0` and `.1` are the convolution and the norm of a
level, a lateral or an extra one; `class_head.{i}` and `box_head.{i}.{k}` are heads, of decoder layer i or, past the last layer,
of the proposals; `backbone.stage_norms.{i}` norms the output of stage i. `settle.py` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from paqdetr.convert.keymap import Rule, move, same


@dataclass(frozen=True)
class Layout:
    """A program whose checkpoints we read.

    Attributes:
        title: its name, for people.
        rules: where its tensors go.
        settings: our settings that its code implies, given (names of the tensors in the file, hints).
        hints: name of a setting in the file's arguments or config -> our setting; several names must agree.
        required: argument -> the only value of it that we can build.
        num_queries: what published models have, where the file does not say.
        level_bias: whether the convolutions that make the levels have a bias.
        preprocessing: what it does to images: `resize`, `pad_divisor`.
        unsupported: part of a tensor's name -> what we lack, where it is known.
    """

    title: str
    rules: tuple[Rule, ...]
    settings: Callable[[Collection[str], Mapping[str, Any]], dict[str, Any]]
    hints: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    num_queries: int = 300
    level_bias: bool = True
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)


def encoder_and_decoder(prefix: str) -> tuple[Rule, ...]:
    """Layers as in Deformable DETR's code: norm2 follows self-attention in the decoder, norm1 cross-attention."""
    encoder, decoder = f"{prefix}encoder.layers.{{i}}.", f"{prefix}decoder.layers.{{i}}."
    ours, theirs = "encoder.layers.{i}.", "decoder.layers.{i}."
    return (
        move(f"{encoder}self_attn.{{rest}}", f"{ours}attention.{{rest}}"),
        move(f"{encoder}norm1.{{p}}", f"{ours}norm.{{p}}"),
        move(f"{encoder}linear{{k}}.{{p}}", f"{ours}ffn.linear{{k}}.{{p}}"),
        move(f"{encoder}norm2.{{p}}", f"{ours}ffn.norm.{{p}}"),
        move(f"{decoder}self_attn.{{rest}}", f"{theirs}self_attention.{{rest}}"),
        move(f"{decoder}norm2.{{p}}", f"{theirs}self_norm.{{p}}"),
        move(f"{decoder}cross_attn.{{rest}}", f"{theirs}cross_attention.{{rest}}"),
        move(f"{decoder}norm1.{{p}}", f"{theirs}cross_norm.{{p}}"),
        move(f"{decoder}linear{{k}}.{{p}}", f"{theirs}ffn.linear{{k}}.{{p}}"),
        move(f"{decoder}norm3.{{p}}", f"{theirs}ffn.norm.{{p}}"),
    )


def proposal_projection(prefix: str) -> tuple[Rule, ...]:
    """The linear layer and the norm in front of the proposals' heads."""
    return (
        move(f"{prefix}enc_output.{{p}}", "start.head.project.{p}"),
        move(f"{prefix}enc_output_norm.{{p}}", "start.head.norm.{p}"),
    )


def heads(prefix: str = "", decoder: str = "transformer.decoder.") -> tuple[Rule, ...]:
    """Heads in a list, which the decoder knows under a second name."""
    return (
        same(f"{decoder}class_embed.{{rest}}", f"{prefix}class_embed.{{rest}}"),
        same(f"{decoder}bbox_embed.{{rest}}", f"{prefix}bbox_embed.{{rest}}"),
        move(f"{prefix}class_embed.{{i}}.{{p}}", "class_head.{i}.{p}"),
        move(f"{prefix}bbox_embed.{{i}}.layers.{{k}}.{{p}}", "box_head.{i}.{2k}.{p}"),
    )


def mlp(source: str, target: str) -> Rule:
    """An MLP whose layers are numbered without the activations between them."""
    return move(f"{source}.layers.{{k}}.{{p}}", f"{target}.{{2k}}.{{p}}")


LEVELS = (
    move("input_proj.{i}.0.{p}", "level.{i}.0.{p}"),
    move("input_proj.{i}.1.{p}", "level.{i}.1.{p}"),
)

# Positions of boxes as DAB-DETR's descendants make them: on the padded image, clamped at 1e-3.
DAB_CONVENTIONS: dict[str, Any] = {"padded_positions": True, "box_eps": 1e-3}
DEFORMABLE_MAP: dict[str, Any] = {"position_temperature": 10000.0, "position_offset": -0.5}
# Detections: so many of an image, boxes as predicted. Only detectron2 cuts them off at the border.
KEEP_300: dict[str, Any] = {"max_detections": 300, "clamp_boxes": False}
KEEP_100: dict[str, Any] = {"max_detections": 100, "clamp_boxes": False}
