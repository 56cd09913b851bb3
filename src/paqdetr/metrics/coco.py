"""COCO figures of a list of results, per-class AP, AP after non-maximum suppression, from records checked before."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import hotcoco
import numpy as np

from paqdetr.errors import ConfigError, DataError
from paqdetr.files import read_json
from paqdetr.serialize import fields_of
from paqdetr.text import shorten, some
from paqdetr.values import as_flag, as_id, is_coordinate

Json = Mapping[str, Any]
_LEAST = (-1e9, -1e9, 0, 0)  # of x, y, width and height
IouType = Literal["bbox", "segm"]
MAX_DETECTIONS = 100
"""Detections of a class in an image that COCO looks at."""


class CocoRecords:
    """The records of one data set, with ids rewritten to 1, 2, 3...: the evaluator takes only integers.

    Args:
        truth: a COCO json: `images`, `categories` and `annotations`.
        source: what to call it in errors, the file as a rule.
        masks: whether records are compared by `segmentation`, not by `bbox`.

    Attributes:
        class_names: in the order of the rewritten category ids, which is that of the original ids; a name
            that two categories share has its id in brackets.
        image_ids: the original ids; the rewritten one is the position, from 1.
        category_ids: likewise.

    Raises:
        DataError: a list is missing, or ids are missing or not unique.
    """

    def __init__(self, truth: Any, *, source: str, masks: bool) -> None:
        for key in ("images", "categories", "annotations"):
            if not isinstance(truth, Mapping) or not isinstance(truth.get(key), Sequence):
                raise DataError(
                    f"{source}: no list under the key '{key}'; expected images, categories and annotations",
                    "give the COCO json of the data set, not the one with the results",
                )
            _require_objects(truth[key], f"{source}: {key}")
        self._truth, self._source, self.masks = truth, source, masks
        self._images = _numbering(truth["images"], f"{source}: images")
        self._names = {
            self._images[i["id"]]: _plain(n) for i in truth["images"] if isinstance(n := i.get("file_name"), str)
        }
        self._by_name: dict[str, list[int]] = {}
        for number, name in self._names.items():
            self._by_name.setdefault(name.rpartition("/")[2], []).append(number)
        self._categories = _numbering(truth["categories"], f"{source}: categories")
        self._called = {
            self._categories[c["id"]]: n for c in truth["categories"] if isinstance(n := c.get("name"), str)
        }
        self._by_class: dict[str, list[int]] = {}
        for number, name in self._called.items():
            self._by_class.setdefault(name.casefold(), []).append(number)
        self._sizes = {self._images[image["id"]]: _size(image, source) for image in truth["images"]}
        self.class_names = _class_names(truth["categories"], self._categories)
        self.image_ids: tuple[int | str, ...] = tuple(self._images)
        self.category_ids: tuple[int | str, ...] = tuple(self._categories)

    @classmethod
    def open(cls, ground_truth: GroundTruth, iou_type: str) -> CocoRecords:
        """The records of a COCO json, or of the file with it, to be compared by boxes or by masks; records as they are.

        Raises:
            DataError: the file cannot be read, or as above.
            ConfigError: `iou_type` is neither "bbox" nor "segm".
        """
        if iou_type not in ("bbox", "segm"):
            raise ConfigError(f"iou_type: found {iou_type!r}, expected 'bbox' or 'segm'", "choose one of the two")
        if isinstance(ground_truth, CocoRecords):
            return ground_truth
        if isinstance(ground_truth, (str, Path)):
            return cls(read_json(Path(ground_truth)), source=str(ground_truth), masks=iou_type == "segm")
        return cls(ground_truth, source="the ground truth", masks=iou_type == "segm")

    def ground_truth(self) -> dict[str, Any]:
        """The data set with new ids; `area` and `iscrowd` filled in where they are missing. Made once, and not to be changed.

        Raises:
            DataError: an annotation is malformed.
        """
        return self._rewritten

    @cached_property
    def _rewritten(self) -> dict[str, Any]:
        annotations = self._truth["annotations"]
        called = [shorten(a["id"]) if "id" in a else f"number {i}" for i, a in enumerate(annotations)]
        names = [f"{self._source}: annotation {name}" for name in called]
        records = self._rewrite(annotations, names)
        for number, (record, annotation, name) in enumerate(zip(records, annotations, names, strict=True), start=1):
            # Numbered from 1 whatever their own ids: COCO's rules read the id 0 as "not matched".
            record["id"] = number
            crowd = as_flag(annotation.get("iscrowd"))
            if crowd is None:
                raise DataError(
                    f"{name}: iscrowd is {shorten(annotation['iscrowd'])}, expected 0 or 1", "repair the file"
                )
            record["iscrowd"] = int(crowd)
            if self.masks:
                record["bbox"] = hotcoco.mask.to_bbox(record["segmentation"]).tolist()
            area = annotation.get("area")
            if area is not None:
                record["area"] = _number(area, "area", name, low=0, high=1e18)
            elif self.masks:
                record["area"] = float(hotcoco.mask.area(record["segmentation"]))
            else:
                record["area"] = record["bbox"][2] * record["bbox"][3]
        return {
            "images": [{"id": n, "height": height, "width": width} for n, (height, width) in self._sizes.items()],
            # Under numbers: a name may be text that the evaluator cannot take.
            "categories": [{"id": n, "name": str(n)} for n in range(1, len(self.class_names) + 1)],
            "annotations": records,
        }

    def objects(self) -> np.ndarray:
        """(G, 2) int64: image and category of every annotation that is no crowd, by position from 0."""
        annotations = [row for row in self.ground_truth()["annotations"] if not row["iscrowd"]]
        rows = [(row["image_id"] - 1, row["category_id"] - 1) for row in annotations]
        return np.array(rows, np.int64).reshape(-1, 2)

    def results(self, results: Sequence[Json], source: str = "") -> list[dict[str, Any]]:
        """The results with new ids; `source` is what errors call them by, their file as a rule.

        Raises:
            DataError: a result is malformed, its image or category is not in the data set, or the image has another name there.
        """
        _require_objects(results, source or "the results")
        before = f"{source}: " if source else ""
        names = [f"{before}result number {i}" for i in range(len(results))]
        records = self._rewrite(results, names, by_names=True)
        for record, result, name in zip(records, results, names, strict=True):
            record["score"] = _number(result.get("score"), "score", name, low=-1e9)
        return records

    def image_called(self, name: str) -> int | None:
        """The number of the image with a file name, as the ground truth has it or with fewer or more folders before it; None if
        there is none.

        Raises:
            DataError: several images are called so.
        """
        wanted = f"/{_plain(name)}"
        own = {number: f"/{self._names[number]}" for number in self._by_name.get(wanted.rpartition("/")[2], [])}
        within = [number for number, full in own.items() if wanted.endswith(full)]
        longest = max((len(own[number]) for number in within), default=0)
        found = [number for number in within if len(own[number]) == longest]
        found = found or [number for number, full in own.items() if full.endswith(wanted)]
        if len(found) > 1:
            raise DataError(
                f"{self._source}: {len(found)} images are called {shorten(name)}",
                "give names with their folders, or image ids",
            )
        return found[0] if found else None

    def _image(self, item: Json, name: str) -> int | None:
        """The number of the image that a record is about: by its id, or else by its file name."""
        image_id, file_name = item.get("image_id"), item.get("file_name")
        image = _find(self._images, image_id)
        if not isinstance(file_name, str):
            return self.image_called(image_id) if image is None and isinstance(image_id, str) else image
        if image is None:
            return self.image_called(file_name)
        own = self._names.get(image)
        if own is not None and _stem(own) != _stem(_plain(file_name)):
            raise DataError(
                f"{name}: image_id {image_id!r} is {own!r} in {self._source}, and file_name is {file_name!r}",
                "use the same split for both, or remove image_id: images are then found by file_name",
            )
        return image

    def _category(self, item: Json, name: str) -> int | None:
        """The number of the category that a record is about: by its id, or by its name where the id is unknown or another's."""
        category_id, called = item.get("category_id"), item.get("category_name")
        category = _find(self._categories, category_id)
        own = None if category is None else self._called.get(category)
        if not isinstance(called, str) or called == own or (category is not None and own is None):
            return category
        if own is not None and (called.casefold() == own.casefold() or re.fullmatch(r"class \d+", called)):
            return category  # `ClassTable.numbered` calls classes so, for want of names
        found = self._by_class.get(called.casefold(), [])
        if len(found) == 1:
            return found[0]
        if category is not None:
            raise DataError(
                f"{name}: category_id {category_id!r} is {own!r} in {self._source}, and category_name is {called!r}",
                "use data with the same classes for both, or remove category_name: ids are then compared",
            )
        return None

    def _rewrite(self, items: Sequence[Json], names: list[str], *, by_names: bool = False) -> list[dict[str, Any]]:
        """Image, category and shape of each; `names` say which one an error is about."""
        records = [self._place(item, name, by_names) for item, name in zip(items, names, strict=True)]
        if self.masks:
            for record, item, name in zip(records, items, names, strict=True):
                record["segmentation"] = self._mask(item, record["image_id"], name)
        else:
            for record, box in zip(records, _boxes(items, names).tolist(), strict=True):
                record["bbox"] = box
        return records

    def _place(self, item: Json, name: str, by_names: bool) -> dict[str, Any]:
        image_id, category_id = item.get("image_id"), item.get("category_id")
        image = self._image(item, name) if by_names else _find(self._images, image_id)
        category = self._category(item, name) if by_names else _find(self._categories, category_id)
        if image is None:
            called = f" with file_name {item['file_name']!r}" if by_names and "file_name" in item else ""
            raise DataError(
                f"{name}: image_id {shorten(image_id)}{called} is none of the {len(self._images)} images of {self._source}"
                f" ({some(list(map(shorten, self._images)), 5)})",
                "use the same split for both; ids are compared with their type (1 is not '1'), else file names",
            )
        if category is None:
            raise DataError(
                f"{name} (image {shorten(image_id)}): category_id {shorten(category_id)} is none of the categories of"
                f" {self._source} ({some(list(map(shorten, self._categories)), 5)})",
                "use the category ids of the annotation file, not class indices that start at 0",
            )
        return {"image_id": image, "category_id": category}

    def _mask(self, item: Json, image: int, name: str) -> dict[str, Any]:
        """Polygons or a run-length code -> the run-length code of the whole image."""
        height, width = self._sizes[image]
        segmentation = item.get("segmentation")
        try:
            if isinstance(segmentation, Mapping):
                found = tuple(int(side) for side in segmentation["size"])
                if (height, width) not in ((0, 0), found):
                    raise ValueError(f"its size is {found}, the image's (height, width) is {(height, width)}")
                hotcoco.mask.area(dict(segmentation))  # refuses what is no run-length code
                return dict(segmentation)
            if not segmentation or not height or not width:
                raise ValueError("expected polygons or a run-length code, and height and width of the image")
            if not all(is_coordinate(value) for polygon in segmentation for value in polygon):
                raise ValueError("its polygons hold values that are no finite numbers of pixels")
            return hotcoco.mask.merge(hotcoco.mask.fr_py_objects(segmentation, height, width))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise DataError(
                f"{name} (image {shorten(item.get('image_id'))}): no usable segmentation: {error}",
                "where there are only boxes evaluate with --iou-type bbox, in Python iou_type='bbox'",
            ) from error


