"""When intermediate layers have several positives: a callback for the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from paqdetr.errors import ConfigError
from paqdetr.integrations.transformers.plugin import PaqPlugin


class OneToManyUntil(TrainerCallback):
    """Several positives a box for the first part of a training, one for the rest: `Trainer(callbacks=[OneToManyUntil(0.5)])`.

    A short training needs the rest to unlearn copies, since under one-to-many the last layer alone suppresses them.

    Args:
        share: of the training, in [0, 1].
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share: expected a number in [0, 1], found {share}")
        self.share = share

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The count of steps is the Trainer's own, so a resumed training goes on as it would have."""
        plugins = [module for module in model.modules() if isinstance(module, PaqPlugin)]
        if not plugins:
            raise ConfigError("OneToManyUntil: the model has no PaQ attached", "call attach(model) first")
        for plugin in plugins:
            plugin.one_to_many = state.global_step < self.share * state.max_steps
