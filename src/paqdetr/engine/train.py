"""Training, from a recipe and a folder of data to a run. What happens in between is the `Trainer`'s."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from paqdetr.config import describe_idle, load_config
from paqdetr.engine.environment import describe_environment
from paqdetr.engine.events import Callback
from paqdetr.engine.run import Run, prepare_run
from paqdetr.engine.setup import describe_data, open_splits, with_classes, with_largest_batch
from paqdetr.engine.trackers import require_trackers
from paqdetr.engine.trainer import Trainer
from paqdetr.errors import UserError


def train(
    model: str | Path,
    *,
    data: str | Path,
    output: str | Path,
    resume: bool = False,
    device: str | None = None,
    auto_batch: bool = False,
    callbacks: Sequence[Callback] = (),
    settings: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Run:
    """Train a model and evaluate it on the validation split after each `eval_every` epochs.

    Settings that change nothing beside the others, and what is odd about the data, are named in the log.

    Args:
        model: a name of `list_models()`, a recipe of `list_recipes()`, or a YAML file.
        data: a data set's folder with a `train` and, if there is one, a `val` split; `val_fraction` makes one.
        output: the run's folder.
        resume: continue a run that was interrupted; start it if there is none; do nothing if it is finished.
        device: "cpu", "cuda", ...; the best there is if None.
        auto_batch: take the largest batch that fits into memory as `batch_size`; a resumption keeps the one found first.
        callbacks: told of every step and evaluation.
        settings: overrides with dotted keys, such as {"model.num_patterns": 32}.
        overrides: overrides of top-level settings, such as epochs=12.

    Raises:
        UserError: settings, data or the output folder cannot be used; nothing is overwritten.
        TrainingInterrupted: SIGINT or SIGTERM came; the state is saved.
    """
    given = {**(settings or {}), **overrides}
    config = load_config(model, given)
    train_split, val_split = open_splits(data, config)
    config = with_classes(config, train_split)
    require_trackers(config.trackers)
    if auto_batch:
        config = with_largest_batch(config, train_split, Run(Path(output)), device=device)
    was_there = Path(output).exists()
    run = prepare_run(output, config, resume=resume)
    if run.finished:
        return run
    try:
        trainer = Trainer(config, run, train_split, val_split, device=device, callbacks=list(callbacks))
    except UserError:  # a device, a precision or a checkpoint that cannot be used
        if not was_there:
            with suppress(OSError):  # removes an empty folder alone
                run.output.rmdir()
        raise
    trainer.processes.wait()  # the others have seen that there is no run yet
    held, failure = None, None
    if trainer.processes.main:
        for note in (*describe_idle(config, given), *describe_data(config, train_split, val_split)):
            logging.getLogger(__name__).warning("%s", note)
        try:
            run.write_config(config)
            held = run.hold()
            run.remove_leftovers()
            run.add_environment(describe_environment() | {"processes": trainer.processes.count})
        except UserError as error:
            failure = error
    trainer.processes.raise_together(failure)
    try:
        trainer.fit()
    finally:
        if held is not None:
            held.close()
    return run
