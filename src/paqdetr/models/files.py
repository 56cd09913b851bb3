"""A model as one file, and back; and trainings that start from one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError, field_validator

from paqdetr.checkpoint import load_tensors, read_checkpoint, write_checkpoint
from paqdetr.config import Config, validate_config
from paqdetr.errors import CheckpointError, ConfigError, memory_error
from paqdetr.models.detector import Detector
from paqdetr.models.device import require_device
from paqdetr.models.reshape import (
    ReshapeReport,
    require_same_settings,
    reshape,
    reshape_tensors,
    without_counters,
)
from paqdetr.models.zoo import build_model
from paqdetr.preprocessing import Preprocessing
from paqdetr.structures import ClassTable
from paqdetr.text import shorten

_LOG = logging.getLogger(__name__)


class _Class(BaseModel):
    id: int = Field(ge=-(2**63), lt=2**63)
    name: str


class _Header(BaseModel):
    """What the header of a model's checkpoint holds, among other things."""

    name: str
    model: dict[str, Any]
    classes: list[_Class] = Field(min_length=1)
    preprocessing: dict[str, Any]

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: list[_Class]) -> list[_Class]:
        if len({row.id for row in value}) < len(value):
            raise ValueError("two classes have one id")
        return value


def save(model: Detector, path: str | Path, **extra: Any) -> None:
    """Write a model as one safetensors file; `extra` (metrics, step...) goes into its header."""
    header = {
        "name": model.name,
        "model": model.config.model_dump(mode="json"),
        "classes": [
            {"id": i, "name": name} for i, name in zip(model.classes.ids, model.classes.names, strict=True)
        ],
        "preprocessing": model.preprocessing.to_dict(),
        **extra,
    }
    write_checkpoint(path, model.state_dict(), header)


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    classes: ClassTable | Sequence[str] | int | None = None,
    num_queries: int | None = None,
) -> Detector:
    """A model from a checkpoint, in evaluation mode.

    Args:
        path: a .safetensors file, or a run's folder (its best.safetensors, else last.safetensors).
        device: where to put it.
        classes: other classes: a table, names, or how many. Rows of known names stay, the rest starts anew; a line in the log
            says which (`reshape_classes` returns it as a report).
        num_queries: another number of queries, as `resize_queries` makes it.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit the model its header names.
        ConfigError: torch cannot use the device here.
    """
    target = require_device(device)
    file = find_checkpoint(path)
    with torch.inference_mode(False):  # a model loaded in there may be trained later
        tensors, header = read_checkpoint(file)
        config, table, preprocessing = describe_checkpoint(header, str(file))
        try:
            model = _build_to_fill(config, table)
        except ConfigError as error:
            raise _not_ours(header, str(file), error) from None
        except (RuntimeError, MemoryError) as error:
            if memory_error(error) is None:
                raise
            raise CheckpointError(
                f"{file}: the model that its header describes needs more memory than this machine has",
                "load it on a larger one; if it is small, its header is damaged",
            ) from None
        model.preprocessing = preprocessing
        load_tensors(model, tensors, str(file))
        if classes is not None or num_queries is not None:
            model, report = reshape(model, classes=classes, num_queries=num_queries)
            _LOG.warning("%s: %s", file, report)
        return model.to(target).eval()


def _build_to_fill(config: Config, classes: ClassTable) -> Detector:
    """A model without weights, on the meta device; with random ones where it has buffers that no file holds (timm's Swin)."""
    with torch.device("meta"):
        model = build_model(config, classes=classes)
    if {name for name, _ in model.named_buffers()} <= model.state_dict().keys():
        return model
    return build_model(config, classes=classes)


def model_to_train(
    config: Config, classes: ClassTable, *, resumed: bool = False
) -> tuple[Detector, ReshapeReport | None]:
    """A model at the start of a training: new, or with the weights of the checkpoint `config.init`.

    Args:
        config: of the training.
        classes: of its data.
        resumed: a saved state will fill it, so that the checkpoint need not be there any more.

    Returns:
        the model, and what it took from the checkpoint; None if there is none or it is not read.

    Raises:
        CheckpointError: as `start_from`.
    """
    pretrained = config.pretrained_backbone and config.init is None
    model = build_model(config, classes=classes, pretrained_backbone=pretrained)
    return model, None if config.init is None or resumed else start_from(model, config.init)


def start_from(model: Detector, path: str | Path) -> ReshapeReport:
    """Fill a model with the weights of a checkpoint, in place; its classes and its number of queries may be others.

    Args:
        model: for the classes and queries of the new training.
        path: a .safetensors file or a run's folder.

    Returns:
        what was kept.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its weights were made with other settings; the message says which, the
            remedy how to set them.
    """
    file = find_checkpoint(path)
    tensors, header = read_checkpoint(file)
    config, classes, _ = describe_checkpoint(header, str(file))
    require_same_settings(config.model, model.config, str(file))
    own = model.state_dict()
    tensors, report = reshape_tensors(
        without_counters(tensors, own),
        own,
        config=model.config,
        classes=(classes, model.classes),
        queries=(config.model.num_queries, model.config.num_queries),
    )
    load_tensors(model, tensors, str(file))
    return report


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
        raise _not_ours(header, where, error) from None


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the best of a run's folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path}: the folder has no checkpoint", "give a run's folder or a .safetensors file"
    )


def _not_ours(header: Mapping[str, Any], where: str, error: ConfigError) -> CheckpointError:
    return CheckpointError(
        f"{where}: its header describes no model that this version can build ({error.message})",
        f"load it with the version that wrote it, {shorten(header.get('version'))}",
    )
