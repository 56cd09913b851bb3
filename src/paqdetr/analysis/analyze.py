"""From a checkpoint and a data set to a report: one pass over the images, then one section after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paqdetr._version import __version__
from paqdetr.analysis.errors import diagnosis_sections
from paqdetr.analysis.examples import example_sections
from paqdetr.analysis.gradients import content_gradients
from paqdetr.analysis.inside import inside_section, loss_settings
from paqdetr.analysis.layers import layer_section
from paqdetr.analysis.patterns import Studied, pattern_section
from paqdetr.analysis.semantics import semantics
from paqdetr.analysis.subject import Judged, Subject, outcome
from paqdetr.analysis.summary import class_section, summary_section
from paqdetr.analysis.training import run_folder, training_section
from paqdetr.analysis.usage import Usage, usage_section
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits
from paqdetr.errors import ConfigError, DataError
from paqdetr.evaluation.content import ContentCollector
from paqdetr.evaluation.evaluate import evaluate_split, require_same_classes
from paqdetr.evaluation.layers import LayerCollector
from paqdetr.losses.criterion import build_criterion
from paqdetr.metrics import QueryUsage
from paqdetr.metrics.intervals import SAMPLES, compare_results, figure_intervals
from paqdetr.metrics.matches import MatchTable
from paqdetr.models import Detector, load
from paqdetr.report.page import Chapter, Heading, render, require_report_place, write_folder
from paqdetr.report.section import Section
from paqdetr.runs import read_metrics

# Where nothing is found there is no best threshold.
_CONFIDENT = 0.3
_MOST_BOXES = 8

Progress = Callable[[str, int, int], None]
"""Told (stage, done, in all)."""


@dataclass(frozen=True, slots=True)
class Report:
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


def analyze(
    model: Detector | str | Path,
    *,
    data: str | Path,
    output: str | Path,
    split: str = "val",
    against: Detector | str | Path | None = None,
    images: int = 6,
    samples: int = SAMPLES,
    seed: int = 0,
    batch_size: int = 4,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Write a report of what a detector does on one split: a page, and the numbers behind each plot in data/.

    Args:
        model: a checkpoint, a run's folder, or a detector. A run's folder also gives the curves of the training.
        data: the data set's folder.
        output: a folder that is new, empty, or holds an earlier report, which is replaced. It is written whole or not at all.
        split: "train", "val" or "test".
        against: another model, shown side by side, with paired intervals of the differences.
        images: how many of the best, of the worst and (with `against`) of the most different images are shown. The inside is
            shown for a third of it, at least one.
        samples, seed: of the bootstrap.
        batch_size: images that go through together; it changes no figure.
        device: where checkpoints are put; detectors stay where they are.
        progress: told (stage, done, in all).

    Raises:
        CheckpointError, DataError, ConfigError, StorageError: with what is wrong and what helps.
    """
    if images < 1 or samples < 1:
        raise ConfigError(f"images={images}, samples={samples}: expected at least 1 of each", "give more")
    output = Path(output)
    require_report_place(output)
    chosen = [model] if against is None else [model, against]
    opened = open_split(data, split)
    if not len(opened):
        raise DataError(f"{opened.annotation_file}: the split has no images", "choose another --split")
    if not _has_boxes(opened):
        raise DataError(
            f"{opened.annotation_file}: none of its {len(opened)} images has an object to be found ({opened.skipped} crowds "
            "and boxes without area in their image)",
            "choose another --split; `paqdetr data check` says what is wrong with the boxes",
        )
    truth = opened.ground_truth()
    detectors = [one if isinstance(one, Detector) else load(one, device=device) for one in chosen]
    for one in detectors:
        require_same_classes(one.classes, opened)
        if (dtype := next(one.parameters()).dtype) != torch.float32:
            raise ConfigError(
                f"model: {one.name} is in {dtype}, and losses and gradients are computed in float32",
                "pass model.float()",
            )
    labels = _labels(chosen, detectors)
    tell = progress or _silent
    watched = [
        _watched(detector, source, label, opened, truth, batch_size, tell)
        for detector, source, label in zip(detectors, chosen, labels, strict=True)
    ]
    chapters = _chapters(watched, Path(data), images, samples, seed, tell)
    subjects = [one.subject for one in watched]
    heading = _heading(subjects, Path(data), split)
    page = render(heading, chapters)
    write_folder(output, page, chapters)
    return Report(
        page=output / "index.html",
        sections=tuple(chapter.sections[0] for chapter in chapters),
        figures=subjects[0].evaluation.to_json(),
        against=tuple(chapter.sections[1] for chapter in chapters if len(chapter.sections) > 1),
    )


