from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from paqdetr.data.check import MAX_BITS, Fingerprint, fingerprint, similar

PHOTOGRAPHS = [Image.fromarray(image) for image in load_sample_images().images]


def again(image: Image.Image, quality: int) -> Image.Image:
    """The picture after a trip through a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize("photograph", range(2))
@pytest.mark.parametrize(
    "change",
    [
        lambda image: again(image, 20),
        lambda image: image.resize((200, 133), Image.Resampling.BILINEAR),
        lambda image: image.resize((900, 601), Image.Resampling.NEAREST),
        lambda image: image.point(lambda value: int(value * 0.8)),
        lambda image: again(image.resize((320, 213)), 50),
    ],
)
def test_a_copy_is_found_whatever_was_done_to_it(photograph: int, change) -> None:
    image = PHOTOGRAPHS[photograph]
    prints = [fingerprint(PHOTOGRAPHS[1 - photograph]), fingerprint(image), fingerprint(change(image))]
    ((first, second, bits),) = similar(prints)
    assert (first, second) == (1, 2) and bits <= MAX_BITS


def test_parts_of_one_photograph_are_no_copies() -> None:
    width, height = PHOTOGRAPHS[0].size
    parts = [
        PHOTOGRAPHS[0].crop((x, y, x + width // 3, y + height // 3))
        for x in range(0, width * 2 // 3, width // 4)
        for y in range(0, height * 2 // 3, height // 4)
    ]
    assert list(similar([fingerprint(part) for part in parts])) == []


def test_pictures_of_one_colour_resemble_nothing() -> None:
    flat = [fingerprint(Image.new("RGB", (50, 50), colour)) for colour in ("red", "red", "white")]
    assert [one.bits for one in flat] == [None] * 3
    assert list(similar([*flat, None, fingerprint(PHOTOGRAPHS[0])])) == []


@settings(deadline=None)
@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=30),
    flips=st.lists(st.tuples(st.integers(0, 29), st.lists(st.integers(0, 63), max_size=6)), max_size=20),
)
def test_the_pairs_are_those_that_comparing_all_would_find(hashes: list[int], flips: list) -> None:
    for place, bits in flips:
        changed = hashes[place % len(hashes)]
        for bit in bits:
            changed ^= 1 << bit
        hashes.append(changed)
    thumbnail = np.full(256, 1 / 16, dtype=np.float32)
    found = set(similar([Fingerprint(bits, thumbnail) for bits in hashes]))
    expected = {
        (i, j, (hashes[i] ^ hashes[j]).bit_count())
        for j in range(len(hashes))
        for i in range(j)
        if (hashes[i] ^ hashes[j]).bit_count() <= MAX_BITS
    }
    assert found == expected
