"""State dicts of the original programs: their names and shapes, written down from their published sources, with random values.

Sources (repository, file, commit):
- IDEA-Research/DINO: models/dino/dino.py 66d7173, models/dino/deformable_transformer.py 2a4df86, models/dino/backbone.py 2a4df86,
  models/dino/swin_transformer.py 2a4df86, config/DINO/DINO_4scale.py 67bbcd9
- IDEA-Research/detrex: projects/dino/modeling/dino.py 00ad358, dino_transformer.py 19ee7aa; projects/dn_deformable_detr/modeling/
  dn_deformable_detr.py 5517e89 and 19ee7aa, dn_deformable_transformer.py 293e9c7; detrex/layers/transformer.py 63535d9,
  mlp.py 45bc9af, multi_scale_deform_attn.py 45bc9af; detrex/modeling/neck/channel_mapper.py 13d7cd3
- facebookresearch/detectron2: detectron2/modeling/backbone/swin.py 405ef0d
- IDEA-Research/DN-DETR: models/dn_dab_deformable_detr/dab_deformable_detr.py 3e196c4, deformable_transformer.py 61f5d6a
- fundamentalvision/Deformable-DETR: models/deformable_detr.py, models/deformable_transformer.py, models/backbone.py 48092c5
- xiuqhou/Relation-DETR: models/bricks/dino_transformer.py 2c305dd, models/bricks/relation_transformer.py 092a6eb,
  models/detectors/relation_detr.py 7047657; models/bricks/base_transformer.py, models/bricks/denoising.py,
  models/necks/channel_mapper.py, models/backbones/resnet.py, models/backbones/swin.py 7047657
- open-mmlab/mmdetection: mmdet/models/detectors/dino.py fe3f809, mmdet/models/layers/transformer/dino_layers.py 013e541,
  detr_layers.py 7ece1f0, mmdet/models/necks/channel_mapper.py 2367856, mmdet/models/backbones/swin.py 09269cf;
  projects/CO-DETR/codetr/transformer.py 0342632, co_dino_head.py 0342632, codetr.py 109f02a; rpn_head.py 006c106,
  bbox_head.py 01a7962, atss_head.py 01fba5b
- Sense-X/Co-DETR: projects/models/co_dino_head.py 2bc657a, projects/configs/co_dino/co_dino_5scale_r50_1x_coco.py 2bc657a
- jshilong/DDQ: projects/models/ddq_detr.py 78fc9a3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

State = dict[str, Tensor]

DIM, HEADS, POINTS, FFN = 128, 4, 3, 48
ENCODER_LAYERS, DECODER_LAYERS, QUERIES = 2, 3, 7


@dataclass
class Writer:
    """Collects random tensors by name, of about the size that keeps activations at one."""

    state: State = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def tensor(self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        assert name not in self.state, name
        self.state[name] = torch.randn(shape, generator=self.generator) * std + mean

    def linear(self, name: str, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        self.tensor(f"{name}.weight", fan_out, fan_in, std=fan_in**-0.5)
        if bias:
            self.tensor(f"{name}.bias", fan_out)

    def norm(self, name: str, width: int) -> None:
        self.tensor(f"{name}.weight", width, std=0.2, mean=1.0)
        self.tensor(f"{name}.bias", width)

    def conv(self, name: str, fan_in: int, fan_out: int, kernel: int, *, bias: bool) -> None:
        self.tensor(f"{name}.weight", fan_out, fan_in, kernel, kernel, std=(fan_in * kernel**2) ** -0.5)
        if bias:
            self.tensor(f"{name}.bias", fan_out)

    def frozen_batch_norm(self, name: str, width: int) -> None:
        for leaf in ("weight", "bias", "running_mean"):
            self.tensor(f"{name}.{leaf}", width, std=0.2, mean=float(leaf == "weight"))
        self.state[f"{name}.running_var"] = torch.rand(width, generator=self.generator) + 0.5

    def mlp(self, name: str, *dims: int) -> None:
        for i, (fan_in, fan_out) in enumerate(pairwise(dims)):
            self.linear(f"{name}.layers.{i}", fan_in, fan_out)

    def deformable_attention(self, name: str, levels: int) -> None:
        self.linear(f"{name}.sampling_offsets", DIM, HEADS * levels * POINTS * 2)
        self.linear(f"{name}.attention_weights", DIM, HEADS * levels * POINTS)
        self.linear(f"{name}.value_proj", DIM, DIM)
        self.linear(f"{name}.output_proj", DIM, DIM)

    def attention(self, name: str) -> None:
        """torch.nn.MultiheadAttention"""
        self.tensor(f"{name}.in_proj_weight", 3 * DIM, DIM, std=DIM**-0.5)
        self.tensor(f"{name}.in_proj_bias", 3 * DIM)
        self.linear(f"{name}.out_proj", DIM, DIM)

    def alias(self, name: str, of: str) -> None:
        """Everything below `of` once more below `name`."""
        for key in [key for key in self.state if key.startswith(f"{of}.")]:
            self.state[name + key.removeprefix(of)] = self.state[key].clone()

    # Backbones

    def resnet(self, prefix: str, blocks: tuple[int, ...] = (2, 2, 2, 2), *, deep: bool = False) -> tuple[int, ...]:
        """torchvision's ResNet; `deep` has bottlenecks. Returns the widths of its stages."""
        self.conv(f"{prefix}conv1", 3, 64, 7, bias=False)
        self.frozen_batch_norm(f"{prefix}bn1", 64)
        width_in, widths = 64, []
        for stage, count in enumerate(blocks):
            inner = 64 * 2**stage
            out = inner * 4 if deep else inner
            for block in range(count):
                name = f"{prefix}layer{stage + 1}.{block}"
                shapes = (
                    [(width_in, inner, 1), (inner, inner, 3), (inner, out, 1)]
                    if deep
                    else [(width_in, inner, 3), (inner, inner, 3)]
                )
                for i, (fan_in, fan_out, kernel) in enumerate(shapes, start=1):
                    self.conv(f"{name}.conv{i}", fan_in, fan_out, kernel, bias=False)
                    self.frozen_batch_norm(f"{name}.bn{i}", fan_out)
                if block == 0 and width_in != out:
                    self.conv(f"{name}.downsample.0", width_in, out, 1, bias=False)
                    self.frozen_batch_norm(f"{name}.downsample.1", out)
                width_in = out
            widths.append(out)
        return tuple(widths)

    def detectron2_resnet(self, prefix: str) -> tuple[int, ...]:
        """The same ResNet-18 under detectron2's names."""
        plain = Writer(generator=self.generator)
        widths = plain.resnet("")
        for key, tensor in plain.state.items():
            name = key
            if name.startswith(("conv1", "bn1")):
                name = f"stem.{name}"
            for number in (1, 2, 3, 4):
                name = name.replace(f"layer{number}.", f"res{number + 1}.")
            for number in (1, 2, 3):
                name = name.replace(f"bn{number}.", f"conv{number}.norm.")
            name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
            self.state[prefix + name] = tensor
        return widths

    def swin(self, prefix: str, outputs: tuple[int, ...] = (1, 2, 3)) -> tuple[int, ...]:
        """Swin-T of the official detection code; a norm for each output."""
        width, window = 96, 7
        self.conv(f"{prefix}patch_embed.proj", 3, width, 4, bias=True)
        self.norm(f"{prefix}patch_embed.norm", width)
        widths = []
        for stage, (depth, heads) in enumerate(zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True)):
            c = width * 2**stage
            for block in range(depth):
                name = f"{prefix}layers.{stage}.blocks.{block}"
                self.norm(f"{name}.norm1", c)
                self.tensor(f"{name}.attn.relative_position_bias_table", (2 * window - 1) ** 2, heads)
                self.state[f"{name}.attn.relative_position_index"] = torch.zeros(window**2, window**2).long()
                self.linear(f"{name}.attn.qkv", c, 3 * c)
                self.linear(f"{name}.attn.proj", c, c)
                self.norm(f"{name}.norm2", c)
                self.linear(f"{name}.mlp.fc1", c, 4 * c)
                self.linear(f"{name}.mlp.fc2", 4 * c, c)
            if stage < 3:
                self.linear(f"{prefix}layers.{stage}.downsample.reduction", 4 * c, 2 * c, bias=False)
                self.norm(f"{prefix}layers.{stage}.downsample.norm", 4 * c)
            widths.append(c)
        for stage in outputs:
            self.norm(f"{prefix}norm{stage}", widths[stage])
        return tuple(widths)

    # Parts that Deformable DETR's descendants share

    def levels(self, widths: tuple[int, ...], levels: int, *, name: str = "input_proj", bias: bool = True) -> None:
        """1x1 convolutions, then 3x3 ones of stride 2, a GroupNorm on each."""
        for i in range(levels):
            fan_in = widths[i] if i < len(widths) else (widths[-1] if i == len(widths) else DIM)
            self.conv(f"{name}.{i}.0", fan_in, DIM, 1 if i < len(widths) else 3, bias=bias)
            self.norm(f"{name}.{i}.1", DIM)

    def layers(self, levels: int) -> None:
        """DeformableTransformerEncoderLayer and DeformableTransformerDecoderLayer."""
        for i in range(ENCODER_LAYERS):
            name = f"transformer.encoder.layers.{i}"
            self.deformable_attention(f"{name}.self_attn", levels)
            self.norm(f"{name}.norm1", DIM)
            self.linear(f"{name}.linear1", DIM, FFN)
            self.linear(f"{name}.linear2", FFN, DIM)
            self.norm(f"{name}.norm2", DIM)
        for i in range(DECODER_LAYERS):
            name = f"transformer.decoder.layers.{i}"
            self.deformable_attention(f"{name}.cross_attn", levels)
            self.norm(f"{name}.norm1", DIM)
            self.attention(f"{name}.self_attn")
            self.norm(f"{name}.norm2", DIM)
            self.linear(f"{name}.linear1", DIM, FFN)
            self.linear(f"{name}.linear2", FFN, DIM)
            self.norm(f"{name}.norm3", DIM)

    def listed_layers(
        self, prefix: str, levels: int, names: tuple[str, str, str] = ("attentions.0", "attentions.1", "ffns.0")
    ) -> None:
        """mmcv's layers: norms in a list, in the order of use; in the older ones attentions and feed-forward blocks too."""
        own, cross, ffn = names
        for i in range(ENCODER_LAYERS + DECODER_LAYERS):
            decoder = i >= ENCODER_LAYERS
            name = f"{prefix}decoder.layers.{i - ENCODER_LAYERS}" if decoder else f"{prefix}encoder.layers.{i}"
            if decoder:
                self.attention(f"{name}.{own}.attn")
            self.deformable_attention(f"{name}.{cross if decoder else own}", levels)
            self.linear(f"{name}.{ffn}.layers.0.0", DIM, FFN)
            self.linear(f"{name}.{ffn}.layers.1", FFN, DIM)
            for norm in range(3 if decoder else 2):
                self.norm(f"{name}.norms.{norm}", DIM)

    def channel_mapper(self, widths: tuple[int, ...], norm: str, *, bias: bool) -> None:
        """A lateral for each width and one further level."""
        for i, width in enumerate(widths):
            self.conv(f"neck.convs.{i}.conv", width, DIM, 1, bias=bias)
            self.norm(f"neck.convs.{i}.{norm}", DIM)
        self.conv("neck.extra_convs.0.conv", widths[-1], DIM, 3, bias=bias)
        self.norm(f"neck.extra_convs.0.{norm}", DIM)

    def branches(self, prefix: str, classes: int, count: int = DECODER_LAYERS + 1) -> None:
        """cls_branches and reg_branches, numbered with the activations between layers; the last pair is the proposals'."""
        for i in range(count):
            self.linear(f"{prefix}cls_branches.{i}", DIM, classes)
            for k, width in ((0, DIM), (2, DIM), (4, 4)):
                self.linear(f"{prefix}reg_branches.{i}.{k}", DIM, width)

    def heads(self, count: int, classes: int, *, shared: bool) -> None:
        """class_embed and bbox_embed."""
        for i in range(count):
            if shared and i:
                self.alias(f"class_embed.{i}", "class_embed.0")
                self.alias(f"bbox_embed.{i}", "bbox_embed.0")
            else:
                self.linear(f"class_embed.{i}", DIM, classes)
                self.mlp(f"bbox_embed.{i}", DIM, DIM, DIM, 4)

    def proposals(self) -> None:
        self.linear("transformer.enc_output", DIM, DIM)
        self.norm("transformer.enc_output_norm", DIM)


