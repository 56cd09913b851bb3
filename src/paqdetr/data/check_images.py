"""Decodes every image of a data set once, in several threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from paqdetr.data.fingerprints import Fingerprint, fingerprint
from paqdetr.data.read_ahead import read_ahead
from paqdetr.errors import DataError
from paqdetr.images import read_header, read_image


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What decoding an image showed.

    Attributes:
        error: why it does not decode, None if it does; nothing else is known of it then.
        size: (width, height), its EXIF turn applied.
        traits: see `ImageHeader`.
        digest: of the file's bytes.
        print: what it looks like.
    """

    error: str | None = None
    size: tuple[int, int] = (0, 0)
    traits: frozenset[str] = frozenset()
    digest: bytes = b""
    print: Fingerprint | None = None


def inspect(path: Path) -> ImageFacts:
    """Decode one image."""
    try:
        picture = read_image(path)
        traits = read_header(path).traits
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except DataError as error:
        return ImageFacts(error=f"{error.message.removeprefix(f'{path}: ')}. {error.remedy}")
    except OSError as error:  # gone or locked since it was listed
        return ImageFacts(error=f"cannot be read: {error.strerror}")
    return ImageFacts(None, picture.size, traits, digest, fingerprint(picture))


def inspect_all(paths: Sequence[Path], *, workers: int | None = None) -> Iterator[ImageFacts]:
    """Facts of every image, in order.

    Args:
        workers: threads; None for one per core. Decoding does not hold Python's lock, and unlike processes they start at once
            and need no `if __name__ == "__main__":` in the script that calls.
    """
    threads = (os.cpu_count() or 1) if workers is None else workers
    return read_ahead(paths, inspect, threads=threads if threads > 1 else 0)
