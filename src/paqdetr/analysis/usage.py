"""The use of queries as a chapter of a report: five views in one table, and the pictures behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch.nn.modules.batchnorm import _BatchNorm

from paqdetr.analysis.subject import COLOURS, Analysis, labels, model_column
from paqdetr.data.dataset import DetectionDataset
from paqdetr.errors import DataError
from paqdetr.evaluation.evaluate import require_same_classes
from paqdetr.losses.criterion import Criterion, build_criterion
from paqdetr.metrics import QueryUsageReport, Spread
from paqdetr.models.detector import Detector
from paqdetr.preprocessing import pad_images
from paqdetr.report import plots
from paqdetr.report.section import Column, Part, Section, make_table
from paqdetr.runs import Record
from paqdetr.serialize import finite_rows, plain


@dataclass(frozen=True, slots=True)
class Usage:
    """A model's use of queries, to be shown alone or beside another's.

    Attributes:
        name: of the model, as the page calls it.
        report: of `QueryUsage.report`.
        records: of its training, as of `read_metrics`; empty if there are none.
    """

    name: str
    report: QueryUsageReport
    records: Sequence[Record] = field(default=())


_LEAD = (
    "How unevenly the detector's queries are used. The Gini coefficient is 0 where all queries are used alike "
    "and near 1 where a few do everything. No single number of these can be read alone. A count above a "
    "threshold (a) moves with the scores' calibration: compare models at equal activations (b). With few "
    "images chance alone makes counts uneven: compare each number with the one beside it. In two-stage "
    "detectors the index of a query is the rank of its proposal, and falling use along the ranks makes a "
    "large coefficient by itself. And lower is not better by itself: collapsed models, whose queries are "
    "near-identical, have the lowest of all."
)


def usage_chapter(analysis: Analysis) -> Section:
    """`usage_section` of an analysis, with the gradients that some images of the training split give the queries."""
    found = []
    for one in analysis.models:
        gradients = None
        if analysis.training is not None:
            gradients = content_gradients(
                one.model,
                analysis.training,
                criterion=build_criterion(one.loss[0]),
                images=analysis.images,
                progress=analysis.stage(f"gradients {one.label}"),
            )
        found.append(Usage(one.label, one.usage.report(gradients=gradients), one.records))
    return usage_section(found)


def usage_section(models: Sequence[Usage]) -> Section:
    """The chapter on query use of one model, or of two side by side: view (b) of them is comparable if both reports had the same
    target."""
    makers = (
        _views, _content, _lorenz, _by_index, _ranks, _places, _positives_over_training, _gini_over_training,
    )  # fmt: skip
    parts = [part for make in makers if (part := make(models)) is not None]
    return Section(key="query-use", title="Use of queries", lead=_LEAD, parts=tuple(parts))


def _views(models: Sequence[Usage]) -> Part:
    rows = [
        {"model": model.name, **row, "what": f"({row['view']}) {row['what']}"}
        for model in models
        for row in model.report.rows()
    ]
    columns = (
        *model_column(models),
        Column("what", "view", "text"),
        Column("gini", "Gini"),
        Column("chance", "by chance"),
        Column("by_rank", "by rank alone"),
        Column("per_image", "per image", "amount"),
        Column("threshold", "threshold"),
        Column("unused", "unused", "integer"),
        Column("half", "queries for 50 % of use", "integer"),
    )
    caption = (
        "Five views of how unevenly queries are used. By chance: what counts of this size would give if all "
        "queries were used alike. By rank alone: what the falling use along the proposals' ranks gives. Per "
        "image: queries that an image uses, or its amount. Unused: queries that no image uses, or dead patterns in (e). "
        "Queries for 50 % of use: the fewest that make up half of it."
    )
    return make_table("query_views", caption, columns, rows, digits=6)


def _content(models: Sequence[Usage]) -> Part:
    def patterns(value: Callable[[Any], Any]) -> Callable[[Usage], Any]:
        return lambda usage: None if usage.report.patterns is None else value(usage.report.patterns)

    columns = (
        Column("model", "model", "text", lambda usage: usage.name),
        Column("num_queries", "queries", "integer", lambda usage: usage.report.num_queries),
        Column("images", "images", "integer", lambda usage: usage.report.images),
        Column("boxes_per_image", "boxes per image", "amount", lambda usage: usage.report.boxes_per_image),
        Column("query_cosine", "cosine of queries", value=lambda usage: usage.report.query_cosine),
        Column("num_patterns", "patterns", "integer", patterns(lambda p: len(p.mass))),
        Column("entropy", "mixture entropy", value=patterns(lambda p: p.entropy)),
        Column("dead", "dead patterns", "integer", patterns(lambda p: p.dead)),
        Column("never_lead", "never lead", "integer", patterns(lambda p: p.never_lead)),
        Column("effective", "effective patterns", "amount", patterns(lambda p: p.effective)),
    )
    caption = (
        "What the views stand on. Cosine of queries: 1 means that all content queries of an image are equal. "
        "Mixture entropy: 1 is a uniform mixture, 0 a single pattern. Dead patterns have less than a tenth of "
        "an equal share of the weight; those that never lead are never the largest part of a query."
    )
    return make_table("query_content", caption, columns, models, digits=6)


def _spreads(report: QueryUsageReport) -> dict[str, Spread]:
    """The views that have a curve, by their heading."""
    found = {f"(a) score > {spread.threshold:g}": spread for spread in report.activations[:1]}
    named = {"(b) equal activations": report.equal, "(c) matched": report.positives, "(d) gradient": report.gradients}
    found |= {name: spread for name, spread in named.items() if spread is not None}
    if report.patterns is not None:
        found["(e) patterns"] = Spread(counts=report.patterns.mass, images=report.images, discrete=False)
    return found


def _lorenz(models: Sequence[Usage]) -> Part:
    views = [_spreads(model.report) for model in models]
    names = list(dict.fromkeys(name for view in views for name in view))
    panels = _grid(names, x="share of queries, least used first", y="share of use")
    data: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=False):
        plots.line(axes, [0, 1], [0, 1], colour=plots.GREY, dash=":")
        for model, view, colour in zip(models, views, COLOURS, strict=False):
            if name in view:
                shares, use = view[name].lorenz()
                plots.line(
                    axes, shares, use, colour=colour, label=f"{_short(models)[model.name]} {view[name].gini:.2f}"
                )
                data.setdefault(name, {})[model.name] = plain(np.stack([shares, use], axis=1), 6)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        plots.legend(axes)
    caption = (
        "Lorenz curves: the share of all use that the least used share of the queries makes up. The dotted "
        "line is equal use; the further below it, the less even. The legend has the Gini coefficient."
    )
    return plots.plot_part(panels[0], name="lorenz", caption=caption, data=data)


def _by_index(models: Sequence[Usage]) -> Part:
    views = [{k: v for k, v in _spreads(m.report).items() if not k.startswith("(e)")} for m in models]
    names = list(dict.fromkeys(name for view in views for name in view))
    ranked = any(model.report.ranked for model in models)
    panels = _grid(names, x="index of the query" + (" = rank of its proposal" if ranked else ""), y="per image")
    data: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=False):
        for model, view, colour in zip(models, views, COLOURS, strict=False):
            if name in view:
                values = view[name].counts / max(view[name].images, 1)
                plots.line(axes, np.arange(len(values)), values, colour=colour, label=_short(models)[model.name])
                data.setdefault(name, {})[model.name] = plain(values, 6)
        axes.set_ylim(bottom=0)
        if len(models) > 1:
            plots.legend(axes)
    caption = "How often an image uses each query, or how much of a gradient it gives to it, by the query's index."
    return plots.plot_part(panels[0], name="use_by_index", caption=caption, data=data)


def _ranks(models: Sequence[Usage]) -> Part | None:
    shown = [(model, model.report.places) for model in models if model.report.places is not None]
    if not shown:
        return None
    panels = plots.new_grid(
        1, len(shown), height=3.4, x="rank of the score in its image", y="index of the query",
        titles=[_short(models)[model.name] for model, _ in shown],
    )  # fmt: skip
    data = {}
    for axes, (model, places) in zip(panels, shown, strict=True):
        assert places is not None
        n, cells = model.report.num_queries, len(places.ranks)
        share = places.ranks / max(places.ranks.sum(), 1)
        plots.heat_map(axes, 100 * share, bar="% of matches", form="")
        ticks = np.linspace(0, cells - 1, 5).round().astype(int)
        words = [str(int(tick) * n // cells) for tick in ticks]
        axes.set_xticks(ticks, words)
        axes.set_yticks(ticks, words)
        data[model.name] = plain(share, 6)
    caption = (
        "Where matched queries stand: by their index, and by the rank of their score among all queries of the "
        "image. A detector that finds each object once, and first, has everything in the leftmost columns; a "
        "diagonal means that the order of the proposals is kept to the end."
    )
    return plots.plot_part(panels[0], name="index_and_rank", caption=caption, data=data)


def _places(models: Sequence[Usage]) -> Part | None:
    shown = [m for m in models if m.report.places is not None and m.report.positives is not None]
    if not shown:
        return None
    panels = plots.new_grid(1, len(shown), height=3.6, titles=[_short(models)[m.name] for m in shown], x="x", y="y")
    data = {}
    for axes, model in zip(panels, shown, strict=True):
        places, positives = model.report.places, model.report.positives
        assert places is not None and positives is not None
        used = positives.counts > 0
        mean, counts = places.mean[used], positives.counts[used]
        # An area as large as the mean box would be on axes of two inches; the darker, the more often matched.
        area = np.clip(mean[:, 2] * mean[:, 3] * 144**2, 8, 4000)
        strength = 0.15 + 0.75 * counts / max(counts.max(initial=1), 1)
        axes.scatter(mean[:, 0], mean[:, 1], s=area, alpha=strength, color=plots.BLUE, linewidths=0)
        axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
        data[model.name] = {
            "mean": plain(places.mean, 6),
            "std": plain(places.std, 6),
            "matches": plain(positives.counts, 6),
        }
    caption = (
        "Mean place of the boxes that each query was matched with, in the image; the area is that of the mean "
        "box, and strong colours are matched often. Queries that find boxes all over the image gather in the "
        "middle."
    )
    return plots.plot_part(panels[0], name="query_places", caption=caption, data=data)


def _positives_over_training(models: Sequence[Usage]) -> Part | None:
    """Shares of boxes with 1, 2, ... positives in each intermediate layer; of the first model that has any beyond 1."""
    for model in models:
        rows = [row for row in model.records if row.get("positives_histogram")]
        layers = list(rows[0]["positives_histogram"]) if rows else []
        most = max((int(k) for row in rows for layer in layers for k in row["positives_histogram"][layer]), default=0)
        if most < 2:
            continue
        steps = np.array([row["step"] for row in rows])
        counts = np.array(
            [
                [[row["positives_histogram"][layer].get(str(k), 0) for k in range(most + 1)] for layer in layers]
                for row in rows
            ]
        )  # (R, K - 1, most + 1)
        shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
        kinds = [k for k in range(most + 1) if counts[..., k].any()]
        titles = [f"layer {name.removeprefix('layer')}" for name in layers]
        epochs = np.array([row["epoch"] for row in rows])
        panels = _grid(titles, x="epoch", y="share of boxes")
        for place, (axes, shades) in enumerate(zip(panels, [plots.ramp(len(kinds))] * len(titles), strict=False)):
            axes.stackplot(
                epochs, shares[:, place, kinds].T, labels=[f"{k}" for k in kinds], colors=shades, linewidth=0
            )
            axes.set(ylim=(0, 1), xlim=(epochs.min(), max(epochs.max(), epochs.min() + 1e-3)))
            plots.whole_numbers(axes)
        plots.legend(panels[len(titles) - 1], outside=True)
        caption = (
            f"{_short(models)[model.name]} in training: how many positives boxes have in the layers before the last, by share "
            "of the boxes. Quality-aware assignment gives a box as many as its good predictions deserve."
        )
        data = {
            "model": model.name,
            "steps": steps.tolist(),
            "kinds": kinds,
            "layers": layers,
            "shares": plain(shares[..., kinds], 6),
        }
        return plots.plot_part(panels[0], name="positives_over_training", caption=caption, data=data)
    return None


def _gini_over_training(models: Sequence[Usage]) -> Part | None:
    known = (
        ("positives_gini", "matched in the last layer", plots.BLUE),
        ("positives_gini_chance", "the same by chance", plots.GREY),
        ("gradient_gini", "gradient at content queries", plots.ORANGE),
        ("pattern_gini", "weight of patterns", plots.GREEN),
        ("query_cosine", "cosine of queries (no Gini)", plots.PINK),
        ("mixture_entropy", "entropy of mixtures (no Gini)", plots.SKY),
    )
    shown = [m for m in models if any("positives_gini" in row for row in m.records)]
    if not shown:
        return None
    panels = plots.new_grid(
        1, len(shown), titles=[_short(models)[m.name] for m in shown], x="epoch", y="Gini coefficient", height=3.4
    )
    data: dict[str, Any] = {}
    for axes, model in zip(panels, shown, strict=True):
        for key, label, shade in known:
            points = finite_rows(model.records, ("epoch", key, "step"))
            if len(points):
                plots.line(axes, *points.T[:2], label=label, colour=shade, dash=":" if shade == plots.GREY else "-")
                data.setdefault(model.name, {})[key] = [[int(step), value] for _, value, step in points.tolist()]
        plots.whole_numbers(axes)
        low = min(0.0, axes.get_ylim()[0])
        axes.set_ylim(low, 1)
    plots.legend(panels[-1])
    caption = (
        "The same in training, over the steps between two records. Few boxes make the coefficient of matches "
        "large by chance, which the dotted line shows."
    )
    return plots.plot_part(panels[0], name="gini_over_training", caption=caption, data=data)


def _short(models: Sequence[Usage]) -> dict[str, str]:
    """What plots call each model: A and B, as the page does, where there are two."""
    return {model.name: letter or model.name for model, letter in zip(models, labels(models), strict=True)}


def _grid(titles: Sequence[str], *, x: str, y: str) -> list[Axes]:
    """Up to three plots in a row; places without a plot stay empty."""
    columns = min(len(titles), 3 if len(titles) != 4 else 2)
    rows = -(-len(titles) // columns)
    panels = plots.new_grid(rows, columns, width=7.0, height=2.5 * rows + 0.3, titles=titles, x=x, y=y)
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    for axes in panels:
        axes.tick_params(labelsize=8, colors=plots.MUTED)
    return panels


def content_gradients(
    model: Detector,
    split: DetectionDataset,
    *,
    criterion: Criterion,
    images: int | None = None,
    train_progress: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Spread:
    """Norm of the training loss's gradient at each content query, summed over images.

    Every image passes alone, as an evaluation sees it, without augmentation, and its loss is not divided by its number of boxes:
    an image counts by what there is to learn in it, whatever it stands beside. Denoising queries, whose loss reaches the content
    queries they look at, take part. The model is left as it was: no weight, no running statistic, no gradient changes.

    Args:
        model: a detector; the classes of the split must be among its own.
        split: usually "train".
        criterion: the loss the model was trained with: as of `build_criterion`.
        images: evenly spaced over the split; all if None.
        train_progress: share of the training at which the loss is taken, in [0, 1]; None: where one-to-many assignment begins, if
            it ever does.
        seed: of the denoising noise.
        progress: called with (images done, images in all).

    Returns:
        A `Spread` of amounts: `counts` are the (n,) sums.

    Raises:
        DataError: none of the images can be read, or the split has a class that the model has not.
        NonFiniteError: a prediction is NaN or infinite.
    """
    require_same_classes(model.classes, split)
    count = len(split) if images is None else min(images, len(split))
    if train_progress is None:
        train_progress = criterion.config.one_to_many_from
    if count < 1:
        raise DataError(
            f"{split.annotation_file}: no image to take gradients of", "take another split, or images=1 or more"
        )
    chosen = [place * len(split) // count for place in range(count)]
    device = model.device
    total = torch.zeros(model.config.num_queries, dtype=torch.float64)
    modes = {module: module.training for module in model.modules()}
    ranked, seen = False, 0
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model.train()
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
            for done, index in enumerate(chosen, start=1):
                try:
                    pixels = model.preprocessing(split.checked_image(index))
                except DataError:
                    if done == count and not seen:
                        raise
                    continue
                seen += 1
                pixels, mask = pad_images([pixels], model.preprocessing.pad_divisor)
                target = split.targets(index, classes=model.classes).to(device)
                with torch.no_grad():  # the way from the loss to the content does not pass the backbone
                    features = model.extract(pixels.to(device), None if mask is None else mask.to(device))
                with torch.enable_grad():
                    output = model.detect(features, [target])
                    report = criterion(output, [target], progress=train_progress, num_boxes=1.0)
                    (gradient,) = torch.autograd.grad(report.total, output.mixture.content)  # (1, n, d)
                total += gradient[0].float().norm(dim=-1).cpu()
                ranked = output.proposals is not None
                if progress is not None:
                    progress(done, count)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Spread(counts=total.numpy(), images=seen, ranked=ranked, discrete=False)
