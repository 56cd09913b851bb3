"""`paqdetr study`"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paqdetr.cli import options
from paqdetr.cli.console import Ended, errors, interrupted, live_bars, note, progress_bar, results, table
from paqdetr.errors import ConfigError, DataError
from paqdetr.text import duration, figure

if TYPE_CHECKING:
    from paqdetr.study.report import StudyReport
    from paqdetr.study.results import RunResult
    from paqdetr.study.runs import Places, PlannedRun
    from paqdetr.study.spec import Study


class QueueProgress:
    """What a queue shows: two live bars on a terminal, over the runs and over the steps of the one in hand; a line for each run
    in a log. Its methods are those of `QueueEvents`."""

    def __init__(self, study: Study, runs: list[PlannedRun]) -> None:
        self._checkpoint: str = study.evaluate.checkpoints[0]
        self._bars = live_bars()
        self._all = self._bars.add_task(study.name, total=len(runs), figures="")
        self._one = self._bars.add_task("", total=1, figures="", visible=False)

    def __enter__(self) -> QueueProgress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def on_begin(self, planned: PlannedRun, step: str, number: int, total: int) -> None:
        self._bars.update(self._all, completed=number - 1)
        self._bars.reset(self._one, description=f"{step} {planned.key}", total=planned.steps, visible=step == "train")
        if not errors.is_terminal:
            errors.print(f"{number} of {total}: {step} {planned.key}")

    def on_progress(self, planned: PlannedRun, step: int, ap: float | None) -> None:
        self._bars.update(self._one, completed=step, figures="" if ap is None else f"AP {figure(ap)}")

    def on_result(self, planned: PlannedRun, result: RunResult) -> None:
        self._bars.update(self._one, visible=False)
        if result.failed is not None:
            errors.print(f"{planned.key}: failed: {result.failed}")
            return
        figures = result.figures[self._checkpoint]
        errors.print(f"{planned.key}: AP {figure(figures['AP'])}, after NMS {figure(figures['AP_nms'])}")

    def on_wait(self, planned: PlannedRun) -> None:
        self._bars.update(self._one, description=f"waiting for another process: {planned.key}", visible=True)


def study(
    file: Annotated[Path, typer.Argument(help="What is compared: a YAML file.", metavar="STUDY.yaml")],
    *,
    output: Annotated[Path, options.output(help="Folder of the study; made if absent.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue a study that was stopped, or start it.")] = False,
    data_root: Annotated[Path, typer.Option(help="What data folders of the file are relative to.")] = Path(),
    only: Annotated[
        list[str] | None, typer.Option(metavar="DATA", help="Only this data set of the study; may be repeated.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="List the runs and what they will take; run none.")] = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="Make the data, and print the command of every training; run none.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of what is there; run nothing.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed runs again.")] = False,
    measured: Annotated[
        Path | None, typer.Option(help="With --plan: a folder with results of other studies, to know times from.")
    ] = None,
    ray: Annotated[
        str | None,
        options.machine(
            metavar="ADDRESS",
            help="Train on a Ray cluster whose nodes share these folders: local starts one, auto is that of this machine.",
        ),
    ] = None,
    device: options.Device = None,
) -> None:
    """Train variants over data sets and seeds, and compare them.

    What is there is not trained again; the report says what the runs decide.

    Ctrl-C or SIGTERM stops at the next step of the training in hand, with its state saved; --resume goes on.
    """
    from paqdetr.study.runs import Places, plan_runs
    from paqdetr.study.spec import load_study

    if ray is not None:  # paths mean the same on every node
        output, data_root = output.absolute(), data_root.absolute()
    whole, places = load_study(file), Places(output)
    study = whole.only(only) if only else whole
    words = ["paqdetr", "study", str(file), "--output", str(output)]
    words += [] if data_root == Path() else ["--data-root", str(data_root)]
    command = shlex.join([*words, "--resume"])
    if report_only:
        if only:
            raise ConfigError("--only chooses what is run, and a report is of all that is there", "leave it out")
        return _report(whole, places, command)
    runs = plan_runs(study, file=file, places=places, root=data_root)
    if plan:
        return _plan(study, runs, places, measured)
    from paqdetr.environment import require_device
    from paqdetr.files import read_text, write_text
    from paqdetr.outputs import require_free
    from paqdetr.study.queue import StudyInterrupted, require_no_conflict, run_queue, run_queue_on_ray

    if commands:
        _prepare(study, places, data_root)  # the folders that the commands name
        for planned in runs:
            results.print(planned.command(places.run(planned.key), device=device))
        return None
    if device is not None and ray is None:
        require_device(device)
    if places.study_file.exists() and not resume:
        raise ConfigError(
            f"{places.output}: there is a study already, and nothing is overwritten",
            "continue it with --resume, or choose another --output",
        )
    if not places.study_file.exists():
        # Results and runs that were kept elsewhere may have been put there to go on from.
        require_free(
            places.output, lambda path: path.relative_to(places.output).parts[0] in ("data", "results", "runs")
        )
    for planned in runs:
        require_no_conflict(planned, places)
    write_text(places.study_file, read_text(file))
    _prepare(study, places, data_root)
    try:
        with QueueProgress(study, runs) as events:
            if ray is None:
                done = run_queue(study, runs, places, device=device, retry=retry, events=events)
            else:
                address = None if ray == "local" else ray
                done = run_queue_on_ray(study, runs, places, address=address, device=device, retry=retry, events=events)
    except StudyInterrupted as stopped:
        raise interrupted("the state is saved", stopped.exit_code, resume=resume) from None
    for planned in done.failed:
        errors.print(f"failed: {planned.key}; see {places.log(planned.key)}")
    _report(whole, places, command, may_not_fit=whole.data.keys() - study.data.keys())
    if done.failed:
        note("correct the cause, then continue with --resume --retry", "help", "bold")
        raise Ended(2)


def _prepare(study: Study, places: Places, data_root: Path) -> None:
    from paqdetr.study.datasets import prepare

    for name, data in study.data.items():
        with progress_bar(f"prepare {name}") as progress:
            prepare(data, cache=places.data, root=data_root, progress=progress)


def _report(study: Study, places: Places, command: str, *, may_not_fit: Collection[str] = ()) -> None:
    """Write and print what the results say; `command` makes all of them. Of data sets that were not run now, results that the
    study's file no longer fits are left out."""
    from paqdetr.study.report import write_report
    from paqdetr.study.results import read_results
    from paqdetr.study.verdicts import require_fits

    if not places.results.is_dir():
        raise ConfigError(f"{places.output}: there are no results yet", "run the study without --report-only")
    found = []
    for result in read_results(places.results):
        try:
            if result.key.data in may_not_fit and result.failed is None:
                require_fits(study, result)
        except DataError as error:
            note(f"left out of the report: {error.message}")
        else:
            found.append(result)
    report = write_report(study, found, places.output, command=command)
    _print(report)
    results.print(f"report: {places.output / 'report' / 'index.html'}")


