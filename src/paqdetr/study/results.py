"""What is kept of a run: one json of some kilobytes, from which every table and plot of a study is made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from paqdetr.errors import DataError
from paqdetr.files import MAX_SIDE_BYTES, read_json
from paqdetr.study.runs import RunKey
from paqdetr.text import shorten
from paqdetr.values import MAX_SEED

FORMAT = 1
DUPLICATES = ("duplicates", "copies")
"""What claims call AP_nms - AP; `copies` in older study files and results."""
# Replicates are kept as whole multiples of it, five digits of an AP, and as null where they are NaN.
UNIT = 1e-5
# What a file holds as json has it, in this order.
_AS_IT_IS = ("failed", "measure", "images", "figures", "cost", "provenance", "settings", "curve")


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run that is done, or one that has failed.

    Attributes:
        key: which one.
        failed: the reason; None if it is done, and then all of what follows is there.
        settings: flat, as resolved.
        measure: what was measured: split, checkpoints, replicates, seed. Another wish means to measure again.
        images: of the split, and a hash of their ids: figures of runs with the same hash are of the same images.
        figures: checkpoint -> name -> value in [0, 1], or a number per image; `per_class`, `queries` and `mistakes` are dicts,
            `layers` is a list of `StageFigures.to_json`.
        replicates: checkpoint -> name -> (R,) float64, the figure of each resample of the images, NaN where nothing defines it.
            The r-th resample is the same in all results with the same images and `measure`.
        curve: of the validation split, one dict an evaluation: step, AP, AP50, AP_nms, predictions_per_image; and loss.
        cost: seconds, step_seconds, cpu_seconds, peak_memory_gib, parameters, trainable, gflops, steps, threads.
        provenance: version, git commit, command, machine, packages.
    """

    key: RunKey
    failed: str | None
    settings: dict[str, Any]
    measure: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    replicates: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def figure(self, name: str, checkpoint: str) -> float | None:
        """A figure by the name that claims use; None if the run does not have it."""
        found: Any = self.figures.get(checkpoint, {})
        if name in DUPLICATES:
            values = [found.get("AP_nms"), found.get("AP")]
            return None if None in values else values[0] - values[1]
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return float(found) if isinstance(found, int | float) else None

    def replicate(self, name: str, checkpoint: str) -> np.ndarray | None:
        """(R,) of a figure; None where images were not resampled for it."""
        found = self.replicates.get(checkpoint, {})
        if name in DUPLICATES and {"AP", "AP_nms"} <= found.keys():
            return found["AP_nms"] - found["AP"]
        return found.get(name)

    def to_text(self) -> str:
        """Compact json, a line for each part, so that versions of it can be compared."""
        parts = {"format": FORMAT, **asdict(self.key)} | {name: getattr(self, name) for name in _AS_IT_IS}
        parts["replicates"] = {
            checkpoint: {
                name: [None if math.isnan(value) else round(value / UNIT) for value in values.tolist()]
                for name, values in named.items()
            }
            for checkpoint, named in self.replicates.items()
        }
        lines = [f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in parts.items()]
        return "{" + ",\n".join(lines) + "}\n"


_Value = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)] | None
_Positive = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]


class _Values(BaseModel):
    """Figures by name, of which some have their own form."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, _Value]  # type: ignore[reportIncompatibleVariableOverride]


class _Stage(_Values):
    stage: str


class _Step(_Values):
    step: int


class _Figures(_Values):
    per_class: dict[str, _Value] = {}
    queries: dict[str, _Value] = {}
    mistakes: dict[str, _Value] = {}
    layers: list[_Stage] = []


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Measure(_Part):
    split: str = ""
    checkpoints: list[str] = []
    replicates: int | None = None
    seed: int | None = None


class _Images(_Part):
    count: int = Field(ge=1)
    hash: str


class _Cost(_Part):
    seconds: _Positive
    step_seconds: _Positive
    gflops: _Positive
    steps: _Value = None
    cpu_seconds: _Value = None
    peak_memory_gib: _Value = None
    parameters: _Value = None


class _Commit(_Part):
    commit: str
    changed: bool


class _Machine(_Part):
    processor: str | None = None


class _Provenance(_Part):
    git: _Commit | None = None
    machine: _Machine | None = None
    source: dict[str, Any] | None = None


def _none_if_empty(value: Any) -> Any:
    return None if value == {} else value


class _Stored(BaseModel):
    """What stands in a file: the types of all that tables and plots are made of."""

    model_config = ConfigDict(strict=True)

    data: str
    variant: str
    seed: int = Field(ge=0, le=MAX_SEED)
    failed: str | None
    settings: dict[str, Any]
    measure: _Measure
    images: Annotated[_Images | None, BeforeValidator(_none_if_empty)]  # of a run that has failed
    figures: dict[str, _Figures]
    replicates: dict[str, dict[str, list[Annotated[int, Field(ge=-(10**15), le=10**15)] | None]]]
    curve: list[_Step]
    cost: Annotated[_Cost | None, BeforeValidator(_none_if_empty)]
    provenance: _Provenance

    @model_validator(mode="after")
    def _whole(self) -> _Stored:
        if self.failed is None:
            for checkpoint in self.measure.checkpoints:
                if checkpoint not in self.figures:
                    raise ValueError(f"figures: none of the checkpoint {checkpoint!r}")
        lengths = {len(values) for named in self.replicates.values() for values in named.values()}
        if len(lengths | ({self.measure.replicates} - {None} if lengths else set())) > 1:
            raise ValueError("replicates: not all of one length, that of `measure`")
        return self


def read_result(path: Path) -> RunResult | None:
    """The result in a file; None if there is none.

    Raises:
        DataError: the file holds something else; it names the field.
    """
    if not path.exists():
        return None
    remedy = "remove it: the next `paqdetr study --resume` measures the run again"
    try:
        content = read_json(path, limit=MAX_SIDE_BYTES)
    except DataError as error:
        raise DataError(error.message, remedy) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: is of format {shorten(found)}, this version reads {FORMAT}", remedy)
    try:
        stored = _Stored.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: is no result of a run: {where}: {first['msg']}", remedy) from None
    for stage in [stage for found in content["figures"].values() for stage in found.get("layers", ())]:
        if "copies" in stage:
            stage["duplicates"] = stage.pop("copies")
    return RunResult(
        key=RunKey(stored.data, stored.variant, stored.seed),
        replicates={
            checkpoint: {name: np.array(values, np.float64) * UNIT for name, values in named.items()}
            for checkpoint, named in stored.replicates.items()
        },
        **{name: content[name] for name in _AS_IT_IS},
    )


def read_results(folder: Path) -> list[RunResult]:
    """All results below a folder, of one study or of several, by data set, variant and seed.

    Raises:
        DataError: a file holds something else.
    """
    files: Iterable[Path] = sorted(folder.rglob("seed*.json"))
    found = []
    for file in files:
        if (result := read_result(file)) is None:
            continue
        if not file.as_posix().endswith(f"/{result.key.path}.json"):
            raise DataError(f"{file}: is the result of {result.key}", f"move it to {folder / result.key.path}.json")
        found.append(result)
    return sorted(found, key=lambda result: result.key)
