"""What `predict` takes: the same pixels in any form are the same detections, and what is no picture is named."""

from __future__ import annotations

import http.server
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from torchvision import tv_tensors

from paqdetr.errors import DataError
from paqdetr.images import read_image
from paqdetr.models import Detector
from paqdetr.runtime import ExportInfo, FixedSize, Predictor
from paqdetr.runtime.engines import Engine
from paqdetr.runtime.predictor import predict_in_batches
from paqdetr.structures import ClassTable, Detections

COLOUR = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
GREY = COLOUR[..., 0].copy()
OPAQUE = np.dstack([COLOUR, np.full(GREY.shape, 255, np.uint8)])


class Pixels(np.ndarray):
    """Which, unlike its base, can be referred to weakly."""


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Every row of pixels is a box that reaches as far as its mean is bright, and scores its first pixel."""

    def run(images: np.ndarray) -> dict[str, np.ndarray]:  # (N, H, W, 3)
        bright = images.mean((2, 3)).astype(np.float32) / 255
        low, high = np.zeros_like(bright), np.ones_like(bright)
        return {
            "boxes": np.stack([low, low, bright, high], axis=-1),
            "scores": images[:, :, 0].mean(-1).astype(np.float32) / 255,
            "labels": np.tile(np.arange(images.shape[1]) % 2, (len(images), 1)),
        }

    info = ExportInfo(
        name="rows",
        classes=ClassTable((3, 7), ("cat", "dog")),
        preprocessing=FixedSize(12, 16, (0, 0, 0), (1, 1, 1)),
        raw=False,
        precision="f32",
        max_detections=12,
        clamp_boxes=True,
    )
    return Predictor(Engine("numpy", info.to_json(), None, run), "rows.onnx")


def png(image: Image.Image, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **how)
    return file.getvalue()


def turned(array: np.ndarray) -> bytes:
    """Stored lying, with the EXIF entry that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(Image.fromarray(np.rot90(array, 1).copy()), exif=exif)


def chw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


PICTURE = Image.fromarray(COLOUR)
FORMS: dict[str, tuple[Any, np.ndarray]] = {
    "RGB": (PICTURE, COLOUR),
    "RGBA": (PICTURE.convert("RGBA"), COLOUR),
    "bytes": (png(PICTURE), COLOUR),
    "bytearray": (bytearray(png(PICTURE)), COLOUR),
    "memoryview": (memoryview(png(PICTURE)), COLOUR),
    "file object": (io.BytesIO(png(PICTURE)), COLOUR),
    "EXIF turn": (turned(COLOUR), COLOUR),
    "EXIF turn of PIL": (Image.open(io.BytesIO(turned(COLOUR))), COLOUR),
    "array": (COLOUR, COLOUR),
    "array, RGBA": (OPAQUE, COLOUR),
    "array, not contiguous": (np.asfortranarray(COLOUR[::-1])[::-1], COLOUR),
    "array, read only": (np.frombuffer(COLOUR.tobytes(), np.uint8).reshape(COLOUR.shape), COLOUR),
    "array, uint16": (COLOUR.astype(np.uint16) * 257, COLOUR),
    "array, uint16 of another machine": (COLOUR.astype(">u2") * 257, COLOUR),
    "array, float16": ((COLOUR / 255).astype(np.float16), COLOUR),
    "array, float32": ((COLOUR / 255).astype(np.float32), COLOUR),
    "array, float64 RGBA": (OPAQUE / 255, COLOUR),
    "tensor": (chw(COLOUR), COLOUR),
    "tensor, RGBA": (chw(OPAQUE), COLOUR),
    "tensor, float": (chw(COLOUR) / 255, COLOUR),
    "tensor, float16": ((chw(COLOUR) / 255).half(), COLOUR),
    "tensor with gradients": ((chw(COLOUR) / 255).requires_grad_(), COLOUR),
    "tv_tensor": (tv_tensors.Image(chw(COLOUR)), COLOUR),
    "L": (PICTURE.getchannel(0), GREY),
    "LA": (PICTURE.getchannel(0).convert("LA"), GREY),
    "P of grey": (PICTURE.getchannel(0).convert("P"), GREY),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
    "I": (Image.fromarray(GREY.astype(np.int32) * 257), GREY),
    "grey array": (GREY, GREY),
    "grey array, (H, W, 1)": (GREY[..., None], GREY),
    "grey array, uint16": (GREY.astype(np.uint16) * 257, GREY),
    "grey array, float": (GREY / 255, GREY),
    "grey tensor": (torch.from_numpy(GREY), GREY),
    "grey tensor, (1, H, W)": (torch.from_numpy(GREY)[None] / 255, GREY),
    "1": (Image.fromarray(GREY > 99), (GREY > 99) * np.uint8(255)),
    "array, bool": (GREY > 99, (GREY > 99) * np.uint8(255)),
    "tensor, bool": (torch.from_numpy(GREY > 99), (GREY > 99) * np.uint8(255)),
    "P": (PICTURE.quantize(32), np.asarray(PICTURE.quantize(32).convert("RGB"))),
    "CMYK": (PICTURE.convert("CMYK"), np.asarray(PICTURE.convert("CMYK").convert("RGB"))),
}


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def test_every_form_gives_the_same_detections(predictor: Predictor) -> None:
    """All together in one call, and each alone, against the RGB array of its pixels."""
    sources, pixels = zip(*FORMS.values(), strict=True)
    expected = predictor.predict([as_rgb(p) for p in pixels], threshold=0.0)
    together = predictor.predict(iter(sources), threshold=0.0, batch_size=4)
    assert len(together) == len(FORMS) and len(expected[0]) == 12
    for name, source, right, found in zip(FORMS, sources, expected, together, strict=True):
        (alone,) = predictor(source, threshold=0.0)
        assert found == alone == right, name
        assert found.size == (12, 16) and found.file_name is None
        assert found.image is not None and (np.asarray(found.image) == np.asarray(right.image)).all(), name


