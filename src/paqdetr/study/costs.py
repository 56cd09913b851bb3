"""What runs took, and from that what others will take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paqdetr.config import Config
from paqdetr.study.results import RunResult


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds of a training by the clock of the machine that made the measurements.

    Attributes:
        seconds: None if nothing comparable was measured.
        source: what it rests on: "done", "same settings", "same data", or "arithmetic".
    """

    seconds: float | None
    source: str


class StepTimes:
    """Seconds of an optimiser step, as measured, for settings that were measured or resemble such.

    Args:
        results: of any studies.
    """

    def __init__(self, results: Sequence[RunResult]) -> None:
        self._results = [result for result in results if result.failed is None and result.cost]

    def of(self, data: str, variant: str, config: Config, steps: int, gflops: float | None = None) -> Forecast:
        """What `steps` steps will take.

        The nearest of: runs of the same data set and variant; of the same data set; runs of other settings, by the arithmetic of a
        step (`gflops` of an image times images).
        """
        batch = config.batch_size * config.accumulate
        same = [r.cost["step_seconds"] for r in self._results if (r.key.data, r.key.variant) == (data, variant)]
        if same:
            return Forecast(statistics.median(same) * steps, "same settings")
        near = [r.cost["step_seconds"] for r in self._results if r.key.data == data]
        if near:
            return Forecast(statistics.median(near) * steps, "same data")
        rates = [
            r.cost["step_seconds"] / (r.cost["gflops"] * _images(r.settings))
            for r in self._results
            if r.cost.get("gflops")
        ]
        if rates and gflops is not None:
            return Forecast(statistics.median(rates) * gflops * batch * steps, "arithmetic")
        return Forecast(None, "")


def gpu_hours(*, gflops: float, images: int, epochs: int, tflops: float) -> float:
    """GPU hours of a training by arithmetic alone.

    A multiply-add is counted once in `gflops` and is two operations; a backward pass takes twice a forward pass.

    Args:
        gflops: of one image, as `paqdetr models` shows them.
        images: of an epoch.
        tflops: 10^12 operations a second that the GPU sustains in such a training, which is a fraction of what it can.
    """
    return 2 * 3 * gflops * 1e9 * images * epochs / (tflops * 1e12) / 3600


def _images(settings: dict[str, Any]) -> int:
    return int(settings["batch_size"]) * int(settings["accumulate"])
