"""One side of `nano_throughput.py`: a real training that takes a step whenever it is told to.

It runs on the sources of any commit since the first slice, so it imports nothing that only later ones have.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time

from paqdetr.engine.events import Callback
from paqdetr.engine.train import train


class Turns(Callback):
    """Waits for a line before each step, and answers with what the step took."""

    def on_start(self, plan) -> None:  # type: ignore[no-untyped-def]
        settings = plan.config.model_dump(mode="json")
        self._say({"model": settings["model"], "loss": settings["loss"]})
        self._wait()

    def on_step(self, step: int, loss: float) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._say({"wall": wall, "cpu": cpu, "loss": loss, "peak_gib": round(peak, 3)})
        self._wait()

    def _say(self, what: dict) -> None:  # type: ignore[type-arg]
        print("@" + json.dumps(what), flush=True)

    def _wait(self) -> None:
        if sys.stdin.readline().strip() != "step":
            os._exit(0)  # nothing of this training is kept
        self._wall, self._cpu = time.perf_counter(), time.process_time()


if __name__ == "__main__":
    model, data, threads, settings = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        train(model, data=data, output=f"{folder}/run", callbacks=[Turns()], device="cpu", settings=settings)
