"""Options to compare PaQ with: distinct proposals and residual mixtures, in whole models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paqdetr.config import load_config
from paqdetr.errors import ConfigError
from paqdetr.losses import build_criterion
from paqdetr.models import Detector, create_model, resize_queries
from paqdetr.models.files import load, start_from
from paqdetr.models.queries import QuerySource, ResidualMixtures, StaticQueries
from paqdetr.paq import PatternQueries, StaticMixtures

SMALL: dict[str, Any] = dict(
    num_classes=5, backbone="test_resnet", dim=32, num_heads=4, ffn_dim=64, encoder_layers=1, num_queries=20
)
# name, model settings, loss settings
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("paq_dino_nano", {"mixture": "residual", "distinct_proposals": 0.8}, {"loss.one_to_many_until": 0.5}),
    ("paq_deformable_detr_nano", {"distinct_proposals": 0.5}, {"loss.encoder_assigner": "fixed_k"}),
    ("paq_deformable_detr_one_stage_nano", {"share_heads": True}, {}),
    ("paq_dn_detr_nano", {"mixture": "residual", "gain": 0.0}, {}),
    ("dino_nano", {"queries": "static_mixture", "mixture": "residual"}, {}),
    ("dino_nano", {"queries": "static_mixture"}, {"loss.assigner": "simota"}),
    ("dino_nano", {"queries": "static"}, {"loss.assigner": "fixed_k", "loss.top_k": 3}),
    (
        "dino_nano",
        {"queries": "patterns"},
        {"loss.assigner": "simota", "loss.select": "score", "loss.classification": "varifocal"},
    ),
    ("paq_dino_nano", {"mixture_input": "query"}, {"loss.encoder_assigner": "fixed_k"}),
    ("paq_dino_nano", {"queries": "features"}, {}),
    ("paq_deformable_detr_nano", {"mixture_input": "both", "mixture": "residual"}, {}),
    ("paq_deformable_detr_one_stage_nano", {"mixture_input": "query", "mixture": "residual"}, {}),
    ("paq_dn_detr_nano", {"mixture_input": "both"}, {}),
    ("paq_dn_detr_nano", {"queries": "features", "mixture": "residual"}, {}),
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
    for counts, progress in itertools.product(((3, 0), (0, 0)), (0.0, 0.9)):
        model.zero_grad()
        targets = make_targets(*counts)
        output = model(torch.randn(2, 3, 96, 96), None, targets)
        report = criterion(output, targets, aux_losses=model.aux_losses(), progress=progress)
        assert report.total.isfinite()
        report.total.backward()
        assert [key for key, p in trained.items() if p.grad is None] == []
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        *middle, last = report.positives_per_box
        if any(counts):
            assert last == 1 and all(1 <= positives <= 5 for positives in middle)
            assert loss.get("loss.assigner") != "fixed_k" or middle == [3.0] * len(middle)


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings", "loss"), CASES, ids=IDS)
def test_padded_cells_change_nothing(
    name: str, settings: dict[str, Any], loss: dict[str, Any], make_tokens: Callable, stir: Callable
) -> None:
    model = stirred(create_model(name, **SMALL | settings), stir).eval()
    levels = [torch.randn(2, 32, h, w) for h, w in [(7, 5), (4, 3), (2, 2)]]
    expected = model.detect(make_tokens(levels))
    assert (expected.mixture.weights is None) == (settings.get("queries") in ("static", "features"))
    if model.config.queries in ("patterns", "features"):  # every query's content comes from its image
        assert (expected.mixture.content[0] - expected.mixture.content[1]).abs().amax(-1).min() > 2e-5
    for padding in (1, 6):
        found = model.detect(make_tokens(levels, padding))
        assert (found.pred_boxes - expected.pred_boxes).abs().max() < 1e-4
        assert (found.pred_logits - expected.pred_logits).abs().max() < 1e-4
        assert (found.mixture.content - expected.mixture.content).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["dino_nano", "paq_dino_nano"])
def test_options_that_are_off_draw_no_random_number(name: str) -> None:
    torch.manual_seed(0)
    plain = create_model(name, **SMALL, distinct_proposals=None, distinct_queries=None).state_dict()
    torch.manual_seed(0)
    distinct = create_model(name, **SMALL, distinct_proposals=0.8, distinct_queries=0.8).state_dict()
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
        ("paq_dino_nano", {"mixture": "residual"}),
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


def test_a_training_may_start_from_other_proposals(tmp_path: Path) -> None:
    create_model("paq_dino_nano", **SMALL).save(tmp_path / "plain.safetensors")
    other = create_model("paq_dino_nano", **SMALL, distinct_proposals=None)
    start_from(other, tmp_path / "plain.safetensors")
    plain = load(tmp_path / "plain.safetensors").state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in other.state_dict().items())


def test_options_are_off_in_the_paper() -> None:
    for name in ("paq_dino_nano", "paq_dino_r50", "paq_deformable_detr_r50", "paq_dn_detr_r50"):
        model, host = load_config(name, {"preset": "paper"}).model, load_config(name.removeprefix("paq_")).model
        assert (model.mixture, model.normalize_summary) == ("replace", False)
        assert (model.distinct_proposals, model.distinct_queries) == (host.distinct_proposals, host.distinct_queries)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dino_nano", {"model.mixture": "residual"}, "mixture=residual needs queries=patterns"),
        ("dn_detr_nano", {"model.distinct_proposals": 0.8}, "distinct_proposals=0.8 needs positions=proposals"),
    ],
)
def test_options_need_their_host(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(name, overrides)
