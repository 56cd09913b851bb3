"""YAML as text, numbers, booleans, null, lists and mappings alone: no tags, no dates, nothing that constructs an object.

A plain scalar means what the core schema of YAML 1.2 says, not what YAML 1.1 does: `no`, `12:30` and `1_000` are text, `1e-4`
is a number. Keys are text as written. https://yaml.org/spec/1.2.2/#103-core-schema
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from paqdetr.errors import ConfigError, DataError, UserError
from paqdetr.files import read_text

MAX_BYTES = 2**20
"""The largest YAML file that is read."""

_MAX_DEPTH = 32
_MAX_DIGITS = 100
# Characters and values, those that aliases stand for included: what a file of MAX_BYTES holds without aliases is less.
_MAX_WEIGHT = 2 * MAX_BYTES

_WORDS = {"": None, "~": None} | {
    spelling: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelling in (word, word.capitalize(), word.upper())
}
# A leading zero makes text: 010 is 8 in YAML 1.1 and 10 in YAML 1.2.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def load_yaml(path: Path, *, text_only: bool = False, error: type[UserError] = DataError) -> dict[str, Any]:
    """The file's content, a mapping; an empty file is an empty one.

    Args:
        path: of the file, which is UTF-8, with or without a byte order mark.
        text_only: see `parse_yaml`.
        error: the class of what is raised.

    Raises:
        error: naming the file, and line and column where there are any: it cannot be read, is too large, is not UTF-8, no
            mapping, or as `parse_yaml`.
    """
    text = read_text(path, limit=MAX_BYTES, error=error)
    return as_mapping(parse_yaml(text, str(path), text_only=text_only, error=error), str(path), error=error)


def as_mapping(content: Any, where: str, *, error: type[UserError] = ConfigError) -> dict[str, Any]:
    """What `parse_yaml` gave, which has to be a mapping or nothing."""
    if content is not None and not isinstance(content, dict):
        raise error(f"{where}: holds a {type(content).__name__}, expected keys and values", "Correct the file.")
    return content or {}


def parse_yaml(text: str, where: str, *, text_only: bool = False, error: type[UserError] = ConfigError) -> Any:
    """The one document of `text`: None if it is empty.

    Args:
        text: YAML.
        where: what to call it in errors.
        text_only: every scalar is text as it stands in the file.
        error: the class of what is raised.

    Raises:
        error: naming line and column: no YAML, several documents, a tag (`!!int`), a merge key (`<<`), a key that is no text or
            stands there twice, an alias without its anchor, a control character, more than 32 levels, a number of more than
            100 digits or beyond a double, or aliases that stand for more than 2 MiB.
    """
    return _Reader(text, where, text_only, error).read()


def parse_value(text: str, where: str) -> Any:
    """One value of a command line: text as typed, unless it reads as a number, a boolean, null, or as a whole is quoted text, a
    list or a mapping.

    Raises:
        ConfigError: as `parse_yaml`, but for what is no YAML at all, which is text.
    """
    kind, end = {"[": (list, "]"), "{": (dict, "}"), '"': (str, '"'), "'": (str, "'")}.get(text[:1], (None, ""))
    if kind is None:
        return _scalar(text, where, ConfigError)
    if not text.endswith(end):
        return text
    try:
        value = _Reader(text, where, False, ConfigError).read(syntax_as=_NoYamlError)
    except _NoYamlError:
        return text
    return value if isinstance(value, kind) else text


def dump_yaml(content: Any) -> str:
    """YAML that `parse_yaml` and readers of YAML 1.1 read as `content`: what either would not take for text is quoted."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_value(value: Any) -> str:
    """One line that `parse_value` reads as `value`."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=2**30)
    return text.removesuffix("\n").removesuffix("\n...")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# After those of YAML 1.1, which want a dot and a sign in the exponent: 1e4 is text there.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), None)


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text with a line break of Unicode only as an escape: written as it is, it would be read as a space."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


class _NoYamlError(Exception):
    pass


def _scalar(text: str, where: str, error: type[UserError]) -> Any:
    """What a plain scalar means."""
    if text in _WORDS:
        return _WORDS[text]
    if not _FLOAT.fullmatch(text):  # every integer is a float too
        return text
    if sum(map(str.isdigit, text)) > _MAX_DIGITS:
        raise error(f"{where}: a number of more than {_MAX_DIGITS} digits", "Write it shorter, or in quotes.")
    if _INTEGER.fullmatch(text):
        return int(text)
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(value) and ".inf" not in text.lower():
        raise error(f"{where}: {text} is beyond the largest number, 1.8e308", "Write a smaller number.")
    return value


class _Reader:
    """Builds the values of one document from the parser's events."""

    def __init__(self, text: str, where: str, text_only: bool, error: type[UserError]) -> None:
        self._text, self._where, self._text_only, self._error = text, where, text_only, error
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._weight = 0

    def read(self, syntax_as: type[Exception] | None = None) -> Any:
        bad = _UNPRINTABLE.search(self._text)
        if bad:
            before = self._text[: bad.start()]
            place = f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"
            raise self._error(f"{self._where}: {place}: the character {bad[0]!r} is no text", "Remove it.")
        events = yaml.parse(self._text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        try:
            return self._document(events)
        except yaml.MarkedYAMLError as problem:
            if syntax_as:
                raise syntax_as from None
            mark = problem.problem_mark or problem.context_mark
            what = " ".join(filter(None, (problem.context, problem.problem)))
            self._fail(f"not valid YAML: {what}", mark, "Correct the file.")
        except (yaml.YAMLError, ValueError, OverflowError) as problem:  # \UFFFFFFFF
            if syntax_as:
                raise syntax_as from None
            self._fail(f"not valid YAML: {' '.join(str(problem).split())}", None, "Correct the file.")

    def _fail(self, what: str, mark: Any, remedy: str) -> NoReturn:
        raise self._error(f"{self._at(mark)}: {what}", remedy) from None

    def _at(self, mark: Any) -> str:
        return f"{self._where}: line {mark.line + 1}, column {mark.column + 1}" if mark else self._where

    def _document(self, events: Iterator[Any]) -> Any:
        content = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._fail("a second document begins", event.start_mark, "Make it a file of its own.")
                content = self._value(next(events), events, 0)
        return content

    def _value(self, event: Any, events: Iterator[Any], depth: int) -> Any:
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                self._fail(f"the alias *{event.anchor} has no anchor before it", mark, "Write out the value.")
            value, weight = self._anchors[event.anchor]
            self._add(weight, mark)
            return value
        if event.tag is not None:
            self._fail(f"the tag {event.tag} is not read", mark, "Leave it out; text is written in quotes.")
        if depth > _MAX_DEPTH:
            self._fail(f"nested more than {_MAX_DEPTH} levels deep", mark, "Write less deeply nested values.")
        before = self._weight
        if isinstance(event, yaml.ScalarEvent):
            self._add(1 + len(event.value), mark)
            plain = event.implicit[0]
            if not plain or self._text_only:
                value = event.value
            else:
                value = _scalar(event.value, self._at(mark), self._error)
        else:
            self._add(1, mark)
            collect = self._list if isinstance(event, yaml.SequenceStartEvent) else self._mapping
            value = collect(events, depth + 1)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._weight - before)
        return value

    def _list(self, events: Iterator[Any], depth: int) -> list[Any]:
        found = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            found.append(self._value(event, events, depth))
        return found

    def _mapping(self, events: Iterator[Any], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            mark = event.start_mark
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                self._fail("a key that is no text", mark, "Write the key as text.")
            key = event.value
            if key == "<<" and event.implicit[0]:
                self._fail("the merge key << is not read", mark, "Write out the keys.")
            if key in found:
                self._fail(f"the key {key!r} stands there twice", mark, "Keep one of the two.")
            self._add(1 + len(key), mark)
            if event.anchor is not None:
                self._anchors[event.anchor] = (key, 1 + len(key))
            found[key] = self._value(next(events), events, depth)
        return found

    def _add(self, weight: int, mark: Any) -> None:
        self._weight += weight
        if self._weight > _MAX_WEIGHT:
            self._fail("aliases stand for more values than are read", mark, "Write out fewer values.")
