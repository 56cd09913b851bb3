from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paqdetr.config import load_config
from paqdetr.errors import ConfigError, StorageError
from paqdetr.runs import Record, Run, best_evaluation

CONFIG = load_config("paq_dino_nano", {"epochs": 3})


def changed(**settings: Any) -> Any:
    return load_config("paq_dino_nano", {"epochs": 3, **settings})


def begun(output: Path) -> Run:
    """A run that has trained a little, and saved it."""
    run = Run(output)
    run.write_config(CONFIG)
    run.append({"kind": "train", "step": 1})
    run.state_file.touch()
    return run


def test_a_new_run_has_its_config_and_nothing_else(tmp_path: Path) -> None:
    run = Run(tmp_path / "a" / "b")
    run.require_place(resume=False)
    assert not run.output.exists()
    run.write_config(CONFIG)
    assert [file.name for file in run.output.iterdir()] == ["config.yaml"]
    assert load_config(run.config_file) == CONFIG
    assert run.records() == [] and run.metrics == {} and not run.finished


def test_an_empty_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    Run(tmp_path).require_place(resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_has_kept_nothing_is_in_nobody_s_way(tmp_path: Path, resume: bool) -> None:
    """It has failed before a state was saved: the corrected command starts it anew."""
    run = Run(tmp_path / "run")
    run.write_config(CONFIG)
    run.append({"kind": "start", "step": 0})
    run.append({"kind": "train", "step": 1})
    corrected = changed(lr=1e-5)
    assert run.empty
    run.require_place(resume=resume)
    run.require_settings(corrected)
    run.write_config(corrected)
    assert load_config(run.config_file) == corrected


@pytest.mark.parametrize("kind", ["eval", "finished"])
def test_a_run_whose_weights_were_moved_away_is_in_the_way(tmp_path: Path, kind: str) -> None:
    run = Run(tmp_path / "run")
    run.write_config(CONFIG)
    run.append({"kind": kind, "step": 10})
    with pytest.raises(ConfigError, match="there is a run already"):
        run.require_place(resume=False)


@pytest.mark.parametrize("kept", ["training_state.safetensors", "last.safetensors", "best.safetensors"])
def test_a_run_that_has_kept_something_is_in_the_way(tmp_path: Path, kept: str) -> None:
    run = Run(tmp_path / "run")
    run.write_config(CONFIG)
    (run.output / kept).touch()
    with pytest.raises(ConfigError, match="there is a run already"):
        run.require_place(resume=False)
    run.write_config(changed(lr=1e-5))
    assert load_config(run.config_file) == CONFIG


def test_no_record_has_a_number_that_json_has_not(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append({"kind": "train", "loss": float("inf"), "nested": [{"AP": float("nan")}]})
    assert run.metrics_file.read_text() == '{"kind": "train", "loss": null, "nested": [{"AP": null}]}\n'


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_or_a_foreign_folder_in_the_way(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "best.safetensors").write_text("mine")
    for name, words in (("file", "a file is in the way"), ("folder", "holds other files")):
        with pytest.raises(ConfigError, match=words) as caught:
            Run(tmp_path / name).require_place(resume=resume)
        assert name in caught.value.message and "--output" in caught.value.remedy
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "folder" / "best.safetensors").read_text() == "mine"
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_a_run_is_not_begun_twice(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with pytest.raises(ConfigError, match="there is a run already") as caught:
        run.require_place(resume=False)
    assert "--resume" in caught.value.remedy
    run.require_place(resume=True)


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("epochs", 4, "3"),
        ("model.num_patterns", 32, "64"),
        ("augment.scale", (0.5, 1.0), "[0.6, 1.0]"),
        ("seed", 1, "0"),
    ],
)
def test_changed_settings_are_named(tmp_path: Path, key: str, value: Any, old: str) -> None:
    run = begun(tmp_path / "run")
    before = run.config_file.read_text()
    with pytest.raises(ConfigError) as caught:
        run.require_settings(changed(**{key: value}))
    assert f"{key}={old}" in caught.value.message and str(run.config_file) in caught.value.message
    assert run.config_file.read_text() == before


