from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paqdetr.errors import ConfigError
from paqdetr.models import Detector, create_model, list_models, reshape_classes, resize_queries
from paqdetr.models.files import reshape
from paqdetr.paq.patterns import resized_rows
from paqdetr.structures import ClassTable

HOSTS = [name for name in list_models("*_nano") if not name.startswith("paq_")]
NANO = [*HOSTS, "paq_dino_nano", "paq_dn_detr_nano", "paq_deformable_detr_nano"]
SMALL = {
    "backbone": "test_resnet",
    "dim": 32,
    "ffn_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 6,
    "encoder_query_levels": None,
}
OLD = ClassTable((3, 5, 8), ("cat", "Dog", "bird"))


def make(name: str, **options: object) -> Detector:
    model = create_model(name, num_classes=3, pretrained_backbone=False, **SMALL | options)
    model.classes = OLD
    with torch.no_grad():
        for parameter in model.parameters():  # no two rows alike
            parameter.normal_(std=0.3)
    return model.eval()


def class_rows(model: Detector) -> list[str]:
    """Tensors with a row a class, by the host's own structure."""
    keys = [key for key in model.state_dict() if key.startswith("decoder.class_heads.")]
    if model.denoising is not None:
        keys.append("denoising.label_embed.weight")
    if "start.head.class_head.weight" in model.state_dict() and not model.config.class_agnostic_proposals:
        keys += ["start.head.class_head.weight", "start.head.class_head.bias"]
    keys += [key for key in model.state_dict() if key.startswith(("hybrid_heads.class", "start.head.hybrid_class"))]
    heads = ("faster_rcnn.class_head", "faster_rcnn.box_head", "atss.class_head") if model.auxiliary is not None else ()
    return keys + [f"auxiliary.heads.{head}.{leaf}" for head in heads for leaf in ("weight", "bias")]


@pytest.mark.parametrize("name", NANO)
def test_class_rows_go_over_by_name_whatever_their_case(name: str) -> None:
    model = make(name)
    changed, report = reshape_classes(model, ClassTable((0, 1, 2, 3), ("dog", "fish", "BIRD", "cow")))
    old, new = model.state_dict(), changed.state_dict()
    rows = class_rows(model)
    assert len(rows) >= 2
    for key in rows:
        after, before = new[key].unflatten(0, (4, -1)), old[key].unflatten(0, (3, -1))  # boxes have four rows a class
        assert torch.equal(after[0], before[1]) and torch.equal(after[2], before[2])
        assert not torch.isin(after[1], before).all()
    assert all(torch.equal(new[key], old[key]) for key in old if key not in rows)
    assert set(report.changed) == set(rows)
    assert report.known_classes == ("dog", "BIRD")
    assert report.new_classes == ("fish", "cow")
    assert report.dropped_classes == ("cat",)
    assert str(report) == "2 of 4 classes known by name; new: fish, cow; dropped: cat"
    assert changed.classes.names == ("dog", "fish", "BIRD", "cow")
    assert changed.config.num_classes == 4 and model.config.num_classes == 3
    assert not changed.training


@pytest.mark.parametrize("name", ["deformable_detr_one_stage_nano", "dn_detr_nano", "deformable_detr_nano"])
def test_scores_of_known_classes_stay(name: str) -> None:
    # Where proposals are ranked by their likeliest class, other classes choose others: not in these hosts.
    model = make(name)
    changed, _ = reshape_classes(model, ["bird", "new", "cat"])
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before, after = model(images), changed(images)
    assert torch.equal(after.pred_logits[..., [0, 2]], before.pred_logits[..., [2, 0]])
    assert torch.equal(after.pred_boxes, before.pred_boxes)


