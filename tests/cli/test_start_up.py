"""A typo is answered within a second: what can be wrong in a command is found before torch is imported, and what needs no tensor
never imports it. One interpreter in which the libraries cannot be imported runs all commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paqdetr
from paqdetr.cli.convert import _ORIGINS
from paqdetr.convert import LAYOUTS, OWN
from paqdetr.runs import Run

pytestmark = pytest.mark.integration

SOURCE = str(Path(paqdetr.__file__).parents[1])
SLOW = ("torch", "torchvision", "timm", "accelerate", "numba", "transformers", "supervision", "sklearn", "wandb")

MISTAKES = {
    "train dino_nanoo --data {data} --output new": "unknown model or recipe 'dino_nanoo'",
    "train missing.yaml --data {data} --output new": "missing.yaml: no such file",
    "train dino_nano --data nowhere --output new": "nowhere: no such data folder",
    "train dino_nano --data {data} --output new epochz=3": "unknown setting 'epochz'",
    "train dino_nano --data {data} --output new epochs=three": "epochs='three'",
    "train dino_nano --data {data} --output new model.num_quries=9": "unknown setting 'model.num_quries'",
    "train dino_nano --data {data} --output new init=missing.safetensors": "missing.safetensors: no such file",
    "train dino_nano --data {data} --output new init={run}": "its weights were made with",
    "train dino_nano --data {data} --output new trackers=[wandb]": "trackers: 'wandb' is not installed",
    "train dino_nano --data {data} --output {run}": "there is a run already",
    "train dino_nano --data {data} --output {data}": "the folder holds other files and no run",
    "train dino_nano --data {data} --output new --device cdua": "device 'cdua': there is no such kind",
    "plan dino_nanoo --data {data}": "unknown model or recipe 'dino_nanoo'",
    "plan dino_nano --data nowhere": "nowhere: no such data folder",
    "eval missing.safetensors --data {data}": "missing.safetensors: no such file",
    "eval {run} --data nowhere": "nowhere: no such data folder",
    "eval {run} --data {data} --split tset": "has no split 'tset'",
    "eval {run}/config.yaml --data {data}": "settings, which hold no weights",
    "eval --results missing.json --data {data}": "missing.json: no such file",
    "eval --compare missing.safetensors {run} --data {data}": "missing.safetensors: no such file",
    "predict missing.safetensors {image} --output new": "missing.safetensors: no such file",
    "predict missing.onnx {image} --output new": "missing.onnx: no such file",
    "predict {image} {run} --output new": "a picture, in the place of a model",
    "predict {image} missing.onnx --output new": "a picture, in the place of a model",
    "predict {run} missing.jpg --output new": "missing.jpg: no such file",
    "predict {run} nothing/*.jpg --output new": "no pictures or videos match",
    "predict {run} {image} --output {data}": "the folder holds other files",
    "predict {run} {image} --output new --save drow": "found 'drow'",
    "predict {run} {image} --output new --classes fuor": "the model has no class 'fuor'",
    "predict {run} {image} --output new --classes ,": "--classes: names none",
    "analyze missing.safetensors --data {data} --output new": "missing.safetensors: no such file",
    "analyze {run} --against missing --data {data} --output new": "missing: no such file",
    "analyze {run} --data {data} --split tset --output new": "has no split 'tset'",
    "export missing.safetensors": "missing.safetensors: no such file",
    "export {run} --format onxn": "found 'onxn'",
    "convert missing.pth --from dino --output new.safetensors": "missing.pth: no such file",
    "convert {run} --from dinno --output new.safetensors": "--from dinno: no such program",
    "bench dino_nanoo": "unknown model or recipe 'dino_nanoo'",
    "bench missing.safetensors": "missing.safetensors: no such file",
    "serve missing.safetensors": "missing.safetensors: no such file",
    "study missing.yaml --output new": "missing.yaml: no such study",
    "config show dino_nano epochz=3": "unknown setting 'epochz'",
    "data check nowhere": "nowhere: no such data folder",
    "data preview {data} --split tset": "has no split 'tset'",
    "data preview {data} epochz=3": "unknown setting 'epochz'",
    "hub push missing.safetensors user/name": "missing.safetensors: no such file",
}  # fmt: skip

WITHOUT_TORCH = (
    "data check {data}",
    "data stats {data} --output stats.png",
    "data convert {data} voc --to voc",
    "eval --results results.json --data {data}",
    "config show dino_nano",
    "models",
)

# Names that are None in `sys.modules` cannot be imported.
PROGRAM = """
import contextlib, io, json, sys
sys.modules |= dict.fromkeys(json.loads(sys.argv[1]))
from paqdetr.cli import run
from paqdetr.cli.console import errors
from paqdetr.metrics import MatchTable, evaluate_detections, figure_intervals, gini
found = []
for command in json.loads(sys.argv[2]):
    errors.file = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        code = run(command.split())
    found.append((code, errors.file.getvalue()))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Path, tiny_run: Run) -> dict[str, tuple[int, str]]:
    folder = tmp_path_factory.mktemp("start_up")
    truth = json.loads((tiny_digits / "val.json").read_text(encoding="utf-8"))
    rows = [row | {"score": 0.5} for row in truth["annotations"]]
    (folder / "results.json").write_text(json.dumps(rows), encoding="utf-8")
    image = next((tiny_digits / "val").iterdir())
    commands = [*MISTAKES, *WITHOUT_TORCH]
    filled = [command.format(data=tiny_digits, run=tiny_run.output, image=image) for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(SLOW), json.dumps(filled)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "new").exists()
    return dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("command", "message"), MISTAKES.items())
def test_a_mistake_is_found_without_torch(answers: dict[str, tuple[int, str]], command: str, message: str) -> None:
    code, printed = answers[command]
    assert code == 2 and message in printed, printed


@pytest.mark.parametrize("command", WITHOUT_TORCH)
def test_a_verb_without_tensors_needs_no_torch(answers: dict[str, tuple[int, str]], command: str) -> None:
    code, printed = answers[command]
    assert code == 0, printed


# What predicting in one picture needs beside torch is timm and a part of torchvision. `torch._dynamo` is torch's compiler.
IDLE = (
    "numba",
    "torchvision.models.resnet",
    "torch._dynamo",
    "accelerate",
    "scipy.optimize",
    "matplotlib",
    "supervision",
    "sklearn",
    "hotcoco",
    "transformers",
)
PREDICT = "import sys; from paqdetr.cli import run; print(run(['predict', *sys.argv[1:]])); print(*sys.modules)"


def test_a_prediction_imports_no_more_than_it_needs(tiny_digits: Path, tmp_path: Path) -> None:
    image = next((tiny_digits / "val").iterdir())
    model = paqdetr.create_model("paq_dino_nano", num_classes=10)
    model.save(tmp_path / "nano.safetensors")
    model(image)  # numba compiles the attention, if it has not before
    command = [sys.executable, "-c", PREDICT, str(tmp_path / "nano.safetensors"), str(image)]
    command += ["--output", str(tmp_path / "found")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": SOURCE}, capture_output=True, text=True, check=True)
    code, modules = done.stdout.splitlines()[-2:]
    assert code == "0" and sorted(set(IDLE) & set(modules.split())) == []


def test_convert_knows_all_programs() -> None:
    assert set(_ORIGINS) == {*LAYOUTS, OWN}
