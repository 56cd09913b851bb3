"""Selection of distinct queries between decoder layers (DDQ) and the relation of boxes as a bias (Relation-DETR), against
decoders written as loops over queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from paqdetr.config import load_config
from paqdetr.errors import ConfigError
from paqdetr.models import Detector, create_model
from paqdetr.models.decoder import Decoder, PositionRelation
from paqdetr.models.encoder import DeformableEncoder
from paqdetr.models.files import reshape
from paqdetr.models.queries import QueryGroup
from paqdetr.models.tokens import Tokens, sine_boxes
from paqdetr.structures import BACKGROUND_LOGIT

HEADS, DIM = 2, 8


def decoder_of(stir: Callable, **changes: Any) -> Decoder:
    settings: dict[str, Any] = dict(
        num_layers=4,
        dim=DIM,
        num_heads=HEADS,
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
        refine_from="raw",
        box_eps=1e-5,
        padded_positions=False,
    )
    decoder = Decoder(**settings | changes)
    for head in decoder.box_heads:  # boxes stay near their places, so that neighbours go on overlapping
        torch.nn.init.zeros_(head[-1].weight)
        torch.nn.init.zeros_(head[-1].bias)
    stir(decoder)
    return decoder


def crowd(batch: int, count: int) -> Tensor:
    """Boxes around three places, many of which overlap by more than a half."""
    places = torch.tensor([[0.3, 0.3], [0.6, 0.4], [0.5, 0.7]])[torch.randint(3, (batch, count))]
    return torch.cat([places + 0.04 * torch.rand(batch, count, 2), 0.2 + 0.05 * torch.rand(batch, count, 2)], dim=-1)


def relation_by_hand(relation: PositionRelation, boxes: Tensor, others: Tensor) -> Tensor:
    """(N, 4) and (M, 4) -> (heads, N, M), pair by pair."""
    bias = torch.zeros(HEADS, len(boxes), len(others))
    for i, (x, y, w, h) in enumerate(boxes.tolist()):
        for j, (other_x, other_y, other_w, other_h) in enumerate(others.tolist()):
            numbers = (
                math.log(abs(x - other_x) / (w + 1e-5) + 1),
                math.log(abs(y - other_y) / (h + 1e-5) + 1),
                math.log((w + 1e-5) / (other_w + 1e-5)),
                math.log((h + 1e-5) / (other_h + 1e-5)),
            )
            waves = [
                wave(100 * number / 10000 ** (2 * k / 16))
                for number in numbers
                for k in range(8)
                for wave in (math.sin, math.cos)
            ]
            bias[:, i, j] = F.linear(torch.tensor(waves), relation.project.weight, relation.project.bias).relu()
    return bias


def attend(
    layer: torch.nn.Module, query: Tensor, value: Tensor, bias: Tensor, forbidden: set[tuple[int, int]]
) -> Tensor:
    """Self-attention of one image, (N, d), head by head."""
    weight, shift = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, query, value), weight, shift, strict=True))
    heads = []
    for head in range(HEADS):
        part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
        logits = q[:, part] @ k[:, part].T / math.sqrt(DIM // HEADS) + bias[head]
        for i, j in forbidden:
            logits[i, j] = -math.inf
        heads.append(logits.softmax(-1) @ v[:, part])
    return layer.out_proj(torch.cat(heads, dim=-1))


def survivors(boxes: Tensor, scores: Tensor, among: list[int], threshold: float) -> list[int]:
    """Greedy: the best, then the next that overlaps none of those by more than the threshold, and so on."""
    corners, kept = box_convert(boxes, "cxcywh", "xyxy"), []
    for i in sorted(among, key=lambda i: -scores[i].item()):
        if all(box_iou(corners[i, None], corners[j, None]).item() <= threshold for j in kept):
            kept.append(i)
    return kept


def plain_decoder(
    decoder: Decoder, content: Tensor, reference: Tensor, memory: Tokens, *, blind: set[tuple[int, int]], matching: int
) -> list[tuple[Tensor, Tensor, list[int]]]:
    """Of one image: class logits, boxes, and which matching queries take part, of every layer."""
    ratios = memory.valid_ratios[0].repeat(1, 2)  # (L, 4)
    x, box, reported, out = content, reference, reference, []
    taking_part, forbidden = list(range(matching, len(x))), set(blind)
    bias, last = torch.zeros(HEADS, len(x), len(x)), reference
    for i, layer in enumerate(decoder.layers):
        position = decoder.position_head(sine_boxes(box, DIM // 2))
        x = layer.self_norm(x + attend(layer.self_attention, x + position, x, bias, forbidden))
        places = (box[:, None] * ratios)[None]
        looked = layer.cross_attention((x + position)[None], places, memory.values, memory.spatial_shapes, None)[0]
        x = layer.ffn(layer.cross_norm(x + looked))
        reported = (decoder.box_heads[i](decoder.norm(x)) + torch.logit(box)).sigmoid()
        out.append((decoder.class_heads[i](decoder.norm(x)), reported, taking_part))
        state = x if decoder.refine_raw else decoder.norm(x)
        box = (decoder.box_heads[i](state) + torch.logit(box)).sigmoid()
        if decoder.distinct is not None:
            scores = decoder.class_heads[i](state).amax(-1)
            kept = survivors(box, scores, taking_part, decoder.distinct)
            others = [q for q in range(matching, len(x)) if q not in kept]
            forbidden = blind | {(a, b) for a in others for b in others}
            restarts = decoder.distinct_restart and matching in kept
            taking_part = list(range(matching, len(x))) if restarts else sorted(kept)
        if decoder.relation is not None:
            bias, last = relation_by_hand(decoder.relation, last, reported), reported
    return out


CASES: list[dict[str, Any]] = [
    {"distinct": 0.5},
    {"distinct": 0.5, "refine_from": "normed"},
    {"distinct": 0.5, "distinct_restart": True},
    {"distinct": 0.05},
    {"relation": True},
    {"relation": True, "distinct": 0.6},
]


@torch.no_grad()
@pytest.mark.parametrize("noised", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_decoder_written_as_loops(case: dict, noised: int, make_tokens: Callable, stir: Callable) -> None:
    decoder = decoder_of(stir, **case)
    levels = [torch.randn(2, DIM, 4, 6), torch.randn(2, DIM, 2, 3)]
    memory, count = make_tokens(levels), 12 + noised
    content, reference = torch.randn(2, count, DIM), crowd(2, count)
    mask = torch.zeros(count, count, dtype=torch.bool)
    mask[noised:, :noised] = True  # matching queries do not see noised boxes
    blind = {(int(i), int(j)) for i, j in mask.nonzero()}
    found = decoder(QueryGroup(content, reference), memory, mask if noised else None, matching=slice(noised, None))
    left = 0
    for image in range(2):
        alone = make_tokens([x[image, None] for x in levels])
        expected = plain_decoder(decoder, content[image], reference[image], alone, blind=blind, matching=noised)
        for layer, (logits, boxes, taking_part) in enumerate(expected):
            torch.testing.assert_close(found.boxes[layer, image], boxes, atol=1e-5, rtol=1e-4)
            out = [q for q in range(noised, count) if q not in taking_part]
            left += len(out)
            counted = [q for q in range(count) if q not in out]
            torch.testing.assert_close(found.logits[layer, image, counted], logits[counted], atol=1e-5, rtol=1e-4)
            assert (found.logits[layer, image, out] == BACKGROUND_LOGIT).all()
            if found.counted is not None:
                assert found.counted[layer, image].nonzero()[:, 0].tolist() == counted
    assert (left > 0) is ("distinct" in case), "the case must select something"
    assert (found.counted is None) is ("distinct" not in case)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES[:1] + CASES[-1:], ids=str)
def test_an_image_is_the_same_alone_and_beside_others(case: dict, make_tokens: Callable, stir: Callable) -> None:
    decoder = decoder_of(stir, **case)
    levels = [torch.randn(3, DIM, 4, 6), torch.randn(3, DIM, 2, 3)]
    queries = QueryGroup(torch.randn(3, 12, DIM), crowd(3, 12))
    together = decoder(queries, make_tokens(levels, 2))
    for image in range(3):
        alone = decoder(
            QueryGroup(queries.content[image, None], queries.reference[image, None]),
            make_tokens([x[image, None] for x in levels]),
        )
        assert torch.equal(together.counted[:, image], alone.counted[:, 0])
        torch.testing.assert_close(together.logits[:, image], alone.logits[:, 0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_one_query_stays(make_tokens: Callable, stir: Callable) -> None:
    memory = make_tokens([torch.randn(1, DIM, 4, 6), torch.randn(1, DIM, 2, 3)])
    queries = QueryGroup(torch.randn(1, 1, DIM), crowd(1, 1))
    alone = decoder_of(stir, distinct=0.5)(queries, memory)
    assert alone.counted is not None and alone.counted.all()
    same = QueryGroup(queries.content.repeat(1, 5, 1), queries.reference.repeat(1, 5, 1))
    found = decoder_of(stir, distinct=0.5)(same, memory)  # equal boxes and scores: the first stays
    assert found.counted is not None
    assert found.counted[0].all() and (found.counted[1:] == torch.tensor([1, 0, 0, 0, 0]).bool()).all()


def test_the_relation_reaches_its_layer_and_not_the_boxes(make_tokens: Callable, stir: Callable) -> None:
    decoder = decoder_of(stir, relation=True, num_layers=2)
    assert decoder.relation is not None
    decoder.relation.project.bias.data += 1.0
    memory = make_tokens([torch.randn(1, DIM, 4, 6), torch.randn(1, DIM, 2, 3)])
    found = decoder(QueryGroup(torch.randn(1, 6, DIM), crowd(1, 6)), memory)
    found.logits[1].sum().backward()
    assert decoder.relation.project.weight.grad is not None and decoder.relation.project.weight.grad.any()
    boxes = crowd(1, 4).requires_grad_()
    assert not decoder.relation(boxes, boxes).sum().isnan()
    (grad,) = torch.autograd.grad(decoder.relation(boxes, boxes).sum(), [boxes], allow_unused=True)
    assert grad is None
    assert decoder_of(stir, relation=True, num_layers=1).relation is None  # nothing would read it


def test_boxes_without_area_have_a_relation() -> None:
    relation = PositionRelation(num_heads=HEADS)
    boxes = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0], [0.0, 1.0, 1e-6, 1.0]]])
    found = relation(boxes, boxes)
    assert found.isfinite().all() and (found >= 0).all()
    torch.testing.assert_close(found[0], relation_by_hand(relation, boxes[0], boxes[0]), atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_the_relation_works_in_half_precision(make_tokens: Callable, stir: Callable) -> None:
    decoder = decoder_of(stir, relation=True, distinct=0.5)
    memory = make_tokens([torch.randn(1, DIM, 4, 6), torch.randn(1, DIM, 2, 3)])
    queries = QueryGroup(torch.randn(1, 6, DIM), crowd(1, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(queries, memory).boxes.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("query_levels", [None, 1])
def test_memory_of_all_encoder_layers(query_levels: int | None, make_tokens: Callable, stir: Callable) -> None:
    settings: dict[str, Any] = dict(dim=8, num_heads=2, num_levels=2, num_points=2, ffn_dim=16, dropout=0.0)
    encoder = DeformableEncoder(num_layers=3, query_levels=query_levels, fusion=True, **settings)
    stir(encoder)
    tokens = make_tokens([torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)])
    after = [tokens.values]
    for count in (1, 2, 3):
        shorter = DeformableEncoder(num_layers=count, query_levels=query_levels, **settings)
        shorter.load_state_dict(
            {key: value for key, value in encoder.state_dict().items() if key in shorter.state_dict()}
        )
        after.append(shorter(tokens).values)
    assert encoder.fusion is not None
    first, _, second, norm = encoder.fusion
    expected = norm(second(first(torch.cat(after, dim=-1)).relu()))
    torch.testing.assert_close(encoder(tokens).values, expected, atol=1e-5, rtol=1e-4)


TRAINING_ONLY = ("hybrid_source.", "hybrid_heads.", "start.head.hybrid_", "denoising.")


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddq_detr_r50", "paq_ddq_detr_r50", "relation_detr_r50", "paq_relation_detr_r50"])
def test_without_what_exists_in_training_alone_detections_are_the_same(
    name: str, tiny_model: Callable, make_targets: Callable, stir: Callable
) -> None:
    model: Detector = tiny_model(name).eval()
    bare: Detector = tiny_model(name, **{"model.hybrid_ratio": 0.0, "model.denoising": "none"}).eval()
    for part in model.children():
        if part is not model.backbone:
            stir(part)
    left_out = model.state_dict().keys() - bare.state_dict().keys()
    assert left_out and all(key.startswith(TRAINING_ONLY) for key in left_out)
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if key not in left_out})
    images = torch.randn(2, 3, 96, 128)
    assert torch.equal(model(images).pred_logits, bare(images).pred_logits)
    assert torch.equal(model(images).pred_boxes, bare(images).pred_boxes)
    output = model.train()(images, None, make_targets(2, 0))
    assert output.hybrid is not None and output.hybrid.logits.shape[2] == model.config.num_hybrid
    assert output.hybrid_proposals is not None and output.hybrid_proposals.boxes.shape[1] == model.config.num_hybrid
    assert output.proposals is not None and output.proposals.boxes.shape[1] == model.config.num_queries
    torch.testing.assert_close(output.pred_boxes, bare.train()(images).pred_boxes, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_content_is_the_mapped_token_of_the_memory(tiny_model: Callable, make_tokens: Callable, stir: Callable) -> None:
    model: Detector = tiny_model("ddq_detr_r50").eval()
    stir(model.start)
    features = make_tokens([torch.randn(1, 32, h, w) for h, w in ((6, 8), (3, 4), (2, 2), (1, 1))])
    output, memory = model.detect(features), model.encoder(features)
    assert output.proposals is not None
    linear = model.query_source.linear  # type: ignore[union-attr]
    for query, token in enumerate(output.proposals.indices[0].tolist()):
        torch.testing.assert_close(
            output.mixture.content[0, query], linear(memory.values[0, token]), atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddq_detr_nano", "relation_detr_nano"])
def test_classes_and_queries_can_be_changed(name: str) -> None:
    model = create_model(name, num_classes=4, num_queries=30, backbone="test_resnet")
    for head in (model.start.head.hybrid_class_head, model.decoder.class_heads[1]):  # type: ignore[union-attr]
        torch.nn.init.normal_(head.weight)
    changed, _ = reshape(model, classes=["x", *model.classes.names[1:3]], num_queries=20)
    assert changed.config.num_hybrid == int(20 * model.config.hybrid_ratio)
    old, new = model.state_dict(), changed.state_dict()
    for key in ("start.head.hybrid_class_head.weight", "decoder.class_heads.1.weight"):
        assert torch.equal(new[key][1:], old[key][1:3])
    if name.startswith("relation"):
        assert torch.equal(new["hybrid_source.table"], old["hybrid_source.table"][: changed.config.num_hybrid])


@pytest.mark.parametrize(
    ("name", "key", "value", "needs"),
    [
        ("dab_deformable_detr_nano", "queries", "tokens", "positions=proposals"),
        ("dab_deformable_detr_nano", "hybrid_ratio", 1.5, "positions=proposals"),
        ("deformable_detr_nano", "hybrid_heads", "encoder", "class_agnostic_proposals=false"),
        ("deformable_detr_one_stage_nano", "distinct_queries", 0.8, "box_refinement=true"),
        ("deformable_detr_one_stage_nano", "position_relation", True, "box_refinement=true"),
    ],
)
def test_settings_that_no_host_combines(name: str, key: str, value: object, needs: str) -> None:
    with pytest.raises(ConfigError, match=needs):
        load_config(name, {f"model.{key}": value})


@pytest.mark.parametrize("name", ["dab_deformable_detr_r50", "deformable_detr_refine_r50", "deformable_detr_plus_r50"])
def test_any_host_that_refines_boxes_takes_both(name: str, tiny_model: Callable, stir: Callable) -> None:
    model = tiny_model(name, **{"model.position_relation": True, "model.distinct_queries": 0.5})
    stir(model.decoder)
    output = model.eval()(torch.randn(1, 3, 64, 96))
    assert output.pred_boxes.isfinite().all() and output.layers.counted is not None
    output.layers.boxes.sum().backward()
    assert model.decoder.relation.project.weight.grad is not None
