"""From a picture to the tensor a model wants, the same in training, evaluation and prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from PIL.Image import Image, Resampling
from pydantic import Field, TypeAdapter

from paqdetr.config import Config, ResizeRule

if TYPE_CHECKING:  # a checkpoint's header is read, and found wanting, before torch is imported
    from torch import Tensor

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Normalization:
    """Per-channel mean and std of RGB pixels in [0, 255]."""

    mean: tuple[_Finite, _Finite, _Finite]
    std: tuple[_Positive, _Positive, _Positive]

    def __call__(self, pixels: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (3, H, W) float32."""
        import torch

        mean = torch.tensor(self.mean)[:, None, None]
        return (pixels.float() - mean) / torch.tensor(self.std)[:, None, None]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize and normalise.

    Attributes:
        image_size: the long side in pixels, or (short side, most the long side may have).
        size_divisor: sides are rounded to multiples of it, at the price of a slightly changed aspect. With a divisor of the
            coarsest stride no token is part image, part padding.
        normalization: of the pixels.
        resize: how sides become whole pixels, where image_size has two numbers and size_divisor is 1; to the nearest multiple of
            size_divisor elsewhere.
        pad_divisor: sides of a batch are padded to multiples of it; 1: to the largest image of the batch alone.
    """

    image_size: int | tuple[int, int]
    size_divisor: Annotated[int, Field(ge=1, le=1024)]
    normalization: Normalization
    resize: ResizeRule = "detr"
    pad_divisor: Annotated[int, Field(ge=1, le=1024)] = 1

    @classmethod
    def of(cls, config: Config, normalization: Normalization) -> Preprocessing:
        """What the settings do to an image."""
        how = {name: getattr(config, name) for name in ("image_size", "size_divisor", "resize", "pad_divisor")}
        return cls(normalization=normalization, **how)

    @property
    def rule(self) -> ResizeRule:
        """The rule that is at work."""
        return "nearest" if isinstance(self.image_size, int) or self.size_divisor > 1 else self.resize

    def target_size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """(height, width) after the resize.

        Args:
            height, width: of the image in pixels.
            scale: of a training batch. The rules of other programs scale the short side alone, as their training does; the limit
                of the long side stays.
        """
        if isinstance(self.image_size, int):
            zoom = self.image_size / max(height, width)
        elif self.rule == "nearest":
            zoom = min(self.image_size[0] / min(height, width), self.image_size[1] / max(height, width))
        else:
            short, longest = self.image_size
            return _program_size(self.rule, height, width, round(short * scale), longest)
        whole = self._nearest(height * zoom, width * zoom)
        return self._nearest(whole[0] * scale, whole[1] * scale)

    def _nearest(self, height: float, width: float) -> tuple[int, int]:
        """Sides in whole pixels, rounded to the divisor and at least one of it."""
        step = self.size_divisor
        return max(round(height / step), 1) * step, max(round(width / step), 1) * step

    def __call__(self, image: Image, size: tuple[int, int] | None = None) -> Tensor:
        """RGB image -> (3, H, W) float32; `size` (height, width) overrides the target size."""
        height, width = size or self.target_size(image.height, image.width)
        if self.rule in ("detr", "detectron2"):
            # These resize with Pillow; torch rounds about one value in 500 to the neighbouring grey level.
            resized = to_pixels(image.resize((width, height), Resampling.BILINEAR))
        else:
            resized = resize(to_pixels(image), height, width)
        return self.normalization(resized)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's header."""
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """Its values under the names that they have in a `Config`; the normalization follows from the backbone."""
        values = asdict(self)
        del values["normalization"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`, also after a trip through json. Older headers have neither `resize` nor `pad_divisor`:
        their images were resized to the nearest pixel and padded to multiples of 32.

        Raises:
            pydantic.ValidationError: a value is missing, of another type or out of its range.
        """
        content = json.dumps({"resize": "nearest", "pad_divisor": 32, **values})
        return TypeAdapter(cls).validate_json(content, strict=True)


def _program_size(rule: ResizeRule, height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """(height, width) to which a program resizes, given the short side and the most that the long side may have.

    Sources: datasets/transforms.py of fundamentalvision/Deformable-DETR 48092c5 (DINO's and DN-DETR's are the same);
    detectron2/data/transforms/augmentation_impl.py (`ResizeShortestEdge`); image_transforms.py of transformers 5.24;
    models/detectors/base_detector.py (`EvalResize`) of xiuqhou/Relation-DETR 7047657.
    """
    low, high = min(height, width), max(height, width)
    if rule == "relation_detr":  # in float32, so that some sides are a pixel short; torch multiplies by the reciprocal
        sides = np.array([height, width], dtype=np.float32)
        reciprocals = np.float32(1) / sides
        zoom = np.minimum(np.float32(short) * reciprocals.max(), np.float32(longest) * reciprocals.min())
        tall, wide = (sides * zoom).astype(int).tolist()
        return max(tall, 1), max(wide, 1)
    if rule == "detectron2":
        zoom = short / low
        tall, wide = (short, zoom * width) if height < width else (zoom * height, short)
        if max(tall, wide) > longest:
            zoom = longest / max(tall, wide)
            tall, wide = tall * zoom, wide * zoom
        return max(int(tall + 0.5), 1), max(int(wide + 0.5), 1)
    exact: float = short
    if high / low * short > longest:
        exact = longest * low / high
        short = max(round(exact), 1)
    if low == short:
        return height, width
    long = max(int((exact if rule == "transformers" else short) * high / low), 1)
    return (long, short) if height > width else (short, long)


def to_pixels(image: Image) -> Tensor:
    """RGB image -> (3, H, W) uint8."""
    import torch

    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """(3, h, w) uint8 -> (3, height, width) uint8, bilinear with antialiasing."""
    import torchvision.transforms.v2.functional as TF

    return TF.resize(pixels, [height, width], antialias=True)


def pad_images(images: Sequence[Tensor], divisor: int = 1) -> tuple[Tensor, Tensor | None]:
    """Stack images of different sizes.

    Args:
        images: (3, h, w) each.
        divisor: sides become multiples of it.

    Returns:
        (B, 3, H, W), zero at padding; and (B, H, W) bool, True at padding, None if there is none.
    """
    import torch

    height, width = (max(int(image.shape[axis]) for image in images) for axis in (1, 2))
    height, width = (-(-side // divisor) * divisor for side in (height, width))
    batch = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for row, row_mask, image in zip(batch, mask, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
        row_mask[: image.shape[1], : image.shape[2]] = False
    return batch, mask if bool(mask.any()) else None
