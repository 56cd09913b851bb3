"""A queue that is killed in the middle of a run loses none, repeats none, and ends with the same table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from paqdetr.cli import run as paqdetr
from paqdetr.errors import ConfigError
from paqdetr.runs import Run
from paqdetr.study.measure import Job
from paqdetr.study.measure import main as measure_main
from paqdetr.study.queue import Done, Ended, QueueEvents, last_words, run_queue
from paqdetr.study.report import study_report
from paqdetr.study.results import RunResult, read_result, read_results
from paqdetr.study.runs import Places, PlannedRun, RunKey, plan_runs
from paqdetr.study.spec import Study, load_study

MODULE = "paqdetr.study.queue"


@pytest.fixture
def file(tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any]) -> Path:
    """Two variants on digits, 24 steps in 12 epochs, evaluated twice."""
    values = {
        "name": "tiny",
        "base": "paq_dino_nano",
        "settings": tiny_settings,
        "seeds": [0],
        "threads": 1,
        "data": {"digits": {"folder": tiny_digits.name, "steps": 24, "evaluations": 2}},
        "variants": {"baseline": {}, "other": {"settings": {"loss.gamma": 0.2}}},
        "claims": {"same": {"variant": "other"}},
        "evaluate": {"replicates": 50},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def planned(file: Path, output: Path, root: Path) -> tuple[Study, list[PlannedRun], Places]:
    """The study, its runs and where they lie."""
    study, places = load_study(file), Places(output)
    return study, plan_runs(study, file=file, places=places, root=root), places


class Children:
    """Stands for the processes of a queue: notes what is started and leaves behind what they would."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.started: list[str] = []
        self.ends: dict[str, int] = {}
        self.inside: Callable[[str], object] = lambda name: None

    def __call__(self, arguments: list[str], *, log: Path, **rest: Any) -> Ended:
        step = "measure" if arguments[0] == "paqdetr.study.measure" else "train"
        name = f"{step} {log.parent.name} {log.stem}"
        self.started.append(name)
        self.inside(name)
        code = self.ends.get(name, 0)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("error: loss is NaN\nhelp: lower lr\n" if code == 2 else "", encoding="utf-8")
        if code == 0:
            self._leave(step, arguments)
        return Ended(code, 1.0, 0.5)

    def _leave(self, step: str, arguments: list[str]) -> None:
        if step == "train":
            run = Run(Path(arguments[arguments.index("--output") + 1]))
            run.output.mkdir(parents=True, exist_ok=True)
            run.append({"kind": "finished"})
        else:
            job = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
            found = Job.from_json(job)
            figures = {name: {"AP": 0.5, "AP_nms": 0.5} for name in found.measure["checkpoints"]}
            result = RunResult(
                found.key,
                None,
                found.settings,
                measure=found.measure,
                images={"count": 4, "hash": "a"},
                figures=figures,
                cost={"seconds": 1.0, "step_seconds": 0.5, "gflops": 1.0},
            )
            Path(job["result"]).write_text(result.to_text(), encoding="utf-8")


@pytest.fixture
def queue(
    file: Path, tmp_path: Path, tiny_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Children, Callable[..., Done]]:
    """The queue without its processes: what was started, and a function that runs it."""
    children = Children(Places(tmp_path / "out"))
    monkeypatch.setattr(f"{MODULE}.run_child", children)
    monkeypatch.setattr(f"{MODULE}._WAIT", 0.01)

    def go(**rest: Any) -> Done:
        study, runs, places = planned(file, tmp_path / "out", tiny_digits.parent)
        return run_queue(study, runs, places, **rest)

    return children, go


Queue = tuple[Children, Callable[..., Done]]
ALL = [f"{step} {variant} seed0" for variant in ("baseline", "other") for step in ("train", "measure")]


def test_what_is_there_is_not_made_again(queue: Queue) -> None:
    children, go = queue
    assert go().trained == 2 and children.started == ALL
    done = go()
    assert (done.skipped, done.trained, done.measured) == (2, 0, 0) and children.started == ALL


def test_a_new_measurement_needs_no_new_training(queue: Queue, file: Path) -> None:
    children, go = queue
    go()
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(values | {"evaluate": {"replicates": 60}}), encoding="utf-8")
    children.started.clear()
    assert go().measured == 2 and children.started == ["measure baseline seed0", "measure other seed0"]


def test_a_failed_run_is_kept_with_its_reason_and_the_others_go_on(queue: Queue, file: Path) -> None:
    children, go = queue
    children.ends["train baseline seed0"] = 2
    done = go()
    assert [str(run.key) for run in done.failed] == ["digits, baseline, seed 0"] and done.trained == 1
    result = read_result(children.places.result(done.failed[0].key))
    assert result is not None and result.failed == "training: error: loss is NaN"
    report = study_report(load_study(file), read_results(children.places.results), command="x")
    assert [row["state"] for row in report.tables["runs"].rows] == ["training: error: loss is NaN", "done"]
    # Not tried again unasked: it would fail again.
    children.started.clear()
    assert len(go().failed) == 1 and children.started == []
    children.ends.clear()
    assert go(retry=True).failed == [] and children.started == ALL[:2]


