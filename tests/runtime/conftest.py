from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # where patches.py is

from patches import Patches, scene


@pytest.fixture
def patches() -> Patches:
    return Patches()


@pytest.fixture
def clip(tmp_path: Path) -> Callable[..., Path]:
    """`clip(times, rotation=90)` is an mp4 of 96x64 whose frame at second t has a red patch at its top left, before it is rotated
    by so many degrees against the clock, and a green one whose place depends on t."""
    av = pytest.importorskip("av")

    def make(times: Sequence[float], *, rotation: int = 0, mirrored: bool = False, name: str = "clip.mp4") -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30, options={"crf": "12", "preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 10_000)
            stream.set_display_rotation(rotation, hflip=mirrored)
            for number, seconds in enumerate(times):
                image = scene((96, 64), (4, 4, 20, 20))
                left = 30 + number % 40
                image.paste("#00ff00", (left, 40, left + 16, 56))
                frame = av.VideoFrame.from_image(image)
                frame.pts, frame.time_base = round(seconds * 10_000), Fraction(1, 10_000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make
