"""The curves of a training: records of its metrics.jsonl as points, smoothed and thinned for a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.engine.run import json_lines
from paqdetr.errors import DataError

Record = dict[str, Any]
Points = tuple[np.ndarray, np.ndarray]
"""x and y, (P,) float64 each."""


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, in order of step.

    Lines that are no json objects with a `step` are skipped: the last one of an interrupted run is cut short.
    Where a resumed run went back to an earlier step, what it had written beyond that step is left out.

    Raises:
        DataError: the file cannot be read, or has no record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "check the run folder") from error
    records: list[Record] = []
    for record in json_lines(content):
        if not isinstance(record.get("step"), (int, float)):
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        records.append(record)
    if not records:
        raise DataError(
            f"{path}: no record in {len(content.splitlines())} lines",
            "train for at least one logging interval",
        )
    return records


def series(records: Sequence[Record], key: str, x: str = "step") -> Points:
    """The records that have both as finite numbers."""
    return _points([(record.get(x), record.get(key)) for record in records])


def positives_by_layer(records: Sequence[Record]) -> dict[str, Points]:
    """Mean positives of a box in each decoder layer that has any: "layer 1", ..."""
    rows = [r for r in records if isinstance(r.get("positives_per_box"), list)]
    count = max((len(r["positives_per_box"]) for r in rows), default=0)
    layers = {
        f"layer {layer + 1}": _points(
            [(r["step"], (r["positives_per_box"] + [None] * count)[layer]) for r in rows]
        )
        for layer in range(count)
    }
    return {name: points for name, points in layers.items() if len(points[0])}


def _points(rows: Sequence[tuple[Any, Any]]) -> Points:
    array = np.array([row for row in rows if all(map(_finite, row))], dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def smoothing_window(values: np.ndarray) -> int:
    """A fiftieth of the curve."""
    return max(1, len(values) // 50)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of the values of the last window, of fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - smoothing_window(values), 0)
    return (total[ends] - total[starts]) / (ends - starts)


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> Points:
    """Every n-th point: more than a plot has pixels only make its file heavy."""
    stride = math.ceil(len(steps) / most) or 1
    return steps[::stride], values[::stride]
