"""An exported model of a few hundred bytes: what it finds depends on an image's mean colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from paqdetr.runtime.info import KEY, ExportInfo, FixedSize
from paqdetr.structures import ClassTable


def write_tiny_onnx(path: Path, *, side: int = 32) -> Path:
    """Two boxes an image: the more red, the surer of class 3 and the wider its box; likewise green and class 7."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    to_boxes = np.zeros((3, 8), np.float32)
    to_boxes[0, 2], to_boxes[1, 7] = 0.5, 0.5
    constants = {
        "to_boxes": to_boxes,
        "corner": np.array([0.1, 0.1, 0.2, 0.6, 0.3, 0.2, 0.9, 0.4], np.float32),
        "to_scores": np.eye(3, 2, dtype=np.float32),
        "none": np.zeros(2, np.float32),
        "scale": np.array([1 / 255], np.float32),
        "axes": np.array([1, 2], np.int64),
        "shape": np.array([-1, 2, 4], np.int64),
        "numbers": np.array([[0, 1]], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "scale"], ["color"]),
        helper.make_node("Gemm", ["color", "to_boxes", "corner"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["boxes"]),
        helper.make_node("Gemm", ["color", "to_scores", "none"], ["scores"]),
        helper.make_node("Cast", ["scores"], ["zeros"], to=TensorProto.INT64),
        helper.make_node("Sub", ["zeros", "zeros"], ["nothing"]),
        helper.make_node("Add", ["nothing", "numbers"], ["labels"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", side, side, 3])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["n", 2, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 2]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["n", 2]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    info = ExportInfo(
        name="tiny",
        classes=ClassTable((3, 7), ("red", "green")),
        preprocessing=FixedSize(side, side, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
        raw=False,
        precision="f32",
        max_detections=2,
        clamp_boxes=True,
        threshold=0.2,
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, info.to_json()
    onnx.save(model, str(path))
    return path
