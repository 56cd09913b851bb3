from __future__ import annotations

import importlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import paqdetr
from paqdetr.checkpoint import read_checkpoint, read_header
from paqdetr.config import load_config
from paqdetr.errors import ConfigError, DataError, NonFiniteError, UserError
from paqdetr.evaluation import evaluate
from paqdetr.models.detector import Detector
from paqdetr.runs import Run
from paqdetr.training import Callback, train
from paqdetr.training.callbacks import TrainingPlan
from paqdetr.training.optim import lr_factor

GOLDEN = Path(__file__).parent / "golden" / "losses_paq_dino_nano.json"
MODULE = importlib.import_module("paqdetr.training.trainer")
STEP = importlib.import_module("paqdetr.training.step")


class Listener(Callback):
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_start(self, plan: TrainingPlan) -> None:
        self.events.append(("start", plan))

    def on_step(self, step: int, loss: float) -> None:
        self.events.append(("step", (step, loss)))

    def on_record(self, record: dict[str, Any]) -> None:
        self.events.append(("record", record))

    def on_evaluation_progress(self, done: int, total: int) -> None:
        self.events.append(("progress", (done, total)))

    def on_evaluation(self, record: dict[str, Any]) -> None:
        self.events.append(("evaluation", record))

    def on_end(self) -> None:
        self.events.append(("end", None))

    def of(self, kind: str) -> list[Any]:
        return [event for name, event in self.events if name == kind]


@pytest.fixture
def digits(tmp_path: Path, tiny_digits: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_digits, tmp_path / "digits"))


# ---------------------------------------------------------------------------------------- the run folder


def test_the_run_folder(tiny_run: Run, tiny_settings: dict[str, Any]) -> None:
    assert sorted(file.name for file in tiny_run.output.iterdir()) == [
        ".lock",
        "best.safetensors",
        "config.yaml",
        "curves.png",
        "environment.json",
        "last.safetensors",
        "metrics.jsonl",
        "predictions.png",
        "training_state.safetensors",
    ]
    expected = load_config("paq_dino_nano", {**tiny_settings, "epochs": 2, "model.num_classes": 10})
    assert load_config(tiny_run.config_file) == expected
    for name in ("curves.png", "predictions.png"):
        with Image.open(tiny_run.output / name) as picture:
            assert min(picture.size) > 200
    assert tiny_run.finished


def test_the_records(tiny_run: Run) -> None:
    kinds = [record["kind"] for record in tiny_run.records()]
    assert kinds == ["start", "train", "train", "eval", "train", "train", "eval", "finished"]
    start = tiny_run.records("start")[0]
    assert start["device"].startswith("cpu") and start["step"] == 0
    assert {"version", "torch", "threads", "cores", "processes"} <= start.keys()
    assert start["attention"] == "numba"
    for number, record in enumerate(tiny_run.records("train"), start=1):
        assert record["step"] == number and record["epoch"] == number / 2
        assert record.keys() == {
            *("kind", "step", "epoch", "loss", "loss_class", "loss_l1", "loss_giou", "loss_encoder"),
            *("loss_denoising", "loss_diversity", "query_cosine", "mixture_entropy", "grad_norm"),
            *("images_per_second", "positives_per_box", "positives_histogram", "lr", "positives_gini"),
            *("positives_gini_chance", "gradient_gini", "pattern_gini", "dead_patterns", "pattern_cosine"),
        }
        parts = sum(value for key, value in record.items() if key.startswith("loss_"))
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
        assert 0 < record["mixture_entropy"] <= 1 and -1 <= record["query_cosine"] <= 1
        # One entry a decoder layer; the last layer is one-to-one.
        assert len(record["positives_per_box"]) == 3
        assert record["positives_per_box"][-1] == 1 and min(record["positives_per_box"]) >= 1
    for epoch, record in enumerate(tiny_run.records("eval"), start=1):
        assert (record["step"], record["epoch"], record["split"]) == (2 * epoch, epoch, "val")
        assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "AP_nms"} <= record.keys()
        assert {"per_class", "predictions_per_image", "boxes_per_image"} <= record.keys()
        assert list(record["per_class"]) == [str(digit) for digit in range(10)]
    (finished,) = tiny_run.records("finished")
    assert finished["step"] == 4 and finished["seconds"] > 0 and finished["peak_memory_gib"] > 0


