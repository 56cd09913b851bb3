"""`torch.ops.paqdetr.ms_deform_attn`: the kernels as one operator that autograd, `torch.compile` and `torch.export` know.

A CPU runs numba's loops, a GPU Triton's. Backward saves the three inputs, nothing else. Autocast leaves the operator alone:
values come as they are, half precision too, and the door keeps locations and weights in at least float32.

Written with `torch.library.Library` rather than `custom_op`, whose first call imports torch's compiler: a second.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from paqdetr.ops import cpu, cuda

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}
"""By type of device: modules with `NAME`, `forward` and `backward`."""

ran: dict[str, None] = {}
"""Names of back ends that computed something in this process, in order of their first time."""

_library = torch.library.Library("paqdetr", "DEF")
_library.define(
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
    " -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "ms_deform_attn_backward(Tensor gradient, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
    " Tensor attention_weights) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)

# The door's arguments, already checked; `spatial_shapes` as height, width, height, width, ...
ms_deform_attn = torch.ops.paqdetr.ms_deform_attn.default
# Gradients of value, locations and weights from that of the output.
ms_deform_attn_backward = torch.ops.paqdetr.ms_deform_attn_backward.default


def _forward(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    kernels = KERNELS[value.device.type]
    ran[kernels.NAME] = None
    return _untraced(kernels.forward)(value, _pairs(spatial_shapes), locations, weights)


def _backward(
    gradient: Tensor, value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = KERNELS[value.device.type]
    return _untraced(kernels.backward)(gradient, value, _pairs(spatial_shapes), locations, weights)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, hidden from torch's compiler if that has been imported."""
    return _disabled(function) if "torch._dynamo" in sys.modules else function


@functools.cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


def _forward_shape(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, locations.shape[1], heads * channels)


def _backward_shape(
    gradient: Tensor, value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape),
        weights.new_empty(weights.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    to_value, to_locations, to_weights = ms_deform_attn_backward(
        gradient, value, ctx.spatial_shapes, locations, weights
    )
    return to_value, None, to_locations, to_weights


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "ms_deform_attn_backward has no derivative: for second derivatives choose backend='reference' or 'gather'"
    )


def _pairs(spatial_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


for key in ("CPU", "CUDA"):
    _library.impl("ms_deform_attn", _forward, key)
    _library.impl("ms_deform_attn_backward", _backward, key)
torch.library.register_fake("paqdetr::ms_deform_attn", _forward_shape, lib=_library)
torch.library.register_fake("paqdetr::ms_deform_attn_backward", _backward_shape, lib=_library)
torch.library.register_autograd("paqdetr::ms_deform_attn", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("paqdetr::ms_deform_attn_backward", _refuse, lib=_library)
