from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patches import Patches, scene

from paqdetr.errors import ConfigError
from paqdetr.runtime.tiles import Tiles, merge_tiles, predict_tiles
from paqdetr.structures import Detections


def found(model: Patches, image: object, tiles: Tiles, **how: object) -> Detections:
    return predict_tiles(image, tiles, lambda images, size: model.predict(list(images), batch_size=size), **how)  # type: ignore[arg-type]


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 900), st.floats(0, 0.9))
def test_tiles_cover_the_image_and_overlap(height: int, width: int, size: int, overlap: float) -> None:
    windows = Tiles(size, overlap).windows(height, width)
    assert len(windows) == Tiles(size, overlap).count(height, width)
    for low, length in ((0, width), (1, height)):
        spans = sorted({(window[low], window[low + 2]) for window in windows})
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert {end - start for start, end in spans} == {min(size, length)}
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end - start >= int(size * overlap) - 1  # rounded to whole pixels at both ends


def test_an_image_that_fits_into_a_tile_is_predicted_as_it_is(patches: Patches) -> None:
    image = scene((300, 200), (20, 20, 60, 50), (100, 100, 180, 160))
    plain = patches.predict([image])[0]
    whole = found(patches, image, Tiles(300))
    assert whole.boxes.tobytes() == plain.boxes.tobytes() and whole.scores.tobytes() == plain.scores.tobytes()
    assert patches.calls == [(1, 1), (1, 1)]


@pytest.mark.parametrize(
    "box",
    [
        (120, 40, 140, 60),  # in the overlap of two tiles, whole in both
        (110, 40, 136, 60),  # whole in the left one, cut in the right one
        (90, 40, 190, 70),  # longer than the overlap, cut in both
        (40, 90, 70, 200),  # the same from top to bottom
        (90, 95, 190, 205),  # across four tiles
        (10, 30, 390, 60),  # through all the tiles of a row
        (5, 5, 395, 295),  # larger than any tile
        (0, 0, 30, 30),  # in the corner
    ],
)
def test_an_object_across_a_border_is_found_once(patches: Patches, box: tuple[int, ...]) -> None:
    for with_whole in (False, True):
        detections = found(patches, scene((400, 300), box), Tiles(128, 0.2, with_whole))
        assert detections.boxes.tolist() == [list(box)]
    assert patches.calls[0] == (12, 4)  # 4 x 3 tiles, all given at once


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 8), st.integers(8, 31), st.integers(8, 31)), max_size=30))
def test_objects_in_a_grid_are_all_found_once(places: list[tuple[int, int, int, int]]) -> None:
    """Side by side, one pixel apart, of sizes below and above the overlap of 26 pixels."""
    boxes = {(33 * x, 33 * y): (33 * x, 33 * y, 33 * x + w, 33 * y + h) for x, y, w, h in places}
    image = scene((400, 300), *boxes.values())
    detections = found(Patches(), image, Tiles(128, 0.2))
    assert sorted(map(tuple, detections.boxes.tolist())) == sorted(boxes.values())
    assert (np.diff(detections.scores) <= 0).all()


def _part(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Detections:
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels))


def test_only_boxes_of_different_tiles_are_compared() -> None:
    """A crowd within a tile stays as the model has it; another class is another object."""
    windows, size = [(0, 0, 100, 100), (80, 0, 180, 100)], (100, 180)
    crowd = _part([[10, 10, 40, 40], [12, 10, 42, 40], [11, 11, 41, 41]], [1, 1, 1], [0.9, 0.8, 0.7])
    other = _part([[3, 10, 17, 40], [3, 10, 17, 40]], [1, 2], [0.6, 0.5])
    left = _part([[83, 10, 97, 40]], [1], [0.4])
    assert len(merge_tiles([crowd, other], windows, size)) == 5
    merged = merge_tiles([left, other], windows, size)
    assert merged.labels.tolist() == [1, 2] and merged.scores.tolist() == pytest.approx([0.6, 0.5])


def test_a_cut_box_gives_way_to_a_whole_one_whatever_its_score() -> None:
    windows = [(0, 0, 100, 100), (80, 0, 180, 100)]
    whole, cut = _part([[60, 10, 97, 40]], [1], [0.5]), _part([[0, 10, 17, 40]], [1], [0.9])
    merged = merge_tiles([whole, cut], windows, (100, 180))
    assert merged.boxes.tolist() == [[60, 10, 97, 40]] and merged.scores.tolist() == [0.5]
    assert len(merge_tiles([_part([], [], []), _part([], [], [])], windows, (100, 180))) == 0


