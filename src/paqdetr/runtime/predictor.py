"""From pictures to detections with an exported model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Never, TypeVar

import numpy as np
from PIL.Image import Image

from paqdetr.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from paqdetr.files import EXPORTED
from paqdetr.images import ImageSource
from paqdetr.other_programs import what_to_write
from paqdetr.runtime.engines import Engine, open_engine
from paqdetr.runtime.info import OUTPUTS, ExportInfo
from paqdetr.runtime.predict import stream
from paqdetr.runtime.sources import Source, list_source, read_source
from paqdetr.runtime.tiles import Tiles, predict_tiles
from paqdetr.structures import BACKGROUND_LOGIT, ClassTable, Detections, OperatingPoint
from paqdetr.text import Summary, shorten, some
from paqdetr.values import require_batch_size, require_nms, require_threshold

# Scores up to here are those of queries that have left; an engine's sigmoid may round them.
_LEFT = 1e3 * math.exp(BACKGROUND_LOGIT)
# Batches' worth of pictures, of any sizes, that may wait for others of their size.
_WAITING = 8

_Pixels = TypeVar("_Pixels")
_Entry = TypeVar("_Entry")


class PredictMixin:
    """`predict`, `stream` and `names`, which a `Detector` and an exported model have in common.

    `preprocessing` makes pixels of a PIL image, and `_detect_pixels` takes them as `Predictor.detect` does.
    """

    classes: ClassTable
    operating_point: OperatingPoint
    preprocessing: Any
    _detect_pixels: Any

    def predict(
        self,
        images: ImageSource | Iterable[ImageSource],
        threshold: float | None = None,
        batch_size: int = 1,
        *,
        nms: float | None = None,
        classes: Collection[int | str] | int | None = None,
        tiles: Tiles | int | None = None,
        **unknown: Never,
    ) -> list[Detections]:
        """Detections of one image or many, in the order given; always a list. `model(images)` is the same, but for tensors: a
        `Detector` that is called with one does its forward pass.

        Threads may share a model. A `Detector` is in evaluation mode while any of them predicts, and in its former mode
        afterwards; call `eval()` before they start where its mode is changed elsewhere too.

        Args:
            images: one of these, or a list or other iterable of any of them:

                - a path (str or pathlib), a folder, a pattern such as `data/*.jpg`, or an http address;
                - a PIL image of any mode; the content of an image file as bytes; a file opened as binary;
                - an array (H, W, 3) RGB, (H, W, 4) RGBA, (H, W) or (H, W, 1) grey: uint8, uint16, float from 0 to 1, or bool;
                - a tensor (C, H, W) or (H, W), with the same channels and values, on any device.

                An array or tensor with four dimensions is that many images. EXIF turns are applied, transparency is put on
                white, uint16 is divided by 257. OpenCV's arrays are BGR: turn them with `[..., ::-1]`.
            threshold: the least score of a detection, in [0, 1]; None: that of `operating_point`, else 0.3.
            batch_size: images of one size that go through the model together; it never changes what is found.
            nms: a box that overlaps a better one of its class by more than this IoU is dropped; None: that of
                `operating_point`, else nothing is; 1 drops nothing.
            classes: ids or names of the only classes that are wanted, or one of them.
            tiles: images are cut into tiles of this many pixels a side, or as a `Tiles` says, so that small objects of large
                images are found; one that is not larger is predicted as it is.
            unknown: nothing; what other programs call the arguments is answered with their names here.

        Raises:
            DataError: an image that cannot be read, by its name or its place in the list.
            NonFiniteError: predictions that are NaN or infinite, with the images.
            ConfigError: an argument that is unknown or out of its range, a class that the model does not have, or a model in a
                precision that its device has not.
        """
        for word in unknown:
            advice = what_to_write(word, ("threshold", "batch_size", "nms", "classes", "tiles"))
            raise ConfigError(f"predict: no argument {word!r}", advice or "help(model.predict) lists what there is")
        point = self.operating_point
        least = point.least_score(threshold)
        overlap = point.nms if nms is None else nms
        require_threshold(least)
        require_nms(overlap)
        require_batch_size(batch_size)
        cut = None if tiles is None else Tiles.of(tiles)
        wanted = None if classes is None else self.classes.find(classes)
        given, again = _listed(images), []

        def read(source: Source) -> Image:
            picture = next(read_source(source))
            if picture.frame is not None:
                raise _is_video(source)
            lasting = source.kind in ("picture", "given") and not hasattr(source.address, "read")
            again.append(source.address if lasting else picture.image)
            return picture.image

        def cleaned(detections: Detections) -> Detections:
            if wanted is not None:
                detections = detections[np.isin(detections.labels, wanted)]
            return detections if overlap is None or overlap == 1 else detections.without_duplicates(overlap)

        def found(pixels: Sequence[Any], sizes: Sequence[tuple[int, int]], names: Sequence[str]) -> list[Detections]:
            return list(map(cleaned, self._detect_pixels(pixels, sizes, threshold=least, names=names)))

        def of_parts(parts: Iterable[Image], together: int) -> list[Detections]:
            return predict_in_batches(parts, self.preprocessing, found, batch_size=together)

        pictures = map(read, given)
        if cut is None:
            names = [one.shown for one in given]
            results = predict_in_batches(pictures, self.preprocessing, found, batch_size=batch_size, names=names)
        else:
            results = [cleaned(predict_tiles(image, cut, of_parts, batch_size=batch_size)) for image in pictures]
        for source, readable, detections in zip(given, again, results, strict=True):
            detections.image_id = detections.file_name = None if source.kind == "given" else source.name
            detections.source = readable
        return results

    def stream(
        self, sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], **how: Any
    ) -> Iterator[Detections]:
        """Detections of pictures, folders, videos and cameras, one by one and lazily: see `paqdetr.runtime.predict.stream`."""
        return stream(self, sources, **how)

    @property
    def names(self) -> dict[int, str]:
        """Category id -> name of the classes."""
        return self.classes.id_to_name


def _listed(images: ImageSource | Iterable[ImageSource]) -> list[Source]:
    """Every image, and where it comes from. What is no collection of images is one image, or nothing that `read_image` knows."""
    dimensions, kind = getattr(images, "ndim", None), getattr(getattr(images, "dtype", None), "kind", "")
    one = isinstance(images, (str, bytes, bytearray, memoryview, Mapping)) or hasattr(images, "read")
    column = dimensions == 1 and kind in ("O", "U", "T")  # of paths, in an array or a table
    several = isinstance(images, Iterable) and not one and (dimensions in (None, 4) or column)
    given: list[Source] = []
    for place, image in enumerate(images if several else [images]):  # type: ignore[arg-type]
        is_path = isinstance(image, (str, os.PathLike))
        given += list_source(image) if is_path else [Source(image, f"image {place}", "given")]
    for source in given:
        if source.kind in ("video", "live"):
            raise _is_video(source)
    return given


def _is_video(source: Source) -> DataError:
    return DataError(f"{source.shown}: a video, expected pictures", "loop over model.stream(...), which takes videos")


class Predictor(PredictMixin, Summary):
    """An exported model. It is used as a `Detector` is, and needs no torch.

    Attributes:
        name: of the model.
        classes: index -> the data set's category id and name.
        preprocessing: the one size that images are stretched to.
        operating_point: threshold and IoU of the suppression, which `predict` begins from.
        info: what the file says about itself.
        engine: what runs it.
    """

    def __init__(self, engine: Engine, where: str = "the model") -> None:
        if not isinstance(engine, Engine):
            raise ConfigError(
                f"Predictor: expected an Engine, found {shorten(engine)}", "paqdetr.load(path) opens a file"
            )
        self.engine, self.where = engine, where
        self.info = info = ExportInfo.from_json(engine.metadata, where)
        self.name, self.classes, self.preprocessing = info.name, info.classes, info.preprocessing
        self.operating_point = OperatingPoint(threshold=info.threshold, nms=info.nms)

    def __call__(self, images: ImageSource | Iterable[ImageSource], **how: Any) -> list[Detections]:
        """The same as `predict`."""
        return self.predict(images, **how)

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        size, info = self.preprocessing, self.info
        return f"{self.name}, exported: {self.where}", [
            ("classes", f"{len(self.classes)}: {some(self.classes.names, 8)}"),
            ("images", f"stretched to {size.width}x{size.height}"),
            ("runs with", f"{self.engine.name}, weights {info.precision}"),
            ("evaluation", self.operating_point.shown),
        ]

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
            keep = (scores >= threshold) & (scores > _LEFT)
            found.append(
                Detections(
                    boxes=boxes[keep] * np.array([width, height, width, height], np.float32),
                    scores=scores[keep],
                    labels=np.asarray(self.classes.ids, dtype=np.int64)[labels[keep]],
                    names=self.classes.id_to_name,
                    size=(height, width),
                )
            )
        return found

    _detect_pixels = detect

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The graph on (N, H, W, 3) uint8: boxes (N, n, 4) xyxy in [0, 1], scores (N, n), best first, labels (N, n), class
        indices."""
        found = self.outputs(images)
        return self._decoded(*found) if self.info.raw else found  # type: ignore[return-value]

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
            missing = [name for name in OUTPUTS[self.info.raw] if name not in found]
            if missing:
                raise CheckpointError(f"{self.where}: the graph has no output {missing[0]!r}", "export the model again")
            parts.append([found[name][: len(part)] for name in OUTPUTS[self.info.raw]])
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


