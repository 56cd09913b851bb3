"""Clutter for the digits data: lines, arcs, scribbles and signs that are no digits, as antialiased masks."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

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
    return polyline_mask([path * side for path in paths], max(1.0, width * side))


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


def polyline_mask(paths: list[np.ndarray], width: float) -> tuple[np.ndarray, int, int]:
    """Draws polylines, antialiased.

    Args:
        paths: arrays (K, 2) of x, y in pixels.
        width: the stroke's width in pixels.

    Returns:
        As `clutter`.
    """
    return _drawn(paths, width)


def polygon_mask(corners: np.ndarray) -> tuple[np.ndarray, int, int]:
    """A filled polygon with (K, 2) corners in pixels, antialiased; returns as `clutter`."""
    return _drawn([corners], None)


def _drawn(paths: list[np.ndarray], width: float | None) -> tuple[np.ndarray, int, int]:
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
