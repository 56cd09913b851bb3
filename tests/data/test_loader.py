from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from paqdetr.config import AugmentConfig, Config, load_config
from paqdetr.data.augment import Augment
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.loader import (
    Batch,
    Failure,
    ImageLoader,
    Images,
    Pictures,
    SampleKey,
    TrainingBatches,
    TrainingImages,
    collate,
    collate_in_place,
    plain_batch,
    training_loader,
)
from paqdetr.errors import DataError, WorkerError
from paqdetr.preprocessing import Normalization, Preprocessing
from paqdetr.structures import Targets

PREPROCESSING = Preprocessing(64, 32, Normalization(mean=(127.0,) * 3, std=(128.0,) * 3))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    """Ten pictures of noise, four of them tall, with 0 to 3 boxes each."""
    folder = tmp_path_factory.mktemp("noise")
    (folder / "train").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(10):
        width, height = (40, 60) if i < 4 else (60, 40)
        name = f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / "train" / name)
        images.append({"id": 100 + i, "file_name": name, "width": width, "height": height})
        for j in range(i % 4):
            annotations.append(
                {"id": len(annotations), "image_id": 100 + i, "category_id": 1 + j % 2, "bbox": [5 * j, 4, 20, 30]}
            )
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    return open_split(folder, "train")


def settings(**overrides: object) -> Config:
    return load_config("paq_dino_nano", {"image_size": 64, "batch_size": 3, "augment.color": 0.2, **overrides})


def epoch(config: Config, split: DetectionDataset, epochs: int = 1) -> list[Batch]:
    loader, batches = training_loader(config, split, PREPROCESSING)
    found = []
    for number in range(epochs):
        batches.epoch = number
        found += list(loader)
    return found


def require_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images)
        assert (a.padding_mask is None) == (b.padding_mask is None)
        assert a.padding_mask is None or torch.equal(a.padding_mask, b.padding_mask)  # type: ignore[arg-type]
        for mine, its in zip(a.targets, b.targets, strict=True):
            assert mine.image_id == its.image_id and mine.size == its.size
            assert torch.equal(mine.boxes, its.boxes) and torch.equal(mine.labels, its.labels)


def keys(epoch: int = 0, **changes: object) -> list[list[SampleKey]]:
    defaults: dict[str, object] = dict(
        sizes=np.array([[60, 40]] * 10 + [[40, 60]] * 13), batch_size=4, scale=(0.5, 1.0), seed=0
    )
    sampler = TrainingBatches(**defaults | changes)  # type: ignore[arg-type]
    sampler.epoch = epoch
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


# ---------------------------------------------------------------------------------------------- batches


def test_workers_change_no_batch_and_no_noise(split: DetectionDataset) -> None:
    torch.manual_seed(3)
    alone = epoch(settings(workers=0), split, epochs=2)
    after_alone = torch.rand(2)
    torch.manual_seed(3)
    helped = epoch(settings(workers=2), split, epochs=2)
    after_helped = torch.rand(2)
    require_equal(alone, helped)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), after_alone)  # what training draws next does not depend on the loader
    assert torch.equal(after_alone, after_helped)


def test_an_epoch_can_be_repeated_alone(split: DetectionDataset) -> None:
    both = epoch(settings(workers=0), split, epochs=2)
    loader, batches = training_loader(settings(workers=0), split, PREPROCESSING)
    batches.epoch = 1
    torch.manual_seed(99)
    require_equal(list(loader), both[3:])
    assert len(loader) == 3


def test_a_batch_has_what_a_step_takes(split: DetectionDataset) -> None:
    for batch in epoch(settings(workers=0), split):
        count, channels, height, width = batch.images.shape
        assert count == 3 and channels == 3 and height % 32 == 0 and width % 32 == 0
        assert batch.images.dtype == torch.float32
        assert batch.padding_mask is None or batch.padding_mask.shape == (3, height, width)
        for target in batch.targets:
            place = split.image_ids.index(target.image_id)  # type: ignore[arg-type]
            assert target.size == tuple(split.sizes[place])
            assert target.boxes.dtype == torch.float32 and target.labels.dtype == torch.int64
            assert len(target.boxes) == len(target.labels) <= len(split.labels(place))
            assert bool(len(target)) == bool(len(split.labels(place)))
        moved = batch.to("cpu")
        assert torch.equal(moved.images, batch.images) and len(moved.targets) == 3


