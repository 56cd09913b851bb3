"""One tiny model, exported once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    from paqdetr.deploy import export

    folder = tmp_path_factory.mktemp("exported")
    checkpoint = folder / "tiny.safetensors"
    tiny().save(checkpoint)
    return Exported(checkpoint, export(checkpoint).file)
