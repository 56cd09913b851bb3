"""Settings without effect: what is called one has none, to the last bit, and has one where it is not called so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paqdetr.cli import run
from paqdetr.config import Config, idle_settings, list_configs, load_config
from paqdetr.config.model import Needs
from paqdetr.config.schema import known_fields
from paqdetr.data.augment import Augment
from paqdetr.errors import ConfigError
from paqdetr.losses import build_criterion
from paqdetr.models.zoo import build_model, preprocessing_of
from paqdetr.runs import flat_settings
from paqdetr.structures import Targets
from paqdetr.study.runs import Places, plan_runs
from paqdetr.study.spec import load_study
from paqdetr.training import train

TINY = {
    "model.backbone": "test_resnet",
    "model.dim": 32,
    "model.ffn_dim": 32,
    "model.num_classes": 5,
    "model.num_queries": 30,
    "model.encoder_layers": 1,
    "model.decoder_layers": 2,
    "model.denoising_queries": 6,
    "model.denoising_groups": 2,
}
PATTERNS = {"model.queries": "patterns"}
BEST = {"loss.assigner": "quality_aware", "loss.select": "score"}
# key -> another value, a model (and settings) beside which it changes nothing, and settings of dino_nano beside which it does
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "model.num_patterns": (9, "dino_nano", PATTERNS),
    "model.pattern_std": (0.5, "dino_nano", {"model.queries": "static_mixture"}),
    "model.temperature": (0.5, "dino_nano", PATTERNS),
    "model.bias_std": (1.0, "dino_nano", {"model.queries": "static_mixture"}),
    "loss.diversity_weight": (5.0, "dino_nano", {"model.queries": "static_mixture"}),
    "loss.div_scale": (9.0, "dino_nano", PATTERNS),
    "model.extractor": ("pooled", "dino_nano", PATTERNS),
    "model.extractor_conv": ("full", "dino_nano", PATTERNS),
    "model.head": ("factorised", "dino_nano", PATTERNS),
    "model.head_rank": (4, "paq_dino_nano", PATTERNS | {"model.head": "factorised"}),
    "model.gain": (0.0, "dino_nano", PATTERNS),
    "model.normalize_summary": (True, "dino_nano", PATTERNS),
    "model.mixture_input": ("both", "dino_nano", PATTERNS),
    "model.detach_query_features": (False, "paq_dino_nano", {"model.queries": "features"}),
    "model.content_std": (0.7, "paq_dino_nano", PATTERNS | {"model.mixture": "residual"}),
    "model.denoising_queries": (12, "dn_detr_nano", {}),
    "model.denoising_groups": (3, "dino_nano", {"model.denoising": "plain"}),
    "model.label_noise": (0.1, "dino_nano", {}),
    "model.box_noise": (0.3, "dino_nano", {}),
    "loss.encoder_assigner": ("fixed_k", "dn_detr_nano", {}),
    "loss.assigner": ("fixed_k", "dino_nano", {}),
    "loss.top_k": (3, "dino_nano", {"loss.assigner": "fixed_k"}),
    "loss.one_to_many_from": (0.6, "dino_nano", {"loss.assigner": "fixed_k"}),
    "loss.one_to_many_until": (0.4, "dino_nano", {"loss.assigner": "fixed_k"}),
    "loss.select": ("score", "dino_nano", {"loss.assigner": "quality_aware"}),
    "loss.min_positives": (4, "dino_nano", {"loss.assigner": "simota"}),
    "loss.encoder_min_positives": (4, "paq_dino_nano", {"loss.encoder_assigner": "simota"}),
    "loss.min_iou": (1.0, "dino_nano", BEST | {"loss.min_positives": 4}),
    "loss.gamma": (300.0, "dino_nano", BEST),
    "loss.confidence": ("max", "dino_nano", BEST | {"loss.gamma": 300.0}),
    "loss.varifocal_alpha": (0.25, "dino_r50", {}),
    "loss.hybrid_loss": ("aligned", "dino_nano", {"model.hybrid_queries": 20}),
    "model.hybrid_heads": ("encoder", "dino_nano", {"model.hybrid_queries": 20}),
    "model.hybrid_ratio": (1.0, "dino_nano", {}),
    "model.distinct_restart": (True, "deformable_detr_nano", {"model.distinct_queries": 0.05}),
    "loss.hybrid_weight": (3.0, "dino_nano", {"model.hybrid_queries": 20}),
    "loss.hybrid_repeat": (2, "dino_nano", {"model.hybrid_queries": 20}),
    "model.roi_samples": (8, "dino_nano", {"model.auxiliary_heads": ["faster_rcnn"]}),
    "model.customised_queries": (3, "dino_nano", {"model.auxiliary_heads": ["atss"]}),
    "loss.auxiliary_weight": (5.0, "dino_nano", {"model.auxiliary_heads": ["atss"]}),
    "model.share_heads": (True, "dino_nano", {}),
    "model.distinct_queries": (0.05, "dino_nano", {}),
    "model.scale_positions": (True, "dino_nano", {}),
    "model.position_relation": (True, "dino_nano", {}),
    "model.look_forward_twice": (False, "dino_nano", {}),
    "model.refine_from": ("raw", "deformable_detr_one_stage_nano", {"model.refine_from": "normed"}),
    "model.padded_positions": (True, "deformable_detr_nano", {}),
    "loss.customised_weight": (5.0, "dino_nano", {"model.auxiliary_heads": ["atss"]}),
}

OF_SEVERAL_LAYERS = {"loss.assigner", "model.distinct_queries", "model.look_forward_twice", "model.position_relation"}
OF_SEVERAL_LAYERS |= {"model.scale_positions", "model.share_heads"}


def step(config: Config) -> tuple[float, float]:
    """The loss of a first step in mid-training, and the sum of all gradients."""
    torch.manual_seed(0)
    model = build_model(config).train()
    with torch.no_grad():  # what starts at zero would hide something
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.sin(torch.arange(parameter.numel()).view_as(parameter).float()))
    torch.manual_seed(1)
    boxes = torch.cat([0.3 + 0.4 * torch.rand(3, 2), 0.1 + 0.3 * torch.rand(3, 2)], dim=1)
    targets = [Targets(torch.tensor([0, 3, 4]), boxes), Targets(torch.tensor([1, 1, 2]), boxes.flip(0))]
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 64:] = True
    output = model(torch.randn(2, 3, 64, 96).masked_fill(padding[:, None], 0.0), padding, targets)
    report = build_criterion(config.loss)(output, targets, aux_losses=model.aux_losses(), progress=0.5)
    report.total.backward()
    gradient = sum(float(p.grad.double().abs().sum()) for p in model.parameters() if p.grad is not None)
    return float(report.total.detach()), gradient


def test_every_setting_of_the_table_is_known_and_tried() -> None:
    named = {key for key, field in known_fields().items() if any(isinstance(mark, Needs) for mark in field.metadata)}
    # The schedule's two show in no single step.
    crop = {"augment.crop_size", "augment.crop_style", "augment.keep_small"}  # see below
    assert named - set(CASES) == {"drop_at", "lr_reference_batch", "resize", *crop}


@pytest.mark.integration
@pytest.mark.parametrize("key", CASES)
def test_what_is_called_idle_is_and_what_is_not_is_not(key: str, one_thread: None) -> None:
    value, model, needed = CASES[key]
    beside = {"model.decoder_layers": 1} if key in OF_SEVERAL_LAYERS else {}
    beside |= {"model.hybrid_queries": 20} if key == "model.hybrid_ratio" else {}
    beside |= {"model.denoising": "none"} if key in ("model.label_noise", "model.box_noise") else {}
    for name, settings, idle in ((model, TINY | beside, True), ("dino_nano", TINY | needed, False)):
        without, with_it = load_config(name, settings), load_config(name, settings | {key: value})
        assert (key in idle_settings(with_it, [key])) is idle
        assert (step(with_it) == step(without)) is idle


@pytest.mark.integration
@pytest.mark.parametrize(
    ("off", "changes", "needs"),
    [
        (
            {"loss.one_to_many_until": 0.0},
            {
                "loss.assigner": "quality_aware",
                "loss.encoder_assigner": "simota",
                "loss.gamma": 0.9,
                "loss.top_k": 9,
                "loss.min_positives": 3,
                "loss.encoder_min_positives": 2,
                "loss.min_iou": 0.7,
                "loss.select": "score",
                "loss.confidence": "max",
            },
            "loss.one_to_many_until above 0",
        ),
        ({"loss.diversity_weight": 0.0}, {"loss.div_scale": 5.0}, "loss.diversity_weight above 0"),
        ({"loss.div_scale": 0.0}, {"loss.diversity_weight": 5.0}, "loss.div_scale above 0"),
        (
            {"model.decoder_layers": 1},
            {"model.distinct_queries": 0.05, "model.distinct_restart": True, "model.refine_from": "normed"},
            "model.decoder_layers above 1",
        ),
    ],
)
def test_what_is_switched_off(off: dict[str, Any], changes: dict[str, Any], needs: str, one_thread: None) -> None:
    without = load_config("paq_dino_nano", TINY | off)
    changed = load_config("paq_dino_nano", TINY | off | changes)
    assert idle_settings(changed, [*off, *changes]) == dict.fromkeys(changes, needs)
    assert step(changed) == step(without)


def test_raw_output_needs_a_norm() -> None:
    config = load_config("dino_nano", {"model.decoder_norm": False})
    assert idle_settings(config, ["model.refine_from"]) == {"model.refine_from": "model.decoder_norm=true"}


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"image_size": [480, 800], "size_divisor": 1}, False),
        ({"image_size": [480, 800], "size_divisor": 32}, True),
        ({"image_size": 800, "size_divisor": 1}, True),
    ],
)
def test_rules_of_programs_need_two_sizes_and_whole_pixels(settings: dict[str, Any], idle: bool) -> None:
    rules = [load_config("dino_nano", settings | {"resize": resize}) for resize in ("detr", "detectron2")]
    assert bool(idle_settings(rules[0], ["resize"])) is idle
    sizes = {preprocessing_of(config).target_size(333, 500) for config in rules}
    assert (len(sizes) == 1) is idle


def test_no_model_that_ships_has_settings_without_effect() -> None:
    keys = [f"model.{key}" for key in ("share_heads", "scale_positions", "position_relation", "distinct_queries")]
    keys += ["model.refine_from", "model.padded_positions", "resize"]
    for name in list_configs():
        config = load_config(name)
        own = [key for key in keys if flat_settings(config)[key] != known_fields()[key].default]
        assert not idle_settings(config, own), name


def test_settings_of_the_images_half_need_it() -> None:
    config = load_config("paq_dino_nano", {"model.mixture_input": "query"})
    half = {f"model.{key}" for key in ("extractor", "extractor_conv", "head", "head_rank", "normalize_summary")}
    idle = idle_settings(config, [*half, "model.num_patterns", "model.gain", "model.bias_std"])
    assert set(idle) == half
    assert idle["model.extractor"] == "model.mixture_input=image or both"


def test_learned_content_of_hybrid_queries_starts_as_the_settings_say() -> None:
    config = load_config("paq_relation_detr_nano", TINY | {"model.content_std": 1.0})
    assert idle_settings(config, ["model.content_std"]) == {}
    model = build_model(config)
    assert model.hybrid_source is not None and float(model.hybrid_source.table.std()) == pytest.approx(1, abs=0.1)
    config = load_config("paq_relation_detr_nano", {"model.hybrid_heads": "all"})
    assert idle_settings(config, ["model.content_std"])


@pytest.mark.parametrize(
    ("key", "value", "changes", "idle"),
    [
        ("augment.crop_size", [0.3, 0.4], {}, False),
        ("augment.crop_size", [0.3, 0.4], {"augment.crop_style": "detr"}, True),
        ("augment.crop_size", [0.3, 0.4], {"augment.crop": 0.0}, True),
        ("augment.crop_style", "detr", {}, False),
        ("augment.crop_style", "detr", {"augment.crop": 0.0}, True),
        ("augment.keep_small", 200.0, {"augment.crop_style": "detr"}, False),
        ("augment.keep_small", 200.0, {"augment.crop": 0.0}, True),
    ],
)
def test_settings_of_the_crop(key: str, value: Any, changes: dict[str, Any], idle: bool) -> None:
    def pictures(settings: dict[str, Any]) -> list[bytes]:
        config = load_config("dino_nano", {"image_size": 400, "augment.crop": 1.0} | settings)
        augment = Augment(config.augment, preprocessing_of(config))
        found = []
        for seed in range(4):
            torch.manual_seed(seed)
            pixels = torch.randint(0, 255, (3, 500, 700), dtype=torch.uint8)
            boxes = np.array([[50.0, 60.0, 90.0, 100.0], [500.0, 300.0, 640.0, 440.0]], np.float32)
            found.append(augment(pixels, boxes, np.array([0, 1]), scale=1.0).pixels.numpy().tobytes())
        return found

    config = load_config("dino_nano", {"augment.crop": 1.0} | changes | {key: value})
    assert bool(idle_settings(config, [key])) is idle
    assert (pictures(changes) == pictures(changes | {key: value})) is idle


def test_rates() -> None:
    config = load_config("dino_r50", {"drop_at": 0.5, "lr_reference_batch": 4})
    assert idle_settings(config, ["drop_at", "lr_reference_batch", "lr"]) == {
        "lr_reference_batch": "lr_rule=linear or sqrt"
    }
    config = load_config("dino_r50", {"schedule": "cosine", "lr_rule": "sqrt"})
    assert list(idle_settings(config, ["drop_at", "lr_reference_batch"])) == ["drop_at"]


def test_a_training_names_them(
    tiny_digits: Path,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    no_pictures: None,
) -> None:
    settings = {**tiny_settings, "epochs": 1, "model.num_patterns": 16}
    with caplog.at_level(logging.WARNING):
        train("dino_nano", data=tiny_digits, output=tmp_path / "run", device="cpu", settings=settings)
    told = [record.message for record in caplog.records if "changes nothing" in record.message]
    assert told == ["model.num_patterns=16 changes nothing here: it needs model.queries=patterns or static_mixture"]


def test_a_plan_names_them(
    tiny_digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paqdetr.training.plan.plan_training", _stop)
    words = ["image_size=96", "loss.gamma=0.5"]
    assert run(["plan", "dino_nano", *words, "--data", str(tiny_digits)]) == 2
    assert "note: loss.gamma=0.5 changes nothing here" in capsys.readouterr().err


def _stop(*arguments: object, **options: object) -> None:
    raise ConfigError("far enough", "stop here")


def test_a_study_refuses_a_variant_that_would_be_its_baseline(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "name: study\nbase: dino_nano\nepochs: 1\nseeds: [0]\ndata: {digits: {make: {train: 8, val: 4, test: 4}}}\n"
        "variants: {baseline: {}, sharper: {settings: {model.temperature: 0.5}}}\n"
    )
    with pytest.raises(ConfigError, match=r"variants\.sharper\.settings, on digits: model\.temperature=0\.5"):
        plan_runs(load_study(file), file=file, places=Places(tmp_path / "out"), root=tmp_path)
