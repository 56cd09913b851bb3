"""Operators that the package does not leave to torch, against torch's own: the layers of the nano at 256 px, four images.

python benchmarks/operators.py --json operators.json

Depthwise convolutions: the weights' gradient alone. Softmax: over the 12 places that a head of three levels looks at.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import compare, interleave, provenance

from paqdetr.models.encoder import softmax
from paqdetr.ops.depthwise import weight_gradient

# kernel, channels, side: layers of EfficientNet-Lite0 at strides 16 and 32. Its 3x3 layers are left to torch.
DEPTHWISE = ((5, 672, 16), (5, 1152, 8), (3, 480, 16), (3, 1152, 8))
BATCH = 4
ROWS, PLACES = 4 * 320 * 8, 12


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = provenance(threads=1, seed=0, packages=("paqdetr", "torch", "numba"))
    report |= {"clock": "cpu", "rounds": arguments.rounds, "cases": {}}
    for kernel, channels, side in DEPTHWISE:
        name = f"weights' gradient, depthwise {kernel}x{kernel}, {channels} channels of {side}x{side}"
        report["cases"][name] = depthwise(kernel, channels, side, arguments.rounds)
    report["cases"][f"softmax, {ROWS:,} rows of {PLACES}"] = places(arguments.rounds)
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def depthwise(kernel: int, channels: int, side: int, rounds: int) -> dict[str, Any]:
    """One layer."""
    x, gradient = (
        torch.randn(BATCH, channels, side, side).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    weight = torch.randn(channels, 1, kernel, kernel)

    def torchs() -> torch.Tensor:
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, None, [1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], channels, [False, True, False]
        )[1]  # fmt: skip

    def ours() -> torch.Tensor:
        return weight_gradient(x, gradient, (kernel, kernel), 1, kernel // 2, 1)

    torch.testing.assert_close(ours(), torchs(), rtol=1e-3, atol=1e-3)
    times = interleave({"torch": torchs, "paqdetr": ours}, rounds=rounds, clock=time.process_time)
    return compare(times, against="torch")


def places(rounds: int) -> dict[str, Any]:
    """Forward and backward."""
    logits = torch.randn(ROWS, PLACES, requires_grad=True)
    weights = torch.randn(ROWS, PLACES)

    def torchs() -> torch.Tensor:
        return torch.autograd.grad((logits.softmax(-1) * weights).sum(), logits)[0]

    def ours() -> torch.Tensor:
        return torch.autograd.grad((softmax(logits) * weights).sum(), logits)[0]

    torch.testing.assert_close(ours(), torchs())
    times = interleave({"torch": torchs, "paqdetr": ours}, rounds=rounds, clock=time.process_time)
    return compare(times, against="torch")


if __name__ == "__main__":
    main()
