"""Backbone and encoder in 8 bits, kept only if the AP stays and the latency falls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from paqdetr.data.dataset import DetectionDataset
from paqdetr.deploy.graph import save_graph
from paqdetr.errors import ExportError
from paqdetr.evaluation.evaluate import evaluate_split
from paqdetr.runtime import ExportInfo, Predictor, open_exported
from paqdetr.runtime.engines import Engine
from paqdetr.timing import interleave

CALIBRATION_IMAGES = 300
MIN_SPEEDUP = 1.1
"""How many times faster int8 has to be: a tenth less latency, rounded."""

# In these parts small differences decide which of two queries finds an object: RT-DETR falls to an AP of 0 with its decoder in
# 8 bits (ultralytics pull request 26191).
_FLOAT_PARTS = ("detector.decoder", "detector.start", "detector.query_source")
_ROUNDS = 30


def quantize_checked(
    plain: Path,
    output: Path,
    info: ExportInfo,
    splits: Sequence[DetectionDataset],
    *,
    parts: Mapping[str, str],
    max_drop: float,
    slow: bool,
    check: bool,
) -> dict[str, Any] | None:
    """Quantise an exported float model, and measure both.

    Args:
        plain: the float model, .onnx or .xml.
        output: the file to write, of the same kind.
        info: of the new file.
        splits: to calibrate on, and to measure AP on.
        parts: the part of the model that each node is of, by the node's name.
        max_drop: AP that may be lost.
        slow: with accuracy control: layers return to float until the AP is within `max_drop` (OpenVINO alone).
        check: measure AP and latency here.

    Returns:
        AP, AP50 and milliseconds of "float" and "int8"; None without `check`.

    Raises:
        ExportError: too much AP is lost, or too little time gained.
    """
    import nncf

    train, held_out = splits
    before = open_exported(plain)
    images = [before.preprocessing(train.image(i))[None] for i in spread(len(train), CALIBRATION_IMAGES)]
    graph, names = _read(plain)
    in_float = [name for name in names if parts.get(name.split("/")[0], "").startswith(_FLOAT_PARTS)]
    arguments: dict[str, Any] = {
        "model_type": nncf.ModelType.TRANSFORMER,
        "ignored_scope": nncf.IgnoredScope(names=in_float, validate=False),
        "subset_size": len(images),
    }
    if plain.suffix.lower() == ".onnx":  # onnxruntime has no kernels for activations with a scale for each channel
        from nncf.quantization.advanced_parameters import QuantizationParameters

        per_tensor = QuantizationParameters(per_channel=False)
        arguments["advanced_parameters"] = nncf.AdvancedQuantizationParameters(
            activations_quantization_params=per_tensor
        )
    calibration = nncf.Dataset(images, lambda image: {"images": image})
    if slow:

        def score(compiled: Any, items: Iterable[Any]) -> tuple[float, None]:
            for _ in items:  # the data set is that of `held_out`
                pass

            def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
                found = compiled([pixels])
                return {output.any_name: np.array(found[output]) for output in compiled.outputs}

            return _figures(Predictor(Engine("nncf", before.engine.metadata, None, run)), held_out)["AP"], None

        quantized = nncf.quantize_with_accuracy_control(
            graph,
            calibration,
            nncf.Dataset(images[:1], lambda image: {"images": image}),
            score,
            max_drop=max_drop,
            **arguments,
        )
    else:
        quantized = nncf.quantize(graph, calibration, **arguments)
    save_graph(quantized, output, info)
    if not check:
        return None
    after = open_exported(output)
    found = {"float": _figures(before, held_out), "int8": _figures(after, held_out)}
    calls = {"float": lambda: before.run(images[0]), "int8": lambda: after.run(images[0])}
    times = {key: 1e3 * median(seconds) for key, seconds in interleave(calls, rounds=_ROUNDS).items()}
    for key, value in times.items():
        found[key]["ms"] = round(value, 2)
    drop, speedup = found["float"]["AP"] - found["int8"]["AP"], times["float"] / times["int8"]
    measured = (
        f"AP {found['float']['AP']:.3f} -> {found['int8']['AP']:.3f}, {times['float']:.1f} -> {times['int8']:.1f} ms"
    )
    if not drop <= max_drop:
        raise ExportError(
            f"int8 is not written: it loses {drop:.3f} AP on {held_out.name}, more than {max_drop} ({measured})",
            "keep f32 or f16, allow more with --max-drop, or try --slow",
        )
    if speedup < MIN_SPEEDUP:
        raise ExportError(
            f"int8 is not written: it is {speedup:.2f} times as fast, expected {MIN_SPEEDUP} ({measured})",
            "keep f32, which loses no AP; --no-check writes int8 for another machine",
        )
    return {**found, "max_drop": max_drop, "calibration_images": len(images)}


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices, evenly over `count`."""
    return sorted({i * count // min(count, wanted) for i in range(min(count, wanted))})


def _read(file: Path) -> tuple[Any, list[str]]:
    """The graph of an .onnx or .xml file, and its nodes' names. OpenVINO makes several nodes of one, named NODE/PART."""
    if file.suffix.lower() == ".onnx":
        import onnx

        model = onnx.load(str(file))
        return model, [node.name for node in model.graph.node]
    import openvino

    graph = openvino.Core().read_model(str(file))
    return graph, [node.get_friendly_name() for node in graph.get_ordered_ops()]


def _figures(predictor: Predictor, split: DetectionDataset) -> dict[str, float]:
    figures = evaluate_split(predictor, split).figures
    return {"AP": round(figures.AP, 4), "AP50": round(figures.AP50, 4)}
