"""Real processes that talk through gloo: sharing out a step or an evaluation changes nothing, and nobody waits for ever."""

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
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from same_end import require_same_end

from paqdetr import cli
from paqdetr.checkpoint import read_header
from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.distributed import Processes, build_accelerator
from paqdetr.errors import ConfigError, DataError
from paqdetr.evaluation.evaluate import detect_split
from paqdetr.models.zoo import build_model
from paqdetr.runs import Run
from paqdetr.training.setup import synchronise_norms, with_classes

Start = Callable[..., Any]  # the fixture of conftest.py

# Groups of denoising queries depend on what is in a batch, and so do the losses.
PLAIN = {"model.denoising": "none", "augment.flip": 0.0, "augment.crop": 0.0, "workers": 0}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Path, tiny_settings: dict[str, Any]) -> Path:
    """Annotations of the training images from what an untrained model finds there, so that its AP is neither 0 nor 1."""
    split = open_split(tiny_digits, "train")
    config = with_classes(load_config("paq_dino_nano", {**tiny_settings, **PLAIN}), split)
    torch.manual_seed(config.seed)
    model = build_model(config, classes=split.classes, pretrained_backbone=config.pretrained_backbone).eval()
    content = json.loads(split.annotation_file.read_text())
    content["annotations"] = []
    for index, detections in detect_split(model, split, batch_size=1):
        detections.image_id = split.image_ids[index]
        for row in detections.to_coco()[1:20:4]:
            if row["bbox"][2] > 1 and row["bbox"][3] > 1:
                area = row["bbox"][2] * row["bbox"][3]
                content["annotations"].append(
                    {**row, "area": area, "iscrowd": 0, "id": len(content["annotations"]) + 1}
                )
    path = tmp_path_factory.mktemp("truth") / "train.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    start: Start,
    truth: Path,
) -> dict[int, Path]:
    """Folders with what one, two and three processes came to."""
    folders = {}
    for count in (1, 2, 3):
        folder = folders[count] = tmp_path_factory.mktemp(f"{count} processes")
        shared = {"data": str(tiny_digits), "output": str(folder / "run"), "truth": str(truth)}

        def job(what: str, name: str, /, *, accumulate: int = 1, folder: Path = folder, **more: Any) -> dict[str, Any]:
            settings = {**tiny_settings, **PLAIN, "batch_size": 2, "accumulate": accumulate, **more}
            return {
                **shared,  # noqa: B023
                "what": what,
                "settings": settings,
                "accumulate": accumulate,
                "gradients": str(folder / f"{name}.safetensors"),
                "answer": str(folder / f"{name}.json"),
            }

        jobs = [job("gradients", "gradients"), job("evaluation", "evaluation")]
        if count == 1:
            jobs += [job("gradients", f"accumulate{n}", accumulate=n) for n in (2, 3)]
        if count == 2:
            jobs += [job("accidents", "accidents"), job("gradients", "accumulate3", accumulate=3)]
            jobs += [job("gradients", "bf16", amp="bf16")]
            jobs += [job("gradients", "checkpointed", checkpoint_activations=True)]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        for ended in start(count, "jobs", folder / "jobs.json").end():
            assert ended.code == 0, ended.err
    return folders


