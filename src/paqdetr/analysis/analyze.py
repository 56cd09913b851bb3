"""From a checkpoint and a data set to a report: one pass over the images, then one chapter after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from paqdetr._version import __version__
from paqdetr.analysis.curves import layer_section, training_section
from paqdetr.analysis.errors import calibration_section, confusion_section, curve_section, mistake_section
from paqdetr.analysis.examples import example_section
from paqdetr.analysis.inside import inside_sections
from paqdetr.analysis.patterns import pattern_chapter
from paqdetr.analysis.subject import Analysis, ModelUnderTest, Progress, has_boxes, training_split
from paqdetr.analysis.summary import class_section, findings_section, summary_section
from paqdetr.analysis.usage import usage_chapter
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.errors import ConfigError, DataError, import_extra
from paqdetr.evaluation.content import ContentCollector
from paqdetr.evaluation.evaluate import evaluate_split, require_same_classes
from paqdetr.evaluation.layers import LayerCollector
from paqdetr.metrics.intervals import SAMPLES
from paqdetr.metrics.matches import MatchTable
from paqdetr.metrics.query_usage import BatchMatch, QueryUsage
from paqdetr.models import Detector, load
from paqdetr.report.page import Chapter, Heading, render, require_report_place, write_folder
from paqdetr.report.section import Section
from paqdetr.text import Summary, figure

Made = Section | tuple[Section, ...] | None
CHAPTERS: tuple[Callable[[Analysis], Made], ...] = (
    findings_section,
    example_section,
    summary_section,
    class_section,
    lambda analysis: mistake_section(analysis.models),
    lambda analysis: confusion_section(analysis.models),
    lambda analysis: curve_section(analysis.models),
    lambda analysis: calibration_section(analysis.models),
    lambda analysis: training_section([(one.label, one.records) for one in analysis.models]),
)
"""What the report shows, in order. A chapter is a section on all models, or one for each of them, or None."""
RESEARCH: tuple[Callable[[Analysis], Made], ...] = (
    lambda analysis: layer_section([(one.label, one.stages) for one in analysis.models]),
    usage_chapter,
    pattern_chapter,
    inside_sections,
)
"""Chapters that are folded away at first."""
_FOLD = "How queries are used"


@dataclass(frozen=True, slots=True, repr=False)
class Report(Summary):
    """What `analyze` wrote.

    Attributes:
        page: index.html; it needs no other file.
        sections: of the model; where two models have sections of their own, the other's follow under `against`.
        figures: COCO figures of the model by name, as `Evaluation.to_json` has them.
        against: sections of the other model; empty without one.
    """

    page: Path
    sections: tuple[Section, ...]
    figures: dict[str, Any]
    against: tuple[Section, ...] = ()

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        parts = [f"{key} {figure(self.figures.get(key))}" for key in ("AP", "AP50", "AP75")]
        return f"Report: {self.page}", [("figures", ", ".join(parts))]


def analyze(
    model: Detector | str | Path,
    *,
    data: str | Path,
    output: str | Path,
    split: str = "val",
    against: Detector | str | Path | None = None,
    images: int = 24,
    samples: int = SAMPLES,
    seed: int = 0,
    batch_size: int = 4,
    device: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a report of what a detector does on one split: a page, and the numbers behind each plot in data/.

    Args:
        model: a checkpoint, a run's folder, or a detector. A run's folder also gives the curves of the training.
        data: the data set's folder.
        output: a folder that is new, empty, or holds an earlier report, which is replaced. It is written whole or not at all.
        split: "train", "val" or "test".
        against: another model, shown side by side, with paired intervals of the differences: B - A, this one minus `model`.
        images: how many images the gallery shows: the worst, some of every class and kind of mistake, and the best. The inside
            is shown for a twelfth of it, at least one.
        samples: resamples of the bootstrap.
        seed: of the resamples.
        batch_size: images that go through together; it changes no figure.
        device: where checkpoints are put; None: the best there is. Detectors stay where they are.
        progress: called with (stage, done, in all).

    Raises:
        CheckpointError, DataError, ConfigError, StorageError: with what is wrong and what helps.
    """
    if images < 1 or samples < 1:
        raise ConfigError(f"images={images}, samples={samples}: expected at least 1 of each", "give more")
    import_extra("sklearn", "analyze")  # now, not after the evaluation
    output = Path(output)
    require_report_place(output)
    chosen = [model] if against is None else [model, against]
    opened = open_split(data, split)
    if not len(opened):
        raise DataError(f"{opened.annotation_file}: the split has no images", "choose another --split")
    if not has_boxes(opened):
        raise DataError(
            f"{opened.annotation_file}: none of its {len(opened)} images has an object to be found ({opened.skipped} crowds "
            "and boxes without area in their image)",
            "choose another --split; `paqdetr data check` says what is wrong with the boxes",
        )
    truth = opened.ground_truth()
    learning, unread = training_split(data)
    detectors = [one if isinstance(one, Detector) else load(one, device=device) for one in chosen]
    for one in detectors:
        require_same_classes(one.classes, opened)
        if learning is not None:
            try:
                require_same_classes(one.classes, learning)
            except DataError as error:  # a data set that has grown since
                learning, unread = None, error.message
        if (dtype := next(one.parameters()).dtype) != torch.float32:
            raise ConfigError(
                f"model: {one.name} is in {dtype}, and losses and gradients are computed in float32",
                "pass model.float()",
            )
    report_progress = progress or (lambda stage, done, total: None)
    models = [
        _observe(detector, source, label, opened, truth, batch_size, report_progress)
        for detector, source, label in zip(detectors, chosen, _labels(chosen, detectors), strict=True)
    ]
    analysis = Analysis(models, images, samples, seed, report_progress, learning, unread)
    made = [(found, chapter in RESEARCH) for chapter in CHAPTERS + RESEARCH if (found := chapter(analysis)) is not None]
    chapters = [
        Chapter(
            tuple(replace(one, fold=_FOLD if folded else "") for one in ([own] if isinstance(own, Section) else own))
        )
        for own, folded in made
    ]
    write_folder(output, render(_heading(models, Path(data), split), chapters), chapters)
    return Report(
        page=output / "index.html",
        sections=tuple(chapter.sections[0] for chapter in chapters),
        figures=models[0].evaluation.to_json(),
        against=tuple(chapter.sections[1] for chapter in chapters if len(chapter.sections) > 1),
    )


