"""The programs that run exported graphs on a CPU: onnxruntime and OpenVINO. And the seal that shows a damaged file."""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.errors import BackendError, CheckpointError, import_extra
from paqdetr.files import read_bytes
from paqdetr.runtime.info import FILE_ENTRY, KEY

_SEAL_KEY = f"{KEY}_sha256"
# The last bytes of a file: a further entry of the ONNX message's metadata_props (field 14: key and value), or a comment of XML.
_ENTRY = bytes([1 << 3 | 2, len(_SEAL_KEY)]) + _SEAL_KEY.encode() + bytes([2 << 3 | 2, 64])
_SEALS = {
    ".onnx": (bytes([14 << 3 | 2, len(_ENTRY) + 64]) + _ENTRY, b""),
    ".xml": (f"<!-- {_SEAL_KEY} ".encode(), b" -->\n"),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """An open graph.

    Attributes:
        name: of the program that runs it, with its version.
        metadata: the json text that the file holds; empty where another program made it.
        batch: images of a call, where the graph has a fixed number.
        run: (N, H, W, 3) uint8, or (N, 3, H, W) float32 of a raw graph -> its outputs by name. Threads may call it at once.
    """

    name: str
    metadata: str
    batch: int | None
    run: Callable[[np.ndarray], dict[str, np.ndarray]]


def open_engine(path: Path, threads: int | None = None) -> Engine:
    """An .onnx or .xml file, ready to run. Arguments and errors are those of `open_exported`."""
    if threads is None:
        said = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(said) if said.isascii() and said.isdigit() and len(said) < 5 else 0
    kind, opener = {".onnx": ("ONNX", _open_onnx), ".xml": ("OpenVINO", _open_openvino)}[path.suffix.lower()]
    content = read_bytes(path, limit=None, error=CheckpointError)
    _check_seal(path, content)
    try:
        engine = opener(path, content, threads)
    except BackendError:
        raise
    except Exception as error:  # of classes that their C++ parts make
        problem = f"{path}: not a readable {kind} model ({' '.join(str(error).split())[:200]})"
        raise CheckpointError(problem, "copy it again, or export the model again") from None
    if not engine.metadata:
        raise CheckpointError(
            f"{path}: an {kind} model that paqdetr did not export: its metadata has no entry {KEY!r}",
            "give a file that `paqdetr export` has written",
        )
    return engine


def seal(path: Path) -> None:
    """Append the SHA-256 of an exported file's content, of an .xml file's .bin as well."""
    before, after = _SEALS[path.suffix.lower()]
    digest = _digest(path, path.read_bytes())
    with path.open("ab") as file:
        file.write(before + digest + after)


def is_sealed(path: Path) -> bool:
    """Whether a file is there and was written by `paqdetr export`; .pt2 and TorchScript archives by the extra file they hold."""
    if not path.is_file():
        return False
    suffix = path.suffix.lower()
    if suffix not in _SEALS:
        return zipfile.is_zipfile(path) and any(name.endswith(FILE_ENTRY) for name in zipfile.ZipFile(path).namelist())
    before, after = _SEALS[suffix]
    return path.read_bytes()[-(len(before) + 64 + len(after)) :].startswith(before)


def _check_seal(path: Path, content: bytes) -> None:
    before, after = _SEALS[path.suffix.lower()]
    start = content.rfind(before)
    if start < 0:
        return  # another program's, or rewritten by one: its metadata will show
    if content[start + len(before) :] != _digest(path, content[:start]) + after:
        raise CheckpointError(
            f"{path}: damaged, or changed since its export (the SHA-256 at its end differs)",
            "copy it again from where it came, or export the model again",
        )


def _digest(path: Path, content: bytes) -> bytes:
    total = hashlib.sha256(content)
    if path.suffix.lower() == ".xml":
        total.update(read_bytes(path.with_suffix(".bin"), limit=None, error=CheckpointError))
    return total.hexdigest().encode()


def _open_onnx(path: Path, content: bytes, threads: int) -> Engine:
    program = import_extra("onnxruntime", "onnx")
    options = program.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = program.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs, first = [output.name for output in session.get_outputs()], session.get_inputs()[0]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(None, {first.name: images}), strict=True))

    batch = first.shape[0] if first.shape and isinstance(first.shape[0], int) else None
    metadata = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return Engine(f"onnxruntime {program.__version__}", metadata, batch, run)


def _open_openvino(path: Path, content: bytes, threads: int) -> Engine:
    program = import_extra("openvino", "openvino")
    # Its own choice is bfloat16 on some processors: other boxes, and others again on the next machine.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    core, entry = program.Core(), ["model_info", KEY]
    graph = core.read_model(str(path))
    metadata = graph.get_rt_info(entry).astype(str) if graph.has_rt_info(entry) else ""
    shape = graph.inputs[0].partial_shape
    batch = None if shape[0].is_dynamic else shape[0].get_length()
    if batch is None:
        # Compiled for any batch it takes longer; and with one thread a batch of eight was not faster than its images.
        shape[0] = 1
        graph.reshape(shape)
    compiled = core.compile_model(graph, "CPU", settings)
    local, outputs = threading.local(), [output.any_name for output in compiled.outputs]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        parts = [images] if batch else [images[i : i + 1] for i in range(len(images))]
        found = [[np.array(values) for values in local.request.infer([part]).values()] for part in parts]
        return {name: np.concatenate(values) for name, values in zip(outputs, zip(*found, strict=True), strict=True)}

    return Engine(f"OpenVINO {program.__version__.split('-')[0]}", metadata, batch, run)
