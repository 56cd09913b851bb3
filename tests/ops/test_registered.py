"""The operator as torch's tools see it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from paqdetr.ops import ms_deform_attn
from paqdetr.ops.registered import ms_deform_attn as operator
from paqdetr.ops.registered import ms_deform_attn_backward as operator_backward

SHAPES = [(4, 5), (2, 3)]
FLAT = [4, 5, 2, 3]


class Attention(nn.Module):
    def __init__(self, backend: Any = "numba") -> None:
        super().__init__()
        self.backend = backend

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, SHAPES, locations, weights, self.backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(dtype: torch.dtype, needs_grad: bool, problem: Any) -> None:
    """torch's own checks: schema, fake kernel, autograd registration, tracing with symbolic shapes."""
    value, locations, weights = problem(SHAPES, dtype=torch.float32)
    inputs = [x.requires_grad_(needs_grad) for x in (value.to(dtype), locations, weights)]
    torch.library.opcheck(operator, (inputs[0], FLAT, inputs[1], inputs[2]))
    if not needs_grad:
        gradient = torch.randn(2, 3, 6, dtype=dtype)
        torch.library.opcheck(operator_backward, (gradient, inputs[0], FLAT, inputs[1], inputs[2]))


@pytest.mark.parametrize("backend", ["auto", "reference", "gather", "numba"])
def test_compiles_without_a_graph_break(backend: Any, problem: Any) -> None:
    """Without inductor, which would need a compiler."""
    inputs = [x.requires_grad_() for x in problem(SHAPES, dtype=torch.float32)]
    compiled = torch.compile(Attention(backend), fullgraph=True, backend="aot_eager")
    found, expected = compiled(*inputs), Attention(backend)(*inputs)
    torch.testing.assert_close(found, expected)
    for x, y in zip(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_one_compiled_graph_serves_other_sizes(problem: Any) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(Attention(), fullgraph=True, dynamic=True, backend=count)
    for batch, queries in ((5, 7), (6, 11), (9, 4)):  # equal sizes would be taken for one
        inputs = problem(SHAPES, batch=batch, queries=queries, dtype=torch.float32)
        torch.testing.assert_close(compiled(*inputs), Attention()(*inputs))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["auto", "reference", "gather", "numba"])
def test_exports_and_runs(backend: Any, problem: Any) -> None:
    inputs = problem(SHAPES, dtype=torch.float32)
    queries = torch.export.Dim("queries", min=2, max=100)
    dynamic = ({}, {1: queries}, {1: queries})
    program = torch.export.export(Attention(backend), inputs, dynamic_shapes=dynamic)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    others = problem(SHAPES, queries=9, dtype=torch.float32)
    torch.testing.assert_close(loaded(*others), Attention(backend)(*others))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert ("paqdetr.ms_deform_attn.default" in operators) == (backend in ("auto", "numba"))
    assert any("grid_sample" in name for name in operators) == (backend == "reference")


@pytest.mark.parametrize("backend", ["reference", "gather", "numba"])
def test_under_autocast_places_stay_exact(backend: Any, problem: Any) -> None:
    shapes = [(80, 90), (2, 3)]
    value, locations, weights = (x.requires_grad_() for x in problem(shapes, dtype=torch.float32))
    half = value.detach().bfloat16().requires_grad_()
    expected = ms_deform_attn(half.float(), shapes, locations, weights, backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = ms_deform_attn(half, shapes, locations, weights, backend)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    found.float().sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    assert locations.grad is not None and locations.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_the_inputs_alone(dtype: torch.dtype, problem: Any) -> None:
    value, locations, weights = problem(SHAPES, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (value.to(dtype), locations, weights)]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ms_deform_attn(inputs[0], SHAPES, inputs[1], inputs[2], "numba").sum()
    assert {x.data_ptr() for x in kept if x.numel() > 1} == {x.data_ptr() for x in inputs}


def test_saved_bytes_against_the_reference(problem: Any) -> None:
    """At the encoder's proportions, 16 points of 32 channels: far below half."""
    shapes = [(20, 20), (10, 10), (5, 5), (3, 3)]
    value, locations, weights = (
        x.requires_grad_() for x in problem(shapes, 1, 534, heads=8, channels=32, points=4, dtype=torch.float32)
    )
    sizes = {}
    for backend in ("reference", "numba"):
        storages: dict[int, int] = {}

        def keep(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(keep, lambda x: x):
            ms_deform_attn(value, shapes, locations, weights, backend).sum()  # type: ignore[arg-type]
        sizes[backend] = sum(storages.values())
    assert sizes["numba"] == sum(x.numel() * 4 for x in (value, locations, weights))
    assert sizes["numba"] < 0.2 * sizes["reference"]


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_inputs_that_need_no_gradient_get_none(wanted: int, problem: Any) -> None:
    inputs = problem(SHAPES)
    inputs[wanted].requires_grad_()
    ms_deform_attn(inputs[0], SHAPES, inputs[1], inputs[2], "numba").sum().backward()
    assert [x.grad is not None for x in inputs] == [i == wanted for i in range(3)]


def test_a_second_derivative_is_refused_not_wrong(problem: Any) -> None:
    inputs = [x.requires_grad_() for x in problem(SHAPES)]
    found = ms_deform_attn(inputs[0], SHAPES, inputs[1], inputs[2], "numba")
    (gradient,) = torch.autograd.grad(found.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative.*reference"):
        gradient.sum().backward()


def test_shapes_alone_on_the_meta_device(problem: Any) -> None:
    inputs = [x.to("meta") for x in problem(SHAPES)]
    with FlopCounterMode(display=False) as counter:
        assert ms_deform_attn(inputs[0], SHAPES, inputs[1], inputs[2]).shape == (2, 3, 6)
        assert operator(inputs[0], FLAT, inputs[1], inputs[2]).shape == (2, 3, 6)
    assert counter.get_total_flops() == 0
