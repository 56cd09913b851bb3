"""Reads pictures: every file, PIL image and array becomes one RGB image, the right way up."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from paqdetr.errors import DataError
from paqdetr.files import open_regular
from paqdetr.values import environment_integer

if TYPE_CHECKING:  # a program that runs an exported model has no torch
    from torch import Tensor

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})

# Those and the other formats below: what is looked for where pictures stand by themselves, without annotations that name them.
PICTURE_EXTENSIONS = IMAGE_EXTENSIONS | {
    ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".heic", ".heif", ".jxl",
}  # fmt: skip

MAX_PIXELS = environment_integer("PAQDETR_MAX_PIXELS", 178_956_970, low=1, high=2**40)
"""Images with more pixels are refused before they are decoded: a file of some kilobytes can claim any size."""

if "PAQDETR_MAX_PIXELS" in os.environ:  # Pillow has a limit of its own, of half as many, and refuses over twice that
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# What is decoded, whatever a file is called. Pillow knows 40 more formats; of PostScript it would run the program.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow looks for the orientation.
_EXIF = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")

_ARRAY_REMEDY = "Pass (height, width, 3) RGB, (height, width, 4) RGBA or (height, width) grey."
_ROUNDING = 1e-3  # floats of a picture that was resized may leave 0..1 by so much
_STRIP = 2**20  # pixels that are converted together
_JPEG_SIDE = 65_500  # the most that libjpeg writes


ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | Tensor"
"""What can be read as a picture: a path, a file's content, a file opened as binary, a PIL image, an array, a tensor."""


def read_image(source: ImageSource, *, remedy: str | None = None) -> Image.Image:
    """The picture as 8-bit RGB with its EXIF orientation applied.

    Args:
        source: a path, the bytes of an image file, a file opened as binary, a PIL image, an array or a tensor.
            An array is (H, W, 3) RGB, (H, W, 4) RGBA, or (H, W) or (H, W, 1) grey; a tensor (C, H, W) with these channels, or
            (H, W), on any device. Values: uint8; uint16, divided by 257; float from 0 to 1; bool, black and white.
        remedy: what to advise about a file that is no image or damaged, where other than it may be simply removed.

    Returns:
        A PIL image of mode "RGB", independent of the source. Other modes are converted thus: grey, 1 bit,
        palette, CMYK, YCbCr, HSV and LAB by their meaning; of several frames the first; what is transparent
        is put on white; 16-bit grey (also in a 32-bit integer image) is divided by 257; larger integers and
        floats, whose range is not known, are stretched so that the least value is black and the greatest
        white (what is not finite is black).

    Raises:
        DataError: the file is missing, no image, damaged or cut short, of more than `MAX_PIXELS` pixels, or the array has
            another shape, dtype or range: floats up to 255, or normalised ones, and integers of other sizes.
    """
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "the given image"
        try:
            return _to_rgb(_upright(source))
        except Exception as error:  # Pillow reports damaged files by any class there is
            raise DataError(f"{name}: the image does not decode: {error}", "Replace or remove the file.") from error
    if isinstance(source, (str, os.PathLike)):
        file: Path | BinaryIO = Path(source)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        file = io.BytesIO(source)
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        file = source  # type: ignore[assignment]
    elif hasattr(source, "permute"):
        return _from_tensor(source)
    elif hasattr(source, "__array__"):
        return _from_array(np.asarray(source))
    else:
        kind = type(source)
        found = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise DataError(
            f"an image: expected a path, bytes, a binary file, a PIL image, an array or a tensor, found {found}",
            f'{_ARRAY_REMEDY} Files are opened with open(path, "rb").',
        )
    with _opened(file, remedy) as image:
        return _to_rgb(_upright(image))


def _orientation(image: Image.Image) -> int | None:
    """That of the EXIF block, 1 if there is none; None if the block is broken."""
    block = image.info.get("exif")
    if isinstance(block, bytes) and not _has_entries(block.removeprefix(b"Exif\0\0")):
        return None
    try:
        # not PngImageFile's own, which decodes everything in search of a late EXIF chunk
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return None
    return turn if isinstance(turn, int) and 0 <= turn <= 8 else None


def _has_entries(block: bytes) -> bool:
    """Whether a block of EXIF is empty, or a TIFF header and as many entries as it says: Pillow makes the best of others."""
    if block[:4] not in (b"II*\0", b"MM\0*"):
        return not block
    order = "little" if block[:1] == b"I" else "big"
    start = int.from_bytes(block[4:8], order)
    count = int.from_bytes(block[start : start + 2], order)
    return 8 <= start and start + 2 + 12 * count <= len(block)


