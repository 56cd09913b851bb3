"""`paqdetr plan`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paqdetr.cli import options
from paqdetr.cli.console import Ended, OutputFiles, errors, facts_table, note, progress_bar, results
from paqdetr.text import duration


def plan(
    model: options.Model,
    settings: options.Settings = None,
    *,
    data: Annotated[Path, typer.Option(help="Folder of the data set.")],
    device: options.Device = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps to measure.")] = 5,
    auto_batch: options.AutoBatch = False,
    overfit: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Instead: train so many steps on one batch, and see if it is learnt."),
    ] = None,
    json_file: options.JsonFile = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Estimate what a training will take: memory, time, disk.

    It takes a few real steps and evaluates a few images in another process, and keeps nothing of them.
    """
    from paqdetr.config import describe_idle, load_config, parse_overrides
    from paqdetr.training.setup import describe_data, open_splits, require_no_batch_size, with_classes

    files = OutputFiles("paqdetr plan", overwrite=overwrite, json=json_file)
    given = parse_overrides(settings or [])
    if auto_batch:
        require_no_batch_size(given)
    config = load_config(model, given)
    train_split, val_split = open_splits(data, config)
    for line in (*describe_idle(config, given), *describe_data(config, train_split, val_split)):
        note(line)
    config = with_classes(config, train_split)
    if auto_batch:
        from paqdetr.distributed import Processes
        from paqdetr.training.memory import largest_batch

        with errors.status("find the largest batch"):
            size = largest_batch(config, train_split, Processes.join(device))
        config = config.model_copy(update={"batch_size": size})
    if overfit is not None:
        from paqdetr.training.plan import overfit_one_batch

        tried = overfit_one_batch(config, train_split, steps=overfit, device=device)
        first, last = tried.losses[0], tried.losses[-1]
        results.print(
            f"{tried.images} images, {len(tried.losses)} steps: loss {first:.2f} -> {last:.2f}, "
            f"{tried.found:.0%} of {tried.boxes} boxes found, {tried.wrong:.2f} wrong predictions a box"
        )
        files.write("json", tried.to_json())
        if not tried.learnt:
            note("less than 90 % of the boxes of this one batch are found", "not learnt", "bold")
            note("give it more steps; then look at lr, and at the boxes and classes of the data", "help", "bold")
            raise Ended(2)
        return
    from paqdetr.training.plan import plan_training

    with progress_bar("try a few steps") as progress:
        found = plan_training(config, train_split, val_split, device=device, steps=steps, progress=progress)
    parts = {name: value for name, value in found.memory.items() if name not in ("peak", "total", "available")}
    rows = {
        "images of a step": f"{found.step_images} (batch_size {config.batch_size}, accumulate {config.accumulate})",
        "steps": f"{found.epoch_steps} an epoch, {found.total_steps} in all",
        "parameters": f"{found.parameters / 1e6:.1f} M, {found.trainable / 1e6:.1f} M of them trained at lr {found.lr:.2e}",
        "memory": f"about {found.memory['total']:.2f} GiB of {found.memory['available']:.2f} free"
        + ("" if found.fits else ": too much"),
        "made of": ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if round(value, 2)),
        "a step": f"{found.step_seconds:.3f} s, mean of {found.measured_steps}",
        "an epoch": f"{duration(found.epoch_seconds)}, "
        + (f"and {duration(found.evaluation_seconds)} to evaluate" if val_split else "without evaluation"),
        "in all": duration(found.total_seconds),
        "disk": f"{found.disk:.2f} GiB",
    }
    results.print(facts_table(f"{config.name} on {data}, {found.device}", rows))
    files.write("json", found.to_json() | {"batch_size": config.batch_size})
