"""Composes one scene of the digits data: a photograph, clutter, digits, and what hides them in part.

Things are painted from back to front. An owner map notes whose ink is on top at every pixel; from it come the
visible share of every digit and its box. Nothing is painted that would hide too much of a digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from paqdetr.data.digits.glyphs import SPLITS, clutter, glyphs_of, ink_mask, photo_patch, polygon_mask
from paqdetr.errors import ConfigError

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# A speck apart from the rest, of less than this share of the digit's visible ink, does not stretch its box.
_SPECK = 0.04
_NOBODY = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneSpec:
    """What scenes look like; scales are shares of the image's side.

    Attributes:
        size: side of the square image in pixels, 64 to 4096.
        min_objects, max_objects: how many digits, both inclusive.
        min_scale, max_scale: the longer side of a whole digit's box, as a share of the image's side.
        max_rotation: in degrees, to either side.
        max_hidden: the largest hidden share of a digit's ink, in [0, 1).

    Raises:
        ConfigError: a value is out of its range.
    """

    size: int = 320
    min_objects: int = 3
    max_objects: int = 12
    min_scale: float = 0.06
    max_scale: float = 0.45
    max_rotation: float = 25.0
    max_hidden: float = 0.6

    def __post_init__(self) -> None:
        rules = (
            (64 <= self.size <= 4096, f"size is {self.size}, expected 64 to 4096 pixels"),
            (
                1 <= self.min_objects <= self.max_objects <= 1000,
                f"objects are {self.min_objects} to {self.max_objects}, expected 1 <= min <= max <= 1000",
            ),
            (
                0.02 <= self.min_scale <= self.max_scale <= 0.9,
                f"scales are {self.min_scale} to {self.max_scale}, expected 0.02 <= min <= max <= 0.9",
            ),
            (0 <= self.max_rotation <= 180, f"max_rotation is {self.max_rotation}, expected 0 to 180 degrees"),
            (0 <= self.max_hidden < 1, f"max_hidden is {self.max_hidden}, expected at least 0 and below 1"),
        )
        for holds, message in rules:
            if not holds:
                raise ConfigError(f"digits: {message}", "Choose a value within the range.")


@dataclass(frozen=True, slots=True)
class Scene:
    """One composed scene with G digits.

    Attributes:
        image: (size, size, 3) uint8 RGB.
        digits: (G,) int64 in 0..9.
        boxes: (G, 4) int64, xyxy in pixels, tight around the visible ink.
        visible: (G,) float64, the visible share of each digit's ink.
        owner: (size, size) int16, index of the digit whose ink is on top, -1 where there is none.
        glyphs: (G,) int64, which of scikit-learn's scans each digit is.
    """

    image: np.ndarray
    digits: np.ndarray
    boxes: np.ndarray
    visible: np.ndarray
    owner: np.ndarray
    glyphs: np.ndarray


def compose_scene(spec: SceneSpec, *, seed: int, split: str, index: int) -> Scene:
    """The scene number `index` of a split; depends on these arguments alone, not on how many scenes are made.

    Raises:
        ConfigError: `spec` asks for more digits than fit.
    """
    for attempt in range(20):
        stream = np.random.SeedSequence([seed, SPLITS.index(split), index, attempt])
        painter = _Painter(spec, split, np.random.Generator(np.random.PCG64(stream)))
        if painter.paint():
            return painter.finished()
    raise ConfigError(
        f"digits: {spec.min_objects} objects of {spec.min_scale:g} of the side or more do not fit one image",
        "Lower min_objects or the scales.",
    )


class _Painter:
    """The canvas while it is being painted."""

    def __init__(self, spec: SceneSpec, split: str, rng: np.random.Generator) -> None:
        self.spec, self.split, self.rng = spec, split, rng
        self.owner = np.full((spec.size, spec.size), _NOBODY, dtype=np.int16)
        self.canvas = self._background()
        self.glyphs: list[int] = []
        self.digits: list[int] = []
        self.ink: list[int] = []  # pixels of each digit's whole ink, outside the image too
        self.seen: list[int] = []  # pixels of it that are visible now
        self.extents: list[tuple[int, int, int, int]] = []  # xyxy of the whole ink inside the image

    def paint(self) -> bool:
        """Paints everything; False if fewer digits than asked for found a place."""
        rng, spec = self.rng, self.spec
        for _ in range(int(rng.integers(3, 9))):
            self._clutter()
        wanted = int(rng.integers(spec.min_objects, spec.max_objects + 1))
        scales = np.exp(rng.uniform(math.log(spec.min_scale), math.log(spec.max_scale), size=wanted))
        for scale in scales:
            if self._digit(float(scale)) and rng.random() < 0.3:
                self._occluder(len(self.digits) - 1)
        for _ in range(int(rng.integers(0, 4))):
            self._clutter(thin=True)
        return len(self.digits) >= spec.min_objects

    def finished(self) -> Scene:
        visible = np.array(self.seen, dtype=np.float64) / np.array(self.ink, dtype=np.float64)
        return Scene(
            image=self._developed(),
            digits=np.array(self.digits, dtype=np.int64),
            boxes=np.array([self._box(i) for i in range(len(self.digits))], dtype=np.int64).reshape(-1, 4),
            visible=visible,
            owner=self.owner,
            glyphs=np.array(self.glyphs, dtype=np.int64),
        )

    # Background and finish

    def _background(self) -> np.ndarray:
        """(size, size, 3) float32: one piece of a photograph, often with further pieces pasted on it."""
        rng, size = self.rng, self.spec.size
        base = photo_patch(rng, self.split, size, size)
        for _ in range(int(rng.integers(0, 4))):
            width, height = (int(v) for v in rng.uniform(0.15, 0.6, size=2) * size)
            x, y = (int(v) for v in rng.uniform(-0.1, 0.9, size=2) * size)
            base.paste(photo_patch(rng, self.split, width, height), (x, y))
        return np.array(base, dtype=np.float32)

    def _developed(self) -> np.ndarray:
        """The canvas as a camera might have taken it: exposure, a little blur, noise."""
        rng, canvas = self.rng, self.canvas
        canvas = (canvas - 127.5) * rng.uniform(0.75, 1.1) + 127.5 + rng.uniform(-15, 15)
        if rng.random() < 0.25:
            blur = ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9) * self.spec.size / 320)
            soft = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).filter(blur)
            canvas = np.asarray(soft, dtype=np.float32)
        if rng.random() < 0.6:
            noise = rng.standard_normal(canvas.shape[:2], dtype=np.float32) * np.float32(rng.uniform(1, 9))
            canvas = canvas + noise[..., None]
        return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)

    # Things

    def _digit(self, scale: float) -> bool:
        """Paints a digit of `scale`, trying several places and then smaller sizes."""
        rng, spec = self.rng, self.spec
        digit = int(rng.integers(10))
        pool = glyphs_of(self.split)[digit]
        glyph = int(pool[rng.integers(len(pool))])
        for _ in range(12):
            mask = ink_mask(rng, glyph, longest=scale * spec.size, max_rotation=spec.max_rotation)
            height, width = mask.shape
            # Some digits may be cut by the image's edge; the cut is bounded like any other hiding.
            slack = 0.25 if rng.random() < 0.12 else 0.0
            left = round(rng.uniform(-slack * width, spec.size - (1 - slack) * width))
            top = round(rng.uniform(-slack * height, spec.size - (1 - slack) * height))
            solid = mask >= 0.5
            ink = int(solid.sum())
            clipped, x, y = self._clip(mask, left, top)
            inside = clipped >= 0.5
            seen = int(inside.sum())
            h, w = clipped.shape
            extent = (x, y, x + w, y + h)
            if seen >= (1 - spec.max_hidden) * ink and not self._crowded(extent) and self._may_hide(inside, x, y):
                self._hide(inside, x, y)
                self.owner[y : y + h, x : x + w][inside] = len(self.digits)
                self._blend(clipped * np.float32(rng.uniform(0.8, 1.0)), x, y, self._ink_colour(inside, x, y, 40, 150))
                self.digits.append(digit)
                self.glyphs.append(glyph)
                self.ink.append(ink)
                self.seen.append(seen)
                self.extents.append(extent)
                return True
            scale = max(spec.min_scale, 0.9 * scale)
        return False

    def _occluder(self, target: int) -> None:
        """Covers one side of a digit with a piece of photograph or paper, straight edge towards the digit."""
        rng, side = self.rng, self.spec.size
        x0, y0, x1, y1 = self.extents[target]
        if max(x1 - x0, y1 - y0) < 0.09 * side:
            return  # what is left of such a small digit could not be read
        rows, columns = np.nonzero(self.owner[y0:y1, x0:x1] == target)
        points = np.stack([columns + x0, rows + y0], axis=1) + 0.5
        angle = rng.uniform(0, 2 * math.pi)
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]])
        reach, aside = points @ along, points @ across
        most = 0.9 * self.spec.max_hidden
        cut = float(np.quantile(reach, 1 - rng.uniform(min(0.1, most), most)))
        depth = float(reach.max()) - cut + rng.uniform(0.01, 0.06) * side
        middle, half = (
            (aside.max() + aside.min()) / 2,
            (aside.max() - aside.min()) / 2 + rng.uniform(0.0, 0.05) * side,
        )
        corners = np.array(
            [
                (cut + a * depth) * along + (middle + b * half) * across
                for a, b in ((0, -1), (0, 1), (1, 1 + rng.uniform(-0.3, 0.1)), (1, -1 + rng.uniform(-0.1, 0.3)))
            ]
        )
        mask, x, y = self._clip(*polygon_mask(corners))
        solid = mask >= 0.5
        if not mask.size or not self._may_hide(solid, x, y):
            return
        self._hide(solid, x, y)
        height, width = mask.shape
        if rng.random() < 0.7:
            colour = np.asarray(photo_patch(rng, self.split, width, height), dtype=np.float32)
        else:
            colour = rng.uniform(20, 235, size=3).astype(np.float32)
        self._blend(mask, x, y, colour)

    def _clutter(self, *, thin: bool = False) -> None:
        mask, x, y = self._clip(*clutter(self.rng, self.spec.size, thin=thin))
        solid = mask >= 0.5
        if not solid.any() or not self._may_hide(solid, x, y):
            return
        colour = self._ink_colour(solid, x, y, 25, 140)
        self._hide(solid, x, y)
        self._blend(mask * np.float32(self.rng.uniform(0.7, 1.0)), x, y, colour)

    # Canvas

    def _clip(self, mask: np.ndarray, left: int, top: int) -> tuple[np.ndarray, int, int]:
        """The part of a mask inside the image and its place there."""
        size, (height, width) = self.spec.size, mask.shape
        x0, y0 = min(max(left, 0), size), min(max(top, 0), size)
        x1, y1 = max(min(left + width, size), x0), max(min(top + height, size), y0)
        return mask[y0 - top : y1 - top, x0 - left : x1 - left], x0, y0

    def _crowded(self, extent: tuple[int, int, int, int]) -> bool:
        """Whether a digit here would share more than 30 % of the smaller box with another digit."""
        if not self.extents:
            return False
        others, own = np.array(self.extents), np.array(extent)
        sides = np.minimum(others[:, 2:], own[2:]) - np.maximum(others[:, :2], own[:2])
        shared = np.clip(sides, 0, None).prod(axis=1)
        smaller = np.minimum((others[:, 2:] - others[:, :2]).prod(axis=1), (own[2:] - own[:2]).prod())
        return bool((shared > 0.3 * smaller).any())

    def _covered(self, solid: np.ndarray, x: int, y: int) -> np.ndarray:
        """(number of digits,) visible pixels of each digit under a mask."""
        height, width = solid.shape
        under = self.owner[y : y + height, x : x + width][solid]
        return np.bincount(under[under != _NOBODY], minlength=len(self.digits))

    def _may_hide(self, solid: np.ndarray, x: int, y: int) -> bool:
        left = np.array(self.seen) - self._covered(solid, x, y)
        return bool((left >= (1 - self.spec.max_hidden) * np.array(self.ink)).all())

    def _hide(self, solid: np.ndarray, x: int, y: int) -> None:
        self.seen = [s - int(c) for s, c in zip(self.seen, self._covered(solid, x, y), strict=True)]
        height, width = solid.shape
        self.owner[y : y + height, x : x + width][solid] = _NOBODY

    def _blend(self, alpha: np.ndarray, x: int, y: int, colour: np.ndarray) -> None:
        height, width = alpha.shape
        area = self.canvas[y : y + height, x : x + width]
        area += alpha[..., None] * (colour - area)

    def _ink_colour(self, solid: np.ndarray, x: int, y: int, least: float, most: float) -> np.ndarray:
        """(3,) float32 colour, brighter or darker by `least` to `most` than what lies under the ink."""
        rng = self.rng
        height, width = solid.shape
        under = self.canvas[y : y + height, x : x + width][solid] @ _LUMA
        mean = float(under.mean())
        # On a restless ground the same contrast is harder to see.
        contrast = rng.uniform(least, most) + 0.7 * float(under.std())
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if not 0 <= mean + sign * contrast <= 255 and abs(255 * (sign < 0) - mean) > abs(255 * (sign > 0) - mean):
            sign = -sign
        chroma = rng.uniform(-1, 1, size=3).astype(np.float32) * np.float32(rng.uniform(0, 80))
        colour = np.clip(mean + sign * contrast + chroma - chroma @ _LUMA, 0, 255)
        # Whole numbers: how a processor sums up the mean must not show in the pixels.
        return np.rint(colour).astype(np.float32)

    def _box(self, digit: int) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = self.extents[digit]
        ink = self.owner[y0:y1, x0:x1] == digit
        if self.seen[digit] < self.ink[digit]:
            from scipy import ndimage

            pieces = np.zeros(ink.shape, dtype=np.int32)
            ndimage.label(ink, structure=np.ones((3, 3), dtype=int), output=pieces)
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0  # what is no ink
            ink = (sizes >= _SPECK * self.seen[digit])[pieces]
        (rows,), (columns,) = np.nonzero(ink.any(axis=1)), np.nonzero(ink.any(axis=0))
        return x0 + int(columns[0]), y0 + int(rows[0]), x0 + int(columns[-1]) + 1, y0 + int(rows[-1]) + 1
