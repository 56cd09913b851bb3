"""Writes a data set in another format, and reads it again to see that nothing was lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal, get_args

import numpy as np

from paqdetr.data.annotations import Annotations, Issues
from paqdetr.data.formats.coco import write_coco
from paqdetr.data.formats.voc import write_voc
from paqdetr.data.formats.yolo import write_yolo
from paqdetr.data.layout import Format, find_layout
from paqdetr.errors import ConfigError, DataError

Target = Literal["coco", "voc", "yolo"]
_WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}

# YOLO's shares of the image come back within this many pixels.
_PIXELS = 1e-6


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was converted: from which format, images and boxes (crowds too) by split, and segmentations that were left out."""

    format: Format
    images: dict[str, int]
    boxes: dict[str, int]
    masks: int


def convert_dataset(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    link: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes all splits of a data set as COCO, Pascal VOC or YOLO, images included.

    Image ids, category ids and their order, boxes, crowds and areas are kept; what a format has no place for
    lies in `paqdetr.json` beside it. Masks are left out, annotation ids are numbered anew. The new folder is
    made beside its place, read again, compared with the source, and moved: it is there as a whole or not at all.

    Args:
        source: a folder in one of the layouts of `find_layout`, or a `data.yaml`.
        target: a folder that does not exist or is empty.
        to: "coco", "voc" or "yolo".
        link: hard links to the images instead of copies; both must lie on one file system.
        progress: told (images done, images in all).

    Raises:
        ConfigError: `to` is something else.
        DataError: the source is malformed, the target is in use, or the format cannot hold a name or a box.
    """
    source, target = Path(source), Path(target)
    if to not in get_args(Target):
        raise ConfigError(f"--to: found {to!r}, expected coco, voc or yolo", "Choose one of the three.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: is there already, and nothing is overwritten", "Choose another folder.")
    layout = find_layout(source)
    splits = {split: place.read(Issues()) for split, place in layout.splits.items()}
    _require_one_class_table(splits)
    total, done = sum(map(len, splits.values())), 0

    def place_image(image: Path, goal: Path) -> None:
        nonlocal done
        goal.parent.mkdir(parents=True, exist_ok=True)
        _place(image, goal, link=link)
        done += 1
        if progress is not None:
            progress(done, total)

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _WRITERS[to](partial, splits, place_image)
        _require_equal(splits, partial, to)
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes a private folder
        partial.replace(target)
    except OSError as error:  # a full disk, for one, does not name the file
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(
            f"{target}: cannot be written: {error.strerror}", "Check the disk and the folder's permissions."
        ) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Conversion(
        format=layout.format,
        images={split: len(a) for split, a in splits.items()},
        boxes={split: len(a.boxes) for split, a in splits.items()},
        masks=sum(a.masks for a in splits.values()),
    )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _place(image: Path, goal: Path, *, link: bool) -> None:
    try:
        if link:
            os.link(image, goal)
        else:
            shutil.copyfile(image, goal)
    except OSError as error:
        hint = (
            "Leave --link out: the two folders are on different file systems." if link else "Check the disk."
        )
        raise DataError(f"{image}: cannot be brought to {goal}: {error.strerror}", hint) from None


def _require_one_class_table(splits: dict[str, Annotations]) -> None:
    """VOC and YOLO have one list of classes for all splits."""
    first, *others = splits.values()
    for content in others:
        if content.classes != first.classes:
            raise DataError(
                f"{content.source}: has other categories than {first.source}",
                "Give all splits the same `categories`, those without boxes too.",
            )
    names = first.classes.names
    if len(set(names)) < len(names):
        raise DataError(f"{first.source}: two categories have the same name", "Give each its own name.")


def _require_equal(splits: dict[str, Annotations], folder: Path, to: str) -> None:
    """Reads what was written.

    Raises:
        DataError: it is not what was read.
    """
    written = find_layout(folder)
    for split, expected in splits.items():
        if split not in written.splits:
            raise DataError(
                f"{expected.source}: the split {split!r} has no place in {to}", "Rename or remove the split."
            )
        try:
            found = written.splits[split].read(Issues())
        except DataError as error:
            message = error.message.replace(f"{folder}/", "")
            raise DataError(
                f"{expected.source}: {to} cannot hold this data: {message}", error.remedy
            ) from None
        difference = _difference(expected, found)
        if difference is not None:
            raise DataError(
                f"{expected.source}: {to} cannot hold this data: {difference}",
                "Correct it first; `paqdetr data check` lists all problems of a data set.",
            )


def _difference(one: Annotations, other: Annotations) -> str | None:
    """What differs between two readings of the same data, None if nothing does."""
    if one.classes != other.classes:
        return f"the classes {one.classes.names} came back as {other.classes.names}"
    if list(one.image_ids) != list(other.image_ids) or list(one.file_names) != list(other.file_names):
        return "the names of images came back as others"
    changed = np.flatnonzero((one.sizes != other.sizes).any(axis=1))
    if len(changed):
        index = changed[0]
        width, height = one.sizes[index][::-1]
        return f"{one.file_names[index]} is not {width}x{height} pixels, as the annotations say"
    for index in range(len(one)):
        if not _same_boxes(_rows(one, index), _rows(other, index)):
            return f"the boxes of {one.file_names[index]} came back as others"
    return None


def _rows(content: Annotations, index: int) -> np.ndarray:
    """(n, 7) label, crowd, area, box of an image; crowds, which may have changed places, come last."""
    rows = slice(content.starts[index], content.starts[index + 1])
    boxes, areas = content.boxes[rows], content.areas[rows]
    areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    table = np.column_stack([content.labels[rows], content.crowd[rows], areas, boxes])
    return table[np.argsort(content.crowd[rows], kind="stable")]


def _same_boxes(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other, rtol=_PIXELS, atol=_PIXELS)
