"""From a trained detector to a file for another program, which is kept only if it finds what the detector finds."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from paqdetr._version import __version__
from paqdetr.checkpoint import find_checkpoint
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import split_to_evaluate
from paqdetr.deploy.graph import MAX_BATCH, DeployedDetector, capture, fixed_size, save_graph
from paqdetr.deploy.parity import IMAGES, Parity, compare_with_model, digits_pictures
from paqdetr.deploy.quantize import quantize_checked, spread
from paqdetr.environment import package_version
from paqdetr.errors import ConfigError, ExportError, import_extra
from paqdetr.files import storage_errors
from paqdetr.loading import open_any_exported
from paqdetr.models import Detector
from paqdetr.models import load as load_detector
from paqdetr.ops import use_backend
from paqdetr.outputs import made_by, require_replaceable, write_json, write_output
from paqdetr.runtime import ExportInfo
from paqdetr.runtime.engines import is_sealed
from paqdetr.runtime.info import FILE_ENTRY, OUTPUTS, Attention, Format, Precision, require_choices
from paqdetr.values import is_whole, require_nms, require_threshold

ENDINGS: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "torchscript": ".torchscript"}
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_MAKER = "paqdetr export"
_OPSET = 18


@dataclass(frozen=True, slots=True)
class Export:
    """What `export` wrote.

    Attributes:
        file: the model; an OpenVINO model has its weights beside it, in a .bin file of the same name.
        report_file: the comparison with the model, as json; None if it was not checked.
        info: what the file says about itself.
        parity: the comparison on pictures; None if it was not checked, or in int8, which has a check of its own.
        quantization: AP and milliseconds of the int8 model and of the float model; None in f32 and f16, and unchecked.
    """

    file: Path
    report_file: Path | None
    info: ExportInfo
    parity: Parity | None
    quantization: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Ready for json."""
        return {
            "file": str(self.file),
            "bytes": sum(part.stat().st_size for part in _parts(self.file)),
            "image_size": [self.info.preprocessing.height, self.info.preprocessing.width],
            "precision": self.info.precision,
            "source_sha256": self.info.source,
            "versions": dict(self.info.versions),
            "parity": self.parity and self.parity.to_json(),
            "quantization": self.quantization,
        }


