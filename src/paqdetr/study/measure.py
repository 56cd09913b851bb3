"""Measures a finished training: `python -m paqdetr.study.measure JOB.json`, a process of its own that a queue starts."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.config import load_config
from paqdetr.data.dataset import DetectionDataset, open_split
from paqdetr.environment import require_device
from paqdetr.errors import UserError
from paqdetr.evaluation.content import ContentCollector
from paqdetr.evaluation.evaluate import detect_split, require_same_classes
from paqdetr.evaluation.layers import LayerCollector
from paqdetr.files import write_text
from paqdetr.metrics.diagnosis import error_split
from paqdetr.metrics.intervals import resample_images
from paqdetr.metrics.matches import MatchTable
from paqdetr.metrics.query_report import QueryUsageReport, Spread
from paqdetr.metrics.query_usage import BatchMatch, QueryUsage
from paqdetr.models import Detector, load
from paqdetr.models.cost import model_cost
from paqdetr.runs import Record, Run, flat_settings
from paqdetr.serialize import json_number, plain
from paqdetr.structures import CONFIDENT, Detections
from paqdetr.study.results import RunResult
from paqdetr.study.runs import Places, PlannedRun, RunKey, read_source
from paqdetr.study.spec import Study

# Raised whenever a figure would come out otherwise than before. A figure that is new is a dash where it was not measured.
_VERSION = 1
# What a training ran with: of its last session.
_PROVENANCE = ("started", "git", "paqdetr", "python", "packages", "machine")


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be measured, of which run, and where the result goes.

    Attributes:
        key: of the run.
        run, folder, result: its folder, that of the data set, and the file to write.
        settings: flat, as planned.
        measure: what the result depends on besides the run: `Study.measure_of`, and the version of this file.
        device: "cpu", ...; the best there is if None.
        source: which images the run was trained on; None if that was not recorded.
    """

    key: RunKey
    run: str
    folder: str
    result: str
    settings: dict[str, Any]
    measure: dict[str, Any]
    device: str | None
    source: dict[str, Any] | None = None

    @classmethod
    def of(cls, study: Study, planned: PlannedRun, places: Places, *, device: str | None) -> Job:
        """What a study wants to know of one of its runs."""
        key = planned.key
        return cls(
            key=key,
            run=str(places.run(key).output),
            folder=str(planned.folder),
            result=str(places.result(key)),
            settings=flat_settings(planned.config),
            measure={"version": _VERSION, **study.measure_of(key.data)},
            device=device,
            source=read_source(places.source(key)),
        )

    def failed(self, reason: str) -> RunResult:
        """The result of a run that has none."""
        return RunResult(self.key, reason, self.settings, measure=self.measure)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """From `asdict` by way of json."""
        arguments: dict[str, Any] = {**values, "key": RunKey(**values["key"])}
        return cls(**arguments)


def measure_run(job: Job) -> RunResult:
    """Evaluate a run's checkpoints and collect what its records say.

    Raises:
        UserError: a checkpoint or the data cannot be read, or do not fit.
    """
    run = Run(Path(job.run))
    wanted = job.measure
    split = open_split(job.folder, wanted["split"])
    figures: dict[str, dict[str, Any]] = {}
    replicates: dict[str, dict[str, np.ndarray]] = {}
    model: Detector | None = None
    for checkpoint in wanted["checkpoints"]:
        model = load(getattr(run, checkpoint), device=str(require_device(job.device)))
        figures[checkpoint], replicates[checkpoint] = measure_model(
            model, split, replicates=wanted["replicates"], seed=wanted["seed"]
        )
    assert model is not None
    records, sessions = run.records(), json.loads(run.environment_file.read_text(encoding="utf-8"))
    return RunResult(
        key=job.key,
        failed=None,
        settings=flat_settings(load_config(run.config_file)),
        measure=job.measure,
        images={"count": len(split), "hash": _hash(split)},
        figures=figures,
        replicates=replicates,
        curve=learning_curve(records),
        cost=cost_of(run, records, model, split) | {"cpu_seconds": _cpu_seconds(run, len(sessions))},
        provenance={
            "sessions": len(sessions),
            **{name: sessions[-1].get(name) for name in _PROVENANCE},
            "source": job.source,
        },
    )


