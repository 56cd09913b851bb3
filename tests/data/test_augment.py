"""A white rectangle on black shows where its box has to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paqdetr.config import AugmentConfig
from paqdetr.data.augment import Augment, Augmented, crop, spare_small
from paqdetr.preprocessing import Normalization, Preprocessing

PLAIN = Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def augment(size: int | tuple[int, int] = 96, divisor: int = 1, **settings: Any) -> Augment:
    defaults: dict[str, Any] = dict(flip=0.0, crop=0.0, scale=(1.0, 1.0), color=0.0)
    return Augment(AugmentConfig(**defaults | settings), Preprocessing(size, divisor, PLAIN))


def scene(height: int, width: int, *boxes: tuple[int, int, int, int]) -> tuple[Tensor, np.ndarray]:
    """Black, with the boxes (xyxy in pixels) in white: all in channel 0, the first alone in channel 1, and so on."""
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes[:2], start=1):
        pixels[[0, number], top:bottom, left:right] = 255
    return pixels, np.array(boxes, dtype=np.float32).reshape(-1, 4)


def corners(result: Augmented) -> np.ndarray:
    """(G, 4) xyxy in pixels of the result."""
    return result.boxes.double().numpy()


def extent(channel: Tensor) -> tuple[int, int, int, int] | None:
    """xyxy of what is white, the right and lower side excluded."""
    rows, columns = torch.where(channel > 127.5)
    if not len(rows):
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_nothing_but_the_resize() -> None:
    pixels, boxes = scene(40, 80, (8, 4, 40, 20))
    result = augment(size=160)(pixels, boxes, np.array([3]), scale=1.0)
    assert result.pixels.shape == (3, 80, 160) and result.pixels.dtype == torch.uint8
    assert result.boxes.tolist() == [[pytest.approx(v) for v in (16, 8, 80, 40)]]
    assert result.labels.tolist() == [3] and result.labels.dtype == torch.int64
    assert result.boxes.dtype == torch.float32 and type(result.boxes) is Tensor
    assert type(result.pixels) is Tensor


def test_flip_by_hand() -> None:
    pixels, boxes = scene(40, 80, (0, 10, 20, 30))
    result = augment(flip=1.0, size=80)(pixels, boxes, np.array([0]), scale=1.0)
    assert result.boxes.tolist() == [[pytest.approx(v) for v in (60, 10, 80, 30)]]
    assert torch.equal(result.pixels, pixels.flip(-1))


@given(
    seed=st.integers(0, 2**62),
    height=st.integers(40, 130),
    width=st.integers(40, 130),
    place=st.tuples(*[st.floats(0, 1)] * 4),
    scale=st.floats(0.6, 1.0),
    divisor=st.sampled_from([1, 32]),
)
def test_the_box_stays_around_what_is_white(
    seed: int, height: int, width: int, place: tuple[float, ...], scale: float, divisor: int
) -> None:
    across, down = (12 + int(share * (side - 12)) for share, side in zip(place[:2], (width, height), strict=True))
    left, top = int(place[2] * (width - across)), int(place[3] * (height - down))
    pixels, boxes = scene(height, width, (left, top, left + across, top + down))
    torch.manual_seed(seed)
    result = augment(size=192, divisor=divisor, flip=0.5, crop=0.7, crop_size=(0.4, 1.0))(
        pixels, boxes, np.array([5]), scale=scale
    )
    assert result.labels.tolist() == [5]  # a crop that loses every box is not made
    box = corners(result)[0]
    out_height, out_width = result.pixels.shape[1:]
    assert (
        (box >= 0).all() and (box <= np.array([out_width, out_height] * 2) + 1e-4).all() and (box[2:] > box[:2]).all()
    )
    assert out_height % divisor == 0 and out_width % divisor == 0
    white = extent(result.pixels[0])
    assert white is not None
    # A resize moves edges by less than a pixel of the coarser picture.
    slack = 1.0 + max(out_height / height, out_width / width)
    assert np.abs(box - white).max() <= slack


@given(seed=st.integers(0, 2**62))
def test_labels_stay_with_their_boxes(seed: int) -> None:
    pixels, boxes = scene(100, 100, (5, 60, 35, 90), (60, 10, 95, 50))
    torch.manual_seed(seed)
    result = augment(size=200, crop=1.0, crop_size=(0.3, 0.9), flip=0.5)(pixels, boxes, np.array([1, 2]), scale=1.0)
    assert len(result.labels) == len(result.boxes) >= 1
    for label, box in zip(result.labels.tolist(), corners(result), strict=True):
        white = extent(result.pixels[label])
        assert white is not None and np.abs(box - white).max() <= 8


@given(seed=st.integers(0, 2**62))
def test_a_box_that_is_dropped_shows_less_than_a_fifth(seed: int) -> None:
    pixels, boxes = scene(100, 100, (0, 0, 40, 40), (60, 60, 100, 100))
    torch.manual_seed(seed)
    result = augment(size=100, crop=1.0, crop_size=(0.5, 0.7))(pixels, boxes, np.array([1, 2]), scale=1.0)
    share = (result.pixels.shape[1] / 100) ** 2  # pixels of the result for one of the original: the crop is enlarged
    for label in {1, 2} - set(result.labels.tolist()):
        # The crop's side is at least 50 of 100 pixels, so it is enlarged by at most 2 in each direction.
        assert int((result.pixels[label] > 127.5).sum()) < 0.2 * 40 * 40 * 4 * share + 100


def test_images_without_boxes_are_cropped_too() -> None:
    pixels, boxes = scene(64, 64)
    torch.manual_seed(0)
    result = augment(size=64, crop=1.0, crop_size=(0.5, 0.5), flip=1.0)(pixels, boxes, np.zeros(0, np.int64), scale=1.0)
    assert result.boxes.shape == (0, 4) and result.labels.shape == (0,) and result.pixels.shape == (3, 64, 64)


def test_a_crop_drops_boxes_of_which_less_than_a_fifth_is_left() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 20.0, 10.0, 30.0], [40.0, 0.0, 50.0, 10.0]])
    image = Augmented(torch.zeros(3, 40, 60, dtype=torch.uint8), boxes, torch.tensor([1, 2, 3]))
    whole, left_out = crop(image, 0, 8, 40, 50), crop(image, 0, 9, 40, 50)  # a fifth and a tenth of the first two
    assert whole.labels.tolist() == [1, 2, 3] and left_out.labels.tolist() == [3]
    assert whole.boxes[0].tolist() == [0, 0, 2, 10] and left_out.boxes.tolist() == [[31, 0, 41, 10]]


def test_a_crop_keeps_the_aspect() -> None:
    pixels, boxes = scene(60, 120, (50, 20, 70, 40))
    result = augment(size=240, crop=1.0, crop_size=(0.5, 0.5))(pixels, boxes, np.array([0]), scale=1.0)
    assert result.pixels.shape == (3, 120, 240)


@pytest.mark.parametrize("scale", [0.4, 0.77, 1.0, 1.3])
@pytest.mark.parametrize("size", [320, (256, 400)])
def test_sides_are_multiples_of_the_divisor(scale: float, size: int | tuple[int, int]) -> None:
    pixels, boxes = scene(97, 143, (0, 0, 10, 10))
    result = augment(size=size, divisor=32)(pixels, boxes, np.array([0]), scale=scale)
    height, width = result.pixels.shape[1:]
    assert height % 32 == 0 and width % 32 == 0
    longest = 320 if size == 320 else 256 * 143 / 97
    assert abs(width - longest * scale) <= 32


def test_colour_changes_pixels_and_no_box() -> None:
    pixels = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    boxes = np.array([[4, 4, 20, 20]], np.float32)
    plain = augment(size=40)(pixels, boxes, np.array([0]), scale=1.0)
    coloured = augment(size=40, color=0.5)(pixels, boxes, np.array([0]), scale=1.0)
    assert torch.equal(plain.boxes, coloured.boxes)
    assert (plain.pixels.float() - coloured.pixels.float()).abs().mean() > 1


def test_colour_changes_the_pixels_that_are_left_after_the_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    change, seen = augment(size=20, color=0.5), []
    monkeypatch.setattr(change, "_color", lambda pixels: seen.append(tuple(pixels.shape)) or pixels)
    change(*scene(100, 80, (4, 4, 20, 20)), np.array([0]), scale=1.0)
    assert seen == [(3, 20, 16)]


def test_the_same_seed_gives_the_same_and_another_something_else() -> None:
    pixels, boxes = scene(100, 100, (30, 30, 70, 70))
    change = augment(size=100, crop=1.0, crop_size=(0.3, 1.0), flip=0.5, color=0.3)

    def once(seed: int) -> Augmented:
        torch.manual_seed(seed)
        return change(pixels, boxes, np.array([0]), scale=1.0)

    assert torch.equal(once(1).pixels, once(1).pixels) and torch.equal(once(1).boxes, once(1).boxes)
    assert len({tuple(once(seed).boxes.flatten().tolist()) for seed in range(8)}) >= 6


def test_what_is_given_is_not_changed() -> None:
    pixels, boxes = scene(50, 50, (10, 10, 30, 40))
    before, labels = (pixels.clone(), boxes.copy()), np.array([0])
    for seed in range(5):
        torch.manual_seed(seed)
        augment(crop=1.0, flip=1.0, color=0.5)(pixels, boxes, labels, scale=1.0)
    assert torch.equal(pixels, before[0]) and np.array_equal(boxes, before[1])


# --------------------------------------------------------------------------- settings that are off by default


def test_settings_that_are_off_draw_nothing() -> None:
    """Noise of older trainings must not change: what is off takes no random number."""
    pixels, boxes = scene(100, 100, (30, 30, 70, 70))
    plain, spelled = augment(crop=1.0, flip=0.5), augment(crop=1.0, flip=0.5, mosaic=0.0, keep_small=0.0)
    for seed in range(5):
        states = []
        for change in (plain, spelled):
            torch.manual_seed(seed)
            change(pixels, boxes, np.array([0]), scale=1.0)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)


@given(
    frame=st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(1, 60), st.integers(1, 60)),
    boxes=st.lists(st.tuples(*[st.floats(0, 90)] * 2, *[st.floats(1, 50)] * 2), max_size=8),
    side=st.floats(1, 60),
)
def test_a_frame_that_spares_small_boxes(
    frame: tuple[int, int, int, int], boxes: list[tuple[float, ...]], side: float
) -> None:
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4)
    top, left, height, width = spare_small(frame, corners, side)
    # it grows, and no further than boxes reach
    assert top <= frame[0] and left <= frame[1]
    assert top + height >= frame[0] + frame[2] and left + width >= frame[1] + frame[3]
    for x0, y0, x1, y1 in corners.tolist():
        small = ((x1 - x0) * (y1 - y0)) ** 0.5 < side - 1e-3
        meets = x0 < left + width and x1 > left and y0 < top + height and y1 > top
        inside = x0 >= left and x1 <= left + width and y0 >= top and y1 <= top + height
        assert not small or not meets or inside


@given(seed=st.integers(0, 2**62))
def test_small_boxes_are_never_cut(seed: int) -> None:
    pixels, boxes = scene(100, 100, (0, 0, 60, 60), (45, 45, 57, 55))
    torch.manual_seed(seed)
    result = augment(size=200, crop=1.0, crop_size=(0.3, 0.6), keep_small=20.0)(
        pixels, boxes, np.array([1, 2]), scale=1.0
    )
    for label, (left, top, right, bottom) in zip(result.labels.tolist(), result.boxes.tolist(), strict=True):
        if label == 2:  # its aspect is that of the whole box
            assert (right - left) / (bottom - top) == pytest.approx(12 / 10, rel=0.05)


@given(seed=st.integers(0, 2**62), height=st.integers(40, 200), width=st.integers(40, 200))
def test_the_crop_of_detr(seed: int, height: int, width: int) -> None:
    """The short side becomes 400, 500 or 600, and a window of 384 to 600 is cut out: 0.64 of it to all."""
    change = augment(crop=1.0, crop_style="detr")
    torch.manual_seed(seed)
    top, left, crop_height, crop_width = change._frame(height, width)
    assert 0 <= top <= height - crop_height and 0 <= left <= width - crop_width
    short = min(height, width)
    for side, whole in ((crop_height, height), (crop_width, width)):
        assert 384 / 600 * short - 1 <= side <= min(600 / 400 * short + 1, whole)


def test_the_crop_of_detr_changes_the_aspect() -> None:
    change = augment(crop=1.0, crop_style="detr")
    torch.manual_seed(0)
    frames = [change._frame(300, 300)[2:] for _ in range(50)]
    assert len({h / w for h, w in frames}) > 40
    assert max(h for h, _ in frames) == 300 and min(h for h, _ in frames) < 220
