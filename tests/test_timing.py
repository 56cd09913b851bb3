from __future__ import annotations

from paqdetr.timing import compare, interleave


def test_interleaved_timing_counts_every_case_in_turn() -> None:
    calls: list[str] = []
    told: list[tuple[int, int]] = []
    ticks = iter([0, 1, 10, 12, 20, 21, 30, 34])
    seconds = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=2,
        warmup=1,
        clock=lambda: next(ticks),
        progress=lambda done, total: told.append((done, total)),
    )
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert told == [(1, 2), (2, 2)]
    assert seconds == {"a": [1, 1], "b": [2, 4]}
    compared = compare(seconds, against="b")
    assert compared["a"] == {"median_ms": 1e3, "min_ms": 1e3, "max_ms": 1e3, "ratio": 3, "ratio_of_fastest": 2}
