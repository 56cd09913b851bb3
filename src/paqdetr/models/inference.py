"""From pictures to detections: bucketed by size, so that what an image is batched with never matters.

Never beyond rounding, that is: sums are taken in another order in a batch of another size, and where two proposals have the same
score but for the last bit, they may change places.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.ops import box_convert

from paqdetr.errors import NonFiniteError
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
        paths = [str(x) if isinstance(x := sources[entry[0]], (str, Path)) else None for entry in bucket]
        names = [path or f"image {entry[0]}" for path, entry in zip(paths, bucket, strict=True)]
        pixels, sizes = [entry[1] for entry in bucket], [entry[2] for entry in bucket]
        batch = detect_batch(model, pixels, sizes, threshold=threshold, names=names)
        for path, (index, *_), detections in zip(paths, bucket, batch, strict=True):
            detections.image_id = None if path is None else Path(path).name
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
    names: Sequence[int | str] = (),
) -> Iterator[Detections]:
    """Preprocessed images of one size -> detections in pixels of the original images.

    Args:
        images: (3, H, W) float each, all of one size.
        sizes: (height, width) of the originals in pixels.
        threshold: the least score.
        look: shown the raw output, before the first detections are given.
        names: of the images, for errors: paths or ids; places in the batch if there are none.

    Raises:
        NonFiniteError: a prediction is NaN or infinite, naming the images.
    """
    device = next(model.parameters()).device
    batch, mask = pad_images(images)
    with _evaluating(model), torch.inference_mode():
        output = model(batch.to(device), None if mask is None else mask.to(device))
    logits, boxes = output.pred_logits.float().cpu(), output.pred_boxes.float().cpu()
    _require_finite(logits, boxes, names or [f"batch position {i}" for i in range(len(images))])
    if look is not None:
        look(output)
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
def _evaluating(model: Detector) -> Iterator[None]:
    """Evaluation mode inside. A model that is in it already is left alone: threads may share such a model."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
