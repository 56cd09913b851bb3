"""The folder of a run: its files, and how a run is taken up again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from paqdetr.checkpoint import write_whole
from paqdetr.config import Config, load_config
from paqdetr.errors import ConfigError, StorageError
from paqdetr.metrics.jsonable import json_safe
from paqdetr.models import Detector, load

_ENDED = "finished"
# What may differ when a run is continued: it changes neither weights nor figures.
FREE_SETTINGS = (
    "workers",
    "cache_images",
    "save_every_steps",
    "save_every_minutes",
    "trackers",
    "nan_policy",
)


@dataclass(frozen=True, slots=True)
class Run:
    """A training's output.

    Attributes:
        output: the folder, with config.yaml, environment.json, metrics.jsonl, best.safetensors, last.safetensors,
            training_state.safetensors, curves.png, predictions.png.
    """

    output: Path

    @property
    def config_file(self) -> Path:
        """Settings as resolved."""
        return self.output / "config.yaml"

    @property
    def environment_file(self) -> Path:
        """A json list with an entry for each start and resumption: command, versions, git commit, machine."""
        return self.output / "environment.json"

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
            text = config.to_yaml()
            write_whole(self.config_file, lambda path: path.write_text(text, encoding="utf-8"))

    def add_environment(self, entry: dict[str, Any]) -> None:
        """Note what this start or resumption runs with."""
        try:
            entries = json.loads(self.environment_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            entries = []
        text = json.dumps([*entries, entry], indent=1) + "\n"
        write_whole(self.environment_file, lambda path: path.write_text(text, encoding="utf-8"))

    def append(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl, null in place of a number that is NaN or infinite.

        Raises:
            StorageError: the file cannot be written.
        """
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(json_safe(record), allow_nan=False) + "\n")
        except OSError as error:
            raise StorageError(
                f"{self.metrics_file}: cannot be written ({error.strerror})",
                "check the disk's space and the folder's permissions, then continue with --resume",
            ) from None

    def flush_metrics(self) -> int:
        """Have the disk take over metrics.jsonl; its size in bytes."""
        with self.metrics_file.open("r+b") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def hold(self) -> IO[bytes] | None:
        """Keep other trainings out of the folder until the file that is given back is closed, or this process ends, however.

        Raises:
            ConfigError: another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows: nobody is kept out
            return None
        # A lock of the process, which those that load images do not inherit.
        file = self.config_file.open("r+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise ConfigError(
                f"{self.output}: another process is training there", "wait until it ends, or stop it"
            ) from None
        except OSError:
            pass  # a network's file system without locks
        return file

    def remove_leftovers(self) -> None:
        """Remove half-written files of a process that was killed while saving."""
        for path in self.output.glob(".*.tmp"):
            path.unlink(missing_ok=True)

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
    before, after = flat_settings(old), flat_settings(new)
    changed = [key for key in before if before[key] != after.get(key) and key not in FREE_SETTINGS]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{where}: the run was started with {key}={before[key]!r}, now it is {after.get(key)!r}",
            "resume with the same settings, or start a new run with another --output",
        )


def flat_settings(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, as json values."""
    return _flat(config.model_dump(mode="json"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
