"""Writes a data set in another format, and reports what that format cannot hold."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import numpy as np

from paqdetr.data.annotations import Annotations, Issues
from paqdetr.data.files import header_sizes
from paqdetr.data.formats.coco import write_coco
from paqdetr.data.formats.voc import write_voc
from paqdetr.data.formats.yolo import SPLITS as YOLO_SPLITS
from paqdetr.data.formats.yolo import write_yolo
from paqdetr.data.layout import Format, find_layout
from paqdetr.errors import ConfigError, DataError
from paqdetr.images import IMAGE_EXTENSIONS
from paqdetr.outputs import require_free, whole_folder
from paqdetr.text import shorten

Target = Literal["coco", "voc", "yolo"]
_WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    Attributes:
        format: of the source.
        images, boxes: how many were written, by split; crowds count as boxes.
        losses: what was left out or changed -> how often.
    """

    format: Format
    images: dict[str, int]
    boxes: dict[str, int]
    losses: dict[str, int]

    @classmethod
    def of(cls, source: Format, written: Mapping[str, Annotations], losses: dict[str, int]) -> Conversion:
        """From the splits as they were written."""
        images = {split: len(a) for split, a in written.items()}
        return cls(source, images, {split: len(a.boxes) for split, a in written.items()}, losses)


def convert_dataset(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    link: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes all splits of a data set as COCO, Pascal VOC or YOLO, images included.

    Boxes and class names are kept by all three. Duplicate boxes, segmentations and keypoints are left out. What else a format
    has no place for is in `Conversion.losses`: see docs/data.md. The new folder appears as a whole or not at all.

    Args:
        source: a folder in one of the layouts of `find_layout`, or a `data.yaml`.
        target: a folder that does not exist or is empty.
        to: "coco", "voc" or "yolo".
        link: hard links to the images instead of copies; both must lie on one file system.
        progress: called with (images done, images in all).

    Raises:
        ConfigError: `to` is something else, or the target is in use.
        DataError: the source is malformed, or the format has no place for a split or a name.
        StorageError: the target cannot be written.
    """
    if to not in get_args(Target):
        raise ConfigError(f"--to: found {to!r}, expected coco, voc or yolo", "Choose one of the three.")
    layout = find_layout(source)
    splits = {split: place.read(Issues()) for split, place in layout.splits.items()}
    written, losses = write_splits(splits, Path(target), to=to, link=link, progress=progress)
    return Conversion.of(layout.format, written, losses)


def write_splits(
    splits: Mapping[str, Annotations],
    target: Path,
    *,
    to: str,
    link: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Annotations], dict[str, int]]:
    """Writes splits that have been read; see `convert_dataset`.

    Returns:
        the splits as they were written, and the losses.
    """
    require_free(target, remedy="choose another folder")
    if to != "coco":
        _require_one_class_table(splits)
        _require_known_endings(splits)
    if to == "yolo":
        _require_yolo_splits(splits)
    for content in splits.values():
        _require_single_names(content)
        _require_true_sizes(content)
    losses: Counter[str] = Counter()
    prepared = {split: _prepared(content, to, losses) for split, content in splits.items()}
    losses.update(_lost_classes(prepared, to))
    total, done = sum(map(len, prepared.values())), 0

    def place_image(image: Path, goal: Path) -> None:
        nonlocal done
        goal.parent.mkdir(parents=True, exist_ok=True)
        _place(image, goal, link=link)
        done += 1
        if progress is not None:
            progress(done, total)

    with whole_folder(target) as partial:
        _WRITERS[to](partial, prepared, place_image)
    return prepared, {what: count for what, count in losses.items() if count}


def _place(image: Path, goal: Path, *, link: bool) -> None:
    try:
        if link:
            os.link(image.resolve(), goal)
        else:
            shutil.copyfile(image, goal)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the whole folder
            raise
        apart = link and error.errno == errno.EXDEV
        reason = "the two folders are on different file systems" if apart else error.strerror
        hint = "Leave --link out." if link else "Check the disk."
        raise DataError(f"{image}: cannot be {'linked' if link else 'copied'}: {reason}", hint) from None


def _require_one_class_table(splits: Mapping[str, Annotations]) -> None:
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


def _require_yolo_splits(splits: Mapping[str, Annotations]) -> None:
    for split, content in splits.items():
        if split not in YOLO_SPLITS:
            raise DataError(
                f"{content.source}: YOLO has no place for the split {split!r}, only for {', '.join(YOLO_SPLITS)}",
                "Rename or remove the split, or convert to coco or voc.",
            )


def _require_known_endings(splits: Mapping[str, Annotations]) -> None:
    """VOC and YOLO find pictures by their endings."""
    for content in splits.values():
        for name in content.file_names:
            if PurePosixPath(name).suffix.lower() not in IMAGE_EXTENSIONS:
                endings = ", ".join(sorted(IMAGE_EXTENSIONS))
                raise DataError(
                    f"{content.image_dir / name}: VOC and YOLO are read with images that end in {endings}",
                    "Save it as one of these, or convert to coco.",
                )


def _require_single_names(content: Annotations) -> None:
    name, count = Counter(content.file_names).most_common(1)[0] if len(content) else ("", 1)
    if count > 1:
        raise DataError(
            f"{content.source}: {count} images have the file_name {shorten(name)}",
            "Make one of them, with the boxes of all.",
        )


def _require_true_sizes(content: Annotations) -> None:
    """Shares of a wrong size would be wrong boxes."""
    found = header_sizes([content.image_dir / name for name in content.file_names], Issues())
    for name, stated, size in zip(content.file_names, content.sizes.tolist(), found, strict=True):
        if size is not None and list(size) != stated:
            raise DataError(
                f"{content.image_dir / name}: is {size[1]}x{size[0]} pixels, the annotations say {stated[1]}x{stated[0]}",
                "Correct it first; `paqdetr data check` lists all problems of a data set.",
            )


def _prepared(content: Annotations, to: str, losses: Counter[str]) -> Annotations:
    """The annotations without what the format has no place for, which is counted."""
    duplicates = content.duplicates()
    losses["segmentations left out"] += content.masks
    losses["keypoints left out"] += content.poses
    losses["duplicate boxes left out"] += int(duplicates.sum())
    content = content.with_boxes(~duplicates)
    if to == "coco":
        texts = sum(isinstance(own, str) for own in content.image_ids)
        losses["images numbered anew, their old ids under `original_id`"] += len(content) if texts else 0
        return content
    sides, areas = content.boxes[:, 2:], content.areas
    own_area = ~np.isnan(areas) & ~np.isclose(areas, sides.prod(axis=1))
    losses["areas left out"] += int(own_area.sum())
    losses["image ids replaced by the file name"] += sum(
        own != name for own, name in zip(content.image_ids, content.file_names, strict=True)
    )
    if to == "voc":
        keep = np.all(sides > 0, axis=1)
        losses["boxes without area left out"] += int((~keep).sum())
        return content.with_boxes(keep)
    keep, corners = content.trainable()
    losses["crowds left out"] += int(content.crowd.sum())
    losses["boxes without area inside their image left out"] += int((~keep & ~content.crowd).sum())
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    clipped = (np.abs(boxes - content.boxes) > 1e-6).any(axis=1)
    losses["boxes clipped to their image"] += int((clipped & keep).sum())
    return replace(content, boxes=boxes).with_boxes(keep)


def _lost_classes(splits: Mapping[str, Annotations], to: str) -> dict[str, int]:
    """What VOC, which has no list of classes, and YOLO, which numbers them from 0, do not keep of them."""
    if to == "coco":
        return {}
    classes = next(iter(splits.values())).classes
    kept, first = list(classes.names), 0
    if to == "voc":
        used = {label for content in splits.values() for label in content.labels.tolist()}
        kept, first = sorted(classes.names[label] for label in used), 1
    ids = {name: first + number for number, name in enumerate(kept)}
    changed = [ids[name] != own for own, name in zip(classes.ids, classes.names, strict=True) if name in ids]
    return {"classes without boxes left out": len(classes) - len(kept), "category ids changed": sum(changed)}
