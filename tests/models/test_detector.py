from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paqdetr.config import load_config
from paqdetr.losses import build_criterion
from paqdetr.models import create_model, list_models
from paqdetr.models.detector import Detector
from paqdetr.models.outputs import DetectorOutput
from paqdetr.models.tokens import Tokens
from paqdetr.structures import Targets

# Valid cells of each level, for models of three and of four levels.
ROOMY = [(11, 9), (6, 5), (3, 3), (2, 2)]  # more tokens than the tiny and nano models have queries
TIGHT = [(3, 4), (2, 2), (1, 1), (1, 1)]  # fewer


def step(model: Detector, targets: list[Targets], size: int) -> DetectorOutput:
    """One training step on random images: forward, losses, backward."""
    model.train()
    output = model(torch.randn(len(targets), 3, size, size), None, targets)
    criterion = build_criterion(load_config(model.name).loss)
    report = criterion(output, targets, aux_losses=model.aux_losses())
    assert torch.isfinite(report.total)
    report.total.backward()
    return output


def without_gradient(model: nn.Module) -> list[str]:
    return [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]


def with_zero_gradient(model: nn.Module) -> list[str]:
    return [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.any()]


@pytest.mark.parametrize("name", list_models("*_nano"))
def test_training_steps_give_every_parameter_a_gradient(name: str, make_targets: Callable, stir: Callable) -> None:
    small = {"backbone": "test_resnet", "dim": 64, "ffn_dim": 64, "decoder_layers": 3}
    model = create_model(name, num_classes=5, num_queries=30, **small)
    for part in model.children():
        if part is not model.backbone:
            stir(part)
    output = step(model, make_targets(3, 1), 128)
    assert output.pred_logits.shape == (2, 30, 5) and output.pred_boxes.shape == (2, 30, 4)
    assert output.layers.logits.shape == (3, 2, 30, 5) and output.layers.boxes.shape == (3, 2, 30, 4)
    assert torch.equal(output.pred_logits, output.layers.logits[-1])
    assert torch.equal(output.pred_boxes, output.layers.boxes[-1])
    copies = {"contrastive": 96, "plain": 15, "none": 0}[model.config.denoising]  # 16 groups of 2 x 3; 5 groups of 3
    assert (0 if output.denoised is None else output.denoised.boxes.shape[2]) == copies
    assert (output.proposals is not None) is (model.config.positions == "proposals")
    assert (output.mixture.weights is not None) == name.startswith("paq")
    assert without_gradient(model) == []
    # ATSS scales the boxes of each level, and not every level has a positive.
    assert [key for key in with_zero_gradient(model) if not key.startswith("auxiliary.heads.atss.scales.")] == []
    model.zero_grad()
    step(model, make_targets(0, 0), 128)  # a batch without boxes
    assert without_gradient(model) == []


@pytest.mark.parametrize("name", ["dn_detr_r50", "dab_deformable_detr_r50", "paq_dino_r50"])
def test_one_decoder_layer_gives_every_parameter_a_gradient(
    name: str, tiny_model: Callable, make_targets: Callable
) -> None:
    model = tiny_model(name, **{"model.encoder_layers": 1, "model.decoder_layers": 1})
    step(model, make_targets(2, 1), 64)
    assert without_gradient(model) == []


@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
@pytest.mark.parametrize(
    "name", ["dino_r50", "paq_dino_r50", "dino_5scale_r50", "co_dino_r50", "paq_hybrid_deformable_detr_r50"]
)
def test_other_levels_and_a_resnet(
    name: str, counts: tuple[int, ...], tiny_model: Callable, make_targets: Callable
) -> None:
    model = tiny_model(name)
    step(model, make_targets(*counts), 64)
    assert without_gradient(model) == []


@pytest.mark.integration
def test_resnet50_at_full_width(make_targets: Callable) -> None:
    model = create_model("paq_dino_r50", num_queries=60, denoising_queries=4)
    output = step(model, make_targets(2, 1, num_classes=80), 64)
    assert output.pred_logits.shape == (2, 60, 80) and output.layers.logits.shape[0] == 6
    assert without_gradient(model) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_model_trains_on_two_images(name: str, make_targets: Callable) -> None:
    model = create_model(name)
    for counts in ((3, 1), (0, 0)):
        model.zero_grad()
        output = step(model, make_targets(*counts, num_classes=80), 320)
        assert output.pred_logits.shape == (2, model.config.num_queries, 80)
        assert without_gradient(model) == []


def test_outside_training_there_is_no_denoising(tiny_model: Callable, make_targets: Callable) -> None:
    model = tiny_model()
    images, targets = torch.randn(1, 3, 64, 64), make_targets(2)
    assert model.train()(images, None, targets).denoised is not None
    assert model(images).denoised is None
    output = model.eval()(images, None, targets)
    assert output.denoised is None and output.denoising is None
    assert tiny_model(**{"model.denoising": "none"}).train()(images, None, targets).denoised is None


