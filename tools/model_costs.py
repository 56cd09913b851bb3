"""Count parameters and FLOPs of every model, for the table that `paqdetr models` shows without counting.

    python tools/model_costs.py

To be run when a model is added or what it is made of changes; tests/models/test_cost.py notices. It takes minutes. The image has
800 x 1333 pixels, a multiply-add counts once, and the numbers are the same on every machine.
"""

from __future__ import annotations

from pathlib import Path

import yaml

import paqdetr
from paqdetr.models import list_models
from paqdetr.models.cost import model_cost

FILE = Path(paqdetr.__file__).parent / "configs" / "costs.yaml"


def main() -> None:
    rows = {}
    for name in list_models():
        cost = model_cost(name)
        rows[name] = {"parameters": cost.parameters, "trainable": cost.trainable, "flops": cost.flops}
    FILE.write_text(
        "# Written by tools/model_costs.py: one image of 800 x 1333 pixels, a multiply-add counted once.\n"
        + yaml.safe_dump(rows),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
