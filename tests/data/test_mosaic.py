"""A white rectangle on black in each of four pictures shows where its box has to be in the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paqdetr.data.augment import Augmented, mosaic


def tile(number: int, height: int, width: int) -> Augmented:
    """Lit in a channel of its own, the last in none, from a quarter to three quarters of each side."""
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    top, left, bottom, right = height // 4, width // 4, height * 3 // 4, width * 3 // 4
    if number < 3:
        pixels[number, top:bottom, left:right] = 255
    box = torch.tensor([[left, top, right, bottom]], dtype=torch.float32)
    return Augmented(pixels, box, torch.tensor([number]))


@given(seed=st.integers(0, 2**62), sizes=st.lists(st.tuples(*[st.integers(40, 120)] * 2), min_size=4, max_size=4))
def test_boxes_stay_with_what_they_are_around(seed: int, sizes: list[tuple[int, int]]) -> None:
    torch.manual_seed(seed)
    whole = mosaic([tile(i, *size) for i, size in enumerate(sizes)])
    pixels, boxes, labels = whole.pixels, whole.boxes, whole.labels
    height, width = sizes[0]
    assert pixels.shape == (3, height, width) and pixels.dtype == torch.uint8
    assert boxes.dtype == torch.float32 and len(boxes) == len(labels)
    assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
        if label == 3:
            continue
        rows, columns = torch.where(pixels[label] > 127)
        assert len(rows)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        for one, other in zip(box, found, strict=True):
            assert abs(one - float(other)) <= 3.5  # edges of an enlarged picture are soft


@given(seed=st.integers(0, 2**62))
def test_what_is_hardly_to_be_seen_has_no_box(seed: int) -> None:
    torch.manual_seed(seed)
    whole = mosaic([tile(i, 60, 60) for i in range(4)])
    for number in set(range(3)) - set(whole.labels.tolist()):
        share = (whole.pixels[number] > 127).float().mean()
        assert share < 0.2 * 0.25 * 1.3 * 1.5**2  # a fifth of the quarter of a tile that fills 65 % and is enlarged


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (2, 40)])
def test_images_that_are_hardly_high_or_wide(size: tuple[int, int]) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        assert mosaic([tile(0, *size), *(tile(i, 1, 60) for i in range(1, 4))]).pixels.shape == (3, *size)


def test_images_without_boxes() -> None:
    empty = Augmented(torch.zeros(3, 40, 50, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    whole = mosaic([empty] * 4)
    assert whole.pixels.shape == (3, 40, 50) and whole.boxes.shape == (0, 4) and whole.labels.shape == (0,)
