"""What runs took, and from that what others will take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from paqdetr.config import Config, ModelConfig
from paqdetr.models.cost import model_cost
from paqdetr.study.results import RunResult, read_result
from paqdetr.study.runs import Places, PlannedRun


@dataclass(frozen=True, slots=True)
class Forecast:
    """The runs of a variant on a data set, and what they will take on the machine that made the measurements.

    Attributes:
        seeds: of all runs.
        steps: of each.
        done: number of runs that have been trained.
        failed: number of those that failed, which `--resume --retry` trains again.
        seconds: of a training, as `_step_seconds` counts them; None if nothing comparable was measured.
        source: whose time per FLOP that rests on, from the nearest to the farthest: "these runs", "this data", "FLOPs" of any.
    """

    data: str
    variant: str
    seeds: tuple[int, ...]
    steps: int
    done: int
    failed: int
    seconds: float | None
    source: str

    @property
    def left(self) -> float | None:
        """Seconds of the trainings that are to be done."""
        missing = len(self.seeds) - self.done
        return 0.0 if not missing else None if self.seconds is None else self.seconds * missing


def forecast(runs: Sequence[PlannedRun], places: Places, measured: Sequence[RunResult] = ()) -> list[Forecast]:
    """What is to be done, by data set and variant.

    Args:
        runs: of one study.
        measured: results of other studies, whose times count too.
    """
    found = {planned.key: read_result(places.result(planned.key)) for planned in runs}
    own = [result for result in found.values() if result is not None]
    times = _Times([*own, *measured])
    grouped: dict[tuple[str, str], list[PlannedRun]] = {}
    for planned in runs:
        grouped.setdefault((planned.key.data, planned.key.variant), []).append(planned)
    rows = []
    for (data, variant), group in grouped.items():
        seconds, source = times.of(data, variant, group[0].config)
        there = [(found[planned.key], places.run(planned.key).finished) for planned in group]
        failed = sum(result is not None and result.failed is not None for result, _ in there)
        done = sum(result is not None or finished for result, finished in there) - failed
        seeds = tuple(planned.key.seed for planned in group)
        steps = group[0].steps
        rows.append(Forecast(data, variant, seeds, steps, done, failed, seconds and seconds * steps, source))
    return rows


class _Times:
    """Seconds of an optimiser step, of settings that were measured or resemble such."""

    def __init__(self, results: Sequence[RunResult]) -> None:
        keys = ("batch_size", "accumulate")
        usable = [one for one in results if one.failed is None and one.cost]
        self._results = [one for one in usable if all(isinstance(one.settings.get(key), int) for key in keys)]

    def of(self, data: str, variant: str, config: Config) -> tuple[float | None, str]:
        """Seconds, and what they rest on."""
        near = [result for result in self._results if result.key.data == data and _alike(result, config)]
        same = [result for result in near if result.key.variant == variant]
        for found, source in ((same, "these runs"), (near, "this data"), (self._results, "FLOPs")):
            if found:
                # A row of this name may have had another depth, and one of these data is another model.
                return statistics.median(_step_seconds(one.cost) * _share(config, one) for one in found), source
        return None, ""


def _step_seconds(cost: dict[str, Any]) -> float:
    """Of one thread without what other work on the machine took: its CPU time, evaluations included, if that is less than by the
    clock."""
    clock, cpu = cost["step_seconds"], cost.get("cpu_seconds")
    alone = cost.get("device") == "cpu" and cost.get("threads") == cost.get("processes") == 1
    return min(clock, cpu / cost["steps"]) if alone and cpu is not None else clock


def _share(config: Config, result: RunResult) -> float:
    """FLOPs of a step in parts of those of a run that was measured, whose images are these settings' too if they are alike."""
    image = result.cost.get("image") if _alike(result, config) else None
    own = config.batch_size * config.accumulate * gflops(config, image)
    return own / (_step_images(result.settings) * result.cost["gflops"])


def gflops(config: Config, image: Sequence[int] | None = None) -> float:
    """10^9 multiply-adds, each counted once, of an image of this height and width, or else of a square of the settings' size."""
    size = config.image_size
    height, width = image or ((size, size) if isinstance(size, int) else size)
    return _gflops(config.model, height, width)  # type: ignore[arg-type]  # frozen models can be hashed


@cache
def _gflops(model: ModelConfig, height: int, width: int) -> float:
    return model_cost(Config(name="model", model=model), height=height, width=width).flops / 1e9


def _alike(result: RunResult, config: Config) -> bool:
    """Whether a step has as many images of one size: data sets of one name may differ between studies."""
    size = config.model_dump(mode="json")["image_size"]
    images = config.batch_size * config.accumulate
    return result.settings.get("image_size") == size and _step_images(result.settings) == images


def _step_images(settings: dict[str, Any]) -> int:
    return int(settings["batch_size"]) * int(settings["accumulate"])
