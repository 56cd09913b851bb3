"""What a detector gets wrong: curves over thresholds, six kinds of mistakes, confused classes, and calibration of scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from paqdetr.analysis.subject import COLOURS, ResultSet, labels, marks
from paqdetr.metrics.diagnosis import MISTAKES, Confusion, ErrorSplit, calibration, error_split, precision_recall
from paqdetr.metrics.matches import RECALLS
from paqdetr.report import plots
from paqdetr.report.section import Column, Figure, Section, Table, make_table
from paqdetr.serialize import plain
from paqdetr.text import figure

_MOST_LINES = 7
_IOUS = (0.5, 0.75, 0.9)
# Calibration: what counts as right, and the score from which detections count.
_KINDS = ((0.5, "right at IoU .50"), (None, "share of IoU .50 to .95"))
_SCORED = 0.05
_MOST_CLASSES = 30
_MOST_CONFUSED = 20
_NOTHING = "(nothing)"

_MEANING = {
    "classification": "on an object of another class",
    "localisation": "on an object of its class, but loosely: IoU .10 to .50",
    "both": "loosely on an object of another class",
    "duplicate": "on an object that is found already",
    "background": "on no object",
    "missed": "an object that nothing found, not even loosely or as another class",
}


def curve_section(sets: Sequence[ResultSet]) -> Section:
    """Precision against recall, F1 against the threshold, and the best threshold of every class."""
    lead = (
        "Where to put the score threshold, and what it costs. The area under a precision-recall curve is AP. "
        "F1 is the harmonic mean of precision and recall: its peak is a threshold to start from, and a flat peak means that "
        "the choice hardly matters."
    )
    parts = [_precision_recall(sets), _classes_precision_recall(sets), _f1(sets), _best(sets)]
    return Section("curves", "Curves", lead, tuple(part for part in parts if part is not None))


def calibration_section(sets: Sequence[ResultSet]) -> Section:
    """Reliability: how often detections of a score are right."""
    lead = (
        "Whether a score is a probability. On the diagonal, detections that score 0.7 are right 70 times out of 100; below it "
        "the detector is too sure of itself, above it too modest. The expected calibration error is the mean distance from "
        f"the diagonal. Only detections that score {_SCORED:g} or more count: nearly all of a DETR's score less, rightly, and "
        "would hide the rest."
    )
    return Section("calibration", "Calibration", lead, (_reliability(sets),))


# ------------------------------------------------------------------------------------------------- curves


def _precision_recall(sets: Sequence[ResultSet]) -> Figure:
    axes = plots.new_axes(height=3.4, x="recall", y="precision, mean over classes")
    data: dict[str, Any] = {"recall": RECALLS.tolist()}
    for own, name, colour in zip(sets, labels(sets), COLOURS, strict=False):
        rows = {f"IoU {iou:.2f}": _mean(precision_recall(own.table, iou)) for iou in _IOUS}
        rows["mean of .50 to .95"] = _mean(precision_recall(own.table, None))
        for (what, row), dash in zip(rows.items(), ("-", "--", ":", "-."), strict=True):
            plots.line(axes, RECALLS, row, label=f"{name} {what}".strip(), colour=colour, dash=dash)
        data[own.label] = {what: plain(row) for what, row in rows.items()}
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    plots.legend(axes, outside=True)
    caption = (
        "Precision against recall, the mean over classes, at several IoU thresholds. A gap between IoU .50 "
        "and .90 is loose boxes."
    )
    return plots.plot_part(axes, name="precision_recall", caption=caption, data=data)


def _classes_precision_recall(sets: Sequence[ResultSet]) -> Figure | None:
    """The curves of the classes with the most objects, a panel a result set."""
    table = sets[0].table
    objects = table.positives[0].sum(axis=1)
    chosen = [int(c) for c in np.argsort(-objects, kind="stable")[:_MOST_LINES] if objects[c]]
    if not chosen:
        return None
    panels = plots.new_grid(1, len(sets), height=3.4, titles=labels(sets), x="recall", y="precision")
    data: dict[str, Any] = {"recall": RECALLS.tolist()}
    for own, axes in zip(sets, panels, strict=True):
        curves = precision_recall(own.table, 0.5)
        for place, c in enumerate(chosen):
            plots.line(axes, RECALLS, curves[c], label=table.class_names[c], colour=plots.colour(place))
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        data[own.label] = {name: plain(row) for name, row in zip(table.class_names, curves, strict=True)}
    plots.legend(panels[-1], outside=True)
    which = "each class" if len(chosen) == len(table.class_names) else f"the {len(chosen)} classes with most objects"
    caption = f"Precision against recall of {which}, at IoU .50."
    return plots.plot_part(panels[0], name="precision_recall_classes", caption=caption, data=data)


def _f1(sets: Sequence[ResultSet]) -> Figure:
    axes = plots.new_axes(height=3.4, x="score threshold", y="over all classes")
    data = {}
    for own, name, colour in zip(sets, labels(sets), COLOURS, strict=False):
        found = own.curves
        for what, row, dash in (
            ("F1", found.f1, "-"),
            ("precision", found.precision, "--"),
            ("recall", found.recall, ":"),
        ):
            plots.line(axes, found.thresholds, row[-1], label=f"{name} {what}".strip(), colour=colour, dash=dash)
        if not math.isnan(found.best_threshold[-1]):
            plots.line(axes, [found.best_threshold[-1]], [found.best_f1[-1]], colour=colour, marker="o")
        data[own.label] = found.to_json()
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    plots.legend(axes, outside=True)
    peaks = [
        f"{f'{name}: ' if name else ''}F1 {own.curves.best_f1[-1]:.3f} at {own.confident:.2f}"
        for own, name in zip(sets, labels(sets), strict=True)
        if not math.isnan(own.curves.best_threshold[-1])
    ]
    caption = "F1, precision and recall of all classes together against the score threshold, at IoU .50."
    if peaks:
        caption += f" The dot marks the best F1. {'; '.join(peaks)}."
    return plots.plot_part(axes, name="f1", caption=caption, data=data)


def _best(sets: Sequence[ResultSet]) -> Table:
    """The best threshold of every class, and what it gives."""
    names = (*sets[0].table.class_names, "all together")
    columns = [Column("class", "class", "text", lambda c: names[c])]
    for (key, mark), own in zip(marks(sets), sets, strict=True):
        columns += [
            Column(f"{key}_threshold", f"threshold{mark}", value=lambda c, own=own: own.curves.best_threshold[c]),
            Column(f"{key}_f1", f"F1{mark}", value=lambda c, own=own: own.curves.best_f1[c]),
        ]
    caption = (
        "The score threshold of the best F1, by class, at IoU .50. They were chosen on these images: on others F1 is a little "
        "lower."
    )
    return make_table("best_thresholds", caption, columns, range(len(names)))


# -------------------------------------------------------------------------------------------- calibration


def _reliability(sets: Sequence[ResultSet]) -> Figure:
    titles = ["found, at IoU .50", "and how well, IoU .50 to .95"]
    panels = plots.new_grid(1, 2, height=3.2, titles=titles, x="score", y="accuracy")
    data: dict[str, Any] = {}
    errors: list[str] = []
    for (iou, what), axes in zip(_KINDS, panels, strict=True):
        axes.plot([0, 1], [0, 1], ":", color=plots.MUTED, linewidth=1)
        for own, name, colour in zip(sets, labels(sets), COLOURS, strict=False):
            found = calibration(own.table, iou_threshold=iou, score_threshold=_SCORED)
            filled = found.counts > 0
            plots.line(axes, found.confidence[filled], found.accuracy[filled], label=name, colour=colour, marker="o")
            data.setdefault(own.label, {})[what] = found.to_json()
            errors.append(f"{name} {figure(found.error)} {what} ({figure(found.chance)} by chance)".strip())
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
    plots.legend(panels[0])
    caption = (
        "Left: the share of detections that found an object. Right: the mean share of the ten IoU thresholds at which they "
        "did, so that a score on the diagonal also says how well the box fits. Ten bins of the score; a bin of few detections "
        f"is uncertain. Expected calibration error: {'; '.join(errors)}."
    )
    return plots.plot_part(panels[0], name="reliability", caption=caption, data=data)


def _mean(curves: np.ndarray) -> np.ndarray:
    """The mean of the classes that have objects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no class has any: NaN
        return np.nanmean(curves, axis=0)


