"""Options that exist to be compared with: further heads, distinct proposals, residual mixtures, in whole models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paqdetr.config import load_config
from paqdetr.errors import CheckpointError
from paqdetr.losses import build_criterion
from paqdetr.models import Detector, create_model, load, reshape_classes, resize_queries, save
from paqdetr.models.files import start_from
from paqdetr.models.many_heads import OneToManyHeads
from paqdetr.models.queries import QuerySource, ResidualMixtures, StaticQueries
from paqdetr.paq import PatternQueries, StaticMixtures

SMALL: dict[str, Any] = dict(
    num_classes=5, backbone="resnet18", dim=32, num_heads=4, ffn_dim=64, encoder_layers=1, num_queries=20
)
LOSS: dict[str, Any] = {
    "loss.one_to_many_until": 0.5,
    "loss.positives_schedule": "linear",
    "loss.rank_damping": 1.5,
    "loss.normalizer": "positives",
}
HEADS = {"one_to_many_heads": "all"}
# name, model settings, loss settings
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("paq_dino_nano", HEADS, {}),
    ("paq_dino_nano", {"one_to_many_heads": "intermediate", "distinct_proposals": 0.8}, LOSS),
    ("paq_dino_nano", {"mixture": "residual"}, {"loss.one_to_one_weight": 1.0, **LOSS}),
    (
        "paq_deformable_detr_nano",
        {"distinct_proposals": 0.5, **HEADS},
        {"loss.encoder_assigner": "fixed_k"} | LOSS,
    ),
    ("paq_deformable_detr_one_stage_nano", {"share_heads": True, **HEADS}, {}),
    ("paq_dn_detr_nano", {"mixture": "residual", "gain": 0.0, **HEADS}, LOSS),
    ("dino_nano", {"queries": "static_mixture", "mixture": "residual"}, {}),
]
IDS = [f"{name}-{'-'.join(map(str, model))}" for name, model, _ in CASES]


def stirred(model: Detector, stir: Callable[[nn.Module], None]) -> Detector:
    for part in model.children():
        if part is not model.backbone:
            stir(part)
    return model


@pytest.mark.parametrize(("name", "settings", "loss"), CASES, ids=IDS)
def test_every_parameter_has_a_gradient_in_every_step(
    name: str, settings: dict[str, Any], loss: dict[str, Any], make_targets: Callable
) -> None:
    criterion = build_criterion(load_config(name, loss).loss)
    model = create_model(name, **SMALL | settings).train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for counts, progress in itertools.product(((3, 1), (0, 0)), (0.0, 0.9)):
        model.zero_grad()
        targets = make_targets(*counts)
        output = model(torch.randn(2, 3, 96, 96), None, targets)
        report = criterion(output, targets, aux_losses=model.aux_losses(), progress=progress)
        assert report.total.isfinite()
        report.total.backward()
        assert [key for key, p in trained.items() if p.grad is None] == []
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        several = criterion.one_to_many(progress)
        for key, p in trained.items():
            if ".many_heads.class" in key or (".many_heads.box" in key and key.endswith("4.bias")):
                assert p.grad is not None
                assert bool(p.grad.any()) == (several and ("class" in key or sum(counts) > 0)), key


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings", "loss"), CASES, ids=IDS)
def test_padded_cells_change_nothing(
    name: str,
    settings: dict[str, Any],
    loss: dict[str, Any],
    make_tokens: Callable,
    stir: Callable,
) -> None:
    model = stirred(create_model(name, **SMALL | settings), stir).eval()
    levels = [torch.randn(2, 32, h, w) for h, w in [(7, 5), (4, 3), (2, 2)]]
    expected = model.detect(make_tokens(levels))
    for padding in (1, 6):
        found = model.detect(make_tokens(levels, padding))
        assert (found.pred_boxes - expected.pred_boxes).abs().max() < 1e-4
        assert (found.pred_logits - expected.pred_logits).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["paq_dino_nano", "paq_deformable_detr_nano"])
def test_further_heads_are_not_there_in_use(name: str, tmp_path: Path, stir: Callable) -> None:
    model = stirred(create_model(name, **SMALL, **HEADS), stir).eval()
    assert isinstance(model.decoder.many_heads, OneToManyHeads)
    image = torch.randn(1, 3, 96, 96)
    expected = model(image)
    assert expected.layers.many is None
    for parameter in model.decoder.many_heads.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(model(image).pred_boxes, expected.pred_boxes)
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors")(image).pred_logits, expected.pred_logits)


@pytest.mark.parametrize("which", ["intermediate", "all"])
@pytest.mark.parametrize("share", [False, True])
def test_further_heads_read_what_the_layers_own_read(
    which: str, share: bool, make_targets: Callable, stir: Callable
) -> None:
    model = create_model("paq_dino_nano", **SMALL, one_to_many_heads=which, share_heads=share).train()
    stirred(model, stir)
    heads, decoder = model.decoder.many_heads, model.decoder
    assert heads is not None and heads.num_layers == (2 if which == "intermediate" else 3)
    assert len(heads.class_heads) == (1 if share else heads.num_layers)
    for own, other in ((decoder.class_heads, heads.class_heads), (decoder.box_heads, heads.box_heads)):
        for a, b in zip(own, other, strict=False):
            b.load_state_dict(a.state_dict())
    output = model(torch.randn(2, 3, 96, 96), None, make_targets(2, 1))
    many = output.layers.many
    assert many is not None and many.logits.shape == (heads.num_layers, 2, 20, 5)
    assert torch.equal(many.logits, output.layers.logits[: heads.num_layers])
    assert torch.equal(many.boxes, output.layers.boxes[: heads.num_layers])


def test_further_heads_start_like_the_decoders_own() -> None:
    for name, box in (("paq_dino_nano", 0.0), ("paq_deformable_detr_one_stage_nano", -2.0)):
        heads = create_model(name, **SMALL, **HEADS).decoder.many_heads
        assert heads is not None
        for class_head, box_head in zip(heads.class_heads, heads.box_heads, strict=True):
            assert class_head.bias.tolist() == pytest.approx([-4.5951] * 5, abs=1e-4)
            assert not box_head[-1].weight.any()
        assert heads.box_heads[0][-1].bias.tolist() == [0, 0, box, box]
        assert len(heads.box_heads) == 1 or not heads.box_heads[1][-1].bias.any()


@pytest.mark.parametrize("name", ["dino_nano", "paq_dino_nano"])
def test_options_that_are_off_draw_no_random_number(name: str) -> None:
    torch.manual_seed(0)
    plain = create_model(name, **SMALL).state_dict()
    torch.manual_seed(0)
    distinct = create_model(name, **SMALL, distinct_proposals=0.8).state_dict()
    assert list(plain) == list(distinct)
    assert all(torch.equal(plain[key], distinct[key]) for key in plain)


# --- residual mixtures


@pytest.fixture(params=[PatternQueries, StaticMixtures])
def residual(request: pytest.FixtureRequest) -> ResidualMixtures:
    levels = {"num_levels": 1} if request.param is PatternQueries else {}
    mixtures = request.param(num_queries=4, num_patterns=3, dim=8, **levels)
    return ResidualMixtures(static=StaticQueries(num_queries=4, dim=8), mixtures=mixtures)


def test_mixtures_are_added_through_a_gate(residual: ResidualMixtures) -> None:
    assert isinstance(residual, QuerySource)
    tokens, shapes = torch.randn(3, 10, 8), [(2, 5)]
    start = residual(tokens, shapes)
    assert torch.equal(start.content, residual.table.expand(3, -1, -1))
    assert start.weights is not None and start.weights.shape == (3, 4, 3)
    with torch.no_grad():
        residual.gate.copy_(torch.arange(8.0))
    mixture = residual.mixtures(tokens, shapes).content
    expected = residual.table + torch.arange(8.0) * mixture
    torch.testing.assert_close(residual(tokens, shapes).content, expected)
    assert residual.patterns is residual.mixtures.patterns
    assert residual.aux_losses()["diversity"] == residual.mixtures.aux_losses()["diversity"]


def test_the_gate_opens_although_it_is_shut(residual: ResidualMixtures) -> None:
    (residual(torch.randn(1, 10, 8), [(2, 5)]).content * torch.randn(4, 8)).sum().backward()
    assert residual.gate.grad is not None and residual.gate.grad.any()
    for parameter in residual.parameters():
        assert parameter.grad is not None


def test_a_trained_host_begins_as_it_was(tmp_path: Path, stir: Callable) -> None:
    host = stirred(create_model("dino_nano", **SMALL), stir).eval()
    grown = create_model("paq_dino_nano", **SMALL, mixture="residual").eval()
    tensors = host.state_dict()
    own = {key: tensors.get(key, value) for key, value in grown.state_dict().items()}
    assert {key for key in own if key not in tensors} == {
        key for key in own if key.startswith(("query_source.gate", "query_source.mixtures."))
    }
    grown.load_state_dict(own)
    with torch.no_grad():
        image = torch.randn(2, 3, 96, 96)
        assert torch.equal(host(image).pred_boxes, grown(image).pred_boxes)
        assert torch.equal(host(image).pred_logits, grown(image).pred_logits)


def test_gain_zero_starts_with_mixtures_that_no_image_changes() -> None:
    tokens, shapes = torch.randn(3, 10, 8), [(2, 5)]
    for head in ("dense", "factorised"):
        queries = PatternQueries(4, 3, 8, 1, head=head, gain=0.0)
        weights = queries(tokens, shapes).weights
        assert weights is not None and torch.equal(weights[0], weights[1])
        assert not torch.allclose(weights[0, 0], weights[0, 1])
        queries(tokens, shapes).content.square().sum().backward()
        last = queries.head.linear if head == "dense" else queries.head.factors
        assert last.weight.grad is not None and last.weight.grad.any()


# --- other classes, other numbers of queries, other files


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("paq_dino_nano", {"mixture": "residual", **HEADS}),
        ("paq_dn_detr_nano", {"mixture": "residual", "head": "factorised"}),
        ("dino_nano", {"queries": "static_mixture"}),
        ("dino_nano", {"queries": "static_mixture", "mixture": "residual"}),
    ],
)
def test_rows_of_classes_and_queries(name: str, settings: dict[str, Any], stir: Callable) -> None:
    model = stirred(create_model(name, **SMALL | settings), stir).eval()
    fewer, _ = resize_queries(model, 10)
    rows = torch.arange(10) if model.config.positions == "proposals" else torch.arange(10) * 2
    with torch.no_grad():
        features = model.extract(torch.randn(1, 3, 96, 96))
        found, expected = (m.detect(features).mixture for m in (fewer, model))
    torch.testing.assert_close(found.content, expected.content[:, rows])
    assert found.weights is not None and found.weights.shape[1] == 10
    more, report = resize_queries(model, 25)
    assert more.detect(features).pred_boxes.shape == (1, 25, 4) and report.interpolated_queries == 5
    if model.decoder.many_heads is not None:
        names = model.classes.names
        other, _ = reshape_classes(model, [names[4], "new", names[1]])
        assert other.decoder.many_heads is not None
        heads = model.decoder.many_heads.class_heads
        for old, new in zip(heads, other.decoder.many_heads.class_heads, strict=True):
            assert new.weight.shape == (3, 32)
            assert torch.equal(new.weight[0], old.weight[4]) and torch.equal(new.bias[2], old.bias[1])


def test_a_training_may_start_from_other_proposals_but_not_from_other_heads(tmp_path: Path) -> None:
    save(create_model("paq_dino_nano", **SMALL), tmp_path / "plain.safetensors")
    start_from(create_model("paq_dino_nano", **SMALL, distinct_proposals=0.8), tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError) as caught:
        start_from(create_model("paq_dino_nano", **SMALL, **HEADS), tmp_path / "plain.safetensors")
    assert caught.value.remedy == "add model.one_to_many_heads=none"
