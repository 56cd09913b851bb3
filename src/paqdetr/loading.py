"""Any model file by its ending: checkpoints, runs, and what `paqdetr export` has written."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.files import EXPORTED, EXPORTED_BY_TORCH, open_regular
from paqdetr.runtime import Predictor, open_exported
from paqdetr.runtime.engines import Engine
from paqdetr.runtime.info import FILE_ENTRY, OUTPUTS

if TYPE_CHECKING:
    from paqdetr.models import Detector
    from paqdetr.structures import ClassTable


def is_exported(path: str | Path) -> bool:
    """Whether a path names an exported model, by its ending."""
    return Path(path).suffix.lower() in EXPORTED + EXPORTED_BY_TORCH


def require_model(path: str | Path) -> Path:
    """Find what is wrong with a model's file before torch is imported, which takes seconds; tensors are not read.

    Returns:
        the file that is meant.

    Raises:
        CheckpointError: it is missing, or of another kind.
    """
    if not is_exported(path):
        from paqdetr.checkpoint import find_described

        return find_described(path)[0]
    open_regular(Path(path), error=CheckpointError).close()
    return Path(path)


def load(
    path: str | Path,
    *,
    device: str | None = "cpu",
    classes: ClassTable | Sequence[str] | int | None = None,
    num_queries: int | None = None,
    threads: int | None = None,
) -> Detector | Predictor:
    """A model from a file, by its ending. Each has `predict`, `classes` and `preprocessing`.

    Args:
        path: a .safetensors file, a folder of a run (its best.safetensors, else last.safetensors) or of `save_pretrained`, or
            `hf:user/name@revision`, a model of the Hub, which give a `Detector`; or an exported .onnx, .xml (OpenVINO), .pt2 or
            .torchscript file, which gives a `Predictor`. The first two of these are run without torch.
        device: where a `Detector` is put, None for the best there is; exported models run on the CPU.
        classes: other classes, see `paqdetr.models.load`.
        num_queries: another number of queries.
        threads: of an exported model, that work on one image; `OMP_NUM_THREADS`, else one for each core.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
        ConfigError: torch cannot use the device, or an argument does not go with the file.
        BackendError: the engine that runs it is not installed.
    """
    if is_exported(path):
        if classes is not None or num_queries is not None:
            raise ConfigError(
                f"{path}: the classes and queries of an exported model cannot be changed",
                "change its checkpoint and export it again",
            )
        if device is not None and not str(device).startswith("cpu"):
            raise ConfigError(
                f"{path}: an exported model runs on the CPU here, not on {device}", "load its checkpoint there"
            )
        return open_any_exported(path, threads=threads)
    if threads is not None:
        raise ConfigError("threads: of exported models alone", "call torch.set_num_threads for a checkpoint")
    file = require_model(path)
    from paqdetr.models import load as load_detector

    return load_detector(file, device=device, classes=classes, num_queries=num_queries)


def open_any_exported(path: str | Path, *, threads: int | None = None) -> Predictor:
    """As `open_exported`, with .pt2 and .torchscript files as well, which torch runs with its own threads. Open those of people
    you trust alone: torch runs code that is in them.

    Raises:
        CheckpointError: the file is missing, damaged, or from elsewhere.
    """
    path = Path(path)
    if path.suffix.lower() not in EXPORTED_BY_TORCH:
        return open_exported(path, threads=threads)
    open_regular(path, error=CheckpointError).close()
    import torch
    import torchvision  # noqa: F401, whose operators a graph may have

    found = {FILE_ENTRY: ""}
    try:
        if path.suffix.lower() == ".pt2":
            program = torch.export.load(path, extra_files=found)
            module, name = program.module(), next(iter(program.graph_signature.user_inputs))
            size = next(node.meta["val"].shape[0] for node in program.graph.nodes if node.name == name)
            batch = size if isinstance(size, int) else None  # a symbol stands for any number
        else:
            module, batch = torch.jit.load(str(path), _extra_files=found), None
    except Exception as error:  # of any class, where a file is damaged
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: not a readable {path.suffix} file ({reason})", "export the model again"
        ) from None
    text = found[FILE_ENTRY]
    if not text:
        raise CheckpointError(
            f"{path}: a model that paqdetr did not export: it holds no {FILE_ENTRY}",
            "give a file that `paqdetr export` has written",
        )
    lock = threading.Lock()  # an exported program keeps state while it runs

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with lock, torch.inference_mode():
            outputs = [output.numpy() for output in module(torch.from_numpy(images))]
        return dict(zip(OUTPUTS[len(outputs) == 2], outputs, strict=True))

    return Predictor(
        Engine(f"torch {torch.__version__}", text if isinstance(text, str) else text.decode(), batch, run), str(path)
    )
