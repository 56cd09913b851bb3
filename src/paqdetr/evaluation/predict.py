"""Pictures in, drawn pictures and a COCO results json out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paqdetr.errors import DataError
from paqdetr.images import list_images, read_image
from paqdetr.metrics.coco import CocoRecords
from paqdetr.models.detector import Detector
from paqdetr.outputs import RESULTS, made_by, require_free, write_json, write_picture
from paqdetr.structures import Detections
from paqdetr.values import require_threshold

_MAKER = "paqdetr predict"
_RESULTS_FILE = "predictions.json"


@dataclass(frozen=True, slots=True)
class Predictions:
    """What `predict_folder` wrote.

    Attributes:
        output: the folder with one drawn picture for each image.
        results_file: COCO results with `file_name` and `category_name`; `image_id` is that of `annotations`, else the file name.
        found: detections by picture, in order.
        unreadable: pictures that could not be read, with the reason.
    """

    output: Path
    results_file: Path
    found: dict[Path, Detections]
    unreadable: dict[Path, str]


def predict_folder(
    model: Detector,
    sources: Sequence[str | Path],
    *,
    output: str | Path,
    threshold: float = 0.3,
    annotations: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Detect in images and folders of images.

    A picture that cannot be read is reported and left out; the others are still done. Pictures appear one by one, and the results
    at the end: a call that was killed is repeated into the same folder.

    Args:
        model: a detector.
        sources: image files and folders.
        output: a folder that is new, empty, or holds nothing but what an earlier call drew and wrote, which is replaced.
        threshold: the least score that is drawn and written.
        annotations: a COCO json with these images, by file name: results have its image ids.
        overwrite: other files may lie in `output`, and are replaced where they have the name of one that is written.
        progress: called with (images done, images in all).

    Raises:
        DataError: a source is missing, a folder has no images, two pictures share a name, one lies in `output`, is not in
            `annotations`, or none could be read.
        ConfigError: a threshold outside of [0, 1], or `output` holds other files.
        StorageError: something cannot be written.
    """
    require_threshold(threshold)
    output = Path(output)
    pictures = _pictures(sources)
    for path in pictures:
        if path.resolve().parent == output.resolve():
            raise DataError(
                f"{path}: lies in the output folder, where it would be drawn over", "choose another --output"
            )
    ids = None if annotations is None else _image_ids(pictures, annotations)
    require_free(
        output,
        lambda file: overwrite or _is_ours(file, output),
        remedy="choose another --output, or replace files of the same names with --overwrite",
    )
    found: dict[Path, Detections] = {}
    unreadable: dict[Path, str] = {}
    for done, path in enumerate(pictures, start=1):
        try:
            picture = read_image(path)
        except DataError as error:
            unreadable[path] = error.message
            continue
        detections = model.predict(picture, threshold=threshold)[0]
        detections.file_name = path.name
        detections.image_id = path.name if ids is None else ids[path]
        found[path] = detections
        drawn = detections.draw(picture)
        write_picture(output / f"{path.stem}.jpg", drawn, maker=_MAKER, overwrite=overwrite)
        if progress is not None:
            progress(done, len(pictures))
    if not found:
        path, reason = next(iter(unreadable.items()))
        raise DataError(f"none of {len(pictures)} images could be read; the first: {reason}", f"look at {path}")
    rows = [row for detections in found.values() for row in detections.to_coco(rounded=True)]
    results_file = output / _RESULTS_FILE
    write_json(results_file, rows, maker=RESULTS, overwrite=overwrite)
    return Predictions(output, results_file, found, unreadable)


def _is_ours(file: Path, output: Path) -> bool:
    return made_by(file) == (RESULTS if file == output / _RESULTS_FILE else _MAKER)


def _image_ids(pictures: Sequence[Path], annotations: str | Path) -> dict[Path, int | str]:
    records = CocoRecords.open(annotations, "bbox")
    ids: dict[Path, int | str] = {}
    for path in pictures:
        own = records.image_called(str(path)) or records.image_called(path.name)
        if own is None:
            raise DataError(
                f"{annotations}: none of its {len(records.image_ids)} images is called {path.name}",
                "give the json of these images, or leave --annotations out",
            )
        ids[path] = records.image_ids[own - 1]
    return ids


def _pictures(sources: Sequence[str | Path]) -> list[Path]:
    pictures: list[Path] = []
    for source in sources:
        pictures += list_images(source)
    names: dict[str, Path] = {}
    for path in pictures:
        other = names.setdefault(path.stem, path)
        if other != path:
            raise DataError(
                f"{path} and {other} would both be drawn to {path.stem}.jpg", "predict them into two folders"
            )
    return pictures
