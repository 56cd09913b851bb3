"""The rows of a study's tables, by column key: what the page, the Markdown and docs/study.md are all made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from paqdetr.errors import DataError
from paqdetr.serialize import plain
from paqdetr.study.statistics import Estimate, pooled_variance, variance_bound
from paqdetr.study.verdicts import Runs, Verdict

SEED_COUNTS = (2, 3, 5, 8, 12)
"""Numbers of seeds that are planned with."""
SETTLED = 0.015
"""The difference in AP that a study is to settle."""

Row = dict[str, Any]


def verdict_rows(runs: Runs, decided: Sequence[Verdict]) -> list[Row]:
    """Of every claim on every data set."""
    rows = []
    for verdict in decided:
        claim, effect = runs.study.claims[verdict.claim], verdict.effect
        numbers: Row = dict.fromkeys(("effect", "low", "high", "smallest"))
        if effect is not None:
            low, high = effect.interval
            smallest = effect.smallest_effect()
            numbers = {"effect": effect.mean, "low": low, "high": high, "smallest": smallest}
        rows.append(
            {
                "claim": claim.text or verdict.claim,
                "data": verdict.data,
                "figure": claim.figure,
                "verdict": verdict.outcome,
                **{key: _number(value) for key, value in numbers.items()},
                "threshold": verdict.threshold,
                "p": None if effect is None else round(verdict.p, 4),
                "seeds": 0 if effect is None else effect.seeds,
                "published": claim.published.effect if claim.published else None,
                "note": _note(verdict, runs.study.level),
            }
        )
    return rows


def _note(verdict: Verdict, level: float) -> str:
    """What a reader has to know beside the numbers."""
    notes = []
    effect = verdict.effect
    if effect is None:
        notes.append("no runs yet")
    elif effect.seeds == 1:
        notes.append("one seed says nothing of others")
    else:
        low, high = effect.interval
        if verdict.outcome == "undecided" and not low <= verdict.threshold <= high:
            notes.append("its own interval would decide; with so many claims it does not")
        if not verdict.over_images:
            notes.append("interval over seeds alone")
    if effect is not None and verdict.missing:
        notes.append("missing seeds " + ", ".join(map(str, verdict.missing)))
    return "; ".join(notes)


def figure_rows(runs: Runs, data: str) -> list[Row]:
    """What the variants reach; those without a run are left out."""
    rows = []
    for variant in runs.study.variants_of(data):
        mean = runs.mean(data, variant, "AP")
        if mean is None:
            continue
        row: Row = {"variant": variant, "seeds": mean.seeds, "AP": mean.mean, "spread": mean.spread}
        for key, figure in (
            ("AP50", "AP50"),
            ("AP_nms", "AP_nms"),
            ("copies", "copies"),
            ("predictions", "predictions_per_image"),
            ("boxes", "boxes_per_image"),
        ):
            found = runs.mean(data, variant, figure)
            row[key] = None if found is None else found.mean
        row |= dict.fromkeys(("difference", "low", "high"))
        if variant != runs.study.baseline:
            found = runs.difference(data, variant, runs.study.baseline, "AP")
            if found is not None:
                row["difference"] = found.mean
                row["low"], row["high"] = found.interval
        rows.append({key: _number(value) for key, value in row.items()})
    return rows


def query_rows(runs: Runs, data: str) -> list[Row]:
    """Views of query use; empty if no run has them."""
    rows = []
    for variant in runs.study.variants_of(data):
        done = list(runs.of(data, variant).values())
        views = [run.figures[runs.checkpoint].get("queries", {}) for run in done]
        names = sorted({name for view in views for name in view})
        if not names:
            continue
        row: Row = {"variant": variant}
        for name in names:
            row[name] = _mean([view.get(name) for view in views])
        rows.append(row)
    return rows


def layer_rows(runs: Runs, data: str) -> list[Row]:
    """What every stage of the detectors finds, means over the seeds for which it was measured; empty if it was for none."""
    rows = []
    for variant in runs.study.variants_of(data):
        found = _measured(runs, data, variant, "layers")
        if len({len(stages) for stages in found}) > 1:
            raise DataError(
                f"{data}, {variant}: its runs were measured with unequal numbers of layers",
                "measure them again: remove their files under results/",
            )
        for stages in zip(*found, strict=True):
            row: Row = {"variant": variant, "seeds": len(found), "stage": stages[0]["stage"]}
            rows.append(row | {name: _mean([s.get(name) for s in stages]) for name in stages[0] if name != "stage"})
    return rows


def mistake_rows(runs: Runs, data: str) -> list[Row]:
    """What AP50 would gain were one kind of mistake mended, means over the seeds for which it was measured."""
    rows = []
    for variant in runs.study.variants_of(data):
        found = _measured(runs, data, variant, "mistakes")
        if found:
            means = {kind: _mean([gains.get(kind) for gains in found]) for kind in found[0]}
            rows.append({"variant": variant, "seeds": len(found), **means})
    return rows


def _measured(runs: Runs, data: str, variant: str, name: str) -> list[Any]:
    """One figure of all runs that have it."""
    done = runs.of(data, variant).values()
    return [found for run in done if (found := run.figures[runs.checkpoint].get(name)) is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _number(sum(known) / len(known)) if known else None


def cost_rows(runs: Runs) -> list[Row]:
    """What trainings took; a row for every processor that runs of a variant were made on, since their times have no mean."""
    rows = []
    for data in runs.study.data:
        for variant in runs.study.variants_of(data):
            by_processor: dict[str, list[Row]] = {}
            for run in runs.of(data, variant).values():
                if run.cost:
                    processor = (run.provenance.get("machine") or {}).get("processor") or "unknown"
                    by_processor.setdefault(processor, []).append(run.cost)
            rows += [
                {
                    "data": data,
                    "variant": variant,
                    "processor": processor,
                    "runs": len(costs),
                    **_mean_cost(costs),
                }
                for processor, costs in sorted(by_processor.items())
            ]
    return rows


def _mean_cost(costs: Sequence[Row]) -> Row:
    def mean(key: str, unit: float = 1.0) -> float | None:
        return _mean([None if cost.get(key) is None else cost[key] / unit for cost in costs])

    return {
        "steps": mean("steps"),
        "minutes": mean("seconds", 60),
        "step_seconds": mean("step_seconds"),
        "cpu_minutes": mean("cpu_seconds", 60),
        "memory": mean("peak_memory_gib"),
        "parameters": mean("parameters", 1e6),
        "gflops": mean("gflops"),
    }


def planning(runs: Runs, data: str) -> Estimate | None:
    """The chances of an AP difference to the baseline, pooled over the variants of a data set; None without two seeds.

    Its `seeds` are one more than the degrees of freedom of the spread between seeds. V differences share the baseline's runs,
    which correlates any two of them by 1/2 if all variants are equally steady, and their sample variances by 1/4: the mean of
    these is known as well as from 4 V / (V + 3) of them that share nothing.
    """
    base = runs.study.baseline
    found = [runs.difference(data, variant, base, "AP") for variant in runs.study.variants_of(data) if variant != base]
    usable = [effect for effect in found if effect is not None and effect.seeds > 1]
    variance, degrees = pooled_variance(usable)
    if not degrees:
        return None
    degrees = max(round(4 * degrees / (len(usable) + 3)), 1)
    shared = sum(effect.image_variance for effect in usable) / len(usable)
    images = min((effect.images for effect in usable if effect.images is not None), default=None)
    return Estimate(0.0, (0.0,) * (degrees + 1), variance, shared, images, runs.study.level)


def planning_rows(runs: Runs) -> list[Row]:
    """What more seeds would see on each data set."""
    rows = []
    for data in runs.study.data:
        found = planning(runs, data)
        row: Row = {"data": data}
        keys = ("seed_error", "degrees", "image_error", "needed", "needed_at_most")
        row |= dict.fromkeys((*keys, *(f"n{count}" for count in SEED_COUNTS)))
        if found is not None:
            degrees = found.seeds - 1
            worst = Estimate(
                0.0,
                found.values,
                variance_bound(found.seed_variance, degrees),
                found.image_variance,
                found.images,
                found.level,
            )
            row |= {
                "seed_error": _number(found.spread),
                "degrees": degrees,
                "image_error": _number(math.sqrt(found.image_variance)),
                "needed": found.seeds_needed(SETTLED),
                "needed_at_most": worst.seeds_needed(SETTLED),
            }
            row |= {f"n{n}": _number(found.with_seeds(n).smallest_effect()) for n in SEED_COUNTS}
        rows.append(row)
    return rows


def run_rows(runs: Runs) -> list[Row]:
    """Every run of the study."""
    study, rows = runs.study, []
    failed = {(run.key.data, run.key.variant, run.key.seed): run.failed for run in runs.failed}
    for data in study.data:
        for variant in study.variants_of(data):
            done = runs.of(data, variant)
            for seed in study.seeds_of(data, variant):
                run = done.get(seed)
                state = "done" if run is not None else failed.get((data, variant, seed), "not yet")
                row: Row = {"data": data, "variant": variant, "seed": seed, "state": state}
                for name in ("AP", "AP_nms"):
                    row[name] = None if run is None else run.figure(name, runs.checkpoint)
                rows.append(row)
    return rows


def _number(value: Any) -> Any:
    """Six digits of what is a figure; names and counts as they are."""
    return plain(value, 6)