def test_outputs_are_boxes_and_logits_of_each_stage(tiny_model: Callable, stir: Callable) -> None:
    model = tiny_model("paq_dino_r50").eval()
    stir(model.decoder)
    with torch.no_grad():
        output = model(torch.randn(2, 3, 64, 96))
    assert output.proposals.boxes.shape == (2, 20, 4) and output.proposals.logits.shape == (2, 20, 5)
    assert output.mixture.content.shape == (2, 20, 32) and output.mixture.weights.shape == (2, 20, 6)
    assert output.layers.boxes.min() >= 0 and output.layers.boxes.max() <= 1
    assert output.pred_logits.mean() < -2  # every class starts near a probability of 0.01


def levels_of(model: Detector, cells: list[tuple[int, int]], batch: int = 2) -> list[Tensor]:
    config = model.config
    return [torch.randn(batch, config.dim, h, w) for h, w in cells[: config.num_levels]]


def difference(found: DetectorOutput, expected: DetectorOutput) -> float:
    pairs = [
        (found.layers.logits, expected.layers.logits),
        (found.layers.boxes, expected.layers.boxes),
        (found.mixture.content, expected.mixture.content),
    ]
    if found.proposals is not None and expected.proposals is not None:
        pairs += [
            (found.proposals.logits, expected.proposals.logits),
            (found.proposals.boxes, expected.proposals.boxes),
        ]
    return max(float((a - b).abs().max()) for a, b in pairs)


def built(name: str, tiny_model: Callable, stir: Callable) -> Detector:
    if "nano" in name:
        small = {"backbone": "test_resnet", "dim": 32, "ffn_dim": 64, "decoder_layers": 3}
        model = create_model(name, num_classes=5, frozen_stride=0, **small).eval()
    else:
        model = tiny_model(name).eval()
    for part in model.children():
        if part is not model.backbone:
            stir(part)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", [*list_models("*_nano"), "dino_r50", "paq_dino_r50"])
def test_padded_cells_change_nothing(name: str, tiny_model: Callable, make_tokens: Callable, stir: Callable) -> None:
    model = built(name, tiny_model, stir)
    for cells in (ROOMY, TIGHT):
        levels = levels_of(model, cells)
        expected = model.detect(make_tokens(levels))
        for padding in (1, 7):
            assert difference(model.detect(make_tokens(levels, padding)), expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["paq_dino_nano", "paq_dino_r50"])
def test_an_image_is_the_same_beside_a_larger_one(
    name: str, tiny_model: Callable, make_tokens: Callable, stir: Callable
) -> None:
    model = built(name, tiny_model, stir)
    small, large = levels_of(model, TIGHT, 1), levels_of(model, ROOMY, 1)
    rows, masks = [], []
    for a, b in zip(small, large, strict=True):
        height, width = b.shape[2:]
        padded = torch.randn(1, b.shape[1], height, width)
        padded[:, :, : a.shape[2], : a.shape[3]] = a
        mask = torch.zeros(2, height, width, dtype=torch.bool)
        mask[0] = True
        mask[0, : a.shape[2], : a.shape[3]] = False
        rows.append(torch.cat([padded, b]).flatten(2).transpose(1, 2))
        masks.append(mask)
    shapes = [(int(x.shape[2]), int(x.shape[3])) for x in large]
    both = model.detect(Tokens.from_values(torch.cat(rows, dim=1), shapes, masks, temperature=20.0))
    for image, levels in enumerate((small, large)):
        alone = model.detect(make_tokens(levels))
        assert (both.layers.boxes[:, image] - alone.layers.boxes[:, 0]).abs().max() < 1e-4
        assert (both.layers.logits[:, image] - alone.layers.logits[:, 0]).abs().max() < 1e-4


@torch.no_grad()
def test_the_test_above_would_notice(tiny_model: Callable, make_tokens: Callable, stir: Callable) -> None:
    """Without the mask the same padding changes everything."""
    model = built("paq_dino_r50", tiny_model, stir)
    levels = levels_of(model, ROOMY)
    expected = model.detect(make_tokens(levels))
    tokens = make_tokens(levels, 1)
    blind = Tokens.from_values(tokens.values, tokens.spatial_shapes, None, temperature=20.0)
    assert difference(model.detect(blind), expected) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["dino_r50", "paq_dino_r50", "dn_detr_r50", "paq_dn_detr_r50", "hybrid", "co_dino"])
def test_matching_queries_do_not_hear_those_of_training(
    name: str, tiny_model: Callable, make_tokens: Callable, make_targets: Callable, stir: Callable
) -> None:
    changes: dict[str, Any] = {}
    if name == "hybrid":  # all three kinds of queries in one pass
        name, changes = "paq_dino_r50", {"model.hybrid_queries": 7}
    elif name == "co_dino":
        name, changes = "paq_dino_r50", {"model.auxiliary_heads": ["faster_rcnn", "atss"], "model.roi_samples": 16}
    model = tiny_model(name, **changes).train()
    for part in model.children():
        stir(part) if part is not model.backbone else None
    features = make_tokens(levels_of(model, ROOMY))
    expected = model.detect(features)
    outputs = [model.detect(features, make_targets(*counts)) for counts in ((2, 1), (2, 1), (5, 0), (0, 0))]
    for output in outputs:
        assert (output.layers.logits - expected.layers.logits).abs().max() < 1e-4
        assert (output.layers.boxes - expected.layers.boxes).abs().max() < 1e-4
    first, second = outputs[0].denoised, outputs[1].denoised
    assert first is not None and second is not None
    assert (first.boxes - second.boxes).abs().max() > 0.05  # these do hear their targets


