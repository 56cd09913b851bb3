"""`paqdetr train`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paqdetr.cli import options
from paqdetr.cli.console import Ended, errors, facts_table, interrupted, note, results
from paqdetr.text import figure
from paqdetr.values import MAX_SEED


def train(
    model: options.Model,
    settings: options.Settings = None,
    *,
    data: Annotated[
        Path | None,
        options.data(help="Folder of the data set, or its data.yaml. Needed, unless a run is resumed by its folder."),
    ] = None,
    output: Annotated[
        Path | None, options.output(help="Folder of the run; made if absent. Needed, as --data is.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an interrupted run, or start it. With a run's folder as MODEL, no more is needed.",
        ),
    ] = False,
    accept_new_data: Annotated[
        bool, typer.Option("--accept-new-data", help="With --resume: even if the data have changed.")
    ] = False,
    device: options.Device = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Short for seed=N.")] = None,
    amp: Annotated[str | None, typer.Option(help="Short for amp=bf16|fp16|no.")] = None,
    auto_batch: options.AutoBatch = False,
) -> None:
    """Train a detector and evaluate it on the validation split.

    Ctrl-C, SIGTERM or SIGHUP finishes the step and saves the state; --resume continues from there.
    """
    from paqdetr.cli.progress import TrainingProgress
    from paqdetr.config import parse_overrides
    from paqdetr.environment import this_is_main
    from paqdetr.interrupt import TrainingInterrupted
    from paqdetr.training import train as run_training

    overrides, progress = parse_overrides(settings or []), TrainingProgress()
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
            callbacks=[progress],
        )
    except TrainingInterrupted as stopped:
        if this_is_main():
            raise interrupted(f"saved at step {stopped.step}", stopped.exit_code, resume=resume) from None
        raise Ended(stopped.exit_code) from None
    from paqdetr.distributed import leave

    leave()
    if not this_is_main():
        return
    if not progress.total:
        note(
            f"{run.output}: the run was finished, and nothing is left to train; to train its weights further, or on other data, "
            f"start a new run with init={run.output}"
        )
    best = run.metrics
    facts = {}
    if best:
        facts[f"validation AP (epoch {best.get('epoch')})"] = figure(best.get("AP"))
        facts |= {"AP50": figure(best.get("AP50")), "AP after NMS": figure(best.get("AP_nms"))}
    else:
        facts["validation AP"] = "none: no val split"
    finished = run.records("finished")[-1]
    if "stopped" in finished:
        facts[f"stopped after epoch {finished['epoch']}"] = finished["stopped"]
    facts["training time"] = f"{finished['seconds'] / 60:.1f} min"
    facts["peak memory"] = f"{finished['peak_memory_gib']:.2f} GiB"
    results.print(facts_table(f"run {run.output}", facts))
    results.print(f"checkpoint: {run.best}")  # outside the table, which would shorten it
    pictures = [name for name in ("curves.png", "predictions.png") if (run.output / name).is_file()]
    if pictures:
        errors.print(f"pictures: {', '.join(str(run.output / name) for name in pictures)}")