def test_an_exported_model_is_shown_in_a_few_lines(predictor: Predictor) -> None:
    assert repr(predictor).splitlines() == [
        "rows, exported: rows.onnx",
        "  classes     2: cat, dog",
        "  images      stretched to 16x12",
        "  runs with   numpy, weights f32",
        "  evaluation  no threshold known",
    ]
    assert "<b>rows, exported: rows.onnx</b>" in predictor._repr_html_() and predictor.names == {3: "cat", 7: "dog"}


def test_a_detector_takes_the_same_forms() -> None:
    from paqdetr.models import create_model

    model: Detector = create_model("dino_nano", num_classes=2, image_size=32, num_queries=10)
    sources = [FORMS[name] for name in ("array", "tensor, float", "EXIF turn", "array, uint16", "grey tensor", "L")]
    expected = model.predict([as_rgb(pixels) for _, pixels in sources], threshold=0.0)
    assert model([source for source, _ in sources], threshold=0.0) == expected
    assert model(torch.stack([chw(COLOUR) / 255] * 2).float()).pred_logits.shape == (2, 10, 2)  # a module still
    assert model.predict(np.stack([COLOUR, COLOUR]), threshold=0.0) == [expected[0]] * 2
    assert model.names == {0: "class 0", 1: "class 1"}
    with pytest.raises(ValueError, match=r"batch \(B, 3, H, W\), found \(3, 12, 16\); model\.predict"):
        model(chw(COLOUR).float())


