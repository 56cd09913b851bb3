from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paqdetr.cli import run
from paqdetr.data.check import check_dataset
from paqdetr.data.stats import dataset_stats


def test_figures_by_hand(tiny_data: dict[str, Path]) -> None:
    stats = dataset_stats(tiny_data["coco"])
    train = stats["train"]
    assert train.per_class.tolist() == [2, 1] and train.per_image.tolist() == [2, 1, 0]
    assert train.sides.tolist() == pytest.approx([80**0.5, 8, 200**0.5])
    assert train.shares.tolist() == pytest.approx([(80 / 768) ** 0.5, (64 / 768) ** 0.5, (200 / 768) ** 0.5])
    assert train.aspects.tolist() == [10 / 8, 1, 0.5]
    assert train.centres.tolist() == pytest.approx(
        np.array([[9 / 32, 10 / 24], [24 / 32, 6 / 24], [7 / 24, 12 / 32]]), abs=1e-9
    )
    figures = train.to_json()
    assert figures["images_without_boxes"] == 1 and figures["box_sizes"] == {"small": 3, "medium": 0, "large": 0}
    assert figures["quantiles"]["boxes_per_image"][3] == 1
    assert list(stats) == ["train", "val"]


def test_the_check_counts_the_same(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Of boxes without area, crowds, and two categories of one name."""
    content = json.loads((tiny_data["coco"] / "train.json").read_text())
    rows = content["annotations"]
    rows += [rows[0] | {"id": 10, "bbox": [3, 3, 0, 5]}, rows[0] | {"id": 11, "iscrowd": 1}]
    for category in content["categories"]:
        category["name"] = "fish"
    (tmp_path / "train.json").write_text(json.dumps(content))
    (tmp_path / "train").symlink_to(tiny_data["coco"] / "train")
    figures = dataset_stats(tmp_path)["train"].to_json()
    summary = asdict(check_dataset(tmp_path).splits["train"])
    assert figures["boxes_per_class"] == {"fish (1)": 3, "fish (2)": 1} and figures["boxes"] == 4
    del summary["traits"], summary["box_sizes"]["histogram"], figures["quantiles"]
    assert figures == summary


def test_the_command(tiny_data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn, figures = tmp_path / "a" / "s.png", tmp_path / "b" / "s.json"
    assert run(["data", "stats", str(tiny_data["voc"]), "--output", str(drawn), "--json", str(figures)]) == 0
    assert "train" in capsys.readouterr().out
    assert json.loads(figures.read_text())["splits"]["val"]["boxes"] == 1
    with Image.open(drawn) as image:
        assert image.width > 1000 and len(image.getcolors(10**6) or ()) > 50


def test_a_split_without_boxes_is_drawn(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads((tiny_data["coco"] / "train.json").read_text()) | {"annotations": []}
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.json").write_text(json.dumps(content))
    (tmp_path / "d" / "train").symlink_to(tiny_data["coco"] / "train")
    assert run(["data", "stats", str(tmp_path / "d"), "--output", str(tmp_path / "s.png")]) == 0
    assert dataset_stats(tmp_path / "d")["train"].to_json()["quantiles"]["box_side"] == []
