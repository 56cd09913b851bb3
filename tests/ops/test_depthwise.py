"""The gradient of depthwise convolutions against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paqdetr.ops import depthwise
from paqdetr.ops.depthwise import depthwise_conv2d, weight_gradient

pytest.importorskip("numba")
LAST = torch.channels_last


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=LAST)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.sampled_from([2, 3, 16, 67, 130]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_the_gradient_of_the_weights_is_torchs(
    batch: int,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    seed: int,
) -> None:
    if any(side + 2 * padding < dilation * (tap - 1) + 1 for side, tap in zip(size, kernel, strict=True)):
        return  # no place for the kernel
    torch.manual_seed(seed)
    x, weight = maps(batch, channels, *size).double(), torch.randn(channels, 1, *kernel).double()
    weight.requires_grad_()
    y = F.conv2d(x, weight, None, stride, padding, dilation, channels)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, weight, gradient)
    found = weight_gradient(x.float(), gradient.float(), kernel, stride, padding, dilation)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.stride() == weight.stride()  # DDP copies other gradients, and warns


def layer(channels: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = maps(2, channels, 8, 6), torch.randn(channels, 1, 5, 5)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(channels, requires_grad=True)


def test_the_layer_is_torchs_but_for_the_rounding_of_that_gradient() -> None:
    x, weight, bias = layer()
    expected = F.conv2d(x, weight, bias, 2, 2, 1, 70)
    found = depthwise_conv2d(x, weight, bias, stride=2, padding=2, dilation=1)
    assert type(found.grad_fn).__name__ == "_DepthwiseConv2dBackward"
    assert torch.equal(found, expected)
    gradient = torch.randn_like(found)
    theirs = torch.autograd.grad(expected, (x, weight, bias), gradient)
    ours = torch.autograd.grad(found, (x, weight, bias), gradient)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[2], theirs[2])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    x, weight, bias = layer(channels=300)
    gradient = maps(2, 300, 8, 6)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = depthwise_conv2d(x, weight, bias, stride=1, padding=2, dilation=1)
            found.append(torch.autograd.grad(y, weight, gradient)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("what", ["frozen", "no grad", "small", "double", "channels first", "autocast", "no numba"])
def test_torch_does_what_the_loop_is_not_made_for(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = layer()
    if what == "frozen":
        weight = weight.detach()
    if what == "small":
        weight = weight[..., 1:4, 1:4].detach().requires_grad_()
    if what == "double":
        x, weight, bias = x.double(), weight.double(), bias.double()
    if what == "channels first":
        x = x.contiguous(memory_format=torch.contiguous_format)
    if what == "no numba":
        monkeypatch.setattr(depthwise, "numba_missing", lambda: "it is not there")
    with torch.set_grad_enabled(what != "no grad"), torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        found = depthwise_conv2d(x, weight, bias, stride=1, padding=2, dilation=1)
        expected = F.conv2d(x, weight, bias, 1, 2, 1, 70)
    assert torch.equal(found, expected)
    assert type(found.grad_fn).__name__ != "_DepthwiseConv2dBackward"
