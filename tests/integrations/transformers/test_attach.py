"""PaQ in detectors of transformers: what is mixed into what, who learns, and the way back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from paqdetr.errors import ConfigError, UserError
from paqdetr.integrations.transformers import HOSTS, PaqPlugin, PaqSettings, attach, detach
from paqdetr.paq import NonFiniteError

Make = Callable[..., Any]
Batch = dict[str, Any]


def detect(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and boxes, without labels."""
    with torch.no_grad():
        output = model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    return output.logits, output.pred_boxes


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def differs(found: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return not torch.equal(found[0], other[0])  # box heads may start from zero and say nothing


def opened(model: Any) -> Any:
    """With the gate away from zero, so that patterns matter."""
    with torch.no_grad():
        model.paq.gate.fill_(0.5)
    return model


def decoder_inputs(model: Any, batch: Batch, **labels: Any) -> list[dict[str, Any]]:
    """What the decoder is called with, before and after PaQ, in this order."""
    seen: list[dict[str, Any]] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    decoder = model.model.decoder
    handles = [
        decoder.register_forward_pre_hook(look, with_kwargs=True, prepend=True),
        decoder.register_forward_pre_hook(look, with_kwargs=True),
    ]
    model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], **labels)
    for handle in handles:
        handle.remove()
    return seen


# --- content


def test_a_model_gives_what_it_gave_until_it_is_trained(kind: str, make_host: Make, batch: Batch) -> None:
    model = make_host(kind)
    before = detect(model, batch)
    assert attach(model, num_patterns=8) is model
    assert_equal(detect(model, batch), before)
    assert differs(detect(opened(model), batch), before)


def test_detach_gives_the_model_back(kind: str, make_host: Make, batch: Batch) -> None:
    model = make_host(kind)
    keys, before, settings = list(model.state_dict()), detect(model, batch), model.config.to_dict()
    loss = model.loss_function
    opened(attach(model, num_patterns=8))
    assert differs(detect(model, batch), before)
    assert detach(model) is model
    assert_equal(detect(model, batch), before)
    assert list(model.state_dict()) == keys and model.config.to_dict() == settings
    assert model.loss_function is loss and "_loss_function" not in model.__dict__
    assert_equal(detect(attach(model, mode="none"), batch), before)


def test_what_the_residual_form_mixes(kind: str, make_host: Make, batch: Batch) -> None:
    model = opened(attach(make_host(kind), num_patterns=8))
    plain, mixed = decoder_inputs(model, batch)
    content = plain["inputs_embeds"]
    assert content.shape[1] == model.paq.queries.num_queries == (40 if kind == "dab-patterns" else 20)
    if kind in ("conditional", "dab"):
        assert (content == 0).all()
    mixture = model.paq.queries(*model.paq.host.memory(plain, model.paq._map_size)).content
    torch.testing.assert_close(mixed["inputs_embeds"], content + 0.5 * mixture)
    assert plain.keys() == mixed.keys()
    assert all(mixed[name] is plain[name] for name in plain if name != "inputs_embeds"), "content alone"


def test_what_the_replacing_form_mixes(kind: str, make_host: Make, batch: Batch) -> None:
    model = attach(make_host(kind), mode="replace", num_patterns=8)
    plain, mixed = decoder_inputs(model, batch)
    mixture = model.paq.queries(*model.paq.host.memory(plain, model.paq._map_size)).content
    torch.testing.assert_close(mixed["inputs_embeds"], mixture)
    assert model.paq.gate is None


