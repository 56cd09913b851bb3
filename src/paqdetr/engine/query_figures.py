"""How queries are used while a model trains: what each batch says, and the figures of many.

Everything a batch says is computed where its tensors are, and crosses to the host after the step, when nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paqdetr.metrics.query_report import count_dead
from paqdetr.metrics.query_usage import query_cosine, row_entropy
from paqdetr.metrics.query_use import chance_gini, gini
from paqdetr.models.detector import DetectorOutput
from paqdetr.paq import Pairs

# Boxes with this many positives and more are counted together.
_MOST = 16
# In the order in which processes send their sums to each other.
_SUMS = ("histogram", "matches", "mass", "gradients")


@dataclass(slots=True)
class BatchUse:
    """How a batch of a training step used its queries.

    Attributes:
        positives: mean positives of a box by decoder layer; NaN without boxes.
        histogram: ((K - 1) * 17,) boxes with 0, 1, ... 16 or more positives, of each layer but the last, one after the other.
        matches: (n,) matches of the last layer by query.
        mass: (m,) column sums of the mixtures; (0,) for content that is no mixture.
        gradients: (n,) norm of the loss's gradient at each content query, summed over images; there after the backward pass.
    """

    positives: list[float]
    histogram: np.ndarray
    matches: np.ndarray
    mass: Tensor
    gradients: Tensor


def batch_use(
    output: DetectorOutput, pairs: Sequence[Sequence[Pairs]], positives: list[float], boxes: Sequence[int]
) -> BatchUse:
    """What a batch says of its queries.

    Args:
        output: of the detector.
        pairs: matches, [layer][image].
        positives: mean positives of a box by layer.
        boxes: in each image.
    """
    content, weights = output.mixture.content, output.mixture.weights
    n = content.shape[1]
    last = np.concatenate([pair.query_indices.numpy() for pair in pairs[-1]])
    with torch.no_grad():
        mass = content.new_zeros(0) if weights is None else weights.detach().float().sum((0, 1))
    return BatchUse(
        positives=positives,
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
        scale: that the loss is multiplied by, as gradient scalers do; a tensor is not waited for.
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


class QuerySums:
    """Sums of `BatchUse` over the steps of this process since the last record."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {name: np.zeros(0) for name in _SUMS}

    def add(self, batch: BatchUse) -> None:
        """Take in a batch whose backward pass is done."""
        for name in _SUMS:
            value = getattr(batch, name)
            values = value.cpu().double().numpy() if isinstance(value, Tensor) else value
            self.sums[name] = (
                values.astype(np.float64) if not self.sums[name].size else self.sums[name] + values
            )

    def flat(self) -> list[float]:
        """One list, to be summed over processes and given to `figures`."""
        return np.concatenate(list(self.sums.values())).tolist()

    def figures(self, totals: Sequence[float], *, images: float) -> dict[str, Any]:
        """What a record says.

        Args:
            totals: the sum of `flat()` over processes.
            images: of all processes.
        """
        ends = np.cumsum([value.size for value in self.sums.values()])
        parts = np.split(np.asarray(totals, dtype=np.float64), ends[:-1])
        histogram, matches, mass, gradients = parts
        figures: dict[str, Any] = {}
        if matches.any():
            chance = chance_gini(
                num_queries=len(matches), images=round(images), per_image=matches.sum() / images
            )
            figures |= {"positives_gini": gini(matches), "positives_gini_chance": chance}
        if gradients.any():
            figures["gradient_gini"] = gini(gradients)
        if mass.any():
            figures |= {"pattern_gini": gini(mass), "dead_patterns": count_dead(mass)}
        figures = {name: round(value, 6) for name, value in figures.items()}
        layers = histogram.reshape(-1, _MOST + 1).astype(int)
        if layers.any():
            shown = int(np.flatnonzero(layers.any(0))[-1]) + 1
            figures["positives_histogram"] = {
                f"layer{i}": {str(k): int(row[k]) for k in range(shown)} for i, row in enumerate(layers, 1)
            }
        return figures


def _histogram(pairs: Sequence[Pairs], boxes: Sequence[int]) -> np.ndarray:
    """(17,) how many boxes of a layer have 0, 1, ... positives, the last "or more"."""
    starts = np.cumsum([0, *boxes])
    owners = np.concatenate(
        [pair.target_indices.numpy() + start for pair, start in zip(pairs, starts, strict=False)]
    )
    positives = np.bincount(owners, minlength=int(starts[-1]))
    return np.bincount(np.minimum(positives, _MOST), minlength=_MOST + 1)
