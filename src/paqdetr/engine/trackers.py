"""Records of a run sent to TensorBoard, Weights & Biases, MLflow or trackio, by accelerate's trackers."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator

from paqdetr.config import Config
from paqdetr.engine.run import Run, flat_settings
from paqdetr.errors import ConfigError

_PROJECT = "paqdetr"


def require_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError for a tracker whose package is not installed: accelerate would leave it out in silence."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"trackers: {name!r} is not installed", f"`pip install {name}`, or leave it out of trackers"
            )


def start_trackers(accelerator: Accelerator, run: Run, config: Config, *, step: int) -> None:
    """Begin, or take up again, the trackers of the settings; what an earlier process logged after `step` is forgotten where
    the tracker can."""
    if not config.trackers:
        return
    # The same id in every resumption.
    ident = hashlib.sha256(str(run.output.resolve()).encode()).hexdigest()[:16]
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1 if step else None},
        "wandb": {"name": run.output.name, "dir": str(run.output), "id": ident, "resume": "allow"},
        "mlflow": {"run_name": run.output.name},
        "trackio": {"name": run.output.name, "resume": "allow"},
    }
    # Trackers take plain values.
    settings = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in flat_settings(config).items()
    }
    project = "tensorboard" if config.trackers == ("tensorboard",) else _PROJECT
    accelerator.init_trackers(
        project,
        config=settings if step == 0 else None,
        init_kwargs={name: options[name] for name in config.trackers},
    )


def track(accelerator: Accelerator, record: dict[str, Any]) -> None:
    """Send the numbers of a "train" or "eval" record, under names such as train/loss and eval/per_class/cat."""
    if accelerator.trackers and record["kind"] in ("train", "eval"):
        values = dict(_numbers(record, record["kind"] + "/", leave_out=("kind", "step", "split")))
        accelerator.log(values, step=record["step"])


def _numbers(
    values: dict[str, Any], prefix: str, *, leave_out: tuple[str, ...] = ()
) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if key in leave_out:
            continue
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            found += _numbers({str(i): item for i, item in enumerate(value, start=1)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + key, float(value)))
    return found
