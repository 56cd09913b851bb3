"""Frozen batch norms, folded into the convolutions before them.

A frozen norm multiplies and shifts each channel by constants. Done as written it reads and writes every activation once more,
forward and backward. Scaling the weights instead gives the same result and costs next to nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torchvision.ops import FrozenBatchNorm2d

from paqdetr.ops.depthwise import depthwise_conv2d

_Norm = FrozenBatchNormAct2d | FrozenBatchNorm2d


class FoldedNorm(nn.Module):
    """What is left of a frozen norm: its numbers, under their names, and the activation that timm puts behind it."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def __init__(self, norm: _Norm) -> None:
        super().__init__()
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.eps = cast(float, norm.eps)
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, (C,) and (C,)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Only the activation: the convolution has done the rest."""
        return self.act(self.drop(x))


class FoldedConv2d(nn.Module):
    """A convolution whose weights are scaled by the norm that followed it. Its own weights stay what they were, and train."""

    def __init__(self, conv: nn.Conv2d, norm: FoldedNorm) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation, self.groups = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.pads_same = isinstance(conv, Conv2dSame)
        self._is_depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
        self._norm = (norm,)  # in a tuple: its tensors belong to its own place in the model

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, c', H', W'), normed."""
        weight, bias = self._fold()
        padding = self.padding
        if self.pads_same:
            x, padding = pad_same(x, list(weight.shape[-2:]), list(self.stride), list(self.dilation)), 0
        if self._is_depthwise and not isinstance(padding, str):
            stride, pad, dilation = (_one(sides) for sides in (self.stride, padding, self.dilation))
            if stride is not None and pad is not None and dilation is not None:
                return depthwise_conv2d(x, weight, bias, stride=stride, padding=pad, dilation=dilation)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Weight and bias. Not kept between calls: fused optimisers, and writes to `.data`, change weights without a trace."""
        scale, shift = self._norm[0].affine()
        bias = shift if self.bias is None else shift + self.bias * scale
        return self.weight * scale[:, None, None, None], bias


def _one(sides: int | Sequence[int]) -> int | None:
    """The number that holds along both axes; None if there are two."""
    if isinstance(sides, int):
        return sides
    return sides[0] if len(set(sides)) == 1 else None


@torch.no_grad()
def fold_frozen_norms(body: nn.Module) -> int:
    """Replace every frozen norm that follows a convolution, in place. Names and values of all tensors stay.

    Which norm follows which convolution is seen in a forward pass over a small black image.

    Returns:
        How many were folded. A norm behind anything else is left as it is, and so is one whose convolution something else reads
        as well: another norm, a sum, or whoever takes the features.
    """
    if not any(isinstance(part, _Norm) for part in body.modules()):
        return 0
    training = body.training
    body.eval()
    watch = _Readers()
    handles = watch.hooks(body)
    try:
        with watch:
            features = body(torch.zeros(1, 3, 64, 64, device=next(body.parameters()).device))
        watch.read(features)
    finally:
        body.train(training)
        for handle in handles:
            handle.remove()
    pairs = watch.pairs()
    for conv_name, norm_name in pairs:
        conv, norm = body.get_submodule(conv_name), body.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, _Norm)
        folded = FoldedNorm(norm)
        body.set_submodule(norm_name, folded)
        body.set_submodule(conv_name, FoldedConv2d(conv, folded))
    return len(pairs)


class _Readers(TorchFunctionMode):
    """Who reads the outputs of convolutions during a forward pass: names of norms, and "" for everything else."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # holding the tensor keeps its id from being given away
        self._readers: dict[str, set[str]] = {}
        self._norm = ""

    def hooks(self, body: nn.Module) -> list[RemovableHandle]:
        """Note what comes out of convolutions, and when a norm is at work."""
        found = []
        for name, part in body.named_modules():
            if type(part) in (nn.Conv2d, Conv2dSame):
                found.append(part.register_forward_hook(partial(self._made, name)))
            elif isinstance(part, _Norm):
                found.append(part.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
                found.append(part.register_forward_hook(lambda *_: self._enter("")))
        return found

    def read(self, values: object) -> None:
        """Note what is read now."""
        for value in tree_leaves(values):
            if id(value) in self._outputs:
                self._readers[self._outputs[id(value)][0]].add(self._norm)

    def pairs(self) -> list[tuple[str, str]]:
        """Convolution and norm, where each has no other."""
        only = [(conv, *readers) for conv, readers in self._readers.items() if len(readers) == 1 and "" not in readers]
        readers = Counter(name for names in self._readers.values() for name in names)
        return [(conv, norm) for conv, norm in only if readers[norm] == 1]

    def _made(self, name: str, part: nn.Module, inputs: object, output: Tensor) -> None:
        self._outputs[id(output)] = (name, output)
        self._readers.setdefault(name, set())

    def _enter(self, name: str) -> None:
        self._norm = name

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") != "__get__":  # asking for a shape reads nothing
            self.read((args, kwargs))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def bake_folded_norms(model: nn.Module) -> None:
    """Replace every `FoldedConv2d` by a plain convolution with the scaled weights, in place: an exported graph then holds the
    weights themselves and no computation of them."""
    for name, part in list(model.named_modules()):
        if isinstance(part, FoldedConv2d):
            weight, bias = part._fold()
            outputs, inputs, *kernel = weight.shape
            names = ("stride", "padding", "dilation", "groups")
            how: dict[str, Any] = {"kernel_size": tuple(kernel), **{name: getattr(part, name) for name in names}}
            baked = (Conv2dSame if part.pads_same else nn.Conv2d)(inputs * part.groups, outputs, **how)
            baked.weight, baked.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            model.set_submodule(name, baked)
