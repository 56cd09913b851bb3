"""What verbs write: whole or not at all, marked with the command that made it, and never over anything else.

Every format has a place for the mark: the key `made_by` of a json object, `Software` of a PNG, the comment of a JPEG or an mp4,
the `generator` of an HTML page, the `database` of VOC's XML, the first line of YAML. COCO results, lines of json and YOLO's
labels have none: they are known by the form of their rows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from paqdetr._version import __version__
from paqdetr.errors import ConfigError
from paqdetr.files import remove_leftovers, storage_errors, unfinished, whole_file
from paqdetr.images import fit_jpeg

RESULTS = "COCO results"
"""What `made_by` calls a list of detections."""
RESULT_KEYS = ("image_id", "file_name", "category_id", "category_name", "bbox", "score")
"""The keys of a row of results, in order."""
LINE_KEYS = ("image", "frame", "time", "width", "height", "detections")
"""The keys of a line of json on one image, in order: `frame` and `time` (seconds) are null unless it is of a video."""

_HEAD = 4096
_MARK = re.compile(
    rb'(?:\A\{\s*"made_by": "|\A\x89PNG.*?Software\x00|\A\xff\xd8.*?\xff\xfe..|\A<!.*?content="|\A# made_by: '
    rb"|\A<annotation>\s*<source>\s*<database>)(paqdetr[ a-z]*) \d",
    re.DOTALL,
)
# Of an mp4 the last bytes, where its metadata is.
_VIDEO, _VIDEO_MARK = re.compile(rb"\A.{4}ftyp", re.DOTALL), re.compile(rb"(paqdetr[ a-z]*) \d[^\x00]*\Z")
_LINE = re.compile(
    rb'\A\{"image": "(?:[^"\\]|\\.)*", "frame": (?:null|\d+), "time": (?:null|[-+\d.e]+), '
    rb'"width": \d+, "height": \d+, "detections": \['
)
_LABELS = re.compile(rb"\A(?:\d+(?: [01]\.\d{6}){5}\n)+\Z")


def made_by(path: Path) -> str | None:
    """The command that wrote a file, such as "paqdetr eval"; `RESULTS` for detections of any of them; None for all else."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            found = _MARK.match(head)
            if found is None and _VIDEO.match(head):
                file.seek(max(file.seek(0, os.SEEK_END) - _HEAD, 0))
                found = _VIDEO_MARK.search(file.read())
    except OSError:
        return None
    if found is not None:
        return found[1].decode()
    whole_rows = head[: head.rfind(b"\n") + 1]
    return RESULTS if _is_results(head) or _LINE.match(head) or _LABELS.match(whole_rows) else None


def mark(maker: str) -> str:
    """What a file says of its origin."""
    return f"{maker} {__version__}"


def _is_results(head: bytes) -> bool:
    text = head.decode("utf-8", errors="replace")
    start = re.match(r"\s*\[\s*(?=\{)", text)
    if start is None:
        return text.strip() == "[]" and len(head) < _HEAD
    try:
        row, _ = json.JSONDecoder().raw_decode(text, start.end())
    except (ValueError, RecursionError):
        return False
    return tuple(row) == RESULT_KEYS


def require_replaceable(path: Path, maker: str, *, overwrite: bool = False) -> None:
    """Check a file that is going to be written.

    Args:
        path: where it will be.
        maker: the command that writes it, as of `made_by`: what it wrote earlier is replaced.
        overwrite: any file is replaced.

    Raises:
        ConfigError: it is a folder, its folder cannot be made or written, or there is something else that would be lost.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, where a file is to be written", "name a file")
    _require_place(path)
    if overwrite or not os.path.lexists(path) or _is_stream(path) or made_by(path) == maker:
        return
    if path.is_file() and path.stat().st_size == 0:
        return  # as `mktemp` makes it
    raise ConfigError(
        f"{path}: the file exists, and `{maker}` did not write it"
        if maker != RESULTS
        else f"{path}: the file exists and holds other things than detections of this program",
        "name another file, or replace it with --overwrite",
    )


def require_free(
    output: Path,
    is_ours: Callable[[Path], bool] | None = None,
    *,
    remedy: str = "choose another --output, or an empty folder",
) -> None:
    """Check a folder that is going to be written.

    Args:
        output: absent, empty, or with nothing but what `is_ours` knows.
        is_ours: called with every file in it, at any depth; None: it has to be empty.
        remedy: what to do if there is another.

    Raises:
        ConfigError: it is a file, holds something else, or cannot be made or written.
    """
    if os.path.lexists(output) and not output.is_dir():
        raise ConfigError(f"{output}: a file is in the way", remedy)
    _require_place(output)
    if not output.is_dir():
        return
    remove_leftovers(output)
    foreign = next((path for path in files_below(output) if is_ours is None or not is_ours(path)), None)
    if foreign is not None:
        raise ConfigError(
            f"{output}: the folder holds other files, such as {foreign.relative_to(output)}, and nothing is overwritten",
            remedy,
        )


def files_below(folder: Path) -> Iterator[Path]:
    """Files at any depth, and empty folders; without what a file manager (.DS_Store) or a new disk (lost+found) has there."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "lost+found":
            continue
        if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
            yield from files_below(path)
        else:
            yield path


