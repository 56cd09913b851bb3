"""`paqdetr eval`"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from paqdetr.cli import options
from paqdetr.cli.console import OutputFiles, note, note_unfinished, progress_bar, results, table
from paqdetr.errors import ConfigError
from paqdetr.text import figure
from paqdetr.values import require_threshold

if TYPE_CHECKING:
    from paqdetr.data.dataset import DetectionDataset
    from paqdetr.distributed import Processes
    from paqdetr.evaluation.evaluate import Evaluation
    from paqdetr.metrics import CocoFigures
    from paqdetr.metrics.coco import CocoRecords
    from paqdetr.metrics.intervals import Difference, Interval
    from paqdetr.metrics.matches import MatchTable
    from paqdetr.models.detector import Detector
    from paqdetr.runtime import Predictor
    from paqdetr.runtime.tiles import Tiles

_Kind = Literal["bbox", "segm"]


@dataclass(frozen=True, slots=True)
class _Task:
    """What holds for every result set: the ground truth, and how results are compared with it."""

    data: Path | None
    split: str
    annotations: Path | None
    kind: _Kind
    max_detections: int
    resamples: int
    seed: int
    batch_size: int
    device: str | None
    threshold: float = 0.0
    nms: float | None = None
    tiles: Tiles | None = None

    @property
    def where(self) -> str:
        return str(self.annotations) if self.data is None else f"{self.data} {self.split}"

    @property
    def counted(self) -> str:
        """What a title says where more or fewer detections than COCO's 100 count."""
        return "" if self.max_detections == 100 else f", {self.max_detections} detections in place of 100"

    def source(self, path: Path, *, made_already: bool = False) -> dict[str, Any]:
        """What figures are of, for json: a model and how it was used, or a results file; and the ground truth."""
        truth: dict[str, Any] = {"annotations": str(self.annotations)}
        if self.data is not None:
            truth = {"data": str(self.data), "split": self.split}
        truth["max_detections"] = self.max_detections
        if made_already:
            return {"results": str(path), **truth, "iou_type": self.kind}
        tiles = None if self.tiles is None else asdict(self.tiles)
        return {"model": str(path), **truth, "threshold": self.threshold, "nms": self.nms, "tiles": tiles}

    def require_truth(self, option: str, remedy: str) -> None:
        if (self.data is None) == (self.annotations is None):
            raise ConfigError(f"eval {option} needs the ground truth, once", remedy)

    def dataset(self) -> DetectionDataset | None:
        """None if there is but a file with annotations."""
        from paqdetr.data.dataset import open_split

        return None if self.data is None else open_split(self.data, self.split)

    def truth(self, dataset: DetectionDataset | None) -> CocoRecords:
        from paqdetr.metrics.coco import CocoRecords

        content = self.annotations if dataset is None else dataset.ground_truth()
        assert content is not None
        return CocoRecords.open(content, self.kind)


@dataclass(frozen=True, slots=True)
class _Found:
    """A result set with all that is printed and written of it."""

    title: str
    figures: CocoFigures
    written: dict[str, Any]
    truth: CocoRecords
    rows: list[dict[str, Any]]
    queries: int | None = None


