"""Every verb that writes a file replaces what it wrote itself, and nothing else."""

from __future__ import annotations

import errno
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
from PIL import Image

from paqdetr.cli import run
from paqdetr.outputs import RESULTS, made_by
from paqdetr.runs import Run


@pytest.fixture
def commands(tiny_run: Run, tiny_digits: Path, tmp_path: Path) -> dict[str, list[str]]:
    """The verbs, without the option that says where to write."""
    truth = tiny_digits / "val.json"
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}
        for row in json.loads(truth.read_text())["annotations"]
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    results = ["eval", "--results", str(tmp_path / "results.json"), "--annotations", str(truth)]
    model, data = str(tiny_run.best), str(tiny_digits)
    return {
        "eval": results,
        "eval checkpoint": ["eval", model, "--data", data],
        "eval compare": ["eval", "--compare", *[str(tmp_path / "results.json")] * 2, *results[3:]],
        "check": ["data", "check", data, "--workers", "1"],
        "stats": ["data", "stats", data],
        "preview": ["data", "preview", data, "image_size=64", "batch_size=1", "--batches", "1"],
        "plan": ["plan", "paq_dino_nano", "--data", data, "--device", "cpu"],
        "bench": ["bench", "dino_nano", "--image-size", "64", "--device", "cpu"],
        "convert": ["convert", model, "--from", "paqdetr"],
        "predict": ["predict", model, str(tiny_digits / "test")],
        "analyze": ["analyze", model, "--data", data],
        "data convert": ["data", "convert", data],
    }


FILES = [
    ("eval", "--json", ".json"),
    ("eval checkpoint", "--json", ".json"),
    ("eval checkpoint", "--results-out", ".json"),
    ("eval compare", "--json", ".json"),
    ("check", "--json", ".json"),
    ("stats", "--json", ".json"),
    ("stats", "--output", ".png"),
    ("preview", "--output", ".png"),
    ("plan", "--json", ".json"),
    ("bench", "--json", ".json"),
    ("convert", "--json", ".json"),
    ("convert", "--output", ".safetensors"),
]


def a_file(path: Path, source: Path) -> bytes:
    """Somebody's file of that kind: ground truth, a photograph, weights."""
    if path.suffix == ".json":
        shutil.copy(source / "val.json", path)
    elif path.suffix == ".png":
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_bytes(b"weights")
    return path.read_bytes()


@pytest.mark.parametrize(("verb", "option", "ending"), FILES)
def test_a_file_of_somebody_else_is_kept(
    commands: dict[str, list[str]],
    tiny_digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    option: str,
    ending: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # where stats.png would be
    file = tmp_path / f"mine{ending}"
    before = a_file(file, tiny_digits)
    other = ["--output", "x.safetensors"] if verb == "convert" and option == "--json" else []
    assert run([*commands[verb], *other, option, str(file)]) == 2
    said = capsys.readouterr()
    assert f"{option} {file}: the file exists" in said.err and "--overwrite" in said.err
    assert said.out == ""  # it was found before the work
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"mine{ending}", "results.json"]


