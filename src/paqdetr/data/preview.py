"""Training batches as a picture: what a model is shown, with its boxes, after every augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from paqdetr.config import Config
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.loader import Batch, training_loader
from paqdetr.drawing import class_key, draw_boxes, tiled
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
    """Draws the first batches of an epoch, one per row, exactly as training gets them, over a key to the colours of
    the classes; padding is purple.

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
    shown = list(islice(loader, batches))
    ids = [split.classes.ids[label] for batch in shown for target in batch.targets for label in target.labels.tolist()]
    colours, key = class_key(ids, split.classes.id_to_name)
    rows = [_row(batch, split, preprocessing.normalization, colours) for batch in shown]
    output = Path(output)
    write_picture(output, tiled(rows, gap=_GAP, key=key), maker="paqdetr data preview", overwrite=overwrite)
    return output


def _row(
    batch: Batch, split: DetectionDataset, normalization: Normalization, colours: Mapping[int, str]
) -> list[Image.Image]:
    """The images of a batch."""
    mean = np.array(normalization.mean)[:, None, None]
    std = np.array(normalization.std)[:, None, None]
    height, width = batch.images.shape[2:]
    row = []
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
        row.append(draw_boxes(picture, corners, ids, split.classes.id_to_name, colours=colours))
    return row
