"""The total loss of a DETR with or without PaQ: L = L_1:m + L_aux + beta * L_div (PaQ-DETR, arXiv 2603.06917).

L_1:m are layers 1..L-1 under the configured assigner; L_aux is everything one-to-one: the last layer, the encoder's proposals,
and the denoising queries, whose targets are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paqdetr.config import LossConfig
from paqdetr.losses.boxes import FlatPairs, box_losses
from paqdetr.models.decoder import Decoded
from paqdetr.models.detector import DetectorOutput
from paqdetr.models.proposals import AllTokens
from paqdetr.paq import (
    Assigner,
    CostWeights,
    FixedKAssigner,
    OneToOneAssigner,
    Pairs,
    QualityAwareAssigner,
    SimOTAAssigner,
    focal_loss,
    match_layers,
    varifocal_loss,
)
from paqdetr.structures import Targets

ClassificationLoss = Callable[[Tensor, Tensor], Tensor]

# A logit whose probability is 0 to the last bit that matters, and which half precision can hold.
_CERTAINLY_NOT = -50.0


@dataclass(frozen=True, slots=True)
class LossReport:
    """The loss of one step, taken apart.

    Attributes:
        total: scalar, the sum of `terms`.
        terms: weighted scalars by name: "layer1/class", "layer1/l1", "layer1/giou", ... for the decoder's layers from 1,
            "encoder/...", "denoising1/...", "hybrid1/...", and "diversity", which is beta * scale * L_div.
        positives_per_box: mean number of positives of a box in each decoder layer; NaN on a batch without boxes.
        pairs: the matches behind it, [layer][image].
    """

    total: Tensor
    terms: dict[str, Tensor]
    positives_per_box: list[float]
    pairs: list[list[Pairs]]


class Criterion:
    """Matches predictions with targets and sums the losses.

    Args:
        config: weights, classification loss, schedule.
        intermediate: assigner of layers 1..L-1 while several positives a box are on.
        encoder: assigner of the proposals while they are on.
        last: assigner of the last layer, and of all once they are off.
        cost_weights: of the matching cost.
    """

    def __init__(
        self,
        *,
        config: LossConfig,
        intermediate: Assigner,
        encoder: Assigner,
        last: Assigner,
        cost_weights: CostWeights,
    ) -> None:
        self.config = config
        self.intermediate, self.encoder, self.last = intermediate, encoder, last
        self.cost_weights = cost_weights
        self.aux_weights = {"diversity": config.diversity_weight * config.div_scale}
        self.classify: ClassificationLoss = (
            varifocal_loss if config.classification == "varifocal" else focal_loss
        )

    def one_to_many(self, progress: float) -> bool:
        """Whether intermediate layers use their own assigner at this share of the training, in [0, 1]."""
        return progress < self.config.one_to_many_until

    def __call__(
        self,
        output: DetectorOutput,
        targets: Sequence[Targets],
        *,
        aux_losses: dict[str, Tensor] | None = None,
        progress: float = 0.0,
        num_boxes: float | None = None,
    ) -> LossReport:
        """Losses of one batch.

        Args:
            output: of the detector in training mode.
            targets: of the B images.
            aux_losses: unweighted losses of the query source, by name; each needs a weight in `aux_weights`.
            progress: share of the training that is done, in [0, 1].
            num_boxes: normaliser: boxes in the batch over all processes divided by their number; the batch's own if None.

        Raises:
            NonFiniteError: a prediction is NaN or infinite.
        """
        device = output.pred_logits.device
        own_boxes = sum(len(target) for target in targets)
        normalizer = max(float(own_boxes if num_boxes is None else num_boxes), 1.0)
        num_layers = output.layers.logits.shape[0]

        # The encoder's proposals are matched with the decoder's layers: one transfer to the host. A loss over all tokens, and the
        # one-to-many branch, have matches of their own.
        logits, boxes = output.layers.logits, output.layers.boxes  # (K, B, n, C), (K, B, n, 4)
        names = [f"layer{i + 1}" for i in range(num_layers)]
        assigners = self._assigners(num_layers, progress)
        proposals = output.proposals
        if proposals is not None and proposals.everything is None:
            logits = torch.cat([logits, proposals.logits[None]])
            boxes = torch.cat([boxes, proposals.boxes[None]])
            names.append("encoder")
            assigners.append(self._encoder_assigner(progress))
        pairs = match_layers(logits, boxes, targets, assigners, weights=self.cost_weights, names=names)
        flat = FlatPairs.from_pairs(pairs, targets, device)
        terms = self._terms(names, logits, boxes, flat, normalizer)
        if proposals is not None and proposals.everything is not None:
            terms |= self._all_tokens(proposals.everything, targets, progress, normalizer)
        if output.hybrid is not None:
            terms |= self._hybrid(output.hybrid, targets, normalizer)
        if output.denoised is not None and output.denoising is not None:
            fixed = [Pairs(*output.denoising.positives(len(target))) for target in targets]
            copies = FlatPairs.from_pairs([fixed] * num_layers, targets, device)
            names = [f"denoising{i + 1}" for i in range(num_layers)]
            scale = normalizer * output.denoising.groups
            terms |= self._terms(names, output.denoised.logits, output.denoised.boxes, copies, scale)
        for name, value in (aux_losses or {}).items():
            terms[name] = self.aux_weights[name] * value

        counts = flat.counts(len(pairs))[:num_layers].tolist()
        return LossReport(
            total=torch.stack(list(terms.values())).sum(),
            terms=terms,
            positives_per_box=[count / own_boxes if own_boxes else float("nan") for count in counts],
            pairs=pairs[:num_layers],
        )

    def _assigners(self, num_layers: int, progress: float) -> list[Assigner]:
        middle = self.intermediate if self.one_to_many(progress) else self.last
        return [middle] * (num_layers - 1) + [self.last]

    def _encoder_assigner(self, progress: float) -> Assigner:
        return self.encoder if self.one_to_many(progress) else self.last

    def _all_tokens(
        self, tokens: AllTokens, targets: Sequence[Targets], progress: float, normalizer: float
    ) -> dict[str, Tensor]:
        """The encoder's loss where every token is "an object" (class 0) or not (Deformable DETR, two-stage)."""
        objects = [replace(target, labels=torch.zeros_like(target.labels)) for target in targets]
        # Padding and border tokens, which can never be chosen, are made certain of nothing: no loss, no gradient, no match.
        logits = tokens.logits.masked_fill(~tokens.valid[..., None], _CERTAINLY_NOT)[None]  # (1, B, S, C)
        boxes = tokens.boxes[None]
        assigner = self._encoder_assigner(progress)
        pairs = match_layers(logits, boxes, objects, [assigner], weights=self.cost_weights, names=["encoder"])
        flat = FlatPairs.from_pairs(pairs, objects, logits.device)
        return self._terms(["encoder"], logits, boxes, flat, normalizer)

    def _hybrid(self, predicted: Decoded, targets: Sequence[Targets], normalizer: float) -> dict[str, Tensor]:
        """One-to-many branch of H-DETR (arXiv 2207.13080): each box counts `hybrid_repeat` times, matched one-to-one."""
        repeat, layers = self.config.hybrid_repeat, predicted.logits.shape[0]
        repeated = [
            replace(target, labels=target.labels.repeat(repeat), boxes=target.boxes.repeat(repeat, 1))
            for target in targets
        ]
        names = [f"hybrid{i + 1}" for i in range(layers)]
        pairs = match_layers(
            predicted.logits,
            predicted.boxes,
            repeated,
            [self.last] * layers,
            weights=self.cost_weights,
            names=names,
        )
        flat = FlatPairs.from_pairs(pairs, repeated, predicted.logits.device)
        terms = self._terms(names, predicted.logits, predicted.boxes, flat, normalizer * repeat)
        return {name: self.config.hybrid_weight * value for name, value in terms.items()}

    def _terms(
        self, names: list[str], logits: Tensor, boxes: Tensor, pairs: FlatPairs, normalizer: float
    ) -> dict[str, Tensor]:
        """Weighted class, L1 and GIoU losses of each layer: (K, B, N, C), (K, B, N, 4) -> 3 K scalars."""
        l1, giou, iou = box_losses(boxes, pairs)
        goal = torch.zeros_like(logits, dtype=torch.float32)
        quality = iou.to(goal.dtype) if self.config.classification == "varifocal" else torch.ones_like(iou)
        goal[pairs.layer, pairs.image, pairs.query, pairs.label] = quality
        classification = self.classify(logits, goal).sum((1, 2, 3))
        weighted = (
            ("class", self.config.class_weight * classification),
            ("l1", self.config.l1_weight * l1),
            ("giou", self.config.giou_weight * giou),
        )
        return {
            f"{name}/{kind}": values[i] / normalizer
            for kind, values in weighted
            for i, name in enumerate(names)
        }


def build_criterion(config: LossConfig) -> Criterion:
    """The criterion that the settings describe."""
    weights = CostWeights(classification=config.class_cost, l1=config.l1_cost, giou=config.giou_cost)
    one_to_one = OneToOneAssigner(cost_weights=weights)
    assigners: dict[str, Assigner] = {
        "one_to_one": one_to_one,
        "quality_aware": QualityAwareAssigner(
            gamma=config.gamma,
            top_k=config.top_k,
            min_positives=config.min_positives,
            select=config.select,
            confidence=config.confidence,
            cost_weights=weights,
        ),
        "fixed_k": FixedKAssigner(k=config.top_k, cost_weights=weights),
        "simota": SimOTAAssigner(
            top_k=config.top_k,
            min_positives=config.min_positives,
            select="cost" if config.select == "score" else "hungarian",
            cost_weights=weights,
        ),
    }
    return Criterion(
        config=config,
        intermediate=assigners[config.assigner],
        encoder=assigners[config.encoder_assigner],
        last=one_to_one,
        cost_weights=weights,
    )
