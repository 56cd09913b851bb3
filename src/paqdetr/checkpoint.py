"""A checkpoint is one safetensors file: tensors, and a header that says what they are. No pickle.

The header's `paqdetr` entry is json with model name, config, class table, preprocessing, metrics and version; any
safetensors reader shows it without torch. Its last key, `sha256`, covers the rest of it and every tensor: a file that was damaged
on its way is refused, whatever safetensors itself makes of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paqdetr._version import __version__
from paqdetr.errors import CheckpointError
from paqdetr.files import open_regular, parse_json, write_whole
from paqdetr.text import some

_KEY = "paqdetr"
_HASH = "sha256"


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the whole new one, after a crash or a power cut too.

    Raises:
        StorageError: it cannot be written; what was at `path` before is still there.
    """
    content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    full = {**header, "version": __version__}
    # Inside the json: several entries of metadata would be written in no fixed order.
    metadata = {_KEY: json.dumps({**full, _HASH: _digest(json.dumps(full), content)})}

    def write(temporary: Path) -> None:
        try:
            save_file(content, temporary, metadata=metadata)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors says it
            raise OSError(*((int(number[1]), os.strerror(int(number[1]))) if number else (str(error),))) from None

    write_whole(Path(path), write)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header's json and of all tensors: names, types, shapes and bytes."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_header(path: str | Path) -> dict[str, Any]:
    """The header alone, without reading a tensor.

    Raises:
        CheckpointError: no such file, not safetensors, or not written by paqdetr.
    """
    return _open(Path(path))[1]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, on the CPU, and the header.

    Raises:
        CheckpointError: as `read_header`; or the content is not what was written.
    """
    return _open(Path(path), tensors=True)


def is_own(path: Path) -> bool:
    """Whether a file is a checkpoint of ours by its header, or a folder has one; whether it is whole is not looked at."""
    if path.is_dir():
        return any(map(is_own, path.glob("*.safetensors")))
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _open(path: Path, tensors: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise CheckpointError(f"{path}: a pickle, which this program does not open", "give a .safetensors file")
    try:
        # Opened first: safetensors calls a file that may not be read missing, and would wait for a pipe.
        with open_regular(path, error=CheckpointError), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # of types unknown to torch
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})", "copy or train it again") from None
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path}: safetensors without a paqdetr header", "convert weights of other programs first"
        )
    header = parse_json(metadata[_KEY], f"{path}: its paqdetr header", error=CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: its paqdetr header is a {type(header).__name__}, expected an object", "copy or train it again"
        )
    written = header.pop(_HASH, None)  # files of versions before it have none
    if tensors and written is not None and written != _digest(json.dumps(header), content):
        raise CheckpointError(
            f"{path}: damaged: its content is not what was written (the SHA-256 in its header differs)",
            "copy it again from where it came, or train it again",
        )
    return content, header


def load_tensors(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill a module; every name and shape must agree. A module on the meta device takes over the tensors themselves.

    Raises:
        CheckpointError: naming the first tensors that are missing, left over, of another shape or no weights.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in tensors]
    extra = [key for key in tensors if key not in own]
    reshaped = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    other = [
        f"{key} ({tensors[key].dtype} instead of {own[key].dtype})"
        for key in own
        if key in tensors and not _same_kind(tensors[key], own[key])
    ]
    for problem, keys in (
        ("lacks", missing),
        ("has unknown", extra),
        ("has another shape for", reshaped),
        ("has values of another type for", other),
    ):
        if keys:
            raise CheckpointError(
                f"{where}: it is of another model: it {problem} {some(keys)}",
                "load it with the model and settings it was made with",
            )
    if any(tensor.is_meta for tensor in own.values()):
        module.load_state_dict({key: tensors[key].to(own[key].dtype) for key in own}, assign=True)
    else:
        module.load_state_dict(dict(tensors))


def _same_kind(given: Tensor, own: Tensor) -> bool:
    """Whether its values can be taken over: weights may have another precision, but are no whole or complex numbers."""
    plain = given.layout is torch.strided and not given.is_quantized and given.device.type != "meta"
    return plain and (given.is_floating_point() == own.is_floating_point()) and not given.is_complex()
