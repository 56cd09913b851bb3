"""Files of data sets: which are listed and looked for, and that none leads outside; their sizes; which split a name means."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from paqdetr.data.annotations import Issues
from paqdetr.errors import DataError
from paqdetr.files import MAX_SIDE_BYTES, read_text
from paqdetr.images import IMAGE_EXTENSIONS, PICTURE_EXTENSIONS, is_leftover, read_size
from paqdetr.text import shorten


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
    return None if plain == "." or len(plain) > 4096 or any(len(os.fsencode(p)) > 255 for p in path.parts) else plain


def with_slashes(name: str, folder: Path) -> str:
    """A name in a folder with the backslashes of Windows as slashes, unless a file is called so."""
    return name.replace("\\", "/") if "\\" in name and not os.path.lexists(folder / name) else name


def listed_name(name: str, issues: Issues, *, source: Path, what: str, folder: Path) -> str | None:
    """The plain form of a name that a file lists; None for a leftover, and where it leads out of the folder. Backslashes, as
    Windows writes them, part folders unless a file is called so. An absolute name may lie in the folder.

    Args:
        source: the file that lists it.
        what: the name and where it stands, for errors: "line 3: '../a'".
        folder: that names are relative to.

    Raises:
        DataError: it leads out, unless issues are collected.
    """
    name = with_slashes(name, folder)
    for base in (folder, folder.resolve()):  # programs write absolute names, too
        name = name.removeprefix(f"{base}/") if base.is_absolute() else name
    plain = inner_path(name)
    if plain is None:
        remedy = "Give names relative to that folder, without '..'."
        issues.error(source, f"{what} is no name inside {folder}", remedy, kind="path leaves the folder")
    elif is_leftover(plain):
        issues.warn(name, "left out: not part of the data", kind="skipped file")
        return None
    return plain


def numbered_lines(path: Path, *, limit: int = MAX_SIDE_BYTES) -> Iterator[tuple[int, str]]:
    """(number, text) of a file's lines, without space around them and without empty ones.

    Raises:
        DataError: as `read_text`.
    """
    for number, line in enumerate(read_text(path, limit=limit).split("\n"), start=1):
        if text := line.strip():
            yield number, text


def listed_names(list_file: Path, issues: Issues, *, folder: Path) -> Iterator[tuple[int, str]]:
    """Line number and name of each line of a list, where `listed_name` gives one.

    Raises:
        DataError: as `listed_name` and `numbered_lines`.
    """
    for number, line in numbered_lines(list_file):
        what = f"line {number}: {shorten(line)}"
        if (name := listed_name(line, issues, source=list_file, what=what, folder=folder)) is not None:
            yield number, name


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in a folder, sorted, without hidden ones and leftovers; none if it cannot be read."""
    return [folder / entry.name for entry in _visible(folder) if _is_folder(entry)]


def folder_in(folder: Path, name: str) -> Path:
    """The folder of this name in a folder, whatever the case; the path that it would have if there is none."""
    found = (below for below in folders_in(folder) if below.name.lower() == name.lower())
    return next(found, folder / name)


def files_in(folder: Path) -> list[Path]:
    """The files directly in a folder, as `folders_in`."""
    return [folder / entry.name for entry in _visible(folder) if not _is_folder(entry)]


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.name[0] != "." and not is_leftover(entry.name)]
    except OSError:
        return []
    return sorted(found, key=lambda entry: entry.name)


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
        real = names.get(base) or names.get(composed(base))
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


# ------------------------------------------------------------------------------------------------- sizes


def header_sizes(paths: Sequence[Path], issues: Issues) -> list[tuple[int, int] | None]:
    """(height, width) of every image with its EXIF turn applied; None where it cannot be read and issues are collected.

    Raises:
        DataError: an image is missing or its header is damaged, unless issues are collected.
    """
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 4)) as pool:
        found = list(pool.map(_size, paths))
    sizes: list[tuple[int, int] | None] = []
    for path, size in zip(paths, found, strict=True):
        if isinstance(size, DataError):
            if not issues.collect:
                raise size
            # Images are opened again, one by one, when they are checked: not an unreadable file twice.
            issues.error(path, size.message.removeprefix(f"{path}: "), size.remedy, kind="unreadable image")
            sizes.append(None)
        else:
            sizes.append(size)
    return sizes


REPLACE = "Replace it, or remove it and its annotations."
"""What to do about an image of a data set that cannot be read."""


def _size(path: Path) -> tuple[int, int] | DataError:
    try:
        width, height = read_size(path, remedy=REPLACE)
    except DataError as error:
        return error
    return height, width


# ------------------------------------------------------------------------------------ names of splits

USUAL = ("train", "val", "test")
_MEANINGS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# What annotation tools call a set that was never divided, and VOC what its train and val are together.
_UNDIVIDED = ("default", "all", "trainval")

T = TypeVar("T")


def meaning(name: str) -> str | None:
    """The split that a name says in full, whatever its case; None if it says none."""
    return _MEANINGS.get(name.lower())


def hint(name: str) -> str | None:
    """The split that one word of a name says: "my_train", "val2017"; None if none or several do."""
    words = {_MEANINGS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _MEANINGS}
    return words.pop() if len(words) == 1 else None


def is_split(name: str) -> bool:
    """Whether a name says a split in full, or is what a set is called that was never divided."""
    return meaning(name) is not None or _letters(name) in _UNDIVIDED


def name_splits(found: Mapping[str, T], where: Path) -> dict[str, T]:
    """The same under the names of splits, in the order train, val, test, others.

    A name that says a split in full comes first, then one of which a word says it (of several years the last), then, for train, a
    name for what is not divided. Names that are left stay as they are: no split is dropped.

    Args:
        found: by name, as of files and folders.
        where: they lie, for errors.

    Raises:
        DataError: two names mean the same split.
    """
    chosen: dict[str, str] = {}  # split -> name
    plain = [name for name in found if meaning(name) is None]
    for split in USUAL:
        names = [name for name in found if meaning(name) == split]
        names = names or _latest(name for name in plain if hint(name) == split)
        if split == "train" and not names:
            rest = [name for name in plain if hint(name) is None]
            names = rest if len(found) == 1 else [name for name in rest if _letters(name) in _UNDIVIDED]
        if len(names) > 1:
            raise DataError(
                f"{where}: {' and '.join(map(repr, names))} mean the same split, {split!r}",
                "Rename or remove all but one of them.",
            )
        if names:
            chosen[split] = names[0]
    others = {name: name for name in sorted(found) if name not in chosen.values()}
    return {split: found[name] for split, name in (chosen | others).items()}


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def _latest(names: Iterable[str]) -> list[str]:
    """The names without those of which another one differs in its number alone, and has a higher one."""
    latest: dict[str, str] = {}
    for name in sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]):
        latest[re.sub(r"\d+", "", name)] = name
    return list(latest.values())
