"""From pictures to detections: bucketed by size, so that what an image is batched with never matters.

Never beyond rounding, that is: sums are taken in another order in a batch of another size, and where two proposals have the same
score but for the last bit, they may change places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from paqdetr.config import ModelConfig
from paqdetr.errors import ConfigError, NonFiniteError, memory_error
from paqdetr.models.outputs import DetectorOutput
from paqdetr.preprocessing import Preprocessing, pad_images
from paqdetr.structures import BACKGROUND_LOGIT, ClassTable, Detections, Targets

Self = TypeVar("Self")


class ImageModel(Protocol):
    """What turns pixels into detections: a `Detector`, or what behaves like one."""

    config: ModelConfig
    classes: ClassTable
    preprocessing: Preprocessing
    training: bool

    @property
    def device(self) -> torch.device: ...
    def __call__(self, images: Tensor, padding_mask: Tensor | None = None, /) -> DetectorOutput: ...
    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def train(self, mode: bool = True, /) -> Any: ...


class Observer(Protocol):
    """Looks at the raw outputs of an evaluation while it runs, so that one pass serves many questions.

    With several processes each has its own copy, which sees its share of the images; the copies have to be picklable.
    """

    def see(self, output: DetectorOutput, targets: Sequence[Targets], indices: Sequence[int]) -> None:
        """A batch of images of one size, without padding.

        Args:
            output: on the model's device, without gradients; not to be changed.
            targets: ground truth of the images, on that device; crowds and boxes of no area are left out.
            indices: of the images in the split.
        """
        ...

    def merge(self: Self, other: Self) -> None:
        """Take over what another process's copy has seen; called in the main process alone."""
        ...


def detect_batch(
    model: ImageModel,
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    threshold: float = 0.0,
    look: Callable[[DetectorOutput], None] | None = None,
    names: Sequence[int | str] = (),
    at_least: int = 0,
) -> Iterator[Detections]:
    """Preprocessed images of one size -> detections in pixels of the original images.

    Args:
        images: (3, H, W) float each, all of one size.
        sizes: (height, width) of the originals in pixels.
        threshold: the least score.
        look: shown the raw output, before the first detections are given.
        names: of the images, for errors: paths or ids; places in the batch if there are none.
        at_least: detections that are kept in an image, if there are so many, where the model itself keeps fewer.

    Raises:
        NonFiniteError: a prediction is NaN or infinite, naming the images.
    """
    device = model.device
    batch, mask = pad_images(images, model.preprocessing.pad_divisor)
    with _evaluating(model), torch.inference_mode(), _in_precision_of(model) as dtype:
        # Convolutions over channels that lie apart take longer: by a tenth, in the nano on a CPU.
        pixels = batch.to(device, dtype, memory_format=torch.channels_last)
        output = model(pixels, None if mask is None else mask.to(device))
    logits, boxes = output.pred_logits.float().cpu(), output.pred_boxes.float().cpu()
    _require_finite(logits, boxes, names or [f"batch position {i}" for i in range(len(images))])
    if look is not None:
        look(output)
    for image_logits, image_boxes, size in zip(logits, boxes, sizes, strict=True):
        yield postprocess(
            image_logits, image_boxes, size, model.classes, model.config, threshold=threshold, at_least=at_least
        )


def postprocess(
    logits: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    classes: ClassTable,
    config: ModelConfig,
    *,
    threshold: float,
    at_least: int = 0,
) -> Detections:
    """The best (query, class) pairs of one image; no non-maximum suppression.

    Args:
        logits: (n, C).
        boxes: (n, 4) cxcywh in [0, 1].
        size: (height, width) of the image in pixels.
        classes: from index to original id and name.
        config: of the model: `max_detections` and `clamp_boxes`.
        threshold: the least score.
        at_least: as of `detect_batch`.
    """
    scores = logits.sigmoid().flatten()
    best = scores.topk(min(max(config.max_detections, at_least), scores.numel()))
    keep = best.values >= threshold
    if config.distinct_queries is not None:
        keep &= logits.flatten()[best.indices] > BACKGROUND_LOGIT  # queries that have left
    chosen, values = best.indices[keep], best.values[keep]
    queries, labels = chosen // logits.shape[1], chosen % logits.shape[1]
    height, width = size
    corners = box_convert(boxes[queries], "cxcywh", "xyxy")
    if config.clamp_boxes:
        corners = corners.clamp(0, 1)
    pixels = corners * torch.tensor([width, height, width, height])
    return Detections(
        boxes=pixels.numpy().astype(np.float32),
        scores=values.numpy().astype(np.float32),
        labels=np.asarray(classes.ids, dtype=np.int64)[labels.numpy()],
        names=classes.id_to_name,
        query_indices=queries.numpy(),
        size=(height, width),
    )


def _require_finite(logits: Tensor, boxes: Tensor, names: Sequence[int | str]) -> None:
    """NaN is above no threshold: without this, a broken model would find nothing and say nothing."""
    finite = torch.isfinite(logits).all(2).all(1) & torch.isfinite(boxes).all(2).all(1)  # (B,)
    if not finite.all():
        bad = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
        raise NonFiniteError(
            f"predictions are NaN or infinite for image(s) {bad}",
            "the weights are broken or overflow in half precision: take an earlier checkpoint, or predict in float32",
            images=bad,
        )


@contextmanager
def _in_precision_of(model: ImageModel) -> Iterator[torch.dtype]:
    """The dtype that the model takes images in.

    Raises:
        ConfigError: the device cannot compute in that precision.
    """
    parameter = next(model.parameters())
    try:
        yield parameter.dtype
    except RuntimeError as error:
        if parameter.dtype == torch.float32 or memory_error(error) is not None:
            raise
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"a model in {parameter.dtype} does not run on this {parameter.device.type}: {reason}",
            "take model.float(), or train in half precision with amp=bf16: checkpoints stay in float32",
        ) from error


@contextmanager
def _evaluating(model: ImageModel) -> Iterator[None]:
    """Evaluation mode inside. A model that is in it already is left alone: threads may share such a model."""
    was_training = model.training
    if was_training:
        model.train(False)
    try:
        yield
    finally:
        if was_training:
            model.train()
