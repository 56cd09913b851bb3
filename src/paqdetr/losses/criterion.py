"""The total loss of a DETR with or without PaQ: L = L_1:m + L_aux + beta * L_div (PaQ-DETR, arXiv 2603.06917).

L_1:m are layers 1..L-1 under the configured assigner. L_aux is everything one-to-one: the last layer, the encoder's proposals,
the denoising queries, whose targets are fixed; and, with several positives per box, the hybrid queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

from paqdetr.config import LossConfig
from paqdetr.models.auxiliary import Auxiliary
from paqdetr.models.denoising import DenoisingQueries
from paqdetr.models.outputs import Decoded, DetectorOutput
from paqdetr.models.proposals import AllTokens, Proposals
from paqdetr.paq import (
    AlignedAssigner,
    Assigner,
    CostWeights,
    OneToOneAssigner,
    Pairs,
    focal_loss,
    match_layers,
    quality_focal_loss,
    varifocal_loss,
)
from paqdetr.paq.assignment import ASSIGNERS
from paqdetr.paq.costs import iou_and_giou
from paqdetr.structures import BACKGROUND_LOGIT, Targets


@dataclass(frozen=True, slots=True)
class FlatPairs:
    """All matched pairs of K layers and B images as flat index tensors, each (P,) int64, with their truth.

    Attributes:
        layer, image, query: where the prediction stands in (K, B, N).
        label: its class.
        box: (P, 4) cxcywh it should have.
        weight: (P,) how much of a positive it is; None if all pairs are whole ones.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    label: Tensor
    box: Tensor
    weight: Tensor | None = None

    @classmethod
    def from_pairs(
        cls, pairs: Sequence[Sequence[Pairs]], targets: Sequence[Targets], device: torch.device
    ) -> FlatPairs:
        """From [layer][image] -> Pairs; indices travel to the device in one go."""
        offsets = [0]
        for target in targets:
            offsets.append(offsets[-1] + len(target))
        rows = [
            torch.stack(
                [
                    torch.full_like(found.query_indices, layer),
                    torch.full_like(found.query_indices, image),
                    found.query_indices,
                    found.target_indices + offsets[image],
                ]
            )
            for layer, row in enumerate(pairs)
            for image, found in enumerate(row)
        ]
        layer, image, query, truth = torch.cat(rows, dim=1).to(device)
        labels = torch.cat([target.labels for target in targets]).to(device)
        boxes = torch.cat([target.boxes for target in targets]).to(device)
        weight = None
        if any(found.weights is not None for row in pairs for found in row):
            parts = [_weights_of(found) for row in pairs for found in row]
            weight = torch.cat(parts).to(device, boxes.dtype)
        return cls(layer, image, query, labels[truth], boxes[truth], weight)


def _weights_of(pairs: Pairs) -> Tensor:
    if pairs.weights is None:
        return torch.ones(len(pairs), dtype=torch.float64)
    return pairs.weights.to(torch.float64)


