"""Optimiser, learning-rate schedule and moving average of a recipe."""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from paqdetr.config import Config


def step_images(config: Config, batches: int, processes: int = 1) -> int:
    """Images of a whole step, where a process has so many batches per epoch."""
    return config.batch_size * min(config.accumulate, batches) * processes


def lr_scale(config: Config, images: int) -> float:
    """What the rule for other batch sizes multiplies every learning rate by, where a step has so many images.

    "linear" is proportional to the images of a step (Goyal et al., arXiv 1706.02677, section 2.1), "sqrt" to their root
    (for Adam: Malladi et al., arXiv 2205.10287).
    """
    ratio = images / config.lr_reference_batch
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_rule]


def parameter_groups(model: nn.Module, config: Config, *, scale: float = 1.0) -> list[dict[str, object]]:
    """Trainable parameters by learning rate and weight decay: backbone, sampling offsets and reference points learn slower,
    norms and biases do not decay unless `decay_norms` says so. All rates are multiplied by `scale`."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = config.lr
        if "backbone." in name:
            lr = config.backbone_lr
        elif "sampling_offsets" in name or "point_head" in name:
            lr = config.lr * config.offsets_lr_scale
        lr *= scale
        # A bias may be a table: the factorised head of pattern queries has one for each query and pattern.
        free = not config.decay_norms and (parameter.ndim == 1 or name.endswith("bias"))
        decay = 0.0 if free else config.weight_decay
        groups.setdefault((lr, decay), []).append(parameter)
    # A schedule that starts in mid-training reads initial_lr: lr is then already changed.
    return [
        {"params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()
    ]


def build_optimizer(model: nn.Module, config: Config, *, scale: float = 1.0) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config, scale=scale), lr=config.lr * scale, fused=True)


def lr_factor(config: Config, step: int, total_steps: int) -> float:
    """What every learning rate is multiplied by at a step: linear warm-up, then step or cosine decay."""
    warmup = min(config.warmup_steps, max(total_steps // 10, 1))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "step":
        return 0.1 if step >= config.drop_at * total_steps else 1.0
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_schedule(optimizer: torch.optim.Optimizer, config: Config, total_steps: int, *, done: int = 0) -> LambdaLR:
    """The schedule over optimiser steps, of which `done` lie behind."""
    return LambdaLR(optimizer, lambda step: lr_factor(config, step, total_steps), last_epoch=done - 1)


class MovingAverage:
    """Exponential moving average of a model's weights and buffers, quick at first: decay min(decay, (1 + t) / (10 + t)).

    The t-th update, counted from 0, copies if t = 0. Not torch's `AveragedModel`, whose count is a tensor: a GPU sync in every
    update.

    Args:
        decay: 0 makes it a copy of the latest weights.

    Attributes:
        model: a model with the averaged weights, where the given one is.
        updates: how often it was updated; set with the weights of a saved one.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = deepcopy(model), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        for mine, latest in zip(_tensors(self.model), _tensors(model), strict=True):
            average = self.updates and mine.is_floating_point()
            old, new = averaged.setdefault(mine.dtype, ([], [])) if average else copied
            old.append(mine)
            new.append(latest)
        if copied[0]:
            torch._foreach_copy_(*copied)
        for old, new in averaged.values():
            torch._foreach_lerp_(old, new, 1 - keep)
        self.updates += 1


def _tensors(model: nn.Module) -> chain[Tensor]:
    return chain(model.parameters(), model.buffers())
