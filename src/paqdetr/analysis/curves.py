"""How precision, recall, F1 and the meaning of a score change with the score threshold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from paqdetr.analysis.subject import Judged, labels
from paqdetr.metrics.diagnosis import Calibration, calibration, precision_recall
from paqdetr.metrics.matches import RECALLS
from paqdetr.report import plots
from paqdetr.report.section import Column, Figure, Section, Table
from paqdetr.serialize import json_number, plain

_COLOURS = (plots.BLUE, plots.ORANGE)
_MOST_LINES = 7
_IOUS = (0.5, 0.75, 0.9)
# Calibration: what counts as right, and the score from which detections count.
_KINDS = ((0.5, "right at IoU .50"), (None, "share of IoU .50 to .95"))
_SCORED = 0.05


def curve_section(judged: Sequence[Judged]) -> Section:
    """Precision against recall, F1 against the threshold, and the best threshold of every class.

    Args:
        judged: one result set, or two on the same ground truth.
    """
    lead = (
        "Where to put the score threshold, and what it costs. The area under a precision-recall curve is AP. "
        "F1 is the harmonic "
        "mean of precision and recall: its peak is a threshold to start from, and a flat peak means that the "
        "choice hardly matters."
    )
    parts = [_precision_recall(judged), _classes_precision_recall(judged), _f1(judged), _best(judged)]
    return Section("curves", "Curves", lead, tuple(part for part in parts if part is not None))


def calibration_section(judged: Sequence[Judged]) -> Section:
    """Reliability: how often detections of a score are right.

    Args:
        judged: one result set, or two on the same ground truth.
    """
    lead = (
        "Whether a score is a probability. On the diagonal, detections that score 0.7 are right 70 times out "
        "of 100; below it the "
        "detector is too sure of itself, above it too modest. The expected calibration error is the mean "
        "distance from the diagonal. "
        f"Only detections that score {_SCORED:g} or more count: nearly all of a DETR's score less, rightly, "
        "and would hide the rest."
    )
    return Section("calibration", "Calibration", lead, (_reliability(judged), _calibration_table(judged)))


# ------------------------------------------------------------------------------------------------- curves


def _precision_recall(judged: Sequence[Judged]) -> Figure:
    axes = plots.new_axes(height=3.4, x="recall", y="precision, mean over classes")
    data: dict[str, Any] = {"recall": RECALLS.tolist()}
    for own, name, colour in zip(judged, labels(judged), _COLOURS, strict=False):
        rows = {f"IoU {iou:.2f}": _mean(precision_recall(own.table, iou)) for iou in _IOUS}
        rows["mean of .50 to .95"] = _mean(precision_recall(own.table, None))
        for (what, row), dash in zip(rows.items(), ("-", "--", ":", "-."), strict=True):
            plots.line(axes, RECALLS, row, label=f"{name} {what}".strip(), colour=colour, dash=dash)
        data[own.label] = {what: _listed(row) for what, row in rows.items()}
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    plots.legend(axes, outside=True)
    caption = (
        "Precision against recall, the mean over classes, at several IoU thresholds. A gap between IoU .50 "
        "and .90 is loose boxes."
    )
    return plots.plot_part(axes, name="precision_recall", caption=caption, data=data)


def _classes_precision_recall(judged: Sequence[Judged]) -> Figure | None:
    """The curves of the classes with the most objects, a panel a result set."""
    table = judged[0].table
    objects = table.positives[0].sum(axis=1)
    chosen = [int(c) for c in np.argsort(-objects, kind="stable")[:_MOST_LINES] if objects[c]]
    if not chosen:
        return None
    panels = plots.new_grid(len(judged), 1, height=3.2 * len(judged), titles=labels(judged), x="recall", y="precision")
    data: dict[str, Any] = {"recall": RECALLS.tolist()}
    for own, axes in zip(judged, panels, strict=True):
        curves = precision_recall(own.table, 0.5)
        for place, c in enumerate(chosen):
            plots.line(axes, RECALLS, curves[c], label=table.class_names[c], colour=plots.colour(place))
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        plots.legend(axes, outside=True)
        data[own.label] = {name: _listed(row) for name, row in zip(table.class_names, curves, strict=True)}
    which = "each class" if len(chosen) == len(table.class_names) else f"the {len(chosen)} classes with most objects"
    caption = f"Precision against recall of {which}, at IoU .50."
    return plots.plot_part(panels[0], name="precision_recall_classes", caption=caption, data=data)


def _f1(judged: Sequence[Judged]) -> Figure:
    axes = plots.new_axes(height=3.4, x="score threshold", y="over all classes")
    data = {}
    for own, name, colour in zip(judged, labels(judged), _COLOURS, strict=False):
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
        for own, name in zip(judged, labels(judged), strict=True)
        if not math.isnan(own.curves.best_threshold[-1])
    ]
    caption = "F1, precision and recall of all classes together against the score threshold, at IoU .50."
    if peaks:
        caption += f" The dot marks the best F1. {'; '.join(peaks)}."
    return plots.plot_part(axes, name="f1", caption=caption, data=data)


def _best(judged: Sequence[Judged]) -> Table:
    """The best threshold of every class, and what it gives."""
    rows = []
    for c, name in enumerate((*judged[0].table.class_names, "all together")):
        row: dict[str, Any] = {"class": name}
        for key, own in zip("ab", judged, strict=False):
            row[f"{key}_threshold"] = json_number(own.curves.best_threshold[c])
            row[f"{key}_f1"] = json_number(own.curves.best_f1[c])
        rows.append(row)
    columns = [Column("class", "class", "text")]
    for key, mark in zip("ab", ("",) if len(judged) == 1 else (" A", " B"), strict=False):
        columns += [Column(f"{key}_threshold", f"threshold{mark}"), Column(f"{key}_f1", f"F1{mark}")]
    caption = (
        "The score threshold of the best F1, by class, at IoU .50. They were chosen on these images: on "
        "others F1 is a little lower."
    )
    return Table("best_thresholds", caption, tuple(columns), tuple(rows))


# -------------------------------------------------------------------------------------------- calibration


def _reliability(judged: Sequence[Judged]) -> Figure:
    panels = plots.new_grid(
        1,
        2,
        height=3.2,
        titles=["found, at IoU .50", "and how well, IoU .50 to .95"],
        x="score",
        y="accuracy",
    )
    data: dict[str, Any] = {}
    for (iou, what), axes in zip(_KINDS, panels, strict=True):
        axes.plot([0, 1], [0, 1], ":", color=plots.MUTED, linewidth=1)
        for own, name, colour in zip(judged, labels(judged), _COLOURS, strict=False):
            found = calibration(own.table, iou_threshold=iou, score_threshold=_SCORED)
            filled = found.counts > 0
            plots.line(axes, found.confidence[filled], found.accuracy[filled], label=name, colour=colour, marker="o")
            data.setdefault(own.label, {})[what] = found.to_json()
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
    plots.legend(panels[0])
    caption = (
        "Left: the share of detections that found an object. Right: the mean share of the ten IoU thresholds "
        "at which they did, so that "
        "a score on the diagonal also says how well the box fits. Ten bins of the score; a bin of few detections is uncertain."
    )
    return plots.plot_part(panels[0], name="reliability", caption=caption, data=data)


def _calibration_table(judged: Sequence[Judged]) -> Table:
    names = ("all together", *judged[0].table.class_names)
    rows = []
    for place, name in enumerate(names):
        row: dict[str, Any] = {"class": name}
        for key, own in zip("ab", judged, strict=False):
            found = [_of_class(own, iou, place - 1) for iou, _ in _KINDS]
            row[f"{key}_n"] = int(found[0].counts.sum())
            row[f"{key}_found"], row[f"{key}_fits"] = (json_number(one.error) for one in found)
        rows.append(row)
    columns = [Column("class", "class", "text")]
    for key, mark in zip("ab", ("",) if len(judged) == 1 else (" A", " B"), strict=False):
        columns += [
            Column(f"{key}_n", f"detections{mark}", "integer"),
            Column(f"{key}_found", f"error{mark}"),
            Column(f"{key}_fits", f"with fit{mark}"),
        ]
    caption = "Expected calibration error, 0 at best: of being right at IoU .50, and of how well the box fits."
    return Table("calibration", caption, tuple(columns), tuple(rows))


def _of_class(own: Judged, iou: float | None, place: int) -> Calibration:
    chosen = None if place < 0 else place
    return calibration(own.table, iou_threshold=iou, score_threshold=_SCORED, class_index=chosen)


# -------------------------------------------------------------------------------------------------- parts


def _mean(curves: np.ndarray) -> np.ndarray:
    """The mean of the classes that have objects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no class has any: NaN
        return np.nanmean(curves, axis=0)


def _listed(values: np.ndarray) -> list[float | None]:
    return plain(values)
