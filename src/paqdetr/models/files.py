"""A model as one file, and back: trainings that start from one, and weights for other classes or numbers of queries."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paqdetr.checkpoint import (
    describe_checkpoint,
    find_checkpoint,
    load_tensors,
    not_ours,
    operating_point_of,
    read_checkpoint,
    require_same_settings,
)
from paqdetr.config import Config, ModelConfig
from paqdetr.environment import require_device
from paqdetr.errors import CheckpointError, ConfigError, memory_error
from paqdetr.models.backbone import Uninitialised
from paqdetr.models.detector import Detector
from paqdetr.models.zoo import as_class_table, build_model
from paqdetr.paq.patterns import resized_rows
from paqdetr.serialize import fields_of
from paqdetr.structures import ClassTable
from paqdetr.text import some

_LOG = logging.getLogger(__name__)

# Tensors with one or several rows per class, and with one or several rows per query.
_CLASS_ROWS = re.compile(
    r"(decoder|hybrid_heads)\.class_heads\.\d+\.(weight|bias)|start\.head\.(hybrid_)?class_head\.(weight|bias)|"
    r"denoising\.label_embed\.weight|"
    r"auxiliary\.heads\.\w+\.class_head\.(weight|bias)|auxiliary\.heads\.faster_rcnn\.box_head\.(weight|bias)"
)
_QUERY_ROWS = re.compile(
    r"query_source\.(table|logits|mixtures\.logits)|start\.(boxes|position)|"
    r"query_source\.(mixtures\.)?head\.(linear\.(weight|bias)|queries|bias)"
)
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class ReshapeReport:
    """What a change of shape kept and what it started anew.

    Attributes:
        known_classes: classes of the new model whose rows came over, by name.
        new_classes: classes of the new model that start anew.
        dropped_classes: classes of the old model that the new one does not have.
        queries: (before, after).
        interpolated_queries: how many of the new model's queries lie between two of the old one's.
        changed: tensors of another shape than before.
    """

    known_classes: tuple[str, ...]
    new_classes: tuple[str, ...]
    dropped_classes: tuple[str, ...]
    queries: tuple[int, int]
    interpolated_queries: int
    changed: tuple[str, ...]

    def __str__(self) -> str:
        before, after = self.queries
        total = len(self.known_classes) + len(self.new_classes)
        parts = [f"{len(self.known_classes)} of {total} classes known by name"]
        if self.new_classes:
            parts.append(f"new: {some(self.new_classes, 5)}")
        if self.dropped_classes:
            parts.append(f"dropped: {some(self.dropped_classes, 5)}")
        if before != after:
            grown = f", {self.interpolated_queries} of them interpolated" if self.interpolated_queries else ""
            parts.append(f"queries {before} -> {after}{grown}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return {key: value for key, value in fields_of(self).items() if key != "changed"}


def reshape(
    model: Detector, *, classes: ClassTable | Sequence[str] | int | None = None, num_queries: int | None = None
) -> tuple[Detector, ReshapeReport]:
    """The same model with other classes, another number of queries, or both.

    Class rows of heads, and of the labels that denoising embeds, go over where names agree, whatever their case; other classes
    start as in a new model. Where a query is the rank of a proposal (two-stage hosts), fewer queries are the first ones; where it
    is an identity (learned anchors or points), they are spread evenly over the old ones. More queries are all the old ones, then
    new ones interpolated between neighbours: content, positions, and the rows of PaQ's weight head alike.

    Args:
        model: unchanged.
        classes: a table, names (ids are then 0, 1, ...), or a number of nameless classes; None keeps them.
        num_queries: None keeps it.

    Returns:
        a new model, and what was kept.

    Raises:
        ConfigError: no class, one name twice, or fewer than one query.
    """
    table = model.classes if classes is None else as_class_table(classes)
    count = model.config.num_queries if num_queries is None else num_queries
    if count < 1:
        raise ConfigError(f"num_queries={count}: expected at least 1", "choose a positive number")
    architecture = model.config.model_copy(update={"num_classes": len(table), "num_queries": count})
    preprocessing = model.preprocessing
    config = Config(name=model.name, model=architecture, **preprocessing.settings())
    like = next(model.parameters())
    rebuilt = build_model(config, classes=table).to(like.device, like.dtype)
    rebuilt.preprocessing = preprocessing
    tensors, report = reshape_tensors(
        model.state_dict(),
        rebuilt.state_dict(),
        config=architecture,
        classes=(model.classes, table),
        queries=(model.config.num_queries, count),
    )
    load_tensors(rebuilt, tensors, f"{model.name} with {len(table)} classes and {count} queries")
    return rebuilt.train(model.training), report


def reshape_classes(model: Detector, classes: ClassTable | Sequence[str] | int) -> tuple[Detector, ReshapeReport]:
    """`reshape` to other classes."""
    return reshape(model, classes=classes)


def resize_queries(model: Detector, num_queries: int) -> tuple[Detector, ReshapeReport]:
    """`reshape` to another number of queries."""
    return reshape(model, num_queries=num_queries)


def reshape_tensors(
    tensors: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    *,
    config: ModelConfig,
    classes: tuple[ClassTable, ClassTable],
    queries: tuple[int, int],
) -> tuple[dict[str, Tensor], ReshapeReport]:
    """Tensors of one model in the shapes of another that differs in classes or queries alone.

    Args:
        tensors: of the old model, by name.
        fresh: of the new model as it was built; rows of new classes keep these values.
        config: of either.
        classes: of the old model and of the new one.
        queries: number of queries of the old model and of the new one.
    """
    rows = classes[0].rows_in(classes[1])
    query_rows = resized_rows(*queries, ranked=config.positions == "proposals")
    result = dict(tensors)
    for key, tensor in tensors.items():
        if key not in fresh:
            continue
        if _CLASS_ROWS.fullmatch(key):
            # A class-agnostic head of proposals has one row, whatever the classes.
            if not (config.class_agnostic_proposals and key.startswith("start.head.")):
                by_class = tensor.unflatten(0, (len(classes[0]), -1))  # (C, rows a class, ...)
                result[key] = fresh[key].to(tensor.device, tensor.dtype).clone()
                for old, new in rows:
                    result[key].unflatten(0, (len(classes[1]), -1))[new] = by_class[old]
        elif key == "hybrid_source.table":
            result[key] = resized_rows(len(tensor), len(fresh[key]), ranked=True).of(tensor, 1)
        elif _QUERY_ROWS.fullmatch(key) and queries[0] != queries[1]:
            result[key] = query_rows.of(tensor, len(tensor) // queries[0])
    known = {new for _, new in rows}
    went = {old for old, _ in rows}
    report = ReshapeReport(
        known_classes=tuple(name for row, name in enumerate(classes[1].names) if row in known),
        new_classes=tuple(name for row, name in enumerate(classes[1].names) if row not in known),
        dropped_classes=tuple(name for row, name in enumerate(classes[0].names) if row not in went),
        queries=queries,
        interpolated_queries=int((query_rows.share > 0).sum()),
        changed=tuple(key for key in tensors if result[key].shape != tensors[key].shape),
    )
    return result, report


def without_counters(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the step counters of batch norms that the model has, whose norms may be frozen where the others were not."""
    result = {key: value for key, value in tensors.items() if key in own or not key.endswith(_COUNTER)}
    return result | {key: own[key] for key in own if key.endswith(_COUNTER) and key not in tensors}