def dino(*, swin: bool = False, classes: int = 91, shared: bool = True) -> State:
    w = Writer()
    widths = w.swin("backbone.0.") if swin else w.resnet("backbone.0.body.")
    w.levels(widths[1:], 4)
    w.tensor("transformer.level_embed", 4, DIM)
    w.layers(4)
    w.norm("transformer.decoder.norm", DIM)
    w.mlp("transformer.decoder.ref_point_head", 2 * DIM, DIM, DIM)
    w.tensor("transformer.tgt_embed.weight", QUERIES, DIM)
    w.proposals()
    w.heads(DECODER_LAYERS, classes, shared=shared)
    w.alias("transformer.decoder.class_embed", "class_embed")
    w.alias("transformer.decoder.bbox_embed", "bbox_embed")
    w.linear("transformer.enc_out_class_embed", DIM, classes)
    w.mlp("transformer.enc_out_bbox_embed", DIM, DIM, DIM, 4)
    w.tensor("label_enc.weight", classes + 1, DIM)
    return w.state


def dino_5scale() -> State:
    """DINO_5scale_swin.py: all four stages, one extra level."""
    w = Writer(dino(swin=True))
    for key in [key for key in w.state if key.startswith("input_proj.") or "level_embed" in key]:
        del w.state[key]
    for key in [key for key in w.state if "sampling_offsets" in key or "attention_weights" in key]:
        shape = list(w.state.pop(key).shape)
        shape[0] = shape[0] // 4 * 5
        w.tensor(key, *shape, std=DIM**-0.5 if len(shape) == 2 else 1.0)
    w.norm("backbone.0.norm0", 96)
    w.levels((96, 192, 384, 768), 5)
    w.tensor("transformer.level_embed", 5, DIM)
    return w.state


