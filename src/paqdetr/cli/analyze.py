"""`paqdetr analyze`"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from paqdetr.cli import options
from paqdetr.cli.console import note_unfinished, progress_bar, results
from paqdetr.text import figure
from paqdetr.values import MAX_RESAMPLES


def analyze(
    checkpoint: options.Checkpoint,
    *,
    data: options.Data,
    output: Annotated[Path, options.output(help="Folder for the report; an earlier report is replaced.")],
    split: options.Split = None,
    against: Annotated[
        Path | None, typer.Option(help="Another checkpoint or run's folder, shown side by side.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=1000, help="Images of the gallery, the worst first.")] = 24,
    resamples: Annotated[
        int,
        options.figures(min=1, max=MAX_RESAMPLES, help="Resamples behind the intervals, shufflings behind the tests."),
    ] = 1000,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 4,
    device: options.Device = None,
) -> None:
    """Write one HTML page on what a detector does well and badly."""
    from paqdetr.data.layout import find_split, split_to_evaluate
    from paqdetr.environment import require_device
    from paqdetr.loading import require_model

    files = [require_model(path) for path in (checkpoint, against) if path is not None]
    for file in files:
        note_unfinished(file)
    split = split_to_evaluate(data, split)
    find_split(data, split)
    from paqdetr.analysis import analyze as write_report  # takes seconds: after what a typo can be in

    with ExitStack() as stack:
        bars = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                stack.close()  # the bar of the stage before
                bars.clear()
                bars[stage] = stack.enter_context(progress_bar(stage))
            bars[stage](done, total)

        report = write_report(
            files[0],
            data=data,
            output=output,
            split=split,
            against=files[1] if files[1:] else None,
            images=images,
            samples=resamples,
            seed=seed,
            batch_size=batch_size,
            device=str(require_device(device)),
            progress=progress,
        )
    size = report.page.stat().st_size / 2**20
    results.print(
        f"AP {figure(report.figures['AP'])}, AP50 {figure(report.figures['AP50'])}: {report.page} ({size:.1f} MB, one file; "
        f"the numbers behind it are in {report.page.parent / 'data'})"
    )