def box_losses(pred_boxes: Tensor, pairs: FlatPairs) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the pairs of each layer.

    Args:
        pred_boxes: (K, B, N, 4) cxcywh.
        pairs: of the K layers; weighted ones count by their weight.

    Returns:
        L1 (K,), GIoU loss (K,), and the detached IoU of every pair (P,), at least float32.
    """
    predicted = pred_boxes[pairs.layer, pairs.image, pairs.query]  # (P, 4)
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    truth = pairs.box.to(predicted.dtype)
    l1 = (predicted - truth).abs().sum(-1)
    corners, truth_corners = box_convert(predicted, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
    # The default eps, 1e-7, is a tenth of the area of one pixel of 800 x 1333.
    giou = generalized_box_iou_loss(corners, truth_corners, eps=1e-12)
    with torch.no_grad():
        iou, _ = iou_and_giou(predicted.T, truth.T)
    if pairs.weight is not None:
        weight = pairs.weight.to(predicted.dtype)
        l1, giou = weight * l1, weight * giou
    zero = predicted.new_zeros(pred_boxes.shape[0])
    return zero.index_add(0, pairs.layer, l1), zero.index_add(0, pairs.layer, giou), iou


Terms = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class LossReport:
    """The loss of one step, taken apart.

    Attributes:
        total: scalar, the sum of `terms`.
        terms: weighted scalars by name: "layer1/class", "layer1/l1", "layer1/giou", ... for the decoder's layers from 1,
            "encoder/...", "denoising1/...", "hybrid1/...", "hybrid_encoder/...", "atss/...", "rpn/...", "rcnn/...",
            "customised_atss1/...", and "diversity", which is beta * scale * L_div.
        positives_per_box: mean number of positives of a box in each decoder layer; NaN on a batch without boxes.
        pairs: the matches behind "layer1", "layer2", ...: [layer][image].
    """

    total: Tensor
    terms: Terms
    positives_per_box: list[float]
    pairs: list[list[Pairs]]


class Criterion:
    """Matches predictions with targets and sums the losses.

    Args:
        config: weights, classification loss, schedule.
        intermediate: assigner of layers 1..L-1 while one-to-many assignment is on.
        encoder: assigner of the encoder's proposals while it is on.
        last: assigner of the last layer, and of all once it is off.
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
        self.classify = CLASSIFICATION[config.classification]
        if config.classification == "varifocal":
            self.classify = partial(varifocal_loss, alpha=config.varifocal_alpha)

    def one_to_many(self, progress: float) -> bool:
        """Whether intermediate layers use their own assigner at this share of the training, in [0, 1]."""
        return self.config.one_to_many_from <= progress < self.config.one_to_many_until

    def assigners(self, progress: float) -> tuple[Assigner, Assigner]:
        """Of the intermediate layers, and of the encoder's proposals, at this share of the training."""
        return (self.intermediate, self.encoder) if self.one_to_many(progress) else (self.last, self.last)

    def __call__(
        self,
        output: DetectorOutput,
        targets: Sequence[Targets],
        *,
        aux_losses: dict[str, Tensor] | None = None,
        progress: float = 0.0,
        num_boxes: float | None = None,
        share: float = 1.0,
    ) -> LossReport:
        """Losses of one batch.

        Args:
            output: of the detector in training mode.
            targets: of the B images.
            aux_losses: unweighted losses of the query source, by name; each needs a weight in `aux_weights`.
            progress: share of the training that is done, in [0, 1].
            num_boxes: what losses are divided by: the boxes of the whole step, in all of its batches and processes, so that their
                losses add up to that of one large batch (where data parallelism takes the mean of gradients, multiply the loss by
                the number of processes); the batch's own boxes if None.
            share: of the step that this batch is, for losses that no number of boxes divides: `aux_losses` and auxiliary heads.

        Raises:
            ValueError: targets are not what `Targets` says, an auxiliary loss has no weight, or class-agnostic proposals come
                from a model in evaluation mode.
            NonFiniteError: a prediction is NaN or infinite.
        """
        own_boxes = sum(map(len, targets))
        divisor = max(float(own_boxes if num_boxes is None else num_boxes), 1.0)
        num_layers = len(output.layers.logits)
        intermediate, encoder = self.assigners(progress)

        # L_1:m, and of L_aux the last layer and the proposals: matched together, with one transfer to the host.
        names = [f"layer{i + 1}" for i in range(num_layers)]
        assigners = [intermediate] * (num_layers - 1) + [self.last]
        predicted, tokens = output.layers, None
        if output.proposals is not None:
            tokens = output.proposals.all_tokens
            if tokens is None:
                predicted = _with_proposals(predicted, output.proposals)
                names, assigners = [*names, "encoder"], [*assigners, encoder]
        terms, pairs = self._matched(names, predicted, targets, assigners, divisor)

        # The rest of L_aux
        if tokens is not None:
            terms |= self._all_tokens(tokens, targets, encoder, divisor)
        if output.hybrid is not None:
            hybrid, names = output.hybrid, [f"hybrid{i + 1}" for i in range(len(output.hybrid.logits))]
            if output.hybrid_proposals is not None:
                hybrid, names = _with_proposals(hybrid, output.hybrid_proposals), [*names, "hybrid_encoder"]
            loss = self._aligned if self.config.hybrid_loss == "aligned" else self._repeated
            terms |= {
                name: self.config.hybrid_weight * value for name, value in loss(names, hybrid, targets, divisor).items()
            }
        if output.denoised is not None and output.denoising is not None:
            terms |= self._denoising(output.denoised, output.denoising, targets, divisor)
        if output.auxiliary is not None:
            terms |= self._auxiliary(output.auxiliary, output.customised, targets, num_layers, share)

        # beta * L_div, and whatever else a query source brings
        for name, value in (aux_losses or {}).items():
            terms[name] = self._aux_weight(name) * share * value

        counts = [sum(map(len, layer)) for layer in pairs[:num_layers]]
        return LossReport(
            total=torch.stack(list(terms.values())).sum(),
            terms=terms,
            positives_per_box=[count / own_boxes if own_boxes else float("nan") for count in counts],
            pairs=pairs[:num_layers],
        )

    def _matched(
        self,
        names: list[str],
        predicted: Decoded,
        targets: Sequence[Targets],
        assigners: Sequence[Assigner],
        divisor: float,
    ) -> tuple[Terms, list[list[Pairs]]]:
        """Losses of K layers, each under its own assigner, and their matches, [layer][image]."""
        pairs = match_layers(
            predicted.logits,
            predicted.boxes,
            targets,
            assigners,
            weights=self.cost_weights,
            names=names,
            counted=predicted.counted,
        )
        return self._terms(names, predicted, targets, pairs, divisor), pairs

    def _all_tokens(self, tokens: AllTokens, targets: Sequence[Targets], assigner: Assigner, divisor: float) -> Terms:
        """The encoder's loss where every token is "an object" (class 0) or not (Deformable DETR, two-stage)."""
        objects = [replace(target, labels=torch.zeros_like(target.labels)) for target in targets]
        # Padding and border tokens, which can never be chosen, get a logit without loss, gradient or match.
        logits = tokens.logits.masked_fill(~tokens.valid[..., None], BACKGROUND_LOGIT)[None]  # (1, B, S, C)
        terms, _ = self._matched(["encoder"], Decoded(logits, tokens.boxes[None]), objects, [assigner], divisor)
        return terms

    def _repeated(self, names: list[str], predicted: Decoded, targets: Sequence[Targets], divisor: float) -> Terms:
        """One-to-many branch of H-DETR (arXiv 2207.13080): each box counts `hybrid_repeat` times, matched one-to-one."""
        repeat = self.config.hybrid_repeat
        repeated = [
            replace(target, labels=target.labels.repeat(repeat), boxes=target.boxes.repeat(repeat, 1))
            for target in targets
        ]
        terms, _ = self._matched(names, predicted, repeated, [self.last] * len(names), divisor * repeat)
        return terms

    def _aligned(self, names: list[str], predicted: Decoded, targets: Sequence[Targets], divisor: float) -> Terms:
        """Loss of DDQ's dense queries (arXiv 2303.12776; details of its code): `hybrid_repeat` positives per box, whose alignment
        is the target of their class and weighs their GIoU. Sums are divided by the alignment of a layer; an image without boxes
        counts for nothing."""
        assigner = AlignedAssigner(self.config.hybrid_repeat, cost_weights=self.cost_weights)
        pairs = match_layers(
            predicted.logits, predicted.boxes, targets, [assigner] * len(names), weights=self.cost_weights, names=names
        )
        flat = FlatPairs.from_pairs(pairs, targets, predicted.logits.device)
        assert flat.weight is not None
        _, giou, _ = box_losses(predicted.boxes, flat)
        empty = torch.tensor([len(target) == 0 for target in targets], device=flat.layer.device)
        logits = predicted.logits.masked_fill(empty[:, None, None], BACKGROUND_LOGIT)
        goal = torch.zeros_like(logits, dtype=giou.dtype)
        goal[flat.layer, flat.image, flat.query, flat.label] = flat.weight.to(giou.dtype)
        alignment = giou.new_zeros(len(names)).index_add(0, flat.layer, flat.weight.to(giou.dtype))
        # Of the whole step, as far as this batch tells: alignment per box times the boxes of all batches and processes.
        norm = (alignment * (divisor / max(sum(map(len, targets)), 1))).clamp(min=1)
        weighted = (
            ("class", self.config.class_weight * quality_focal_loss(logits, goal).sum((1, 2, 3)) / norm),
            ("giou", self.config.giou_weight * giou / norm),
        )
        return {f"{name}/{kind}": values[i] for kind, values in weighted for i, name in enumerate(names)}

    def _denoising(
        self, predicted: Decoded, info: DenoisingQueries, targets: Sequence[Targets], divisor: float
    ) -> Terms:
        """Loss of the denoising queries, each of which knows its box."""
        layers = len(predicted.logits)
        pairs = [[Pairs(*info.positives(len(target))) for target in targets]] * layers
        names = [f"denoising{i + 1}" for i in range(layers)]
        if info.counted is not None:
            predicted = _only(predicted, info.counted)
        return self._terms(names, predicted, targets, pairs, divisor * info.groups)

    def _auxiliary(
        self, heads: Auxiliary, predictions: Sequence[Decoded], targets: Sequence[Targets], layers: int, share: float
    ) -> Terms:
        """Co-DETR's heads, once for each decoder layer, and the queries that they give, divided by their positives."""
        terms = {name: self.config.auxiliary_weight * layers * share * value for name, value in heads.losses.items()}
        weight = self.config.customised_weight * share
        for queries, predicted in zip(heads.customised, predictions, strict=True):
            names = [f"customised_{queries.name}{i + 1}" for i in range(layers)]
            positives = max(sum(map(len, queries.pairs)), 1)
            counted = _only(predicted, queries.counted)
            own = self._terms(names, counted, targets, [queries.pairs] * layers, positives)
            terms |= {name: weight * value for name, value in own.items()}
        return terms

    def _aux_weight(self, name: str) -> float:
        if name not in self.aux_weights:
            raise ValueError(
                f"auxiliary loss {name!r} has no weight, known are {sorted(self.aux_weights)}:"
                f" set criterion.aux_weights[{name!r}]"
            )
        return self.aux_weights[name]

    def _terms(
        self, names: list[str], predicted: Decoded, targets: Sequence[Targets], pairs: list[list[Pairs]], divisor: float
    ) -> Terms:
        """Weighted class, L1 and GIoU losses of each layer: 3 K scalars."""
        flat = FlatPairs.from_pairs(pairs, targets, predicted.logits.device)
        l1, giou, iou = box_losses(predicted.boxes, flat)
        weighted = (
            ("class", self.config.class_weight * self._class_losses(predicted.logits, flat, iou)),
            ("l1", self.config.l1_weight * l1),
            ("giou", self.config.giou_weight * giou),
        )
        return {
            f"{name}/{kind}": values[i]
            for kind, values in ((kind, sums / divisor) for kind, sums in weighted)
            for i, name in enumerate(names)
        }

    def _class_losses(self, logits: Tensor, pairs: FlatPairs, iou: Tensor) -> Tensor:
        """Sums of each layer, (K,). A pair of weight w has the target w * IoU, as in Align-DETR (arXiv 2304.07527); for focal
        loss, whose targets are 0 and 1, it is w of a positive and 1 - w of a negative."""
        place = (pairs.layer, pairs.image, pairs.query, pairs.label)
        by_quality = self.config.classification != "focal"
        dtype = torch.promote_types(logits.dtype, torch.float32)
        quality = iou.to(dtype) if by_quality else torch.ones_like(iou, dtype=dtype)
        if by_quality and pairs.weight is not None:
            quality = quality * pairs.weight.to(dtype)
        goal = torch.zeros_like(logits, dtype=dtype)
        goal[place] = quality
        losses = self.classify(logits, goal)  # (K, B, N, C)
        if not by_quality and pairs.weight is not None:
            whole = losses[place]
            negative = self.classify(logits[place], torch.zeros_like(whole))
            losses = losses.index_put(place, torch.lerp(negative, whole, pairs.weight.to(whole.dtype)))
        return losses.sum((1, 2, 3))


