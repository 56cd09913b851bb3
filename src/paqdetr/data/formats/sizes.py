"""Sizes of images in formats whose annotations do not give them: read from the files' headers, several at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paqdetr.data.annotations import Issues
from paqdetr.errors import DataError
from paqdetr.images import read_header


def header_sizes(paths: Sequence[Path], issues: Issues) -> list[tuple[int, int] | None]:
    """(height, width) of every image with its EXIF turn applied; None where it cannot be read and issues are collected.

    Raises:
        DataError: an image is missing or its header is damaged, unless issues are collected.
    """
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 4)) as pool:
        found = list(pool.map(_size, paths))
    sizes: list[tuple[int, int] | None] = []
    for path, size in zip(paths, found, strict=True):
        if isinstance(size, DataError):
            if not issues.collect:
                raise size
            # Images are opened again, one by one, when they are checked: not an unreadable file twice.
            issues.error(path, size.message.removeprefix(f"{path}: "), size.remedy, kind="unreadable image")
            sizes.append(None)
        else:
            sizes.append(size)
    return sizes


def _size(path: Path) -> tuple[int, int] | DataError:
    try:
        width, height = read_header(path).size
    except DataError as error:
        return error
    return height, width
