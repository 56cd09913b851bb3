"""Names of files that annotations may hold: none leads outside its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath


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