def _only(predicted: Decoded, counted: Tensor) -> Decoded:
    """Predictions of (K, B, N) queries, of which those not counted, (B, N), have no class loss and no gradient."""
    return Decoded(predicted.logits.masked_fill(~counted[..., None], BACKGROUND_LOGIT), predicted.boxes)


def _with_proposals(layers: Decoded, proposals: Proposals) -> Decoded:
    """The encoder's proposals as one more layer: (K + 1, B, n, C), (K + 1, B, n, 4)."""
    if proposals.logits.shape[-1] != layers.logits.shape[-1]:
        raise ValueError(
            "class-agnostic proposals learn from all tokens, which a model gives in training mode alone:"
            " call model.train() before the forward pass"
        )
    counted = layers.counted
    if counted is not None:
        counted = torch.cat([counted, torch.ones_like(counted[:1])])
    logits, boxes = (proposals.logits[None], proposals.boxes[None])
    return Decoded(torch.cat([layers.logits, logits]), torch.cat([layers.boxes, boxes]), counted)


def build_criterion(config: LossConfig) -> Criterion:
    """The criterion that the settings describe."""
    weights = CostWeights(classification=config.class_cost, l1=config.l1_cost, giou=config.giou_cost)
    least = config.encoder_min_positives or config.min_positives
    of_encoder = config.model_copy(update={"min_positives": least})
    return Criterion(
        config=config,
        intermediate=ASSIGNERS[config.assigner](config, weights),
        encoder=ASSIGNERS[config.encoder_assigner](of_encoder, weights),
        last=OneToOneAssigner(cost_weights=weights),
        cost_weights=weights,
    )


CLASSIFICATION = {"focal": focal_loss, "varifocal": varifocal_loss, "quality_focal": quality_focal_loss}
