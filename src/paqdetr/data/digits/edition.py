"""Makes the digits data set: a difficult, bundled detection problem that needs no download.

Scenes are composed (see `scenes.py`) from what scikit-learn ships: 1,797 real handwritten digits and two
photographs. An image depends only on the seed, its split, its number and the look of scenes (`SceneSpec`): a
smaller edition is the beginning of a larger one and exactly as hard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from paqdetr.data.digits.glyphs import SPLITS
from paqdetr.data.digits.scenes import SceneSpec, compose_scene
from paqdetr.errors import ConfigError, DataError
from paqdetr.files import MAX_SIDE_BYTES, read_json
from paqdetr.outputs import whole_folder
from paqdetr.values import MAX_SEED, MAX_WORKERS

EDITION_FILE = "digits.json"
# Raised whenever the same arguments would give other images than before.
_EDITION_FORMAT = 1
_JPEG_QUALITY = 90

CATEGORIES = [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)]

_LICENSES = [
    {
        "id": 1,
        "name": "Digits: CC BY 4.0, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository",
        "url": "https://archive.ics.uci.edu/dataset/80",
    },
    {
        "id": 2,
        "name": "Photographs: CC BY 2.0, see the README beside scikit-learn's sample images",
        "url": "https://creativecommons.org/licenses/by/2.0/",
    },
]


def make_digits(
    output: str | Path,
    *,
    seed: int = 0,
    size: int = 320,
    train: int = 1600,
    val: int = 300,
    test: int = 1000,
    min_objects: int = 3,
    max_objects: int = 12,
    min_scale: float = 0.06,
    max_scale: float = 0.45,
    max_rotation: float = 25.0,
    max_hidden: float = 0.6,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes `train.json`, `train/000000.jpg` ... and the same for `val` and `test` into `output`.

    The files are byte-identical for the same arguments on every run with the same versions of Pillow (JPEG
    codec, resampling), numpy (random streams) and scikit-learn (its bundled data); `workers` does not matter.
    Everything is written beside `output` first and moved there at the end, so an interrupted call leaves no
    half-made data set (`whole_folder`).

    Args:
        output: the folder to make. If it already holds exactly this edition, nothing is done.
        seed: non-negative; another seed gives other scenes from the same division of digits and photographs.
        size: side of the square images in pixels.
        train, val, test: number of images of each split, at least 1.
        min_objects, max_objects, min_scale, max_scale, max_rotation, max_hidden: see `SceneSpec`.
        workers: processes to compose with; a script that asks for more than one needs the usual
            `if __name__ == "__main__":` around the call.
        progress: called with (images done, images in all) after every image.

    Returns:
        `output` as a path.

    Raises:
        ConfigError: an argument is out of its range.
        DataError: `output` is a file, or a folder with other content.
        StorageError: it cannot be written.
    """
    output = Path(output)
    spec = SceneSpec(
        size=size,
        min_objects=min_objects,
        max_objects=max_objects,
        min_scale=min_scale,
        max_scale=max_scale,
        max_rotation=max_rotation,
        max_hidden=max_hidden,
    )
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    for name, value, least, most in (
        ("seed", seed, 0, MAX_SEED),
        ("workers", workers, 1, MAX_WORKERS),
        *((split, count, 1, 10**7) for split, count in counts.items()),
    ):
        if not least <= value <= most:
            raise ConfigError(
                f"digits: {name} is {value}, expected {least} to {most}", "Choose a value within the range."
            )
    edition = {"format": _EDITION_FORMAT, "seed": seed, **counts, **asdict(spec)}
    if _holds(output, edition):
        return output

    total, done = sum(counts.values()), 0
    with whole_folder(output) as partial_output, _mapper(min(workers, max(counts.values()))) as mapped:
        for split, count in counts.items():
            (partial_output / split).mkdir()
            annotations: list[dict[str, Any]] = []
            for index, objects in enumerate(
                mapped(partial(_write_image, spec, seed, split, partial_output), range(count))
            ):
                for found in objects:
                    annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **found})
                done += 1
                if progress is not None:
                    progress(done, total)
            _write_json(partial_output / f"{split}.json", _coco(split, seed, size, count, annotations))
        _write_json(partial_output / EDITION_FILE, edition)
    return output


def _write_image(spec: SceneSpec, seed: int, split: str, folder: Path, index: int) -> list[dict[str, Any]]:
    """Composes and saves one image; returns its annotations without their ids."""
    scene = compose_scene(spec, seed=seed, split=split, index=index)
    Image.fromarray(scene.image).save(folder / split / _file_name(index), quality=_JPEG_QUALITY)
    return [
        {
            "category_id": digit + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "visible": round(visible, 3),  # beyond COCO: the share of the digit's ink that is not hidden
        }
        for digit, (x0, y0, x1, y1), visible in zip(
            scene.digits.tolist(), scene.boxes.tolist(), scene.visible.tolist(), strict=True
        )
    ]


def _file_name(index: int) -> str:
    return f"{index:06d}.jpg"


def _coco(split: str, seed: int, size: int, count: int, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    images = [{"id": i + 1, "file_name": _file_name(i), "width": size, "height": size} for i in range(count)]
    return {
        "info": {"description": f"paqdetr digits, {split}, seed {seed}", "version": str(_EDITION_FORMAT)},
        "licenses": _LICENSES,
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8", newline="\n")


def _holds(output: Path, edition: dict[str, Any]) -> bool:
    """True if `output` is this edition, False if it is free to be made.

    Raises:
        DataError: it is neither.
    """
    if not output.exists():
        return False
    if not output.is_dir():
        raise DataError(f"{output}: is a file, expected a folder to make the digits in", "Choose another output.")
    if not any(output.iterdir()):
        return False
    remedy = "Choose another output, or remove the folder first."
    try:
        found = read_json(output / EDITION_FILE, limit=MAX_SIDE_BYTES)
    except DataError:
        raise DataError(f"{output}: the folder is not empty and holds no digits data", remedy) from None
    if found == edition:
        return True
    keys = edition.keys() | found.keys() if isinstance(found, dict) else ()
    different = ", ".join(
        f"{k}={found.get(k)} (asked for {edition.get(k)})" for k in sorted(keys) if found.get(k) != edition.get(k)
    )
    raise DataError(f"{output}: holds another edition of the digits: {different}", remedy)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, in this process or in several; results come in order either way."""
    if workers == 1:
        yield map
        return
    # spawn: forking a process in which torch has started threads can hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield partial(pool.map, chunksize=8)
    except BrokenProcessPool:
        raise ConfigError(
            f"digits: one of {workers} processes that compose images has ended, killed or at its start",
            "A script that calls make_digits with workers needs `if __name__ == '__main__':` around it; or leave workers out.",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what is still queued is not worth composing
