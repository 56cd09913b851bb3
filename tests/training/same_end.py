"""What a training that was stopped and resumed has to leave."""

from __future__ import annotations

import json

import torch

from paqdetr.checkpoint import read_checkpoint
from paqdetr.runs import Run


def require_same_end(one: Run, other: Run, *, records: bool = True) -> None:
    """Bit for bit: weights, average, optimiser, generators, position; and every record, but for times. Nothing half-written
    is left.

    Args:
        records: False where metrics.jsonl was damaged.
    """
    for path in ("state_file", "last", "best"):
        (mine, header), (its, other_header) = (read_checkpoint(getattr(run, path)) for run in (one, other))
        assert mine.keys() == its.keys()
        different = [key for key in mine if not torch.equal(mine[key], its[key])]
        assert different == [], f"{path}: {len(different)} of {len(mine)} tensors, {different[:3]}"
        for found in (header, other_header):
            found.get("metrics", {}).pop("images_per_second", None)
            for key in ("metrics_size", "seconds"):
                found.get("position", {}).pop(key, None)
        assert header == other_header
    keys = {key.split(".")[0] for key in read_checkpoint(one.state_file)[0]}
    assert keys == {"model", "average", "optimizer", "random", "data"}
    assert not list(other.output.glob(".*tmp*")) and other.finished
    if not records:
        return
    for kind in ("train", "eval"):
        rows = [
            [{k: v for k, v in row.items() if k != "images_per_second"} for row in run.records(kind)]
            for run in (one, other)
        ]
        assert rows[0] == rows[1]
    assert all(json.loads(line) for line in other.metrics_file.read_text().splitlines())
