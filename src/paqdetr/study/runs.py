"""The runs of a study: every data set with every variant and seed, their settings, places and training images."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paqdetr.config import Config, describe_idle, load_config
from paqdetr.data.dataset import open_split
from paqdetr.errors import ConfigError
from paqdetr.files import MAX_SIDE_BYTES, read_json, write_text
from paqdetr.runs import Run, changed_settings, flat_settings
from paqdetr.study.datasets import folder_of, source_of, training_images
from paqdetr.study.spec import Study
from paqdetr.yaml_files import dump_value

_SAVE_EVERY_MINUTES = 2


@dataclass(frozen=True, slots=True)
class Places:
    """Where a study keeps what: DIR/KIND/DATA/VARIANT/seedN for each kind of thing.

    Attributes:
        output: the study's folder. `runs` holds ordinary folders of `paqdetr train`, `results` one json per run, all that
            tables are made of, `logs` what trainings printed, `sources` which images they saw, `data` what was made for all runs.
    """

    output: Path

    @property
    def study_file(self) -> Path:
        return self.output / "study.yaml"

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def results(self) -> Path:
        return self.output / "results"

    def run(self, key: RunKey) -> Run:
        return Run(self.output / "runs" / key.path)

    def result(self, key: RunKey) -> Path:
        return self.results / f"{key.path}.json"

    def log(self, key: RunKey) -> Path:
        return self.output / "logs" / f"{key.path}.log"

    def source(self, key: RunKey) -> Path:
        return self.output / "sources" / f"{key.path}.json"

    def lock(self, key: RunKey) -> Path:
        return self.output / "locks" / f"{key.path}.lock"


@dataclass(frozen=True, slots=True, order=True)
class RunKey:
    """Which of a study's runs."""

    data: str
    variant: str
    seed: int

    @property
    def path(self) -> str:
        """Relative, with slashes."""
        return f"{self.data}/{self.variant}/seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.data}, {self.variant}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One training of a study.

    Attributes:
        key: which one.
        base: model, recipe or YAML file.
        settings: what is laid over it, by dotted keys.
        config: the result of both, with the number of classes if the data are there.
        folder: of the data.
        source: which data those are, wherever the folder lies.
        steps: optimiser steps.
        epoch_steps: of an epoch.
        processes: that train together.
    """

    key: RunKey
    base: str
    settings: dict[str, Any]
    config: Config
    folder: Path
    source: dict[str, Any]
    steps: int
    epoch_steps: int
    processes: int

    def train_arguments(self, run: Run, *, device: str | None = None) -> list[str]:
        """What follows `python -m` to train it, or to take it up again."""
        launcher = ["paqdetr.study.launch", f"--nproc_per_node={self.processes}", "-m"]
        words = [*(launcher if self.processes > 1 else []), "paqdetr", "train", self.base]
        words += [f"{key}={dump_value(value)}" for key, value in self.settings.items()]
        words += [f"save_every_minutes={_SAVE_EVERY_MINUTES}"]
        words += ["--data", str(self.folder), "--output", str(run.output), "--resume"]
        return words + (["--device", device] if device else [])

    def command(self, run: Run, *, device: str | None = None) -> str:
        """The same, to be pasted into a shell."""
        return shlex.join(["python", "-m", *self.train_arguments(run, device=device)])


def plan_runs(study: Study, *, file: Path, places: Places, root: Path) -> list[PlannedRun]:
    """All runs in the order in which they are done: all of the first seed first, so that a study that is stopped early has
    something to say on every variant.

    Args:
        file: the study's own, which YAML files that it names are relative to.
        root: what data folders are relative to.

    Raises:
        ConfigError: a base or a setting is wrong; the message says where in the study it stands.
        DataError: a data folder, or its split that is to be measured, is missing or not readable.
    """
    for name, data in study.data.items():
        if data.folder is not None:  # the split that is measured, before anything is trained
            open_split(root / data.folder, study.split_of(name))
    prepared = {
        (name, variant): _DataPlan.of(study, name, variant, file=file, root=root)
        for name, data in study.data.items()
        for variant in (None, *data.steps_of)
    }
    seeds = {
        (data, variant): study.seeds_of(data, variant) for data in study.data for variant in study.variants_of(data)
    }
    return [
        _planned(
            study,
            RunKey(data, variant, own[turn]),
            prepared[data, variant if variant in study.data[data].steps_of else None],
            file,
            places,
            root,
        )
        for turn in range(max(map(len, seeds.values())))
        for (data, variant), own in seeds.items()
        if turn < len(own)
    ]


@dataclass(frozen=True, slots=True)
class _DataPlan:
    """What is looked up once for all runs on a data set."""

    budget: dict[str, Any]
    alike: dict[str, Any]  # what no variant's base may change
    steps: int
    epoch_steps: int
    classes: int | None

    @classmethod
    def of(cls, study: Study, name: str, variant: str | None, *, file: Path, root: Path) -> _DataPlan:
        data = study.data[name]
        config = _layered(study, name, None, file)[2]
        images = training_images(data, root=root)
        batches = max(images // (config.batch_size * study.processes), 1)
        epoch_steps = -(-batches // config.accumulate)
        steps, epochs = study.budget_of(name, variant)
        budget: dict[str, Any] = {}
        if epochs is None:
            assert steps is not None  # the study's file was checked for it
            epochs = -(-steps // epoch_steps)
            budget["max_steps"] = steps
        budget |= {"epochs": epochs, "eval_every": max(1, round(epochs / (data.evaluations or study.evaluations)))}
        classes = None if data.make is not None else len(open_split(root / str(data.folder), "train").classes)
        return cls(
            budget=budget,
            alike={
                "batch_size": config.batch_size,
                "accumulate": config.accumulate,
                "max_steps": budget.get("max_steps"),
                "patience": None,
            },
            steps=steps or epochs * epoch_steps,
            epoch_steps=epoch_steps,
            classes=10 if data.make else classes,
        )


def _planned(study: Study, key: RunKey, data: _DataPlan, file: Path, places: Places, root: Path) -> PlannedRun:
    spec, fold = study.data[key.data], study.fold_of(key.data, key.seed)
    base, layers, _ = _layered(study, key.data, key.variant, file)
    settings = layers | data.budget | {"seed": key.seed}
    config = load_config(base, settings)
    for idle in describe_idle(config, study.variants[key.variant].settings):
        raise ConfigError(
            f"{file}: variants.{key.variant}.settings, on {key.data}: {idle}", "leave it out, or add what it needs"
        )
    for name, value in data.alike.items():  # settings of a study's file cannot differ: it was checked for them
        if getattr(config, name) != value:
            raise ConfigError(
                f"{file}: variants.{key.variant}: {base}: has {name}={getattr(config, name)}, but {value} is what all runs on "
                "these data are to have",
                f"take {name} out of the base, so that all variants see equally many images",
            )
    if data.classes is not None:
        model = config.model.model_copy(update={"num_classes": data.classes})
        config = config.model_copy(update={"model": model})
    return PlannedRun(
        key=key,
        base=base,
        settings=settings,
        config=config,
        folder=folder_of(spec, cache=places.data, root=root, fold=fold),
        source=source_of(spec, fold),
        steps=data.steps,
        epoch_steps=data.epoch_steps,
        processes=study.processes,
    )


def _layered(study: Study, data: str, variant: str | None, file: Path) -> tuple[str, dict[str, Any], Config]:
    """The base, a name or the path of a YAML file wherever the program runs; the settings that are laid over it, without budget
    and seed; and the result. They are put together layer by layer, so that an error names the one that brings it.

    Raises:
        ConfigError: a layer is wrong.
    """
    own = study.variants[variant] if variant else None
    first = f"variants.{variant}.base" if own is not None and own.base else "base"
    layers = {first: {}, "settings": study.settings, f"data.{data}.settings": study.data[data].settings}
    if own is not None:
        layers[f"variants.{variant}.settings"] = own.settings
    name = (own.base if own is not None else None) or study.base
    base = str((file.parent / name).resolve()) if name.endswith((".yaml", ".yml")) else name
    config, settings = None, {}
    for place, more in layers.items():
        settings = {**settings, **more}
        try:
            config = load_config(base, settings)
        except ConfigError as error:
            message = error.message.removeprefix(f"{name}: ")
            raise ConfigError(f"{file}: {place}: {message}", error.remedy) from None
    assert config is not None
    return base, settings, config


def require_same_settings(
    planned: PlannedRun, found: Mapping[str, Any], where: Path, remedy: str | None = None
) -> None:
    """Raise ConfigError unless a run that is there, or its result, has the settings that are planned.

    Args:
        found: flat settings, by dotted key.
        remedy: if it is another than a new name.
    """
    wanted = flat_settings(planned.config)
    for key in changed_settings(found, wanted):
        raise ConfigError(
            f"{where}: was made with {key}={found[key]!r}, the study now says {wanted[key]!r}",
            remedy or "give changed settings a new name among the variants or data sets, or choose another --output",
        )


def note_source(planned: PlannedRun, places: Places) -> None:
    """Keep what a training that is about to begin is trained on. One that has begun keeps what it began with."""
    if places.run(planned.key).config_file.is_file():
        return
    write_text(places.source(planned.key), json.dumps(planned.source) + "\n")


def read_source(file: Path) -> dict[str, Any] | None:
    """What was noted; None of a run from before such notes were made, or one that was put here by hand."""
    if not file.exists():
        return None
    content = read_json(file, limit=MAX_SIDE_BYTES, error=ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file}: holds a {type(content).__name__}, expected an object",
            "remove it if the run beside it is to be trusted",
        )
    return content


def require_same_source(planned: PlannedRun, found: Mapping[str, Any] | None, where: Path) -> None:
    """Raise ConfigError if a run that is there, or its result, is known to be of other images than are planned.

    Args:
        found: as noted; None if nothing is known.
    """
    for key, value in planned.source.items():
        if found is not None and found.get(key) != value:
            raise ConfigError(
                f"{where}: was made of data with {key}={found.get(key)!r}, the study now says {value!r}",
                "give changed data a new name among the data sets, or choose another --output; "
                "with folds, the order of the seeds says which part is held out",
            )
