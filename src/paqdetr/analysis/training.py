"""The curves of one training or two, from their runs' metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paqdetr.analysis.subject import COLOURS
from paqdetr.report import plots
from paqdetr.report.plots import smoothed, thin
from paqdetr.report.section import Figure, Section
from paqdetr.runs import Record, positives_by_layer, read_metrics, series

_MOST_POINTS = 400
_DASHES = ("-", "--")


@dataclass(frozen=True, slots=True)
class Training:
    """The records of a run, and what the report calls its model: the first or the second."""

    place: int
    label: str
    records: list[Record]


@dataclass(frozen=True, slots=True)
class _Panel:
    """A plot of one figure of the records, smoothed over a fiftieth of them where it jumps from step to step."""

    name: str
    key: str
    title: str
    y: str
    caption: str
    kind: str = "train"
    log: bool = False
    smooth: bool = True


_PANELS = (
    _Panel("ap", "AP", "AP on the validation split", "AP", "After each evaluation.", kind="eval"),
    _Panel(
        "loss",
        "loss",
        "Loss, all terms",
        "loss",
        "Of training steps; a drop may only mean that one-to-many assignment ended.",
        log=True,
    ),
    _Panel(
        "entropy",
        "mixture_entropy",
        "Entropy of a query's mixture",
        "entropy / log m",
        "At 1 every query mixes all patterns alike, and all queries are alike; at 0 each is one pattern.",
    ),
    _Panel(
        "cosine",
        "query_cosine",
        "Likeness of content queries",
        "mean cosine of pairs",
        "Near 1, nothing but their positions tells queries apart.",
    ),
    _Panel("lr", "lr", "Learning rate", "learning rate", "Of the parts outside of the backbone.", smooth=False),
)


def training_section(runs: Sequence[tuple[str, Path | None]]) -> Section | None:
    """The curves of (label, run folder); None if there is no run.

    Raises:
        DataError: a metrics.jsonl cannot be read or has no record.
    """
    trainings = [
        Training(place, label, read_metrics(folder / "metrics.jsonl"))
        for place, (label, folder) in enumerate(runs)
        if folder is not None
    ]
    if not trainings:
        return None
    parts = [*(figure for panel in _PANELS if (figure := _draw(panel, trainings)) is not None), *_positives(trainings)]
    lead = "How the training went, from the run's metrics.jsonl. Lines from step to step are running means."
    without = [label for label, folder in runs if folder is None]
    if without:
        lead += f" {', '.join(without)}: its checkpoint lies in no run folder, so there is nothing to draw."
    return Section("training", "Training", lead, tuple(parts))


def _draw(panel: _Panel, trainings: Sequence[Training]) -> Figure | None:
    curves = []
    for training in trainings:
        of_kind = [record for record in training.records if record.get("kind") == panel.kind]
        steps, values = series(of_kind, panel.key)
        if panel.log:
            steps, values = steps[values > 0], values[values > 0]
        if len(steps):
            curves.append((training.place, training.label, steps, values))
    if not curves:
        return None
    axes = plots.new_axes(height=2.6, title=panel.title, x="step", y=panel.y)
    data = {}
    for place, label, steps, values in curves:
        shown = smoothed(values) if panel.smooth and panel.kind == "train" else values
        plots.line(
            axes,
            *thin(steps, shown, _MOST_POINTS),
            colour=COLOURS[place],
            label=label if len(trainings) > 1 else "",
            dash=_DASHES[place],
            marker="o" if panel.kind == "eval" else "",
        )
        data[label] = {"step": steps, "value": values}
    if panel.log:
        axes.set_yscale("log")
    if panel.kind == "eval":
        axes.set_ylim(bottom=0)
    plots.legend(axes)
    return plots.plot_part(axes, name=f"training_{panel.name}", caption=panel.caption, data=data)


def _positives(trainings: Sequence[Training]) -> list[Figure]:
    """Positives per box by layer: one plot, the trainings side by side."""
    shown = [(t, positives_by_layer(t.records)) for t in trainings]
    shown = [(training, layers) for training, layers in shown if len(layers)]
    if not shown:
        return []
    titles = [training.label if len(shown) > 1 else "Positives per box" for training, _ in shown]
    grid = plots.new_grid(1, len(shown), height=2.8, titles=titles, x="step", y="positives per box")
    data = {}
    for axes, (training, layers) in zip(grid, shown, strict=True):
        for (layer, (steps, values)), colour in zip(layers.items(), plots.ramp(len(layers)), strict=True):
            plots.line(axes, *thin(steps, smoothed(values), _MOST_POINTS), colour=colour, label=layer)
        data[training.label] = {layer: {"step": s, "value": v} for layer, (s, v) in layers.items()}
        axes.set_ylim(bottom=0)
    plots.legend(grid[-1])
    caption = "How many queries learn from each box, in each decoder layer. The last layer always has one."
    return [plots.plot_part(grid[0], name="training_positives", caption=caption, data=data)]
