"""Exports of tiny models with random weights: what is written, what is refused, and that a wrong file is not kept."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paqdetr
from paqdetr.cli import run
from paqdetr.data.digits import make_digits
from paqdetr.deploy import export
from paqdetr.deploy.export import to_openvino
from paqdetr.deploy.graph import DeployedDetector, fixed_size
from paqdetr.deploy.parity import compare_with_model, digits_pictures
from paqdetr.errors import ConfigError, ExportError
from paqdetr.models import create_model, list_models
from paqdetr.models.folding import FoldedConv2d
from paqdetr.runtime import Predictor, open_exported
from paqdetr.structures import OperatingPoint

from .conftest import Exported, tiny

onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
for _package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(_package)
pytestmark = pytest.mark.usefixtures("graphs_once")


def opened(file: Path) -> Predictor:
    model = paqdetr.load(file)
    assert isinstance(model, Predictor)
    return model


def test_baked_weights_compute_the_same() -> None:
    model = tiny()
    module = DeployedDetector(model)
    assert not any(isinstance(part, FoldedConv2d) for part in module.modules())
    assert any(isinstance(part, FoldedConv2d) for part in model.modules()), "the model itself stays as it is"
    image = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    [own] = model.predict(image[0].numpy(), threshold=0)
    with torch.no_grad():
        boxes, scores, labels = (output[0].numpy() for output in module(image))
    np.testing.assert_allclose(64 * boxes, own.boxes, atol=1e-3)
    np.testing.assert_allclose(scores, own.scores, atol=1e-5)
    assert [model.classes.ids[label] for label in labels] == own.labels.tolist()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"format": "tflite"}, "format: expected one of onnx"),
        ({"precision": "f64"}, "precision: expected one of f32"),
        ({"precision": "int8"}, "images to calibrate on"),
        ({"precision": "f16", "format": "pt2"}, "does not go with the format pt2"),
        ({"batch": 0}, "batch: expected 1 to 1024"),
        ({"batch": True}, "batch: expected 1 to 1024"),
        ({"batch": 4, "precision": "int8", "calibrate": "digits"}, "int8 does not go with batch 4"),
        ({"batch": 4, "format": "torchscript"}, "batch does not go with the format torchscript"),
        ({"slow": True, "precision": "int8", "calibrate": "digits"}, "openvino alone, found int8 in onnx"),
        ({"slow": True, "format": "openvino"}, "openvino alone, found f32 in openvino"),
        ({"image_size": (100, 64)}, "multiples of 32"),
        ({"image_size": (0, 64)}, "multiples of 32"),
        ({"image_size": 100}, "multiples of 32"),
        ({"image_size": (320,)}, "image_size: expected"),
        ({"image_size": 320.0}, "image_size: expected"),
        ({"image_size": "320"}, "image_size: expected"),
        ({"max_drop": 2.0}, "max_drop"),
        ({"nms": True}, "nms: expected an IoU from 0 to 1, found True"),
        ({"threshold": 1.5}, "threshold: expected a number from 0 to 1"),
        ({"output": "model.pb"}, r"model\.pb: no format has this ending \(.*\.xml \(openvino\)"),
        ({"output": "model.pb", "format": "onnx"}, r"ends in \.onnx"),
        ({"model": 3}, "model: expected a Detector, a checkpoint or a run's folder, found int"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(
    arguments: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    arguments = {"model": tiny(), "output": tmp_path / "m.onnx", **arguments}
    with pytest.raises(ConfigError, match=reason):
        export(**arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.report.json"])
def test_files_of_others_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"of somebody else")
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: the file exists"):
        export(tiny(), tmp_path / "m.onnx")
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("image_size", "expected"), [(320, (320, 320)), ((800, 1333), (800, 800)), (300, (320, 320))], ids=str
)
def test_the_size_is_the_square_of_the_checkpoint(image_size: Any, expected: tuple[int, int]) -> None:
    model = tiny()
    model.preprocessing = replace(model.preprocessing, image_size=image_size)
    size = fixed_size(model, None)
    assert (size.height, size.width) == expected
    assert fixed_size(model, (64, 128)).target_size(1, 1) == (64, 128)
    assert fixed_size(model, 64) == fixed_size(model, (64, 64))


@pytest.mark.integration
def test_metadata_say_where_the_file_comes_from(exported: Exported) -> None:
    import hashlib

    import onnx

    model = opened(exported.file)
    assert model.info.source == hashlib.sha256(exported.checkpoint.read_bytes()).hexdigest()
    assert {"paqdetr", "torch", "onnx"} <= model.info.versions.keys() and len(model.classes) == 10
    graph = onnx.load(str(exported.file))
    onnx.checker.check_model(graph)
    assert [tuple(d.dim_param or d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim)] == [
        ("batch", 64, 64, 3)
    ]
    assert str(Path(paqdetr.__file__).parent) not in str(graph), "no paths of the machine that exported it"
    report = json.loads(exported.file.with_name("tiny.onnx.report.json").read_text())
    assert report["parity"]["passed"] and len(report["parity"]["images"]) == 8


@pytest.mark.integration
def test_selection_of_distinct_queries_is_in_the_graph(tmp_path: Path) -> None:
    """For every image of a batch by itself: different ones lose different queries."""
    model = tiny("ddq_detr_nano")
    done = export(model, tmp_path / "ddq.onnx")
    assert done.parity is not None and done.parity.passed
    pictures, engine = digits_pictures(3, 64), open_exported(done.file)
    found = [engine.predict(pictures, threshold=0.01, batch_size=size) for size in (1, 3)]
    for own, one, three in zip(model.predict(pictures, threshold=0.01), *found, strict=True):
        assert len(own) < 30 * 10  # queries have left
        assert len(own) == len(one) == len(three) > 0
        np.testing.assert_allclose(one.scores, own.scores, atol=1e-4)
        np.testing.assert_allclose(three.scores, one.scores, atol=1e-5)
        np.testing.assert_allclose(three.boxes, one.boxes, atol=1e-2)
    of_three = opened(export(model, tmp_path / "ddq.pt2", batch=3).file)  # its check predicts single pictures
    assert of_three.engine.batch == 3 and len(of_three.predict(pictures[0], threshold=0.01)[0]) == len(found[0][0])
    script = export(model, tmp_path / "ddq.torchscript", format="torchscript").file
    # In a process that has not imported torchvision, whose operator the graph has.
    subprocess.run([sys.executable, "-c", f"import paqdetr; paqdetr.load({str(script)!r})"], check=True)


@pytest.mark.integration
def test_batches_of_one_and_three_agree(exported: Exported) -> None:
    model, pictures = opened(exported.file), digits_pictures(3, 64)
    for one, three in zip(model.predict(pictures), model.predict(pictures, batch_size=3), strict=True):
        np.testing.assert_allclose(one.scores, three.scores, atol=1e-5)
        assert sorted(one.labels) == sorted(three.labels)


@pytest.mark.integration
def test_a_changed_weight_fails_the_comparison_and_leaves_no_file(exported: Exported, tmp_path: Path) -> None:
    model = paqdetr.load(exported.checkpoint)
    file, pictures = opened(exported.file), digits_pictures(2, 64)
    assert compare_with_model(model, file, pictures, threshold=0.3).passed
    with torch.no_grad():
        model.decoder.box_heads[-1][-1].bias[0] += 0.3
    assert not compare_with_model(model, file, pictures, threshold=0.3).passed


@pytest.mark.integration
def test_what_does_not_agree_is_not_kept(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tiny()
    with torch.no_grad():
        wrong.decoder.box_heads[-1][-1].bias[0] += 0.3
    module = sys.modules["paqdetr.deploy.export"]  # its name in the package is the function's
    monkeypatch.setattr(module, "DeployedDetector", lambda model, raw: DeployedDetector(wrong, raw=raw))
    with pytest.raises(ExportError, match="does not find what the model finds") as caught:
        export(exported.checkpoint, tmp_path / "m.torchscript", format="torchscript")
    assert caught.value.parity is not None and not list(tmp_path.iterdir())


@pytest.mark.integration
@pytest.mark.parametrize("form", ["pt2", "torchscript"])
def test_torch_formats(form: Any, tmp_path: Path) -> None:
    model = tiny()
    model.operating_point = OperatingPoint(threshold=0.45, nms=0.6)
    done = export(model, tmp_path / f"m.{form}")  # the ending says which format
    found = opened(done.file)
    assert found.operating_point == model.operating_point and done.parity is not None and done.parity.passed
    assert done.report_file is not None and done.report_file.is_file()
    done = export(model, tmp_path / f"m.{form}", format=form, check=False, nms=1)  # it may be replaced
    assert [file.name for file in tmp_path.iterdir()] == [f"m.{form}"]  # no report that speaks of the one before
    assert done.report_file is None and done.info.nms is None and opened(done.file).operating_point.nms is None
    (tmp_path / f"m.{form}").write_bytes(b"damaged")
    with pytest.raises(paqdetr.CheckpointError, match="not a readable"):
        opened(done.file)


@pytest.mark.integration
def test_raw_outputs_have_the_names_of_transformers(tmp_path: Path) -> None:
    import onnxruntime

    model = tiny(decoder_layers=1)
    done = export(model, tmp_path / "raw.onnx", raw=True, batch=2, attention="gather")
    session = onnxruntime.InferenceSession(str(done.file))
    assert [value.name for value in (*session.get_inputs(), *session.get_outputs())] == [
        "pixel_values",
        "logits",
        "pred_boxes",
    ]
    assert session.get_inputs()[0].shape == [2, 3, 64, 64]
    assert done.parity is not None and all((image.raw_difference or 1) < 1e-3 for image in done.parity.images)


@pytest.mark.integration
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_f16_halves_the_file(form: Any, tmp_path: Path) -> None:
    model = tiny("paq_deformable_detr_one_stage_nano")  # no proposals, whose ranks rounding would change
    done = export(model, tmp_path / ("m.onnx" if form == "onnx" else "m.xml"), format=form, precision="f16")
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert done.to_json()["bytes"] < 2.6 * weights and opened(done.file).info.precision == "f16"


@pytest.mark.integration
def test_predict_runs_without_torch(exported: Exported, tmp_path: Path) -> None:
    image = tmp_path / "digits.png"
    digits_pictures(1, 64)[0].save(image)
    arguments = ["predict", str(exported.file), str(image), "--output", str(tmp_path / "out"), "--threshold", "0"]
    code = (
        "import sys, time\nfrom paqdetr.cli import run\n"
        f"print(run({arguments!r}), 'torch' in sys.modules, time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    code_, torch_, seconds = done.stdout.split()[-3:]
    assert (code_, torch_) == ("0", "False"), done.stderr
    assert float(seconds) < 1.5, "0.8 on a quiet machine"
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())


@pytest.mark.integration
def test_eval_and_bench_take_exported_models(exported: Exported, tmp_path: Path) -> None:
    data = tmp_path / "digits"
    make_digits(data, size=64, train=2, val=6, test=1, max_objects=4)  # of the file's size, so that nothing is resized
    found = {}
    for name, model in (("run", exported.checkpoint), ("file", exported.file)):
        out = tmp_path / f"{name}.json"
        assert run(["eval", str(model), "--data", str(data), "--json", str(out)]) == 0
        found[name] = json.loads(out.read_text())
    for figure in ("AP", "AP50", "AR100"):
        assert found["file"][figure] == pytest.approx(found["run"][figure], abs=1e-3)
    assert (
        run(
            [
                "bench",
                str(exported.file),
                "--against",
                str(exported.checkpoint),
                "--rounds",
                "2",
                "--json",
                str(tmp_path / "b.json"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "b.json").read_text())["inference"][str(exported.file)]["median_ms"] > 0


@pytest.fixture(scope="module")
def small_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("nncf")
    return make_digits(tmp_path_factory.mktemp("int8") / "digits", size=64, train=6, val=4, test=1, max_objects=4)


@pytest.mark.parametrize(
    ("form", "slow"),
    [
        pytest.param("onnx", False, marks=pytest.mark.integration),
        pytest.param("openvino", False, marks=pytest.mark.slow),
        pytest.param("openvino", True, marks=pytest.mark.slow),
    ],
)
def test_int8_is_kept_within_its_limits(
    form: Any, slow: bool, exported: Exported, small_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paqdetr.deploy.quantize.MIN_SPEEDUP", 0)  # a model this small gains nothing
    file = tmp_path / ("m.onnx" if form == "onnx" else "m.xml")
    done = export(exported.checkpoint, file, format=form, precision="int8", calibrate=small_digits, slow=slow)
    assert opened(file).info.precision == "int8" and done.quantization is not None
    evaluation = paqdetr.evaluate(opened(file), data=small_digits, split="val")
    assert evaluation.figures.AP == pytest.approx(done.quantization["int8"]["AP"], abs=1e-4)
    part_of = {node.name: node.doc_string for node in onnx.load(exported.file).graph.node}
    quantized = [part_of.get(name, "") for name in quantized_nodes(file)]
    assert sum(part.startswith("detector.backbone") for part in quantized) > 20
    assert not any(part.startswith("detector.decoder") for part in quantized)


def quantized_nodes(file: Path) -> list[str]:
    """Names of the nodes whose weights are in 8 bits."""
    if file.suffix == ".onnx":
        nodes = onnx.load(file).graph.node
        eighths = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
        return [node.name for node in nodes if len(node.input) > 1 and node.input[1] in eighths]
    operations = openvino.Core().read_model(file).get_ops()
    return [op.get_friendly_name().split("/")[0] for op in operations if op.get_type_name() == "FakeQuantize"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("figures", "speedup", "reason"),
    [([0.5, 0.5], 1e6, "times as fast, expected"), ([0.5, 0.4], 0.0, "loses 0.100 AP on val, more than 0.01")],
)
def test_int8_that_gains_nothing_or_loses_much_is_not_kept(
    figures: list[float],
    speedup: float,
    reason: str,
    exported: Exported,
    small_digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = iter(figures)
    monkeypatch.setattr("paqdetr.deploy.quantize.MIN_SPEEDUP", speedup)
    monkeypatch.setattr("paqdetr.deploy.quantize._figures", lambda *_: {"AP": next(found), "AP50": 0.0})
    with pytest.raises(ExportError, match=reason):
        export(exported.checkpoint, tmp_path / "m.onnx", precision="int8", calibrate=small_digits)
    assert not list(tmp_path.iterdir())
    done = export(exported.checkpoint, tmp_path / "m.onnx", precision="int8", calibrate=small_digits, check=False)
    assert done.quantization is None and opened(done.file).info.precision == "int8"  # for another machine


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("*_nano"))
def test_every_host_passes_in_both_engines(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # A first, a middle and a last layer: in an export, which takes seconds for each, further ones are the middle one again.
    model = create_model(name, num_classes=10, image_size=128, decoder_layers=3).eval()
    done = export(model, tmp_path / "m.onnx")
    assert done.parity is not None and done.parity.passed
    to_openvino(done.file, tmp_path / "m.xml", done.info)
    xml = open_exported(tmp_path / "m.xml")
    assert compare_with_model(model, xml, digits_pictures(), threshold=0.3).passed
    pictures = digits_pictures(3, 128)
    for engine in (xml, open_exported(done.file)):
        for one, three in zip(engine.predict(pictures), engine.predict(pictures, batch_size=3), strict=True):
            np.testing.assert_allclose(one.scores, three.scores, atol=1e-5)