def test_a_measurement_that_fails_leaves_the_result_that_is_there(queue: Queue, file: Path) -> None:
    children, go = queue
    go()
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(values | {"evaluate": {"replicates": 60}}), encoding="utf-8")
    children.ends["measure baseline seed0"] = 2
    done = go()
    assert [run.key.variant for run in done.failed] == ["baseline"] and done.measured == 1
    kept = read_result(children.places.result(done.failed[0].key))
    assert kept is not None and kept.failed is None and kept.measure["replicates"] == 50
    children.ends.clear()
    assert go().measured == 1  # and is measured as soon as that is possible, unasked


def test_a_retry_that_is_interrupted_goes_on_unasked(queue: Queue) -> None:
    children, go = queue
    children.ends["train baseline seed0"] = 2
    go()
    children.ends["train baseline seed0"] = 143
    with pytest.raises(ConfigError, match="stopped from outside"):
        go(retry=True)
    children.ends.clear()
    done = go()
    assert done.failed == [] and done.trained == 1


def test_a_run_that_failed_can_be_mended_by_other_settings(queue: Queue, file: Path) -> None:
    children, go = queue
    children.ends["train other seed0"] = 2
    go()
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values["variants"]["other"]["settings"]["loss.gamma"] = 0.3
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    children.ends.clear()
    done = go(retry=True)
    assert done.failed == [] and done.trained == 1


def test_results_of_other_images_are_refused(queue: Queue, file: Path) -> None:
    children, go = queue
    go()
    for name in ("baseline", "other"):
        path = children.places.result(RunKey("digits", name, 0))
        source = json.loads(children.places.source(RunKey("digits", name, 0)).read_text())
        assert source["folder"] and source["fold"] is None
        whole = json.loads(path.read_text())
        whole["provenance"] = {"source": source | {"fold": 1}}
        path.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="was made of data with fold=1, the study now says None"):
        go()


def test_a_result_at_the_place_of_another_run_is_refused(queue: Queue) -> None:
    children, go = queue
    go()
    moved = children.places.result(RunKey("digits", "other", 0))
    moved.write_text(children.places.result(RunKey("digits", "baseline", 0)).read_text())
    with pytest.raises(ConfigError, match=r"other/seed0\.json: is the result of digits, baseline, seed 0"):
        go()


def test_a_child_that_somebody_stops_stops_the_queue(queue: Queue) -> None:
    children, go = queue
    children.ends["train baseline seed0"] = 143
    with pytest.raises(ConfigError, match="stopped from outside"):
        go()
    assert not list(children.places.results.rglob("*.json"))


def test_two_queues_share_the_runs(queue: Queue) -> None:
    """While one trains the baseline, another does the other variant, then waits for the first."""
    children, go = queue
    second: list[Done] = []

    class Waits(QueueEvents):
        def on_wait(self, planned: PlannedRun) -> None:
            raise StopIteration(str(planned.key))

    def inside(name: str) -> None:
        if name == "train baseline seed0":
            children.inside = lambda name: None
            with pytest.raises(StopIteration, match="baseline"):
                second.append(go(events=Waits()))

    children.inside = inside
    first = go()
    assert (first.trained, first.skipped) == (1, 1)
    assert children.started == ["train baseline seed0", *ALL[2:], "measure baseline seed0"]


