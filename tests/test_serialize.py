from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from paqdetr.serialize import fields_of, json_number, plain


def test_what_nothing_defines_is_null() -> None:
    numbers = [None, math.nan, np.float64("nan"), math.inf, -math.inf, 0.1234567, np.float32(0.5), 3]
    found = [json_number(value) for value in numbers]
    assert json.dumps(found, allow_nan=False) == "[null, null, null, null, null, 0.1234567, 0.5, 3.0]"
    assert json_number(0.1234567, 6) == 0.123457 and json_number(math.nan, 6) is None


def test_records_of_any_depth() -> None:
    found = plain({"a": math.inf, "b": [math.nan, 1, (np.float64("-inf"), "x")], "c": {"d": True, "e": 0.5}})
    assert found == {"a": None, "b": [None, 1, [None, "x"]], "c": {"d": True, "e": 0.5}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[1, 2], [3, 4]]), "[[1, 2], [3, 4]]"),
        (np.array([[0.1234567, np.nan], [-np.inf, 1]], np.float32), "[[0.123457, null], [null, 1.0]]"),
    ],
)
def test_arrays(values: np.ndarray, expected: str) -> None:
    assert json.dumps(plain(values, 6), allow_nan=False) == expected


@dataclass
class Part:
    share: float

    def to_json(self) -> dict[str, Any]:
        return {"percent": 100 * self.share}


@dataclass
class Whole:
    name: str
    value: float
    parts: dict[int, Part]
    pairs: tuple[tuple[int, np.float32], ...]


def test_dataclasses_are_their_fields_and_parts_write_themselves() -> None:
    whole = Whole("a", 1 / 3, {1: Part(0.25)}, ((1, np.float32(math.nan)),))
    expected = {"name": "a", "value": 0.333, "parts": {"1": {"percent": 25.0}}, "pairs": [[1, None]]}
    assert plain(whole, 3) == fields_of(whole, 3) == expected
    assert plain([whole])[0]["value"] == 1 / 3