GroundTruth = Json | str | Path | CocoRecords
"""A COCO json, the file with it, or its records."""


def counted_detections(max_detections: int) -> list[int]:
    """How many detections of each class and image the evaluator looks at: 1, 10 and `max_detections`, in ascending order.

    Raises:
        ConfigError: it is below 1.
    """
    if max_detections < 1:
        raise ConfigError(f"max_detections: expected at least 1, found {max_detections}", "COCO looks at 100")
    return [1, min(10, max_detections), max_detections]


def _require_objects(items: Sequence[Any], name: str) -> None:
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DataError(f"{name}: number {i} is {shorten(item)}, expected an object", "repair the json file")


def _numbering(items: Sequence[Json], name: str) -> dict[Any, int]:
    """The items' ids -> 1, 2, 3...

    Integer ids keep their order: it breaks ties between equal scores in pycocotools. Others go by position.
    """
    ids: list[Any] = [as_id(item.get("id")) for item in items]
    for i, own in enumerate(ids):
        if own is None:
            raise DataError(
                f"{name}: number {i} has the id {shorten(items[i].get('id'))}",
                "give each an integer or a string as `id`",
            )
    if len(set(ids)) < len(ids):
        twice = next(own for i, own in enumerate(ids) if own in ids[:i])
        raise DataError(f"{name}: the id {shorten(twice)} is there more than once", "make the ids unique")
    ordered: list[Any] = sorted(ids) if all(isinstance(own, int) for own in ids) else ids  # type: ignore[type-var]
    return {own: number for number, own in enumerate(ordered, start=1)}


