from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paqdetr.models.tokens import at_least_float32, inverse_sigmoid, sine_boxes, sine_map, sine_proposals


def slow_sine(position: float, dim: int, temperature: float) -> list[float]:
    """Channel 2k is the sine and 2k+1 the cosine of 2 pi position / temperature^(2k / dim)."""
    out = []
    for k in range(dim // 2):
        angle = 2 * math.pi * position / temperature ** (2 * k / dim)
        out += [math.sin(angle), math.cos(angle)]
    return out


@pytest.mark.parametrize(("offset", "temperature"), [(0.0, 20.0), (-0.5, 10000.0)])
def test_sine_map_equals_a_plain_loop_and_counts_valid_cells(offset: float, temperature: float) -> None:
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    sizes = [(2, 4), (3, 5)]  # valid height and width of each image
    for image, (height, width) in enumerate(sizes):
        mask[image, :height, :width] = False
    embedding = sine_map(mask, 8, temperature, offset, torch.float64)
    assert embedding.shape == (2, 15, 8)
    for image, (height, width) in enumerate(sizes):
        for row in range(height):
            for column in range(width):
                y, x = (row + 1 + offset) / (height + 1e-6), (column + 1 + offset) / (width + 1e-6)
                expected = slow_sine(y, 4, temperature) + slow_sine(x, 4, temperature)
                found = embedding[image, row * 5 + column].tolist()
                assert found == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("padding", [0, 1, 7])
def test_sine_map_of_valid_cells_does_not_see_padding(padding: int) -> None:
    mask = torch.ones(1, 4 + padding, 3 + padding, dtype=torch.bool)
    mask[:, :4, :3] = False
    valid = sine_map(mask, 16, 20.0)[~mask.flatten(1)]
    assert torch.equal(valid, sine_map(torch.zeros(1, 4, 3, dtype=torch.bool), 16, 20.0)[0])


def test_sine_boxes_by_hand() -> None:
    box = torch.tensor([0.25, 0.5, 0.125, 1.0], dtype=torch.float64)  # cx, cy, w, h
    found = sine_boxes(box, 2)
    # One sine and one cosine each of cy = pi, cx = pi / 2, w = pi / 4, h = 2 pi.
    half = math.sqrt(0.5)
    assert found.tolist() == pytest.approx([0, -1, 1, 0, half, half, 0, 1], abs=1e-12)


def test_sine_boxes_equal_a_plain_loop() -> None:
    boxes = torch.rand(3, 2, 4, dtype=torch.float64)
    found = sine_boxes(boxes, 8)
    assert found.shape == (3, 2, 32)
    for i in range(3):
        for j in range(2):
            cx, cy, w, h = boxes[i, j].tolist()
            expected = [value for side in (cy, cx, w, h) for value in slow_sine(side, 8, 10000.0)]
            assert found[i, j].tolist() == pytest.approx(expected, abs=1e-10)
            # Proposals of Deformable DETR put x first.
            expected = [value for side in (cx, cy, w, h) for value in slow_sine(side, 8, 10000.0)]
            assert sine_proposals(boxes, 8)[i, j].tolist() == pytest.approx(expected, abs=1e-10)


@given(st.floats(1e-5, 1 - 1e-5))
def test_inverse_sigmoid_undoes_the_sigmoid(x: float) -> None:
    value = torch.tensor(x, dtype=torch.float64)
    assert inverse_sigmoid(value).sigmoid().item() == pytest.approx(x, abs=1e-10)


def test_inverse_sigmoid_is_finite_at_the_ends() -> None:
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64))
    limit = math.log(1e5)
    assert ends.tolist() == pytest.approx([-limit, -limit, 0, limit, limit])
    assert inverse_sigmoid(torch.tensor(0.0), 1e-3).item() == pytest.approx(-math.log(1e3))


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32(given_: torch.dtype, wanted: torch.dtype) -> None:
    assert at_least_float32(torch.zeros(1, dtype=given_)).dtype == wanted
