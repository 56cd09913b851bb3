"""`paqdetr eval`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from paqdetr.cli.console import figures_table, progress_bar, results
from paqdetr.errors import ConfigError


def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A .safetensors file or a run's folder.", metavar="[CHECKPOINT]")
    ] = None,
    *,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set, or its data.yaml.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    results_file: Annotated[
        Path | None, typer.Option("--results", help="Instead of a checkpoint: COCO results of any detector.")
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="Ground truth for --results, a COCO json.")] = None,
    iou_type: Annotated[str, typer.Option(help="bbox or segm; segm with --results alone.")] = "bbox",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="It changes the speed, never a figure.")] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Print the COCO figures of a checkpoint, or of a results file."""
    if (checkpoint is None) == (results_file is None):
        raise ConfigError("eval takes a CHECKPOINT or --results", "give one of them")
    if checkpoint is not None:
        if data is None:
            raise ConfigError("eval CHECKPOINT needs --data", "name the data set's folder")
        if iou_type != "bbox" or annotations is not None:
            raise ConfigError("--iou-type and --annotations go with --results", "leave them out")
        found = _of_checkpoint(checkpoint, data, split, batch_size, device)
        if found is None:
            return  # another process prints and writes
        figures, title = found
    else:
        assert results_file is not None
        if annotations is None:
            raise ConfigError("eval --results needs --annotations", "name the COCO json of the ground truth")
        figures, title = _of_results(results_file, annotations, iou_type)
    results.print(figures_table(figures, title))
    if checkpoint is not None:
        from paqdetr.engine.memory import peak_memory

        results.print(f"peak memory: {peak_memory():.2f} GiB")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _of_checkpoint(
    checkpoint: Path, data: Path, split: str, batch_size: int, device: str
) -> tuple[dict[str, Any], str] | None:
    from paqdetr.data.dataset import open_split
    from paqdetr.engine.evaluate import evaluate_together
    from paqdetr.engine.processes import Processes, leave
    from paqdetr.models import load

    processes = Processes.join(device)
    model = load(checkpoint, device=str(processes.device))
    with progress_bar(f"evaluate on {split}") as progress:
        found = evaluate_together(
            model,
            open_split(data, split),
            processes,
            batch_size=batch_size,
            progress=progress if processes.main else None,
        )
    leave()
    if found is None:
        return None
    return found.to_json(), f"{model.name} on {data} {split}, {found.images_per_second:.1f} images/s"


def _of_results(results_file: Path, annotations: Path, iou_type: str) -> tuple[dict[str, Any], str]:
    from paqdetr.metrics.coco import evaluate_detections, read_results

    if iou_type not in ("bbox", "segm"):
        raise ConfigError(f"--iou-type: expected bbox or segm, found {iou_type!r}", "choose one of them")
    kind: Literal["bbox", "segm"] = "segm" if iou_type == "segm" else "bbox"
    figures = evaluate_detections(annotations, read_results(results_file), iou_type=kind)
    return figures.to_json(), f"{results_file} against {annotations}, {kind}"
