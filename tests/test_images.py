from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from paqdetr import images
from paqdetr.errors import DataError
from paqdetr.images import list_images, read_image, read_size, read_traits


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


def entries(*rows: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, count, four bytes)."""
    packed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in rows)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(rows)) + packed + b"\0\0\0\0"


TURN = (0x112, 3, 1, b"\x06\0\0\0")


@pytest.mark.parametrize(
    ("block", "broken"),
    {
        "garbage": (b"\xff" * 40, True),
        "cut short": (b"II*\0", True),
        "no byte order": (b"XX*\0\x08\0\0\0", True),
        "entries beyond its end": (b"II*\0\xff\xff\xff\x7f", True),
        "more entries than it has": (b"MM\0*\0\0\0\x08\xff\xff", True),
        "cut within an entry": (entries(TURN)[:-8], True),
        "orientation that is a text": (entries((0x112, 2, 4, b"abc\0")), True),
        "orientation 99": (entries((0x112, 3, 1, b"\x63\0\0\0")), True),
        "empty": (b"", False),
        "no orientation": (entries((0x10F, 2, 2, b"a\0\0\0")), False),
        "value beyond its end": (entries((0x10F, 2, 10**5, b"\xff\xff\0\0")), False),
        "leads back to itself": (entries((0x8769, 4, 1, b"\x08\0\0\0")), False),
    }.values(),
)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_broken_exif_block_is_ignored(tmp_path: Path, block: bytes, broken: bool, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (40, 30)).save(path, exif=b"Exif\0\0" + block)
    traits = read_traits(path)
    assert read_image(path).size == read_size(path) == (40, 30)
    assert read_image(Image.open(path)).size == (40, 30)
    assert ("broken exif" in traits) == broken and "exif turn" not in traits


@given(st.binary(max_size=40), st.sampled_from([b"", entries(TURN)[:20], entries(TURN)]))
@settings(deadline=None)
def test_any_exif_block(head: bytes, tail: bytes) -> None:
    for block in (head + tail, tail + head):
        file = io.BytesIO()
        Image.new("RGB", (40, 30)).save(file, "JPEG", exif=b"Exif\0\0" + block)
        assert sorted(read_image(Image.open(file)).size) == [30, 40]


def test_a_turn_is_applied_once(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + entries(TURN, (0x10F, 2, 10**5, b"zzzz")))
    upright = read_image(tmp_path / "a.jpg")
    assert upright.size == read_image(upright).size == (30, 40)
    assert read_size(tmp_path / "a.jpg") == (30, 40)


@pytest.mark.parametrize("read", [read_image, read_size, read_traits, list_images])
def test_only_regular_files_are_opened(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match=r"pipe\.jpg: is a pipe, expected a file"):
        read(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"link\.jpg: is a device, expected a file"):
        read(tmp_path / "link.jpg")
    for name in ("a\0.jpg", "\ud800.jpg"):
        with pytest.raises(DataError, match="cannot be the name of a file"):
            read(tmp_path / name)


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "photo", "PNG")
    Image.new("RGB", (4, 3)).save(tmp_path / "b.txt", "JPEG")
    Image.new("RGB", (4, 3)).save(tmp_path / ".hidden.png")
    (tmp_path / "._b.jpg").write_bytes(b"left by macOS")
    (tmp_path / "README").write_text("no picture")
    os.mkfifo(tmp_path / "pipe")
    assert list_images(tmp_path / "photo") == [tmp_path / "photo"]
    assert list_images(tmp_path / "b.txt") == [tmp_path / "b.txt"]
    assert list_images(tmp_path) == [tmp_path / "photo"]
    with pytest.raises(DataError, match="README: not an image in a known format"):
        list_images(tmp_path / "README")


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
    with pytest.raises(DataError, match=r"\.avif, .*\.gif"):
        list_images(tmp_path)
    for name in ("b.PNG", "a.jpg", "c.txt", "d.webp", "e.gif", "f.avif", "g.jp2"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "d.webp", "e.gif", "f.avif", "g.jp2"]
    assert list_images(str(tmp_path / "a.jpg")) == [tmp_path / "a.jpg"]
    with pytest.raises(DataError, match=r"c\.txt"):
        list_images(tmp_path / "c.txt")
    with pytest.raises(DataError, match="no such"):
        list_images(tmp_path / "absent")


# ------------------------------------------------------------------------------------------- every mode

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8))
SIXTEEN = Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 205)


@pytest.mark.parametrize(
    ("mode", "image", "tolerance"),
    [
        ("RGB", RGB, 0),
        ("RGBA", RGB.convert("RGBA"), 0),
        ("RGBa", RGB.convert("RGBA").convert("RGBa"), 0),
        ("RGBX", RGB.convert("RGBX"), 0),
        ("CMYK", RGB.convert("CMYK"), 0),
        ("YCbCr", RGB.convert("YCbCr"), 3),
        ("LAB", RGB.convert("LAB"), 25),
        ("HSV", RGB.convert("HSV"), 6),
    ],
)
def test_modes_in_colour(mode: str, image: Image.Image, tolerance: int) -> None:
    assert image.mode == mode
    difference = np.abs(pixels(image).astype(int) - np.asarray(RGB))
    assert difference.max() <= tolerance


@pytest.mark.parametrize(
    ("mode", "image", "expected"),
    [
        ("1", RGB.convert("1"), np.asarray(RGB.convert("1").convert("L"))),
        ("L", RGB.convert("L"), np.asarray(RGB.convert("L"))),
        ("LA", RGB.convert("LA"), np.asarray(RGB.convert("L"))),
        ("La", RGB.convert("LA").convert("La"), np.asarray(RGB.convert("L"))),
        ("I;16", SIXTEEN, np.rint(np.asarray(SIXTEEN) / 257).astype(np.uint8)),
        ("I", SIXTEEN.convert("I"), np.rint(np.asarray(SIXTEEN) / 257).astype(np.uint8)),
    ],
)
def test_modes_in_grey(mode: str, image: Image.Image, expected: np.ndarray) -> None:
    assert image.mode == mode
    assert (pixels(image) == expected[..., None]).all()


def test_palettes_with_and_without_transparency() -> None:
    few = RGB.convert("P", palette=Image.Palette.ADAPTIVE)
    assert (pixels(few) == np.asarray(few.convert("RGB"))).all()
    assert pixels(few.convert("PA")).shape == (16, 20, 3)


def test_no_mode_of_pillow_is_without_a_rule() -> None:
    """A new Pillow may bring new modes; whoever sees this fail adds a row above."""
    known = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16 I;16L I;16B I;16N".split()
    assert set(Image.MODES) <= set(known)


def test_several_frames_give_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.tif")[0, 0].tolist() == [255, 0, 0]
    assert read_traits(tmp_path / "a.tif") == {"several frames"}

    def count(image: object) -> int:
        raise AssertionError("a file may have thousands of frames")

    monkeypatch.setattr(TiffImageFile, "n_frames", property(count))
    assert read_size(tmp_path / "a.tif") == read_size((tmp_path / "a.tif").read_bytes()) == (8, 8)


# ---------------------------------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("ending", "image", "traits"),
    [
        ("png", RGB, set()),
        ("jpg", RGB, set()),
        ("webp", RGB, set()),
        ("png", RGB.convert("RGBA"), {"alpha"}),
        ("webp", Image.new("RGBA", (20, 16), (1, 2, 3, 100)), {"alpha"}),
        ("png", RGB.convert("P"), {"palette"}),
        ("jpg", RGB.convert("CMYK"), {"CMYK"}),
        ("jpg", RGB.convert("L"), {"grey"}),
        ("png", SIXTEEN, {"16 bit", "grey"}),
        ("tif", RGB.convert("F"), {"16 bit"}),
    ],
)
def test_header(tmp_path: Path, ending: str, image: Image.Image, traits: set[str]) -> None:
    image.save(tmp_path / f"a.{ending}")
    assert read_size(tmp_path / f"a.{ending}") == (20, 16) and read_traits(tmp_path / f"a.{ending}") == traits


def test_sixteen_bits_in_colour(tmp_path: Path) -> None:
    """Pillow keeps the upper eight bits; written by hand, as it writes no such file."""
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(5, 4, 16, rows))
    assert (pixels(tmp_path / "a.png") == values >> 8).all()
    assert read_traits(tmp_path / "a.png") == {"16 bit"}


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "RGBA", "LA", "RGBa", "P"])
def test_strips_make_no_difference(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (9, 11), dtype=np.uint16))
    elif mode in ("I", "F"):
        values = rng.normal(0, 1e5, (9, 11))
        values[3, 4] = np.inf if mode == "F" else 7e5
        image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (9, 11, 4), dtype=np.uint8), "RGBA").convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(range(256))
    whole = np.asarray(read_image(image))
    monkeypatch.setattr(images, "_STRIP", 25)  # two rows
    assert (np.asarray(read_image(image)) == whole).all() and len(np.unique(whole)) > 10


def test_a_turn_behind_the_pixels_of_a_png_counts_nowhere(tmp_path: Path) -> None:
    """`read_size` would have to read all of the file to find it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    (tmp_path / "late.png").write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    assert Image.open(tmp_path / "late.png").getexif()[0x0112] == 6
    assert read_size(tmp_path / "a.png") == read_image(tmp_path / "a.png").size == (16, 20)
    assert read_size(tmp_path / "late.png") == read_image(tmp_path / "late.png").size == (20, 16)


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_picture(tmp_path: Path, ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGB.save(tmp_path / f"a.{ending}", exif=exif)
    assert read_size(tmp_path / f"a.{ending}") == read_image(tmp_path / f"a.{ending}").size
    assert ("exif turn" in read_traits(tmp_path / f"a.{ending}")) == (orientation != 1)


# ----------------------------------------------------------------------------------------------- limits


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(100, 100, 8, b""))
    with pytest.raises(DataError, match="does not decode"):
        read_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 9999)
    for read in (read_image, read_size, read_traits):
        with pytest.raises(DataError, match=r"a\.png: the image is too large: 100x100 pixels") as caught:
            read(tmp_path / "a.png")
        assert "PAQDETR_MAX_PIXELS" in caught.value.remedy


