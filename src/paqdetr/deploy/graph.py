"""A detector as a graph of one image size: pixels in, detections out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from paqdetr.errors import ConfigError
from paqdetr.models import Detector
from paqdetr.models.folding import bake_folded_norms
from paqdetr.models.proposals import ProposalStart
from paqdetr.runtime import ExportInfo, FixedSize
from paqdetr.runtime.engines import seal
from paqdetr.runtime.info import KEY
from paqdetr.values import is_whole

MAX_BATCH = 1024


class DeployedDetector(nn.Module):
    """A copy of a detector for use elsewhere, in evaluation mode and float32 on the CPU.

    Args:
        model: the detector, which stays as it is.
        raw: take normalised pixels and give the logits and boxes of all queries.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: Detector, *, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.max_detections, self.clamp_boxes = model.config.max_detections, model.config.clamp_boxes
        normalization = model.preprocessing.normalization
        # Not called "mean": exporters name the outputs of nodes so.
        self.register_buffer("pixel_mean", torch.tensor(normalization.mean)[:, None, None])
        self.register_buffer("pixel_std", torch.tensor(normalization.std)[:, None, None])
        self.detector = copy.deepcopy(model).float().cpu()
        bake_folded_norms(self.detector)
        self.detector.decoder.last_only = self.detector.decoder.for_graph = True
        if isinstance(self.detector.start, ProposalStart):
            self.detector.start.head.for_graph = True
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, H, W, 3) uint8 RGB -> boxes (N, n, 4) xyxy in [0, 1], scores (N, n), best first, labels (N, n) int64 class indices.

        Raw: (N, 3, H, W) float32 -> logits (N, q, C), boxes (N, q, 4) cxcywh in [0, 1].
        """
        if self.raw:
            output = self.detector(images)
            return output.pred_logits, output.pred_boxes
        # Channels first: onnxruntime takes ten times as long to subtract three numbers from a last axis of three.
        output = self.detector((images.permute(0, 3, 1, 2).float() - self.pixel_mean) / self.pixel_std)
        probabilities = output.pred_logits.sigmoid()
        classes = probabilities.shape[2]
        scores, best = probabilities.flatten(1).topk(min(self.max_detections, probabilities.shape[1] * classes))
        queries = torch.div(best, classes, rounding_mode="floor")
        boxes = output.pred_boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        half = boxes[..., 2:] * 0.5
        corners = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1)
        return (corners.clamp(0.0, 1.0) if self.clamp_boxes else corners), scores, best - queries * classes

    def example(self, size: FixedSize, batch: int) -> Tensor:
        """Images to trace with."""
        if self.raw:
            return torch.randn(batch, 3, size.height, size.width)
        return torch.randint(256, (batch, size.height, size.width, 3), dtype=torch.uint8)


def fixed_size(model: Detector, image_size: tuple[int, int] | int | None) -> FixedSize:
    """The one size of an exported graph: (height, width), the side of a square, or the square that the checkpoint's own setting
    means.

    Raises:
        ConfigError: no whole sides, or such that the model would have to pad.
    """
    own = model.preprocessing
    step = max(own.size_divisor, own.pad_divisor)
    if image_size is None:
        side = own.image_size if isinstance(own.image_size, int) else own.image_size[0]
        image_size = (side := -(-side // step) * step, side)
    sides = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(sides) != 2 or not all(map(is_whole, sides)):
        raise ConfigError(
            f"image_size: expected (height, width) or one side in whole pixels, found {image_size!r}",
            "write image_size=(480, 640), height first",
        )
    height, width = map(int, sides)
    for side in (height, width):
        if not step <= side <= 2**14 or side % step:
            nearest = max(round(min(side, 2**14) / step), 1) * step
            raise ConfigError(
                f"image size {height},{width}: expected multiples of {step}, the model's divisor",
                f"{nearest} is the nearest to {side}",
            )
    return FixedSize(height, width, tuple(own.normalization.mean), tuple(own.normalization.std))


def capture(module: DeployedDetector, size: FixedSize, batch: int | None) -> ExportedProgram:
    """The module's computation for images of one size; `batch` of them go through together, None: any number from 1 to
    `MAX_BATCH`."""
    example = module.example(size, batch or 2)  # torch takes a 1 for a constant
    shapes = None if batch else ({0: Dim("batch", min=1, max=MAX_BATCH)},)
    return torch.export.export(module, (example,), dynamic_shapes=shapes)


def save_graph(graph: Any, file: Path, info: ExportInfo) -> None:
    """Write an ONNX model (.onnx) or an OpenVINO model (.xml, with its weights in .bin) with its metadata, sealed."""
    if file.suffix.lower() == ".onnx":
        import onnx

        onnx.helper.set_model_props(graph, {KEY: info.to_json()})
        onnx.save(graph, str(file))
    else:
        import openvino

        graph.set_rt_info(info.to_json(), ["model_info", KEY])
        openvino.save_model(graph, str(file), compress_to_fp16=info.precision == "f16")
    seal(file)
