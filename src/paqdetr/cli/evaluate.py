"""`paqdetr eval`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from paqdetr.cli.console import (
    BatchSize,
    Device,
    JsonFile,
    Nms,
    OutputFiles,
    Overlap,
    Overwrite,
    Resamples,
    Seed,
    Split,
    TileSize,
    WithWhole,
    note,
    note_unfinished,
    parse_nms,
    progress_bar,
    results,
    tiles_of,
)
from paqdetr.errors import ConfigError
from paqdetr.values import require_threshold

if TYPE_CHECKING:
    from paqdetr.data.dataset import DetectionDataset
    from paqdetr.distributed import Processes
    from paqdetr.evaluation.evaluate import Evaluation
    from paqdetr.metrics import CocoFigures
    from paqdetr.metrics.coco import CocoRecords
    from paqdetr.metrics.intervals import FigureIntervals
    from paqdetr.metrics.matches import MatchTable
    from paqdetr.models.detector import Detector
    from paqdetr.runtime import Predictor
    from paqdetr.runtime.tiles import Tiles

_Kind = Literal["bbox", "segm"]


@dataclass(frozen=True, slots=True)
class _Options:
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
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A run's folder, a .safetensors file, or an exported model.", metavar="MODEL")
    ] = None,
    *,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set, or its data.yaml.")] = None,
    split: Split = None,
    results_file: Annotated[
        Path | None, typer.Option("--results", help="Instead of a model: COCO results of any detector.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B", help="Instead of a model: two of them, or two results files (.json), side by side."
        ),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="Ground truth of results, a COCO json; or give --data.")
    ] = None,
    iou_type: Annotated[str, typer.Option(help="bbox or segm; segm with results alone.")] = "bbox",
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Say how far each figure depends on the choice of images.")
    ] = False,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    max_detections: Annotated[
        int, typer.Option(min=1, max=10_000, help="Of one class that count in an image; more for crowded images.")
    ] = 100,
    results_out: Annotated[
        Path | None, typer.Option(help="Keep the model's detections in this file, as COCO results.")
    ] = None,
    json_file: JsonFile = None,
    batch_size: BatchSize = 4,
    threshold: Annotated[float, typer.Option(help="Leave out what scores less: AP of what users see at it.")] = 0.0,
    nms: Nms = None,
    tiles: TileSize = None,
    overlap: Overlap = None,
    with_whole: WithWhole = False,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Print the COCO figures of a model or results file, or compare two."""
    from paqdetr.data.layout import split_to_evaluate

    _require_one(checkpoint, results_file, compare)
    if iou_type not in ("bbox", "segm"):
        raise ConfigError(f"--iou-type: expected bbox or segm, found {iou_type!r}", "choose one of them")
    kind: _Kind = "segm" if iou_type == "segm" else "bbox"
    if results_out is not None and checkpoint is None:
        raise ConfigError("--results-out keeps the detections of a CHECKPOINT", "leave it out")
    files = OutputFiles("paqdetr eval", overwrite=overwrite, json=json_file, results_out=results_out)
    split = "" if data is None else split_to_evaluate(data, split)
    require_threshold(threshold)
    cut, suppress = tiles_of(tiles, overlap, with_whole), parse_nms(nms)
    if results_file is not None and (cut, suppress, threshold) != (None, None, 0):
        raise ConfigError("--nms, --threshold and --tiles are about a CHECKPOINT", "leave them out")
    options = _Options(
        data, split, annotations, kind, max_detections, resamples, seed, batch_size, device, threshold, suppress, cut
    )
    if compare is not None:
        written = _compare(compare, options)
    else:
        if checkpoint is not None:
            if data is None:
                raise ConfigError("eval CHECKPOINT needs --data", "name the data set's folder")
            if kind != "bbox" or annotations is not None:
                raise ConfigError("--iou-type and --annotations go with --results", "leave them out")
            found = _of_checkpoint(checkpoint, options)
        else:
            assert results_file is not None
            if (data is None) == (annotations is None):
                raise ConfigError(
                    "eval --results needs the ground truth, once", "give --annotations, or --data and --split"
                )
            found = _of_results(results_file, options)
        written = None if found is None else _print(found, options, intervals=intervals)
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
    given = {"CHECKPOINT": checkpoint, "--results": results_file}
    found = [f"{name} {path}" for name, path in given.items() if path is not None]
    found += [] if compare is None else [f"--compare {compare[0]} {compare[1]}"]
    if len(found) != 1:
        raise ConfigError(
            f"eval takes a CHECKPOINT or --results or --compare, found {' and '.join(found) or 'none of them'}",
            "give one of them",
        )


def _of_checkpoint(checkpoint: Path, options: _Options) -> _Found | None:
    from paqdetr.loading import require_model

    require_model(checkpoint)
    dataset = options.dataset()
    assert dataset is not None
    from paqdetr.distributed import Processes, leave

    processes = Processes.join(options.device)
    model, found = _detect(checkpoint, dataset, processes, options)
    leave()
    if found is None:
        return None
    title = f"{model.name} on {options.where}, {found.images_per_second:.1f} images/s"
    config = getattr(model, "config", None)  # exported models have none
    queries = None if config is None else config.num_queries
    return _Found(title, found.figures, found.to_json(), options.truth(dataset), found.results, queries)


