"""Pictures of a run folder: predictions beside ground truth, and the curves of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from paqdetr.data.dataset import DetectionDataset
from paqdetr.drawing import captioned, class_key, draw_boxes, tiled
from paqdetr.errors import DataError
from paqdetr.images import read_image
from paqdetr.models import Detector
from paqdetr.runs import read_metrics
from paqdetr.structures import Detections
from paqdetr.text import literal

GroundTruth = tuple[ArrayLike, ArrayLike]
"""What is to be found in one image: (G, 4) xyxy boxes in its pixels, (G,) original category ids."""

# ------------------------------------------------------------------------------------------ contact sheet

# Pairs in a row, and the longest side of an image in pixels.
_COLUMNS, _SIDE = 2, 400


def contact_sheet(
    items: Sequence[tuple[Image.Image | np.ndarray, Detections, GroundTruth]],
    names: Mapping[int, str],
    *,
    output: Path,
    threshold: float = 0.3,
) -> None:
    """Write one picture with each image twice, what was found on the left, ground truth on the right, over a key to the classes.

    Args:
        items: image, its detections and its ground truth, both in pixels of the image, EXIF turn applied.
        names: category id -> name, for the ground truth.
        threshold: detections below this score are left out.
    """
    ids = np.concatenate([own for _, found, truth in items for own in (found.above(threshold).labels, truth[1])])
    colours, key = class_key(ids, names)
    pairs = [_pair(image, found, truth, names, colours, threshold) for image, found, truth in items]
    rows = [pairs[start : start + _COLUMNS] for start in range(0, len(pairs), _COLUMNS)]
    sheet = tiled(rows, gap=16, border=16, key=key)
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
    colours: Mapping[int, str],
    threshold: float,
) -> Image.Image:
    picture = read_image(image)
    scale = _SIDE / max(picture.size)
    # Boxes and text are drawn after scaling: text keeps its size whatever the image's.
    small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    boxes = np.asarray(truth[0], dtype=np.float32).reshape(-1, 4)
    found = detections.above(threshold)
    found.boxes = found.boxes * scale
    title = "" if detections.image_id is None else f"{detections.image_id}: "
    drawn = draw_boxes(small, found.boxes, found.labels, names, found.scores, colours=colours)
    left = captioned(drawn, f"{title}found {len(found)} with score ≥ {round(threshold, 2):g}")
    drawn = draw_boxes(small, boxes * scale, truth[1], names, colours=colours)
    right = captioned(drawn, f"ground truth {len(boxes)}")
    return tiled([[left, right]], gap=4)


# ------------------------------------------------------------------------------------------------- curves


def training_curves(metrics_jsonl: Path, output: Path) -> None:
    """Draw a run's metrics: AP, losses of training and validation, learning rate, positives per box, use of queries.

    A panel without data is left out. The suffix of `output` (.png, .svg, .pdf) chooses the format; parent
    folders are made.

    Raises:
        DataError: the file cannot be read, or has no record, or none with a known figure.
    """
    from paqdetr.report.curves import PANELS, draw_panel  # matplotlib takes 0.3 s that a training should not wait for
    from paqdetr.report.plots import new_grid

    records = read_metrics(metrics_jsonl)
    panels = [panel for panel in PANELS.values() if panel.of(records)]
    if not panels:
        raise DataError(
            f"{metrics_jsonl}: {len(records)} records, none with a figure to draw (loss, AP, lr, ...)",
            "give the metrics.jsonl of a training run",
        )
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}.get(len(panels), 4)
    rows = -(-len(panels) // columns)
    grid = new_grid(rows, columns, width=4.3 * columns, height=3.3 * rows)
    for axes, panel in zip(grid, panels, strict=False):
        draw_panel(axes, panel, [("", "", records)], raw=True)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure: Any = grid[0].figure
    if name := metrics_jsonl.resolve().parent.name:
        figure.suptitle(literal(name), fontsize=11)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def draw_predictions(model: Detector, split: DetectionDataset, output: Path) -> None:
    """Write a contact sheet of the first twelve images of a split: what `model.predict` gives by itself, beside ground truth."""
    items = []
    for index in range(min(12, len(split))):
        picture = split.image_or_blank(index)
        ids = [split.classes.ids[label] for label in split.labels(index).tolist()]
        items.append((picture, model.predict(picture)[0], (split.boxes(index), ids)))
    contact_sheet(items, split.classes.id_to_name, output=output, threshold=model.operating_point.least_score())