def _class_names(categories: Sequence[Json], numbers: dict[Any, int]) -> list[str]:
    by_id = {category["id"]: str(category.get("name", category["id"])) for category in categories}
    names = list(by_id.values())
    told = [name if names.count(name) == 1 else f"{name} ({own})" for own in numbers for name in [by_id[own]]]
    return told if len(set(told)) == len(told) else [f"{by_id[own]} ({own})" for own in numbers]


def _boxes(items: Sequence[Json], names: list[str]) -> np.ndarray:
    """All `bbox` as (N, 4) float64; the error names the first that is not four finite numbers."""
    try:
        boxes = np.array([item["bbox"] for item in items]).reshape(len(items), 4)
        flags = bool in {type(value) for item in items for value in item["bbox"]}  # numpy takes them for numbers
        if boxes.dtype.kind in "iuf" and not flags and (np.abs(boxes) < 1e9).all() and (boxes[:, 2:] >= 0).all():
            return boxes.astype(np.float64)
    except (KeyError, TypeError, ValueError):
        pass
    rows = []
    for item, name in zip(items, names, strict=True):
        box = item.get("bbox")
        if not isinstance(box, (Sequence, np.ndarray)) or len(box) != 4:
            raise DataError(
                f"{name} (image {shorten(item.get('image_id'))}): bbox is {shorten(box)}, expected [x, y, width, height]",
                "repair or remove it",
            )
        where = f"bbox {shorten(list(box))}"
        rows.append([_number(value, where, name, low=low) for value, low in zip(box, _LEAST, strict=True)])
    return np.array(rows).reshape(-1, 4)


