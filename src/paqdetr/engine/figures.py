"""The figures of training steps, from one record of metrics.jsonl to the next."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paqdetr.engine.processes import Processes
from paqdetr.engine.query_figures import BatchUse, QuerySums

# Each process has its own share of a loss, and losses add up. These are the same kind of figure in each.
_AVERAGED = frozenset({"query_cosine", "mixture_entropy", "pattern_cosine", "grad_norm"})


class Interval:
    """Sums over the steps of this process since the last record."""

    def __init__(self) -> None:
        self.steps = self.images = self.overflowed = 0
        self.sums: dict[str, float] = {}
        self.positives: list[float] = []  # by layer, over the batches that have boxes
        self.batches_with_boxes = 0
        self.queries = QuerySums()
        self._started = time.perf_counter()

    def add(
        self,
        values: Mapping[str, float],
        batches: Sequence[BatchUse],
        images: int,
        *,
        overflowed: bool = False,
    ) -> None:
        """Take in a step: its figures, and how each of its batches used queries. One that the gradient scaler left out because
        half precision overflowed has no `grad_norm`."""
        self.steps += 1
        self.images += images
        self.overflowed += overflowed
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        for batch in batches:
            row = batch.positives
            self.queries.add(batch)
            self.positives = self.positives or [0.0] * len(row)
            if row and not math.isnan(row[0]):
                self.positives = [total + value for total, value in zip(self.positives, row, strict=True)]
                self.batches_with_boxes += 1

    def means(self, processes: Processes) -> dict[str, Any]:
        """Means over the steps, of all processes together; every process has to ask for them. `grad_norm` is that of the steps
        whose gradient did not overflow, None if there were none; `overflowed_steps` counts the others."""
        counts = [float(self.images), float(self.batches_with_boxes)]
        queries = self.queries.flat()
        totals = processes.sum([*counts, *queries, *self.positives, *self.sums.values()])
        images, batches, *rest = totals
        queries, rest = rest[: len(queries)], rest[len(queries) :]
        positives, sums = rest[: len(self.positives)], rest[len(self.positives) :]
        means: dict[str, Any] = {}
        for name, value in zip(self.sums, sums, strict=True):
            shared = processes.count if name in _AVERAGED else 1
            steps = self.steps - self.overflowed if name == "grad_norm" else self.steps
            means[name] = round(value / shared / steps, 6)
        if self.overflowed:
            means |= {"grad_norm": means.get("grad_norm"), "overflowed_steps": self.overflowed}
        means["images_per_second"] = round(images / (time.perf_counter() - self._started), 3)
        if batches:
            means["positives_per_box"] = [round(value / batches, 4) for value in positives]
        return means | self.queries.figures(queries, images=images)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any shapes as float32 on the CPU, in one transfer: each wait for a GPU costs time, whatever it brings."""
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def grouped(terms: Mapping[str, float]) -> dict[str, float]:
    """Terms by what they are: decoder class, L1 and GIoU over all layers, encoder, denoising, diversity."""
    sums: dict[str, float] = {}
    for name, value in terms.items():
        place, _, kind = name.partition("/")
        group = kind if place.startswith("layer") else place.rstrip("0123456789")
        sums[f"loss_{group}"] = sums.get(f"loss_{group}", 0.0) + value
    return sums
