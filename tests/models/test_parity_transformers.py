"""Deformable DETR against the class of transformers: weights copied, outputs, losses and gradients compared.

An independent implementation of the same published code (fundamentalvision/Deformable-DETR), in its four forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paqdetr.config import load_config
from paqdetr.losses import build_criterion
from paqdetr.models.detector import Detector
from paqdetr.models.zoo import build_model
from paqdetr.structures import Targets

pytestmark = pytest.mark.integration

transformers = pytest.importorskip("transformers")

CLASSES, QUERIES, DIM, LAYERS = 7, 12, 128, 3  # 128: from there on both norm the neck in 32 groups
FORMS = ["deformable_detr_one_stage", "deformable_detr_refine", "deformable_detr"]


def theirs(form: str) -> nn.Module:
    """Their model with random weights, every one of them away from its start."""
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="resnet18", features_only=True, use_pretrained_backbone=False, out_indices=[2, 3, 4]
        ),
        num_queries=QUERIES,
        two_stage_num_proposals=QUERIES,
        num_labels=CLASSES,
        d_model=DIM,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        dropout=0.0,
        auxiliary_loss=True,
        with_box_refine=form != "deformable_detr_one_stage",
        two_stage=form == "deformable_detr",
        class_cost=2,
        tie_word_embeddings=form == "deformable_detr_one_stage",
    )
    model = transformers.DeformableDetrForObjectDetection(config)
    # One module under two names, as in the published code; tying in transformers would make all layers' heads one.
    if config.with_box_refine:
        model.model.decoder.bbox_embed = model.bbox_embed
    if config.two_stage:
        model.model.decoder.class_embed = model.class_embed
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if "backbone" in name and name.endswith("weight"):  # a norm that starts at zero would hide its branch
                buffer.uniform_(0.3, 0.7)
        if config.two_stage:  # what a padded token looks like scores low, as it does after training
            blank = model.model.enc_output_norm(model.model.enc_output.bias)
            model.class_embed[LAYERS].weight[0] -= blank / blank.norm()
    return model


def ours(form: str) -> Detector:
    return build_model(
        load_config(
            f"{form}_r50",
            {
                "model.backbone": "resnet18",
                "model.freeze_backbone_norm": True,
                "model.num_classes": CLASSES,
                "model.num_queries": QUERIES,
                "model.dropout": 0.0,
                "model.dim": DIM,
                "model.ffn_dim": 48,
                "model.num_heads": 4,
                "model.encoder_layers": LAYERS,
                "model.decoder_layers": LAYERS,
            },
        )
    )


def pairs(their: nn.Module, our: Detector) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(our name, our tensor, their tensor of the same meaning), written out by hand."""
    source, target = dict(their.state_dict(keep_vars=True)), dict(our.state_dict(keep_vars=True))
    config, two_stage = our.config, our.config.positions == "proposals"

    def same(name: str, other: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        for kind in ("weight", "bias"):
            yield f"{name}.{kind}", target[f"{name}.{kind}"], source[f"{other}.{kind}"]

    for key in target:
        if key.startswith("backbone.body.") and not key.endswith("num_batches_tracked"):
            name = key.removeprefix("backbone.body.")
            yield key, target[key], source[f"model.backbone.model.{name}"]
    for i in range(4):
        name = f"neck.lateral.{i}" if i < 3 else "neck.extra.0"
        yield from same(f"{name}.0", f"model.input_proj.{i}.0")
        yield from same(f"{name}.1", f"model.input_proj.{i}.1")
    yield "encoder.level_embed", target["encoder.level_embed"], source["model.level_embed"]
    sampling = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    for i in range(LAYERS):
        mine, other = f"encoder.layers.{i}", f"model.encoder.layers.{i}"
        for name in sampling:
            yield from same(f"{mine}.attention.{name}", f"{other}.self_attn.{name}")
        yield from same(f"{mine}.norm", f"{other}.self_attn_layer_norm")
        yield from same(f"{mine}.ffn.norm", f"{other}.final_layer_norm")
        for k in (1, 2):
            yield from same(f"{mine}.ffn.linear{k}", f"{other}.mlp.fc{k}")
        mine, other = f"decoder.layers.{i}", f"model.decoder.layers.{i}"
        for kind in ("weight", "bias"):
            packed = target[f"{mine}.self_attention.in_proj_{kind}"]
            for part, name in zip(packed.chunk(3), "qkv", strict=True):
                yield f"{mine}.{name}.{kind}", part, source[f"{other}.self_attn.{name}_proj.{kind}"]
        yield from same(f"{mine}.self_attention.out_proj", f"{other}.self_attn.o_proj")
        yield from same(f"{mine}.self_norm", f"{other}.self_attn_layer_norm")
        for name in sampling:
            yield from same(f"{mine}.cross_attention.{name}", f"{other}.encoder_attn.{name}")
        yield from same(f"{mine}.cross_norm", f"{other}.encoder_attn_layer_norm")
        yield from same(f"{mine}.ffn.norm", f"{other}.final_layer_norm")
        for k in (1, 2):
            yield from same(f"{mine}.ffn.linear{k}", f"{other}.mlp.fc{k}")
    for i in range(1 if config.share_heads else LAYERS):
        yield from same(f"decoder.class_heads.{i}", f"class_embed.{i}")
        for k in range(3):
            yield from same(f"decoder.box_heads.{i}.{2 * k}", f"bbox_embed.{i}.layers.{k}")
    if two_stage:
        yield from same("start.head.project", "model.enc_output")
        yield from same("start.head.norm", "model.enc_output_norm")
        for kind in ("weight", "bias"):  # one row of theirs says whether there is an object
            name = f"start.head.class_head.{kind}"
            yield name, target[name], source[f"class_embed.{LAYERS}.{kind}"][:1]
        for k in range(3):
            yield from same(f"start.head.box_head.{2 * k}", f"bbox_embed.{LAYERS}.layers.{k}")
        yield from same("start.embed.0", "model.pos_trans")
        yield from same("start.embed.1", "model.pos_trans_norm")
    else:
        table = source["model.query_position_embeddings.weight"]
        yield "start.position", target["start.position"], table[:, :DIM]
        yield "query_source.table", target["query_source.table"], table[:, DIM:]
        yield from same("start.point_head", "model.reference_points")


def twins(form: str, dtype: torch.dtype) -> tuple[nn.Module, Detector]:
    their, our = theirs(form).to(dtype).train(), ours(form).to(dtype).train()
    filled = 0
    with torch.no_grad():
        for _, mine, other in pairs(their, our):
            assert mine.shape == other.shape
            mine.copy_(other)
            filled += mine.numel()
    counted = sum(t.numel() for key, t in our.state_dict().items() if not key.endswith("num_batches_tracked"))
    assert filled == counted  # nothing of ours was left as it was
    return their, our


def padded_images(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two images of 128 x 160 whose valid parts are 128 x 96 and 96 x 160."""
    mask = torch.ones(2, 128, 160, dtype=torch.bool)
    mask[0, :128, :96] = False
    mask[1, :96, :160] = False
    images = torch.randn(2, 3, 128, 160, dtype=dtype).masked_fill(mask[:, None], 0.0)
    return images, mask


def made_targets(dtype: torch.dtype) -> list[Targets]:
    out = []
    for count in (4, 2):
        boxes = torch.cat([0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.3 * torch.rand(count, 2)], dim=1)
        out.append(Targets(torch.randint(CLASSES, (count,)), boxes.to(dtype)))
    return out


def run_theirs(model: nn.Module, images: Tensor, mask: Tensor, targets: list[Targets] | None = None) -> Any:
    labels = None
    if targets is not None:
        labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    return model(images, pixel_mask=(~mask).long(), labels=labels)


# Their two-stage proposals are computed in float32 whatever the model is.
TOLERANCE = {
    ("deformable_detr_one_stage", torch.float64): 1e-9,
    ("deformable_detr_refine", torch.float64): 1e-9,
    ("deformable_detr", torch.float64): 1e-5,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_all_layers(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    their, our = twins(form, dtype)
    images, mask = padded_images(dtype)
    with torch.no_grad():
        # Targets switch their auxiliary outputs on.
        expected = run_theirs(their, images, mask, made_targets(dtype))
        found = our(images, mask)
    bound = TOLERANCE.get((form, dtype), 1e-4)
    assert (found.pred_logits - expected.logits).abs().max() < bound
    assert (found.pred_boxes - expected.pred_boxes).abs().max() < bound
    assert len(expected.auxiliary_outputs) == LAYERS - 1
    for i, layer in enumerate(expected.auxiliary_outputs):
        assert (found.layers.logits[i] - layer["logits"]).abs().max() < bound
        assert (found.layers.boxes[i] - layer["pred_boxes"]).abs().max() < bound
    if our.config.positions == "proposals":
        all_tokens = found.proposals.all_tokens
        valid = all_tokens.valid
        logits, boxes = expected.enc_outputs_class[..., :1], expected.enc_outputs_coord_logits.sigmoid()
        assert valid.any() and not valid.all()
        assert (all_tokens.logits - logits)[valid].abs().max() < bound
        assert (all_tokens.boxes - boxes)[valid].abs().max() < bound
        # Theirs may also choose a token of the padding; the comparison above means something only if it did not.
        chosen = expected.enc_outputs_class[..., 0].topk(QUERIES, dim=1).indices
        assert torch.equal(found.proposals.indices, chosen) and valid.gather(1, chosen).all()


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_the_gradient_of_every_parameter(form: str) -> None:
    """Their loss says nothing of the encoder's proposals, so that in the two-stage form only the decoder's terms are compared."""
    torch.manual_seed(3)
    their, our = twins(form, torch.float64)
    images, mask = padded_images(torch.float64)
    targets = made_targets(torch.float64)
    expected = run_theirs(their, images, mask, targets)
    expected.loss.backward()

    report = build_criterion(load_config(f"{form}_r50", {"loss.class_weight": 1.0}).loss)(
        our(images, mask, targets), targets
    )
    ours_total = torch.stack([v for name, v in report.terms.items() if name.startswith("layer")]).sum()
    ours_total.backward()
    for i in range(LAYERS):
        suffix = "" if i == LAYERS - 1 else f"_{i}"
        for name, other, weight in (("class", "ce", 1), ("l1", "bbox", 5), ("giou", "giou", 2)):
            theirs_term = weight * expected.loss_dict[f"loss_{other}{suffix}"].item()
            assert report.terms[f"layer{i + 1}/{name}"].item() == pytest.approx(theirs_term, rel=1e-6)
    assert ours_total.item() == pytest.approx(expected.loss.item(), rel=1e-6)

    their_gradients = dict(_gradients(their, our))
    ours_gradients = {name: p.grad for name, p in our.named_parameters() if p.requires_grad}
    compared = 0
    for name, gradient in ours_gradients.items():
        other = their_gradients.get(name)
        if name.startswith("start.head."):
            assert gradient is None  # trained by the encoder's loss alone
            continue
        assert gradient is not None and other is not None, name
        scale = float(other.abs().max())
        assert scale > 0, name
        assert float((gradient - other).abs().max()) <= 1e-4 * scale, name
        compared += 1
    assert compared > 100


def _gradients(their: nn.Module, our: Detector) -> Iterator[tuple[str, Tensor]]:
    """Their gradients under our names, with q, k, v packed and the query table parted again."""
    grads = {key: p.grad for key, p in their.named_parameters(remove_duplicate=False)}
    holder = ours_like(our)
    by_id = {id(p): grads[key] for key, p in their.named_parameters(remove_duplicate=False)}
    packed: dict[str, list[Tensor]] = {}
    table = grads.get("model.query_position_embeddings.weight")
    for name, _, other in pairs(their, our):
        if name == "start.position" and table is not None:
            yield name, table[:, :DIM]
        elif name == "query_source.table" and table is not None:
            yield name, table[:, DIM:]
        elif id(other) in by_id and by_id[id(other)] is not None:
            stem, _, last = name.rpartition(".")
            if stem.rpartition(".")[2] in ("q", "k", "v") and stem.startswith("decoder.layers"):
                packed.setdefault(f"{stem.rpartition('.')[0]}.self_attention.in_proj_{last}", []).append(
                    by_id[id(other)]
                )
            else:
                yield name, by_id[id(other)]
    for name, parts in packed.items():
        assert name in holder and len(parts) == 3
        yield name, torch.cat(parts)


def ours_like(our: Detector) -> set[str]:
    return {name for name, _ in our.named_parameters()}
