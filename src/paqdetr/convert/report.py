"""What became of every tensor in a conversion, and how each setting is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paqdetr.convert.settle import Setting
from paqdetr.serialize import fields_of


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the model comes from.

    Attributes:
        sources: the file's tensors it was made of.
        note: how, where it is more than another name.
    """

    sources: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """Every tensor of the file is in `kept`, `renamed` (among the sources) or `dropped`; every tensor of the model is in `kept`,
    `renamed` or `fresh`.

    Attributes:
        source: the file or folder.
        origin: the program it is of.
        model: the name of the model it became.
        settings: of the model, with their origins.
        kept: tensors that keep their name.
        renamed: our name -> what it was made of.
        dropped: the file's name -> why it is not used.
        fresh: our name -> why it starts anew.
        notes: what else a user should know.
    """

    source: str
    origin: str
    model: str
    settings: Mapping[str, Setting]
    kept: tuple[str, ...] = ()
    renamed: Mapping[str, Origin] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    fresh: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def used(self) -> set[str]:
        """The file's tensors that the model holds."""
        return set(self.kept) | {source for origin in self.renamed.values() for source in origin.sources}

    def counts(self) -> dict[str, int]:
        """How many tensors of each kind."""
        return {
            "kept": len(self.kept),
            "renamed": len(self.renamed),
            "dropped": len(self.dropped),
            "fresh": len(self.fresh),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return fields_of(self)
