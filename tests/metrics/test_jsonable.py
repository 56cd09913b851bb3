from __future__ import annotations

import json
import math

import numpy as np
import pytest

from paqdetr.metrics.jsonable import json_number, json_safe, rounded


def test_what_nothing_defines_is_null() -> None:
    numbers = [None, math.nan, np.float64("nan"), math.inf, -math.inf, 0.1234567, np.float32(0.5), 3]
    found = [json_number(value) for value in numbers]
    assert json.dumps(found, allow_nan=False) == "[null, null, null, null, null, 0.1234567, 0.5, 3.0]"
    assert json_number(0.1234567, 6) == 0.123457 and json_number(math.nan, 6) is None


def test_records_of_any_depth() -> None:
    found = json_safe(
        {"a": math.inf, "b": [math.nan, 1, (np.float64("-inf"), "x")], "c": {"d": True, "e": 0.5}}
    )
    assert found == {"a": None, "b": [None, 1, [None, "x"]], "c": {"d": True, "e": 0.5}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[1, 2], [3, 4]]), "[[1, 2], [3, 4]]"),
        (np.array([[0.1234567, np.nan], [-np.inf, 1]], np.float32), "[[0.123457, null], [null, 1.0]]"),
    ],
)
def test_arrays(values: np.ndarray, expected: str) -> None:
    assert json.dumps(rounded(values), allow_nan=False) == expected
