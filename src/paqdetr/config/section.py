"""What every group of settings has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator


def lists_are_tuples(value: Any) -> Any:
    """Sequences of settings are tuples; YAML and json know lists alone."""
    return tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    """Settings that refuse unknown keys, changes, and values of another type: `true` is no number and "3" is none.

    Attributes:
        retired: settings that older versions had -> the value at which they did nothing. Old files may still carry them so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)
    retired: ClassVar[Mapping[str, Any]] = {}

    _lists = field_validator("*", mode="before")(lists_are_tuples)

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        for key in cls.retired.keys() & values.keys():
            if values[key] != cls.retired[key]:
                raise ValueError(
                    f"{key}={values[key]!r} was removed; the last commit that has it is 170e1a7 "
                    "(docs/decisions/0016-remedies-as-settings.md)"
                )
        return {key: value for key, value in values.items() if key not in cls.retired}
