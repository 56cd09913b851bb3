from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from patches import Patches, scene
from PIL import Image

from paqdetr.errors import ConfigError, DataError
from paqdetr.runtime.predict import new_folder, predict_sources, stream
from paqdetr.runtime.video import read_video

EVERYTHING = ("draw", "coco", "yolo", "voc", "crops", "jsonl")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """a.jpg with a red patch of 20 x 10 pixels at (40, 30) and a green one at its edge, b.jpg with a red one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    first = scene((96, 64), (40, 30, 60, 40))
    first.paste(scene((16, 16), (0, 0, 16, 16), colour="#00ff00"), (80, 0))
    first.save(folder / "a.png")
    scene((96, 64), (8, 8, 24, 24)).save(folder / "b.png")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_of_pictures(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    done = predict_sources(patches, [pictures], output=tmp_path / "out", progress=lambda *now: told.append(now))
    assert files(done.output) == ["a.jpg", "b.jpg", "predictions.json"]
    assert (done.images, done.objects, done.unreadable) == (2, 3, {}) and told == [(1, 2), (2, 2)]
    rows = json.loads((done.output / "predictions.json").read_text())
    assert rows[0] == {
        "image_id": "a.png",
        "file_name": "a.png",
        "category_id": 7,
        "category_name": "red",
        "bbox": [40, 30, 20, 10],
        "score": 0.508,
    }
    assert [(row["image_id"], row["category_id"]) for row in rows] == [("a.png", 7), ("a.png", 3), ("b.png", 7)]
    with Image.open(done.output / "a.jpg") as drawn, Image.open(pictures / "a.png") as given:
        assert drawn.size == given.size
        assert np.abs(np.asarray(drawn, int) - np.asarray(given, int)).mean() > 1  # something was drawn


def test_every_form(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    out = predict_sources(patches, [pictures], output=tmp_path / "out", save=EVERYTHING).output
    assert files(out) == [
        "a.jpg",
        "b.jpg",
        "crops/green_x/a-2.jpg",
        "crops/red/a-1.jpg",
        "crops/red/b-1.jpg",
        "labels/a.txt",
        "labels/b.txt",
        "labels/classes.yaml",
        "predictions.json",
        "predictions.jsonl",
        "voc/a.xml",
        "voc/b.xml",
    ]
    # The middle of (40, 30, 60, 40) in an image of 96 x 64, its sides, and its score; classes by their place in the model.
    first, second = (out / "labels" / "a.txt").read_text().splitlines()
    assert first == "0 0.520833 0.546875 0.208333 0.156250 0.508000" and second.startswith("1 0.916667 0.125000 ")
    assert '  0: "red"\n  1: "green/x"' in (out / "labels" / "classes.yaml").read_text()
    boxes = ElementTree.parse(out / "voc" / "a.xml").getroot()
    assert [int(side.text or "") for side in boxes[3].iter("bndbox").__next__()] == [41, 31, 60, 40]
    assert [item.findtext("name") for item in boxes.iter("object")] == ["red", "green/x"]
    with Image.open(out / "crops" / "red" / "a-1.jpg") as crop:
        assert crop.size == (20, 10) and np.asarray(crop)[5, 10, 0] > 200
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "image": "b.png",
        "frame": None,
        "time": None,
        "width": 96,
        "height": 64,
        "detections": [{"box": [8, 8, 24, 24], "score": 0.5064, "label": "red", "id": 7}],
    }


def test_lines_are_there_while_the_next_picture_is_predicted(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def look(done: int, total: int | None) -> None:
        seen.append(len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()))

    predict_sources(patches, [pictures], output=tmp_path / "out", save=["jsonl"], progress=look)
    assert seen == [1, 2]


def test_the_threshold_is_kept(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    some = predict_sources(patches, [pictures], output=tmp_path / "some", threshold=0.507)
    assert some.objects == 1


def test_pictures_lie_as_exif_says(patches: Patches, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    scene((96, 48), (0, 0, 20, 10)).save(tmp_path / "turned.png", exif=exif)
    out = predict_sources(patches, [tmp_path / "turned.png"], output=tmp_path / "out").output
    with Image.open(out / "turned.jpg") as drawn:
        assert drawn.size == (48, 96)
    assert json.loads((out / "predictions.json").read_text())[0]["bbox"] == [38, 0, 10, 20]


def test_a_bad_picture_among_good_ones(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    (pictures / "aa.png").write_text("no image")
    (pictures / "c.png").write_bytes((pictures / "a.png").read_bytes()[:150])
    done = predict_sources(patches, [pictures], output=tmp_path / "out", batch_size=4)
    assert files(done.output) == ["a.jpg", "b.jpg", "predictions.json"]
    assert "not an image in a known format" in done.unreadable[pictures / "aa.png"].message
    assert "does not decode" in done.unreadable[pictures / "c.png"].message and len(done.unreadable) == 2
    assert patches.calls == [(2, 4)]


def test_no_picture_can_be_read(patches: Patches, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    said = r"none of 1 images could be read; the first: .*x\.png.*Convert it to JPEG or PNG"
    with pytest.raises(DataError, match=said):
        predict_sources(patches, [tmp_path / "x.png"], output=tmp_path / "out", save=EVERYTHING)
    assert not (tmp_path / "out").exists()


def test_an_earlier_prediction_is_replaced(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_sources(patches, [pictures], output=out, save=EVERYTHING)
    predict_sources(patches, [pictures], output=out, save=EVERYTHING, threshold=1.0)
    assert json.loads((out / "predictions.json").read_text()) == [] and not (out / "labels" / "a.txt").read_text()
    predict_sources(patches, [pictures], output=out, save=EVERYTHING)
    assert len(json.loads((out / "predictions.json").read_text())) == 3


def test_several_calls_fill_one_folder(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_sources(patches, [pictures / "a.png"], output=out, save=["crops", "yolo"])
    before = files(out)
    predict_sources(patches, [pictures / "b.png"], output=out, save=["crops", "yolo"])
    assert set(before) < set(files(out))


def test_one_that_was_stopped_is_repeated_into_its_folder(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_sources(patches, [pictures], output=tmp_path / "out", progress=stop, save=EVERYTHING)
    assert {file.name for file in (tmp_path / "out").iterdir() if file.is_file()} == {"a.jpg", "predictions.jsonl"}
    predict_sources(patches, [pictures], output=tmp_path / "out", save=EVERYTHING)
    assert len(files(tmp_path / "out")) == 12


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jpg", b"mine"),
        ("notes.txt", b"mine"),
        ("deeper/a.jpg", b"mine"),
        ("predictions.json", b'{"images": [], "annotations": []}'),
        ("predictions.json", b'[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]'),
        ("predictions.jsonl", b'{"image": "a.jpg", "boxes": []}\n'),
        ("labels/a.txt", b"0 0.5 0.5 0.1 0.1\n"),
        ("labels/classes.yaml", b"names: [a]\n"),
        ("voc/a.xml", b"<annotation><filename>a.jpg</filename></annotation>"),
        ("crops/red/a-1.jpg", b"mine"),
        ("clip.mp4", b"\0\0\0\x20ftypisom a film of mine"),
        ("a.jpg", None),
    ],
)
def test_nothing_of_anybody_else_is_overwritten(
    patches: Patches, pictures: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    """Least of all in a folder that earlier predictions lie in."""
    output = predict_sources(patches, [pictures / "b.png"], output=tmp_path / "out", save=EVERYTHING).output
    file = output / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        scene((9, 9)).save(file)
    else:
        file.write_bytes(content)
    before = {path: path.read_bytes() for path in output.rglob("*.*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"holds other files, such as {re.escape(name)}") as caught:
        predict_sources(patches, [pictures], output=output, save=EVERYTHING)
    assert "--overwrite" in caught.value.remedy
    assert {path: path.read_bytes() for path in output.rglob("*.*") if path.is_file()} == before
    predict_sources(patches, [pictures], output=output, overwrite=True, save=EVERYTHING)
    kept = name in ("notes.txt", "deeper/a.jpg", "clip.mp4")
    assert (file.read_bytes() == before[file]) == kept


def test_a_file_in_the_way(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for output in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(ConfigError, match="out"):
            predict_sources(patches, [pictures], output=output, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_results_take_the_image_ids_of_annotations(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    from paqdetr.cli.predict import _image_ids

    names = ("val/b.png", "val/a.png", "a.jpg", "other/c.png")
    truth = {
        "images": [{"id": 10 + n, "file_name": name, "width": 96, "height": 64} for n, name in enumerate(names)],
        "annotations": [],
        "categories": [{"id": 7, "name": "red"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    image_id = _image_ids(tmp_path / "gt.json")
    done = predict_sources(patches, [pictures], output=tmp_path / "out", image_id=image_id)
    rows = json.loads((done.output / "predictions.json").read_text())
    assert {(row["image_id"], row["file_name"]) for row in rows} == {(11, "a.png"), (10, "b.png")}
    shutil.copy(pictures / "a.png", pictures / "d.png")
    with pytest.raises(DataError, match=r"gt\.json: none of its 4 images is called d\.png"):
        predict_sources(patches, [pictures], output=tmp_path / "new", image_id=image_id)
    assert not (tmp_path / "new").exists()
    (pictures / "more").mkdir()
    (pictures / "d.png").rename(pictures / "more" / "a.png")
    with pytest.raises(DataError, match=r"/a\.png and .*/more/a\.png would both be its image 11"):
        predict_sources(patches, [pictures], output=tmp_path / "new", recursive=True, image_id=image_id)


def test_pictures_in_the_output_folder_are_not_drawn_over(patches: Patches, pictures: Path, tmp_path: Path) -> None:
    output = predict_sources(patches, [pictures], output=tmp_path / "out").output
    shutil.copy(pictures / "a.png", output / "mine.png")
    before = (output / "mine.png").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"mine\.png: lies in the output folder"):
            predict_sources(patches, [output / "mine.png"], output=output, overwrite=overwrite)
    assert (output / "mine.png").read_bytes() == before


def test_results_below_their_own_sources(patches: Patches, pictures: Path) -> None:
    """Repeated, a call does not detect in what it has drawn."""
    (pictures / "deep" / "er").mkdir(parents=True)
    shutil.move(pictures / "a.png", pictures / "deep" / "er" / "a.png")
    for _ in range(2):
        done = predict_sources(patches, [pictures], output=pictures / "out", recursive=True, save=("draw", "yolo"))
        assert files(done.output) == [
            "b.jpg",
            "deep/er/a.jpg",
            "labels/b.txt",
            "labels/classes.yaml",
            "labels/deep/er/a.txt",
        ]


def test_two_of_one_name(
    patches: Patches, pictures: Path, tmp_path: Path, clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(clip([0, 0.1]), pictures / "a.mov")  # beside a.png, as some phones write them
    done = predict_sources(patches, [pictures, pictures / "a.png"], output=tmp_path / "live")
    assert files(done.output) == ["a.jpg", "a.mp4", "b.jpg", "predictions.json"] and done.images == 4
    Image.new("RGB", (32, 32)).save(pictures / "a.bmp")
    with pytest.raises(DataError, match=r"a\.bmp would both be written as a") as caught:
        predict_sources(patches, [pictures], output=tmp_path / "out")
    assert "`--save coco,jsonl` takes both" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    whole = predict_sources(patches, [pictures], output=tmp_path / "whole", save=["coco", "jsonl"])
    names = {row["file_name"] for row in json.loads((whole.output / "predictions.json").read_text())}
    assert whole.images == 5 and {"a.mov", "a.png", "b.png"} <= names
    (tmp_path / "other").mkdir()
    shutil.copy(pictures / "b.png", tmp_path / "other")
    with pytest.raises(DataError, match=r"would both be written as b\.png") as caught:
        predict_sources(patches, [pictures, tmp_path / "other"], output=tmp_path / "out", save=["coco"])
    assert "--recursive takes the folder above both" in caught.value.remedy
    with pytest.raises(DataError, match=r"would both be written as b\.png") as caught:
        predict_sources(
            patches, ["http://a.invalid/b.png", "http://b.invalid/b.png"], output=tmp_path / "out", save=["coco"]
        )
    assert "--recursive" not in caught.value.remedy  # there is no folder above both
    # In a list that is still being written, the others are done.
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{pictures}/a.png\n{pictures}/a.bmp\n\n{pictures}/none.png\n"))
    done = predict_sources(patches, ["-"], output=tmp_path / "out")
    assert done.images == 1 and list(done.unreadable) == [pictures / "a.bmp", f"{pictures}/none.png"]


@pytest.mark.parametrize("turn", [1, -1])
def test_a_picture_that_is_called_as_a_frame_of_a_video(
    patches: Patches, pictures: Path, tmp_path: Path, clip: Callable[..., Path], turn: int
) -> None:
    frames = [shutil.copy(pictures / "a.png", tmp_path / f"clip-00000{number}.png") for number in (0, 1)]
    sources = [clip([0, 0.1]), *frames][::turn]
    for form in ("yolo", "voc", "crops"):
        with pytest.raises(DataError, match=r"clip.* would both be written as clip"):
            predict_sources(patches, sources, output=tmp_path / "out", save=["draw", form])
    assert predict_sources(patches, sources, output=tmp_path / "out").images == 4
    assert predict_sources(patches, frames, output=tmp_path / "out", save=EVERYTHING).images == 2


@pytest.mark.parametrize("name", ["missing.jpg", "empty", "notes.txt", "*.gif"])
def test_what_is_no_picture(patches: Patches, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(DataError, match=re.escape(name)):
        predict_sources(patches, [tmp_path / name], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"save": ["coco", "cocoo"]}, "found 'cocoo'"),
        ({"save": []}, "found ''"),
        ({"every": 0}, "every: expected at least 1, found 0"),
        ({"max_frames": 0}, "max_frames: expected at least 1"),
    ],
)
def test_arguments_out_of_range(patches: Patches, pictures: Path, tmp_path: Path, how: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        predict_sources(patches, [pictures], output=tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_a_video_is_drawn_with_its_own_times(patches: Patches, tmp_path: Path, clip: Callable[..., Path]) -> None:
    times = [0, 0.03, 0.2, 0.21, 1.5]
    out = predict_sources(patches, [clip(times)], output=tmp_path / "out", save=EVERYTHING).output
    frames = list(read_video(out / "clip.mp4"))
    assert [frame.time for frame in frames] == pytest.approx(times, abs=1e-3)
    assert frames[0].image.size == (96, 64)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["time"] for line in lines] == pytest.approx(times, abs=1e-3)
    rows = json.loads((out / "predictions.json").read_text())
    assert rows[-1]["image_id"] == "clip.mp4#4" and rows[-1]["file_name"] == "clip.mp4"
    assert (out / "labels" / "clip-000004.txt").is_file() and (out / "crops" / "red" / "clip-000004-1.jpg").is_file()
    again = predict_sources(patches, [clip(times)], output=out, save=EVERYTHING, every=2, max_frames=2)
    assert again.images == 2  # frames 0 and 2; what an earlier call wrote is known as its own, the video too
    assert [frame.time for frame in read_video(out / "clip.mp4")] == pytest.approx([0, 0.2], abs=1e-3)


def test_a_video_that_is_interrupted_plays(patches: Patches, tmp_path: Path, clip: Callable[..., Path]) -> None:
    def stop(done: int, total: int | None) -> None:
        assert total is None
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_sources(patches, [clip([n / 10 for n in range(20)])], output=tmp_path / "out", progress=stop)
    assert len(list(read_video(tmp_path / "out" / "clip.mp4"))) == 7
    assert files(tmp_path / "out") == ["clip.mp4"]


def test_a_stream_is_lazy(patches: Patches, pictures: Path, tmp_path: Path, clip: Callable[..., Path]) -> None:
    found = stream(patches, [pictures, clip([0, 0.5])], threshold=0.2)
    assert patches.calls == []
    first = next(found)
    assert len(patches.calls) == 1 and first.file_name == "a.png" and first.frame is first.time is None
    assert first.image is not None and first.draw(first.image).size == (96, 64)
    assert [(one.file_name, one.frame, one.time) for one in found] == [
        ("b.png", None, None),
        ("clip.mp4", 0, 0.0),
        ("clip.mp4", 1, 0.5),
    ]
    (pictures / "aa.png").write_text("no image")
    with pytest.raises(DataError, match=r"aa\.png"):
        list(stream(patches, pictures))
    left_out: list[str] = []
    rest = stream(patches, pictures, on_unreadable=lambda source, error: left_out.append(source.name), batch_size=2)
    assert [one.file_name for one in rest] == ["a.png", "b.png"] and left_out == ["aa.png"]


def test_the_next_free_folder(tmp_path: Path) -> None:
    (tmp_path / "runs" / "predict-2").mkdir(parents=True)
    assert [new_folder(tmp_path / "runs").name for _ in range(2)] == ["predict-1", "predict-3"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file"):
        new_folder(tmp_path / "file")
