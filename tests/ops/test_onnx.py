"""Export to ONNX, where its libraries are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paqdetr.ops import ms_deform_attn, use_backend

pytestmark = pytest.mark.integration

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)

SHAPES = [(4, 5), (2, 3)]


class Attention(nn.Module):
    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, SHAPES, locations, weights)


@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_onnxruntime_gives_the_same(backend: str, tmp_path: Path, problem: Any) -> None:
    import onnxruntime

    inputs = problem(SHAPES, channels=8, dtype=torch.float32)
    file, names = tmp_path / "attention.onnx", ["value", "locations", "weights"]

    def export() -> None:
        torch.onnx.export(Attention(), inputs, file, input_names=names, dynamo=True)

    if backend == "auto":
        export()
    else:
        with use_backend(backend):
            export()
    session = onnxruntime.InferenceSession(file)
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    (found,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(found), Attention()(*inputs))
