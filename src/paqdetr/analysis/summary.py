"""The figures of one model or two, with intervals, over all and by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from paqdetr.analysis.subject import COLOURS, Analysis, ModelUnderTest, marks
from paqdetr.metrics.coco import FIGURE_NAMES
from paqdetr.metrics.intervals import Comparison, Difference, FigureIntervals, Interval
from paqdetr.report import plots
from paqdetr.report.section import Column, Figure, Section, Table, make_table

_MEANING = {
    "AP": "mean over IoU .50 to .95 and classes",
    "AP50": "at IoU .50",
    "AP75": "at IoU .75",
    "APs": "objects below 32 x 32 pixels",
    "APm": "between",
    "APl": "above 96 x 96 pixels",
    "AR1": "recall with 1 detection per class and image",
    "AR10": "with 10",
    "AR100": "with 100",
    "ARs": "of small objects",
    "ARm": "of medium objects",
    "ARl": "of large objects",
}
_MOST_BARS = 30


def summary_section(analysis: Analysis) -> Section:
    """The twelve COCO figures with their intervals, and what is beside them. Differences are model minus against."""
    models, found = analysis.models, analysis.intervals
    level = f"{100 * found.level:g} %"
    lead = (
        f"How good the detections are, by COCO's rules. Each figure has its {level} bootstrap interval over images: where it "
        "would lie on other test sets like this one. It says nothing of other trainings with other seeds."
    )
    if isinstance(found, Comparison):
        lead += (
            " A minus B is resampled in pairs, the same images for both; where its interval holds 0, these images do not "
            f"decide which of the two is better. {_verdict(found.figures['AP'], level)}"
        )
    names = ["A", "B"] if len(models) > 1 else [models[0].label]
    columns = [Column("figure", "figure", "text", str)]
    for key, name, side in zip("ab", names, _sides(found), strict=False):
        columns += _interval_columns(key, name, level, lambda figure, of=side: of.figures[figure])
    if isinstance(found, Comparison):
        columns += _interval_columns("difference", "A - B", level, found.figures.__getitem__)
    columns.append(Column("meaning", "meaning", "text", _MEANING.get))
    caption = f"COCO figures with {level} intervals from {found.samples} resamples of the images, seed {found.seed}."
    table = make_table("figures", caption, columns, FIGURE_NAMES)
    return Section("summary", "Summary", lead, (_figure_bars(models, found, level), table, *_beside(models)))


def class_section(analysis: Analysis) -> Section:
    """AP of every class, in a table to sort."""
    models, found = analysis.models, analysis.intervals
    level = f"{100 * found.level:g} %"
    matches = models[0].table
    places = {name: place for place, name in enumerate(matches.class_names)}
    boxes, images = matches.positives[0].sum(axis=1), (matches.positives[0] > 0).sum(axis=1)
    columns = [
        Column("class", "class", "text", str),
        Column("boxes", "boxes", "integer", lambda name: boxes[places[name]]),
        Column("images", "images", "integer", lambda name: images[places[name]]),
    ]
    for (key, mark), side in zip(marks(models), _sides(found), strict=True):
        columns += _interval_columns(key, f"AP{mark}", level, lambda name, of=side: of.per_class[name])
        columns.append(Column(f"{key}_50", f"AP50{mark}", value=lambda name, of=side: of.per_class_AP50[name].value))
    if isinstance(found, Comparison):
        columns += _interval_columns("difference", "A - B", level, found.per_class.__getitem__)
    caption = f"AP by class with {level} intervals. A heading sorts; numbers begin with the largest."
    lead = "A class with few boxes has a wide interval: look at that before at its AP."
    table = make_table("classes", caption, columns, places)
    return Section("classes", "Classes", lead, (table, *_class_bars(models, found)))


# -------------------------------------------------------------------------------------------------- parts


def _sides(found: FigureIntervals | Comparison) -> list[FigureIntervals]:
    """A, and B if there is one: `compare_results` was asked for B first."""
    return [found.second, found.first] if isinstance(found, Comparison) else [found]


def _interval_columns(
    key: str, heading: str, level: str, interval: Callable[[str], Interval | Difference]
) -> list[Column]:
    """A figure, or a difference with its sign, and its interval."""
    sign = key == "difference"

    def limits(name: str) -> str | None:
        return _range(interval(name).low, interval(name).high, sign=sign)

    return [
        Column(key, heading, "difference" if sign else "figure", lambda name: interval(name).value),
        Column(f"{key}_range", level, "text", limits),
    ]


def _bars(
    models: Sequence[ModelUnderTest],
    name: str,
    caption: str,
    x: str,
    rows: Sequence[str],
    sides: Sequence[Mapping[str, Interval]],
    form: str,
) -> Figure:
    """Figures as bars with their intervals, those of two models beside each other."""
    axes = plots.new_axes(height=0.65 + 0.25 * len(rows) * len(sides), x=x)
    data = {}
    for place, (model, side) in enumerate(zip(models, sides, strict=True)):
        own = [side[row] for row in rows]
        plots.bars(
            axes, rows, [i.value for i in own], label=f"{'AB'[place]}: {model.label}", colour=COLOURS[place],
            low=[i.low for i in own], high=[i.high for i in own], series=(place, len(sides)), form=form,
        )  # fmt: skip
        data[model.label] = {row: interval.to_json() for row, interval in zip(rows, own, strict=True)}
    if len(sides) > 1:
        plots.legend(axes, above=True, columns=2)
    return plots.plot_part(axes, name=name, caption=caption, data=data)


def _figure_bars(models: Sequence[ModelUnderTest], found: FigureIntervals | Comparison, level: str) -> Figure:
    rows = [name for name in FIGURE_NAMES if name not in ("AR1", "AR10")]
    caption = f"COCO figures with {level} bootstrap intervals over images."
    sides = [side.figures for side in _sides(found)]
    return _bars(models, "figures_bars", caption, "figure, 0 to 1", rows, sides, "{:.3f}")


def _class_bars(models: Sequence[ModelUnderTest], found: FigureIntervals | Comparison) -> tuple[Figure, ...]:
    """A plot, unless there are so many classes that the table reads better."""
    sides = [side.per_class for side in _sides(found)]
    values = {name: own.value for name, own in sides[0].items() if not math.isnan(own.value)}
    if not values or len(values) > _MOST_BARS:
        return ()
    rows = sorted(values, key=lambda name: -values[name])
    caption = "AP by class with its interval, best first."
    return (_bars(models, "classes_bars", caption, "AP", rows, sides, "{:.2f}"),)


def _beside(models: Sequence[ModelUnderTest]) -> tuple[Table, Table]:
    """What the twelve figures do not say: (what, key, meaning)."""
    duplicates = (
        ("AP after NMS", "AP_nms", "class-wise NMS at IoU 0.7; the gain over AP is the cost of duplicates"),
        ("AP50 after NMS", "AP50_nms", "likewise"),
    )
    amounts = (
        ("predictions per image", "predictions_per_image", "that score over 0.3"),
        ("boxes per image", "boxes_per_image", "to be found"),
        (
            "images per second",
            "images_per_second",
            "reading, model and post-processing, on this machine as busy as it was",
        ),
    )
    found = [model.evaluation.to_json() for model in models]
    names = ["A", "B"] if len(models) > 1 else [models[0].label]

    def table(
        name: str, caption: str, kind: Literal["figure", "amount"], rows: Sequence[tuple[str, str, str]]
    ) -> Table:
        columns = (
            Column("what", "what", "text", lambda row: row[0]),
            *(
                Column(key, label, kind, lambda row, of=own: of[row[1]])
                for key, label, own in zip("ab", names, found, strict=False)
            ),
            Column("meaning", "meaning", "text", lambda row: row[2]),
        )
        return make_table(name, caption, columns, rows)

    return (
        table("copies", "What duplicate detections of one object cost.", "figure", duplicates),
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


def _range(low: float, high: float, *, sign: bool = False) -> str | None:
    if math.isnan(low):
        return None
    form = "{:+.3f} to {:+.3f}" if sign else "{:.3f} to {:.3f}"
    return form.format(low, high)
