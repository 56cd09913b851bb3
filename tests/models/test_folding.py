from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from paqdetr.models.folding import FoldedConv2d, FoldedNorm, fold_frozen_norms


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A body with frozen norms as after a training, and the same one folded."""
    body = timm.create_model(name, features_only=True, drop_path_rate=0.0)
    for part in body.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.3, 0.7)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    plain = freeze_batch_norm_2d(body)
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    return plain.double(), folded.double()


def run(body: nn.Module, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    maps = body(images)
    body.zero_grad()
    sum(x.square().mean() for x in maps).backward()
    return maps, {key: p.grad for key, p in body.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "resnet50", "regnety_002"])
def test_same_names_same_features_same_gradients(name: str) -> None:
    plain, folded = pair(name)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert not any("FrozenBatchNorm" in type(part).__name__ for part in folded.modules())
    images = torch.randn(2, 3, 65, 90, dtype=torch.float64)
    expected, their_gradients = run(plain, images)
    found, gradients = run(folded, images)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()
    assert gradients.keys() == their_gradients.keys() and len(gradients) > 10
    for key, gradient in gradients.items():
        scale = their_gradients[key].abs().max()
        assert (gradient - their_gradients[key]).abs().max() <= 1e-9 * scale, key


def test_weights_are_those_that_were_saved() -> None:
    plain, folded = pair("test_resnet")
    for (key, a), (_, b) in zip(plain.state_dict().items(), folded.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    other, _ = pair("test_resnet")
    folded.load_state_dict(other.state_dict())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert (folded(images)[-1] - other(images)[-1]).abs().max() < 1e-9


def test_every_change_of_a_weight_counts() -> None:
    """Also those that leave a tensor's version as it is: of `.data`, and of fused optimisers."""
    plain, folded = pair("test_resnet")
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for change in ("in place", "data", "fused"):
        with torch.inference_mode():
            before = folded(images)[-1]
            assert (before - plain(images)[-1]).abs().max() < 1e-9
        for body in (plain, folded):
            weight = body.get_submodule("layer1.0.conv1").weight
            assert isinstance(weight, nn.Parameter)
            if change == "fused":
                weight.grad = torch.ones_like(weight)
                torch.optim.AdamW([weight], lr=0.1, fused=True).step()
            else:
                with torch.no_grad():
                    (weight if change == "in place" else weight.data).mul_(1.5)
        with torch.no_grad():
            after = folded(images)[-1]
        assert (after - before).abs().max() > 1e-3
        assert (after - plain(images)[-1]).abs().max() < 1e-9


def test_bodies_made_in_inference_mode() -> None:
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        plain, folded = pair("test_resnet")
        for _ in range(2):
            assert (folded(images)[-1] - plain(images)[-1]).abs().max() < 1e-9
            for body in (plain, folded):
                body.state_dict()["layer1.0.conv1.weight"].mul_(1.5)
    with torch.no_grad():
        assert (folded(images)[-1] - plain(images)[-1]).abs().max() < 1e-9


def test_copies_are_independent() -> None:
    _, folded = pair("test_resnet")
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = folded(images)[-1]
        twin = copy.deepcopy(folded)
        for tensor in twin.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
        assert not torch.equal(twin(images)[-1], before)
        assert torch.equal(folded(images)[-1], before)


def test_a_norm_behind_anything_else_stays() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    frozen = freeze_batch_norm_2d(body)
    assert fold_frozen_norms(frozen) == 1
    kinds = [type(part).__name__ for part in frozen]
    assert kinds == ["Conv2d", "ReLU", "FrozenBatchNorm2d", "FoldedConv2d", "FoldedNorm"]
    assert isinstance(frozen[3], FoldedConv2d) and isinstance(frozen[4], FoldedNorm)


def test_a_convolution_whose_output_is_a_feature_stays() -> None:
    plain, folded = pair("xception41p")
    assert any(isinstance(part, FoldedConv2d) for part in folded.modules())
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    for a, b in zip(folded.eval()(images), plain.eval()(images), strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max()


def test_a_convolution_of_two_norms_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            made = self.conv(x)
            return self.first(made) + self.second(made)

    assert fold_frozen_norms(freeze_batch_norm_2d(Twice())) == 0


def test_nothing_to_fold() -> None:
    assert fold_frozen_norms(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4))) == 0


def test_half_precision() -> None:
    plain, folded = pair("test_resnet")
    images = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found, expected = folded.float()(images)[-1], plain.float()(images)[-1]
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