def detrex_dino(*, swin: bool = False) -> State:
    w = Writer()
    widths = w.swin("backbone.") if swin else w.detectron2_resnet("backbone.")
    _detrex_transformer(w, widths)
    w.norm("transformer.decoder.norm", DIM)
    w.tensor("transformer.tgt_embed.weight", QUERIES, DIM)
    w.proposals()
    w.heads(DECODER_LAYERS + 1, 80, shared=False)  # the last is the encoder's
    w.alias("transformer.decoder.class_embed", "class_embed")
    w.alias("transformer.decoder.bbox_embed", "bbox_embed")
    w.tensor("label_enc.weight", 80, DIM)
    return w.state


def detrex_dn(*, newer: bool = False) -> State:
    w = Writer()
    _detrex_transformer(w, w.detectron2_resnet("backbone."))
    w.mlp("transformer.decoder.query_scale", DIM, DIM, DIM)
    w.tensor("tgt_embed.weight", QUERIES, DIM - 1)
    w.tensor("refpoint_embed.weight", QUERIES, 4)
    w.heads(DECODER_LAYERS, 80, shared=False)
    w.alias("transformer.decoder.bbox_embed", "bbox_embed")
    label = "denoising_generator.label_encoder.weight" if newer else "label_encoder.weight"
    w.tensor(label, 81, DIM - 1)
    return w.state


