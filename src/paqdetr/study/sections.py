"""A study's results as the sections of a report: verdicts, figures, curves, query use, cost, and what more seeds would see."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from paqdetr.metrics.diagnosis import MISTAKES
from paqdetr.report.plots import INK, bars, colour, legend, line, new_axes, new_grid, plot_part
from paqdetr.report.section import Column, Figure, Part, Section, Table
from paqdetr.study.tables import (
    SEED_COUNTS,
    SETTLED,
    cost_rows,
    figure_rows,
    layer_rows,
    mistake_rows,
    planning_rows,
    query_rows,
    run_rows,
    verdict_rows,
)
from paqdetr.study.verdicts import Runs, Verdict

_MOST_LINES = 7


def sections(runs: Runs, decided: Sequence[Verdict]) -> list[Section]:
    """The whole report.

    Args:
        decided: the verdicts on the study's claims.
    """
    study = runs.study
    found = [_claims(runs, decided)] if study.claims else []
    found += [section for name in study.data for section in _of_data(runs, name)]
    return [*found, _planning(runs), _cost(runs), _all_runs(runs)]


def _table(name: str, caption: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> Table:
    """Without the columns in which no row has anything."""
    used = tuple(c for c in columns if any(row.get(c.key) not in (None, "") for row in rows))
    return Table(name, caption, used, tuple(rows))


def identifier(*parts: str) -> str:
    """Letters, digits and underscores, as names of a report's parts are."""
    return re.sub(r"\W", "_", "_".join(parts))


# ------------------------------------------------------------------------------------------------ chapters


def _claims(runs: Runs, decided: Sequence[Verdict]) -> Section:
    level = runs.study.level
    caption = (
        f"Effect of each claim with its {1 - level:.0%} interval, paired by seed and by image. p is adjusted for all "
        f"{len(decided)} claims (Holm). Could see: the smallest effect that so many seeds on "
        "these images show in four of five studies."
    )
    table = _table("verdicts", caption, VERDICT_COLUMNS, verdict_rows(runs, decided))
    parts: list[Part] = [table]
    shown = [verdict for verdict in decided if verdict.effect is not None and verdict.effect.seeds > 1]
    if shown:
        parts.append(_forest(shown))
    return Section(
        "verdicts",
        "Verdicts",
        "A claim holds if its whole effect lies above the threshold, does not hold if it lies below, and is undecided if the "
        "threshold is inside the interval: then the runs are too few, or the effect too small, to tell. Computed, not written.",
        tuple(parts),
    )


def _of_data(runs: Runs, name: str) -> Iterator[Section]:
    data = runs.study.data[name]
    rows = figure_rows(runs, name)
    if not rows:
        return
    split = runs.study.split_of(name)
    caption = (
        f"{name}, {split}: means over seeds. The difference in AP is to {runs.study.baseline}, paired, with its "
        f"{1 - runs.study.level:.0%} interval. Copies: what AP gains by non-maximum suppression. Predictions: that score over "
        "0.3, an image; boxes: to be found there."
    )
    parts: list[Part] = [_table(identifier("figures", name), caption, FIGURE_COLUMNS, rows)]
    curves = _curves(runs, name)
    if curves is not None:
        parts.append(curves)
    queries = query_rows(runs, name)
    if queries:
        caption = (
            f"{name}: Gini coefficients of the use of content queries, means over seeds: of images with a score over 0.3 or 0.5, "
            "or at the threshold of equal activations an image; of matches in the last layer, and what rank order alone explains "
            "of it; of the mass of patterns. Entropy of the mixtures, dead patterns, cosine between queries; the image's share: "
            "of the variance of content, what the query's index does not explain, and the part of that by which queries of one "
            "image differ. Lower is not better by itself."
        )
        parts.append(_table(identifier("queries", name), caption, QUERY_COLUMNS, queries))
    layers = layer_rows(runs, name)
    if layers:
        caption = (
            f"{name}: what the detector would answer after the encoder's proposals or after any decoder layer. Best IoU: of the "
            "nearest query, mean over objects; found: objects for which that is 0.5 or more."
        )
        parts.append(_table(identifier("layers", name), caption, LAYER_COLUMNS, layers))
    mistakes = mistake_rows(runs, name)
    if mistakes:
        caption = f"{name}: what AP50 would gain were one kind of mistake mended, after TIDE. Gains do not add up."
        parts.append(_table(identifier("mistakes", name), caption, MISTAKE_COLUMNS, mistakes))
    yield Section(
        identifier("data", name),
        name,
        (data.about + ". " if data.about else "") + "What each variant reaches, and how it gets there.",
        tuple(parts),
    )


