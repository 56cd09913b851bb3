"""`paqdetr study`: what it lists, prints and refuses. Its queue is tested in tests/study/test_queue.py."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from paqdetr.cli import run
from paqdetr.study.results import RunResult
from paqdetr.study.runs import RunKey

VALUES: dict[str, Any] = {
    "name": "small",
    "base": "dino_nano",
    "seeds": [0, 1],
    "steps": 100,
    "data": {"digits": {"make": {"train": 40, "val": 1, "test": 1}}},
    "variants": {"baseline": {}, "new": {"settings": {"loss.assigner": "quality_aware"}}},
    "claims": {"better": {"text": "New is better.", "variant": "new"}},
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    return file


def result(output: Path, variant: str, seed: int, ap: float) -> None:
    """Leave a result, without resamples."""
    found = RunResult(
        RunKey("digits", variant, seed),
        None,
        {},
        images={"count": 10, "hash": "a"},
        figures={"last": {"AP": ap, "AP_nms": ap + 0.01}},
        cost={"seconds": 60.0, "step_seconds": 0.5, "gflops": 1.0},
    )
    file = output / "results" / f"{found.key.path}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(found.to_text())


def test_plan_lists_the_runs_and_makes_nothing(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert run(["study", str(study), "--output", str(output), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "4 runs" in said and "0 of 2" in said and "left: 4 runs whose time is not known yet" in said
    assert not output.exists()


def test_only_some_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {**VALUES["data"], "other": {"folder": "missing"}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(VALUES | {"data": data}))
    start = ["study", str(tmp_path / "two.yaml"), "--output", str(tmp_path / "out"), "--plan"]
    assert run(start) != 0  # the folder is missing
    capsys.readouterr()
    assert run([*start, "--only", "digits"]) == 0
    assert "4 runs" in capsys.readouterr().out
    assert run([*start, "--only", "digits", "--only", "digit"]) != 0
    assert "there is no data set 'digit'" in (said := capsys.readouterr().err) and "choose from digits, other" in said


def test_commands_can_be_run_by_hand(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert run(["study", str(study), "--output", str(output), "--commands", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (output / "runs").exists()
    words = shlex.split(lines[1])
    assert (Path(words[words.index("--data") + 1]) / "train").is_dir()
    assert words[:5] == ["python", "-m", "paqdetr", "train", "dino_nano"]
    assert {"loss.assigner=quality_aware", "seed=0", "max_steps=100", "epochs=10"} <= set(words)
    assert str(output / "runs/digits/new/seed0") in words


def test_the_report_of_what_is_there(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    arguments = ["study", str(study), "--output", str(output), "--report-only"]
    assert run(arguments) == 2 and "there are no results yet" in capsys.readouterr().err
    for seed in (0, 1):
        result(output, "baseline", seed, 0.4 + seed / 1000)
        result(output, "new", seed, 0.5 + seed / 500)
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert "New is better." in said and "holds" in said and "+0.101" in said
    assert (output / "report" / "index.html").is_file() and (output / "study.md").is_file()
    root = tmp_path / "all my data"
    assert run([*arguments, "--data-root", str(root)]) == 0  # the page is replaced
    # The command that the report names finds the data again.
    command = json.loads((output / "study.json").read_text())["facts"]["command"]
    assert shlex.split(command)[-3:] == ["--data-root", str(root), "--resume"]


def test_a_part_of_the_data_leaves_the_verdicts_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**VALUES["data"], "other": {"make": {"train": 41, "val": 1, "test": 1}}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(VALUES | {"data": data}))
    start = ["study", str(tmp_path / "two.yaml"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("paqdetr.study.queue.run_queue", lambda *_, **__: SimpleNamespace(failed=[]))
    monkeypatch.setattr("paqdetr.study.datasets.prepare", lambda *_, **__: None)
    for seed in (0, 1):
        result(tmp_path / "out", "baseline", seed, 0.4 + seed / 1000)
        result(tmp_path / "out", "new", seed, 0.5 + seed / 500)
    tables = []
    for more in (["--only", "digits"], ["--report-only"]):
        assert run([*start, *more]) == 0
        tables.append(json.loads((tmp_path / "out" / "study.json").read_text())["verdicts"])
    assert tables[0] == tables[1] and {row["data"] for row in tables[1]} == {"digits", "other"}
    assert run([*start, "--report-only", "--only", "digits"]) == 2
    assert "a report is of all that is there" in capsys.readouterr().err
    # Results of data sets that are not run may be of another file: they are left out, and named.
    for file in (tmp_path / "out" / "results" / "digits" / "new").iterdir():
        file.write_text(file.read_text().replace('"measure":{}', '"measure":{"split":"val"}'))
    assert run([*start, "--resume", "--only", "other"]) == 0
    said = capsys.readouterr().err
    assert said.count("left out of the report: digits, new, seed") == 2 and "was measured with split='val'" in said


def test_failed_runs_are_run_again_when_asked(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, asked = tmp_path / "out", []

    def queue(loaded: Any, runs: list[Any], *_: Any, retry: bool, **__: Any) -> Any:
        asked.append(retry)
        return SimpleNamespace(failed=[] if retry else runs[:1])

    monkeypatch.setattr("paqdetr.study.queue.run_queue", queue)
    monkeypatch.setattr("paqdetr.study.datasets.prepare", lambda *_, **__: None)
    result(output, "baseline", 0, 0.4)
    arguments = ["study", str(study), "--output", str(output)]
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert "failed: digits, baseline, seed 0" in said and "continue with --resume --retry" in said
    assert run([*arguments, "--resume", "--retry"]) == 0 and asked == [False, True]


def test_mistakes(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "study.yaml").write_text(study.read_text(encoding="utf-8"))
    assert run(["study", str(study), "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert "there is a study already" in said and "--resume" in said
    assert run(["study", str(tmp_path / "no.yaml"), "--output", str(output)]) == 2
    assert "no such study" in capsys.readouterr().err
    assert run(["study", str(study), "--output", str(output), "--resume", "--device", "cuda:99"]) == 2
    assert "device 'cuda:99': it does not work here" in capsys.readouterr().err and not (output / "runs").exists()
    study.write_text(yaml.safe_dump(VALUES | {"data": {"fish": {"folder": "fish"}}}), encoding="utf-8")
    assert run(["study", str(study), "--output", str(output), "--resume"]) == 2
    assert "no such data folder" in capsys.readouterr().err
