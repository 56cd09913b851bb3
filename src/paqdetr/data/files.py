"""Reads annotation files that may come from anywhere.

They are limited in size and depth, and none of them names a file outside its folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from paqdetr.errors import DataError

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


def load_yaml(path: Path) -> dict[str, Any]:
    """The file's content, a mapping.

    Raises:
        DataError: as `read_text`, or it is no YAML or no mapping.
    """
    text = read_text(path, limit=2**20)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # the latter: odd dates and keys
        raise DataError(
            f"{path}: no valid YAML: {' '.join(str(error).split())}", "Correct the file."
        ) from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: holds a {type(content).__name__}, expected keys and values", "Correct the file."
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


def missing_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Those files that `folder` does not have; lists every folder once instead of asking for each file."""
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, base = os.path.split(name)
        if parent not in listed:
            try:
                with os.scandir(folder / parent) as entries:
                    listed[parent] = {entry.name for entry in entries}
            except OSError:
                listed[parent] = set()
        if base not in listed[parent]:
            missing.append(name)
    return missing
