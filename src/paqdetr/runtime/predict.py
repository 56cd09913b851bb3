"""From sources to results on the disk, with any detector that has a `predict`."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from paqdetr.errors import ConfigError, DataError
from paqdetr.outputs import require_free
from paqdetr.runtime.save import Saver, is_ours, require_forms
from paqdetr.runtime.sources import OnUnreadable, Picture, Source, batches, list_sources, read_sources, refuse
from paqdetr.structures import ClassTable, Detections, OperatingPoint


class Predicts(Protocol):
    """A detector, whatever runs it. `predict` takes threshold, nms, classes, tiles and batch_size, as `Detector.predict` does."""

    @property
    def classes(self) -> ClassTable: ...
    @property
    def operating_point(self) -> OperatingPoint: ...
    @property
    def predict(self) -> Callable[..., list[Detections]]: ...


@dataclass(frozen=True, slots=True)
class Predictions:
    """What `predict_sources` wrote.

    Attributes:
        output: the folder.
        images: pictures and frames that were looked at.
        objects: detections in them.
        unreadable: sources that could not be read, with the error.
    """

    output: Path
    images: int
    objects: int
    unreadable: dict[Path | str, DataError]


def stream(
    model: Predicts,
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    recursive: bool = False,
    every: int = 1,
    max_frames: int | None = None,
    buffer: bool = False,
    batch_size: int = 1,
    on_unreadable: OnUnreadable = refuse,
    **how: Any,
) -> Iterator[Detections]:
    """Detections of pictures and videos, one at a time and only as they are asked for, whatever the source.

    Args:
        model: a detector.
        sources: one or many of: a file, a folder, a pattern such as `data/*.jpg`, `http://...`, a video, `rtsp://...`,
            `camera:0`, and "-" for a list of these on standard input.
        recursive: folders with all that is below them.
        every: of a video every so many frames.
        max_frames: the most of each video or live source, which goes on for ever otherwise.
        buffer: of a live source all frames; otherwise those that arrive while the model is busy are dropped.
        batch_size: pictures, or frames of a file, that go through the model together. Those of a live source go alone.
        on_unreadable: called with what cannot be read, which is then left out; by default an error.
        how: threshold, nms, classes and tiles, as of `Detector.predict`.

    Returns:
        an iterator: each has `image`, `file_name`, and of a video `frame` and `time`.

    Raises:
        DataError: a source does not exist or cannot be read.
        ConfigError: an argument is out of its range.
        BackendError: PyAV is not installed.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    listed = list_sources(given, recursive=recursive)
    pictures = read_sources(listed, every=every, max_frames=max_frames, buffer=buffer, on_unreadable=on_unreadable)
    return (detections for _, detections in _detect(model, pictures, batch_size, how))


def _detect(
    model: Predicts, pictures: Iterator[Picture], batch_size: int, how: dict[str, Any]
) -> Iterator[tuple[Picture, Detections]]:
    for group in batches(pictures, batch_size):
        found = model.predict([picture.image for picture in group], batch_size=batch_size, **how)
        for picture, detections in zip(group, found, strict=True):
            name = picture.source.name
            detections.file_name = name
            detections.image_id = name if picture.frame is None else f"{name}#{picture.frame}"
            detections.source, detections.size = picture.image, (picture.image.height, picture.image.width)
            detections.frame, detections.time = picture.frame, picture.time
            yield picture, detections


