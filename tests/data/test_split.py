"""Dividing a data set: seeded, with near-duplicates in one part; and what verbs do with data that have no val split."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import box_iou

from paqdetr.cli import run as cli
from paqdetr.config import load_config
from paqdetr.data import split as split_module
from paqdetr.data.annotations import Annotations, Builder, Issues
from paqdetr.data.check import ImageFacts
from paqdetr.data.dataset import open_split
from paqdetr.data.layout import available_splits, find_split, split_to_evaluate
from paqdetr.data.split import divide, duplicate_groups, hold_out, split_dataset
from paqdetr.data.stats import describe_crowding
from paqdetr.errors import ConfigError, DataError
from paqdetr.structures import ClassTable
from paqdetr.training.setup import describe_data, open_splits

Classes = list[list[int]]  # of every image, those of its boxes


def annotations(classes: Classes, *, names: int = 3) -> Annotations:
    builder = Builder()
    for index, own in enumerate(classes):
        image = builder.add_image(index, f"{index}.png", height=24, width=32)
        for label in own:
            builder.add_box(image, label, [1, 2, 3, 4])
    table = ClassTable(tuple(range(names)), tuple("abcdefg"[:names]))
    return builder.build(source=Path("x.json"), image_dir=Path("x"), classes=table)


def with_digests(monkeypatch: pytest.MonkeyPatch, digests: list[int]) -> None:
    """What decoding the images would show: those of equal numbers are the same."""
    facts = [ImageFacts(digest=bytes([digest])) for digest in digests]
    monkeypatch.setattr(split_module, "inspect_all", lambda paths: iter(facts))


@settings(max_examples=100)
@given(
    groups=st.lists(st.integers(0, 12), min_size=2, max_size=40),
    val=st.floats(0.01, 0.5),
    test=st.floats(0, 0.3),
    seed=st.integers(0, 5),
)
def test_every_image_is_in_one_part_and_no_group_in_two(groups: list[int], val: float, test: float, seed: int) -> None:
    shares = {"val": val} | ({"test": test} if test else {})
    with pytest.MonkeyPatch.context() as patch:
        with_digests(patch, groups)
        try:
            parts = divide(annotations([[]] * len(groups)), shares, seed=seed)
        except DataError:
            assert len(set(groups)) < len(groups) or len(groups) < 8  # single images can be divided
            return
        assert divide(annotations([[]] * len(groups)), shares, seed=seed)["val"].tolist() == parts["val"].tolist()
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(groups)))
    found = [{groups[index] for index in part} for part in parts.values()]
    assert sum(map(len, found)) == len(set(groups)) and all(found)
    for name, share in shares.items():
        assert len(parts[name]) <= max(round(share * len(groups)), 1)


def test_shares_are_met_and_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    with_digests(monkeypatch, list(range(100)))
    parts = [divide(annotations([[0]] * 100), {"val": 0.1, "test": 0.2}, seed=seed) for seed in (0, 0, 1)]
    assert [len(part) for part in parts[0].values()] == [70, 10, 20]
    assert parts[0]["val"].tolist() == parts[1]["val"].tolist() != parts[2]["val"].tolist()


def test_the_last_images_of_a_class_stay_in_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with a box of it to train on: a crowd is none."""
    with_digests(monkeypatch, list(range(10)))
    classes = [[0], [1, 0], [0], [2], [0, 0], [0], [1], [2], [0], [0]]
    content = annotations(classes)
    content.crowd[content.owners == 7] = True
    for seed in range(20):
        train = divide(content, {"val": 0.5}, seed=seed)["train"].tolist()
        assert {label for index in train for label in classes[index]} == {0, 1, 2} and 3 in train


@pytest.mark.parametrize(
    ("digests", "classes"),
    [([1, 1, 1, 1], [[0]] * 4), ([1, 2], [[0], [1]]), ([7], [[0]]), ([1, 1, 2, 2, 3, 3, 4, 4], [[0]] * 8)],
)
def test_what_cannot_be_divided(monkeypatch: pytest.MonkeyPatch, digests: list[int], classes: Classes) -> None:
    with_digests(monkeypatch, digests)
    with pytest.raises(DataError, match=r"x\.json: \d images in \d groups of near-duplicates cannot be divided"):
        divide(annotations(classes), {"val": 0.1}, seed=0)