def test_the_rate_in_the_records_is_the_one_of_the_step(tiny_run: Run) -> None:
    config = load_config(tiny_run.config_file)
    rates = [record["lr"] for record in tiny_run.records("train")]
    assert rates == [pytest.approx(config.lr * lr_factor(config, step, 4)) for step in range(4)]


def test_the_checkpoints(tiny_run: Run) -> None:
    for path in (tiny_run.best, tiny_run.last, tiny_run.output):
        model = paqdetr.load(path)
        assert isinstance(model, Detector) and not model.training and model.name == "paq_dino_nano"
        assert model.classes.names == tuple(str(digit) for digit in range(10))
        assert model.preprocessing.image_size == 96
    header = read_header(tiny_run.last)
    assert header["step"] == 4 and header["epoch"] == 2
    assert header["metrics"]["AP"] == tiny_run.records("eval")[-1]["AP"]
    assert read_header(tiny_run.best)["metrics"]["AP"] == tiny_run.metrics["AP"]
    best, loaded = tiny_run.model().state_dict(), paqdetr.load(tiny_run.output).state_dict()
    assert all(torch.equal(best[key], loaded[key]) for key in best)


def test_the_checkpoint_has_the_averaged_weights(tiny_run: Run) -> None:
    state, header = read_checkpoint(tiny_run.state_file)
    weights, _ = read_checkpoint(tiny_run.last)
    assert all(torch.equal(weights[key], state[f"average.{key}"]) for key in weights)
    assert any(not torch.equal(weights[key], state[f"model.{key}"]) for key in weights)
    assert header["updates"] == 4 == header["position"]["step"]


# ------------------------------------------------------------------------------------------- the training


def test_callbacks_hear_everything_in_order(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None
) -> None:
    listener = Listener()
    run = train(
        "paq_dino_nano",
        data=tiny_digits,
        output=tmp_path / "run",
        device="cpu",
        epochs=2,
        callbacks=[listener, Callback()],
        settings={**tiny_settings, "log_every": 2},
    )
    per_epoch = ["step", "step", "record", *["progress"] * 4, "evaluation"]
    assert [name for name, _ in listener.events] == ["start", *per_epoch, *per_epoch, "end"]
    (plan,) = listener.of("start")
    assert (plan.first_step, plan.total_steps, plan.images) == (0, 4, 8) and plan.device.startswith("cpu")
    assert plan.config == load_config(run.config_file)
    assert [step for step, _ in listener.of("step")] == [1, 2, 3, 4]
    assert listener.of("record") == run.records("train")
    assert listener.of("evaluation") == run.records("eval")
    losses = [loss for _, loss in listener.of("step")]
    assert run.records("train")[0]["loss"] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)


def test_without_a_validation_split(
    tmp_path: Path, digits: Path, tiny_settings: dict[str, Any], no_pictures: None
) -> None:
    (digits / "val.json").unlink()
    run = train("paq_dino_nano", data=digits, output=tmp_path / "run", device="cpu", epochs=2, settings=tiny_settings)
    assert run.records("eval") == [] and run.metrics == {} and run.finished
    assert read_header(run.best)["epoch"] == 2 == read_header(run.last)["epoch"]


