"""Files of other programs: pickles that hold tensors and nothing that runs, safetensors, and folders that transformers wrote."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from paqdetr.convert.classes import COCO
from paqdetr.errors import CheckpointError
from paqdetr.files import MAX_SIDE_BYTES, open_regular, read_json
from paqdetr.text import shorten

# What published checkpoints hold besides tensors: the command line's arguments, paths among them, and numpy numbers of a log.
# Each only stores values; anything else in a pickle is refused.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    # Python 3.13 pickles its paths as of `pathlib._local`. Pure ones can be made on every system.
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")},
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]
_WEIGHTS = ("model", "state_dict", "ema_model")
_PREFIXES = ("module.", "_orig_mod.")


@dataclass
class SourceFile:
    """What a file of another program holds.

    Attributes:
        path: the file or folder.
        tensors: by the program's name, on the CPU.
        hints: settings it was made with (the command line's arguments, a config.json), as far as the file says.
        notes: what a reader should know of how it was read.
    """

    path: Path
    tensors: dict[str, Tensor]
    hints: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_source(path: str | Path, *, weights: str | None = None) -> SourceFile:
    """Read a .pth, .safetensors, or a folder with config.json and weights.

    Args:
        path: file or folder.
        weights: which entry of a .pth holds the weights; the first of `model`, `state_dict`, `ema_model` if None.

    Raises:
        CheckpointError: it is missing, damaged, holds no weights, or holds code.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    open_regular(path, error=CheckpointError).close()
    if path.suffix == ".safetensors":
        config = path.parent / "config.json"
        hints = _read_json(config) if config.is_file() else {}
        return SourceFile(path, _read_safetensors(path), hints)
    content = _unpickle(path)
    source = SourceFile(path, {})
    arguments = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(arguments, argparse.Namespace):
        source.hints = dict(vars(arguments))
    source.tensors = _tensors_of(content, path, weights, source.notes)
    names = _mmdet_classes(content.get("meta") if isinstance(content, Mapping) else None)
    if names and names != COCO.names:  # COCO's have ids of their own
        source.hints["id2label"] = dict(enumerate(names))
    return source


def _mmdet_classes(meta: Any) -> tuple[str, ...]:
    """Names of the classes that mmdetection writes beside the weights: `CLASSES`, in version 3 inside of `dataset_meta`."""
    if not isinstance(meta, Mapping):
        return ()
    data = meta.get("dataset_meta", meta)
    names = (data.get("CLASSES") or data.get("classes") or ()) if isinstance(data, Mapping) else ()
    return tuple(map(str, names)) if isinstance(names, (tuple, list)) else ()


def _read_folder(folder: Path) -> SourceFile:
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{folder}: a folder without config.json", "give a folder that transformers' save_pretrained wrote"
        )
    source = SourceFile(folder, {}, _read_json(config))
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            source.tensors = _read_shard(folder / name, source.notes)
            return source
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = _read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
                raise CheckpointError(
                    f"{index}: weight_map is {shorten(places)}, expected the file of each tensor",
                    "download the folder again",
                )
            shards = sorted(set(places.values()))
            for shard in shards:
                if Path(shard).name != shard:  # an index must not lead out of its folder
                    raise CheckpointError(f"{index}: {shard!r} is no file name", "download the folder again")
                source.tensors |= _read_shard(folder / shard, source.notes)
            source.notes.append(f"read from {len(shards)} files")
            return source
    raise CheckpointError(
        f"{folder}: no model.safetensors and no pytorch_model.bin", "download the folder with its weights"
    )


def _read_shard(path: Path, notes: list[str]) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: the index names it, and it is not there", "download it")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _tensors_of(_unpickle(path), path, None, notes)


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json(path, limit=MAX_SIDE_BYTES, error=CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a json object", "download it again")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})", "download it again") from None


def _unpickle(path: Path) -> Any:
    """Tensors and plain values of a pickle; whatever would run code is refused."""
    try:
        with safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise CheckpointError(
                f"{path}: it holds more than tensors: {found[0]}, which could run code, so it is not opened",
                "where you trust its source: load it in the program that made it and save the weights alone, "
                'torch.save({"model": checkpoint["model"]}, "weights.pth")',
            ) from None
        raise CheckpointError(
            f"{path}: not a checkpoint that torch can read", "download it again; it may be cut short"
        ) from None
    except Exception as error:  # anything at all, where the bytes are not what torch expects
        first = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise CheckpointError(
            f"{path}: not a checkpoint that torch can read ({first})", "download it again; it may be cut short"
        ) from None


def _tensors_of(content: Any, path: Path, weights: str | None, notes: list[str]) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without the prefixes of wrappers."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a dict of tensors, found {type(content).__name__}", "save the state dict"
        )
    entries = [key for key, value in content.items() if _is_state(value)]
    if weights is not None:
        if weights not in entries:
            raise CheckpointError(
                f"{path}: no weights under {weights!r}", f"choose weights= among {', '.join(entries) or '-'}"
            )
        state = content[weights]
    elif _is_state(content):
        state = content
    else:
        chosen = next((key for key in _WEIGHTS if key in entries), None)
        if chosen is None:
            found = ", ".join(map(str, list(content)[:6]))
            raise CheckpointError(
                f"{path}: no weights under {', '.join(_WEIGHTS)}; it holds {found}",
                "name the entry that holds them: weights=NAME",
            )
        state = content[chosen]
        others = [key for key in entries if key != chosen and key in _WEIGHTS]
        if others:
            notes.append(
                f"weights of {chosen!r}; the file also has {', '.join(others)}: weights={others[0]} takes those"
            )
    state = dict(state)
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )
