"""Gradients at content queries, against the training's own way, and that nothing of the model changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from paqdetr.analysis.usage import content_gradients
from paqdetr.config import LossConfig
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.loader import plain_batch
from paqdetr.errors import DataError
from paqdetr.losses import build_criterion
from paqdetr.models import create_model
from paqdetr.models.detector import Detector
from paqdetr.structures import ClassTable
from paqdetr.training.figures import watch_gradients

SMALL = {"dim": 32, "ffn_dim": 64, "num_queries": 12, "image_size": 96, "num_classes": 10}


@pytest.fixture(scope="module")
def split(tiny_digits: Path) -> DetectionDataset:
    return open_split(tiny_digits, "train")


def detector(name: str, split: DetectionDataset, **more: object) -> Detector:
    torch.manual_seed(0)
    model = create_model(name, **{**SMALL, **more}).eval()
    model.classes = split.classes
    return model


@pytest.mark.parametrize(("name", "ranked"), [("paq_dino_nano", True), ("dino_nano", True), ("dn_detr_nano", False)])
def test_against_the_whole_backward_pass(name: str, ranked: bool, split: DetectionDataset) -> None:
    """Without denoising, whose noise is drawn: the hook of the training, image by image, through the whole model."""
    model = detector(name, split, denoising="none")
    criterion = build_criterion(LossConfig())
    told: list[tuple[int, int]] = []
    found = content_gradients(model, split, criterion=criterion, images=3, progress=lambda *done: told.append(done))
    expected = torch.zeros(12)
    for index in (0, 8 // 3, 16 // 3):
        batch = plain_batch(split, model.preprocessing, [index])
        output = model.train()(batch.images, batch.padding_mask, batch.targets)
        watch_gradients(output.mixture.content, expected)
        criterion(output, batch.targets, num_boxes=1.0).total.backward()
    assert found.counts == pytest.approx(expected.double().numpy(), rel=1e-3)
    assert (found.counts > 0).all()
    assert (found.images, found.ranked, found.discrete) == (3, ranked, False)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_the_model_is_left_as_it_was(split: DetectionDataset) -> None:
    model = detector("paq_dino_nano", split)
    model.encoder.train()  # a mode of one part alone
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    criterion = build_criterion(LossConfig())
    first = content_gradients(model, split, criterion=criterion, images=2, seed=3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    again = content_gradients(model, split, criterion=criterion, images=2, seed=3)
    other = content_gradients(model, split, criterion=criterion, images=2, seed=4)
    assert np.array_equal(first.counts, again.counts)
    assert not np.array_equal(first.counts, other.counts), "the noise of denoising reaches the content"


def test_one_to_many_gives_more_to_learn(split: DetectionDataset) -> None:
    # Enough queries that no box has to do with one.
    model = detector("paq_dino_nano", split, denoising="none", num_queries=40)
    loss = LossConfig(assigner="fixed_k", top_k=4, one_to_many_from=0.2, one_to_many_until=0.5)
    early, late = (
        content_gradients(model, split, criterion=build_criterion(loss), images=2, train_progress=progress)
        for progress in (None, 0.9)
    )
    assert early.counts.sum() > 1.2 * late.counts.sum()


def test_mistakes(split: DetectionDataset) -> None:
    model = detector("dino_nano", split)
    criterion = build_criterion(LossConfig())
    with pytest.raises(DataError, match="no image to take gradients of"):
        content_gradients(model, split, criterion=criterion, images=0)
    model.classes = ClassTable.numbered(10)
    with pytest.raises(DataError, match="does not fit the model"):
        content_gradients(model, split, criterion=criterion)


def test_images_that_cannot_be_read_are_left_out(tiny_digits: Path, tmp_path: Path) -> None:
    broken = open_split(shutil.copytree(tiny_digits, tmp_path / "digits"), "train")
    broken.path(0).write_text("no image")
    model, criterion = detector("paq_dino_nano", broken), build_criterion(LossConfig())
    assert content_gradients(model, broken, criterion=criterion, images=2).images == 1
    for index in range(len(broken)):
        broken.path(index).write_text("no image")
    with pytest.raises(DataError, match="not an image"):
        content_gradients(model, broken, criterion=criterion, images=2)