def measure_model(
    model: Detector, split: DetectionDataset, *, replicates: int, seed: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of a model on a split, and those of each resample of its images.

    Returns:
        figures by name; and (R,) float64 by name.
    """
    require_same_classes(model.classes, split)
    found: list[Detections] = []
    match = BatchMatch()
    usage = QueryUsage(num_queries=model.config.num_queries, match=match)
    content = ContentCollector(num_classes=len(model.classes), match=match)
    layers = LayerCollector(model.classes, model.config)
    for index, detections in detect_split(model, split, batch_size=4, observers=[usage, content, layers]):
        detections.image_id = split.image_ids[index]
        found.append(detections)
    figures, values = measure_detections(split, found, replicates=replicates, seed=seed)
    rows = [row for detections in found for row in detections.to_coco()]
    return figures | {
        "queries": plain(query_views(usage.report()) | content.shares, 6),
        "layers": [stage.to_json() for stage in layers.figures(split)],
        "mistakes": plain(error_split(split.ground_truth(), rows).gains, 6),
    }, values


def measure_detections(
    split: DetectionDataset, found: Sequence[Detections], *, replicates: int, seed: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """As `measure_model`, but for query use, of detections in any order, those of each image by its id."""
    truth = split.ground_truth()
    cleaned = [detections.without_duplicates() for detections in found]
    table, cleaned_table = (
        MatchTable.match(truth, [row for detections in some for row in detections.to_coco()])
        for some in (found, cleaned)
    )
    # A resample counts images in the order of the tables, which is not the split's where ids do not ascend.
    weights = resample_images(len(split), replicates, seed)
    raw, raw_values = _figures(table, weights)
    after, after_values = _figures(cleaned_table, weights)
    sure = {detections.image_id: int((detections.scores > CONFIDENT).sum()) for detections in found}
    counts = np.array([sure[image] for image in table.image_ids])
    figures = {
        **raw,
        "AP_nms": after["AP"],
        "AP50_nms": after["AP50"],
        "predictions_per_image": round(float(counts.mean()), 4),
        "boxes_per_image": round(float(np.mean([len(split.labels(i)) for i in range(len(split))])), 4),
    }
    values = {
        "AP": raw_values["AP"],
        "AP50": raw_values["AP50"],
        "AP_nms": after_values["AP"],
        "predictions_per_image": weights @ counts / len(split),
    }
    return figures, values


def _figures(table: MatchTable, weights: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The COCO figures of a result set, and AP and AP50 of each resample of the images, NaN where a resample holds no object;
    weights (R, I)."""
    whole = table.figures()
    figures: dict[str, Any] = plain({name: values[0] for name, values in whole.figures.items()}, 6)
    figures["per_class"] = plain(dict(zip(table.class_names, whole.per_class[0], strict=True)), 6)
    precision = table.average_precision(weights, areas=(0,))[:, 0]  # (R, C, T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, and meant so
        # A rare class may be missing in a resample: the mean is over those that are there, as in COCO.
        values = {"AP": np.nanmean(precision, axis=(1, 2)), "AP50": np.nanmean(precision[:, :, 0], axis=1)}
    return figures, values


def query_views(report: QueryUsageReport) -> dict[str, Any]:
    """The views of query use as single numbers: Gini coefficients, with what they have to be read beside."""
    views: dict[str, Any] = {"n": report.num_queries, "cosine": report.query_cosine}
    spreads: dict[str, Spread | None] = {
        **{f"over_{round(100 * spread.threshold)}": spread for spread in report.activations if spread.threshold},
        "equal": report.equal,
        "positives": report.positives,
    }
    for name, spread in spreads.items():
        if spread is not None:
            views[f"gini_{name}"], views[f"per_image_{name}"] = spread.gini, spread.per_image
            views[f"by_rank_{name}"] = spread.by_rank
    if report.equal is not None:
        views["threshold_equal"] = report.equal.threshold
    if report.patterns is not None:
        views["gini_patterns"], views["entropy"] = report.patterns.gini, report.patterns.entropy
        views["dead_patterns"], views["patterns"] = report.patterns.dead, len(report.patterns.mass)
    return {name: value for name, value in views.items() if value is not None}


def learning_curve(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The evaluations of a training on its validation split, each with the mean loss since the one before."""
    curve: list[dict[str, Any]] = []
    # A record's means are over the steps since the one before, of either kind.
    losses, steps, last = 0.0, 0, 0
    for record in records:
        if record.get("kind") == "train":
            losses += record["loss"] * (record["step"] - last)
            steps += record["step"] - last
            last = record["step"]
        elif record.get("kind") == "eval":
            names = ("AP", "AP50", "AP_nms", "predictions_per_image")
            row = {"step": record["step"]} | {name: json_number(record.get(name), 6) for name in names}
            curve.append(row | {"loss": json_number(losses / steps, 6) if steps else None})
            losses, steps, last = 0.0, 0, record["step"]
    return curve


def cost_of(run: Run, records: Sequence[Record], model: Detector, split: DetectionDataset) -> dict[str, Any]:
    """What the training took, and what the model takes. FLOPs are of one image of the split's commonest size."""
    finished, start = ([row for row in records if row.get("kind") == kind][-1] for kind in ("finished", "start"))
    sizes = Counter(model.preprocessing.target_size(*size) for size in split.sizes.tolist())
    height, width = sizes.most_common(1)[0][0]
    size = model_cost(str(run.config_file), height=height, width=width)
    return {
        "steps": finished["step"],
        "seconds": finished["seconds"],
        "step_seconds": round(finished["seconds"] / max(finished["step"], 1), 4),
        "peak_memory_gib": finished["peak_memory_gib"],
        "parameters": size.parameters,
        "trainable": size.trainable,
        "gflops": round(size.flops / 1e9, 3),
        "image": [height, width],
        "device": start["device"],
        "threads": start["threads"],
        "processes": start["processes"],
    }


def _cpu_seconds(run: Run, sessions: int) -> float | None:
    """Of all sessions of the training, its evaluations among them; None unless every one of them was counted."""
    file = run.output / "sessions.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:  # a line that was cut when the disk was full
        return None
    times = [row["cpu_seconds"] for row in rows]
    return None if len(rows) != sessions or None in times else round(sum(times), 1)


def _hash(split: DetectionDataset) -> str:
    """Which images, in which order, with how many boxes: resamples of equal hashes are the same."""
    content = json.dumps([[str(i), len(split.boxes(n))] for n, i in enumerate(split.image_ids)])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def main(file: str) -> int:
    """Do a job; 2 and the reason on standard error if it cannot be done."""
    job = Job.from_json(json.loads(Path(file).read_text(encoding="utf-8")))
    try:
        write_text(Path(job.result), measure_run(job).to_text())
    except UserError as error:
        sys.stderr.write(f"error: {error.message}\nhelp: {error.remedy}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
