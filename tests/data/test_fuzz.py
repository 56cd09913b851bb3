"""Whatever the annotation files hold: the data are read as data, or refused by an error of ours. Nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paqdetr.data.annotations import Issues
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits, find_split
from paqdetr.errors import DataError

FILES = {
    "coco": "train.json",
    "voc": "Annotations/a.xml",
    "yolo": "labels/train/a.txt",
    "cityscapes": "gtFine/train/ulm/a_gtFine_polygons.json",
    "crowdhuman": "annotation_train.odgt",
}
LIKELY = [1, 2, 0, -1, 10**20, 1e308, "a.png", "b.png", "../a.png", "1", [4, 6, 10, 8], "person", "rider"]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from(LIKELY)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
EXAMPLES = settings(max_examples=60, deadline=None)
ARABIC_THREE = "\u0663"  # a digit to Python's int(), and to few other programs


@pytest.fixture(scope="module")
def roots(tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of which each example overwrites one file."""
    folder = tmp_path_factory.mktemp("fuzz")
    return {form: Path(shutil.copytree(root, folder / form)) for form, root in tiny_data.items()}


def require_sound(data: DetectionDataset) -> None:
    """What training relies on."""
    for index in range(len(data)):
        height, width = data.sizes[index]
        boxes, labels = data.boxes(index), data.labels(index)
        assert np.isfinite(boxes).all() and len(boxes) == len(labels)
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
        assert (boxes[:, [0, 2]] <= width).all() and (boxes[:, [1, 3]] <= height).all()
        assert ((labels >= 0) & (labels < len(data.classes))).all()
        assert data.path(index).resolve().is_relative_to(data.image_dir.resolve())
        assert data.path(index).exists()
    assert len(set(data.image_ids)) == len(data) > 0
    json.dumps(data.ground_truth(), allow_nan=False)


def read_anyhow(root: Path) -> None:
    """Strictly, as training does, and collecting, as the doctor does; what one refuses the other reports."""
    issues = Issues(collect=True)
    refused = None
    try:
        if "train" not in available_splits(root):
            return
        require_sound(open_split(root, "train"))
    except DataError as error:
        assert error.message and error.remedy
        refused = error
    try:
        find_split(root, "train").read(issues)
    except DataError:
        assert refused is not None
    else:
        reported = [problem for problem in issues.found if problem.severity == "error"]
        assert (refused is None) == (not reported), (refused, reported)


def mutated(draw: Any, node: Any, chance: int) -> Any:
    """A json value in which here and there something is replaced, left out, or there twice."""
    if draw(st.integers(0, chance)) == 0:
        return draw(VALUES)
    if isinstance(node, dict):
        return {k: mutated(draw, value, chance) for k, value in node.items() if draw(st.integers(0, chance))}
    if isinstance(node, list):
        items = [mutated(draw, value, chance) for value in node]
        return items + items[:1] if items and draw(st.integers(0, chance)) == 0 else items
    return node


@pytest.mark.parametrize("form", FILES)
@EXAMPLES
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "ignore")))
def test_bytes(roots: dict[str, Path], form: str, content: bytes) -> None:
    (roots[form] / FILES[form]).write_bytes(content)
    read_anyhow(roots[form])


@pytest.mark.parametrize("form", FILES)
@EXAMPLES
@given(data=st.data())
def test_files_with_something_cut_out_or_put_in(
    roots: dict[str, Path], tiny_data: dict[str, Path], form: str, data: st.DataObject
) -> None:
    whole = (tiny_data[form] / FILES[form]).read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(start + 20, len(whole))))
    (roots[form] / FILES[form]).write_bytes(whole[:start] + data.draw(st.binary(max_size=10)) + whole[end:])
    read_anyhow(roots[form])


@pytest.mark.parametrize("form", ["coco", "cityscapes", "crowdhuman"])
@EXAMPLES
@given(data=st.data(), chance=st.integers(4, 30))
def test_json_with_other_values(
    roots: dict[str, Path], tiny_data: dict[str, Path], form: str, data: st.DataObject, chance: int
) -> None:
    lines = (tiny_data[form] / FILES[form]).read_text().splitlines()
    changed = [mutated(data.draw, json.loads(line), chance) for line in lines]
    (roots[form] / FILES[form]).write_text("\n".join(map(json.dumps, changed)))
    read_anyhow(roots[form])


WORDS = st.sampled_from(["0", "1", "2", "-1", "0.5", "1.0", "nan", "inf", "1e400", "640", "x", "1_0", ARABIC_THREE])


@EXAMPLES
@given(rows=st.lists(st.lists(WORDS | st.floats(width=32).map(str), max_size=12), max_size=5))
def test_label_lines(roots: dict[str, Path], rows: list[list[str]]) -> None:
    (roots["yolo"] / FILES["yolo"]).write_text("\n".join(map(" ".join, rows)), encoding="utf-8")
    read_anyhow(roots["yolo"])


TAGS = st.sampled_from(["xmin", "ymin", "xmax", "ymax", "name", "difficult", "bndbox", "size", "width", "object"])
CONTENTS = st.sampled_from(["1", "20", "-3", "nan", "1e9999", "1e8", "person", "", "0", "9" * 50, ARABIC_THREE])


@EXAMPLES
@given(tags=st.lists(st.tuples(TAGS, CONTENTS), max_size=12))
def test_xml_elements(roots: dict[str, Path], tags: list[tuple[str, str]]) -> None:
    frame = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    (roots["voc"] / FILES["voc"]).write_text(
        f"<annotation>{frame}<object><name>person</name><bndbox>{frame}</bndbox></object></annotation>",
        encoding="utf-8",
    )
    read_anyhow(roots["voc"])


ENTRIES = st.sampled_from(["images/train", "../images/train", ".", "/", "images", ["a", "b"], {0: "a", 1: "b"}])


@EXAMPLES
@given(
    content=st.dictionaries(st.sampled_from(["train", "val", "names", "nc", "path"]), VALUES | ENTRIES),
    raw=st.none() | st.text(max_size=30),
)
def test_data_yaml(roots: dict[str, Path], content: dict[str, Any], raw: str | None) -> None:
    root = roots["yolo"]
    (root / FILES["yolo"]).write_text("0 .5 .5 .1 .1")
    text = raw if raw is not None else json.dumps({"train": "images/train", "names": ["a", "b"]} | content)
    (root / "data.yaml").write_text(text, encoding="utf-8", errors="ignore")
    try:
        read_anyhow(root)
    finally:
        (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [person, rider]\n")