def _detrex_transformer(w: Writer, widths: tuple[int, ...]) -> None:
    w.channel_mapper(widths[1:], "norm", bias=True)
    w.tensor("transformer.level_embeds", 4, DIM)
    w.listed_layers("transformer.", 4)
    w.mlp("transformer.decoder.ref_point_head", 2 * DIM, DIM, DIM)


def dn_detr() -> State:
    w = Writer()
    w.levels(w.resnet("backbone.0.body.")[1:], 4)
    w.tensor("transformer.level_embed", 4, DIM)
    w.layers(4)
    w.mlp("transformer.decoder.ref_point_head", 2 * DIM, DIM, DIM)
    w.mlp("transformer.decoder.query_scale", DIM, DIM, DIM)
    w.tensor("tgt_embed.weight", QUERIES, DIM - 1)
    w.tensor("refpoint_embed.weight", QUERIES, 4)
    w.heads(DECODER_LAYERS, 91, shared=False)
    w.alias("transformer.decoder.bbox_embed", "bbox_embed")
    w.tensor("label_enc.weight", 92, DIM - 1)
    return w.state


def deformable_detr(*, refine: bool = False, two_stage: bool = False, single_scale: bool = False) -> State:
    w = Writer()
    widths = w.resnet("backbone.0.body.")
    levels = 1 if single_scale else 4
    w.levels(widths[-1:] if single_scale else widths[1:], levels)
    w.tensor("transformer.level_embed", levels, DIM)
    w.layers(levels)
    w.heads(DECODER_LAYERS + two_stage, 91, shared=not refine)
    if refine:
        w.alias("transformer.decoder.bbox_embed", "bbox_embed")
    if two_stage:
        w.alias("transformer.decoder.class_embed", "class_embed")
        w.proposals()
        w.linear("transformer.pos_trans", 2 * DIM, 2 * DIM)
        w.norm("transformer.pos_trans_norm", 2 * DIM)
    else:
        w.tensor("query_embed.weight", QUERIES, 2 * DIM)
        w.linear("transformer.reference_points", DIM, 2)
    return w.state


