"""Triton's kernels without a GPU: their results in Triton's interpreter, and their compilation for three kinds of GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton, which comes with torch on Linux"
    ),
]

INTERPRETED = """
import torch
from paqdetr.ops import cuda, registered
from paqdetr.ops.deform_attn import ms_deform_attn_reference

registered.KERNELS["cpu"] = cuda  # the interpreter runs on a CPU
PYRAMIDS = [[(4, 5), (2, 3)], [(1, 1)], [(3, 1), (1, 7), (1, 1)]]
cases = 0
for shapes, batch, queries, heads, channels, points, dtype in [
    (PYRAMIDS[0], 2, 21, 2, 8, 3, torch.float32),  # more queries than a block, and a part of one
    (PYRAMIDS[0], 1, 5, 1, 3, 1, torch.float32),  # channels that fill no power of two
    (PYRAMIDS[1], 2, 3, 2, 1, 2, torch.float32),
    (PYRAMIDS[2], 1, 4, 2, 8, 2, torch.bfloat16),
    (PYRAMIDS[0], 2, 0, 2, 8, 2, torch.float32),
    (PYRAMIDS[0], 0, 3, 2, 8, 2, torch.float32),
]:
    torch.manual_seed(cases)
    tokens = sum(h * w for h, w in shapes)
    grid = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, tokens, heads, channels).to(dtype)
    locations = torch.rand(*grid, 2) * 1.6 - 0.3
    if queries:  # far outside, and on edges and centres of pixels
        for q, place in enumerate((-1e9, 1e9, 0.0, 1.0, 0.5)[: queries]):
            locations[:, q, :, :, 0] = place
    # Gradients jump at pixel centres: rounding decides on which side.
    sizes = torch.tensor([[w, h] for h, w in shapes])[:, None]
    near = (locations * sizes - 0.5).sub((locations * sizes - 0.5).round()).abs() < 0.02
    locations = torch.where(near, locations + 0.05 / sizes, locations)
    weights = torch.randn(grid)
    results = []
    for attention in (registered.ms_deform_attn, ms_deform_attn_reference):
        inputs = [x.clone().requires_grad_() for x in (value, locations, weights)]
        sides = [side for shape in shapes for side in shape] if attention is registered.ms_deform_attn else shapes
        found = attention(inputs[0], sides, inputs[1], inputs[2])
        gradient = torch.linspace(-1, 1, found.numel()).view_as(found).to(found.dtype)
        results.append([found, *torch.autograd.grad(found, inputs, gradient)])
    for x, y in zip(*results):
        assert x.dtype == y.dtype and x.shape == y.shape
        tolerance = 2e-2 if x.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)
    cases += 1

value = torch.ones(1, 4, 1, 1)
places = torch.tensor([float("nan"), float("inf"), 0.5]).view(1, 3, 1, 1, 1, 1).expand(-1, -1, -1, -1, -1, 2)
found = cuda.forward(value, [(2, 2)], places, torch.ones(1, 3, 1, 1, 1))
assert found.flatten().isnan().tolist() == [True, True, False]
assert registered.ran == {"triton": None}
print(cases)
"""

COMPILED = """
import inspect

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from paqdetr.ops import triton_kernels

sizes = dict(HEADS=8, LEVELS=4, POINTS=4, CHANNELS=32, BLOCK=16, WIDE=32)
done = 0
for kernel in (triton_kernels.forward, triton_kernels.backward):
    for values in ("*fp32", "*bf16"):
        kinds = {"levels": "*i32", "tokens": "i32", "queries": "i32"} | dict.fromkeys(sizes, "constexpr")
        kinds |= dict.fromkeys(("value", "out", "gradient"), values)
        signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
        # 7.5 is Turing, 8.0 Ampere, 9.0 Hopper.
        for capability in (75, 90) if values == "*fp32" else (80,):
            if "constexprs" in inspect.signature(ASTSource).parameters:
                source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
            else:  # Triton 3.2
                numbers = {name: kind for name, kind in signature.items() if name not in sizes}
                source = ASTSource(fn=kernel, signature=numbers, constants=sizes)
            done += len(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]) > 0
print(done)
"""


def run(script: str, tmp_path: Path, **environment: str) -> str:
    path = tmp_path / "script.py"  # Triton reads the source of what it runs
    path.write_text(script, encoding="utf-8")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(SRC), "TRITON_CACHE_DIR": str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, str(path)], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_equal_to_the_reference_in_the_interpreter(tmp_path: Path) -> None:
    assert run(INTERPRETED, tmp_path, TRITON_INTERPRET="1") == "6"


def test_compiles_for_gpus(tmp_path: Path) -> None:
    assert run(COMPILED, tmp_path) == "6"
