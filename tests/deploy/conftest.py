"""One tiny model, exported once."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from paqdetr.data.digits.edition import CATEGORIES
from paqdetr.models import Detector, create_model
from paqdetr.structures import ClassTable


class Exported(NamedTuple):
    checkpoint: Path
    file: Path


def tiny(name: str = "paq_dino_nano", **settings: object) -> Detector:
    """A model whose ten classes are the digits, with random weights; its scores are spread out, so that ranks are no ties."""
    torch.manual_seed(0)
    sizes = {"num_classes": 10, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 30, "dim": 32, "ffn_dim": 32}
    model = create_model(name, image_size=64, **{**sizes, **settings}).eval()
    model.classes = ClassTable.from_categories(CATEGORIES)
    with torch.no_grad():
        for head in model.decoder.class_heads:
            head.weight.mul_(20)
    return model


@pytest.fixture(scope="session")
def graphs_once() -> Iterator[None]:
    """torch takes twenty seconds for the graph of a model. That of the same weights, size, batch and form is made once, and every
    export writes its own file from it."""
    import paqdetr.deploy.export  # noqa: F401
    from paqdetr.ops import choice

    module: Any = sys.modules["paqdetr.deploy.export"]  # its name in the package is the function's
    capture, onnx_graph = module.capture, module.onnx_graph
    programs: dict[Any, Any] = {}
    graphs: dict[int, Any] = {}

    def capture_once(detector: Any, *how: Any) -> Any:
        weights = hashlib.sha256()
        for name, tensor in detector.state_dict().items():
            weights.update(name.encode() + tensor.numpy().tobytes())
        key = (weights.digest(), repr(detector.detector.config), detector.raw, choice._forced, repr(how))
        if key not in programs:
            programs[key] = capture(detector, *how)
        return programs[key]

    def graph_once(program: Any, info: Any) -> Any:
        if id(program) not in graphs:
            graphs[id(program)] = onnx_graph(program, info)
        return copy.deepcopy(graphs[id(program)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "capture", capture_once)
        patch.setattr(module, "onnx_graph", graph_once)
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, graphs_once: None) -> Exported:
    from paqdetr.deploy import export

    folder = tmp_path_factory.mktemp("exported")
    checkpoint = folder / "tiny.safetensors"
    tiny().save(checkpoint)
    return Exported(checkpoint, export(checkpoint).file)