def evaluate(
    checkpoint: Annotated[Path | None, typer.Argument(help=options.TRAINED, metavar="MODEL")] = None,
    *,
    data: Annotated[Path | None, options.data(help="Folder of the data set, or its data.yaml.")] = None,
    split: options.Split = None,
    results_file: Annotated[
        Path | None, options.data("--results", help="Instead of a model: COCO results of any detector.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        options.data(
            metavar="A B", help="Instead of a model: two of them, or two results files (.json), side by side."
        ),
    ] = None,
    annotations: Annotated[
        Path | None, options.data(help="Ground truth of results, a COCO json; or give --data.")
    ] = None,
    iou_type: Annotated[str, options.figures(help="bbox or segm; segm with results alone.")] = "bbox",
    intervals: Annotated[
        bool, options.figures("--intervals", help="Bootstrap interval of each figure, over the images.")
    ] = False,
    resamples: options.Resamples = 1000,
    seed: options.Seed = 0,
    max_detections: Annotated[
        int,
        options.detections(
            min=1, max=10_000, help="Detections per class and image that count; raise it for crowded images."
        ),
    ] = 100,
    results_out: Annotated[
        Path | None, options.output(help="Keep the model's detections in this file, as COCO results.")
    ] = None,
    json_file: options.JsonFile = None,
    batch_size: options.BatchSize = 4,
    threshold: Annotated[
        float, options.detections(help="Score threshold; AP is that of the detections above it.")
    ] = 0.0,
    nms: options.Nms = None,
    tiles: options.TileSize = None,
    overlap: options.Overlap = None,
    with_whole: options.WithWhole = False,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
) -> None:
    """Print the COCO figures of a model or results file, or compare two."""
    from paqdetr.data.layout import split_to_evaluate

    _require_one(checkpoint, results_file, compare)
    if iou_type not in ("bbox", "segm"):
        raise ConfigError(f"--iou-type: expected bbox or segm, found {iou_type!r}", "choose one of them")
    kind: _Kind = "segm" if iou_type == "segm" else "bbox"
    if results_out is not None and checkpoint is None:
        raise ConfigError("--results-out keeps the detections of a MODEL", "leave it out")
    files = OutputFiles("paqdetr eval", overwrite=overwrite, json=json_file, results_out=results_out)
    if split is not None and data is None:
        raise ConfigError(f"--split {split} is of --data, which is not given", "give --data, or leave --split out")
    split = "" if data is None else split_to_evaluate(data, split)
    require_threshold(threshold)
    cut, suppress = options.tiles_of(tiles, overlap, with_whole), options.nms_of(nms)
    made_already = [path for path in compare or () if _is_results(path)] if results_file is None else [results_file]
    if made_already and (cut, suppress, threshold) != (None, None, 0):
        raise ConfigError(
            f"{made_already[0]}: --nms, --threshold and --tiles are about a MODEL, not about results", "leave them out"
        )
    task = _Task(
        data, split, annotations, kind, max_detections, resamples, seed, batch_size, device, threshold, suppress, cut
    )
    if compare is not None:
        written = _compare(compare, task)
    else:
        if checkpoint is not None:
            if data is None:
                raise ConfigError("eval MODEL needs --data", "name the data set's folder")
            if kind != "bbox" or annotations is not None:
                raise ConfigError("--iou-type and --annotations go with --results", "leave them out")
            found = _of_checkpoint(checkpoint, task)
        else:
            assert results_file is not None
            task.require_truth("--results", "give --annotations, or --data and --split")
            found = _of_results(results_file, task)
        written = None if found is None else _print(found, task, intervals=intervals)
        if found is not None:
            files.write("results_out", found.rows)
    if written is not None:  # None: another process prints and writes
        files.write("json", written)


def _require_one(checkpoint: Path | None, results_file: Path | None, compare: tuple[Path, Path] | None) -> None:
    """Raise ConfigError unless one thing is to be evaluated, and `--compare` has its own two files."""
    swallowed = next((str(path) for path in compare or () if str(path).startswith("--")), None)
    if swallowed is not None:
        raise ConfigError(
            f"--compare takes two files, and the option {swallowed} stands in the place of one",
            "write --compare A B, and other options before or after",
        )
    given = {"MODEL": checkpoint, "--results": results_file}
    found = [f"{name} {path}" for name, path in given.items() if path is not None]
    found += [] if compare is None else [f"--compare {compare[0]} {compare[1]}"]
    if len(found) != 1:
        raise ConfigError(
            f"eval takes a MODEL or --results or --compare, found {' and '.join(found) or 'none of them'}",
            "give one of them",
        )


