"""Recognises how a data folder is laid out: where the annotations and images of every split lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from paqdetr.errors import DataError

ROBOFLOW_FILE = "_annotations.coco.json"

_USUAL_ORDER = ("train", "val", "test")
_SYNONYMS = {"valid": "val", "validation": "val"}
_FORMS = (
    "DIR/train.json + DIR/train/, DIR/annotations/instances_train*.json + DIR/train*/, "
    f"or DIR/train/{ROBOFLOW_FILE}"
)


@dataclass(frozen=True, slots=True)
class SplitPlace:
    """Where one split lies; `image_dir` is what file names are relative to."""

    annotation_file: Path
    image_dir: Path


def available_splits(data: str | Path) -> list[str]:
    """Names of the splits in a data folder, in the order train, val, test, others.

    Raises:
        DataError: the folder is missing, empty, or of no known layout.
    """
    return list(split_places(data))


def find_split(data: str | Path, split: str) -> SplitPlace:
    """Where a split lies ("valid" and "validation" mean "val").

    Raises:
        DataError: as `available_splits`, or there is no such split.
    """
    places = split_places(data)
    wanted = _SYNONYMS.get(split, split)
    if wanted not in places:
        raise DataError(f"{data}: has no split {split!r}, found {', '.join(places)}", "Name one that exists.")
    return places[wanted]


def split_places(data: str | Path) -> dict[str, SplitPlace]:
    """All splits of a data folder and where they lie, in the order train, val, test, others.

    Raises:
        DataError: the folder is missing, empty, or of no known layout.
    """
    root = Path(data)
    if not root.exists():
        raise DataError(
            f"{root}: no such data folder", "Check the path; `paqdetr data make digits` makes one."
        )
    if not root.is_dir():
        raise DataError(
            f"{root}: is a file, expected a data folder", "Name the folder that holds the splits."
        )
    if not any(root.iterdir()):
        raise DataError(f"{root}: the data folder is empty", f"Put a data set there: {_FORMS}.")
    found = _beside(root) or _as_coco(root) or _as_roboflow(root)
    if not found:
        raise DataError(f"{root}: no COCO annotations found", f"Lay the folder out as {_FORMS}.")
    order = sorted(
        found, key=lambda s: (_USUAL_ORDER.index(s) if s in _USUAL_ORDER else len(_USUAL_ORDER), s)
    )
    return {split: found[split] for split in order}


def _beside(root: Path) -> dict[str, SplitPlace]:
    """train.json beside train/."""
    return {
        _SYNONYMS.get(file.stem, file.stem): SplitPlace(file, root / file.stem)
        for file in sorted(root.glob("*.json"))
        if (root / file.stem).is_dir()
    }


def _as_coco(root: Path) -> dict[str, SplitPlace]:
    """annotations/instances_train2017.json beside train2017/, train/ or images/train2017/."""
    found: dict[str, SplitPlace] = {}
    for file in sorted((root / "annotations").glob("instances_*.json")):
        full = file.stem.removeprefix("instances_")
        plain = re.sub(r"[-_]?\d+$", "", full) or full
        folders = [root / full, root / plain, root / "images" / full, root / "images" / plain]
        folder = next((f for f in folders if f.is_dir()), folders[0])
        split = _SYNONYMS.get(plain, plain)
        if split in found:  # of two years of one split the later has the plain name, the earlier its full one
            earlier = found[split]
            found[earlier.annotation_file.stem.removeprefix("instances_")] = earlier
        found[split] = SplitPlace(file, folder)
    return found


def _as_roboflow(root: Path) -> dict[str, SplitPlace]:
    """train/_annotations.coco.json among the images."""
    return {
        _SYNONYMS.get(file.parent.name, file.parent.name): SplitPlace(file, file.parent)
        for file in sorted(root.glob(f"*/{ROBOFLOW_FILE}"))
    }