def relation_detr(*, swin: bool = False, dino: bool = False) -> State:
    """Relation-DETR, or the DINO of the same repository, which has the relation of boxes alone."""
    w = Writer()
    if swin:
        widths = _torchvision_swin(w, "backbone.0.")
    else:
        widths = w.resnet("backbone.")
    w.levels(widths[1:], 4, name="neck.convs", bias=False)
    w.tensor("transformer.level_embeds", 4, DIM)
    w.layers(4)
    w.norm("transformer.decoder.norm", DIM)
    w.mlp("transformer.decoder.ref_point_head", 2 * DIM, DIM, DIM)
    w.conv("transformer.decoder.position_relation_embedding.pos_proj.0", 64, HEADS, 1, bias=True)
    if not dino:
        w.linear("transformer.encoder.memory_fusion.0", (ENCODER_LAYERS + 1) * DIM, DIM)
        w.linear("transformer.encoder.memory_fusion.2", DIM, DIM)
        w.norm("transformer.encoder.memory_fusion.3", DIM)
        w.mlp("transformer.decoder.query_scale", DIM, DIM, DIM)
        w.tensor("transformer.hybrid_tgt_embed.weight", 9, DIM)
        w.linear("transformer.hybrid_class_head", DIM, 91)
        w.mlp("transformer.hybrid_bbox_head", DIM, DIM, DIM, 4)
    w.tensor("transformer.tgt_embed.weight", QUERIES, DIM)
    w.proposals()
    w.linear("transformer.encoder_class_head", DIM, 91)
    w.mlp("transformer.encoder_bbox_head", DIM, DIM, DIM, 4)
    for i in range(DECODER_LAYERS):
        w.linear(f"transformer.decoder.class_head.{i}", DIM, 91)
        w.mlp(f"transformer.decoder.bbox_head.{i}", DIM, DIM, DIM, 4)
    w.tensor("denoising_generator.label_encoder.weight", 91, DIM)
    return w.state


def _torchvision_swin(w: Writer, prefix: str) -> tuple[int, ...]:
    official = Writer(generator=w.generator)
    widths = official.swin("", outputs=())
    for key, tensor in official.state.items():
        name = key.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2")
        if name.startswith("layers."):
            _, stage, rest = name.split(".", 2)
            index = 2 * int(stage) + (2 if rest.startswith("downsample") else 1)
            rest = rest.removeprefix("blocks.").removeprefix("downsample.")
            name = f"features.{index}.{rest}".replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        w.state[prefix + name] = tensor.flatten() if name.endswith("relative_position_index") else tensor
    return widths


