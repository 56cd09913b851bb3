"""What one model or two do well and badly, and their figures with intervals, over all and by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from paqdetr.analysis.advice import ClassFacts, Duplicates, Facts, TrainingFacts, advice, compare
from paqdetr.analysis.errors import confused_pairs
from paqdetr.analysis.subject import Analysis, ModelUnderTest, marks
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.stats import describe_crowding
from paqdetr.metrics.coco import FIGURE_NAMES
from paqdetr.metrics.diagnosis import calibration
from paqdetr.metrics.intervals import Comparison, Difference, FigureIntervals, Interval
from paqdetr.metrics.matches import AREAS
from paqdetr.report.section import Column, Findings, Section, Table, make_table
from paqdetr.serialize import finite_rows
from paqdetr.structures import CONFIDENT, ClassTable

_MEANING = {
    "AP": "mean over IoU .50 to .95 and classes",
    "AP50": "at IoU .50",
    "AP75": "at IoU .75",
    "APs": "objects below 32 x 32 pixels",
    "APm": "between",
    "APl": "above 96 x 96 pixels",
    "AR1": "recall with 1 detection per class and image",
    "AR10": "with 10",
    "AR100": "with 100",
    "ARs": "of small objects",
    "ARm": "of medium objects",
    "ARl": "of large objects",
}


def findings_section(analysis: Analysis) -> Section:
    """What each model does well and badly, with advice; of two models first what they differ in."""
    parts = []
    if isinstance(analysis.intervals, Comparison):
        parts.append(Findings("comparison", "Of B - A, on the same images.", compare(analysis.intervals)))
    ap = []
    for letter, model, own in zip("AB", analysis.models, _sides(analysis.intervals), strict=False):
        two = len(analysis.models) > 1
        found = advice(facts_of(analysis, model, own))
        caption = f"{model.label}. Costs do not add up."
        parts.append(Findings(f"findings_{letter.lower()}", caption, found, letter if two else ""))
        figure = own.figures["AP"]
        ap.append(
            f"{letter + ': ' if two else ''}AP {figure.value:.3f} ({_range(figure.low, figure.high)}), "
            f"AP50 {own.figures['AP50'].value:.3f}"
        )
    split = analysis.models[0].split
    where = f"on {len(split)} images of {split.name} with {int(analysis.models[0].table.positives[0].sum())} boxes"
    lead = f"{'; '.join(ap)} {where}. Each line follows from figures below; what costs most stands first."
    return Section("findings", "At a glance", lead, tuple(parts))


def facts_of(analysis: Analysis, model: ModelUnderTest, intervals: FigureIntervals) -> Facts:
    """The figures that advice on a model is derived from."""
    outcome, table, point = model.outcome, model.table, model.model.operating_point
    boxes = table.positives.sum(axis=(1, 2)).tolist()
    reliable = calibration(table, score_threshold=CONFIDENT)  # many low scores would hide that these are wrong
    share = reliable.counts / max(reliable.counts.sum(), 1)
    right, wrong, missed = (int(own.sum()) for own in (outcome.right, outcome.wrong, outcome.missed))
    default = point.least_score()
    per_class, training = (
        table.positives[0].sum(axis=1).tolist(),
        training_boxes(analysis.training, model.split.classes),
    )
    return Facts(
        split=model.split.name,
        images=len(model.split),
        boxes=boxes[0],
        ap=intervals.figures["AP"],
        ap50=intervals.figures["AP50"].value,
        sizes={
            name: (intervals.figures[f"AP{name[0]}"].value, count)
            for name, count in zip(AREAS[1:], boxes[1:], strict=True)
        },
        duplicates_cost=model.evaluation.figures_nms.AP - model.evaluation.figures.AP,
        removes_duplicates=point.nms is not None,
        gains=model.mistakes.gains,
        confused=confused_pairs(model.confusion),
        classes=[
            ClassFacts(name, intervals.per_class[name].value, count, None if training is None else training.get(own, 0))
            for name, count, own in zip(table.class_names, per_class, table.category_ids, strict=True)
        ],
        threshold=outcome.threshold,
        f1=float(model.curves.best_f1[-1]),
        precision=right / max(right + wrong, 1),
        recall=right / max(right + missed, 1),
        default_threshold=default,
        default_f1=math.nan if point.nms is not None else float(model.curves.f1[-1][round(100 * default)]),
        calibration_error=reliable.error,
        calibration_chance=reliable.chance,
        confidence=float(np.nansum(share * reliable.confidence)),
        accuracy=float(np.nansum(share * reliable.accuracy)),
        covered=model.stages[-1].found,
        image_size=model.model.preprocessing.image_size,
        near_duplicates=_near_duplicates(analysis, model),
        unread=analysis.unread,
        training=_training(model),
        crowding=describe_crowding(model.split.annotations, queries=model.model.config.num_queries),
    )


def training_boxes(training: DetectionDataset | None, classes: ClassTable) -> dict[int | str, int] | None:
    """Boxes in the training split, whose ids may be others, of each of `classes` that it has, by their ids."""
    if training is None:
        return None
    own = training.annotations
    counts = np.bincount(own.labels[~own.crowd], minlength=len(own.classes)).tolist()
    return {classes.ids[its]: counts[row] for row, its in own.classes.rows_in(classes)}


def _near_duplicates(analysis: Analysis, model: ModelUnderTest) -> Duplicates | None:
    alike = analysis.near_duplicates
    if alike is None:
        return None
    without = model.table.figures((~alike)[None].astype(np.int32)).figures["AP"].item() if alike.any() else math.nan
    return Duplicates(int(alike.sum()), without)


def _training(model: ModelUnderTest) -> TrainingFacts | None:
    """How the run of a checkpoint went; None if there is none, or its settings cannot be read."""
    records, config = model.records, model.run_config
    if not records or config is None:
        return None
    evaluations = [record for record in records if record.get("kind") == "eval"]
    ap, loss = (finite_rows(evaluations, ("epoch", key)).tolist() for key in ("AP", "loss"))
    return TrainingFacts(
        epochs=config.epochs,
        done=max((float(record["epoch"]) for record in records if "epoch" in record), default=0.0),
        finished=records[-1].get("kind") == "finished",
        ap=ap,
        loss=loss,
    )


def summary_section(analysis: Analysis) -> Section:
    """The twelve COCO figures with their intervals, and what is beside them. Differences are B - A."""
    models, found = analysis.models, analysis.intervals
    level = f"{100 * found.level:g} %"
    lead = (
        f"How good the detections are, by COCO's rules. Each figure has its {level} bootstrap interval over images: where it "
        "would lie on other test sets like this one. It says nothing of other trainings with other seeds."
    )
    if isinstance(found, Comparison):
        lead += (
            " B minus A is resampled in pairs, the same images for both; where its interval holds 0, these images do not "
            "decide which of the two is better."
        )
    names = ["A", "B"] if len(models) > 1 else [models[0].label]
    columns = [Column("figure", "figure", "text", str)]
    for key, name, side in zip("ab", names, _sides(found), strict=False):
        columns += _interval_columns(key, name, level, lambda figure, of=side: of.figures[figure])
    if isinstance(found, Comparison):
        columns += _interval_columns("difference", "B - A", level, found.figures.__getitem__)
    columns.append(Column("meaning", "meaning", "text", _MEANING.get))
    caption = f"COCO figures with {level} intervals from {found.samples} resamples of the images, seed {found.seed}."
    table = make_table("figures", caption, columns, FIGURE_NAMES)
    return Section("summary", "Figures", lead, (table, _beside(models)))


def class_section(analysis: Analysis) -> Section:
    """AP of every class, in a table to sort."""
    models, found = analysis.models, analysis.intervals
    level = f"{100 * found.level:g} %"
    matches = models[0].table
    places = {name: place for place, name in enumerate(matches.class_names)}
    boxes, images = matches.positives[0].sum(axis=1), (matches.positives[0] > 0).sum(axis=1)
    columns = [
        Column("class", "class", "text", str),
        Column("boxes", "boxes", "integer", lambda name: boxes[places[name]]),
        Column("images", "images", "integer", lambda name: images[places[name]]),
    ]
    for (key, mark), side in zip(marks(models), _sides(found), strict=True):
        columns += _interval_columns(key, f"AP{mark}", level, lambda name, of=side: of.per_class[name])
        columns.append(Column(f"{key}_50", f"AP50{mark}", value=lambda name, of=side: of.per_class_AP50[name].value))
    if isinstance(found, Comparison):
        columns += _interval_columns("difference", "B - A", level, found.per_class.__getitem__)
    caption = f"AP by class with {level} intervals. A heading sorts; numbers begin with the largest."
    lead = "A class with few boxes has a wide interval: look at that before at its AP."
    table = make_table("classes", caption, columns, places)
    return Section("classes", "Classes", lead, (table,))


# -------------------------------------------------------------------------------------------------- parts


def _sides(found: FigureIntervals | Comparison) -> list[FigureIntervals]:
    """A, and B if there is one."""
    return [found.first, found.second] if isinstance(found, Comparison) else [found]


def _interval_columns(
    key: str, heading: str, level: str, interval: Callable[[str], Interval | Difference]
) -> list[Column]:
    """A figure, or a difference with its sign, and its interval."""
    sign = key == "difference"

    def limits(name: str) -> str | None:
        return _range(interval(name).low, interval(name).high, sign=sign)

    return [
        Column(key, heading, "difference" if sign else "figure", lambda name: interval(name).value),
        Column(f"{key}_range", level, "text", limits),
    ]


def _beside(models: Sequence[ModelUnderTest]) -> Table:
    """What the twelve figures do not say: (what, key, meaning)."""
    busy = "reading, model and post-processing, on this machine as busy as it was"
    rows = (
        ("AP after NMS", "AP_nms", "class-wise NMS at IoU 0.7; the gain over AP is the cost of duplicates"),
        ("AP50 after NMS", "AP50_nms", "likewise"),
        ("predictions per image", "predictions_per_image", "that score over 0.3"),
        ("boxes per image", "boxes_per_image", "to be found"),
        ("images per second", "images_per_second", busy),
    )
    names = ["A", "B"] if len(models) > 1 else [models[0].label]
    found = [model.evaluation.to_json() for model in models]
    columns = (
        Column("what", "what", "text", lambda row: row[0]),
        *(
            Column(key, label, value=lambda row, of=own: of[row[1]])
            for key, label, own in zip("ab", names, found, strict=False)
        ),
        Column("meaning", "meaning", "text", lambda row: row[2]),
    )
    return make_table("beside", "Duplicates, confidence and speed.", columns, rows)


def _range(low: float, high: float, *, sign: bool = False) -> str | None:
    if math.isnan(low):
        return None
    form = "{:+.3f} to {:+.3f}" if sign else "{:.3f} to {:.3f}"
    return form.format(low, high)
