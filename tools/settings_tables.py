"""The tables of docs/settings.md, from the settings themselves.

Types, ranges, defaults and meanings are those of `paqdetr.config`: a setting without a description is an error. The section of
top-level keys is called `training`.
"""

from __future__ import annotations

import json
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from paqdetr.config import Config, load_config
from paqdetr.config.model import Section

# The model whose differences from the defaults the page shows beside them.
EXAMPLE = "paq_dino_nano"
TOP = "training"

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WORDS = {int: "int", float: "float", str: "text", bool: "bool", type(None): "null"}


def sections() -> dict[str, type[Section]]:
    """Name of a table -> the settings in it, in the order of `paqdetr config show`; top-level keys come first."""
    inner = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    return {TOP: Config, **inner}


def table(name: str) -> str:
    """The rows of one section as Markdown.

    Raises:
        SystemExit: there is no such section, or a setting of it has no description.
    """
    known = sections()
    if name not in known:
        raise SystemExit(f"no section {name!r}: {', '.join(known)}")
    example = load_config(EXAMPLE)
    values = example if name == TOP else getattr(example, name)
    lines = [f"| setting | meaning | takes | default | `{EXAMPLE}` |", "|---|---|---|---|---|"]
    for key, field in known[name].model_fields.items():
        if key in known:
            continue
        if not field.description:
            raise SystemExit(f"{name}.{key}: give its Field a description")
        default = "" if field.is_required() else f"`{_yaml(field.default)}`"
        differs = not field.is_required() and getattr(values, key) != field.default
        here = f"`{_yaml(getattr(values, key))}`" if differs else ""
        dotted = key if name == TOP else f"{name}.{key}"
        lines.append(f"| `{dotted}` | {field.description} | {_takes(field)} | {default} | {here} |")
    return "\n".join(lines)


def _takes(field: FieldInfo) -> str:
    """Type and range in words: `int, >= 1`, or the words that may stand there."""
    bounds = [
        f"{sign} {_yaml(getattr(rule, bound))}"
        for rule in field.metadata
        for bound, sign in _SIGNS.items()
        if hasattr(rule, bound)
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(kind: Any) -> str:
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{word}`" for word in arguments)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_type(inner) for inner in arguments)
    if get_origin(kind) is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type(arguments[0])}"
        return f"[{', '.join(_type(inner) for inner in arguments)}]"
    return _WORDS[kind]


def _yaml(value: Any) -> str:
    """A value as it is written after `key=`."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
