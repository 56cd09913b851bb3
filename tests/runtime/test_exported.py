"""Exported files in both engines, on a small graph made by hand: a right answer is known, and no export is needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import batched_nms

import paqdetr
from paqdetr.errors import BackendError, CheckpointError, ConfigError, NonFiniteError
from paqdetr.runtime import ExportInfo, FixedSize, Predictor, open_exported
from paqdetr.runtime.engines import Engine, is_sealed, seal
from paqdetr.runtime.info import KEY
from paqdetr.structures import ClassTable, Detections

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

INFO = ExportInfo(
    name="by_hand",
    classes=ClassTable((3, 70, 8), ("sitting duck", "鳥 🦆", 'a "quote", \\ and <&>')),
    preprocessing=FixedSize(4, 8, (10.0, 20.0, 30.0), (1.0, 2.0, 4.0)),
    raw=False,
    precision="f32",
    max_detections=2,
    clamp_boxes=True,
    versions={"paqdetr": "0"},
)
# Two boxes of an image: of the second class in its left half, of the first in its lower half.
BOXES = [[0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0]]


def write_onnx(file: Path, info: ExportInfo | None = INFO, batch: int | str = "N") -> Path:
    """Boxes and labels are constants; the scores are the image's mean grey level, and half of it."""
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    value = onnx.helper.make_tensor_value_info
    types = onnx.TensorProto
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["images"], ["pixels"], to=types.FLOAT),
            node("ReduceMean", ["pixels", "axes"], ["grey"], keepdims=0),
            node("Unsqueeze", ["grey", "last"], ["column"]),
            node("Mul", ["column", "shares"], ["scores"]),
            node("Mul", ["scores", "zero"], ["nothing"]),
            node("Unsqueeze", ["nothing", "end"], ["flat"]),
            node("Add", ["flat", "places"], ["boxes"]),
            node("Cast", ["nothing"], ["whole"], to=types.INT64),
            node("Add", ["whole", "kinds"], ["labels"]),
        ],
        "by_hand",
        [value("images", types.UINT8, [batch, 4, 8, 3])],
        [
            value("boxes", types.FLOAT, [batch, 2, 4]),
            value("scores", types.FLOAT, [batch, 2]),
            value("labels", types.INT64, [batch, 2]),
        ],
        [
            tensor(np.array([1, 2, 3]), "axes"),
            tensor(np.array([1]), "last"),
            tensor(np.array([2]), "end"),
            tensor(np.array([1 / 255, 0.5 / 255], np.float32), "shares"),
            tensor(np.array(0, np.float32), "zero"),
            tensor(np.array([BOXES], np.float32), "places"),
            tensor(np.array([[1, 0]]), "kinds"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    if info is not None:
        onnx.helper.set_model_props(model, {KEY: info.to_json()})
    onnx.save(model, str(file))
    seal(file)
    return file


def write_openvino(file: Path, info: ExportInfo | None = INFO, batch: int | str = "N") -> Path:
    openvino = pytest.importorskip("openvino")
    source = write_onnx(file.with_name("source.onnx"), info, batch)
    model = openvino.Core().read_model(str(source))
    if info is not None:
        model.set_rt_info(info.to_json(), ["model_info", KEY])
    openvino.save_model(model, str(file), compress_to_fp16=False)
    seal(file)
    return file


WRITERS: dict[str, Callable[..., Path]] = {"m.onnx": write_onnx, "m.xml": write_openvino}


@pytest.fixture(params=list(WRITERS))
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / request.param)


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("name", list(WRITERS))
def test_finds_what_was_worked_out_by_hand(name: str, batch: int | str, tmp_path: Path) -> None:
    model = paqdetr.load(WRITERS[name](tmp_path / name, INFO, batch))
    assert isinstance(model, Predictor)
    images = [np.full((20, 40, 3), grey, np.uint8) for grey in (204, 51, 255)]  # .8, .2 and 1
    for together in (1, 3):
        bright, dark, white = model.predict(images, threshold=0.3, batch_size=together)
        np.testing.assert_allclose(bright.scores, [0.8, 0.4], atol=1e-6)
        np.testing.assert_array_equal(bright.boxes, [[0, 0, 20, 20], [0, 10, 40, 20]])  # pixels of 20 x 40
        assert bright.labels.tolist() == [70, 3] and bright.names[70] == "鳥 🦆"
        assert len(dark) == 0 and len(white) == 2


def test_the_metadata_come_back(exported: Path) -> None:
    assert open_exported(exported).info == INFO and is_sealed(exported)


def test_arguments_choose_among_detections(exported: Path) -> None:
    model = open_exported(exported)
    white = Image.new("RGB", (40, 20), "white")
    [whole] = model.predict(white)
    assert whole.labels.tolist() == [70, 3]
    for wanted in ([3], 3, np.int64(3), ["sitting duck"], "sitting duck", {3, "sitting duck"}):
        assert model.predict(white, classes=wanted)[0].labels.tolist() == [3]
    with pytest.raises(ConfigError, match="no class 'siting duck'"):
        model.predict(white, classes=["siting duck"])
    with pytest.raises(ConfigError, match="classes: names none"):
        model.predict(white, classes=[])
    with pytest.raises(ConfigError, match="batch_size"):
        model.predict(white, batch_size=0)


def _set(key: str, value: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), key: value})


