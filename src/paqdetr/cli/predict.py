"""`paqdetr predict`"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paqdetr.cli import options
from paqdetr.cli.console import Ended, note, open_model, progress_bar, results
from paqdetr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from paqdetr.runtime.sources import Source


def predict(
    model: Annotated[Path, typer.Argument(help=options.TRAINED, metavar="MODEL")],
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Pictures, videos, folders, patterns, http addresses, rtsp://..., camera:0, or - for a list of them.",
            metavar="SOURCE",
        ),
    ],
    *,
    output: Annotated[str | None, options.output(help="Folder for the results; runs/predict-N if not given.")] = None,
    save: Annotated[str, options.output(help="Some of draw,coco,yolo,voc,crops,jsonl.")] = "draw,coco",
    threshold: Annotated[
        float | None, options.detections(help="Score threshold; if not given that of the run's evaluation, else 0.3.")
    ] = None,
    nms: options.Nms = None,
    classes: Annotated[
        str | None,
        options.detections(
            help="Names of the classes to keep, separated by commas; those with a comma in double quotes."
        ),
    ] = None,
    tiles: options.TileSize = None,
    overlap: options.Overlap = None,
    with_whole: options.WithWhole = False,
    recursive: Annotated[bool, options.data("--recursive", help="Search folders recursively.")] = False,
    every: Annotated[int, options.data(min=1, help="Use every N-th frame of a video.")] = 1,
    max_frames: Annotated[int | None, options.data(min=1, help="Frames per video at most.")] = None,
    buffer: Annotated[
        bool, options.data("--buffer", help="Keep all frames of a live source, not only the newest; results may lag.")
    ] = False,
    batch_size: options.BatchSize = 1,
    annotations: Annotated[
        Path | None, options.data(help="COCO json with these images, whose image ids the results take.")
    ] = None,
    overwrite: options.Overwrite = False,
    ray: Annotated[
        str | None,
        options.machine(
            metavar="ADDRESS",
            help="Detect on a Ray cluster (local starts one, auto is the one of this machine), into Parquet files; on CPUs, or "
            "with --device cuda on a GPU for each model.",
        ),
    ] = None,
    workers: Annotated[
        int | None, options.machine(min=1, help="With --ray: models; as many as there is room for.")
    ] = None,
    shard_size: Annotated[
        int | None, options.machine(min=1, help="With --ray: pictures of a Parquet file; 1000 if not given.")
    ] = None,
    device: options.Device = None,
) -> None:
    """Detect in pictures and videos; draw and write what is found.

    Ctrl-C or SIGTERM ends it: what was written stays, and a video ends there and plays.
    """
    from paqdetr.interrupt import StopRequest
    from paqdetr.loading import is_exported, require_model
    from paqdetr.outputs import files_below
    from paqdetr.runtime.predict import new_folder, predict_sources, require_place
    from paqdetr.runtime.save import require_forms
    from paqdetr.runtime.sources import require_sources
    from paqdetr.values import parse_names

    if threshold is not None and not 0 <= threshold <= 1:  # a range of the option would call nan too large
        raise ConfigError(
            f"--threshold: expected a number from 0 to 1, found {threshold}",
            "`paqdetr predict --help` shows how it is used",
        )
    suppress_over, cut = options.nms_of(nms), options.tiles_of(tiles, overlap, with_whole)
    wanted = None if classes is None else parse_names(classes)
    if wanted == []:
        raise ConfigError("--classes: names none", "leave it out for all classes")
    if ray is not None:
        others = {"--save": save != "draw,coco", "--every": every > 1, "--max-frames": max_frames, "--buffer": buffer}
        others |= {"--annotations": annotations, "--overwrite": overwrite}
        for name in (name for name, given in others.items() if given):
            raise ConfigError(f"{name} does not go with --ray, which writes Parquet files of pictures", "leave it out")
        if device not in (None, "cpu", "cuda"):
            raise ConfigError(f"--device {device} does not go with --ray, which finds GPUs itself", "give cpu or cuda")
        how = {"threshold": threshold, "nms": suppress_over, "classes": wanted, "tiles": cut, "shard_size": shard_size}
        given = {key: value for key, value in how.items() if value is not None}
        return _on_ray(model, sources, output, ray, workers, batch_size, device == "cuda", given)
    if workers is not None or shard_size is not None:
        raise ConfigError("--workers and --shard-size are about a Ray cluster", "give --ray local as well")
    forms = [form.strip() for form in save.split(",")]
    require_forms(forms)
    file = require_model(model)
    require_sources(sources, recursive=recursive)
    if output is not None:
        require_place(Path(output), overwrite=overwrite)
        if Path(output).is_dir() and any(files_below(Path(output))):
            note(f"{output}: holds files already; those of other names than the new ones stay")
    image_id = None if annotations is None else _image_ids(annotations)
    if wanted is not None and not is_exported(file):
        from paqdetr.checkpoint import find_described  # needs pydantic, and an exported model runs without

        find_described(file)[2].find(wanted)
    detector = open_model(file, device)  # not what was given: a model of the Hub would be fetched again
    point = detector.operating_point
    usual = [f"nms {point.nms:g}"] if nms is None and point.nms is not None else []
    usual += [f"threshold {point.threshold:.2f}"] if threshold is None and point.threshold is not None else []
    if usual:
        results.print(f"{', '.join(usual)}: from the run's evaluation")
    folder, stop = new_folder() if output is None else Path(output), StopRequest(_interrupt)
    try:
        with progress_bar("predict") as progress, stop:
            done = predict_sources(
                detector,
                sources,
                output=folder,
                save=forms,
                recursive=recursive,
                every=every,
                max_frames=max_frames,
                buffer=buffer,
                batch_size=batch_size,
                image_id=image_id,
                overwrite=overwrite,
                progress=progress,
                threshold=threshold,
                nms=suppress_over,
                classes=wanted,
                tiles=cut,
            )
    except KeyboardInterrupt:
        note(f"what was written is in {folder}; the same command starts over", "interrupted", "bold")
        raise Ended(128 + (stop.signal_number or SIGINT)) from None
    finally:
        if output is None:
            with suppress(OSError):
                folder.rmdir()  # where nothing was written
    shown = round(point.least_score(), 2) if threshold is None else threshold
    results.print(f"{done.objects} objects over {shown} in {done.images} images: {done.output}")
    remedy = ""
    for error in done.unreadable.values():
        note(error.message if error.remedy == remedy else str(error), "left out")
        remedy = error.remedy
    _require_all_read(len(done.unreadable), "correct them, or leave them out")


def _on_ray(
    model: Path,
    sources: list[str],
    output: str | None,
    address: str,
    workers: int | None,
    batch_size: int,
    on_gpus: bool,
    how: dict[str, Any],
) -> None:
    from paqdetr.serving.ray_predict import predict_on_ray

    if output is None or len(sources) != 1:
        raise ConfigError("--ray takes one SOURCE, a folder or a list of pictures, and an --output", "give both")
    with progress_bar("shards") as progress:
        done = predict_on_ray(
            model,
            sources[0],
            output=output,
            address=None if address == "local" else address,
            workers=workers,
            gpus=int(on_gpus),
            batch_size=batch_size,
            progress=progress,
            **how,
        )
    skipped = f", {done.skipped} shards were there" if done.skipped else ""
    results.print(f"{done.objects} objects in {done.images} images: {done.output}{skipped}", soft_wrap=True)
    for reason in list(done.unreadable.values())[:10]:
        note(reason, "left out")
    _require_all_read(done.failures, "the column `error` says why; remove their shards to have them read again")


def _require_all_read(failures: int, remedy: str) -> None:
    """Raise DataError if some pictures could not be read."""
    if failures:
        raise DataError(f"{failures} images could not be read; the others are done", remedy)


def _image_ids(annotations: Path) -> Callable[[Source], int | str]:
    """The image ids of a COCO json, by path, relative name or file name."""
    from paqdetr.metrics.coco import CocoRecords

    records = CocoRecords.open(annotations, "bbox")
    taken: dict[int, Source] = {}

    def image_id(source: Source) -> int | str:
        names = (source.shown, source.name, source.name.rsplit("/", 1)[-1])
        own = next((number for name in names if (number := records.image_called(name))), None)
        if own is None:
            raise DataError(
                f"{annotations}: none of its {len(records.image_ids)} images is called {names[-1]}",
                "give the json of these images, or leave --annotations out",
            )
        other = taken.setdefault(own, source)
        if other.address != source.address:
            raise DataError(
                f"{annotations}: {other.shown} and {source.shown} would both be its image {records.image_ids[own - 1]}",
                "give the images of this json alone, or leave --annotations out",
            )
        return records.image_ids[own - 1]

    return image_id


def _interrupt(signal_name: str) -> None:
    """End a prediction at once, so that files are closed."""
    raise KeyboardInterrupt(signal_name)
