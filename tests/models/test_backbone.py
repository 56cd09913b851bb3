from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from paqdetr.errors import ConfigError
from paqdetr.models import backbone as module
from paqdetr.models.backbone import Backbone, load_imagenet_weights, normalization_of, pad_before_shift
from paqdetr.models.folding import FoldedNorm
from paqdetr.preprocessing import Normalization, to_pixels

STRIDES = (8, 16, 32)


@cache
def _built(name: str, **options: Any) -> Backbone:
    return Backbone(**{"name": name, "strides": STRIDES, "pretrained": False} | options)


def build(name: str, **options: Any) -> Backbone:
    """A copy takes a tenth of the time that random weights take."""
    return copy.deepcopy(_built(name, **options))


def frozen(backbone: Backbone) -> set[str]:
    return {key for key, parameter in backbone.body.named_parameters() if not parameter.requires_grad}


NAMES = ["tf_efficientnet_lite0", "resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"]


@pytest.mark.parametrize("name", NAMES)
def test_each_feature_has_its_stride_and_channels_and_is_used(name: str) -> None:
    backbone = build(name)
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [
        (2, channels, 64 // stride, 96 // stride) for channels, stride in zip(backbone.channels, STRIDES, strict=True)
    ]
    sum(x.square().mean() for x in maps).backward()
    assert [key for key, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        ("resnet18", False),
        ("tf_efficientnet_lite0", False),
        ("swin_tiny_patch4_window7_224", False),
        ("regnety_002", False),
        ("convnext_atto", True),  # patches drop what is left over
        ("ese_vovnet19b_dw", True),  # so does its pooling
        ("hrnet_w18_small", True),  # adds maps whose sizes would differ
    ],
)
@torch.no_grad()
def test_images_of_any_size_are_padded_only_where_the_backbone_needs_it(name: str, padded: bool) -> None:
    """`padded`: does the bare backbone give other sizes than ceil(side / stride), or fail, on odd sides?"""
    backbone = build(name).eval()
    sides = []
    backbone.body.register_forward_pre_hook(lambda _, given: sides.append(tuple(given[0].shape[2:])))
    images = torch.randn(1, 3, 65, 95)
    maps = backbone(images)
    assert [tuple(x.shape[2:]) for x in maps] == [(9, 12), (5, 6), (3, 3)]
    assert sides == [(96, 96) if padded else (65, 95)]
    # Sides that are multiples of the coarsest stride are never padded; elsewhere maps are those of the padded image.
    whole = torch.nn.functional.pad(images, (0, 1, 0, 31))
    expected = backbone(whole)
    assert sides[-1] == (96, 96)
    if padded:
        for found, full in zip(maps, expected, strict=True):
            assert torch.equal(found, full[:, :, : found.shape[2], : found.shape[3]])


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("strides", [(8, 16), (4, 8, 16, 32), (32,), (2, 4, 8, 16, 32)])
def test_any_choice_of_strides(name: str, strides: tuple[int, ...]) -> None:
    backbone = build(name, strides=strides)
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert [x.shape[2] for x in maps] == [64 // stride for stride in strides]
    sum(x.square().mean() for x in maps).backward()
    assert [key for key, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "stride", "prefixes"),
    [
        ("tf_efficientnet_lite0", 8, ("conv_stem", "blocks.0", "blocks.1", "blocks.2")),
        ("resnet18", 4, ("conv1", "layer1")),
        ("resnet18", 8, ("conv1", "layer1", "layer2")),
        ("swin_tiny_patch4_window7_224", 8, ("patch_embed", "layers_0", "layers_1")),
        ("convnext_atto", 8, ("stem_0", "stem_1", "stages_0", "stages_1")),
    ],
)
def test_frozen_stride_freezes_the_stem_to_that_feature_and_no_more(
    name: str, stride: int, prefixes: tuple[str, ...]
) -> None:
    backbone = build(name, frozen_stride=stride)
    keys = [key for key, _ in backbone.body.named_parameters()]
    assert frozen(backbone) == {key for key in keys if key.startswith(tuple(p + "." for p in prefixes))}
    assert len(frozen(backbone)) < len(keys)
    # What is frozen is exactly what the feature of that stride is made from.
    maker = build(name, strides=(stride,))
    maker(torch.randn(1, 3, 64, 64))[0].square().mean().backward()
    assert frozen(backbone) == {key for key, p in maker.body.named_parameters() if p.grad is not None}


