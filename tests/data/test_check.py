from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from paqdetr.cli import run as cli
from paqdetr.config import load_config
from paqdetr.data.check import CheckReport, check_dataset
from paqdetr.data.dataset import open_split
from paqdetr.data.digits import make_digits
from paqdetr.errors import DataError
from paqdetr.training.setup import describe_data


def make_split(root: Path, split: str, images: list[dict[str, Any]], annotations: list[Any], names: list[str]) -> None:
    (root / split).mkdir(parents=True)
    rng = np.random.default_rng(sum(map(ord, split)))
    for image in images:
        path = root / split / image["file_name"]
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 20, 3), dtype=np.uint8)).save(path)
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(content))


def image(image_id: int, **values: object) -> dict[str, Any]:
    return {"id": image_id, "file_name": f"{image_id}.png", "width": 20, "height": 10, **values}


def box(annotation_id: int, image_id: int, category: int, *bbox: float) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": image_id, "category_id": category, "bbox": list(bbox)}


def found(report: CheckReport, severity: str, split: str) -> list[tuple[str, str]]:
    return [(p.subject, p.message) for p in report.problems if (p.severity, p.split) == (severity, split)]


def test_a_sound_data_set(tmp_path: Path) -> None:
    root = make_digits(tmp_path / "digits", size=64, train=3, val=1, test=1)
    calls: list[tuple[int, int]] = []
    report = check_dataset(root, progress=lambda *c: calls.append(c))
    assert report.errors == []
    assert calls == [(i, 5) for i in range(1, 6)]
    assert report.splits["train"].images == 3
    assert report.splits["train"].boxes == sum(report.splits["train"].boxes_per_class.values()) >= 9
    assert all("none in train" in problem.message for problem in report.warnings)


@pytest.mark.parametrize(
    ("form", "count", "message"),
    [
        ("corners", 10, "10 of 10 boxes are over the edge of their image"),
        ("shares", 10, "no number of 10 boxes is over 1"),
        ("yolo", 10, "no number of 10 boxes is over 1"),
        ("share corners", 10, "no number of 10 boxes is over 1"),
        ("coco", 10, None), ("corners", 5, None), ("shares", 5, None),
    ],
)  # fmt: skip
def test_boxes_in_another_form(tmp_path: Path, form: str, count: int, message: str | None) -> None:
    """x1, y1, x2, y2 or shares of the sides in the place of x, y, width, height: one error, of a split with some boxes."""
    shapes = {
        "corners": lambda x: (x, 5, x + 3, 9),
        "shares": lambda x: (x / 20, 0.5, 3 / 20, 0.4),
        "yolo": lambda x: ((x + 1.5) / 20, 0.8, 3 / 20, 0.4),
        "share corners": lambda x: (x / 20, 0.5, (x + 3) / 20, 0.9),
        "coco": lambda x: (x, 5, 3, 4),
    }
    boxes = [shapes[form](x) for x in range(7, 7 + count)]
    make_split(tmp_path, "train", [image(1)], [box(i, 1, 0, *bbox) for i, bbox in enumerate(boxes, 1)], ["a"])
    report = check_dataset(tmp_path)
    if message is None:
        kinds = {kind for split, _, kind in report.counts if split == "train"}
        assert kinds == ({"box over the edge"} if form == "corners" else set())
        return
    ((subject, problem),) = found(report, "error", "train")
    assert subject == "train.json" and problem.startswith(message)
    split = open_split(tmp_path, "train")
    assert f"train.json: {problem}" in describe_data(load_config("dino_nano"), split, None)


