"""The figures of training steps: losses and query use, summed from one record of metrics.jsonl to the next."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paqdetr.distributed import Processes
from paqdetr.losses.criterion import Criterion
from paqdetr.metrics.query_report import chance_gini, count_dead, gini
from paqdetr.metrics.query_usage import query_cosine, row_entropy
from paqdetr.models.outputs import DetectorOutput
from paqdetr.paq import Pairs
from paqdetr.structures import Targets

# Boxes with this many positives and more are counted together.
_MOST = 16


@dataclass(slots=True)
class BatchUse:
    """How a batch of a training step used its queries.

    Attributes:
        boxes: of all images.
        positives: (K,) positives of all boxes by decoder layer.
        histogram: ((K - 1) * 17,) boxes with 0, 1, ... 16 or more positives, of each layer but the last, one after the other.
        matches: (n,) matches of the last layer by query.
        mass: (m,) column sums of the mixtures; (0,) for content that is no mixture.
        gradients: (n,) norm of the loss's gradient at each content query, summed over images; there after the backward pass.
    """

    boxes: int
    positives: np.ndarray
    histogram: np.ndarray
    matches: np.ndarray
    mass: Tensor
    gradients: Tensor


def batch_use(output: DetectorOutput, pairs: Sequence[Sequence[Pairs]], boxes: Sequence[int]) -> BatchUse:
    """What a batch says of its queries.

    Args:
        output: of the detector.
        pairs: matches, [layer][image].
        boxes: in each image.
    """
    content, weights = output.mixture.content, output.mixture.weights
    n = content.shape[1]
    last = np.concatenate([pair.query_indices.numpy() for pair in pairs[-1]])
    with torch.no_grad():
        mass = content.new_zeros(0) if weights is None else weights.detach().float().sum((0, 1))
    return BatchUse(
        boxes=sum(boxes),
        positives=np.array([sum(map(len, layer)) for layer in pairs]),
        histogram=np.concatenate([[], *(_histogram(layer, boxes) for layer in pairs[:-1])]),
        matches=np.bincount(last, minlength=n),
        mass=mass,
        gradients=torch.zeros(n, device=content.device),
    )


def watch_gradients(content: Tensor, into: Tensor, *, scale: Tensor | float = 1.0) -> None:
    """Let the backward pass add the norm of the gradient at each content query to `into`, summed over images.

    Args:
        content: (B, n, d), as the decoder takes it.
        into: (n,) float32.
        scale: that the loss is multiplied by, as gradient scalers do; a tensor causes no GPU sync.
    """

    def note(gradient: Tensor) -> None:
        norms = gradient.detach().float().norm(dim=-1).sum(0) / scale
        # Where half precision overflows, the scaler leaves out the step: its gradient is not to stay in the sum.
        into.add_(norms.nan_to_num(0.0, 0.0, 0.0))

    if content.requires_grad:
        content.register_hook(note)


def mixture_figures(output: DetectorOutput, diversity: Tensor | None = None) -> dict[str, Tensor]:
    """How content queries differ: mean cosine between those of an image, entropy of mixture rows over log m, and, given the
    diversity loss before weighting, the mean absolute cosine between patterns. Scalars, where the output is."""
    with torch.no_grad():
        figures = {"query_cosine": query_cosine(output.mixture.content).mean()}
        if output.mixture.weights is not None:
            figures["mixture_entropy"] = row_entropy(output.mixture.weights).mean()
        if diversity is not None:
            figures["pattern_cosine"] = diversity.detach()
    return figures


def _histogram(pairs: Sequence[Pairs], boxes: Sequence[int]) -> np.ndarray:
    """(17,) how many boxes of a layer have 0, 1, ... positives, the last "or more"."""
    starts = np.cumsum([0, *boxes])
    owners = np.concatenate([pair.target_indices.numpy() + start for pair, start in zip(pairs, starts, strict=False)])
    positives = np.bincount(owners, minlength=int(starts[-1]))
    return np.bincount(np.minimum(positives, _MOST), minlength=_MOST + 1)


# Each process has its own share of a loss, and losses add up. These are the same kind of figure in each.
_AVERAGED = frozenset({"query_cosine", "mixture_entropy", "pattern_cosine", "grad_norm"})


class Interval:
    """Sums over the steps of this process since the last record."""

    def __init__(self) -> None:
        self.steps = self.overflowed = 0
        self.values: dict[str, float] = {}
        # Images and boxes; and what `BatchUse` has.
        self.sums: dict[str, np.ndarray] = {"counts": np.zeros(2)}
        self._started = time.perf_counter()

    def add(
        self, values: Mapping[str, float], batches: Sequence[BatchUse], images: int, *, overflowed: bool = False
    ) -> None:
        """Take in a step: its figures, and how each of its batches used queries, after the backward pass. One that the gradient
        scaler left out because half precision overflowed has no `grad_norm`."""
        self.steps += 1
        self.overflowed += overflowed
        self.sums["counts"] += [images, 0]
        for key, value in values.items():
            self.values[key] = self.values.get(key, 0.0) + value
        for batch in batches:
            self.add_use(batch)

    def add_use(self, batch: BatchUse) -> None:
        """Take in how a batch used queries."""
        self.sums["counts"] += [0, batch.boxes]
        use: dict[str, np.ndarray] = {
            "positives": batch.positives,
            "histogram": batch.histogram,
            "matches": batch.matches,
            "mass": batch.mass.cpu().double().numpy(),
            "gradients": batch.gradients.cpu().double().numpy(),
        }
        for name, values in use.items():
            self.sums[name] = self.sums.get(name, 0.0) + values

    def means(self, processes: Processes) -> dict[str, Any]:
        """Means over the steps, of all processes together; every process has to ask for them. `grad_norm` is that of the steps
        whose gradient did not overflow, None if there were none; `overflowed_steps` counts the others."""
        own = self.sums | {"values": np.array(list(self.values.values()))}
        flat = np.array(processes.sum(np.concatenate(list(own.values())).tolist()))
        ends = np.cumsum([part.size for part in own.values()])
        sums = dict(zip(own, np.split(flat, ends[:-1]), strict=True))
        images, boxes = sums.pop("counts").tolist()
        means: dict[str, Any] = {}
        for name, value in zip(self.values, sums.pop("values").tolist(), strict=True):
            shared = processes.count if name in _AVERAGED else 1
            steps = self.steps - self.overflowed if name == "grad_norm" else self.steps
            means[name] = round(value / shared / steps, 6)
        if self.overflowed:
            means |= {"grad_norm": means.get("grad_norm"), "overflowed_steps": self.overflowed}
        means["images_per_second"] = round(images / (time.perf_counter() - self._started), 3)
        if boxes and "positives" in sums:
            means["positives_per_box"] = [round(value / boxes, 4) for value in sums["positives"].tolist()]
        return means | (query_figures(sums, images=images) if "matches" in sums else {})


def query_figures(sums: Mapping[str, np.ndarray], *, images: float) -> dict[str, Any]:
    """What a record says of queries, from sums of what `BatchUse` has over so many images."""
    matches, mass, gradients = sums["matches"], sums["mass"], sums["gradients"]
    figures: dict[str, Any] = {}
    if matches.any():
        chance = chance_gini(num_queries=len(matches), images=round(images), per_image=matches.sum() / images)
        figures |= {"positives_gini": gini(matches), "positives_gini_chance": chance}
    if gradients.any():
        figures["gradient_gini"] = gini(gradients)
    if mass.any():
        figures |= {"pattern_gini": gini(mass), "dead_patterns": count_dead(mass)}
    figures = {name: round(value, 6) for name, value in figures.items()}
    layers = sums["histogram"].reshape(-1, _MOST + 1).astype(int)
    if layers.any():
        shown = int(np.flatnonzero(layers.any(0))[-1]) + 1
        figures["positives_histogram"] = {
            f"layer{i}": {str(k): int(row[k]) for k in range(shown)} for i, row in enumerate(layers, 1)
        }
    return figures


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any shapes as float32 on the CPU, in one GPU sync."""
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


class ValidationLoss:
    """An observer of an evaluation: the loss of the decoder's layers, on all images together. Denoising, proposals and other
    losses of training mode are left out, and every layer is matched one-to-one, so that the values of a training compare.
    """

    def __init__(self, criterion: Criterion) -> None:
        self._criterion = criterion
        self._sums: dict[str, float] = {}
        self._boxes = 0

    def see(self, output: DetectorOutput, targets: Sequence[Targets], indices: Sequence[int]) -> None:
        """Take in a batch."""
        report = self._criterion(replace(output, proposals=None), targets, progress=1.0, num_boxes=1.0)
        for name, value in grouped(
            dict(zip(report.terms, torch.stack([*report.terms.values()]).tolist(), strict=True))
        ).items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._boxes += sum(map(len, targets))

    def merge(self, other: ValidationLoss) -> None:
        """Take over what another process has seen."""
        for name, value in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._boxes += other._boxes

    def means(self) -> dict[str, float]:
        """Per box: "loss" and its terms, as training records have them; empty without boxes."""
        if not self._boxes:
            return {}
        terms = {name: round(value / self._boxes, 6) for name, value in self._sums.items()}
        return {"loss": round(sum(self._sums.values()) / self._boxes, 6)} | terms

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_criterion": None}