def test_a_feature_may_end_in_a_module_without_parameters() -> None:
    """As VGG's do, in a pooling."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2))
    module._freeze(body, until="1")
    assert [p.requires_grad for p in body.parameters()] == [False, False, True, True]
    with pytest.raises(RuntimeError, match="no module 'layer9'"):
        module._freeze(body, until="layer9")


def test_nothing_is_frozen_at_zero() -> None:
    assert frozen(build("resnet18", frozen_stride=0)) == set()


def test_frozen_norms_keep_their_statistics() -> None:
    backbone = build("resnet18").train()
    assert not [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)]
    assert [part for part in backbone.modules() if isinstance(part, FoldedNorm)]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    x = 5 + torch.randn(2, 3, 64, 64)
    first = backbone(x)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(first, backbone.eval()(x), strict=True))


def test_norms_of_the_frozen_part_keep_their_statistics_whatever_the_others_do() -> None:
    backbone = build("resnet18", frozen_stride=4, freeze_norm=False).train()
    before = {name: own.clone() for name, own in backbone.named_buffers() if name.endswith("running_mean")}
    backbone(torch.randn(2, 3, 64, 64))
    moved = {name for name, own in backbone.named_buffers() if name in before and not torch.equal(own, before[name])}
    assert moved and not any(("bn1" in name and "layer" not in name) or "layer1" in name for name in moved)
    assert any("layer2" in name for name in moved)


def test_norms_train_when_they_are_not_frozen() -> None:
    backbone = build("resnet18", frozen_stride=0, freeze_norm=False).train()
    before = backbone.body.bn1.running_mean.clone()  # type: ignore[union-attr, operator]
    backbone(5 + torch.randn(2, 3, 64, 64))
    assert not torch.equal(before, backbone.body.bn1.running_mean)  # type: ignore[union-attr, arg-type]
    assert "body.bn1.weight" in dict(backbone.named_parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "regnety_002"])
def test_without_pretraining_frozen_norms_do_not_cut_the_residual_branches(name: str) -> None:
    """timm starts the last norm of each branch at zero; were it frozen there, no gradient would ever pass."""
    backbone = build(name)
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert max(float(x.detach().abs().max()) for x in maps) < 1e4  # half precision ends at 65504
    sum(x.square().mean() for x in maps).backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_imagenet_weights_of_the_wheel_are_in_their_places() -> None:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    load_imagenet_weights(model, "tf_efficientnet_lite0")
    normalize = normalization_of("tf_efficientnet_lite0")

    def best(name: str) -> list[int]:
        image = Image.fromarray(load_sample_image(name)).resize((224, 224))
        with torch.no_grad():
            return model(normalize(to_pixels(image))[None])[0].topk(5).indices.tolist()

    assert best("china.jpg")[0] in {442, 698, 832}  # bell cote, palace, stupa: a Chinese temple
    assert {442, 698} <= set(best("china.jpg"))
    assert best("flower.jpg")[0] == 985  # daisy


def test_pretrained_features_are_those_of_the_whole_model() -> None:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    load_imagenet_weights(model, "tf_efficientnet_lite0")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = build("tf_efficientnet_lite0", pretrained=True)(x)
        state, expected = model.bn1(model.conv_stem(x)), []  # type: ignore[operator]
        for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
            state = block(state)
            expected += [state] if i in (2, 4, 6) else []
    for found, wanted in zip(maps, expected, strict=True):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_weights_from_timm_keep_their_places(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached here, so the weights of a random model stand in for the pretrained ones."""
    source = timm.create_model(name, num_classes=1000, **module._size_options(name))
    for tensor in source.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.02 * torch.rand_like(tensor))
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: source.state_dict())
    backbone = Backbone(name=name, strides=STRIDES, pretrained=True, freeze_norm=False).eval()
    pad_before_shift(source)  # as the backbone does
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = source.eval().forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
        for found, wanted in zip(backbone(x), maps[-3:], strict=True):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_resnet50_is_torchvisions() -> None:
    """Same names, same weights, same features; where these come from, in torchvision's own ResNet."""
    twin = torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d)
    for key, tensor in twin.state_dict().items():  # statistics and scales as after a training
        if ".bn" in key or key.startswith("bn") or "downsample.1" in key:
            tensor.uniform_(0.3, 0.7)
    backbone = build("resnet50", freeze_norm=True)
    state = {key: value for key, value in twin.state_dict().items() if not key.startswith("fc.")}
    assert set(state) == {key for key in backbone.body.state_dict() if "num_batches" not in key}
    backbone.body.load_state_dict(state, strict=False)
    layers = [f"layer{i}" for i in (2, 3, 4)]
    extractor = create_feature_extractor(twin, layers)
    for size in ((64, 96), (75, 101)):
        features = extractor(images := torch.randn(2, 3, *size))
        for name, found in zip(layers, backbone(images), strict=True):
            scale = float(features[name].abs().max())
            assert scale > 0 and float((found - features[name]).abs().max()) < 1e-5 * max(scale, 1)