@pytest.mark.integration
def test_a_run_that_somebody_trains_by_hand_is_waited_for(
    queue: Queue, file: Path, tmp_path: Path, tiny_digits: Path
) -> None:
    children, go = queue
    _, runs, places = planned(file, tmp_path / "out", tiny_digits.parent)
    run = places.run(runs[0].key)
    run.output.mkdir(parents=True)
    run.write_config(runs[0].config)
    code = (
        "import sys; from pathlib import Path; from paqdetr.runs import Run\n"
        "held = Run(Path(sys.argv[1])).hold(); print(); input()"
    )
    command = [sys.executable, "-c", code, str(run.output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline()
        waited: list[PlannedRun] = []

        class Waits(QueueEvents):
            def on_wait(self, planned: PlannedRun) -> None:
                waited.append(planned)
                other.communicate("")  # it ends

        assert go(events=Waits()).trained == 2
    assert [run.key.variant for run in waited] == ["baseline"] and children.started == [*ALL[2:], *ALL[:2]]


def test_changed_settings_are_refused_before_anything_runs(queue: Queue, file: Path) -> None:
    children, go = queue
    go()
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values["variants"]["other"]["settings"]["loss.gamma"] = 0.3
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    children.started.clear()
    with pytest.raises(
        ConfigError, match=r"other/seed0\.json: was made with loss\.gamma=0\.2, the study now says 0\.3"
    ):
        go()
    assert children.started == []


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    older = "error: of another day\n"
    log.write_text(older + "step 1\nerror: no space\nhelp: make some\n")
    assert last_words(log, Ended(2, 1.0, None, len(older))) == "error: no space"
    log.write_text(older + "Traceback\nKeyError: 1\n")
    assert last_words(log, Ended(1, 1.0, None, len(older))) == "KeyError: 1"
    for code in (-9, 137):  # of the process itself, and of one of several
        assert last_words(log, Ended(code, 1.0, None)) == "killed by SIGKILL: memory may have run out"
    assert last_words(tmp_path / "none.log", Ended(1, 1.0, None)) == "exit code 1"


# ------------------------------------------------------------------------------------------ real processes


def table(output: Path, file: Path) -> Any:
    """Everything the report says, but for times."""
    report = study_report(load_study(file), read_results(output / "results"), command="x").to_json()
    del report["facts"], report["tables"]["cost"]
    return report


def in_this_process(arguments: list[str], **rest: Any) -> Ended:
    """What a child would do, without the seconds that it takes to start one."""
    if arguments[0] == "paqdetr.study.measure":
        return Ended(measure_main(arguments[1]), 1.0, 1.0)
    return Ended(paqdetr(arguments[1:]), 1.0, 1.0)


@pytest.mark.integration
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.usefixtures("no_pictures", "one_thread")
def test_killed_in_the_middle_of_a_run(
    tmp_path: Path,
    file: Path,
    tiny_digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_children: Callable[..., list[int]],
) -> None:
    """The power goes while the second of two runs trains; then a terminal is closed; then it comes to its end."""
    root = tiny_digits.parent
    study, runs, places = planned(file, tmp_path / "straight", root)
    with monkeypatch.context() as patch:
        patch.setattr(f"{MODULE}.run_child", in_this_process)
        assert run_queue(study, runs, places).trained == 2

    # The first run was done before.
    output = tmp_path / "out"
    for kind in ("runs", "results"):
        name = "seed0" if kind == "runs" else "seed0.json"
        (output / kind / "digits/baseline").mkdir(parents=True)
        copy = shutil.copytree if kind == "runs" else shutil.copyfile
        copy(places.output / kind / "digits/baseline" / name, output / kind / "digits/baseline" / name)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}

    command = [sys.executable, "-m", "paqdetr", "study", str(file), "--output", str(output)]
    command += ["--data-root", str(root), "--resume"]
    run = Run(output / "runs/digits/other/seed0")
    process = start_until(command, run, step=5)
    kill_children(process.pid)
    process.kill()
    process.wait()
    assert not run.finished and run.state_file.is_file()

    process = start_until(command, run, step=13)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 143 and "--resume" in said and not run.finished
    assert not read_result(output / "results/digits/other/seed0.json")

    study, runs, places = planned(file, output, root)
    with monkeypatch.context() as patch:
        patch.setattr(f"{MODULE}.run_child", in_this_process)
        done = run_queue(study, runs, places)
    assert (done.skipped, done.trained, done.measured) == (1, 1, 1)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert table(output, file) == table(tmp_path / "straight", file)
    mine, its = (read_result(p.result(runs[1].key)) for p in (places, Places(tmp_path / "straight")))
    assert mine is not None and its is not None and mine.figures == its.figures and mine.curve == its.curve
    starts = [record["step"] for record in run.records("start")]
    assert len(starts) == 3 and starts[0] == 0 < starts[1] < starts[2]
    # One session was killed before it was counted: its cost is not known, and is not guessed.
    assert mine.cost["cpu_seconds"] is None
    assert len((run.output / "sessions.jsonl").read_text().splitlines()) == 2


def start_until(command: list[str], run: Run, *, step: int) -> subprocess.Popen[str]:
    """Start a queue and wait until the run in hand has come to this step."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 300
    while not any(record.get("step", 0) >= step for record in run.records("train")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.integration
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.usefixtures("no_pictures", "one_thread")
def test_a_cluster_of_two_workers_of_which_one_is_killed(
    tmp_path: Path,
    file: Path,
    tiny_digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_children: Callable[..., list[int]],
) -> None:
    """`study --ray`: the same results as one run after the other, though a worker dies while its run trains."""
    pytest.importorskip("ray")
    root = tiny_digits.parent
    study, runs, places = planned(file, tmp_path / "straight", root)
    with monkeypatch.context() as patch:
        patch.setattr(f"{MODULE}.run_child", in_this_process)
        assert run_queue(study, runs, places).trained == 2
    command = [sys.executable, "-m", "paqdetr", "study", str(file), "--output", str(tmp_path / "out")]
    command += ["--data-root", str(root), "--ray", "local"]
    process = start_until(command, Run(tmp_path / "out/runs/digits/other/seed0"), step=3)
    assert kill_children(process.pid, having="run_queue")
    _, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    assert table(tmp_path / "out", file) == table(tmp_path / "straight", file)
    for planned_run in runs:
        [mine, its] = [read_result(p.result(planned_run.key)) for p in (Places(tmp_path / "out"), places)]
        assert mine is not None and its is not None and mine.figures == its.figures and mine.curve == its.curve
