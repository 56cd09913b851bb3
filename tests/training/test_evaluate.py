"""Evaluation with a detector that cheats: it recognises an image by its size, so a wrong order would show."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.distributed import Processes
from paqdetr.errors import DataError, UserError
from paqdetr.evaluation import evaluate
from paqdetr.evaluation.content import ContentCollector
from paqdetr.evaluation.evaluate import (
    Evaluation,
    detect_split,
    evaluate_split,
    evaluate_together,
    require_same_classes,
)
from paqdetr.evaluation.layers import LayerCollector
from paqdetr.metrics.query_usage import BatchMatch, QueryUsage
from paqdetr.models import create_model
from paqdetr.models.detector import Detector
from paqdetr.models.outputs import DetectorOutput
from paqdetr.paq import OneToOneAssigner
from paqdetr.runs import Run
from paqdetr.structures import ClassTable, Detections, Targets

# The package's attribute of this name is the function.
MODULE = importlib.import_module("paqdetr.models.inference")
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def write(folder: Path, count: int = 7) -> DetectionDataset:
    """Pictures of unequal sizes, tall and wide; image i has i % 3 + 1 boxes that lie apart."""
    (folder / "val").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        width, height = (150 + i, 100) if i % 2 else (100, 150 + i)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "val" / f"{i}.png")
        images.append({"id": f"image {i}", "file_name": f"{i}.png", "width": width, "height": height})
        for j in range(i % 3 + 1):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": f"image {i}",
                    "category_id": (3, 7)[(i + j) % 2],
                    "bbox": [5 + 2 * i, 3 + 32 * j, 40, 25 + i],
                }
            )
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "val.json").write_text(json.dumps(content))
    return open_split(folder, "val")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return write(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def model() -> Detector:
    detector = create_model("paq_dino_nano", num_classes=2, dim=32, ffn_dim=64, num_queries=12, image_size=96).eval()
    detector.classes = ClassTable.from_categories(CATEGORIES)
    return detector


def cheat(split: DetectionDataset, *, copies: bool = False, leave_out: int = 0) -> Any:
    """In place of `detect_batch`: the ground truth of the images that have these sizes."""
    place = {tuple(size): index for index, size in enumerate(split.sizes.tolist())}

    def detect(
        model: Detector, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], **_: Any
    ) -> Iterator[Detections]:
        assert len({tuple(image.shape) for image in images}) == 1
        for size in sizes:
            index = place[size]
            boxes = split.boxes(index)[leave_out:]
            labels = np.array([split.classes.ids[k] for k in split.labels(index)[leave_out:]], dtype=np.int64)
            scores = 0.9 - 0.01 * index - 0.001 * np.arange(len(boxes), dtype=np.float32)
            if copies:
                boxes, labels = np.repeat(boxes, 2, axis=0), np.repeat(labels, 2)
                scores = np.repeat(scores, 2) - np.tile(np.float32([0, 1e-5]), len(scores))
            yield Detections(boxes, scores.astype(np.float32), labels, split.classes.id_to_name)

    return detect


def test_a_perfect_detector(split: DetectionDataset, model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "detect_batch", cheat(split))
    progress: list[tuple[int, int]] = []
    for batch_size in (1, 3):
        progress.clear()
        found = evaluate_split(model, split, batch_size=batch_size, progress=lambda *done: progress.append(done))
        assert found.figures.AP == pytest.approx(1) and found.figures_nms.AP == pytest.approx(1)
        assert found.figures.per_class == {"cat": pytest.approx(1), "dog": pytest.approx(1)}
        # 1 + 2 + 3 + 1 + 2 + 3 + 1 boxes in 7 images, all of them sure
        assert found.boxes_per_image == pytest.approx(13 / 7) == found.predictions_per_image
        assert {row["image_id"] for row in found.results} == set(split.image_ids)
        assert len(found.results) == 13 and found.images_per_second > 0
        assert progress == [(done, 7) for done in range(1, 8)]


def test_a_detector_that_misses(split: DetectionDataset, model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "detect_batch", cheat(split, leave_out=1))
    found = evaluate_split(model, split)
    assert 0 < found.figures.AR100 < 0.8 and 0 < found.figures.AP < 0.8
    assert found.predictions_per_image == pytest.approx(6 / 7)


def test_what_copies_cost(split: DetectionDataset, model: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "detect_batch", cheat(split, copies=True))
    found = evaluate_split(model, split)
    assert found.figures.AP < 0.8 and found.figures_nms.AP == pytest.approx(1)
    assert found.predictions_per_image == pytest.approx(26 / 7)
    figures = found.to_json()
    assert figures["AP_nms"] == pytest.approx(1) and figures["AP"] == pytest.approx(found.figures.AP)
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "per_class"} <= figures.keys()
    json.dumps(figures, allow_nan=False)


def test_the_batch_size_changes_no_figure(
    split: DetectionDataset, model: Detector, tmp_path: Path, one_thread: None
) -> None:
    # The truth is what the model itself finds one by one, so that AP is neither 0 nor 1.
    content = json.loads(split.annotation_file.read_text())
    content["annotations"] = []
    for index, detections in detect_split(model, split, batch_size=1):
        detections.image_id = split.image_ids[index]
        for row in detections.to_coco()[1:20:4]:
            if row["bbox"][2] > 1 and row["bbox"][3] > 1:
                content["annotations"].append({**row, "id": len(content["annotations"]) + 1})
    (tmp_path / "val.json").write_text(json.dumps(content))
    truth = DetectionDataset.from_json(tmp_path / "val.json", split.image_dir)
    one, four = (evaluate_split(model, truth, batch_size=size) for size in (1, 4))
    assert 0.05 < one.figures.AP < 1
    for name in ("AP", "AP50", "AR100"):
        assert getattr(one.figures, name) == pytest.approx(getattr(four.figures, name), abs=1e-3)

    def scores(rows: list[dict[str, Any]]) -> dict[Any, list[float]]:
        return {i: sorted(row["score"] for row in rows if row["image_id"] == i) for i in split.image_ids}

    mine, its = scores(one.results), scores(four.results)
    for image_id in split.image_ids:
        assert mine[image_id] == pytest.approx(its[image_id], abs=1e-5)


def test_reading_ahead_changes_neither_order_nor_detections(
    split: DetectionDataset, model: Detector, one_thread: None
) -> None:
    alone, helped = (list(detect_split(model, split, batch_size=2, workers=count)) for count in (0, 2))
    assert [index for index, _ in alone] == [index for index, _ in helped] and len(alone) == 7
    for (_, mine), (_, its) in zip(alone, helped, strict=True):
        assert np.array_equal(mine.boxes, its.boxes) and np.array_equal(mine.scores, its.scores)


class Watch:
    """Notes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[DetectorOutput, list[Targets], list[int]]] = []

    def see(self, output: DetectorOutput, targets: Sequence[Targets], indices: Sequence[int]) -> None:
        self.seen.append((output, list(targets), list(indices)))

    def merge(self, other: Watch) -> None:
        raise AssertionError("there is no other process")


