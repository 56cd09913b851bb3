"""What a detector gives for a batch of images, for losses, observers and postprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from paqdetr.models.denoising import DenoisingQueries
from paqdetr.models.proposals import Proposals
from paqdetr.paq import Mixture

if TYPE_CHECKING:
    from paqdetr.models.auxiliary import Auxiliary


@dataclass(frozen=True, slots=True)
class Decoded:
    """Predictions of all K layers, first to last.

    Attributes:
        logits: (K, B, N, C).
        boxes: (K, B, N, 4) cxcywh in [0, 1].
        counted: (K, B, N) bool, the queries that take part in matching; None: all. Others have the `BACKGROUND_LOGIT` of
            `paqdetr.structures`.
    """

    logits: Tensor
    boxes: Tensor
    counted: Tensor | None = None

    def split(self, sizes: Sequence[int]) -> list[Decoded]:
        """Predictions of groups of so many queries, in turn."""
        counted = [None] * len(sizes) if self.counted is None else self.counted.split(list(sizes), dim=2)
        logits, boxes = self.logits.split(list(sizes), dim=2), self.boxes.split(list(sizes), dim=2)
        return [Decoded(*part) for part in zip(logits, boxes, counted, strict=True)]


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
        hybrid: predictions of the hybrid queries, (K, B, N, C) and (K, B, N, 4); None outside training.
        hybrid_proposals: what the encoder chose for these, where they have heads of their own for it; None outside training.
        auxiliary: losses and queries of the auxiliary heads; None outside training.
        customised: predictions of the queries of each auxiliary head, (K, B, N, C) and (K, B, N, 4).
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    layers: Decoded
    proposals: Proposals | None
    mixture: Mixture
    denoised: Decoded | None = None
    denoising: DenoisingQueries | None = None
    hybrid: Decoded | None = None
    hybrid_proposals: Proposals | None = None
    auxiliary: Auxiliary | None = None
    customised: tuple[Decoded, ...] = ()
