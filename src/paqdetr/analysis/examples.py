"""The best and the worst images: what was found, what was wrong, what was missed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL.Image import Image

from paqdetr.analysis.subject import Analysis, ModelUnderTest, Outcome
from paqdetr.report.overlay import Overlay
from paqdetr.report.plots import GREEN, ORANGE, PINK
from paqdetr.report.section import Picture, Section

_LEGEND = "Green: found. Orange, with a cross: wrong. Pink, dashed: missed."


def example_sections(analysis: Analysis) -> tuple[Section, ...]:
    """One section per model, with the same images: the best, the worst and, of two models, those where they differ most."""
    models, outcomes, progress = analysis.models, analysis.outcomes, analysis.stage("best and worst images")
    chosen = _choice(outcomes, analysis.images)
    sections = []
    for place, (model, found) in enumerate(zip(models, outcomes, strict=True)):
        parts = []
        for done, (group, index) in enumerate(chosen, start=place * len(chosen) + 1):
            name = model.split.file_names[index]
            caption = (
                f"{group}: {name}. F1 {found.f1[index]:.2f}: {found.right[index]} found, {found.wrong[index]} wrong, "
                f"{found.missed[index]} missed."
            )
            data = {"file": name, "image_id": model.split.image_ids[index]}
            data |= {kind: getattr(found, kind)[index] for kind in ("f1", "right", "wrong", "missed")}
            image = draw_outcome(model, index, found.threshold)
            parts.append(Picture(f"image_{len(parts)}", caption, image, data))
            progress(done, len(chosen) * len(models))
        sections.append(Section("images", "Images", _lead(outcomes), tuple(parts)))
    return tuple(sections)


def _lead(outcomes: Sequence[Outcome]) -> str:
    two = len(outcomes) > 1
    thresholds = " for A and ".join(f"{o.threshold:.2f}" for o in outcomes) + (" for B" if two else "")
    return (
        f"Where F1 is best and worst{', for A' if two else ''}. Shown is what scores at least {thresholds}: there F1 over the "
        "whole split is at its best. A detection is right if it has the class of an object and an IoU of at least 0.5 with "
        f"it. {_LEGEND}"
    )


def _choice(outcomes: Sequence[Outcome], images: int) -> list[tuple[str, int]]:
    """(group, index), no image twice: the last groups get what the first leave."""
    first = outcomes[0]
    objects = first.right + first.missed
    errors = first.wrong + first.missed
    rankings = {
        "Worst": np.lexsort((-errors, first.f1)),
        "Best": np.lexsort((-objects, -np.where(objects > 0, first.f1, -1.0))),
    }
    if len(outcomes) > 1:
        gain = first.f1 - outcomes[1].f1
        rankings["A ahead"] = np.argsort(-gain, kind="stable")[: int((gain > 0).sum())]
        rankings["B ahead"] = np.argsort(gain, kind="stable")[: int((gain < 0).sum())]
    taken: set[int] = set()
    groups: dict[str, list[int]] = {}
    for group, ranking in rankings.items():
        groups[group] = [index for index in ranking.tolist() if index not in taken][:images]
        taken.update(groups[group])
    order = [name for name in ("Best", "Worst", "A ahead", "B ahead") if name in groups]
    return [(group, index) for group in order for index in groups[group]]


def draw_outcome(model: ModelUnderTest, index: int, threshold: float) -> Image:
    """The image of the split with detections that are right and wrong, and objects that were missed."""
    table, t = model.table, model.table.threshold_index(0.5)
    image_id = model.split.image_ids[index]
    picture = model.split.image_or_blank(index)
    scale = np.array([picture.width, picture.height] * 2, dtype=float)
    overlay = Overlay(picture)
    position = table.image_ids.index(image_id)  # not the index: tables sort whole numbers, files need not
    own = np.flatnonzero((table.images == position) & (table.scores >= threshold) & ~table.ignored[0, t])
    own = own[np.argsort(table.scores[own])]  # the surest lies on top
    right = table.true_positive[0, t, own]
    found = set(table.matches[t, own[right]].tolist())
    names = {row["id"]: row["name"] for row in model.truth["categories"]}
    for number, row in enumerate(model.truth["annotations"]):
        if row["image_id"] != image_id or row.get("iscrowd") or number in found:
            continue
        box = _corners(row["bbox"]) / scale
        overlay.box(box, PINK, width=2.5, dashed=True)
        overlay.label(box[:2], f"missed {names[row['category_id']]}", PINK)
    for place, good in zip(own.tolist(), right.tolist(), strict=True):
        row = model.evaluation.results[int(table.detections[place])]
        box = _corners(row["bbox"]) / scale
        colour = GREEN if good else ORANGE
        overlay.box(box, colour, width=2.5)
        cross = "" if good else " \N{BALLOT X}"
        overlay.label(box[:2], f"{names[row['category_id']]} {row['score']:.2f}{cross}", colour)
    return overlay.picture()


def _corners(bbox: Sequence[float]) -> np.ndarray:
    """[x, y, width, height] -> xyxy."""
    x, y, width, height = bbox
    return np.array([x, y, x + width, y + height], dtype=float)