def _drop(text: str) -> str:
    content = json.loads(text)
    del content["classes"]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("format", 2), "written in format 2"),
        (_set("classes", [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "two classes one id"),
        (_set("classes", []), "'classes'"),
        (_set("preprocessing", {"height": 0}), "'height'"),
        (_set("threshold", 2), "'threshold'"),
        (_set("max_detections", 10**400), "'max_detections'"),
        (_set("precision", "f64"), "'precision'"),
        (_drop, "nothing for 'classes'"),
        (lambda text: "[]", "'preprocessing'"),
        (lambda text: text[:-1], "no valid json"),
    ],
)
def test_metadata_that_say_something_else_are_refused(change: Callable[[str], str], reason: str) -> None:
    text = change(INFO.to_json())
    with pytest.raises(CheckpointError, match=reason) as caught:
        ExportInfo.from_json(text, "m.onnx")
    assert caught.value.message.startswith("m.onnx: ")


@settings(max_examples=40)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    key=st.sampled_from(sorted(json.loads(INFO.to_json()))),
)
def test_no_value_in_the_metadata_is_a_defect_of_ours(key: str, value: Any) -> None:
    try:
        ExportInfo.from_json(_set(key, value)(INFO.to_json()), "m.onnx")
    except CheckpointError as error:
        assert "m.onnx" in error.message


def _flipped(file: Path) -> None:
    """One bit of a weight."""
    content = bytearray(file.read_bytes())
    content[content.rindex(np.float32(0.5 / 255).tobytes())] ^= 1
    file.write_bytes(content)


def _foreign(file: Path) -> None:
    WRITERS[file.name](file, None)


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.unlink(), "no such file"),
        (lambda file: file.write_bytes(b""), "not a readable"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "not a readable"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "not a readable"),
        (_foreign, "paqdetr did not export"),
        (lambda file: _flipped(file.with_suffix(".bin") if file.suffix == ".xml" else file), "damaged"),
        (lambda file: file.write_bytes(file.read_bytes() + b" "), "damaged"),
    ],
)
def test_damaged_and_foreign_files_end_in_one_line(
    name: str, damage: Callable[[Path], Any], reason: str, tmp_path: Path
) -> None:
    file = WRITERS[name](tmp_path / name)
    damage(file)
    with pytest.raises(CheckpointError, match=reason) as caught:
        paqdetr.load(file)
    assert name in caught.value.message and "\n" not in str(caught.value)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    file = write_openvino(tmp_path / "m.xml")
    file.with_suffix(".bin").unlink()
    with pytest.raises(CheckpointError, match=r"m\.bin: no such file"):
        open_exported(file)


