"""Layers that compute their activations twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from paqdetr.config import LossConfig
from paqdetr.losses import build_criterion
from paqdetr.models import Detector


def step(model: Detector, targets: list, images: Tensor) -> tuple[dict[str, Tensor], Tensor, int]:
    """Gradients, the state of the random numbers afterwards, and how often a layer of encoder or decoder ran."""
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    handles = [layer.register_forward_pre_hook(count) for layer in (*model.encoder.layers, *model.decoder.layers)]
    model.zero_grad()
    torch.manual_seed(5)
    loss = build_criterion(LossConfig())(model(images, None, targets), targets, aux_losses={}).total
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, torch.get_rng_state(), runs


@pytest.mark.parametrize("name", ["paq_dino_r50", "dab_deformable_detr_r50", "deformable_detr_one_stage_r50"])
def test_gradients_are_the_same_to_the_last_bit(
    name: str, tiny_model: Callable[..., Detector], make_targets: Callable[..., list]
) -> None:
    """With dropout, whose noise the second pass has to draw again without drawing from what follows."""
    torch.manual_seed(0)
    model = tiny_model(name, **{"model.dropout": 0.2}).train()
    targets, images = make_targets(2, 1), torch.randn(2, 3, 64, 96)
    plain, state, runs = step(model, targets, images)
    model.checkpoint_activations()
    again, state_again, runs_again = step(model, targets, images)
    layers = len(model.encoder.layers) + len(model.decoder.layers)
    assert (runs, runs_again) == (layers, 2 * layers)
    assert torch.equal(state, state_again)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        assert torch.equal(gradient, again[key]), key
    model.checkpoint_activations(False)
    assert step(model, targets, images)[2] == layers


def test_only_inputs_of_layers_are_kept(tiny_model: Callable[..., Detector]) -> None:
    model = tiny_model("dino_r50").train()
    with torch.no_grad():
        tokens = model.extract(torch.randn(1, 3, 96, 96))

    def kept() -> int:
        sizes: dict[int, int] = {}
        alive = []

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model.encoder(tokens)
        return sum(sizes.values())

    values = tokens.values.nbytes
    assert kept() > 10 * values
    model.checkpoint_activations()
    # What each of two layers updates, the position they share, a place on 4 levels, and what the level embedding needs.
    assert kept() == 3 * values + tokens.centers.nbytes * 4 + tokens.level_index.nbytes


def test_nothing_is_computed_twice_in_use(tiny_model: Callable[..., Detector]) -> None:
    model = tiny_model("dino_r50").eval()
    model.checkpoint_activations()
    images = torch.randn(1, 3, 64, 64)
    logits = model(images).pred_logits
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(count)
    logits.sum().backward()
    assert runs == 0
