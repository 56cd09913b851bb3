"""What a training begins with: splits that fit together, settings that fit the data, a model that fits the processes."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from timm.layers import convert_sync_batchnorm
from torch.nn.modules.batchnorm import _BatchNorm

from paqdetr.config import Config, load_config
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits
from paqdetr.engine.evaluate import require_same_classes
from paqdetr.engine.memory import largest_batch
from paqdetr.engine.processes import Processes
from paqdetr.engine.run import Run
from paqdetr.errors import ConfigError
from paqdetr.models import Detector


def open_splits(data: str | Path, config: Config) -> tuple[DetectionDataset, DetectionDataset | None]:
    """The split to train on, and the one to validate on if there is one.

    Raises:
        DataError: one is malformed, or their classes differ.
        ConfigError: a setting needs a validation split and there is none.
    """
    train_split = open_split(data, "train")
    val_split = open_split(data, "val") if "val" in available_splits(data) else None
    if val_split is not None:  # now, not after the first epoch
        require_same_classes(train_split.classes, val_split)
    elif config.patience is not None:
        raise ConfigError(
            f"patience={config.patience} needs a validation split, and {data} has none",
            "add a val split, or leave patience out",
        )
    return train_split, val_split


def with_classes(config: Config, split: DetectionDataset) -> Config:
    """The settings with the number of classes of the data."""
    architecture = config.model.model_copy(update={"num_classes": len(split.classes)})
    return config.model_copy(update={"model": architecture})


def with_largest_batch(config: Config, split: DetectionDataset, run: Run, *, device: str | None) -> Config:
    """The settings with the largest batch that fits, or the one that an earlier start of the run has found."""
    if run.config_file.is_file():
        size = load_config(run.config_file).batch_size
    else:
        size = largest_batch(config, split, Processes.join(device))
    return config.model_copy(update={"batch_size": size})


def ready_to_train(model: Detector, config: Config, device: torch.device) -> Detector:
    """The model on its device, as the settings of a training want it.

    Raises:
        ConfigError: `sync_batch_norm`, and it has no batch norm that trains.
    """
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
    if not any(isinstance(part, _BatchNorm) and part.training for part in model.train().modules()):
        raise ConfigError(
            "sync_batch_norm=True: the model has no batch norm that trains",
            "leave it out, or train the backbone's with model.freeze_backbone_norm=false",
        )
    # timm's knows norms that have an activation inside.
    return cast(Detector, convert_sync_batchnorm(model))
