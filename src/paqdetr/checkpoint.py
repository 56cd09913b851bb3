"""A checkpoint is one safetensors file: tensors, and a header that says what they are. No pickle.

The header's `paqdetr` entry is json with model name, config, class table, preprocessing, metrics and version; any
safetensors reader shows it without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paqdetr._version import __version__
from paqdetr.errors import CheckpointError

_KEY = "paqdetr"


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    metadata = {_KEY: json.dumps({**header, "version": __version__})}
    try:
        save_file(content, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_header(path: str | Path) -> dict[str, Any]:
    """The header alone, without reading a tensor.

    Raises:
        CheckpointError: no such file, not safetensors, or not written by paqdetr.
    """
    return _open(Path(path))[1]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, on the CPU, and the header. Raises as `read_header`."""
    return _open(Path(path), tensors=True)


def _open(path: Path, tensors: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise CheckpointError(
            f"{path}: a pickle, which this program does not open", "give a .safetensors file"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint", "a run writes best.safetensors and last.safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error})", "copy or train it again"
        ) from None
    try:
        return content, json.loads(metadata[_KEY])
    except (KeyError, json.JSONDecodeError):
        raise CheckpointError(
            f"{path}: safetensors without a paqdetr header", "convert weights of other programs first"
        ) from None


def load_tensors(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill a module; every name and shape must agree.

    Raises:
        CheckpointError: naming the first tensors that are missing, left over or of another shape.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in tensors]
    extra = [key for key in tensors if key not in own]
    reshaped = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    for problem, keys in (("lacks", missing), ("has unknown", extra), ("has another shape for", reshaped)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{where}: it is of another model: it {problem} {', '.join(keys[:3])}{more}",
                "load it with the model and settings it was made with",
            )
    module.load_state_dict(dict(tensors))
