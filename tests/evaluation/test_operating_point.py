"""What an evaluation recommends, and where it goes: into the checkpoint, and from there into what a user gets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paqdetr.checkpoint import read_checkpoint, read_header, write_checkpoint
from paqdetr.cli import run
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.distributed import Processes
from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.evaluation.evaluate import evaluate, evaluate_split
from paqdetr.metrics.query_usage import QueryUsage
from paqdetr.models import load
from paqdetr.models.detector import Detector
from paqdetr.models.files import reshape
from paqdetr.models.inference import detect_batch
from paqdetr.runs import Run
from paqdetr.runtime.tiles import Tiles
from paqdetr.structures import Detections, OperatingPoint


@pytest.fixture(scope="module")
def model(tiny_run: Run) -> Detector:
    return tiny_run.model()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`plant(duplicates=1, wrong=2)`: objects of the four images are found with scores .9, .8, .7 and .6, each once more .05
    lower, with two wrong boxes of .55 in each image."""

    def plant(*, duplicates: int = 0, wrong: int = 0, scale: float = 1.0) -> None:
        def detect(model: Detector, split: DetectionDataset, **_: Any) -> Iterator[tuple[int, Detections]]:
            for index in range(len(split)):
                boxes, ids = split.boxes(index), np.array(split.classes.ids)[split.labels(index)]
                scores = np.full(len(ids), 0.9 - 0.1 * index)
                nothing = (
                    np.tile(np.float32([0, 0, 2, 2]), (wrong, 1)) + np.arange(wrong, dtype=np.float32)[:, None] * 2
                )
                yield (
                    index,
                    Detections(
                        boxes=np.concatenate([*[boxes] * (1 + duplicates), nothing]),
                        scores=scale
                        * np.concatenate([*[scores - 0.05 * n for n in range(1 + duplicates)], np.full(wrong, 0.55)]),
                        labels=np.concatenate([*[ids] * (1 + duplicates), np.full(wrong, ids[0])]),
                    ),
                )

        monkeypatch.setattr(sys.modules[evaluate.__module__], "detect_split", detect)

    return plant


@pytest.mark.parametrize(
    ("planted", "nms", "threshold"),
    [
        ({}, None, 0.6),
        ({"wrong": 2}, None, 0.6),
        ({"duplicates": 1}, 0.7, 0.6),
        ({"duplicates": 1, "wrong": 2}, 0.7, 0.6),
        ({"scale": 0.05}, None, None),  # at most .045: of no use
    ],
)
def test_what_an_evaluation_recommends(
    model: Detector,
    tiny_digits: Path,
    plant: Callable[..., None],
    planted: Any,
    nms: float | None,
    threshold: float | None,
) -> None:
    plant(**planted)
    found = evaluate(model, data=tiny_digits)
    point = found.operating_point
    assert (point.nms, point.threshold) == (nms, threshold)
    assert point.duplicates_cost == pytest.approx(found.figures_nms.AP - found.figures.AP, abs=1e-6)
    assert found.figures_nms.AP == pytest.approx(1) and (point.duplicates_cost > 0.05) == (nms is not None)


