"""Reads annotation files that may come from anywhere.

They are limited in size and depth, and none of them names a file outside its folder.
"""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any

from paqdetr.data.annotations import Issues
from paqdetr.errors import DataError
from paqdetr.images import IMAGE_EXTENSIONS, PICTURE_EXTENSIONS

MAX_JSON_BYTES = int(float(os.environ.get("PAQDETR_MAX_JSON_GIB", "4")) * 2**30)
"""The largest annotation file that is read: ten times the size of that of COCO train2017."""

MAX_SIDE_BYTES = 2**26
"""The largest file with the annotations of one image, or with a list of images."""


def read_bytes(path: Path, *, limit: int = MAX_SIDE_BYTES) -> bytes:
    """The file's content.

    Raises:
        DataError: it is missing, no file, may not be read, or is larger than `limit` bytes.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise DataError(
                    f"{path}: has {size / 2**20:,.0f} MiB, more than the {limit / 2**20:,.0f} that are read",
                    "check that it is the right file; PAQDETR_MAX_JSON_GIB=N raises the limit of annotation files",
                )
            return file.read(limit + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file", "Check the path.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "Check the file.") from None


def read_text(path: Path, *, limit: int = MAX_SIDE_BYTES) -> str:
    """The file as UTF-8 text, with or without a byte order mark.

    Raises:
        DataError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8 text at byte {error.start}", "Save the file as UTF-8.") from None


def parse_json(text: str, where: str) -> Any:
    """What the json text says; `where` names it in errors.

    Raises:
        DataError: no json (naming line and column), nested too deeply, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: no valid json at line {error.lineno}, column {error.colno}: {error.msg}",
            "Export or download the file again.",
        ) from None
    except RecursionError:
        raise DataError(
            f"{where}: the json is nested too deeply", "Check what wrote it: no annotations are."
        ) from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise DataError(f"{where}: no usable json: {error}", "Export or download the file again.") from None


def load_json(path: Path) -> dict[str, Any]:
    """The file's content, an object.

    Raises:
        DataError: as `read_text` and `parse_json`, or it is no object.
    """
    content = parse_json(read_text(path, limit=MAX_JSON_BYTES), str(path))
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: holds a {type(content).__name__}, expected images, annotations and categories",
            "A list is the form of results; name the ground truth.",
        )
    return content


def inner_path(name: str) -> str | None:
    """A relative name in its plain form ("a/./b" is "a/b"), or None if it is absolute, leads out, or is no file name at all.

    What is asked is the name alone: symbolic links are the user's own doing and are followed.
    """
    if not name or "\0" in name or "\n" in name:
        return None
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return None
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or name[1:3] in (":\\", ":/") or name.startswith("\\\\"):
        return None
    plain = str(path)
    return (
        None
        if plain == "." or len(plain) > 4096 or any(len(os.fsencode(p)) > 255 for p in path.parts)
        else plain
    )


# What operating systems and programs leave in folders, and archives of macOS hold beside every file.
_LEFTOVERS = frozenset({"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints", "@eaDir"})


def is_leftover(name: str) -> bool:
    """Whether a relative name is, or lies in, what nobody put there on purpose: `._a.jpg`, `__MACOSX/`, ..."""
    return any(part.startswith("._") or part in _LEFTOVERS for part in name.split("/"))


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in a folder, sorted, without hidden ones and leftovers; none if it cannot be read."""
    return [path for path in _visible(folder) if path.is_dir()]


def files_in(folder: Path) -> list[Path]:
    """The files directly in a folder, as `folders_in`."""
    return [path for path in _visible(folder) if path.is_file()]


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(
            path for path in folder.iterdir() if path.name[:1] != "." and not is_leftover(path.name)
        )
    except OSError:
        return []


def list_files(folder: Path, issues: Issues) -> list[str]:
    """All files below a folder, relative to it, sorted. Links to folders are followed.

    What is left out is a warning in the check: leftovers of programs. A link that leads back to a folder it lies in, and a folder
    that may not be read, are errors.

    Raises:
        DataError: as said, unless issues are collected.
    """
    found: list[str] = []

    def visit(path: str, prefix: str, above: frozenset[str]) -> None:
        real = os.path.realpath(path)
        if real in above:
            message = f"a link that leads back to {real}, in which it lies"
            return issues.error(path, message, "Remove the link.", kind="link")
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            return issues.error(path, f"cannot be read: {error.strerror}", "Check the folder.", kind="link")
        for entry in entries:
            name = prefix + entry.name
            if is_leftover(entry.name):
                issues.warn(folder / name, "left out: not part of the data", kind="skipped file")
            elif _is_folder(entry):
                visit(entry.path, f"{name}/", above | {real})
            else:
                found.append(name)

    visit(str(folder), "", frozenset())
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def list_pictures(folder: Path, issues: Issues) -> list[str]:
    """Those files of `list_files` that are read as pictures by their ending; other pictures are a warning in the check."""
    found = []
    for name in list_files(folder, issues):
        ending = PurePosixPath(name).suffix.lower()
        if ending in IMAGE_EXTENSIONS:
            found.append(name)
        elif ending in PICTURE_EXTENSIONS:
            message = f"left out: only {', '.join(sorted(IMAGE_EXTENSIONS))} are read here"
            issues.warn(folder / name, message, kind="skipped file")
    return found


def composed(name: str) -> str:
    """A name in the one of its Unicode forms (NFC) by which names are compared: macOS writes another (NFD)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class Folder:
    """Looks up files below a folder by relative name, in any Unicode form; every folder is listed once."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._listed: dict[str, dict[str, str]] = {}

    def find(self, name: str) -> str | None:
        """The name as the disk has it, or None if there is nothing of this name."""
        parent, base = os.path.split(name)
        names = self._names(parent)
        real = base if names.get(base) is not None else names.get(composed(base))
        if real is not None:
            return f"{parent}/{real}" if parent else real
        above = self.find(parent) if parent and not names else None
        return self.find(f"{above}/{base}") if above is not None and above != parent else None

    def _names(self, parent: str) -> dict[str, str]:
        """Names of a folder's entries, as they are and composed -> as they are."""
        if parent not in self._listed:
            try:
                with os.scandir(f"{self._root}/{parent}") as entries:
                    names = [entry.name for entry in entries]
            except (OSError, ValueError):
                names = []
            self._listed[parent] = {composed(name): name for name in names} | {name: name for name in names}
        return self._listed[parent]