def test_collate_pads_and_marks_the_padding() -> None:
    def sample(height: int, width: int) -> tuple[torch.Tensor, Targets]:
        return torch.ones(3, height, width), Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))

    batch = collate([sample(32, 64), sample(64, 32)])
    assert isinstance(batch, Batch) and batch.images.shape == (2, 3, 64, 64)
    assert batch.padding_mask is not None
    assert batch.padding_mask.sum((1, 2)).tolist() == [32 * 64, 32 * 64]
    assert (batch.images.mean(1) == 1).eq(~batch.padding_mask).all()
    even = collate([sample(32, 32), sample(32, 32)])
    assert isinstance(even, Batch) and even.padding_mask is None


def test_torchs_loader_pins_a_batch_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its thread for pinning does it; without a GPU there is no such memory, so who is asked has to do."""
    targets = Targets(torch.zeros(2, dtype=torch.int64), torch.rand(2, 4), 7, (32, 48))
    batch = Batch(torch.rand(1, 3, 32, 64), torch.zeros(1, 32, 64, dtype=torch.bool), [targets])
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append(tensor) or tensor.clone())
    pinned = torch_pin_memory(batch)
    assert [id(tensor) for tensor in asked] == [
        id(tensor) for tensor in (batch.padding_mask, batch.images, targets.labels, targets.boxes)
    ]
    assert pinned is not batch and torch.equal(pinned.images, batch.images)
    assert pinned.targets[0].image_id == 7 and pinned.targets[0].size == (32, 48)
    failure = Failure(DataError, "x.png: does not decode", "replace it")
    assert torch_pin_memory(failure) is failure


# -------------------------------------------------------------------------------------------- the images


def test_a_sample_depends_on_its_key_alone(split: DetectionDataset) -> None:
    images = TrainingImages(split=split, augment=Augment(AugmentConfig(), PREPROCESSING), cache_gib=0)
    key = SampleKey(index=7, seed=5, scale=1.0)
    before = torch.get_rng_state()
    first = images.sample(key)
    assert torch.equal(torch.get_rng_state(), before)  # training's own noise goes on undisturbed
    torch.rand(10)
    again = images.sample(key)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].boxes, again[1].boxes)
    others = [images.sample(SampleKey(7, seed, 1.0))[0] for seed in range(6, 12)]
    assert any(other.shape != first[0].shape or not torch.equal(other, first[0]) for other in others)
    assert len(images) == 10


def test_a_sample_without_changes_is_what_evaluation_sees(split: DetectionDataset) -> None:
    """Pixels normalised last, boxes converted once, in the form of `DetectionDataset.targets`."""
    preprocessing = Preprocessing(48, 1, Normalization(mean=(55.0, 1.0, 2.0), std=(100.0, 2.0, 3.0)))
    unchanged = Augment(AugmentConfig(flip=0.0, crop=0.0, color=0.0), preprocessing)
    images = TrainingImages(split=split, augment=unchanged, cache_gib=0)
    pixels, targets = images.sample(SampleKey(index=9, seed=0, scale=1.0))
    plain = plain_batch(split, preprocessing, [9])
    assert torch.equal(pixels, plain.images[0])
    expected = plain.targets[0]
    assert len(expected) and torch.equal(targets.labels, expected.labels)
    assert torch.allclose(targets.boxes, expected.boxes, atol=1e-6)
    assert (targets.image_id, targets.size) == (expected.image_id, expected.size) == (split.image_ids[9], (40, 60))
    left, top, right, bottom = split.boxes(9)[0].tolist()
    by_hand = [(left + right) / 120, (top + bottom) / 80, (right - left) / 60, (bottom - top) / 40]
    assert expected.boxes[0].tolist() == pytest.approx(by_hand)


def test_the_cache_keeps_to_its_budget(split: DetectionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[int] = Counter()
    read = split.image

    def counted(index: int) -> Image.Image:
        opened[index] += 1
        return read(index)

    monkeypatch.setattr(split, "image", counted)
    one = 60 * 40 * 3  # bytes of a picture
    images = TrainingImages(
        split=split, augment=Augment(AugmentConfig(), PREPROCESSING), cache_gib=(3 * one + 10) / 2**30
    )
    for _ in range(3):
        for index in range(10):
            images.sample(SampleKey(index, 0, 1.0))
    assert [opened[index] for index in range(10)] == [1, 1, 1] + [3] * 7
    assert len(images.cache) == 3 and images.cache.nbytes == 3 * one


def test_cached_pixels_are_not_changed_by_use(split: DetectionDataset) -> None:
    augment = Augment(AugmentConfig(color=0.5, flip=1.0, crop=1.0), PREPROCESSING)
    images = TrainingImages(split=split, augment=augment, cache_gib=1)
    first = images.sample(SampleKey(9, 1, 1.0))[0]
    images.sample(SampleKey(9, 2, 0.7))
    assert torch.equal(images.sample(SampleKey(9, 1, 1.0))[0], first)


@pytest.fixture
def broken(split: DetectionDataset, tmp_path: Path) -> DetectionDataset:
    """The same pictures, but number 5 is text and number 6 lies on its side."""
    content = json.loads(split.annotation_file.read_text())
    (tmp_path / "train").mkdir()
    for entry in content["images"]:
        name = entry["file_name"]
        (tmp_path / "train" / name).write_bytes((split.image_dir / name).read_bytes())
    (tmp_path / "train" / "5.png").write_text("no image")
    with Image.open(tmp_path / "train" / "6.png") as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "train" / "6.png")
    (tmp_path / "train.json").write_text(json.dumps(content))
    return open_split(tmp_path, "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_named(broken: DetectionDataset, workers: int) -> None:
    with pytest.raises(DataError, match=r"5\.png") as caught:
        epoch(settings(workers=workers, batch_size=1), broken_without(broken, 6))
    assert caught.value.remedy == "Replace it, or remove it and its annotations."


def test_an_image_of_another_size_than_stated_is_named(broken: DetectionDataset) -> None:
    with pytest.raises(DataError, match=r"6\.png: is 40x60 pixels .* says 60x40"):
        broken.checked_image(6)
    with pytest.raises(DataError, match=r"6\.png"):
        epoch(settings(workers=0, batch_size=1), broken_without(broken, 5))
    assert broken.checked_image(0).size == (40, 60)


def broken_without(split: DetectionDataset, number: int) -> DetectionDataset:
    content = json.loads(split.annotation_file.read_text())
    content["images"] = [image for image in content["images"] if image["id"] != 100 + number]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 100 + number]
    split.annotation_file.write_text(json.dumps(content))
    return DetectionDataset.from_json(split.annotation_file, split.image_dir)


def test_a_failure_stands_for_its_batch() -> None:
    good = (torch.zeros(3, 32, 32), Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)))
    failure, images = Failure(DataError, "what", "remedy"), Images()
    assert collate_in_place(images, [good, failure, good]) is failure


# ------------------------------------------------------------------------------------- workers and mosaic


class Killed(Images):
    """Images whose reading ends the process, as the system ends one that takes too much memory."""

    def sample(self, key: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return key


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_its_batch_is_on_the_way(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = ImageLoader(Killed(), [[0]], workers=0)

    def broken() -> Iterator[object]:
        raise error
        yield

    monkeypatch.setattr(loader, "_loader", broken())
    with pytest.raises(
        WorkerError, match="a process that loads images died: DataLoader worker has closed its connection"
    ):
        list(loader)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_worker_that_dies_is_named(method: str) -> None:
    """At once, and not after the minutes that a slow disk is waited for; with the start method of Python 3.14, too."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {method}")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        with pytest.raises(WorkerError, match=r"a process that loads images died: DataLoader worker(.|\n)*memory"):
            list(ImageLoader(Killed(), [[0]], workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)


class Numbers(Images):
    """Keys, but for one below zero."""

    def sample(self, key: int) -> int:
        if key < 0:
            raise RuntimeError("no such number")
        return key

    def collate(self, samples: Sequence[int]) -> Pictures:
        return Pictures(list(samples), [], {})


@pytest.mark.parametrize("between_passes", [False, True])
def test_a_worker_that_dies_meanwhile_is_told_when_a_batch_is_due(between_passes: bool) -> None:
    """Not in the middle of the step that is just being done."""
    before = {child.pid for child in multiprocessing.active_children()}  # other tests' pools
    loader = ImageLoader(Numbers(), [[1], [2], [3]], workers=1)
    batches = iter(loader)
    for _ in range(3 if between_passes else 1):
        next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if child.pid not in before)
    worker.kill()
    worker.join()
    _ = [time.sleep(0.01) for _ in range(10)]  # the signal would interrupt them
    with pytest.raises(WorkerError, match=rf"DataLoader worker \(pid {worker.pid}\) is killed by signal: Killed"):
        list(loader if between_passes else batches)
    loader.close()


