"""A study as a file: which variants are compared, on which data, with which seeds and budget, and what is claimed.

studies/pilot.yaml is the example. Settings are laid over one another, the later over the earlier: the variant's base model (the
study's, if it names none), `settings` of the study, of the data set, of the variant. A variant thus is the same on all data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from paqdetr.config import known_keys, retired_keys
from paqdetr.config.model import Section, lists_are_tuples
from paqdetr.errors import ConfigError
from paqdetr.serialize import flattened
from paqdetr.text import did_you_mean
from paqdetr.values import MAX_RESAMPLES, MAX_SEED
from paqdetr.yaml_files import load_yaml

# What a study decides for all of its runs alike: key -> what to write instead.
_DECIDED = {
    "name": "the names of runs are those of data set, variant and seed",
    "seed": "list the seeds under `seeds`",
    "epochs": "write `epochs` of the study or of the data set, not of settings",
    "max_steps": "write `steps` of the study or of the data set",
    "eval_every": "write `evaluations` of the study or of the data set",
    "patience": "all runs of a study have the same budget, whatever they reach",
    "model.num_classes": "the data say it",
    "save_every_steps": "leave it out: the queue has states saved every two minutes",
    "save_every_minutes": "leave it out: the queue has states saved every two minutes",
}
_ALL_SEE_AS_MUCH = ("batch_size", "accumulate")
_MAX_RUNS = 10_000

CLAIMED = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
    *("AP_nms", "AP50_nms", "duplicates", "predictions_per_image"),
)
"""Figures that a claim can be about: the COCO figures; those after non-maximum suppression; `duplicates` (formerly `copies`),
AP_nms - AP; and predictions that score over 0.3. Query-use views come on top as `queries.NAME`, whatever the runs have."""


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    known, retired = known_keys(), retired_keys()  # kept studies have retired keys; a run with one is refused
    for key in settings:
        if key in _DECIDED:
            raise ValueError(f"{key} is the study's to set: {_DECIDED[key]}")
        if key not in known and key not in retired:
            hint = did_you_mean(key, known, "docs/settings.md lists what there is")
            raise ValueError(f"unknown setting {key!r}, {hint}")
    return settings


def _named(names: dict[str, Any]) -> dict[str, Any]:
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
            raise ValueError(f"{name!r} names a folder: letters, digits and _ . + - alone")
    return names


def identifier(*parts: str) -> str:
    """Letters, digits and underscores, as names of a report's parts are."""
    return re.sub(r"\W", "_", "_".join(parts))


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) != len(seeds):
        raise ValueError("a seed is listed twice")
    return seeds


# Nested settings and dotted keys mean the same.
_Flat = BeforeValidator(lambda value: flattened(value) if isinstance(value, Mapping) else value)
Settings = Annotated[dict[str, Any], _Flat, AfterValidator(_known)]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...],
    Field(min_length=1, max_length=1000),
    AfterValidator(_distinct),
    BeforeValidator(lists_are_tuples),
]


