"""What happens inside a detector while it looks at one image: proposals, where attention looks, boxes layer by layer, positives.

Hooks see what passes; weights, mode and result of the model stay what they are. Works for every host: what a host has not is None
or empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from paqdetr.config import LossConfig, load_config
from paqdetr.errors import ConfigError
from paqdetr.losses.criterion import Criterion
from paqdetr.models.attention import DeformableAttention
from paqdetr.models.decoder import DecoderLayer
from paqdetr.models.detector import Detector, DetectorOutput
from paqdetr.models.encoder import EncoderLayer
from paqdetr.models.queries import QueryGroup
from paqdetr.models.tokens import Tokens
from paqdetr.paq import QualityAwareAssigner
from paqdetr.paq.costs import matchables
from paqdetr.preprocessing import pad_images
from paqdetr.structures import Targets


@dataclass(frozen=True, slots=True)
class Sampling:
    """Where some queries of one layer look.

    Attributes:
        locations: (M, H, L, P, 2) float32, xy in [0, 1] of the image without padding; what lies outside reads zero.
        weights: (M, H, L, P) float32; over L and P they sum to 1.
    """

    locations: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class Inside:
    """One image on its way through the detector. Arrays are float32; boxes are cxcywh in [0, 1] of the image.

    Attributes:
        picture: the image, RGB.
        logits: (K, n, C) of the K decoder layers.
        boxes: (K, n, 4).
        start: (n, 4) boxes or (n, 2) points that the decoder starts from.
        proposals: (n, 4) boxes of the encoder, best first; None in one-stage hosts.
        proposal_scores: (n,) probability of their likeliest class, or of being an object; None likewise.
        chosen: (M,) int64, the queries whose sampling was recorded.
        decoder: their sampling in each decoder layer.
        encoder: sampling, in each encoder layer, of the token under the centre of each chosen query's final box.
        encoder_level: level of these tokens, from 0, the finest; the finest that the encoder updates.
    """

    picture: Image
    logits: np.ndarray
    boxes: np.ndarray
    start: np.ndarray
    proposals: np.ndarray | None
    proposal_scores: np.ndarray | None
    chosen: np.ndarray
    decoder: tuple[Sampling, ...]
    encoder: tuple[Sampling, ...]
    encoder_level: int

    @property
    def scores(self) -> np.ndarray:
        """(K, n) probability of the likeliest class."""
        return 1 / (1 + np.exp(-self.logits.max(-1)))

    @property
    def labels(self) -> np.ndarray:
        """(K, n) int64, the likeliest class."""
        return self.logits.argmax(-1)


@dataclass(frozen=True, slots=True)
class LayerPositives:
    """Who learns from which box in one decoder layer, for one image; P pairs, G boxes.

    Attributes:
        layer: from 1.
        query, target: (P,) int64.
        iou, confidence: (P,) float64; confidence is c of the assignment rule, the probability of the box's class if it has none.
        score: (P,) float64, s = IoU - gamma * c; None where the layer's rule knows no s.
        claims: (G,) int64, k_j; likewise.
    """

    layer: int
    query: np.ndarray
    target: np.ndarray
    iou: np.ndarray
    confidence: np.ndarray
    score: np.ndarray | None
    claims: np.ndarray | None


# --------------------------------------------------------------------------------------------- recording


@dataclass(slots=True)
class _Calls:
    """What went into the parts, in the order of the calls."""

    attention: dict[nn.Module, tuple[Any, ...]] = field(default_factory=dict)
    queries: QueryGroup | None = None
    memory: Tokens | None = None


@contextmanager
def _recording(model: Detector) -> Iterator[_Calls]:
    calls = _Calls()

    def see_attention(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        calls.attention[module] = arguments

    def see_decoder(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        calls.queries, calls.memory = arguments[0], arguments[1]

    handles = [
        module.register_forward_pre_hook(see_attention)
        for module in model.modules()
        if isinstance(module, DeformableAttention)
    ]
    handles.append(model.decoder.register_forward_pre_hook(see_decoder))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def look_inside(
    model: Detector, picture: Image, *, chosen: Sequence[int] | None = None, most: int = 3
) -> Inside:
    """Run a detector on one image, in evaluation mode, and keep what passes through it.

    Args:
        model: its mode and hooks are afterwards what they were.
        picture: RGB.
        chosen: queries whose sampling is kept; by default the surest ones that are not of the same place.
        most: of these, so many.
    """
    device = next(model.parameters()).device
    images, mask = pad_images([model.preprocessing(picture)], model.preprocessing.pad_divisor)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _recording(model) as calls:
            output = model(images.to(device), None if mask is None else mask.to(device))
            return _kept(model, picture, output, calls, chosen, most)
    finally:
        model.train(was_training)


def _kept(
    model: Detector,
    picture: Image,
    output: DetectorOutput,
    calls: _Calls,
    chosen: Sequence[int] | None,
    most: int,
) -> Inside:
    assert calls.queries is not None and calls.memory is not None
    logits, boxes = output.layers.logits[:, 0], output.layers.boxes[:, 0]
    rows = (
        _surest(logits[-1], boxes[-1], most)
        if chosen is None
        else torch.as_tensor(list(chosen), device=logits.device)
    )
    levels = model.encoder.query_levels
    tokens = _tokens_under(boxes[-1][rows, :2], calls.memory, levels)
    proposals = output.proposals
    return Inside(
        picture=picture,
        logits=_array(logits),
        boxes=_array(boxes),
        start=_array(calls.queries.reference[0]),
        proposals=None if proposals is None else _array(proposals.boxes[0]),
        proposal_scores=None if proposals is None else _array(proposals.logits[0].sigmoid().amax(-1)),
        chosen=rows.cpu().numpy(),
        decoder=tuple(
            _sampling(layer.cross_attention, calls, rows)
            for layer in model.decoder.layers
            if isinstance(layer, DecoderLayer)
        ),
        encoder=tuple(
            _sampling(layer.attention, calls, tokens)
            for layer in model.encoder.layers
            if isinstance(layer, EncoderLayer)
        ),
        encoder_level=len(calls.memory.spatial_shapes) - levels,
    )


def _sampling(attention: DeformableAttention, calls: _Calls, rows: Tensor) -> Sampling:
    """Of these queries; locations from the padded level to the image."""
    query, reference, _, spatial_shapes, _ = calls.attention[attention]
    locations, weights = attention.sampling(query[:1, rows], reference[:1, rows], spatial_shapes)
    assert calls.memory is not None
    ratios = calls.memory.valid_ratios[0][:, None]  # (L, 1, 2)
    return Sampling(locations=_array(locations[0] / ratios), weights=_array(weights[0]))


def _surest(logits: Tensor, boxes: Tensor, most: int) -> Tensor:
    """The surest queries, leaving out any that overlaps a surer one by more than half: (n, C), (n, 4) -> (M,)."""
    corners = box_convert(boxes.float(), "cxcywh", "xyxy")
    overlap = box_iou(corners, corners)
    chosen: list[int] = []
    for query in logits.amax(-1).argsort(descending=True, stable=True).tolist():
        if not chosen or float(overlap[query, chosen].max()) <= 0.5:
            chosen.append(query)
        if len(chosen) == most:
            break
    return torch.tensor(chosen, device=logits.device)


def _tokens_under(points: Tensor, memory: Tokens, levels: int) -> Tensor:
    """Places (M, 2) in [0, 1] -> (M,), the tokens of the finest updated level that hold them, counted among the updated."""
    level = len(memory.spatial_shapes) - levels
    height, width = memory.spatial_shapes[level]
    limits = torch.tensor([width, height], device=points.device)
    valid = (memory.valid_ratios[0, level] * limits).round()  # cells that are image
    cells = (points.clamp(0, 1) * valid).floor().long().clamp(max=valid.long() - 1)
    return cells[:, 1] * width + cells[:, 0]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


# --------------------------------------------------------------------------------------------- positives


def loss_settings(model: Detector, checkpoint: Path | None) -> tuple[LossConfig, str]:
    """The loss a detector was trained with, as far as it is known, and where that is from.

    A checkpoint does not say; the config.yaml of the run it lies in does, or else the settings its model's name stands for.
    """
    if checkpoint is not None:
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        if (folder / "config.yaml").is_file():
            config = load_config(folder / "config.yaml")
            if config.name == model.name:
                return config.loss, "the run's config.yaml"
    try:
        return load_config(model.name).loss, f"the settings of {model.name}"
    except ConfigError:
        return LossConfig(), "the package's defaults"


def positives(
    inside: Inside, targets: Targets, criterion: Criterion, *, progress: float | None = None
) -> list[LayerPositives]:
    """The pairs that the criterion would make of this image, layer by layer.

    Args:
        inside: of the image.
        targets: its boxes.
        criterion: of `build_criterion`.
        progress: share of the training at which one asks, in [0, 1]; None: where one-to-many assignment begins, if it ever does.
    """
    logits, boxes = torch.from_numpy(inside.logits)[:, None], torch.from_numpy(inside.boxes)[:, None]
    rows = matchables(logits, boxes, [targets], weights=criterion.cost_weights)
    middle, _ = criterion.assigners(criterion.config.one_to_many_from if progress is None else progress)
    found = []
    for layer, (image,) in enumerate(rows, start=1):
        assigner = criterion.last if layer == len(rows) else middle
        pairs = assigner.solve(image)
        query, target = pairs.query_indices.numpy(), pairs.target_indices.numpy()
        known = assigner.qualities(image) if isinstance(assigner, QualityAwareAssigner) else None
        confidence = image.class_confidence if known is None else known.confidence
        found.append(
            LayerPositives(
                layer=layer,
                query=query,
                target=target,
                iou=image.iou[query, target],
                confidence=confidence[query, target],
                score=None if known is None else known.scores[query, target],
                claims=None if known is None else known.claims,
            )
        )
    return found
