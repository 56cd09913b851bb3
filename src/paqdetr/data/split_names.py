"""Which split a name means: "Train", "valid", "my_val", "instances_test2017"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from paqdetr.errors import DataError

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
