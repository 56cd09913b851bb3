"""The total loss of a DETR with or without PaQ: L = L_1:m + L_aux + beta * L_div (PaQ-DETR, arXiv 2603.06917).

L_1:m are layers 1..L-1 under the configured assigner; L_aux is everything one-to-one: the last layer, the encoder's proposals,
and the denoising queries, whose targets are fixed. Three settings change who learns one-to-many, none of them the paper's: a
one-to-one loss beside it in the same layers, heads of its own for it, and a schedule that ends it or lowers its positives.
"""

from __future__ import annotations

import math
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
    Matchables,
    OneToOneAssigner,
    Pairs,
    QualityAwareAssigner,
    RankDamping,
    SimOTAAssigner,
    focal_loss,
    match_layers,
    varifocal_loss,
)
from paqdetr.paq.costs import matchables
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
            "encoder/...", "denoising1/...", "hybrid1/...", and "diversity", which is beta * scale * L_div. A one-to-one loss
            beside one-to-many is "one_to_one1/...", and what heads of their own learn one-to-many "one_to_many1/...".
        positives_per_box: mean number of positives of a box in each decoder layer, of whichever of its matches has more; NaN on a
            batch without boxes.
        pairs: the matches behind "layer1", "layer2", ...: [layer][image].
    """

    total: Tensor
    terms: dict[str, Tensor]
    positives_per_box: list[float]
    pairs: list[list[Pairs]]


class Criterion:
    """Matches predictions with targets and sums the losses.

    Args:
        config: weights, classification loss, schedule.
        intermediate: assigner of layers 1..L-1, or of the heads for several positives, while several positives a box are on.
        encoder: assigner of the proposals while they are on.
        annealed: the pairs (intermediate, encoder) that allow at most 1, 2, ... positives a box, if the schedule lowers them.
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
        annealed: Sequence[tuple[Assigner, Assigner]] = (),
    ) -> None:
        self.config = config
        self.intermediate, self.encoder, self.last = intermediate, encoder, last
        self.annealed = annealed
        self.cost_weights = cost_weights
        self.aux_weights = {"diversity": config.diversity_weight * config.div_scale}
        self.classify: ClassificationLoss = (
            varifocal_loss if config.classification == "varifocal" else focal_loss
        )

    def one_to_many(self, progress: float) -> bool:
        """Whether intermediate layers use their own assigner at this share of the training, in [0, 1]."""
        return progress < self.config.one_to_many_until

    def most_positives(self, progress: float) -> int:
        """The most positives a box may get from an assigner with several at this share of the training."""
        if not self.one_to_many(progress):
            return 1
        if self.config.positives_schedule == "constant":
            return self.config.top_k
        left = 1 - progress / self.config.one_to_many_until  # in (0, 1]
        return math.ceil(self.config.top_k * left)  # each number for an equal share of the time

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
            num_boxes: what losses are divided by: the boxes of the whole step, in all of its batches and processes, so that their
                losses add up to that of one large batch (where data parallelism takes the mean of gradients, multiply the loss by
                the number of processes); the batch's own boxes if None.

        Raises:
            ValueError: targets are not what `Targets` says, an auxiliary loss has no weight, or class-agnostic proposals come
                from a model in evaluation mode.
            NonFiniteError: a prediction is NaN or infinite.
        """
        unknown = sorted(set(aux_losses or ()) - set(self.aux_weights))
        if unknown:
            raise ValueError(
                f"auxiliary loss {unknown[0]!r} has no weight, known are {sorted(self.aux_weights)}:"
                f" set criterion.aux_weights[{unknown[0]!r}]"
            )
        device = output.pred_logits.device
        own_boxes = sum(len(target) for target in targets)
        normalizer = max(float(own_boxes if num_boxes is None else num_boxes), 1.0)
        num_layers = output.layers.logits.shape[0]
        middle, of_encoder = self.assigners(progress)
        several = self.one_to_many(progress)
        many = output.layers.many

        # Heads for several positives and the encoder's proposals are matched with the decoder's layers: one transfer to the host.
        # A loss over all tokens, and the one-to-many branch, have matches of their own.
        stages = [output.layers]  # (K, B, n, C), (K, B, n, 4)
        names = [f"layer{i + 1}" for i in range(num_layers)]
        assigners = [self.last if many is not None else middle] * (num_layers - 1) + [self.last]
        if many is not None and several:
            stages.append(many)
            names += [f"one_to_many{i + 1}" for i in range(len(many.logits))]
            assigners += [middle] * len(many.logits)
        proposals = output.proposals
        if proposals is not None and proposals.everything is None:
            if proposals.logits.shape[-1] != output.pred_logits.shape[-1]:
                raise ValueError(
                    "class-agnostic proposals learn from all tokens, which a model gives in training mode alone:"
                    " call model.train() before the forward pass"
                )
            stages.append(Decoded(proposals.logits[None], proposals.boxes[None]))
            names.append("encoder")
            assigners.append(of_encoder)
        logits = torch.cat([stage.logits for stage in stages])
        boxes = torch.cat([stage.boxes for stage in stages])
        rows = matchables(logits, boxes, targets, weights=self.cost_weights, names=names)
        pairs = _solve(assigners, rows)
        flat = FlatPairs.from_pairs(pairs, targets, device)
        counts = flat.positives
        terms = self._terms(names, logits, boxes, flat, self._divisor(normalizer, counts, own_boxes))
        if several and self.config.one_to_many_weight != 1:
            of_layers = [f"layer{i + 1}" for i in range(num_layers - 1)] if many is None else []
            _scale(terms, (*of_layers, "one_to_many"), self.config.one_to_many_weight)
        if several and self.config.one_to_one_weight and num_layers > 1:
            beside = _solve([self.last] * (num_layers - 1), rows)
            one = FlatPairs.from_pairs(beside, targets, device)
            names = [f"one_to_one{i + 1}" for i in range(num_layers - 1)]
            extra = self._terms(names, logits[: num_layers - 1], boxes[: num_layers - 1], one, normalizer)
            _scale(extra, ("one_to_one",), self.config.one_to_one_weight)
            terms |= extra
        if many is not None and not several:  # every parameter has a gradient in every step
            terms["one_to_many/idle"] = 0 * (many.logits.float().sum() + many.boxes.float().sum())
        if proposals is not None and proposals.everything is not None:
            terms |= self._all_tokens(proposals.everything, targets, of_encoder, normalizer)
        if output.hybrid is not None:
            terms |= self._hybrid(output.hybrid, targets, normalizer)
        if output.denoised is not None and output.denoising is not None:
            fixed = [Pairs(*output.denoising.positives(len(target))) for target in targets]
            copies = FlatPairs.from_pairs([fixed] * num_layers, targets, device)
            names = [f"denoising{i + 1}" for i in range(num_layers)]
            scale = normalizer * output.denoising.groups
            logits = output.denoised.logits  # (K, B, N, C)
            if output.denoising.counted is not None:
                logits = logits.masked_fill(~output.denoising.counted[..., None], _CERTAINLY_NOT)
            terms |= self._terms(names, logits, output.denoised.boxes, copies, scale)
        for name, value in (aux_losses or {}).items():
            terms[name] = self.aux_weights[name] * value

        most = list(counts[:num_layers])
        if many is not None and several:
            learnt = counts[num_layers : num_layers + len(many.logits)]
            most[: len(learnt)] = map(max, most, learnt)
        return LossReport(
            total=torch.stack(list(terms.values())).sum(),
            terms=terms,
            positives_per_box=[count / own_boxes if own_boxes else float("nan") for count in most],
            pairs=pairs[:num_layers],
        )

    def assigners(self, progress: float) -> tuple[Assigner, Assigner]:
        """Of the intermediate layers, and of the encoder's proposals, at this share of the training."""
        if not self.one_to_many(progress):
            return self.last, self.last
        if self.annealed:
            return self.annealed[self.most_positives(progress) - 1]
        return self.intermediate, self.encoder

    def _divisor(self, normalizer: float, counts: Sequence[int], own_boxes: int) -> Tensor | float:
        """What each layer's sums are divided by, a number or (K,) float32 on the CPU.

        Positives are counted in this batch alone. In a step of several batches or processes each takes its own number of
        positives a box, times the boxes of the whole step.
        """
        if self.config.normalizer == "boxes" or not own_boxes:
            return normalizer
        return normalizer * (torch.tensor(counts) / own_boxes).clamp(min=1 / own_boxes)

    def _all_tokens(
        self, tokens: AllTokens, targets: Sequence[Targets], assigner: Assigner, normalizer: float
    ) -> dict[str, Tensor]:
        """The encoder's loss where every token is "an object" (class 0) or not (Deformable DETR, two-stage)."""
        objects = [replace(target, labels=torch.zeros_like(target.labels)) for target in targets]
        # Padding and border tokens, which can never be chosen, are made certain of nothing: no loss, no gradient, no match.
        logits = tokens.logits.masked_fill(~tokens.valid[..., None], _CERTAINLY_NOT)[None]  # (1, B, S, C)
        boxes = tokens.boxes[None]
        pairs = match_layers(logits, boxes, objects, [assigner], weights=self.cost_weights, names=["encoder"])
        flat = FlatPairs.from_pairs(pairs, objects, logits.device)
        divisor = self._divisor(normalizer, flat.positives, sum(map(len, targets)))
        return self._terms(["encoder"], logits, boxes, flat, divisor)

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
        self, names: list[str], logits: Tensor, boxes: Tensor, pairs: FlatPairs, divisor: float | Tensor
    ) -> dict[str, Tensor]:
        """Weighted class, L1 and GIoU losses of each layer: (K, B, N, C), (K, B, N, 4) -> 3 K scalars."""
        if isinstance(divisor, Tensor):
            divisor = divisor.to(logits.device, non_blocking=True)
        l1, giou, iou = box_losses(boxes, pairs)
        classification = self._class_losses(logits, pairs, iou)
        weighted = (
            ("class", self.config.class_weight * classification),
            ("l1", self.config.l1_weight * l1),
            ("giou", self.config.giou_weight * giou),
        )
        return {
            f"{name}/{kind}": values[i]
            for kind, values in ((kind, sums / divisor) for kind, sums in weighted)
            for i, name in enumerate(names)
        }

    def _class_losses(self, logits: Tensor, pairs: FlatPairs, iou: Tensor) -> Tensor:
        """Sums of each layer, (K,). A pair of weight w has the target w * IoU, as in Align-DETR; for focal loss, whose targets
        are 0 and 1, it is w of a positive and 1 - w of a negative."""
        place = (pairs.layer, pairs.image, pairs.query, pairs.label)
        varifocal = self.config.classification == "varifocal"
        dtype = torch.promote_types(logits.dtype, torch.float32)
        quality = iou.to(dtype) if varifocal else torch.ones_like(iou, dtype=dtype)
        if varifocal and pairs.weight is not None:
            quality = quality * pairs.weight.to(dtype)
        goal = torch.zeros_like(logits, dtype=dtype)
        goal[place] = quality
        losses = self.classify(logits, goal)  # (K, B, N, C)
        if not varifocal and pairs.weight is not None:
            whole = losses[place]
            negative = self.classify(logits[place], torch.zeros_like(whole))
            weight = pairs.weight.to(whole.dtype)
            losses = losses.index_put(place, weight * whole + (1 - weight) * negative)
        return losses.sum((1, 2, 3))


