"""A gallery of images: what was found, what was wrong and how, what was missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torchvision.ops import box_iou

from paqdetr.analysis.subject import Analysis, ModelUnderTest, Outcome
from paqdetr.drawing import GREEN, ORANGE, PINK, RED, SKY, YELLOW, Canvas, captioned, tiled
from paqdetr.report.section import Gallery, Section, Tile

KINDS = {
    "classification": "wrong class",
    "localisation": "loose box",
    "both": "wrong class and loose box",
    "duplicate": "duplicate",
    "background": "background",
    "missed": "missed",
}
"""Kinds of mistakes of `ErrorSplit`, as the gallery calls them."""
_COLOURS = dict(zip(("", *KINDS), (GREEN, RED, ORANGE, "#EE3377", SKY, YELLOW, PINK), strict=True))
_FOREGROUND, _BACKGROUND = 0.5, 0.1


@dataclass(frozen=True, slots=True)
class Mark:
    """Something in an image: a detection that is right (`kind` "") or wrong, or a missed object; xyxy in pixels, class names."""

    kind: str
    box: np.ndarray
    name: str
    score: float | None = None
    object: str | None = None  # what a wrong detection lies on


def example_section(analysis: Analysis) -> Section:
    """The worst images, some for every class and kind of mistake, and the best; those of two models side by side."""
    models, outcomes = analysis.models, [one.outcome for one in analysis.models]
    names = {row["id"]: row["name"] for row in models[0].truth["categories"]}
    marks = [marks_of(one, found.threshold, names) for one, found in zip(models, outcomes, strict=True)]
    chosen = choose(outcomes, [tags(own) for own in marks[0]], analysis.images)
    done, tiles, data = analysis.stage("images"), [], []
    for number, index in enumerate(chosen, start=1):
        split = models[0].split
        picture = split.image_or_blank(index)
        drawn = [draw_marks(picture, own[index], size=960 if len(marks) == 1 else 640) for own in marks]
        title = "; ".join(
            f"{letter}{found.right[index]} found, {found.wrong[index]} wrong, {found.missed[index]} missed"
            for letter, found in zip(("A: ", "B: ") if models[1:] else ("",), outcomes, strict=True)
        )
        image = drawn[0]
        if len(drawn) > 1:
            image = tiled([[captioned(one, letter) for one, letter in zip(drawn, "AB", strict=True)]], gap=6)
        found_by = frozenset().union(*(tags(own[index]) for own in marks))
        tiles.append(Tile(image, title, str(split.path(index)), found_by))
        data.append(
            {"file": split.file_names[index], "image_id": split.image_ids[index], "title": title}
            | {"mistakes": Counter(KINDS[mark.kind] for mark in marks[0][index] if mark.kind)}
        )
        done(number, len(chosen))
    thresholds = " for A and ".join(f"{o.threshold:.2f}" for o in outcomes) + (" for B" if models[1:] else "")
    lead = (
        f"The worst images first, then some of every class and kind of mistake, then the best. Shown is what scores at least "
        f"{thresholds}, where F1 is best. Green: found (its class, IoU 0.5 or more). Pink, dashed: missed. Other colours: "
        "mistakes, named on the box or in a key. Click to enlarge; the arrow keys turn to the next."
    )
    used = {tag for tile in tiles for tag in tile.tags}
    classes = [name for name in names.values() if (name, "") in used]
    kinds = [kind for kind in KINDS.values() if ("", kind) in used]
    caption = f"{len(tiles)} of {len(models[0].split)} images of {models[0].split.name}."
    filters = (("class", tuple(dict.fromkeys(classes))), ("mistake", tuple(kinds)))
    return Section("images", "Images", lead, (Gallery("images", caption, filters, tuple(tiles), data),))


def tags(marks: Sequence[Mark]) -> frozenset[tuple[str, str]]:
    """What an image is found by: its classes, its kinds of mistakes, and both together; a wrong detection counts for its own
    class and for that of the object."""
    found: set[tuple[str, str]] = set()
    for mark in marks:
        kinds = {"", KINDS[mark.kind]} if mark.kind else {""}
        names = {"", mark.name, mark.object or ""}
        found |= {(name, kind) for name in names for kind in kinds}
    return frozenset(found - {("", "")})


def choose(outcomes: Sequence[Outcome], found_by: Sequence[frozenset[Any]], images: int) -> list[int]:
    """Images, none twice: half of them the worst (of two models, those of the greatest difference as well), then what has the
    most tags that no image before has, then the best."""
    first = outcomes[0]
    objects, errors = first.right + first.missed, first.wrong + first.missed
    worst = np.lexsort((-errors, first.f1)).tolist()
    best = np.lexsort((-objects, -np.where(objects > 0, first.f1, -1.0))).tolist()
    if len(outcomes) > 1:
        apart = np.argsort(-np.abs(first.f1 - outcomes[1].f1), kind="stable").tolist()
        worst = list(dict.fromkeys(index for pair in zip(worst, apart, strict=True) for index in pair))
    taken = [index for index in worst if errors[index] or len(outcomes) > 1][: -(-images // 2)]
    covered = {tag for index in taken for tag in found_by[index]}
    left = [index for index in range(len(found_by)) if index not in taken]
    while left and len(taken) < images - max(images // 6, 1):
        index = max(left, key=lambda one: (len(found_by[one] - covered), first.f1[one] - one * 1e-9))
        if not found_by[index] - covered:
            break
        taken.append(index)
        left.remove(index)
        covered |= found_by[index]
    taken += [index for index in best if index not in taken][: images - len(taken)]
    return taken


def marks_of(model: ModelUnderTest, threshold: float, names: dict[Any, str]) -> list[list[Mark]]:
    """What to mark in each image of the split: missed objects, then detections by rising score."""
    table, t = model.table, model.table.threshold_index(_FOREGROUND)
    places = {own: place for place, own in enumerate(table.image_ids)}  # tables sort whole numbers, files need not
    objects: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    for number, row in enumerate(model.truth["annotations"]):
        if not row.get("iscrowd"):
            objects.setdefault(row["image_id"], []).append((number, row))
    shown = np.flatnonzero((table.scores >= threshold) & ~table.ignored[0, t])
    shown = shown[np.argsort(table.scores[shown], kind="stable")]
    found = []
    for image_id in model.split.image_ids:
        own = shown[table.images[shown] == places[image_id]]
        right = table.true_positive[0, t, own]
        matched = set(table.matches[t, own[right]].tolist())
        rows = [model.results[int(table.detections[place])] for place in own.tolist()]
        truth = objects.get(image_id, [])
        marks = [
            Mark("missed", _corners(row["bbox"]), names[row["category_id"]])
            for number, row in truth
            if number not in matched
        ]
        wrong = wrong_kinds([row for row, good in zip(rows, right, strict=True) if not good], [row for _, row in truth])
        for row, good in zip(rows, right.tolist(), strict=True):
            kind, on = ("", None) if good else next(wrong)
            on = None if on is None else names[on]
            marks.append(Mark(kind, _corners(row["bbox"]), names[row["category_id"]], row["score"], on))
        found.append(marks)
    return found


def wrong_kinds(rows: Sequence[dict[str, Any]], truth: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(kind of mistake, category of the object that it is about or None) of detections that are wrong, by TIDE's rules, as
    `ErrorSplit` counts them."""
    boxes, objects = (
        torch.tensor(np.array([_corners(row["bbox"]) for row in given]).reshape(-1, 4)) for given in (rows, truth)
    )
    categories = np.array([row["category_id"] for row in truth])
    for row, overlaps in zip(rows, box_iou(boxes, objects).numpy(), strict=True):
        own = categories == row["category_id"]
        same, other = overlaps[own].max(initial=0), overlaps[~own].max(initial=0)
        about = categories[int(overlaps.argmax())] if len(overlaps) else None
        if _BACKGROUND <= same < _FOREGROUND:
            yield "localisation", row["category_id"]
        elif other >= _FOREGROUND:
            yield "classification", categories[int(np.where(own, -1, overlaps).argmax())]
        elif same >= _FOREGROUND:
            yield "duplicate", row["category_id"]
        elif max(same, other) < _BACKGROUND:
            yield "background", None
        else:
            yield "both", about


def draw_marks(picture: Image, marks: Sequence[Mark], *, size: int) -> Image:
    """The image with what is right and wrong in it, its longer side `size` pixels."""
    canvas = Canvas(picture, size=size)
    scale = np.array([picture.width, picture.height] * 2, dtype=float)
    for mark in marks:
        key = KINDS[mark.kind] if mark.kind else "found"
        words = (mark.name, "" if mark.score is None else f"{mark.score:.2f}", key if mark.kind else "")
        label = " ".join(word for word in words if word)
        canvas.box(mark.box / scale, _COLOURS[mark.kind], label=label, key=key, width=2.5, dashed=mark.kind == "missed")
    return canvas.picture("below")


def _corners(bbox: Sequence[float]) -> np.ndarray:
    """[x, y, width, height] -> xyxy."""
    x, y, width, height = bbox
    return np.array([x, y, x + width, y + height], dtype=float)