def test_observers_see_every_raw_output_once(split: DetectionDataset, model: Detector) -> None:
    first, second = Watch(), Watch()
    found = evaluate_split(model, split, batch_size=3, observers=[first, second])
    plain = evaluate_split(model, split, batch_size=3)
    assert found.results == plain.results and astuple(plain.figures) == astuple(found.figures), (
        "looking changes nothing"
    )
    assert sorted(index for _, _, indices in first.seen for index in indices) == list(range(7))
    assert [indices for _, _, indices in second.seen] == [indices for _, _, indices in first.seen]
    scores = {image_id: [] for image_id in split.image_ids}
    for row in found.results:
        scores[row["image_id"]].append(row["score"])
    for output, targets, indices in first.seen:
        assert output.pred_logits.shape == (len(indices), 12, 2) and output.mixture.weights is not None
        assert not output.pred_logits.requires_grad
        for logits, target, index in zip(output.pred_logits, targets, indices, strict=True):
            assert target.image_id == split.image_ids[index]
            assert target.size == tuple(split.sizes[index].tolist())
            # The raw output is that of this very image.
            assert sorted(logits.sigmoid().flatten().tolist()) == pytest.approx(
                sorted(scores[target.image_id]), abs=1e-6
            )
            corners = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor(target.size * 2)[[1, 0, 3, 2]]
            assert corners.numpy() == pytest.approx(split.boxes(index), abs=1e-3)
            assert target.labels.tolist() == split.labels(index).tolist()


