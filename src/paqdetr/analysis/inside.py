"""Inside a detector while it looks at one image: proposals, attention, boxes layer by layer, positives; as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from paqdetr.analysis.subject import Analysis, ModelUnderTest
from paqdetr.data.dataset import DetectionDataset
from paqdetr.drawing import Canvas, mark
from paqdetr.losses.criterion import Criterion, build_criterion
from paqdetr.models.decoder import DecoderLayer
from paqdetr.models.detector import Detector
from paqdetr.models.encoder import DeformableAttention, EncoderLayer
from paqdetr.models.queries import QueryGroup
from paqdetr.models.tokens import Tokens
from paqdetr.paq.assignment import Qualities
from paqdetr.paq.costs import matching_costs
from paqdetr.preprocessing import pad_images
from paqdetr.report.section import Column, Part, Picture, Section, Slides, make_table
from paqdetr.serialize import plain
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

    picture: Image.Image
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
    """Which queries are assigned to which box in one decoder layer, for one image; P pairs, G boxes.

    Attributes:
        layer: from 1.
        query, target: (P,) int64.
        iou, confidence: (P,) float64; confidence is c of the assignment rule, the probability of the box's class if it has none.
        score: (P,) float64, s = IoU - gamma * c; None where the layer's rule knows no s.
    """

    layer: int
    query: np.ndarray
    target: np.ndarray
    iou: np.ndarray
    confidence: np.ndarray
    score: np.ndarray | None


# --------------------------------------------------------------------------------------------- recording


def look_inside(model: Detector, picture: Image.Image, *, chosen: Sequence[int] | None = None, most: int = 3) -> Inside:
    """Run a detector on one image, in evaluation mode, and keep what passes through it.

    Args:
        model: its mode and hooks are afterwards what they were.
        picture: RGB.
        chosen: queries whose sampling is kept, at least one; by default the surest ones that are not of the same place.
        most: of these, so many.
    """
    device = model.device
    images, mask = pad_images([model.preprocessing(picture)], model.preprocessing.pad_divisor)
    encoder = [layer.attention for layer in cast(Iterable[EncoderLayer], model.encoder.layers)]
    decoder = [layer.cross_attention for layer in cast(Iterable[DecoderLayer], model.decoder.layers)]
    was_training, calls = model.training, dict[nn.Module, tuple[Any, ...]]()  # the arguments of each module's last call
    handles = [own.register_forward_pre_hook(calls.__setitem__) for own in (*encoder, *decoder, model.decoder)]
    model.eval()
    try:
        with torch.inference_mode():
            output = model(images.to(device), None if mask is None else mask.to(device))
            queries, memory = cast(tuple[QueryGroup, Tokens], calls[model.decoder][:2])
            logits, boxes = output.layers.logits[:, 0], output.layers.boxes[:, 0]
            rows = _surest(logits[-1], boxes[-1], most) if chosen is None else torch.tensor(chosen, device=device)
            levels = model.encoder.query_levels
            tokens = _tokens_under(boxes[-1][rows, :2], memory, levels)
            proposals = output.proposals
            return Inside(
                picture=picture,
                logits=_array(logits),
                boxes=_array(boxes),
                start=_array(queries.reference[0]),
                proposals=None if proposals is None else _array(proposals.boxes[0]),
                proposal_scores=None if proposals is None else _array(proposals.logits[0].sigmoid().amax(-1)),
                chosen=rows.cpu().numpy(),
                decoder=tuple(_sampling(own, calls[own], rows, memory) for own in decoder),
                encoder=tuple(_sampling(own, calls[own], tokens, memory) for own in encoder),
                encoder_level=len(memory.spatial_shapes) - levels,
            )
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def _sampling(attention: DeformableAttention, called_with: tuple[Any, ...], rows: Tensor, memory: Tokens) -> Sampling:
    """Of these queries; locations from the padded level to the image."""
    query, reference, _, spatial_shapes, _ = called_with
    locations, weights = attention.sampling(query[:1, rows], reference[:1, rows], spatial_shapes)
    ratios = memory.valid_ratios[0][:, None]  # (L, 1, 2)
    return Sampling(locations=_array(locations[0] / ratios), weights=_array(weights[0]))


def _surest(logits: Tensor, boxes: Tensor, most: int) -> Tensor:
    """The surest queries, leaving out any that overlaps a surer one by more than half: (n, C), (n, 4) -> (M,)."""
    corners = box_convert(boxes.float(), "cxcywh", "xyxy")
    return nms(corners, logits.amax(-1).float(), 0.5)[:most]


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
    rows = matching_costs(logits, boxes, [targets], weights=criterion.cost_weights)
    middle, _ = criterion.assigners(criterion.config.one_to_many_from if progress is None else progress)
    found = []
    for layer, (image,) in enumerate(rows, start=1):
        assigner = criterion.last if layer == len(rows) else middle
        pairs = assigner.solve(image)
        query, target = pairs.query_indices.numpy(), pairs.target_indices.numpy()
        qualities = getattr(assigner, "qualities", None)  # what a rule goes by beside the cost, if it is to be shown
        known: Qualities | None = None if qualities is None else qualities(image)
        confidence = image.class_confidence if known is None else known.confidence
        found.append(
            LayerPositives(
                layer=layer,
                query=query,
                target=target,
                iou=image.iou[query, target],
                confidence=confidence[query, target],
                score=None if known is None else known.scores[query, target],
            )
        )
    return found


_PROPOSALS = 50  # shown of each image
_BOXES = 8  # detections followed through the layers
_MOST_BOXES = 8  # of a training image whose positives are shown


def inside_sections(analysis: Analysis) -> tuple[Section, ...]:
    """A section per model: the images with most found objects, and one-to-many positives of some training images."""
    images = np.argsort(-analysis.models[0].outcome.right, kind="stable")[: analysis.few].tolist()
    training = analysis.training
    learning = None if training is None else (training, _with_few_boxes(training, analysis.few))
    return tuple(
        _inside_section(model, images, learning, analysis.stage(f"inside {model.label}")) for model in analysis.models
    )


def _with_few_boxes(split: DetectionDataset, count: int) -> list[int]:
    """Images with several boxes, but not too many to distinguish."""
    boxes = np.array([len(split.labels(index)) for index in range(len(split))])
    fit = np.flatnonzero((boxes > 0) & (boxes <= _MOST_BOXES))
    if not len(fit):
        fit = np.flatnonzero(boxes > 0)
    return fit[np.argsort(-boxes[fit], kind="stable")][:count].tolist()


def _inside_section(
    model: ModelUnderTest,
    images: Sequence[int],
    training: tuple[DetectionDataset, Sequence[int]] | None,
    progress: Callable[[int, int], None],
) -> Section:
    """Positions of images in the model's split, and in a training split; without that no one-to-many positives are shown."""
    settings, source = model.loss
    criterion, classes = build_criterion(settings), model.model.classes
    one_to_many = settings.assigner != "one_to_one" and settings.one_to_many_until > 0
    parts: list[Part] = []
    without = []
    if model.model.config.positions != "proposals":
        without.append("its queries start from learned places, so there are no encoder proposals")
    if not one_to_many:
        without.append(f"it was trained with one-to-one assignment in every layer ({source})")
    elif training is None:
        without.append("there is no training split to show positives of")
    learning, pairs = training if training is not None and one_to_many else (model.split, ())
    total = len(images) + len(pairs)
    for number, index in enumerate(images):
        inside = look_inside(model.model, model.split.image_or_blank(index))
        parts += _views(inside, model.split.targets(index, classes=classes), classes.names, number)
        progress(number + 1, total)
    for number, index in enumerate(pairs):
        inside = look_inside(model.model, learning.image_or_blank(index), most=1)
        targets = learning.targets(index, classes=classes)
        parts += _learning(inside, targets, classes.names, criterion, number, learning.file_names[index])
        progress(len(images) + number + 1, total)
    lead = (
        "One image on its way through the detector. The slider goes from layer to layer; colours mark queries. "
        "Points are where the query's attention samples the features, the larger the weightier."
    )
    if pairs:
        begin, end = settings.one_to_many_from, settings.one_to_many_until
        when = f"; in the training they were on from {100 * begin:g} % to {100 * end:g} % of it"
        lead += f" One-to-many positives are those that the loss ({source}) assigns for the finished weights"
        lead += "." if (begin, end) == (0, 1) else f"{when}."
    if without:
        lead += f" Not shown for {model.label}: {'; '.join(without)}."
    return Section("inside", "Inside", lead, tuple(parts))


