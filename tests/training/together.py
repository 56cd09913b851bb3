"""What processes of the tests do, alone or several together (the fixture `start`)."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported here, once for all processes, which are forked: scipy, torch's compiler (shapes on the meta device) and plots.
import scipy.optimize  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
from safetensors.torch import save_file

from paqdetr import checkpoint, files
from paqdetr.cli import console, main
from paqdetr.config import load_config
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.loader import Batch, plain_batch
from paqdetr.distributed import leave
from paqdetr.errors import NonFiniteError
from paqdetr.evaluation.evaluate import evaluate_together
from paqdetr.metrics import QueryUsage
from paqdetr.report import curves  # noqa: F401
from paqdetr.runs import Run
from paqdetr.structures import Targets
from paqdetr.training import trainer as loop
from paqdetr.training.setup import with_classes
from paqdetr.training.step import Step
from paqdetr.training.trainer import Trainer


def trainer(job: dict[str, Any], split: DetectionDataset, **settings: Any) -> Trainer:
    config = load_config("paq_dino_nano", {**job["settings"], **settings})
    run = Run(Path(job["output"]))
    return Trainer(with_classes(config, split), run, split, None, device="cpu", callbacks=[])


def without_boxes(batch: Batch) -> Batch:
    none = [Targets(t.labels[:0], t.boxes[:0], t.image_id, t.size) for t in batch.targets]
    return Batch(batch.images, None, none)


def gradients(job: dict[str, Any], split: DetectionDataset) -> None:
    """Of one step over the same six images, shared out over processes and `accumulate` batches."""
    train = trainer(job, split)
    share = 6 // (train.processes.count * job["accumulate"])
    first = train.processes.index * share * job["accumulate"]
    batches = [
        plain_batch(split, train.model.preprocessing, list(range(start, start + share)))
        for start in range(first, first + share * job["accumulate"], share)
    ]
    boxes = sum(len(split.labels(index)) for index in range(6))
    step = train.step.gradients(batches, boxes=float(boxes), progress=0.0)
    if train.processes.main:
        found = {name: p.grad for name, p in train.model.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in found.values())
        save_file({name: grad.contiguous() for name, grad in found.items()}, job["gradients"])
        Path(job["answer"]).write_text(json.dumps({"loss": step.loss}), encoding="utf-8")


def evaluation(job: dict[str, Any], split: DetectionDataset) -> None:
    train = trainer(job, split)
    truth = DetectionDataset.from_json(job["truth"], split.image_dir)
    usage = QueryUsage(num_queries=train.model.config.num_queries)
    found = evaluate_together(train.model, truth, train.processes, batch_size=2, observers=[usage])
    assert (found is not None) == train.processes.main
    if found is not None:
        figures = {key: value for key, value in found.to_json().items() if key != "images_per_second"}
        answer = {"figures": figures, "results": found.results, "usage": usage.report().to_json()}
        Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def accidents(job: dict[str, Any], split: DetectionDataset) -> None:
    """One process has no boxes, none has, one sees NaN; and ordinary steps in between."""
    answer: dict[str, Any] = {}
    train = trainer(job, split, nan_policy="skip-step")
    last = train.processes.index == train.processes.count - 1
    full = plain_batch(split, train.model.preprocessing, [train.processes.index])
    empty = without_boxes(full)
    broken = Batch(full.images * math.nan, None, full.targets)
    sum_of = lambda: float(sum(p.detach().double().sum() for p in train.model.parameters()))  # noqa: E731
    before = sum_of()

    def step(name: str, batch: Batch) -> None:
        nonlocal before
        boxes = train.processes.sum([float(sum(map(len, batch.targets)))])[0]
        done = train.step([batch], boxes=boxes, progress=0.0)
        sums = train.processes.gather(sum_of())
        if sums is not None:
            assert all(total == sums[0] for total in sums), f"{name}: processes have drifted apart"
        loss = done.loss if math.isfinite(done.loss) else None
        answer[name] = {"problem": done.problem, "loss": loss, "changed": sum_of() != before}
        before = sum_of()

    step("one process without boxes", empty if last else full)
    step("no boxes at all", empty)
    step("NaN in one process", broken if last else full)
    step("afterwards", full)
    train.step.config = train.config.model_copy(update={"nan_policy": "raise"})

    def ended_by(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except NonFiniteError as error:
            answer[name] = train.processes.gather((error.message, error.reported_elsewhere))

    ended_by("NaN", lambda: step("NaN that ends it", broken if last else full))
    loop._MOST_SKIPPED = 1
    train.run.output.mkdir(exist_ok=True)
    ended_by("too many", lambda: train._advance(Step(images=1, problem="of NaN"), seconds=0.0))
    if last:
        next(p for p in train.model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * math.nan)
    ended_by("gradient", lambda: step("a gradient that ends it", full))
    if train.processes.main:
        Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def jobs(file: str) -> None:
    """A json list of jobs, one after the other in the same processes."""
    for job in json.loads(Path(file).read_text(encoding="utf-8")):
        split = open_split(job["data"], "train")
        {"gradients": gradients, "evaluation": evaluation, "accidents": accidents}[job["what"]](job, split)


def command_line(*arguments: str) -> None:
    """As `python -m paqdetr ARGUMENTS`, without the pictures, which take longer than a tiny training itself."""
    loop.training_curves = loop.draw_predictions = lambda *_, **__: None
    sys.argv = ["paqdetr", *arguments]
    main()


def own_group(*arguments: str) -> None:
    """The command line in a process group of its own, as a shell or a batch system starts it."""
    os.setpgid(0, 0)
    # As a shell in a terminal leaves them: nohup, and scripts that start something in the background, have them ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command_line(*arguments)


def after_step(step: str, act: Callable[[], object]) -> None:
    """What is to happen in the training of this process as soon as so many optimiser steps are done."""
    advance = Trainer._advance

    def then_act(self: Trainer, *positional: Any, **named: Any) -> None:
        advance(self, *positional, **named)
        if self.position.step == int(step):
            act()

    Trainer._advance = then_act


def killed_after_step(step: str, *arguments: str) -> None:
    """The command line, until so many optimiser steps are done."""
    after_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    command_line(*arguments)


def held_after_step(step: str, file: str, work: str, *arguments: str) -> None:
    """`work`, which waits after so many optimiser steps until the file is there, for two minutes at most: what a test does
    meanwhile is done in the middle of the training, however fast it is."""

    def hold() -> None:
        end = time.monotonic() + 120
        while not Path(file).exists() and time.monotonic() < end:
            time.sleep(0.01)

    after_step(step, hold)
    globals()[work](*arguments)


def killed_while_writing(name: str, nth: str, where: str, *arguments: str) -> None:
    """The command line, until the n-th time that a file of this name is written: "half" of it lies beside its place, the
    "whole" of it, or it "moved" there a moment ago."""
    write_whole, flush, count = checkpoint.write_whole, files._flush, 0

    def until(path: Path, write: Any) -> None:
        nonlocal count
        count += path.name == name

        def die(temporary: Path) -> None:
            write(temporary)
            if where == "half":
                os.truncate(temporary, temporary.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        def die_at_folder(place: Path) -> None:
            if place.is_dir():
                os.kill(os.getpid(), signal.SIGKILL)

        if path.name == name and count == int(nth):
            if where == "moved":
                files._flush = die_at_folder
            else:
                write_whole(path, die)
        write_whole(path, write)
        files._flush = flush

    checkpoint.write_whole = until
    command_line(*arguments)


def with_full_disk(megabytes: str, *arguments: str) -> None:
    """The command line where no file may become larger: a write fails as on a full disk, but with EFBIG."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = int(float(megabytes) * 2**20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    command_line(*arguments)


def run(place: tuple[int, int, int, str, str], work: str, *arguments: str) -> None:
    """Take one's place among the processes, and work."""
    rank, count, port, out, err = place
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
    console.errors.file, console.results.file = sys.stderr, sys.stdout
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # it is served there
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    # As in a program of its own: workers of a loader would otherwise hang on a server, and outlive a process that is killed.
    multiprocessing.set_start_method("fork", force=True)
    for name in ("training_curves", "draw_predictions"):  # take longer than a tiny training itself
        setattr(sys.modules[Trainer.__module__], name, lambda *positional, **named: None)
    globals()[work](*arguments)
    leave()