@pytest.mark.parametrize("score", [0.4, 0.95])
def test_a_cut_box_gives_way_to_none_that_it_covers_itself(score: float) -> None:
    """A small object before a large one, of which one tile shows a part and the other found nothing."""
    windows = Tiles(640, 0.2).windows(640, 1100)
    large, small = _part([[100, 100, 640, 500]], [1], [0.9]), _part([[40, 300, 100, 360]], [1], [score])
    merged = merge_tiles([large, small], windows, (640, 1100))
    assert sorted(merged.boxes.tolist()) == [[100, 100, 640, 500], [500, 300, 560, 360]]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"size": 8}, "whole pixels, at least 16, found 8"),
        ({"size": "64"}, "found '64'"),
        ({"size": 64.0}, "found 64.0"),
        ({"size": True}, "found True"),
        ({"size": 640, "overlap": "0.2"}, "found '0.2'"),
        ({"size": 640, "overlap": 1.0}, "found 1.0"),
        ({"size": 640, "overlap": float("nan")}, "found nan"),
    ],
)
def test_what_cannot_be_cut(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tiles(**how)


def test_small_objects_of_large_images_are_found_in_tiles() -> None:
    """Four scenes pasted together: the model, which sees nothing smaller than 5 % of what it looks at, loses what it finds in
    each of them alone; its tiles do not."""
    from paqdetr.metrics.coco import evaluate_detections

    rng = np.random.default_rng(0)
    truth: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "red"}]}
    rows: dict[str, list] = {"plain": [], "tiles": []}
    for number in range(1, 7):
        boxes = []
        for left, top in [(x, y) for x in range(0, 640, 80) for y in range(0, 640, 80) if rng.random() < 0.3]:
            side = int(rng.integers(17, 40))
            x, y = left + int(rng.integers(0, 70 - side)), top + int(rng.integers(0, 70 - side))
            boxes.append((x, y, x + side, y + side))
        truth["images"].append({"id": number, "width": 640, "height": 640})
        for x, y, right, bottom in boxes:
            own = {"bbox": [x, y, right - x, bottom - y], "area": (right - x) ** 2, "category_id": 7, "iscrowd": 0}
            truth["annotations"].append({"id": len(truth["annotations"]) + 1, "image_id": number, **own})
        image, model = scene((640, 640), *boxes), Patches(smallest=0.05)
        for name, detections in (("plain", model.predict([image])[0]), ("tiles", found(model, image, Tiles(320)))):
            detections.image_id = number
            rows[name] += detections.to_coco()
    plain, tiled = (evaluate_detections(truth, rows[name]).AP for name in ("plain", "tiles"))
    assert tiled > plain + 0.05 and tiled == pytest.approx(1)


@pytest.mark.slow
def test_a_trained_model_finds_more_in_tiles(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Digits pasted together two by two, and a detector that was trained on single scenes."""
    import paqdetr
    from paqdetr.data.dataset import open_split
    from paqdetr.data.digits import make_digits

    data = make_digits(tmp_path / "digits", train=1400, val=100, test=1)
    settings = {"image_size": 192, "model.num_queries": 60}
    run = paqdetr.train("dino_nano", data=data, output=tmp_path / "run", device="cpu", epochs=2, settings=settings)
    measure = script("benchmarks/tiles.py").measure
    found = measure(paqdetr.load(run.output), open_split(data, "val"), tmp_path / "pasted")
    assert found["tiles"]["AP"] > found["without tiles"]["AP"] + 0.05


LARGE = """
import numpy as np
from PIL import Image
from paqdetr.environment import peak_resident
from paqdetr.models import create_model
from paqdetr.runtime.tiles import Tiles
model = create_model("paq_dino_nano", num_classes=10).eval()
pixels = np.random.default_rng(0).integers(0, 255, (3000, 4000, 3), dtype=np.uint8)
found = model.predict(Image.fromarray(pixels), threshold=0.0, tiles=Tiles(640, with_whole=True))[0]
print(len(found), peak_resident() / 2**30)
"""


@pytest.mark.integration
def test_the_memory_for_twelve_megapixels() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    count, gib = done.stdout.split()
    assert int(count) > 300 and float(gib) < 1.5