@pytest.mark.integration
@pytest.mark.parametrize(
    ("count", "name"),
    [
        (2, "gradients"),
        (3, "gradients"),
        (1, "accumulate2"),
        (1, "accumulate3"),
        (2, "accumulate3"),
        (2, "checkpointed"),
    ],
)
def test_gradients_are_those_of_the_one_large_batch(answers: dict[int, Path], count: int, name: str) -> None:
    large, shared = (
        load_file(folder / f"{file}.safetensors")
        for folder, file in ((answers[1], "gradients"), (answers[count], name))
    )
    assert large.keys() == shared.keys()
    norm = torch.stack([grad.norm() for grad in large.values()]).norm()
    for key, grad in large.items():
        assert torch.allclose(shared[key], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), key
    difference = torch.stack([(large[key] - shared[key]).norm() for key in large]).norm()
    assert difference < 1e-5 * norm, f"relative difference {difference / norm:.1e}"
    losses = [
        json.loads((folder / f"{file}.json").read_text())["loss"]
        for folder, file in ((answers[1], "gradients"), (answers[count], name))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.integration
def test_gradients_in_half_precision_are_close(answers: dict[int, Path]) -> None:
    full, half = (load_file(answers[n] / f"{name}.safetensors") for n, name in ((1, "gradients"), (2, "bf16")))
    assert all(grad.dtype == torch.float32 for grad in half.values())
    for part in ("backbone", "neck", "encoder", "start", "query_source", "decoder"):
        keys = [key for key in full if key.startswith(f"{part}.")]
        one, two = (torch.cat([grads[key].flatten() for key in keys]) for grads in (full, half))
        # Another precision chooses a few other proposals, and their queries get other gradients: alike, and not equal.
        least = 0.2 if part == "query_source" else 0.65
        assert torch.nn.functional.cosine_similarity(one, two, dim=0) > least, part
        assert two.norm() == pytest.approx(float(one.norm()), rel=0.5), part
    losses = [
        json.loads((answers[n] / f"{name}.json").read_text())["loss"] for n, name in ((1, "gradients"), (2, "bf16"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]


@pytest.mark.integration
def test_figures_do_not_depend_on_the_number_of_processes(answers: dict[int, Path]) -> None:
    """Eight images in batches of two: three processes have two, one and one."""
    one, two, three = (json.loads((answers[count] / "evaluation.json").read_text()) for count in (1, 2, 3))
    assert 0.05 < one["figures"]["AP"] < 1
    assert one == two == three


@pytest.mark.integration
def test_accidents_in_one_process(answers: dict[int, Path]) -> None:
    answer = json.loads((answers[2] / "accidents.json").read_text())
    for name in ("one process without boxes", "no boxes at all", "afterwards"):
        assert answer[name]["problem"] is None and answer[name]["changed"] and answer[name]["loss"] > 0, name
    left_out = answer["NaN in one process"]
    assert not left_out["changed"] and left_out["loss"] is None
    assert "not finite" in left_out["problem"] or "nan" in left_out["problem"].lower()
    for name, words in {
        "NaN": "nan",
        "too many": "steps in a row were left out; the last because of nan",
        "gradient": "norm became nan on images [1, 2]",  # one of each process
    }.items():
        (first, told), (second, told_too) = answer[name]
        assert first == second and words in first.lower() and (told, told_too) == (False, True), name


# ----------------------------------------------------------------------------------------- whole trainings


@pytest.fixture(scope="module")
def arguments(tiny_digits: Path, tiny_settings: dict[str, Any]) -> list[str]:
    settings = {**tiny_settings, "batch_size": 2, "epochs": 2, "save_every_steps": 1, "workers": 1}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    return ["train", "paq_dino_nano", *pairs, "--data", str(tiny_digits), "--device", "cpu"]


@pytest.mark.integration
def test_two_processes_are_killed_and_resumed(tmp_path: Path, arguments: list[str], start: Start) -> None:
    """torchrun trains without a stop; two processes die in the second epoch, and go on."""
    straight, halves = Run(tmp_path / "straight"), Run(tmp_path / "halves")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "paqdetr"]
    done = subprocess.run(
        [*command, *arguments, "--output", str(straight.output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation AP") == 1 and done.stderr.count("steps of 4 on cpu") == 1
    assert straight.records("start")[0]["processes"] == 2
    assert [record["step"] for record in straight.records("train")] == [1, 2, 3, 4]

    killed = start(2, "killed_after_step", 3, *arguments, "--output", halves.output).end()
    assert [process.code for process in killed] == [-signal.SIGKILL] * 2, killed[0].err
    (other,) = start(1, "command_line", *arguments, "--output", halves.output, "--resume").end()
    assert other.code == 2 and "was started with 2 processes, now there are 1" in other.err
    first, second = start(2, "command_line", *arguments, "--output", halves.output, "--resume").end()
    assert (first.code, second.code) == (0, 0), first.err
    assert "resumed at step 2" in first.err and second.out == second.err == ""
    require_same_end(straight, halves)


@pytest.mark.integration
def test_an_image_that_one_process_misses_ends_all(
    tmp_path: Path, tiny_digits: Path, arguments: list[str], start: Start
) -> None:
    """Told once, and no process waits for the other."""
    data = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    (data / "train" / "000003.jpg").write_text("no image")
    run = Run(tmp_path / "run")
    first, second = start(2, "command_line", *arguments, "--data", data, "--output", run.output).end()
    assert first.code == second.code == 2
    assert "000003.jpg: not an image" in first.err and second.err == ""
    assert not run.finished


@pytest.mark.integration
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path: Path, arguments: list[str], start: Start) -> None:
    run = Run(tmp_path / "run")
    go_on = tmp_path / "go on"
    group = start(2, "held_after_step", 1, go_on, "command_line", *arguments, "--output", run.output)
    for _ in range(2400):
        if run.records("train") or not group.processes[1].is_alive():
            break
        time.sleep(0.05)
    # Nobody else trains there meanwhile.
    (other,) = start(1, "command_line", *arguments, "--output", run.output, "--resume").end()
    assert other.code == 2, other.err
    os.kill(group.processes[1].pid, signal.SIGTERM)
    go_on.touch()
    first, second = group.end()
    assert first.code == 130 or first.code == 128 + signal.SIGTERM, first.err
    assert second.code == 128 + signal.SIGTERM and "interrupted" not in second.err
    step = read_header(run.state_file)["position"]["step"]
    assert f"interrupted: saved at step {step}; continue with" in first.err
    assert first.err.splitlines()[-1].strip().startswith("torchrun --nproc_per_node=2 -m paqdetr train")


@pytest.mark.integration
def test_the_eval_command_in_three_processes(tmp_path: Path, tiny_run: Run, tiny_digits: Path, start: Start) -> None:
    files = [tmp_path / "one.json", tmp_path / "three.json"]
    arguments = ["eval", str(tiny_run.best), "--data", str(tiny_digits), "--json"]
    assert cli.run([*arguments, str(files[0])]) == 0
    ended = start(3, "command_line", *arguments, files[1]).end()
    assert [process.code for process in ended] == [0, 0, 0], ended[0].err
    assert "AP50" in ended[0].out and not any(process.out for process in ended[1:])
    one, three = (json.loads(file.read_text()) for file in files)
    one.pop("images_per_second"), three.pop("images_per_second")
    assert one.keys() == three.keys()
    for name, value in one.items():  # this process may have more threads, whose sums differ in the last bits
        if isinstance(value, float):
            assert three[name] == pytest.approx(value, abs=1e-3), name


# ------------------------------------------------------------------------------------------ one alone


def test_one_process_sends_nothing() -> None:
    alone = Processes()
    assert alone.main and alone.sum([1.5, 2.0]) == [1.5, 2.0]
    item = object()
    assert alone.gather(item) == [item] and alone.broadcast(item) is item
    alone.raise_together(None)
    error = DataError("a.jpg: missing", "copy it")
    with pytest.raises(DataError) as caught:
        alone.raise_together(error)
    assert caught.value is error and not error.reported_elsewhere


def test_norms_that_train_are_synchronised() -> None:
    config = load_config("paq_dino_nano", {"model.freeze_backbone_norm": False, "model.frozen_stride": 0})
    model = build_model(config)
    plain, images = build_model(config).eval(), torch.randn(1, 3, 64, 64)
    plain.load_state_dict(model.state_dict())
    synchronised = synchronise_norms(model)
    kinds = {type(part).__name__ for part in synchronised.backbone.modules()}
    assert any("Sync" in kind for kind in kinds) and not any(kind.startswith("BatchNorm") for kind in kinds)
    assert synchronised.state_dict().keys() == plain.state_dict().keys()  # any model loads its checkpoint
    assert torch.allclose(synchronised.eval()(images).pred_logits, plain(images).pred_logits, atol=1e-5)


def test_without_norms_that_train_nothing_can_be_synchronised() -> None:
    with pytest.raises(ConfigError, match="no batch norm that trains") as caught:
        synchronise_norms(build_model(load_config("paq_dino_nano")))
    assert "freeze_backbone_norm" in caught.value.remedy


def test_norms_are_synchronised_on_gpus_alone(tmp_path: Path) -> None:
    config = load_config("paq_dino_nano", {"sync_batch_norm": True})
    with pytest.raises(ConfigError, match="sync_batch_norm=True"):
        build_accelerator(config, "cpu", tmp_path)


def test_weights_that_are_not_whole_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP and DeepSpeed, which accelerate can be set to behind our back."""
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ConfigError, match="accelerate is set to FSDP, and training keeps whole weights") as caught:
        build_accelerator(load_config("paq_dino_nano"), "cpu", tmp_path)
    assert "without FSDP" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "foo"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x"),
        ("ACCELERATE_USE_CPU", "maybe"),
        ("FORK_LAUNCHED", "perhaps"),
    ],
)
def test_values_that_accelerate_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match=f"accelerate cannot start with {name}={value}"):
        build_accelerator(load_config("paq_dino_nano"), "cpu", tmp_path)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "x", "-1", "1e3", "9" * 30])
def test_numbers_of_processes_that_are_none(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"the environment variable {name} is '{value}', expected a whole"):
        Processes.join("cpu")


def test_processes_that_nobody_started(monkeypatch: pytest.MonkeyPatch) -> None:
    announced = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in {**announced, "MASTER_PORT": "29512"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)  # of earlier tests
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 announces several processes") as caught:
        Processes.join("cpu")
    assert "torchrun" in caught.value.remedy and not PartialState._shared_state


def test_each_process_has_its_own_gpu_before_any_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else "cuda" would be the first one for all of them."""
    done: list[Any] = []

    def require(device: str | None) -> torch.device:
        done.append(device)
        raise ConfigError("enough", "")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr("paqdetr.distributed.require_device", require)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    for device in ("cuda", "cpu"):
        with pytest.raises(ConfigError, match="enough"):
            Processes.join(device)
    assert done == [1, "cuda", "cpu"]
