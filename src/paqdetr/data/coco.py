"""Data sets in COCO's json: one file of annotations and one folder of images for every split."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from paqdetr.data.layout import available_splits, find_split
from paqdetr.errors import DataError
from paqdetr.images import read_image
from paqdetr.structures import ClassTable

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CocoDataset", "available_splits", "is_box", "load_json", "missing_files", "open_split"]

_REMEDY = "Correct the annotation file; `paqdetr data check` lists all problems of a data set."


class CocoDataset:
    """Images and boxes of one split, by position; annotations lie in flat arrays.

    Attributes:
        name: of the split.
        classes: contiguous class index <-> category id and name.
        annotation_file, image_dir: where it was read from.
        image_ids: the data set's own ids.
        file_names: relative to `image_dir`.
        sizes: (N, 2) int64, (height, width) of every image as the annotation file says.
        skipped: number of annotations left out: crowds, and boxes without area inside their image.
    """

    def __init__(
        self,
        *,
        name: str,
        classes: ClassTable,
        annotation_file: Path,
        image_dir: Path,
        image_ids: list[int | str],
        file_names: list[str],
        sizes: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        starts: np.ndarray,
        skipped: int,
    ) -> None:
        """Takes what `from_json` read; boxes and labels of image i are the rows starts[i]:starts[i + 1]."""
        self.name, self.classes = name, classes
        self.annotation_file, self.image_dir = annotation_file, image_dir
        self.image_ids, self.file_names, self.sizes, self.skipped = image_ids, file_names, sizes, skipped
        self._boxes, self._labels, self._starts = np.asarray(boxes, dtype=np.float32), labels, starts

    @classmethod
    def from_json(
        cls, annotation_file: str | Path, image_dir: str | Path, *, name: str | None = None
    ) -> CocoDataset:
        """Reads and verifies an annotation file; images themselves are not opened, only looked for.

        Args:
            annotation_file: COCO json with `images`, `annotations` and `categories`.
            image_dir: the folder that `file_name` is relative to.
            name: of the split; the file's name without its ending if not given.

        Raises:
            DataError: the file or an entry of it is malformed or contradicts another, or an image is missing.
        """
        annotation_file, image_dir = Path(annotation_file), Path(image_dir)
        content = load_json(annotation_file)
        classes = _classes(annotation_file, content)
        image_ids, file_names, sizes = _images(annotation_file, content)
        _require_files(image_dir, file_names, annotation_file)
        boxes, labels, owners, skipped = _annotations(annotation_file, content, classes, image_ids, sizes)
        order = np.argsort(owners, kind="stable")
        starts = np.zeros(len(image_ids) + 1, dtype=np.int64)
        np.cumsum(np.bincount(owners, minlength=len(image_ids)), out=starts[1:])
        return cls(
            name=name or annotation_file.stem,
            classes=classes,
            annotation_file=annotation_file,
            image_dir=image_dir,
            image_ids=image_ids,
            file_names=file_names,
            sizes=sizes,
            boxes=boxes[order],
            labels=labels[order],
            starts=starts,
            skipped=skipped,
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> Path:
        """Where the image lies."""
        return self.image_dir / self.file_names[index]

    def boxes(self, index: int) -> np.ndarray:
        """(G, 4) float32, xyxy in pixels, clipped to the image; without crowds and boxes of no area."""
        return self._boxes[self._rows(index)].copy()

    def labels(self, index: int) -> np.ndarray:
        """(G,) int64 contiguous class indices of `boxes(index)`."""
        return self._labels[self._rows(index)].copy()

    def image(self, index: int) -> Image.Image:
        """The picture as RGB with its EXIF orientation applied.

        Raises:
            DataError: it does not decode.
        """
        return read_image(self.path(index))

    def _rows(self, index: int) -> slice:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        return slice(int(self._starts[index]), int(self._starts[index + 1]))


def open_split(data: str | Path, split: str) -> CocoDataset:
    """Opens one split of a data folder.

    Three layouts are recognised: `train.json` beside `train/`; `annotations/instances_train*.json` beside
    `train*/` (as in COCO's own `train2017`); and `train/_annotations.coco.json` among the images (Roboflow,
    whose validation split is called `valid`).

    Args:
        data: the folder.
        split: "train", "val" or "test", or whatever else the folder has.

    Raises:
        DataError: no such folder or split, or the split is malformed (see `CocoDataset.from_json`).
    """
    place = find_split(data, split)
    return CocoDataset.from_json(place.annotation_file, place.image_dir, name=split)


def load_json(path: Path) -> dict[str, Any]:
    """The file's content, an object.

    Raises:
        DataError: it cannot be read, is no json (naming line and column), or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file", "Check the path.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: no valid json at line {error.lineno}, column {error.colno}: {error.msg}",
            "Export or download the file again.",
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8 text at byte {error.start}", "Save the file as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "Check the file.") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: holds a {type(content).__name__}, expected images, annotations and categories",
            "A list is the form of results; name the ground truth.",
        )
    return content