def _upright(image: Image.Image) -> Image.Image:
    """A copy, decoded, with its EXIF orientation applied and forgotten; as stored where the EXIF block is broken, or lies behind
    the pixels of a PNG, where `read_size` does not see it either."""
    turn = _orientation(image)
    image.load()
    if image.format == "TIFF":  # some versions of Pillow have turned it by now
        turn = _orientation(image)
    method = _UPRIGHT.get(turn or 1)
    upright = image.copy() if method is None else image.transpose(method)
    for key in _EXIF:
        upright.info.pop(key, None)
    return upright


def read_traits(source: str | Path) -> frozenset[str]:
    """What is out of the ordinary in an image file by its header, of "exif turn", "broken exif", "16 bit", "palette", "CMYK",
    "alpha", "grey" and "several frames"; `read_image` has a rule for each.

    Raises:
        DataError: the file is missing, no image, or its header is damaged.
    """
    with _opened(Path(source)) as image:
        return frozenset(_traits(image))


def read_size(source: str | Path | bytes, *, remedy: str | None = None) -> tuple[int, int]:
    """(width, height) in pixels of an image file, or of its content, as `read_image` gives it: with its EXIF turn applied.
    Nothing is decoded; `remedy` as of `read_image`.

    Raises:
        DataError: as `read_traits`.
    """
    with _opened(io.BytesIO(source) if isinstance(source, bytes) else Path(source), remedy) as image:
        width, height = image.size
        if image.format == "TIFF":  # some versions of Pillow have turned the size already
            width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _traits(image: Image.Image) -> Iterator[str]:
    turn = _orientation(image)
    mode = image.mode
    raw = str(image.tile[0].args) if getattr(image, "tile", None) else ""  # type: ignore[attr-defined]
    if turn is None:
        yield "broken exif"
    elif turn in _UPRIGHT:
        yield "exif turn"
    if mode.startswith("I") or mode == "F" or ";16" in raw:
        yield "16 bit"
    if mode in ("P", "PA"):
        yield "palette"
    if mode == "CMYK":
        yield "CMYK"
    if mode in ("1", "L", "LA") or mode.startswith("I"):
        yield "grey"
    if image.has_transparency_data:
        yield "alpha"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        yield "several frames"


def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow was built with, or that a plug-in of the user's has added by now."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _opened(source: Path | BinaryIO, remedy: str | None = None) -> Iterator[Image.Image]:
    """The image, not yet decoded; whatever goes wrong meanwhile, while decoding too, becomes a DataError."""
    usual = "Convert it to JPEG or PNG, or remove it." if isinstance(source, Path) else "Send a JPEG or PNG."
    path = source if isinstance(source, Path) else getattr(source, "name", "the given bytes")
    try:
        opened = open_regular(source) if isinstance(source, Path) else nullcontext(source)
        with opened as file, Image.open(file, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            yield image
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path}: the image is too large: {error}",
            f"Make it smaller, or cut it into tiles; PAQDETR_MAX_PIXELS=N raises the limit of {MAX_PIXELS:,}.",
        ) from None
    except DataError:
        raise
    except UnidentifiedImageError:
        size = f" ({path.stat().st_size} bytes)" if isinstance(path, Path) else ""
        raise DataError(f"{path}: not an image in a known format{size}", remedy or usual) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow reports damaged files by any class there is
        raise DataError(f"{path}: the image does not decode: {error}", remedy or usual) from error


# What operating systems and programs leave in folders, and archives of macOS hold beside every file.
_LEFTOVERS = frozenset({"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints", "@eaDir"})


def is_leftover(name: str) -> bool:
    """Whether a relative name is, or lies in, what nobody put there on purpose: `._a.jpg`, `__MACOSX/`, ..."""
    return any(part.startswith("._") or part in _LEFTOVERS for part in name.split("/"))


def list_images(path: str | Path) -> list[Path]:
    """The image files of a folder (not of its subfolders) in order of name, or the one file that `path` is. Hidden files are left
    out; a file without an ending is one of them if its content is an image.

    Raises:
        DataError: `path` does not exist, is a file of another kind, or a folder without images.
    """
    path = Path(path)
    kinds = ", ".join(sorted(PICTURE_EXTENSIONS))
    if not path.is_dir():
        if path.suffix.lower() not in PICTURE_EXTENSIONS:
            read_size(path)
        open_regular(path).close()
        return [path]
    found = pictures_in(path)
    if not found:
        raise DataError(f"{path}: the folder holds no images ({kinds})", "Name a folder with images directly in it.")
    return found


