"""What content queries hold, and whether it has to do with what they find: collected in one pass of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paqdetr.errors import DataError
from paqdetr.metrics.query_usage import UNIT, BatchMatch, fixed
from paqdetr.models.detector import Detector
from paqdetr.models.outputs import DetectorOutput
from paqdetr.structures import ClassTable, Targets


@dataclass(frozen=True, slots=True)
class Samples:
    """Matched queries: each found a box of its image in the last layer's one-to-one match.

    Attributes:
        images: (P,) int64, of the split.
        queries: (P,) int64, index of the query.
        categories: (P,) int64, contiguous class index of the box.
        boxes: (P, 4) float32, the box, cxcywh in [0, 1].
        content: (P, d) float32.
        weights: (P, m) float32; None for content that is no mixture.
    """

    images: np.ndarray
    queries: np.ndarray
    categories: np.ndarray
    boxes: np.ndarray
    content: np.ndarray
    weights: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, chosen: np.ndarray) -> Samples:
        """Some of them, by position or by mask."""
        columns: list[Any] = [None if column is None else column[chosen] for column in self.columns()]
        return Samples(*columns)

    def columns(self) -> list[Any]:
        """All arrays, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True, slots=True)
class ContentStudy:
    """What was collected.

    Attributes:
        classes: of the model.
        matched: matches that were seen; `samples` are as many, or a random part of them.
        samples: matched queries, by image and query.
        category_counts: (C,) int64 matches of each category.
        category_weights: (C, m) mean mixture weights of the queries matched with each category, over all matches; NaN where
            there is none.
        index_content: (n, d) mean content of each query index over all images: a static table, as near as one can be.
        index_weights: (n, m) mean weights of each query index over all images.
        image_share: of the variance of content over queries and images, the share that the query index does not explain: 0 is a
            learned table, the same for every image; pattern queries that learnt to look at the image have more.
        query_share: the part of `image_share` by which the queries of one image differ from each other; the rest is common to all
            queries of an image. With `mixture_input="query"` it is what the features of single queries decide.
        images: (I,) int64, those of `image_mass`, ascending.
        image_mass: (I, m) float32 mean weight of each pattern over the queries of an image.
        patterns: (m, d) float32.

    All that has to do with patterns is None for content that is no mixture.
    """

    classes: ClassTable
    matched: int
    samples: Samples
    category_counts: np.ndarray
    category_weights: np.ndarray | None
    index_content: np.ndarray
    index_weights: np.ndarray | None
    image_share: float
    query_share: float
    images: np.ndarray
    image_mass: np.ndarray | None
    patterns: np.ndarray | None

    def category_lift(self) -> np.ndarray | None:
        """(C, m) log2 of a category's mean weights over those of all matched queries: 1 is twice as much, -1 half."""
        if self.category_weights is None:
            return None
        seen = self.category_counts > 0
        counts = self.category_counts[seen, None]
        overall = (self.category_weights[seen] * counts).sum(0) / max(self.category_counts.sum(), 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log2(np.maximum(self.category_weights, 1e-9) / np.maximum(overall, 1e-9))


class ContentCollector:
    """An observer of an evaluation that keeps what the matched content queries hold:
    `evaluate_split(model, split, observers=[collector])`, then `collector.study(model)`.

    Sums and means are of all matches. Of the queries themselves at most `limit` are kept, those with the smallest hash of image
    and box: a random part of all, the same in whatever order and by however many processes they are seen.

    Args:
        num_classes: C.
        limit: the most matched queries that are kept one by one.
        match: shared with other observers of the same evaluation, which then match each batch once.
    """

    def __init__(self, *, num_classes: int, limit: int = 3000, match: BatchMatch | None = None) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, found {limit}")
        self.num_classes, self.limit, self.match = num_classes, limit, match or BatchMatch()
        self._kept: list[tuple[np.ndarray, Samples]] = []  # hashes and samples
        self._sums: dict[str, np.ndarray] = {}
        self._squares = 0  # of content, in units; an int of any size
        self._image_squares = 0  # of the mean content of each image
        self._masses: dict[int, np.ndarray] = {}
        self._images: list[int] = []

    def see(self, output: DetectorOutput, targets: Sequence[Targets], indices: Sequence[int]) -> None:
        """As an observer of an evaluation: take in a batch."""
        pairs = self.match(output.pred_logits, output.pred_boxes, targets)
        content, weights = _host(output.mixture.content), _host(output.mixture.weights)
        assert content is not None
        exact = torch.from_numpy(content).double()
        self._images += indices
        self._add("content", fixed(exact).sum(0).numpy())
        self._squares += int(fixed(exact.square().sum((1, 2))).sum())
        self._image_squares += int(fixed(exact.mean(1).square().sum(1)).sum())
        if weights is not None:
            self._add("weights", fixed(torch.from_numpy(weights)).sum(0).numpy())
            self._masses |= dict(zip(indices, weights.mean(1), strict=True))
        for place, (index, pair, target) in enumerate(zip(indices, pairs, targets, strict=True)):
            queries, boxes = pair.query_indices.numpy(), pair.target_indices.numpy()
            categories = target.labels.cpu().numpy()[boxes]
            rows = None if weights is None else weights[place, queries]
            self._add("counts", np.bincount(categories, minlength=self.num_classes))
            if rows is not None:
                sums = np.zeros((self.num_classes, rows.shape[1]), dtype=np.int64)
                np.add.at(sums, categories, fixed(torch.from_numpy(rows)).numpy())
                self._add("category_weights", sums)
            samples = Samples(
                np.full(len(queries), index), queries, categories, target.boxes.cpu().float().numpy()[boxes],
                content[place, queries], rows,
            )  # fmt: skip
            self._kept.append((_hash(index, boxes), samples))
        if sum(len(samples) for _, samples in self._kept) > 2 * self.limit:
            self._kept = [self._smallest()]

    def merge(self, other: ContentCollector) -> None:
        """Take over what another process's collector has seen."""
        for name, value in other._sums.items():
            self._add(name, value)
        self._squares += other._squares
        self._image_squares += other._image_squares
        self._masses |= other._masses
        self._images += other._images
        self._kept += other._kept

    @property
    def shares(self) -> dict[str, float]:
        """`image_share` and `query_share` of `ContentStudy`; empty before any image was seen."""
        if "content" not in self._sums:
            return {}
        images, index_content = len(self._images), self._sums["content"] / UNIT / len(self._images)  # (n, d)
        # Of a mean square over queries and images: that of the index means, of the image means, and of the mean of all.
        square = self._squares / UNIT / (images * len(index_content))
        by_index, overall = np.square(index_content).sum(1).mean(), np.square(index_content.mean(0)).sum()
        by_image = self._image_squares / UNIT / images
        whole = square - overall
        parts = {"image_share": square - by_index, "query_share": square - by_index - by_image + overall}
        return {name: float(max(part, 0.0) / whole) if whole > 1e-9 * square else 0.0 for name, part in parts.items()}

    def study(self, model: Detector) -> ContentStudy:
        """What was collected.

        Args:
            model: whose outputs were seen.

        Raises:
            DataError: no image was seen, or none of them has a box.
        """
        counts = self._sums.get("counts")
        if counts is None or not counts.any():
            raise DataError(
                f"none of the {len(self._images)} images that were evaluated has a box to match queries with",
                "take a split with annotations",
            )
        _, samples = self._smallest()
        samples = samples.rows(np.lexsort((samples.queries, samples.images)))
        images = np.sort(np.asarray(self._images, dtype=np.int64))
        source = model.query_source
        patterns: Tensor | None = getattr(source, "patterns", None)
        sums = {name: value / UNIT for name, value in self._sums.items()}
        category_weights = index_weights = mass = None
        if "weights" in sums:
            with np.errstate(invalid="ignore"):
                category_weights = sums["category_weights"] / np.where(counts, counts, np.nan)[:, None]
            index_weights = sums["weights"] / len(images)
            mass = np.stack([self._masses[index] for index in images.tolist()])
        index_content = sums["content"] / len(images)
        return ContentStudy(
            classes=model.classes,
            matched=int(counts.sum()),
            samples=samples,
            category_counts=counts,
            category_weights=category_weights,
            index_content=index_content,
            index_weights=index_weights,
            **self.shares,
            images=images,
            image_mass=mass,
            patterns=_host(patterns),
        )

    def _add(self, name: str, value: np.ndarray) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value.astype(np.int64)

    def _smallest(self) -> tuple[np.ndarray, Samples]:
        """The `limit` samples of the smallest hashes."""
        hashes = np.concatenate([hashes for hashes, _ in self._kept])
        parts = zip(*(samples.columns() for _, samples in self._kept), strict=True)
        columns: list[Any] = [None if part[0] is None else np.concatenate(part) for part in parts]
        joined = Samples(*columns)
        order = np.argsort(hashes, kind="stable")[: self.limit]
        return hashes[order], joined.rows(order)


def _hash(image: int, boxes: np.ndarray) -> np.ndarray:
    """(P,) uint64, evenly spread: splitmix64 of the image's and the boxes' numbers."""
    x = (np.uint64(image) << np.uint64(24)) + boxes.astype(np.uint64) + np.uint64(1)
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _host(value: Tensor | None) -> np.ndarray | None:
    return None if value is None else value.detach().to("cpu", torch.float32).numpy()
