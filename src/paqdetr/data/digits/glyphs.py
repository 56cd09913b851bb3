"""What the digits data are made of: scikit-learn's bundled handwritten digits and photographs, by split.

Neither a handwritten digit nor a piece of a photograph is shared by two splits. The division is the same for
every seed, so that even a model trained on one edition may be tested on another without a leak.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

SPLITS = ("train", "val", "test")

# Shares of every class's handwritten digits, in the order of SPLITS.
_GLYPH_SHARES = (0.7, 0.1, 0.2)
_GLYPH_PERMUTATION_SEED = 20240
# Columns [first, last) of the two photographs (both are 640 wide), a guard of 8 columns between the bands.
PHOTO_BANDS = {"train": (0, 284), "val": (292, 436), "test": (444, 640)}
# Crops are drawn alike in all splits, so no wider than the narrowest band: else one split would be blurrier.
_CROP_SIDES = (56, 144)

# A glyph field has this many pixels for one cell of the 8x8 scan, and a margin of this many cells.
_FIELD_CELL = 8
_FIELD_MARGIN = 2


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 scans with values 0..16, and their (1797,) int64 digits."""
    from sklearn.datasets import load_digits

    flat, digits = load_digits(return_X_y=True)
    return flat.reshape(-1, 8, 8).astype(np.uint8), digits.astype(np.int64)


@cache
def glyphs_of(split: str) -> tuple[np.ndarray, ...]:
    """Per digit 0..9 the int64 indices of its scans that belong to `split`; disjoint between splits."""
    _, digits = _scans()
    rng = np.random.Generator(np.random.PCG64(_GLYPH_PERMUTATION_SEED))
    position = SPLITS.index(split)
    chosen = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(digits == digit))
        bounds = np.round(np.cumsum((0.0, *_GLYPH_SHARES)) * len(order)).astype(int)
        chosen.append(order[bounds[position] : bounds[position + 1]])
    return tuple(chosen)


@cache
def glyph_field(index: int) -> Image.Image:
    """One scan as a smooth "L" field of 96x96 pixels: 0 paper, 255 ink; a threshold makes strokes."""
    scan = np.pad(_scans()[0][index], _FIELD_MARGIN)
    side = scan.shape[0] * _FIELD_CELL
    cells = Image.fromarray((scan.astype(np.uint16) * 255 // 16).astype(np.uint8))
    return cells.resize((side, side), Image.Resampling.BICUBIC)


def ink_mask(rng: np.random.Generator, index: int, *, longest: float, max_rotation: float) -> np.ndarray:
    """Writes one scan anew: stroke width, slant, proportions and angle vary.

    Args:
        rng: where the variation comes from.
        index: of the scan.
        longest: the longer side of the result, in pixels.
        max_rotation: in degrees, to either side.

    Returns:
        (h, w) float32 ink in [0, 1], tight around ink >= 0.5; max(h, w) is `longest` within two pixels.
    """
    field = glyph_field(index)
    threshold = rng.uniform(0.38, 0.56)
    angle = math.radians(rng.uniform(-max_rotation, max_rotation))
    cos, sin = math.cos(angle), math.sin(angle)
    stretch, shear = math.exp(rng.uniform(-0.2, 0.2)), rng.uniform(-0.15, 0.15)
    shape = np.array([[cos, -sin], [sin, cos]]) @ np.array([[stretch, shear], [0.0, 1.0 / stretch]])
    rows, columns = np.nonzero(np.asarray(field) >= threshold * 255)
    turned = shape @ np.stack([columns + 0.5, rows + 0.5])
    low, high = turned.min(axis=1), turned.max(axis=1)
    zoom = longest / float((high - low).max())
    margin = 2
    width, height = (math.ceil(v) + 2 * margin for v in (high - low) * zoom)
    back = np.linalg.inv(shape)  # output pixel -> field pixel, as PIL wants it
    origin = back @ (low - margin / zoom)
    data = (back[0, 0] / zoom, back[0, 1] / zoom, origin[0], back[1, 0] / zoom, back[1, 1] / zoom, origin[1])
    warped = field.transform((width, height), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    # The field rises over about 1.5 cells at an edge; here the edge becomes about 1.3 pixels wide.
    softness = max(0.03, 1.3 / (1.5 * _FIELD_CELL * zoom))
    mask = np.clip((np.asarray(warped, dtype=np.float32) / 255 - threshold) / softness + 0.5, 0, 1)
    solid = mask >= 0.5
    (rows,), (columns,) = np.nonzero(solid.any(axis=1)), np.nonzero(solid.any(axis=0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)


@cache
def _photo_bands(split: str) -> tuple[Image.Image, ...]:
    from sklearn.datasets import load_sample_image

    first, last = PHOTO_BANDS[split]
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return tuple(photo.crop((first, 0, last, photo.height)) for photo in photos)


def photo_patch(rng: np.random.Generator, split: str, width: int, height: int) -> Image.Image:
    """A random piece of the split's photographs, mirrored, recoloured and sometimes blurred.

    Returns:
        An RGB image of exactly `width` x `height` pixels.
    """
    bands = _photo_bands(split)
    band = bands[int(rng.integers(len(bands)))]
    crop_width, crop_height = (int(side) for side in rng.integers(_CROP_SIDES[0], _CROP_SIDES[1] + 1, size=2))
    left = int(rng.integers(band.width - crop_width + 1))
    top = int(rng.integers(band.height - crop_height + 1))
    # Recolouring and blur happen on the small crop, where they cost little.
    patch = band.crop((left, top, left + crop_width, top + crop_height)).convert("RGB", _recolouring(rng))
    if rng.random() < 0.3:
        patch = patch.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.5)))
    if rng.random() < 0.5:
        patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return patch.resize((width, height), Image.Resampling.BICUBIC)


def _recolouring(rng: np.random.Generator) -> tuple[float, ...]:
    """A 3x4 colour matrix: other channel order, saturation, contrast and brightness."""
    order = rng.permutation(3) if rng.random() < 0.6 else np.arange(3)
    saturation, contrast = rng.uniform(0.2, 1.1), rng.uniform(0.55, 1.1)
    mixing = saturation * np.eye(3)[order] + (1 - saturation) / 3
    brightness = 127.5 * (1 - contrast) + rng.uniform(-35, 35)
    return tuple(float(v) for row in contrast * mixing for v in (*row, brightness))
