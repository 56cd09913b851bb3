"""Converted weights against a slow reference of the original codes, which works on the original names alone.

The reference is written from the facts in docs/convert.md, per source: order and scale of the sine terms, which reference boxes
carry on, what is normed, how proposals are ranked. It shares nothing with the package; backbones are torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.models.swin_transformer import SwinTransformer

from paqdetr.convert import COCO, convert_checkpoint

pytestmark = pytest.mark.integration

DIM, HEADS, POINTS, QUERIES = 128, 4, 3, 7
LEFT = -50.0  # our logit of queries that are left out of the detections
State = dict[str, Tensor]

OFFICIAL = {
    "encoder": "transformer.encoder.layers.{}.",
    "decoder": "transformer.decoder.layers.{}.",
    "encoder_attention": "self_attn.",
    "encoder_norms": ("norm1.", "norm2."),
    "self_attention": "self_attn.",
    "cross_attention": "cross_attn.",
    "decoder_norms": (
        "norm2.",
        "norm1.",
        "norm3.",
    ),  # after self-attention, after cross-attention, after the feed-forward block
    "linear1": "linear1.",
    "linear2": "linear2.",
    "level_embed": "transformer.level_embed",
}
DETREX = OFFICIAL | {
    "encoder_attention": "attentions.0.",
    "encoder_norms": ("norms.0.", "norms.1."),
    "self_attention": "attentions.0.attn.",
    "cross_attention": "attentions.1.",
    "decoder_norms": ("norms.0.", "norms.1.", "norms.2."),
    "linear1": "ffns.0.layers.0.0.",
    "linear2": "ffns.0.layers.1.",
    "level_embed": "transformer.level_embeds",
}
MMDET = DETREX | {
    "encoder": "encoder.layers.{}.",
    "decoder": "decoder.layers.{}.",
    "encoder_attention": "self_attn.",
    "self_attention": "self_attn.attn.",
    "cross_attention": "cross_attn.",
    "linear1": "ffn.layers.0.0.",
    "linear2": "ffn.layers.1.",
    "level_embed": "level_embed",
}
CO_DETR = DETREX | {
    "encoder": "query_head.transformer.encoder.layers.{}.",
    "decoder": "query_head.transformer.decoder.layers.{}.",
    "level_embed": "query_head.transformer.level_embeds",
}
RELATION = OFFICIAL | {"level_embed": "transformer.level_embeds"}

DINO_LIKE = {"eps": 1e-3, "norm": True, "twice": True, "host": "dino"}
VARIANTS: dict[str, dict[str, Any]] = {
    "dino": DINO_LIKE | {"names": OFFICIAL, "temperature": 20, "offset": 0.0},
    "dino unshared": DINO_LIKE | {"names": OFFICIAL, "temperature": 20, "offset": 0.0},
    "dino swin": DINO_LIKE | {"names": OFFICIAL, "temperature": 20, "offset": 0.0},
    "dino 5scale swin": DINO_LIKE | {"names": OFFICIAL, "temperature": 20, "offset": 0.0},
    "detrex dino": DINO_LIKE | {"names": DETREX, "temperature": 10000, "offset": -0.5},
    "detrex dino swin": DINO_LIKE | {"names": DETREX, "temperature": 10000, "offset": -0.5},
    **{
        name: DINO_LIKE | {"names": MMDET, "temperature": 20, "offset": 0.0, "report_eps": 1e-5}
        for name in ("mmdet dino", "mmdet dino swin", "ddq", "ddq swin")
    },
    **{
        name: DINO_LIKE | {"names": CO_DETR, "temperature": 20, "offset": 0.0}
        for name in ("co-detr", "co-detr swin", "co-detr project swin")
    },
    **{
        name: DINO_LIKE | {"names": RELATION, "temperature": 10000, "offset": -0.5}
        for name in ("relation", "relation dino", "relation swin")
    },
    "dn_detr": {"names": OFFICIAL, "temperature": 10000, "offset": -0.5, "eps": 1e-3, "host": "dn"},
    "detrex dn": {"names": DETREX, "temperature": 10000, "offset": -0.5, "eps": 1e-3, "host": "dn"},
    "detrex dn newer": {"names": DETREX, "temperature": 10000, "offset": -0.5, "eps": 1e-3, "host": "dn"},
    **{
        f"deformable {kind}": {"names": OFFICIAL, "temperature": 10000, "offset": -0.5, "eps": 1e-5, "host": kind}
        for kind in ("one-stage", "single scale", "refine", "two-stage")
    },
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_boxes_and_scores_equal_the_originals(variant: str, make_original: Callable[[str], Any]) -> None:
    original = make_original(variant)
    for key in ("transformer.enc_out_class_embed.bias", "transformer.encoder_class_head.bias"):
        if key in original.state:  # slots without a class never had an object, so in a trained model they never win
            original.state[key][[i for i in range(91) if i not in COCO.ids]] = -100.0
    if original.origin == "ddq":  # large boxes, so that some overlap by more than 0.8
        original.state["bbox_head.reg_branches.0.4.bias"][2:] = 5.0
    elif original.origin == "mmdet_dino":  # boxes on the border, where the two clamps differ
        original.state["bbox_head.reg_branches.0.4.bias"][:] = -8.0
    given = {"num_heads": HEADS, "num_queries": QUERIES}
    model, _ = convert_checkpoint(original.save(), origin=original.origin, settings=given)
    images, mask = _batch(256 if "swin" in variant else 96)
    state = {key: value.double() if value.is_floating_point() else value for key, value in original.state.items()}
    with torch.no_grad():
        logits, boxes = Reference(state, VARIANTS[variant])(images, mask)
        found = model.double()(images, mask)
    torch.testing.assert_close(found.layers.boxes, boxes, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(found.layers.logits, logits, atol=1e-7, rtol=1e-7)
    assert bool((logits == LEFT).any()) is (original.origin == "ddq")


# Of a picture of 100 x 133 at 96 / 160: the size it is resized to (127.68 pixels wide), the size it runs at, detections that
# are kept, and whether they are cut off at the border. Sources: docs/convert.md, "Images and detections".
END_TO_END = {
    "dino": ((96, 127), (96, 127), 300, False),
    "dn_detr": ((96, 127), (96, 127), 100, False),
    "deformable refine": ((96, 127), (96, 127), 100, False),
    "deformable two-stage": ((96, 127), (96, 127), 100, False),
    "detrex dino": ((96, 128), (96, 128), 300, True),
    "detrex dn": ((96, 128), (96, 128), 100, True),
    "mmdet dino": ((96, 128), (96, 128), 300, True),
    "ddq": ((96, 128), (96, 128), 300, True),
    "relation": ((96, 127), (96, 128), 300, False),
}


@pytest.mark.parametrize("variant", list(END_TO_END))
def test_predictions_equal_the_originals_from_picture_to_boxes(
    variant: str, make_original: Callable[[str], Any]
) -> None:
    original = make_original(variant)
    (height, width), (tall, wide), most, clamped = END_TO_END[variant]
    settings = {"num_heads": HEADS, "num_queries": QUERIES, "image_size": [96, 160]}
    for key in ("transformer.enc_out_class_embed.bias", "transformer.encoder_class_head.bias"):
        if key in original.state:
            original.state[key][[i for i in range(91) if i not in COCO.ids]] = -100.0
    for key in original.state:
        if ("bbox" in key and key.endswith("layers.2.bias")) or ("reg_branches" in key and key.endswith("4.bias")):
            original.state[key][2:] = 3.0  # boxes that are large enough to leave the picture
    model, report = convert_checkpoint(original.save(), origin=original.origin, settings=settings)
    noise = np.random.default_rng(0).integers(0, 256, (100, 133, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((133, 100))

    if variant == "relation":  # resizes tensors
        pixels = torchvision.transforms.v2.functional.resize(
            torch.from_numpy(np.array(picture)).permute(2, 0, 1), [height, width], antialias=True
        )
    else:
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    mean, std = (torch.tensor(x).double()[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = F.pad((pixels.double() / 255 - mean) / std, (0, wide - width, 0, tall - height))[None]
    mask = torch.ones(1, tall, wide, dtype=torch.bool)
    mask[:, :height, :width] = False
    state = {key: value.double() if value.is_floating_point() else value for key, value in original.state.items()}
    with torch.no_grad():
        logits, boxes = (x[-1, 0] for x in Reference(state, VARIANTS[variant])(images, mask))
    best = logits.sigmoid().flatten().topk(most)
    chosen = boxes[best.indices // 80]
    corners = torch.cat([chosen[:, :2] - chosen[:, 2:] / 2, chosen[:, :2] + chosen[:, 2:] / 2], 1)
    assert corners.min() < -0.01 or corners.max() > 1.01
    expected = (corners.clamp(0, 1) if clamped else corners) * torch.tensor([133, 100, 133, 100])

    (found,) = model.predict(picture, threshold=0.0)
    assert found.scores == pytest.approx(best.values.numpy(), abs=1e-5)
    assert found.labels.tolist() == [COCO.ids[index % 80] for index in best.indices.tolist()]
    assert np.abs(found.boxes - expected.numpy()).max() < 0.01
    assert report.settings["max_detections"].value == most


def _batch(height: int) -> tuple[Tensor, Tensor]:
    """Two images, the second padded at the right and the bottom."""
    width = height * 5 // 4
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
    mask = torch.zeros(2, height, width, dtype=torch.bool)
    mask[1, height * 2 // 3 :] = True
    mask[1, :, width * 3 // 4 :] = True
    return images.masked_fill(mask[:, None], 0.0), mask


class Reference:
    """The published codes, one step after the other."""

    def __init__(self, state: State, facts: dict[str, Any]) -> None:
        self.state, self.facts = state, facts
        self.names, self.host = facts["names"], facts["host"]

    def __call__(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (K, B, n, 80) and boxes (K, B, n, 4)."""
        maps = self.levels(self.backbone(images))
        masks = [F.interpolate(mask[None].double(), size=x.shape[-2:])[0].bool() for x in maps]
        shapes = [tuple(x.shape[-2:]) for x in maps]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        padding = torch.cat([m.flatten(1) for m in masks], 1)
        embed = self.state[self.names["level_embed"]]
        position = torch.cat([self.sine_map(m) + embed[i] for i, m in enumerate(masks)], 1)
        ratios = torch.stack(
            [torch.stack([(~m[:, 0]).double().mean(1), (~m[:, :, 0]).double().mean(1)], -1) for m in masks], 1
        )  # (B, L, 2), x first
        centers = torch.cat([self.centers(m) for m in masks], 1)
        memory = self.encode(tokens, position, centers[:, :, None] * ratios[:, None], shapes, padding)
        content, place, reference = self.start(memory, centers, shapes, padding)
        return self.decode(content, place, reference, memory, shapes, padding, ratios)

    # Pieces

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}weight"], self.state[f"{name}bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.state[f"{name}weight"]
        return F.layer_norm(x, weight.shape, weight, self.state[f"{name}bias"])

    def mlp(self, name: str, x: Tensor) -> Tensor:
        names = sorted(
            key.removesuffix("weight") for key in self.state if key.startswith(f"{name}.") and key.endswith("weight")
        )
        for i, layer in enumerate(names):
            x = self.linear(layer, x)
            x = x.relu() if i + 1 < len(names) else x
        return x

    def first(self, *names: str) -> str:
        """The name of these that the program uses."""
        return next(name for name in names if any(key.startswith(name) for key in self.state))

    def backbone(self, images: Tensor) -> list[Tensor]:
        prefix = next(
            p for p in ("backbone.0.body.", "backbone.0.", "backbone.") if any(k.startswith(p) for k in self.state)
        )
        own = {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}
        return _swin(own, images) if any("relative_position" in key for key in own) else _resnet(own, images)

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """1x1 convolutions read the coarsest maps, one each; the first 3x3 reads the last map, further ones the last level."""
        if "neck.convs.0.conv.weight" in self.state:
            extra = [f"neck.extra_convs.{i}.{{}}." for i in range(1)]
            laterals = sum(key.startswith("neck.convs.") and key.endswith("conv.weight") for key in self.state)
            names = [f"neck.convs.{i}.{{}}." for i in range(laterals)] + extra
            norm = "gn" if "neck.convs.0.gn.weight" in self.state else "norm"
            convs, norms = [n.format("conv") for n in names], [n.format(norm) for n in names]
        else:
            home = "neck.convs" if "neck.convs.0.0.weight" in self.state else "input_proj"
            count = sum(key.startswith(home) and key.endswith(".0.weight") for key in self.state)
            convs, norms = ([f"{home}.{i}.{j}." for i in range(count)] for j in (0, 1))
        laterals = sum(self.state[f"{c}weight"].shape[-1] == 1 for c in convs)
        inputs, levels = maps[-laterals:], []
        for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
            weight, bias = self.state[f"{conv}weight"], self.state.get(f"{conv}bias")
            if i < laterals:
                x = F.conv2d(inputs[i], weight, bias)
            else:
                x = F.conv2d(inputs[-1] if i == laterals else levels[-1], weight, bias, stride=2, padding=1)
            levels.append(F.group_norm(x, 32, self.state[f"{norm}weight"], self.state[f"{norm}bias"]))
        return levels

    def sine_map(self, mask: Tensor) -> Tensor:
        """(B, h, w) -> (B, h * w, d): y then x, sine and cosine in turn."""
        parts = []
        for axis in (1, 2):
            count = (~mask).double().cumsum(axis)
            last = count[:, -1:] if axis == 1 else count[:, :, -1:]
            angle = (count + self.facts["offset"]) / (last + 1e-6) * 2 * math.pi
            parts.append(_waves(angle, DIM // 2, self.facts["temperature"]))
        return torch.cat(parts, -1).flatten(1, 2)

    @staticmethod
    def centers(mask: Tensor) -> Tensor:
        _, height, width = mask.shape
        rows, columns = (~mask[:, :, 0]).sum(1).double(), (~mask[:, 0]).sum(1).double()
        y = (torch.arange(height).double() + 0.5)[None] / rows[:, None]
        x = (torch.arange(width).double() + 0.5)[None] / columns[:, None]
        return torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1).flatten(1, 2)

    def deformable(
        self, name: str, query: Tensor, reference: Tensor, memory: Tensor, shapes: list[Any], padding: Tensor
    ) -> Tensor:
        """reference: (B, Q, L, 2 or 4)."""
        batch, count, _ = query.shape
        levels = len(shapes)
        value = self.linear(f"{name}value_proj.", memory).masked_fill(padding[..., None], 0)
        offsets = self.linear(f"{name}sampling_offsets.", query).view(batch, count, HEADS, levels, POINTS, 2)
        weights = self.linear(f"{name}attention_weights.", query).view(batch, count, HEADS, levels * POINTS)
        weights = weights.softmax(-1).view(batch, count, HEADS, levels, POINTS)
        result, start = torch.zeros(batch, count, HEADS, DIM // HEADS, dtype=query.dtype), 0
        for level, (height, width) in enumerate(shapes):
            part = value[:, start : start + height * width].view(batch, height, width, HEADS, DIM // HEADS)
            start += height * width
            center = reference[:, :, None, level, None]
            move = offsets[:, :, :, level]
            if reference.shape[-1] == 2:
                place = center + move / torch.tensor([width, height])
            else:
                place = center[..., :2] + move / POINTS * center[..., 2:] * 0.5
            for head in range(HEADS):
                sampled = F.grid_sample(
                    part[..., head, :].permute(0, 3, 1, 2), 2 * place[:, :, head] - 1, align_corners=False
                )  # (B, c, Q, P)
                result[:, :, head] += (sampled * weights[:, None, :, head, level]).sum(-1).transpose(1, 2)
        return self.linear(f"{name}output_proj.", result.flatten(2))

    def encode(self, x: Tensor, position: Tensor, reference: Tensor, shapes: list[Any], padding: Tensor) -> Tensor:
        after = [x]
        for i in range(2):
            layer = self.names["encoder"].format(i)
            first, second = (layer + norm for norm in self.names["encoder_norms"])
            name = layer + self.names["encoder_attention"]
            x = self.norm(first, x + self.deformable(name, x + position, reference, x, shapes, padding))
            x = self.norm(second, x + self.feed_forward(layer, x))
            after.append(x)
        fusion = "transformer.encoder.memory_fusion."
        if f"{fusion}0.weight" in self.state:
            x = self.linear(f"{fusion}0.", torch.cat(after, -1)).relu()
            x = self.norm(f"{fusion}3.", self.linear(f"{fusion}2.", x))
        return x

    def feed_forward(self, layer: str, x: Tensor) -> Tensor:
        inner = self.linear(layer + self.names["linear1"], x).relu()
        return self.linear(layer + self.names["linear2"], inner)

    def start(
        self, memory: Tensor, centers: Tensor, shapes: list[Any], padding: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Content (B, n, d), a fixed position or None, and boxes or points in [0, 1]."""
        batch = memory.shape[0]
        if self.host == "dn":
            table = F.pad(self.state["tgt_embed.weight"], (0, 1))  # the indicator comes last
            return (
                table.expand(batch, -1, -1),
                None,
                self.state["refpoint_embed.weight"].sigmoid().expand(batch, -1, -1),
            )
        if "query_embed.weight" in self.state:
            position, content = self.state["query_embed.weight"].split(DIM, 1)
            points = self.linear("transformer.reference_points.", position).sigmoid()
            return (x.expand(batch, -1, -1) for x in (content, position, points))  # type: ignore[return-value]
        sides = torch.cat([torch.full((h * w,), 0.05 * 2.0**i) for i, (h, w) in enumerate(shapes)]).double()
        anchors = torch.cat([centers, sides[None, :, None].expand(batch, -1, 2)], -1)
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~padding
        logits = (anchors / (1 - anchors)).log().masked_fill(~valid[..., None], math.inf)
        project = self.first("transformer.enc_output.", "memory_trans_fc.", "query_head.transformer.enc_output.")
        x = self.linear(project, memory.masked_fill(~valid[..., None], 0))
        x = self.norm(
            self.first("transformer.enc_output_norm.", "memory_trans_norm.", "query_head.transformer.enc_output_norm."),
            x,
        )
        class_head, box_head = self.encoder_heads()
        scores = self.linear(class_head, x)
        ranked = scores[..., 0] if self.host == "two-stage" else scores.amax(-1)
        # The one difference: the originals rank masked tokens too, all of which have the score of a token of zeros.
        best = ranked.masked_fill(~valid, -math.inf).topk(QUERIES, 1).indices
        if "query_map.weight" in self.state:
            every = (self.mlp(box_head, x) + logits).sigmoid()
            usable = [row.nonzero()[:, 0].tolist() for row in valid]
            chosen = [_suppress(*image)[:QUERIES] for image in zip(every, ranked, usable, strict=True)]
            best = torch.tensor(chosen)
        pick = best[..., None].expand(-1, -1, 4)
        boxes = (self.mlp(box_head, x) + logits).gather(1, pick).sigmoid()
        if "query_map.weight" in self.state:
            tokens = memory.gather(1, best[..., None].expand(-1, -1, DIM))
            return self.linear("query_map.", tokens), None, boxes
        if self.host == "two-stage":
            sine = _waves(boxes * 2 * math.pi, DIM // 2, 10000).flatten(-2)  # x, y, w, h
            embedded = self.norm("transformer.pos_trans_norm.", self.linear("transformer.pos_trans.", sine))
            position, content = embedded.split(DIM, -1)
            return content, position, boxes
        table = self.first(
            "transformer.tgt_embed.weight", "query_embedding.weight", "query_head.transformer.query_embed.weight"
        )
        return self.state[table].expand(batch, -1, -1), None, boxes

    def encoder_heads(self) -> tuple[str, str]:
        for class_head, box_head in (
            ("transformer.enc_out_class_embed.", "transformer.enc_out_bbox_embed"),
            ("transformer.encoder_class_head.", "transformer.encoder_bbox_head"),
        ):
            if f"{class_head}weight" in self.state:
                return class_head, box_head
        classes, regress = self.heads()
        return classes.format(3), regress.format(3)  # past the three decoder layers

    def heads(self) -> tuple[str, str]:
        """Of decoder layer {}."""
        for classes, regress in (
            ("transformer.decoder.class_head.{}.", "transformer.decoder.bbox_head.{}"),
            ("bbox_head.cls_branches.{}.", "bbox_head.reg_branches.{}"),
            ("query_head.cls_branches.{}.", "query_head.reg_branches.{}"),
        ):
            if f"{classes.format(0)}weight" in self.state:
                return classes, regress
        return "class_embed.{}.", "bbox_embed.{}"

    def decode(
        self,
        x: Tensor,
        place: Tensor | None,
        reference: Tensor,
        memory: Tensor,
        shapes: list[Any],
        padding: Tensor,
        ratios: Tensor,
    ) -> tuple[Tensor, Tensor]:
        eps, logits, boxes = self.facts["eps"], [], []
        classes, regress = self.heads()
        decoder = self.first("transformer.decoder.", "decoder.", "query_head.transformer.decoder.")
        rows = torch.tensor(COCO.ids) if self.state[f"{classes.format(0)}weight"].shape[0] == 91 else torch.arange(80)
        bias, earlier = torch.zeros(len(x), HEADS, x.shape[1], x.shape[1]).double(), reference
        taking_part = [list(range(x.shape[1])) for _ in x]
        for i in range(3):
            layer = self.names["decoder"].format(i)
            scaled = reference[:, :, None] * ratios.repeat(1, 1, reference.shape[-1] // 2)[:, None]
            position = place
            if position is None:
                # Of the box on the padded image, by the valid ratio of the finest level: y, x, w, h.
                sine = _waves(scaled[:, :, 0][..., [1, 0, 2, 3]] * 2 * math.pi, DIM // 2, 10000).flatten(-2)
                position = self.mlp(f"{decoder}ref_point_head", sine)
                if "transformer.decoder.query_scale.layers.0.weight" in self.state and i:
                    position = position * self.mlp("transformer.decoder.query_scale", x)
            after_self, after_cross, after_ffn = (layer + norm for norm in self.names["decoder_norms"])
            x = self.norm(after_self, x + self.attend(layer + self.names["self_attention"], x, position, bias))
            name = layer + self.names["cross_attention"]
            x = self.norm(after_cross, x + self.deformable(name, x + position, scaled, memory, shapes, padding))
            x = self.norm(after_ffn, x + self.feed_forward(layer, x))
            state = self.norm(f"{decoder}norm.", x) if self.facts.get("norm") else x
            known = _logit(reference, eps)
            known = F.pad(known, (0, 4 - known.shape[-1]))
            logits.append(self.linear(classes.format(i), state)[..., rows])
            reported = F.pad(_logit(reference, self.facts.get("report_eps", eps)), (0, 4 - reference.shape[-1]))
            boxes.append((self.mlp(regress.format(i), state) + reported).sigmoid())
            for image, queries in enumerate(taking_part):
                logits[-1][image, [q for q in range(x.shape[1]) if q not in queries]] = LEFT
            if self.host not in ("one-stage", "single scale"):
                reference = (self.mlp(regress.format(i), x) + known).sigmoid()  # of the output before the norm
            if "transformer.decoder.position_relation_embedding.pos_proj.0.weight" in self.state:
                bias, earlier = self.relation(earlier, boxes[-1]), boxes[-1]
            if "query_map.weight" in self.state:  # scores of the output before the norm as well
                scores, bias = self.linear(classes.format(i), x).amax(-1), torch.zeros_like(bias)
                for image, queries in enumerate(taking_part):
                    kept = _suppress(reference[image], scores[image], queries)
                    out = torch.tensor([q not in kept for q in range(x.shape[1])])
                    bias[image, :, out[:, None] & out] = -math.inf
                    # Its code reads who takes part off the first row of the mask, which forbids nothing where query 0 stays.
                    taking_part[image] = list(range(x.shape[1])) if 0 in kept else kept
        return torch.stack(logits), torch.stack(boxes)

    def relation(self, boxes: Tensor, others: Tensor) -> Tensor:
        """(B, N, 4) twice -> (B, heads, N, N)"""
        name = "transformer.decoder.position_relation_embedding.pos_proj.0."
        center, size = boxes[:, :, None, :2], boxes[:, :, None, 2:] + 1e-5
        distance = ((center - others[:, None, :, :2]).abs() / size + 1).log()
        numbers = torch.cat([distance, (size / (others[:, None, :, 2:] + 1e-5)).log()], -1)
        waves = _waves(numbers * 100, 16, 10000).flatten(-2)
        return F.conv2d(waves.permute(0, 3, 1, 2), self.state[f"{name}weight"], self.state[f"{name}bias"]).relu()

    def attend(self, name: str, x: Tensor, position: Tensor, added: Tensor) -> Tensor:
        """Position is added to queries and keys, not to values; query, key and value rows are packed in this order."""
        weight, bias = self.state[f"{name}in_proj_weight"], self.state[f"{name}in_proj_bias"]
        inputs = (x + position, x + position, x)
        q, k, v = (
            F.linear(i, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for i, w, b in zip(inputs, weight.chunk(3), bias.chunk(3), strict=True)
        )
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(DIM // HEADS) + added).softmax(-1) @ v
        return self.linear(f"{name}out_proj.", mixed.transpose(1, 2).flatten(2))


def _waves(angle: Tensor, dim: int, temperature: float) -> Tensor:
    """(...) -> (..., dim): sin(a / T^0), cos(a / T^0), sin(a / T^(2/dim)), ..."""
    waves = [f(angle / temperature ** (2 * i / dim)) for i in range(dim // 2) for f in (torch.sin, torch.cos)]
    return torch.stack(waves, -1)


def _suppress(boxes: Tensor, scores: Tensor, among: list[int]) -> list[int]:
    """Greedy suppression by IoU above 0.8, whatever the class: those that stay, best first."""
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    iou, kept = torchvision.ops.box_iou(corners, corners), []
    for i in sorted(among, key=lambda i: -scores[i].item()):
        if not kept or iou[i, kept].max() <= 0.8:
            kept.append(i)
    return kept


def _logit(x: Tensor, eps: float) -> Tensor:
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def _resnet(state: State, images: Tensor) -> list[Tensor]:
    """Maps of strides 4 to 32 of torchvision's ResNet-18."""
    if any(key.startswith("res2.") for key in state):  # detectron2's names
        state = {_torchvision_name(key): value for key, value in state.items()}
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d).double().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"fc.weight", "fc.bias"}
    x = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(images)))))
    maps = [x]
    for stage in (model.layer2, model.layer3, model.layer4):
        x = stage(x)
        maps.append(x)
    return maps


