"""What the collector keeps of content queries, and the chapters that are made of it."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image

from paqdetr.analysis.patterns import (
    ContentReport,
    cluster_order,
    embed,
    exciting_images,
    pattern_cosines,
    pattern_section,
)
from paqdetr.analysis.semantics import semantics
from paqdetr.analysis.usage import Usage, usage_section
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.errors import DataError
from paqdetr.evaluation.content import ContentCollector, ContentStudy
from paqdetr.evaluation.evaluate import evaluate_split
from paqdetr.metrics import QueryUsage, QueryUsageReport, Spread
from paqdetr.models import create_model
from paqdetr.models.detector import Detector
from paqdetr.paq import Mixture, OneToOneAssigner
from paqdetr.report.section import Figure, Picture, Section, Table
from paqdetr.runs import Run
from paqdetr.structures import Targets

N, C, M, D = 5, 3, 4, 6


@dataclass
class Output:
    """All that the collector looks at."""

    pred_logits: torch.Tensor
    pred_boxes: torch.Tensor
    mixture: Mixture


def image(seed: int) -> tuple[Output, Targets]:
    draw = torch.Generator().manual_seed(seed)
    count = 1 + seed % 3
    target = Targets(torch.randint(C, (count,), generator=draw), torch.rand(count, 4, generator=draw) * 0.4 + 0.2)
    weights = torch.randn(1, N, M, generator=draw).softmax(-1)
    mixture = Mixture(content=torch.randn(1, N, D, generator=draw), weights=weights)
    logits = torch.randn(1, N, C, generator=draw)
    return Output(logits, torch.rand(1, N, 4, generator=draw) * 0.4 + 0.2, mixture), target


def collected(seeds: list[int], limit: int = 3000) -> ContentCollector:
    collector = ContentCollector(num_classes=C, limit=limit)
    for seed in seeds:
        output, target = image(seed)
        collector.see(output, [target], [seed])  # type: ignore[arg-type]
    return collector


@pytest.fixture(scope="module")
def anyone() -> Detector:
    return create_model("dino_nano", num_classes=C, dim=32, ffn_dim=64, num_queries=N, image_size=96)


def test_against_a_slow_reference(anyone: Detector) -> None:
    study = collected(list(range(10))).study(anyone)
    rows: list[tuple[int, int, int]] = []
    weights: dict[int, list[np.ndarray]] = {c: [] for c in range(C)}
    contents = np.stack([image(seed)[0].mixture.content[0].numpy() for seed in range(10)])  # (10, N, D)
    for seed in range(10):
        output, target = image(seed)
        pairs = OneToOneAssigner()(output.pred_logits, output.pred_boxes, [target])[0]
        for query, box in zip(pairs.query_indices.tolist(), pairs.target_indices.tolist(), strict=True):
            category = int(target.labels[box])
            rows.append((seed, query, category))
            assert output.mixture.weights is not None
            weights[category].append(output.mixture.weights[0, query].numpy())
            place = len(rows) - 1
            assert study.samples.content[place] == pytest.approx(contents[seed, query])
            assert study.samples.boxes[place] == pytest.approx(target.boxes[box].numpy())
    samples = study.samples
    assert list(zip(samples.images, samples.queries, samples.categories, strict=True)) == rows
    assert study.matched == len(rows) == sum(1 + seed % 3 for seed in range(10))
    assert study.category_weights is not None and study.image_mass is not None
    for category, found in weights.items():
        assert study.category_counts[category] == len(found)
        assert study.category_weights[category] == pytest.approx(np.mean(found, axis=0), abs=1e-6)
    assert study.index_content == pytest.approx(contents.mean(0), abs=1e-6)
    within = np.square(contents - contents.mean(0)).sum()
    whole = np.square(contents - contents.mean((0, 1))).sum()
    assert study.image_share == pytest.approx(within / whole, abs=1e-6)
    additive = contents.mean(0) + contents.mean(1, keepdims=True) - contents.mean((0, 1))
    assert study.query_share == pytest.approx(np.square(contents - additive).sum() / whole, abs=1e-6)
    for place, index in enumerate(study.images):
        mass = image(int(index))[0].mixture.weights
        assert mass is not None and study.image_mass[place] == pytest.approx(mass[0].mean(0).numpy())
    overall = np.concatenate([np.asarray(found) for found in weights.values()]).mean(0)
    lift = study.category_lift()
    assert lift is not None
    assert lift[0] == pytest.approx(np.log2(study.category_weights[0] / overall), abs=1e-5)


def require_same(one: ContentStudy, other: ContentStudy) -> None:
    for name in ("images", "queries", "categories", "boxes", "content", "weights"):
        assert np.array_equal(getattr(one.samples, name), getattr(other.samples, name)), name
    for name in ("category_weights", "index_content", "index_weights", "images", "image_mass"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), name
    assert (one.matched, one.image_share) == (other.matched, other.image_share)
    assert one.query_share == other.query_share


@pytest.mark.parametrize("limit", [3000, 6])
def test_neither_order_nor_sharing_out_change_anything(limit: int, anyone: Detector) -> None:
    straight = collected(list(range(12)), limit).study(anyone)
    first, second = collected([7, 1, 9, 3, 11, 5], limit), collected([10, 4, 2, 0, 8, 6], limit)
    first.merge(pickle.loads(pickle.dumps(second)))
    require_same(first.study(anyone), straight)
    assert len(straight.samples) == min(limit, 24) and straight.matched == 24


def test_the_kept_part_is_no_first_part(anyone: Detector) -> None:
    kept = collected(list(range(60)), 20).study(anyone).samples.images
    assert kept.min() < 20 and kept.max() >= 40, "not the first images, and not the last"


def test_a_static_table_has_nothing_of_the_image(anyone: Detector) -> None:
    collector = ContentCollector(num_classes=C)
    table = torch.randn(1, N, D)
    for seed in range(6):
        output, target = image(seed)
        output.mixture = Mixture(content=table, weights=None)
        collector.see(output, [target], [seed])  # type: ignore[arg-type]
    study = collector.study(anyone)
    assert study.image_share == pytest.approx(0, abs=1e-6)
    assert study.category_weights is None and study.samples.weights is None and study.category_lift() is None
    assert exciting_images(study) == []


@pytest.mark.parametrize(
    ("decided_by", "image_share", "query_share"),
    [("index", 0.0, 0.0), ("image", 1.0, 0.0), ("both", 1.0, 1.0), ("sum", 0.5, 0.0)],
)
def test_shares_of_content_that_is_made_of_known_parts(decided_by: str, image_share: float, query_share: float) -> None:
    """Signs of a two-level design, so that each part has the variance 1 and a mean of zero."""
    collector = ContentCollector(num_classes=C)
    index, signs = torch.tensor([1.0, 1, -1, -1])[:, None], torch.tensor([1.0, -1, 1, -1])
    for seed, sign in enumerate(signs):
        content = {"index": index, "image": sign.expand(4, 1), "both": sign * index, "sum": sign + index}
        output, target = image(seed)
        output.mixture = Mixture(content=content[decided_by][None].expand(1, -1, D), weights=None)
        output.pred_logits, output.pred_boxes = output.pred_logits[:, :4], output.pred_boxes[:, :4]
        collector.see(output, [target], [seed])  # type: ignore[arg-type]
    shares = {"image_share": image_share, "query_share": query_share}
    assert collector.shares == pytest.approx(shares, abs=1e-6)


def test_no_boxes_at_all(anyone: Detector) -> None:
    collector = ContentCollector(num_classes=C)
    output, _ = image(0)
    none = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    collector.see(output, [none], [0])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="none of the 1 images"):
        collector.study(anyone)
    with pytest.raises(ValueError, match="limit"):
        ContentCollector(num_classes=C, limit=0)


def test_like_rows_stand_together() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat([0, 1, 2], 5))
    rows = np.eye(3)[kinds] * 10 + rng.normal(size=(15, 3))
    ordered = kinds[cluster_order(rows)]
    assert int((np.diff(ordered) != 0).sum()) == 2, "three runs"
    assert cluster_order(rows[:2]).tolist() == [0, 1]


def test_embeddings_are_seeded_and_keep_groups_apart() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 12)
    content = (rng.normal(size=(24, 5)) + 8 * groups[:, None]).astype(np.float32)
    first, again = embed(content, seed=1), embed(content, seed=1)
    for name, places in first.items():
        assert places.shape == (24, 2) and np.array_equal(places, again[name])
        centres = [places[groups == group].mean(0) for group in (0, 1)]
        spread = max(np.linalg.norm(places[groups == g] - centres[g], axis=1).mean() for g in (0, 1))
        assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread, name


@pytest.mark.parametrize("different", [1, 5, 9, 210])
def test_embeddings_of_equal_rows(different: int) -> None:
    """Static tables: every row many times. Zero, which some tables start with, too."""
    rows = np.random.default_rng(0).normal(size=(different, 4)) * (different > 1)
    found = embed(np.tile(rows, (3, 1)).astype(np.float32))
    assert bool(found) == (different >= 8)
    for places in found.values():
        assert places.shape == (3 * different, 2) and np.isfinite(places).all()
        assert np.array_equal(places[:different], places[-different:])
        assert len(np.unique(places, axis=0)) == different


def test_cosines() -> None:
    found = pattern_cosines(np.array([[2.0, 0], [0, 3], [-1, 0], [0, 0]]))
    assert found.tolist() == [[1, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]


def test_exciting_images_by_hand(anyone: Detector) -> None:
    study = collected(list(range(3))).study(anyone)
    mass = np.array([[0.25, 0.5, 0.25, 0], [0.25, 0.2, 0.55, 0], [0.25, 0.35, 0.4, 0]], dtype=np.float32)
    planted = ContentStudy(
        study.classes, study.matched, study.samples, study.category_counts, None, study.index_content, None,
        0.5, 0.25, study.images, mass, None,
    )  # fmt: skip
    (pattern, images), (second, _) = exciting_images(planted, patterns=2, images=2)
    assert (pattern, second) == (2, 1), "0 is the same in every image, 3 is never there"
    assert [index for index, _ in images] == [1, 2]
    assert images[0][1] == pytest.approx(0.55 / 0.4)


# ---------------------------------------------------------------------------------------------- chapters


@pytest.fixture(scope="module")
def split(tiny_digits: Path) -> DetectionDataset:
    return open_split(tiny_digits, "train")


@pytest.fixture(scope="module")
def observed(split: DetectionDataset) -> dict[str, tuple[QueryUsageReport, ContentStudy]]:
    """Of an untrained model with patterns, and of one without."""
    found = {}
    for name in ("paq_dino_nano", "dn_detr_nano"):
        torch.manual_seed(0)
        model = create_model(name, num_classes=10, dim=32, ffn_dim=64, num_queries=12, image_size=96).eval()
        model.classes = split.classes
        with torch.no_grad():  # content that starts at zero would have nothing to show
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        usage, collector = QueryUsage(num_queries=12), ContentCollector(num_classes=10)
        evaluate_split(model, split, observers=[usage, collector])
        gradients = Spread(counts=np.arange(12.0), images=8, ranked=True, discrete=False)
        found[name] = usage.report(gradients=gradients), collector.study(model)
    return found


def require_sound(section: Section) -> set[str]:
    """Names are unique, numbers are json, pictures are not empty; the names."""
    names = [part.name for part in section.parts]
    assert len(set(names)) == len(names)
    for part in section.parts:
        assert part.caption.strip().endswith(".") or part.caption.endswith(")"), part.name
        if isinstance(part, Table):
            for row in part.rows:
                assert {column.key for column in part.columns} <= row.keys(), part.name
            json.dumps(part.rows, allow_nan=False)
            continue
        json.dumps(part.data, allow_nan=False)
        if isinstance(part, Figure):
            assert "<svg" in part.svg and part.data
        else:
            assert isinstance(part, Picture) and isinstance(part.image, Image) and min(part.image.size) > 50
    return set(names)


def test_the_chapter_on_use(observed: Any, tiny_run: Run) -> None:
    paq, plain = (observed[name][0] for name in ("paq_dino_nano", "dn_detr_nano"))
    alone = require_sound(usage_section([Usage("static", plain)]))
    assert alone == {"query_views", "query_content", "lorenz", "use_by_index", "index_and_rank", "query_places"}
    records = tiny_run.records("train")
    records = [
        row | {"positives_histogram": {"layer1": {"0": 0, "1": 3, "2": 1}, "layer2": {"0": 0, "1": 4}}}
        for row in records
    ]
    section = usage_section([Usage("paq", paq, records), Usage("static", plain)])
    assert require_sound(section) == alone | {"positives_over_training", "gini_over_training"}
    views = section.parts[0]
    assert isinstance(views, Table)
    assert [row["what"][:3] for row in views.rows if row["model"] == "paq"] == [
        *["(a)"] * 3, "(b)", "(c)", "(d)", "(e)",
    ]  # fmt: skip
    by_name = {part.name: part for part in section.parts}
    shares = by_name["positives_over_training"].data["shares"]  # type: ignore[union-attr]
    assert shares[0] == [[0.75, 0.25], [1.0, 0.0]]
    assert by_name["use_by_index"].data["(c) matched"]["paq"] == pytest.approx(  # type: ignore[union-attr]
        (paq.positives.counts / paq.images).tolist(), abs=1e-6
    )


def test_the_chapter_on_patterns(observed: Any, split: DetectionDataset) -> None:
    studied = []
    for name, (_, study) in observed.items():
        studied.append(ContentReport(name, study, semantics(study, permutations=9)))
    section = pattern_section(studied, split)
    names = require_sound(section)
    both = {"content_embedding", "content_embedding_against"}
    mixes = {"category_patterns", "pattern_cosines", "exciting_images", "mixture_image", "mixtures"}
    assert names == both | mixes | {"pattern_meaning", "content_variance"}
    meaning = next(part for part in section.parts if part.name == "pattern_meaning")
    assert isinstance(meaning, Table) and len(meaning.rows) == 3 * 3 + 2 * 3
    shares = next(part for part in section.parts if part.name == "content_variance")
    assert isinstance(shares, Table)
    for row, model in zip(shares.rows, studied, strict=True):
        assert row["index"] + row["image"] + row["query"] == pytest.approx(1, abs=1e-5)
        assert row["query"] == pytest.approx(model.study.query_share, abs=1e-6)
    static = [row for row in meaning.rows if row["model"] == "dn_detr_nano" and "index" in row["shuffled"]]
    assert all(row["value"] == pytest.approx(row["twin"], abs=1e-6) for row in static), "its own twin"
    assert next(row["p"] for row in static if row["measure"] == "cluster") == 1.0
    heat = next(part for part in section.parts if part.name == "category_patterns")
    assert isinstance(heat, Figure)
    study = studied[0].study
    assert study.category_weights is not None
    place = heat.data["categories"].index(study.classes.names[int(study.samples.categories[0])])
    expected = study.category_weights[study.samples.categories[0], heat.data["patterns"]]
    assert heat.data["mean_weights"][place] == pytest.approx(expected.tolist(), abs=1e-6)
