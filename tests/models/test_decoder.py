from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paqdetr.models.decoder import Decoded, Decoder
from paqdetr.models.queries import QueryGroup
from paqdetr.models.tokens import Tokens, sine_boxes

LEVELS = [(4, 6), (2, 3)]


def build(*, layers: int = 4, **changes: Any) -> Decoder:
    settings: dict[str, Any] = dict(
        num_layers=layers,
        dim=8,
        num_heads=2,
        num_levels=2,
        num_points=2,
        ffn_dim=16,
        dropout=0.0,
        num_classes=3,
        norm=True,
        share_heads=False,
        fixed_position=False,
        scale_positions=False,
        box_refinement=True,
        look_forward_twice=True,
        refine_from="normed",
        box_eps=1e-5,
        padded_positions=False,
    )
    decoder = Decoder(**settings | changes)
    for head in decoder.box_heads:  # as `init_weights` does
        torch.nn.init.zeros_(head[-1].weight)
        torch.nn.init.zeros_(head[-1].bias)
    return decoder


def run(decoder: Decoder, content: Tensor, reference: Tensor, memory: Tokens, mask: Tensor | None = None) -> Decoded:
    return decoder(QueryGroup(content, reference), memory, mask)


@pytest.fixture
def inputs(make_tokens: Callable) -> tuple[Tensor, Tensor, Tokens]:
    memory = make_tokens([torch.randn(2, 8, h, w) for h, w in LEVELS])
    return torch.randn(2, 5, 8), 0.2 + 0.6 * torch.rand(2, 5, 4), memory


def logit(x: Tensor) -> Tensor:
    return (x / (1 - x)).log()


def slow_decoder(decoder: Decoder, content: Tensor, reference: Tensor, memory: Tokens) -> list[tuple[Tensor, Tensor]]:
    """Layer by layer: embed the box, attend, look, feed forward; move the box in logit space."""
    ratios = memory.valid_ratios.repeat(1, 1, 2)  # (B, L, 4)
    x, box, out = content, reference, []
    for i, layer in enumerate(decoder.layers):
        first, _, second = decoder.position_head
        embedding = sine_boxes(box, 4)
        position = F.linear(F.linear(embedding, first.weight, first.bias).relu(), second.weight, second.bias)
        attended = layer.self_attention(x + position, x + position, x)[0]
        x = F.layer_norm(x + attended, (8,), layer.self_norm.weight, layer.self_norm.bias)
        places = torch.stack([box * ratios[:, level, None] for level in range(2)], dim=2)
        looked = layer.cross_attention(x + position, places, memory.values, memory.spatial_shapes, memory.padding_mask)
        x = F.layer_norm(x + looked, (8,), layer.cross_norm.weight, layer.cross_norm.bias)
        x = layer.ffn(x)
        state = F.layer_norm(x, (8,), decoder.norm.weight, decoder.norm.bias)
        box = (decoder.box_heads[i](state) + logit(box)).sigmoid()
        out.append((decoder.class_heads[i](state), box))
    return out


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
def test_equals_a_plainly_written_decoder(padding: int, make_tokens: Callable, stir: Callable) -> None:
    decoder = build()
    stir(decoder)
    memory = make_tokens([torch.randn(2, 8, h, w) for h, w in LEVELS], padding)
    content, reference = torch.randn(2, 5, 8), 0.2 + 0.6 * torch.rand(2, 5, 4)
    found = run(decoder, content, reference, memory)
    assert found.logits.shape == (4, 2, 5, 3) and found.boxes.shape == (4, 2, 5, 4)
    for i, (logits, boxes) in enumerate(slow_decoder(decoder, content, reference, memory)):
        assert (found.logits[i] - logits).abs().max() < 1e-5
        assert (found.boxes[i] - boxes).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("twice", [True, False])
def test_starts_with_the_boxes_it_was_given(inputs: tuple, twice: bool) -> None:
    found = run(build(look_forward_twice=twice), *inputs)
    assert (found.boxes - inputs[1]).abs().max() < 1e-5