def test_steps_and_evaluations_as_set(
    tmp_path: Path,
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    no_pictures: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = Listener()
    run = train(
        "dino_nano",
        data=tiny_digits,
        output=tmp_path / "run",
        device="cpu",
        epochs=10,
        max_steps=5,
        eval_every=2,
        callbacks=[listener],
        settings={**tiny_settings, "log_every": 3},
    )
    # Every third, the last of each epoch of two, and the last of all: none of the five is left out, or counted twice.
    records = run.records("train")
    assert [record["step"] for record in records] == [2, 3, 4, 5]
    losses = [loss for _, loss in listener.of("step")]
    means = [(losses[0] + losses[1]) / 2, *losses[2:]]
    assert [record["loss"] for record in records] == pytest.approx(means, rel=1e-5)
    assert [record["epoch"] for record in run.records("eval")] == [2, 3]
    assert run.records("finished")[0]["step"] == 5
    assert "mixture_entropy" not in run.records("train")[0] and "loss_diversity" not in run.records("train")[0]
    assert "max_steps" not in caplog.text


def test_more_steps_than_the_epochs_have_are_told(
    tmp_path: Path,
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    no_pictures: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = small(tiny_digits, tiny_settings, tmp_path / "run", epochs=1, max_steps=5)
    assert caplog.text.count("max_steps=5 changes nothing: epochs=1") == 1
    assert run.records("finished")[0]["step"] < 5


def test_precision_may_differ_between_trainings_of_one_process(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None
) -> None:
    losses = {}
    for amp in ("no", "bf16", "no"):
        listener = Listener()
        run = train(
            "paq_dino_nano",
            data=tiny_digits,
            output=tmp_path / f"run{len(list(tmp_path.iterdir()))}",
            device="cpu",
            max_steps=1,
            amp=amp,
            callbacks=[listener],
            settings=tiny_settings,
        )
        assert load_config(run.config_file).amp == amp
        losses.setdefault(amp, []).append(listener.of("step")[0][1])
    assert losses["no"][0] == pytest.approx(losses["no"][1], rel=1e-5)
    assert losses["bf16"][0] == pytest.approx(losses["no"][0], rel=0.05) and losses["bf16"] != losses["no"][:1]


def test_images_without_boxes_take_part(
    tmp_path: Path, digits: Path, tiny_settings: dict[str, Any], no_pictures: None
) -> None:
    content = json.loads((digits / "train.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    (digits / "train.json").write_text(json.dumps(content))
    run = train(
        "paq_dino_nano",
        data=digits,
        output=tmp_path / "run",
        device="cpu",
        epochs=1,
        settings={**tiny_settings, "batch_size": 1},
    )
    rows = run.records("train")
    assert len(rows) == 8 and all(math.isfinite(row["loss"]) for row in rows)
    assert sum("positives_per_box" in row for row in rows) == 1  # nothing defines it without boxes


# --------------------------------------------------------------------------------------- steps and their ends


def small(tiny_digits: Path, tiny_settings: dict[str, Any], output: Path, **arguments: Any) -> Run:
    settings = {**tiny_settings, "workers": 0, **arguments.pop("settings", {})}
    fixed: dict[str, Any] = {"data": tiny_digits, "device": "cpu", "settings": settings}
    return train("paq_dino_nano", output=output, **fixed | arguments)


def test_accumulated_batches_make_one_step(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None
) -> None:
    """Eight images are four batches of two: one step of three and one of what is left."""
    listener = Listener()
    settings = {"batch_size": 2, "accumulate": 3}
    run = small(tiny_digits, tiny_settings, tmp_path / "run", epochs=2, settings=settings, callbacks=[listener])
    assert [record["step"] for record in run.records("train")] == [1, 2, 3, 4]
    assert [record["step"] for record in run.records("eval")] == [2, 4]
    assert listener.of("start")[0].step_images == 6
    assert read_header(run.state_file)["updates"] == 4


def test_a_training_without_progress_ends_early(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AP .1 .3 .2 .3 .2: with patience 3 the fifth evaluation is the last."""
    figures = iter([0.1, 0.3, 0.2, 0.3, 0.2, 0.9])
    evaluate_together = MODULE.evaluate_together

    def pretend(*args: Any, **kwargs: Any) -> Any:
        found = evaluate_together(*args, **kwargs)
        ap = next(figures)
        monkeypatch.setattr(type(found), "to_json", lambda self: {"AP": ap, "AP50": ap})
        return found

    monkeypatch.setattr(MODULE, "evaluate_together", pretend)
    run = small(tiny_digits, tiny_settings, tmp_path / "run", epochs=20, patience=3)
    assert [record["AP"] for record in run.records("eval")] == [0.1, 0.3, 0.2, 0.3, 0.2]
    (finished,) = run.records("finished")
    assert finished["epoch"] == 5 and finished["stopped"] == "no better AP in 3 evaluations"
    assert read_header(run.best)["epoch"] == 2 and run.metrics["epoch"] == 2
    state = read_header(run.state_file)["position"]
    assert state["stale"] == 3 and state["best_ap"] == 0.3
    # Resumed before it could say so, it ends at once.
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[:-1]))
    small(tiny_digits, tiny_settings, run.output, epochs=20, patience=3, resume=True)
    assert run.finished and len(run.records("eval")) == 5


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(
    tmp_path: Path,
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    build, calls = MODULE.build_criterion, 0

    def poisoned(config: Any) -> Any:
        criterion = build(config)
        classify = criterion.classify

        def bad(logits: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            loss = classify(logits, goal)
            if calls not in (3, 4):  # matched and denoising terms of the second step
                return loss
            if what == "loss":
                return loss * float("nan")
            # Finite, with a gradient that is not: the root of zero.
            return loss + (logits - logits.detach()).abs().sqrt().sum() * 0

        criterion.classify = bad
        return criterion

    monkeypatch.setattr(MODULE, "build_criterion", poisoned)
    listener = Listener()
    arguments: dict[str, Any] = {"max_steps": 3, "nan_policy": "skip-step", "callbacks": [listener]}
    run = small(tiny_digits, tiny_settings, tmp_path / "run", **arguments)
    assert [record["step"] for record in run.records("train")] == [1, 3]
    (skipped,) = run.records("skipped")
    assert skipped["step"] == 2 and "became nan on images [" in skipped["reason"]
    assert [step for step, _ in listener.of("step")] == [1, 2, 3]
    assert math.isnan(listener.of("step")[1][1])
    assert read_header(run.state_file)["updates"] == 2
    tensors, _ = read_checkpoint(run.last)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())

    calls = 0
    with pytest.raises(NonFiniteError, match=r"became nan on images \["):
        small(tiny_digits, tiny_settings, tmp_path / "other", max_steps=3)


def test_an_overflow_in_half_precision_has_no_norm_and_is_counted(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient scaler of fp16 on the CPU: its first scale overflows, the next one does not."""
    build = MODULE.build_accelerator

    def scaled(*arguments: Any) -> Any:
        accelerator = build(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-127)
        return accelerator

    monkeypatch.setattr(MODULE, "build_accelerator", scaled)
    run = small(tiny_digits, tiny_settings, tmp_path / "run", max_steps=3, log_every=1)
    first, *later = run.records("train")
    assert first["overflowed_steps"] == 1 and first["grad_norm"] is None and math.isfinite(first["loss"])
    assert all(row["grad_norm"] > 0 and "overflowed_steps" not in row for row in later) and len(later) == 2
    assert run.records("skipped") == [], "no step of nan_policy's"
    assert read_header(run.state_file)["updates"] == 2, "the average takes in no step that was left out"


def test_gradients_that_are_never_finite_end_a_training_in_half_precision_too(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, make = MODULE.build_accelerator, MODULE.build_criterion

    def scaled(*arguments: Any) -> Any:
        accelerator = build(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    def poisoned(config: Any) -> Any:
        criterion = make(config)
        classify = criterion.classify
        criterion.classify = lambda logits, goal: (
            classify(logits, goal) + (logits - logits.detach()).abs().sqrt().sum() * 0
        )
        return criterion

    monkeypatch.setattr(MODULE, "build_accelerator", scaled)
    monkeypatch.setattr(MODULE, "build_criterion", poisoned)
    monkeypatch.setattr(STEP, "_MOST_OVERFLOWS", 3)
    with pytest.raises(NonFiniteError, match="the gradient's norm became nan"):
        small(tiny_digits, tiny_settings, tmp_path / "run", epochs=9)
    assert not Run(tmp_path / "run").finished


def test_what_was_left_out_leaves_no_trace_in_running_statistics(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Detector.forward, 0

    def infinite(model: Detector, images: torch.Tensor, *more: Any) -> Any:
        nonlocal calls
        calls += model.training
        if model.training and calls == 2:
            images = images.index_fill(3, torch.tensor([0]), torch.inf)
        return forward(model, images, *more)

    monkeypatch.setattr(Detector, "forward", infinite)
    settings = tiny_settings | {"model.normalize_summary": True, "model.freeze_backbone_norm": False}
    run = small(tiny_digits, settings, tmp_path / "run", max_steps=4, nan_policy="skip-step")
    assert [record["step"] for record in run.records("skipped")] == [2]
    for file in (run.last, run.state_file):
        assert all(bool(x.isfinite().all()) for x in read_checkpoint(file)[0].values() if x.is_floating_point())


def test_without_boxes_to_validate_the_last_epoch_is_the_best(
    tmp_path: Path,
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    no_pictures: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = Path(shutil.copytree(tiny_digits, tmp_path / "digits"))
    content = json.loads((data / "val.json").read_text())
    (data / "val.json").write_text(json.dumps(content | {"annotations": []}))
    run = small(data, tiny_settings, tmp_path / "run", epochs=3, patience=1)
    assert [record["AP"] for record in run.records("eval")] == [None] * 3
    assert read_header(run.best)["epoch"] == 3
    assert "val.json: no image has an object to be found, so that AP is undefined" in caplog.text


@pytest.fixture
def infinite_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class loss of a training is infinite."""
    build = MODULE.build_criterion

    def poisoned(config: Any) -> Any:
        criterion = build(config)
        classify = criterion.classify
        criterion.classify = lambda logits, goal: classify(logits, goal) * float("inf")
        return criterion

    monkeypatch.setattr(MODULE, "build_criterion", poisoned)


@pytest.mark.usefixtures("infinite_loss")
def test_too_many_steps_left_out_in_a_row(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "_MOST_SKIPPED", 3)
    with pytest.raises(NonFiniteError, match="3 steps in a row were left out; the last because the loss became"):
        small(tiny_digits, tiny_settings, tmp_path / "run", epochs=9, nan_policy="skip-step")
    assert len(Run(tmp_path / "run").records("skipped")) == 3


def test_the_run_says_what_it_was_made_with(tiny_run: Run) -> None:
    (entry,) = json.loads(tiny_run.environment_file.read_text())
    assert entry["paqdetr"] == paqdetr.__version__
    assert torch.__version__.split("+")[0] == entry["packages"]["torch"].split("+")[0]
    assert entry["machine"]["memory_gib"] > 0 and entry["processes"] == 1 and entry["command"].startswith("python")
    assert entry["git"] is None or len(entry["git"]["commit"]) == 40
    assert tiny_run.id == entry["id"] and len(entry["id"]) == 32


def test_nothing_that_is_written_holds_a_pickle(tiny_run: Run) -> None:
    import pickletools
    import zipfile

    for path in tiny_run.output.iterdir():
        known = path.name == ".lock" or path.suffix in (".safetensors", ".json", ".jsonl", ".yaml", ".png")
        assert known and not zipfile.is_zipfile(path)
        with pytest.raises(ValueError), path.open("rb") as file:
            for _ in pickletools.genops(file):
                pass


# --------------------------------------------------------------------------------------------- what fails


def refused(error: type[UserError], output: Path, **arguments: Any) -> UserError:
    """The error of a training that must not begin, and must not leave a run behind."""
    with pytest.raises(error) as caught:
        train("paq_dino_nano", output=output, **arguments)
    assert not output.exists() or list(output.iterdir()) == []
    return caught.value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "cpu", "amp": "fp16"}, "amp='fp16' needs a GPU"),
        ({"device": "cpu", "settings": {"model.backbone": "resnet9000"}}, "no model 'resnet9000'"),
    ],
)
def test_mistakes_leave_no_run_behind(tmp_path: Path, tiny_digits: Path, arguments: dict[str, Any], words: str) -> None:
    assert words in refused(ConfigError, tmp_path / "run", data=tiny_digits, **arguments).message


def test_no_cuda(tmp_path: Path, tiny_digits: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    error = refused(ConfigError, tmp_path / "run", data=tiny_digits, device="cuda")
    assert "'cuda'" in error.message and error.remedy == "use --device cpu, in Python device='cpu'"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode(
    tmp_path: Path, digits: Path, tiny_settings: dict[str, Any], workers: int
) -> None:
    (digits / "train" / "000003.jpg").write_text("no image")
    listener = Listener()
    with pytest.raises(DataError, match=r"000003\.jpg: not an image"):
        train(
            "paq_dino_nano",
            data=digits,
            output=tmp_path / "run",
            device="cpu",
            workers=workers,
            callbacks=[listener],
            settings=tiny_settings,
        )
    assert listener.events[-1] == ("end", None)  # a progress bar is put away
    assert not Run(tmp_path / "run").finished and not Run(tmp_path / "run").last.exists()


@pytest.mark.usefixtures("infinite_loss")
def test_a_loss_that_is_not_finite_names_the_images(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any]
) -> None:
    with pytest.raises(NonFiniteError, match=r"the loss became (inf|nan) on images \[\d") as caught:
        train("paq_dino_nano", data=tiny_digits, output=tmp_path / "run", device="cpu", settings=tiny_settings)
    assert "learning rate" in caught.value.remedy


# ---------------------------------------------------------------------------------------- the stored losses


def test_twenty_steps_reproduce_stored_losses(
    tmp_path: Path, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None, one_thread: None
) -> None:
    """A change of model, losses, data or recipe shows here. If it is meant, store anew:

    UPDATE_GOLDEN=1 python -m pytest tests/training/test_train.py -k stored_losses
    """
    listener = Listener()
    train(
        "paq_dino_nano",
        data=tiny_digits,
        output=tmp_path / "run",
        device="cpu",
        epochs=10,
        eval_every=10,
        workers=0,
        callbacks=[listener],
        pretrained_backbone=True,
        settings={**tiny_settings, "model.backbone": "tf_efficientnet_lite0"},
    )
    losses = [loss for _, loss in listener.of("step")]
    assert len(losses) == 20
    here = {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}
    if os.environ.get("UPDATE_GOLDEN"):
        what = "loss of every step in tests/training/test_train.py::test_twenty_steps_reproduce_stored_losses"
        content = {"what": what, **here, "losses": [round(loss, 5) for loss in losses]}
        GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
        pytest.skip(f"stored in {GOLDEN.name}; run again without UPDATE_GOLDEN")
    stored = json.loads(GOLDEN.read_text())
    if here == {key: stored[key] for key in here}:
        assert losses[:3] == pytest.approx(stored["losses"][:3], rel=1e-3)
        assert losses == pytest.approx(stored["losses"], rel=2e-2)
    else:
        # Elsewhere pixels and sums differ in their last bits, and a proposal or a match that was nearly a tie falls the other
        # way: single steps then differ by a few percent, their mean does not.
        assert losses[:3] == pytest.approx(stored["losses"][:3], rel=5e-2)
        assert losses == pytest.approx(stored["losses"], rel=0.2)
        assert sum(losses) == pytest.approx(sum(stored["losses"]), rel=2e-2)


# ------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["paq_dino_nano", "ddq_detr_nano", "paq_ddq_detr_nano", "relation_detr_nano", "co_dino_nano", "paq_co_dino_nano"],
)
def test_eight_images_are_learnt_by_heart(name: str, tmp_path: Path, no_pictures: None) -> None:
    """About two minutes each on two cores."""
    from paqdetr.data.digits import make_digits

    data = make_digits(tmp_path / "digits", size=160, train=8, val=1, test=1)
    run = train(
        name,
        data=data,
        output=tmp_path / "run",
        device="cpu",
        epochs=250,
        eval_every=250,
        settings={
            "image_size": 160,
            "batch_size": 4,
            "augment.flip": 0.0,
            "augment.crop": 0.0,
            "augment.scale": (1.0, 1.0),
            "ema_decay": 0.98,
            **({"loss.one_to_many_until": 0.3} if name.startswith("paq") else {}),
        },
    )
    found = evaluate(paqdetr.load(run.last), data=data, split="train")
    assert found.figures.AP >= 0.9, found.to_json()


# ---------------------------------------------------------------------------------------- from a checkpoint


def test_a_training_from_a_checkpoint(
    tmp_path: Path, tiny_run: Run, tiny_digits: Path, tiny_settings: dict[str, Any], no_pictures: None
) -> None:
    settings = {**tiny_settings, "init": str(tiny_run.best), "model.num_queries": 12, "lr": 1e-12}
    settings |= {"backbone_lr": 1e-12, "ema_decay": 0.0}
    run = train("paq_dino_nano", data=tiny_digits, output=tmp_path / "run", epochs=1, settings=settings)
    start = run.records("start")[0]["init"]
    assert start["queries"] == [20, 12] and len(start["known_classes"]) == 10 and not start["new_classes"]
    old, new = (read_checkpoint(path)[0] for path in (tiny_run.best, run.best))
    for key in ("encoder.level_embed", "query_source.patterns", "decoder.class_heads.0.weight"):
        torch.testing.assert_close(new[key], old[key], atol=1e-6, rtol=1e-5)


def test_a_training_from_another_model_is_refused_before_it_begins(
    tmp_path: Path, tiny_run: Run, tiny_digits: Path, tiny_settings: dict[str, Any]
) -> None:
    settings = {**tiny_settings, "init": str(tiny_run.best), "model.num_patterns": 7}
    with pytest.raises(UserError, match="num_patterns 64 instead of 7"):
        train("paq_dino_nano", data=tiny_digits, output=tmp_path / "run", epochs=1, settings=settings)
    assert not (tmp_path / "run" / "config.yaml").exists()
