"""What is left of a study, and what full scale takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from paqdetr.runs import flat_settings
from paqdetr.study.costs import forecast, gflops
from paqdetr.study.results import RunResult
from paqdetr.study.runs import Places, PlannedRun, RunKey, plan_runs
from paqdetr.study.spec import Study

VALUES = {
    "name": "x",
    "base": "dino_nano",
    "seeds": [0, 1],
    "steps": 100,
    "data": {
        "digits": {"make": {}, "settings": {"image_size": 96}},
        "fish": {"make": {}, "settings": {"image_size": 192}},
    },
    "variants": {"baseline": {}, "new": {"settings": {"loss.class_weight": 0.5}}},
}


@pytest.fixture
def runs(tmp_path: Path) -> list[PlannedRun]:
    study = Study.model_validate(VALUES)
    return plan_runs(study, file=tmp_path / "x.yaml", places=Places(tmp_path), root=tmp_path)


def test_times_come_from_the_nearest_that_was_measured(tmp_path: Path, runs: list[PlannedRun]) -> None:
    places = Places(tmp_path)
    unknown = forecast(runs, places)
    assert [row.seconds for row in unknown] == [None] * 4 and unknown[0].left is None
    first = runs[0]
    cost = {"seconds": 50.0, "step_seconds": 0.5, "gflops": gflops(first.config)}
    result = RunResult(first.key, None, flat_settings(first.config), cost=cost)
    places.result(first.key).parent.mkdir(parents=True)
    places.result(first.key).write_text(result.to_text())
    rows = {(row.data, row.variant): row for row in forecast(runs, places)}
    done = rows["digits", "baseline"]
    assert (done.seconds, done.done, done.left, done.source) == (50, 1, 50, "these runs")
    assert (rows["digits", "new"].left, rows["digits", "new"].source) == (100, "this data")
    places.result(runs[1].key).parent.mkdir(parents=True)
    places.result(runs[1].key).write_text(RunResult(runs[1].key, "training: error", {}).to_text())
    other = {(row.data, row.variant): row for row in forecast(runs, places)}[runs[1].key.data, runs[1].key.variant]
    assert (other.done, other.failed, other.left) == (0, 1, 100)
    places.result(runs[1].key).unlink()
    # Four times the pixels: more arithmetic, if less than four times, since the decoder's is the same.
    further = rows["fish", "new"]
    assert further.source == "FLOPs" and further.seconds is not None
    fish = next(run for run in runs if (run.key.data, run.key.variant) == ("fish", "new"))
    assert further.seconds == pytest.approx(50 * gflops(fish.config) / gflops(first.config))
    assert 75 < further.seconds < 200
    # A data set of the same name with other images is none of that.
    other = replace(result, key=RunKey("digits", "new", 0), settings=result.settings | {"image_size": 64})
    again = {(row.data, row.variant): row for row in forecast(runs, places, [other])}
    assert again["digits", "new"].source == "this data"


@pytest.mark.parametrize(
    ("ran", "seconds"),
    [
        ({"device": "cpu", "threads": 1, "processes": 1, "cpu_seconds": 20.0}, 20.0),
        ({"device": "cpu", "threads": 1, "processes": 1, "cpu_seconds": 60.0}, 50.0),  # evaluations are in it
        ({"device": "cpu", "threads": 1, "processes": 1, "cpu_seconds": None}, 50.0),
        ({"device": "cpu", "threads": 2, "processes": 1, "cpu_seconds": 20.0}, 50.0),
        ({"device": "cuda", "threads": 1, "processes": 1, "cpu_seconds": 20.0}, 50.0),
    ],
)
def test_other_work_on_the_machine_does_not_count_in_a_run_of_one_thread(
    tmp_path: Path, runs: list[PlannedRun], ran: dict[str, object], seconds: float
) -> None:
    first = runs[0]
    cost = {"seconds": 50.0, "step_seconds": 0.5, "steps": 100, "gflops": gflops(first.config), **ran}
    result = RunResult(first.key, None, flat_settings(first.config), cost=cost)
    row = next(row for row in forecast(runs, Places(tmp_path), [result]) if row.variant == "baseline")
    assert row.seconds == pytest.approx(seconds)


def test_a_row_of_the_same_name_may_be_another_model(tmp_path: Path, runs: list[PlannedRun]) -> None:
    """Half the FLOPs on images of two thirds the height, which are those of the data: twice the time is to be expected."""
    first = runs[0]
    cost = {"step_seconds": 0.5, "gflops": gflops(first.config, (64, 96)) / 2, "image": [64, 96]}
    other = RunResult(first.key, None, flat_settings(first.config), cost=cost)
    found = forecast(runs, Places(tmp_path), [other])[0]
    assert found.source == "these runs" and found.seconds == pytest.approx(100)
    assert gflops(first.config, (64, 96)) < gflops(first.config)
