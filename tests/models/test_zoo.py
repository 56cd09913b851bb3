from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import paqdetr
from paqdetr.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from paqdetr.config import ModelConfig, load_config
from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.models import Detector, create_model, list_models, load
from paqdetr.models.backbone import Uninitialised
from paqdetr.models.denoising import ContrastiveDenoising, PlainDenoising
from paqdetr.models.proposals import LearnedAnchors, LearnedPoints, ProposalStart
from paqdetr.models.queries import FeatureQueries, StaticQueries
from paqdetr.models.zoo import as_class_table, build_model
from paqdetr.paq import PatternQueries
from paqdetr.structures import ClassTable

CORE = [f"{host}_{size}" for host in ("deformable_detr", "dn_detr", "dino") for size in ("r50", "swin_l", "nano")]
VARIANTS = [
    "dab_deformable_detr_r50",
    "deformable_detr_one_stage_r50",
    "deformable_detr_plus_r50",
    "deformable_detr_refine_r50",
    "ddq_detr_nano",
    "ddq_detr_r50",
    "ddq_detr_swin_l",
    "deformable_detr_static_r50",
    "dino_5scale_r50",
    "hybrid_deformable_detr_r50",
    "relation_detr_nano",
    "relation_detr_r50",
    "relation_detr_swin_l",
]


def test_list_models() -> None:
    names = list_models()
    assert names == sorted(names)
    for name in CORE + VARIANTS:
        assert name in names and f"paq_{name}" in names
    plain = [name for name in names if not name.startswith("paq_")]
    assert list_models("paq_*") == [f"paq_{name}" for name in plain]
    assert list_models("dino_nano") == ["dino_nano"]
    assert list_models("yolo*") == []


def put_together(name: str) -> Detector:
    """A model without weights, whose parts are as many as its settings say."""
    backbone = "test_resnet"  # the model's own takes most of the time
    with torch.device("meta"), Uninitialised():
        model = create_model(name, num_classes=7, backbone=backbone)
    config = model.config
    assert (
        model.name == name and config == load_config(name, {"model.num_classes": 7, "model.backbone": backbone}).model
    )
    assert len(model.encoder.layers) == config.encoder_layers
    assert len(model.decoder.layers) == config.decoder_layers
    assert len(model.neck.lateral) + len(model.neck.extra) == config.num_levels
    assert len(model.classes) == 7 and model.decoder.class_heads[0].out_features == 7
    return model


@pytest.mark.parametrize("name", [*list_models("*_nano"), *list_models("*_swin_l")])
def test_models_are_put_together_as_their_settings_say(name: str) -> None:
    """Those of ResNet-50: below, host by host."""
    put_together(name)


# host: where queries start, where their content comes from without PaQ, denoising
HOSTS = {
    "deformable_detr": (ProposalStart, None, None),
    "deformable_detr_one_stage": (LearnedPoints, StaticQueries, None),
    "deformable_detr_refine": (LearnedPoints, StaticQueries, None),
    "deformable_detr_static": (ProposalStart, StaticQueries, None),
    "deformable_detr_plus": (ProposalStart, StaticQueries, None),
    "hybrid_deformable_detr": (ProposalStart, StaticQueries, None),
    "dab_deformable_detr": (LearnedAnchors, StaticQueries, None),
    "dn_detr": (LearnedAnchors, StaticQueries, PlainDenoising),
    "dino": (ProposalStart, StaticQueries, ContrastiveDenoising),
    "dino_5scale": (ProposalStart, StaticQueries, ContrastiveDenoising),
    "co_dino": (ProposalStart, StaticQueries, ContrastiveDenoising),
    "ddq_detr": (ProposalStart, FeatureQueries, ContrastiveDenoising),
    "relation_detr": (ProposalStart, StaticQueries, ContrastiveDenoising),
}
DINOS = ("dino", "dino_5scale", "co_dino", "ddq_detr", "relation_detr")  # what these have in common with DINO


@pytest.mark.parametrize("paq", ["", "paq_"])
@pytest.mark.parametrize("host", HOSTS)
def test_what_makes_a_host(host: str, paq: str) -> None:
    model = put_together(f"{paq}{host}_r50")
    start, source, denoising = HOSTS[host]
    assert type(model.start) is start
    assert type(model.query_source) is (PatternQueries if paq else source or type(None))
    assert type(model.denoising) is (denoising or type(None))
    dn = host == "dn_detr"
    if isinstance(model.query_source, (PatternQueries, StaticQueries)):
        table = model.query_source.patterns if paq else model.query_source.table
        assert table.shape == (64 if paq else model.config.num_queries, 255 if dn else 256)
    if denoising:
        assert model.denoising.label_embed.weight.shape == (7, 255 if dn else 256)
    assert model.config.num_queries == (900 if host in DINOS else 300)
    assert isinstance(model.decoder.norm, torch.nn.LayerNorm) is (host in DINOS)
    assert (model.decoder.position_scale is not None) is (host in ("dn_detr", "dab_deformable_detr", "relation_detr"))
    assert (model.decoder.position_head is None) is ("deformable_detr" in host and "dab" not in host)
    hybrid = {"hybrid_deformable_detr": 1500, "ddq_detr": 1350, "relation_detr": 1500}.get(host, 0)
    assert model.config.num_hybrid == hybrid
    assert (model.decoder.relation is not None) is (model.encoder.fusion is not None) is (host == "relation_detr")
    assert (model.config.distinct_queries is not None) is (model.hybrid_heads is not None) is (host == "ddq_detr")
    assert (model.hybrid_source is not None) is (hybrid > 0 and f"{paq}{host}" != "ddq_detr")
    assert (model.auxiliary is not None) is host.startswith("co_")
    if isinstance(model.start, ProposalStart):
        assert model.start.head.class_head.out_features == (7 if host in DINOS else 1)


def test_paq_is_a_few_settings_away_from_its_baseline() -> None:
    for name in list_models("paq_*"):
        ours, host = (yaml.safe_load(load_config(n).to_yaml()) for n in (name, name.removeprefix("paq_")))
        different = {f"model.{key}" for key in ours["model"] if ours["model"][key] != host["model"][key]}
        different |= {f"loss.{key}" for key in ours["loss"] if ours["loss"][key] != host["loss"][key]}
        different |= {key for key in ours if key not in ("model", "loss", "name") and ours[key] != host[key]}
        assert {"model.queries", "loss.assigner"} <= different, name
        nano = {"model.pattern_std", "loss.one_to_many_until"} if name.endswith("_nano") else set()
        paq = {"model.queries", "loss.assigner", "loss.classification", "loss.varifocal_alpha"}
        assert different <= paq | nano, name


def test_overrides(tiny_model: Callable) -> None:
    model = create_model(
        "paq_dino_nano", num_classes=3, num_queries=12, num_patterns=5, backbone="resnet18", image_size=96
    )
    assert model.classes == ClassTable.numbered(3)
    assert model.preprocessing.image_size == 96
    assert model.preprocessing.normalization.mean[0] == pytest.approx(123.675)
    assert model.backbone.channels == (128, 256, 512)
    with torch.no_grad():
        output = model.eval()(torch.randn(1, 3, 64, 64))
    assert output.pred_logits.shape == (1, 12, 3) and output.mixture.weights is not None
    assert output.mixture.weights.shape == (1, 12, 5)
    assert create_model("paq_dino_nano", preset="paper").config.extractor_conv == "full"
    assert tiny_model(**{"model.content_std": 0.0}).query_source.table.abs().max() == 0


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_other_backbones(name: str, make_targets: Callable) -> None:
    model = create_model("dino_nano", backbone=name, num_classes=5, num_queries=10).train()
    output = model(torch.randn(1, 3, 96, 64), None, make_targets(1))
    (output.layers.boxes.sum() + output.layers.logits.sum() + output.proposals.boxes.sum()).backward()
    for lateral in model.neck.lateral:
        assert lateral[0].weight.grad.abs().max() > 0  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "overrides", "message", "remedy"),
    [
        ("paq_dino_nao", {}, "unknown model or recipe 'paq_dino_nao'", "'paq_dino_nano'"),
        ("dino_nano", {"num_querys": 3}, "unknown setting 'model.num_querys'", "'model.num_queries'"),
        ("dino_nano", {"num_queries": 0}, "model.num_queries=0", "config show"),
        ("dino_nano", {"backbone": "resnet19"}, "no model 'resnet19'", "timm"),
    ],
)
def test_mistakes(name: str, overrides: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        create_model(name, **overrides)
    assert message in caught.value.message and remedy in caught.value.remedy


def test_class_table_has_to_fit() -> None:
    with pytest.raises(ConfigError, match=r"num_classes=80, but there are 2 classes"):
        build_model(load_config("dino_nano"), classes=ClassTable.numbered(2))


def test_pretrained_weights_come_with_the_flag() -> None:
    first, second = (create_model("dino_nano", pretrained_backbone=True).backbone for _ in range(2))
    other = create_model("dino_nano").backbone
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.body.conv_stem.weight, other.body.conv_stem.weight)  # type: ignore[union-attr, arg-type]