def test_query_usage_observes(split: DetectionDataset, model: Detector) -> None:
    usage = QueryUsage(num_queries=12)
    found = evaluate_split(model, split, observers=[usage])
    report = usage.report()
    assert report.images == 7 and report.boxes_per_image == pytest.approx(13 / 7) == found.boxes_per_image
    assert report.ranked and report.positives is not None and report.positives.counts.sum() == 13
    assert report.patterns is not None and report.patterns.mass.sum() == pytest.approx(1)
    assert report.query_cosine is not None and -1 <= report.query_cosine <= 1


def test_observers_that_share_a_match_make_it_once(
    split: DetectionDataset, model: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    assign = OneToOneAssigner.__call__

    def counted(self: OneToOneAssigner, logits: Tensor, boxes: Tensor, targets: Any) -> Any:
        made.append(len(targets))
        return assign(self, logits, boxes, targets)

    monkeypatch.setattr(OneToOneAssigner, "__call__", counted)
    match = BatchMatch()
    shared = QueryUsage(num_queries=12, match=match), ContentCollector(num_classes=2, match=match)
    alone = QueryUsage(num_queries=12), ContentCollector(num_classes=2)
    evaluate_split(model, split, batch_size=2, observers=shared)
    assert sum(made) == len(split) == 7, "every image once"
    evaluate_split(model, split, batch_size=2, observers=alone)
    assert sum(made) == 21
    assert shared[0].report().to_json() == alone[0].report().to_json()
    assert np.array_equal(shared[1].study(model).category_counts, alone[1].study(model).category_counts)
    copied = pickle.loads(pickle.dumps(match))
    assert copied._batch == () and match._batch, "a batch on a GPU does not travel between processes"


def test_the_model_is_left_in_its_mode(split: DetectionDataset, model: Detector) -> None:
    model.train()
    evaluate_split(model, split)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("categories", "words"),
    [
        ([{"id": 3, "name": "cat"}, {"id": 8, "name": "cow"}], "category 8 'cow' .* unknown to it"),
        ([{"id": 3, "name": "cow"}, {"id": 7, "name": "dog"}], "category 3 'cow' .* calls 3 'cat'"),
    ],
)
def test_other_classes_than_the_models(tmp_path: Path, model: Detector, categories: Any, words: str) -> None:
    split = write(tmp_path)
    content = json.loads(split.annotation_file.read_text())
    content["categories"], content["annotations"] = categories, []
    split.annotation_file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words) as caught:
        evaluate(model, data=tmp_path, split="val")
    assert "val.json" in caught.value.message


