"""The detectors of benchmarks/peers.py behind one face, all on the same backbone with the same ImageNet weights.

Each is its library's own class at the size of our nano models: 128 channels after the backbone, whose stem and first stages are
frozen. Where a published default was made for images of 800 pixels, it is scaled to the size given; everything else is the
library's default, except what `CNN_SETTINGS` and `DETR_SETTINGS` say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, box_convert
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from paqdetr.config import ModelConfig, load_config
from paqdetr.data.loader import Batch
from paqdetr.losses import build_criterion
from paqdetr.models.backbone import Backbone, normalization_of
from paqdetr.models.detector import Detector
from paqdetr.models.inference import detect_batch, postprocess
from paqdetr.models.zoo import build_model
from paqdetr.preprocessing import Preprocessing, pad_images
from paqdetr.structures import ClassTable, Detections

BACKBONE, STRIDES, FROZEN_STRIDE, WIDTH = "tf_efficientnet_lite0", (8, 16, 32), 8, 128
_MADE_FOR = 800  # pixels, the short side of COCO recipes

CNN_SETTINGS: dict[str, Any] = {
    "fcos": {"head_convs": 4, "levels": "P3-P7", "nms": 0.6},
    "retinanet": {
        "head_convs": 4,
        "levels": "P3-P7",
        "nms": 0.5,
        "anchors": "32-512 px at 800 px, 3 octaves, 3 aspects",
    },
    "faster_rcnn": {
        "levels": "P3-P5 and a pooled one",
        "anchors": "two sizes a level, 32-512 px at 800 px, 3 aspects",
        "rpn_proposals": "1000 before and 300 after suppression",
        "rois_per_image": 128,
        "box_head": "two layers of 512",
        "nms": 0.5,
    },
}
DETR_SETTINGS: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 3,
    "ffn": 512,
    "heads": 8,
    "form": "one-stage, box refinement, all three levels updated by the encoder",
}


@dataclass(slots=True)
class Peer:
    """A detector that is trained and evaluated.

    Attributes:
        model: with the backbone's parameters under `body`.
        loss: of a batch at a share of the training in [0, 1], the model being in training mode.
        detect: (model or its moving average, preprocessed images of one size, sizes (height, width) of the originals) -> what was
            found, in pixels of the originals.
        clip_norm: of the gradients.
        settings: what a reader has to know.
    """

    model: nn.Module
    body: nn.Module
    loss: Callable[[Batch, float], Tensor]
    detect: Callable[[nn.Module, list[Tensor], list[tuple[int, int]]], list[Detections]]
    clip_norm: float
    settings: dict[str, Any]


def build_peer(name: str, *, classes: ClassTable, image_size: int, settings: dict[str, Any]) -> Peer:
    """A detector by name, with ImageNet weights in its backbone.

    Args:
        name: one of `PEERS`.
        classes: of the data.
        image_size: the long side of an image in pixels.
        settings: of our own models, by dotted keys; of transformers' it takes `model.num_queries`.
    """
    return PEERS[name](name, classes, image_size, settings)


# --- our own


def _ours(name: str, classes: ClassTable, image_size: int, settings: dict[str, Any]) -> Peer:
    config = load_config(name, {**settings, "model.num_classes": len(classes), "image_size": image_size})
    model = build_model(config, classes=classes, pretrained_backbone=True)
    criterion = build_criterion(config.loss)

    def loss(batch: Batch, progress: float) -> Tensor:
        output = model(batch.images, batch.padding_mask, batch.targets)
        return criterion(output, batch.targets, aux_losses=model.aux_losses(), progress=progress).total

    def detect(averaged: nn.Module, images: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        return list(detect_batch(cast(Detector, averaged), images, sizes))

    return Peer(model, model.backbone, loss, detect, config.clip_norm, {"recipe": name})


# --- torchvision


class _AsTheyAre(nn.Module):
    """In the place of torchvision's transform: images are resized and normalised already."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        """Images (3, H, W) of one size -> a batch of them."""
        return ImageList(torch.stack(images), [(int(x.shape[1]), int(x.shape[2])) for x in images]), targets

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Boxes stay in pixels of the batch."""
        return result


class _Pyramid(nn.Module):
    """Our backbone and torchvision's feature pyramid."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.body = _backbone()
        self.fpn = FeaturePyramidNetwork(list(self.body.channels), WIDTH, extra_blocks=extra)
        self.out_channels = WIDTH

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> maps by name."""
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(images))))


def _torchvision(name: str, classes: ClassTable, image_size: int, settings: dict[str, Any]) -> Peer:
    scale = image_size / _MADE_FOR
    model = {"fcos": _fcos, "retinanet": _retinanet, "faster_rcnn": _faster_rcnn}[name](len(classes), scale)
    model.transform = cast(Any, _AsTheyAre())
    first = 1 if name == "faster_rcnn" else 0  # class 0 is background there

    def loss(batch: Batch, progress: float) -> Tensor:
        targets = []
        for index, target in enumerate(batch.targets):
            height, width = _valid_size(batch, index)
            pixels = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
            kept = ((pixels[:, 2:] - pixels[:, :2]) > 0).all(1)
            targets.append({"boxes": pixels[kept], "labels": target.labels[kept] + first})
        return torch.stack(list(model(list(batch.images), targets).values())).sum()

    def detect(averaged: nn.Module, images: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        batch, _ = pad_images(images)
        found = averaged(list(batch))
        return [
            _detections(row, image, size, classes, first) for row, image, size in zip(found, images, sizes, strict=True)
        ]

    pyramid = cast(_Pyramid, model.backbone)
    return Peer(model, pyramid.body, loss, detect, 10.0, CNN_SETTINGS[name])


def _fcos(num_classes: int, scale: float) -> nn.Module:
    return FCOS(_Pyramid(LastLevelP6P7(WIDTH, WIDTH)), num_classes, detections_per_img=300, score_thresh=0.01)


def _retinanet(num_classes: int, scale: float) -> nn.Module:
    octaves = tuple(tuple(round(scale * size * 2 ** (i / 3)) for i in range(3)) for size in (32, 64, 128, 256, 512))
    return RetinaNet(
        _Pyramid(LastLevelP6P7(WIDTH, WIDTH)),
        num_classes,
        anchor_generator=AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * 5),
        detections_per_img=300,
        score_thresh=0.01,
    )


def _faster_rcnn(num_classes: int, scale: float) -> nn.Module:
    # There is no level of stride 4 here, and every level has equally many anchors.
    sizes = tuple(tuple(round(scale * size) for size in row) for row in ((32, 64), (96, 128), (192, 256), (384, 512)))
    return FasterRCNN(
        _Pyramid(LastLevelMaxPool()),
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4),
        rpn_pre_nms_top_n_train=1000,
        rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_train=300,
        rpn_post_nms_top_n_test=300,
        box_roi_pool=_scaled_pool(scale),
        box_head=TwoMLPHead(WIDTH * 7 * 7, 512),
        box_predictor=FastRCNNPredictor(512, num_classes + 1),
        box_batch_size_per_image=128,
        box_detections_per_img=300,
        box_score_thresh=0.01,
    )


def _scaled_pool(scale: float) -> MultiScaleRoIAlign:
    """RoIs go to levels by their size; the canonical 224 pixels of the fourth level are those of a larger image."""
    return MultiScaleRoIAlign(["0", "1", "2"], 7, 2, canonical_scale=max(round(224 * scale), 1))


def _valid_size(batch: Batch, index: int) -> tuple[int, int]:
    """(height, width) of an image of the batch without its padding."""
    if batch.padding_mask is None:
        return int(batch.images.shape[2]), int(batch.images.shape[3])
    valid = ~batch.padding_mask[index]
    return int(valid.any(1).sum()), int(valid.any(0).sum())


def _detections(
    row: dict[str, Tensor], image: Tensor, size: tuple[int, int], classes: ClassTable, first: int
) -> Detections:
    """What torchvision found in a preprocessed image, in pixels of the original."""
    order = row["scores"].argsort(descending=True)
    stretch = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
    limit = torch.tensor([size[1], size[0]] * 2)
    boxes = torch.minimum((row["boxes"][order] * stretch).clamp(min=0), limit)
    ids = torch.tensor(classes.ids)[row["labels"][order] - first]
    return Detections(boxes.numpy().astype("float32"), row["scores"][order].numpy(), ids.numpy(), classes.id_to_name)


# --- transformers


def _deformable_detr(name: str, classes: ClassTable, image_size: int, settings: dict[str, Any]) -> Peer:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

    queries = int(settings.get("model.num_queries", 100))
    config = DeformableDetrConfig(
        backbone_config=TimmBackboneConfig(
            backbone=BACKBONE, features_only=True, use_pretrained_backbone=False, out_indices=[2, 3, 4]
        ),
        num_labels=len(classes),
        num_queries=queries,
        d_model=WIDTH,
        num_feature_levels=len(STRIDES),
        encoder_layers=DETR_SETTINGS["encoder_layers"],
        decoder_layers=DETR_SETTINGS["decoder_layers"],
        encoder_ffn_dim=DETR_SETTINGS["ffn"],
        decoder_ffn_dim=DETR_SETTINGS["ffn"],
        encoder_attention_heads=DETR_SETTINGS["heads"],
        decoder_attention_heads=DETR_SETTINGS["heads"],
        dropout=0.0,
        auxiliary_loss=True,
        with_box_refine=True,
        two_stage=False,  # its loss leaves the proposals of the two-stage form untrained
        class_cost=2,
        tie_word_embeddings=False,
    )
    model = DeformableDetrForObjectDetection(config)
    model.model.decoder.bbox_embed = model.bbox_embed  # one module under two names, as in the published code
    # Its own frozen norm would drop the activations that timm's EfficientNet keeps inside its norms.
    model.model.backbone.model = body = _backbone()

    def loss(batch: Batch, progress: float) -> Tensor:
        labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in batch.targets]
        return model(batch.images, pixel_mask=_mask(batch.images, batch.padding_mask), labels=labels).loss

    def detect(averaged: nn.Module, images: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        batch, padding = pad_images(images)
        found = averaged(batch, pixel_mask=_mask(batch, padding))
        return [
            postprocess(logits, boxes, size, classes, ModelConfig(), threshold=0.0)
            for logits, boxes, size in zip(found.logits, found.pred_boxes, sizes, strict=True)
        ]

    return Peer(model, body, loss, detect, 0.1, DETR_SETTINGS | {"num_queries": queries})


def _mask(images: Tensor, padding: Tensor | None) -> Tensor:
    """transformers' mask: (B, H, W) int64, 1 at the image."""
    if padding is None:
        return torch.ones(images.shape[0], *images.shape[2:], dtype=torch.int64)
    return (~padding).long()


def _backbone() -> Backbone:
    return Backbone(name=BACKBONE, strides=STRIDES, frozen_stride=FROZEN_STRIDE, pretrained=True)


def preprocessing_of(image_size: int) -> Preprocessing:
    """The same for all: the long side, sides in multiples of 32, and the backbone's normalisation."""
    return Preprocessing(image_size, 32, normalization_of(BACKBONE))


PEERS: dict[str, Callable[[str, ClassTable, int, dict[str, Any]], Peer]] = {
    "dino_nano": _ours,
    "paq_dino_nano": _ours,
    "deformable_detr_refine_nano": _ours,  # the form that transformers' has here
    "transformers_deformable_detr": _deformable_detr,
    "fcos": _torchvision,
    "retinanet": _torchvision,
    "faster_rcnn": _torchvision,
}