@torch.no_grad()
def test_output_norms_are_over_the_channels_of_each_map() -> None:
    plain, normed = (build("swin_tiny_patch4_window7_224"), build("swin_tiny_patch4_window7_224", output_norm=True))
    normed.load_state_dict(plain.state_dict(), strict=False)
    plain.eval(), normed.eval()  # Swin drops paths at random in training
    images = torch.randn(1, 3, 64, 96)
    assert normed.norms is not None
    for norm in normed.norms:
        norm.weight.uniform_(0.5, 2.0)
    for x, found, norm in zip(plain(images), normed(images), normed.norms, strict=True):
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        expected = (x - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        assert (found - expected).abs().max() < 1e-4


def test_a_weight_file_of_another_model_is_refused() -> None:
    with pytest.raises(RuntimeError, match="tensor"):
        module._copy_in_order(timm.create_model("resnet18"), module._lite0_state())


def test_weights_that_cannot_be_had_are_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def unreachable(*arguments: Any, **options: Any) -> None:
        raise OSError("We couldn't connect to the Hub\nand more")

    # Whatever a machine has in its cache, and whether or not it is connected.
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", unreachable)
    with pytest.raises(ConfigError) as caught:
        build("resnet50", pretrained=True)
    assert "resnet50" in caught.value.message and "couldn't connect" in caught.value.message
    assert "and more" not in caught.value.message
    assert "HF_HOME" in caught.value.remedy and "pretrained_backbone=false" in caught.value.remedy


def test_unknown_backbone() -> None:
    with pytest.raises(ConfigError, match="no model 'resnet5o'"):
        build("resnet5o")
    with pytest.raises(ConfigError, match=r"similar names: .*resnext"):
        build("resnext")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18.no_such_tag"])
def test_a_backbone_that_cannot_serve(name: str) -> None:
    with pytest.raises(ConfigError, match=r"gives no features of strides \(8, 16, 32\)"):
        build(name)


def test_maps_that_are_smaller_than_strides_say() -> None:
    with pytest.raises(ConfigError, match="'inception_v3': its features are smaller"):
        build("inception_v3")


def test_strides_that_a_backbone_lacks() -> None:
    with pytest.raises(ConfigError, match=r"'resnet18' gives no features of strides \(8, 64\)") as caught:
        build("resnet18", strides=(8, 64))
    assert "backbone_strides" in caught.value.remedy
    with pytest.raises(ConfigError, match=r"frozen_stride=64.*has strides \[2, 4, 8, 16, 32\]"):
        build("resnet18", frozen_stride=64)


def test_how_pixels_are_normalised() -> None:
    assert normalization_of("tf_efficientnet_lite0") == Normalization((127.0,) * 3, (128.0,) * 3)
    imagenet = normalization_of("resnet50")
    assert imagenet.mean == pytest.approx((123.675, 116.28, 103.53))
    assert imagenet.std == pytest.approx((58.395, 57.12, 57.375))
    assert normalization_of("swin_large_patch4_window12_384.ms_in22k").mean == pytest.approx(imagenet.mean)


@pytest.mark.parametrize(("name", "strides"), module._multiples)
def test_sizes_that_are_known_beforehand(name: str, strides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    known = module._multiples[name, strides]
    monkeypatch.setattr(module, "_multiples", {})
    body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
    assert module._multiple_of_sides(body, name, strides) == known