def pictures_in(folder: Path) -> list[Path]:
    """As `list_images`, of a folder that may have none."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.name[:1] != "."
        and not is_leftover(entry.name)
        and entry.is_file()
        and (entry.suffix.lower() in PICTURE_EXTENSIONS or (not entry.suffix and _is_picture(entry)))
    )


def _is_picture(path: Path) -> bool:
    try:
        read_size(path)
    except DataError:
        return False
    return True


def _from_tensor(tensor: Any) -> Image.Image:
    shape = tuple(tensor.shape)
    if tensor.ndim == 3 and shape[0] in (1, 3, 4):
        tensor = tensor.permute(1, 2, 0)
    elif tensor.ndim != 2:
        last = tensor.ndim == 3 and shape[2] in (1, 3, 4)
        raise DataError(
            f"a tensor of shape {shape} and {tensor.dtype}: expected (C, H, W) with 1, 3 or 4 channels, or (H, W)",
            "Use .permute(2, 0, 1) where channels are last." if last else "Pass the tensor of one RGB image.",
        )
    values = tensor.detach().cpu()
    return _from_array((values.float() if values.is_floating_point() else values).numpy())


def _from_array(array: np.ndarray) -> Image.Image:
    shape = array.shape
    if array.ndim not in (2, 3) or 0 in shape or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        first = array.ndim == 3 and shape[0] in (1, 3, 4)
        raise DataError(
            f"an array of shape {shape} and {array.dtype}: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)",
            "Use .transpose(1, 2, 0) where channels are first." if first else _ARRAY_REMEDY,
        )
    values = np.ascontiguousarray(_eight_bits(array[..., 0] if shape[2:] == (1,) else array))
    return _to_rgb(Image.fromarray(values))


def _eight_bits(array: np.ndarray) -> np.ndarray:
    """The values of an array as uint8; see `read_image`."""
    kind, found = array.dtype.kind, f"an array of shape {array.shape} and {array.dtype}"
    if array.dtype == np.uint8:
        return array
    if kind == "b":
        return array * np.uint8(255)
    if kind == "u" and array.dtype.itemsize == 2:
        return np.rint(array / np.float32(257)).astype(np.uint8)
    if kind == "f":
        low, high = array.min(), array.max()
        if -_ROUNDING <= low and high <= 1 + _ROUNDING:
            return np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
        remedy = "Pass the picture as it was before it was normalised."
        if low >= 0 and 1 < high <= 255:
            remedy = "Divide by 255, or use .astype('uint8')."
        elif not np.isfinite([low, high]).all():
            remedy = "Replace what is not finite."
        raise DataError(f"{found} has values from {low:g} to {high:g}: expected floats from 0 to 1", remedy)
    raise DataError(
        f"{found}: expected uint8, uint16, bool, or floats from 0 to 1",
        "Use .astype('uint8') if its values are 0 to 255.",
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image  # already a copy
    if image.mode.startswith("I;16"):
        return _in_strips(image, lambda strip: _grey(_floats(strip) / 257))
    if image.mode in ("I", "F"):
        low, high = _range(image)
        if image.mode == "I" and low >= 0 and high <= 65535:
            return _in_strips(image, lambda strip: _grey(_floats(strip) / 257))
        return _in_strips(image, lambda strip: _grey(_stretched(_floats(strip), low, high)))
    if image.mode in ("La", "RGBa") or image.has_transparency_data:
        return _in_strips(image, _on_white)
    return image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """First row and content of parts of an image."""
    rows = max(_STRIP // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """RGB of an image, some rows at a time: floats, or copies with opacity, of all of it would take many times its memory."""
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _floats(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def _range(image: Image.Image) -> tuple[float, float]:
    """The least and the greatest finite value; (0, 0) if there is none."""
    low, high = np.inf, -np.inf
    for _, strip in _strips(image):
        values = _floats(strip)
        values = values[np.isfinite(values)]
        low, high = min(low, values.min(initial=np.inf)), max(high, values.max(initial=-np.inf))
    return (low, high) if low <= high else (0.0, 0.0)


def _stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    finite = np.isfinite(values)
    if high == low:  # no range to stretch: keep what is plausible as an 8-bit value
        return np.where(finite, np.clip(values, 0, 255), 0.0)
    return np.where(finite, (np.where(finite, values, low) - low) * (255 / (high - low)), 0.0)


def fit_jpeg(picture: Image.Image) -> Image.Image:
    """The picture, or a smaller copy where it is wider or higher than a JPEG file can be."""
    if max(picture.size) <= _JPEG_SIDE:
        return picture
    scale = _JPEG_SIDE / max(picture.size)
    return picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))
