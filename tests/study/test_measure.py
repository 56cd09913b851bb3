"""What is measured of a run: by hand, and against the images that each figure belongs to."""

from __future__ import annotations

from pathlib import Path

from paqdetr.engine import Run
from paqdetr.study.measure import learning_curve


def test_the_loss_of_a_curve_weighs_records_by_their_steps(tmp_path: Path) -> None:
    """Records each 4 steps in epochs of 5, evaluated every second one: the last of an epoch is of a single step."""
    run = Run(tmp_path)
    for step, loss in ((4, 2.0), (5, 7.0), (8, 1.0), (10, 4.0)):
        run.append({"kind": "train", "step": step, "loss": loss})
    run.append({"kind": "eval", "step": 10, "AP": 0.5})
    run.append({"kind": "train", "step": 12, "loss": 6.0})
    run.append({"kind": "eval", "step": 12, "AP": None})
    run.append({"kind": "eval", "step": 13, "AP": 0.25})
    rows = [(row["step"], row["AP"], row["loss"]) for row in learning_curve(run)]
    assert rows == [(10, 0.5, (4 * 2 + 7 + 3 * 1 + 2 * 4) / 10), (12, None, 6.0), (13, 0.25, None)]
