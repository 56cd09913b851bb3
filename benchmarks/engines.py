"""An exported model in onnxruntime and OpenVINO beside torch with numba's attention, and transformers' Deformable DETR.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/engines.py --json docs/results/engines.json

One thread: `predict` of paq_dino_nano on a picture of 320 px, random weights, in turns, in CPU time, which other work on the
machine disturbs less; in torch the module that is exported, too, and everything once more without selection of distinct queries.
Two threads: the engines beside transformers' Deformable DETR R50 at 640 px, as somebody would take it who wants a detector of
that family, by the clock and without what is around the models. Pictures are noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import compare, interleave, provenance

from paqdetr.deploy import export
from paqdetr.deploy.export import to_openvino
from paqdetr.deploy.graph import DeployedDetector
from paqdetr.models import Detector, create_model
from paqdetr.ops import use_backend
from paqdetr.runtime import open_exported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"num_classes": 80, "image_size": arguments.size}
    models = {
        "": create_model("paq_dino_nano", **sizes).eval(),
        ", no selection": create_model("paq_dino_nano", **sizes, distinct_proposals=None, distinct_queries=None).eval(),
    }
    noise = np.random.default_rng(0).integers(256, size=(1, arguments.size, arguments.size, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, (what, model) in enumerate(models.items()):
            onnx, xml = Path(folder, f"{number}.onnx"), Path(folder, f"{number}.xml")
            to_openvino(onnx, xml, export(model, onnx).info)
            files |= {f"onnxruntime{what}": onnx, f"openvino f32{what}": xml}
        found = {"one thread": _beside_numba(models, files, noise, arguments.rounds)}
        shown = {name: files[name] for name in ("onnxruntime", "openvino f32")}
        found["two threads"] = _beside_transformers(shown, noise, max(arguments.rounds // 10, 3))
    packages = ("paqdetr", "torch", "numba", "onnxruntime", "openvino", "transformers")
    content = {**provenance(threads=1, seed=0, packages=packages), "model": "paq_dino_nano", **found}
    for title, rows in found.items():
        print(title)
        for name, row in rows.items():
            print(
                f"  {name:40} {row['median_ms']:8.1f} ms  {row['ratio']:.2f}x, fastest {row['ratio_of_fastest']:.2f}x"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def _beside_numba(
    models: dict[str, Detector], files: dict[str, Path], noise: np.ndarray, rounds: int
) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, plain = models.values()
    module, images, [picture] = DeployedDetector(model), torch.from_numpy(noise), noise

    def run(backend: str, call: Callable[[], object]) -> None:
        with torch.inference_mode(), use_backend(backend):
            call()

    engines = {name: open_exported(file, threads=1) for name, file in files.items()}
    cases = {
        "torch, numba": lambda: run("numba", lambda: model.predict(picture)),
        "torch, reference": lambda: run("reference", lambda: model.predict(picture)),
        "torch, numba, no selection": lambda: run("numba", lambda: plain.predict(picture)),
        "torch, numba, exported module": lambda: run("numba", lambda: module(images)),
        **{name: (lambda engine=engine: engine.predict(picture)) for name, engine in engines.items()},
    }
    return compare(interleave(cases, rounds=rounds, clock=time.process_time), against="torch, numba")


def _beside_transformers(files: dict[str, Path], noise: np.ndarray, rounds: int) -> dict[str, Any]:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    torch.set_num_threads(2)
    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone
    )
    other = DeformableDetrForObjectDetection(config).eval()
    pixels = torch.randn(1, 3, 640, 640)

    def run() -> None:
        with torch.inference_mode():
            other(pixels)

    name = "transformers, Deformable DETR R50, 640 px"
    engines = {key: open_exported(file, threads=2) for key, file in files.items()}
    cases = {name: run, **{key: (lambda engine=engine: engine.run(noise)) for key, engine in engines.items()}}
    return compare(interleave(cases, rounds=rounds), against=name)


if __name__ == "__main__":
    main()
