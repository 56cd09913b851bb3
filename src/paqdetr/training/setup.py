"""What a training begins with: splits that fit together, settings that fit the data, a model that fits the processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from paqdetr.config import Config
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits
from paqdetr.data.split import hold_out
from paqdetr.data.stats import describe_crowding
from paqdetr.errors import ConfigError, DataError

if TYPE_CHECKING:  # settings and data are found wanting before torch is imported
    import torch

    from paqdetr.models import Detector

# As a share of the boxes: what selection of distinct queries may hide before a training says so.
_MANY_HIDDEN = 0.005


def open_splits(data: str | Path, config: Config) -> tuple[DetectionDataset, DetectionDataset | None]:
    """The split to train on, and the one to validate on: `val`, or what `val_fraction` holds out; None if there is neither.

    Raises:
        DataError: one is malformed, their classes differ, or there is no box to train on.
        ConfigError: a setting needs a validation split and there is none, or `val_fraction` and there is one.
    """
    train_split = open_split(data, "train")
    if not any(len(train_split.labels(index)) for index in range(len(train_split))):
        raise DataError(
            f"{train_split.annotation_file}: no image has boxes to train on", "`paqdetr data check` shows what is there"
        )
    val_split = open_split(data, "val") if "val" in available_splits(data) else None
    if config.val_fraction:
        if val_split is not None:
            raise ConfigError(
                f"val_fraction={config.val_fraction:g}, and {data} has a val split", "leave val_fraction out"
            )
        train_split, val_split = hold_out(train_split, config.val_fraction, seed=config.seed)
    if val_split is not None:  # now, not after the first epoch
        _require_classes_of_train(train_split, val_split)
    elif config.patience is not None:
        raise ConfigError(
            f"patience={config.patience} needs a validation split, and {data} has none",
            "set val_fraction=0.1, or leave patience out",
        )
    return train_split, val_split


def describe_data(config: Config, train_split: DetectionDataset, val_split: DetectionDataset | None) -> list[str]:
    """Sentences on what the data do to a training, and its user may not know."""
    name, queries = train_split.annotation_file.name, config.model.num_queries
    found = [
        f"{name}: {sentence}"
        for sentence in describe_crowding(train_split.annotations, queries=queries, max_detections=None)
    ]
    if duplicates := int(train_split.annotations.duplicates().sum()):
        found.append(f"{name}: {duplicates} duplicate boxes are left out; `paqdetr data check` lists them")
    files = [train_split] if val_split is None or config.val_fraction else [train_split, val_split]
    found += [f"{one.annotation_file.name}: {form}" for one in files if (form := one.annotations.other_form())]
    if (limit := config.model.distinct_queries) is not None:
        hidden = train_split.annotations.overlapping(limit)
        if (share := float(hidden.mean())) >= _MANY_HIDDEN:
            found.append(
                f"{name}: {share:.1%} of the boxes overlap another of their image by more than {limit:g}: of two such "
                f"predictions the better one alone is kept (model.distinct_queries={limit:g}), so that one object of the two "
                "is not found; model.distinct_proposals=null model.distinct_queries=null keeps both"
            )
    if val_split is None:
        return [
            *found,
            f"{train_split.annotation_file.parent} has no val split: no AP is computed, and best.safetensors is that of the last "
            "epoch; set val_fraction=0.1, or make a split with `paqdetr data split`",
        ]
    if bool(val_split.annotations.crowd.all()):
        found.append(
            f"{val_split.annotation_file.name}: no image has an object to be found, so that AP is undefined: best.safetensors is "
            "that of the last epoch, and patience ends nothing"
        )
    if config.val_fraction:
        images = len(train_split) + len(val_split)
        found.append(f"val_fraction={config.val_fraction:g}: {len(val_split)} of {images} images validate")
    crowding = describe_crowding(val_split.annotations, queries=queries)
    return found + [f"{val_split.annotation_file.name}: {sentence}" for sentence in crowding]


def require_no_batch_size(given: Mapping[str, Any]) -> None:
    """Raise ConfigError if the settings that are given beside `auto_batch` say a batch size too."""
    if "batch_size" in given:
        raise ConfigError(
            f"batch_size={given['batch_size']} and --auto-batch, which finds one (auto_batch=True in Python)",
            "leave one of them out",
        )


def with_classes(config: Config, split: DetectionDataset) -> Config:
    """The settings with the number of classes of the data.

    Raises:
        ConfigError: they give another one; the default is no such setting.
    """
    given = config.model.num_classes
    if "num_classes" in config.model.model_fields_set and given != len(split.classes):
        raise ConfigError(
            f"model.num_classes={given}, and {split.annotation_file} has {len(split.classes)} categories",
            f"leave model.num_classes out, or set it to {len(split.classes)} if these are the right data; a run cannot go on "
            "with other classes: start a new one with init= and its folder",
        )
    architecture = config.model.model_copy(update={"num_classes": len(split.classes)})
    return config.model_copy(update={"model": architecture})


def _require_classes_of_train(train: DetectionDataset, val: DetectionDataset) -> None:
    """Raise DataError unless every class of the validation split is one of the training split, under the same id and name."""
    if misfit := train.classes.misfit(val.classes):
        category, name, trained = misfit
        raise DataError(
            f"train and val differ: category {category} is {name!r} in {val.annotation_file}, and in "
            f"{train.annotation_file} it is {'not listed' if trained is None else repr(trained)}",
            "give both the same categories; `paqdetr data check` lists all differences",
        )


def ready_to_train(model: Detector, config: Config, device: torch.device) -> Detector:
    """The model on its device, as the settings of a training want it.

    Raises:
        ConfigError: `sync_batch_norm`, and it has no batch norm that trains.
    """
    import torch

    if config.sync_batch_norm:
        model = synchronise_norms(model)
    model.checkpoint_activations(config.checkpoint_activations)
    model.to(device)
    if config.channels_last:
        model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def synchronise_norms(model: Detector) -> Detector:
    """The model with batch norms that train on the images of all processes.

    Raises:
        ConfigError: it has none that train.
    """
    from timm.layers import convert_sync_batchnorm
    from torch.nn.modules.batchnorm import _BatchNorm

    if not any(isinstance(part, _BatchNorm) and part.training for part in model.train().modules()):
        raise ConfigError(
            "sync_batch_norm=True: the model has no batch norm that trains",
            "leave it out, or train the backbone's with model.freeze_backbone_norm=false",
        )
    # timm's knows norms that have an activation inside.
    return cast("Detector", convert_sync_batchnorm(model))
