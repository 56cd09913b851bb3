"""What a trained detector does: its errors, its queries and patterns, its inside, and the report that shows them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paqdetr.analysis.analyze import Report, analyze

__all__ = ["Report", "analyze"]


def __getattr__(name: str) -> Any:
    # The page needs jinja2 and matplotlib; the study, which draws with `plots` alone, need not wait for the rest.
    if name not in __all__:
        raise AttributeError(f"module 'paqdetr.analysis' has no attribute {name!r}")
    return getattr(import_module("paqdetr.analysis.analyze"), name)
