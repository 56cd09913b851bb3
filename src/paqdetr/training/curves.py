"""Pictures of a run folder: predictions beside ground truth, and the curves of its metrics.jsonl, smoothed and thinned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from paqdetr.data.dataset import DetectionDataset
from paqdetr.drawing import BLUE, GREEN, ORANGE, PINK, RED, SKY, draw_boxes, font_path, tiled
from paqdetr.errors import DataError
from paqdetr.images import read_image
from paqdetr.models import Detector
from paqdetr.report.plots import smoothed, smoothing_window, thin
from paqdetr.runs import Record, positives_by_layer, read_metrics, series
from paqdetr.structures import Detections
from paqdetr.text import literal, printable

_INK, _GREY = "#222222", "#888888"

_MOST_POINTS = 1500


GroundTruth = tuple[ArrayLike, ArrayLike]
"""What is to be found in one image: (G, 4) xyxy boxes in its pixels, (G,) original category ids."""

# ------------------------------------------------------------------------------------------ contact sheet


def contact_sheet(
    items: Sequence[tuple[Image.Image | np.ndarray, Detections, GroundTruth]],
    names: Mapping[int, str],
    *,
    output: Path,
    columns: int = 2,
    threshold: float = 0.3,
    size: int = 400,
) -> None:
    """Write one picture with each image twice: what was found on the left, ground truth on the right.

    Args:
        items: image, its detections and its ground truth, both in pixels of the image, EXIF turn applied.
        names: category id -> name, for the ground truth.
        columns: pairs in a row.
        threshold: detections below this score are left out.
        size: longest side of each image on the sheet, in pixels.
    """
    if not items or columns < 1 or size < 1:
        raise ValueError(f"got {len(items)} items, columns={columns}, size={size}; expected at least 1 of each")
    pairs = [_pair(image, found, truth, names, threshold, size) for image, found, truth in items]
    columns = min(columns, len(pairs))
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    sheet = tiled(rows, gap=16, border=16)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() == ".png":
        sheet.quantize(256).save(output, optimize=True)  # half the size
    else:
        sheet.save(output)


def _pair(
    image: Image.Image | np.ndarray,
    detections: Detections,
    truth: GroundTruth,
    names: Mapping[int, str],
    threshold: float,
    size: int,
) -> Image.Image:
    picture = read_image(image)
    scale = size / max(picture.size)
    # Boxes and text are drawn after scaling: text keeps its size whatever the image's.
    small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    boxes = np.asarray(truth[0], dtype=np.float32).reshape(-1, 4)
    found = detections.above(threshold)
    found.boxes = found.boxes * scale
    title = "" if detections.image_id is None else f"{detections.image_id}: "
    left = _captioned(found.draw(small), f"{title}found {len(found)} with score ≥ {threshold:g}")
    right = _captioned(draw_boxes(small, boxes * scale, truth[1], names), f"ground truth {len(boxes)}")
    return tiled([[left, right]], gap=4)


def _captioned(picture: Image.Image, text: str) -> Image.Image:
    font, bar = ImageFont.truetype(font_path(), 11), 17
    text = printable(text)
    while text and font.getlength(text) > picture.width - 2:  # the end says more than a long file name
        text = "…" + text.lstrip("…")[1:] if len(text) > 1 else ""
    framed = Image.new("RGB", (picture.width, picture.height + bar), "white")
    framed.paste(picture, (0, bar))
    ImageDraw.Draw(framed).text((1, 1), text, fill=_INK, font=font)
    return framed


# ------------------------------------------------------------------------------------------------- curves


def training_curves(metrics_jsonl: Path, output: Path) -> None:
    """Draw a run's metrics: losses, AP, learning rate, positives per box, mixture entropy, query cosine, use of queries.

    A panel without data is left out. The suffix of `output` (.png, .svg, .pdf) chooses the format; parent
    folders are made.

    Raises:
        DataError: the file cannot be read, or has no record, or none with a known figure.
    """
    from matplotlib.figure import Figure  # 0.3 s that a training should not wait for

    records = read_metrics(metrics_jsonl)
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "eval"]
    panels = [panel for panel in _panels(train, evaluations) if panel is not None]
    if not panels:
        raise DataError(
            f"{metrics_jsonl}: {len(records)} records, none with a figure to draw (loss, AP, lr, ...)",
            "give the metrics.jsonl of a training run",
        )
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}.get(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.3 * columns, 3.3 * rows), dpi=110, layout="constrained")
    for position, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, position)
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_INK, labelsize=8)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    if name := metrics_jsonl.resolve().parent.name:
        figure.suptitle(literal(name), fontsize=11, color=_INK)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


_Panel = Callable[[Any], None] | None


def _panels(train: list[Record], evaluations: list[Record]) -> list[_Panel]:
    """One drawing function a panel, or None where the run has no such figure."""
    terms = {
        "classification": ("loss_class", BLUE),
        "L1": ("loss_l1", ORANGE),
        "GIoU": ("loss_giou", GREEN),
        "denoising": ("loss_denoising", PINK),
        "encoder": ("loss_encoder", SKY),
        "diversity": ("loss_diversity", RED),
    }

    uses = {
        "matches": ("positives_gini", BLUE),
        "matches by chance": ("positives_gini_chance", _GREY),
        "gradients": ("gradient_gini", ORANGE),
        "patterns": ("pattern_gini", GREEN),
    }

    def one(title: str, key: str, ylabel: str, **options: Any) -> _Panel:
        return several({"": (key, BLUE)}, title, ylabel, **options)

    def several(keys: dict[str, tuple[str, str]], title: str, ylabel: str, **options: Any) -> _Panel:
        curves = {label: (*series(train, key), colour) for label, (key, colour) in keys.items()}
        return _lines(curves, title, ylabel, **options)

    return [
        _ap(evaluations),
        one("Training loss, all terms", "loss", "loss"),
        several(terms, "Loss terms", "loss (log scale)", log=True),
        _positives(train),
        one("Learning rate", "lr", "learning rate", smooth=False),
        one("Entropy of a query's mixture weights", "mixture_entropy", "entropy / log m"),
        one("Likeness of content queries", "query_cosine", "mean cosine of pairs"),
        several(uses, "Unevenness of query use", "Gini coefficient", bottom=0.0),
        one("Training throughput", "images_per_second", "images per second", bottom=0.0),
    ]


def _ap(evaluations: list[Record]) -> _Panel:
    splits = sorted({str(record.get("split", "")) for record in evaluations})
    curves = []
    for split, style in zip(splits, ["-", "--", ":", "-."], strict=False):
        of_split = [record for record in evaluations if str(record.get("split", "")) == split]
        for key, colour in (("AP50", SKY), ("AP", BLUE)):
            epochs, values = series(of_split, key, "epoch")
            if len(epochs):
                curves.append((f"{key} {split}".strip(), epochs, values, style, colour))
    if not curves:
        return None

    def draw(axes: Any) -> None:
        for label, epochs, values, style, colour in curves:
            marker = {"marker": "o", "markersize": 6 if len(epochs) == 1 else 3}
            axes.plot(epochs, values, style, color=colour, label=literal(label), linewidth=1.6, **marker)
            best = int(np.argmax(values))
            place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{values[best]:.3f}", (epochs[best], values[best]), fontsize=8, color=_INK, **place)
        _dress(axes, "Average precision (best value marked)", "epoch", "AP")
        axes.set_ylim(0, max(0.05, min(1.0, 1.15 * max(values.max() for _, _, values, _, _ in curves))))
        axes.legend(frameon=False, fontsize=8, loc="lower right")

    return draw


def _positives(train: list[Record]) -> _Panel:
    layers = positives_by_layer(train)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(layers)))
    last = next(reversed(layers), "")
    curves = {
        name + (" (last)" if name == last else ""): (*points, shade)
        for (name, points), shade in zip(layers.items(), shades, strict=True)
    }
    return _lines(curves, "Positive queries per box, by decoder layer", "positives per box", bottom=0.0)


def _lines(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, Any]],
    title: str,
    ylabel: str,
    *,
    smooth: bool = True,
    log: bool = False,
    bottom: float | None = None,
) -> _Panel:
    """A panel over steps with a line for each `label: (steps, values, colour)` that has points."""
    if log:  # a term that is 0 throughout has no place on a log scale
        curves = {label: curve for label, curve in curves.items() if np.any(curve[1] > 0)}
    curves = {label: curve for label, curve in curves.items() if len(curve[0])}
    if not curves:
        return None

    def draw(axes: Any) -> None:
        for label, (steps, values, colour) in curves.items():
            if smooth and smoothing_window(values) > 1:
                axes.plot(*thin(steps, values, _MOST_POINTS), color=colour, alpha=0.25, linewidth=0.7)
            marker = "o" if len(values) == 1 else None
            mean = smoothed(values) if smooth else values
            axes.plot(*thin(steps, mean, _MOST_POINTS), color=colour, label=label, linewidth=1.6, marker=marker)
        _dress(axes, title, "step", ylabel)
        if log:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_formatter("{x:g}")  # no offset or power of ten above the axis
        if bottom is not None:
            axes.set_ylim(bottom, 1.05 * axes.get_ylim()[1])
        if len(curves) > 1:
            low, high = axes.get_ylim()  # room above the lines for the legend
            axes.set_ylim(low, high * (high / low) ** 0.3 if log else high + 0.25 * (high - low))
            axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper right", columnspacing=1.2)

    return draw


def _dress(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=_INK)
    axes.set_xlabel(xlabel, fontsize=9, color=_INK)
    axes.set_ylabel(ylabel, fontsize=9, color=_INK)


def draw_predictions(model: Detector, split: DetectionDataset, output: Path, *, images: int = 12) -> None:
    """Write a contact sheet of the first images of a split: predictions beside ground truth."""
    items = []
    for index in range(min(images, len(split))):
        picture = split.image_or_blank(index)
        ids = [split.classes.ids[label] for label in split.labels(index).tolist()]
        items.append((picture, model.predict(picture)[0], (split.boxes(index), ids)))
    contact_sheet(items, split.classes.id_to_name, output=output)
