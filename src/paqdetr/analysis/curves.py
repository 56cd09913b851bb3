"""Two chapters of curves: of the training, epoch by epoch, and of what the detector finds, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from paqdetr.analysis.subject import COLOURS, labels, model_column
from paqdetr.evaluation.layers import StageFigures
from paqdetr.report.curves import PANELS, draw_panel
from paqdetr.report.plots import legend, line, new_axes, plot_part
from paqdetr.report.section import Column, Figure, Section, Table, make_table
from paqdetr.runs import Record


def training_section(models: Sequence[tuple[str, Sequence[Record]]]) -> Section | None:
    """AP and losses of one training or two; None if there are no records.

    Args:
        models: their names, and the records of their runs, as of `read_metrics`; none of a checkpoint outside of a run's folder.
    """
    every = zip(labels(models), COLOURS, models, strict=False)
    trainings = {name: (letter or name, colour, own) for letter, colour, (name, own) in every if own}
    if not trainings:
        return None
    parts = []
    for name in ("ap", "loss"):
        axes = new_axes(height=3.0)
        if drawn := draw_panel(axes, PANELS[name], list(trainings.values())):
            data = {own: drawn[shown] for own, (shown, *_) in trainings.items() if shown in drawn}
            parts.append(plot_part(axes, name=f"training_{name}", caption=PANELS[name].caption, data=data))
    lead = "How the training went, from the run's metrics.jsonl. Lines from step to step are running means."
    if without := [label for label, own in models if not own]:
        lead += f" {', '.join(without)}: its checkpoint lies in no run folder, so there is nothing to draw."
    return Section("training", "Training", lead, tuple(parts))


Stages = tuple[str, Sequence[StageFigures]]
"""A model's name, and its stages."""

_LEAD = (
    "What the detector would answer if it stopped earlier: after the encoder's proposals, or after any decoder layer. "
    "Where the best IoU is low from the start, the proposals miss the objects; where it stops rising, further layers "
    "refine nothing. Where AP lies far below AP without duplicates, several queries answer for one object; layers with "
    "one-to-many assignment do so by design, and the last layer, one to one, has to undo it. Where the last "
    "layer is no better without duplicates than the one before, choosing among them is all that it does."
)


def layer_section(models: Sequence[Stages]) -> Section:
    """The chapter on what each stage finds.

    Args:
        models: one, or two side by side.
    """
    return Section("layers", "Layer by layer", _LEAD, (_curves(models), _table(models)))


def _curves(models: Sequence[Stages]) -> Figure:
    names = list(dict.fromkeys(one.stage for _, stages in models for one in stages))
    places = {name: place for place, name in enumerate(names)}
    axes = new_axes(y="AP")
    for letter, (_, stages), colour in zip(labels(models), models, COLOURS, strict=False):
        known = [one for one in stages if one.AP == one.AP]
        x = [places[one.stage] for one in known]
        line(axes, x, [one.AP for one in known], colour=colour, label=f"{letter} AP".strip(), marker="o")
        after = [one.AP_nms for one in known]
        line(axes, x, after, colour=colour, label=f"{letter} without duplicates".strip(), dash=":", marker="o")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(bottom=0)
    legend(axes)
    caption = "AP of every stage's predictions, and after removing duplicates (non-maximum suppression at IoU 0.7)."
    data = {model: [one.to_json() for one in stages] for model, stages in models}
    return plot_part(axes, name="layers", caption=caption, data=data)


def _table(models: Sequence[Stages]) -> Table:
    columns = (
        *model_column(models),
        Column("stage", "stage", "text"),
        Column("best_iou", "best IoU"),
        Column("found", "found", "percent"),
        Column("AP", "AP"),
        Column("AP_nms", "AP, NMS"),
        Column("duplicates", "duplicates", "difference"),
        Column("predictions_per_image", "predictions", "amount"),
    )
    rows = [{"model": model, **one.to_json()} for model, stages in models for one in stages]
    caption = (
        "Best IoU: that of the nearest query, whatever its class and score, mean over objects; found: objects for "
        "which it is 0.5 or more. NMS: after removing duplicates, and what they cost. Predictions: per image, those that score "
        "over 0.3. Proposals of an encoder without classes have no AP."
    )
    return make_table("layer_figures", caption, columns, rows)
