"""What the digits data are made of: scikit-learn's bundled handwritten digits and photographs, by split; and clutter.

Neither a handwritten digit nor a piece of a photograph is shared by two splits. The division is the same for
every seed, so that even a model trained on one edition may be tested on another without a leak.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from paqdetr.errors import import_extra

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
    flat, digits = import_extra("sklearn.datasets", "digits").load_digits(return_X_y=True)
    return np.asarray(flat, dtype=np.uint8).reshape(-1, 8, 8), np.asarray(digits, dtype=np.int64)


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
    load = import_extra("sklearn.datasets", "digits").load_sample_image
    first, last = PHOTO_BANDS[split]
    photos = [Image.fromarray(load(name)) for name in ("china.jpg", "flower.jpg")]
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


# ------------------------------------------- clutter: lines, arcs, scribbles and signs that are no digits

_SUPERSAMPLING = 2

# Polylines in a unit box that no one reads as a digit; each is a tuple of strokes.
_SIGNS: tuple[tuple[tuple[tuple[float, float], ...], ...], ...] = (
    (((0.5, 0), (0.5, 1)), ((0, 0.5), (1, 0.5))),  # plus
    (((0, 0), (1, 1)), ((1, 0), (0, 1))),  # cross
    (((0.5, 0), (1, 1), (0, 1), (0.5, 0)),),  # triangle
    (((0, 1), (0.2, 0), (0.5, 0.7), (0.8, 0), (1, 1)),),  # M
    (((0, 0), (0.25, 1), (0.5, 0.3), (0.75, 1), (1, 0)),),  # W
    (((0.1, 0), (0.1, 1)), ((0.9, 0), (0.9, 1)), ((0.1, 0.5), (0.9, 0.5))),  # H
    (((0.1, 0), (0.1, 1)), ((0.9, 0), (0.1, 0.5), (0.9, 1))),  # K
    (((0.9, 0), (0.1, 0), (0.1, 1), (0.9, 1)), ((0.1, 0.5), (0.7, 0.5))),  # E
    (((0, 0), (1, 0)), ((0.5, 0), (0.5, 1))),  # T
    (((0.1, 1), (0.1, 0), (0.9, 1), (0.9, 0)),),  # N
)


def clutter(rng: np.random.Generator, side: int, *, thin: bool = False) -> tuple[np.ndarray, int, int]:
    """One random piece of clutter for an image of `side` pixels.

    Args:
        rng: where the randomness comes from.
        side: of the square image, in pixels.
        thin: only thin lines and arcs, no scribbles or signs.

    Returns:
        mask: (h, w) float32 in [0, 1].
        left, top: where its first column and row lie in the image; the mask may reach over the edge.
    """
    kind = rng.uniform(0, 0.5 if thin else 1.0)
    if kind < 0.3:
        paths, width = _line(rng), rng.uniform(0.004, 0.016)
    elif kind < 0.5:
        paths, width = _arc(rng), rng.uniform(0.004, 0.018)
    else:
        extent = math.exp(rng.uniform(math.log(0.06), math.log(0.3)))
        shape = _scribble(rng) if kind < 0.75 else _sign(rng)
        paths, width = _placed(rng, shape, extent), extent * rng.uniform(0.08, 0.16)
    return _drawn([path * side for path in paths], max(1.0, width * side))


def _line(rng: np.random.Generator) -> list[np.ndarray]:
    # Long and thin: a short thick one would read as a "1".
    angle, half = rng.uniform(0, math.pi), rng.uniform(0.2, 0.6)
    step = half * np.array([math.cos(angle), math.sin(angle)])
    centre = rng.uniform(0, 1, size=2)
    return [np.stack([centre - step, centre + step])]


def _arc(rng: np.random.Generator) -> list[np.ndarray]:
    # At most half a turn of a large circle: a closed small one would read as a "0".
    start, span, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 3.0), rng.uniform(0.12, 0.45)
    angles = start + span * np.linspace(0, 1, 24)
    return [rng.uniform(0, 1, size=2) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)]


def _scribble(rng: np.random.Generator) -> list[np.ndarray]:
    """A smooth curve through six to nine corners far from one another: more turns than any digit has."""
    corners = [rng.uniform(0, 1, size=2)]
    for _ in range(int(rng.integers(5, 9))):
        candidates = rng.uniform(0, 1, size=(4, 2))
        corners.append(candidates[np.argmax(np.square(candidates - corners[-1]).sum(axis=1))])
    points = np.array([corners[0], *corners, corners[-1]])
    t = np.linspace(0, 1, 7)[:-1, None]
    curve = []
    for a, b, c, d in zip(points, points[1:], points[2:], points[3:], strict=False):  # Catmull-Rom segments
        curve.append(b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a))))
    return [np.concatenate([*curve, points[-1:]])]


def _sign(rng: np.random.Generator) -> list[np.ndarray]:
    sign = _SIGNS[int(rng.integers(len(_SIGNS)))]
    return [np.array(stroke) + rng.uniform(-0.06, 0.06, size=(len(stroke), 2)) for stroke in sign]


def _placed(rng: np.random.Generator, shape: list[np.ndarray], extent: float) -> list[np.ndarray]:
    angle = rng.uniform(-0.45, 0.45)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    stretch = np.array([rng.uniform(0.6, 1.0), 1.0]) * extent
    centre = rng.uniform(0.02, 0.98, size=2)
    return [centre + ((path - 0.5) * stretch) @ turn for path in shape]


def polygon_mask(corners: np.ndarray) -> tuple[np.ndarray, int, int]:
    """A filled polygon with (K, 2) corners in pixels, antialiased; returns as `clutter`."""
    return _drawn([corners], None)


def _drawn(paths: list[np.ndarray], width: float | None) -> tuple[np.ndarray, int, int]:
    """Polylines (K, 2) of a stroke width in pixels, or filled polygons (None), antialiased; returns as `clutter`."""
    points = np.concatenate(paths)
    margin = 1 + (width or 0) / 2
    left, top = (int(v) for v in np.floor(points.min(axis=0) - margin))
    right, bottom = (int(v) for v in np.ceil(points.max(axis=0) + margin))
    fine = Image.new("L", ((right - left) * _SUPERSAMPLING, (bottom - top) * _SUPERSAMPLING))
    draw = ImageDraw.Draw(fine)
    for path in paths:
        flat = ((path - (left, top)) * _SUPERSAMPLING).ravel().tolist()
        if width is None:
            draw.polygon(flat, fill=255)
        else:
            draw.line(flat, fill=255, width=max(1, round(width * _SUPERSAMPLING)), joint="curve")
    return np.asarray(fine.reduce(_SUPERSAMPLING), dtype=np.float32) / 255, left, top