def _require_place(path: Path) -> None:
    """Raise ConfigError unless a file or folder can be made there, with the folders above it."""
    if _is_stream(path):
        return
    folder = path if path.exists() else path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not path.exists() and not folder.is_dir():
        raise ConfigError(f"{path}: {folder} is a file, not a folder", "choose another place")
    # A file is replaced by a new one, so that its folder counts as well.
    for wanted in {folder, folder if folder.is_dir() else folder.parent}:
        if not os.access(wanted, os.W_OK):
            raise ConfigError(f"{path}: {wanted} may not be written", "choose another place")


def _is_stream(path: Path) -> bool:
    """A device or a pipe, such as /dev/stdout: it is written into, and cannot be replaced."""
    special = str(path) in ("/dev/stdout", "/dev/stderr") or str(path).startswith("/dev/fd/")
    return special or (path.exists() and not path.is_file() and not path.is_dir())


@contextmanager
def output_file(path: Path, *, maker: str, overwrite: bool = False) -> Iterator[Path]:
    """A place to write into, whose content is at `path` after the block, whole or not at all; a link is followed, a device or a
    pipe written into.

    Raises:
        ConfigError: as `require_replaceable`.
        StorageError: it cannot be written; what was there before still is.
    """
    require_replaceable(path, maker, overwrite=overwrite)
    if _is_stream(path):
        with storage_errors(path):
            yield path
    else:
        with whole_file(path.resolve()) as place:
            yield place


def write_output(path: Path, write: Callable[[Path], object], *, maker: str, overwrite: bool = False) -> None:
    """Let `write` fill a file at `path`, as in the block of an `output_file`."""
    with output_file(path, maker=maker, overwrite=overwrite) as place:
        write(place)


def write_json(
    path: Path, content: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, maker: str, overwrite: bool = False
) -> None:
    """An object, with the mark as its first key, or COCO results (`maker` is `RESULTS`), a row a line.

    Raises:
        as `output_file`.
    """
    if isinstance(content, Mapping):
        text = json.dumps({"made_by": mark(maker), **content}, indent=1) + "\n"
        write_output(path, lambda place: place.write_text(text, encoding="utf-8"), maker=maker, overwrite=overwrite)
        return
    with write_rows(path, overwrite=overwrite) as add:
        for row in content:
            add(row)


@contextmanager
def write_rows(path: Path, *, overwrite: bool = False) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """COCO results, written a row at a time by the function that is given; at `path` after the block.

    Raises:
        as `output_file`.
    """
    between = ""

    def add(row: Mapping[str, Any]) -> None:
        nonlocal between
        with storage_errors(path):
            file.write(f"{between}\n{json.dumps(row)}")
        between = ","

    place_of = output_file(path, maker=RESULTS, overwrite=overwrite)
    with place_of as place, storage_errors(path), place.open("w", encoding="utf-8") as file:
        file.write("[")
        yield add
        file.write("\n" * bool(between) + "]\n")


def write_picture(path: Path, picture: Image.Image, *, maker: str, overwrite: bool = False) -> None:
    """A PNG, or a JPEG where the name ends so, of at most 65,500 pixels a side.

    Raises:
        as `write_output`.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        how: dict[str, Any] = {"format": "JPEG", "quality": 92, "comment": mark(maker).encode()}
        picture = fit_jpeg(picture)
    else:
        how = {
            "format": "PNG",
            "pnginfo": PngInfo(),
            "compress_level": 1,
        }  # a fifth larger than 6, in a third of the time
        how["pnginfo"].add_text("Software", mark(maker))
    write_output(path, lambda place: picture.save(place, **how), maker=maker, overwrite=overwrite)


@contextmanager
def whole_folder(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder that takes the place of `output` when the block has filled it, and vanishes if the block fails.

    It is made beside `output`, or within it where that is a mounted volume. What a killed process left half-made is removed.

    Args:
        output: absent or empty.
        replace: what is there may be lost.

    Raises:
        StorageError: it cannot be written; what was there before still is.
    """
    output = output.resolve()
    within = output.is_dir() and (output.is_mount() or not os.access(output.parent, os.W_OK))
    base = output / output.name if within else output
    with storage_errors(output):
        base.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(base.parent)
        with unfinished(base) as fresh:
            fresh.mkdir()
            yield fresh
            aside = fresh.with_name(".replaced")
            if within:
                for entry in list(fresh.iterdir()):
                    if replace and (output / entry.name).exists():
                        aside.mkdir(exist_ok=True)
                        (output / entry.name).rename(aside / entry.name)
                    entry.rename(output / entry.name)
                return
            if replace and output.exists():
                output.rename(aside)
            elif output.exists():
                output.rmdir()  # a folder that was filled meanwhile is not overwritten
            try:
                fresh.rename(output)
            except OSError:
                if aside.exists():
                    aside.rename(output)
                raise