def test_an_error_in_a_worker_that_lives_on_is_its_own() -> None:
    loader = ImageLoader(Numbers(), [[-1]], workers=1)
    with pytest.raises(RuntimeError, match="no such number"):
        list(loader)
    loader.close()


def test_a_daemonic_process_loads_by_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(multiprocessing.current_process().__dict__["_config"], "daemon", True)
    assert [batch.indices for batch in ImageLoader(Numbers(), [[1], [2]], workers=2)] == [[1], [2]]
    assert "a daemonic process, such as one of multiprocessing.Pool" in caplog.text


@pytest.mark.integration
def test_spawned_workers_change_no_batch(split: DetectionDataset) -> None:
    """What a worker needs survives pickling: macOS and Windows start workers so."""
    config = settings(workers=2, **{"augment.mosaic": 0.5})
    expected = epoch(settings(workers=0, **{"augment.mosaic": 0.5}), split)
    images = TrainingImages(split=split, augment=Augment(config.augment, PREPROCESSING), cache_gib=0.1)
    _, batches = training_loader(config, split, PREPROCESSING)
    require_equal(expected, list(ImageLoader(images, batches, workers=2, start_method="spawn")))


def test_workers_share_the_cache(split: DetectionDataset) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform does not fork")
    images = TrainingImages(split=split, augment=Augment(AugmentConfig(), PREPROCESSING), cache_gib=0.1)
    _, batches = training_loader(settings(), split, PREPROCESSING)
    loader = ImageLoader(images, batches, workers=2, start_method="fork")
    seen = {target.image_id for batch in loader for target in batch.targets}
    assert len(images.cache) == len(seen) == 9  # decoded by the workers, and here too


