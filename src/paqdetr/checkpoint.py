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
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open

from paqdetr._version import __version__
from paqdetr.config import Config, ModelConfig, is_name, list_configs, load_config, validate_config
from paqdetr.config.model import Role
from paqdetr.errors import CheckpointError, ConfigError, import_extra
from paqdetr.files import EXPORTED, EXPORTED_BY_TORCH, open_regular, parse_json, write_whole
from paqdetr.images import PICTURE_EXTENSIONS
from paqdetr.preprocessing import Preprocessing
from paqdetr.structures import ClassTable, OperatingPoint
from paqdetr.text import shorten, some

if TYPE_CHECKING:  # a header is read, and found wanting, before torch is imported
    import torch
    from torch import Tensor

_KEY = "paqdetr"
_HASH = "sha256"
# The last of tensors of types unknown to torch.
_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError)


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the whole new one, after a crash or a power cut too.

    Raises:
        StorageError: it cannot be written; what was at `path` before is still there.
    """
    from safetensors.torch import save_file

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
    import torch

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
        with safe_open(path, framework="np") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _open(path: Path, tensors: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        # Opened first: safetensors calls a file that may not be read missing, and would wait for a pipe.
        kind = "pt" if tensors else "np"
        with open_regular(path, error=CheckpointError), safe_open(path, framework=kind) as file:
            metadata = file.metadata() or {}
            content: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
    except _UNREADABLE as error:
        raise _unreadable(path, str(error)) from None
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


def _unreadable(path: Path, reason: str) -> CheckpointError:
    """The error for a file that is no safetensors file: what it is, by its ending."""
    ending = path.suffix.lower()
    if ending in PICTURE_EXTENSIONS:
        found, remedy = (
            "a picture, in the place of a model",
            "give a run's folder or a .safetensors file first, then pictures",
        )
    elif ending in (".yaml", ".yml"):
        found, remedy = "settings, which hold no weights", "give the run's folder or a .safetensors file"
        if any(path.parent.glob("*.safetensors")):
            remedy = f"give the run's folder: {path.parent}"
    elif ending in EXPORTED + EXPORTED_BY_TORCH:
        found, remedy = (
            "an exported model, where a checkpoint is needed",
            "give the checkpoint that it was exported from",
        )
    elif ending in (".pth", ".pt", ".bin", ".ckpt"):
        found = "a pickle, which this program does not open"
        remedy = (
            f"paqdetr convert {path} --from PROGRAM --output {path.with_suffix('.safetensors')} takes its weights over"
        )
    else:
        found = f"not a readable safetensors file ({reason})"
        remedy = "copy or train it again" if ending == ".safetensors" else "give a run's folder or a .safetensors file"
    return CheckpointError(f"{path}: {found}", remedy)


def load_tensors(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str, *, assign: bool = False) -> None:
    """Fill a module; every name and shape must agree.

    Args:
        assign: the module gets tensors instead of filling its own, which may have no values yet.

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
    problems = {"lacks": missing, "has unknown": extra, "has another shape for": reshaped}
    for problem, keys in (problems | {"has values of another type for": other}).items():
        if keys:
            raise CheckpointError(
                f"{where}: it is of another model: it {problem} {some(keys)}",
                "load it with the model and settings it was made with",
            )
    if assign:
        # Copied: tensors of a file lie at any address, those of torch at multiples of 64, and sums differ in the last bit.
        module.load_state_dict({key: tensors[key].to(own[key].dtype, copy=True) for key in own}, assign=True)
    else:
        module.load_state_dict(dict(tensors))


def _same_kind(given: Tensor, own: Tensor) -> bool:
    """Whether its values can be taken over: weights may have another precision, but are no whole or complex numbers."""
    import torch

    plain = given.layout is torch.strided and not given.is_quantized and given.device.type != "meta"
    return plain and (given.is_floating_point() == own.is_floating_point()) and not given.is_complex()


class _Class(BaseModel):
    id: int = Field(ge=-(2**63), lt=2**63)
    name: str


class _OperatingPoint(BaseModel):
    threshold: float | None = Field(default=None, ge=0, le=1)
    nms: float | None = Field(default=None, ge=0, le=1)
    duplicates_cost: float | None = Field(default=None, ge=-1, le=1)


class _Header(BaseModel):
    """What the header of a model's checkpoint holds, among other things."""

    name: str
    model: dict[str, Any]
    classes: list[_Class] = Field(min_length=1)
    preprocessing: dict[str, Any]
    operating_point: _OperatingPoint = _OperatingPoint()  # checkpoints of earlier versions have none

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: list[_Class]) -> list[_Class]:
        if len({row.id for row in value}) < len(value):
            raise ValueError("two classes have one id")
        return value


