from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.data.loader import TrainingImages, training_loader
from paqdetr.preprocessing import Normalization, Preprocessing

REPO = Path(__file__).resolve().parents[2]
BENCHMARK = REPO / "benchmarks" / "loader_memory.py"
RECORDS = 300


def containers(root: object) -> list[Any]:
    """All Python containers that can be reached from an object without passing through a module, a class or a function."""
    found, seen, todo = [], set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, type(gc), type(containers))):
            continue
        seen.add(id(item))
        if isinstance(item, (list, tuple, dict, set, frozenset)):
            found.append(item)
        todo += gc.get_referents(item)
    return found


def test_a_loader_holds_no_python_object_for_each_record(tmp_path: Path) -> None:
    """Workers copy the pages of what they count references to: there must be nothing that is as long as the data."""
    (tmp_path / "train").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "train" / "0.png")
    for number in range(1, RECORDS):
        os.link(tmp_path / "train" / "0.png", tmp_path / "train" / f"{number}.png")
    images = [{"id": f"i{n}", "file_name": f"{n}.png", "width": 32, "height": 32} for n in range(RECORDS)]
    boxes = [{"image_id": f"i{n}", "category_id": 1, "bbox": [1, 2, 3, 4]} for n in range(RECORDS)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    split = open_split(tmp_path, "train")
    config = load_config("paq_dino_nano", {"image_size": 32, "workers": 0})
    preprocessing = Preprocessing(32, 32, Normalization(mean=(127.0,) * 3, std=(128.0,) * 3))
    loader, batches = training_loader(config, split, preprocessing)
    next(iter(loader))
    held = [*containers(split), *containers(loader._loader.dataset), *containers(batches)]
    assert isinstance(loader._loader.dataset, TrainingImages) and len(held) > 10
    assert [item for item in held if len(item) >= RECORDS // 2] == []
    assert any(isinstance(item, np.ndarray) and len(item) >= RECORDS for item in gc.get_referents(vars(split)))


@pytest.mark.slow
def test_memory_of_the_loader_is_flat(tmp_path: Path) -> None:
    if not BENCHMARK.is_file():
        pytest.skip("needs the benchmarks of a checkout")
    command = [sys.executable, str(BENCHMARK), "--records", "20000", "--workers", "4", "--epochs", "3"]
    path = os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--json", str(tmp_path / "m.json")], env=env, check=True, capture_output=True)
    found = json.loads((tmp_path / "m.json").read_text())
    assert [len(epoch["workers"]) for epoch in found["epochs"]] == [4, 4, 4]
    assert found["growth_of_workers"] < 0.05 and found["growth_of_all"] < 0.05
