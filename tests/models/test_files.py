"""Loading in other shapes, and trainings that start from a checkpoint. Saving and loading as it was: test_zoo.py."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paqdetr
from paqdetr.config import load_config
from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.models import Detector, create_model, list_models, start_from
from paqdetr.models.files import describe_start, model_to_train
from paqdetr.models.zoo import build_model
from paqdetr.structures import ClassTable

SMALL = {
    "backbone": "test_resnet",
    "dim": 32,
    "ffn_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 6,
    "encoder_query_levels": None,
}
OLD, NEW = ClassTable((1, 2), ("cat", "dog")), ClassTable((7, 9, 4), ("bird", "Cat", "dog"))


def make(name: str, classes: ClassTable = OLD, **options: object) -> Detector:
    model = create_model(name, num_classes=len(classes), **SMALL | options)
    model.classes = classes
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make("dino_nano").save(tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_load_in_another_shape_says_what_it_kept(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = paqdetr.load(checkpoint)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        model = paqdetr.load(checkpoint, classes=["dog", "horse"], num_queries=4)
    assert model.classes == ClassTable((0, 1), ("dog", "horse"))
    assert model.config.num_queries == 4
    assert not model.training
    assert [record.getMessage() for record in caplog.records] == [
        f"{checkpoint}: 1 of 2 classes known by name; new: horse; dropped: cat; queries 6 -> 4"
    ]
    kept = model.state_dict()["decoder.class_heads.1.weight"][0]
    assert torch.equal(kept, same.state_dict()["decoder.class_heads.1.weight"][1])


@pytest.mark.parametrize("name", list_models("*_nano"))
def test_every_host_starts_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    old = make(name)
    old.save(tmp_path / "x.safetensors")
    torch.manual_seed(1)
    model = make(name, NEW, num_queries=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = start_from(model, tmp_path / "x.safetensors")
    assert report.known_classes == ("Cat", "dog") and report.new_classes == ("bird",)
    assert report.queries == (6, 8)
    state, source = model.state_dict(), old.state_dict()
    head = "decoder.class_heads.0.weight"
    assert torch.equal(state[head][1:], source[head]) and torch.equal(state[head][0], before[head][0])
    same = [key for key in source if source[key].shape == state[key].shape and key not in report.changed]
    assert all(torch.equal(state[key], source[key]) for key in same)
    assert len(same) > 0.7 * len(source)


def test_heads_that_the_checkpoint_has_not_start_anew_with_other_classes(tmp_path: Path) -> None:
    old = make("dino_nano")
    old.save(tmp_path / "x.safetensors")
    model = make("dino_nano", NEW, auxiliary_heads=["atss", "faster_rcnn"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert start_from(model, tmp_path / "x.safetensors").known_classes == ("Cat", "dog")
    own = {key for key in before if key.startswith("auxiliary.")}
    assert own and all(torch.equal(model.state_dict()[key], before[key]) for key in own)
    head = "decoder.class_heads.0.weight"
    assert torch.equal(model.state_dict()[head][1:], old.state_dict()[head])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("paq_dino_nano", {"backbone": "tf_efficientnet_lite0"}),
        ("deformable_detr_one_stage_nano", {}),
        ("paq_dn_detr_nano", {}),
        ("dino_nano", {"backbone": "swin_tiny_patch4_window7_224"}),  # has buffers that no file holds
    ],
)
def test_a_loaded_model_is_the_saved_one_and_draws_no_weights(
    name: str, settings: dict[str, object], tmp_path: Path
) -> None:
    model = make(name, **settings)
    model.save(tmp_path / "model.safetensors")
    before = torch.get_rng_state()
    loaded = paqdetr.load(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before) or "swin" in str(settings)
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert [key for key, parameter in loaded.named_parameters() if parameter.requires_grad] == trained
    with torch.inference_mode():
        images = torch.randn(1, 3, 64, 96)
        assert torch.equal(model(images).pred_boxes, loaded(images).pred_boxes)


def test_a_model_loaded_in_inference_mode_predicts_and_trains(checkpoint: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (expected,) = paqdetr.load(checkpoint).predict(image, threshold=0.0)
    with torch.inference_mode():
        model = paqdetr.load(checkpoint)
        (inside,) = model.predict(image, threshold=0.0)
    (outside,) = model.predict(image, threshold=0.0)
    for found in (inside, outside):
        assert np.array_equal(found.boxes, expected.boxes) and np.array_equal(found.scores, expected.scores)
    model.train()(torch.randn(1, 3, 64, 64)).pred_logits.sum().backward()
    assert model.encoder.level_embed.grad is not None


def test_other_settings_are_an_error_whose_remedy_works(checkpoint: Path) -> None:
    options = {
        "position_temperature": 10000,
        "refine_from": "normed",
        "share_heads": True,
        "backbone_strides": [16, 32],
        "padded_positions": True,
    }
    free = {"dropout": 0.1, "masked_neck_norm": True}  # no concern of the weights
    model = make("dino_nano", **options, **free)
    with pytest.raises(CheckpointError, match="its weights were made with") as caught:
        start_from(model, checkpoint)
    for key in options | free:
        assert (f"{key} " in caught.value.message) is (key in options)
    overrides = shlex.split(caught.value.remedy.removeprefix("add "))  # what a shell makes of it
    small = [f"model.{key}={value}".replace("None", "null") for key, value in SMALL.items()]
    wrong = [f"model.{key}={value}" for key, value in (options | free).items()]
    config = load_config("dino_nano", [*small, *wrong, *overrides, "model.num_classes=2"])
    start_from(build_model(config, classes=OLD), checkpoint)


def test_another_source_of_queries_points_to_convert(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="queries 'static' instead of 'patterns'") as caught:
        start_from(make("paq_dino_nano"), checkpoint)
    assert "paqdetr convert CHECKPOINT --from paqdetr --as MODEL" in caught.value.remedy


def test_norms_that_are_trained_keep_their_counters(checkpoint: Path) -> None:
    model = make("dino_nano", freeze_backbone_norm=False)
    start_from(model, checkpoint)
    source = paqdetr.load(checkpoint).state_dict()
    state = model.state_dict()
    assert torch.equal(state["backbone.body.bn1.running_mean"], source["backbone.body.bn1.running_mean"])
    assert state["backbone.body.bn1.num_batches_tracked"] == 0
    model.save(checkpoint)
    start_from(make("dino_nano"), checkpoint)


def test_a_training_starts_from_init_instead_of_imagenet(checkpoint: Path) -> None:
    small = {f"model.{key}": value for key, value in SMALL.items()}
    config = load_config("dino_nano", {**small, "init": str(checkpoint), "model.num_classes": 3})
    assert config.pretrained_backbone  # test_resnet has no weights here: reaching for them would fail
    model, report = model_to_train(config, NEW)
    assert report is not None and report.new_classes == ("bird",)
    assert model.classes == NEW
    checkpoint.unlink()
    assert model_to_train(config, NEW, resumed=True)[1] is None  # a saved state fills it
    with pytest.raises(CheckpointError, match="no such file"):
        model_to_train(config, NEW)


def test_no_init_is_a_new_model() -> None:
    small = {f"model.{key}": value for key, value in SMALL.items()}
    config = load_config("dino_nano", {**small, "pretrained_backbone": False, "model.num_classes": 3})
    assert model_to_train(config, NEW)[1] is None
    with pytest.raises(ConfigError, match="ImageNet weights could not be loaded"):
        model_to_train(config.model_copy(update={"pretrained_backbone": True}), NEW)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pretrained_backbone": False}, True),
        ({"pretrained_backbone": False, "model.frozen_stride": 0}, True),  # its norms
        ({"pretrained_backbone": False, "model.frozen_stride": 0, "model.freeze_backbone_norm": False}, False),
        ({"pretrained_backbone": False, "init": "run"}, False),
        ({}, False),
    ],
)
def test_a_backbone_that_is_frozen_at_random_is_said(settings: dict[str, Any], said: bool) -> None:
    found = describe_start(load_config("dino_nano", settings))
    assert bool(found) is said and all("keep random weights" in note for note in found)
