"""AP of a trained model that is given fewer or more queries than it was trained with: nothing is trained, rows are re-sampled.

python benchmarks/query_count.py RUN [RUN ...] --data data/digits-small --json docs/results/query_count.json
python benchmarks/query_count.py --table docs/results/query_count.json        # the table of docs/plugin.md

Each RUN is a checkpoint or the folder of a run. `paqdetr.models.resize_queries` makes the other models; all are evaluated on the
test split, with and without non-maximum suppression.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import provenance

from paqdetr.data.dataset import open_split
from paqdetr.engine.evaluate import evaluate_split
from paqdetr.models import load, resize_queries

_FIGURES = ("AP", "AP50", "AP_nms", "AP50_nms", "AR100", "predictions_per_image", "boxes_per_image")


def main() -> None:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--factors", nargs="+", type=float, default=[0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="only print the table of this json")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(markdown(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    if not arguments.runs or arguments.data is None:
        parser.error("RUN and --data are needed")
    torch.set_num_threads(arguments.threads)
    report = provenance(
        threads=arguments.threads, seed=0, packages=("paqdetr", "torch", "timm", "hotcoco")
    ) | {
        "split": arguments.split,
        "models": [measure(run, arguments) for run in arguments.runs],
    }
    print(markdown(report))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(run: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one model with each number of queries."""
    trained = load(run)
    split = open_split(arguments.data, arguments.split)
    rows = []
    for factor in arguments.factors:
        count = max(round(factor * trained.config.num_queries), 1)
        model, _ = resize_queries(trained, count)
        started = time.process_time()
        figures = evaluate_split(model, split).to_json()
        seconds = time.process_time() - started
        rows.append(
            {"num_queries": count}
            | {name: round(figures[name], 5) for name in _FIGURES}
            | {"cpu_ms_per_image": round(1e3 * seconds / len(split), 2)}
        )
        print(f"{trained.name}, {count} queries: {rows[-1]}", flush=True)
    return {
        "name": trained.name,
        "queries": trained.config.queries,
        "trained_with": trained.config.num_queries,
        "images": len(split),
        "rows": rows,
    }


def markdown(report: dict[str, Any]) -> str:
    """One row a model and number of queries."""
    lines = [
        "| model | queries | AP | AP50 | AP after NMS | AR100 | predictions over 0.3 an image |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in report["models"]:
        at_home = next(row for row in model["rows"] if row["num_queries"] == model["trained_with"])
        for row in model["rows"]:
            home = row is at_home
            change = "" if home else f" ({row['AP'] - at_home['AP']:+.3f})"
            count = f"**{row['num_queries']}**" if home else str(row["num_queries"])
            lines.append(
                f"| {model['name']} | {count} | {row['AP']:.3f}{change} | {row['AP50']:.3f} | {row['AP_nms']:.3f} | "
                f"{row['AR100']:.3f} | {row['predictions_per_image']:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