@torch.no_grad()
def test_looking_forward_twice_changes_gradients_not_values(inputs: tuple, stir: Callable) -> None:
    twice, once = build(look_forward_twice=True), build(look_forward_twice=False)
    stir(twice)
    once.load_state_dict(twice.state_dict())
    assert torch.equal(run(twice, *inputs).boxes, run(once, *inputs).boxes)


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_which_box_heads_the_loss_of_a_layer_reaches(inputs: tuple, stir: Callable, twice: bool, layer: int) -> None:
    decoder = build(look_forward_twice=twice)
    stir(decoder)
    run(decoder, *inputs).boxes[layer].square().sum().backward()
    reached = [
        i for i, head in enumerate(decoder.box_heads) if head[-1].weight.grad is not None
        and bool(head[-1].weight.grad.any())
    ]  # fmt: skip
    assert reached == ([layer - 1, layer] if twice and layer else [layer])


@pytest.mark.parametrize("refine", [True, False])
def test_learned_places_are_trained_where_they_are_used(inputs: tuple, stir: Callable, refine: bool) -> None:
    """With refinement only the first layer starts from them; without, every layer does."""
    decoder = build(box_refinement=refine, look_forward_twice=False)
    stir(decoder)
    content, reference, memory = inputs
    reached = []
    for layer in range(4):
        reference = reference.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            run(decoder, content.detach(), reference, memory).boxes[layer].sum(), reference
        )
        reached.append(float(gradient.abs().sum()))
    # A later layer's boxes depend on them through the content alone, which looked around them in layer 1.
    direct = [gradient > 1.0 for gradient in reached]
    assert direct == ([True, False, False, False] if refine else [True] * 4)


def test_box_loss_does_not_reach_the_embedding_through_earlier_boxes(inputs: tuple, stir: Callable) -> None:
    """Where a layer looks and what position it embeds follow the earlier box without gradient."""
    decoder = build(look_forward_twice=True)
    stir(decoder)
    found = run(decoder, *inputs)
    found.logits[3].sum().backward()
    for head in decoder.box_heads:
        assert all(parameter.grad is None for parameter in head.parameters())


def test_shared_heads(inputs: tuple, stir: Callable) -> None:
    decoder = build(share_heads=True)
    assert len(decoder.class_heads) == len(decoder.box_heads) == 1
    stir(decoder)
    own = build(share_heads=False)
    state = decoder.state_dict()
    for i in range(4):
        for kind in ("class_heads", "box_heads"):
            state |= {
                k.replace(f"{kind}.0", f"{kind}.{i}"): v for k, v in decoder.state_dict().items() if k.startswith(kind)
            }
    own.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(run(decoder, *inputs).boxes, run(own, *inputs).boxes)
        assert torch.equal(run(decoder, *inputs).logits, run(own, *inputs).logits)


@torch.no_grad()
def test_forbidden_queries_are_not_heard(inputs: tuple, stir: Callable) -> None:
    decoder = build()
    stir(decoder)
    content, reference, memory = inputs
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2:, :2] = True  # the last three may not see the first two
    expected = run(decoder, content, reference, memory, mask)
    other, moved = content.clone(), reference.clone()
    other[:, :2], moved[:, :2] = torch.randn(2, 2, 8), torch.rand(2, 2, 4)
    found = run(decoder, other, moved, memory, mask)
    assert torch.allclose(found.logits[:, :, 2:], expected.logits[:, :, 2:], atol=1e-6)
    assert not torch.allclose(found.logits[:, :, :2], expected.logits[:, :, :2], atol=1e-2)
    assert not torch.allclose(run(decoder, other, moved, memory).logits[:, :, 2:], expected.logits[:, :, 2:], atol=1e-4)


@torch.no_grad()
def test_queries_have_no_order(inputs: tuple, stir: Callable) -> None:
    decoder = build()
    stir(decoder)
    content, reference, memory = inputs
    order = torch.tensor([3, 0, 4, 1, 2])
    found = run(decoder, content[:, order], reference[:, order], memory)
    expected = run(decoder, content, reference, memory)
    assert torch.allclose(found.boxes, expected.boxes[:, :, order], atol=1e-5)


@torch.no_grad()
def test_boxes_are_float32_in_half_precision(inputs: tuple) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(build(), *inputs)
    assert found.boxes.dtype == torch.float32
    # Nothing has moved at the start: a bfloat16 anywhere on the way would show at 1e-3.
    assert (found.boxes - inputs[1]).abs().max() < 1e-5


# --- what the hosts do differently


def embed(decoder: Decoder, box: Tensor) -> Tensor:
    first, _, second = decoder.position_head
    hidden = F.linear(sine_boxes(box, 4), first.weight, first.bias).relu()
    return F.linear(hidden, second.weight, second.bias)