def _is_results(path: Path) -> bool:
    """Whether a path names detections that are made already: a results file, or a folder of them."""
    from paqdetr.metrics.coco import is_shards

    return path.suffix == ".json" or is_shards(path)


def _of_checkpoint(checkpoint: Path, task: _Task) -> _Found | None:
    from paqdetr.loading import require_model

    file = require_model(checkpoint)
    dataset = task.dataset()
    assert dataset is not None
    from paqdetr.distributed import Processes, leave

    model, found = _detect(file, dataset, Processes.join(task.device), task)
    leave()
    if found is None:
        return None
    title = f"{model.name} on {task.where}, {found.images_per_second:.1f} images/s"
    config = getattr(model, "config", None)  # exported models have none
    queries = None if config is None else config.num_queries
    written = {"source": task.source(checkpoint), **found.to_json()}
    return _Found(title, found.figures, written, task.truth(dataset), found.results, queries)


def _detect(
    file: Path, dataset: DetectionDataset, processes: Processes, task: _Task
) -> tuple[Detector | Predictor, Evaluation | None]:
    """The model, and what it finds; None in all processes but the main one."""
    from paqdetr.evaluation.evaluate import evaluate_together
    from paqdetr.loading import is_exported, load

    if processes.main:
        note_unfinished(file)
    model = load(file, device=task.device if is_exported(file) else str(processes.device))
    with progress_bar(f"evaluate on {dataset.name}") as progress:
        found = evaluate_together(
            model,
            dataset,
            processes,
            batch_size=task.batch_size,
            max_detections=task.max_detections,
            progress=progress if processes.main else None,
            threshold=task.threshold,
            nms=task.nms,
            tiles=task.tiles,
        )
    return model, found


def _of_results(results_file: Path, task: _Task) -> _Found:
    from paqdetr.metrics.coco import evaluate_detections, read_results

    truth, rows = task.truth(task.dataset()), read_results(results_file)
    figures = evaluate_detections(
        truth, rows, iou_type=task.kind, source=str(results_file), max_detections=task.max_detections
    )
    title = f"{results_file} against {task.where}, {task.kind}"
    written = {"source": task.source(results_file, made_already=True), **figures.to_json()}
    return _Found(title, figures, written, truth, rows)


def _print(found: _Found, task: _Task, *, intervals: bool) -> dict[str, Any]:
    """Print the figures, with their intervals if these are asked for; what goes into the json."""
    from paqdetr.metrics.coco import FIGURE_NAMES
    from paqdetr.metrics.intervals import figure_intervals
    from paqdetr.metrics.matches import MatchTable
    from paqdetr.serialize import plain

    figures, drawn, headings = found.figures, None, ()
    written = {**found.written, "per_class_AP50": plain(figures.per_class_AP50), "max_detections": task.max_detections}
    if intervals:
        matches = MatchTable.match(found.truth, found.rows, task.kind, max_detections=task.max_detections)
        with progress_bar("resample the images") as progress:
            drawn = figure_intervals(matches, samples=task.resamples, seed=task.seed, progress=progress)
        written["intervals"], headings = drawn.to_json(), (_interval_heading(drawn.level),)

    def interval(kind: str, name: str) -> tuple[str, ...]:
        return () if drawn is None else (_range(getattr(drawn, kind)[name], ""),)

    made = table(found.title + task.counted, ("figure",), ("value", *headings), no_wrap=True)
    for name in FIGURE_NAMES:
        made.add_row(name, figure(getattr(figures, name)), *interval("figures", name))
    for key, label in (("AP_nms", "AP after NMS"), ("AP50_nms", "AP50 after NMS")):
        if key in written:
            made.add_row(label, figure(written[key]))
    results.print(made)
    made = table("by class", ("class",), ("AP", *headings, "AP50", *headings), no_wrap=True)
    for name, value in figures.per_class.items():
        own = (figure(value), *interval("per_class", name))
        made.add_row(name, *own, figure(figures.per_class_AP50[name]), *interval("per_class_AP50", name))
    results.print(made)
    _warn_of_crowding(found.truth, found.queries, task)
    return written


