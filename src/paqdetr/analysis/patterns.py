"""Patterns as a chapter of a report: what they are used for, and whether that is meaning or chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import pdist

from paqdetr.analysis.semantics import SHUFFLES, Semantics, semantics, unit_rows
from paqdetr.analysis.subject import Analysis, model_column
from paqdetr.data.dataset import DetectionDataset
from paqdetr.drawing import Canvas, captioned, mark, tiled
from paqdetr.evaluation.content import ContentStudy
from paqdetr.report.plots import GREY, PALETTE, colour, heat_map, legend, new_axes, new_grid, plot_part
from paqdetr.report.section import Column, Part, Picture, Section, make_table
from paqdetr.serialize import plain
from paqdetr.text import literal

# Rows that differ: fewer make no map; for fewer than the second number t-SNE is computed exactly.
_LEAST_DIFFERENT, _FEW = 8, 200


def cluster_order(rows: np.ndarray) -> np.ndarray:
    """An order of (R, D) rows in which like ones stand together: leaves of average-linkage clustering by Euclidean distance, in
    scipy's optimal order."""
    if len(rows) < 3:
        return np.arange(len(rows))
    distances = pdist(np.asarray(rows, dtype=np.float64))
    return leaves_list(optimal_leaf_ordering(linkage(distances, "average"), distances))


def pattern_cosines(patterns: np.ndarray) -> np.ndarray:
    """(m, m) cosines of (m, d) patterns."""
    unit = unit_rows(patterns)
    return unit @ unit.T