def _observe(
    detector: Detector,
    source: Detector | str | Path,
    label: str,
    split: DetectionDataset,
    truth: dict[str, Any],
    batch_size: int,
    progress: Progress,
) -> ModelUnderTest:
    """The one pass over the split that everything is made of."""
    match = BatchMatch()
    usage = QueryUsage(num_queries=detector.config.num_queries, match=match)
    content = ContentCollector(num_classes=len(detector.classes), match=match)
    layers = LayerCollector(detector.classes, detector.config)
    found = evaluate_split(
        detector,
        split,
        batch_size=batch_size,
        progress=lambda done, total: progress(f"evaluate {label}", done, total),
        observers=[usage, content, layers],
    )
    return ModelUnderTest(
        label=label,
        truth=truth,
        results=found.results,
        table=MatchTable.match(truth, found.results),
        model=detector,
        checkpoint=None if isinstance(source, Detector) else Path(source),
        split=split,
        evaluation=found,
        usage=usage,
        content=content,
        layers=layers,
    )


def _labels(sources: Sequence[Detector | str | Path], detectors: Sequence[Detector]) -> list[str]:
    """The models' names; with the checkpoint's where two share one, and with a letter where that is the same as well: figures
    are kept by label."""
    names = [detector.name for detector in detectors]
    if len(set(names)) == len(names):
        return names
    places = ["given" if isinstance(source, Detector) else "/".join(Path(source).parts[-2:]) for source in sources]
    names = [f"{name} ({place})" for name, place in zip(names, places, strict=True)]
    if len(set(names)) == len(names):
        return names
    return [f"{name} {letter}" for name, letter in zip(names, "AB", strict=True)]


def _heading(models: Sequence[ModelUnderTest], data: Path, split: str) -> Heading:
    names = tuple(one.label for one in models)
    title = f"{' against '.join(names)} on {data.resolve().name} {split}"
    first = models[0]
    facts = [("Data", f"{data}, {split}: {len(first.split)} images, {len(first.truth['annotations'])} boxes")]
    for letter, one in zip("AB", models, strict=False):
        which = f"Model {letter}" if len(models) > 1 else "Model"
        parameters = sum(parameter.numel() for parameter in one.model.parameters())
        where = "an object in memory" if one.checkpoint is None else str(one.checkpoint)
        size = one.model.preprocessing.image_size
        facts.append((which, f"{one.model.name}, {parameters / 1e6:.1f} million parameters, input {size}, {where}"))
    facts.append(("Made by", f"paqdetr {__version__} on {date.today().isoformat()}"))
    return Heading(title=title, models=names, facts=tuple(facts))
