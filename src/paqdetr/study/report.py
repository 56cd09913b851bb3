"""What a study found: study.json, study.md with its plots, and one HTML page. A chapter is a function in `CHAPTERS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paqdetr.files import write_text
from paqdetr.report.page import Chapter, Heading, render, to_markdown, write_folder, write_plots
from paqdetr.report.plots import INK, bars, colour, legend, line, new_axes, new_grid, plot_part
from paqdetr.report.section import Figure, Part, Section, Table
from paqdetr.study import tables
from paqdetr.study.results import RunResult
from paqdetr.study.spec import Study, identifier
from paqdetr.study.verdicts import Runs, Verdict, verdicts

_MOST_LINES = 7


@dataclass(frozen=True, slots=True)
class StudyReport:
    """What a study's results say.

    Attributes:
        runs: the results by data set, variant and seed.
        verdicts: on the claims.
        sections: of the report.
        facts: (what, value): how the results were made.
    """

    runs: Runs
    verdicts: list[Verdict]
    sections: list[Section]
    facts: tuple[tuple[str, str], ...]

    @property
    def tables(self) -> dict[str, Table]:
        """By name."""
        return {part.name: part for s in self.sections for part in s.parts if isinstance(part, Table)}

    def to_json(self) -> dict[str, Any]:
        """Verdicts and the rows of all tables, ready for json."""
        return {
            "study": self.runs.study.name,
            "facts": dict(self.facts),
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "tables": {name: list(table.rows) for name, table in self.tables.items()},
        }


def study_report(study: Study, results: Sequence[RunResult], *, command: str) -> StudyReport:
    """Work out verdicts and tables. Takes seconds, whatever the number of runs.

    Args:
        results: of the study's runs, as far as they are there.
        command: that makes the study.

    Raises:
        DataError: runs that are to be compared were measured on different images.
    """
    runs = Runs(study, results)
    decided = verdicts(runs)
    sections = [section for chapter in CHAPTERS for section in chapter(runs, decided)]
    return StudyReport(runs, decided, sections, tuple(_facts(runs, command)))


def write_report(study: Study, results: Sequence[RunResult], output: Path, *, command: str) -> StudyReport:
    """Write study.json, study.md, plots/ and report/index.html into `output`; arguments as of `study_report`.

    Raises:
        UserError: as `study_report`, or a file cannot be written.
    """
    report = study_report(study, results, command=command)
    title = f"Study {study.name}"
    write_text(output / "study.json", json.dumps(report.to_json(), indent=1) + "\n")
    write_plots(report.sections, output / "plots")
    write_text(output / "study.md", to_markdown(title, report.facts, report.sections, plots="plots"))
    chapters = [Chapter((section,)) for section in report.sections]
    heading = Heading(title=title, models=(study.name,), facts=report.facts)
    write_folder(output / "report", render(heading, chapters), chapters)
    return report


def _facts(runs: Runs, command: str) -> list[tuple[str, str]]:
    """How the results were made, as far as they agree; where they do not, all that there is."""
    study = runs.study
    facts = [("about", study.about)] if study.about else []
    facts.append(("runs", f"{len(runs.done)} of {len(runs.keys)} done, {len(runs.failed)} failed"))
    facts.append(("command", command))
    seconds = sum(run.cost.get("seconds", 0) for run in runs.done)
    facts.append(("training time", f"{seconds / 3600:.1f} h in all, {study.threads} threads per run"))
    measured = f"{', '.join(study.evaluate.checkpoints)}, {study.evaluate.replicates} resamples of the images"
    facts.append(("measured", measured))
    found: dict[str, set[str]] = {}
    for run in runs.done:
        own = run.provenance
        machine, git, packages = (
            part if isinstance(part := own.get(key), dict) else {} for key in ("machine", "git", "packages")
        )
        for what, value in (
            ("processor", machine.get("processor")),
            ("cores", machine.get("cores")),
            ("paqdetr", own.get("paqdetr")),
            ("commit", git and git["commit"][:10] + (" (changed)" if git["changed"] else "")),
            ("Python", own.get("python")),
            ("torch", packages.get("torch")),
        ):
            found.setdefault(what, set()).update([str(value)] if value else [])
    return facts + [(what, ", ".join(sorted(values))) for what, values in found.items() if values]


# ------------------------------------------------------------------------------------------------ chapters


def _claims(runs: Runs, decided: Sequence[Verdict]) -> list[Section]:
    if not runs.study.claims:
        return []
    parts: list[Part] = [tables.verdict_table(runs, decided)]
    shown = [verdict for verdict in decided if verdict.effect is not None and verdict.effect.seeds > 1]
    if shown:
        parts.append(_forest(runs, shown))
    lead = (
        f"A claim is decided if its p, adjusted for all claims of the study, is below {runs.study.level:g}: it holds if the "
        "difference lies on its side of the threshold, and does not hold if on the other. Undecided: the runs are too few, or "
        "the effect too small. Computed, not written."
    )
    return [Section("verdicts", "Verdicts", lead, tuple(parts))]


def _data_sets(runs: Runs, decided: Sequence[Verdict]) -> list[Section]:
    """One for each data set that has a run."""
    found = []
    for name, data in runs.study.data.items():
        figures = tables.figure_table(runs, name)
        if not figures.rows:
            continue
        more = [table(runs, name) for table in (tables.query_table, tables.layer_table, tables.mistake_table)]
        parts = [figures, _curves(runs, name), *(table for table in more if table.rows)]
        lead = f"{data.about}. " if data.about else ""
        lead += "What each variant reaches, and how it gets there."
        found.append(Section(identifier("data", name), name, lead, tuple(part for part in parts if part is not None)))
    return found


def _planning(runs: Runs, decided: Sequence[Verdict]) -> list[Section]:
    table = tables.planning_table(runs)
    parts: list[Part] = [table]
    usable = [row for row in table.rows if row["seed_error"] is not None]
    if usable:
        axes = new_axes(x="seeds", y="minimum detectable effect on AP")
        for number, row in enumerate(usable):
            effects = [row[f"n{count}"] for count in tables.SEED_COUNTS]
            line(axes, tables.SEED_COUNTS, effects, label=row["data"], colour=colour(number), marker="o")
        axes.axhline(tables.SETTLED, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        if len(usable) > 1:
            legend(axes)
        caption = "What n seeds would detect with power 0.8; the dotted line is 1.5 points of AP."
        parts.append(plot_part(axes, name="smallest_effect", caption=caption, data=usable))
    lead = "Another seed changes a result, and so would other test images. More seeds average the first away, not the second."
    return [Section("planning", "Seeds that are needed", lead, tuple(parts))]


CHAPTERS: tuple[Callable[[Runs, Sequence[Verdict]], list[Section]], ...] = (
    _claims,
    _data_sets,
    _planning,
    lambda runs, decided: [
        Section("cost", "Cost", "What a training takes, and what the model does.", (tables.cost_table(runs),))
    ],
    lambda runs, decided: [
        Section("runs", "Runs", "Every run, those that failed among them.", (tables.run_table(runs),))
    ],
)


# ------------------------------------------------------------------------------------------------ plots


def _forest(runs: Runs, decided: Sequence[Verdict]) -> Figure:
    lower = {name for name, claim in runs.study.claims.items() if claim.sign < 0}
    names = [f"{own.claim}{' <' if own.claim in lower else ''}, {own.data}" for own in decided]
    effects = [verdict.effect for verdict in decided if verdict.effect is not None]
    axes = new_axes(height=0.8 + 0.36 * len(names), x="difference: variant minus the other")
    low, high = zip(*(effect.interval for effect in effects), strict=True)
    bars(axes, names, [e.mean for e in effects], low=low, high=high, form="{:+.3f}")
    axes.axvline(0, color=INK, linewidth=0.8)
    caption = "Variant minus the other, with intervals. For a claim marked with <, values left of zero support it."
    return plot_part(axes, name="effects", caption=caption, data=[verdict.to_json() for verdict in decided])


def _curves(runs: Runs, data: str) -> Figure | None:
    """AP on the validation split against steps, before and after NMS, mean over seeds."""
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
