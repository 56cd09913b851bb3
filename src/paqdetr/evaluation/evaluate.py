"""A model against a split: the COCO figures, with and without removing duplicates.

Several processes share out the batches, which one process alone would make just so; the main one puts them in order and
computes the figures. No image is seen twice, and the figures do not depend on how many processes there are.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image

from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import split_to_evaluate
from paqdetr.errors import ConfigError, DataError
from paqdetr.interrupt import worker_start_method
from paqdetr.loading import load, require_model
from paqdetr.metrics.coco import MAX_DETECTIONS, CocoFigures, CocoRecords, counted_detections, evaluate_detections
from paqdetr.metrics.diagnosis import threshold_curves
from paqdetr.metrics.matches import MatchTable
from paqdetr.runtime.predictor import Predictor, batched_by_size, predict_in_batches
from paqdetr.runtime.tiles import Tiles, predict_tiles
from paqdetr.structures import CONFIDENT, ClassTable, Detections, OperatingPoint
from paqdetr.text import Summary, figure
from paqdetr.values import require_batch_size, require_nms, require_threshold

if TYPE_CHECKING:  # what a call has wrong is found before torch is imported
    from paqdetr.distributed import Processes
    from paqdetr.models.detector import Detector
    from paqdetr.models.inference import Observer
    from paqdetr.models.outputs import DetectorOutput

# IoU of the suppression that shows what duplicates cost, and the least gain of AP for which it is recommended.
_NMS, _WORTH_IT = 0.7, 0.005
# No detection that scores less is of use, wherever F1 is at its best.
_LEAST_USEFUL = 0.05
# Processes that read pictures beside a GPU.
_WORKERS = 4


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation(Summary):
    """What an evaluation found.

    Attributes:
        figures: the COCO figures of the raw output; the detector's AP.
        figures_nms: the same after class-wise non-maximum suppression at IoU 0.7: the difference is the cost of duplicates.
        predictions_per_image: predictions that score over 0.3.
        boxes_per_image: boxes to be found.
        images_per_second: reading, model and post-processing.
        results: COCO result dicts of the raw output, of the classes that the split has.
        operating_point: the threshold and the suppression of duplicates that these figures recommend.
        unreadable_images: that count as images without detections.
    """

    figures: CocoFigures
    figures_nms: CocoFigures
    predictions_per_image: float
    boxes_per_image: float
    images_per_second: float
    results: list[dict[str, Any]]
    operating_point: OperatingPoint = field(default_factory=OperatingPoint)
    unreadable_images: int = 0

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        f, point = self.figures, self.operating_point
        classes = sorted((ap, name) for name, ap in f.per_class.items() if not math.isnan(ap))
        rows = [
            ("AP50, AP75", f"{figure(f.AP50)}, {figure(f.AP75)}"),
            ("AP of small, medium, large", ", ".join(map(figure, (f.APs, f.APm, f.APl)))),
            (f"AP with nms {_NMS}", f"{figure(self.figures_nms.AP)} (duplicates cost {figure(point.duplicates_cost)})"),
            (
                "predictions over 0.3 per image",
                f"{self.predictions_per_image:.1f}, to be found {self.boxes_per_image:.1f}",
            ),
            ("recommended", point.shown),
            ("images per second", f"{self.images_per_second:.1f}"),
        ]
        if self.unreadable_images:
            rows.append(("images that cannot be read", str(self.unreadable_images)))
        if classes:
            (low, worst), (high, best) = classes[0], classes[-1]
            rows.insert(2, (f"AP of {len(classes)} classes", f"{figure(low)} ({worst}) to {figure(high)} ({best})"))
        return f"Evaluation: AP {figure(f.AP)}", rows

    def to_json(self) -> dict[str, Any]:
        """Figures by name, ready for json; `unreadable_images` among them if there are any."""
        nms = self.figures_nms.to_json()
        return {
            **self.figures.to_json(),
            "AP_nms": nms["AP"],
            "AP50_nms": nms["AP50"],
            "predictions_per_image": round(self.predictions_per_image, 3),
            "boxes_per_image": round(self.boxes_per_image, 3),
            "images_per_second": round(self.images_per_second, 2),
            **({"unreadable_images": self.unreadable_images} if self.unreadable_images else {}),
        }


def evaluate(
    model: Detector | Predictor | str | Path,
    *,
    data: str | Path,
    split: str | None = "val",
    batch_size: int = 4,
    max_detections: int = MAX_DETECTIONS,
    progress: Callable[[int, int], None] | None = None,
    observers: Sequence[Observer] = (),
    threshold: float = 0.0,
    nms: float | None = None,
    tiles: Tiles | int | None = None,
) -> Evaluation:
    """Figures of a model on one split of a data set.

    Args:
        model: a detector, an exported model, or the path of either or of a run; a checkpoint goes to the best device there is.
            The classes of the data must be among its own, by name.
        data: the data set's folder.
        split: "train", "val" or "test"; None: val, or where there is none test, or else the first there is.
        batch_size: images of one size that go through together; it changes no figure.
        max_detections: of one class that are looked at in an image (COCO's maxDets, 100): more where images have more objects.
        progress: called with (images done, images in all).
        observers: shown the raw outputs on the way, such as `paqdetr.metrics.QueryUsage`.
        threshold: detections that score less are left out, which only lowers AP: what users get at this threshold.
        nms: a box that overlaps a better one of its class by more than this IoU is left out; None: nothing is.
        tiles: large images are cut into these, or into tiles of this many pixels a side.

    Raises:
        DataError: the split is missing or malformed, or has a class that the model has not.
        CheckpointError: the checkpoint cannot be read.
        ConfigError: `model` is none of these, a number out of its range, or tiles together with observers.
    """
    require_batch_size(batch_size)
    require_threshold(threshold)
    require_nms(nms)
    if tiles is not None and observers:
        raise ConfigError("tiles: observers look at the outputs for whole images", "leave one of the two out")
    counted_detections(max_detections)
    if isinstance(model, (str, Path)):
        model = require_model(model)
    elif not isinstance(model, Predictor):
        from paqdetr.models.detector import Detector

        if not isinstance(model, Detector):
            raise ConfigError(
                f"model: expected a Detector or a path, found {type(model).__name__}",
                "give what paqdetr.load or create_model returns, or a checkpoint's path",
            )
    opened = open_split(data, split_to_evaluate(data, split))
    if isinstance(model, (str, Path)):
        model = load(model, device=None)
    return evaluate_split(
        model,
        opened,
        batch_size=batch_size,
        max_detections=max_detections,
        progress=progress,
        observers=observers,
        threshold=threshold,
        nms=nms,
        tiles=None if tiles is None else Tiles.of(tiles),
    )


def evaluate_split(model: Detector | Predictor, split: DetectionDataset, **how: Any) -> Evaluation:
    """As `evaluate`, on a split that is open already; `how` are keywords of `evaluate_together`."""
    from paqdetr.distributed import Processes

    found = evaluate_together(model, split, Processes(), **how)
    assert found is not None
    return found


def evaluate_together(
    model: Detector | Predictor,
    split: DetectionDataset,
    processes: Processes,
    *,
    batch_size: int = 4,
    max_detections: int = MAX_DETECTIONS,
    progress: Callable[[int, int], None] | None = None,
    observers: Sequence[Observer] = (),
    threshold: float = 0.0,
    nms: float | None = None,
    tiles: Tiles | None = None,
    workers: int | None = None,
) -> Evaluation | None:
    """As `evaluate_split`, by several processes, each with the same model and observers. All have to call it. `workers` are
    those of `detect_split`.

    The main process's observers have seen everything afterwards, the others' their own share.

    Returns:
        the figures in the main process, None in the others.
    """
    require_same_classes(model.classes, split)
    started = time.perf_counter()
    own: list[tuple[int, Detections]] = []
    unreadable: dict[int, str] = {}
    with processes.agreeing():
        for index, detections in detect_split(
            model,
            split,
            batch_size=batch_size,
            processes=processes,
            observers=observers,
            at_least=max_detections if max_detections > MAX_DETECTIONS else 0,
            tiles=tiles,
            workers=workers,
            unreadable=unreadable,
        ):
            detections.image_id, detections.file_name = split.image_ids[index], split.file_names[index]
            own.append((index, detections))
            if progress is not None:
                progress(min(len(own) * processes.count, len(split)), len(split))
    shares = processes.gather((own, unreadable))
    with processes.agreeing():
        if shares is not None:
            _tell_of_unreadable({index: why for _, failed in shares for index, why in failed.items()}, len(split))
    for observer in observers:
        for share in (processes.gather(observer) or [])[1:]:
            observer.merge(share)
    if shares is None:
        return None
    seconds = time.perf_counter() - started
    by_index = {index: detections for share, _ in shares for index, detections in share}
    found = [by_index[index] for index in range(len(split))]
    if nms is not None:
        found = [detections.without_duplicates(nms) for detections in found]
    found = [detections.above(threshold) for detections in found]
    results = [row for detections in found for row in detections.to_coco()]
    cleaned = [row for detections in found for row in detections.without_duplicates(_NMS).to_coco()]
    truth = CocoRecords.open(split.ground_truth(), "bbox")
    figures, figures_nms = (
        evaluate_detections(truth, rows, max_detections=max_detections) for rows in (results, cleaned)
    )
    cost = figures_nms.AP - figures.AP
    helps = cost >= _WORTH_IT
    return Evaluation(
        figures=figures,
        figures_nms=figures_nms,
        operating_point=OperatingPoint(
            threshold=_best_threshold(truth, cleaned if helps else results, max_detections),
            nms=_NMS if helps else None,
            duplicates_cost=None if math.isnan(cost) else round(cost, 6),
        ),
        predictions_per_image=float(np.mean([(d.scores > CONFIDENT).sum() for d in found])),
        boxes_per_image=float(np.mean([len(split.labels(i)) for i in range(len(split))])),
        images_per_second=len(found) / max(seconds, 1e-9),
        results=results,
        unreadable_images=sum(len(failed) for _, failed in shares),
    )


def _best_threshold(truth: CocoRecords, rows: list[dict[str, Any]], max_detections: int) -> float | None:
    """Where F1 over all classes is at its best; None where nothing right scores enough to be of use. Rows that score less change
    no match of the others, and matching them takes most of the time."""
    usable = [row for row in rows if row["score"] >= _LEAST_USEFUL]
    best = threshold_curves(MatchTable.match(truth, usable, max_detections=max_detections)).best_threshold[-1]
    return None if math.isnan(best) else math.floor(best * 1e4) / 1e4


def detect_split(
    model: Detector | Predictor,
    split: DetectionDataset,
    *,
    batch_size: int,
    processes: Processes | None = None,
    observers: Sequence[Observer] = (),
    workers: int | None = None,
    at_least: int = 0,
    tiles: Tiles | None = None,
    unreadable: dict[int, str] | None = None,
) -> Iterator[tuple[int, Detections]]:
    """(index, detections) of every image, in batches of one size: what an image is batched with never matters. Of several
    processes each takes its share of the batches. Observers are shown the raw output of each batch.

    Detections have the split's category ids. Those of classes that it has not are left out: nothing says whether they are
    right. An image that cannot be read has no detections, so that one bad file does not end a training at its evaluation; how
    many there are is logged.

    Args:
        workers: processes that read the pictures of coming batches meanwhile; they change no order and no figure. None: up to 4
            beside a GPU where processes are forked, and none elsewhere: those that are spawned import torch first, and want the
            caller's script below `if __name__ == "__main__":`.
        at_least: as of `detect_batch`.
        tiles: images are cut into these; observers see nothing then.
        unreadable: filled with index -> why of images that cannot be read. The caller then tells of them: of several processes
            none knows what the others could read.

    Raises:
        DataError: no image could be read, without `unreadable`.
    """
    from paqdetr.data.loader import ImageLoader, SplitImages
    from paqdetr.distributed import Processes
    from paqdetr.models.inference import detect_batch

    processes = processes or Processes()
    sides = split.sizes.tolist()
    batches = list(
        batched_by_size(range(len(split)), lambda index: model.preprocessing.target_size(*sides[index]), batch_size)
    )
    if workers is None:
        on_host = isinstance(model, Predictor) or model.device.type == "cpu"
        workers = 0 if on_host or worker_start_method() != "fork" else min(_WORKERS, os.cpu_count() or 1)
    if isinstance(model, Predictor) and observers:
        raise ConfigError(
            f"{model.where}: an exported model does not show what observers look at", "take its checkpoint"
        )

    def detect(
        images: list[Any], sizes: list[tuple[int, int]], names: Sequence[int | str], **look: Any
    ) -> Iterable[Detections]:
        if isinstance(model, Predictor):
            return model.detect(images, sizes, names=names)
        return detect_batch(model, images, sizes, names=names, at_least=at_least, **look)

    failed = {} if unreadable is None else unreadable

    known, called = model.classes.ids_in(split.classes), split.classes.id_to_name

    def kept(index: int, detections: Detections) -> Detections:
        return detections.as_classes({} if index in failed else known, called)

    def of_tiles(parts: Iterable[Image], together: int) -> list[Detections]:
        found = predict_in_batches(parts, model.preprocessing, detect, batch_size=together)
        # Of many tiles the best alone: thousands that score next to nothing would be compared with each other.
        most = np.arange(max(at_least, MAX_DETECTIONS))
        return [one[most[: len(one)]] for one in found] if len(found) > 1 else found

    own = batches[processes.index :: processes.count]
    if tiles is not None:
        own = [[index] for chosen in own for index in chosen]
    images = SplitImages(split, model.preprocessing if tiles is None else None)
    loader = ImageLoader(images, own, workers=workers)
    try:
        for batch in loader:
            failed.update(batch.errors)
            if tiles is not None:
                found = [predict_tiles(picture, tiles, of_tiles, batch_size=batch_size) for picture in batch.images]
            else:

                def look(output: DetectorOutput, indices: list[int] = batch.indices) -> None:
                    device = output.pred_boxes.device
                    targets = [split.targets(index, classes=model.classes).to(device) for index in indices]
                    for observer in observers:
                        observer.see(output, targets, indices)

                ids = [split.image_ids[index] for index in batch.indices]
                sizes = [(height, width) for height, width in (sides[index] for index in batch.indices)]
                found = detect(batch.images, sizes, ids, **({"look": look} if observers else {}))
            for index, detections in zip(batch.indices, found, strict=True):
                yield index, kept(index, detections)
    finally:
        loader.close()
    if unreadable is None:
        _tell_of_unreadable(failed, sum(map(len, own)))


def _tell_of_unreadable(unreadable: dict[int, str], images: int) -> None:
    """Log how many of the images could not be read; DataError if none could."""
    if not unreadable:
        return
    first = unreadable[min(unreadable)]
    if len(unreadable) == images:
        raise DataError(f"none of {images} images could be read; the first: {first}", "look at this file")
    logging.getLogger(__name__).warning(
        "%d of %d images cannot be read and count as images without detections; the first: %s",
        len(unreadable),
        images,
        first,
    )


def require_same_classes(classes: ClassTable, split: DetectionDataset) -> None:
    """Raise DataError unless every class of the split is one of the model's `classes`, by id and name, or by name alone: see
    `ClassTable.ids_in`."""
    if len(classes.ids_in(split.classes)) == len(split.classes):
        return
    known, names = classes.id_to_name, {name.casefold() for name in classes.names}
    wrong = [(i, name) for i, name in split.classes.id_to_name.items() if known.get(i) != name]
    category, name = next(((i, name) for i, name in wrong if name.casefold() not in names), wrong[0])
    found = f"the model calls {category} {known[category]!r}" if category in known else "unknown to it"
    raise DataError(
        f"{split.annotation_file}: category {category} {name!r} does not fit the model: {found}",
        "evaluate on data with the classes the model was trained on, by name; `paqdetr info MODEL` lists them",
    )