# --------------------------------------------------------------------------------------------- one image


def _views(inside: Inside, targets: Targets, names: Sequence[str], number: int) -> list[Part]:
    labels = [f"{names[inside.labels[-1, q]]} {inside.scores[-1, q]:.2f}" for q in inside.chosen]
    parts: list[Part] = [
        Slides(
            f"attention_{number}",
            f"Decoder: where the queries that found {', '.join(labels)} look. Boxes are those they come with into the layer.",
            _layers(inside.decoder),
            tuple(_attention(inside, k, labels) for k in range(len(inside.decoder))),
            {"queries": inside.chosen, "layers": plain(inside.decoder, 4)},
        ),
        _refinement(inside, targets, names, number),
    ]
    if inside.proposals is not None and inside.proposal_scores is not None:
        parts.append(_proposals(inside, number))
    if inside.encoder:
        level = inside.encoder_level + 1
        parts.append(
            Slides(
                f"encoder_{number}",
                f"Encoder: where the tokens of level {level} (of {inside.encoder[0].weights.shape[2]}, 1 the finest) under the "
                "centres of the same boxes look.",
                _layers(inside.encoder),
                tuple(_encoder(inside, sampling) for sampling in inside.encoder),
                {"layers": plain(inside.encoder, 4)},  # four digits: a hundredth of a pixel
            )
        )
    return parts


def _attention(inside: Inside, layer: int, labels: Sequence[str]) -> Image.Image:
    canvas = _canvas(inside, 0.35)
    for place in range(len(inside.chosen)):
        _dots(canvas, inside.decoder[layer], place, mark(place))
    for place, query in enumerate(inside.chosen):
        came = inside.boxes[layer - 1, query] if layer else inside.start[query]
        if len(came) == 4:
            canvas.box(_corners(came), mark(place), label=labels[place], width=1.2)
        else:
            canvas.dots(came, mark(place), radii=6.0)
            canvas.label(came, labels[place], mark(place))
    return canvas.picture()


def _encoder(inside: Inside, sampling: Sampling) -> Image.Image:
    canvas = _canvas(inside, 0.35)
    for place, query in enumerate(inside.chosen):
        _dots(canvas, sampling, place, mark(place))
        canvas.label(inside.boxes[-1, query, :2], "token", mark(place))
    return canvas.picture()


def _dots(canvas: Canvas, sampling: Sampling, place: int, colour: str) -> None:
    """The points of all heads and levels; the area of a disc goes with the weight."""
    points = sampling.locations[place].reshape(-1, 2)
    weights = sampling.weights[place].reshape(-1)
    order = np.argsort(-weights, kind="stable")  # small ones on top
    radii = 9.0 * np.sqrt(weights[order] / max(float(weights.max()), 1e-9))
    canvas.dots(points[order], colour, radii=np.maximum(radii, 0.8), strength=0.75)


def _refinement(inside: Inside, targets: Targets, names: Sequence[str], number: int) -> Slides:
    """The surest detections followed back through the layers."""
    queries = np.argsort(-inside.scores[-1], kind="stable")[:_BOXES]
    labels = ("start", *_layers(inside.boxes))
    images = []
    for step in range(len(labels)):
        canvas = _canvas(inside, 0.0)
        for box in targets.boxes.numpy():
            canvas.box(_corners(box), "#FFFFFF", width=0.8, dashed=True)
        for place, query in enumerate(queries[::-1]):
            colour = mark(len(queries) - 1 - place)
            box = inside.boxes[step - 1, query] if step else inside.start[query]
            if len(box) == 2:
                canvas.dots(box, colour, radii=5.0)
                continue
            label = f"{names[inside.labels[step - 1, query]]} {inside.scores[step - 1, query]:.2f}" if step else ""
            canvas.box(_corners(box), colour, label=label, width=1.2)
        images.append(canvas.picture())
    learned = "learned points" if inside.start.shape[-1] == 2 else "learned boxes"
    start = learned if inside.proposals is None or learned == "learned points" else "proposals"
    data = {
        "queries": queries,
        "start": inside.start[queries],
        "boxes": inside.boxes[:, queries],
        "scores": inside.scores[:, queries],
        "truth": targets.boxes.numpy(),
    }
    caption = (
        f"Boxes from the start ({start}) to the last layer, of the {len(queries)} surest detections. "
        "White, dashed: ground truth."
    )
    return Slides(f"refinement_{number}", caption, labels, tuple(images), data)


