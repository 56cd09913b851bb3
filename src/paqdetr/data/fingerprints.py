"""Finds images that are the same or look the same: by their bytes, and by a perceptual hash.

The hash is the customary one of 64 bits: which of the lowest 8 x 8 frequencies of the 32 x 32 grey picture are above their
median. Pictures whose hashes differ in few bits are compared once more, as thumbnails: scenes with a common background
share low frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image
from scipy.fft import dctn

# Recompressed and resized copies differ in 0 to 4 bits of 64; one band more than that makes sure that some band is equal.
MAX_BITS = 4
_LEAST_CORRELATION = 0.97
_FLAT = 2.0  # standard deviation of grey values under which a picture has no structure to hash
_ROWS_AT_ONCE = 2048
_BITS_SET = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a picture looks like.

    Attributes:
        bits: the perceptual hash; None of a picture of one colour, which resembles all others of its kind.
        thumbnail: (256,) float32, 16 x 16 grey values with mean 0 and length 1.
    """

    bits: int | None
    thumbnail: np.ndarray


def fingerprint(image: Image.Image) -> Fingerprint:
    """Of an RGB picture."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    small = grey.reshape(16, 2, 16, 2).mean(axis=(1, 3)).reshape(-1)
    small = small - small.mean()
    if grey.std() < _FLAT:
        return Fingerprint(None, np.zeros(256, dtype=np.float32))
    low = np.asarray(dctn(grey, norm="ortho"))[:8, :8].reshape(-1)
    bits = int(np.packbits(low > np.median(low[1:])).view(">u8")[0])
    return Fingerprint(bits, (small / max(float(np.linalg.norm(small)), 1e-9)).astype(np.float32))


def similar(prints: list[Fingerprint | None]) -> Iterator[tuple[int, int, int]]:
    """(first, second, differing bits) of every pair that looks the same, first < second, in no order."""
    known = [i for i, p in enumerate(prints) if p is not None and p.bits is not None]
    if len(known) < 2:
        return
    places = np.array(known)
    hashes = np.array([prints[i].bits for i in known], dtype=np.uint64)  # type: ignore[union-attr]
    thumbnails = np.stack([prints[i].thumbnail for i in known])  # type: ignore[union-attr]
    seen: set[tuple[int, int]] = set()
    for group in _with_an_equal_band(hashes):
        for start in range(0, len(group), _ROWS_AT_ONCE):
            rows = group[start : start + _ROWS_AT_ONCE]
            differing = _bits_set(hashes[rows][:, None] ^ hashes[group][None])  # (rows, group)
            for row, column in np.argwhere(differing <= MAX_BITS):
                one, other = int(rows[row]), int(group[column])
                if one >= other or (one, other) in seen:
                    continue
                seen.add((one, other))
                if float(thumbnails[one] @ thumbnails[other]) >= _LEAST_CORRELATION:
                    yield int(places[one]), int(places[other]), int(differing[row, column])


def _with_an_equal_band(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of hashes that agree in one of `MAX_BITS` + 1 bands: every pair that differs in fewer bits is in one of them."""
    edges = np.linspace(0, 64, MAX_BITS + 2).astype(int)
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        ends = np.flatnonzero(np.diff(band[order])) + 1
        for group in np.split(order, ends):
            if len(group) > 1:
                yield group


def _bits_set(values: np.ndarray) -> np.ndarray:
    """How many bits are 1; numpy has a function for it from version 2 only."""
    pieces = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, 8)
    return _BITS_SET[pieces].sum(axis=-1)
