"""Which data a training was started with, small enough to be kept in its state: a resumption on other data is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paqdetr.data.dataset import DetectionDataset
from paqdetr.structures import ClassTable

_NAME, _BYTES, _BOXES = range(3)


@dataclass(frozen=True, slots=True)
class SplitDigest:
    """What a split consists of.

    Attributes:
        classes: category ids and names.
        images: (N, 3) int64 in the order of the data set: hash of the file name; bytes of the file, -1 if it is missing; hash of
            its stated size, boxes, labels and crowds.
        file_names: (N,); None in a digest that comes from a state.
    """

    classes: ClassTable
    images: Tensor
    file_names: list[str] | None = None

    @classmethod
    def of(cls, split: DetectionDataset) -> SplitDigest:
        """The digest of a split. No image is opened: 100,000 take about a second."""
        a = split.annotations
        columns = [a.boxes, a.labels, a.crowd]
        rows = np.empty((len(a), 3), dtype=np.int64)
        for index, name in enumerate(a.file_names):
            own = slice(int(a.starts[index]), int(a.starts[index + 1]))
            rows[index] = (
                _hash(name.encode(errors="surrogatepass")),
                _size(split, index),
                _hash(*(part.tobytes() for part in (a.sizes[index], *(column[own] for column in columns)))),
            )
        return cls(a.classes, torch.from_numpy(rows), list(a.file_names))

    def changes_from(self, before: SplitDigest) -> Iterator[str]:
        """What is different from an earlier digest, in words; nothing if it is the same data."""
        if self.classes != before.classes:
            yield _class_change(before.classes, self.classes)
        mine, its = self.images.numpy(), before.images.numpy()
        added = ~np.isin(mine[:, _NAME], its[:, _NAME])
        if added.any():
            yield f"{_count(added)} added ({self._first(added)})"
        removed = ~np.isin(its[:, _NAME], mine[:, _NAME])
        if removed.any():
            yield f"{_count(removed)} removed"
        # Images of both, in one order: the rest is compared image by image.
        places = np.flatnonzero(~added)[np.argsort(mine[~added, _NAME], kind="stable")]
        old = its[~removed][np.argsort(its[~removed, _NAME], kind="stable")]
        if len(places) != len(old):
            yield "images are listed more or less often than before"
            return
        for column, what in ((_BYTES, "of another size in bytes"), (_BOXES, "with other boxes")):
            changed = np.zeros(len(mine), dtype=bool)
            changed[places] = mine[places, column] != old[:, column]
            if changed.any():
                yield f"{_count(changed)} {what} ({self._first(changed)})"
        if not np.array_equal(mine[~added, _NAME], its[~removed, _NAME]):
            yield "images in another order"

    def _first(self, which: np.ndarray) -> str:
        assert self.file_names is not None
        return self.file_names[int(np.flatnonzero(which)[0])]


DataDigest = Mapping[str, SplitDigest]


def data_changes(before: DataDigest, now: DataDigest) -> str:
    """What is different between the data of a state and those of now, by split; empty if nothing is."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        if name not in now or name not in before:
            found.append(f"{name}: the split is {'gone' if name in before else 'new'}")
        elif changes := list(now[name].changes_from(before[name])):
            found.append(f"{name}: {', '.join(changes)}")
    return "; ".join(found)


def digest_to_state(digest: DataDigest) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and an entry of the header."""
    header = {name: [split.classes.ids, split.classes.names] for name, split in digest.items()}
    return {name: split.images for name, split in digest.items()}, header


def digest_from_state(tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None) -> DataDigest | None:
    """The digest of a saved state; None of one that was saved before there were digests.

    Raises:
        KeyError, TypeError: the state is malformed.
    """
    if header is None:
        return None
    return {
        name: SplitDigest(ClassTable(tuple(ids), tuple(names)), tensors[name]) for name, (ids, names) in header.items()
    }


def _hash(*parts: bytes) -> int:
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(part)
    return int.from_bytes(total.digest(), "little", signed=True)


def _size(split: DetectionDataset, index: int) -> int:
    try:
        return split.path(index).stat().st_size
    except OSError:
        return -1  # reading it raises the error


def _count(which: np.ndarray) -> str:
    number = int(which.sum())
    return f"{number} image{'s' if number > 1 else ''}"


def _class_change(before: ClassTable, now: ClassTable) -> str:
    old, new = before.id_to_name, now.id_to_name
    for category in dict.fromkeys([*old, *new]):
        if old.get(category) != new.get(category):
            was, name = (repr(table[category]) if category in table else "none" for table in (old, new))
            return f"class {category} is {name}, was {was}"
    return "classes in another order"