def test_denoising_gradient_does_not_reach_the_content_queries_of_others(
    tiny_model: Callable, make_targets: Callable, stir: Callable
) -> None:
    """Copies see matching queries, not the reverse: a loss of matching queries leaves the label embedding alone."""
    model = built("dino_r50", tiny_model, stir).train()
    output = model(torch.randn(2, 3, 64, 64), None, make_targets(2, 1))
    assert model.denoising is not None
    (grad,) = torch.autograd.grad(
        output.pred_logits.sum(), [model.denoising.label_embed.weight], retain_graph=True, allow_unused=True
    )
    assert grad is None or not grad.any()
    (grad,) = torch.autograd.grad(output.denoised.logits.sum(), [model.denoising.label_embed.weight])
    assert grad.any()


def test_no_gradient_from_decoder_to_proposals(tiny_model: Callable, stir: Callable) -> None:
    """Mixed query selection: positions come from the proposals, detached."""
    model = built("paq_dino_r50", tiny_model, stir).train()
    output = model(torch.randn(1, 3, 64, 64))
    (output.layers.boxes.sum() + output.layers.logits.sum()).backward()
    assert all(p.grad is None for p in model.start.parameters())
    assert all(p.grad is not None for p in model.encoder.parameters())


@torch.no_grad()
def test_masks_that_say_something_else_are_refused(tiny_model: Callable) -> None:
    model = tiny_model(**{"model.encoder_layers": 1, "model.decoder_layers": 1}).eval()
    images = torch.randn(2, 3, 64, 96)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    for wrong in (mask.float(), mask.to(torch.uint8), (~mask).long(), mask[:1], mask[0], mask[:, :, :-1]):
        with pytest.raises(ValueError, match=r"expected \(2, 64, 96\) bool, True at padding, found") as caught:
            model(images, wrong)
        assert str(wrong.dtype) in str(caught.value) and str(tuple(wrong.shape)) in str(caught.value)
    with pytest.raises(ValueError, match=r"first pixel of image 0 of the batch.*invert"):
        model(images, ~mask)
    beside = mask.clone()
    beside[1] = mask[1].flip(1)  # padding on the left
    with pytest.raises(ValueError, match="first pixel of image 1"):
        model.extract(images, beside)
    nothing = model(images, torch.zeros_like(mask))
    assert torch.equal(nothing.pred_boxes, model(images).pred_boxes)
    assert not torch.equal(model(images, mask).pred_boxes[1], nothing.pred_boxes[1])


class Given(nn.Module):
    """A backbone that has its maps from the test."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels
        self.maps: dict[tuple[int, ...], list[Tensor]] = {}

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps[tuple(images.shape[2:])]


@torch.no_grad()
@pytest.mark.parametrize("name", ["paq_dino_r50", "dino_r50", "paq_deformable_detr_r50"])
def test_with_a_masked_neck_the_whole_detector_is_blind_to_padding(
    name: str, tiny_model: Callable, stir: Callable
) -> None:
    """Of equal features at valid places. With the plain norm of the published codes, it is not."""
    errors = []
    for masked in (True, False):
        torch.manual_seed(1)
        model = tiny_model(name, **{"model.masked_neck_norm": masked}).eval()
        stir(model)
        backbone = Given(model.backbone.channels)
        model.backbone = backbone
        small, large = torch.zeros(2, 3, 64, 96), torch.zeros(2, 3, 128, 160)
        backbone.maps[64, 96], backbone.maps[128, 160] = [], []
        for channels, stride in zip(backbone.channels, (8, 16, 32), strict=True):
            x = torch.randn(2, channels, 64 // stride, 96 // stride)
            wide = 10 * torch.randn(2, channels, 128 // stride, 160 // stride)
            wide[:, :, : x.shape[2], : x.shape[3]] = x
            backbone.maps[64, 96].append(x)
            backbone.maps[128, 160].append(wide)
        mask = torch.ones(2, 128, 160, dtype=torch.bool)
        mask[:, :64, :96] = False
        errors.append(difference(model(large, mask), model(small)))
    assert errors[0] < 1e-4 and errors[1] > 1e-2


@torch.no_grad()
def test_padding_of_images_becomes_padding_of_tokens(tiny_model: Callable) -> None:
    model = tiny_model().eval()
    mask = torch.zeros(1, 64, 128, dtype=torch.bool)
    mask[:, :, 64:] = True
    tokens = model.extract(torch.randn(1, 3, 64, 128), mask)
    assert tokens.spatial_shapes == [(8, 16), (4, 8), (2, 4), (1, 2)]
    assert tokens.padding_mask is not None and int(tokens.padding_mask.sum()) == 85
    assert tokens.valid_ratios.tolist() == [[[0.5, 1.0]] * 4]
