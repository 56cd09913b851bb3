"""The curves of trainings, from the records of their metrics.jsonl: one table of panels for pages and for curves.png."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from paqdetr.report.plots import BLUE, GREEN, GREY, INK, ORANGE, PINK, RED, SKY, legend, line, ramp, whole_numbers
from paqdetr.serialize import finite_rows

Record = dict[str, Any]
Points = tuple[np.ndarray, np.ndarray]
_MOST_POINTS = 1500


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a panel: of the records of a `kind`, the value under `key`, or the sum of several."""

    label: str
    key: str | tuple[str, ...]
    colour: str = BLUE
    kind: str = "train"

    def points(self, records: Sequence[Record]) -> Points:
        """(epochs, values), where both are finite numbers."""
        keys = (self.key,) if isinstance(self.key, str) else self.key
        rows = finite_rows((own for own in records if own.get("kind") == self.kind), ("epoch", *keys))
        return rows[:, 0], rows[:, 1:].sum(axis=1)


@dataclass(frozen=True, slots=True)
class Panel:
    """A plot over epochs.

    Attributes:
        name: letters and underscores.
        title, y: heading, and name of the axis.
        caption: how to read it.
        curves: of a run, from its records.
        log: a logarithmic axis; else it begins at zero if `zero`.
        smooth: lines from step to step are running means.
        best: the highest value is written beside its point, and the axis is at least so long that noise near 0 looks flat.
    """

    name: str
    title: str
    y: str
    caption: str
    curves: tuple[Curve, ...] | Callable[[Sequence[Record]], Sequence[tuple[str, str, Points]]]
    log: bool = False
    zero: bool = False
    smooth: bool = True
    best: bool = False

    def of(self, records: Sequence[Record]) -> list[tuple[str, str, Points]]:
        """(label, colour, points) of each curve that has any."""
        if callable(self.curves):
            found = list(self.curves(records))
        else:
            found = [(curve.label, curve.colour, curve.points(records)) for curve in self.curves]
        if self.log:  # a term that is 0 throughout has no place on a log scale
            found = [(label, shade, (x[y > 0], y[y > 0])) for label, shade, (x, y) in found]
        return [one for one in found if len(one[2][0])]


def _positives(records: Sequence[Record]) -> list[tuple[str, str, Points]]:
    """Mean positives of a box in each decoder layer."""
    rows = [record for record in records if isinstance(record.get("positives_per_box"), list)]
    count = max((len(record["positives_per_box"]) for record in rows), default=0)
    found = []
    for layer, shade in enumerate(ramp(count) if count else ()):
        flat = [r | {"own": (r["positives_per_box"] + [None] * count)[layer]} for r in rows]
        name = f"layer {layer + 1}" + (" (last)" if layer == count - 1 else "")
        found.append((name, shade, Curve(name, "own").points(flat)))
    return found


_DECODER = ("loss_class", "loss_l1", "loss_giou")
PANELS: Mapping[str, Panel] = {
    panel.name: panel
    for panel in (
        Panel(
            "ap", "Average precision (best value marked)", "AP", "After each evaluation.",
            (Curve("AP50 val", "AP50", SKY, "eval"), Curve("AP val", "AP", BLUE, "eval")),
            zero=True, best=True,
        ),
        Panel(
            "loss", "Loss of training and validation", "loss",
            "Of the decoder's layers, which are what both have: in training under augmentation, and in validation of the "
            "averaged weights, where every layer is matched one-to-one. Where the validation loss rises while the other falls, "
            "the model overfits; where training falls all at once, one-to-many assignment may have ended.",
            (Curve("training", _DECODER, BLUE), Curve("validation", "loss", ORANGE, "eval")),
        ),
        Panel("total", "Training loss, all terms", "loss", "", (Curve("", "loss"),)),
        Panel(
            "terms", "Loss terms", "loss (log scale)", "",
            (
                Curve("classification", "loss_class", BLUE), Curve("L1", "loss_l1", ORANGE), Curve("GIoU", "loss_giou", GREEN),
                Curve("denoising", "loss_denoising", PINK), Curve("encoder", "loss_encoder", SKY),
                Curve("diversity", "loss_diversity", RED),
            ), log=True,
        ),
        Panel("positives", "Positive queries per box, by decoder layer", "positives per box", "", _positives, zero=True),
        Panel(
            "lr", "Learning rate", "learning rate", "Of the parts outside of the backbone.", (Curve("", "lr"),), smooth=False,
            zero=True,
        ),
        Panel("entropy", "Entropy of a query's mixture weights", "entropy / log m", "", (Curve("", "mixture_entropy"),)),
        Panel("cosine", "Likeness of content queries", "mean cosine of pairs", "", (Curve("", "query_cosine"),)),
        Panel(
            "use", "Unevenness of query use", "Gini coefficient", "",
            (
                Curve("matches", "positives_gini", BLUE), Curve("matches by chance", "positives_gini_chance", GREY),
                Curve("gradients", "gradient_gini", ORANGE), Curve("patterns", "pattern_gini", GREEN),
            ), zero=True,
        ),
        Panel("speed", "Training throughput", "images per second", "", (Curve("", "images_per_second"),), zero=True),
    )
}  # fmt: skip


def draw_panel(
    axes: Axes, panel: Panel, runs: Sequence[tuple[str, str, Sequence[Record]]], *, raw: bool = False
) -> dict[str, Any]:
    """Draw a panel of one run or more.

    Args:
        runs: (label, colour, records). Of one run each curve has its own colour; of several each run has, and curves differ by
            their dashes.
        raw: also the values that the running means are made of.

    Returns:
        the numbers, by run and curve; empty if there is nothing to draw.
    """
    data: dict[str, Any] = {}
    for run, colour, records in runs:
        for place, (label, shade, (epochs, values)) in enumerate(panel.of(records)):
            own = shade if len(runs) == 1 else colour
            name = " ".join(word for word in (run if len(runs) > 1 else "", label) if word)
            dash = "-" if len(runs) == 1 else ("-", "--", ":", "-.")[place % 4]
            dense = len(values) > 1 and panel.smooth and smoothing_window(values) > 1
            stride = -(-len(values) // _MOST_POINTS)
            if dense and raw:
                axes.plot(epochs[::stride], values[::stride], color=own, alpha=0.25, linewidth=0.7)
            shown = smoothed(values) if panel.smooth else values
            mark = "o" if len(values) <= 40 and not dense else ""
            line(axes, epochs[::stride], shown[::stride], label=name, colour=own, dash=dash, marker=mark)
            if panel.best:
                best = int(np.argmax(values))
                place_of = {
                    "xytext": (0, 5),
                    "textcoords": "offset points",
                    "ha": "center",
                    "fontsize": 8,
                    "color": INK,
                }
                axes.annotate(f"{values[best]:.3f}", (epochs[best], values[best]), **place_of)
            data.setdefault(run, {})[label or panel.name] = {"epoch": epochs, "value": values}
    if not data:
        return data
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set(xlabel="epoch", ylabel=panel.y)
    whole_numbers(axes)
    if panel.log:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter("{x:g}")  # no offset or power of ten above the axis
    if panel.zero:
        axes.set_ylim(0, max(1.12 * axes.get_ylim()[1], 0.05 if panel.best else 1e-12))
    legend(axes)
    return data


def smoothing_window(values: np.ndarray) -> int:
    """A fiftieth of the curve."""
    return max(1, len(values) // 50)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of the values of the last window, of fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - smoothing_window(values), 0)
    return (total[ends] - total[starts]) / (ends - starts)
