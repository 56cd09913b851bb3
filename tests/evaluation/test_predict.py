from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paqdetr.errors import ConfigError, DataError
from paqdetr.evaluation import predict_folder
from paqdetr.models.detector import Detector
from paqdetr.runs import Run


@pytest.fixture(scope="module")
def model(tiny_run: Run) -> Detector:
    return tiny_run.model()


@pytest.fixture
def pictures(tmp_path: Path, tiny_digits: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(("a.jpg", "b.jpg")):
        shutil.copy(tiny_digits / "val" / f"{number:06d}.jpg", folder / name)
    return folder


def test_a_folder_of_pictures(model: Detector, pictures: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    done = predict_folder(
        model, [pictures], output=tmp_path / "out", threshold=0.0, progress=lambda *now: told.append(now)
    )
    assert sorted(file.name for file in done.output.iterdir()) == ["a.jpg", "b.jpg", "predictions.json"]
    assert list(done.found) == [pictures / "a.jpg", pictures / "b.jpg"] and done.unreadable == {}
    assert told == [(1, 2), (2, 2)]
    rows = json.loads(done.results_file.read_text())
    assert {row["image_id"] for row in rows} == {"a.jpg", "b.jpg"} and len(rows) == 400
    assert list(rows[0]) == ["image_id", "file_name", "category_id", "category_name", "bbox", "score"]
    for row in rows:
        assert row["file_name"] == row["image_id"] and row["category_name"] == str(row["category_id"] - 1)
        assert all(round(side, 2) == side for side in row["bbox"]) and round(row["score"], 5) == row["score"]
        x, y, width, height = row["bbox"]
        assert 0 <= x <= x + width <= 96.001 and 0 <= y <= y + height <= 96.001 and 0 <= row["score"] <= 1
    with Image.open(done.output / "a.jpg") as drawn, Image.open(pictures / "a.jpg") as given:
        assert drawn.size == given.size
        assert np.abs(np.asarray(drawn, int) - np.asarray(given, int)).mean() > 1  # something was drawn


def test_the_threshold_is_kept(model: Detector, pictures: Path, tmp_path: Path) -> None:
    everything = predict_folder(model, [pictures], output=tmp_path / "all", threshold=0.0)
    scores = np.sort(np.concatenate([d.scores for d in everything.found.values()]))
    threshold = float(scores[len(scores) // 2])
    some = predict_folder(model, [pictures], output=tmp_path / "some", threshold=threshold)
    assert 0 < sum(map(len, some.found.values())) == (scores >= threshold).sum() < len(scores)


def test_pictures_lie_as_exif_says(model: Detector, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.new("RGB", (96, 48), "white").save(tmp_path / "turned.jpg", exif=exif)
    done = predict_folder(model, [tmp_path / "turned.jpg"], output=tmp_path / "out", threshold=0.0)
    with Image.open(tmp_path / "out" / "turned.jpg") as drawn:
        assert drawn.size == (48, 96)
    boxes = done.found[tmp_path / "turned.jpg"].boxes
    assert boxes[:, [0, 2]].max() <= 48 and 48 < boxes[:, [1, 3]].max() <= 96


def test_a_bad_picture_among_good_ones(model: Detector, pictures: Path, tmp_path: Path) -> None:
    (pictures / "aa.png").write_text("no image")
    (pictures / "c.jpg").write_bytes((pictures / "a.jpg").read_bytes()[:600])
    done = predict_folder(model, [pictures], output=tmp_path / "out")
    assert [path.name for path in done.found] == ["a.jpg", "b.jpg"]
    assert [path.name for path in done.unreadable] == ["aa.png", "c.jpg"]
    assert "not an image in a known format" in done.unreadable[pictures / "aa.png"]
    assert "does not decode" in done.unreadable[pictures / "c.jpg"]
    assert (tmp_path / "out" / "predictions.json").is_file()


def test_no_picture_can_be_read(model: Detector, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(DataError, match=r"none of 1 images could be read; the first: .*x\.png"):
        predict_folder(model, [tmp_path / "x.png"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_prediction_is_replaced(model: Detector, pictures: Path, tmp_path: Path) -> None:
    predict_folder(model, [pictures], output=tmp_path / "out", threshold=0.0)
    again = predict_folder(model, [pictures], output=tmp_path / "out", threshold=1.0)
    assert json.loads(again.results_file.read_text()) == []
    with_boxes = predict_folder(model, [pictures], output=tmp_path / "out", threshold=0.0)
    assert len(json.loads(with_boxes.results_file.read_text())) == 400


def test_one_that_was_stopped_is_repeated_into_its_folder(model: Detector, pictures: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_folder(model, [pictures], output=tmp_path / "out", progress=stop)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.jpg"]
    predict_folder(model, [pictures], output=tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jpg", b"mine"),
        ("notes.txt", b"mine"),
        ("deeper/a.jpg", b"mine"),
        ("predictions.json", b'{"images": [], "annotations": []}'),
        ("predictions.json", b'[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]'),
        ("a.jpg", None),
    ],
)
def test_nothing_of_anybody_else_is_overwritten(
    model: Detector, pictures: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    """Least of all in a folder that earlier predictions lie in."""
    output = predict_folder(model, [pictures / "b.jpg"], output=tmp_path / "out").output
    file = output / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content or (pictures / "a.jpg").read_bytes())
    before = {path: path.read_bytes() for path in output.rglob("*.*")}
    with pytest.raises(ConfigError, match=f"holds other files, such as {re.escape(name)}") as caught:
        predict_folder(model, [pictures], output=output)
    assert "--overwrite" in caught.value.remedy
    assert {path: path.read_bytes() for path in output.rglob("*.*")} == before
    predict_folder(model, [pictures], output=output, overwrite=True)
    kept = name in ("notes.txt", "deeper/a.jpg")
    assert (file.read_bytes() == before[file]) == kept


def test_a_file_in_the_way(model: Detector, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for output in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(ConfigError, match="out"):
            predict_folder(model, [pictures], output=output, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_results_take_the_image_ids_of_annotations(
    model: Detector, pictures: Path, tiny_digits: Path, tmp_path: Path
) -> None:
    truth = json.loads((tiny_digits / "val.json").read_text())
    for image, name in zip(truth["images"], ("val/b.jpg", "val/a.jpg", "a.png", "other/c.jpg"), strict=True):
        image["file_name"] = name
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    done = predict_folder(model, [pictures], output=tmp_path / "out", threshold=0.0, annotations=tmp_path / "gt.json")
    rows = json.loads(done.results_file.read_text())
    assert {(row["image_id"], row["file_name"]) for row in rows} == {(2, "a.jpg"), (1, "b.jpg")}
    shutil.copy(pictures / "a.jpg", pictures / "d.jpg")
    with pytest.raises(DataError, match=r"gt\.json: none of its 4 images is called d\.jpg"):
        predict_folder(model, [pictures], output=tmp_path / "new", annotations=tmp_path / "gt.json")
    assert not (tmp_path / "new").exists()


def test_pictures_in_the_output_folder_are_not_drawn_over(model: Detector, pictures: Path, tmp_path: Path) -> None:
    output = predict_folder(model, [pictures], output=tmp_path / "out").output
    shutil.copy(pictures / "a.jpg", output / "mine.jpg")
    before = (output / "mine.jpg").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"mine\.jpg: lies in the output folder"):
            predict_folder(model, [output / "mine.jpg"], output=output, overwrite=overwrite)
    assert (output / "mine.jpg").read_bytes() == before


def test_two_pictures_of_one_name(model: Detector, pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(pictures / "a.png")
    with pytest.raises(DataError, match=r"would both be drawn to a\.jpg"):
        predict_folder(model, [pictures], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.jpg", "empty", "notes.txt"])
def test_what_is_no_picture(model: Detector, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        predict_folder(model, [tmp_path / name], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