def mmdet_dino(*, swin: bool = False, classes: int = 80, ddq: bool = False) -> State:
    """dino-4scale_r50: convolutions of the neck have no bias, since a norm follows. DDQ-DETR has heads for dense queries, those
    of boxes under two names once it was trained."""
    w = Writer()
    widths = _mmdet_swin(w, "backbone.", (1, 2, 3)) if swin else w.resnet("backbone.")
    w.channel_mapper(widths[1:], "gn", bias=False)
    w.listed_layers("", 4, ("self_attn", "cross_attn", "ffn"))
    w.tensor("level_embed", 4, DIM)
    w.linear("memory_trans_fc", DIM, DIM)
    w.norm("memory_trans_norm", DIM)
    w.norm("decoder.norm", DIM)
    w.mlp("decoder.ref_point_head", 2 * DIM, DIM, DIM)
    if ddq:
        w.linear("query_map", DIM, DIM)
        w.branches("bbox_head.", classes, DECODER_LAYERS + 2)
        w.branches("bbox_head.aux_", classes, DECODER_LAYERS)
        w.alias("decoder.aux_reg_branches", "bbox_head.aux_reg_branches")
    else:
        w.tensor("query_embedding.weight", QUERIES, DIM)
        w.branches("bbox_head.", classes)
    w.tensor("dn_query_generator.label_embedding.weight", classes, DIM)
    return w.state


def co_detr(*, swin: str = "", classes: int = 80, project: bool = False) -> State:
    """co_dino_5scale_r50; Swin has the official names in Sense-X's repository and mmdetection's in its project."""
    w = Writer()
    outputs = (0, 1, 2, 3)
    if swin == "official":
        widths = w.swin("backbone.", outputs=outputs)
    elif swin == "mmdet":
        widths = _mmdet_swin(w, "backbone.", outputs)
    else:
        widths = w.resnet("backbone.")
    w.channel_mapper(widths, "gn", bias=False)
    home = "query_head.transformer."
    w.listed_layers(home, 5)
    w.tensor(f"{home}level_embeds", 5, DIM)
    w.linear(f"{home}enc_output", DIM, DIM)
    w.norm(f"{home}enc_output_norm", DIM)
    w.tensor(f"{home}query_embed.weight", QUERIES, DIM)
    w.norm(f"{home}decoder.norm", DIM)
    w.linear(f"{home}decoder.ref_point_head.0", 2 * DIM, DIM)
    w.linear(f"{home}decoder.ref_point_head.2", DIM, DIM)
    for i in range(2):
        w.linear(f"{home}aux_pos_trans.{i}", 2 * DIM, DIM)
        w.norm(f"{home}aux_pos_trans_norm.{i}", DIM)
    w.branches("query_head.", classes)
    w.tensor(f"query_head.{'dn_generator.' if project else ''}label_embedding.weight", classes, DIM)
    w.conv("query_head.downsample.0", DIM, DIM, 3, bias=True)
    w.norm("query_head.downsample.1", DIM)
    w.conv("rpn_head.rpn_conv", DIM, DIM, 3, bias=True)
    w.conv("rpn_head.rpn_cls", DIM, 9, 1, bias=True)
    w.conv("rpn_head.rpn_reg", DIM, 36, 1, bias=True)
    w.linear("roi_head.0.bbox_head.shared_fcs.0", DIM * 49, 4 * DIM)  # 1024 of 256
    w.linear("roi_head.0.bbox_head.shared_fcs.1", 4 * DIM, 4 * DIM)
    w.linear("roi_head.0.bbox_head.fc_cls", 4 * DIM, classes + 1)  # background comes last
    w.linear("roi_head.0.bbox_head.fc_reg", 4 * DIM, 4 * classes)
    for branch in ("cls", "reg"):
        w.conv(f"bbox_head.0.{branch}_convs.0.conv", DIM, DIM, 3, bias=False)
        w.norm(f"bbox_head.0.{branch}_convs.0.gn", DIM)
    for head, width in (("cls", classes), ("reg", 4), ("centerness", 1)):
        w.conv(f"bbox_head.0.atss_{head}", DIM, width, 3, bias=True)
    for level in range(6):
        w.tensor(f"bbox_head.0.scales.{level}.scale")
    return w.state


