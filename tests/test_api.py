"""The public names of the README and the design: they stay."""

from __future__ import annotations

import ast
import inspect
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import paqdetr
from paqdetr.runs import Run


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def tiny_model(tiny_run: Run) -> paqdetr.Detector:
    return tiny_run.model()


def test_every_name_is_there() -> None:
    assert set(paqdetr.__all__) <= set(dir(paqdetr))
    for name in paqdetr.__all__:
        assert getattr(paqdetr, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = paqdetr.tarin
    assert paqdetr.__version__.count(".") >= 2
    assert issubclass(paqdetr.CheckpointError, paqdetr.UserError)


def test_signatures() -> None:
    create = parameters(paqdetr.create_model)
    assert next(iter(create)) == "name" and "num_classes" in create
    assert list(parameters(paqdetr.load)) == ["path", "device", "classes", "num_queries", "threads"]
    assert parameters(paqdetr.list_models)["pattern"].default == "*"
    train = parameters(paqdetr.train)
    assert list(train)[:3] == ["model", "data", "output"]
    assert {"resume", "device", "callbacks", "settings", "overrides"} <= train.keys()
    assert train["data"].kind is inspect.Parameter.KEYWORD_ONLY
    assert train["overrides"].kind is inspect.Parameter.VAR_KEYWORD
    evaluate = parameters(paqdetr.evaluate)
    assert list(evaluate)[:3] == ["model", "data", "split"] and evaluate["split"].default == "val"
    assert list(parameters(paqdetr.Detector.predict)) == [
        "self",
        "images",
        "threshold",
        "batch_size",
        "nms",
        "classes",
        "tiles",
        "unknown",
    ]
    assert parameters(paqdetr.Detector.predict)["threshold"].default is None  # that of the run's evaluation, else 0.3
    assert list(parameters(paqdetr.Detector.forward))[:3] == ["self", "images", "padding_mask"]


def test_list_recipes() -> None:
    names = paqdetr.list_recipes("*_finetune")
    assert names == ["dino_r50_finetune", "paq_dino_r50_finetune"]
    assert set(names) < set(paqdetr.list_recipes()) and "digits_quickstart" in paqdetr.list_recipes()
    assert not set(paqdetr.list_recipes()) & set(paqdetr.list_models())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, d, f: m.predict(d, threshold=math.nan), paqdetr.ConfigError, "threshold: .*found nan"),
        (lambda m, d, f: m.predict(d, threshold=2), paqdetr.ConfigError, "threshold: .*from 0 to 1, found 2"),
        (lambda m, d, f: m.predict(d, batch_size=0), paqdetr.ConfigError, "batch_size: .*at least 1, found 0"),
        (lambda m, d, f: m.predict(d, batch_size=-1), paqdetr.ConfigError, "batch_size: .*found -1"),
        (lambda m, d, f: m.predict(torch.zeros(8, 8, 3)), paqdetr.DataError, r"a tensor of shape \(8, 8, 3\)"),
        (lambda m, d, f: m.predict(f), paqdetr.DataError, "not an image in a known format"),
        (lambda m, d, f: m.predict(f, conf=0.3), paqdetr.ConfigError, r"no argument 'conf' \(write threshold= instead"),
        (lambda m, d, f: m(np.zeros((8, 8)), iou=0.3), paqdetr.ConfigError, r"'iou' \(write nms= instead"),
        (lambda m, d, f: m.predict(f, imgsz=640), paqdetr.ConfigError, "leave it out: .* the model's own image size"),
        (lambda m, d, f: m.predict(f, device="cpu"), paqdetr.ConfigError, r"paqdetr.load\(path, device=\.\.\.\)"),
        (lambda m, d, f: m.predict(f, hue=1), paqdetr.ConfigError, r"'hue' \(help\(model.predict\) lists"),
        (
            lambda m, d, f: m(torch.zeros(1, 3, 64, 64), threshold=0.3),
            paqdetr.ConfigError,
            r"forward pass.*\(model.predict\(tensor, threshold=\.\.\.\) takes pictures",
        ),
        (lambda m, d, f: paqdetr.evaluate(m, data=d, batch_size=0), paqdetr.ConfigError, "batch_size"),
        (lambda m, d, f: paqdetr.evaluate(m, data=d, batch_size=-1), paqdetr.ConfigError, "batch_size"),
        (lambda m, d, f: paqdetr.evaluate(3, data=d), paqdetr.ConfigError, "or a path, found int"),  # type: ignore[arg-type]
        (lambda m, d, f: paqdetr.evaluate(d, data=d), paqdetr.CheckpointError, "no checkpoint"),
        (lambda m, d, f: paqdetr.load(f, device="gpu"), paqdetr.ConfigError, "device 'gpu': .* in Python device='"),
        (
            lambda m, d, f: paqdetr.load("dino_nano"),
            paqdetr.CheckpointError,
            r"name of a model .*create_model\('dino_nano'\)",
        ),
        (lambda m, d, f: paqdetr.load("me/digits"), paqdetr.CheckpointError, "no such file or folder .*hf:me/digits"),
        (lambda m, d, f: paqdetr.create_model("DINO-Nano"), paqdetr.ConfigError, "did you mean 'dino_nano'"),
        (
            lambda m, d, f: paqdetr.train(m, data=d, output=d),
            paqdetr.ConfigError,
            r"a name .*found a Detector \(.*init=",
        ),  # type: ignore[arg-type]
        (
            lambda m, d, f: paqdetr.train("dino_nano", data=d, output=d, settings="epochs=1"),  # type: ignore[arg-type]
            paqdetr.ConfigError,
            "settings: expected a mapping, found a str",
        ),
        (lambda m, d, f: m.train(data=d, epochs=3), paqdetr.ConfigError, r"paqdetr\.train\('paq_dino_nano', data="),
        (lambda m, d, f: m.train(str(d)), paqdetr.ConfigError, r"paqdetr\.train"),
        (lambda m, d, f: paqdetr.Predictor(f), paqdetr.ConfigError, r"paqdetr\.load\(path\)"),
        (
            lambda m, d, f: m.predict(np.zeros((8, 8)), classes=["cat"]),
            paqdetr.ConfigError,
            r"no class 'cat' \(it has 0, 1, 2",
        ),
        (lambda m, d, f: m.predict(np.zeros((8, 8)))[0].xyxy, AttributeError, "no 'xyxy'; here it is boxes"),
        (lambda m, d, f: m.predict(np.zeros((8, 8)))[0].speed, AttributeError, "Detections has no 'speed'$"),
        (lambda m, d, f: paqdetr.Run(str(d / "x")).model(), paqdetr.CheckpointError, "best.safetensors: no such file"),
    ],
)
def test_arguments_that_cannot_be(
    call: Callable[..., object],
    kind: type[Exception],
    message: str,
    tiny_model: paqdetr.Detector,
    tiny_run: Run,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=message):
        call(tiny_model, tmp_path, tiny_run.best)