def test_paths_folders_and_patterns(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.png", "deep/c.png"):
        PICTURE.save(tmp_path / name)
    (expected,) = predictor.predict(COLOUR, threshold=0.0)
    for source, names in (
        (tmp_path / "a.png", ["a.png"]),
        (str(tmp_path / "a.png"), ["a.png"]),
        (tmp_path, ["a.png", "b.png"]),
        (f"{tmp_path}/*.png", ["a.png", "b.png"]),
        (tmp_path / "**" / "*.png", ["a.png", "b.png", "deep/c.png"]),
        (np.array([f"{tmp_path}/a.png", f"{tmp_path}/b.png"]), ["a.png", "b.png"]),
        (pd.Series([f"{tmp_path}/a.png"]), ["a.png"]),
        (pd.Series([tmp_path / "a.png"]), ["a.png"]),
        ([COLOUR, f"{tmp_path}/a*", tmp_path / "deep"], [None, "a.png", "c.png"]),
    ):
        found = predictor.predict(source, threshold=0.0)
        assert [one.file_name for one in found] == [one.image_id for one in found] == names
        for one in found:
            assert np.array_equal(one.boxes, expected.boxes) and np.array_equal(one.scores, expected.scores)
    assert found[1].source == tmp_path / "a.png"
    (tmp_path / "[1].png").write_bytes(png(PICTURE))  # a name that is a pattern as well
    assert predictor.predict(tmp_path / "[1].png")[0].file_name == "[1].png"


@pytest.mark.parametrize("given", ["ä b.png", "%C3%A4%20b.png"])  # as a browser shows it, and as it sends it
def test_an_address(predictor: Predictor, tmp_path: Path, given: str) -> None:
    PICTURE.save(tmp_path / "ä b.png")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(tmp_path))

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (found,) = predictor(f"http://127.0.0.1:{server.server_port}/{given}?size=2 ä", threshold=0.0)
        server.shutdown()
    assert found.file_name == "ä b.png" and found.size == (12, 16)
    assert (np.asarray(found.image) == COLOUR).all()


@pytest.mark.parametrize(
    ("source", "message", "remedy"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"shape \(3, 8, 9\) and uint8: expected \(H, W\)", r"\.transpose\(1, 2, 0\)"),
        (np.zeros((8, 9, 2)), r"shape \(8, 9, 2\) and float64", "grey"),
        (np.zeros((8, 9, 5), np.uint8), r"shape \(8, 9, 5\)", "grey"),
        (np.zeros((0, 9, 3), np.uint8), r"shape \(0, 9, 3\)", "grey"),
        (np.zeros(9), r"shape \(9,\) and float64", "grey"),
        (COLOUR.astype(np.float32), r"\(12, 16, 3\) and float32 has values from 0 to 255: .* 0 to 1", "Divide by 255"),
        (COLOUR / 127.5 - 1, "values from -1 to 1: expected floats from 0 to 1", "before it was normalised"),
        (np.full((4, 4), np.nan), "values from nan to nan", "not finite"),
        (COLOUR.astype(np.int64), r"\(12, 16, 3\) and int64: expected uint8, uint16, bool, or floats", "astype"),
        (COLOUR.astype(np.complex64), "complex64: expected uint8", "astype"),
        (np.array([["a"]]), "<U1: expected uint8", "astype"),
        (torch.zeros(8, 9, 3), r"a tensor of shape \(8, 9, 3\) and torch\.float32: expected \(C, H, W\)", r"\.permute"),
        (torch.zeros(2, 8, 9), r"a tensor of shape \(2, 8, 9\)", "RGB"),
        (torch.zeros(3, 8, 9).long(), r"\(8, 9, 3\) and int64", "astype"),
        (None, "found NoneType", "grey"),
        (7, "found int", "grey"),
        ([COLOUR], "found list", "grey"),
        ({"image": COLOUR}, "found dict", "grey"),
        (io.StringIO("x"), r"found _io\.StringIO", "rb"),
        (b"no image", "the given bytes: not an image", "Send"),
        (b"", "the given bytes: not an image", "Send"),
    ],
)
def test_what_is_no_picture_is_named_with_its_place(
    predictor: Predictor, source: Any, message: str, remedy: str
) -> None:
    with pytest.raises(DataError, match=f"image 1: .*{message}") as caught:
        predictor.predict([COLOUR, source])
    assert len(caught.value.message) < 200
    with pytest.raises(DataError, match=remedy):
        predictor.predict((source,))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the path of a picture is empty"),
        ("absent.jpg", r"absent\.jpg: no such file"),
        ("absent*.jpg", r"absent\*\.jpg: no pictures or videos match"),
        ("camera:0", r"camera:0: a video, expected pictures .*model\.stream"),
        ("rtsp://localhost/x", "a video, expected pictures"),
    ],
)
def test_paths_without_a_picture(predictor: Predictor, source: str, message: str) -> None:
    for given_ in (source, [COLOUR, source]):
        with pytest.raises(DataError, match=message):
            predictor.predict(given_)