def describe_checkpoint(header: Mapping[str, Any], where: str) -> tuple[Config, ClassTable, Preprocessing]:
    """What a checkpoint's header says: settings of the model, classes, preprocessing.

    Raises:
        CheckpointError: it lacks something or is malformed; `where` names the file.
    """
    try:
        found = _Header.model_validate(header, strict=True)
        preprocessing = Preprocessing.from_dict(found.preprocessing)
        # In the order of the file: position is the class index.
        classes = ClassTable(tuple(row.id for row in found.classes), tuple(row.name for row in found.classes))
        values = {"name": found.name, "model": found.model, **preprocessing.settings()}
        return validate_config(values, where), classes, preprocessing
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        missing = first["type"] == "missing"
        raise CheckpointError(
            f"{where}: its header lacks {key!r}"
            if missing
            else f"{where}: its header is malformed: {key}: {first['msg']}",
            "give a file that paqdetr's `save` or a run has written",
        ) from None
    except ConfigError as error:
        raise not_ours(header, where, error) from None


def operating_point_of(header: Mapping[str, Any]) -> OperatingPoint:
    """What a header, which `describe_checkpoint` has accepted, says of it."""
    return OperatingPoint(**_OperatingPoint.model_validate(header.get("operating_point", {})).model_dump())


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, the best of a run's folder, that of a folder of `save_pretrained`, or one of the
    Hub (`hf:user/name@revision`).

    Raises:
        CheckpointError: a folder without one, the name of a model or recipe, or what may be a name on the Hub.
    """
    if str(path).startswith("hf:"):
        return import_extra("paqdetr.models.hub", "hub").fetch(str(path))
    path = Path(path)
    if not path.exists() and str(path) in list_configs():
        raise CheckpointError(
            f"{path}: no such file, but the name of a model or recipe",
            f"give a run's folder or a checkpoint; paqdetr.create_model({str(path)!r}) makes a model with random weights",
        )
    if not path.exists() and not path.suffix and re.fullmatch(r"[\w.-]+/[\w.-]+", path.as_posix()):
        raise CheckpointError(
            f"{path}: no such file or folder", f"check the path; a model of the Hub is written hf:{path.as_posix()}"
        )
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors", "model.safetensors"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: the folder has no checkpoint", "give a run's folder or a .safetensors file")


def find_described(path: str | Path) -> tuple[Path, Config, ClassTable]:
    """The checkpoint that a path means, with the settings and classes in its header; no tensor is read.

    Raises:
        CheckpointError: as `read_header` and `describe_checkpoint`.
    """
    file = find_checkpoint(path)
    return file, *describe_checkpoint(read_header(file), str(file))[:2]


def not_ours(header: Mapping[str, Any], where: str, error: ConfigError) -> CheckpointError:
    """The error for a header that describes no model of this version."""
    return CheckpointError(
        f"{where}: its header describes no model that this version can build ({error.message})",
        f"load it with the version that wrote it, {shorten(header.get('version'))}",
    )


def require_same_settings(old: ModelConfig, new: ModelConfig, where: str) -> None:
    """Weights mean what they meant only under the settings they were made with.

    Args:
        old: of the checkpoint.
        new: of the model to be filled.
        where: the checkpoint, for errors.

    Raises:
        CheckpointError: a setting that matters differs; the remedy says how to set it.
    """
    overrides = settings_to_add(old, new)
    if not overrides:
        return
    keys = [override.split("=")[0].removeprefix("model.") for override in overrides]
    found = ", ".join(f"{key} {getattr(old, key)!r} instead of {getattr(new, key)!r}" for key in keys)
    if "queries" in keys:
        remedy = "paqdetr convert CHECKPOINT --from paqdetr --as MODEL gives it the queries of another model first"
    else:
        remedy = f"add {' '.join(overrides)}"
    raise CheckpointError(f"{where}: its weights were made with {found}", remedy)


def settings_to_add(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Overrides of `new` that give it what `old`'s weights need."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    free = ModelConfig.with_role(Role.FREE)
    different = [key for key in before if before[key] != after[key] and key not in free]
    values = {key: before[key] for key in different}
    texts = {key: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for key, v in values.items()}
    return [f"model.{key}={text}" for key, text in texts.items()]


def command_to_train_from(path: Path, name: str, model: ModelConfig, preprocessing: Preprocessing) -> str | None:
    """The command that starts a training from a checkpoint, with the settings that its weights need; None if the name in its
    header is that of no model or recipe that comes with the package, but of a file somewhere."""
    if not is_name(name):
        return None
    config = load_config(name)
    added = settings_to_add(model, config.model)
    added += [
        f"{key}={value}"
        for key in ("resize", "pad_divisor")
        if (value := getattr(preprocessing, key)) != getattr(config, key)
    ]
    return " ".join([f"paqdetr train {name} --data DIR --output RUN", *map(shlex.quote, (f"init={path}", *added))])