def predict_sources(
    model: Predicts,
    sources: Sequence[str | os.PathLike[str]],
    *,
    output: str | Path,
    save: Sequence[str] = ("draw", "coco"),
    recursive: bool = False,
    every: int = 1,
    max_frames: int | None = None,
    buffer: bool = False,
    batch_size: int = 1,
    image_id: Callable[[Source], int | str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int | None], object] | None = None,
    **how: Any,
) -> Predictions:
    """Detect in pictures and videos, and write what is found as it comes.

    What cannot be read is reported and left out; the others are still done. A call that was killed is repeated into the same
    folder.

    Args:
        model: a detector.
        sources: files, folders, patterns, addresses, cameras, "-": see `list_sources`.
        output: a folder that is new, empty, or holds nothing but what earlier calls wrote: files of the same names are replaced,
            others stay.
        save: what is written, of `paqdetr.runtime.save.FORMS`.
        recursive, every, max_frames, buffer, batch_size: as of `stream`; results keep the paths below a folder.
        image_id: of a source, for the results; its name if not given.
        overwrite: other files may lie in `output`, and are replaced where they have the name of one that is written.
        progress: called with (pictures done, pictures in all, None where nobody knows).
        how: threshold, nms, classes and tiles, as of `Detector.predict`.

    Raises:
        DataError: a source is missing, a folder has no pictures, two share a name, one lies in `output`, or none could be read.
        ConfigError: an argument is out of its range, or `output` holds other files.
        StorageError: something cannot be written.
    """
    require_forms(save)
    output = Path(output)
    unreadable: dict[Path | str, DataError] = {}

    def left_out(source: Source, error: DataError) -> None:
        unreadable[source.address if isinstance(source.address, Path) else source.shown] = error

    growing = "-" in map(str, sources)  # a list that is worked through while it is written
    on_problem = left_out if growing else refuse
    listed = list_sources(sources, recursive=recursive, leave_out=output, on_unreadable=on_problem)
    listed = _without_collisions(listed, output, save, on_problem)
    total = None
    if not growing:
        listed = list(listed)
        total = len(listed) if all(source.kind in ("picture", "address") for source in listed) else None
        if image_id is not None:
            list(map(image_id, listed))  # one that has none is found before anything is predicted
    require_place(output, overwrite=overwrite)
    images = objects = 0
    pictures = read_sources(listed, every=every, max_frames=max_frames, buffer=buffer, on_unreadable=left_out)
    found = _detect(model, pictures, batch_size, {key: value for key, value in how.items() if value is not None})
    with Saver(output, save, model.classes, overwrite=overwrite) as saver:
        for picture, detections in found:
            if image_id is not None:
                detections.image_id = image_id(picture.source)
            saver.add(picture, detections)
            images, objects = images + 1, objects + len(detections)
            if progress is not None:
                progress(images + len(unreadable), total)
    if not images:
        if not unreadable:
            raise DataError("standard input: names no pictures", "write one path a line")
        first = next(iter(unreadable.values()))
        raise DataError(f"none of {len(unreadable)} images could be read; the first: {first.message}", first.remedy)
    return Predictions(output, images, objects, unreadable)


def require_place(output: Path, *, overwrite: bool = False) -> None:
    """Raise ConfigError unless results can be written to a folder: see `predict_sources`."""
    require_free(
        output,
        lambda file: overwrite or is_ours(file, output),
        remedy="choose another --output, or replace files of the same names with --overwrite",
    )


def new_folder(parent: Path = Path("runs")) -> Path:
    """`runs/predict-N`, made with the first N that is free.

    Raises:
        ConfigError: it cannot be made.
    """
    for number in itertools.count(1):
        folder = parent / f"predict-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not folder.exists():
                raise ConfigError(f"{parent}: cannot be written ({error.strerror})", "choose an --output") from None
    raise AssertionError


def _without_collisions(
    sources: Iterable[Source], output: Path, save: Sequence[str], on_problem: OnUnreadable
) -> Iterator[Source]:
    """The sources, each once, without those that would be written to the place of another one, or lie where results go."""
    for_frames = not {"yolo", "voc", "crops"}.isdisjoint(save)
    by_stem = for_frames or "draw" in save  # the other forms have whole names in them
    taken: dict[tuple[str, str], Source] = {}
    for source in sources:
        problem = None
        if isinstance(source.address, Path) and source.address.resolve().is_relative_to(output.resolve()):
            problem = "lies in the output folder, where it would be drawn over", "choose another --output"
        kind = "video" if source.kind in ("video", "live") else "picture"
        name = str(PurePosixPath(source.name).with_suffix("")) if by_stem else source.name
        others = [taken.setdefault((kind, name), source)]
        if for_frames and kind == "video":
            others.append(taken.get(("frame", name), source))
        elif for_frames and (frame := re.fullmatch(r"(.+)-\d{6,}", name)):  # as the labels of a frame are called
            taken.setdefault(("frame", frame[1]), source)
            others.append(taken.get(("video", frame[1]), source))
        other = next((other for other in others if other.address != source.address), None)
        if other is not None:
            remedy = (
                "give one of them alone, as by a pattern such as 'FOLDER/*.png', and another --output for the other"
            )
            if source.name != other.name:
                remedy += "; `--save coco,jsonl` takes both"
            elif isinstance(source.address, Path) and isinstance(other.address, Path):
                remedy += "; --recursive takes the folder above both"
            problem = f"and {other.shown} would both be written as {name}", remedy
        if problem is not None:
            on_problem(source, DataError(f"{source.shown}: {problem[0]}", problem[1]))
        elif others[0] is source:
            yield source