def test_a_run_is_known_by_its_folder_settings_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path / "run")
    assert Run.at(run.output) == run  # the start was stopped just then
    assert Run.at(run.config_file) is None  # as of any file of this name
    run.add_environment({"data": "/data"})
    assert all(Run.at(path) == run for path in (run.output, str(run.output), run.config_file, run.last, run.best))
    assert run.data == "/data"
    monkeypatch.chdir(run.output)  # where no other name means the run
    assert Run.at("dino_nano") is Run.at("mine.yaml") is None
    for damaged in ("[1]", "{}", "", "[{}]"):
        run.environment_file.write_text(damaged)
        assert run.data is None


def test_the_command_that_resumes_with_the_run_s_own_settings(tmp_path: Path) -> None:
    run = begun(tmp_path / "my run")
    with pytest.raises(ConfigError) as caught:
        run.require_settings(changed(seed=1, epochs=4, lr=0.5))
    assert all(f"{key}=" in caught.value.message for key in ("seed", "epochs", "lr"))
    further, command = caught.value.remedy.split(": ")
    assert further.startswith(f"to train its weights further, start a new run with init={run.output}; its own settings")
    assert shlex.split(command) == ["paqdetr", "train", str(run.output), "--resume", "--data", "DIR"]
    run.require_settings(load_config(run.config_file))