def test_nothing_is_concluded_from_what_was_not_read(tmp_path: Path) -> None:
    """Boxes of an image without a size are not read: of their class it is not said that train has none."""
    for split in ("train", "val"):
        make_split(tmp_path, split, [image(1), image(2)], [box(1, 1, 0, 1, 1, 5, 5)], ["a"])
    content = json.loads((tmp_path / "train.json").read_text())
    del content["images"][0]["width"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    problems = check_dataset(tmp_path).problems
    assert {(p.severity, p.kind) for p in problems if p.split == "train"} >= {("error", "image size")}
    assert not {"class without training", "class without boxes"} & {p.kind for p in problems}
    assert ("train", "images without boxes") not in {(p.split, p.kind) for p in problems}


def test_classes_without_boxes(tmp_path: Path) -> None:
    """As Roboflow's first class is, which stands for the whole set."""
    for split in ("train", "val"):
        make_split(tmp_path, split, [image(1)], [box(1, 1, 1, 1, 1, 5, 5)], ["things", "a"])
    (message,) = [p.message for p in check_dataset(tmp_path).warnings if p.subject == "class things"]
    assert message.startswith("has boxes in no split")


def test_a_broken_data_set(tmp_path: Path) -> None:
    annotations = [
        box(1, 1, 0, 1, 1, 5, 5),
        box(2, 1, 0, 1, 1, 5, 5),
        box(3, 1, 1, 15, 5, 10, 5),
        box(4, 1, 1, 30, 5, 10, 5),
        box(5, 2, 1, 3, 3, 0, 2),
        box(6, 2, 9, 1, 1, 5, 5),
        box(7, 99, 0, 1, 1, 5, 5),
        box(8, 2, 0, 1, 1, 5),
        {**box(9, 2, 0, 0, 0, 20, 10), "iscrowd": 1},
    ]
    images = [image(1), image(2), image(3, width=10, height=20), image(4), image(5)]
    make_split(tmp_path, "train", images, annotations, ["a", "b", "c"])
    (tmp_path / "train" / "4.png").unlink()
    whole = (tmp_path / "train" / "5.png").read_bytes()
    (tmp_path / "train" / "5.png").write_bytes(whole[: len(whole) // 2])
    make_split(
        tmp_path, "val", [image(1), image(2)], [box(1, 1, 2, 0, 0, 9, 9), box(2, 2, 1, 0, 0, 9, 9)], ["a", "x", "c"]
    )
    shutil.copy(tmp_path / "train" / "1.png", tmp_path / "val" / "2.png")
    (tmp_path / "test").mkdir()
    (tmp_path / "test.json").write_text("{")

    report = check_dataset(tmp_path)

    errors = found(report, "error", "train")
    json_file = str(tmp_path / "train.json")
    assert [message for subject, message in errors if subject == json_file] == [
        "annotation 6 of image 2 has category_id 9, which `categories` does not list",
        "annotation 7 belongs to image 99, which `images` does not list",
        "annotation 8 of image 2 has bbox [1, 1, 5], expected four finite numbers [x, y, w, h], w and h not below 0",
    ]
    others = {Path(subject).name: message for subject, message in errors if subject != json_file}
    assert others.keys() == {"3.png", "4.png", "5.png"}
    assert others["3.png"] == "is 20x10 pixels, the annotations say 10x20 (turned by its EXIF orientation?)"
    assert "missing" in others["4.png"]
    assert "does not decode" in others["5.png"]

    assert found(report, "warning", "train") == [
        ("2.png", "box [3, 3, 0, 2] of class 'b' has no area; training leaves it out"),
        ("1.png", "box [30, 5, 10, 5] of class 'b' is outside the image of 20x10; training leaves it out"),
        ("1.png", "box [15, 5, 10, 5] of class 'b' is 5 pixels over the edge of the image of 20x10"),
        ("1.png", "box [1, 1, 5, 5] of class 'a' is there twice; training leaves one out, evaluation counts both"),
    ]

    summary = report.splits["train"]
    assert (summary.images, summary.boxes, summary.crowds, summary.images_without_boxes) == (4, 5, 1, 2)
    assert summary.boxes_per_class == {"a": 2, "b": 3, "c": 0}

    assert found(report, "error", "val") == [("class x", "has id 1, which is 'b' in train")]
    assert found(report, "warning", "val") == [("2.png", "the same file as train/1.png")]
    ((subject, message),) = found(report, "error", "test")
    assert subject == str(tmp_path / "test.json") and "line 1, column 2" in message
    assert report.number_of("error") == len(report.errors)
    assert report.splits["test"].images == 0


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        check_dataset(tmp_path)


def test_copies_and_leaks_are_told_apart(tmp_path: Path) -> None:
    photographs = [Image.fromarray(pixels).resize((320, 214)) for pixels in load_sample_images().images]
    for split, names in (("train", ["a", "x/a", "x/c"]), ("val", ["d"])):
        images = [image(n, file_name=f"{name}.jpg", width=320, height=214) for n, name in enumerate(names)]
        make_split(tmp_path, split, images, [box(1, 0, 0, 1, 1, 9, 9)], ["x"])
    photographs[0].save(tmp_path / "train" / "a.jpg", quality=95)
    photographs[0].save(tmp_path / "train" / "x/a.jpg", quality=40)
    photographs[1].save(tmp_path / "train" / "x/c.jpg")
    photographs[1].save(tmp_path / "val" / "d.jpg", quality=50)
    for workers in (1, 2):
        report = check_dataset(tmp_path, workers=workers)
        found = {p.kind: (p.split, p.subject, p.message) for p in report.warnings}
        assert found["duplicate image"][:2] == ("train", "x/a.jpg")
        assert found["duplicate image"][2].endswith(" bits differ) a.jpg")
        assert found["leak between splits"][:2] == ("val", "d.jpg")
        assert found["leak between splits"][2].endswith(" of 64 bits differ) train/x/c.jpg")


def test_the_report_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [box(n, 1, n % 2, 1, 1, size, size) for n, size in enumerate((2, 40, 100, 7))]
    make_split(tmp_path, "train", [image(1, width=200, height=120)], boxes, ["a", "b"])
    Image.effect_noise((200, 120), 60).convert("RGBA").save(tmp_path / "train" / "1.png")
    assert cli(["data", "check", str(tmp_path), "--json", str(tmp_path / "out" / "report.json")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["format"], report["errors"], report["warnings"]) == ("coco", 0, 1)
    assert [problem["kind"] for problem in report["problems"]] == ["no val split"]
    train = report["splits"]["train"]
    assert train["boxes_per_class"] == {"a": 2, "b": 2} and train["traits"] == {"alpha": 1}
    sizes = train["box_sizes"]
    assert (sizes["small"], sizes["medium"], sizes["large"]) == (2, 1, 1)
    assert {edge: count for edge, count in sizes["histogram"].items() if count} == {"2": 1, "4": 1, "32": 1, "64": 1}
    out = capsys.readouterr().out
    assert "1 alpha" in out and "2 to 4 px" in out and "8 to 16 px" in out and "128 to" not in out


def test_many_problems_of_a_kind_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [box(n, 1, 0, 30, 1, 5, 5) for n in range(25)]
    make_split(tmp_path, "train", [image(1)], [*boxes, box(25, 1, 0, 1, 1, 5, 5)], ["a"])
    assert cli(["data", "check", str(tmp_path), "--show", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("is outside the image") == 3 and "train: 22 more of this kind" in out


SCRIPT = """
import sys
from paqdetr.data.check import check_dataset

print(check_dataset(sys.argv[1], workers=4).splits["train"].images)
"""


@pytest.mark.integration
def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """However many images: where processes are spawned, the script would run again in each of them."""
    make_split(tmp_path / "data", "train", [image(n) for n in range(900)], [], ["a"])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "data")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "900\n", "")


SUMMARY: dict[str, tuple[Any, str]] = {
    "a test image that is in train": (
        lambda root: shutil.copy(root / "train" / "1.png", root / "test" / "2.png"),
        "1 of 3 test images have a near-duplicate in another split: AP on test is flattered",
    ),
    "three val images that are in train": (
        lambda root: [shutil.copy(root / "train" / f"{n}.png", root / "val" / f"{n}.png") for n in (1, 2, 3)],
        "3 of 3 val images have a near-duplicate in another split: AP on val is flattered",
    ),
    "no val split": (
        lambda root: [(root / "val.json").unlink(), shutil.rmtree(root / "val")],
        "no val split: training prints no AP and keeps the last epoch; `paqdetr data split` makes one, and so does "
        "training with val_fraction=0.1",
    ),
    "a class that train has no boxes of": (
        lambda root: change_boxes(root, "train", [box(n, n, n - 1, 1, 1, 5, 5) for n in (1, 2)]),
        "classes with boxes in val and none in train: 1; their AP is 0",
    ),
    "more boxes of a class than AP counts": (
        lambda root: change_boxes(root, "val", [box(n, 2, 0, n / 20, 1, 5, 5) for n in range(101)]),
        "val: 1 of 3 images have more than 100 boxes (up to 101), and a query finds one object at most: take a model with "
        "enough queries",
    ),
    "duplicate boxes": (
        lambda root: change_boxes(root, "test", [box(n, 2, 1, 1, 1, 5, 5) for n in range(3)]),
        "duplicate boxes in test: 2; evaluation counts both, of which one is always missed; `paqdetr data convert` "
        "leaves them out",
    ),
    "a json that is no split": (
        lambda root: shutil.copy(root / "train.json", root / "more.json"),
        "COCO files that are not read: 1; their names say no split",
    ),
    "duplicate images": (
        lambda root: shutil.copy(root / "val" / "1.png", root / "val" / "3.png"),
        "1 of 3 val images are near-duplicates of others in it",
    ),
}


def change_boxes(root: Path, split: str, boxes: list[Any]) -> None:
    content = json.loads((root / f"{split}.json").read_text())
    content["annotations"] = boxes
    (root / f"{split}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", SUMMARY)
def test_what_matters_most_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, sentence = SUMMARY[name]
    for split in ("train", "val", "test"):
        make_split(tmp_path, split, [image(n) for n in (1, 2, 3)], [box(n, n, n % 3, 1, 1, 5, 5) for n in (1, 2, 3)],
                   ["a", "b", "c"])  # fmt: skip
    assert check_dataset(tmp_path).summary() == []
    change(tmp_path)
    report = check_dataset(tmp_path)
    assert report.summary()[0] == ("warning", sentence) and report.to_json()["summary"][0] == sentence
    assert cli(["data", "check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"warning: {sentence}"


def test_errors_come_before_warnings_and_leaks_before_the_rest(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        make_split(tmp_path, split, [image(1), image(2)], [box(1, 1, 0, 1, 1, 5, 5)] * 2, ["a"])
    shutil.copy(tmp_path / "train" / "1.png", tmp_path / "test" / "1.png")
    change_boxes(tmp_path, "val", [box(1, 9, 0, 1, 1, 5, 5)])
    sentences = [sentence for _, sentence in check_dataset(tmp_path).summary()]
    assert sentences == [
        "errors: 1; training would fail, or learn something wrong",
        "1 of 2 test images have a near-duplicate in another split: AP on test is flattered",
        *(
            f"duplicate boxes in {split}: 1; evaluation counts both, of which one is always missed; "
            "`paqdetr data convert` leaves them out"
            for split in ("train", "test")
        ),
    ]
