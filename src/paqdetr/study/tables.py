"""The tables of a study's report. A column is one entry: its heading and how its value is found stand together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from paqdetr.errors import DataError
from paqdetr.metrics.diagnosis import MISTAKES
from paqdetr.report.section import Column, Table, make_table
from paqdetr.study.results import RunResult
from paqdetr.study.runs import RunKey
from paqdetr.study.spec import identifier
from paqdetr.study.statistics import Estimate, pooled_variance, variance_bound
from paqdetr.study.verdicts import Runs, Verdict

SEED_COUNTS = (2, 3, 5, 8, 12)
"""Numbers of seeds that are planned with."""
SETTLED = 0.015
"""The difference in AP that a study is to settle."""

_table = partial(make_table, empty=False, digits=6)
_VARIANT, _SEEDS = Column("variant", "variant", "text"), Column("seeds", "seeds", "integer")


def verdict_table(runs: Runs, decided: Sequence[Verdict]) -> Table:
    """Every claim on every data set."""
    claims, level = runs.study.claims, runs.study.level
    strictest = level / len(decided) if decided else level  # of Holm's steps, the first

    def effect(value: Callable[[Estimate], float]) -> Callable[[Verdict], float | None]:
        return lambda verdict: None if verdict.effect is None else value(verdict.effect)

    def detectable(verdict: Verdict) -> float | None:
        if verdict.effect is None:
            return None
        found = replace(verdict.effect, level=strictest).smallest_effect()
        return None if claims[verdict.claim].is_share and found > 1 else found

    def published(verdict: Verdict) -> float | None:
        own = claims[verdict.claim]
        return None if own.published is None else own.sign * own.published.effect

    columns = (
        Column("claim", "claim", "text", lambda v: claims[v.claim].text or v.claim),
        Column("data", "data", "text"),
        Column("figure", "figure", "text", lambda v: claims[v.claim].figure),
        Column("verdict", "verdict", "text", lambda v: v.outcome),
        Column("effect", "difference", "difference", value=effect(lambda e: e.mean)),
        Column("low", "from", "difference", value=effect(lambda e: e.interval[0])),
        Column("high", "to", "difference", value=effect(lambda e: e.interval[1])),
        Column("threshold", "claimed", "text", lambda v: f"{'<' if claims[v.claim].sign < 0 else '>'} {v.threshold:g}"),
        Column("p", "p", value=lambda v: v.effect and round(v.p, 4)),
        Column("smallest", "detectable (80 % power)", value=detectable),
        Column("seeds", "seeds", "integer", lambda v: v.effect.seeds if v.effect else 0),
        Column("published", "published", "difference", published),
        Column("note", "note", "text", partial(_note, runs)),
    )
    caption = (
        f"Difference: variant minus the other, with the {100 * (1 - level):g}% interval of this claim by itself, paired by seed "
        f"and by image. p is adjusted for all {len(decided)} claims (Holm). Detectable: the minimum effect that so many seeds on "
        f"these images decide with a power of 80 %, as the first of {len(decided)} claims; none where no effect would do."
    )
    return _table("verdicts", caption, columns, decided)


def _note(runs: Runs, verdict: Verdict) -> str:
    """What a reader has to know beside the numbers."""
    notes = []
    effect = verdict.effect
    if effect is None:
        run = [runs.of(verdict.data, name) for name in (runs.study.claims[verdict.claim].variant, verdict.against)]
        notes.append("runs without this figure" if all(run) else "no runs yet")
    elif effect.seeds == 1:
        notes.append("one seed says nothing of others")
    else:
        low, high = effect.interval
        if effect.standard_error == 0:
            notes.append("equal for all seeds and images, which says nothing of others")
        elif verdict.outcome == "undecided" and not low <= verdict.threshold <= high:
            notes.append("its own interval would decide; with so many claims it does not")
        if not verdict.over_images:
            notes.append("interval over seeds alone")
    if effect is not None and verdict.missing:
        notes.append("missing seeds " + ", ".join(map(str, verdict.missing)))
    return "; ".join(notes)


def figure_table(runs: Runs, data: str) -> Table:
    """What the variants reach; those without a run are left out."""
    study = runs.study
    base = study.baseline
    ap = {v: found for v in study.variants_of(data) if (found := runs.mean(data, v, "AP")) is not None}
    to_base = {v: runs.difference(data, v, base, "AP") for v in ap if v != base}

    def mean(figure: str) -> Callable[[str], float | None]:
        return lambda variant: (found := runs.mean(data, variant, figure)) and found.mean

    def difference(value: Callable[[Estimate], float]) -> Callable[[str], float | None]:
        return lambda variant: None if (found := to_base.get(variant)) is None else value(found)

    columns = (
        Column("variant", "variant", "text", str),
        Column("seeds", "seeds", "integer", lambda v: ap[v].seeds),
        Column("AP", "AP", value=lambda v: ap[v].mean),
        Column("spread", "\N{PLUS-MINUS SIGN} seeds", value=lambda v: ap[v].spread),
        Column("AP50", "AP50", value=mean("AP50")),
        Column("difference", "to baseline", "difference", difference(lambda e: e.mean)),
        Column("low", "from", "difference", difference(lambda e: e.interval[0])),
        Column("high", "to", "difference", difference(lambda e: e.interval[1])),
        Column("AP_nms", "AP, NMS", value=mean("AP_nms")),
        Column("duplicates", "duplicates", value=mean("duplicates")),
        Column("predictions", "predictions", value=mean("predictions_per_image")),
        Column("boxes", "boxes", value=mean("boxes_per_image")),
    )
    caption = (
        f"{data}, {study.split_of(data)}: means over seeds. To baseline: AP minus that of {base}, paired, with its "
        f"{100 * (1 - study.level):g}% interval. Duplicates: what AP gains by non-maximum suppression. Predictions: those that "
        "score over 0.3, per image; boxes: ground truth, per image."
    )
    return _table(identifier("figures", data), caption, columns, ap)


def query_table(runs: Runs, data: str) -> Table:
    """Views of query use; no rows if no run has them."""
    columns = (
        _VARIANT,
        Column("n", "n", "integer"),
        Column("gini_over_30", "over 0.3"),
        Column("per_image_over_30", "activations"),
        Column("gini_over_50", "over 0.5"),
        Column("gini_equal", "equal activations"),
        Column("gini_positives", "matches"),
        Column("by_rank_positives", "by rank alone"),
        Column("gini_patterns", "patterns"),
        Column("entropy", "entropy"),
        Column("dead_patterns", "dead"),
        Column("cosine", "cosine"),
        Column("image_share", "image's share"),
        Column("query_share", "of single queries"),
    )
    caption = (
        f"{data}: Gini coefficients of the use of content queries, means over seeds: of images with a score over 0.3 or 0.5, "
        "or at the threshold of equal activations per image; of matches in the last layer, and what rank order alone explains "
        "of it; of the mass of patterns. Entropy of the mixtures, dead patterns, cosine between queries; the image's share: "
        "of the variance of content, what the query's index does not explain, and the part of that by which queries of one "
        "image differ. Lower is not better by itself."
    )
    rows = [{"variant": v, **_means(views)} for v, views in _measured(runs, data, "queries") if any(views)]
    return _table(identifier("queries", data), caption, columns, rows)


def layer_table(runs: Runs, data: str) -> Table:
    """What every stage of the detectors finds; no rows if it was measured for no run."""
    columns = (
        _VARIANT,
        _SEEDS,
        Column("stage", "stage", "text"),
        Column("best_iou", "best IoU"),
        Column("found", "found"),
        Column("AP", "AP"),
        Column("AP_nms", "AP, NMS"),
        Column("duplicates", "duplicates"),
        Column("predictions_per_image", "predictions"),
    )
    caption = (
        f"{data}: what the detector would answer after the encoder's proposals or after any decoder layer. Best IoU: of the "
        "nearest query, mean over objects; found: objects for which that is 0.5 or more."
    )
    rows = []
    for variant, found in _measured(runs, data, "layers"):
        if len({len(stages) for stages in found}) > 1:
            raise DataError(
                f"{data}, {variant}: its runs were measured with unequal numbers of layers",
                "measure them again: remove their files under results/",
            )
        for stages in zip(*found, strict=True):
            means = _means([{name: value for name, value in stage.items() if name != "stage"} for stage in stages])
            rows.append({"variant": variant, "seeds": len(found), "stage": stages[0]["stage"], **means})
    return _table(identifier("layers", data), caption, columns, rows)


def mistake_table(runs: Runs, data: str) -> Table:
    """Gains of AP50; no rows if they were measured for no run."""
    columns = (_VARIANT, _SEEDS, *(Column(kind, kind) for kind in MISTAKES))
    caption = f"{data}: what AP50 would gain were one kind of mistake corrected, after TIDE. Gains do not add up."
    rows = [{"variant": v, "seeds": len(gains), **_means(gains)} for v, gains in _measured(runs, data, "mistakes")]
    return _table(identifier("mistakes", data), caption, columns, rows)


def _measured(runs: Runs, data: str, name: str) -> Iterator[tuple[str, list[Any]]]:
    """(variant, what its runs have under a name in their figures), without those for which it was not measured."""
    for variant in runs.study.variants_of(data):
        done = runs.of(data, variant).values()
        found = [value for run in done if (value := run.figures[runs.checkpoint].get(name)) is not None]
        if found:
            yield variant, found


def _means(measured: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means by name over the seeds that have it."""
    return {name: _mean([one.get(name) for one in measured]) for name in sorted(set().union(*measured))}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def cost_table(runs: Runs) -> Table:
    """What trainings took; a row for every processor that a variant was trained on, since their times have no mean."""

    costs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for data in runs.study.data:
        for variant in runs.study.variants_of(data):
            for run in sorted(runs.of(data, variant).values(), key=_processor):
                if run.cost:
                    costs.setdefault((data, variant, _processor(run)), []).append(run.cost)

    def mean(key: str, unit: float = 1.0) -> Callable[[tuple[str, str, str]], float | None]:
        return lambda own: _mean([None if (value := cost.get(key)) is None else value / unit for cost in costs[own]])

    columns = (
        Column("data", "data", "text", lambda own: own[0]),
        Column("variant", "variant", "text", lambda own: own[1]),
        Column("processor", "processor", "text", lambda own: own[2]),
        Column("runs", "runs", "integer", lambda own: len(costs[own])),
        Column("steps", "steps", "integer", mean("steps")),
        Column("minutes", "minutes", value=mean("seconds", 60)),
        Column("step_seconds", "s per step", value=mean("step_seconds")),
        Column("cpu_minutes", "CPU minutes", value=mean("cpu_seconds", 60)),
        Column("memory", "peak GiB", value=mean("peak_memory_gib")),
        Column("parameters", "parameters, M", value=mean("parameters", 1e6)),
        Column("gflops", "GFLOPs", value=mean("gflops")),
    )
    caption = "Means over runs on the same processor, by the clock. FLOPs: of one image, a multiply-add counted once."
    return _table("cost", caption, columns, costs)


