"""The curves of one training or two, from their runs' metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paqdetr.analysis.subject import COLOURS
from paqdetr.report import plots
from paqdetr.report.curves import PANELS, draw_panel
from paqdetr.report.section import Section
from paqdetr.runs import read_metrics

_SHOWN = ("ap", "loss")


def training_section(runs: Sequence[tuple[str, Path | None]]) -> Section | None:
    """The curves of (label, run folder); None if there is no run.

    Raises:
        DataError: a metrics.jsonl cannot be read or has no record.
    """
    trainings = [
        (label, colour, read_metrics(folder / "metrics.jsonl"))
        for (label, folder), colour in zip(runs, COLOURS, strict=False)
        if folder is not None
    ]
    if not trainings:
        return None
    parts = []
    for name in _SHOWN:
        axes = plots.new_axes(height=3.0)
        data = draw_panel(axes, PANELS[name], trainings)
        if data:
            parts.append(plots.plot_part(axes, name=f"training_{name}", caption=PANELS[name].caption, data=data))
    lead = "How the training went, from the run's metrics.jsonl. Lines from step to step are running means."
    without = [label for label, folder in runs if folder is None]
    if without:
        lead += f" {', '.join(without)}: its checkpoint lies in no run folder, so there is nothing to draw."
    return Section("training", "Training", lead, tuple(parts))
