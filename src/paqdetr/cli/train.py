"""`paqdetr train`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from paqdetr.cli.console import Device, Ended, Model, Settings, errors, print_styled, results, show
from paqdetr.values import MAX_SEED


def train(
    model: Model,
    settings: Settings = None,
    *,
    data: Annotated[Path, typer.Option(help="Folder of the data set, or its data.yaml.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; made if absent.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, or start it.")] = False,
    accept_new_data: Annotated[
        bool, typer.Option("--accept-new-data", help="With --resume: even if the data have changed.")
    ] = False,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Short for seed=N.")] = None,
    amp: Annotated[str | None, typer.Option(help="Short for amp=bf16|fp16|no.")] = None,
    auto_batch: Annotated[
        bool, typer.Option("--auto-batch", help="Take the largest batch that fits into memory.")
    ] = False,
) -> None:
    """Train a detector and evaluate it on the validation split.

    Ctrl-C, SIGTERM or SIGHUP finishes the step and saves the state; --resume continues from there.
    """
    from paqdetr.cli.progress import TrainingProgress
    from paqdetr.config import parse_overrides
    from paqdetr.distributed import leave, this_is_main
    from paqdetr.environment import command_line
    from paqdetr.interrupt import TrainingInterrupted
    from paqdetr.training import train as run_training

    overrides = parse_overrides(settings or [])
    overrides |= {key: value for key, value in (("seed", seed), ("amp", amp)) if value is not None}
    try:
        run = run_training(
            model,
            data=data,
            output=output,
            resume=resume,
            accept_new_data=accept_new_data,
            device=device,
            auto_batch=auto_batch,
            settings=overrides,
            callbacks=[TrainingProgress()],
        )
    except TrainingInterrupted as interrupted:
        if this_is_main():
            command = command_line() + ("" if resume else " --resume")
            print_styled(errors, ("interrupted:", "bold"), f" saved at step {interrupted.step}; continue with")
            errors.print(f"  {command}", soft_wrap=True)
        raise Ended(interrupted.exit_code) from None
    leave()
    if not this_is_main():
        return
    best = run.metrics
    table = Table(title=f"run {run.output}", title_justify="left", show_header=False)
    if best:
        table.add_row(f"validation AP (epoch {best.get('epoch')})", show(best.get("AP")))
        table.add_row("AP50", show(best.get("AP50")))
        table.add_row("AP after NMS", show(best.get("AP_nms")))
    else:
        table.add_row("validation AP", "none: no val split")
    finished = run.records("finished")[-1]
    if "stopped" in finished:
        table.add_row(f"stopped after epoch {finished['epoch']}", finished["stopped"])
    table.add_row("training time", f"{finished['seconds'] / 60:.1f} min")
    table.add_row("peak memory", f"{finished['peak_memory_gib']:.2f} GiB")
    results.print(table)
    results.print(f"checkpoint: {run.best}", soft_wrap=True)  # outside the table, which would shorten it
    pictures = [name for name in ("curves.png", "predictions.png") if (run.output / name).is_file()]
    if pictures:
        errors.print(f"pictures: {', '.join(str(run.output / name) for name in pictures)}", soft_wrap=True)
