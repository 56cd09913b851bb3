"""`paqdetr eval`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from paqdetr.cli.console import progress_bar, results
from paqdetr.cli.options import BatchSize, Device, Resamples, Seed
from paqdetr.cli.outputs import require_writable, write_json
from paqdetr.errors import ConfigError

if TYPE_CHECKING:
    from paqdetr.data.dataset import DetectionDataset
    from paqdetr.engine.evaluate import Evaluation
    from paqdetr.engine.processes import Processes
    from paqdetr.metrics import CocoFigures
    from paqdetr.metrics.intervals import FigureIntervals
    from paqdetr.metrics.matching import MatchTable

_Kind = Literal["bbox", "segm"]


@dataclass(frozen=True, slots=True)
class _Found:
    """A result set with all that is printed and written of it."""

    title: str
    figures: CocoFigures
    written: dict[str, Any]
    truth: dict[str, Any] | Path
    rows: list[dict[str, Any]]


def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A .safetensors file or a run's folder.", metavar="CHECKPOINT")
    ] = None,
    *,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set, or its data.yaml.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test; val, or what there is instead, if not given.")
    ] = None,
    results_file: Annotated[
        Path | None, typer.Option("--results", help="Instead of a checkpoint: COCO results of any detector.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B",
            help="Instead of a checkpoint: two of them, or two results files (.json), side by side.",
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
    results_out: Annotated[
        Path | None, typer.Option(help="Keep the checkpoint's detections in this file, as COCO results.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    batch_size: BatchSize = 4,
    device: Device = None,
) -> None:
    """Print the COCO figures of a checkpoint or of a results file, or compare two."""
    from paqdetr.data.layout import split_to_evaluate

    _require_one(checkpoint, results_file, compare)
    if iou_type not in ("bbox", "segm"):
        raise ConfigError(f"--iou-type: expected bbox or segm, found {iou_type!r}", "choose one of them")
    kind: _Kind = "segm" if iou_type == "segm" else "bbox"
    if results_out is not None and checkpoint is None:
        raise ConfigError("--results-out keeps the detections of a CHECKPOINT", "leave it out")
    require_writable(json=json_file, results_out=results_out)
    split = "" if data is None else split_to_evaluate(data, split)
    if compare is not None:
        written = _compare(compare, data, split, annotations, kind, (resamples, seed), batch_size, device)
    else:
        if checkpoint is not None:
            if data is None:
                raise ConfigError("eval CHECKPOINT needs --data", "name the data set's folder")
            if kind != "bbox" or annotations is not None:
                raise ConfigError("--iou-type and --annotations go with --results", "leave them out")
            found = _of_checkpoint(checkpoint, data, split, batch_size, device)
        else:
            assert results_file is not None
            if (data is None) == (annotations is None):
                raise ConfigError(
                    "eval --results needs the ground truth, once", "give --annotations, or --data and --split"
                )
            found = _of_results(results_file, data, split, annotations, kind)
        written = None if found is None else _tell(found, kind, (resamples, seed) if intervals else None)
        if found is not None and results_out is not None:
            write_json(results_out, found.rows)
        if found is not None and checkpoint is not None:
            from paqdetr.engine.memory import peak_memory

            results.print(f"peak memory: {peak_memory():.2f} GiB")
    if written is not None and json_file is not None:  # None: another process prints and writes
        write_json(json_file, written)


def _require_one(
    checkpoint: Path | None, results_file: Path | None, compare: tuple[Path, Path] | None
) -> None:
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


def _of_checkpoint(
    checkpoint: Path, data: Path, split: str, batch_size: int, device: str | None
) -> _Found | None:
    from paqdetr.data.dataset import open_split
    from paqdetr.engine.processes import Processes, leave

    processes = Processes.join(device)
    dataset = open_split(data, split)
    name, found = _detect(checkpoint, dataset, processes, batch_size)
    leave()
    if found is None:
        return None
    title = f"{name} on {data} {split}, {found.images_per_second:.1f} images/s"
    return _Found(title, found.figures, found.to_json(), dataset.ground_truth(), found.results)


def _detect(
    checkpoint: Path, dataset: DetectionDataset, processes: Processes, batch_size: int
) -> tuple[str, Evaluation | None]:
    """The model's name, and what it finds; None in all processes but the main one."""
    from paqdetr.engine.evaluate import evaluate_together
    from paqdetr.models import load

    model = load(checkpoint, device=str(processes.device))
    with progress_bar(f"evaluate on {dataset.name}") as progress:
        told = progress if processes.main else None
        return model.name, evaluate_together(model, dataset, processes, batch_size=batch_size, progress=told)


