"""From pictures to detections with an exported model."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL.Image import Image

from paqdetr.errors import CheckpointError, ConfigError, NonFiniteError
from paqdetr.images import ImageSource, read_image
from paqdetr.runtime.engines import Engine, open_engine
from paqdetr.runtime.info import ExportInfo, FixedSize
from paqdetr.runtime.predict import stream
from paqdetr.runtime.tiles import Tiles, predict_tiles
from paqdetr.structures import ClassTable, Detections, OperatingPoint
from paqdetr.text import did_you_mean
from paqdetr.values import require_batch_size, require_nms, require_threshold

DEFAULT_THRESHOLD = 0.3
"""The least score of a detection, where neither the caller nor the model names one."""

EXPORTED = (".onnx", ".xml")
"""Endings of the files that `open_exported` reads."""

_OUTPUTS = {False: ("boxes", "scores", "labels"), True: ("logits", "pred_boxes")}
_Pixels = TypeVar("_Pixels")


class Predictor:
    """An exported model. It is used as a `Detector` is, and needs no torch.

    Attributes:
        name: of the model.
        classes: index -> the data set's category id and name.
        preprocessing: the one size that images are stretched to.
        info: what the file says about itself.
        engine: what runs it.
    """

    def __init__(self, engine: Engine, where: str = "the model") -> None:
        self.engine = engine
        self.info = ExportInfo.from_json(engine.metadata, where)
        self.where = where
        self.name = self.info.name

    @property
    def classes(self) -> ClassTable:
        return self.info.classes

    @property
    def operating_point(self) -> OperatingPoint:
        return OperatingPoint(threshold=self.info.threshold, nms=self.info.nms)

    @property
    def preprocessing(self) -> FixedSize:
        return self.info.preprocessing

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        threshold: float | None = None,
        nms: float | None = None,
        classes: Collection[int | str] | None = None,
        batch_size: int = 1,
        tiles: Tiles | int | None = None,
    ) -> list[Detections]:
        """Detections of one image or many, in the order given. Threads may share a predictor.

        Args:
            images: paths, bytes of image files, files opened as binary, PIL images or (H, W, 3) uint8 RGB arrays. EXIF turns
                are applied.
            threshold: the least score of a detection, in [0, 1]; None: the model's own, else 0.3.
            nms: boxes that overlap a better one of their class by more than this IoU are dropped; None: the model's own, else
                none are; 1 drops none.
            classes: ids or names of the only classes that are wanted.
            batch_size: images that go through the model together.
            tiles: large images are cut into tiles of this many pixels a side, or as a `Tiles` says.

        Raises:
            DataError: an image that cannot be read, by name.
            NonFiniteError: predictions that are NaN or infinite, with the images.
            ConfigError: a number out of its range, or a class that the model does not have.
        """
        return predict_images(
            self, images, self.detect, threshold=threshold, nms=nms, classes=classes, batch_size=batch_size, tiles=tiles
        )

    def stream(
        self, sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], **how: Any
    ) -> Iterator[Detections]:
        """Detections of pictures, folders, videos and cameras, one by one: see `paqdetr.runtime.predict.stream`."""
        return stream(self, sources, **how)

    def detect(
        self,
        pixels: Sequence[np.ndarray],
        sizes: Sequence[tuple[int, int]],
        *,
        threshold: float = 0.0,
        names: Sequence[int | str] = (),
    ) -> list[Detections]:
        """Preprocessed images -> detections in pixels of the original images, without removing duplicates.

        Args:
            pixels: (H, W, 3) uint8 each, of the model's own size.
            sizes: (height, width) of the originals in pixels.
            threshold: the least score.
            names: of the images, for errors.

        Raises:
            NonFiniteError: a prediction is NaN or infinite.
        """
        found: list[Detections] = []
        for boxes, scores, labels in zip(*self.run(np.stack(pixels)), strict=True):
            if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
                bad = names[len(found)] if names else f"batch position {len(found)}"
                raise NonFiniteError(
                    f"predictions of {self.where} are NaN or infinite for image(s) {[bad]}",
                    "the weights are broken: export an earlier checkpoint",
                    images=[bad],
                )
            height, width = sizes[len(found)]
            keep = scores >= threshold
            found.append(
                Detections(
                    boxes=boxes[keep] * np.array([width, height, width, height], np.float32),
                    scores=scores[keep],
                    labels=np.asarray(self.classes.ids, dtype=np.int64)[labels[keep]],
                    names=self.classes.id_to_name,
                )
            )
        return found

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The graph on (N, H, W, 3) uint8: boxes (N, n, 4) xyxy in [0, 1], scores (N, n), best first, labels (N, n), class
        indices."""
        boxes, scores, labels = self._decoded(*self.outputs(images)) if self.info.raw else self.outputs(images)
        return boxes, scores, labels

    def outputs(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """What the graph itself gives for (N, H, W, 3) uint8: boxes, scores and labels, or logits (N, q, C) and boxes (N, q, 4)
        cxcywh of a raw one. A graph with a fixed batch is run as often as it takes, the last time with black images as well."""
        step = self.engine.batch or len(images)
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            black = np.zeros((step - len(part), *part.shape[1:]), part.dtype)
            given = np.concatenate([part, black]) if len(black) else part
            found = self.engine.run(self.preprocessing.normalized(given) if self.info.raw else given)
            missing = [name for name in _OUTPUTS[self.info.raw] if name not in found]
            if missing:
                raise CheckpointError(f"{self.where}: the graph has no output {missing[0]!r}", "export the model again")
            parts.append([found[name][: len(part)] for name in _OUTPUTS[self.info.raw]])
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _decoded(self, logits: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `run`, from (N, n, C) logits and (N, n, 4) boxes cxcywh."""
        scores = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32).reshape(len(logits), -1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.info.max_detections]
        queries, labels = np.divmod(best, logits.shape[2])
        chosen = np.take_along_axis(boxes, queries[..., None], axis=1)
        half = chosen[..., 2:] / 2
        corners = np.concatenate([chosen[..., :2] - half, chosen[..., :2] + half], axis=-1)
        return (
            (corners.clip(0, 1) if self.info.clamp_boxes else corners),
            np.take_along_axis(scores, best, axis=1),
            labels,
        )


def open_exported(path: str | Path, *, threads: int | None = None) -> Predictor:
    """A model that `paqdetr export` wrote, for onnxruntime (.onnx) or OpenVINO (.xml and .bin).

    Args:
        path: of the file.
        threads: that work on one image; `OMP_NUM_THREADS`, else one for each core.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind or from elsewhere.
        BackendError: the engine is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in EXPORTED:
        raise CheckpointError(
            f"{path}: expected an .onnx or .xml file", "give a file that `paqdetr export` has written"
        )
    return Predictor(open_engine(path, threads), str(path))


def class_ids(table: ClassTable, wanted: Collection[int | str]) -> list[int]:
    """Ids of classes given by id or name.

    Raises:
        ConfigError: a class that is not in the table.
    """
    names: dict[str, int] = {name: i for i, name in zip(reversed(table.ids), reversed(table.names), strict=True)}
    found = []
    for one in [wanted] if isinstance(wanted, str) else wanted:
        category = names.get(one) if isinstance(one, str) else one if one in table.ids else None
        if category is None:
            raise ConfigError(
                f"classes: the model has no class {one!r}",
                did_you_mean(str(one), table.names, f"it has {len(table)} classes"),
            )
        found.append(category)
    return found


class Classifies(Protocol):
    """What `predict_images` has to know of a detector."""

    @property
    def classes(self) -> ClassTable: ...
    @property
    def operating_point(self) -> OperatingPoint: ...
    @property
    def preprocessing(self) -> Callable[[Image], Any]: ...


def predict_images(
    model: Classifies,
    images: ImageSource | Iterable[ImageSource],
    detect: Callable[..., Iterable[Detections]],
    *,
    threshold: float | None = None,
    nms: float | None = None,
    classes: Collection[int | str] | None = None,
    batch_size: int = 1,
    tiles: Tiles | int | None = None,
) -> list[Detections]:
    """What `predict` of a detector does, whatever runs it.

    Args:
        model: with its classes, preprocessing and operating point.
        images: one or many, as of `Predictor.predict`, as the others are.
        detect: called with pixels, sizes, threshold and names, as `Predictor.detect` is.

    Raises:
        as of `Predictor.predict`.
    """
    point = model.operating_point
    least = next(x for x in (threshold, point.threshold, DEFAULT_THRESHOLD) if x is not None)
    overlap = point.nms if nms is None else nms
    require_threshold(least)
    require_nms(overlap)
    wanted = None if classes is None else class_ids(model.classes, classes)

    def cleaned(detections: Detections) -> Detections:
        if wanted is not None:
            detections = detections.rows(np.isin(detections.labels, wanted))
        return detections if overlap is None or overlap == 1 else detections.without_duplicates(overlap)

    def found(pixels: Sequence[Any], sizes: Sequence[tuple[int, int]], names: Sequence[str]) -> list[Detections]:
        return list(map(cleaned, detect(pixels, sizes, threshold=least, names=names)))

    if tiles is None:
        return predict_in_batches(images, model.preprocessing, found, batch_size=batch_size)
    require_batch_size(batch_size)
    cut = Tiles(tiles) if isinstance(tiles, int) else tiles

    def of_parts(parts: list[Image], together: int) -> list[Detections]:
        return predict_in_batches(parts, model.preprocessing, found, batch_size=together)

    results = []
    for source in as_list(images):
        detections = cleaned(predict_tiles(read_image(source), cut, of_parts, batch_size=batch_size))
        name = Path(source).name if isinstance(source, (str, os.PathLike)) else None
        results.append(replace(detections, image_id=name, file_name=name))
    return results


def as_list(images: ImageSource | Iterable[ImageSource]) -> list[Any]:
    """One image or many as a list. What is no collection of images is one image, or nothing that `read_image` knows: a number,
    a tensor."""
    one = (
        isinstance(images, (str, bytes, bytearray, memoryview, Mapping))
        or hasattr(images, "read")
        or hasattr(images, "ndim")
    )
    return list(images) if isinstance(images, Iterable) and not one else [images]


def predict_in_batches(
    images: ImageSource | Iterable[ImageSource],
    prepare: Callable[[Image], _Pixels],
    detect: Callable[[list[_Pixels], list[tuple[int, int]], list[str]], Iterable[Detections]],
    *,
    batch_size: int,
) -> list[Detections]:
    """Read images, put those of one shape together, and bring what is found into the order given.

    Args:
        images: one or many, as of `Predictor.predict`.
        prepare: RGB image -> an array or tensor, with a `shape`.
        detect: at most `batch_size` of them, the (height, width) of their originals, and their names for errors -> detections.
        batch_size: at least 1.
    """
    require_batch_size(batch_size)
    sources = as_list(images)
    found: dict[int, Detections] = {}
    buckets: dict[Hashable, list[tuple[int, _Pixels, tuple[int, int]]]] = defaultdict(list)

    def run(bucket: list[tuple[int, _Pixels, tuple[int, int]]]) -> None:
        indices, pixels, sizes = (list(column) for column in zip(*bucket, strict=True))
        paths = [str(x) if isinstance(x := sources[i], (str, os.PathLike)) else None for i in indices]
        names = [path or f"image {i}" for path, i in zip(paths, indices, strict=True)]
        for i, path, detections in zip(indices, paths, detect(pixels, sizes, names), strict=True):
            detections.image_id = detections.file_name = None if path is None else Path(path).name
            found[i] = detections
        bucket.clear()

    for i, source in enumerate(sources):
        picture = read_image(source)
        pixels = prepare(picture)
        bucket = buckets[tuple(getattr(pixels, "shape", ()))]
        bucket.append((i, pixels, (picture.height, picture.width)))
        if len(bucket) == batch_size:
            run(bucket)
    for bucket in filter(None, buckets.values()):
        run(bucket)
    return [found[i] for i in range(len(sources))]
