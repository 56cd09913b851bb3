"""Does the content of a query know what the query will find? Numbers for it, each against shuffled labels.

Three things that are not knowledge look like it: chance; the image, since what stands together is found together; and the query's
index, since an index has its places and sizes, and these their categories. Each has a shuffling of its own that keeps it and
destroys the rest, and the index also has a twin: the same queries with the mean content of their index, which no image changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.sparse import csr_array

from paqdetr.evaluation.content import ContentStudy
from paqdetr.serialize import Jsonable

# Contents whose cosines differ by less are as near.
_AS_NEAR = 1e-6
SHUFFLES = ("all", "image", "index")


@dataclass(frozen=True, slots=True)
class Shuffled(Jsonable):
    """A statistic with its labels shuffled many times.

    Attributes:
        mean, low, high: of the shuffled values, with their central 95 %.
        p: share of values, the true one among them, that are at least the true one: small if shuffling destroys something.
    """

    json_digits: ClassVar = 6
    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True)
class Measure(Jsonable):
    """One number for how much content has to do with categories.

    Attributes:
        name: "dominant pattern" and "cluster": adjusted mutual information with the category, 0 by chance and 1 for a
            one-to-one relation; "nearest neighbour": share of queries whose nearest content in another image belongs to the same
            category.
        value: of the model.
        shuffled: the same with labels shuffled: over "all" queries; within each "image"; within each query "index".
        twin: of the static twin, every query with the mean content of its index.
    """

    json_digits: ClassVar = 6
    name: str
    value: float
    shuffled: dict[str, Shuffled]
    twin: float


@dataclass(frozen=True, slots=True)
class Semantics(Jsonable):
    """Whether content clusters by category.

    Attributes:
        samples: matched queries that were looked at.
        categories: that occur among them.
        permutations: of each shuffling.
        measures: of `Measure`; empty if there are fewer than two categories or images, of which nothing follows.
    """

    samples: int
    categories: int
    permutations: int
    measures: tuple[Measure, ...]


Statistic = Callable[[np.ndarray], float]


def semantics(study: ContentStudy, *, permutations: int = 999, seed: int = 0) -> Semantics:
    """Measure whether content clusters by category.

    Args:
        study: of `ContentCollector.study`.
        permutations: of each of the three shufflings.
        seed: of shufflings and of k-means.
    """
    samples = study.samples
    names, labels = np.unique(samples.categories, return_inverse=True)
    if len(names) < 2 or len(np.unique(samples.images)) < 2:
        return Semantics(len(samples), len(names), permutations, ())
    groups = {"all": np.zeros(len(samples), dtype=int), "image": samples.images, "index": samples.queries}
    twin_content = study.index_content[samples.queries]
    pairs: list[tuple[str, Statistic, Statistic]] = []
    if samples.weights is not None and study.index_weights is not None:
        twin_lead = study.index_weights[samples.queries].argmax(1)
        own, twin = (mutual_information(c, labels) for c in (np.asarray(samples.weights.argmax(1)), twin_lead))
        pairs.append(("dominant pattern", own, twin))
    count = len(names)
    own, twin = (
        mutual_information(clusters(content, count, seed=seed), labels) for content in (samples.content, twin_content)
    )
    pairs.append(("cluster", own, twin))
    own, twin = (purity(content, samples.images, labels) for content in (samples.content, twin_content))
    pairs.append(("nearest neighbour", own, twin))
    measures = [
        Measure(
            name=name,
            value=own(labels),
            shuffled={
                kind: shuffle_test(own, labels, groups[kind], permutations=permutations, seed=seed) for kind in SHUFFLES
            },
            twin=twin(labels),
        )
        for name, own, twin in pairs
    ]
    return Semantics(len(samples), count, permutations, tuple(measures))


def shuffle_test(
    statistic: Statistic, labels: np.ndarray, groups: np.ndarray, *, permutations: int, seed: int
) -> Shuffled:
    """A statistic of labels against the same with labels shuffled within groups.

    Args:
        statistic: (P,) labels -> number.
        labels: (P,) int64.
        groups: (P,) any numbers: labels stay among those of equal number.
        permutations: at least 1; the least p is 1 / (permutations + 1).
        seed: of the shuffling.
    """
    rng = np.random.default_rng(seed)
    places = np.argsort(groups, kind="stable")  # the labels' places, group by group
    in_order = groups[places]
    true, values = statistic(labels), np.empty(permutations)
    for i in range(permutations):
        shuffled = np.empty_like(labels)
        shuffled[places] = labels[places[np.lexsort((rng.random(len(labels)), in_order))]]
        values[i] = statistic(shuffled)
    at_least = int((values >= true - 1e-12).sum())  # equal but for rounding is equal
    low, high = np.quantile(values, [0.025, 0.975])
    return Shuffled(float(values.mean()), float(low), float(high), (at_least + 1) / (permutations + 1))


def mutual_information(clusters: np.ndarray, labels: np.ndarray) -> Statistic:
    """Adjusted mutual information of clusters with labels that are some order of the given ones.

    (MI - E) / (mean entropy - E), with E the expectation over all orders: it depends on how many labels of each kind there are
    and not on their order, and is computed once. Equal to scikit-learn's `adjusted_mutual_info_score`.
    """
    from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

    cluster = np.unique(clusters, return_inverse=True)[1]
    rows, columns, total = int(cluster.max()) + 1, int(labels.max()) + 1, len(labels)
    expected = expected_mutual_information(contingency_matrix(labels, cluster, sparse=True), total)
    entropies = [_entropy(np.bincount(x)) for x in (cluster, labels)]
    room = sum(entropies) / 2 - expected

    def statistic(labels: np.ndarray) -> float:
        joint = _entropy(np.bincount(cluster * columns + labels, minlength=rows * columns))
        return (sum(entropies) - joint - expected) / room if abs(room) > 1e-12 else 0.0

    return statistic


def clusters(content: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """(P,) k-means clusters of (P, d) content by direction, at most `count` and never more than there are different rows."""
    from sklearn.cluster import KMeans

    unit = unit_rows(content)
    count = min(count, len(np.unique(unit.round(6), axis=0)))
    return KMeans(count, n_init=4, random_state=seed).fit_predict(unit)  # pyright: ignore[reportArgumentType]


def purity(content: np.ndarray, images: np.ndarray, labels: np.ndarray) -> Statistic:
    """Share of queries whose nearest content, by cosine, in another image has the same label; where several are as near, the
    share among these. Contents (P, d), images (P,)."""
    near = neighbours(content, images)
    kinds = int(labels.max()) + 1
    rows = np.flatnonzero(np.diff(near.indptr))  # those with another image to look in

    def statistic(labels: np.ndarray) -> float:
        shares = near @ np.eye(kinds)[labels]  # (P, kinds)
        return float(shares[rows, labels[rows]].mean())

    return statistic


def neighbours(content: np.ndarray, images: np.ndarray) -> csr_array:
    """(P, P), row i: the nearest of other images, each with an equal share of 1."""
    unit, size = unit_rows(content), 512
    rows, columns, shares = [], [], []
    for start in range(0, len(unit), size):
        cosine = unit[start : start + size] @ unit.T
        cosine[images[start : start + size, None] == images[None]] = -np.inf
        best = cosine.max(1, keepdims=True)
        row, column = np.nonzero((cosine >= best - _AS_NEAR) & np.isfinite(best))
        rows.append(row + start)
        columns.append(column)
        shares.append(1 / np.bincount(row, minlength=len(cosine))[row])
    places = (np.concatenate(rows), np.concatenate(columns))
    return csr_array((np.concatenate(shares), places), shape=(len(unit), len(unit)))


def unit_rows(content: np.ndarray) -> np.ndarray:
    """(N, d) rows at length 1, in float64."""
    values = content.astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
