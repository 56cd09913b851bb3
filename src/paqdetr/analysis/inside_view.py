"""The inside of a detector as pictures: attention, proposals, boxes layer by layer, and who learns from which box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from paqdetr.analysis.inside import Inside, LayerPositives, Sampling, look_inside, loss_settings, positives
from paqdetr.analysis.overlay import Overlay, mark
from paqdetr.analysis.section import Column, Part, Picture, Section, Slides, Table
from paqdetr.analysis.subject import Subject
from paqdetr.data.dataset import DetectionDataset
from paqdetr.engine.evaluate import targets_of
from paqdetr.losses.criterion import Criterion, build_criterion
from paqdetr.structures import Targets

_PROPOSALS = 50  # shown of each image
_BOXES = 8  # detections followed through the layers
_TRUTH = "#FFFFFF"


def inside_section(
    subject: Subject,
    *,
    images: Sequence[int],
    training: tuple[DetectionDataset, Sequence[int]] | None,
    progress: Callable[[int, int], None] | None = None,
) -> Section:
    """What happens in the detector with a few images.

    Args:
        subject: the model.
        images: positions of images in its split.
        training: the training split, and positions of images in it for the one-to-many positives; None leaves them out.
        progress: told (images done, images in all).
    """
    settings, source = loss_settings(subject.model, subject.checkpoint)
    criterion = build_criterion(settings)
    several = settings.assigner != "one_to_one" and settings.one_to_many_until > 0
    pairs = training[1] if training is not None and several else ()
    total, done, parts, without = len(images) + len(pairs), 0, [], []
    for number, index in enumerate(images):
        inside = look_inside(subject.model, subject.split.image_or_blank(index))
        targets = targets_of(subject.split, index, classes=subject.model.classes)
        parts += _views(inside, targets, subject, number)
        done += 1
        if progress is not None:
            progress(done, total)
    if training is not None:
        for number, index in enumerate(pairs):
            split = training[0]
            inside = look_inside(subject.model, split.image_or_blank(index), most=1)
            targets = targets_of(split, index, classes=subject.model.classes)
            parts += _learning(inside, targets, subject, criterion, number, split.file_names[index])
            done += 1
            if progress is not None:
                progress(done, total)
    if subject.model.config.positions != "proposals":
        without.append("its queries start from learned places, so there are no encoder proposals")
    if not several:
        without.append(f"it was trained with one positive a box in every layer ({source})")
    elif training is None:
        without.append("the data has no training split to show positives of")
    lead = (
        "One image on its way through the detector. The slider goes from layer to layer; colours mark queries. "
        "Points are where the query's attention samples the features, the larger the weightier."
    )
    if several and pairs:
        begin, end = settings.one_to_many_from, settings.one_to_many_until
        when = f"; in the training they were on from {100 * begin:g} % to {100 * end:g} % of it"
        lead += f" Several positives a box are those that the loss ({source}) makes of the finished weights"
        lead += "." if (begin, end) == (0, 1) else f"{when}."
    if without:
        lead += f" Not shown for {subject.label}: {'; '.join(without)}."
    return Section("inside", "Inside", lead, tuple(parts))


# --------------------------------------------------------------------------------------------- one image


def _views(inside: Inside, targets: Targets, subject: Subject, number: int) -> list[Part]:
    names = subject.model.classes.names
    said = [f"{names[inside.labels[-1, q]]} {inside.scores[-1, q]:.2f}" for q in inside.chosen]
    parts: list[Part] = [
        Slides(
            f"attention_{number}",
            f"Decoder: where the queries that found {', '.join(said)} look. Boxes are those they come with into the layer.",
            tuple(f"layer {k + 1}" for k in range(len(inside.decoder))),
            tuple(_attention(inside, k, said) for k in range(len(inside.decoder))),
            {
                "queries": inside.chosen,
                "layers": [_rounded(sampling) for sampling in inside.decoder],
            },
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
                tuple(f"layer {k + 1}" for k in range(len(inside.encoder))),
                tuple(_encoder(inside, sampling) for sampling in inside.encoder),
                {"layers": [_rounded(sampling) for sampling in inside.encoder]},
            )
        )
    return parts


def _attention(inside: Inside, layer: int, said: Sequence[str]) -> Image.Image:
    overlay = Overlay(inside.picture, dim=0.35)
    for place in range(len(inside.chosen)):
        _dots(overlay, inside.decoder[layer], place, mark(place))
    for place, query in enumerate(inside.chosen):
        came = inside.boxes[layer - 1, query] if layer else inside.start[query]
        if len(came) == 4:
            overlay.box(_corners(came), mark(place), width=2.5)
            overlay.label(_corners(came)[:2], said[place], mark(place))
        else:
            overlay.dots(came, mark(place), radii=6.0)
            overlay.label(came, said[place], mark(place))
    return overlay.picture()


def _encoder(inside: Inside, sampling: Sampling) -> Image.Image:
    overlay = Overlay(inside.picture, dim=0.35)
    for place, query in enumerate(inside.chosen):
        _dots(overlay, sampling, place, mark(place))
        overlay.label(inside.boxes[-1, query, :2], "token", mark(place))
    return overlay.picture()


def _dots(overlay: Overlay, sampling: Sampling, place: int, colour: str) -> None:
    """The points of all heads and levels; the area of a disc goes with the weight."""
    points = sampling.locations[place].reshape(-1, 2)
    weights = sampling.weights[place].reshape(-1)
    order = np.argsort(-weights, kind="stable")  # small ones on top
    radii = 9.0 * np.sqrt(weights[order] / max(float(weights.max()), 1e-9))
    overlay.dots(points[order], colour, radii=np.maximum(radii, 0.8), strength=0.75)


def _refinement(inside: Inside, targets: Targets, names: Sequence[str], number: int) -> Slides:
    """The surest detections followed back through the layers."""
    queries = np.argsort(-inside.scores[-1], kind="stable")[:_BOXES]
    labels = ["start", *(f"layer {k + 1}" for k in range(len(inside.boxes)))]
    images = []
    for step in range(len(labels)):
        overlay = Overlay(inside.picture)
        _truth(overlay, targets)
        for place, query in enumerate(queries[::-1]):
            colour = mark(len(queries) - 1 - place)
            box = inside.boxes[step - 1, query] if step else inside.start[query]
            if len(box) == 2:
                overlay.dots(box, colour, radii=5.0)
                continue
            overlay.box(_corners(box), colour, width=2.2)
            if step:
                said = f"{names[inside.labels[step - 1, query]]} {inside.scores[step - 1, query]:.2f}"
                overlay.label(_corners(box)[:2], said, colour)
        images.append(overlay.picture())
    start = (
        "learned points"
        if inside.start.shape[-1] == 2
        else "proposals"
        if inside.proposals is not None
        else "learned boxes"
    )
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
    return Slides(f"refinement_{number}", caption, tuple(labels), tuple(images), data)


def _proposals(inside: Inside, number: int) -> Picture:
    assert inside.proposals is not None and inside.proposal_scores is not None
    count = min(_PROPOSALS, len(inside.proposals))
    overlay = Overlay(inside.picture, dim=0.25)
    for place in range(count - 1, -1, -1):  # the best on top
        best = place < 10
        overlay.box(
            _corners(inside.proposals[place]),
            mark(0) if best else mark(1),
            width=2.2 if best else 1.2,
            strength=1.0 if best else 0.55,
        )
    caption = f"What the encoder proposes: the best {count} of {len(inside.proposals)} boxes, the ten best in orange."
    data = {"boxes": inside.proposals[:count], "scores": inside.proposal_scores[:count]}
    return Picture(f"proposals_{number}", caption, overlay.picture(), data)


# --------------------------------------------------------------------------------------------- learning


def _learning(
    inside: Inside, targets: Targets, subject: Subject, criterion: Criterion, number: int, file: str
) -> list[Part]:
    layers = positives(inside, targets, criterion)
    names = subject.model.classes.names
    rows = [row for layer in layers for row in _pair_rows(layer, targets, names)]
    columns = (
        Column("layer", "layer", "integer"),
        Column("box", "box", "integer"),
        Column("class", "class", "text"),
        Column("query", "query", "integer"),
        Column("iou", "IoU"),
        Column("c", "c"),
        Column("s", "s"),
        Column("k", "k", "integer"),
    )
    return [
        Slides(
            f"positives_{number}",
            f"Queries that learn from each box of the training image {file}: thick, dashed, the box; thin, their predictions.",
            tuple(_title(layer, len(layers)) for layer in layers),
            tuple(_positives_picture(inside, targets, layer) for layer in layers),
        ),
        Table(
            f"pairs_{number}",
            "The same pairs: c is the query's confidence in the box's class, s = IoU - gamma c, k how many queries the box gets.",
            columns,
            tuple(rows),
        ),
    ]  # fmt: skip


def _title(layer: LayerPositives, layers: int) -> str:
    last = ", one to one" if layer.layer == layers else ""
    return f"layer {layer.layer}{last}: {len(layer.query)} positives"


def _pair_rows(layer: LayerPositives, targets: Targets, names: Sequence[str]) -> list[dict[str, Any]]:
    counts = np.bincount(layer.target, minlength=len(targets))
    order = np.lexsort((-layer.iou, layer.target))
    return [
        {
            "layer": layer.layer,
            "box": int(layer.target[p]) + 1,
            "class": names[int(targets.labels[layer.target[p]])],
            "query": int(layer.query[p]),
            "iou": float(layer.iou[p]),
            "c": float(layer.confidence[p]),
            "s": None if layer.score is None else float(layer.score[p]),
            "k": int(counts[layer.target[p]]),
        }
        for p in order
    ]


def _positives_picture(inside: Inside, targets: Targets, layer: LayerPositives) -> Image.Image:
    overlay = Overlay(inside.picture, dim=0.15)
    counts = np.bincount(layer.target, minlength=len(targets))
    for query, target in zip(layer.query, layer.target, strict=True):
        overlay.box(_corners(inside.boxes[layer.layer - 1, query]), mark(int(target)), width=1.5)
    for number, box in enumerate(targets.boxes.numpy()):
        overlay.box(_corners(box), mark(number), width=3.2, dashed=True)
        overlay.label(_corners(box)[:2], f"{number + 1}: {counts[number]}", mark(number))
    return overlay.picture()


def _truth(overlay: Overlay, targets: Targets) -> None:
    for box in targets.boxes.numpy():
        overlay.box(_corners(box), _TRUTH, width=1.5, dashed=True)


def _corners(box: np.ndarray) -> np.ndarray:
    """cxcywh -> xyxy."""
    return np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])


def _rounded(sampling: Sampling) -> dict[str, Any]:
    """Four digits: a hundredth of a pixel."""
    return {
        "locations": np.round(sampling.locations.astype(float), 4),
        "weights": np.round(sampling.weights.astype(float), 4),
    }