def export(
    model: Detector | str | Path,
    output: str | Path | None = None,
    *,
    format: Format | None = None,
    image_size: tuple[int, int] | int | None = None,
    batch: int | None = None,
    precision: Precision = "f32",
    calibrate: str | Path | None = None,
    threshold: float | None = None,
    nms: float | None = None,
    raw: bool = False,
    check: bool = True,
    attention: Attention = "grid_sample",
    max_drop: float = 0.01,
    slow: bool = False,
    overwrite: bool = False,
) -> Export:
    """Write a detector for another program.

    In goes `images`, (N, H, W, 3) uint8 RGB, stretched to one size; scaling and normalisation are in the graph. Out come `boxes`
    (N, n, 4) xyxy in [0, 1], `scores` (N, n), best first, and `labels` (N, n) int64, indices into the classes of the metadata.

    Args:
        model: a detector, a .safetensors file or a run's folder.
        output: the file; beside the checkpoint if not given.
        format: "onnx" (opset 18), "openvino" (.xml and .bin), "pt2" (torch.export) or "torchscript" (deprecated in torch); None:
            the one whose files end as `output` does, else "onnx".
        image_size: (height, width) in pixels that images are stretched to, or the side of a square; by default the checkpoint's
            size, as a square.
        batch: images of a call, always as many; None: any number, as int8 and TorchScript take.
        precision: of the weights. "f16" halves the file, computation stays in float32. "int8" computes backbone and encoder in
            8 bits, and needs `calibrate`.
        calibrate: a data set: the comparison takes pictures of it, and int8 is calibrated on its training split and checked on
            its validation split.
        threshold: the least score that predictions keep, written into the metadata; None: that of the model's `operating_point`.
        nms: IoU over which they drop duplicates, likewise; 1 drops none, and is written as null.
        raw: `pixel_values` (N, 3, H, W), normalised, to `logits` and `pred_boxes`, named as in transformers.
        check: compare the file with the model on 8 pictures, in int8 AP and latency with those in float, and keep it only if it
            is as good.
        attention: "gather" for TensorRT, whose GridSample is wrong.
        max_drop: AP that int8 may lose.
        slow: quantise in int8 with accuracy control, which leaves layers in float until the AP is within `max_drop`; "openvino"
            alone.
        overwrite: replace files that something else has written.

    Raises:
        ExportError: the file does not find what the model finds; nothing is left behind.
        ConfigError: an argument.
        BackendError: a package that is needed is not installed.
        StorageError: a file cannot be written.
    """
    format = format or _format_of(output)
    require_choices(format=format, precision=precision, attention=attention)
    _require_arguments(format, precision, batch, raw=raw, calibrate=calibrate, max_drop=max_drop, slow=slow)
    require_nms(nms)
    if threshold is not None:
        require_threshold(threshold)
    source, detector = "", model
    if not isinstance(model, Detector):
        if not isinstance(model, (str, os.PathLike)):
            raise ConfigError(
                f"model: expected a Detector, a checkpoint or a run's folder, found {type(model).__name__}",
                "paqdetr.load(PLACE) gives a Detector; of a Run give run.output, of an exported model what it was made from",
            )
        checkpoint = find_checkpoint(model)
        output = output or checkpoint.with_suffix(ENDINGS[format])
        detector = load_detector(checkpoint)
        source = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    if output is None:
        raise ConfigError("output: a model that comes from no file needs one", "name the file to write")
    assert isinstance(detector, Detector)
    file = Path(output)
    if file.suffix != ENDINGS[format]:  # in small letters: loaders go by it
        raise ConfigError(
            f"{file}: a file in the format {format} ends in {ENDINGS[format]}",
            f"name it {file.with_suffix(ENDINGS[format])}",
        )
    size = fixed_size(detector, image_size)
    for part in _parts(file):
        require_replaceable(part, _MAKER, overwrite=overwrite or is_sealed(file))
    report_file = file.with_name(f"{file.name}.report.json")
    if check:
        require_replaceable(report_file, _MAKER, overwrite=overwrite)
    needed = _NEEDS.get(format, ()) + ("nncf",) * (precision == "int8")
    for package in needed:
        import_extra(package, "export")
    splits: list[DetectionDataset] = []
    if calibrate is not None:
        names = ["train"] * (precision == "int8") + [split_to_evaluate(calibrate, None)]
        splits = [open_split(calibrate, name) for name in names]
    point = detector.operating_point
    info = ExportInfo(
        name=detector.name,
        classes=detector.classes,
        preprocessing=size,
        raw=raw,
        precision=precision,
        max_detections=detector.config.max_detections,
        clamp_boxes=detector.config.clamp_boxes,
        threshold=point.threshold if threshold is None else threshold,
        nms=point.nms if nms is None else None if nms == 1 else nms,
        source=source,
        versions={"paqdetr": __version__, **{name: package_version(name) or "unknown" for name in ("torch", *needed)}},
    )
    parity, quantization = None, None
    with tempfile.TemporaryDirectory(prefix="paqdetr-export-") as folder, _quietly():
        made = Path(folder) / file.name
        if precision == "int8":
            plain = Path(folder) / f"float{file.suffix}"
            parts = _write(detector, plain, replace(info, precision="f32"), format, batch, attention)
            quantization = quantize_checked(
                plain, made, info, splits, parts=parts, max_drop=max_drop, slow=slow, check=check
            )
        else:
            _write(detector, made, info, format, batch, attention)
            if check:
                pictures = [splits[0].image(i) for i in spread(len(splits[0]), IMAGES)] if splits else digits_pictures()
                exported = open_any_exported(made)
                least = exported.operating_point.least_score()
                parity = compare_with_model(detector, exported, pictures, threshold=least)
                _require_parity(parity, file)
        if made_by(report_file) == _MAKER:  # it says nothing of the new file
            with storage_errors(report_file):
                report_file.unlink()
        for part in reversed(_parts(made)):  # the weights before the graph that names them
            write_output(file.with_suffix(part.suffix), partial(shutil.copyfile, part), maker=_MAKER, overwrite=True)
    done = Export(file, report_file if check else None, info, parity, quantization)
    if check:
        write_json(report_file, done.to_json(), maker=_MAKER, overwrite=overwrite)
    return done


def _format_of(output: str | Path | None) -> Format:
    ending = ENDINGS["onnx"] if output is None else Path(output).suffix.lower()
    for known, own in ENDINGS.items():
        if own == ending:
            return known
    endings = ", ".join(f"{own} ({known})" for known, own in ENDINGS.items())
    raise ConfigError(f"{output}: no format has this ending", f"end it in one of {endings}")