@pytest.mark.parametrize("denoising", ["rt", "rt-v2", "d-fine"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_denoising_queries_are_left_alone(denoising: str, mode: Any, make_host: Make, batch: Batch) -> None:
    model = attach(make_host(denoising), mode=mode, gate=0.5, num_patterns=8).train()
    plain, mixed = decoder_inputs(model, batch, labels=batch["labels"])
    copies = plain["inputs_embeds"].shape[1] - 20
    assert copies > 0
    assert torch.equal(mixed["inputs_embeds"][:, :copies], plain["inputs_embeds"][:, :copies])
    assert not torch.equal(mixed["inputs_embeds"][:, copies:], plain["inputs_embeds"][:, copies:])


def test_the_extractor_sees_valid_tokens_alone(kind: str, make_host: Make, batch: Batch) -> None:
    model = attach(make_host(kind), num_patterns=8)
    tokens, shapes, padding = model.paq.host.memory(decoder_inputs(model, batch)[0], model.paq._map_size)
    assert tokens.shape[1] == sum(height * width for height, width in shapes)
    if kind.startswith(("rt", "d-fine")):
        assert padding is None  # their images come in one size
        return
    assert padding is not None and padding.shape == tokens.shape[:2]
    assert not padding[0].any()
    start = 0
    for height, width in shapes:
        level = padding[1, start : start + height * width].view(height, width)
        assert not level[:, : width * 2 // 3].any() and level[:, -(width // 3) or width :].all()
        start += height * width


# --- who learns


def test_patterns_learn_at_once_when_they_replace(kind: str, make_host: Make, batch: Batch) -> None:
    model = attach(make_host(kind), mode="replace", num_patterns=8, diversity_weight=0.0).train()
    model(**batch).loss.backward()
    assert (model.paq.queries.patterns.grad.abs().amax(1) > 0).all()
    assert all(p.grad is not None for p in model.paq.parameters())


def test_patterns_learn_once_the_gate_has_moved(kind: str, make_host: Make, batch: Batch) -> None:
    model = attach(make_host(kind), num_patterns=8, diversity_weight=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(**batch).loss.backward()
    # Zeros, but no None: DDP would wait for those.
    assert (model.paq.queries.patterns.grad == 0).all() and (model.paq.gate.grad != 0).any()
    optimizer.step()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    assert (model.paq.queries.patterns.grad.abs().amax(1) > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.paq.parameters())


def test_patterns_from_zero_learn_first(kind: str, make_host: Make, batch: Batch) -> None:
    model = make_host(kind)
    before = detect(model, batch)
    attach(model, gate=1.0, pattern_std=0.0, num_patterns=8)
    assert_equal(detect(model, batch), before)
    model.train()(**batch).loss.backward()
    assert (model.paq.queries.patterns.grad.abs().amax(1) > 0).all()
    assert model.paq.queries.patterns.grad.isfinite().all()


def test_diversity_is_part_of_the_loss(make_host: Make, batch: Batch) -> None:
    model = attach(make_host("deformable"), num_patterns=8, diversity_weight=0.5, div_scale=4.0)
    without = attach(make_host("deformable"), num_patterns=8, diversity_weight=0.0)
    without.paq.load_state_dict(model.paq.state_dict())
    found, plain = model(**batch), without(**batch)
    owed = 2 * model.paq.queries.aux_losses()["diversity"]
    assert found.loss_dict["loss_diversity"].item() == pytest.approx(owed.item())
    assert "loss_diversity" not in plain.loss_dict
    torch.testing.assert_close(found.loss, plain.loss + owed)


# --- copies, precision, mistakes


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_its_own_patterns(kind: str, way: str, make_host: Make, batch: Batch) -> None:
    model = opened(attach(make_host(kind), num_patterns=8))
    before = detect(model, batch)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_equal(detect(other, batch), before)
    with torch.no_grad():
        other.paq.queries.patterns.mul_(2)
    assert_equal(detect(model, batch), before)
    assert differs(detect(other, batch), before)
    detach(other)
    assert_equal(detect(model, batch), before)
    assert model.paq.positives_per_box == []
    other(**batch)
    assert model.paq.positives_per_box == [], "its loss, too, is its own"


def test_half_precision(kind: str, make_host: Make, batch: Batch) -> None:
    if kind == "dab":
        pytest.skip("the host makes its zero content in float32 and cannot run in bfloat16 itself")
    model = attach(make_host(kind).to(torch.bfloat16), gate=0.5, num_patterns=8)
    assert {p.dtype for p in model.paq.parameters()} == {torch.bfloat16}
    logits, boxes = detect(model, batch | {"pixel_values": batch["pixel_values"].bfloat16()})
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and boxes.isfinite().all()


def test_autocast(kind: str, make_host: Make, batch: Batch) -> None:
    model = attach(make_host(kind), gate=0.5, num_patterns=8).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.paq.parameters())


@pytest.mark.parametrize("extractor", ["fused", "pooled"])
@pytest.mark.parametrize("head", ["dense", "factorised"])
def test_settings_reach_the_queries(extractor: Any, head: Any, make_host: Make, batch: Batch) -> None:
    settings = PaqSettings(extractor=extractor, head=head, num_patterns=5, head_rank=4, pattern_std=0.1)
    model = attach(make_host("rt"), settings, temperature=2.0)
    queries = model.paq.queries
    assert type(queries.extractor).__name__.lower().startswith(extractor)
    assert queries.patterns.shape == (5, 32) and queries.temperature == 2.0
    assert queries.patterns.std().item() == pytest.approx(0.1, rel=0.3)
    assert model.config.paq["head"] == head and model.config.paq["temperature"] == 2.0
    detect(model, batch)


def test_broken_predictions_name_layer_and_image(kind: str, make_host: Make, batch: Batch) -> None:
    model = attach(make_host(kind), num_patterns=8).train()
    with torch.no_grad():
        model.paq.gate.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"layer1.*\[11, 12\]"):
        model(**batch)


def test_every_host_is_tested_here(make_host: Make, all_kinds: list[str]) -> None:
    assert {type(make_host(kind)).__name__ for kind in all_kinds} == set(HOSTS)


def test_mistakes_are_the_users_and_change_nothing(make_host: Make, batch: Batch) -> None:
    def expect(message: str, function: Callable[..., Any], *args: Any, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            function(*args, **changes)
        assert isinstance(caught.value, UserError) and caught.value.remedy

    expect("cannot be attached to a Linear", attach, nn.Linear(2, 2))
    model = make_host("rt")
    before = detect(model, batch)
    expect("has no PaQ attached", detach, model)
    expect("unknown setting 'top'", attach, model, top=3)
    expect("mode='replce' is not known", attach, model, mode="replce")
    expect("neither would ever get a gradient", attach, model, pattern_std=0.0)
    expect("nothing would be attached", attach, model, mode="none", assigner="none")
    expect("assigner='none' makes none", attach, model, assigner="none", classification="varifocal")
    for assigner in ("quality_aware", "simota"):
        expect("min_positives=3 exceeds top_k=2", attach, model, assigner=assigner, top_k=2, min_positives=3)
    expect("has varifocal loss already", attach, model, classification="varifocal")
    expect("use_focal_loss=False", attach, make_host("rt", use_focal_loss=False))
    expect("auxiliary_loss=False", attach, make_host("deformable", auxiliary_loss=False))
    model.loss_function = lambda *args, **kwargs: None
    expect("builds no RTDetrLoss", attach, model)
    del model._loss_function
    assert not hasattr(model, "paq") and not hasattr(model.config, "paq")
    assert_equal(detect(model, batch), before)
    attach(model)
    expect("has PaQ attached already", attach, model)


def test_another_number_of_queries(make_host: Make, batch: Batch) -> None:
    """RT-DETR takes as many of its proposals as the settings say, at any time."""
    model = attach(make_host("rt"), gate=0.5, num_patterns=8)
    for count in (10, 30):
        model.config.num_queries = count
        with pytest.raises(ConfigError, match=rf"now has {count} queries, PaQ was attached with") as caught:
            detect(model, batch)
        assert "resize" in caught.value.remedy
        model.paq.queries.resize(count)
        assert detect(model, batch)[0].shape[1] == count


def test_learned_queries_of_the_host_are_resized_too(make_host: Make, batch: Batch) -> None:
    model = attach(make_host("deformable"), gate=0.5, num_patterns=8)
    own = model.config.num_queries
    model.config.num_queries = own + 5
    model.paq.queries.resize(own + 5)
    with pytest.raises(
        ConfigError, match=rf"given {own} content queries, PaQ and the model's config have {own + 5}"
    ) as caught:
        detect(model, batch)
    assert "query embeddings" in caught.value.remedy


def test_a_loss_function_of_ones_own_is_put_back(make_host: Make, batch: Batch) -> None:
    model = make_host("rt")
    own = lambda *args, **kwargs: (torch.zeros(()), {}, None)  # noqa: E731
    model.loss_function = own
    attach(model, assigner="none", num_patterns=8)
    assert list(model(**batch).loss_dict) == ["loss_diversity"]
    detach(model)
    assert model.loss_function is own and not isinstance(getattr(model, "paq", None), PaqPlugin)
