"""Lists of texts and ids in flat arrays.

A forked worker that reads a Python object writes to it (its reference count), and the page it lies on is copied: a list of
a million names slowly becomes a list of a million names in every worker. Arrays have one reference count each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class Texts(Sequence[str]):
    """A read-only list of texts: their UTF-8 bytes in one array, and where each begins."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=self._starts[1:])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start, end = self._starts[place], self._starts[place + 1]
        return self._bytes[start:end].tobytes().decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})" if len(self) < 9 else f"<{len(self)} texts>"


class Ids(Sequence[int | str]):
    """A read-only list of ids, integers or texts, each of which comes out as what it was."""

    def __init__(self, ids: Sequence[int | str]) -> None:
        self._numbers: np.ndarray | None = None
        self._texts: Texts | None = None
        if all(isinstance(own, int) and -(2**63) <= own < 2**63 for own in ids):
            self._numbers = np.array(ids, dtype=np.int64)
        else:
            self._texts = Texts(json.dumps(own) for own in ids)

    def __len__(self) -> int:
        return len(self._numbers if self._numbers is not None else self._texts or ())

    @overload
    def __getitem__(self, index: int) -> int | str: ...
    @overload
    def __getitem__(self, index: slice) -> list[int | str]: ...
    def __getitem__(self, index: int | slice) -> int | str | list[int | str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._numbers is not None:
            return int(self._numbers[index])
        assert self._texts is not None
        return json.loads(self._texts[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})" if len(self) < 9 else f"<{len(self)} ids>"
