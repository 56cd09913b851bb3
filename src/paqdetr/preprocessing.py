"""From a picture to the tensor a model wants, the same in training, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL.Image import Image
from torch import Tensor

# timm's hierarchical backbones want sides that are multiples of their coarsest stride.
_PAD_TO = 32


@dataclass(frozen=True, slots=True)
class Normalization:
    """Per-channel mean and std of RGB pixels in [0, 255]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (3, H, W) float32."""
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
    """

    image_size: int | tuple[int, int]
    size_divisor: int
    normalization: Normalization

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize."""
        if isinstance(self.image_size, int):
            scale = self.image_size / max(height, width)
        else:
            short, longest = self.image_size
            scale = min(short / min(height, width), longest / max(height, width))
        return self.round_size(height * scale, width * scale)

    def round_size(self, height: float, width: float) -> tuple[int, int]:
        """Sides in whole pixels, rounded to the divisor and at least one of it."""
        step = self.size_divisor
        return max(round(height / step), 1) * step, max(round(width / step), 1) * step

    def __call__(self, image: Image, size: tuple[int, int] | None = None) -> Tensor:
        """RGB image -> (3, H, W) float32; `size` (height, width) overrides the resize."""
        pixels = to_pixels(image)
        height, width = size or self.target_size(image.height, image.width)
        resized = TF.resize(pixels, [height, width], antialias=True)
        return self.normalization(resized)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`, also after a trip through json."""
        size = values["image_size"]
        normalization = values["normalization"]
        return cls(
            image_size=size if isinstance(size, int) else (int(size[0]), int(size[1])),
            size_divisor=int(values["size_divisor"]),
            normalization=Normalization(mean=tuple(normalization["mean"]), std=tuple(normalization["std"])),
        )


def to_pixels(image: Image) -> Tensor:
    """RGB image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack images of different sizes.

    Args:
        images: (3, h, w) each.

    Returns:
        (B, 3, H, W), zero at padding, sides multiples of 32; and (B, H, W) bool, True at padding, None if there is none.
    """
    height, width = (max(int(image.shape[axis]) for image in images) for axis in (1, 2))
    height, width = (-(-side // _PAD_TO) * _PAD_TO for side in (height, width))
    batch = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for row, row_mask, image in zip(batch, mask, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
        row_mask[: image.shape[1], : image.shape[2]] = False
    return batch, mask if bool(mask.any()) else None
