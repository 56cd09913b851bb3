"""What every group of settings has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Settings that refuse unknown keys and changes.

    Attributes:
        retired: settings that older versions had -> the value at which they did nothing. Old files may still carry them so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    retired: ClassVar[Mapping[str, Any]] = {}

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
