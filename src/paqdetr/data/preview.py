"""Training batches as a picture: what a model is shown, with its boxes, after every augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from paqdetr.config import Config
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.loader import Batch, training_loader
from paqdetr.drawing import draw_targets
from paqdetr.outputs import write_picture
from paqdetr.preprocessing import Normalization, Preprocessing

_GAP = 6
_PADDING = np.array([90, 30, 90], dtype=np.uint8)  # no photograph is of this colour


def preview_batches(
    config: Config,
    split: DetectionDataset,
    preprocessing: Preprocessing,
    output: str | Path,
    *,
    batches: int = 3,
    epoch: int = 0,
    overwrite: bool = False,
) -> Path:
    """Draws the first batches of an epoch, one a row, exactly as training gets them; padding is purple.

    Args:
        config: its `augment`, `batch_size`, `seed` and `workers` count.
        output: a PNG file.
        batches: how many; fewer if the epoch has fewer.
        overwrite: replace a file that is no such picture.

    Raises:
        DataError: an image cannot be read.
        ConfigError: the file exists and is no such picture.
        StorageError: it cannot be written.
    """
    loader, sampler = training_loader(config, split, preprocessing)
    sampler.epoch = epoch
    rows = []
    for batch in loader:
        rows.append(_row(batch, split, preprocessing.normalization))
        if len(rows) == batches:
            break
    width, height = max(row.width for row in rows), sum(row.height + _GAP for row in rows) - _GAP
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + _GAP
    output = Path(output)
    write_picture(output, sheet, maker="paqdetr data preview", overwrite=overwrite)
    return output


def _row(batch: Batch, split: DetectionDataset, normalization: Normalization) -> Image.Image:
    """The images of a batch side by side."""
    mean = np.array(normalization.mean)[:, None, None]
    std = np.array(normalization.std)[:, None, None]
    count, _, height, width = batch.images.shape
    row = Image.new("RGB", (count * (width + _GAP) - _GAP, height), "white")
    for number, target in enumerate(batch.targets):
        pixels = batch.images[number].numpy().astype(np.float64) * std + mean  # (3, H, W)
        picture = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()
        inner_height, inner_width = height, width
        if batch.padding_mask is not None:
            mask = batch.padding_mask[number].numpy()
            picture[mask] = _PADDING
            inner_height, inner_width = int((~mask[:, 0]).sum()), int((~mask[0]).sum())
        boxes = target.boxes.numpy() * np.array([inner_width, inner_height] * 2)  # cxcywh in pixels
        corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
        ids = [split.classes.ids[label] for label in target.labels.tolist()]
        drawn = draw_targets(picture, corners, ids, split.classes.id_to_name)
        row.paste(drawn, (number * (width + _GAP), 0))
    return row