def _proposals(inside: Inside, number: int) -> Picture:
    assert inside.proposals is not None and inside.proposal_scores is not None
    count = min(_PROPOSALS, len(inside.proposals))
    canvas = _canvas(inside, 0.25)
    for place in range(count - 1, -1, -1):  # the best on top
        best = place < 10
        colour, width, strength = (mark(0), 1.2, 1.0) if best else (mark(1), 0.5, 0.55)
        canvas.box(_corners(inside.proposals[place]), colour, width=width, strength=strength)
    caption = f"What the encoder proposes: the best {count} of {len(inside.proposals)} boxes, the ten best in orange."
    data = {"boxes": inside.proposals[:count], "scores": inside.proposal_scores[:count]}
    return Picture(f"proposals_{number}", caption, canvas.picture(), data)


# --------------------------------------------------------------------------------------------- learning


def _learning(
    inside: Inside, targets: Targets, names: Sequence[str], criterion: Criterion, number: int, file: str
) -> list[Part]:
    layers = positives(inside, targets, criterion)
    rows = [(layer, pair, layer.target[pair]) for layer in layers for pair in np.lexsort((-layer.iou, layer.target))]
    columns = (
        Column("layer", "layer", "integer", lambda row: row[0].layer),
        Column("box", "box", "integer", lambda row: row[2] + 1),
        Column("class", "class", "text", lambda row: names[int(targets.labels[row[2]])]),
        Column("query", "query", "integer", lambda row: row[0].query[row[1]]),
        Column("iou", "IoU", value=lambda row: row[0].iou[row[1]]),
        Column("c", "c", value=lambda row: row[0].confidence[row[1]]),
        Column("s", "s", value=lambda row: None if row[0].score is None else row[0].score[row[1]]),
        Column("k", "k", "integer", lambda row: (row[0].target == row[2]).sum()),
    )
    caption = "The same pairs: c is the query's confidence in the box's class, s = IoU - gamma c, k the number of its queries."
    return [
        Slides(
            f"positives_{number}",
            f"Queries that learn from each box of the training image {file}: thick, dashed, the box; thin, their predictions.",
            tuple(
                f"layer {layer.layer}{', one to one' if layer is layers[-1] else ''}: {len(layer.query)} positives"
                for layer in layers
            ),
            tuple(_positives_picture(inside, targets, layer) for layer in layers),
        ),
        make_table(f"pairs_{number}", caption, columns, rows),
    ]


def _positives_picture(inside: Inside, targets: Targets, layer: LayerPositives) -> Image.Image:
    canvas = _canvas(inside, 0.15)
    counts = np.bincount(layer.target, minlength=len(targets))
    for query, target in zip(layer.query, layer.target, strict=True):
        canvas.box(_corners(inside.boxes[layer.layer - 1, query]), mark(int(target)), width=0.8)
    for number, box in enumerate(targets.boxes.numpy()):
        label = f"{number + 1}: {counts[number]}"
        canvas.box(_corners(box), mark(number), label=label, width=1.6, dashed=True)
    return canvas.picture()


def _canvas(inside: Inside, dim: float) -> Canvas:
    return Canvas(inside.picture, size=640, dim=dim, smooth=True)


def _corners(box: np.ndarray) -> np.ndarray:
    """cxcywh -> xyxy."""
    return np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])


def _layers(of: Sized) -> tuple[str, ...]:
    return tuple(f"layer {number}" for number in range(1, len(of) + 1))