def _of_results(
    results_file: Path, data: Path | None, split: str, annotations: Path | None, kind: _Kind
) -> _Found:
    from paqdetr.data.dataset import open_split
    from paqdetr.metrics.coco import evaluate_detections, read_results

    truth = annotations if data is None else open_split(data, split).ground_truth()
    assert truth is not None
    where = annotations if data is None else f"{data} {split}"
    rows = read_results(results_file)
    figures = evaluate_detections(truth, rows, iou_type=kind, source=str(results_file))
    return _Found(f"{results_file} against {where}, {kind}", figures, figures.to_json(), truth, rows)


def _tell(found: _Found, kind: _Kind, drawn: tuple[int, int] | None) -> dict[str, Any]:
    """Print the figures; what goes into the json. `drawn`: how many resamples, and their seed."""
    from paqdetr.cli.figures import classes_table, figures_table
    from paqdetr.metrics.intervals import figure_intervals
    from paqdetr.metrics.jsonable import json_number
    from paqdetr.metrics.matching import MatchTable

    intervals: FigureIntervals | None = None
    ap50 = found.figures.per_class_AP50
    written = {
        **found.written,
        "per_class_AP50": {name: json_number(value) for name, value in ap50.items()},
    }
    if drawn is not None:
        table = MatchTable.match(found.truth, found.rows, kind)
        with progress_bar("resample the images") as progress:
            intervals = figure_intervals(table, samples=drawn[0], seed=drawn[1], progress=progress)
        written["intervals"] = intervals.to_json()
    labels = {"AP_nms": "AP after NMS", "AP50_nms": "AP50 after NMS"}
    more = {label: written[key] for key, label in labels.items() if key in written}
    results.print(figures_table(found.figures, found.title, more, intervals))
    results.print(classes_table(found.figures, intervals))
    return written


def _compare(
    pair: tuple[Path, Path],
    data: Path | None,
    split: str,
    annotations: Path | None,
    kind: _Kind,
    drawn: tuple[int, int],
    batch_size: int,
    device: str | None,
) -> dict[str, Any] | None:
    """Print two result sets side by side; what goes into the json."""
    from paqdetr.cli.figures import class_comparison_table, comparison_table, verdict
    from paqdetr.metrics.intervals import compare_results

    models = [path for path in pair if path.suffix != ".json"]
    if (data is None) == (annotations is None):
        raise ConfigError(
            "eval --compare needs the ground truth, once", "give --data, or --annotations if both are results"
        )
    if models and data is None:
        raise ConfigError(f"{models[0]}: a checkpoint needs --data", "name the data set's folder")
    if models and kind != "bbox":
        raise ConfigError("--iou-type segm compares results files", "give two of them")
    tables = _tables(pair, data, split, annotations, kind, batch_size, device)
    if tables is None:
        return None
    with progress_bar("resample the images") as progress:
        found = compare_results(*tables, samples=drawn[0], seed=drawn[1], progress=progress)
    where = f"{data} {split}" if data is not None else str(annotations)
    results.print(f"A: {pair[0]}\nB: {pair[1]}", soft_wrap=True)
    results.print(comparison_table(found, f"on {where}, {kind}, {len(tables[0].image_ids)} images"))
    results.print(class_comparison_table(found))
    results.print(verdict(found), soft_wrap=True)
    results.print(
        f"Over {found.samples} resamples of the images; another training seed would move both as well.",
        soft_wrap=True,
    )
    return {
        "A": {"source": str(pair[0]), **found.first.to_json()},
        "B": {"source": str(pair[1]), **found.second.to_json()},
        "difference": found.to_json(),
        "verdict": verdict(found),
    }


def _tables(
    pair: tuple[Path, Path],
    data: Path | None,
    split: str,
    annotations: Path | None,
    kind: _Kind,
    batch_size: int,
    device: str | None,
) -> tuple[MatchTable, MatchTable] | None:
    """The matches of both; None in all processes but the main one."""
    from paqdetr.data.dataset import open_split
    from paqdetr.engine.processes import Processes, leave
    from paqdetr.metrics.coco import read_results
    from paqdetr.metrics.matching import MatchTable

    processes, dataset = Processes.join(device), None if data is None else open_split(data, split)
    truth: dict[str, Any] | Path | None = annotations if dataset is None else dataset.ground_truth()
    assert truth is not None
    rows: list[list[dict[str, Any]]] = []
    for path in pair:
        if path.suffix == ".json":
            rows.append(read_results(path))
            continue
        assert dataset is not None
        _, found = _detect(path, dataset, processes, batch_size)
        rows.append([] if found is None else found.results)
    leave()
    if not processes.main:
        return None
    first, second = (
        MatchTable.match(truth, own, kind, source=str(path)) for own, path in zip(rows, pair, strict=True)
    )
    return first, second
