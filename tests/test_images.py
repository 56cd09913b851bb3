from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paqdetr.errors import DataError
from paqdetr.images import list_images, read_image


def pixels(source: object) -> np.ndarray:
    image = read_image(source)  # type: ignore[arg-type]
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def colours() -> Image.Image:
    """3 wide, 2 high: red, green, blue over black, grey, white."""
    rows = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(0, 0, 0), (128, 128, 128), (255, 255, 255)]]
    return Image.fromarray(np.array(rows, dtype=np.uint8))


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, colours: Image.Image, orientation: int, turned) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    colours.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), turned(np.asarray(colours)))


def test_modes_with_a_meaning(tmp_path: Path, colours: Image.Image) -> None:
    expected = np.asarray(colours)
    np.testing.assert_array_equal(pixels(colours), expected)
    np.testing.assert_array_equal(pixels(colours.convert("P", palette=Image.Palette.ADAPTIVE)), expected)
    np.testing.assert_array_equal(pixels(colours.convert("CMYK")), expected)
    grey = Image.fromarray(np.array([[0, 77, 255]], dtype=np.uint8))
    assert pixels(grey)[0].tolist() == [[0] * 3, [77] * 3, [255] * 3]
    assert pixels(grey.point(lambda v: 255 * (v > 100), "1"))[0].tolist() == [[0] * 3, [0] * 3, [255] * 3]


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    rgba = Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], dtype=np.uint8))
    assert pixels(rgba)[0].tolist() == [[255] * 3, [10, 20, 30], [204] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert pixels(tmp_path / "p.png")[0].tolist() == [[255] * 3, [0, 200, 0]]
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png")[0].tolist() == [[255] * 3]


def test_deep_images_become_eight_bits(tmp_path: Path) -> None:
    sixteen = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels(Image.fromarray(sixteen.astype(np.int32)))[0, :, 0].tolist() == [0, 1, 128, 255]
    signed = np.array([[-100, 0, 155]], dtype=np.int32)
    assert pixels(Image.fromarray(signed))[0, :, 0].tolist() == [0, 100, 255]
    floats = np.array([[0, np.nan, 1, 5, np.inf]], dtype=np.float32)
    assert pixels(Image.fromarray(floats))[0, :, 0].tolist() == [0, 0, 51, 255, 0]


def test_arrays() -> None:
    rgb = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(pixels(rgb), rgb)
    np.testing.assert_array_equal(pixels(rgb[:, ::-1]), rgb[:, ::-1])
    for grey in (rgb[..., 0], rgb[..., :1]):
        np.testing.assert_array_equal(pixels(grey), np.repeat(rgb[..., :1], 3, axis=2))
    for wrong in (rgb.astype(np.float32), rgb[None], rgb[..., :2], rgb[:0]):
        with pytest.raises(DataError, match="expected"):
            read_image(wrong)


def test_the_result_is_independent_of_its_source(colours: Image.Image) -> None:
    read_image(colours).putpixel((0, 0), (1, 2, 3))
    assert colours.getpixel((0, 0)) == (255, 0, 0)


def test_bad_files_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for ending in ("jpg", "png"):
        whole = tmp_path / f"whole.{ending}"
        Image.fromarray(noise).save(whole)
        cut = tmp_path / f"cut.{ending}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(DataError, match=rf"cut\.{ending}.*does not decode"):
            read_image(cut)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"text\.jpg.*8 bytes"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match=r"absent\.jpg.*no such"):
        read_image(str(tmp_path / "absent.jpg"))
    with pytest.raises(DataError, match="is a folder"):
        read_image(tmp_path)


def test_list_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        list_images(tmp_path)
    for name in ("b.PNG", "a.jpg", "c.txt", "d.webp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "d.webp"]
    assert list_images(str(tmp_path / "a.jpg")) == [tmp_path / "a.jpg"]
    with pytest.raises(DataError, match=r"c\.txt"):
        list_images(tmp_path / "c.txt")
    with pytest.raises(DataError, match="no such"):
        list_images(tmp_path / "absent")
