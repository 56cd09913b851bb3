"""Collects how a detector uses its queries, batch by batch, in bounded memory and in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paqdetr.errors import NonFiniteError
from paqdetr.metrics.query_report import PatternUse, Places, QueryUsageReport, Spread
from paqdetr.paq import CostWeights, OneToOneAssigner, Pairs
from paqdetr.structures import Targets

if TYPE_CHECKING:
    from paqdetr.models.outputs import DetectorOutput


# Scores are counted between edges that lie 1/64 apart in the logit, from -8 (0.0003) to 8: at most 0.004 in the score.
_PER_LOGIT, _REACH = 64, 8
_EDGES = 2 * _REACH * _PER_LOGIT + 1
UNIT = 2.0**32
"""Sums of reals are kept in whole multiples of 1 / UNIT, so that they do not depend on the order of the batches: those of 900
queries in a million images stay below 2^63."""
_RANKS = 32


class BatchMatch:
    """The one-to-one match of the last layer with a batch's ground truth, made once for all observers that share this object.

    Args:
        cost_weights: of the match; the DETR family's by default.
    """

    def __init__(self, cost_weights: CostWeights | None = None) -> None:
        self._assigner = OneToOneAssigner(cost_weights=cost_weights or CostWeights())
        self._batch: tuple[Any, ...] = ()
        self._pairs: list[Pairs] = []

    def __call__(self, pred_logits: Tensor, pred_boxes: Tensor, targets: Sequence[Targets]) -> list[Pairs]:
        """Pairs of each image; those of the call before if it was of the very same batch."""
        batch = (pred_logits, pred_boxes, targets)
        if not self._batch or any(one is not other for one, other in zip(batch, self._batch, strict=True)):
            self._pairs = list(self._assigner(pred_logits.detach(), pred_boxes.detach(), targets))
            self._batch = batch
        return self._pairs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batch": (), "_pairs": []}


class QueryUsage:
    """How queries are used, over the images of an evaluation: `update` with each batch, then `report`.

    It takes the outputs of any DETR. As an observer of `paqdetr.evaluation.evaluate.evaluate_split` it takes a `DetectorOutput`:
    `evaluate_split(model, split, observers=[usage])`.

    It keeps counts alone: for each query those at the thresholds, a histogram of its scores in 1026 bins, its matches and the
    sums of their boxes; 4 MB for 900 queries, however many images there are. Counts at `thresholds` are exact. The threshold of
    view (b) is one of the histogram's edges, at most 0.004 from its neighbours, and the counts there are exact again.

    On a GPU all of it stays there until `report`, but for the costs of the match, which cross to the host once a batch.

    Args:
        num_queries: n.
        thresholds: scores of view (a), in (0, 1); the author's by default.
        ranked: whether index i is the i-th best proposal of every image, as in two-stage hosts.
        cost_weights: of the one-to-one match; the DETR family's by default.
        match: shared with other observers of the same evaluation, which then match each batch once.
    """

    def __init__(
        self,
        *,
        num_queries: int,
        thresholds: Sequence[float] = (0.3, 0.4, 0.5),
        ranked: bool = False,
        cost_weights: CostWeights | None = None,
        match: BatchMatch | None = None,
    ) -> None:
        if num_queries < 1:
            raise ValueError(f"num_queries: expected at least 1, found {num_queries}")
        if not all(0 < threshold < 1 for threshold in thresholds):
            raise ValueError(f"thresholds: expected numbers between 0 and 1, found {tuple(thresholds)}")
        self.num_queries, self.thresholds, self.ranked = num_queries, tuple(thresholds), ranked
        self.match = match or BatchMatch(cost_weights)
        self._sums: dict[str, Tensor] = {}  # int64, but for the histogram, which is int32
        self._peak: Tensor | None = None  # (m,) float32

    def update(
        self,
        pred_logits: Tensor,
        pred_boxes: Tensor,
        targets: Sequence[Targets] | None = None,
        weights: Tensor | None = None,
        *,
        content: Tensor | None = None,
        pairs: Sequence[Pairs] | None = None,
    ) -> None:
        """Take in a batch.

        Args:
            pred_logits: (B, n, C) of the last layer; scores are their sigmoid.
            pred_boxes: (B, n, 4) cxcywh in [0, 1].
            targets: ground truth of the B images.
            weights: (B, n, m) of the mixtures that content queries are.
            content: (B, n, d) content queries.
            pairs: the last layer's one-to-one matches, if they are known already; computed from `targets` otherwise.

        Raises:
            ValueError: shapes that contradict each other or earlier batches.
            NonFiniteError: a prediction of an image with ground truth is NaN or infinite.
        """
        self._require(pred_logits, pred_boxes, targets, weights, content)
        if pred_logits.device.type == "mps":  # which has no float64
            pred_logits, pred_boxes = pred_logits.cpu(), pred_boxes.cpu()
            targets = None if targets is None else [target.to("cpu") for target in targets]
            weights, content = (None if value is None else value.cpu() for value in (weights, content))
        # Sums that began in inference mode could not be added to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            logits = pred_logits.detach()
            best = logits.to(torch.promote_types(logits.dtype, torch.float32)).amax(-1)  # (B, n)
            self._add("images", torch.tensor([len(best)], device=best.device))
            self._add_scores(best)
            if targets is not None:
                if pairs is None:
                    pairs = self.match(pred_logits, pred_boxes, targets)
                self._add_matches(best, targets, pairs)
            if weights is not None:
                self._add_weights(weights.detach())
            if content is not None:
                self._add("cosine", fixed(query_cosine(content.detach().double())).sum(0, keepdim=True))
                self._add("images_with_content", torch.tensor([len(content)], device=content.device))

    def see(self, output: DetectorOutput, targets: Sequence[Targets], indices: Sequence[int]) -> None:
        """As an observer of an evaluation: take in a batch with its ground truth."""
        self.ranked = output.proposals is not None
        mixture = output.mixture
        self.update(output.pred_logits, output.pred_boxes, targets, mixture.weights, content=mixture.content)

    def merge(self, other: QueryUsage) -> None:
        """Add what another collector has seen, in another process for example.

        Raises:
            ValueError: it counts other queries, thresholds or patterns.
        """
        mine, its = (self.num_queries, self.thresholds), (other.num_queries, other.thresholds)
        if mine != its:
            raise ValueError(f"queries and thresholds: {mine} here, {its} there")
        for name, value in other._sums.items():
            if name in self._sums and self._sums[name].shape != value.shape:
                raise ValueError(f"{name}: {tuple(self._sums[name].shape)} here, {tuple(value.shape)} there")
        for name, value in other._sums.items():
            self._add(name, value)
        if other._peak is not None:
            self._raise_peak(other._peak)
        self.ranked = self.ranked or other.ranked

    @property
    def images(self) -> int:
        """Seen so far."""
        return self._count("images")

    def report(
        self, *, activations_per_image: float | None = None, gradients: Spread | None = None, dead_share: float = 0.1
    ) -> QueryUsageReport:
        """What was found so far.

        Args:
            activations_per_image: how many queries an image is to activate in view (b): give two models the same number to
                compare them. By default as many as there are boxes in an image.
            gradients: view (d), of `paqdetr.analysis.usage.content_gradients`.
            dead_share: a pattern with less than this share of an equal share of the mass is called dead.

        Raises:
            ValueError: no image was seen, or `activations_per_image` is not positive.
            NonFiniteError: scores were NaN.
        """
        images = self.images
        if not images:
            raise ValueError("no image was seen: call update first")
        if activations_per_image is not None and activations_per_image <= 0:
            raise ValueError(f"activations_per_image: expected more than 0, found {activations_per_image}")
        if broken := self._count("broken"):
            raise NonFiniteError(
                f"{broken} of {images * self.num_queries} scores were NaN",
                "evaluate without half precision, or a checkpoint from before the training diverged",
            )

        def spread(counts: np.ndarray, images: int = images, threshold: float | None = None) -> Spread:
            return Spread(counts=counts, images=images, threshold=threshold, ranked=self.ranked)

        annotated = self._count("images_with_targets")
        boxes = self._count("boxes") / annotated if annotated else None
        target = boxes or None if activations_per_image is None else activations_per_image
        equal = None
        if target is not None:
            threshold, counts = self._at_equal(target)
            equal = spread(counts, threshold=threshold)
        above = self._array("above")
        described = self._count("images_with_content")
        return QueryUsageReport(
            num_queries=self.num_queries,
            images=images,
            boxes_per_image=boxes,
            ranked=self.ranked,
            activations=tuple(spread(above[i], threshold=t) for i, t in enumerate(self.thresholds)),
            equal=equal,
            target=target,
            positives=spread(self._array("matches"), annotated) if annotated else None,
            gradients=gradients,
            patterns=self._patterns(dead_share),
            query_cosine=self._count("cosine") / UNIT / described if described else None,
            places=self._places() if annotated else None,
        )

    # ------------------------------------------------------------------------------------------- counting

    def _add_scores(self, best: Tensor) -> None:
        """(B, n) best logit of each query."""
        scores = best.sigmoid()
        thresholds = scores.new_tensor(self.thresholds)[:, None, None]
        self._add("above", (scores > thresholds).sum(1))  # (T, n)
        self._add("broken", best.isnan().sum(dtype=torch.int64).view(1))
        # The number of edges below a logit: edge k is (k / 64 - 8), and times 64 is exact, so a count above an edge is too.
        bins = (best * _PER_LOGIT).nan_to_num(0.0).ceil().clamp(-_REACH * _PER_LOGIT, _REACH * _PER_LOGIT + 1)
        place = bins.long() + _REACH * _PER_LOGIT  # (B, n) in 0..1025
        place += torch.arange(best.shape[1], device=best.device) * (_EDGES + 1)
        histogram = self._sum("histogram", (self.num_queries * (_EDGES + 1),), best.device, dtype=torch.int32)
        flat = place.flatten()
        histogram.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))

    def _add_matches(self, best: Tensor, targets: Sequence[Targets], pairs: Sequence[Pairs]) -> None:
        """Matches of the last layer, and the boxes and score ranks that go with them."""
        device, (batch, n) = best.device, best.shape
        boxes = sum(len(target) for target in targets)
        self._add("images_with_targets", torch.tensor([batch], device=device))
        self._add("boxes", torch.tensor([boxes], device=device))
        self._add("matches", torch.zeros(n, dtype=torch.int64, device=device))
        queries = torch.cat([pair.query_indices for pair in pairs]).to(device)  # (P,)
        found = torch.cat(
            [t.boxes[p.target_indices.to(t.boxes.device)] for t, p in zip(targets, pairs, strict=True)]
        ).to(device, torch.float64)  # (P, 4)
        counts = torch.tensor([len(pair) for pair in pairs])
        image = torch.repeat_interleave(torch.arange(batch), counts).to(device)
        self._sums["matches"].index_add_(0, queries, torch.ones_like(queries))
        for name, values in (("place", found), ("place_squared", found.square())):
            self._sum(name, (n, 4), device).index_add_(0, queries, fixed(values))
        ranks = best.argsort(1, descending=True).argsort(1)[image, queries]
        cells = min(n, _RANKS)
        cell = queries * cells // n * cells + ranks * cells // n
        self._sum("ranks", (cells * cells,), device).index_add_(0, cell, torch.ones_like(cell))

    def _add_weights(self, weights: Tensor) -> None:
        """(B, n, m), rows that sum to 1."""
        batch, _, m = weights.shape
        rows = weights.double()
        self._add("mass", fixed(rows.sum(1)).sum(0))  # (m,)
        self._add("entropy", fixed(row_entropy(rows)).sum(0, keepdim=True))
        leads = F.one_hot(rows.argmax(-1).flatten(), m).sum(0)
        self._add("leads", leads)
        self._add("images_with_weights", torch.tensor([batch], device=rows.device))
        self._raise_peak(rows.flatten(0, 1).amax(0).float())

    def _raise_peak(self, peak: Tensor) -> None:
        self._peak = peak if self._peak is None else torch.maximum(self._peak.to(peak.device), peak)

    def _add(self, name: str, value: Tensor) -> None:
        self._sum(name, tuple(value.shape), value.device, dtype=value.dtype).add_(value)

    def _sum(self, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """The sum of this name, on the device where it is added to."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(shape, dtype=dtype, device=device)
        elif self._sums[name].device != device:
            self._sums[name] = self._sums[name].to(device)
        return self._sums[name]

    def _require(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Targets] | None,
        weights: Tensor | None,
        content: Tensor | None,
    ) -> None:
        n = self.num_queries
        if logits.ndim != 3 or logits.shape[1] != n:
            raise ValueError(f"pred_logits: expected (B, {n}, C), found {tuple(logits.shape)}")
        batch = logits.shape[0]
        if boxes.shape != (batch, n, 4):
            raise ValueError(f"pred_boxes: expected {(batch, n, 4)}, found {tuple(boxes.shape)}")
        if targets is not None and len(targets) != batch:
            raise ValueError(f"targets: expected those of {batch} images, found {len(targets)}")
        for name, value in (("weights", weights), ("content", content)):
            if value is not None and (value.ndim != 3 or value.shape[:2] != (batch, n)):
                raise ValueError(f"{name}: expected ({batch}, {n}, ...), found {tuple(value.shape)}")
        known = self._sums.get("mass")
        if weights is not None and known is not None and known.shape[0] != weights.shape[2]:
            raise ValueError(f"weights: {known.shape[0]} patterns before, now {weights.shape[2]}")

    # ------------------------------------------------------------------------------------------- reading

    def _array(self, name: str) -> np.ndarray:
        return self._sums[name].cpu().numpy().astype(np.int64)

    def _count(self, name: str) -> int:
        return int(self._sums[name].item()) if name in self._sums else 0

    def _at_equal(self, target: float) -> tuple[float, np.ndarray]:
        """The threshold whose activations an image come nearest to the target, the higher of two as near; the counts there."""
        histogram = self._array("histogram").reshape(self.num_queries, _EDGES + 1)
        # Above edge k lie the bins k + 1 and on.
        above = histogram[:, ::-1].cumsum(1)[:, ::-1][:, 1:]  # (n, E)
        distance = np.abs(above.sum(0) / self.images - target)
        edge = _EDGES - 1 - int(distance[::-1].argmin())
        threshold = 1 / (1 + np.exp(-(edge / _PER_LOGIT - _REACH)))
        return float(threshold), above[:, edge]

    def _patterns(self, dead_share: float) -> PatternUse | None:
        images = self._count("images_with_weights")
        if not images or self._peak is None:
            return None
        mass = self._array("mass") / UNIT / (images * self.num_queries)
        return PatternUse(
            mass=mass,
            peak=self._peak.cpu().numpy(),
            leads=self._array("leads"),
            entropy=self._count("entropy") / UNIT / images,
            dead_share=dead_share,
        )

    def _places(self) -> Places:
        cells = min(self.num_queries, _RANKS)
        matches = self._array("matches")
        times = np.where(matches > 0, matches, np.nan)[:, None]
        mean = self._array("place") / UNIT / times
        square = self._array("place_squared") / UNIT / times
        std = np.sqrt(np.maximum(square - mean**2, 0))
        return Places(mean=mean, std=std, ranks=self._array("ranks").reshape(cells, cells))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_sums"] = {name: value.cpu() for name, value in self._sums.items()}
        state["_peak"] = None if self._peak is None else self._peak.cpu()
        return state


def query_cosine(content: Tensor) -> Tensor:
    """Mean cosine between the different content queries of each image: (B, n, d) -> (B,); 0 where there is only one."""
    unit = F.normalize(content.to(torch.promote_types(content.dtype, torch.float32)), dim=-1)
    count = content.shape[1]
    together = unit.sum(1).square().sum(-1)  # |sum|^2 = n + sum of all pairs' cosines
    return (together - unit.square().sum((1, 2))) / max(count * (count - 1), 1)


def row_entropy(weights: Tensor) -> Tensor:
    """Mean entropy of each image's mixture rows over log m: (B, n, m) -> (B,) in [0, 1]."""
    entropy = -torch.special.xlogy(weights, weights).sum(-1).mean(-1)
    return entropy / np.log(weights.shape[-1])


def fixed(values: Tensor) -> Tensor:
    """Reals as whole multiples of 1 / `UNIT`, int64."""
    return (values.double() * UNIT).round().long()