@dataclass(frozen=True, slots=True)
class _Watched:
    """A model, and those that watched its evaluation."""

    subject: Subject
    judged: Judged
    usage: QueryUsage
    content: ContentCollector
    layers: LayerCollector


def _watched(
    detector: Detector,
    source: Detector | str | Path,
    label: str,
    split: DetectionDataset,
    truth: dict[str, Any],
    batch_size: int,
    tell: Progress,
) -> _Watched:
    """The one pass over the split that everything is made of."""
    usage = QueryUsage(num_queries=detector.config.num_queries)
    content = ContentCollector(num_classes=len(detector.classes))
    layers = LayerCollector(detector.classes, detector.config)
    found = evaluate_split(
        detector,
        split,
        batch_size=batch_size,
        progress=_stage(tell, f"evaluate {label}"),
        observers=[usage, content, layers],
    )
    table = MatchTable.match(truth, found.results)
    checkpoint = None if isinstance(source, Detector) else Path(source)
    return _Watched(
        Subject(label, detector, checkpoint, split, truth, found, table),
        Judged(label, truth, found.results, table),
        usage,
        content,
        layers,
    )


def _chapters(
    watched: Sequence[_Watched], data: Path, images: int, samples: int, seed: int, tell: Progress
) -> list[Chapter]:
    subjects = [one.subject for one in watched]
    judged = [one.judged for one in watched]
    stage = _stage(tell, "intervals")
    tables = [subject.table for subject in subjects]
    if len(subjects) > 1:
        found = compare_results(tables[1], tables[0], samples=samples, seed=seed, progress=stage)
    else:
        found = figure_intervals(tables[0], samples=samples, seed=seed, progress=stage)
    image_ids = subjects[0].split.image_ids
    outcomes = [outcome(own.table, own.confident or _CONFIDENT, image_ids) for own in judged]
    runs = [run_folder(subject.checkpoint) for subject in subjects]
    training = _training_split(data)
    examples = example_sections(subjects, outcomes, images=images, progress=_stage(tell, "best and worst images"))
    chapters = [
        Chapter((summary_section(subjects, found),)),
        Chapter((class_section(subjects, found),)),
        Chapter(examples),
        *(Chapter((section,)) for section in diagnosis_sections(judged)),
        Chapter((_layers(watched, tell),)),
        Chapter((_usage(watched, runs, training, 4 * images, tell),)),
        Chapter((_patterns(watched, samples, seed, tell),)),
    ]
    few = max(1, images // 3)
    shown = np.argsort(-outcomes[0].right, kind="stable")[:few].tolist()
    learning = None if training is None else (training, _learnable(training, few))
    inside = [
        inside_section(subject, images=shown, training=learning, progress=_stage(tell, f"inside {subject.label}"))
        for subject in subjects
    ]
    chapters.append(Chapter(tuple(inside)))
    curves = training_section([(own.label, run) for own, run in zip(subjects, runs, strict=True)])
    return chapters if curves is None else [*chapters, Chapter((curves,))]


def _layers(watched: Sequence[_Watched], tell: Progress) -> Section:
    found = []
    for done, one in enumerate(watched):
        tell("layers", done, len(watched))
        found.append((one.subject.label, one.layers.figures(one.subject.split)))
    tell("layers", len(watched), len(watched))
    return layer_section(found)


def _usage(
    watched: Sequence[_Watched],
    runs: Sequence[Path | None],
    training: DetectionDataset | None,
    images: int,
    tell: Progress,
) -> Section:
    """The use of queries, with the gradients that some images of the training split give them."""
    found = []
    for one, run in zip(watched, runs, strict=True):
        gradients = None
        if training is not None:
            settings, _ = loss_settings(one.subject.model, one.subject.checkpoint)
            gradients = content_gradients(
                one.subject.model,
                training,
                criterion=build_criterion(settings),
                images=images,
                progress=_stage(tell, f"gradients {one.subject.label}"),
            )
        records = [] if run is None else read_metrics(run / "metrics.jsonl")
        found.append(Usage(one.subject.label, one.usage.report(gradients=gradients), records))
    return usage_section(found[0], against=found[1] if len(found) > 1 else None)


def _patterns(watched: Sequence[_Watched], samples: int, seed: int, tell: Progress) -> Section:
    """What patterns are used for, with as many permutations as there are resamples."""
    found = []
    for done, one in enumerate(watched):
        tell("patterns", done, len(watched) + 1)
        study = one.content.study(one.subject.model)
        found.append(Studied(one.subject.label, study, semantics(study, permutations=max(samples - 1, 19), seed=seed)))
    tell("patterns", len(watched), len(watched) + 1)
    against = found[1] if len(found) > 1 else None
    return pattern_section(found[0], watched[0].subject.split, against=against, seed=seed)


def _training_split(data: Path) -> DetectionDataset | None:
    """The split that a model learns from; None if the data has none with boxes, which an analysis can do without."""
    if "train" not in available_splits(data):
        return None
    split = open_split(data, "train")
    return split if _has_boxes(split) else None


def _has_boxes(split: DetectionDataset) -> bool:
    return any(len(split.labels(index)) for index in range(len(split)))


def _learnable(split: DetectionDataset, few: int) -> list[int]:
    """Images with several boxes, but no more than can be told apart."""
    counts = np.array([len(split.labels(index)) for index in range(len(split))])
    fit = np.flatnonzero((counts > 0) & (counts <= _MOST_BOXES))
    if not len(fit):
        fit = np.flatnonzero(counts > 0)
    return fit[np.argsort(-counts[fit], kind="stable")][:few].tolist()


def _labels(sources: Sequence[Detector | str | Path], detectors: Sequence[Detector]) -> list[str]:
    """The models' names; with the checkpoint's where two share one, and with a letter where that is the same as well: figures
    are kept by label."""
    names = [detector.name for detector in detectors]
    if len(set(names)) == len(names):
        return names
    names = [
        f"{name} ({'given' if isinstance(source, Detector) else _short(Path(source))})"
        for name, source in zip(names, sources, strict=True)
    ]
    if len(set(names)) == len(names):
        return names
    return [f"{name} {letter}" for name, letter in zip(names, "AB", strict=True)]


def _short(path: Path) -> str:
    return "/".join(path.parts[-2:])


def _heading(subjects: Sequence[Subject], data: Path, split: str) -> Heading:
    names = [subject.label for subject in subjects]
    title = f"{' against '.join(names)} on {data.resolve().name} {split}"
    facts = [
        (
            "Data",
            f"{data}, {split}: {len(subjects[0].split)} images, {len(subjects[0].truth['annotations'])} boxes",
        )
    ]
    for letter, subject in zip("AB", subjects, strict=False):
        which = f"Model {letter}" if len(subjects) > 1 else "Model"
        parameters = sum(parameter.numel() for parameter in subject.model.parameters())
        where = "an object in memory" if subject.checkpoint is None else str(subject.checkpoint)
        size = subject.model.preprocessing.image_size
        facts.append((which, f"{subject.model.name}, {parameters / 1e6:.1f} million parameters, input {size}, {where}"))
    facts.append(("Made by", f"paqdetr {__version__} on {date.today().isoformat()}"))
    return Heading(title=title, models=tuple(names), facts=tuple(facts))


def _stage(tell: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(name, done, total)


def _silent(stage: str, done: int, total: int) -> None:
    pass
