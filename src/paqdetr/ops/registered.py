"""`torch.ops.paqdetr.ms_deform_attn`: the kernels as one operator that autograd, `torch.compile` and `torch.export` know.

A CPU runs numba's loops, a GPU Triton's. Backward saves the three inputs, nothing else. Autocast leaves the operator alone:
values come as they are, half precision too, and the door keeps locations and weights in at least float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from paqdetr.ops import cpu, cuda

_operator: Any = torch.library.custom_op  # declared to return a function, which has no `register_fake`

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}
"""By type of device: modules with `NAME`, `forward` and `backward`."""

ran: dict[str, None] = {}
"""Names of back ends that computed something in this process, in order of their first time."""


@_operator("paqdetr::ms_deform_attn", mutates_args=())
def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The door's arguments, already checked; `spatial_shapes` as height, width, height, width, ..."""
    kernels = KERNELS[value.device.type]
    ran[kernels.NAME] = None
    return kernels.forward(value, _pairs(spatial_shapes), sampling_locations, attention_weights)


@_operator("paqdetr::ms_deform_attn_backward", mutates_args=())
def ms_deform_attn_backward(
    gradient: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    kernels = KERNELS[value.device.type]
    return kernels.backward(gradient, value, _pairs(spatial_shapes), sampling_locations, attention_weights)


@ms_deform_attn.register_fake
def _(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, locations.shape[1], heads * channels)


@ms_deform_attn_backward.register_fake
def _(
    gradient: Tensor, value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, locations, weights)
    )  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    to_value, to_locations, to_weights = ms_deform_attn_backward(
        gradient, value, ctx.spatial_shapes, locations, weights
    )
    return to_value, None, to_locations, to_weights


ms_deform_attn.register_autograd(_differentiate, setup_context=_save)


def _pairs(spatial_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))