def _require_arguments(
    format: str, precision: str, batch: int | None, *, raw: bool, calibrate: object, max_drop: float, slow: bool
) -> None:
    if batch is not None and not (is_whole(batch) and 1 <= batch <= MAX_BATCH):
        raise ConfigError(f"batch: expected 1 to {MAX_BATCH} images, found {batch}", "leave it out for any number")
    if batch is not None and format == "torchscript":
        raise ConfigError("batch does not go with the format torchscript, which takes any number", "leave batch out")
    if precision == "int8" and batch not in (None, 1):  # it is calibrated with one image at a time
        raise ConfigError(f"precision int8 does not go with batch {batch}", "leave batch out for any number of images")
    if slow and (precision, format) != ("int8", "openvino"):
        raise ConfigError(
            f"slow goes with int8 in the format openvino alone, found {precision} in {format}",
            "choose the format openvino, or leave slow out",
        )
    if precision != "f32" and format not in _NEEDS:
        raise ConfigError(f"precision {precision} does not go with the format {format}", "choose onnx or openvino")
    if precision == "int8" and raw:
        raise ConfigError("precision int8 does not go with raw: its check needs detections", "leave one of them out")
    if precision == "int8" and calibrate is None:
        raise ConfigError(
            "precision int8 needs images to calibrate on", "name a data set with calibrate (--calibrate DATA)"
        )
    if not 0 <= max_drop <= 1:
        raise ConfigError(f"max_drop: expected AP from 0 to 1, found {max_drop}", "0.01 is usual")


def _require_parity(parity: Parity, file: Path) -> None:
    if parity.passed:
        return
    compared, missing = (sum(getattr(image, key) for image in parity.images) for key in ("compared", "missing"))
    raw = max((image.raw_difference or 0 for image in parity.images), default=0)
    error = ExportError(
        f"{file}: not written: it does not find what the model finds: {missing} of {compared} detections have no partner of "
        f"their class with IoU >= {parity.min_iou} and a score within {parity.max_score_difference}"
        + (f"; raw outputs are off by {raw:.2g}" if raw else ""),
        "report it with the model's settings (docs/deploy.md has the known reasons); --no-check writes the file all the same",
    )
    error.parity = parity
    raise error


def _write(
    detector: Detector, file: Path, info: ExportInfo, format: Format, batch: int | None, attention: Attention
) -> dict[str, str]:
    """The model as a sealed file, unchecked. Returns the part of the model that each of its nodes is of, by the node's name."""
    module = DeployedDetector(detector, raw=info.raw)
    text, size = info.to_json(), info.preprocessing
    with use_backend("gather" if attention == "gather" else "reference"), torch.no_grad():
        if format == "torchscript":
            script: Any = torch.jit.trace(module, (module.example(size, 2),), check_trace=False)
            torch.jit.save(script, str(file), _extra_files={FILE_ENTRY: text})
            return {}
        program = capture(module, size, batch)
    if format == "pt2":
        torch.export.save(program, file, extra_files={FILE_ENTRY: text})
        return {}
    graph = file.with_suffix(".onnx")
    parts = _write_onnx(program, graph, info)
    if format == "openvino":
        to_openvino(graph, file, info)
        graph.unlink()
    return parts


def to_openvino(graph: Path, file: Path, info: ExportInfo) -> None:
    """An exported .onnx file as a sealed .xml file with its .bin."""
    import openvino

    save_graph(openvino.Core().read_model(str(graph)), file, info)


def _write_onnx(program: ExportedProgram, file: Path, info: ExportInfo) -> dict[str, str]:
    model = onnx_graph(program, info)
    if info.precision == "f16":
        _halve_weights(model)
    save_graph(model, file, info)
    return {node.name: node.doc_string for node in model.graph.node}


def onnx_graph(program: ExportedProgram, info: ExportInfo) -> Any:
    """The ModelProto of a captured module; `doc_string` of each node is the part of the model that it is of."""
    how: dict[str, Any] = {"dynamo": True, "verbose": False, "external_data": False, "opset_version": _OPSET}
    names = ["pixel_values" if info.raw else "images"]
    exported = torch.onnx.export(program, input_names=names, output_names=OUTPUTS[info.raw], **how)
    assert exported is not None
    model = exported.model_proto
    for node in model.graph.node:
        scope = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
        node.doc_string = next(reversed(re.findall(r"(?:^|/)(detector[\w.]*): ", scope)), "")
        del node.metadata_props[:]  # lines and paths of our source
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.shape.dim[0].dim_param:  # torch's own name for it, such as s34
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    model.producer_name, model.producer_version = _MAKER, __version__
    return model


def _halve_weights(model: Any) -> None:
    """Store large weights in half precision. A cast in front of each keeps the computation in float32; engines do it once."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    for weight in list(model.graph.initializer):
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < 256:
            continue
        half = numpy_helper.to_array(weight).astype(np.float16)
        if np.isfinite(half).all():
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(half, f"{name}_f16"))
            model.graph.node.insert(0, helper.make_node("Cast", [f"{name}_f16"], [name], to=TensorProto.FLOAT))


def _parts(file: Path) -> list[Path]:
    """The files of an exported model."""
    return [file, file.with_suffix(".bin")] if file.suffix.lower() == ".xml" else [file]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what exporters have to say about their own parts."""
    # Whoever listens to all loggers gets torch's traces too, which take longer than the export.
    names = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", "torch.__trace", "nncf")
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in levels:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
