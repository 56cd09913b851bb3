"""From pictures to detections: bucketed by size, so that what an image is batched with never matters.

Never beyond rounding, that is: sums are taken in another order in a batch of another size, and where two proposals have the same
score but for the last bit, they may change places.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.ops import box_convert

from paqdetr.images import read_image
from paqdetr.models.arguments import require_batch_size, require_threshold
from paqdetr.preprocessing import pad_images
from paqdetr.structures import ClassTable, Detections, Targets

if TYPE_CHECKING:
    from paqdetr.models.detector import Detector, DetectorOutput

ImageSource = str | Path | Image | np.ndarray
Self = TypeVar("Self")


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


def predict_images(
    model: Detector, images: ImageSource | Sequence[ImageSource], *, threshold: float, batch_size: int = 1
) -> list[Detections]:
    """See `Detector.predict`."""
    require_threshold(threshold)
    require_batch_size(batch_size)
    # A tensor is no list of images either; `read_image` says so.
    sources = [images] if isinstance(images, (str, Path, Image, np.ndarray, Tensor)) else list(images)
    found: list[Detections | None] = [None] * len(sources)
    buckets: dict[tuple[int, int], list[tuple[int, Tensor, tuple[int, int]]]] = defaultdict(list)

    def run(bucket: list[tuple[int, Tensor, tuple[int, int]]]) -> None:
        for index, detections in zip(
            (entry[0] for entry in bucket), _run(model, bucket, threshold), strict=True
        ):
            source = sources[index]
            detections.image_id = Path(source).name if isinstance(source, (str, Path)) else None
            found[index] = detections

    for index, source in enumerate(sources):
        picture = read_image(source)
        pixels = model.preprocessing(picture)
        bucket = buckets[(pixels.shape[1], pixels.shape[2])]
        bucket.append((index, pixels, (picture.height, picture.width)))
        if len(bucket) == batch_size:
            run(bucket)
            bucket.clear()
    for bucket in buckets.values():
        if bucket:
            run(bucket)
    return [detections for detections in found if detections is not None]


def detect_batch(
    model: Detector,
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    threshold: float = 0.0,
    look: Callable[[DetectorOutput], None] | None = None,
) -> Iterator[Detections]:
    """Preprocessed images of one size -> detections in pixels of the original images.

    Args:
        images: (3, H, W) float each, all of one size.
        sizes: (height, width) of the originals in pixels.
        threshold: the least score.
        look: shown the raw output, before the first detections are given.
    """
    device = next(model.parameters()).device
    batch, mask = pad_images(images)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            output = model(batch.to(device), None if mask is None else mask.to(device))
    finally:
        model.train(was_training)
    if look is not None:
        look(output)
    logits, boxes = output.pred_logits.float().cpu(), output.pred_boxes.float().cpu()
    for image_logits, image_boxes, size in zip(logits, boxes, sizes, strict=True):
        yield postprocess(image_logits, image_boxes, size, model.classes, threshold=threshold)


def postprocess(
    logits: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    classes: ClassTable,
    *,
    threshold: float,
    limit: int = 300,
) -> Detections:
    """The best (query, class) pairs of one image; no non-maximum suppression.

    Args:
        logits: (n, C).
        boxes: (n, 4) cxcywh in [0, 1].
        size: (height, width) of the image in pixels.
        classes: from index to original id and name.
        threshold: the least score.
        limit: the most detections.
    """
    scores = logits.sigmoid().flatten()
    best = scores.topk(min(limit, scores.numel()))
    keep = best.values >= threshold
    chosen, values = best.indices[keep], best.values[keep]
    queries, labels = chosen // logits.shape[1], chosen % logits.shape[1]
    height, width = size
    corners = box_convert(boxes[queries], "cxcywh", "xyxy").clamp(0, 1)
    pixels = corners * torch.tensor([width, height, width, height])
    return Detections(
        boxes=pixels.numpy().astype(np.float32),
        scores=values.numpy().astype(np.float32),
        labels=np.asarray(classes.ids, dtype=np.int64)[labels.numpy()],
        names=classes.id_to_name,
        query_indices=queries.numpy(),
    )


def _run(
    model: Detector, bucket: Sequence[tuple[int, Tensor, tuple[int, int]]], threshold: float
) -> Iterator[Detections]:
    return detect_batch(
        model, [entry[1] for entry in bucket], [entry[2] for entry in bucket], threshold=threshold
    )