def _planning(runs: Runs) -> Section:
    rows = tuple(planning_rows(runs))
    table = Table(
        "planning",
        "Spread of the paired differences to the baseline, pooled over variants, and the smallest effect on AP that 2, 3, ... "
        "seeds see in four of five studies. For 0.015: the fewest seeds that see 1.5 points of AP; at most: if the spread "
        "between seeds is as large as these runs allow (80 % bound). All of it is of one "
        "claim by itself: where a study has several, Holm's adjustment asks for more. A dash: 200 seeds do not see it, or, since "
        "the test images are too few, no number does.",
        PLANNING_COLUMNS,
        rows,
    )
    parts: list[Part] = [table]
    usable = [row for row in rows if row["seed_error"] is not None]
    if usable:
        axes = new_axes(x="seeds", y="smallest effect on AP", title="")
        for number, row in enumerate(usable):
            effects = [row[f"n{count}"] for count in SEED_COUNTS]
            line(axes, SEED_COUNTS, effects, label=row["data"], colour=colour(number), marker="o")
        axes.axhline(SETTLED, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        if len(usable) > 1:
            legend(axes)
        caption = "What n seeds would see with power 0.8; the dotted line is 1.5 points of AP."
        data = [dict(row) for row in usable]
        parts.append(plot_part(axes, name="smallest_effect", caption=caption, data=data))
    return Section(
        "planning",
        "Seeds that are needed",
        "Another seed changes a result, and so would other test images. More seeds average the first away, not the second.",
        tuple(parts),
    )


def _cost(runs: Runs) -> Section:
    caption = "Means over runs on the same processor, by the clock. FLOPs: of one image, a multiply-add counted once."
    table = _table("cost", caption, COST_COLUMNS, cost_rows(runs))
    return Section("cost", "Cost", "What a training takes, and what the model does.", (table,))


def _all_runs(runs: Runs) -> Section:
    caption = f"{len(runs.done)} of {runs.planned} runs are done."
    table = _table("runs", caption, RUN_COLUMNS, run_rows(runs))
    return Section("runs", "Runs", "Every run, those that failed among them.", (table,))


# ------------------------------------------------------------------------------------------------ plots


def _forest(decided: Sequence[Verdict]) -> Figure:
    names = [f"{verdict.claim}, {verdict.data}" for verdict in decided]
    effects = [verdict.effect for verdict in decided if verdict.effect is not None]
    axes = new_axes(height=0.8 + 0.36 * len(names), x="effect, in the direction of the claim")
    low, high = zip(*(effect.interval for effect in effects), strict=True)
    bars(axes, names, [e.mean for e in effects], low=low, high=high, form="{:+.3f}")
    axes.axvline(0, color=INK, linewidth=0.8)
    caption = "Effects with their intervals; what lies right of zero speaks for the claim."
    return plot_part(axes, name="effects", caption=caption, data=[verdict.to_json() for verdict in decided])


def _curves(runs: Runs, data: str) -> Figure | None:
    """AP on the validation split against steps, with and without copies, mean over seeds."""
    grid = new_grid(1, 2, height=3.0, titles=("AP", "AP after NMS"), x="optimiser steps")
    numbers: list[dict[str, Any]] = []
    for position, variant in enumerate(runs.study.variants_of(data)):
        done = list(runs.of(data, variant).values())
        for axes, figure in zip(grid, ("AP", "AP_nms"), strict=True):
            points = _mean_curve([run.curve for run in done], figure)
            if points:
                steps, low, mean, high = zip(*points, strict=True)
                dash = "-" if position < _MOST_LINES else "--"
                line(axes, steps, mean, low=low, high=high, label=variant, colour=colour(position), dash=dash)
                numbers.append({"variant": variant, "figure": figure, "points": [list(p) for p in points]})
    if not numbers:
        return None
    legend(grid[0])
    caption = f"{data}: learning curves on the validation split; means, and bands from the worst to the best seed."
    return plot_part(grid[0], name=identifier("curves", data), caption=caption, data=numbers)


def _mean_curve(curves: Sequence[Sequence[dict[str, Any]]], figure: str) -> list[tuple[int, float, float, float]]:
    """(step, least, mean, most) at the steps that all seeds have."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for row in curve:
            if row.get(figure) is not None:
                by_step.setdefault(int(row["step"]), []).append(float(row[figure]))
    return [
        (step, min(values), sum(values) / len(values), max(values))
        for step, values in sorted(by_step.items())
        if len(values) == len(curves)
    ]


# ------------------------------------------------------------------------------------------------ columns


def _columns(*named: tuple[Any, ...]) -> tuple[Column, ...]:
    return tuple(Column(*column) for column in named)


VERDICT_COLUMNS = _columns(
    ("claim", "claim", "text"),
    ("data", "data", "text"),
    ("figure", "figure", "text"),
    ("verdict", "verdict", "text"),
    ("effect", "effect"),
    ("low", "from"),
    ("high", "to"),
    ("threshold", "over"),
    ("p", "p"),
    ("smallest", "could see"),
    ("seeds", "seeds", "integer"),
    ("published", "published"),
    ("note", "note", "text"),
)
FIGURE_COLUMNS = _columns(
    ("variant", "variant", "text"),
    ("seeds", "seeds", "integer"),
    ("AP", "AP"),
    ("spread", "\N{PLUS-MINUS SIGN} seeds"),
    ("AP50", "AP50"),
    ("difference", "to baseline"),
    ("low", "from"),
    ("high", "to"),
    ("AP_nms", "AP, NMS"),
    ("copies", "copies"),
    ("predictions", "predictions"),
    ("boxes", "boxes"),
)
QUERY_COLUMNS = _columns(
    ("variant", "variant", "text"),
    ("n", "n", "integer"),
    ("gini_over_30", "over 0.3"),
    ("per_image_over_30", "activations"),
    ("gini_over_50", "over 0.5"),
    ("gini_equal", "equal activations"),
    ("gini_positives", "matches"),
    ("by_rank_positives", "by rank alone"),
    ("gini_patterns", "patterns"),
    ("entropy", "entropy"),
    ("dead_patterns", "dead"),
    ("cosine", "cosine"),
    ("image_share", "image's share"),
    ("query_share", "of single queries"),
)
LAYER_COLUMNS = _columns(
    ("variant", "variant", "text"),
    ("seeds", "seeds", "integer"),
    ("stage", "stage", "text"),
    ("best_iou", "best IoU"),
    ("found", "found"),
    ("AP", "AP"),
    ("AP_nms", "AP, NMS"),
    ("copies", "copies"),
    ("predictions_per_image", "predictions"),
)
MISTAKE_COLUMNS = _columns(
    ("variant", "variant", "text"),
    ("seeds", "seeds", "integer"),
    *((kind, kind) for kind in MISTAKES),
)
COST_COLUMNS = _columns(
    ("data", "data", "text"),
    ("variant", "variant", "text"),
    ("processor", "processor", "text"),
    ("runs", "runs", "integer"),
    ("steps", "steps", "integer"),
    ("minutes", "minutes"),
    ("step_seconds", "s a step"),
    ("cpu_minutes", "CPU minutes"),
    ("memory", "peak GiB"),
    ("parameters", "parameters, M"),
    ("gflops", "GFLOPs"),
)
PLANNING_COLUMNS = _columns(
    ("data", "data", "text"),
    ("seed_error", "\N{PLUS-MINUS SIGN} a seed"),
    ("degrees", "d.o.f.", "integer"),
    ("image_error", "\N{PLUS-MINUS SIGN} the images"),
    *((f"n{count}", f"{count} see") for count in SEED_COUNTS),
    ("needed", "for 0.015", "integer"),
    ("needed_at_most", "at most", "integer"),
)
RUN_COLUMNS = _columns(
    ("data", "data", "text"),
    ("variant", "variant", "text"),
    ("seed", "seed", "integer"),
    ("AP", "AP"),
    ("AP_nms", "AP after NMS"),
    ("state", "state", "text"),
)