def test_evaluate_takes_a_path(tiny_run: Run, tiny_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for place in (tiny_run.output, str(tiny_run.best)):
        assert paqdetr.evaluate(place, data=tiny_digits).figures.AP == tiny_run.metrics["AP"]


def test_create_model_and_call_it() -> None:
    model = paqdetr.create_model(
        "paq_dino_nano", num_classes=5, dim=32, ffn_dim=64, num_queries=15, image_size=96
    ).eval()
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    with torch.no_grad():
        out = model(torch.randn(2, 3, 64, 96), padding_mask=mask)
    assert out.pred_logits.shape == (2, 15, 5) and out.pred_boxes.shape == (2, 15, 4)
    assert (out.pred_boxes >= 0).all() and (out.pred_boxes <= 1).all()
    for key in ("num_querys", "model.num_querys"):
        with pytest.raises(paqdetr.ConfigError, match=r"unknown setting 'model\.num_querys'"):
            paqdetr.create_model("paq_dino_nano", **{key: 15})
    dotted = paqdetr.create_model("dino_nano", classes=["cat", "dog"], **{"model.num_queries": 15})
    assert dotted.names == {0: "cat", 1: "dog"} and dotted.config.num_classes == 2 and dotted.config.num_queries == 15
    with pytest.raises(paqdetr.ConfigError, match="num_classes=3, but there are 2 classes"):
        paqdetr.create_model("dino_nano", classes=["cat", "dog"], num_classes=3)
    with pytest.raises(paqdetr.ConfigError, match="unknown model"):
        paqdetr.create_model("paq_dino_nanoo")


def test_detections(tiny_run: Run, tiny_digits: Path) -> None:
    path = tiny_digits / "val" / "000000.jpg"
    found = tiny_run.model().predict(path, threshold=0.0)[0]
    assert found.boxes.shape == (len(found), 4) and found.boxes.dtype == np.float32
    assert found.boxes.min() >= 0 and found.boxes.max() <= 96
    assert (np.diff(found.scores) <= 0).all()
    assert set(found.labels.tolist()) <= set(range(1, 11)) and found.names[1] == "0"  # the data set's own ids

    some = found.above(float(found.scores[4]))
    assert len(some) >= 5 and some.scores.min() >= found.scores[4]

    rows = some.to_coco()
    assert len(rows) == len(some) and rows[0]["image_id"] == "000000.jpg"
    x, y, width, height = rows[0]["bbox"]
    assert [x, y, x + width, y + height] == pytest.approx(some.boxes[0].tolist(), abs=1e-4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on OpenCV
        other = some.to_supervision()
    assert np.array_equal(other.xyxy, some.boxes) and other.data["class_name"][0] in set("0123456789")
    assert len(found.above(1.1).to_supervision()) == 0 and found.above(1.1).to_coco() == []

    with Image.open(path) as opened:
        before = np.asarray(opened)
        drawn = some.draw(opened)
    assert drawn.size == (96, 96) and np.abs(np.asarray(drawn, int) - before).mean() > 0.5


def test_what_is_returned_is_shown_in_a_few_lines(tiny_run: Run, tiny_digits: Path, tmp_path: Path) -> None:
    """In a terminal and as HTML: the title, and the figures that are asked for first."""
    model = tiny_run.model()
    evaluation = paqdetr.evaluate(model, data=tiny_digits)
    for shown, title, parts in (
        (model, "Detector paq_dino_nano", ["10: 0, 1, 2, 3", "long side 96", "20", "float32 on cpu"]),
        (
            tiny_run,
            f"Run {tiny_run.output}: finished: step 4 of 4, epoch 2 of 2",
            ["AP 0.", "best.safetensors", "curves.png"],
        ),
        (
            evaluation,
            f"Evaluation: AP {evaluation.figures.AP:.3f}",
            ["AP50, AP75", "duplicates cost", "images per second"],
        ),
        (paqdetr.Run(tmp_path), f"Run {tmp_path}: no run", ["files"]),
    ):
        lines, page = repr(shown).splitlines(), shown._repr_html_()
        assert lines[0] == title and 2 <= len(lines) <= 9 and max(map(len, lines[1:])) < 120
        assert f"<b>{title}</b>" in page
        for part in parts:
            assert part in repr(shown) and part in page


def python_of(page: str) -> list[str]:
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    ("page", "here"),
    [
        ("convert", {"checkpoint0011.pth": "dino.safetensors", 'origin="dino"': 'origin="paqdetr"'}),
        ("evaluation", {}),
        ("predict", {'"car"': '"7"'}),
        ("queries", {'"DIR"': '"data"'}),
        (
            "training",
            {
                '"DIR"': '"data"',
                '"RUN", epochs=2': '"new", epochs=1, settings=tiny',
                "pretrained_backbone=True": "**small",
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_python_of_a_page_runs(
    page: str,
    here: dict[str, str],
    tiny_run: Run,
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for videos, on a model of digits; `here` is what is called otherwise here."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name, target in {
        "runs/first": tiny_run.output,
        "RUN": tiny_run.output,
        "dino.safetensors": tiny_run.best,
        "data": tiny_digits,
        "test.json": tiny_digits / "test.json",
    }.items():
        Path(name).symlink_to(target)
    with Image.open(tiny_digits / "val" / "000000.jpg") as picture:
        for name in ("photo.jpg", "a.jpg", "b.jpg", "aerial.tif"):
            picture.save(name)
    keys = ("image_size", *(key for key in tiny_settings if key.startswith("model.")))
    names: dict[str, Any] = {"tiny": tiny_settings, "small": {key: tiny_settings[key] for key in keys}}
    if page == "evaluation":
        names["results"] = paqdetr.evaluate(tiny_run.output, data=tiny_digits, split="test").results
    for block in python_of(page):
        if ".mp4" not in block:
            for word, other in here.items():
                block = block.replace(word, other)
            exec(block, names)
    assert Path("drawn.png").is_file() == (page == "predict")
    assert Path("mine.safetensors").is_file() == Path("new/best.safetensors").is_file() == (page == "training")


@pytest.mark.parametrize("page", ["deploy", "serve"])
def test_the_names_of_a_page_are_there(page: str) -> None:
    """Running it would export models, and push to a hub."""
    known = {"paqdetr": paqdetr, "model": paqdetr.Detector}
    nodes = [node for block in python_of(page) for node in ast.walk(ast.parse(block))]
    names = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    plain = [name for name in names if re.fullmatch(r"(paqdetr|model)(\.\w+)+", name)]
    assert len(plain) >= 3 and all(eval(name, known) is not None for name in plain)
    assert "import paqdetr\n" in python_of(page)[0]