@pytest.mark.parametrize(
    ("verb", "options", "makers"),
    [
        ("eval", ["--json", "a.json"], ["paqdetr eval"]),
        ("eval compare", ["--resamples", "100", "--json", "a.json"], ["paqdetr eval"]),
        ("eval checkpoint", ["--json", "a.json", "--results-out", "b.json"], ["paqdetr eval", RESULTS]),
        ("check", ["--json", "a.json"], ["paqdetr data check"]),
        ("stats", ["--json", "a.json", "--output", "b.png"], ["paqdetr data stats"] * 2),
        ("preview", ["--output", "a.png"], ["paqdetr data preview"]),
    ],
)
def test_what_a_verb_wrote_it_replaces(
    commands: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    options: list[str],
    makers: list[str],
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert run([*commands[verb], *options]) == 0
    files = sorted(folder.iterdir())
    assert [made_by(file) for file in files] == makers
    for file in files:
        file.write_bytes(file.read_bytes()[:3000])  # cut short, and still known
    assert run([*commands[verb], *options]) == 0, capsys.readouterr().err
    assert all(file.stat().st_size != 3000 for file in files)
    for file in files:
        file.write_text("mine")
    assert run([*commands[verb], *options]) == 2
    assert run([*commands[verb], *options, "--overwrite"]) == 0
    assert [made_by(file) for file in files] == makers


@pytest.mark.parametrize(
    ("verb", "option"), [("predict", "--output"), ("analyze", "--output"), ("data convert", "DST")]
)
def test_a_folder_with_other_files_is_kept(
    commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, option: str
) -> None:
    folder = tmp_path / "out"
    for name in ("index.html", "predictions.json", "data/notes.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    where = [str(folder), "--to", "yolo"] if option == "DST" else [option, str(folder)]
    assert run([*commands[verb], *where]) == 2
    said = capsys.readouterr()
    assert f"{folder}: the folder holds other files, such as " in said.err and said.out == ""
    assert {path.read_text() for path in folder.rglob("*.*")} == {"mine"}


def test_a_report_with_notes_in_it_is_kept(tmp_path: Path) -> None:
    from paqdetr.errors import ConfigError
    from paqdetr.report.page import require_report_place, write_folder

    page = '<!doctype html><meta name="generator" content="paqdetr analyze 0.1">'
    write_folder(tmp_path / "report", page, [])
    write_folder(tmp_path / "report", page, [])
    for name in ("data/notes.txt", "data/numbers.json", "index.html"):
        (tmp_path / "report" / name).write_text("mine")
        with pytest.raises(ConfigError, match=f"such as {name}"):
            require_report_place(tmp_path / "report")
        (tmp_path / "report" / name).unlink()


def test_an_interrupted_predict_says_what_there_is(
    commands: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from paqdetr.runtime.save import Saver

    add = Saver.add

    def stop(saver: Saver, *given: Any) -> None:
        add(saver, *given)
        if len(list((tmp_path / "out").glob("*.jpg"))) == 4:
            raise KeyboardInterrupt

    arguments = [*commands["predict"], "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "add", stop)
        assert run(arguments) == 130
    assert f"interrupted: what was written is in {tmp_path / 'out'}" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert run(arguments) == 0
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_eval_of_crowded_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """400 objects in one image: COCO's AP looks at 100 detections of them."""
    boxes = [[50 * (n % 20), 50 * (n // 20), 40, 40] for n in range(400)]
    rows = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5} for box in boxes]
    truth = {
        "images": [{"id": 1, "width": 1000, "height": 1000}, {"id": 2, "width": 9, "height": 9}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": n, **row, "area": 1600, "iscrowd": 0} for n, row in enumerate(rows)],
    }
    for name, content in (("gt.json", truth), ("rows.json", rows)):
        (tmp_path / name).write_text(json.dumps(content))
    out, results = tmp_path / "out.json", str(tmp_path / "rows.json")
    where = ["--annotations", str(tmp_path / "gt.json"), "--json", str(out), "--resamples", "100"]
    note = "note: 1 of 2 images have more than 100 boxes of one class (up to 400), and AP counts no more"
    for command in (["eval", "--results", results], ["eval", "--compare", results, results]):
        assert run([*command, *where]) == 0
        said = capsys.readouterr()
        assert note in said.err and "--max-detections" in said.err
        assert json.loads(out.read_text())["max_detections"] == 100
        assert run([*command, *where, "--max-detections", "400"]) == 0
        said = capsys.readouterr()
        assert "note:" not in said.err and "400 detections in place of 100" in " ".join(said.out.split())
        assert json.loads(out.read_text())["max_detections"] == 400


def test_eval_of_a_checkpoint_with_too_few_queries(
    tiny_run: Run, tiny_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    content = json.loads((folder / "val.json").read_text())
    first = content["annotations"][0]
    content["annotations"] += [first | {"id": 1000 + n} for n in range(50)]
    (folder / "val.json").write_text(json.dumps(content))
    out = tmp_path / "found.json"
    arguments = ["eval", str(tiny_run.best), "--data", str(folder), "--max-detections"]
    assert run([*arguments, "100", "--results-out", str(out)]) == 0
    said = capsys.readouterr().err
    assert (
        "note: 1 of 4 images have more than 20 boxes (up to " in said
        and "raise model.num_queries, which is 20, to at least " in said
    )
    assert len(json.loads(out.read_text())) == 4 * 200  # all pairs of a query and a class


def killed(command: list[str], begun: Callable[[], bool]) -> None:
    """Run it as a process, and kill it with SIGKILL once it has begun to write."""
    process = subprocess.Popen(
        [sys.executable, "-m", "paqdetr", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 300
    while not begun():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()


@pytest.mark.integration
def test_a_killed_predict_is_repeated(commands: dict[str, list[str]], tiny_digits: Path, tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.jpg").symlink_to(tiny_digits / "val" / "000000.jpg")
    out = tmp_path / "out"
    command = [*commands["predict"][:2], str(tmp_path), "--output", str(out)]
    killed(command, lambda: len(list(out.glob("*.jpg"))) > 3)
    assert 3 < len(list(out.glob("*.jpg"))) < 300 and not (out / "predictions.json").exists()
    for number in range(5, 300):
        (tmp_path / f"{number}.jpg").unlink()
    assert run(command) == 0
    assert made_by(out / "predictions.json") == RESULTS
    assert not list(out.glob(".*"))  # nothing half-written is left


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_video_that_is_stopped_by_a_signal_plays(
    commands: dict[str, list[str]], tiny_digits: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    from paqdetr.runtime.video import VideoWriter, read_video

    writer = VideoWriter(tmp_path / "clip.mp4")
    with Image.open(tiny_digits / "val" / "000000.jpg") as picture:
        for second in range(3000):
            writer.add(picture, float(second))
    writer.close()
    out, told = tmp_path / "out", tmp_path / "told"
    command = [*commands["predict"][:2], str(tmp_path / "clip.mp4"), "--output", str(out), "--save", "draw,jsonl"]
    with told.open("w") as output:
        process = subprocess.Popen([sys.executable, "-m", "paqdetr", *command], stderr=output)
    end, lines = time.monotonic() + 300, out / "predictions.jsonl"
    while not lines.exists() or lines.read_text().count("\n") < 20:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == code and "interrupted: what was written is in" in told.read_text()
    assert 20 <= len(list(read_video(out / "clip.mp4"))) < 3000


@pytest.mark.integration
@pytest.mark.parametrize("verb", ["make", "convert"])
def test_a_killed_data_verb_is_repeated(tiny_digits: Path, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    small = ["--size", "64", "--val", "1", "--test", "1", "--output", str(out)]
    if verb == "make":
        command = ["data", "make", "digits", "--train", "100000", *small]
        again = ["data", "make", "digits", "--train", "1", *small]
    else:
        source = Path(shutil.copytree(tiny_digits, tmp_path / "source"))
        content = json.loads((source / "train.json").read_text())
        image = content["images"][0]
        content["images"] += [image | {"id": 100 + n, "file_name": f"n{n}.jpg"} for n in range(20000)]
        (source / "train.json").write_text(json.dumps(content))
        for n in range(20000):
            os.link(source / "train" / image["file_name"], source / "train" / f"n{n}.jpg")
        command = again = ["data", "convert", str(source), str(out), "--to", "coco"]
    killed(command, lambda: any(tmp_path.glob(".paqdetr-*/out/*/*.jpg")))
    assert not out.exists() and len(list(tmp_path.glob(".paqdetr-*"))) == 1
    assert run(again) == 0
    assert out.is_dir() and not list(tmp_path.glob(".paqdetr-*"))


def test_a_disk_error_that_names_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a write, wherever it is: the disk is the user's affair."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("paqdetr.data.digits.make_digits", full)
    assert run(["data", "make", "digits", "--output", str(tmp_path / "d")]) == 2
    assert "error: a file cannot be written (No space left on device)" in capsys.readouterr().err