def _torchvision_name(key: str) -> str:
    key = key.removeprefix("stem.")
    for number in (2, 3, 4, 5):
        key = key.replace(f"res{number}.", f"layer{number - 1}.")
    key = key.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    for number in (1, 2, 3):
        key = key.replace(f"conv{number}.norm.", f"bn{number}.")
    return key


def _swin(state: State, images: Tensor) -> list[Tensor]:
    """Maps of strides 4 to 32 of torchvision's Swin-T, normed where the detector does."""
    if any("w_msa" in key for key in state):
        state = _official_swin(state)
    norms = {int(key[4]): key[:6] for key in state if key.startswith("norm") and key.endswith("weight")}
    renamed = {}
    for key, value in state.items():
        if key.startswith("norm"):
            continue
        if key.startswith("layers."):
            _, stage, rest = key.split(".", 2)
            index = 2 * int(stage) + (2 if rest.startswith("downsample") else 1)
            rest = rest.removeprefix("blocks.").removeprefix("downsample.")
            key = f"features.{index}.{rest}".replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        key = key.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2")
        if not key.endswith("relative_position_index"):
            renamed[key] = value
    model = SwinTransformer([4, 4], 96, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7]).double().eval()
    _, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected
    x, maps = images, []
    for index, block in enumerate(model.features):
        x = block(x)
        if index % 2:
            stage, y = index // 2, x
            if stage in norms:
                weight = state[f"norm{stage}.weight"]
                y = F.layer_norm(x, weight.shape, weight, state[f"norm{stage}.bias"])
            maps.append(y.permute(0, 3, 1, 2))
    return maps


def _official_swin(state: State) -> State:
    """mmdetection's names and order of merged cells -> those of the official code."""
    renamed = {}
    for key, value in state.items():
        if "downsample" in key:  # columns (channel, row, column) -> (column, row, channel)
            value = value.unflatten(-1, (-1, 2, 2)).movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3)
        for theirs, official in (
            ("stages.", "layers."),
            ("projection", "proj"),
            ("w_msa.", ""),
            ("ffn.layers.0.0", "mlp.fc1"),
            ("ffn.layers.1", "mlp.fc2"),
        ):
            key = key.replace(theirs, official)
        renamed[key] = value
    return renamed