def _print(report: StudyReport) -> None:
    """Figures by data set, and the verdicts."""
    from paqdetr.study.spec import identifier

    study, tables = report.runs.study, report.tables
    for name in study.data:
        if (figures := tables.get(identifier("figures", name))) is None:
            continue
        headings = ("seeds", "AP", "spread", "AP after NMS", "to baseline", "interval")
        made = table(f"{name}, {study.split_of(name)}", ("variant",), headings)
        for row in figures.rows:
            interval = "-" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
            numbers = (figure(row["AP"]), figure(row["spread"]), figure(row["AP_nms"]), _signed(row["difference"]))
            made.add_row(row["variant"], str(row["seeds"]), *numbers, interval)
        results.print(made)
    if report.verdicts:
        made = table("claims", ("claim", "data", "verdict"), ("effect", "p", "detectable (80 % power)"))
        for row in tables["verdicts"].rows:
            numbers = (_signed(row["effect"]), figure(row["p"]), figure(row["smallest"]))
            made.add_row(row["claim"], row["data"], row["verdict"], *numbers)
        results.print(made)


def _plan(study: Study, runs: list[PlannedRun], places: Places, measured: Path | None) -> None:
    from paqdetr.study.costs import forecast
    from paqdetr.study.results import read_results

    rows = forecast(runs, places, [] if measured is None else read_results(measured))
    title = f"study {study.name}: {len(runs)} runs"
    made = table(title, ("data", "variant", "seeds"), ("steps", "done", "per run", "left"))
    made.add_column("from")
    for row in rows:
        done, times = f"{row.done} of {len(row.seeds)}", (_hours(row.seconds), _hours(row.left))
        done += f", {row.failed} failed" if row.failed else ""
        made.add_row(row.data, row.variant, " ".join(map(str, row.seeds)), str(row.steps), done, *times, row.source)
    results.print(made)
    known = [row.left for row in rows if row.left is not None]
    unknown = sum(len(row.seeds) - row.done for row in rows if row.left is None)
    parts = [_hours(sum(known))] if known else []
    parts += [f"{unknown} runs whose time is not known yet"] if unknown else []
    results.print(f"left: {' and '.join(parts)}")


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _hours(seconds: float | None) -> str:
    return "?" if seconds is None else duration(seconds)
