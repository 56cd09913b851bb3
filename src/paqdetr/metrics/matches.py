"""How every detection was matched, kept so compactly that AP and recall follow for many whole-numbered weights of images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np

from paqdetr.errors import ConfigError
from paqdetr.metrics.coco import MAX_DETECTIONS, CocoRecords, GroundTruth, IouType, Json, evaluated

RECALLS = np.linspace(0.0, 1.0, 101)
"""Where COCO reads the precision."""

# Cumulated weights held at once: 4 million numbers, 16 MB.
_BLOCK = 4_000_000


@dataclass(frozen=True, slots=True, eq=False)
class WeightedFigures:
    """COCO figures of S weightings of the images. NaN where nothing defines one, as in `CocoFigures`.

    Attributes:
        figures: name -> (S,) float64; the twelve of `FIGURE_NAMES` in their order.
        per_class: (S, C) AP of each class.
        per_class_AP50: (S, C).
    """

    figures: dict[str, np.ndarray]
    per_class: np.ndarray
    per_class_AP50: np.ndarray


def _of_class(
    weights: np.ndarray,  # (S, I)
    positives: np.ndarray,  # (S,), all above 0
    images: np.ndarray,  # (n,)
    true_positive: np.ndarray,  # (T, n)
    counted: np.ndarray,  # (T, n): not ignored
) -> np.ndarray:  # (S, T)
    found = np.zeros((len(weights), len(true_positive)))
    if not true_positive.any():
        return found
    end = int(np.flatnonzero(true_positive.any(axis=0))[-1]) + 1  # what comes later changes nothing
    images, true_positive, counted = images[:end], true_positive[:, :end], counted[:, :end]
    # What counts at one threshold counts at the others, but for the few that are matched: cumulate once, then correct.
    base = counted[-1]
    kept = np.flatnonzero(base)
    before = _cumulated(weights[:, images[kept]])  # (S, 1 + kept)
    for t, (hits, counts) in enumerate(zip(true_positive, counted, strict=True)):
        places = np.flatnonzero(hits)  # (k,)
        if not len(places):
            continue
        right = np.cumsum(weights[:, images[places]], axis=1, dtype=np.int32)  # (S, k)
        all_of_them = before[:, np.searchsorted(kept, places, side="right")]
        changed = np.flatnonzero(counts != base)
        if len(changed):
            signed = weights[:, images[changed]] * np.where(counts[changed], 1, -1).astype(np.int32)
            all_of_them = all_of_them + _cumulated(signed)[:, np.searchsorted(changed, places, side="right")]
        precision = right / (all_of_them + np.spacing(1.0))  # nothing before and weight 0: 0, not 0 / 0
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # Recalls that are read at each true positive: those above the one before it, up to its own.
        reached = np.searchsorted(RECALLS, right / positives[:, None], side="right")  # (S, k)
        read = np.diff(reached, axis=1, prepend=0)
        found[:, t] = np.einsum("sk,sk->s", best, read) / len(RECALLS)
    return found


def _cumulated(weights: np.ndarray) -> np.ndarray:
    """(S, n) -> (S, n + 1): the sum of the first 0, 1, ... n."""
    sums = np.zeros((weights.shape[0], weights.shape[1] + 1), np.int32)
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


AREAS = ("all", "small", "medium", "large")
"""Sizes of objects: all, below 32^2, between, and above 96^2 square pixels."""

# Image and class pairs that are asked for at once: their matches are Python lists, of some 10 kB a pair, and of many pairs
# each takes longer than of few.
_PAIRS_AT_ONCE = 200


@dataclass(frozen=True, slots=True, eq=False)
class MatchTable:
    """The matches of one result set under COCO's rules; A = 4 object sizes, T = 10 IoU thresholds, C classes, I images.

    The N detections are those that COCO looks at, the best `max_detections` of each class in each image, class after class and
    within a class by falling score; equal scores in the order of COCO: by image, then as in the results.

    Attributes:
        image_ids: (I) the ids of the ground truth, ascending if all are integers, else as listed; weights and `images` are in
            this order.
        category_ids: (C) the ids of the ground truth, ascending; classes are in this order.
        class_names: (C).
        iou_thresholds: (T,) .50, .55, ... .95.
        offsets: (C + 1,) int64; class c has the detections `offsets[c]:offsets[c + 1]`.
        scores: (N,) float64.
        images: (N,) int32, positions in `image_ids`.
        ranks: (N,) int32, position among the detections of its class and image, 0 the best.
        detections: (N,) int64, positions in the results that were matched.
        true_positive: (A, T, N) bool.
        ignored: (A, T, N) bool, neither right nor wrong: matched to a crowd or to an object of another size, or unmatched
            and itself of another size.
        matches: (T, N) int32, positions in the annotations of the ground truth that detections were matched to, crowds
            included, whatever the size; -1 for none.
        positives: (A, C, I) int32, objects to be found.
        max_detections: of a class in an image.
    """

    image_ids: tuple[int | str, ...]
    category_ids: tuple[int | str, ...]
    class_names: tuple[str, ...]
    iou_thresholds: np.ndarray
    offsets: np.ndarray
    scores: np.ndarray
    images: np.ndarray
    ranks: np.ndarray
    detections: np.ndarray
    true_positive: np.ndarray
    ignored: np.ndarray
    matches: np.ndarray
    positives: np.ndarray
    max_detections: int = MAX_DETECTIONS

    @classmethod
    def match(
        cls,
        ground_truth: GroundTruth,
        results: Sequence[Json],
        iou_type: IouType = "bbox",
        *,
        source: str = "",
        max_detections: int = MAX_DETECTIONS,
    ) -> MatchTable:
        """Match results with the ground truth. Arguments and errors are those of `evaluate_detections`."""
        records = CocoRecords.open(ground_truth, iou_type)
        return cls.of_records(records, records.results(results, source), max_detections=max_detections)

    @classmethod
    def of_records(
        cls, records: CocoRecords, results: list[dict[str, Any]], *, max_detections: int = MAX_DETECTIONS
    ) -> MatchTable:
        """As `match`, of records that are checked and numbered already (`records.results(...)`)."""
        truth = records.ground_truth()
        iou_type = "segm" if records.masks else "bbox"
        images, classes, scores, areas = _columns(results, records.masks)
        order = np.lexsort((-scores, images, classes))  # stable: equal scores stay as in the results
        pair_images, pair_classes = images[order], classes[order]
        ranks = np.empty(len(order), np.int32)
        ranks[order] = _positions_within_runs(pair_images, pair_classes)
        order = order[ranks[order] < max_detections]
        order = order[np.lexsort((ranks[order], images[order], -scores[order], classes[order]))]

        parameters = hotcoco.Params(iou_type)
        ranges, thresholds = np.array(parameters.area_rng), np.array(parameters.iou_thrs)
        outside = (areas < ranges[:, :1]) | (areas > ranges[:, 1:])  # (A, number of results)
        matched = np.zeros((len(ranges), len(thresholds), len(results)), bool)
        ignored = np.repeat(outside[:, None], len(thresholds), axis=1)  # right where nothing could be matched
        matches = np.full((len(thresholds), len(results)), -1, np.int32)
        _fill_in_matches(truth, results, iou_type, max_detections, matched, ignored, matches)
        return cls(
            image_ids=records.image_ids,
            category_ids=records.category_ids,
            class_names=tuple(records.class_names),
            iou_thresholds=thresholds,
            offsets=np.searchsorted(classes[order], np.arange(len(records.class_names) + 1)),
            scores=scores[order],
            images=images[order].astype(np.int32),
            ranks=ranks[order],
            detections=order,
            true_positive=(matched & ~ignored)[:, :, order],
            ignored=ignored[:, :, order],
            matches=matches[:, order],
            positives=_positives(truth["annotations"], ranges, len(records.class_names), len(truth["images"])),
            max_detections=max_detections,
        )

    def of_class(self, index: int) -> slice:
        """Where the detections of a class lie in the arrays of length N."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def threshold_index(self, iou_threshold: float) -> int:
        """Which of `iou_thresholds` is meant.

        Raises:
            ConfigError: none of them.
        """
        return threshold_index(self.iou_thresholds, iou_threshold)

    def average_precision(
        self, weights: np.ndarray | None = None, *, areas: Sequence[int] = range(len(AREAS))
    ) -> np.ndarray:
        """AP of every class, size and IoU threshold, with each image counted as often as its weight says.

        It is exactly that of the data set with each image repeated so often, unless detections of one class in one image
        have the same score: COCO's rules let their order decide, and repeated images would then take turns.

        Args:
            weights: (S, I) whole numbers from 0, or None for one of each.
            areas: which of `AREAS`.

        Returns:
            (S, len(areas), C, T) float64; NaN where the weighted images hold no object.
        """
        weights = self._weights(weights)
        samples, classes = len(weights), len(self.class_names)
        found = np.full((samples, len(areas), classes, len(self.iou_thresholds)), np.nan)
        for c in range(classes):
            own = self.of_class(c)
            rows = max(1, _BLOCK // max(own.stop - own.start, 1))
            for start in range(0, samples, rows):
                block = weights[start : start + rows]
                for a, area in enumerate(areas):
                    positives = block @ self.positives[area, c]  # (rows,)
                    defined = positives > 0
                    if defined.any():
                        hits, counted = self.true_positive[area, :, own], ~self.ignored[area, :, own]
                        of_class = _of_class(block[defined], positives[defined], self.images[own], hits, counted)
                        found[start : start + rows, a, c][defined] = of_class
        return found

    def recall(
        self,
        weights: np.ndarray | None = None,
        *,
        areas: Sequence[int] = range(len(AREAS)),
        max_detections: int | None = None,
    ) -> np.ndarray:
        """As `average_precision`: the share of objects found by the best `max_detections` of each class and image, by all if it
        is None."""
        most = max_detections or self.max_detections
        thresholds, images = len(self.iou_thresholds), len(self.image_ids)
        whole = self._weights(weights).astype(np.float64)  # whole numbers still, and products by BLAS
        found = np.full((len(whole), len(areas), len(self.class_names), thresholds), np.nan)
        for c in range(len(self.class_names)):
            own = self.of_class(c)
            early, places = self.ranks[own] < most, self.images[own]
            for a, area in enumerate(areas):
                positives = whole @ self.positives[area, c]  # (S,)
                rows = self.true_positive[area, :, own]
                hits = np.stack([np.bincount(places[row & early], minlength=images) for row in rows])  # (T, I)
                with np.errstate(invalid="ignore"):
                    found[:, a, c] = np.where(positives[:, None] > 0, (whole @ hits.T) / positives[:, None], np.nan)
        return found

    def figures(self, weights: np.ndarray | None = None) -> WeightedFigures:
        """The twelve COCO figures, and AP by class, for each row of `weights` ((S, I) or None, as above)."""
        precision = self.average_precision(weights)  # (S, A, C, T)
        recalls = self.recall(weights)
        few = [self.recall(weights, areas=(0,), max_detections=number)[:, 0] for number in (1, 10)]
        fifty, seventy_five = (self.threshold_index(iou) for iou in (0.5, 0.75))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, and meant so
            figures = {
                "AP": np.nanmean(precision[:, 0], axis=(1, 2)),
                "AP50": np.nanmean(precision[:, 0, :, fifty], axis=1),
                "AP75": np.nanmean(precision[:, 0, :, seventy_five], axis=1),
                **{f"AP{size}": np.nanmean(precision[:, a], axis=(1, 2)) for a, size in enumerate("sml", start=1)},
                "AR1": np.nanmean(few[0], axis=(1, 2)),
                "AR10": np.nanmean(few[1], axis=(1, 2)),
                "AR100": np.nanmean(recalls[:, 0], axis=(1, 2)),
                **{f"AR{size}": np.nanmean(recalls[:, a], axis=(1, 2)) for a, size in enumerate("sml", start=1)},
            }
        return WeightedFigures(figures, precision[:, 0].mean(axis=2), precision[:, 0, :, fifty])

    def _weights(self, weights: np.ndarray | None) -> np.ndarray:
        number = len(self.image_ids)
        if weights is None:
            return np.ones((1, number), np.int32)
        weights = np.asarray(weights)
        if weights.ndim != 2 or weights.shape[1] != number or weights.dtype.kind not in "iu":
            raise ValueError(f"weights: {weights.dtype} {weights.shape}, expected integers (samples, {number})")
        return weights.astype(np.int32, copy=False)


def threshold_index(thresholds: np.ndarray, iou_threshold: float) -> int:
    """Which of the IoU thresholds is meant.

    Raises:
        ConfigError: none of them.
    """
    close = np.flatnonzero(np.isclose(thresholds, iou_threshold, atol=1e-6))
    if not len(close):
        known = ", ".join(f"{threshold:.2f}" for threshold in thresholds)
        raise ConfigError(f"IoU threshold {iou_threshold}: expected one of {known}", "choose one of them")
    return int(close[0])


def _columns(results: list[dict[str, Any]], masks: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image and class from 0, score, and area in square pixels of each result."""
    images = np.array([result["image_id"] for result in results], np.int64) - 1
    classes = np.array([result["category_id"] for result in results], np.int64) - 1
    scores = np.array([result["score"] for result in results], np.float64)
    if masks:
        areas = np.array([hotcoco.mask.area(result["segmentation"]) for result in results], np.float64)
    else:
        boxes = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)
        areas = boxes[:, 2] * boxes[:, 3]
    return images, classes, scores, areas


def _positions_within_runs(*keys: np.ndarray) -> np.ndarray:
    """(N,) how far each is into its run of equal keys."""
    if not len(keys[0]):
        return np.zeros(0, np.int32)
    changes = np.concatenate([[True], np.any([key[1:] != key[:-1] for key in keys], axis=0)])
    starts = np.flatnonzero(changes)
    return (np.arange(len(changes)) - starts[np.cumsum(changes) - 1]).astype(np.int32)


def _positives(annotations: list[dict[str, Any]], ranges: np.ndarray, classes: int, images: int) -> np.ndarray:
    """(A, C, I) how many objects of each class are to be found in each image."""
    counted = [annotation for annotation in annotations if not annotation["iscrowd"]]
    places = np.array([(a["category_id"] - 1, a["image_id"] - 1) for a in counted], np.int64).reshape(-1, 2)
    areas = np.array([a["area"] for a in counted], np.float64)
    positives = np.zeros((len(ranges), classes, images), np.int32)
    for found, (low, high) in zip(positives, ranges, strict=True):
        inside = (low <= areas) & (areas <= high)
        np.add.at(found, tuple(places[inside].T), 1)
    return positives


def _fill_in_matches(
    truth: dict[str, Any],
    results: list[dict[str, Any]],
    iou_type: str,
    max_detections: int,
    matched: np.ndarray,  # (A, T, number of results), filled in
    ignored: np.ndarray,  # likewise
    matches: np.ndarray,  # (T, number of results), likewise
) -> None:
    """Ask the library for the matches of every image and class that has both objects and detections."""
    objects: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for annotation in truth["annotations"]:
        objects.setdefault((annotation["image_id"], annotation["category_id"]), []).append(annotation)
    found: dict[tuple[int, int], list[int]] = {}
    for number, result in enumerate(results):
        place = (result["image_id"], result["category_id"])
        if place in objects:
            found.setdefault(place, []).append(number)
    # Each pair becomes an image with one class of its own, so that nothing else of the image is matched along.
    pairs = list(found)
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        chosen = pairs[start : start + _PAIRS_AT_ONCE]
        objects_of_chosen = {
            "images": [dict(truth["images"][image - 1], id=n) for n, (image, _) in enumerate(chosen, start=1)],
            "categories": [{"id": 1, "name": "object"}],
            "annotations": [
                dict(own, image_id=n, category_id=1) for n, pair in enumerate(chosen, start=1) for own in objects[pair]
            ],
        }
        numbers = [number for pair in chosen for number in found[pair]]
        detected = [
            dict(results[number], image_id=n, category_id=1)
            for n, pair in enumerate(chosen, start=1)
            for number in found[pair]
        ]
        evaluation = evaluated(objects_of_chosen, detected, iou_type, max_detections)
        areas = {tuple(limits): i for i, limits in enumerate(evaluation.params.area_rng)}
        for pair in evaluation.eval_imgs:
            assert pair is not None  # it has objects and detections
            own = [numbers[i - 1] for i in pair["dtIds"]]
            area = areas[tuple(pair["aRng"])]
            matched[area][:, own] = pair["dtMatched"]
            ignored[area][:, own] = pair["dtIgnore"]
            if area == 0:
                matches[:, own] = np.array(pair["dtMatches"], np.int32) - 1  # annotations are numbered from 1
