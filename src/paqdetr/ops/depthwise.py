"""Depthwise convolution whose weights' gradient is computed fast on a CPU.

torch's takes, for kernels of 5x5, several times as long as everything else about such a layer. Forward pass and the gradient of
the map are torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from paqdetr.ops.choice import numba_missing
from paqdetr.ops.compiled import chunks, kernel
from paqdetr.ops.threads import for_each

# torch is as fast with smaller ones.
_LEAST_KERNEL = 4
# Channels of a block: 4 registers of AVX-512, so that 4 additions wait for none of each other.
_LANES = 64


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int, padding: int, dilation: int
) -> Tensor:
    """`F.conv2d` with as many groups as channels: (B, C, H, W), (C, 1, kh, kw), (C,) or None -> (B, C, h, w).

    The result has the same bits as torch's; so has the gradient of x. The weights' has the same ones with any number of threads,
    and differs from torch's by rounding.
    """
    if _is_ours(x, weight):
        return _DepthwiseConv2d.apply(x, weight, bias, stride, padding, dilation)  # type: ignore[no-any-return]
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    """Whether the loop is made for this, and worth it."""
    return (
        min(weight.shape[-2:]) >= _LEAST_KERNEL
        and torch.is_grad_enabled()
        and weight.requires_grad
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and numba_missing() is None
    )


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        to_x, _, to_bias = torch.ops.aten.convolution_backward(
            gradient, x, weight, [x.shape[1]], [stride] * 2, [padding] * 2, [dilation] * 2,
            False, [0, 0], x.shape[1], [need_x, False, need_bias],
        )  # fmt: skip
        to_weight = None
        if need_weight:
            to_weight = weight_gradient(x, gradient, tuple(weight.shape[-2:]), *ctx.geometry)
        return to_x, to_weight, to_bias, None, None, None


def weight_gradient(
    x: Tensor, gradient: Tensor, window: tuple[int, int], stride: int, padding: int, dilation: int
) -> Tensor:
    """(B, C, H, W), (B, C, h, w) float32 on a CPU -> (C, 1, kh, kw)."""
    batch, channels, height, width = x.shape
    high, wide = gradient.shape[-2:]
    rows, columns = window
    out = x.new_zeros(rows * columns, channels)
    arrays = [_rows(x), _rows(gradient), out]
    addresses = [array.data_ptr() for array in arrays]
    sizes = (batch, height, width, channels, high, wide, rows, columns, stride, padding, dilation)

    def work(block: tuple[int, int]) -> None:
        first, lanes = block
        kernel("weight_gradient", lanes)(*addresses, first, *sizes)

    for_each(work, chunks(channels, _LANES), threads=torch.get_num_threads())
    # Strides as those of weights, which DDP asks for: `contiguous` leaves a transposed single column or row as it is.
    return out.t().clone(memory_format=torch.contiguous_format).view(channels, 1, rows, columns)


def _rows(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> contiguous (B, H, W, C)."""
    return maps.detach().permute(0, 2, 3, 1).contiguous()