def test_new_classes_start_as_rare_as_in_a_new_model() -> None:
    changed, _ = reshape_classes(make("dino_nano"), ["cat", "new"])
    bias = changed.state_dict()["decoder.class_heads.0.bias"][1]
    assert bias.sigmoid().item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "count"),
    [(name, count) for name in NANO for count in (4, 9)]
    + [(name, count) for name in ("dino_nano", "dn_detr_nano") for count in (1, 6, 20)],
)
def test_query_rows_of_every_host(name: str, count: int) -> None:
    model = make(name)
    changed, report = resize_queries(model, count)
    old, new = model.state_dict(), changed.state_dict()
    assert changed.config.num_queries == count
    ranked = model.config.positions == "proposals"
    kept = list(range(min(count, 6))) if ranked or count >= 6 else [i * 6 // count for i in range(count)]
    per_query = {
        key: model.config.num_patterns if key.startswith("query_source.head.linear") else 1
        for key in old
        if key in ("query_source.table", "start.boxes", "start.position") or key.startswith("query_source.head.linear")
    }
    assert per_query or model.config.queries in ("proposals", "tokens")
    hybrid = "hybrid_source.table"
    if hybrid in old and model.config.hybrid_ratio:  # their number follows that of the queries
        both = min(len(old[hybrid]), len(new[hybrid]))
        assert len(new[hybrid]) == changed.config.num_hybrid and torch.equal(new[hybrid][:both], old[hybrid][:both])
        old.pop(hybrid)
    for key, rows in per_query.items():
        before, after = old[key].unflatten(0, (6, rows)), new[key].unflatten(0, (count, rows))
        assert torch.equal(after[: len(kept)], before[kept]), key
        for row in after[6:]:  # between two neighbours, and never on one of them
            between = [
                torch.equal(torch.lerp(a, b, share), row)
                for a, b in pairwise(before)
                for share in torch.tensor([i / n for n in range(2, 6) for i in range(1, n)])
            ]
            assert any(between), key
    assert all(torch.equal(new[key], old[key]) for key in old if key not in per_query)
    assert report.queries == (6, count)
    assert report.interpolated_queries == max(count - 6, 0)
    with torch.no_grad():
        assert changed(torch.randn(1, 3, 64, 96)).pred_boxes.shape == (1, count, 4)


def test_kept_pattern_queries_mix_the_same_patterns() -> None:
    model = make("paq_dino_nano", head="factorised", head_rank=3)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(images).mixture.weights
        fewer, more = (resize_queries(model, n)[0](images).mixture.weights for n in (4, 9))
    assert before is not None and fewer is not None and more is not None
    torch.testing.assert_close(fewer, before[:, :4])
    torch.testing.assert_close(more[:, :6], before)


def test_one_query_grows_to_copies_of_itself() -> None:
    model = make("dn_detr_nano", num_queries=1)
    changed, _ = resize_queries(model, 3)
    assert torch.equal(changed.state_dict()["start.boxes"], model.state_dict()["start.boxes"].expand(3, -1))


@given(old=st.integers(2, 40), new=st.integers(1, 150), ranked=st.booleans())
def test_places_of_queries(old: int, new: int, ranked: bool) -> None:
    rows = resized_rows(old, new, ranked=ranked)
    low, high, share = rows.low, rows.high, rows.share
    places = low + share * (high - low)
    assert len(places) == new == len(set(places.tolist()))  # no two queries alike
    assert 0 <= places.min() and places.max() <= old - 1
    if new >= old:
        assert places[:old].tolist() == list(range(old))
        assert ((share[old:] > 0) & (share[old:] < 1)).all()
        gaps = torch.bincount(low[old:], minlength=old - 1)
        assert gaps.max() - gaps.min() <= 1  # shared out evenly
    else:
        steps = places.diff()
        assert (steps > 0).all()
        assert not ranked or places.tolist() == list(range(new))


def test_both_at_once() -> None:
    changed, report = reshape(make("dn_detr_nano"), classes=2, num_queries=3)
    assert changed.classes == ClassTable.numbered(2)
    assert str(report) == (
        "0 of 2 classes known by name; new: class 0, class 1; dropped: cat, Dog, bird; queries 6 -> 3"
    )


def test_the_model_keeps_its_preprocessing_mode_and_type() -> None:
    model = make("dino_nano").double().train()
    changed, _ = reshape_classes(model, ["cat"])
    assert changed.preprocessing == model.preprocessing
    assert changed.training
    assert changed.decoder.class_heads[0].weight.dtype == torch.float64


@pytest.mark.parametrize("classes", [0, [], ["cat", "Cat"]])
def test_impossible_classes_are_refused(classes: int | list[str]) -> None:
    with pytest.raises(ConfigError, match="classes"):
        reshape_classes(make("dino_nano"), classes)


def test_no_queries_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_queries=0: expected at least 1"):
        resize_queries(make("dino_nano"), 0)
