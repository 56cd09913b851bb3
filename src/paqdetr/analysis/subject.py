"""What is analysed: result sets beside their ground truth, and models with what one pass over a split found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.config import Config, LossConfig, load_config
from paqdetr.data.check import inspect_all
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.data.layout import available_splits
from paqdetr.data.split import duplicate_groups
from paqdetr.errors import ConfigError, DataError
from paqdetr.evaluation.content import ContentCollector
from paqdetr.evaluation.evaluate import Evaluation
from paqdetr.evaluation.layers import LayerCollector, StageFigures
from paqdetr.metrics import QueryUsage
from paqdetr.metrics.diagnosis import Confusion, ErrorSplit, ThresholdCurves, confusion, error_split, threshold_curves
from paqdetr.metrics.intervals import Comparison, FigureIntervals, compare_results, figure_intervals
from paqdetr.metrics.matches import MatchTable
from paqdetr.models import Detector
from paqdetr.report.plots import BLUE, ORANGE
from paqdetr.report.section import Column
from paqdetr.runs import Record, read_metrics
from paqdetr.structures import CONFIDENT

_MOST_COMPARED = 4000  # images, of which some 100 a second are read
COLOURS = (BLUE, ORANGE)
"""Of the first model and of the second."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""


@dataclass(frozen=True)
class ResultSet:
    """Detections of any detector, matched.

    Attributes:
        label: what the report calls them.
        truth: a COCO json.
        results: COCO results.
        table: their matches.
    """

    label: str
    truth: dict[str, Any]
    results: Sequence[dict[str, Any]]
    table: MatchTable

    @cached_property
    def curves(self) -> ThresholdCurves:
        """F1 and the like at IoU .5."""
        return threshold_curves(self.table)

    @cached_property
    def mistakes(self) -> ErrorSplit:
        """Of all detections."""
        return error_split(self.truth, self.results)

    @cached_property
    def confusion(self) -> Confusion:
        """Of those that score enough."""
        return confusion(self.truth, self.results, score_threshold=self.confident, table=self.table)

    @property
    def confident(self) -> float:
        """The score threshold at which F1 over all classes is at its best; 0 if nothing is found at all."""
        best = float(self.curves.best_threshold[-1])
        return 0.0 if np.isnan(best) else best


def labels(models: Sequence[Any]) -> list[str]:
    """ "" for one model or result set; A and B for two, as the page's heading and tables call them: names may be long."""
    return [""] if len(models) == 1 else list("AB")


def marks(models: Sequence[Any]) -> list[tuple[str, str]]:
    """(prefix of keys, ending of headings) of each model's columns: none for one, A and B for two."""
    return [("a", "")] if len(models) == 1 else [("a", " A"), ("b", " B")]


def model_column(models: Sequence[Any]) -> list[Column]:
    """The column that says which of two models a row is about; none for one."""
    return [Column("model", "model", "text")] if len(models) > 1 else []


@dataclass(frozen=True, kw_only=True)
class ModelUnderTest(ResultSet):
    """A model and what was observed in one pass over a split.

    Attributes:
        model: the detector.
        checkpoint: where it was read from, a file or a run's folder; None if it came as an object.
        split: the images.
        evaluation: of the model on the split.
        usage, content, layers: the observers of the evaluation.
    """

    truth: dict[str, Any]
    model: Detector
    checkpoint: Path | None
    split: DetectionDataset
    evaluation: Evaluation
    usage: QueryUsage
    content: ContentCollector
    layers: LayerCollector

    @cached_property
    def stages(self) -> tuple[StageFigures, ...]:
        """What each of its stages finds."""
        return self.layers.figures(self.split)

    @cached_property
    def outcome(self) -> Outcome:
        """What it got right in each image, where its F1 is best."""
        threshold = self.confident or CONFIDENT  # where nothing is found there is no best one
        return outcome(self.table, threshold, self.split.image_ids)

    @cached_property
    def records(self) -> list[Record]:
        """Of the run that its checkpoint lies in; empty if it lies in none.

        Raises:
            DataError: the run's metrics.jsonl cannot be read or has no record.
        """
        file = self._of_run("metrics.jsonl")
        return [] if file is None else read_metrics(file)

    @cached_property
    def run_config(self) -> Config | None:
        """The settings of that run; None if there is none, or this version cannot read them."""
        file = self._of_run("config.yaml")
        with suppress(ConfigError):
            return None if file is None else load_config(file)
        return None

    @cached_property
    def loss(self) -> tuple[LossConfig, str]:
        """The loss that it was trained with, as far as it is known, and where that is from: a checkpoint does not say; the
        settings of the run it lies in do, or else those that the model's name stands for."""
        if self.run_config is not None and self.run_config.name == self.model.name:
            return self.run_config.loss, "the run's config.yaml"
        with suppress(ConfigError):
            return load_config(self.model.name).loss, f"the settings of {self.model.name}"
        return LossConfig(), "the package's defaults"

    def _of_run(self, name: str) -> Path | None:
        if self.checkpoint is None:
            return None
        file = (self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent) / name
        return file if file.is_file() else None


