"""Pictures as data URIs, small enough together that the page keeps its limit."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

from PIL import Image, features

# (long side in pixels, quality): tried in this order until all pictures fit.
_STEPS = ((640, 80), (560, 72), (480, 66), (400, 58), (320, 50))


def encode_pictures(
    images: Sequence[Image.Image],
    *,
    budget: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str | None]:
    """Data URIs of all pictures, WebP where Pillow can write it, else JPEG.

    All are made smaller alike until they fit. Those that do not fit at the smallest size either, the last ones, are left out.

    Args:
        images: RGB.
        budget: characters of all together.
        progress: told (pictures done, pictures in all) of the first attempt.

    Returns:
        as many; None for one that is left out.
    """
    found: list[str] = []
    for number, (side, quality) in enumerate(_STEPS):
        found = []
        for done, image in enumerate(images, start=1):
            found.append(_encode(image, side, quality))
            if progress is not None and number == 0:
                progress(done, len(images))
        if sum(map(len, found)) <= budget:
            return list(found)
    kept: list[str | None] = []
    for text in found:
        budget -= len(text)
        kept.append(text if budget >= 0 else None)
    return kept


def _encode(image: Image.Image, side: int, quality: int) -> str:
    picture = image.convert("RGB")
    if max(picture.size) > side:
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    kind = "webp" if features.check("webp") else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