@given(
    arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 255)),
    st.sampled_from([1, 3, 4, None]),
    st.sampled_from([np.uint8, np.uint16, np.float16, np.float32, np.float64]),
    st.booleans(),
)
def test_any_array_and_tensor(grey: np.ndarray, channels: int | None, dtype: Any, as_tensor: bool) -> None:
    """Values are scaled to uint8 and back without a change; what is transparent lies on white."""
    pixels = grey if channels is None else np.stack([np.roll(grey, i) for i in range(channels)], axis=-1)
    expected = np.broadcast_to(grey[..., None], (*grey.shape, 3)) if channels in (None, 1) else pixels[..., :3]
    if channels == 4:
        alpha = pixels[..., 3:].astype(float)
        expected = (expected * alpha + 255 * (255 - alpha)) / 255
    scaled = pixels.astype(np.uint16) * 257 if dtype == np.uint16 else pixels
    given_: Any = (pixels / 255).astype(dtype) if dtype in (np.float16, np.float32, np.float64) else scaled
    if as_tensor:
        given_ = torch.from_numpy(given_) if channels is None else torch.from_numpy(given_).permute(2, 0, 1)
    found = np.asarray(read_image(given_)).astype(float)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= (1 if channels == 4 else 0)


def test_few_pictures_wait_for_others_of_their_size() -> None:
    """Of 300 pictures in 50 sizes, and each in its place in the end."""
    alive: set[int] = set()
    most = 0

    def prepare(picture: Image.Image) -> np.ndarray:
        nonlocal most
        pixels = np.zeros((picture.height, picture.width)).view(Pixels)
        alive.add(id(pixels))
        weakref.finalize(pixels, alive.discard, id(pixels))
        most = max(most, len(alive))
        return pixels

    def detect(pixels: list[np.ndarray], sizes: list[tuple[int, int]], names: list[str]) -> list[Detections]:
        assert len({one.shape for one in pixels}) == 1 and len(pixels) <= 4
        return [Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0), size=size) for size in sizes]

    widths = [1 + 7 * i % 50 for i in range(300)]
    found = predict_in_batches((Image.new("RGB", (w, 3)) for w in widths), prepare, detect, batch_size=4)
    assert [one.size for one in found] == [(3, width) for width in widths]
    assert 20 < most < 45  # 32 that wait, the batch before them, and the next


def test_tiles_give_the_same_names_and_pictures(predictor: Predictor, tmp_path: Path) -> None:
    Image.fromarray(np.tile(COLOUR, (3, 2, 1))).save(tmp_path / "large.png")
    path, array = predictor.predict([tmp_path / "large.png", np.tile(COLOUR, (3, 2, 1))], tiles=16, threshold=0.1)
    assert (path.file_name, path.size, path.source) == ("large.png", (36, 32), tmp_path / "large.png")
    assert array.file_name is None and np.array_equal(path.boxes, array.boxes) and len(path) > 12


@pytest.fixture
def gone(predictor: Predictor, tmp_path: Path) -> Iterator[Callable[[], Detections]]:
    PICTURE.save(tmp_path / "a.png")
    (found,) = predictor.predict(tmp_path / "a.png", threshold=0.0)
    yield lambda: ((tmp_path / "a.png").unlink(missing_ok=True), found)[1]


def test_the_picture_is_read_when_it_is_asked_for(gone: Callable[[], Detections], predictor: Predictor) -> None:
    (kept,) = predictor.predict(COLOUR, threshold=0.0)
    assert "<img" in kept._repr_html_() and kept.draw().size == (16, 12)
    found = gone()
    with pytest.raises(DataError, match=r"a\.png: no such file"):
        found.draw()
    assert "<img" not in found._repr_html_() and "cat" in found._repr_html_()
    assert found.draw(COLOUR).size == (16, 12)
    found.source = None
    assert found.image is None
    with pytest.raises(DataError, match=r"the picture is not known .*draw"):
        found.draw()
