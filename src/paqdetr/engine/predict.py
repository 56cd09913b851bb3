"""Pictures in, drawn pictures and a COCO results json out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paqdetr.errors import DataError
from paqdetr.images import list_images, read_image
from paqdetr.models.arguments import require_threshold
from paqdetr.models.detector import Detector
from paqdetr.structures import Detections


@dataclass(frozen=True, slots=True)
class Predictions:
    """What `predict_folder` wrote.

    Attributes:
        output: the folder with one drawn picture for each image.
        results_file: COCO results; `image_id` is the file name.
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
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Detect in images and folders of images.

    A picture that cannot be read is reported and left out; the others are still done.

    Args:
        model: a detector.
        sources: image files and folders.
        output: new or empty folder, or one of an earlier prediction whose pictures are replaced.
        threshold: the least score that is drawn and written.
        progress: told (images done, images in all).

    Raises:
        DataError: a source is missing, a folder has no images, two pictures share a name, one lies in `output`, or none could
            be read.
        ConfigError: a threshold outside of [0, 1].
    """
    require_threshold(threshold)
    output = Path(output)
    pictures = _pictures(sources)
    results_file = output / "predictions.json"
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: a file is in the way", "choose another --output")
    if output.is_dir() and any(output.iterdir()) and not results_file.is_file():
        raise DataError(
            f"{output}: the folder holds other files", "choose another --output, or an empty folder"
        )
    for path in pictures:
        if path.resolve().parent == output.resolve():
            raise DataError(
                f"{path}: lies in the output folder, where it would be drawn over", "choose another --output"
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
        detections.image_id = path.name
        found[path] = detections
        output.mkdir(parents=True, exist_ok=True)  # not before there is something to put into it
        detections.draw(picture).save(output / f"{path.stem}.jpg", quality=92)
        if progress is not None:
            progress(done, len(pictures))
    if not found:
        path, reason = next(iter(unreadable.items()))
        raise DataError(
            f"none of {len(pictures)} images could be read; the first: {reason}", f"look at {path}"
        )
    rows = [row for detections in found.values() for row in detections.to_coco()]
    results_file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return Predictions(output, results_file, found, unreadable)


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