def mistake_section(sets: Sequence[ResultSet]) -> Section:
    """The error split of TIDE: what AP50 would gain, and how many there are."""
    every = [own.mistakes for own in sets]
    confident = [error_split(own.truth, own.results, score_threshold=own.confident) for own in sets]
    lead = (
        "Where AP is lost, after TIDE (Bolya et al., 2020). Each bar is what AP50 would gain were one kind of mistake "
        "corrected and all else left as it is: the longest says what to work on. Gains do not add up, since correcting one "
        "mistake uncovers another."
    )
    return Section("mistakes", "Mistakes", lead, (_gains(sets, every), _mistake_table(sets, every, confident)))


def confusion_section(sets: Sequence[ResultSet]) -> Section:
    """Which class is taken for which."""
    lead = (
        "Which class is taken for which, at IoU .50. Objects are first matched with detections of their class, as AP does it; "
        "what is left over is then matched whatever its class. The last column counts objects that nothing found, the last "
        "row detections of nothing."
    )
    named = list(zip(sets, labels(sets), "ab", strict=False))
    matrices = [_matrix(own, own.confusion, label, key) for own, label, key in named]
    parts: list[Figure | Table] = [*matrices, *(_confused(own.confusion, label, key) for own, label, key in named)]
    return Section("confusion", "Confusion", lead, tuple(parts))