def batched_by_size(
    entries: Iterable[_Entry], size_of: Callable[[_Entry], Hashable], batch_size: int, *, most: int | None = None
) -> Iterator[list[_Entry]]:
    """Batches of entries of one size each; full ones as soon as they are, the others at the end, or the largest of them once more
    than `most` entries wait."""
    buckets: dict[Hashable, list[_Entry]] = {}
    waiting = 0
    for entry in entries:
        size = size_of(entry)
        buckets.setdefault(size, []).append(entry)
        waiting += 1
        if most is not None and waiting > most:
            size = max(buckets, key=lambda size: len(buckets[size]))
        elif len(buckets[size]) < batch_size:
            continue
        waiting -= len(buckets[size])
        yield buckets.pop(size)
    yield from buckets.values()


def predict_in_batches(
    pictures: Iterable[Image],
    prepare: Callable[[Image], _Pixels],
    detect: Callable[[list[_Pixels], list[tuple[int, int]], list[str]], Iterable[Detections]],
    *,
    batch_size: int,
    names: Sequence[str] = (),
) -> list[Detections]:
    """Put images of one shape together, and bring what is found into the order given. At most `8 * batch_size` of them wait for
    others of their shape.

    Args:
        pictures: RGB each; read one by one if they are lazy.
        prepare: RGB image -> an array or tensor, with a `shape`.
        detect: at most `batch_size` of them, the (height, width) of their originals, and their names for errors -> detections.
        batch_size: at least 1.
        names: of all pictures, for errors; their places if there are none.
    """
    require_batch_size(batch_size)
    found: dict[int, Detections] = {}
    prepared = ((i, prepare(picture), (picture.height, picture.width)) for i, picture in enumerate(pictures))
    most = _WAITING * batch_size
    for batch in batched_by_size(prepared, lambda entry: tuple(getattr(entry[1], "shape", ())), batch_size, most=most):
        indices, pixels, sizes = (list(column) for column in zip(*batch, strict=True))
        shown = [names[i] if names else f"image {i}" for i, _, _ in batch]
        found.update(zip(indices, detect(pixels, sizes, shown), strict=True))
    return [found[i] for i in range(len(found))]
