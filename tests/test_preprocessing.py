from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paqdetr.preprocessing import Normalization, Preprocessing, pad_images, to_pixels

LITE = Normalization(mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0))


def build(size: int | tuple[int, int], divisor: int = 1) -> Preprocessing:
    return Preprocessing(size, divisor, LITE)


@pytest.mark.parametrize(
    ("size", "divisor", "image", "expected"),
    [
        (320, 1, (480, 640), (240, 320)),  # one number is the long side
        (320, 1, (640, 480), (320, 240)),
        (320, 32, (480, 640), (256, 320)),  # 240 / 32 = 7.5, to the even 8
        (320, 32, (427, 640), (224, 320)),  # 213.5 / 32 = 6.7
        (320, 32, (10, 640), (32, 320)),  # 5 pixels, but never less than one step
        (320, 1, (1, 2000), (1, 320)),
        ((800, 1333), 1, (480, 640), (800, 1066)),  # two numbers are the short side ...
        ((800, 1333), 1, (500, 1000), (666, 1332)),  # ... unless the long one would pass its limit
        ((800, 1333), 1, (1000, 500), (1332, 666)),
        ((800, 1333), 1, (800, 800), (800, 800)),
        ((800, 1333), 32, (480, 640), (800, 1056)),
    ],
)
def test_target_size(
    size: int | tuple[int, int], divisor: int, image: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert build(size, divisor).target_size(*image) == expected


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([1, 16, 32]))
def test_target_size_keeps_its_promises(height: int, width: int, divisor: int) -> None:
    found = build(320, divisor).target_size(height, width)
    assert max(found) == 320
    assert all(side % divisor == 0 and side >= divisor for side in found)
    exact = 320 * min(height, width) / max(height, width)
    assert abs(min(found) - max(exact, divisor)) <= divisor / 2 + 1e-6
    short, long = sorted(replace(build((200, 320)), resize="nearest").target_size(height, width))
    assert long <= 320 and short <= 200 and (long == 320 or short == 200)


def test_normalisation_by_hand() -> None:
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    found = LITE(pixels)
    assert found.dtype == torch.float32
    assert found[:, 0, 0].tolist() == [-127 / 128, 0, 1]
    imagenet = Normalization(mean=(100.0, 50.0, 25.0), std=(10.0, 5.0, 1.0))
    assert imagenet(pixels)[:, 1, 1].tolist() == pytest.approx([-10, 15.4, 230])


def test_the_call_resizes_then_normalises() -> None:
    image = Image.new("RGB", (64, 32), (255, 127, 0))
    found = build(32)(image)
    assert found.shape == (3, 16, 32) and found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor([1.0, 0.0, -127 / 128])[:, None, None].expand(3, 16, 32))
    assert build(32)(image, size=(8, 24)).shape == (3, 8, 24)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    array = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    found = build(64)(Image.fromarray(array))
    assert torch.equal(found, LITE(torch.from_numpy(array).permute(2, 0, 1)))


def test_shrinking_averages() -> None:
    stripes = np.zeros((32, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 254
    found = build(32)(Image.fromarray(stripes))
    assert found[:, :, 4:-4].abs().max() < 0.02  # grey: without antialiasing it would be black or white


def test_to_pixels_is_channels_first_and_a_copy() -> None:
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    pixels = to_pixels(image)
    assert pixels.shape == (3, 2, 3) and pixels.dtype == torch.uint8
    assert pixels[:, 0, 0].tolist() == [1, 2, 3]
    pixels.zero_()
    assert image.getpixel((0, 0)) == (1, 2, 3)


IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@pytest.mark.parametrize("size", [320, (800, 1333)])
def test_to_a_header_and_back(size: int | tuple[int, int]) -> None:
    preprocessing = Preprocessing(size, 32, IMAGENET, resize="detectron2", pad_divisor=16)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


def test_headers_of_before_the_rules_are_read_as_their_images_were_made() -> None:
    header = Preprocessing((800, 1333), 1, IMAGENET).to_dict()
    del header["resize"], header["pad_divisor"]
    old = Preprocessing.from_dict(header)
    assert old.target_size(480, 640) == (800, 1067)
    assert old.pad_divisor == 32


def test_padding_by_hand() -> None:
    images = [torch.full((3, 33, 20), 1.0), torch.full((3, 10, 64), 2.0)]
    batch, mask = pad_images(images, 32)
    assert batch.shape == (2, 3, 64, 64) and mask is not None and mask.shape == (2, 64, 64)
    assert batch.sum() == 3 * 33 * 20 + 2 * 3 * 10 * 64
    assert (batch[0, :, :33, :20] == 1).all() and (batch[1, :, :10] == 2).all()
    assert (~mask).sum((1, 2)).tolist() == [33 * 20, 10 * 64]
    assert not mask[0, :33, :20].any() and not mask[1, :10].any()
    assert not batch.masked_select(mask[:, None].expand_as(batch)).any()
    tight, tight_mask = pad_images(images)
    assert torch.equal(tight, batch[:, :, :33]) and tight_mask is not None
    assert torch.equal(tight_mask, mask[:, :33])


def test_no_padding_no_mask() -> None:
    image = torch.randn(3, 32, 64)
    batch, mask = pad_images([image, image])
    assert mask is None and torch.equal(batch[1], image)
    odd = torch.randn(3, 33, 65)
    assert torch.equal(pad_images([odd])[0][0], odd) and pad_images([odd])[1] is None
    assert pad_images([odd], 32)[1] is not None


def test_padding_keeps_the_dtype() -> None:
    assert pad_images([torch.zeros(3, 5, 5, dtype=torch.bfloat16)])[0].dtype == torch.bfloat16