@dataclass(frozen=True)
class Analysis:
    """What the chapters of a report are made from.

    Attributes:
        models: one, or the model and the one it is compared with.
        images, samples, seed: as of `analyze`.
        progress: called with (stage, done, in all).
        training, unread: as of `training_split`.
    """

    models: Sequence[ModelUnderTest]
    images: int
    samples: int
    seed: int
    progress: Progress
    training: DetectionDataset | None = None
    unread: str = ""

    def stage(self, name: str) -> Callable[[int, int], None]:
        """The progress of one stage."""
        return lambda done, total: self.progress(name, done, total)

    @property
    def few(self) -> int:
        """How many images are shown in detail."""
        return max(1, self.images // 12)

    @cached_property
    def intervals(self) -> FigureIntervals | Comparison:
        """Of the one model, or of both with their difference, B - A."""
        make = compare_results if self.models[1:] else figure_intervals
        tables = [one.table for one in self.models]
        return make(*tables, samples=self.samples, seed=self.seed, progress=self.stage("intervals"))

    @cached_property
    def near_duplicates(self) -> np.ndarray | None:
        """(I,) bool: images of the split, in the order of tables, that look like one of the training split; None if there is no
        other split to compare with, or images are so many that it would take minutes."""
        split, training = self.models[0].split, self.training
        if training is None or split.name == "train" or len(split) + len(training) > _MOST_COMPARED:
            return None
        paths = [own.path(index) for own in (training, split) for index in range(len(own))]
        facts, progress = [], self.stage("near-duplicates")
        for fact in inspect_all(paths):
            facts.append(fact)
            progress(len(facts), len(paths))
        groups = duplicate_groups(facts)
        alike = np.isin(groups[len(training) :], groups[: len(training)])
        by_id = dict(zip(split.image_ids, alike.tolist(), strict=True))
        return np.array([by_id[own] for own in self.models[0].table.image_ids])


def training_split(data: str | Path) -> tuple[DetectionDataset | None, str]:
    """The split that a model learns from, None if the data has none with boxes, which an analysis can do without; and why it
    cannot be read, empty otherwise: who evaluates may have the images of `val` alone."""
    try:
        split = open_split(data, "train") if "train" in available_splits(data) else None
    except DataError as error:
        return None, error.message
    return (split if split is not None and has_boxes(split) else None), ""


def has_boxes(split: DetectionDataset) -> bool:
    """Whether any image has an object to be found."""
    return any(len(split.labels(index)) for index in range(len(split)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model got right in each of I images of a split, at one score threshold and IoU 0.5.

    Attributes:
        threshold: detections below it do not count: where F1 over all classes is at its best.
        right, wrong, missed: (I,) int64 detections that found an object, that found none, objects not found.
    """

    threshold: float
    right: np.ndarray
    wrong: np.ndarray
    missed: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """(I,) 2 right / (2 right + wrong + missed); 1 where there was nothing to find and nothing was found."""
        total = 2 * self.right + self.wrong + self.missed
        return np.where(total > 0, 2 * self.right / np.maximum(total, 1), 1.0)


def outcome(table: MatchTable, threshold: float, image_ids: Sequence[int | str]) -> Outcome:
    """Count right, wrong and missed by image, in the order of `image_ids`: tables sort whole numbers, files need not."""
    t, images = table.threshold_index(0.5), len(table.image_ids)
    kept = (table.scores >= threshold) & ~table.ignored[0, t]
    right = np.bincount(table.images[kept & table.true_positive[0, t]], minlength=images)
    found = np.bincount(table.images[kept], minlength=images)
    objects = table.positives[0].sum(axis=0)
    places = {own: place for place, own in enumerate(table.image_ids)}
    order = [places[own] for own in image_ids]
    return Outcome(threshold, right[order], (found - right)[order], (objects - right)[order])
