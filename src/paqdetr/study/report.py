"""Writes what a study found: study.json, study.md with its plots, and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paqdetr.files import write_whole
from paqdetr.report.markdown import to_markdown, write_plots
from paqdetr.report.page import Chapter, Heading, render, write_folder
from paqdetr.report.section import Section, Table
from paqdetr.study.results import RunResult, read_results
from paqdetr.study.sections import sections
from paqdetr.study.spec import Study
from paqdetr.study.verdicts import Runs, Verdict, verdicts


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

    def table(self, name: str) -> Table:
        """A table of the report by its name.

        Raises:
            KeyError: the report has no such table.
        """
        for section in self.sections:
            for part in section.parts:
                if isinstance(part, Table) and part.name == name:
                    return part
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Verdicts and the rows of all tables, ready for json."""
        tables = {part.name: list(part.rows) for s in self.sections for part in s.parts if isinstance(part, Table)}
        return {
            "study": self.runs.study.name,
            "facts": dict(self.facts),
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "tables": tables,
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
    return StudyReport(runs, decided, sections(runs, decided), tuple(_facts(runs, command)))


def write_report(study: Study, results: Path, output: Path, *, command: str) -> StudyReport:
    """Write study.json, study.md, plots/ and report/index.html into `output`.

    Args:
        results: the folder of the runs' results.

    Raises:
        UserError: a result cannot be read, or a file not be written.
    """
    report = study_report(study, read_results(results), command=command)
    title = f"Study {study.name}"
    text = json.dumps(report.to_json(), indent=1) + "\n"
    write_whole(output / "study.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_plots(report.sections, output / "plots")
    page = to_markdown(title, report.facts, report.sections, plots="plots")
    write_whole(output / "study.md", lambda path: path.write_text(page, encoding="utf-8"))
    chapters = [Chapter((section,)) for section in report.sections]
    heading = Heading(title=title, models=(study.name,), facts=report.facts)
    write_folder(output / "report", render(heading, chapters), chapters)
    return report


def _facts(runs: Runs, command: str) -> list[tuple[str, str]]:
    """How the results were made, as far as they agree; where they do not, all that there is."""
    study = runs.study
    facts = [("about", study.about)] if study.about else []
    facts.append(("runs", f"{len(runs.done)} of {runs.planned} done, {len(runs.failed)} failed"))
    facts.append(("command", command))
    seconds = sum(run.cost.get("seconds", 0) for run in runs.done)
    facts.append(("training time", f"{seconds / 3600:.1f} h in all, {study.threads} threads a run"))
    measured = f"{', '.join(study.evaluate.checkpoints)}, {study.evaluate.replicates} resamples of the images"
    facts.append(("measured", measured))
    for what, values in (
        ("processor", {_at(run, "machine", "processor") for run in runs.done}),
        ("cores", {_at(run, "machine", "cores") for run in runs.done}),
        ("paqdetr", {_at(run, "paqdetr") for run in runs.done}),
        ("commit", {_commit(run) for run in runs.done}),
        ("Python", {_at(run, "python") for run in runs.done}),
        ("torch", {_at(run, "packages", "torch") for run in runs.done}),
    ):
        known = sorted(str(value) for value in values if value)
        if known:
            facts.append((what, ", ".join(known)))
    return facts


def _commit(run: RunResult) -> str | None:
    git = run.provenance.get("git")
    return None if not git else git["commit"][:10] + (" (changed)" if git["changed"] else "")


def _at(run: RunResult, *keys: str) -> Any:
    found: Any = run.provenance
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
