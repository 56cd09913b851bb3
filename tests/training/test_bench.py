from __future__ import annotations

import pytest
import torch

from paqdetr.errors import ConfigError
from paqdetr.training.bench import bench, bench_files

TINY = {
    "model.backbone": "test_resnet",
    "model.dim": 32,
    "model.ffn_dim": 32,
    "model.num_queries": 10,
    "model.num_classes": 3,
    "model.encoder_layers": 1,
    "model.decoder_layers": 2,
}


def test_two_models_take_turns() -> None:
    told: list[tuple[int, int]] = []
    found = bench(
        "paq_dino_nano",
        against="dino_nano",
        image_size=64,
        batch_size=2,
        device="cpu",
        rounds=2,
        progress=lambda done, total: told.append((done, total)),
        settings=TINY,
    )
    assert told == [(n, 6) for n in range(1, 7)]
    assert next(iter(found.attention)) == "reference" and found.attention["reference"]["ratio"] == 1
    for part in (found.inference, found.training_step):
        assert list(part) == ["paq_dino_nano", "dino_nano"] and part["dino_nano"]["ratio"] == 1
        assert all(0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in part.values())
    speed, median = found.images_per_second["inference"], found.inference["paq_dino_nano"]["median_ms"]
    assert speed == pytest.approx(2e3 / median, rel=0.01)
    # Patterns, their extractor and their weights are what PaQ adds to the same host.
    assert found.saved_mib["paq_dino_nano"] > found.saved_mib["dino_nano"] > 0
    assert found.to_json()["peak_memory_gib"] > 0


@pytest.mark.parametrize(
    ("model", "against", "message"),
    [("dino_nano", "dino_nano", "is the model itself"), ("dino_nano", "dion_nano", "dino_nano")],
)
def test_what_cannot_be_compared(model: str, against: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(model, against=against, image_size=64, device="cpu", settings=TINY)


def test_an_exported_model_refuses_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paqdetr.training.bench.require_device", torch.device)  # as if there were one
    with pytest.raises(ConfigError, match=r"a\.onnx: an exported model runs on the CPU here, not on cuda"):
        bench_files(["a.onnx"], device="cuda")


def test_exported_models_have_a_size_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"image size 320: an exported model has a size of its own"):
        bench_files(["a.onnx", "b.xml"], image_size=320)