def test_the_limit_can_be_raised(tmp_path: Path) -> None:
    """In a process of its own: Pillow's limit is one of the whole process."""
    (tmp_path / "a.png").write_bytes(png(20_000, 20_000, 8, b""))
    code = "import sys; from paqdetr.images import read_size; print(read_size(sys.argv[1]))"
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "a.png")]
    path = os.pathsep.join([str(Path(images.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    for limit, works in ((None, False), ("500000000", True)):
        env = os.environ | {"PYTHONPATH": path} | ({"PAQDETR_MAX_PIXELS": limit} if limit else {})
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert ("(20000, 20000)" in done.stdout) == works, done.stderr
        assert works or "the image is too large" in done.stderr


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    text = zlib.compress(b"a" * 200_000_000)
    whole = png(2, 2, 8, b"\0" * 14)
    bomb = b"zTXt" + b"Comment\0\0" + text
    chunk = struct.pack(">I", len(bomb) - 4) + bomb + struct.pack(">I", zlib.crc32(bomb))
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk + whole[33:])
    with pytest.raises(DataError, match="does not decode"):
        read_image(tmp_path / "a.png")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match="not an image in a known format"):
        read_image(tmp_path / "a.png")


@given(st.binary(max_size=60), st.integers(0, 400), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]))
@settings(max_examples=150, deadline=None)
def test_damaged_files_raise_nothing_but_our_errors(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int, form: str
) -> None:
    buffer = io.BytesIO()
    RGB.save(buffer, format=form)
    whole = buffer.getvalue()
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(whole[:place] + noise + whole[place + len(noise) :])
    for read in (read_image, read_size, read_traits):
        with contextlib.suppress(DataError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)


@pytest.mark.parametrize("name", ["._a.jpg", "._b.png", "._.webp"])
def test_leftovers_are_no_images(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    with pytest.raises(DataError, match="holds no images"):
        list_images(tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "c.png")
    assert list_images(tmp_path) == [tmp_path / "c.png"]
