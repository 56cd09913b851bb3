"""`paqdetr train`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from paqdetr.cli.console import errors, results, show


def train(
    model: Annotated[
        str,
        typer.Argument(help="A model or recipe (`paqdetr models`), or a YAML file.", metavar="MODEL|CONFIG"),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, such as epochs=12 model.num_patterns=32.", metavar="[KEY=VALUE]..."),
    ] = None,
    *,
    data: Annotated[Path, typer.Option(help="Folder of the data set, or its data.yaml.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; made if absent.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run, or start it.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...: the best there is if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for seed=N.")] = None,
    amp: Annotated[str | None, typer.Option(help="Short for amp=bf16|fp16|no.")] = None,
) -> None:
    """Train a detector and evaluate it on the validation split."""
    from paqdetr.cli.progress import TrainingProgress
    from paqdetr.config import parse_overrides
    from paqdetr.engine import train as run_training

    overrides = parse_overrides(settings or [])
    overrides |= {key: value for key, value in (("seed", seed), ("amp", amp)) if value is not None}
    run = run_training(
        model,
        data=data,
        output=output,
        resume=resume,
        device=device,
        settings=overrides,
        callbacks=[TrainingProgress()],
    )
    best = run.metrics
    table = Table(title=f"run {run.output}", title_justify="left", show_header=False)
    if best:
        table.add_row(f"validation AP (epoch {best['epoch']})", show(best["AP"]))
        table.add_row("AP50", show(best["AP50"]))
        table.add_row("AP after NMS", show(best["AP_nms"]))
    finished = run.records("finished")[-1]
    table.add_row("training time", f"{finished['seconds'] / 60:.1f} min")
    table.add_row("peak memory", f"{finished['peak_memory_gib']:.2f} GiB")
    results.print(table)
    results.print(f"checkpoint: {run.best}", soft_wrap=True)  # outside the table, which would shorten it
    errors.print(
        f"curves and example predictions are beside it: {run.output}/curves.png, predictions.png",
        soft_wrap=True,
    )