@pytest.mark.parametrize(("name", "module"), [("m.onnx", "onnxruntime"), ("m.xml", "openvino")])
def test_an_engine_that_is_missing_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = WRITERS[name](tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=rf"{module} .*pip install 'paqdetr\["):
        open_exported(file)


def test_arguments_of_checkpoints_do_not_go_with_exported_files(tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "m.onnx")
    for arguments in ({"num_queries": 3}, {"classes": 2}, {"device": "cuda"}):
        with pytest.raises(ConfigError, match=r"m\.onnx"):
            paqdetr.load(file, **arguments)


def test_predictions_that_are_not_finite_name_the_image() -> None:
    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        scores = np.where(images[:, :1, 0, 0] > 0, np.nan, np.ones((len(images), 1))).astype(np.float32)
        return {
            "boxes": np.zeros((len(images), 1, 4), np.float32),
            "scores": scores,
            "labels": np.zeros((len(images), 1), int),
        }

    model = Predictor(Engine("by hand", INFO.to_json(), None, run))
    images = [np.zeros((4, 8, 3), np.uint8), np.ones((4, 8, 3), np.uint8)]
    assert len(model.predict(images[0], threshold=0)[0]) == 1
    with pytest.raises(NonFiniteError, match="image 1"):
        model.predict(images, threshold=0, batch_size=2)


@pytest.mark.parametrize("score", [0.0, 1 / (1 + np.exp(50.0))], ids=["onnxruntime", "OpenVINO"])
def test_queries_that_have_left_are_no_detections(score: float) -> None:
    """What an engine's sigmoid makes of their logit, -50. The graph fills up with them; the checkpoint leaves them out."""
    scores = np.array([[0.5, 1e-7, score, score]], np.float32)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"boxes": np.zeros((1, 4, 4), np.float32), "scores": scores, "labels": np.zeros((1, 4), int)}

    [found] = Predictor(Engine("by hand", INFO.to_json(), None, run)).predict(
        np.zeros((4, 8, 3), np.uint8), threshold=0
    )
    assert found.scores.tolist() == scores[0, :2].tolist()


def test_raw_outputs_are_decoded_as_the_detector_does() -> None:
    from paqdetr.config import ModelConfig
    from paqdetr.models.inference import postprocess

    logits, boxes = torch.randn(2, 5, 3), torch.rand(2, 5, 4)
    given: list[np.ndarray] = []

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        given.append(images)
        return {"logits": logits.numpy(), "pred_boxes": boxes.numpy()}

    info = replace(INFO, raw=True, max_detections=7)
    model = Predictor(Engine("by hand", info.to_json(), None, run))
    images = [np.full((4, 8, 3), (11, 24, 38), np.uint8)] * 2
    found = model.predict(images, threshold=0.4, batch_size=2)
    np.testing.assert_allclose(given[0][1, :, 2, 3], [1, 2, 2])  # (11 - 10) / 1, (24 - 20) / 2, (38 - 30) / 4
    config = ModelConfig(num_classes=3, max_detections=7)
    for image, ours in enumerate(found):
        theirs = postprocess(logits[image], boxes[image], (4, 8), INFO.classes, config, threshold=0.4)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-5)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
        assert ours.labels.tolist() == theirs.labels.tolist()


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.7, 1.0])
def test_duplicates_are_removed_as_torchvision_does(iou: float) -> None:
    corners = torch.rand(60, 2) * 60
    boxes = torch.cat([corners, corners + 20 + torch.rand(60, 2) * 30], dim=1)
    scores, labels = torch.rand(60), torch.randint(3, (60,))
    found = Detections(boxes.numpy(), scores.numpy(), labels.numpy()).without_duplicates(iou)
    kept = batched_nms(boxes.double(), scores.double(), labels, iou)
    np.testing.assert_array_equal(found.boxes, boxes[kept].numpy())