def _interval_heading(level: float) -> str:
    return f"{100 * level:.0f} % interval"


def _range(of: Interval | Difference, sign: str) -> str:
    return "-" if math.isnan(of.low) else f"{of.low:{sign}.3f} to {of.high:{sign}.3f}"


def _warn_of_crowding(truth: CocoRecords, queries: int | None, task: _Task) -> None:
    from paqdetr.data.stats import crowding_sentences

    owners, labels = truth.objects().T
    images = len(truth.image_ids)
    for sentence in crowding_sentences(owners, labels, images, queries=queries, max_detections=task.max_detections):
        note(sentence)


def _compare(pair: tuple[Path, Path], task: _Task) -> dict[str, Any] | None:
    """Print two result sets side by side; what goes into the json."""
    from paqdetr.loading import require_model
    from paqdetr.metrics.intervals import compare_results

    models = [path for path in pair if not _is_results(path)]
    task.require_truth("--compare", "give --data, or --annotations if both are results")
    if models and task.data is None:
        raise ConfigError(f"{models[0]}: a model needs --data", "name the data set's folder")
    if models and task.kind != "bbox":
        raise ConfigError("--iou-type segm compares results files", "give two of them")
    files = {path: require_model(path) for path in models}
    dataset = task.dataset()
    truth = task.truth(dataset)
    tables = _tables(pair, files, truth, dataset, task)
    if tables is None:
        return None
    with progress_bar("resample the images") as progress:
        found = compare_results(*tables, samples=task.resamples, seed=task.seed, progress=progress)
    results.print(f"A: {pair[0]}\nB: {pair[1]}")
    title = f"on {task.where}, {task.kind}, {len(tables[0].image_ids)} images{task.counted}"
    for heading, of, kind in ((title, "figure", "figures"), ("AP by class", "class", "per_class")):
        headings = ("A", "B", "B - A", _interval_heading(found.level), "B better")
        made = table(heading, (of,), headings, no_wrap=True)
        for name, own in getattr(found, kind).items():
            values = [figure(getattr(side, kind)[name].value) for side in (found.first, found.second)]
            better = "-" if math.isnan(own.low) else f"{100 * own.superiority:.1f} %"
            made.add_row(name, *values, "-" if math.isnan(own.value) else f"{own.value:+.3f}", _range(own, "+"), better)
        results.print(made)
    results.print(found.verdict())
    results.print(f"Over {found.samples} resamples of images; another training seed would move both as well.")
    _warn_of_crowding(truth, None, task)
    sides = zip("AB", pair, (found.first, found.second), strict=True)
    return {
        letter: {"source": task.source(path, made_already=path not in models), **own.to_json()}
        for letter, path, own in sides
    } | {"difference": found.to_json(), "verdict": found.verdict(), "max_detections": task.max_detections}


def _tables(
    pair: tuple[Path, Path], models: dict[Path, Path], truth: CocoRecords, dataset: DetectionDataset | None, task: _Task
) -> list[MatchTable] | None:
    """The matches of both; None in all processes but the main one. `models` has the file of each that is no results file."""
    from paqdetr.environment import this_is_main
    from paqdetr.metrics.coco import read_results
    from paqdetr.metrics.matches import MatchTable

    read = {path: read_results(path) for path in pair if path not in models}
    if models:
        from paqdetr.distributed import Processes, leave

        processes = Processes.join(task.device)
        for path, file in models.items():
            assert dataset is not None
            _, found = _detect(file, dataset, processes, task)
            read[path] = [] if found is None else found.results
        leave()
    if not this_is_main():
        return None
    return [
        MatchTable.match(truth, read[path], task.kind, source=str(path), max_detections=task.max_detections)
        for path in pair
    ]
