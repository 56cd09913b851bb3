"""The folder of a run: its files, and how a run is taken up again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from paqdetr.config import Config, command_to_resume, idle_settings, load_config
from paqdetr.errors import ConfigError, DataError, StorageError
from paqdetr.files import Busy, acquire, remove_leftovers, storage_errors, write_text
from paqdetr.serialize import finite_rows, flattened, plain
from paqdetr.text import Summary, figure

if TYPE_CHECKING:  # a run is looked at without torch
    from paqdetr.models import Detector

Record = dict[str, Any]
"""A line of metrics.jsonl."""

_ENDED = "finished"
_GO_ON = ", then continue with --resume"
# What may differ when a run is continued: it changes neither weights nor figures.
FREE_SETTINGS = ("workers", "cache_images", "save_every_steps", "save_every_minutes", "trackers", "nan_policy")


@dataclass(frozen=True, slots=True, repr=False)
class Run(Summary):
    """A training's output.

    Attributes:
        output: the folder, with config.yaml, environment.json, metrics.jsonl, best.safetensors, last.safetensors,
            training_state.safetensors, curves.png, predictions.png.
    """

    output: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))  # a text is one, too

    @classmethod
    def at(cls, path: str | Path) -> Run | None:
        """The run whose folder, settings or checkpoint this is; None if it is none."""
        path = Path(path)
        run = cls(path.parent if path.name == "config.yaml" or path.suffix == ".safetensors" else path)
        # A start may have been stopped between the two; a file config.yaml alone may be anybody's.
        begun = run.environment_file.is_file() or path == run.output
        return run if run.config_file.is_file() and begun else None

    @property
    def config_file(self) -> Path:
        """Settings as resolved."""
        return self.output / "config.yaml"

    @property
    def environment_file(self) -> Path:
        """A json list with an entry for each start and resumption: the run's id, command, data, versions, git commit, machine."""
        return self.output / "environment.json"

    @property
    def data(self) -> str | None:
        """Folder of the data of the last start or resumption; None if the run does not say."""
        entries = self._environments()
        return entries[-1].get("data") if entries else None

    @property
    def id(self) -> str | None:
        """Hexadecimal digits that stay with the run wherever its folder goes; None before its start. Of a run that an earlier
        version began, those that W&B knows it by."""
        entries = self._environments()
        if not entries:
            return None
        return entries[-1].get("id") or hashlib.sha256(str(self.output.resolve()).encode()).hexdigest()[:16]

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
        rows = json_lines(self.metrics_file.read_bytes())
        return [row for row in rows if kind is None or row.get("kind") == kind]

    @property
    def finished(self) -> bool:
        """Whether the training came to its end."""
        return bool(self.records(_ENDED))

    @property
    def status(self) -> str:
        """How far the training has come, such as "unfinished: step 960 of 1400, epoch 2.74 of 4"."""
        config = None
        with suppress(ConfigError):  # of a version that has other settings
            config = load_config(self.config_file)
        return describe_status(self.records(), config)

    @property
    def metrics(self) -> dict[str, Any]:
        """The evaluation record of the best epoch; empty if there was none."""
        return best_evaluation(self.records())

    @property
    def empty(self) -> bool:
        """Whether a training was begun here and has never kept weights, such as one that ran out of memory in its first step.
        One that was evaluated had kept some: they were moved away."""
        kept = any(file.exists() for file in (self.state_file, self.best, self.last))
        kept = kept or any(row.get("kind") in ("eval", _ENDED) for row in self.records())
        return self.config_file.exists() and not kept

    def model(self, *, device: str = "cpu") -> Detector:
        """The best checkpoint, loaded."""
        from paqdetr.models import load

        return load(self.best, device=device)

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        best = self.metrics
        state = self.status if self.config_file.exists() else "no run"
        rows = [("best", f"AP {figure(best.get('AP'))}, AP50 {figure(best.get('AP50'))}, epoch {best.get('epoch')}")]
        rows = rows if best else []
        own = (self.best, self.last, self.config_file, self.metrics_file, self._curves)
        files = [file.name for file in own if file.exists()]
        return f"Run {self.output}: {state}", [*rows, ("files", ", ".join(files))]

    @property
    def _curves(self) -> Path:
        return self.output / "curves.png"

    def _picture(self) -> str | None:
        from paqdetr.drawing import data_uri
        from paqdetr.images import read_image

        with suppress(DataError):
            return data_uri(read_image(self._curves), 960)
        return None

    def write_config(self, config: Config) -> None:
        """Write the settings, whole or not at all, unless they are there, or are others of a run that has kept something."""
        if self.config_file.exists():
            with suppress(ConfigError):
                if not self.empty or load_config(self.config_file) == config:
                    return
        write_text(self.config_file, config.to_yaml())

    def add_environment(self, entry: dict[str, Any]) -> None:
        """Note what this start or resumption runs with."""
        write_text(self.environment_file, json.dumps([*self._environments(), entry], indent=1) + "\n")

    def _environments(self) -> list[dict[str, Any]]:
        try:
            entries = json.loads(self.environment_file.read_bytes())
        except (FileNotFoundError, ValueError):
            entries = []
        # What is damaged is no reason to end a training.
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

    def append(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl, null in place of a number that is NaN or infinite.

        Raises:
            StorageError: the file cannot be written.
        """
        with storage_errors(self.metrics_file, _GO_ON), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")

    def flush_metrics(self) -> int:
        """fsync metrics.jsonl, a new one if somebody has removed it; its size in bytes.

        Raises:
            StorageError: the file cannot be written.
        """
        with storage_errors(self.metrics_file, _GO_ON), self.metrics_file.open("ab") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def require_place(self, *, resume: bool) -> None:
        """Raise ConfigError if the folder holds a run already and `resume` is off; or if it is a file, or a folder with other
        files. It becomes a run by `write_config`, which is called as soon as nothing can be wrong any more."""
        if self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"{self.output}: a file is in the way", "choose another --output")
        # Listed before it is asked for the run: another process may be making one here just now.
        foreign = self.output.is_dir() and any(not entry.name.startswith(".") for entry in self.output.iterdir())
        if self.config_file.exists():
            if not resume and not self.empty:
                raise ConfigError(
                    f"{self.output}: there is a run already, and nothing is overwritten",
                    "choose another --output, or continue it with --resume (in Python output= and resume=True)",
                )
        elif foreign:
            raise ConfigError(f"{self.output}: the folder holds other files and no run", "choose another --output")

    def require_settings(self, config: Config) -> None:
        """Raise ConfigError if the run, which has kept something, was started with other settings."""
        if not self.config_file.exists() or self.empty:
            return
        started = load_config(self.config_file)
        before, after = flat_settings(started), flat_settings(config)
        changed = changed_settings(before, after)
        # What changes nothing in either may differ: a setting that came later than the run, above all.
        idle = idle_settings(started, changed).keys() & idle_settings(config, changed).keys()
        found = [f"{key}={before[key]!r}, now it is {after[key]!r}" for key in changed if key not in idle]
        if found:
            more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
            longer = {"epochs", "max_steps"} & set(changed)
            further = f"to train its weights further, start a new run with init={self.output}; " if longer else ""
            raise ConfigError(
                f"{self.config_file}: the run was started with {'; '.join(found[:8])}{more}",
                f"{further}its own settings are resumed by: "
                f"{command_to_resume(self.output, names_data=self.data is not None)}",
            )

    def begin(self, *, resume: bool) -> IO[bytes] | None:
        """`hold` the folder for a training, new or continued.

        Raises:
            ConfigError: as `require_place`, or another process holds it.
        """
        self.require_place(resume=resume)
        held = self.hold()
        try:
            self.require_place(resume=resume)  # another training may have come and gone in between
        except ConfigError:
            if held is not None:
                held.close()
            raise
        return held

    def hold(self) -> IO[bytes] | None:
        """Keep other trainings out of the folder until the file that is given back is closed, or this process ends, however.

        Raises:
            ConfigError: another process holds it.
            StorageError: nothing can be written there.
        """
        try:
            return acquire(self._lock_file)
        except Busy:
            raise ConfigError(
                f"{self.output}: another process is training there", "wait until it ends, or stop it"
            ) from None
        except OSError as error:
            raise StorageError(
                f"{self.output}: cannot be written ({error.strerror})", "choose another --output"
            ) from None

    def abandon(self) -> None:
        """Remove the folder if no run was begun in it: a mistake in the settings must not leave anything in the way. Its holder
        calls it."""
        if not self.config_file.exists():
            with suppress(OSError):
                self._lock_file.unlink(missing_ok=True)
                self.output.rmdir()  # an empty folder alone

    @property
    def _lock_file(self) -> Path:
        return self.output / ".lock"

    def remove_leftovers(self) -> None:
        """Remove half-written files of a process that was killed while saving."""
        remove_leftovers(self.output)
        for pattern in (".tmp??????", ".*.tmp"):  # of safetensors, and of earlier versions
            for path in self.output.glob(pattern):
                if path.is_file():
                    path.unlink(missing_ok=True)

    def truncate_metrics(self, size: int) -> None:
        """Forget records written after a saved state, given the file's size in bytes at that time; what follows begins a line.

        Raises:
            StorageError: the file cannot be written.
        """
        with storage_errors(self.metrics_file), self.metrics_file.open("a+b") as file:
            file.truncate(min(size, os.fstat(file.fileno()).st_size))
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def describe_status(records: Sequence[Record], config: Config | None) -> str:
    """How far a training with these records has come; without its settings as far as that is known."""
    places = finite_rows(records, ("step", "epoch"))
    steps = finite_rows(records, ("step",))[:, 0]
    where = f"step {steps[-1]:.0f}" if len(steps) and steps[-1] > 0 else "no step was recorded"
    if config is not None and len(places) and places[-1, 1] > 0:
        total = round(config.epochs * places[-1, 0] / places[-1, 1])
        where += f" of {min(total, config.max_steps or total)}, epoch {places[-1, 1]:g} of {config.epochs}"
    ended = [record for record in records if record.get("kind") == _ENDED]
    stopped = f" ({ended[-1]['stopped']})" if ended and "stopped" in ended[-1] else ""
    return f"{'finished' if ended else 'unfinished'}: {where}{stopped}"


def best_evaluation(records: Sequence[Record]) -> Record:
    """The evaluation with the best AP, the first of equals, of those on the validation split that the run has now; empty if there
    was none."""
    begins = max((i for i, record in enumerate(records) if record.get("new_validation")), default=0)
    rows = [record for record in records[begins:] if record.get("kind") == "eval"]
    scores = [row["AP"] if isinstance(row.get("AP"), int | float) else 0.0 for row in rows]
    return rows[scores.index(max(scores))] if rows else {}


def flat_settings(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key, as json values."""
    return flattened(config.model_dump(mode="json"))


def changed_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Dotted keys of `wanted` that a run was made with otherwise, without those that change no weight."""
    return [
        key
        for key, value in wanted.items()
        if key in found and key not in FREE_SETTINGS and plain(found[key]) != plain(value)
    ]


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, as they were written: where a run goes on with fewer images, steps are fewer from there on.

    Lines that are no json objects with a `step` are skipped: the last one of an interrupted run is cut short.

    Raises:
        DataError: the file cannot be read, or has no record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "check the run folder") from error
    records = [record for record in json_lines(content) if isinstance(record.get("step"), (int, float))]
    if not records:
        raise DataError(
            f"{path}: no record in {len(content.splitlines())} lines", "train for at least one logging interval"
        )
    return records


def json_lines(content: bytes) -> list[dict[str, Any]]:
    """The objects of a file with one json a line, without lines that a crash cut short or the disk has damaged."""
    rows = []
    for line in content.splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