class Digits(Section):
    """Arguments of `paqdetr data make digits`."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    size: int = Field(default=320, ge=32, le=4096)
    train: int = Field(default=1600, ge=1, le=10**7)
    val: int = Field(default=300, ge=1, le=10**7)
    test: int = Field(default=1000, ge=1, le=10**7)
    min_objects: int = Field(default=3, ge=0, le=1000)
    max_objects: int = Field(default=12, ge=1, le=1000)


class _Budget(Section):
    steps: int | None = Field(default=None, ge=1, le=10**9)
    epochs: int | None = Field(default=None, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.steps and self.epochs:
            raise ValueError("has both steps and epochs; a budget is one of them")
        return self


class DataSet(_Budget):
    """Images to train and evaluate on, and what all variants have in common there. The same images may stand under several names,
    with other settings or another budget.

    Attributes:
        folder: of a data set, relative to --data-root.
        make: or the digits that are made, once for all data sets of the study with equal arguments.
        folds: cut train and val together into so many parts; a run of the k-th seed (counted from 0; those in `more_seeds` come
            after those of all) is validated on part k modulo `folds`, and trained on the others.
        split: that is measured, if not that of `evaluate`.
        steps, epochs, evaluations, seeds: instead of the study's.
        steps_of: steps of single variants, where rows are compared at equal cost rather than at equal steps: variant -> steps.
        variants: those that run here; all if None.
        more_seeds: of single variants, after the seeds of all: variant -> seeds.
    """

    about: str = ""
    folder: str | None = None
    make: Digits | None = None
    folds: int | None = Field(default=None, ge=2, le=1000)
    split: Literal["train", "val", "test"] | None = None
    settings: Settings = Field(default_factory=dict)
    evaluations: int | None = Field(default=None, ge=1, le=10**6)
    seeds: Seeds | None = None
    variants: tuple[str, ...] | None = None
    more_seeds: dict[str, Seeds] = Field(default_factory=dict)
    steps_of: dict[str, Annotated[int, Field(ge=1, le=10**9)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> DataSet:
        if (self.folder is None) == (self.make is None):
            raise ValueError("needs either `folder: DIR` or `make: {...}`")
        return self


class Variant(Section):
    """One row of a comparison.

    Attributes:
        base: another model, recipe or YAML file than the study's.
        settings: what differs from it.
    """

    about: str = ""
    base: str | None = None
    settings: Settings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _same_images(self) -> Variant:
        for key in _ALL_SEE_AS_MUCH:
            if key in self.settings:
                raise ValueError(
                    f"settings.{key} is not a variant's to set: all variants see equally many images; "
                    "write it under `settings` of the study or of the data set"
                )
        return self


class Published(Section):
    """What a paper says of a claim.

    Attributes:
        effect: in the figure's own unit, positive where the claim says so: 0.015 is 1.5 points of AP.
        where: data, model and table.
    """

    effect: float
    where: str


class Claim(Section):
    """A sentence that the runs decide: the figure of `variant` is higher (lower) than that of `against`, by more than
    `threshold`.

    Attributes:
        text: the sentence.
        against: another variant than the baseline.
        threshold: in the figure's unit: 0.01 is one point of AP.
        data: where it is to be decided; all data sets that both variants run on if None.
        published: what is claimed elsewhere, to stand beside it.
    """

    text: str = ""
    variant: str
    against: str | None = None
    figure: str = "AP"
    direction: Literal["higher", "lower"] = "higher"
    threshold: float = Field(default=0.0, ge=0)
    data: tuple[str, ...] | None = None
    published: Published | None = None

    @property
    def sign(self) -> int:
        """1 if variant minus the other is claimed to be above zero, -1 if below."""
        return 1 if self.direction == "higher" else -1

    @property
    def is_share(self) -> bool:
        """Whether the figure lies in [0, 1]; of `queries.`, where counts stand too, this is said of Gini coefficients alone."""
        return self.figure.startswith("queries.gini") or not self.figure.startswith(
            ("queries.", "predictions_per_image")
        )

    @property
    def bound(self) -> float:
        """What variant minus the other is claimed to exceed, or to lie below."""
        return self.sign * self.threshold + 0.0  # and no -0

    @model_validator(mode="after")
    def _known_figure(self) -> Claim:
        if self.figure not in (*CLAIMED, "copies") and not self.figure.startswith("queries."):
            hint = did_you_mean(self.figure, CLAIMED, f"there are {', '.join(CLAIMED)}", cutoff=0.4)
            raise ValueError(f"figure: unknown figure {self.figure!r}, {hint}")
        numbers = {"threshold": self.threshold, "published.effect": self.published and self.published.effect}
        for key, value in numbers.items():
            if self.is_share and value is not None and abs(value) >= 0.5:
                raise ValueError(f"{key}: {value} of {self.figure}, which lies in [0, 1]: one point is 0.01")
        return self


class Measurement(Section):
    """What is measured of a finished training; it can change without training again.

    Attributes:
        split: of the data set.
        checkpoints: the first is the one that claims are about. `best` was chosen on the validation split, `last` was not chosen.
        replicates: resamples of the images, the same for all runs of a data set.
        seed: of those resamples.
    """

    split: Literal["train", "val", "test"] = "test"
    checkpoints: Annotated[tuple[Literal["last", "best"], ...], Field(min_length=1, max_length=2)] = ("last",)
    replicates: int = Field(default=400, ge=50, le=MAX_RESAMPLES)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)


class Study(_Budget):
    """All of it.

    Attributes:
        base: the model, recipe or YAML file (relative to the study's) that variants change.
        settings: of all runs.
        steps, epochs: the budget of every run: optimiser steps, or passes over the training images. One of the two, here or at
            each data set.
        evaluations: on the validation split, about so many over a training.
        seeds: the same number means the same order of images and the same initial weights where shapes agree, so runs are
            compared seed by seed.
        threads: of each process.
        processes: that train together, each on a device of its own; `batch_size` is of one.
        baseline: the variant that others are compared with.
        level: one minus the confidence of intervals, and how often, over all claims together, a wrong verdict is accepted.
    """

    name: str
    about: str = ""
    base: str
    settings: Settings = Field(default_factory=dict)
    evaluations: int = Field(default=10, ge=1, le=10**6)
    seeds: Seeds = (0, 1, 2)
    threads: int = Field(default=2, ge=1, le=1024)
    processes: int = Field(default=1, ge=1, le=1024, description="that train together, one a device")
    baseline: str = "baseline"
    level: float = Field(default=0.05, gt=0, lt=0.5)
    data: Annotated[dict[str, DataSet], Field(min_length=1), AfterValidator(_named)]
    variants: Annotated[dict[str, Variant], Field(min_length=1), AfterValidator(_named)]
    claims: dict[str, Claim] = Field(default_factory=dict)
    evaluate: Measurement = Measurement()

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        _named({self.name: None})
        variants = self.variants, "a variant"
        _require_known("baseline", [self.baseline], *variants)
        runs = sum(len(self.seeds_of(name, variant)) for name in self.data for variant in self.variants_of(name))
        if runs > _MAX_RUNS:
            raise ValueError(f"{runs:,} runs, more than the {_MAX_RUNS:,} that a study may have")
        parts = [identifier(name) for name in self.data]
        if twice := next((name for name in self.data if parts.count(identifier(name)) > 1), None):
            raise ValueError(
                f"data: {twice!r} and another name differ in _ . + - alone, which a report cannot tell apart"
            )
        for name, data in self.data.items():
            if not (data.steps or data.epochs or self.steps or self.epochs):
                raise ValueError(f"data.{name}: has no budget: give steps or epochs, here or for the study")
            _require_known(f"data.{name}.variants", data.variants or (), *variants)
            for key, own in (("more_seeds", data.more_seeds), ("steps_of", data.steps_of)):
                _require_known(f"data.{name}.{key}", own, *variants)
                _require_known(f"data.{name}.{key}", own, self.variants_of(name), "a variant that runs there")
            for variant in data.more_seeds:
                _distinct(self.seeds_of(name, variant))
        for name, claim in self.claims.items():
            _require_known(f"claims.{name}.variant", [claim.variant], *variants)
            _require_known(f"claims.{name}.against", [claim.against or self.baseline], *variants)
            if claim.variant == (claim.against or self.baseline):
                raise ValueError(f"claims.{name}: compares {claim.variant!r} with itself")
            _require_known(f"claims.{name}.data", claim.data or (), self.data, "a data set")
            decided = self.data_of(claim)
            for data in claim.data or ():
                if data not in decided:
                    raise ValueError(f"claims.{name}.data: not both of its variants run on {data!r}")
            if not decided:
                raise ValueError(f"claims.{name}: there is no data set on which both of its variants run")
        return self

    def only(self, names: Collection[str]) -> Study:
        """The study on these data sets alone.

        Raises:
            ConfigError: one that it does not have.
        """
        if unknown := [name for name in names if name not in self.data]:
            raise ConfigError(
                f"{self.name}: there is no data set {unknown[0]!r}", f"choose from {', '.join(self.data)}"
            )
        return self.model_copy(update={"data": {name: own for name, own in self.data.items() if name in names}})

    def seeds_of(self, data: str, variant: str) -> tuple[int, ...]:
        """Seeds of a variant's runs on a data set."""
        own = self.data[data]
        return (own.seeds or self.seeds) + own.more_seeds.get(variant, ())

    def fold_of(self, data: str, seed: int) -> int | None:
        """The part that is held out from the runs of a seed, of all variants the same; None without `folds`."""
        own = self.data[data]
        order = dict.fromkeys([*(own.seeds or self.seeds), *(one for more in own.more_seeds.values() for one in more)])
        return None if own.folds is None else list(order).index(seed) % own.folds

    def budget_of(self, data: str, variant: str | None) -> tuple[int | None, int | None]:
        """Steps and epochs of a variant's runs on a data set, one of them None; of all but those in `steps_of` if it is None."""
        own = self.data[data]
        if variant in own.steps_of:
            return own.steps_of[variant], None
        return (own.steps, own.epochs) if own.steps or own.epochs else (self.steps, self.epochs)

    def variants_of(self, data: str) -> tuple[str, ...]:
        """Variants that run on a data set, in the study's order."""
        chosen = self.data[data].variants
        return tuple(name for name in self.variants if chosen is None or name in chosen)

    def split_of(self, data: str) -> str:
        """The split that is measured."""
        return self.data[data].split or self.evaluate.split

    def measure_of(self, data: str) -> dict[str, Any]:
        """What is measured of a run on a data set, as its result keeps it."""
        wanted = self.evaluate
        return {
            "split": self.split_of(data),
            "checkpoints": list(wanted.checkpoints),
            "replicates": wanted.replicates,
            "seed": wanted.seed,
        }

    def data_of(self, claim: Claim) -> tuple[str, ...]:
        """Data sets on which a claim is decided: those that both of its variants run on."""
        both = {claim.variant, claim.against or self.baseline}
        return tuple(
            name
            for name in self.data
            if (claim.data is None or name in claim.data) and both <= set(self.variants_of(name))
        )


def load_study(path: str | Path) -> Study:
    """A study's file, checked.

    Raises:
        ConfigError: naming the key that is wrong.
        DataError: the file cannot be read as YAML.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(
            f"{path}: no such study",
            "give a YAML file; examples are in studies/ of a checkout, and not in the installed package",
        )
    values = load_yaml(path)
    values.setdefault("name", path.stem)
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise _explain(error, path) from None


def _require_known(key: str, names: Iterable[str], known: Collection[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{key}: {name!r} is not {what} of this study; there are {', '.join(known)}")


def _explain(error: ValidationError, path: Path) -> ConfigError:
    """One line about the first of pydantic's complaints."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        parent, _, leaf = key.rpartition(".")
        known = _fields_at(first["loc"][:-1])
        remedy = did_you_mean(leaf, known, f"known there: {', '.join(known)}")
        return ConfigError(f"{path}: unknown key {leaf!r}" + (f" in {parent}" if parent else ""), remedy)
    if first["type"] == "missing":
        return ConfigError(f"{path}: {key} is missing", "docs/own_studies.md shows what a study's file holds")
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(
        f"{path}: {key}: {message}" if key else f"{path}: {message}",
        "correct the file; docs/own_studies.md shows what it holds",
    )


def _fields_at(place: tuple[int | str, ...]) -> list[str]:
    """Keys that are known at a place of the file."""
    sections: dict[str, type[BaseModel]] = {"data": DataSet, "variants": Variant, "claims": Claim}
    inner: dict[str, type[BaseModel]] = {"make": Digits, "published": Published}
    if not place:
        return list(Study.model_fields)
    if place[0] == "evaluate":
        return list(Measurement.model_fields)
    found = inner.get(str(place[-1])) or sections.get(str(place[0]))
    return list(found.model_fields) if found else []
