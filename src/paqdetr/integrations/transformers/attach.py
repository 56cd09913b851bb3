"""Attach PaQ to a detector of transformers, detach it, load an attached one again, and follow its schedule in a Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import TrainerCallback

from paqdetr._version import __version__
from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.integrations.transformers.hosts import HOSTS, host_of
from paqdetr.integrations.transformers.plugin import PaqPlugin, PaqSettings

# What `from_pretrained` of a configuration and of a model both need.
_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")


class OneToManyUntil(TrainerCallback):
    """One-to-many assignment in the first part of a training alone: `Trainer(callbacks=[OneToManyUntil(0.5)])`.

    A short training needs the rest to unlearn duplicates, since under one-to-many the last layer alone suppresses them.

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


_logger = logging.getLogger(__name__)

# Under this name the module stands in the model, its tensors in the state dict, and its settings in config.json.
NAME = "paq"


def attach(model: Any, settings: PaqSettings | None = None, **changes: Any) -> Any:
    """Put pattern queries into a detector of transformers, and quality-aware assignment into its intermediate losses.

    The model itself is changed, but none of its own parameters: patterns, their network and the gate are at `model.paq`, the
    settings at `model.config.paq`. With the default settings outputs stay what they were until training moves the gate.
    The last decoder layer, the encoder's proposals and denoising queries are matched as before.

    Args:
        model: a `DeformableDetr-`, `ConditionalDetr-`, `DabDetr-`, `RTDetr-`, `RTDetrV2-` or `DFineForObjectDetection`.
        settings: how; the defaults if None.
        changes: single settings by name, laid over them.

    Returns:
        the model.

    Raises:
        ConfigError: a model of another class, one that has PaQ already or was saved with it, or settings that do not fit it.
    """
    host_of(model)  # or an error
    if isinstance(getattr(model, NAME, None), PaqPlugin):
        raise ConfigError(f"this {type(model).__name__} has PaQ attached already", "call detach(model) first")
    if isinstance(getattr(model.config, NAME, None), dict):
        raise ConfigError(
            f"config.{NAME} says that this {type(model).__name__} was saved with PaQ, and its patterns have not been loaded",
            f"load it with from_pretrained of {__package__}; for new patterns, `del model.config.{NAME}` first",
        )
    base = settings.to_dict() if settings else {}
    return _insert(model, PaqSettings.from_dict({**base, **changes}, "attach"))


def _insert(model: Any, settings: PaqSettings) -> Any:
    plugin = PaqPlugin(host_of(model), model.config, settings)
    own = next(model.model.decoder.parameters())
    plugin.to(device=own.device, dtype=own.dtype).train(model.training)
    plugin.insert(model)
    setattr(model, NAME, plugin)
    setattr(model.config, NAME, {**settings.to_dict(), "version": __version__})
    return model


def detach(model: Any) -> Any:
    """Take PaQ out again. What training has done to the model's own parameters stays; without training, outputs are bit-equal.

    Returns:
        the model.

    Raises:
        ConfigError: nothing is attached.
    """
    plugin = getattr(model, NAME, None)
    if not isinstance(plugin, PaqPlugin):
        raise ConfigError(f"this {type(model).__name__} has no PaQ attached", "call attach(model) first")
    plugin.remove(model)
    delattr(model, NAME)
    delattr(model.config, NAME)
    return model


def from_pretrained(path: str | Path, **options: Any) -> Any:
    """Load a detector that was saved by `save_pretrained` with PaQ attached, patterns included.

    A plain `from_pretrained` of transformers would build the model without PaQ and leave the tensors of the patterns out, which a
    trained model does not survive; each load logs a message.

    Args:
        path: a folder or the name of a repository on the Hub.
        options: of transformers' `from_pretrained`: dtype, device_map, revision, num_labels, ignore_mismatched_sizes, ...

    Raises:
        ConfigError: the model has no PaQ, or settings that this version does not know.
        CheckpointError: its files lack tensors of the patterns, or have them in another shape.
    """
    config = options.pop("config", None)
    if config is None:  # what is the configuration's, such as num_labels, goes there, as in transformers
        hub = {name: options[name] for name in _HUB if name in options}
        made: Any = transformers.AutoConfig.from_pretrained(path, return_unused_kwargs=True, **options)
        config, options = made[0], {**made[1], **hub}
    marker = getattr(config, NAME, None)
    if not isinstance(marker, dict):
        raise ConfigError(
            f"{path}: its config.json has no {NAME!r}, so no PaQ was attached to this model",
            "load it with transformers, then call attach(model)",
        )
    settings = PaqSettings.from_dict({k: v for k, v in marker.items() if k != "version"}, f"{path}: config.json")
    attached = _with_paq(_class_of(config, path), settings)
    model, report = attached.from_pretrained(path, config=config, output_loading_info=True, **options)
    missing = sorted(name for name in report["missing_keys"] if name.startswith(f"{NAME}."))
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors of the patterns are missing, such as {missing[0]!r}",
            "save the model again with save_pretrained while PaQ is attached",
        )
    # With ignore_mismatched_sizes transformers would start these anew, by the rule of its own layers or not at all.
    other = sorted(row[0] for row in report["mismatched_keys"] if row[0].startswith(f"{NAME}."))
    if other:
        raise CheckpointError(
            f"{path}: {len(other)} tensors of PaQ have another shape, such as {other[0]!r}",
            "load it with the settings that it was saved with; then model.paq.queries.resize(n) changes the number of queries",
        )
    model.__class__ = attached.__base__
    count = sum(1 for _ in model.paq.state_dict())
    _logger.warning(
        "%s: loaded with PaQ (%s). %s.from_pretrained of transformers would leave out its %d tensors.",
        path,
        model.paq.extra_repr(),
        type(model).__name__,
        count,
    )
    return model


def _with_paq(base: type[nn.Module], settings: PaqSettings) -> Any:
    """The class whose instances are born with PaQ, so that the loader of transformers fills its tensors as any others."""

    class Attached(base):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _insert(self, settings)

    Attached.__name__ = Attached.__qualname__ = base.__name__
    return Attached


def _class_of(config: Any, path: str | Path) -> type[nn.Module]:
    for name in config.architectures or []:
        if name in HOSTS and hasattr(transformers, name):
            return getattr(transformers, name)
    raise ConfigError(
        f"{path}: config.json names the architectures {config.architectures}", f"expected one of {', '.join(HOSTS)}"
    )