def embed(content: np.ndarray, *, seed: int = 0) -> dict[str, np.ndarray]:
    """(P, d) content in two dimensions: {"PCA": (P, 2), "t-SNE": (P, 2)}; the same seed gives the same places, and equal rows
    have the same place. Empty if fewer than eight rows differ: a static table of few queries has no map."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    # Equal rows are embedded once: t-SNE's tree does not survive heaps of points in one place.
    scale = float(np.abs(content).max(initial=0)) or 1.0
    values = content.astype(np.float64)
    _, first, inverse = np.unique((values / scale).round(5), axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    values = values[first]
    if len(values) < _LEAST_DIFFERENT:
        return {}
    width = min(30, *values.shape)
    reduced = PCA(width, svd_solver="full").fit_transform(values)
    tsne = TSNE(
        2,
        perplexity=min(30.0, (len(values) - 1) / 3),
        init="pca",
        learning_rate="auto",
        random_state=seed,
        method="exact" if len(values) < _FEW else "barnes_hut",
    )
    return {"PCA": reduced[inverse, :2], "t-SNE": np.asarray(tsne.fit_transform(reduced))[inverse]}


# As many categories get a colour and shape of their own; the rest share one.
_COLOURS = 3 * len(PALETTE)
_EMBEDDED = 1200
_LEAD = (
    "What the content of queries has to do with what they find. The pictures suggest meaning wherever one "
    "looks for it; the first table says how much of it is there. Each number is held against shuffled labels: "
    "over all queries (chance), within each image (what stands together is found together), and within each "
    "query index (an index has its places, and these their categories). Only what beats the last two says "
    "that the image decided what the query looks for. The static twin is the same model with the mean content "
    "of each index, as a learned table would have it."
)


@dataclass(frozen=True, slots=True)
class ContentReport:
    """A model's content, to be shown alone or beside another's.

    Attributes:
        name: of the model, as the page calls it.
        study: of `ContentCollector.study`.
        semantics: of `paqdetr.analysis.semantics.semantics`.
    """

    name: str
    study: ContentStudy
    semantics: Semantics


def pattern_chapter(analysis: Analysis) -> Section:
    """`pattern_section` of an analysis, with as many permutations as there are resamples."""
    found = []
    for done, one in enumerate(analysis.models):
        analysis.progress("patterns", done, len(analysis.models))
        study = one.content.study(one.model)
        measured = semantics(study, permutations=max(analysis.samples - 1, 19), seed=analysis.seed)
        found.append(ContentReport(one.label, study, measured))
    analysis.progress("patterns", len(found), len(found))
    return pattern_section(found, analysis.models[0].split, seed=analysis.seed)


def pattern_section(models: Sequence[ContentReport], split: DetectionDataset, *, seed: int = 0) -> Section:
    """The chapter on patterns.

    Args:
        models: one, or two side by side, a static one for example; of one without patterns there is less to show.
        split: whose evaluation was observed, for its pictures.
        seed: of the embeddings.

    Raises:
        DataError: an image cannot be read.
    """
    parts = [_image_share(models), _meaning(models)]
    for model, suffix in zip(models, ("", "_against"), strict=False):
        own = [
            _category_map(model),
            _embedding(model, seed),
            _cosines(model),
            _exciting_images(model, split),
            *_one_image(model, split),
        ]
        parts += [replace(part, name=part.name + suffix) for part in own if part is not None]
    kept = tuple(part for part in parts if part is not None)
    return Section(key="patterns", title="Patterns and meaning", lead=_LEAD, parts=kept)


def _meaning(models: Sequence[ContentReport]) -> Part | None:
    words = {"all": "over all", "image": "in each image", "index": "in each index"}
    tests = [
        {"model": model.name, "measure": m.name, "value": m.value, "twin": m.twin, "shuffled": words[kind]}
        | m.shuffled[kind].to_json()
        for model in models
        for m in model.semantics.measures
        for kind in SHUFFLES
    ]
    if not tests:
        return None
    columns = (
        *model_column(models),
        Column("measure", "measure", "text"),
        Column("value", "value"),
        Column("twin", "static twin"),
        Column("shuffled", "labels shuffled", "text"),
        Column("mean", "then: mean"),
        Column("low", "2.5 %"),
        Column("high", "97.5 %"),
        Column("p", "p"),
    )
    first = models[0].semantics
    caption = (
        f"{first.samples} matched queries, {first.categories} categories, {first.permutations} shufflings "
        "of each kind. Dominant pattern and cluster: adjusted mutual information with the category, 0 by "
        "chance and 1 for a one-to-one relation. Nearest neighbour: share of queries whose nearest content in "
        "another image belongs to the same category. p: share of shufflings that reach the value."
    )
    return make_table("pattern_meaning", caption, columns, tests, digits=6)


def _image_share(models: Sequence[ContentReport]) -> Part:
    columns = (
        Column("model", "model", "text", lambda m: m.name),
        Column("index", "by the index", "percent", lambda m: 1 - m.study.image_share),
        Column(
            "image",
            "by the image, for all its queries alike",
            "percent",
            lambda m: m.study.image_share - m.study.query_share,
        ),
        Column("query", "by both together", "percent", lambda m: m.study.query_share),
    )
    caption = (
        "What decides a query's content: shares of its variance over queries and images. Content that nothing "
        "but the index decides is a learned table, whatever made it. The last share is what differs between the queries "
        "of one image beyond their index: what each query looks at, where mixtures are computed from that."
    )
    return make_table("content_variance", caption, columns, models, digits=6)


# ------------------------------------------------------------------------------------------------- plots


def _category_map(model: ContentReport) -> Part | None:
    """Categories by patterns, both in the order of a clustering."""
    study = model.study
    lift = study.category_lift()
    if lift is None or study.category_weights is None:
        return None
    seen = np.flatnonzero(study.category_counts)
    rows, columns = seen[cluster_order(lift[seen])], cluster_order(lift[seen].T)
    values = lift[np.ix_(rows, columns)]
    names = [f"{study.classes.names[c]} ({study.category_counts[c]})" for c in rows]
    height = min(max(2.2, 1.2 + 0.22 * len(rows)), 12)
    axes = new_axes(width=7.0, height=height, x="pattern", title=f"{model.name}: patterns of each category")
    heat_map(
        axes, np.clip(values, -3, 3), rows=names, columns=[str(c) for c in columns], centred=True,
        bar="log2 of the weight over the mean", form="",
    )  # fmt: skip
    axes.tick_params(axis="x", labelsize=6)
    caption = (
        "Mean mixture weight of each pattern in the queries matched with a category, over its mean in all "
        "matched queries: 1 is twice as much, -1 half. Matches in brackets. Rows and columns stand in the "
        "order of a hierarchical clustering."
    )
    data = {
        "categories": [study.classes.names[c] for c in rows],
        "matches": study.category_counts[rows].tolist(),
        "patterns": columns.tolist(),
        "mean_weights": plain(study.category_weights[np.ix_(rows, columns)], 6),
        "log2_lift": plain(values, 6),
    }
    return plot_part(axes, name="category_patterns", caption=caption, data=data)


def _embedding(model: ContentReport, seed: int) -> Part | None:
    """Matched content queries in two dimensions, by PCA and by t-SNE, coloured by category."""
    samples = model.study.samples
    if len(samples) > _EMBEDDED:
        chosen = np.random.default_rng(seed).choice(len(samples), _EMBEDDED, replace=False)
        samples = samples.rows(np.sort(chosen))
    places = embed(samples.content, seed=seed)
    if not places:
        return None
    plots = new_grid(1, 2, width=7.4, height=3.6, titles=[f"{model.name}: {name}" for name in places])
    kinds, counts = np.unique(samples.categories, return_counts=True)
    common = kinds[np.argsort(-counts, kind="stable")][:_COLOURS]
    names = model.study.classes.names
    for axes, points in zip(plots, places.values(), strict=True):
        rest = ~np.isin(samples.categories, common)
        if rest.any():
            axes.scatter(*points[rest].T, s=7, color=GREY, alpha=0.5, linewidths=0, label="others")
        for number, kind in enumerate(common.tolist()):
            own = points[samples.categories == kind]
            shape = "o^s"[number // len(PALETTE)]
            style: dict[str, Any] = {"color": colour(number), "marker": shape, "label": literal(names[kind])}
            axes.scatter(*own.T, s=13, alpha=0.75, linewidths=0, **style)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
    legend(plots[-1], outside=True)
    caption = (
        f"{len(samples)} content queries as they entered the decoder, coloured by the category that each was "
        "matched with in the end. Distances in t-SNE say who is near, not how far apart groups are. The "
        "numbers that decide are in the table above."
    )
    data = {"categories": [names[c] for c in samples.categories]} | {k: plain(v, 6) for k, v in places.items()}
    return plot_part(plots[0], name="content_embedding", caption=caption, data=data)


def _cosines(model: ContentReport) -> Part | None:
    patterns = model.study.patterns
    if patterns is None:
        return None
    cosine = pattern_cosines(patterns)
    order = cluster_order(patterns)
    others = np.abs(cosine[~np.eye(len(cosine), dtype=bool)])
    axes = new_axes(width=5.4, height=4.6, title=f"{model.name}: cosine between patterns")
    words = [str(pattern) for pattern in order]
    values = cosine[np.ix_(order, order)]
    heat_map(axes, values, rows=words, columns=words, low=-1, high=1, centred=True, form="", most_labels=24)
    random = np.sqrt(2 / np.pi / patterns.shape[1])
    caption = (
        "Cosine between patterns, in the order of a clustering. Mean of the absolute values: "
        f"{others.mean():.3f}; random directions in {patterns.shape[1]} dimensions would have {random:.3f}."
    )
    data = {"patterns": order.tolist(), "cosine": plain(values, 6), "mean_absolute": round(float(others.mean()), 6)}
    return plot_part(axes, name="pattern_cosines", caption=caption, data=data)


# ---------------------------------------------------------------------------------------------- pictures


def exciting_images(
    study: ContentStudy, *, patterns: int = 5, images: int = 4
) -> list[tuple[int, list[tuple[int, float]]]]:
    """For the patterns whose mass depends most on the image: the images with the most of it.

    Returns:
        (pattern, [(image of the split, its mass over the pattern's mean mass), ...]), the most variable pattern first.
    """
    if study.image_mass is None:
        return []
    mass = study.image_mass.astype(np.float64)
    # In units of an equal share, so that a pattern nobody uses is not "variable".
    spread = mass.std(0) * mass.shape[1]
    found = []
    for pattern in np.argsort(-spread, kind="stable")[:patterns].tolist():
        best = np.argsort(-mass[:, pattern], kind="stable")[:images]
        ratios = mass[best, pattern] / max(mass[:, pattern].mean(), 1e-12)
        found.append((pattern, list(zip(study.images[best].tolist(), ratios.tolist(), strict=True))))
    return found


def _exciting_images(model: ContentReport, split: DetectionDataset) -> Part | None:
    found = exciting_images(model.study)
    if not found:
        return None
    rows = []
    for pattern, images in found:
        rows.append([])
        for index, ratio in images:
            picture = split.image_or_blank(index)
            picture.thumbnail((150, 150))
            rows[-1].append(captioned(picture, f"{pattern}: {ratio:.2f} x"))
    caption = (
        "The images that excite a pattern most, for the patterns whose weight depends most on the image; "
        "above each the pattern, and how much more of it the image's queries hold than those of a mean image."
    )
    data = [
        {"pattern": pattern, "images": [[str(split.image_ids[i]), round(ratio, 4)] for i, ratio in images]}
        for pattern, images in found
    ]
    return Picture(name="exciting_images", caption=caption, image=tiled(rows, gap=6), data=data)


def _one_image(model: ContentReport, split: DetectionDataset) -> list[Part | None]:
    """The mixtures of one image's matched queries, and the picture they belong to."""
    study = model.study
    samples = study.samples
    if samples.weights is None or not len(samples):
        return []
    # Of the images with the most categories the one with the fewest boxes: many to distinguish, little clutter.
    images = np.unique(samples.images).tolist()
    kinds = [samples.categories[samples.images == image] for image in images]
    chosen = min(zip(images, kinds, strict=True), key=lambda one: (-len(np.unique(one[1])), len(one[1])))[0]
    own = samples.rows(samples.images == chosen)
    assert own.weights is not None
    own = own.rows(np.argsort(own.categories, kind="stable")[:12])
    assert own.weights is not None
    names = [study.classes.names[c] for c in own.categories]
    canvas = Canvas(split.image_or_blank(chosen), size=640, dim=0.15, smooth=True)
    for number, (box, name) in enumerate(zip(own.boxes, names, strict=True)):
        x, y, w, h = box.tolist()
        canvas.box([x - w / 2, y - h / 2, x + w / 2, y + h / 2], mark(number), label=f"{number + 1} {name}")
    ident = str(split.image_ids[chosen])
    lift = own.weights / np.maximum(samples.weights.mean(0), 1e-12)
    top = np.argsort(-own.weights.max(0), kind="stable")[:16]
    axes = new_axes(
        width=7.0, height=1.4 + 0.26 * len(own), x="pattern", title=f"{model.name}: mixtures of image {ident}"
    )
    rows = [f"{number + 1} {name}" for number, name in enumerate(names)]
    heat_map(axes, own.weights[:, top], rows=rows, columns=[str(p) for p in top], bar="weight", low=0)
    data = {
        "image": ident,
        "categories": names,
        "queries": own.queries.tolist(),
        "weights": plain(own.weights, 6),
        "over_mean": plain(lift, 6),
    }
    caption = f"Boxes of image {ident} whose queries are taken apart below."
    picture = Picture(name="mixture_image", caption=caption, image=canvas.picture())
    caption = "What these queries were mixed from: weights of the patterns that are largest in any of them."
    mixed = plot_part(axes, name="mixtures", caption=caption, data=data)
    return [picture, mixed]
