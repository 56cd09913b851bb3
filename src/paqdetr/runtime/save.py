"""What predictions are written as: drawn pictures and video, COCO results, YOLO and VOC labels, crops, lines of json."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType

from paqdetr.errors import ConfigError, UserError
from paqdetr.files import storage_errors
from paqdetr.outputs import (
    LINE_KEYS,
    RESULTS,
    made_by,
    mark,
    output_file,
    require_replaceable,
    write_output,
    write_picture,
    write_rows,
)
from paqdetr.runtime.sources import Picture, Source
from paqdetr.runtime.video import VideoWriter
from paqdetr.structures import ClassTable, Detections
from paqdetr.text import did_you_mean

MAKER = "paqdetr predict"
FORMS = ("draw", "coco", "yolo", "voc", "crops", "jsonl")
"""What can be written, where NAME is the relative path of a picture without its ending, with `-000017` for a frame of a video.

`draw` is NAME.jpg, NAME.mp4 of a video; `coco` is predictions.json; `yolo` is labels/NAME.txt, with the classes in
labels/classes.yaml; `voc` is voc/NAME.xml; `crops` is crops/CLASS/NAME-1.jpg; `jsonl` is predictions.jsonl."""

_COCO, _LINES, _CLASSES = "predictions.json", "predictions.jsonl", "labels/classes.yaml"


def require_forms(forms: Sequence[str]) -> None:
    """Raise ConfigError unless all are of `FORMS`, and there is one."""
    for form in forms or [""]:
        if form not in FORMS:
            raise ConfigError(
                f"save: expected some of {', '.join(FORMS)}, found {form!r}",
                did_you_mean(form, FORMS, "draw,coco is usual"),
            )


def is_ours(file: Path, output: Path) -> bool:
    """Whether a file in a folder with results is one that an earlier call wrote there."""
    name = file.relative_to(output).as_posix()
    lists = name in (_COCO, _LINES) or (name.startswith("labels/") and file.suffix == ".txt")
    if lists and file.is_file() and file.stat().st_size == 0:
        return name != _COCO
    return made_by(file) == (RESULTS if lists else MAKER)


class Saver:
    """Writes the results of pictures one by one. Those of a picture are there at once, `predictions.json` and a video at
    their end; a video that is interrupted ends there, and plays.

    Args:
        output: the folder, which is made when there is something to write.
        forms: of `FORMS`.
        classes: of the model, for YOLO's numbers.
        overwrite: any file in the way is replaced.

    Raises:
        StorageError: something cannot be written.
    """

    def __init__(self, output: Path, forms: Sequence[str], classes: ClassTable, *, overwrite: bool = False) -> None:
        self.output, self._classes, self._overwrite = output, classes, overwrite
        write = {"draw": self._draw, "yolo": self._yolo, "voc": self._voc, "crops": self._crops, "jsonl": self._line}
        self._writes = [write[form] for form in dict.fromkeys(forms) if form != "coco"]
        self._coco, self._add_row = "coco" in forms, None
        self._results, self._lines = contextlib.ExitStack(), None
        self._video: tuple[Source, Path, contextlib.ExitStack, VideoWriter] | None = None
        self._live, self._named = False, False

    def add(self, picture: Picture, detections: Detections) -> None:
        """Write what was found in a picture."""
        self._live |= picture.live
        for write in self._writes:
            write(picture, detections)
        if self._coco:
            if self._add_row is None:
                self._add_row = self._results.enter_context(write_rows(self.output / _COCO, overwrite=self._overwrite))
            for row in detections.to_coco(rounded=True):
                self._add_row(row)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Of results that are not complete nothing is left; a live source ends no other way.
        why = None if kind is None or self._live else GeneratorExit()
        with contextlib.ExitStack() as stack:  # whatever fails, the others are closed
            if self._lines is not None:
                stack.callback(self._lines.close)
            stack.callback(self._results.__exit__, type(why) if why else None, why, None)
            with contextlib.suppress(*() if kind is None else (UserError, OSError)):
                self._end_video()

    def _place(self, picture: Picture, folder: str, ending: str) -> Path:
        stem = PurePosixPath(picture.source.name).with_suffix("")
        frame = "" if picture.frame is None else f"-{picture.frame:06d}"
        return self.output / folder / f"{stem}{frame}{ending}"

    def _draw(self, picture: Picture, detections: Detections) -> None:
        drawn = detections.draw(picture.image)
        if picture.time is None:
            write_picture(self._place(picture, "", ".jpg"), drawn, maker=MAKER, overwrite=self._overwrite)
            return
        if self._video is None or self._video[0] is not picture.source:
            self._end_video()
            path = self.output / PurePosixPath(picture.source.name).with_suffix(".mp4")
            with contextlib.ExitStack() as stack:
                place = stack.enter_context(output_file(path, maker=MAKER, overwrite=self._overwrite))
                writer = stack.enter_context(contextlib.closing(VideoWriter(place, comment=mark(MAKER))))
                self._video = picture.source, path, stack.pop_all(), writer
        with storage_errors(self._video[1]):
            self._video[3].add(drawn, picture.time)

    def _end_video(self) -> None:
        if self._video is not None:
            (_, path, stack, _), self._video = self._video, None
            with storage_errors(path):
                stack.close()

    def _yolo(self, picture: Picture, detections: Detections) -> None:
        if not self._named:
            lines = [f"  {number}: {json.dumps(name)}" for number, name in enumerate(self._classes.names)]
            self._text(self.output / _CLASSES, "\n".join([f"# made_by: {mark(MAKER)}", "names:", *lines, ""]), MAKER)
            self._named = True
        self._text(self._place(picture, "labels", ".txt"), detections.to_yolo(scores=True), RESULTS)

    def _voc(self, picture: Picture, detections: Detections) -> None:
        self._text(self._place(picture, "voc", ".xml"), detections.to_voc(database=mark(MAKER)), MAKER)

    def _crops(self, picture: Picture, detections: Detections) -> None:
        for number, ((left, top, right, bottom), _, label, name) in enumerate(detections, start=1):
            left, top = max(int(left), 0), max(int(top), 0)
            right, bottom = min(-int(-right // 1), picture.image.width), min(-int(-bottom // 1), picture.image.height)
            if right > left and bottom > top:
                name = re.sub(r"[^\w .+-]", "_", name).strip(". ") or str(label)
                place = self._place(picture, f"crops/{name}", f"-{number}.jpg")
                crop = picture.image.crop((left, top, right, bottom))
                write_picture(place, crop, maker=MAKER, overwrite=self._overwrite)

    def _line(self, picture: Picture, detections: Detections) -> None:
        path = self.output / _LINES
        found = [
            {"box": [round(x, 2) for x in box], "score": round(score, 5), "label": name, "id": label}
            for box, score, label, name in detections
        ]
        time = None if picture.time is None else round(picture.time, 6)
        values = (picture.source.name, picture.frame, time, *picture.image.size, found)
        with storage_errors(path):
            if self._lines is None:
                require_replaceable(path, RESULTS, overwrite=self._overwrite)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._lines = path.open("w", encoding="utf-8")
            self._lines.write(json.dumps(dict(zip(LINE_KEYS, values, strict=True))) + "\n")
            self._lines.flush()

    def _text(self, path: Path, text: str, maker: str) -> None:
        write_output(
            path, lambda place: place.write_text(text, encoding="utf-8"), maker=maker, overwrite=self._overwrite
        )
