"""What every group of settings has in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


def lists_are_tuples(value: Any) -> Any:
    """Sequences of settings are tuples; YAML and json know lists alone."""
    return tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    """Settings that refuse unknown keys, changes, and values of another type: `true` is no number and "3" is none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    _lists = field_validator("*", mode="before")(lists_are_tuples)
