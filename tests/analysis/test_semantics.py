"""Whether content knows categories: on structures that were planted, and on none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from paqdetr.analysis.semantics import (
    Measure,
    clusters,
    mutual_information,
    neighbours,
    purity,
    semantics,
    shuffle_test,
)
from paqdetr.evaluation.content import ContentStudy, Samples
from paqdetr.structures import ClassTable

IMAGES, QUERIES, CATEGORIES, WIDTH = 40, 6, 3, 8
SETTINGS = {"permutations": 99, "seed": 0}


def study(kind: str, seed: int = 0) -> ContentStudy:
    """Every query of every image is matched. Content is decided by `kind` alone; weights follow content, 8 patterns.

    A query's category follows its index four times out of five, and else the image's own category.
    """
    rng = np.random.default_rng(seed)
    image, query = (x.ravel() for x in np.mgrid[:IMAGES, :QUERIES])
    own = rng.integers(CATEGORIES, size=IMAGES)
    category = np.where(rng.random(len(query)) < 0.8, query % CATEGORIES, own[image])
    if kind == "image":
        category = own[image]
    if kind == "index and category":  # and the category is not the index's
        category = rng.integers(CATEGORIES, size=len(query))
    decided_by = {
        "nothing": rng.integers(100, size=len(query)),
        "category": category,
        "index": query,
        "image": image,
        "index and category": query * CATEGORIES + category,
    }[kind]
    table = rng.normal(size=(200, WIDTH))
    content = table[decided_by].astype(np.float32)
    if kind not in ("index", "image"):
        content += rng.normal(size=content.shape, scale=0.1).astype(np.float32)
    weights = np.exp(4 * content) / np.exp(4 * content).sum(1, keepdims=True)
    grid = (IMAGES, QUERIES, WIDTH)
    return ContentStudy(
        classes=ClassTable.numbered(CATEGORIES),
        matched=len(query),
        samples=Samples(image, query, category, np.zeros((len(query), 4), np.float32), content, weights),
        category_counts=np.bincount(category, minlength=CATEGORIES),
        category_weights=None,
        index_content=content.reshape(grid).mean(0),
        index_weights=weights.reshape(grid).mean(0),
        image_share=0.5,
        query_share=0.5,
        images=np.arange(IMAGES),
        image_mass=None,
        patterns=None,
    )


def measured(kind: str) -> dict[str, Measure]:
    found = semantics(study(kind), **SETTINGS)
    assert (found.samples, found.categories) == (IMAGES * QUERIES, CATEGORIES)
    json.dumps(found.to_json(), allow_nan=False)
    return {measure.name: measure for measure in found.measures}


def test_content_that_knows_the_category() -> None:
    for name, measure in measured("category").items():
        # The largest of eight weights may be the same for two categories; clusters and neighbours see all of them.
        assert measure.value > (0.5 if name == "dominant pattern" else 0.999), name
        for kind, test in measure.shuffled.items():
            assert test.p == 0.01 and test.high < measure.value, (name, kind)
        assert measure.twin < measure.value, "the index alone knows less"


def test_content_that_knows_nothing() -> None:
    for name, measure in measured("nothing").items():
        test = measure.shuffled["all"]
        assert test.low - 0.05 < measure.value < test.high + 0.05, name
        if name != "nearest neighbour":
            assert abs(measure.value) < 0.06 and abs(test.mean) < 0.02


def test_content_that_knows_the_index_alone() -> None:
    """It looks like knowledge of categories until labels are shuffled within the index: that changes nothing at all."""
    for name, measure in measured("index").items():
        assert measure.shuffled["all"].p == 0.01 and measure.value > measure.shuffled["all"].high, name
        index = measure.shuffled["index"]
        assert measure.twin == pytest.approx(measure.value, abs=1e-9), "content is its own twin"
        if name == "nearest neighbour":
            assert abs(measure.value - index.mean) < 0.05 and index.p > 0.05
        else:
            assert index.p == 1.0 and index.mean == pytest.approx(measure.value)


def test_content_that_knows_the_image_alone() -> None:
    for name, measure in measured("image").items():
        image = measure.shuffled["image"]
        assert image.p == 1.0 and image.low == pytest.approx(measure.value), name


def test_knowledge_beyond_the_index() -> None:
    """Content of index and category, where these have nothing to do with each other."""
    found = measured("index and category")["nearest neighbour"]
    assert found.value > 0.95 and found.shuffled["index"].p == 0.01
    assert found.twin < 0.6


def test_under_the_null_hypothesis_p_is_spread_evenly() -> None:
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(3, size=60), np.zeros(60)
    found = []
    for seed in range(60):
        statistic = mutual_information(rng.integers(4, size=60), labels)
        found.append(shuffle_test(statistic, labels, groups, permutations=39, seed=seed).p)
    assert 0.35 < np.mean(found) < 0.65 and np.mean(np.asarray(found) <= 0.1) < 0.25


def test_shuffling_stays_within_groups() -> None:
    labels, groups = np.arange(12) % 4, np.arange(12) % 3
    seen = []

    def note(shuffled: np.ndarray) -> float:
        seen.append(shuffled.copy())
        return 0.0

    found = shuffle_test(note, labels, groups, permutations=20, seed=0)
    assert found.p == 1.0
    for shuffled in seen:
        for group in range(3):
            assert sorted(shuffled[groups == group]) == sorted(labels[groups == group])
    assert len({tuple(shuffled) for shuffled in seen}) > 15


@pytest.mark.parametrize("seed", range(3))
def test_mutual_information_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cluster, labels = rng.integers(7, size=200) * 3, rng.integers(4, size=200)
    cluster[labels == 1] = 3
    statistic = mutual_information(cluster, labels)
    for order in (labels, rng.permutation(labels)):
        assert statistic(order) == pytest.approx(adjusted_mutual_info_score(order, cluster), abs=1e-9)
    assert mutual_information(np.zeros(200), labels)(labels) == pytest.approx(0, abs=1e-12)


def test_neighbours_against_a_slow_search() -> None:
    rng = np.random.default_rng(0)
    content, images = rng.normal(size=(700, 5)), rng.integers(4, size=700)
    content[10:13] = content[20] * 2  # the same direction, three times
    found = neighbours(content, images).toarray()
    unit = content / np.linalg.norm(content, axis=1, keepdims=True)
    for i in range(0, 700, 7):
        others = np.flatnonzero(images != images[i])
        cosine = unit[others] @ unit[i]
        expected = others[cosine > cosine.max() - 1e-6]
        assert np.flatnonzero(found[i]).tolist() == expected.tolist()
        assert found[i].sum() == pytest.approx(1)


def test_purity_by_hand() -> None:
    content = np.array([[1.0, 0], [1, 0.1], [0, 1], [2, 0], [0, 3]])
    images = np.array([0, 0, 0, 1, 2])
    # 0, 1 -> 3; 2 -> 4; 3 -> 0 (1 is farther); 4 -> 2
    statistic = purity(content, images, np.array([0, 1, 0, 0, 1]))
    assert statistic(np.array([0, 1, 0, 0, 1])) == pytest.approx(2 / 5)  # 0 and 3 have each other's label
    tied = purity(np.ones((3, 2)), np.arange(3), np.array([0, 0, 1]))
    assert tied(np.array([0, 0, 1])) == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_clusters_are_no_more_than_there_are_different_rows() -> None:
    content = np.repeat(np.eye(3), 4, axis=0)
    assert len(set(clusters(content, 8))) == 3 and len(set(clusters(content, 2))) == 2


def test_too_little_to_tell() -> None:
    whole = study("category")
    one = whole.samples.categories == 0
    for few in (whole.samples.rows(one), whole.samples.rows(whole.samples.images == 0)):
        small = ContentStudy(
            whole.classes, len(few), few, whole.category_counts, None, whole.index_content,
            whole.index_weights, 0.5, 0.5, whole.images, None, None,
        )  # fmt: skip
        assert semantics(small).measures == ()