def _number(value: Any, key: str, name: str, *, low: float, high: float = 1e9) -> float:
    plain = value.item() if isinstance(value, np.generic) else value
    if not isinstance(plain, (int, float)) or isinstance(plain, bool) or not low <= plain <= high:
        raise DataError(
            f"{name}: {key}: found {shorten(value)}, expected a finite number from {low:g} to {high:g}",
            "look for NaN in the model's output, or repair the file",
        )
    return float(plain)


def _size(image: Json, source: str) -> tuple[int, int]:
    """(height, width) in pixels, 0 where it is not said: boxes can be compared without."""
    sides = []
    for key in ("height", "width"):
        side = image.get(key) or 0
        if not is_coordinate(side) or side < 0:
            raise DataError(
                f"{source}: image {shorten(image['id'])}: {key}: found {shorten(side)}, expected a number of pixels",
                "repair the file",
            )
        sides.append(int(side))
    return sides[0], sides[1]


def _plain(name: str) -> str:
    """A file name with slashes, and with composed letters: macOS takes them apart."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def _find(table: dict[Any, int], key: Any) -> int | None:
    own = as_id(key)
    return None if own is None else table.get(own)


@dataclass(frozen=True, slots=True)
class CocoFigures:
    """What COCO reports for one set of results.

    Every figure lies in [0, 1] and is averaged over the classes that have ground truth. It is NaN where
    nothing defines it: `APl` without a large object, all without any object (pycocotools says -1 there).

    Attributes:
        AP: mean over IoU .50:.05:.95, area "all", the best 100 detections per image and class; AP50, AP75 at one IoU.
        APs, APm, APl: AP of objects below 32^2, between, and above 96^2 square pixels of annotated `area`.
        AR1, AR10, AR100: recall with that many detections per image and class, mean over the IoU thresholds. With another
            `max_detections`, that number stands in the place of 100 everywhere.
        ARs, ARm, ARl: AR100 by object area.
        per_class: class name -> AP; NaN for a class without ground truth. In ascending order of category id.
        per_class_AP50: class name -> AP at IoU .50.
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    per_class: dict[str, float] = field(default_factory=dict)
    per_class_AP50: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The twelve figures and `per_class`, ready for json: None (null) stands where a figure is NaN."""
        return {key: value for key, value in fields_of(self).items() if key != "per_class_AP50"}


FIGURE_NAMES: tuple[str, ...] = tuple(f.name for f in fields(CocoFigures) if not f.name.startswith("per_class"))
"""The twelve figures, in the order in which COCO prints them."""


def evaluate_detections(
    ground_truth: GroundTruth,
    results: Sequence[Json],
    *,
    iou_type: IouType = "bbox",
    source: str = "",
    max_detections: int = MAX_DETECTIONS,
) -> CocoFigures:
    """Compare results with the ground truth, by COCO's rules. Prints nothing and changes neither argument.

    Args:
        ground_truth: a COCO json, the file with it, or its records: `images`, `categories`, `annotations`. Ids may be
            integers or strings. An annotation without `area` gets that of its box (of its mask for "segm"),
            one without `iscrowd` counts as a single object.
        results: COCO results, as of `Detections.to_coco()`: `image_id`, `category_id`, `score` and `bbox`
            ([x, y, width, height] in pixels) or, for "segm", `segmentation`. May be empty: AP is then 0.
        iou_type: "bbox" compares boxes, "segm" masks (`bbox` of a result is then ignored).
        source: what errors call the results by, their file as a rule.
        max_detections: how many of each class are looked at in an image, best first (COCO's maxDets). More than 100 are needed
            where images have more than 100 objects of a class: those beyond count as missed.

    Raises:
        DataError: the ground truth cannot be read or is malformed, or a result belongs to an unknown image or
            category, or its box, mask or score is missing or not finite.
        ConfigError: `iou_type` is something else, or `max_detections` is below 1.
    """
    records = CocoRecords.open(ground_truth, iou_type)
    evaluation = evaluated(records.ground_truth(), records.results(results, source), iou_type, max_detections)
    evaluation.accumulate()
    evaluation.summary_lines()  # fills the figures; summarize() would do so too, but prints
    figures = {name: _or_nan(value) for name, value in evaluation.get_results().items() if name in FIGURE_NAMES}

    # (thresholds, recalls, classes, areas, max detections): area "all" is the first, `max_detections` the last.
    precision = (evaluation.eval or {})["precision"][:, :, :, 0, -1]
    return CocoFigures(
        **figures,
        per_class={name: _mean(precision[:, :, k]) for k, name in enumerate(records.class_names)},
        per_class_AP50={name: _mean(precision[0, :, k]) for k, name in enumerate(records.class_names)},
    )


def evaluated(
    truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str, max_detections: int = MAX_DETECTIONS
) -> hotcoco.COCOeval:
    """The library's evaluation of results, matched but not yet summed up; truth and results as `CocoRecords` has them."""
    dataset = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(dataset, dataset.load_res(results), iou_type)
    evaluation.params.max_dets = counted_detections(max_detections)
    evaluation.evaluate()
    return evaluation


def is_shards(path: Path) -> bool:
    """Whether it is a Parquet file, or a folder of such."""
    return path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The COCO results in a json file: a list with one dict a detection; or those in what `predict --ray` wrote.

    Raises:
        DataError: the file is missing, is not json, or holds something else than a list of objects.
    """
    if is_shards(Path(path)):
        from paqdetr.serving.ray_predict import read_shards

        return read_shards(path)
    results = read_json(Path(path))
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise DataError(
            f"{path}: found a json {type(results).__name__}, expected a list of detections",
            "give the file that `paqdetr predict` or another detector wrote, not the annotations",
        )
    return results


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined: COCO marks the rest with -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def _or_nan(value: float) -> float:
    return math.nan if value == -1 else float(value)