def test_workers_persist_over_epochs(split: DetectionDataset) -> None:
    loader, batches = training_loader(settings(workers=2), split, PREPROCESSING)
    before = {child.pid for child in multiprocessing.active_children()}
    workers = []
    for batches.epoch in range(3):
        list(loader)
        workers.append({child.pid for child in multiprocessing.active_children()} - before)
    assert len(workers[0]) == 2 and workers[0] == workers[1] == workers[2]


def test_mosaic_is_a_setting_that_leaves_the_others_alone(split: DetectionDataset) -> None:
    """With it off, or on and not drawn, an image is what it was before there was mosaic."""
    key = SampleKey(7, 5, 1.0)

    def sample(mosaic: float, key: SampleKey = key) -> tuple[torch.Tensor, Targets]:
        augment = Augment(AugmentConfig(color=0.3, mosaic=mosaic), PREPROCESSING)
        return TrainingImages(split=split, augment=augment, cache_gib=0).sample(key)

    off, rare, always = sample(0.0), sample(1e-9), sample(1.0)
    assert torch.equal(off[0], rare[0]) and torch.equal(off[1].boxes, rare[1].boxes)
    assert always[0].shape == off[0].shape and not torch.equal(always[0], off[0])
    assert always[1].image_id == off[1].image_id and always[1].size == off[1].size
    assert torch.equal(sample(1.0)[0], always[0])
    several = [sample(1.0, SampleKey(7, seed, 1.0))[1] for seed in range(20)]
    assert max(len(targets) for targets in several) > 3  # of one image: three at the most
    assert all(((t.boxes >= 0) & (t.boxes <= 1)).all() for t in several)