def _entries(
    path: Path, content: dict[str, Any], key: str, *, may_be_empty: bool = False
) -> list[dict[str, Any]]:
    if key not in content:
        raise DataError(f"{path}: has no `{key}`, found {', '.join(sorted(content)) or 'nothing'}", _REMEDY)
    entries = content[key]
    if not isinstance(entries, list):
        raise DataError(f"{path}: `{key}` is a {type(entries).__name__}, expected a list", _REMEDY)
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: {key}[{position}] is {entry!r}, expected an object", _REMEDY)
    if not entries and not may_be_empty:
        raise DataError(f"{path}: `{key}` is empty", _REMEDY)
    return entries


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_side(value: object) -> TypeGuard[float]:
    """Whether it is a number of pixels; some exporters write 640.0."""
    return (_is_integer(value) or isinstance(value, float)) and 1 <= value < 1e9 and value == int(value)


def _classes(path: Path, content: dict[str, Any]) -> ClassTable:
    categories = _entries(path, content, "categories")
    for position, category in enumerate(categories):
        if not _is_integer(category.get("id")) or "name" not in category:
            raise DataError(
                f"{path}: categories[{position}] is {category!r}, expected an integer `id` and a `name`",
                _REMEDY,
            )
    classes = ClassTable.from_categories(categories)
    twice = {i for i, following in zip(classes.ids, classes.ids[1:], strict=False) if i == following}
    if twice:
        raise DataError(f"{path}: category id {min(twice)} is given twice", _REMEDY)
    return classes


def _images(path: Path, content: dict[str, Any]) -> tuple[list[int | str], list[str], np.ndarray]:
    ids: list[int | str] = []
    file_names: list[str] = []
    sizes: list[tuple[int, int]] = []
    seen: set[int | str] = set()
    for position, image in enumerate(_entries(path, content, "images")):
        image_id, file_name = image.get("id"), image.get("file_name")
        height, width = image.get("height"), image.get("width")
        if not (_is_integer(image_id) or isinstance(image_id, str)):
            raise DataError(
                f"{path}: images[{position}] has id {image_id!r}, expected a number or a text", _REMEDY
            )
        if image_id in seen:
            raise DataError(f"{path}: image id {image_id!r} is given twice", _REMEDY)
        if not isinstance(file_name, str) or not file_name:
            raise DataError(
                f"{path}: image {image_id!r} has file_name {file_name!r}, expected a name", _REMEDY
            )
        if not (_is_side(height) and _is_side(width)):
            raise DataError(
                f"{path}: image {image_id!r} has height {height!r} and width {width!r}, expected pixels",
                _REMEDY,
            )
        seen.add(image_id)
        ids.append(image_id)
        file_names.append(file_name)
        sizes.append((int(height), int(width)))
    return ids, file_names, np.array(sizes, dtype=np.int64)


def _annotations(
    path: Path, content: dict[str, Any], classes: ClassTable, image_ids: list[int | str], sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Clipped boxes (A, 4) float32, labels (A,), positions of their images (A,); how many were left out."""
    position_of = {image_id: position for position, image_id in enumerate(image_ids)}
    label_of = classes.id_to_index
    boxes: list[list[float]] = []
    labels: list[int] = []
    owners: list[int] = []
    crowds = 0
    for position, annotation in enumerate(_entries(path, content, "annotations", may_be_empty=True)):
        subject = f"{path}: annotation {annotation.get('id', f'[{position}]')}"
        owner, label = annotation.get("image_id"), annotation.get("category_id")
        if not isinstance(owner, (int, str)) or owner not in position_of:
            raise DataError(f"{subject} belongs to image {owner!r}, which `images` does not list", _REMEDY)
        if not _is_integer(label) or label not in label_of:
            raise DataError(
                f"{subject} of image {owner!r} has category_id {label!r}, which `categories` does not list",
                _REMEDY,
            )
        box = annotation.get("bbox")
        if not is_box(box):
            raise DataError(
                f"{subject} of image {owner!r} has bbox {box!r}, expected four finite numbers [x, y, w, h]",
                _REMEDY,
            )
        if annotation.get("iscrowd"):
            crowds += 1
            continue
        boxes.append(box)
        labels.append(label_of[label])
        owners.append(position_of[owner])
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    where = np.array(owners, dtype=np.int64)
    corners[:, 2:] += corners[:, :2]
    limits = sizes[where][:, ::-1] if len(where) else np.zeros((0, 2))
    clipped = np.clip(corners, 0, np.concatenate([limits, limits], axis=1)).astype(np.float32)
    keep = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    skipped = crowds + int((~keep).sum())
    return clipped[keep], np.array(labels, dtype=np.int64)[keep], where[keep], skipped


def is_box(value: object) -> TypeGuard[list[float]]:
    """Whether a `bbox` is four finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == 4
        # The comparison also sorts out NaN, infinity and integers that no float can hold.
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and -1e9 < v < 1e9 for v in value)
    )


def missing_files(image_dir: Path, file_names: list[str]) -> list[str]:
    """Those files that `image_dir` does not have; lists every folder once instead of asking per file."""
    listed: dict[str, set[str]] = {}
    missing = []
    for file_name in file_names:
        folder, base = os.path.split(file_name)
        if folder not in listed:
            try:
                with os.scandir(image_dir / folder) as entries:
                    listed[folder] = {entry.name for entry in entries}
            except OSError:
                listed[folder] = set()
        if base not in listed[folder]:
            missing.append(file_name)
    return missing


def _require_files(image_dir: Path, file_names: list[str], annotation_file: Path) -> None:
    missing = missing_files(image_dir, file_names)
    if missing:
        raise DataError(
            f"{image_dir / missing[0]}: missing, though {annotation_file} lists it"
            f" ({len(missing)} of {len(file_names)} images are missing)",
            "Put the images there, or correct `file_name`.",
        )