# ----------------------------------------------------------------------------------------------- mistakes


def _gains(sets: Sequence[ResultSet], found: Sequence[ErrorSplit]) -> Figure:
    axes = plots.new_axes(height=0.7 + 0.3 * len(MISTAKES) * len(sets), x="gain of AP50 if corrected")
    for place, (split, name) in enumerate(zip(found, labels(sets), strict=True)):
        gains, series = [split.gains[kind] for kind in MISTAKES], (place, len(found))
        plots.bars(axes, list(MISTAKES), gains, label=name, colour=COLOURS[place], series=series, form="{:.3f}")
    plots.legend(axes)
    texts = [
        f"{f'{name}: ' if name else ''}AP50 is {split.ap:.3f}; without false positives it would gain "
        f"{split.false_positives:.3f}, without objects missed {split.false_negatives:.3f}"
        for split, name in zip(found, labels(sets), strict=True)
    ]
    caption = f"What AP50 would gain were one kind of mistake corrected. {'; '.join(texts)}."
    data = {own.label: split.to_json() for own, split in zip(sets, found, strict=True)}
    return plots.plot_part(axes, name="mistakes", caption=caption, data=data)


def _mistake_table(sets: Sequence[ResultSet], every: Sequence[ErrorSplit], confident: Sequence[ErrorSplit]) -> Table:
    columns = [Column("kind", "mistake", "text", str)]
    for (key, mark), gains, counts in zip(marks(sets), every, confident, strict=True):
        columns += [
            Column(f"{key}_gain", f"gain{mark}", value=lambda kind, of=gains: of.gains[kind]),
            Column(f"{key}_count", f"count{mark}", "integer", lambda kind, of=counts: of.counts[kind]),
        ]
    columns.append(Column("meaning", "a detection", "text", _MEANING.get))
    thresholds = " and ".join(f"{own.confident:.2f}" for own in sets)
    caption = f"Gains of AP50 with all detections; counts of those that score {thresholds} or more, where F1 is best."
    return make_table("mistake_counts", caption, columns, _MEANING)


# ---------------------------------------------------------------------------------------------- confusion


def _matrix(own: ResultSet, found: Confusion, name: str, key: str) -> Figure:
    """The share of each object class that went where; of many classes those with the most confusions."""
    classes = len(found.class_names)
    chosen = np.arange(classes)
    if classes > _MOST_CLASSES:
        wrong = found.matrix.sum(axis=1)[:-1] - np.diag(found.matrix)[:-1]
        chosen = np.sort(np.argsort(-wrong, kind="stable")[:_MOST_CLASSES])
    places = np.append(chosen, classes)
    objects = found.matrix.sum(axis=1, keepdims=True)
    shares = found.matrix / np.where(objects, objects, 1)
    shown = np.where(objects > 0, shares, np.nan)[np.ix_(places, places)]
    shown[-1, -1] = np.nan
    names = [*(found.class_names[c] for c in chosen), _NOTHING]
    side = 1.6 + 0.34 * len(names)
    width, height = max(4.2, min(side + 1.2, 10.0)), max(2.8, min(side, 9.0))
    axes = plots.new_axes(width=width, height=height, title=name, x="detected as", y="object")
    plots.heat_map(axes, shown, rows=names, columns=names, bar="share of the row", low=0.0, high=1.0)
    caption = (
        "Of the objects of each class (row), the share that was detected as each class, at IoU .50 and a score of "
        f"{own.confident:.2f} or more, where F1 is best. The last row shares out the detections of nothing by class."
    )
    if classes > _MOST_CLASSES:
        caption += f" Shown are the {_MOST_CLASSES} classes with the most confusions of {classes}; the json has all."
    return plots.plot_part(axes, name=f"confusion_{key}", caption=caption, data=found.to_json())


def _confused(found: Confusion, name: str, key: str) -> Table:
    """The most frequent confusions of one class with another."""
    columns = (
        Column("object", "object", "text", lambda row: row[0]),
        Column("detected", "detected as", "text", lambda row: row[1]),
        Column("count", "count", "integer", lambda row: row[2]),
        Column("share", "share of the objects", "percent", lambda row: row[2] / row[3]),
    )
    caption = f"{f'{name}. ' if name else ''}The classes most often taken for another."
    return make_table(f"confused_{key}", caption, columns, confused_pairs(found))


def confused_pairs(found: Confusion) -> list[tuple[str, str, int, int]]:
    """(class of the object, class of the detection, count, objects of the class), the most frequent first."""
    wrong = found.matrix[:-1, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
    objects, names = found.matrix[:-1].sum(axis=1), found.class_names
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(names[i], names[j], int(wrong[i, j]), int(objects[i])) for i, j in pairs if wrong[i, j]]
