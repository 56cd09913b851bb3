"""What a detector gives for a batch of images, for losses, observers and postprocessing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paqdetr.models.denoising import DenoisingQueries
from paqdetr.models.proposals import Proposals
from paqdetr.paq import Mixture


@dataclass(frozen=True, slots=True)
class Decoded:
    """Predictions of all K layers, first to last.

    Attributes:
        logits: (K, B, N, C).
        boxes: (K, B, N, 4) cxcywh in [0, 1].
    """

    logits: Tensor
    boxes: Tensor

    def part(self, first: int, end: int | None) -> Decoded:
        """Predictions of the queries first..end - 1."""
        return Decoded(self.logits[:, :, first:end], self.boxes[:, :, first:end])


@dataclass(frozen=True, slots=True)
class DetectorOutput:
    """Everything one forward pass gives.

    Attributes:
        pred_logits: (B, n, C) of the last layer; `sigmoid` gives the probability of each class.
        pred_boxes: (B, n, 4) cxcywh in [0, 1] of the image without its padding.
        layers: predictions of all K decoder layers, the last included: (K, B, n, C) and (K, B, n, 4).
        proposals: the encoder's choice, (B, n, C) and (B, n, 4); None in one-stage hosts.
        mixture: content queries (B, n, d), and the weights (B, n, m) of pattern queries or None.
        denoised: predictions of the denoising queries, (K, B, N, C) and (K, B, N, 4); None outside training.
        denoising: how these queries are laid out; None outside training.
        hybrid: predictions of the one-to-many branch, (K, B, N, C) and (K, B, N, 4); None outside training.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    layers: Decoded
    proposals: Proposals | None
    mixture: Mixture
    denoised: Decoded | None = None
    denoising: DenoisingQueries | None = None
    hybrid: Decoded | None = None