@pytest.mark.parametrize("names", [("cat", "dog"), ("Dog", "CAT")])
def test_classes_of_the_same_names_have_the_data_s_ids(
    tmp_path: Path, model: Detector, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    """As after a conversion: ids are 0 and 1, in either order."""
    split = write(tmp_path)
    content = json.loads(split.annotation_file.read_text())
    new = {row["id"]: [name.casefold() for name in names].index(row["name"]) for row in CATEGORIES}
    content["categories"] = [{"id": n, "name": name} for n, name in enumerate(names)]
    for annotation in content["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    (tmp_path / "renumbered.json").write_text(json.dumps(content))
    other = DetectionDataset.from_json(tmp_path / "renumbered.json", split.image_dir)

    watches = Watch(), Watch()
    layers = [LayerCollector(model.classes, model.config) for _ in range(2)]
    plain, found = (
        evaluate_split(model, data, observers=[watch, layer])
        for data, watch, layer in zip((split, other), watches, layers, strict=True)
    )
    assert [{**row, "category_id": new[row["category_id"]]} for row in plain.results] == [
        {**row, "category_name": row["category_name"].casefold()} for row in found.results
    ]
    assert {k.casefold(): v for k, v in found.figures.per_class.items()} == pytest.approx(plain.figures.per_class)
    first, second = ([t.labels.tolist() for _, targets, _ in watch.seen for t in targets] for watch in watches)
    assert first == second, "the model's own indices"
    assert [stage.AP for stage in layers[0].figures(split)] == [stage.AP for stage in layers[1].figures(other)]
    monkeypatch.setattr(MODULE, "detect_batch", cheat(split))
    assert evaluate_split(model, other).figures.AP == pytest.approx(1)


def test_fewer_classes_than_the_models_will_do(
    tmp_path: Path, model: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cats are not annotated: what the model takes for one is left out, and dogs keep the model's own index."""
    split = write(tmp_path)
    content = json.loads(split.annotation_file.read_text())
    content["categories"] = [category for category in CATEGORIES if category["name"] == "dog"]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 7]
    split.annotation_file.write_text(json.dumps(content))
    dogs = open_split(tmp_path, "val")
    require_same_classes(ClassTable((3, 5, 7), ("cat", "cow", "dog")), dogs)

    watch = Watch()
    found = evaluate_split(model, dogs, observers=[watch])
    assert {row["category_id"] for row in found.results} == {7}, "of an untrained model, which says both"
    labels = [label for _, targets, _ in watch.seen for target in targets for label in target.labels.tolist()]
    assert labels == [1] * len(content["annotations"])

    monkeypatch.setattr(MODULE, "detect_batch", cheat(split))  # finds the cats as well
    perfect = evaluate_split(model, dogs)
    assert perfect.figures.AP == pytest.approx(1) and list(perfect.figures.per_class) == ["dog"]
    assert perfect.predictions_per_image == perfect.boxes_per_image == len(content["annotations"]) / 7


def test_an_image_of_another_size_than_stated(tmp_path: Path, model: Detector) -> None:
    split = write(tmp_path)
    Image.new("RGB", (100, 100)).save(split.path(2))
    with pytest.raises(DataError, match=r"2\.png: is 100x100 pixels"):
        evaluate(model, data=tmp_path)
    with pytest.raises(DataError, match=r"2\.png: is 100x100 pixels"):
        list(detect_split(model, split, batch_size=2, workers=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_count_as_images_without_detections(
    tmp_path: Path, model: Detector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    split = write(tmp_path)
    monkeypatch.setattr(MODULE, "detect_batch", cheat(split))
    split.path(2).write_bytes(split.path(2).read_bytes()[:50])
    split.path(5).write_text("no picture")
    lost = len(split.labels(2)) + len(split.labels(5))
    found = dict(detect_split(model, split, batch_size=3, workers=workers))
    assert len(found) == len(split) and sum(map(len, found.values())) == 13 - lost == 7
    (record,) = caplog.records
    assert record.message.startswith(
        f"2 of 7 images cannot be read and count as images without detections; the first: {split.path(2)}: "
    )
    evaluation = evaluate_split(model, split)
    assert evaluation.predictions_per_image == 1 and evaluation.boxes_per_image == pytest.approx(13 / 7)
    assert evaluation.unreadable_images == evaluation.to_json()["unreadable_images"] == 2

    for index in range(len(split)):
        split.path(index).write_text("no picture")
    with pytest.raises(DataError, match=r"none of 7 images could be read; the first: .*0\.png"):
        evaluate_split(model, split)


class OneOfTwo(Processes):
    """One of two processes, in this one: the second runs first, and the first is given what it would have sent."""

    def __init__(self, index: int, sent: list[Any]) -> None:
        super().__init__(index=index, count=2)
        self.sent = sent

    def gather(self, item: Any) -> list[Any] | None:
        if self.main:
            return [item, self.sent.pop(0)]
        self.sent.append(item)
        return None

    def raise_together(self, error: UserError | None) -> None:
        if error is not None:
            raise error


def test_a_process_whose_images_all_are_unreadable_ends_nothing(
    tmp_path: Path, model: Detector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    split = write(tmp_path)
    monkeypatch.setattr(MODULE, "detect_batch", cheat(split))
    others = [index for index, _ in detect_split(model, split, batch_size=3, processes=Processes(index=1, count=2))]
    assert 0 < len(others) < len(split)

    def evaluate_both() -> Evaluation | None:
        sent: list[Any] = []
        for index in (1, 0):
            found = evaluate_together(model, split, OneOfTwo(index, sent), batch_size=3)
        return found

    for index in others:
        split.path(index).write_text("no picture")
    evaluation = evaluate_both()
    assert evaluation is not None and 0 < evaluation.predictions_per_image < evaluation.boxes_per_image
    (record,) = caplog.records
    assert record.message.startswith(f"{len(others)} of 7 images cannot be read")
    for index in range(len(split)):
        split.path(index).write_text("no picture")
    with pytest.raises(DataError, match="none of 7 images could be read"):
        evaluate_both()


def test_a_trained_model_on_its_data(tiny_digits: Path, tiny_run: Run) -> None:
    found = evaluate(tiny_run.model(), data=tiny_digits)
    assert found.to_json()["AP"] == pytest.approx(tiny_run.metrics["AP"])  # best.safetensors is that of the record
    assert len(found.results) == 4 * 200  # 20 queries, 10 classes
