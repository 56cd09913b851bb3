"""Every verb once as a process, and what each prints, in this process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from paqdetr import __version__, list_models, list_recipes
from paqdetr.cli import run
from paqdetr.cli.console import results, table
from paqdetr.config import load_config
from paqdetr.data.check import check_dataset
from paqdetr.errors import ConfigError
from paqdetr.runs import Run
from paqdetr.runtime.tiles import Tiles
from paqdetr.structures import OperatingPoint
from paqdetr.values import environment_integer


def paqdetr(*arguments: object, module: str = "paqdetr") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.integration
def test_help_is_quick_and_complete() -> None:
    done = paqdetr("--help")
    assert done.returncode == 0 and done.stderr == ""
    for verb in ("train", "eval", "predict", "models", "data", "config", "--debug"):
        assert verb in done.stdout
    code = "import sys, paqdetr.cli; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["False", "False"]


@pytest.mark.integration
def test_a_mistake_of_a_process_is_no_traceback() -> None:
    """Verbs that work are run as processes by tests/test_readme.py."""
    done = paqdetr("config", "show", "nonsense")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------- train


def test_train(
    tmp_path: Path,
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    no_pictures: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "a run [1]"
    settings = [f"{key}={value}" for key, value in {**tiny_settings, "epochs": 1}.items()]
    arguments = ["train", "paq_dino_nano", *settings, "--data", str(tiny_digits), "--output", str(output)]
    arguments += ["--device", "cpu", "--seed", "7", "--amp", "no"]
    assert run(arguments) == 0
    said = capsys.readouterr()
    assert "paq_dino_nano: 8 images, 2 steps of 4 on cpu" in said.err
    assert "epoch 1: val AP" in said.err
    assert "validation AP (epoch 1)" in said.out
    assert str(Run(output).best) in said.out  # whole, to be copied, however long
    config = load_config(output / "config.yaml")
    assert (config.seed, config.amp, config.epochs, config.model.dim) == (7, "no", 1, 32)

    assert run([*arguments, "--resume"]) == 0  # finished: says the same and does nothing
    said = capsys.readouterr()
    assert "validation AP (epoch 1)" in said.out and f"start a new run with init={output}" in said.err.replace(
        "\n", " "
    )
    assert len(Run(output).records("start")) == 1


def test_settings_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("base: paq_dino_nano\nlr: 2.0e-3\nmodel:\n  num_patterns: 8\n")
    assert run(["config", "show", str(tmp_path / "mine.yaml"), "epochs=3"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown)
    config = load_config(tmp_path / "shown.yaml")
    assert (config.name, config.lr, config.model.num_patterns, config.epochs) == ("mine", 2e-3, 8, 3)
    assert config == load_config(tmp_path / "mine.yaml", ["epochs=3"])


# --------------------------------------------------------------------------------------------------- eval


def test_eval_of_a_checkpoint(
    tmp_path: Path, tiny_run: Run, tiny_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out.json"
    arguments = ["eval", str(tiny_run.output), "--data", str(tiny_digits), "--split", "test", "--json", str(out)]
    assert run([*arguments, "--batch-size", "2"]) == 0
    said = capsys.readouterr().out
    for words in ("AP75", "AR100", "AP after NMS", "by class", "paq_dino_nano on"):
        assert words in said
    figures = json.loads(out.read_text())
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "per_class"} <= figures.keys()


def test_eval_of_results(tmp_path: Path, tiny_digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((tiny_digits / "val.json").read_text())
    rows = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in content["annotations"]]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    out = tmp_path / "out.json"
    arguments = ["eval", "--results", str(tmp_path / "results.json")]
    arguments += ["--annotations", str(tiny_digits / "val.json"), "--json", str(out)]
    assert run(arguments) == 0
    found = json.loads(out.read_text())
    assert found["AP"] == pytest.approx(1)
    of = {"annotations": str(tiny_digits / "val.json"), "max_detections": 100, "iou_type": "bbox"}
    assert found["source"] == {"results": str(tmp_path / "results.json"), **of}
    assert "1.000" in capsys.readouterr().out


def test_eval_keeps_results_that_can_be_compared(
    tmp_path: Path, tiny_run: Run, tiny_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, out = tmp_path / "deep" / "kept.json", tmp_path / "out.json"
    data = ["--data", str(tiny_digits), "--split", "test"]
    arguments = ["eval", str(tiny_run.output), *data, "--results-out", str(kept), "--json", str(out)]
    assert run([*arguments, "--intervals", "--resamples", "100", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert said.count("95 % interval") == 3
    figures = json.loads(out.read_text())
    assert figures["intervals"]["figures"]["AP"]["value"] == pytest.approx(figures["AP"])
    assert (figures["intervals"]["samples"], figures["intervals"]["seed"]) == (100, 3)
    # The same detections, read back: no difference to the model itself.
    assert run(["eval", "--compare", str(kept), str(tiny_run.best), *data, "--json", str(out)]) == 0
    assert "A and B are equally good: AP of B - A is +0.000" in capsys.readouterr().out
    found = json.loads(out.read_text())
    of = {"data": str(tiny_digits), "split": "test", "max_detections": 100}
    used = {"model": str(tiny_run.best), **of, "threshold": 0.0, "nms": None, "tiles": None}
    assert found["B"]["source"] == used and figures["source"] == used | {"model": str(tiny_run.output)}
    assert found["A"] == found["B"] | {"source": {"results": str(kept), **of, "iou_type": "bbox"}}
    assert found["A"]["figures"]["AP"]["value"] == pytest.approx(figures["AP"])
    # They are COCO results like any others.
    truth = str(tiny_digits / "test.json")
    for ground_truth in (["--annotations", truth], data):
        out.unlink()
        assert run(["eval", "--results", str(kept), *ground_truth, "--json", str(out)]) == 0
        again = json.loads(out.read_text())
        assert again["AP"] == pytest.approx(figures["AP"])
        assert again["per_class_AP50"] == pytest.approx(figures["per_class_AP50"])


def test_eval_compares_results(tmp_path: Path, tiny_digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = tiny_digits / "train.json"  # eight images: as of a sign test, four would decide nothing
    rows = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5}
        for a in json.loads(truth.read_text())["annotations"]
    ]
    good, bad, out = (tmp_path / name for name in ("good.json", "bad.json", "out.json"))
    good.write_text(json.dumps(rows))
    bad.write_text(json.dumps([]))
    arguments = ["--annotations", str(truth), "--resamples", "100", "--json", str(out)]
    assert run(["eval", "--compare", str(bad), str(good), *arguments]) == 0
    said = capsys.readouterr().out
    assert "B is better: AP of B - A is +1.000, 95 % interval +0.261 to +1.000." in said
    assert f"A: {bad}\nB: {good}" in said and "another training seed" in said
    found = json.loads(out.read_text())
    assert found["difference"]["figures"]["AP"] == pytest.approx(
        {"value": 1.0, "low": 2 * 0.025 ** (1 / 8) - 1, "high": 1.0, "superiority": 1.0}
    )
    assert found["verdict"].startswith("B is better")
    assert found["difference"]["per_class"].keys() == found["A"]["per_class"].keys()
    assert run(["eval", "--compare", str(good), str(bad), *arguments]) == 0
    assert "A is better: AP of B - A is -1.000" in capsys.readouterr().out
    # Half of the images each: which half is better depends on the images drawn.
    images = sorted({row["image_id"] for row in rows})
    for path, part in ((good, images[::2]), (bad, images[1::2])):
        path.write_text(json.dumps([row for row in rows if row["image_id"] in part]))
    assert run(["eval", "--compare", str(good), str(bad), *arguments]) == 0
    assert "Not decided on these images" in capsys.readouterr().out


def test_eval_compares_masks(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = shared_data("cocoeval_fixture"), tmp_path / "out.json"
    results = str(folder / "instances_val2014_fakesegm100_results.json")
    arguments = ["--annotations", str(folder / "instances_val2014_100.json"), "--iou-type", "segm"]
    assert run(["eval", "--results", results, *arguments, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["AP"] == pytest.approx(0.319545, abs=5e-7)
    compared = ["eval", "--compare", results, results, *arguments, "--resamples", "100", "--json", str(out)]
    assert run(compared) == 0
    found = json.loads(out.read_text())
    assert found["A"]["figures"]["AP"]["value"] == pytest.approx(0.319545, abs=5e-7)
    assert found["difference"]["figures"]["AP"]["superiority"] == 0.5


# ------------------------------------------------------------------------------------------------ predict


def test_predict_leaves_out_what_does_not_decode(
    tmp_path: Path, tiny_run: Run, tiny_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(tiny_digits / "val" / "000000.jpg") as picture:
        picture.resize((96, 64)).save(pictures / "turned.jpg", exif=exif)
    (pictures / "bad.jpg").write_text("no image")
    alone = shutil.copy(tiny_digits / "val" / "000001.jpg", tmp_path / "alone.jpg")
    arguments = ["predict", str(tiny_run.best), str(pictures), str(alone), "--output", str(tmp_path / "out")]
    assert run([*arguments, "--threshold", "0"]) == 2
    said = capsys.readouterr()
    assert "400 objects over 0.0 in 2 images" in said.out
    assert "left out:" in said.err and "bad.jpg" in said.err and "Convert it to JPEG or PNG" in said.err
    assert "error: 1 images could not be read; the others are done" in said.err
    with Image.open(tmp_path / "out" / "turned.jpg") as drawn:
        assert drawn.size == (64, 96)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {row["image_id"] for row in rows} == {"turned.jpg", "alone.jpg"}


def test_bench_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "bench.json"
    arguments = ["bench", "dino_nano", "model.decoder_layers=1", "model.num_queries=10", "--image-size", "64"]
    assert run([*arguments, "--rounds", "1", "--device", "cpu", "--json", str(out)]) == 0
    said, figures = capsys.readouterr().out, json.loads(out.read_text())
    assert f"{figures['training_step']['dino_nano']['median_ms']:.1f}" in said
    assert f"peak memory: {figures['peak_memory_gib']:.2f} GiB" in said
    assert "1 image of 64x64, cpu" in " ".join(said.split())


def test_bench_rejects_unknown_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "dino_nano", "--against", "transformers", "--image-size", "64"]) == 2
    assert "unknown model or recipe 'transformers'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- data


def test_data_make_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "make", "digits", "--output", str(tmp_path / "d"), "--size", "64"]
    arguments += ["--train", "1", "--val", "1", "--test", "1", "--max-objects", "4"]
    assert run(arguments) == 0
    written = (tmp_path / "d" / "train.json").stat().st_mtime_ns
    assert run(arguments) == 0
    assert (tmp_path / "d" / "train.json").stat().st_mtime_ns == written


def test_data_check_names_every_problem(tmp_path: Path, tiny_digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    content = json.loads((folder / "train.json").read_text())
    content["annotations"][0]["bbox"] = ["x", 1, 2, 3]
    content["annotations"][1]["image_id"] = 99
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "val" / "000002.jpg").write_text("no image")
    problems = [problem for problem in check_dataset(folder).problems if problem.severity == "error"]
    assert len(problems) == 3
    assert run(["data", "check", str(folder)]) == 2
    said = capsys.readouterr()
    for problem in problems:  # in full: brackets are no markup
        assert f"error [{problem.kind}] {problem.split} {problem.subject}: {problem.message}" in said.out
    assert "expected four finite numbers [x, y, w, h]" in said.out
    assert f"error: {folder}: 3 errors" in said.err


# ------------------------------------------------------------------------------------------------- models


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "paq_dino_nano", "--height", "320", "--width", "320"]) == 0
    said = capsys.readouterr()
    small = said.out.splitlines()[1].split()
    assert small[0] == "paq_dino_nano" and "320 x 320" in said.err

    assert run(["models", "paq_dino_nano"]) == 0
    said = capsys.readouterr()
    large = said.out.splitlines()[1].split()
    assert small[:3] == large[:3] and float(small[3]) < float(large[3]) and "800 x 1333" in said.err


def test_models_are_listed_whole_and_uncounted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("paqdetr.models.cost.build_model", None)  # nothing is built
    assert run(["models"]) == 0
    header, *rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert header[0].strip() == "model"
    assert [row[0] for row in rows] == list_models()


def test_tables_of_narrow_terminals_keep_names_and_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in ("40", "56", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        made = table(None, ("figure",), ("A", "B", "B - A", "95 % interval"), no_wrap=True)
        made.add_row("AP", "0.123", "0.456", "+0.333", "-0.789 to +0.987")
        results.print(made)
        last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        cells = [
            "".join(part) for part in zip(*([c.strip() for c in line.split("│")[1:-1]] for line in last), strict=True)
        ]
        assert [cell.replace(" ", "") for cell in cells] == ["AP", "0.123", "0.456", "+0.333", "-0.789to+0.987"], (
            columns
        )


def test_config_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run(["config", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=2) for line in lines if line.startswith("  ")]
    assert sorted(row[0] for row in rows if row[1] == "recipe") == list_recipes()
    assert sorted(row[0] for row in rows if row[1] == "model") == list_models()
    assert all(row[2] and "#" not in row[2] for row in rows)
    hosts = [line for line in lines if not line.startswith("  ")]
    assert hosts == sorted(set(hosts)) and len(hosts) == 13
    own = lines[lines.index("DINO") + 1 : lines.index("DINO, 5 levels")]
    assert all("dino" in row or "digits_quickstart" in row for row in own) and "5scale" not in "".join(own)

    assert run(["config", "list", "digits_*"]) == 0
    said = capsys.readouterr().out
    assert (
        said == "DINO\n"
        "  digits_quickstart  recipe  What `make quickstart` trains: dino_nano on digits, in half an hour on two CPU cores\n"
    )
    assert run(["config", "list", "yolo*"]) == 2
    assert "no model or recipe is called 'yolo*'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    said = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == ["paqdetr", "Python", "torch", "torchvision", "numba", "device"]
    assert said["paqdetr"] == __version__ and said["torch"] == torch.__version__


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("command", "callee", "expected"),
    [
        ("predict m.onnx clip.mp4 --every 3", "runtime.predict.predict_sources", {"every": 3, "max_frames": None}),
        ("predict m.onnx clip.mp4 --max-frames 4", "runtime.predict.predict_sources", {"max_frames": 4, "every": 1}),
        ("predict m.onnx camera:0 --buffer", "runtime.predict.predict_sources", {"buffer": True, "tiles": None}),
        (
            "predict m.onnx clip.mp4 --tiles 64 --overlap 0.3 --with-whole",
            "runtime.predict.predict_sources",
            {"tiles": Tiles(64, 0.3, True), "buffer": False},
        ),
        ("export m.onnx --raw --batch 4", "deploy.export", {"raw": True, "slow": False, "batch": 4, "check": True}),
        (
            "export m.onnx --slow --no-check",
            "deploy.export",
            {"raw": False, "slow": True, "batch": None, "check": False},
        ),
    ],
)
def test_options_reach_what_they_are_meant_for(
    command: str, callee: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def call(*_: object, **how: Any) -> None:
        given.update(how)
        raise ConfigError("that is enough", "nothing is to be done")

    monkeypatch.chdir(tmp_path)
    for name in ("m.onnx", "clip.mp4"):
        (tmp_path / name).touch()
    monkeypatch.setattr(f"paqdetr.{callee}", call)
    monkeypatch.setattr("paqdetr.cli.predict.open_model", lambda *_: SimpleNamespace(operating_point=OperatingPoint()))
    monkeypatch.setattr("paqdetr.checkpoint.find_described", lambda path: (path,))
    assert run(command.split()) == 2
    assert {name: given[name] for name in expected} == expected


# --------------------------------------------------------------------------------------------- exit codes


def test_no_verb_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["data"], ["config"]):
        assert run(arguments) == 2
        said = capsys.readouterr()
        assert "Usage:" in said.out + said.err and "error" not in said.err


def test_a_defect_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a [bold] surprise")

    monkeypatch.setattr("paqdetr.config.load_config", broken)
    assert run(["config", "show", "paq_dino_nano"]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[0] == "internal error: ValueError: a [bold] surprise"
    assert "report it with the output of --debug" in said and "Traceback" not in said
    assert run(["--debug", "config", "show", "paq_dino_nano"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "in broken" in said


def test_debug_shows_where_a_mistake_was_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", "nonsense", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "error: unknown model or recipe 'nonsense'" in said


@pytest.mark.parametrize(
    "arguments",
    [
        "config show paq_dino_nano",
        "plan paq_dino_nano --data x",
        "data make digits --output x",
        "train paq_dino_nano --data x --output y",
    ],
)
def test_interrupted(arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what can go on is said to."""

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("config.parse_overrides", "config.load_config", "data.digits.make_digits"):
        monkeypatch.setattr(f"paqdetr.{name}", stopped)
    assert run(arguments.split()) == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted: ") and ("--resume" in said) == arguments.startswith("train")