@pytest.fixture(params=["dino_nano", "paq_dino_nano"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Detector, Path]:
    """A model whose ids are neither contiguous nor in order."""
    classes = ClassTable((90, 3, 17), ("cat", "dog", "häuschen"))
    small = {"model.backbone": "test_resnet", "model.dim": 32, "model.ffn_dim": 64, "model.decoder_layers": 2}
    settings = {"model.num_classes": 3, "model.num_queries": 9, "image_size": [64, 128], **small}
    config = load_config(request.param, settings)
    model = build_model(config, classes=classes).eval()
    path = tmp_path / "best.safetensors"
    model.save(path, metrics={"AP": 0.25}, step=7)
    return model, path


@pytest.mark.parametrize("saved", list_models("*_nano"), indirect=True)
def test_saved_and_loaded_bit_for_bit(saved: tuple[Detector, Path]) -> None:
    model, path = saved
    found = load(path)
    assert not found.training
    assert found.name == model.name and found.config == model.config
    assert found.classes == model.classes  # position is the class index: the order stays
    assert found.preprocessing == model.preprocessing
    own, other = model.state_dict(), found.state_dict()
    assert list(own) == list(other)
    for key, tensor in own.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key
    with torch.no_grad():
        image = torch.randn(1, 3, 64, 64)
        assert torch.equal(model(image).pred_boxes, found(image).pred_boxes)
        assert torch.equal(model(image).pred_logits, found(image).pred_logits)


def test_saved_twice_gives_the_same_file(saved: tuple[Detector, Path], tmp_path: Path) -> None:
    _, path = saved
    again = tmp_path / "again.safetensors"
    load(path).save(again, metrics={"AP": 0.25}, step=7)
    assert again.read_bytes() == path.read_bytes()


def test_the_header_needs_nothing_but_json(saved: tuple[Detector, Path]) -> None:
    model, path = saved
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(json.loads(file.read(length))["__metadata__"]["paqdetr"])
    assert header["name"] == model.name
    assert header["classes"] == [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 17, "name": "häuschen"}]
    assert ModelConfig.model_validate(header["model"]) == model.config
    assert header["preprocessing"]["image_size"] == [64, 128]
    assert header["metrics"] == {"AP": 0.25} and header["step"] == 7
    assert header["version"] == paqdetr.__version__


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors, header = read_checkpoint(path)
    header.pop("version")
    change(header)
    write_checkpoint(path, tensors, header)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(classes=h["classes"][:2]), "num_classes=3, but there are 2 classes"),
        (lambda h: h["model"].update(backbone="resnet19"), "no model 'resnet19'"),
    ],
)
@pytest.mark.parametrize("saved", ["dino_nano"], indirect=True)
def test_headers_of_other_makes(
    saved: tuple[Detector, Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(saved[1], change)
    with pytest.raises(CheckpointError) as caught:
        load(saved[1])
    assert caught.value.message.startswith(str(saved[1])) and message in caught.value.message


@pytest.mark.parametrize("saved", ["dino_nano"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 64}, "another shape for"),
        ({"queries": "patterns"}, "lacks query_source.patterns"),
        ({"denoising": "none"}, "has unknown denoising.label_embed.weight"),
        ({"backbone": "tf_efficientnet_lite0"}, "lacks backbone.body.conv_stem.weight"),
    ],
)
def test_weights_of_another_model(saved: tuple[Detector, Path], change: dict[str, Any], message: str) -> None:
    rewrite(saved[1], lambda header: header["model"].update(change))
    with pytest.raises(CheckpointError) as caught:
        load(saved[1])
    assert "it is of another model" in caught.value.message and message in caught.value.message


def test_what_a_folder_means(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder has no checkpoint"):
        load(tmp_path)
    (tmp_path / "last.safetensors").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "last.safetensors"
    (tmp_path / "best.safetensors").touch()
    assert find_checkpoint(str(tmp_path)) == tmp_path / "best.safetensors"
    assert find_checkpoint(tmp_path / "last.safetensors") == tmp_path / "last.safetensors"


@pytest.mark.parametrize("classes", ["cat", True, 0, [], ["cat", "Cat"]])
def test_what_is_no_table_of_classes(classes: Any) -> None:
    with pytest.raises(ConfigError, match="classes"):
        as_class_table(classes)


def test_what_is_a_table_of_classes() -> None:
    assert as_class_table(np.int64(2)) == as_class_table(2) == ClassTable((0, 1), ("class 0", "class 1"))
    assert as_class_table(["cat", "dog"]) == ClassTable((0, 1), ("cat", "dog"))


@pytest.mark.parametrize("word", ["init", "pretrained"])
def test_weights_are_not_promised_that_are_not_loaded(word: str) -> None:
    with pytest.raises(ConfigError, match=f"create_model: {word}='run': its models have random weights") as caught:
        create_model("dino_nano", **{word: "run"})
    assert "paqdetr.load(path)" in caught.value.remedy