def with_training_parts(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file without auxiliary heads that the model has not, and with the start of those that the file has not."""
    kept = {key: value for key, value in tensors.items() if key in own or not key.startswith("auxiliary.")}
    return kept | {key: own[key] for key in own if key.startswith("auxiliary.") and key not in tensors}


def load(
    path: str | Path,
    *,
    device: str | None = "cpu",
    classes: ClassTable | Sequence[str] | int | None = None,
    num_queries: int | None = None,
) -> Detector:
    """A model from a checkpoint, in evaluation mode.

    Args:
        path: as of `find_checkpoint`: a .safetensors file, a folder of a run (its best.safetensors, else last.safetensors) or of
            `save_pretrained`, or `hf:user/name@revision`.
        device: where to put it; None: the best there is.
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
            with Uninitialised(), torch.random.fork_rng(devices=[]):
                model = build_model(config, classes=table)
        except ConfigError as error:
            raise not_ours(header, str(file), error) from None
        except (RuntimeError, MemoryError) as error:
            if memory_error(error) is None:
                raise
            raise CheckpointError(
                f"{file}: the model that its header describes needs more memory than this machine has",
                "load it on a larger one; if it is small, its header is damaged",
            ) from None
        model.preprocessing = preprocessing
        load_tensors(model, tensors, str(file), assign=True)
        model.operating_point = operating_point_of(header)
        if classes is not None or num_queries is not None:
            model, report = reshape(model, classes=classes, num_queries=num_queries)
            _LOG.warning("%s: %s", file, report)
        return model.to(target).eval()


def model_to_train(
    config: Config, classes: ClassTable, *, resumed: bool = False
) -> tuple[Detector, ReshapeReport | None]:
    """A model at the start of a training: new, or with the weights of the checkpoint `config.init`.

    Args:
        config: of the training.
        classes: of its data.
        resumed: a saved state will fill it, so that neither the checkpoint nor ImageNet weights need be there any more.

    Returns:
        the model, and what it took from the checkpoint; None if there is none or it is not read.

    Raises:
        CheckpointError: as `start_from`.
    """
    pretrained = config.pretrained_backbone and config.init is None and not resumed
    model = build_model(config, classes=classes, pretrained_backbone=pretrained)
    return model, None if config.init is None or resumed else start_from(model, config.init)


def describe_start(config: Config) -> list[str]:
    """What is odd about the weights that a training begins with: a sentence, or none."""
    frozen = config.model.frozen_stride or config.model.freeze_backbone_norm
    if config.pretrained_backbone or config.init is not None or not frozen:
        return []
    return [
        "pretrained_backbone=false: frozen parts of the backbone keep random weights; "
        "model.frozen_stride=0 model.freeze_backbone_norm=false train all of it"
    ]


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
    load_tensors(model, with_training_parts(tensors, own), str(file))
    return report
