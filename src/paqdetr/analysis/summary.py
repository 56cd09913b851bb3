"""The figures of one model or two, with intervals, over all and by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from paqdetr.analysis.subject import Subject
from paqdetr.metrics.coco import FIGURE_NAMES
from paqdetr.metrics.intervals import Comparison, Difference, FigureIntervals, Interval
from paqdetr.report import plots
from paqdetr.report.section import Column, Figure, Section, Table
from paqdetr.serialize import json_number

_MEANING = {
    "AP": "mean over IoU .50 to .95 and classes",
    "AP50": "at IoU .50",
    "AP75": "at IoU .75",
    "APs": "objects below 32 x 32 pixels",
    "APm": "between",
    "APl": "above 96 x 96 pixels",
    "AR1": "recall with 1 detection a class and image",
    "AR10": "with 10",
    "AR100": "with 100",
    "ARs": "of small objects",
    "ARm": "of medium objects",
    "ARl": "of large objects",
}
_MOST_BARS = 30

Found = FigureIntervals | Comparison


def summary_section(subjects: Sequence[Subject], found: Found) -> Section:
    """The twelve COCO figures with their intervals, and what is beside them.

    Args:
        subjects: one model, or the model and the one it is held against.
        found: intervals of the one, or `compare_results(against, model)`: differences are model minus against.
    """
    first, second, differences = _parts(found)
    level = f"{100 * found.level:g} %"
    lead = (
        f"How good the detections are, by COCO's rules. Each figure has its {level} bootstrap interval over images: where it "
        "would lie on other test sets like this one. It says nothing of other trainings with other seeds."
    )
    if differences is not None:
        lead += (
            " A minus B is resampled in pairs, the same images for both; where its interval holds 0, these images do not "
            f"decide which of the two is better. {_verdict(differences['AP'], level)}"
        )
    rows = [
        {
            "figure": name,
            "meaning": _MEANING[name],
            **_cells(first.figures[name], "a"),
            **({} if second is None else _cells(second.figures[name], "b")),
            **({} if differences is None else _difference_cells(differences[name])),
        }
        for name in FIGURE_NAMES
    ]
    columns = (
        Column("figure", "figure", "text"),
        *_columns(subjects, level),
        Column("meaning", "meaning", "text"),
    )
    caption = f"COCO figures with {level} intervals from {found.samples} resamples of the images, seed {found.seed}."
    return Section(
        "summary",
        "Summary",
        lead,
        (
            _bars(subjects, first, second, level),
            Table("figures", caption, columns, tuple(rows)),
            *_beside(subjects),
        ),
    )


def class_section(subjects: Sequence[Subject], found: Found) -> Section:
    """AP of every class, in a table to sort."""
    first, second, differences = _parts(found)
    level = f"{100 * found.level:g} %"
    table = subjects[0].table
    boxes = table.positives[0].sum(axis=1)
    images = (table.positives[0] > 0).sum(axis=1)
    rows = []
    for place, name in enumerate(table.class_names):
        per_class = None if differences is None or not isinstance(found, Comparison) else found.per_class[name]
        rows.append(
            {
                "class": name,
                "boxes": int(boxes[place]),
                "images": int(images[place]),
                **_cells(first.per_class[name], "a"),
                "a_50": json_number(first.per_class_AP50[name].value),
                **({} if second is None else _cells(second.per_class[name], "b")),
                **({} if second is None else {"b_50": json_number(second.per_class_AP50[name].value)}),
                **({} if per_class is None else _difference_cells(per_class)),
            }
        )
    two = len(subjects) > 1
    mark = {"a": " A", "b": " B"} if two else {"a": "", "b": ""}
    columns = [
        Column("class", "class", "text"),
        Column("boxes", "boxes", "integer"),
        Column("images", "images", "integer"),
    ]
    for key in ("a", "b")[: len(subjects)]:
        columns += [
            Column(key, f"AP{mark[key]}"),
            Column(f"{key}_range", level, "text"),
            Column(f"{key}_50", f"AP50{mark[key]}"),
        ]
    if two:
        columns += [Column("difference", "A - B", "difference"), Column("difference_range", level, "text")]
    caption = f"AP by class with {level} intervals. A heading sorts; numbers begin with the largest."
    lead = "A class with few boxes has a wide interval: look at that before at its AP."
    parts = (Table("classes", caption, tuple(columns), tuple(rows)), *_class_bars(subjects, first, second))
    return Section("classes", "Classes", lead, parts)


# -------------------------------------------------------------------------------------------------- parts


def _parts(
    found: Found,
) -> tuple[FigureIntervals, FigureIntervals | None, dict[str, Difference] | None]:
    """A, B and A - B. `compare_results` was asked for B first."""
    if isinstance(found, Comparison):
        return found.second, found.first, found.figures
    return found, None, None


def _cells(found: Interval, key: str) -> dict[str, Any]:
    return {key: json_number(found.value), f"{key}_range": _range(found.low, found.high)}


def _difference_cells(found: Difference) -> dict[str, Any]:
    return {
        "difference": json_number(found.value),
        "difference_range": _range(found.low, found.high, sign=True),
    }


def _columns(subjects: Sequence[Subject], level: str) -> list[Column]:
    if len(subjects) == 1:
        return [Column("a", subjects[0].label), Column("a_range", level, "text")]
    return [
        Column("a", "A"),
        Column("a_range", level, "text"),
        Column("b", "B"),
        Column("b_range", level, "text"),
        Column("difference", "A - B", "difference"),
        Column("difference_range", level, "text"),
    ]


def _bars(subjects: Sequence[Subject], first: FigureIntervals, second: FigureIntervals | None, level: str) -> Figure:
    names = [name for name in FIGURE_NAMES if name not in ("AR1", "AR10")]
    axes = plots.new_axes(height=0.6 + 0.26 * len(names) * len(subjects), x="figure, 0 to 1")
    sets = [(first, plots.BLUE), (second, plots.ORANGE)][: len(subjects)]
    data = {}
    for place, (found, colour) in enumerate(sets):
        assert found is not None
        intervals = [found.figures[name] for name in names]
        label = f"{'AB'[place]}: {subjects[place].label}" if len(sets) > 1 else ""
        plots.bars(
            axes, names, [i.value for i in intervals], label=label, colour=colour, low=[i.low for i in intervals],
            high=[i.high for i in intervals], series=(place, len(sets)), form="{:.3f}",
        )  # fmt: skip
        data[subjects[place].label] = {name: i.to_json() for name, i in zip(names, intervals, strict=True)}
    if len(sets) > 1:
        plots.legend(axes, above=True, columns=2)
    caption = f"COCO figures with {level} bootstrap intervals over images."
    return plots.plot_part(axes, name="figures_bars", caption=caption, data=data)


def _beside(subjects: Sequence[Subject]) -> tuple[Table, Table]:
    """What the twelve figures do not say."""
    copies = (
        ("AP after NMS", "AP_nms", "class-wise non-maximum suppression at IoU 0.7; the gain over AP is the cost of copies"),
        ("AP50 after NMS", "AP50_nms", "likewise"),
    )  # fmt: skip
    amounts = (
        ("predictions an image", "predictions_per_image", "that score over 0.3"),
        ("boxes an image", "boxes_per_image", "to be found"),
        ("images a second", "images_per_second", "reading, model and post-processing, on this machine as busy as it was"),
    )  # fmt: skip
    found = [subject.evaluation.to_json() for subject in subjects]
    labels = [subjects[0].label] if len(subjects) == 1 else ["A", "B"]

    def table(name: str, caption: str, kind: Literal["figure", "amount"], kinds: Sequence[tuple[str, ...]]) -> Table:
        rows = [
            {
                "what": what,
                "meaning": meaning,
                **{key: one[of] for key, one in zip("ab", found, strict=False)},
            }
            for what, of, meaning in kinds
        ]
        columns = (
            Column("what", "what", "text"),
            *(Column(key, label, kind) for key, label in zip("ab", labels, strict=False)),
            Column("meaning", "meaning", "text"),
        )
        return Table(name, caption, columns, tuple(rows))

    return (
        table("copies", "What copies of one object cost.", "figure", copies),
        table("amounts", "Confidence and speed.", "amount", amounts),
    )


def _verdict(own: Difference, level: str) -> str:
    """What the comparison of AP comes to, in a sentence."""
    if math.isnan(own.value):
        return "There is nothing to compare: the ground truth has no objects."
    where = f"AP of A - B is {own.value:+.3f}, {level} interval {_range(own.low, own.high, sign=True)}"
    if own.decided:
        return f"Here {'A' if own.value > 0 else 'B'} is better: {where}."
    return f"Here they do not: {where}."


def _class_bars(
    subjects: Sequence[Subject], first: FigureIntervals, second: FigureIntervals | None
) -> tuple[Figure, ...]:
    """A plot, unless there are so many classes that the table reads better."""
    values = {name: found.value for name, found in first.per_class.items() if not math.isnan(found.value)}
    if not values or len(values) > _MOST_BARS:
        return ()
    names = sorted(values, key=lambda name: -values[name])
    sets = [first] if second is None else [first, second]
    axes = plots.new_axes(height=0.7 + 0.24 * len(names) * len(sets), x="AP")
    for place, found in enumerate(sets):
        intervals = [found.per_class[name] for name in names]
        plots.bars(
            axes, names, [i.value for i in intervals], label=f"{'AB'[place]}: {subjects[place].label}",
            colour=(plots.BLUE, plots.ORANGE)[place], low=[i.low for i in intervals],
            high=[i.high for i in intervals], series=(place, len(sets)), form="{:.2f}",
        )  # fmt: skip
    if len(sets) > 1:
        plots.legend(axes, above=True, columns=2)
    caption = "AP by class with its interval, best first."
    data = {s.label: {name: f.per_class[name].to_json() for name in names} for s, f in zip(subjects, sets, strict=True)}
    return (plots.plot_part(axes, name="classes_bars", caption=caption, data=data),)


def _range(low: float, high: float, *, sign: bool = False) -> str | None:
    if math.isnan(low):
        return None
    form = "{:+.3f} to {:+.3f}" if sign else "{:.3f} to {:.3f}"
    return form.format(low, high)
