"""What is kept of a run: one json of some kilobytes, from which every table and plot of a study is made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.errors import DataError
from paqdetr.study.runs import RunKey

FORMAT = 1
# Replicates are kept as whole multiples of it, five digits of an AP, and as null where they are NaN.
UNIT = 1e-5


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run that is done, or one that has failed.

    Attributes:
        key: which one.
        failed: the reason; None if it is done, and then all of what follows is there.
        settings: flat, as resolved.
        measure: what was measured: split, checkpoints, replicates, seed. Another wish means to measure again.
        images: of the split, and a hash of their ids: figures of runs with the same hash are of the same images.
        figures: checkpoint -> name -> value in [0, 1], or a number an image; `per_class`, `queries` and `mistakes` are dicts,
            `layers` is a list of `StageFigures.to_json`.
        replicates: checkpoint -> name -> (R,) float64, the figure of each resample of the images, NaN where nothing defines it.
            The r-th resample is the same in all results with the same images and `measure`.
        curve: of the validation split, one dict an evaluation: step, AP, AP50, AP_nms, predictions_per_image; and loss.
        cost: seconds, step_seconds, cpu_seconds, peak_memory_gib, parameters, trainable, gflops, steps, threads.
        provenance: version, git commit, command, machine, packages.
    """

    key: RunKey
    failed: str | None
    settings: dict[str, Any]
    measure: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    replicates: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def figure(self, name: str, checkpoint: str) -> float | None:
        """A figure by the name that claims use; None if the run does not have it."""
        found: Any = self.figures.get(checkpoint, {})
        if name == "copies":
            values = [found.get("AP_nms"), found.get("AP")]
            return None if None in values else values[0] - values[1]
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return float(found) if isinstance(found, int | float) else None

    def replicate(self, name: str, checkpoint: str) -> np.ndarray | None:
        """(R,) of a figure; None where images were not resampled for it."""
        found = self.replicates.get(checkpoint, {})
        if name == "copies" and {"AP", "AP_nms"} <= found.keys():
            return found["AP_nms"] - found["AP"]
        return found.get(name)

    def to_text(self) -> str:
        """Compact json, a line for each part, so that versions of it can be compared."""
        whole = {
            checkpoint: {name: _whole(values) for name, values in named.items()}
            for checkpoint, named in self.replicates.items()
        }
        parts: dict[str, Any] = {
            "format": FORMAT,
            "data": self.key.data,
            "variant": self.key.variant,
            "seed": self.key.seed,
            "failed": self.failed,
            "measure": self.measure,
            "images": self.images,
            "figures": self.figures,
            "cost": self.cost,
            "provenance": self.provenance,
            "settings": self.settings,
            "curve": self.curve,
            "replicates": whole,
        }
        lines = [
            f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in parts.items()
        ]
        return "{" + ",\n".join(lines) + "}\n"


def read_result(path: Path) -> RunResult | None:
    """The result in a file; None if there is none.

    Raises:
        DataError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(
                f"{path}: is of format {content['format']}, this version reads {FORMAT}",
                "remove it: the next `paqdetr study --resume` measures the run again",
            )
        return RunResult(
            key=RunKey(content["data"], content["variant"], int(content["seed"])),
            failed=content["failed"],
            settings=content["settings"],
            measure=content["measure"],
            images=content["images"],
            figures=content["figures"],
            replicates={
                checkpoint: {name: np.asarray(values, np.float64) * UNIT for name, values in named.items()}
                for checkpoint, named in content["replicates"].items()
            },
            curve=content["curve"],
            cost=content["cost"],
            provenance=content["provenance"],
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is no result of a run ({error})",
            "remove it: the next `paqdetr study --resume` measures the run again",
        ) from None


def read_results(folder: Path) -> list[RunResult]:
    """All results below a folder, of one study or of several, by data set, variant and seed.

    Raises:
        DataError: a file holds something else.
    """
    files: Iterable[Path] = sorted(folder.rglob("seed*.json"))
    found = [result for result in map(read_result, files) if result is not None]
    return sorted(found, key=lambda result: result.key)


def _whole(values: np.ndarray) -> list[int | None]:
    return [None if math.isnan(value) else round(value / UNIT) for value in values.tolist()]