def passes(layer: Any, x: Tensor, position: Tensor, box: Tensor, memory: Tokens) -> Tensor:
    """One decoder layer, which the tests above have compared with its plain form."""
    ratios = memory.valid_ratios.repeat(1, 1, 2)
    return layer(x, position, box[:, :, None] * ratios[:, None], memory, None)


@torch.no_grad()
def test_positions_scaled_by_content_from_the_second_layer_on(make_tokens: Callable, stir: Callable) -> None:
    """DAB-DETR, section 4.2, without a norm before the heads."""
    decoder = build(norm=False, scale_positions=True, look_forward_twice=False).double()
    stir(decoder)
    memory = make_tokens([torch.randn(2, 8, h, w, dtype=torch.float64) for h, w in LEVELS], 2)
    x, box = torch.randn(2, 5, 8).double(), (0.2 + 0.6 * torch.rand(2, 5, 4)).double()
    found = run(decoder, x, box, memory)
    scale = decoder.position_scale
    for i, layer in enumerate(decoder.layers):
        position = embed(decoder, box)
        if i > 0:
            hidden = F.linear(x, scale[0].weight, scale[0].bias).relu()
            position = position * F.linear(hidden, scale[2].weight, scale[2].bias)
        x = passes(layer, x, position, box, memory)
        box = (decoder.box_heads[i](x) + logit(box)).sigmoid()
        assert (found.boxes[i] - box).abs().max() < 1e-10
        assert (found.logits[i] - decoder.class_heads[i](x)).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
def test_published_conventions_of_dino(padding: int, make_tokens: Callable, stir: Callable) -> None:
    """Boxes of the next layer from the output before the norm, 1e-3 in the inverse sigmoid, positions in the padded image."""
    decoder = build(refine_from="raw", box_eps=1e-3, padded_positions=True).double()
    stir(decoder)
    memory = make_tokens([torch.randn(2, 8, h, w, dtype=torch.float64) for h, w in LEVELS], padding)
    x, box = torch.randn(2, 5, 8).double(), (0.2 + 0.6 * torch.rand(2, 5, 4)).double()
    box[0, 0, 0], box[1, 2, 3] = 1e-5, 1 - 1e-6  # beyond the limit
    found = run(decoder, x, box, memory)
    for i, layer in enumerate(decoder.layers):
        ratio = memory.valid_ratios[:, 0].repeat(1, 2)[:, None]  # (B, 1, 4), of the finest level
        x = passes(layer, x, embed(decoder, box * ratio), box, memory)
        state = F.layer_norm(x, (8,), decoder.norm.weight, decoder.norm.bias)
        known = (box.clamp(min=1e-3) / (1 - box).clamp(min=1e-3)).log()
        assert (found.boxes[i] - (decoder.box_heads[i](state) + known).sigmoid()).abs().max() < 1e-10
        assert (found.logits[i] - decoder.class_heads[i](state)).abs().max() < 1e-10
        box = (decoder.box_heads[i](x) + known).sigmoid()


@torch.no_grad()
def test_without_refinement_all_layers_look_around_the_same_point(inputs: tuple, stir: Callable) -> None:
    decoder = build(fixed_position=True, box_refinement=False, look_forward_twice=False, share_heads=True)
    stir(decoder)
    x, _, memory = inputs
    point, position = torch.rand(2, 5, 2), torch.randn(2, 5, 8)
    found = decoder(QueryGroup(x, point, position), memory)
    for i, layer in enumerate(decoder.layers):
        places = point[:, :, None] * memory.valid_ratios[:, None]
        x = layer(x, position, places, memory, None)
        offset = decoder.box_heads[0](F.layer_norm(x, (8,), decoder.norm.weight, decoder.norm.bias))
        expected = torch.cat([offset[..., :2] + logit(point), offset[..., 2:]], dim=-1).sigmoid()
        assert (found.boxes[i] - expected).abs().max() < 1e-5


def test_a_part_of_the_queries(inputs: tuple) -> None:
    found = run(build(), *inputs)
    _, part, rest = found.split([1, 2, 2])
    assert torch.equal(part.boxes, found.boxes[:, :, 1:3]) and torch.equal(part.logits, found.logits[:, :, 1:3])
    assert rest.boxes.shape[2] == 2 and rest.counted is None
