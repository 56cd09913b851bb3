"""Training, from a recipe and a folder of data to a run. What happens in between is the `Trainer`'s."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from multiprocessing import current_process
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from uuid import uuid4

from paqdetr.checkpoint import find_described, require_same_settings
from paqdetr.config import describe_idle, is_name, load_config
from paqdetr.environment import describe_environment
from paqdetr.errors import ConfigError, UserError
from paqdetr.runs import Run
from paqdetr.training.callbacks import Callback, NotebookProgress, require_trackers
from paqdetr.training.setup import describe_data, open_splits, require_no_batch_size, with_classes
from paqdetr.values import environment_integer


def train(
    model: str | Path,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    accept_new_data: bool = False,
    device: str | None = None,
    auto_batch: bool = False,
    callbacks: Sequence[Callback] = (),
    settings: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Run:
    """Train a model and evaluate it on the validation split after each `eval_every` epochs.

    Settings that change nothing beside the others, and what is odd about the data, are named in the log.

    Args:
        model: a name of `list_models()`, a recipe of `list_recipes()`, or a YAML file; with `resume` also the folder of a run,
            which then says everything else.
        data: a data set's folder with a `train` and, if there is one, a `val` split; `val_fraction` makes one. Needed, as is
            output, unless a run is resumed by its folder.
        output: the run's folder.
        resume: continue a run that was interrupted; start it if there is none; do nothing if it is finished.
        accept_new_data: resume even if boxes, images or the names of classes are not those that the run was started with. With
            `max_steps`, an epoch must have as many batches as before.
        device: "cpu", "cuda", ...; the best there is if None.
        auto_batch: take the largest batch that fits into memory, and leaves an epoch 30 steps, as `batch_size`; a resumption
            keeps the one found first.
        callbacks: called at every step and evaluation. A notebook shows a bar of its own.
        settings: overrides with dotted keys, such as {"model.num_patterns": 32}.
        overrides: overrides of top-level settings, such as epochs=12, which go before those of `settings`.

    Raises:
        UserError: settings, data or the output folder cannot be used; nothing is overwritten.
        TrainingInterrupted: SIGINT, SIGTERM or SIGHUP came; the state is saved.
    """
    # A process that is being spawned imports the script of its parent.
    if getattr(current_process(), "_inheriting", False):
        raise ConfigError(
            "a process that the script has started runs the script again, and would train too",
            "put the call below `if __name__ == '__main__':`",
        )
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            f"model: expected a name or a YAML file, found a {type(model).__name__}",
            "save it, and give its file as init=: train('dino_nano', init='model.safetensors', ...)",
        )
    model, data, output = _where(model, data, output, resume)
    if not isinstance(settings or {}, Mapping):
        kind = type(settings).__name__
        raise ConfigError(f"settings: expected a mapping, found a {kind}", 'pass settings={"augment.flip": 0}')
    given = {**(settings or {}), **overrides}
    if auto_batch:
        require_no_batch_size(given)
    config = load_config(model, given)
    train_split, val_split = open_splits(data, config)
    config = with_classes(config, train_split)
    require_trackers(config.trackers)
    if accept_new_data and not resume:
        raise ConfigError("accept_new_data is for a resumption", "resume too, or leave accept_new_data out")
    run, held, was_there = Run(Path(output)), None, Path(output).exists()
    if environment_integer("WORLD_SIZE", 1, low=1) == 1:  # of several processes one alone looks, below
        run.require_place(resume=resume)
        if config.init is not None and not run.state_file.is_file():
            file, made_with, _ = find_described(config.init)
            require_same_settings(made_with.model, config.model, str(file))

    gettempdir()  # fails where there is none, as torch and matplotlib would in the middle of their import
    # Torch takes seconds to import: not before everything that a typo can be in was looked at.
    from paqdetr.distributed import Processes
    from paqdetr.models.files import describe_start
    from paqdetr.training.memory import with_largest_batch
    from paqdetr.training.trainer import Trainer

    processes = Processes.join(device)
    try:
        with processes.agreeing():
            run.require_place(resume=resume)
            if processes.main:
                held = run.begin(resume=resume)
        if auto_batch:
            config = with_largest_batch(config, train_split, run, processes)
        run.require_settings(config)
        if run.finished:
            if processes.main:
                logging.getLogger(__name__).info("%s: the run is finished, and nothing is left to train", run.output)
            return run
        trainer = Trainer(
            config,
            run,
            train_split,
            val_split,
            device=device,
            callbacks=[*callbacks, *([NotebookProgress()] if NotebookProgress.wanted() else [])],
            accept_new_data=accept_new_data,
        )
        processes.wait()  # the others have seen what there is
        with processes.agreeing():
            if processes.main:
                notes = (*describe_idle(config, given), *describe_data(config, train_split, val_split))
                for note in (*notes, *describe_start(config)):
                    logging.getLogger(__name__).warning("%s", note)
                run.write_config(config)
                run.remove_leftovers()
                where = {"id": run.id or uuid4().hex, "data": str(Path(data).resolve()), "processes": processes.count}
                run.add_environment(describe_environment() | where)
        trainer.fit()
    except UserError:
        if held is not None and not was_there:
            run.abandon()
        raise
    finally:
        if held is not None:
            held.close()
    return run


def _where(
    model: str | Path, data: str | Path | None, output: str | Path | None, resume: bool
) -> tuple[str | Path, str | Path, str | Path]:
    """Model, data and output, which a run that is resumed by its folder says itself."""
    run = Run.at(model) if resume and not is_name(str(model)) else None
    if run is not None:
        if output is not None and Path(model) != run.config_file and Path(output).resolve() != run.output.resolve():
            raise ConfigError(
                f"{model}: a run to go on with, and output is another folder, {output}",
                "leave --output out; or name the model, with init=FILE to start from weights",
            )
        model, data, output = run.config_file, data or run.data, output or run.output
    elif data is None or output is None:
        load_config(model)  # if there is no such model, that is the mistake
    for name, value, what in (("data", data, "the folder of a data set"), ("output", output, "a folder for the run")):
        if value is None:
            of_run = f"{run.output} does not say which it was made with; " if run is not None else ""
            raise ConfigError(
                f"--{name} is not given",
                f"{of_run}name {what}; to go on with a run, its folder is enough: `paqdetr train RUN --resume`",
            )
    assert data is not None and output is not None
    return model, data, output
