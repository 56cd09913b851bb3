"""What is recorded is what the detector did, in every host, and the detector does not notice."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from paqdetr.analysis.inside import look_inside, positives
from paqdetr.analysis.subject import ModelUnderTest
from paqdetr.config import LossConfig, load_config
from paqdetr.losses.criterion import build_criterion
from paqdetr.models import Detector
from paqdetr.preprocessing import pad_images
from paqdetr.structures import Targets

Build = Callable[..., Detector]
ONE_STAGE = ["deformable_detr_one_stage_r50", "dab_deformable_detr_r50", "paq_dn_detr_r50"]
TWO_STAGE = ["deformable_detr_r50", "paq_deformable_detr_plus_r50", "dino_r50", "paq_dino_r50"]


def forward(model: Detector, picture: Image.Image) -> Any:
    images, mask = pad_images([model.preprocessing(picture)])
    with torch.inference_mode():
        return model(images, mask)


@pytest.mark.parametrize("name", [*ONE_STAGE, *TWO_STAGE, "hybrid_deformable_detr_r50"])
def test_every_host_shows_what_it_has_and_does_not_notice(name: str, tiny_model: Build, picture: Image.Image) -> None:
    model = tiny_model(name).train()
    inside = look_inside(model, picture)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    output = forward(model.eval(), picture)
    assert torch.equal(torch.from_numpy(inside.logits[-1]), output.pred_logits[0])
    assert torch.equal(torch.from_numpy(inside.boxes), output.layers.boxes[:, 0])

    points, levels = (3, 4, model.config.num_levels, model.config.num_points), model.config.num_levels
    assert len(inside.decoder) == 3 and len(inside.encoder) == 2 and len(inside.chosen) == 3
    for sampling in (*inside.decoder, *inside.encoder):
        assert sampling.locations.shape == (*points, 2) and sampling.weights.shape == points
        np.testing.assert_allclose(sampling.weights.sum((2, 3)), 1, atol=1e-5)
    assert 0 <= inside.encoder_level < levels
    assert inside.start.shape == (20, 2 if name == "deformable_detr_one_stage_r50" else 4)
    if name in ONE_STAGE:
        assert inside.proposals is None and inside.proposal_scores is None
    else:
        assert output.proposals is not None and inside.proposals is not None
        assert torch.equal(torch.from_numpy(inside.proposals), output.proposals.boxes[0])
        assert (np.diff(inside.proposal_scores) <= 0).all()  # best first


def test_the_picture_of_an_image_in_which_nothing_is_found(
    tiny_model: Build, picture: Image.Image, tmp_path: Path
) -> None:
    tiny_model("dino_r50").save(tmp_path / "model.safetensors")
    picture.save(tmp_path / "image.png")
    main = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "picture.py"))["main"]
    with pytest.raises(SystemExit, match=r"image\.png: the model finds nothing over 0\.5"):
        main(str(tmp_path / "model.safetensors"), str(tmp_path / "image.png"), str(tmp_path / "out.jpg"))
    assert not (tmp_path / "out.jpg").exists()


@pytest.mark.parametrize("divisor", [1, 32], ids=["padded", "whole"])
@pytest.mark.parametrize("name", ["deformable_detr_one_stage_r50", "dino_r50"])
def test_places_and_weights_are_those_computed_by_hand(
    name: str, divisor: int, tiny_model: Build, picture: Image.Image
) -> None:
    """With constant offsets o and logits w: around points p + o / (width, height), around boxes p + o size / (2 P)."""
    model = tiny_model(name, size_divisor=divisor)
    attention = model.decoder.layers[0].cross_attention
    offsets = torch.randn(4, 4, 4, 2)  # (H, L, P, 2)
    logits = torch.randn(4, 4, 4)
    with torch.no_grad():
        attention.sampling_offsets.weight.zero_()
        attention.attention_weights.weight.zero_()
        attention.sampling_offsets.bias.copy_(offsets.flatten())
        attention.attention_weights.bias.copy_(logits.flatten())
    inside = look_inside(model, picture, chosen=[7, 0, 19])
    assert inside.chosen.tolist() == [7, 0, 19]

    width, height = (96, 75) if divisor == 1 else (96, 64)
    start = inside.start[[7, 0, 19]][:, None, None, None]  # (3, 1, 1, 1, 2 or 4)
    if start.shape[-1] == 4:
        expected = start[..., :2] + offsets.numpy() * start[..., 2:] / 8
    else:  # cells that are image and not padding, of levels with stride 8 to 64
        cells = np.array([[-(-width // stride), -(-height // stride)] for stride in (8, 16, 32, 64)])
        expected = start + offsets.numpy() / cells[None, None, :, None]
    np.testing.assert_allclose(inside.decoder[0].locations, expected, atol=2e-6)
    by_hand = logits.flatten(1).softmax(-1).view(1, 4, 4, 4).expand(3, -1, -1, -1)
    np.testing.assert_allclose(inside.decoder[0].weights, by_hand, atol=1e-6)


def test_what_is_recorded_is_what_reached_the_kernel(
    tiny_model: Build, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paqdetr.models.encoder as module

    seen: list[tuple[Tensor, Tensor]] = []
    kernel = module.ms_deform_attn

    def spy(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        seen.append((locations[0], weights[0]))
        return kernel(value, shapes, locations, weights)

    monkeypatch.setattr(module, "ms_deform_attn", spy)
    model = tiny_model("paq_dino_r50", size_divisor=32)
    inside = look_inside(model, picture, chosen=[3, 11])
    encoder, decoder = seen[:2], seen[2:]
    for sampling, (locations, weights) in zip(inside.decoder, decoder, strict=True):
        np.testing.assert_allclose(sampling.locations, locations[[3, 11]], atol=1e-6)
        np.testing.assert_allclose(sampling.weights, weights[[3, 11]], atol=1e-6)
    # The token under a box's centre: 96 x 64 pixels are 12 x 8 cells of the finest level.
    x, y = (inside.boxes[-1, [3, 11], :2] * [12, 8]).T
    tokens = np.floor(y).astype(int) * 12 + np.floor(x).astype(int)
    assert inside.encoder_level == 0
    for sampling, (locations, weights) in zip(inside.encoder, encoder, strict=True):
        np.testing.assert_allclose(sampling.locations, locations[tokens], atol=1e-6)
        np.testing.assert_allclose(sampling.weights, weights[tokens], atol=1e-6)


def test_tokens_are_of_the_finest_level_that_the_encoder_updates(tiny_model: Build, picture: Image.Image) -> None:
    model = tiny_model("dino_r50", **{"model.encoder_query_levels": 2})
    inside = look_inside(model, picture)
    assert inside.encoder_level == 2 and len(inside.encoder) == 2


def test_chosen_queries_are_sure_and_apart(tiny_model: Build, picture: Image.Image) -> None:
    inside = look_inside(tiny_model("dino_r50"), picture, most=4)
    surest = inside.scores[-1].argmax()
    assert inside.chosen[0] == surest
    corners = [inside.boxes[-1, q] for q in inside.chosen]
    for i, a in enumerate(corners):
        for b in corners[:i]:
            low, high = (
                np.maximum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2),
                np.minimum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2),
            )
            common = np.prod(np.clip(high - low, 0, None))
            assert common / (a[2] * a[3] + b[2] * b[3] - common) <= 0.5 + 1e-6


# --------------------------------------------------------------------------------------------- positives


TARGETS = Targets(
    torch.tensor([1, 4, 0]),
    torch.tensor([[0.3, 0.4, 0.3, 0.4], [0.7, 0.6, 0.2, 0.2], [0.5, 0.5, 0.9, 0.8]]),
    image_id="a",
)


@pytest.mark.parametrize("name", ["paq_dino_r50", "dino_r50", "paq_deformable_detr_one_stage_r50"])
def test_positives_are_those_of_the_criterion(name: str, tiny_model: Build, picture: Image.Image) -> None:
    model = tiny_model(name)
    settings = load_config(name).loss.model_copy(update={"min_positives": 2})
    criterion = build_criterion(settings)
    inside = look_inside(model, picture)
    found = positives(inside, TARGETS, criterion)
    report = criterion(forward(model, picture), [TARGETS], aux_losses={}, progress=0.0)
    assert [layer.layer for layer in found] == [1, 2, 3]
    for layer, (pairs,) in zip(found, report.pairs, strict=True):
        assert layer.query.tolist() == pairs.query_indices.tolist()
        assert layer.target.tolist() == pairs.target_indices.tolist()
    many = settings.assigner == "quality_aware"
    assert [layer.score is not None for layer in found] == [many, many, False]
    assert (len(found[0].query) >= 6) == many and len(found[2].query) == 3
    delayed = build_criterion(settings.model_copy(update={"one_to_many_from": 0.3}))
    for layer, same in zip(positives(inside, TARGETS, delayed), found, strict=True):
        assert layer.query.tolist() == same.query.tolist()
    # Past the share of the training that has several positives per box, every layer has one.
    late = positives(
        inside, TARGETS, build_criterion(settings.model_copy(update={"one_to_many_until": 0.5})), progress=0.7
    )
    assert all(layer.score is None and sorted(layer.target.tolist()) == [0, 1, 2] for layer in late)


@pytest.mark.parametrize(("progress", "most"), [(0.7, 4), (0.9, 1)])
def test_positives_follow_the_schedule_of_the_criterion(
    progress: float, most: int, tiny_model: Build, picture: Image.Image
) -> None:
    model = tiny_model("paq_dino_r50")
    changes = {"min_positives": 4, "top_k": 4, "one_to_many_until": 0.8}
    criterion = build_criterion(load_config("paq_dino_r50").loss.model_copy(update=changes))
    found = positives(look_inside(model, picture), TARGETS, criterion, progress=progress)
    report = criterion(forward(model, picture), [TARGETS], aux_losses={}, progress=progress)
    for layer, (pairs,) in zip(found, report.pairs, strict=True):
        assert layer.query.tolist() == pairs.query_indices.tolist()
        assert layer.target.tolist() == pairs.target_indices.tolist()
    assert np.bincount(found[0].target).max() == most


def test_s_iou_c_and_k_are_those_computed_by_hand(tiny_model: Build, picture: Image.Image) -> None:
    settings = LossConfig(assigner="quality_aware", gamma=0.25, top_k=3)
    inside = look_inside(tiny_model("dino_r50"), picture)
    for layer in positives(inside, TARGETS, build_criterion(settings))[:2]:
        boxes, truth = inside.boxes[layer.layer - 1].astype(float), TARGETS.boxes.numpy().astype(float)
        low = np.maximum(boxes[:, None, :2] - boxes[:, None, 2:] / 2, truth[:, :2] - truth[:, 2:] / 2)
        high = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:] / 2, truth[:, :2] + truth[:, 2:] / 2)
        common = np.clip(high - low, 0, None).prod(-1)
        iou = common / (boxes[:, None, 2:].prod(-1) + truth[:, 2:].prod(-1) - common)
        confidence = 1 / (1 + np.exp(-inside.logits[layer.layer - 1][:, TARGETS.labels.numpy()].astype(float)))
        score = iou - 0.25 * confidence
        pick = (layer.query, layer.target)
        np.testing.assert_allclose(layer.iou, iou[pick], atol=1e-5)
        np.testing.assert_allclose(layer.confidence, confidence[pick], atol=1e-5)
        assert layer.score is not None
        np.testing.assert_allclose(layer.score, score[pick], atol=1e-5)
        wanted = np.ceil(np.sort(score, axis=0)[-3:].sum(0) - 1e-6).clip(1, 3)
        assert np.bincount(layer.target, minlength=3).tolist() == wanted.tolist()


def test_the_loss_is_the_runs_if_there_is_one(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model("paq_dino_r50")

    def loss(checkpoint: Path | None) -> tuple[LossConfig, str]:
        rest: dict[str, Any] = dict.fromkeys(field.name for field in fields(ModelUnderTest))
        return ModelUnderTest(**rest | {"model": model, "checkpoint": checkpoint}).loss

    by_name = load_config("paq_dino_r50").loss, "the settings of paq_dino_r50"
    assert loss(tmp_path / "x.safetensors") == loss(None) == by_name
    config = load_config("paq_dino_r50", {"loss.gamma": 0.7})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for place in (tmp_path, tmp_path / "best.safetensors"):
        settings, source = loss(place)
        assert settings.gamma == 0.7 and "config.yaml" in source
    (tmp_path / "config.yaml").write_text("no_such_setting: 1")  # of another version
    assert loss(tmp_path) == by_name
    model.name = "something of my own"
    assert loss(tmp_path) == (LossConfig(), "the package's defaults")