def _detect(
    checkpoint: Path, dataset: DetectionDataset, processes: Processes, options: _Options
) -> tuple[Detector | Predictor, Evaluation | None]:
    """The model, and what it finds; None in all processes but the main one."""
    from paqdetr.evaluation.evaluate import evaluate_together
    from paqdetr.loading import is_exported, load

    if processes.main:
        note_unfinished(checkpoint)
    model = load(checkpoint, device="cpu" if is_exported(checkpoint) else str(processes.device))
    with progress_bar(f"evaluate on {dataset.name}") as progress:
        found = evaluate_together(
            model,
            dataset,
            processes,
            batch_size=options.batch_size,
            max_detections=options.max_detections,
            progress=progress if processes.main else None,
            threshold=options.threshold,
            nms=options.nms,
            tiles=options.tiles,
        )
    return model, found


def _of_results(results_file: Path, options: _Options) -> _Found:
    from paqdetr.metrics.coco import evaluate_detections, read_results

    truth, rows = options.truth(options.dataset()), read_results(results_file)
    figures = evaluate_detections(
        truth, rows, iou_type=options.kind, source=str(results_file), max_detections=options.max_detections
    )
    title = f"{results_file} against {options.where}, {options.kind}"
    return _Found(title, figures, figures.to_json(), truth, rows)


def _print(found: _Found, options: _Options, *, intervals: bool) -> dict[str, Any]:
    """Print the figures; what goes into the json."""
    from paqdetr.cli.figures import classes_table, figures_table
    from paqdetr.metrics.intervals import figure_intervals
    from paqdetr.metrics.matches import MatchTable
    from paqdetr.serialize import json_number

    drawn: FigureIntervals | None = None
    ap50 = found.figures.per_class_AP50
    written = {
        **found.written,
        "per_class_AP50": {name: json_number(value) for name, value in ap50.items()},
        "max_detections": options.max_detections,
    }
    if intervals:
        table = MatchTable.match(found.truth, found.rows, options.kind, max_detections=options.max_detections)
        with progress_bar("resample the images") as progress:
            drawn = figure_intervals(table, samples=options.resamples, seed=options.seed, progress=progress)
        written["intervals"] = drawn.to_json()
    labels = {"AP_nms": "AP after NMS", "AP50_nms": "AP50 after NMS"}
    more = {label: written[key] for key, label in labels.items() if key in written}
    results.print(figures_table(found.figures, found.title + _counted(options), more, drawn))
    results.print(classes_table(found.figures, drawn))
    _warn_of_crowding(found.truth, found.queries, options)
    return written


def _warn_of_crowding(truth: CocoRecords, queries: int | None, options: _Options) -> None:
    from paqdetr.data.stats import crowding_sentences

    owners, labels = truth.objects().T
    images = len(truth.image_ids)
    for sentence in crowding_sentences(owners, labels, images, queries=queries, max_detections=options.max_detections):
        note(sentence)


def _counted(options: _Options) -> str:
    """What the title says where more or fewer detections than COCO's 100 count."""
    return "" if options.max_detections == 100 else f", {options.max_detections} detections in place of 100"


def _compare(pair: tuple[Path, Path], options: _Options) -> dict[str, Any] | None:
    """Print two result sets side by side; what goes into the json."""
    from paqdetr.cli.figures import class_comparison_table, comparison_table
    from paqdetr.loading import require_model
    from paqdetr.metrics.coco import is_shards
    from paqdetr.metrics.intervals import compare_results

    models = [path for path in pair if path.suffix != ".json" and not is_shards(path)]
    if (options.data is None) == (options.annotations is None):
        raise ConfigError(
            "eval --compare needs the ground truth, once", "give --data, or --annotations if both are results"
        )
    if models and options.data is None:
        raise ConfigError(f"{models[0]}: a checkpoint needs --data", "name the data set's folder")
    if models and options.kind != "bbox":
        raise ConfigError("--iou-type segm compares results files", "give two of them")
    for path in models:
        require_model(path)
    dataset = options.dataset()
    truth = options.truth(dataset)
    tables = _tables(pair, truth, dataset, options)
    if tables is None:
        return None
    with progress_bar("resample the images") as progress:
        found = compare_results(*tables, samples=options.resamples, seed=options.seed, progress=progress)
    title = f"on {options.where}, {options.kind}, {len(tables[0].image_ids)} images{_counted(options)}"
    results.print(f"A: {pair[0]}\nB: {pair[1]}")
    results.print(comparison_table(found, title))
    results.print(class_comparison_table(found))
    results.print(found.verdict())
    results.print(f"Over {found.samples} resamples of the images; another training seed would move both as well.")
    _warn_of_crowding(truth, None, options)
    return {
        "A": {"source": str(pair[0]), **found.first.to_json()},
        "B": {"source": str(pair[1]), **found.second.to_json()},
        "difference": found.to_json(),
        "verdict": found.verdict(),
        "max_detections": options.max_detections,
    }


def _tables(
    pair: tuple[Path, Path], truth: CocoRecords, dataset: DetectionDataset | None, options: _Options
) -> tuple[MatchTable, MatchTable] | None:
    """The matches of both; None in all processes but the main one."""
    from paqdetr.environment import this_is_main
    from paqdetr.metrics.coco import is_shards, read_results
    from paqdetr.metrics.matches import MatchTable

    read = {path: read_results(path) for path in pair if path.suffix == ".json" or is_shards(path)}
    if len(read) < len(set(pair)):
        from paqdetr.distributed import Processes, leave

        processes = Processes.join(options.device)
        for path in (path for path in pair if path not in read):
            assert dataset is not None
            _, found = _detect(path, dataset, processes, options)
            read[path] = [] if found is None else found.results
        leave()
    if not this_is_main():
        return None
    first, second = (
        MatchTable.match(truth, read[path], options.kind, source=str(path), max_detections=options.max_detections)
        for path in pair
    )
    return first, second
