"""What a detector gets wrong: the six kinds of mistakes, and which class is taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from paqdetr.analysis.curves import calibration_section, curve_section
from paqdetr.analysis.subject import Judged, labels
from paqdetr.metrics.diagnosis import MISTAKES, Confusion, ErrorSplit, confusion, error_split
from paqdetr.report import plots
from paqdetr.report.section import Column, Figure, Section, Table

_COLOURS = (plots.BLUE, plots.ORANGE)
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


def diagnosis_sections(judged: Sequence[Judged]) -> tuple[Section, ...]:
    """Curves, mistakes, confusion and calibration.

    Args:
        judged: one result set, or two on the same ground truth, which are then shown side by side.
    """
    return (
        curve_section(judged),
        mistake_section(judged),
        confusion_section(judged),
        calibration_section(judged),
    )


def mistake_section(judged: Sequence[Judged]) -> Section:
    """The error split of TIDE: what AP50 would gain, and how many there are.

    Args:
        judged: one result set, or two on the same ground truth.
    """
    everything = [error_split(own.truth, own.results, iou_type=own.iou_type) for own in judged]
    confident = [
        error_split(own.truth, own.results, iou_type=own.iou_type, score_threshold=own.confident) for own in judged
    ]
    lead = (
        "Where AP is lost, after TIDE (Bolya et al., 2020). Each bar is what AP50 would gain were one kind of "
        "mistake mended and all "
        "else left as it is: the longest says what to work on. Gains do not add up, since mending one mistake uncovers another."
    )
    return Section(
        "mistakes",
        "Mistakes",
        lead,
        (_gains(judged, everything), _mistake_table(judged, everything, confident)),
    )


def confusion_section(judged: Sequence[Judged]) -> Section:
    """Which class is taken for which.

    Args:
        judged: one result set, or two on the same ground truth.
    """
    lead = (
        "Which class is taken for which, at IoU .50. Objects are first matched with detections of their "
        "class, as AP does it; what is "
        "left over is then matched whatever its class. The last column counts objects that nothing found, the "
        "last row detections of "
        "nothing."
    )
    found = [
        confusion(own.truth, own.results, iou_type=own.iou_type, score_threshold=own.confident, table=own.table)
        for own in judged
    ]
    parts: list[Figure | Table] = []
    for place, (own, matrix) in enumerate(zip(judged, found, strict=True)):
        parts.append(_matrix(own, matrix, labels(judged)[place], "ab"[place]))
        parts.append(_confused(matrix, labels(judged)[place], "ab"[place]))
    return Section("confusion", "Confusion", lead, tuple(parts))


# ----------------------------------------------------------------------------------------------- mistakes


def _gains(judged: Sequence[Judged], found: Sequence[ErrorSplit]) -> Figure:
    axes = plots.new_axes(height=0.7 + 0.3 * len(MISTAKES) * len(judged), x="gain of AP50 if mended")
    for place, (split, name) in enumerate(zip(found, labels(judged), strict=True)):
        plots.bars(
            axes,
            list(MISTAKES),
            [split.gains[kind] for kind in MISTAKES],
            label=name,
            colour=_COLOURS[place],
            series=(place, len(found)),
            form="{:.3f}",
        )
    plots.legend(axes)
    said = [
        f"{f'{name}: ' if name else ''}AP50 is {split.ap:.3f}; without false positives it would gain "
        f"{split.false_positives:.3f}, "
        f"without objects missed {split.false_negatives:.3f}"
        for split, name in zip(found, labels(judged), strict=True)
    ]
    caption = f"What AP50 would gain were one kind of mistake mended. {'; '.join(said)}."
    data = {own.label: split.to_json() for own, split in zip(judged, found, strict=True)}
    return plots.plot_part(axes, name="mistakes", caption=caption, data=data)


def _mistake_table(
    judged: Sequence[Judged], everything: Sequence[ErrorSplit], confident: Sequence[ErrorSplit]
) -> Table:
    rows = []
    for kind, meaning in _MEANING.items():
        row: dict[str, Any] = {"kind": kind, "meaning": meaning}
        for key, gains, counts in zip("ab", everything, confident, strict=False):
            row[f"{key}_gain"], row[f"{key}_count"] = gains.gains[kind], counts.counts[kind]
        rows.append(row)
    columns = [Column("kind", "mistake", "text")]
    for key, mark in zip("ab", ("",) if len(judged) == 1 else (" A", " B"), strict=False):
        columns += [Column(f"{key}_gain", f"gain{mark}"), Column(f"{key}_count", f"count{mark}", "integer")]
    columns.append(Column("meaning", "a detection", "text"))
    thresholds = " and ".join(f"{own.confident:.2f}" for own in judged)
    caption = f"Gains of AP50 with all detections; counts of those that score {thresholds} or more, where F1 is best."
    return Table("mistake_counts", caption, tuple(columns), tuple(rows))


# ---------------------------------------------------------------------------------------------- confusion


def _matrix(own: Judged, found: Confusion, name: str, key: str) -> Figure:
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
    axes = plots.new_axes(
        width=max(4.2, min(side + 1.2, 10.0)),
        height=max(2.8, min(side, 9.0)),
        title=name,
        x="detected as",
        y="object",
    )
    plots.heat_map(axes, shown, rows=names, columns=names, bar="share of the row", low=0.0, high=1.0)
    caption = (
        "Of the objects of each class (row), the share that was detected as each class, at IoU .50 and a "
        f"score of {own.confident:.2f} "
        "or more, where F1 is best. The last row shares out the detections of nothing by class."
    )
    if classes > _MOST_CLASSES:
        caption += f" Shown are the {_MOST_CLASSES} classes with the most confusions of {classes}; the json has all."
    return plots.plot_part(axes, name=f"confusion_{key}", caption=caption, data=found.to_json())


def _confused(found: Confusion, name: str, key: str) -> Table:
    """The most frequent confusions of one class with another."""
    wrong = found.matrix[:-1, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
    objects = found.matrix[:-1].sum(axis=1)
    rows = [
        {
            "object": found.class_names[row],
            "detected": found.class_names[column],
            "count": int(wrong[row, column]),
            "share": float(wrong[row, column] / objects[row]),
        }
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]
    caption = f"{f'{name}. ' if name else ''}The classes most often taken for another."
    columns = (
        Column("object", "object", "text"),
        Column("detected", "detected as", "text"),
        Column("count", "count", "integer"),
        Column("share", "share of the objects", "percent"),
    )
    return Table(f"confused_{key}", caption, columns, tuple(rows))
