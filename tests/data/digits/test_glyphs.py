from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from paqdetr.data.digits.glyphs import PHOTO_BANDS, SPLITS, glyphs_of, ink_mask, photo_patch


def test_every_glyph_belongs_to_exactly_one_split() -> None:
    every = np.concatenate([glyphs for split in SPLITS for glyphs in glyphs_of(split)])
    assert sorted(every.tolist()) == list(range(1797))
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        for glyphs in glyphs_of(split):
            assert len(glyphs) == pytest.approx(share * 179.7, abs=6)


def test_photo_bands_do_not_touch() -> None:
    for a, b in combinations(PHOTO_BANDS.values(), 2):
        assert a[1] + 8 <= b[0] or b[1] + 8 <= a[0]


def test_photo_patch_has_the_size_asked_for() -> None:
    patch = photo_patch(np.random.default_rng(0), "val", 50, 31)
    assert (patch.mode, patch.size) == ("RGB", (50, 31))


@pytest.mark.parametrize("longest", [19.2, 60.0, 144.0])
def test_ink_is_tight_and_of_the_length_asked_for(longest: float) -> None:
    rng = np.random.default_rng(1)
    for index in range(0, 1797, 90):
        solid = ink_mask(rng, index, longest=longest, max_rotation=25) >= 0.5
        assert abs(max(solid.shape) - longest) <= 2
        for edge in (solid[0], solid[-1], solid[:, 0], solid[:, -1]):
            assert edge.any()


def test_rotation_turns_the_ink() -> None:
    # A "1" is long and thin: its principal axis tells the angle. Without rotation slant remains.
    def spread(max_rotation: float) -> float:
        angles, one = [], int(glyphs_of("train")[1][0])
        for seed in range(40):
            rng = np.random.default_rng(seed)
            solid = ink_mask(rng, one, longest=64, max_rotation=max_rotation)
            rows, columns = np.nonzero(solid >= 0.5)
            angles.append(0.5 * math.atan2(2 * np.cov(columns, rows)[0, 1], np.var(columns) - np.var(rows)))
        return float(np.std(np.unwrap(angles, period=math.pi)))

    assert spread(25) > 1.5 * spread(0)