def test_groups_go_through_others() -> None:
    digests = [b"a", b"b", b"a", b"c", b"b"]
    found = duplicate_groups([ImageFacts(digest=digest) for digest in digests])
    assert found.tolist() == [0, 1, 0, 2, 1]
    assert duplicate_groups([]).tolist() == []


# ---------------------------------------------------------------------------------------------- with pictures


@pytest.fixture
def train_only(tmp_path: Path) -> Path:
    """Twelve pictures to train on, of which 0, 1, 2 are one picture in three qualities; the boxes of two are there twice."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(12):
        blocks = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        if number < 3:
            blocks = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3) * 5
        picture = Image.fromarray(blocks).resize((64, 48), Image.Resampling.BICUBIC)
        picture.save(root / "train" / f"{number}.jpg", quality=95 - 20 * (number % 3))
        rows.append({"image_id": number, "category_id": 1, "bbox": [4, 4, 20, 20]})
    rows += rows[:2]
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 64, "height": 48} for n in range(12)],
        "annotations": [{"id": n, **row} for n, row in enumerate(rows)],
        "categories": [{"id": 1, "name": "a"}],
    }
    (root / "train.json").write_text(json.dumps(content))
    return root


def test_pictures_that_look_the_same_stay_together(train_only: Path) -> None:
    sides = set()
    for seed in range(8):
        train, val = hold_out(open_split(train_only, "train"), 0.4, seed=seed)
        assert len(train) + len(val) == 12 and len(val) == 5
        alike = [name in val.file_names for name in ("0.jpg", "1.jpg", "2.jpg")]
        assert len(set(alike)) == 1
        sides.add(alike[0])
        assert val.name == "val" and [len(val.boxes(index)) for index in range(len(val))] == [1] * 5
    assert sides == {True, False}


def test_the_command(train_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "split", str(train_only), str(tmp_path / "out"), "--val", "0.25", "--test", "0.1"]
    assert cli(command) == 0
    said = capsys.readouterr()
    assert "coco from coco: train 8 images 8 boxes, val 3 images 3 boxes, test 1 images 1 boxes" in said.out
    assert "note: duplicate boxes left out: 2" in said.err
    assert available_splits(tmp_path / "out") == ["train", "val", "test"]
    names = [name for split in ("train", "val", "test") for name in open_split(tmp_path / "out", split).file_names]
    assert sorted(names) == sorted(open_split(train_only, "train").file_names)
    assert cli([*command[:3], str(tmp_path / "again"), *command[4:]]) == 0
    assert [p.read_text() for p in sorted((tmp_path / "out").glob("*.json"))] == [
        p.read_text() for p in sorted((tmp_path / "again").glob("*.json"))
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": 0.6, "test": 0.4}, "expected shares that add up to less than 1"),
        ({"val": -0.1, "test": 0.5}, "expected shares that add up to less than 1"),
        ({"val": float("nan")}, "expected shares that add up to less than 1"),
    ],
)
def test_shares_that_cannot_be(train_only: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_dataset(train_only, tmp_path / "out", **options)


def test_what_is_there_already_is_not_cut_out_again(tiny_data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has a split 'val' already") as caught:
        split_dataset(tiny_data["voc"], tmp_path / "out")
    assert caught.value.remedy == "Pass --val 0 --test 0.1 to cut test."
    with pytest.raises(DataError, match="nothing is to be cut") as caught:
        split_dataset(tiny_data["voc"], tmp_path / "out", val=0)
    assert caught.value.remedy == "Pass --val 0 --test 0.1 to cut test."
    done = split_dataset(tiny_data["voc"], tmp_path / "out", val=0, test=0.4)
    assert done.images == {"train": 2, "test": 1, "val": 1}
    with pytest.raises(DataError, match="has a split 'val' already") as caught:
        split_dataset(tmp_path / "out", tmp_path / "again")
    assert caught.value.remedy == "It has train, val and test: nothing needs to be cut."


# ------------------------------------------------------------------------------------------- no val split


def test_training_is_told_what_is_odd_about_the_data(train_only: Path) -> None:
    config = load_config("paq_dino_nano")
    train, val = open_splits(train_only, config)
    assert val is None
    notes = describe_data(config, train, None)
    assert notes == [
        "train.json: 2 duplicate boxes are left out; `paqdetr data check` lists them",
        f"{train_only} has no val split: no AP is computed, and best.safetensors is that of the last epoch; set "
        "val_fraction=0.1, or make a split with `paqdetr data split`",
    ]


def test_training_is_told_of_objects_that_hide_one_another(train_only: Path) -> None:
    file = train_only / "train.json"
    content = json.loads(file.read_text())
    content["annotations"] += [{"id": 99, "image_id": 3, "category_id": 1, "bbox": [4, 4, 20, 21]}]
    file.write_text(json.dumps(content))
    (told,) = [
        note for note in describe_data(load_config("dino_nano"), open_split(train_only, "train"), None) if "0.8" in note
    ]
    assert told.startswith("train.json: 6.7% of the boxes overlap another of their image by more than 0.8") and (
        "model.distinct_proposals=null model.distinct_queries=null keeps both" in told
    )
    plain = load_config("dino_nano", {"model.distinct_queries": None})
    assert not any("overlap" in note for note in describe_data(plain, open_split(train_only, "train"), None))


def test_a_share_of_train_validates(train_only: Path) -> None:
    config = load_config("paq_dino_nano", {"val_fraction": 0.25, "patience": 2})
    train, val = open_splits(train_only, config)
    assert val is not None and (len(train), len(val)) == (9, 3)
    assert "val_fraction=0.25: 3 of 12 images validate" in describe_data(config, train, val)
    again = open_splits(train_only, config)[1]
    assert again is not None and list(again.file_names) == list(val.file_names)


def test_a_share_beside_a_val_split_is_refused(tiny_data: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"val_fraction=0\.1, and .* has a val split"):
        open_splits(tiny_data["coco"], load_config("paq_dino_nano", {"val_fraction": 0.1}))


@pytest.mark.parametrize("value", [1, -0.1, 1.5])
def test_shares_of_train_are_less_than_all(value: float) -> None:
    with pytest.raises(ConfigError, match="val_fraction"):
        load_config("paq_dino_nano", {"val_fraction": value})


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [
        (("train", "val", "test"), "val"),
        (("train", "test"), "test"),
        (("train",), "train"),
        (("night", "train"), "train"),
    ],
)
def test_the_split_that_is_evaluated_if_none_is_named(
    train_only: Path, caplog: pytest.LogCaptureFixture, splits: tuple[str, ...], chosen: str
) -> None:
    content = (train_only / "train.json").read_text()
    (train_only / "train.json").unlink()
    for split in splits:
        (train_only / split).mkdir(exist_ok=True)
        for picture in (train_only / "train").iterdir():
            if split != "train":
                (train_only / split / picture.name).write_bytes(picture.read_bytes())
        (train_only / f"{split}.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert split_to_evaluate(train_only, None) == chosen
        assert split_to_evaluate(train_only, "night") == "night"  # named: as it is
    expected = [] if chosen == "val" else [f"{train_only} has no split 'val': {chosen!r} is used"]
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == expected


# ----------------------------------------------------------------------------------- more boxes than are found


def crowded(counts: list[dict[int, int]]) -> Annotations:
    """Of every image, how many boxes of which class."""
    return annotations([[label for label, n in own.items() for _ in range(n)] for own in counts])


QUERIES = "{} of {} images have more than {} boxes (up to {}), and a query finds one object at most: {}"
CLASS = "{} of {} images have more than 100 boxes of one class (up to {})"


@pytest.mark.parametrize(
    ("counts", "queries", "expected"),
    [
        ([{0: 100}, {}], None, []),
        ([{0: 101}, {}], None, [QUERIES.format(1, 2, 100, 101, "take a model"), CLASS.format(1, 2, 101)]),
        (
            [{0: 60, 1: 60}],
            119,
            [QUERIES.format(1, 1, 119, 120, "raise model.num_queries, which is 119, to at least 120")],
        ),
        ([{0: 60, 1: 60}], 120, []),
        ([{0: 150, 1: 200}, {2: 101}, {1: 3}], 900, [CLASS.format(2, 3, 200)]),
        (
            [{0: 400}],
            20,
            [
                QUERIES.format(1, 1, 20, 400, "raise model.num_queries, which is 20, to at least 400"),
                CLASS.format(1, 1, 400),
            ],
        ),
        ([], 10, []),
    ],
)
def test_images_with_more_boxes_than_can_be_found(
    counts: list[dict[int, int]], queries: int | None, expected: list[str]
) -> None:
    found = describe_crowding(crowded(counts), queries=queries)
    assert len(found) == len(expected)
    assert all(sentence.startswith(start) for sentence, start in zip(found, expected, strict=True))
    assert describe_crowding(crowded(counts), queries=queries, max_detections=None) == found[: len(found) - (
        "of one class" in "".join(found)
    )]  # fmt: skip


def test_crowds_are_no_boxes_to_be_found() -> None:
    builder = Builder()
    image = builder.add_image(1, "a.png", height=9, width=9)
    for _ in range(200):
        builder.add_box(image, 0, [1, 1, 2, 2], crowd=True)
    built = builder.build(source=Path("x"), image_dir=Path("x"), classes=ClassTable((1,), ("a",)))
    assert describe_crowding(built) == []


def test_duplicate_boxes_are_left_out_of_training_alone(train_only: Path) -> None:
    train = open_split(train_only, "train")
    assert [len(train.boxes(index)) for index in range(3)] == [1, 1, 1] and train.skipped == 2
    assert len(train.ground_truth()["annotations"]) == 14
    read = find_split(train_only, "train").read(Issues())
    assert np.flatnonzero(read.duplicates()).tolist() == [1, 3]


@given(rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1), st.booleans()), max_size=12))
def test_duplicates_are_those_of_a_slow_search(rows: list[tuple[int, int, int, bool]]) -> None:
    builder = Builder()
    for index in range(3):
        builder.add_image(index, f"{index}.png", height=9, width=9)
    for image, label, side, crowd in rows:
        builder.add_box(image, label, [side, 1, 2, 1 + side], crowd=crowd)
    built = builder.build(source=Path("x"), image_dir=Path("x"), classes=ClassTable((1, 2), ("a", "b")))
    keys = [tuple(row) for row in np.column_stack([built.owners, built.labels, built.crowd, built.boxes]).tolist()]
    assert built.duplicates().tolist() == [key in keys[:place] for place, key in enumerate(keys)]


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), *[st.integers(0, 9)] * 2, *[st.integers(1, 6)] * 2, st.booleans()), max_size=14
    ),
    iou=st.sampled_from([0.3, 0.5, 0.8]),
)
def test_overlapping_boxes_are_those_of_a_slow_search(
    rows: list[tuple[int, int, int, int, int, bool]], iou: float
) -> None:
    builder = Builder()
    for index in range(3):
        builder.add_image(index, f"{index}.png", height=12, width=12)
    for number, (image, *box, crowd) in enumerate(sorted(rows)):
        builder.add_box(image, number % 2, box, crowd=crowd)
    built = builder.build(source=Path("x"), image_dir=Path("x"), classes=ClassTable((1, 2), ("a", "b")))
    trainable, corners = built.trainable()
    close = box_iou(torch.from_numpy(corners), torch.from_numpy(corners)).numpy() > iou
    same = built.owners[:, None] == built.owners[None]
    expected = np.triu(close & same & trainable[:, None] & trainable[None], 1).any(axis=1)
    assert built.overlapping(iou).tolist() == expected.tolist()


def test_choosing_images_keeps_their_boxes() -> None:
    whole = annotations([[0], [1, 2], [], [2, 2, 1]])
    some = whole.with_images(np.array([3, 2, 0]))
    assert list(some.file_names) == ["3.png", "2.png", "0.png"] and list(some.image_ids) == [3, 2, 0]
    assert [some.labels[a:b].tolist() for a, b in zip(some.starts, some.starts[1:], strict=False)] == [
        [2, 2, 1],
        [],
        [0],
    ]