def _solve(assigners: Sequence[Assigner], rows: Sequence[Sequence[Matchables]]) -> list[list[Pairs]]:
    """[layer][image] of the first layers, as many as there are assigners."""
    return [[assigner.solve(image) for image in row] for assigner, row in zip(assigners, rows, strict=False)]


def _scale(terms: dict[str, Tensor], places: Sequence[str], weight: float) -> None:
    """Multiply the terms whose place is one of these, or one of these and a number, in place."""
    for name, value in terms.items():
        place = name.partition("/")[0]
        if place in places or place.rstrip("0123456789") in places:
            terms[name] = weight * value


def build_criterion(config: LossConfig) -> Criterion:
    """The criterion that the settings describe."""
    weights = CostWeights(classification=config.class_cost, l1=config.l1_cost, giou=config.giou_cost)
    by_most = [_assigners(config, weights, most) for most in range(1, config.top_k + 1)]
    pairs = [(rules[config.assigner], rules[config.encoder_assigner]) for rules in by_most]
    return Criterion(
        config=config,
        intermediate=pairs[-1][0],
        encoder=pairs[-1][1],
        last=OneToOneAssigner(cost_weights=weights),
        cost_weights=weights,
        annealed=() if config.positives_schedule == "constant" else pairs,
    )


def _assigners(config: LossConfig, weights: CostWeights, most: int) -> dict[str, Assigner]:
    """Every rule by name, with at most so many positives a box."""
    least = min(config.min_positives, most)
    rules: dict[str, Assigner] = {
        "quality_aware": QualityAwareAssigner(
            gamma=config.gamma,
            top_k=config.top_k,
            min_positives=least,
            max_positives=most,
            select=config.select,
            confidence=config.confidence,
            cost_weights=weights,
        ),
        "fixed_k": FixedKAssigner(k=most, cost_weights=weights),
        "simota": SimOTAAssigner(
            top_k=config.top_k,
            min_positives=least,
            max_positives=most,
            select="cost" if config.select == "score" else "hungarian",
            cost_weights=weights,
        ),
    }
    if config.rank_damping is not None:
        rules = {
            name: RankDamping(rule, tau=config.rank_damping, cost_weights=weights)
            for name, rule in rules.items()
        }
    return {"one_to_one": OneToOneAssigner(cost_weights=weights), **rules}
