"""From the results of runs to comparisons and verdicts. Nothing here is written by hand: a claim's verdict is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from paqdetr.errors import DataError
from paqdetr.runs import changed_settings
from paqdetr.serialize import fields_of
from paqdetr.study.results import RunResult
from paqdetr.study.runs import RunKey
from paqdetr.study.spec import Study
from paqdetr.study.statistics import Estimate, estimate, holm

Outcome = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the runs say of a claim on one data set.

    Attributes:
        claim: its name.
        data: where it was decided.
        against: the variant that is compared with.
        effect: variant minus the other.
        threshold: that the effect is claimed to exceed, or of a claim that says "lower", to lie below.
        p: of the effect being just the threshold, adjusted for all claims of the study together (Holm).
        outcome: `holds` if p is below the study's level and the effect on the claimed side of the threshold; `does not hold` if
            on the other; undecided otherwise.
        over_images: whether images were resampled; else the interval is one over seeds alone.
        missing: seeds that both variants are to have and that are not run, have failed, or lack the figure.
    """

    claim: str
    data: str
    against: str
    effect: Estimate | None
    threshold: float
    p: float
    outcome: Outcome
    over_images: bool
    missing: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Ready for json."""
        return fields_of(self) | {"p": round(self.p, 4)}


class Runs:
    """The results of a study by data set, variant and seed.

    Attributes:
        keys: of all planned runs, in the study's order.
        results: those that are there, by key.

    Args:
        results: of any order; those that the study does not have are left out.

    Raises:
        DataError: a result was made or measured otherwise than the study's file now says.
    """

    def __init__(self, study: Study, results: Sequence[RunResult]) -> None:
        self.study = study
        self.checkpoint: str = study.evaluate.checkpoints[0]
        self.keys = [
            RunKey(data, variant, seed)
            for data in study.data
            for variant in study.variants_of(data)
            for seed in study.seeds_of(data, variant)
        ]
        planned = set(self.keys)
        self.results = {result.key: result for result in results if result.key in planned}
        for result in self.done:
            require_fits(study, result)

    @property
    def failed(self) -> list[RunResult]:
        """Runs that ended with an error."""
        return [result for result in self.results.values() if result.failed is not None]

    @property
    def done(self) -> list[RunResult]:
        """Runs that have figures."""
        return [result for result in self.results.values() if result.failed is None]

    def of(self, data: str, variant: str) -> dict[int, RunResult]:
        """Runs that are done, by seed."""
        found = (self.results.get(RunKey(data, variant, seed)) for seed in self.study.seeds_of(data, variant))
        return {result.key.seed: result for result in found if result is not None and result.failed is None}

    def mean(self, data: str, variant: str, figure: str) -> Estimate | None:
        """A variant's figure by itself, with its interval; None if no run has it."""
        own = self.having(figure, data, variant)
        return self._estimate(list(own.values()), None, figure) if own else None

    def difference(self, data: str, variant: str, against: str, figure: str) -> Estimate | None:
        """Variant minus the other, paired by seed and by image; None if they have no seed in common."""
        mine = self.having(figure, data, variant)
        its = self.having(figure, data, against)
        seeds = [seed for seed in mine if seed in its]
        if not seeds:
            return None
        return self._estimate([mine[s] for s in seeds], [its[s] for s in seeds], figure)

    def having(self, figure: str, data: str, variant: str) -> dict[int, RunResult]:
        """Runs that are done and have a figure, by seed."""
        runs = self.of(data, variant)
        return {seed: run for seed, run in runs.items() if run.figure(figure, self.checkpoint) is not None}

    def _estimate(self, mine: list[RunResult], its: list[RunResult] | None, figure: str) -> Estimate:
        chosen = self.checkpoint
        if its is not None:
            for one, other in zip(mine, its, strict=True):
                if one.images != other.images or one.measure != other.measure:
                    raise DataError(
                        f"{one.key} and {other.key}: were measured on other images or resamples",
                        "measure them again: `paqdetr study --resume` with the data of both",
                    )
        values = _numbers([run.figure(figure, chosen) for run in mine])
        replicates = _stacked([run.replicate(figure, chosen) for run in mine])
        if its is not None:
            values = values - _numbers([run.figure(figure, chosen) for run in its])
            below = _stacked([run.replicate(figure, chosen) for run in its])
            replicates = None if replicates is None or below is None else replicates - below
        images = min(int(run.images["count"]) for run in mine)
        return estimate(
            values.tolist(),
            None if images < 2 else replicates,  # a single image has no resamples
            groups=[run.images["hash"] for run in mine],
            images=images,
            level=self.study.level,
        )


