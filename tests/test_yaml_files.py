"""The one reader of YAML: what it builds, what it refuses, and how quickly."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from paqdetr.errors import ConfigError, DataError, UserError
from paqdetr.yaml_files import dump_value, dump_yaml, load_yaml, parse_value, parse_yaml

# As written -> what it is as a setting. YAML 1.1 reads each of them as something else than text, or in another way.
SURPRISES: dict[str, Any] = {
    **{word: word for word in "no No NO yes Yes on On off OFF y n Y N".split()},
    **dict.fromkeys("true True TRUE".split(), True),
    **dict.fromkeys("false False FALSE".split(), False),
    **dict.fromkeys("null Null NULL ~".split()),
    **{word: word for word in "01 010 -07 0o17 0x1F 0b11 1_000 1__0 1_0.5 0_1 00".split()},
    **{word: word for word in "12:30 1:30:00 190:20:30.15 2024-99-99 2024-01-02 2024-01-02T03:04:05Z".split()},
    **{word: word for word in "= 1e 1.e+ .e5 . - +  -- .-1 1.2.3 0.1.0 v1.10 1e5x inf nan Infinity".split()},
    "1.10": 1.1,
    "1e3": 1000.0,
    "1e-4": 1e-4,
    "-1E+2": -100.0,
    "3": 3,
    "+3": 3,
    "-0": 0,
    "0": 0,
    "1.": 1.0,
    ".5": 0.5,
    "0.0": 0.0,
    ".inf": math.inf,
    "-.INF": -math.inf,
    "1" * 100: int("1" * 100),
}


@pytest.mark.parametrize(("written", "meant"), SURPRISES.items())
def test_plain_scalars(written: str, meant: Any) -> None:
    if written not in ("-",):  # begins a list in a file
        found = parse_yaml(f"key: {written}", "x")["key"]
        assert found == meant and type(found) is type(meant)
        assert parse_yaml(f"[{written}]", "x", text_only=True) == [written]
    for quoted in (f"'{written}'", f'"{written}"'):
        assert parse_yaml(quoted, "x") == parse_value(quoted, "x") == written
    assert parse_value(written, "x") == meant
    assert parse_yaml(f"{{'{written}': 1}}", "x") == {written: 1}


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(parse_yaml(".nan", "x")) and math.isnan(parse_value(".NaN", "x"))


@pytest.mark.parametrize(
    "typed",
    [
        *("12:30", "x #1", "a: b", "# x", "!!int abc", "!x", "&a", "*a", "- a", "a\nb", " a ", "%TAG", "@x", "`x`"),
        *("[1", "{a", '"a', "'a'b", "[old]/best.safetensors", "[a]: b", "'a': 'b'", "2024-99-99", "1_000", "|", ">"),
        *("a,b", "?", "\x1b[1m"),
    ],
)
def test_on_a_command_line_text_stays_as_typed(typed: str) -> None:
    assert parse_value(typed, "x") == typed


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[480, 800]", [480, 800]),
        ("[0.5,1]", [0.5, 1]),
        ("{a: [no, 1e3], 01: ~}", {"a": ["no", 1000.0], "01": None}),
        ("[tensorboard]", ["tensorboard"]),
        ("", None),
    ],
)
def test_lists_and_mappings_on_a_command_line(typed: str, meant: Any) -> None:
    assert parse_value(typed, "x") == meant


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{below}'] * 10)}]\n" for below, name in zip("abcdefghi", "bcdefghij", strict=True)
)
REFUSED = {
    "tag of a type": ("a: 1\nb: !!int abc", "line 2, column 4: the tag tag:yaml.org,2002:int is not read"),
    "tag that constructs": ("!!python/object/apply:os.system [ls]", "column 1: the tag tag:yaml.org,2002:python"),
    "tag of a date": ("a: !!timestamp x", "line 1, column 4: the tag"),
    "tag of its own": ("[!x a]", "line 1, column 2: the tag !x is not read"),
    "tagged key": ("!!bool x: 1", "line 1, column 1: a key that is no text"),
    "key that is a list": ("a: 1\n[1]: 2", "line 2, column 1: a key that is no text"),
    "key that is a mapping": ("? {a: 1}\n: 2", "line 1, column 3: a key that is no text"),
    "key twice": ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands there twice"),
    "inner key twice": ("a: {b: 1, 'b': 2}", "line 1, column 11: the key 'b' stands there twice"),
    "key twice in an aliased mapping": ("- &x {c: 1}\n- {c: 1, c: *x}", "line 2, column 10: the key 'c'"),
    "merge key": ("a: &a {b: 1}\nc:\n  <<: *a", "line 3, column 3: the merge key << is not read"),
    "alias bomb": (BOMB, "line 6, column 32: aliases stand for more values"),
    "alias of itself": ("a: &a [*a]", "line 1, column 8: the alias *a has no anchor before it"),
    "unknown alias": ("a: *b", "line 1, column 4: the alias *b has no anchor"),
    "deep lists": ("a: " + "[" * 50 + "]" * 50, "line 1, column 36: nested more than 32 levels"),
    "deep mappings": ("{a: " * 5000 + "}" * 5000, "nested more than 32 levels"),
    "lists beyond what the parser takes": ("[" * 5000, "line 1, column"),
    "deep blocks": ("\n".join(" " * n + "a:" for n in range(100)), "line 34, column"),
    "many digits": ("a: " + "1" * 5000, "line 1, column 4: a number of more than 100 digits"),
    "many decimals": ("a: 0." + "1" * 101, "line 1, column 4: a number of more than 100 digits"),
    "past a double": ("a: [1, -1e400]", "line 1, column 8: -1e400 is beyond"),
    "two documents": ("a: 1\n---\nb: 2", "line 2, column 1: a second document"),
    "list that is not closed": ("a: [1\n", "not valid YAML"),
    "tab as indentation": ("a:\n\tb: 1", "line 2, column"),
    "unknown escape": ('a: "\\q"', "line 1, column"),
    "escape past unicode": ('a: "\\UFFFFFFFF"', "not valid YAML"),
    "escaped lone surrogate": ('a: "\\ud800"', "not valid YAML"),
    "NUL": ("a: 1\nb: x\0", r"line 2, column 5: the character '\x00' is no text"),
    "terminal escape": ("\x1b[2J: 1", r"line 1, column 1: the character '\x1b' is no text"),
    "lone surrogate": ("a: \udc80", r"line 1, column 4: the character '\udc80' is no text"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_named_by_file_line_and_column(text: str, message: str) -> None:
    start = time.monotonic()
    for text_only in (False, True):
        if text_only and ("digits" in message or "beyond" in message):
            continue  # text may have any number of digits
        with pytest.raises(DataError) as caught:
            parse_yaml(text, "some.yaml", text_only=text_only, error=DataError)
        assert caught.value.message.startswith("some.yaml: ") and message in caught.value.message
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("text", ["[*a]", "[!!int x]", "{a: 1, a: 2}", "[1e999]", "[" * 99 + "]" * 99], ids=len)
def test_lists_on_a_command_line_are_refused_for_the_same(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^model: line 1, column \d+: "):
        parse_value(text, "model")


def test_aliases_are_read() -> None:
    assert parse_yaml("a: &x [1, {b: 2}]\nc: *x\n&k d: *k", "x") == {"a": [1, {"b": 2}], "c": [1, {"b": 2}], "d": "d"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [é]".encode("latin-1"), "no UTF-8 text at byte 8 (line 1)"),
        ("a: 1\nb: é".encode("latin-1"), "no UTF-8 text at byte 8 (line 2)"),
        ("a: 1".encode("utf-16"), "no UTF-8 text at byte 0"),
        ("a: 1".encode("utf-16-le"), r"line 1, column 2: the character '\x00'"),
        (b"a: 1\n" * 2**18, "has 1 MiB, more than the 1 that are read"),
        (b"- a", "holds a list, expected keys and values"),
        (b"7", "holds a int, expected keys and values"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path, error=ConfigError)
    assert str(path) in caught.value.message and message in caught.value.message


def test_a_byte_order_mark_and_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("names: [é, 010]\nnc:", encoding="utf-8-sig")
    assert load_yaml(path, text_only=True) == {"names": ["é", "010"], "nc": ""}
    path.write_text("# later")
    assert load_yaml(path) == {}


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.sampled_from([*SURPRISES, None, True, False])
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_is_read_by_this_and_by_readers_of_yaml_1_1(value: Any) -> None:
    text = dump_yaml(value)
    assert parse_yaml(text, "x") == value
    assert yaml.safe_load(text) == value
    assert parse_value(dump_value(value), "x") == value
    assert "\n" not in dump_value(value)


@given(st.text(max_size=60) | st.text("[]{}:,-?&*!|>'\"%#@ \n\tab01.e<=~", max_size=60), st.booleans())
def test_any_text_gives_plain_values_or_our_error(text: str, text_only: bool) -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(type(key) is str and plain(inner) for key, inner in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in ((str,) if text_only else (str, int, float, bool, type(None)))

    try:
        content = parse_yaml(text, "x", text_only=text_only)
        assert content is None or plain(content)
    except UserError as error:
        assert error.message.startswith("x: ")


@given(st.text(max_size=60) | st.text("[]{}:,'\"a1 ", max_size=30))
def test_any_typed_text_is_a_value(text: str) -> None:
    try:
        value = parse_value(text, "x")
    except ConfigError:
        assert text[0] in "[{'\""
    else:
        assert not isinstance(value, str) or value == text or text[0] in "'\""
