"""What goes wrong in the middle of a training, with real processes: it ends with one clear error or goes on as if nothing had
happened, and never with a damaged file."""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from same_end import require_same_end

from paqdetr.checkpoint import read_checkpoint
from paqdetr.runs import Run

pytestmark = pytest.mark.integration

Start = Callable[..., Any]  # the fixture of conftest.py


@pytest.fixture(scope="module")
def arguments(tiny_digits: Path, tiny_settings: dict[str, Any]) -> list[str]:
    """Four epochs of four steps, on two workers, saved after every other step."""
    settings = {**tiny_settings, "batch_size": 2, "epochs": 4, "save_every_steps": 2, "log_every": 1, "workers": 2}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    return ["train", "paq_dino_nano", *pairs, "--data", str(tiny_digits), "--device", "cpu"]


@pytest.fixture(scope="module")
def straight(arguments: list[str], start: Start, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The training to which nothing happens."""
    run = Run(tmp_path_factory.mktemp("straight") / "run")
    (ended,) = start(1, "command_line", *arguments, "--output", run.output).end()
    assert ended.code == 0, ended.err
    return run


KILLS = {
    "in mid-epoch": ("killed_after_step", 7),
    "while the state is half written": ("killed_while_writing", "training_state.safetensors", 3, "half"),
    "before the state is moved to its place": ("killed_while_writing", "training_state.safetensors", 7, "whole"),
    "after the state was moved to its place": ("killed_while_writing", "training_state.safetensors", 7, "moved"),
    "between the checkpoint and the state": ("killed_while_writing", "last.safetensors", 2, "moved"),
}


SLOW = (
    "before the state is moved to its place",
    "after the state was moved to its place",
    "between the checkpoint and the state",
)


@pytest.mark.parametrize(
    "kill", [pytest.param(kill, marks=[pytest.mark.slow] if kill in SLOW else []) for kill in KILLS]
)
def test_killed_and_resumed_equals_never_killed(
    tmp_path: Path, arguments: list[str], start: Start, straight: Run, kill: str
) -> None:
    run = Run(tmp_path / "run")
    output = ["--output", run.output]
    (ended,) = start(1, *KILLS[kill], *arguments, *output).end()
    assert ended.code == -signal.SIGKILL, ended.err
    assert len(run.records("eval")) in (1, 2, 3) and not run.finished
    (ended,) = start(1, "command_line", *arguments, *output, "--resume").end()
    assert ended.code == 0 and "resumed at step" in ended.err, ended.err
    require_same_end(straight, run)
    environments = json.loads(run.environment_file.read_text())
    assert len(environments) == 2 and environments[1]["command"].endswith("--resume")
    assert environments[0]["id"] == environments[1]["id"]


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool]) -> None:
    """Until it is so, for two minutes at most and while the process lives."""
    for _ in range(2400):
        if condition() or not alive():
            return
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("SIGTERM", 1),  # scancel, systemd
        ("SIGTERM", 2),  # `timeout`
        ("SIGHUP", 1),  # a terminal that is closed
        pytest.param("SIGINT", 1, marks=pytest.mark.slow),  # Ctrl-C
    ],
)
def test_a_signal_to_the_process_group_saves_and_says_how_to_go_on(
    tmp_path: Path, arguments: list[str], start: Start, straight: Run, name: str, times: int
) -> None:
    number = signal.Signals[name]
    run = Run(tmp_path / "run")
    command = [*arguments, "--output", run.output]
    go_on = tmp_path / "go on"
    group = start(1, "held_after_step", 1, go_on, "own_group", *command, "save_every_steps=1000")
    (process,) = group.processes
    wait_for(lambda: bool(run.records("train")), process.is_alive)
    assert len(psutil.Process(process.pid).children(recursive=True)) == 2  # workers, which get it too
    for _ in range(times):
        os.killpg(process.pid, number)
        time.sleep(0.02)
    go_on.touch()
    (ended,) = group.end()
    assert ended.code == 128 + number, ended.err
    assert f"{name}: finishing the step" in ended.err and "Traceback" not in ended.err and ended.out == ""
    *_, what, how = ended.err.splitlines()
    step = read_checkpoint(run.state_file)[1]["position"]["step"]
    assert what == f"interrupted: saved at step {step}; continue with" and step == 1
    assert how.strip().startswith("paqdetr train") and how.endswith("--resume") and str(run.output) in how
    (ended,) = start(1, "command_line", *command, "--resume").end()
    assert ended.code == 0, ended.err
    require_same_end(straight, run)


def test_a_worker_that_dies(
    tmp_path: Path, arguments: list[str], start: Start, straight: Run, kill_children: Callable[..., list[int]]
) -> None:
    """As when the system kills it for its memory: in the middle of a step, which is still finished and saved."""
    run = Run(tmp_path / "run")
    go_on = tmp_path / "go on"
    command = [*arguments, "save_every_steps=1000", "--output", run.output]
    group = start(1, "held_after_step", 1, go_on, "command_line", *command)
    (process,) = group.processes
    wait_for(lambda: bool(run.records("train")), process.is_alive)
    assert kill_children(process.pid)
    go_on.touch()
    (ended,) = group.end()
    assert ended.code == 2, ended.err
    *_, error, remedy = ended.err.splitlines()
    assert error.startswith("error: a process that loads images died: DataLoader worker")
    assert "--resume" in remedy and "Traceback" not in ended.err
    (ended,) = start(1, "command_line", *command, "--resume").end()
    assert ended.code == 0 and "resumed at step 1" in ended.err, ended.err
    require_same_end(straight, run)


def test_an_image_that_goes_missing_and_comes_back(
    tmp_path: Path, arguments: list[str], start: Start, straight: Run, tiny_digits: Path
) -> None:
    """What was done before is saved, even without save_every_steps."""
    data = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    run = Run(tmp_path / "run")
    command = [*arguments, "save_every_steps=1000", "cache_images=0", "--data", data, "--output", run.output]
    go_on = tmp_path / "go on"
    group = start(1, "held_after_step", 1, go_on, "command_line", *command)
    (process,) = group.processes
    wait_for(lambda: bool(run.records("train")), process.is_alive)
    (data / "train").rename(data / "gone")
    go_on.touch()
    (ended,) = group.end()
    assert ended.code == 2, ended.err
    *_, error, remedy = ended.err.splitlines()
    assert "train/0" in error and error.startswith("error: ") and remedy.startswith("help: ")
    step = read_checkpoint(run.state_file)[1]["position"]["step"]
    assert step >= 1
    (data / "gone").rename(data / "train")
    (ended,) = start(1, "command_line", *command, "--resume").end()
    assert ended.code == 0 and f"resumed at step {step}" in ended.err, ended.err
    require_same_end(straight, run)


def test_a_full_disk(tmp_path: Path, arguments: list[str], start: Start, straight: Run) -> None:
    """Checkpoints fit, the larger training state does not: one line says so, and more room is all it needs."""
    run = Run(tmp_path / "run")
    size = straight.last.stat().st_size
    assert size * 1.5 < straight.state_file.stat().st_size
    command = [*arguments, "--output", run.output]
    (ended,) = start(1, "with_full_disk", size * 1.2 / 2**20, *command).end()
    assert ended.code == 2, ended.err
    *_, error, remedy = ended.err.splitlines()
    assert error.startswith(f"error: {run.state_file}: cannot be written (")
    assert "disk's space" in remedy and "Traceback" not in ended.err
    assert not run.state_file.exists() and not list(run.output.glob(".*tmp*"))
    (ended,) = start(1, "command_line", *command, "--resume").end()
    assert ended.code == 0, ended.err
    require_same_end(straight, run)


@pytest.mark.parametrize(
    "redirection",
    {
        "a reader that leaves": "2>&1 | head -1",
        "a full disk": ">/dev/full 2>&1",
        "no streams at all": ">&- 2>&-",
    }.items(),
    ids=lambda item: item[0],
)
def test_output_that_nobody_takes_is_dropped(
    tmp_path: Path, arguments: list[str], redirection: tuple[str, str]
) -> None:
    run = Run(tmp_path / "run")
    command = [sys.executable, "-m", "paqdetr", *arguments, "epochs=1", "workers=0", "--output", str(run.output)]
    shell = f"{shlex.join(command)} {redirection[1]}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert run.finished and run.state_file.is_file() and done.stdout.count("\n") <= 1


def test_a_process_whose_partner_dies(tmp_path: Path, arguments: list[str], start: Start) -> None:
    run = Run(tmp_path / "run")
    go_on = tmp_path / "go on"
    group = start(2, "held_after_step", 1, go_on, "command_line", *arguments, "workers=0", "--output", run.output)
    wait_for(lambda: bool(run.records("train")), group.processes[0].is_alive)
    group.processes[1].kill()
    go_on.touch()
    survivor, _ = group.end()
    assert survivor.code == 2 and "Traceback" not in survivor.err, survivor.err
    *_, error, remedy = survivor.err.splitlines()
    assert error.startswith("error: another process of this command has ended or cannot be reached (")
    assert "gloo" not in error and "--resume" in remedy


SPAWNING = """
import multiprocessing, sys
import paqdetr
from paqdetr.data.digits import make_digits

multiprocessing.set_start_method("spawn", force=True)
what, data, output = sys.argv[1:]
if what == "digits":
    make_digits(output, size=64, train=2, val=1, test=1, workers=2)
else:
    paqdetr.train("paq_dino_nano", data=data, output=output, device="cpu", image_size=64, workers=1)
"""


@pytest.mark.parametrize("what", ["digits", "train"])
def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path, tiny_digits: Path, what: str) -> None:
    """Every process that is spawned runs the script again."""
    script = tmp_path / "script.py"
    script.write_text(SPAWNING)
    command = [sys.executable, str(script), what, str(tiny_digits), str(tmp_path / "output")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("paqdetr.errors.") and "if __name__ == '__main__':" in last, done.stderr


def starts(run: Run) -> int:
    """How often the run was started or resumed, counting what was lost with all it had done."""
    return len(json.loads(run.environment_file.read_text())) if run.environment_file.is_file() else 0


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, arguments: list[str], start: Start, straight: Run) -> None:
    """Again and again, whatever it is doing, until it is through."""
    run, moments = Run(tmp_path / "run"), random.Random(0)
    kills = 0
    for attempt in itertools.count():  # given more time each, so that it gets through on any machine
        before = starts(run)
        group = start(1, "command_line", *arguments, "--output", run.output, "--resume")
        (process,) = group.processes
        wait_for(lambda before=before: starts(run) > before, process.is_alive)
        process.join(moments.uniform(0, 0.1 * attempt))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        (ended,) = group.end()
        assert ended.code in (0, -signal.SIGKILL), ended.err
        if ended.code == 0:
            break
    assert kills > 3
    require_same_end(straight, run)