@pytest.mark.parametrize("verb", ["eval", "plan", "bench", "convert", "check", "stats"])
def test_a_path_that_may_not_be_written_is_refused_before_the_work(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK or Path(path) != tmp_path)
    data, file = ["--data", str(tmp_path)], str(tmp_path / "new" / "out.json")
    commands = {
        "eval": ["eval", "model.safetensors", *data],
        "plan": ["plan", "dino_nano", *data],
        "bench": ["bench", "dino_nano"],
        "convert": ["convert", "model.pth", "--from", "dino", "--output", "model.safetensors"],
        "check": ["data", "check", str(tmp_path)],
        "stats": ["data", "stats", str(tmp_path)],
    }
    assert run([*commands[verb], "--json", file]) == 2
    assert f"error: --json {file}: {tmp_path} may not be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- numbers and the environment


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("data make digits --output x --workers 100000", ("--workers", "256")),
        ("data make digits --output x --seed 9223372036854775808", ("--seed", "4294967295")),
        ("data make digits --output x --train 100000000000", ("--train", "10000000")),
        ("data make digits --output x --size 1000000", ("size is 1000000", "64 to 4096 pixels")),
        ("data make digits --output x --max-objects 1000000000", ("expected 1 <= min <= max <= 1000",)),
        ("data make digits --output x --train 1e3", ("--train", "integer")),
        ("data check x --workers 0", ("--workers", "1")),
        ("data preview x --batches 1000000000", ("--batches", "100")),
        ("eval --results x --annotations y --resamples 100000000000", ("--resamples", "10000")),
        ("eval --results x --annotations y --seed -1", ("--seed", "0")),
        ("eval x --data y --batch-size 1000000", ("--batch-size", "65536")),
        ("analyze x --data y --output z --resamples 10000000", ("--resamples", "10000")),
        ("analyze x --data y --output z --images 100000", ("--images", "1000")),
        ("plan dino_nano --data x --steps 1000000000", ("--steps", "10000")),
        ("bench dino_nano --image-size 1000000000", ("--image-size", "8192")),
        ("models --height 1000000000", ("--height", "16384")),
        ("train dino_nano --data x --output y --seed 18446744073709551616", ("--seed", "4294967295")),
    ],
)
def test_numbers_out_of_range(command: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """The words are those that every version of typer says."""
    assert run(command.split()) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert said.startswith("error: ") and said.count("\n") == 2


@pytest.mark.parametrize("value", ["", "1e9", "-1", "0", "many", "1.5", "9" * 5000, "nan", " ", "\u0663"])
def test_numbers_in_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAQDETR_TEST", value)
    with pytest.raises(ConfigError, match="the environment variable PAQDETR_TEST is ") as caught:
        environment_integer("PAQDETR_TEST", 7, low=1, high=100)
    assert "expected a whole number from 1 to 100" in caught.value.message and len(str(caught.value)) < 250
    monkeypatch.setenv("PAQDETR_TEST", " 12 ")
    assert environment_integer("PAQDETR_TEST", 7, low=1, high=100) == 12
    monkeypatch.delenv("PAQDETR_TEST")
    assert environment_integer("PAQDETR_TEST", 7, low=1, high=100) == 7


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PAQDETR_MAX_PIXELS", "1e9"),
        ("PAQDETR_MAX_JSON_GIB", ""),
        ("WORLD_SIZE", ""),
        ("WORLD_SIZE", "0"),
        ("RANK", "first"),
        ("LOCAL_RANK", ""),
        ("LOCAL_WORLD_SIZE", "-1"),
    ],
)
def test_environment_variables_that_are_no_numbers(
    name: str, value: str, tiny_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    done = paqdetr("train", "dino_nano", "--data", tiny_digits, "--output", tmp_path / "run")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert f"error: the environment variable {name} is {value!r}, expected a whole number" in lines[0].replace(
        f" process {value}:", ""
    )


@pytest.mark.integration
def test_the_encoding_of_the_console_does_not_matter(tiny_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("PYTHONUTF8", "0")
    done = paqdetr("data", "check", f"{tiny_digits}-ü\udcff\x1b[2J")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "\x1b" not in done.stderr
    assert r"\x1b[2J" in done.stderr and r"\xfc" in done.stderr and r"\udcff" in done.stderr
