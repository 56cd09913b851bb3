"""What intervals of the COCO figures cost: matching once, then AP of a thousand resamples of the images.

python benchmarks/intervals.py --json intervals.json

Boxes and detections are those of benchmarks/evaluation.py: 20 classes, 100 detections an image.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from common import provenance

from evaluation import CLASSES, made
from paqdetr.metrics import MatchTable, figure_intervals


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = provenance(threads=1, seed=0, packages=("paqdetr", "numpy", "hotcoco"))
    truth, results = made(arguments.images)
    marks = [time.process_time()]
    table = MatchTable.match(truth, results)
    marks.append(time.process_time())
    figure_intervals(table, samples=arguments.samples)
    marks.append(time.process_time())
    matching, resampling = np.diff(marks).round(2).tolist()
    report |= {
        "clock": "cpu",
        "images": arguments.images,
        "classes": CLASSES,
        "detections": len(results),
        "samples": arguments.samples,
        "matching_seconds": matching,
        "resampling_seconds": resampling,
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