# ------------------------------------------------------------------------------------------- the sampler


def test_an_epoch_has_every_image_at_most_once() -> None:
    found = keys()
    assert [len(batch) for batch in found] == [4] * 5  # 23 images: three miss this epoch
    indices = [key.index for batch in found for key in batch]
    assert len(set(indices)) == 20 and set(indices) <= set(range(23))


def test_over_epochs_every_image_takes_part_equally() -> None:
    seen = Counter(key.index for e in range(200) for batch in keys(e) for key in batch)
    assert set(seen) == set(range(23))
    assert min(seen.values()) > 155 and max(seen.values()) <= 200  # 174 on average


def test_a_rare_orientation_takes_part() -> None:
    sizes = np.array([[60, 40]] * 3 + [[40, 60]] * 20)  # the tall ones never fill a batch of their own
    seen = Counter(key.index for e in range(100) for batch in keys(e, sizes=sizes) for key in batch)
    assert min(seen[index] for index in range(3)) > 70  # 87 on average


def test_epochs_differ_and_repeat_for_a_seed() -> None:
    assert keys(3) == keys(3)
    assert keys(3) != keys(4)
    assert keys(3) != keys(3, seed=1)
    orders = {tuple(key.index for batch in keys(e) for key in batch) for e in range(5)}
    assert len(orders) == 5
    seeds = [key.seed for e in range(5) for batch in keys(e) for key in batch]
    assert len(set(seeds)) == len(seeds)


def test_a_batch_shares_its_scale() -> None:
    scales = [{key.scale for key in batch} for e in range(20) for batch in keys(e)]
    assert all(len(of_batch) == 1 for of_batch in scales)
    values = sorted(scale for of_batch in scales for scale in of_batch)
    assert 0.5 <= values[0] < 0.55 and 0.95 < values[-1] <= 1.0


def test_batches_are_of_one_orientation_but_for_the_rest() -> None:
    for e in range(20):
        mixed = sum(len({key.index < 10 for key in batch}) > 1 for batch in keys(e))
        assert mixed <= 1


@pytest.mark.parametrize("count", [23, 24, 40])
def test_ranks_share_out_the_batches(count: int) -> None:
    sizes = np.array([[60, 40]] * 10 + [[40, 60]] * (count - 10))
    alone = keys(2, sizes=sizes)
    ranks = [keys(2, sizes=sizes, rank=rank, world_size=2) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == count // 8
    indices = [key.index for rank in ranks for batch in rank for key in batch]
    assert len(set(indices)) == len(indices)
    if count % 8 == 0:  # nobody misses the epoch: the same batches as in one process
        assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == alone


@pytest.mark.parametrize("world_size", [1, 2])
def test_fewer_images_than_a_batch_are_repeated(world_size: int) -> None:
    sizes = np.array([[60, 40], [40, 60], [40, 60]])
    for rank in range(world_size):
        (batch,) = keys(sizes=sizes, batch_size=4, rank=rank, world_size=world_size)
        assert len(batch) == 4 and len({key.seed for key in batch}) == 4
    (alone,) = keys(sizes=sizes, batch_size=4)
    assert {key.index for key in alone} == {0, 1, 2}


def test_one_image() -> None:
    (batch,) = keys(sizes=np.array([[40, 60]]), batch_size=2)
    assert [key.index for key in batch] == [0, 0]