def _mmdet_swin(w: Writer, prefix: str, outputs: tuple[int, ...]) -> tuple[int, ...]:
    """The official Swin as mmdetection's `swin_converter` renames it; merged cells are in the order of nn.Unfold."""
    official = Writer(generator=w.generator)
    widths = official.swin("", outputs=outputs)
    for key, tensor in official.state.items():
        name = key.replace("patch_embed.proj.", "patch_embed.projection.").replace("layers.", "stages.")
        name = (
            name.replace(".attn.", ".attn.w_msa.")
            .replace("mlp.fc1.", "ffn.layers.0.0.")
            .replace("mlp.fc2.", "ffn.layers.1.")
        )
        w.state[prefix + name] = unfolded(tensor) if "downsample" in key else tensor
    return widths


def unfolded(merged: Tensor) -> Tensor:
    """Columns (cell, channel), cells column by column -> columns (channel, cell), cells row by row: what nn.Unfold gives."""
    cells = merged.unflatten(-1, (4, -1))  # (0, 0), (1, 0), (0, 1), (1, 1) as (row, column)
    return torch.stack([cells[..., k, :] for k in (0, 2, 1, 3)], dim=-1).flatten(-2)


ORIGINALS: dict[str, tuple[str, Callable[[], State]]] = {
    "dino": ("dino", dino),
    "dino unshared": ("dino", lambda: dino(shared=False)),
    "dino swin": ("dino", lambda: dino(swin=True)),
    "dino 5scale swin": ("dino", dino_5scale),
    "detrex dino": ("detrex", detrex_dino),
    "detrex dino swin": ("detrex", lambda: detrex_dino(swin=True)),
    "detrex dn": ("detrex", detrex_dn),
    "detrex dn newer": ("detrex", lambda: detrex_dn(newer=True)),
    "dn_detr": ("dn_detr", dn_detr),
    "deformable one-stage": ("deformable_detr", deformable_detr),
    "deformable single scale": ("deformable_detr", lambda: deformable_detr(single_scale=True)),
    "deformable refine": ("deformable_detr", lambda: deformable_detr(refine=True)),
    "deformable two-stage": ("deformable_detr", lambda: deformable_detr(refine=True, two_stage=True)),
    "mmdet dino": ("mmdet_dino", mmdet_dino),
    "mmdet dino swin": ("mmdet_dino", lambda: mmdet_dino(swin=True)),
    "co-detr": ("co_detr", co_detr),
    "co-detr swin": ("co_detr", lambda: co_detr(swin="official")),
    "co-detr project swin": ("co_detr", lambda: co_detr(swin="mmdet", project=True)),
    "ddq": ("ddq", lambda: mmdet_dino(ddq=True)),
    "ddq swin": ("ddq", lambda: mmdet_dino(ddq=True, swin=True)),
    "relation": ("relation_detr", relation_detr),
    "relation dino": ("relation_detr", lambda: relation_detr(dino=True)),
    "relation swin": ("relation_detr", lambda: relation_detr(swin=True)),
}


@dataclass(frozen=True)
class Original:
    """A checkpoint of an original program: its word for --from, its tensors, and its file."""

    name: str
    origin: str
    state: State
    path: Path

    def save(self) -> Path:
        """As the originals write it: a dict with the weights and the command line's arguments."""
        arguments = argparse.Namespace(nheads=HEADS, enc_n_points=POINTS, dec_n_points=POINTS, lr=1e-4)
        torch.save({"model": self.state, "epoch": 11, "args": arguments}, self.path)
        return self.path


@cache
def _state(name: str) -> State:
    return ORIGINALS[name][1]()


@pytest.fixture(scope="module", params=list(ORIGINALS))
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Every variant of every program."""
    name = request.param
    return Original(name, ORIGINALS[name][0], _state(name), tmp_path_factory.mktemp("x") / "original.pth")


@pytest.fixture
def original_names() -> set[str]:
    """What the variants are called."""
    return set(ORIGINALS)


@pytest.fixture
def make_original(tmp_path: Path) -> Callable[[str], Original]:
    """One of `ORIGINALS` by name, to be changed at will."""

    def make(name: str) -> Original:
        state = {key: value.clone() for key, value in _state(name).items()}
        return Original(name, ORIGINALS[name][0], state, tmp_path / "original.pth")

    return make
