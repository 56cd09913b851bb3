"""Decodes every image of a data set once, in several threads or processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from paqdetr.data.fingerprints import Fingerprint, fingerprint
from paqdetr.errors import DataError
from paqdetr.images import read_header, read_image

# Below this number of images, starting processes takes longer than decoding.
_WORTH_PROCESSES = 400


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
        workers: processes, which decode faster than threads if there are many cores and images; a script that uses them needs
            `if __name__ == "__main__":`. None: threads, of this process.

    Raises:
        DataError: a process ended.
    """
    if workers in (None, 1) or len(paths) < _WORTH_PROCESSES:
        pool: Executor = ThreadPoolExecutor(workers or os.cpu_count())
    else:
        # spawn: forking a process in which torch has started threads can hang.
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield from pool.map(inspect, paths, chunksize=16)
    except BrokenProcessPool:
        raise DataError(
            "a process that decodes images ended: memory ran out, or the script that started it has no main guard",
            "Pass --workers 1, lower PAQDETR_MAX_PIXELS to refuse large images, or put the script's code under "
            "`if __name__ == '__main__':`.",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
