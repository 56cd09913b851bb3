from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from paqdetr.cli import run
from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.data.preview import preview_batches
from paqdetr.drawing import mark
from paqdetr.preprocessing import Normalization, Preprocessing

PURPLE = (90, 30, 90)


def test_it_shows_the_pixels_the_boxes_and_the_padding(tmp_path: Path) -> None:
    """A grey picture with one box in the middle, not augmented, beside one that is padded to its height."""
    (tmp_path / "train").mkdir()
    images, annotations = [], []
    for number, (width, height) in enumerate(((64, 64), (64, 32))):
        Image.new("RGB", (width, height), (100, 120, 140)).save(tmp_path / "train" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        box = [width / 4, height / 4, width / 2, height / 2]
        annotations.append({"image_id": number, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    plain = {"augment.flip": 0, "augment.crop": 0, "augment.scale": [1, 1], "batch_size": 2, "workers": 0}
    preprocessing = Preprocessing(64, 32, Normalization(mean=(99.0, 88.0, 77.0), std=(50.0, 60.0, 70.0)))
    split = open_split(tmp_path, "train")
    drawn = preview_batches(load_config("paq_dino_nano", plain), split, preprocessing, tmp_path / "p.png")
    sheet, key = np.split(np.asarray(Image.open(drawn)), [64])
    assert sheet.shape == (64, 64 + 6 + 64, 3)
    assert (key[:6] == 255).all() and (key == ImageColor.getrgb(mark(1))).all(-1).sum() > 50, "the colour of the class"
    tiles = [sheet[:, :64], sheet[:, 70:]]
    padded = next(tile for tile in tiles if tuple(tile[60, 32]) == PURPLE)
    whole = next(tile for tile in tiles if tuple(tile[60, 32]) != PURPLE)
    assert tuple(whole[2, 2]) == tuple(padded[2, 2]) == (100, 120, 140)
    assert tuple(whole[40, 16]) != (100, 120, 140) != tuple(padded[20, 16])  # the left edges of the boxes
    assert (padded[33:] == PURPLE).all()


def test_the_command_shows_what_settings_do(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    sheets = []
    for number, more in enumerate([[], ["augment.mosaic=1"], ["--split", "val"], ["--epoch", "1"], []]):
        output = tmp_path / f"{number}.png"
        command = ["data", "preview", str(tiny_data["yolo"]), "image_size=96", "batch_size=2", *more]
        assert run([*command, "--output", str(output)]) == 0
        sheets.append(output.read_bytes())
    assert len(set(sheets)) == 4 and sheets[0] == sheets[4]


def test_a_setting_that_is_none(tiny_data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "preview", str(tiny_data["coco"]), "augment.mosaik=1", "--output", str(tmp_path / "p.png")]
    assert run(command) == 2
    assert "did you mean 'augment.mosaic'?" in capsys.readouterr().err
