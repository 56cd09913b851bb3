"""The folder of a run: its files, and how a run is taken up again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paqdetr.config import Config, load_config
from paqdetr.errors import ConfigError
from paqdetr.models import Detector, load

_ENDED = "finished"


@dataclass(frozen=True, slots=True)
class Run:
    """A training's output.

    Attributes:
        output: the folder, with config.yaml, metrics.jsonl, best.safetensors, last.safetensors, curves.png, predictions.png.
    """

    output: Path

    @property
    def config_file(self) -> Path:
        """Settings as resolved."""
        return self.output / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One json object a line."""
        return self.output / "metrics.jsonl"

    @property
    def best(self) -> Path:
        """Checkpoint of the best validation AP (of the last epoch if there is no validation split)."""
        return self.output / "best.safetensors"

    @property
    def last(self) -> Path:
        """Checkpoint of the last epoch."""
        return self.output / "last.safetensors"

    @property
    def state_file(self) -> Path:
        """What a resumption needs beside the weights, as safetensors with a json header."""
        return self.output / "training_state.safetensors"

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Records of metrics.jsonl, all or of one kind ("train", "eval", "start", "finished")."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # a line that a crash cut short
        return [row for row in rows if kind is None or row.get("kind") == kind]

    @property
    def finished(self) -> bool:
        """Whether the training came to its end."""
        return bool(self.records(_ENDED))

    @property
    def metrics(self) -> dict[str, Any]:
        """The evaluation record of the best epoch; empty if there was none."""
        rows = self.records("eval")
        return max(rows, key=lambda row: row.get("AP") or 0.0) if rows else {}

    def model(self, *, device: str = "cpu") -> Detector:
        """The best checkpoint, loaded."""
        return load(self.best, device=device)

    def write_config(self, config: Config) -> None:
        """Write the settings, whole or not at all, unless they are there."""
        if not self.config_file.exists():
            temporary = self.output / f".config.{os.getpid()}.tmp"
            temporary.write_text(config.to_yaml(), encoding="utf-8")
            temporary.replace(self.config_file)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def truncate_metrics(self, size: int) -> None:
        """Forget records written after a saved state, given the file's size in bytes at that time."""
        if self.metrics_file.is_file() and self.metrics_file.stat().st_size > size:
            with self.metrics_file.open("r+b") as file:
                file.truncate(size)


def prepare_run(output: str | Path, config: Config, *, resume: bool) -> Run:
    """The folder for a training, new or continued. It is a run only after `Run.write_config`, which the caller does as soon as
    nothing can be wrong any more: a mistake in the settings must not leave a run behind that is in the way.

    Raises:
        ConfigError: it holds a run already and `resume` is off, or that run has other settings; or it is a file, or a
            folder with other files.
    """
    run = Run(Path(output))
    if run.output.exists() and not run.output.is_dir():
        raise ConfigError(f"{run.output}: a file is in the way", "choose another --output")
    if run.config_file.exists():
        if not resume:
            raise ConfigError(
                f"{run.output}: there is a run already, and nothing is overwritten",
                "choose another --output, or continue it with --resume",
            )
        _require_same(load_config(run.config_file), config, run.config_file)
    elif run.output.is_dir() and any(not entry.name.startswith(".") for entry in run.output.iterdir()):
        raise ConfigError(f"{run.output}: the folder holds other files and no run", "choose another --output")
    run.output.mkdir(parents=True, exist_ok=True)
    return run


def _require_same(old: Config, new: Config, where: Path) -> None:
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    changed = [
        key for key in before if before[key] != after.get(key) and key not in ("workers", "cache_images")
    ]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{where}: the run was started with {key}={before[key]!r}, now it is {after.get(key)!r}",
            "resume with the same settings, or start a new run with another --output",
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