def test_how_images_are_loaded_may_change(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.require_settings(changed(workers=3, cache_images=0.5))


def test_what_changes_nothing_may_change(tmp_path: Path) -> None:
    begun(tmp_path / "run").require_settings(
        changed(**{"model.roi_samples": 64})
    )  # without the heads that it belongs to
    with pytest.raises(ConfigError, match="auxiliary_heads"):
        begun(tmp_path / "other").require_settings(changed(**{"model.auxiliary_heads": ("atss",)}))


def test_a_config_that_is_there_is_kept(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    text = "# my notes\n" + run.config_file.read_text()
    run.config_file.write_text(text)
    run.write_config(CONFIG)
    assert run.config_file.read_text() == text


DAMAGED = {
    "no text": b"\xff\xfe\x00\x9c\n",
    "no json": b'{"kind": "train", "st\n',
    "a number": b"17\n",
    "a list": b'["kind"]\n',
    "null": b"null\n",
    "no end": b'{"kind": "train"',
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_that_only_people_read_are_in_nobody_s_way(tmp_path: Path, damage: bytes) -> None:
    run = begun(tmp_path / "run")
    before = run.records()
    with run.metrics_file.open("ab") as file:
        file.write(damage)
    run.environment_file.write_bytes(damage)
    run.truncate_metrics(10**9)
    run.append({"kind": "eval", "AP": 0.5})
    run.add_environment({"command": "a"})
    assert run.records() == [*before, {"kind": "eval", "AP": 0.5}] and run.metrics["AP"] == 0.5
    assert json.loads(run.environment_file.read_text())[-1] == {"command": "a"}


def test_records_skip_a_line_cut_short(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append({"kind": "train", "step": 1})
    run.append({"kind": "eval", "step": 1, "AP": 0.5, "epoch": 1})
    run.append({"kind": "eval", "step": 2, "AP": None, "epoch": 2})
    size = run.metrics_file.stat().st_size
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "eval", "AP": 0.9')
    assert [record["step"] for record in run.records()] == [1, 1, 2]
    assert [record["step"] for record in run.records("eval")] == [1, 2]
    assert run.metrics["epoch"] == 1
    run.truncate_metrics(size)
    assert run.metrics_file.read_text().count("\n") == 3 and run.metrics_file.stat().st_size == size
    run.truncate_metrics(10**9)  # nothing to forget
    assert run.metrics_file.stat().st_size == size


def test_the_first_of_equal_figures_is_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for epoch, ap in ((1, 0.0), (2, 0.3), (3, 0.3)):
        run.append({"kind": "eval", "epoch": epoch, "AP": ap})
    assert run.metrics["epoch"] == 2  # as best.safetensors, which only a better one replaces


def test_records_that_cannot_be_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.metrics_file.mkdir()
    for write in (lambda: run.append({"kind": "train"}), run.flush_metrics, lambda: run.truncate_metrics(0)):
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"):
            write()


def test_records_that_somebody_has_removed_end_no_training(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.flush_metrics() == 0
    run.append({"kind": "train", "step": 7})
    assert run.flush_metrics() == run.metrics_file.stat().st_size and len(run.records()) == 1


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    for name in (".last.safetensors.4711.tmp", ".tmpA1b2C3", ".notes", ".tmp", "mine.tmp"):
        (run.output / name).write_text("x")
    (run.output / ".paqdetr-4711.tmp").mkdir()
    (run.output / ".paqdetr-4711.tmp" / "last.safetensors").write_text("half")
    run.remove_leftovers()
    left = sorted(path.name for path in run.output.iterdir())
    assert left == [".notes", ".tmp", "config.yaml", "metrics.jsonl", "mine.tmp", run.state_file.name]


def test_starts_are_noted_one_after_the_other(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.add_environment({"command": "a"})
    run.add_environment({"command": "b"})
    assert json.loads(run.environment_file.read_text()) == [{"command": "a"}, {"command": "b"}]


HOLD = """
import sys, time
from pathlib import Path
from paqdetr.runs import Run
held = Run(Path(sys.argv[1])).hold()
print("held", flush=True)
time.sleep(120)
"""


@pytest.mark.integration
@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps nobody out")
def test_one_training_at_a_time(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.output)], stdout=-1, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process is training there"):
            run.hold()
        other.kill()
    held = run.hold()  # nothing is left of one that was killed
    assert held is not None
    held.close()


RACE = """
import json, multiprocessing, sys
from pathlib import Path
from paqdetr.runs import Run
from paqdetr.errors import ConfigError

def begin(barrier, folder, answers):
    said = []
    for number in range(1000):
        run = Run(Path(folder) / str(number))
        barrier.wait()
        try:
            held = run.begin(resume=number % 2 == 0)
            run.config_file.touch()
            run.state_file.touch()
            said.append("held")
        except ConfigError as error:
            held = None
            said.append(error.message.rpartition(": ")[2])
        if number % 3:  # else whoever comes a little later finds the folder free again
            barrier.wait()
        if held is not None:
            held.close()
        if not number % 3:
            barrier.wait()
    answers.put(said)

context = multiprocessing.get_context("fork")
barrier, answers = context.Barrier(2), context.Queue()
processes = [context.Process(target=begin, args=(barrier, sys.argv[1], answers)) for _ in range(2)]
for process in processes:
    process.start()
print(json.dumps([answers.get() for _ in processes]))
"""


@pytest.mark.integration
@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps nobody out")
def test_exactly_one_of_two_that_start_at_once_holds_the_folder(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RACE, str(tmp_path)], capture_output=True, text=True, check=True)
    one, other = json.loads(done.stdout)
    refused = {"another process is training there", "there is a run already, and nothing is overwritten"}
    for number, pair in enumerate(zip(one, other, strict=True)):
        if number % 3 or number % 2:
            assert sorted(said == "held" for said in pair) == [False, True], (number, pair)
        assert set(pair) <= {"held", *refused}, (number, pair)
    assert any("another process is training there" in pair for pair in zip(one, other, strict=True))


def test_the_best_evaluation_is_of_the_validation_split_that_the_run_has_now() -> None:
    old: list[Record] = [{"kind": "start"}, {"kind": "eval", "epoch": 1, "AP": 0.8}]
    assert best_evaluation(old)["AP"] == 0.8
    resumed: list[Record] = [*old, {"kind": "start", "new_validation": True}]
    assert best_evaluation(resumed) == {}
    later: list[Record] = [
        {"kind": "eval", "epoch": 2, "AP": 0.5},
        {"kind": "start"},
        {"kind": "eval", "epoch": 3, "AP": 0.4},
    ]
    assert best_evaluation([*resumed, *later])["epoch"] == 2
