"""What a terminal shows: help, words of other programs, completion, `info`, tables and the lines of a training."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from paqdetr import ConfigError, load
from paqdetr.checkpoint import settings_to_add
from paqdetr.cli import app, run
from paqdetr.cli.console import note_unfinished, results, table
from paqdetr.cli.habits import VERBS, what_to_type
from paqdetr.cli.options import complete_model, complete_setting
from paqdetr.cli.progress import TrainingProgress
from paqdetr.config import known_keys, load_config
from paqdetr.other_programs import WORDS, what_to_write
from paqdetr.runs import Run
from paqdetr.training.callbacks import NotebookProgress, TrainingPlan

PROGRAM: Any = typer.main.get_command(app)


def leaves(command: Any = PROGRAM) -> list[Any]:
    """Every verb."""
    inner = getattr(command, "commands", None)
    return [command] if inner is None else [leaf for one in inner.values() for leaf in leaves(one)]


# --------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_names_every_verb_in_one_line(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for arguments in (["--help"], ["data", "-h"], ["help", "hub"], ["config", "--help"]):
        assert run(arguments) == 0
        said = capsys.readouterr().out
        assert "..." not in said.partition("Options:")[0].partition("\n")[2]
        assert all(len(line) <= int(columns) for line in said.splitlines())
    for arguments in ([], ["data"], ["config"], ["hub"]):
        assert run(arguments) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("Usage: ") and "\x1b" not in said.err
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [f"{name}:" for name in ("Data", "Train", "Measure", "Use", "Exchange", "Look up", "Options")]
    for name, command in PROGRAM.commands.items():
        sentence = command.get_short_help_str(200)
        assert [line for line in lines if line.split() == [name, *sentence.split()]], name


def test_options_of_a_long_verb_are_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["help", "eval"]) == 0
    said = capsys.readouterr().out
    groups = {part.partition(":\n")[0]: part.partition(":\n")[2] for part in said.split("\n\n")[2:]}
    assert list(groups) == ["Arguments", "Data", "Figures", "Detections", "Output", "Machine", "Options"]
    assert "--split TEXT" in groups["Data"] and "--json PATH" in groups["Output"] and "--help" in groups["Options"]
    assert run(["eval", "--help"]) == 0 and capsys.readouterr().out == said
    assert run(["bench", "--help"]) == 0
    assert "Machine:" not in capsys.readouterr().out  # few options need no groups
    assert run(["help", "data", "mak"]) == 2
    assert capsys.readouterr().err == "error: `paqdetr data` has no verb 'mak'\nhelp: did you mean 'make'?\n"


# -------------------------------------------------------------------------------- words of other programs


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        # ultralytics
        ("val model=runs/x data=d", "eval runs/x --data d"),
        ("val", "eval MODEL --data DIR"),
        ("test runs/x --data d", "eval runs/x --split test --data d"),
        ("detect a.jpg --weights runs/x --conf 0.4", "predict runs/x a.jpg --threshold 0.4"),
        (
            "detect train data=d model=dino_nano epochs=3 imgsz=320 batch=8 device=0",
            "train dino_nano --data d --device 0 --output DIR epochs=3 image_size=320 batch_size=8",
        ),
        (
            "task=detect mode=train model=dino_nano data=d project=runs name=first exist_ok=True",
            "train dino_nano --data d --output runs/first",
        ),
        ("predict model=runs/x source=a.jpg save_txt=True iou=0.5", "predict runs/x a.jpg --save draw,yolo --nms 0.5"),
        (
            "export model=runs/x format=onnx half=True imgsz=640",
            "export runs/x --format onnx --precision f16 --image-size 640",
        ),
        ("export runs/x half=False", "export runs/x"),
        ("benchmark model=dino_nano imgsz=320", "bench dino_nano --image-size 320"),
        ("checks", "data check DIR"),
        ("settings", "config show 'MODEL|CONFIG'"),
        ("version", "--version"),
        # rf-detr, DETR, detectron2, mmdetection, transformers
        (
            "train dino_nano --dataset-dir d --output-dir o --epochs 10 --grad-accum-steps 4 --early-stopping",
            "train dino_nano --data d --output o epochs=10 accumulate=4 patience=10",
        ),
        (
            "train dino_nano --coco_path d --output_dir o --lr_backbone 1e-5 --num_queries 50 --clip_max_norm 0.1",
            "train dino_nano --data d --output o backbone_lr=1e-5 model.num_queries=50 clip_norm=0.1",
        ),
        (
            "train --config-file x.yaml --num-gpus 1 SOLVER.BASE_LR 0.001 MODEL.WEIGHTS x.safetensors",
            "train x.yaml --data DIR --output DIR lr=0.001 init=x.safetensors",
        ),
        (
            "train cfg.yaml --data d --work-dir o --cfg-options lr=1 --auto-scale-lr",
            "train cfg.yaml --data d --output o lr=1 lr_rule=linear",
        ),
        (
            "train --model_name_or_path dino_nano --per_device_train_batch_size 8 --num_train_epochs 3 --fp16",
            "train dino_nano --amp fp16 --data DIR --output DIR batch_size=8 epochs=3",
        ),
        ("train dino_nano --data d --output o --pretrained runs/x", "train dino_nano --data d --output o init=runs/x"),
        ("train dino_nano data=d project=o pretrained=True", "train dino_nano --data d --output o"),
        ("train dino_nano --pretrained --data d --output o", "train dino_nano --data d --output o"),
        ("predict a.jpg pretrained=runs/x", "predict runs/x a.jpg"),
        # of no program in particular
        (
            "train dino_nano --data d --output o --epochs 3 --batch 8 --imgsz 320 --lr 1e-4",
            "train dino_nano --data d --output o epochs=3 batch_size=8 image_size=320 lr=1e-4",
        ),
        ("train --model dino_nano --data d --output o --resume", "train dino_nano --data d --output o --resume"),
        ("fit dino_nano --data 'my data'", "train dino_nano --data 'my data' --output DIR"),
        ("plan dino_nano --data d --dropout 0.1", "plan dino_nano --data d model.dropout=0.1"),
        ("data check --data d", "data check d"),
        ("data preview dino_nano --data d", "data preview d --model dino_nano"),
        ("data stats dino_nano --data d", "data stats d"),
        ("analyze runs/x data=d --out r", "analyze runs/x --data d --output r"),
        ("eval --compare a b --data d --conf 0.3", "eval --compare a b --data d --threshold 0.3"),
        ("eval runs/x data=d batch=4", "eval runs/x --data d --batch-size 4"),
        ("info model=dino_nano", "info dino_nano"),
        ("export runs/x --int8 --data d", "export runs/x --precision int8 --calibrate d"),
        # what nothing here takes the place of
        ("val runs/x --data d --batch 8 --imgsz 640 --conf 0.1", "eval runs/x --data d --batch-size 8 --threshold 0.1"),
        ("predict runs/x --half a.jpg imgsz=640", "predict runs/x a.jpg"),
        (
            "train dino_nano --data d --output o mosaic=1.0 hsv_h=0.015 --close-mosaic 10 imgsz=96 num_queries=9",
            "train dino_nano --data d --output o augment.mosaic=1.0 image_size=96 model.num_queries=9",
        ),
        ("train dino_nano --data d --output o --cache --freeze 10", "train dino_nano --data d --output o"),
        ("hub upload runs/x", "hub push runs/x USER/NAME"),
    ],
)
def test_words_of_other_programs(typed: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(typed)) == 2
    error, remedy = capsys.readouterr().err.splitlines()
    assert error.startswith("error: `paqdetr") and " has no " in error
    assert remedy.replace("MODEL|CONFIG", "'MODEL|CONFIG'") == f"help: type: paqdetr {wanted}"
    if "DIR" not in wanted and "USER" not in wanted and "MODEL" not in wanted:  # it is what the verb takes
        assert what_to_type(shlex.split(wanted), PROGRAM) is None


@pytest.mark.parametrize(
    ("typed", "note", "wanted"),
    [
        (
            "optimizer=SGD nc=3 opt=adam",
            "optimizer=, opt= left out: the optimizer is AdamW; nc= left out: classes are",
            "paqdetr train m",
        ),
        (
            "--optimizer SGD --nc 3 --momentum 1e-3 --imgsz 320",
            "--optimizer left out: the optimizer is AdamW; --nc left out",
            "paqdetr train m",
        ),
        ("--mixup .1 --freeze 0 1 2 --auto-augment randaugment", "--mixup, --auto-augment left out", "paqdetr train m"),
        ("val=False", "the setting eval_every says when", "paqdetr train m"),
        ("--gpus 1", "", "paqdetr train m"),
        ("--num-gpus 2 batch=4", "each GPU has", "torchrun --nproc_per_node=2 -m paqdetr train m"),
        ("--device 0,1", "has no --device 0,1; each GPU has", "torchrun --nproc_per_node=2 -m paqdetr train m"),
        (
            "device=2,3",
            "has no device=, --device 2,3; each",
            "CUDA_VISIBLE_DEVICES=2,3 torchrun --nproc_per_node=2 -m paqdetr train m",
        ),
    ],
)
def test_what_is_not_carried_over_is_said(
    typed: str, note: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "m", "--data", "d", "--output", "o", *typed.split()]) == 2
    error, remedy = capsys.readouterr().err.splitlines()
    assert note in error and remedy.startswith(f"help: type: {wanted} --data d --output o")
    mistake = what_to_type(["predict", "m", "a.jpg", *typed.split()], PROGRAM)
    if "," in typed and mistake is not None:
        assert mistake[0].endswith("predict runs on one device") and mistake[1] == "type: paqdetr predict m a.jpg"


@pytest.mark.parametrize(
    "typed",
    [
        "train dino_nano --data d --output o epochs=3 name=mine seed=1 model.dropout=0.1 --amp bf16 --resume",
        "train dino_nano --data d --output o bacth=3",  # the settings say what is near
        "train dino_nano --data d --output o bacth=3 imgsz=96",
        "eval runs/lr=0.1/best.safetensors --data=d --nms 0.5",
        "eval runs/x --data d --thresold 0.3",
        "trian dino_nano",
        "predict runs/x a.jpg model",
        "data make digits --output d --size 64",
        "convert x.pth --from dino --output y.safetensors num_heads=8 classes=coco",
        "--version",
        "",
    ],
)
def test_other_lines_are_left_alone(typed: str) -> None:
    assert what_to_type(shlex.split(typed), PROGRAM) is None


def test_what_is_left_out_is_said() -> None:
    typed = "val runs/x data=d --imgsz 640 mixup=0.1 degrees=5"
    assert what_to_type(typed.split(), PROGRAM) == (
        "`paqdetr` has no verb val; --imgsz left out: evaluation and prediction use the model's own image size; "
        "mixup=, degrees= left out: nothing here does the same",
        "type: paqdetr eval runs/x --data d",
    )


def test_every_setting_is_taken_as_it_is() -> None:
    words = [f"{key}=1" for key in known_keys()]
    assert what_to_type(["train", "dino_nano", "--data", "d", "--output", "o", *words], PROGRAM) is None


def test_a_file_with_an_equals_sign_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert what_to_type(["predict", "m.onnx", "source=a.jpg"], PROGRAM) is not None
    (tmp_path / "source=a.jpg").touch()
    assert what_to_type(["predict", "m.onnx", "source=a.jpg"], PROGRAM) is None


def test_the_tables_lead_to_what_there_is() -> None:
    options = {name for leaf in leaves() for param in leaf.params for name in param.opts}
    arguments = {param.metavar for leaf in leaves() for param in leaf.params}
    for word, places in WORDS.items():
        for place in places.split("|"):
            option, key = place.partition(" ")[0], place.partition("=")[0]
            assert (
                place[:1] in ("", "*", "!")
                or place == "GPUS"
                or option in options
                or place in arguments
                or key in known_keys()
            ), word
    for words in VERBS.values():
        command = PROGRAM
        for word in words.partition(" --")[0].split():
            command = command.commands[word] if word != "--version" else None


def test_settings_of_other_programs_in_python() -> None:
    assert not any("*" in (what_to_write(word) or "") for word in WORDS)
    ours = {"batch": "batch_size", "imgsz": "image_size", "lr0": "lr", "learning_rate": "lr"}
    advice = {word: f"write {key}= instead" for word, key in ours.items()}
    for word, said in (advice | {"mixup": "leave it out: nothing here does the same"}).items():
        with pytest.raises(ConfigError) as caught:
            load_config("dino_nano", {word: 1})
        assert caught.value.remedy == said


# ---------------------------------------------------------------------------------------------- completion


def test_what_a_shell_completes() -> None:
    assert complete_model("dino_r50_2") == ["dino_r50_24e"]
    assert complete_model("runs/") == []  # the shell's own: paths
    assert complete_setting("model.num_q") == ["model.num_queries="]


@pytest.mark.integration
def test_completion_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "_PAQDETR_COMPLETE": "complete_bash",
        "COMP_WORDS": "paqdetr train dn_d",
        "COMP_CWORD": "2",
    }.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "paqdetr"], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[0] == "dn_detr_nano" and "torch" not in done.stderr
    monkeypatch.delenv("_PAQDETR_COMPLETE")
    # typer asks which shell has started the program: under make or in CI it is one that it does not know.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = subprocess.run(
        [sys.executable, "-m", "paqdetr", "--show-completion", "bash"], capture_output=True, text=True, check=True
    )
    assert "complete -o default -F _paqdetr_completion paqdetr" in shown.stdout


# ---------------------------------------------------------------------------------------------------- info


def test_info_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "dino_r50"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == "dino_r50: DINO, ResNet-50, 12 epochs of COCO."
    assert "parameters     47.7M" in rows and any("49.0 AP on COCO val2017" in row for row in rows)
    assert any(
        row.startswith("train it") and row.endswith("paqdetr train dino_r50 --data DIR --output DIR") for row in rows
    )
    assert run(["info", "dino_r51"]) == 2
    assert "did you mean 'dino_r50'?" in capsys.readouterr().err


def test_info_of_a_run_and_its_file(tmp_path: Path, tiny_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(tiny_run.output)]) == 0
    said = capsys.readouterr().out
    steps = tiny_run.records("train")[-1]["step"]
    assert f"{tiny_run.output}: finished: step {steps} of {steps}" in said
    assert f"AP {tiny_run.metrics['AP']:.3f}" in said and f"paqdetr export {tiny_run.output}" in said

    copy = Run(Path(shutil.copytree(tiny_run.output, tmp_path / "run")))
    lines = [line for line in copy.metrics_file.read_text().splitlines() if json.loads(line)["kind"] != "finished"]
    copy.metrics_file.write_text("\n".join(lines) + "\n")
    assert run(["info", str(copy.output)]) == 0
    said = capsys.readouterr().out
    assert "unfinished: step" in said and f"paqdetr train {copy.output} --resume" in said.replace("\n", "")
    began = {"command": "torchrun -m paqdetr train dino_nano --data d --output run", "data": "d", "processes": 2}
    copy.environment_file.write_text(json.dumps([began]))
    assert run(["info", str(copy.output)]) == 0
    assert "paqdetr train dino_nano --data d --output run --resume" in capsys.readouterr().out

    assert run(["info", str(copy.best)]) == 0
    said = capsys.readouterr().out
    assert "checkpoint of paq_dino_nano" in said and "10: 0, 1, 2" in said
    command = said.partition("train from it")[2].replace("\n", " ").split()
    settings = [word for word in command if "=" in word]
    assert settings[0] == f"init={copy.best}" and "model.dim=32" in settings
    own = load_config(command[2], settings).model
    assert settings_to_add(load_config(tiny_run.config_file).model, own) == []

    load(copy.best).save(tmp_path / "b2.safetensors", name="b2")  # as a training of b2.yaml leaves it
    assert run(["info", str(tmp_path / "b2.safetensors")]) == 0
    assert "train from it" not in capsys.readouterr().out
    for wrong, word in ((copy.state_file, "not a model"), (tmp_path, "no run"), (tmp_path / "x", "no such file")):
        assert run(["info", str(wrong)]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "verb"), [("train dino_nano --amp", "train"), ("data make --output", "data make"), ("--no-such", "")]
)
def test_a_usage_error_names_the_help_of_its_verb(command: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command.split()) == 2
    assert f"help: `{f'paqdetr {verb}'.strip()} --help` shows" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- tables


def test_titles_are_not_folded_to_their_table(capsys: pytest.CaptureFixture[str]) -> None:
    title = "a title of many words that says on what data and with which settings " * 2
    made = table(title, ("a",), ("b",))
    made.add_row("1", "2")
    results.print(made)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == title and set(second) <= set("┏━┳┓+-")


@pytest.mark.parametrize("verb", [["models"], ["config", "list"]])
def test_lists_fit_a_terminal(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 80 columns: the last column goes on below itself. In a pipe nothing is folded, and the words are the same."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run(verb) == 0
    piped = capsys.readouterr()
    monkeypatch.setattr(results, "_force_terminal", True)
    assert run(verb) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, (shown + piped.err).splitlines())) <= 80 < max(map(len, piped.out.splitlines()))
    assert shown.split() == piped.out.split()


# ---------------------------------------------------------------------------------------------- a training


RECORD = {
    "kind": "train", "step": 20, "epoch": 0.5, "loss": 6.5, "loss_class": 1.25, "loss_giou": 2.0, "lr": 1e-3,
    "images_per_second": 8.0, "positives_per_box": [2.0, 1.0],
}  # fmt: skip
EVALUATION = {
    "kind": "eval", "epoch": 1, "split": "val", "AP": 0.25, "AP50": 0.5, "AP_nms": 0.3, "predictions_per_image": 4.0,
    "boxes_per_image": 5.0,
}  # fmt: skip


@pytest.fixture
def plan() -> TrainingPlan:
    config = load_config("dino_nano", {"epochs": 2})
    return TrainingPlan(config, first_step=10, total_steps=80, images=160, device="cpu", step_images=4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("paqdetr.training.callbacks.time.monotonic", lambda: now[0])
    return now


def test_lines_of_a_log(plan: TrainingPlan, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress()
    progress.on_start(plan)
    clock[0] += 50  # ten steps since it was resumed: 60 are left
    progress.on_step(20, 6.5)
    progress.on_record(RECORD)
    progress.on_evaluation(EVALUATION)
    progress.on_end()
    first, step, evaluation = capsys.readouterr().err.splitlines()
    assert first == "dino_nano: 160 images, 80 steps of 4 on cpu, resumed at step 10"
    assert step == (
        "step 20/80  epoch 0.50/2  loss 6.500 (class 1.250, giou 2.000)  lr 1.00e-03  8.0 images/s  5 min left  "
        "positives per box by layer 2.00 1.00"
    )
    assert evaluation.startswith("epoch 1: val AP 0.250, AP50 0.500, AP after NMS 0.300")


def test_a_notebook_has_a_bar(plan: TrainingPlan, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def display(what: Any, *, display_id: bool) -> Any:
        shown.append(what._repr_html_())
        return SimpleNamespace(update=lambda again: shown.append(again._repr_html_()))

    assert not NotebookProgress.wanted()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))  # type: ignore[arg-type]
    assert NotebookProgress.wanted()
    shell.kernel = None  # IPython in a terminal
    assert not NotebookProgress.wanted()

    progress = NotebookProgress()
    progress.on_start(plan)
    for step in range(11, 21):
        clock[0] += 5
        progress.on_step(step, 6.5)
        progress.on_step(step, 6.5)  # at once again: not shown
    progress.on_record(RECORD)
    progress.on_evaluation_progress(1, 40)
    assert len(shown) == 11
    assert shown[0].startswith('<progress value="10" max="80"></progress> dino_nano 10/80')
    assert shown[-1] == '<progress value="20" max="80"></progress> dino_nano 20/80  loss  6.500  5 min left'
    clock[0] += 1
    progress.on_evaluation_progress(8, 40)
    assert shown[-1].endswith("8.0 images/s  evaluating image 8 of 40")
    progress.on_evaluation(EVALUATION)
    progress.on_end()
    assert shown[-1].endswith("AP 0.250  8.0 images/s  5 min left")  # the evaluation is over


@pytest.mark.parametrize("name", ["", "best.safetensors", "last.safetensors"])
def test_an_unfinished_run_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = Run(tmp_path / "run")
    run_folder.output.mkdir()
    note_unfinished(run_folder.output / name)  # not begun
    run_folder.write_config(load_config("dino_nano", {"epochs": 4}))
    run_folder.append({"kind": "start", "step": 0})
    note_unfinished(run_folder.output / name)
    run_folder.append({"kind": "train", "step": 30, "epoch": 1.5})
    note_unfinished(run_folder.output / name)
    run_folder.append({"kind": "finished", "step": 80})
    note_unfinished(run_folder.output / name)
    assert capsys.readouterr().err == (
        f"note: {run_folder.output} is unfinished: no step was recorded; `paqdetr info {run_folder.output}` says how it goes on\n"
        f"note: {run_folder.output} is unfinished: step 30 of 80, epoch 1.5 of 4; `paqdetr info {run_folder.output}` says how "
        "it goes on\n"
    )
    run_folder.config_file.write_text("no_such_setting: 1")
    (run_folder.output / "metrics.jsonl").write_text('{"kind": "train", "step": 30, "epoch": null}\nhalf a li')
    note_unfinished(run_folder.output / name)
    assert capsys.readouterr().err.startswith(f"note: {run_folder.output} is unfinished: step 30; ")