def verdicts(runs: Runs) -> list[Verdict]:
    """Of every claim on every data set where it is to be decided, in the study's order."""
    study = runs.study
    places = [(name, claim, data) for name, claim in study.claims.items() for data in study.data_of(claim)]
    pairs = [(claim.variant, claim.against or study.baseline) for _, claim, _ in places]
    effects = [runs.difference(data, *pair, claim.figure) for pair, (_, claim, data) in zip(pairs, places, strict=True)]
    raw = [1.0 if e is None else e.p_value(claim.bound) for (_, claim, _), e in zip(places, effects, strict=True)]
    found = []
    for (name, claim, data), (variant, against), effect, p in zip(places, pairs, effects, holm(raw), strict=True):
        outcome: Outcome = "undecided"
        if effect is not None and p < study.level:
            outcome = "holds" if claim.sign * (effect.mean - claim.bound) > 0 else "does not hold"
        wanted = set(study.seeds_of(data, variant)) & set(study.seeds_of(data, against))
        there = runs.having(claim.figure, data, variant).keys() & runs.having(claim.figure, data, against).keys()
        over_images = effect is not None and effect.images is not None
        missing = tuple(sorted(wanted - there))
        found.append(Verdict(name, data, against, effect, claim.bound, p, outcome, over_images, missing))
    return found


def require_fits(study: Study, result: RunResult) -> None:
    """Raise DataError if a result was made or measured otherwise than the study's file now says."""
    _require_same_measure(study, result)
    _require_same_settings(study, result)


def _require_same_measure(study: Study, result: RunResult) -> None:
    """A file that has changed since must not stand above results of the file that was."""
    if not result.images or study.evaluate.checkpoints[0] not in result.figures:
        raise DataError(
            f"{result.key}: its result says nothing of the images or the checkpoint",
            "measure it again: `paqdetr study --resume`, without --report-only",
        )
    for name, value in study.measure_of(result.key.data).items():
        if result.measure.get(name, value) != value:
            raise DataError(
                f"{result.key}: was measured with {name}={result.measure[name]!r}, the study now says {value!r}",
                "measure it again: `paqdetr study --resume`, without --report-only",
            )


def _require_same_settings(study: Study, result: RunResult) -> None:
    key = result.key
    data, variant = study.data[key.data], study.variants[key.variant]
    steps, epochs = study.budget_of(key.data, key.variant)
    wanted, base = study.settings | data.settings | variant.settings, variant.base or study.base
    # Of the base its name alone: a file may be elsewhere by now, and a model may have other settings in this version.
    wanted |= {} if base.endswith((".yaml", ".yml")) else {"name": base}
    wanted |= {"max_steps": steps} if steps else {"epochs": epochs}
    for name in changed_settings(result.settings, wanted):
        raise DataError(
            f"{key}: was made with {name}={result.settings[name]!r}, the study now says {wanted[name]!r}",
            "give changed settings a new name among the variants or data sets, or choose another --output",
        )


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values])


def _stacked(replicates: list[np.ndarray | None]) -> np.ndarray | None:
    """(n, R); None if a run has none."""
    found = [values for values in replicates if values is not None]
    if len({len(values) for values in found}) > 1:
        raise DataError("results were resampled unequally often", "measure the runs of the study again")
    return np.stack(found) if len(found) == len(replicates) else None
