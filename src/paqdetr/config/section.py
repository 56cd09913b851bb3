"""What every group of settings has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator


def lists_are_tuples(value: Any) -> Any:
    """Sequences of settings are tuples; YAML and json know lists alone."""
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Needs:
    """At a field: what the setting needs to have an effect.

    Attributes:
        text: the settings that would do, such as "model.queries=patterns".
        holds: whether a `Config` has them.
    """

    text: str
    holds: Callable[[Any], bool]


class Role(Enum):
    """At a field of a model: what another value of the setting means for weights."""

    FREE = "a training may start from weights that were made with another value: a size that is changed on the way, an initial "
    "value that the weights replace, or what acts in training or on detections alone"
    QUERIES = "part of the source of content queries, which a conversion takes from the model it converts to"
    TARGET = "something else that a conversion takes from the model it converts to"
    HOST = "decides which host it is: weights made with another value are another host's"


class Section(BaseModel):
    """Settings that refuse unknown keys, changes, and values of another type: `true` is no number and "3" is none.

    Attributes:
        retired: settings that older versions had -> the value at which they did nothing. Old files may still carry them so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)
    retired: ClassVar[Mapping[str, Any]] = {}

    _lists = field_validator("*", mode="before")(lists_are_tuples)

    @classmethod
    def with_role(cls, *roles: Role) -> tuple[str, ...]:
        """The settings whose fields say one of these."""
        return tuple(key for key, field in cls.model_fields.items() if any(role in field.metadata for role in roles))

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