def test_a_threshold_and_suppression_leave_what_users_see(
    model: Detector, tiny_digits: Path, plant: Callable[..., None]
) -> None:
    plant(duplicates=1, wrong=2)
    seen = evaluate(model, data=tiny_digits, nms=0.7, threshold=0.75)
    split = open_split(tiny_digits, "val")
    assert len(seen.results) == len(split.labels(0)) + len(split.labels(1))  # of the two images that score .9 and .8
    every = sum(2 * len(split.labels(index)) + 2 for index in range(4))
    assert len(evaluate(model, data=tiny_digits).results) == every


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"nms": 1.5}, "nms: expected an IoU from 0 to 1, found 1.5"),
        ({"nms": float("nan")}, "found nan"),
        ({"nms": False}, "nms: expected an IoU from 0 to 1, found False"),
        ({"nms": "0.7"}, "nms: expected an IoU from 0 to 1, found '0.7'"),
        ({"threshold": -0.1}, "threshold: expected a number"),
        ({"threshold": True}, "threshold: expected a number from 0 to 1, found True"),
        ({"threshold": "0.3"}, "threshold: expected a number from 0 to 1, found '0.3'"),
        ({"tiles": "64"}, "tiles: expected a side in whole pixels, at least 16, found '64'"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number of at least 1, found 2.0"),
        ({"tiles": Tiles(64), "observers": [QueryUsage(num_queries=20)]}, "tiles: observers look at"),
    ],
)
def test_numbers_out_of_range_or_of_another_type(
    model: Detector, tiny_digits: Path, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(model, data=tiny_digits, **how)
    if "observers" not in how:
        with pytest.raises(ConfigError, match=message):
            model(Image.new("RGB", (64, 64)), **how)


def test_numbers_of_numpy_are_numbers(model: Detector) -> None:
    image = Image.new("RGB", (64, 64))
    how: dict[str, Any] = {"threshold": np.float32(0.25), "nms": np.int64(1), "tiles": np.int32(96)}
    assert model(image, **how) == model(image, threshold=0.25, nms=1, tiles=96)


def test_tiles_larger_than_the_images_change_no_figure(model: Detector, tiny_digits: Path) -> None:
    split = open_split(tiny_digits, "val")
    plain, tiled = evaluate_split(model, split, batch_size=1), evaluate_split(model, split, tiles=Tiles(96))
    assert tiled.results == plain.results and astuple(tiled.figures) == astuple(plain.figures)
    smaller = evaluate_split(model, split, tiles=Tiles(64), nms=0.5)
    assert {row["image_id"] for row in smaller.results} == set(split.image_ids)
    assert max(row["bbox"][0] + row["bbox"][2] for row in smaller.results) > 64


def test_a_run_says_what_its_last_evaluation_found(tiny_run: Run) -> None:
    header = read_header(tiny_run.best)
    cost = header["metrics"]["AP_nms"] - header["metrics"]["AP"]
    assert header["operating_point"]["duplicates_cost"] == pytest.approx(cost, abs=1e-6)


def test_the_operating_point_stays_with_the_weights(model: Detector, tmp_path: Path) -> None:
    own = load_with(model, OperatingPoint(0.56, 0.7, 0.0125), tmp_path / "own.safetensors")
    assert own.operating_point == OperatingPoint(0.56, 0.7, 0.0125)
    assert read_header(tmp_path / "own.safetensors")["operating_point"]["threshold"] == 0.56
    assert reshape(own, classes=3)[0].operating_point == OperatingPoint()  # of other classes nothing is known
    plain = load_with(model, OperatingPoint(), tmp_path / "plain.safetensors")
    assert plain.operating_point == OperatingPoint() and "operating_point" not in read_header(
        tmp_path / "plain.safetensors"
    )


def load_with(model: Detector, point: OperatingPoint, path: Path) -> Detector:
    before, model.operating_point = model.operating_point, point
    model.save(path)
    model.operating_point = before
    return load(path)


@pytest.mark.parametrize("point", [{"threshold": 2}, {"nms": "much"}, {"threshold": float("nan")}, []])
def test_a_damaged_operating_point(tiny_run: Run, tmp_path: Path, point: Any) -> None:
    tensors, header = read_checkpoint(tiny_run.best)
    write_checkpoint(tmp_path / "a.safetensors", tensors, header | {"operating_point": point})
    with pytest.raises(CheckpointError, match="its header is malformed: operating_point"):
        load(tmp_path / "a.safetensors")


def test_predictions_begin_from_the_operating_point(
    model: Detector, tiny_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*given: Any, **how: Any) -> list[Detections]:
        return [one[np.repeat(np.arange(len(one)), 2)] for one in detect_batch(*given, **how)]

    monkeypatch.setattr("paqdetr.models.detector.detect_batch", twice)
    picture = tiny_digits / "val" / "000000.jpg"
    everything = model.predict(picture, threshold=0.0, nms=1)[0]
    threshold = float(everything.scores[100])
    own = load_with(model, OperatingPoint(threshold, 0.3), tmp_path / "own.safetensors")
    usual = own.predict(picture)[0]
    assert usual.boxes.tolist() == everything.above(threshold).without_duplicates(0.3).boxes.tolist()
    assert 0 < 2 * len(usual) <= len(own.predict(picture, nms=1)[0]) < len(everything)
    one = own.predict(picture, classes=[everything.names[int(everything.labels[0])]], threshold=0.0)[0]
    assert set(one.labels.tolist()) == {int(everything.labels[0])}
    with pytest.raises(ConfigError, match="the model has no class 'nothing'"):
        own.predict(picture, classes=["nothing"])


def test_tiles_of_a_detector(model: Detector, tiny_digits: Path) -> None:
    picture = tiny_digits / "val" / "000000.jpg"
    [plain], [tiled] = model.predict(picture, threshold=0.0), model.predict(picture, threshold=0.0, tiles=96)
    for part in ("boxes", "scores", "labels", "query_indices"):
        assert getattr(tiled, part).tobytes() == getattr(plain, part).tobytes()
    assert tiled.file_name == plain.file_name == "000000.jpg"
    with Image.open(picture) as image:
        double = image.convert("RGB").resize((192, 96))
    [wide] = model.predict(double, threshold=0.0, tiles=Tiles(96, 0.0))
    assert wide.boxes[:, 2].max() > 96 and wide.query_indices is None and (np.diff(wide.scores) <= 0).all()
    halves = [double.crop((0, 0, 96, 96)), double.crop((96, 0, 192, 96))]
    best = max(float(part.scores[0]) for part in model.predict(halves, threshold=0.0, batch_size=2))
    assert float(wide.scores[0]) == pytest.approx(best, abs=1e-5)


def test_predict_says_where_its_defaults_are_from(
    model: Detector, tiny_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_with(model, OperatingPoint(0.56, 0.7, 0.0125), tmp_path / "a.safetensors")
    picture = tiny_digits / "test" / "000000.jpg"
    command = ["predict", str(tmp_path / "a.safetensors"), str(picture), "--output", str(tmp_path / "out")]
    for options, line in (
        ([], "nms 0.7, threshold 0.56: from the run's evaluation\n"),
        (["--nms", "none"], "threshold 0.56: from the run's evaluation\n"),
        (["--threshold", "0.2"], "nms 0.7: from the run's evaluation\n"),
    ):
        assert run([*command, *options]) == 0
        assert capsys.readouterr().out.startswith(line)
    assert run([*command, "--nms", "0.5", "--threshold", "0.2"]) == 0
    assert "evaluation" not in capsys.readouterr().out
    for options, message in (
        (["--nms", "2"], "--nms: expected an IoU from 0 to 1, or none, found '2'"),
        (["--overlap", "0.3"], "--overlap and --with-whole are about tiles"),
        (["--tiles", "3"], "tiles: expected a side in whole pixels, at least 16, found 3"),
        (["--save", "draw,gif"], "save: expected some of draw, coco"),
        (["--every", "0"], "--every"),
    ):
        assert run([*command, *options]) == 2
        assert message in capsys.readouterr().err


def test_eval_with_suppression_and_tiles(
    tiny_run: Run, tiny_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(tiny_run.best), "--data", str(tiny_digits), "--results-out", str(tmp_path / "rows.json")]
    assert run([*command, "--nms", "0.3", "--tiles", "64", "--overlap", "0.25", "--threshold", "0.001"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert 0 < len(rows) and min(row["score"] for row in rows) >= 0.001
    capsys.readouterr()
    for given in (
        ["--results", "a.json", "--annotations", "b.json", "--tiles", "64"],
        ["--compare", "a.json", "b.json", "--annotations", "b.json", "--threshold", "0.3"],
        ["--compare", str(tiny_run.best), "a.json", "--data", str(tiny_digits), "--nms", "0.5"],
    ):
        assert run(["eval", *given]) == 2
        assert "a.json: --nms, --threshold and --tiles are about a MODEL" in capsys.readouterr().err


def test_eval_of_an_exported_model_refuses_a_gpu(
    tmp_path: Path, tiny_digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.onnx").write_bytes(b"")
    monkeypatch.setattr("paqdetr.distributed.Processes.join", lambda device: Processes())  # as if there were one
    assert run(["eval", str(tmp_path / "a.onnx"), "--data", str(tiny_digits), "--device", "cuda"]) == 2
    assert "a.onnx: an exported model runs on the CPU here, not on cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("point", "shown"),
    [
        (OperatingPoint(), "no threshold known"),
        (OperatingPoint(duplicates_cost=0.0), "found no threshold: too little was right"),
        (OperatingPoint(0.56, 0.7, 0.0125), "threshold 0.56, nms 0.70"),
    ],
)
def test_what_is_shown(point: OperatingPoint, shown: str) -> None:
    assert point.shown == shown


def test_least_score() -> None:
    known, unknown = OperatingPoint(threshold=0.0), OperatingPoint()
    assert [known.least_score(), known.least_score(0.6), known.least_score(0.0)] == [0.0, 0.6, 0.0]
    assert [unknown.least_score(), unknown.least_score(0.0), unknown.least_score(1.0)] == [0.3, 0.0, 1.0]
