"""What every parameter starts with, in one place.

| parameters | start |
|---|---|
| matrices of encoder, decoder, position heads, proposal projection | Xavier-uniform |
| deformable attention: offsets, weights | a ring of directions; uniform attention (`DeformableAttention.init_weights`) |
| convolutions of the neck | Xavier-uniform, bias 0 |
| class heads | bias such that every probability is 0.01; weights as torch makes them |
| box heads, last layer | 0: a layer starts by repeating the box it is given |
| one-stage hosts: the first layer's box heads | bias -2 for width and height |
| level embeddings, learned positions, anchors, labels | N(0, 1) |
| static content, patterns and their mixing | `model.content_std`; `model.pattern_std`, `model.bias_std`, `model.gain` |
| gate of residual mixtures | 0 |
| backbone | ImageNet weights or timm's own start |

Source: the published codes of Deformable DETR and DINO, which agree on these.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from paqdetr.models.attention import MLP, DeformableAttention
from paqdetr.models.start import LearnedPoints, ProposalStart

if TYPE_CHECKING:
    from paqdetr.models.detector import Detector

# So that the many background queries do not drown the first steps.
_CLASS_BIAS = -math.log((1 - 0.01) / 0.01)


def init_weights(model: Detector) -> None:
    """Give every parameter outside the backbone and the query source its start, as the table above says."""
    for part in (
        model.encoder,
        model.decoder.layers,
        model.decoder.position_head,
        model.decoder.position_scale,
    ):
        if part is not None:
            _xavier(part)
    for part in model.neck.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
            _zero(part.bias)
    class_heads, box_heads = list(model.decoder.class_heads), list(model.decoder.box_heads)
    start = model.start
    if isinstance(start, ProposalStart):
        nn.init.xavier_uniform_(start.head.project.weight)
        if start.embed is not None:
            _xavier(start.embed)
        class_heads.append(start.head.class_head)
        box_heads.append(start.head.box_head)
    for head in class_heads:
        nn.init.constant_(head.bias, _CLASS_BIAS)  # type: ignore[arg-type]
    for head in box_heads:
        last = _last(head)
        nn.init.zeros_(last.weight)
        _zero(last.bias)
    if not isinstance(start, ProposalStart):
        nn.init.constant_(_last(model.decoder.box_heads[0]).bias[2:], -2.0)
    if isinstance(start, LearnedPoints):
        nn.init.xavier_uniform_(start.point_head.weight)
        _zero(start.point_head.bias)


def _xavier(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            nn.init.xavier_uniform_(module.in_proj_weight)
    for module in part.modules():
        if isinstance(module, DeformableAttention):
            module.init_weights()


def _last(head: nn.Module) -> nn.Linear:
    assert isinstance(head, MLP)
    layer = head[-1]
    assert isinstance(layer, nn.Linear)
    return layer


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)
