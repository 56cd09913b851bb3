"""The folders that a study's runs train on: found, made once, or cut into folds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.digits import make_digits
from paqdetr.data.layout import available_splits
from paqdetr.errors import DataError
from paqdetr.files import held
from paqdetr.outputs import whole_folder
from paqdetr.study.spec import DataSet

Progress = Callable[[int, int], None]


def folder_of(data: DataSet, *, cache: Path, root: Path, fold: int | None = None) -> Path:
    """Where the images of a data set lie, or will lie once `prepare` has made them.

    Args:
        cache: the study's folder for what it makes.
        root: what folders of the study's file are relative to.
        fold: which part is for validation, with `data.folds`.
    """
    if data.make is not None:
        source = cache / f"digits-{_hash(data.make.model_dump())}"
    else:
        source = root / str(data.folder)
    if fold is None:
        return source
    return cache / f"fold{fold}of{data.folds}-{source.name}-{_hash(str(source.resolve()))}"


def source_of(data: DataSet, fold: int | None = None) -> dict[str, Any]:
    """Which images those are, wherever they lie: ready for json."""
    return {
        "folder": data.folder and Path(data.folder).name,
        "make": data.make and data.make.model_dump(),
        "folds": data.folds,
        "fold": fold,
    }


def prepare(data: DataSet, *, cache: Path, root: Path, progress: Progress | None = None) -> None:
    """Make what is to be made, unless it is there: one process makes it, others of the same study wait.

    Raises:
        DataError: the data set's folder is missing or not readable.
    """
    source = folder_of(data, cache=cache, root=root)
    if data.make is None and not source.exists():
        raise DataError(f"{source}: no such data folder", "say with --data-root where the study's folders lie")
    cache.mkdir(parents=True, exist_ok=True)
    with held(cache / ".lock", wait=True):
        if data.make is not None:
            make_digits(source, **data.make.model_dump(), progress=progress)
        for fold in range(data.folds or 0):
            _cut(source, folder_of(data, cache=cache, root=root, fold=fold), fold, data.folds or 1)


def training_images(data: DataSet, *, root: Path) -> int:
    """Number of images that a training sees, without making them; with folds that of the smallest.

    Raises:
        DataError: the data set's folder is missing or not readable.
    """
    splits = ("train", "val") if data.folds else ("train",)
    if data.make is not None:
        count = sum(getattr(data.make, split) for split in splits)
    else:
        count = sum(len(open_split(root / str(data.folder), split)) for split in splits)
    return count - -(-count // data.folds) if data.folds else count


def _cut(source: Path, folder: Path, fold: int, folds: int) -> None:
    """A data set whose `val` is one part of the source's train and val together, and whose `train` is the other parts.
    Images stay where they are: `from_train` and `from_val` are links to their folders."""
    if folder.exists():
        return
    splits = {name: open_split(source, name) for name in ("train", "val")}
    pool = _pool(splits)
    order = np.random.default_rng(0).permutation(len(pool["images"]))
    chosen = {pool["images"][index]["id"] for index in np.array_split(order, folds)[fold]}
    with whole_folder(folder) as partial:
        for name in ("train", "val"):
            (partial / name).mkdir()
            for origin, split in splits.items():
                _link(partial / name / f"from_{origin}", split.image_dir.resolve())
            inside = chosen if name == "val" else {image["id"] for image in pool["images"]} - chosen
            _write(partial / f"{name}.json", _only(pool, inside))
        if "test" in available_splits(source):
            test = open_split(source, "test")
            _link(partial / "test", test.image_dir.resolve())
            _write(partial / "test.json", test.ground_truth())


def _link(place: Path, folder: Path) -> None:
    """Show a folder at another place; a copy of it where links are for administrators alone, as on Windows."""
    try:
        place.symlink_to(folder, target_is_directory=True)
    except (OSError, NotImplementedError):
        shutil.copytree(folder, place)


def _pool(splits: dict[str, DetectionDataset]) -> dict[str, Any]:
    """The COCO json of several splits together, with ids of its own."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: list[dict[str, Any]] = []
    for origin, split in splits.items():
        content = split.ground_truth()
        categories = categories or content["categories"]
        if content["categories"] != categories:
            raise DataError(f"{split.annotation_file}: other classes than in train", "folds need equal classes")
        ids = {image["id"]: len(images) + n for n, image in enumerate(content["images"], start=1)}
        images += [
            {**image, "id": ids[image["id"]], "file_name": f"from_{origin}/{image['file_name']}"}
            for image in content["images"]
        ]
        first = len(annotations) + 1
        annotations += [
            {**row, "id": first + n, "image_id": ids[row["image_id"]]} for n, row in enumerate(content["annotations"])
        ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _only(pool: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    return {
        **pool,
        "images": [image for image in pool["images"] if image["id"] in ids],
        "annotations": [row for row in pool["annotations"] if row["image_id"] in ids],
    }


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