def _processor(run: RunResult) -> str:
    return (run.provenance.get("machine") or {}).get("processor") or "unknown"


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


def planning_table(runs: Runs) -> Table:
    """What more seeds would detect on each data set."""
    known = {data: planning(runs, data) for data in runs.study.data}

    def of(value: Callable[[Estimate], Any]) -> Callable[[str], Any]:
        return lambda data: None if (estimate := known[data]) is None else value(estimate)

    def worst(found: Estimate) -> Estimate:
        return replace(found, seed_variance=variance_bound(found.seed_variance, found.seeds - 1))

    columns = (
        Column("data", "data", "text", str),
        Column("seed_error", "\N{PLUS-MINUS SIGN} per seed", value=of(lambda e: e.spread)),
        Column("degrees", "d.o.f.", "integer", of(lambda e: e.seeds - 1)),
        Column("image_error", "\N{PLUS-MINUS SIGN} the images", value=of(lambda e: math.sqrt(e.image_variance))),
        *(
            Column(f"n{count}", f"{count} seeds", value=of(lambda e, n=count: e.with_seeds(n).smallest_effect()))
            for count in SEED_COUNTS
        ),
        Column("needed", "for 0.015", "integer", of(lambda e: e.seeds_needed(SETTLED))),
        Column("needed_at_most", "at most", "integer", of(lambda e: worst(e).seeds_needed(SETTLED))),
    )
    caption = (
        "Spread of the paired differences to the baseline, pooled over variants, and the minimum effect on AP that 2, 3, ... "
        "seeds detect with a power of 80 %. For 0.015: the fewest seeds that detect 1.5 points of AP; at most: if the spread "
        "between seeds is as large as these runs allow (80 % bound). All of it is of one "
        "claim by itself: where a study has several, Holm's adjustment asks for more. A dash: 200 seeds do not detect it, or, "
        "since the test images are too few, no number does."
    )
    return _table("planning", caption, columns, known)


def run_table(runs: Runs) -> Table:
    """Every run of the study."""

    def of(value: Callable[[RunResult], Any], otherwise: str | None = None) -> Callable[[RunKey], Any]:
        return lambda key: otherwise if (run := runs.results.get(key)) is None else value(run)

    columns = (
        Column("data", "data", "text"),
        _VARIANT,
        Column("seed", "seed", "integer"),
        Column("AP", "AP", value=of(lambda run: run.figure("AP", runs.checkpoint))),
        Column("AP_nms", "AP after NMS", value=of(lambda run: run.figure("AP_nms", runs.checkpoint))),
        Column("state", "state", "text", of(lambda run: run.failed or "done", "not yet")),
    )
    caption = f"{len(runs.done)} of {len(runs.keys)} runs are done."
    return _table("runs", caption, columns, runs.keys)
