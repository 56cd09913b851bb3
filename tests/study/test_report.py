"""What a study's report says, from simulated runs: the same numbers in json, Markdown and the page."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paqdetr.errors import DataError
from paqdetr.report.page import to_table
from paqdetr.report.section import Column, make_table
from paqdetr.study.report import StudyReport, _facts, _mean_curve, write_report
from paqdetr.study.results import RunResult, read_result, read_results
from paqdetr.study.runs import RunKey
from paqdetr.study.spec import Study
from paqdetr.study.tables import cost_table, figure_table, layer_table, mistake_table, planning, query_table
from paqdetr.study.verdicts import Runs

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "studies"
IMAGES = 60
WEIGHTS = np.random.default_rng(0).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=400).T / IMAGES
EFFECTS = {"baseline": 0.0, "patterns": 0.0, "both": 0.06}


def study() -> Study:
    return Study.model_validate(
        {
            "name": "simulated",
            "base": "dino_nano",
            "epochs": 1,
            "seeds": [0, 1, 2, 3],
            "data": {"digits": {"make": {}}, "fish-2": {"folder": "fish"}},
            "variants": {name: {} for name in EFFECTS},
            "claims": {
                "patterns": {"text": "Patterns raise AP.", "variant": "patterns", "data": ["digits"]},
                "both": {
                    "text": "PaQ | raises AP.",
                    "variant": "both",
                    "published": {"effect": 0.016, "where": "COCO"},
                },
            },
        }
    )


def result(key: RunKey, images: np.ndarray) -> RunResult:
    ap = float(images.mean())
    figures = {
        "AP": ap,
        "AP50": ap + 0.2,
        "AP_nms": ap + 0.04,
        "predictions_per_image": 9.5,
        "boxes_per_image": 7.25,
        "queries": {"n": 60, "gini_over_30": 0.7, "gini_positives": 0.4 + key.seed / 100},
    }
    if key.seed:  # seed 0 was measured before there were such figures
        figures["layers"] = [
            {"stage": "proposals", "best_iou": key.seed / 10, "AP": None, "AP_nms": None, "duplicates": None},
            {"stage": "layer 1", "best_iou": 0.5, "AP": ap, "AP_nms": ap + 0.04, "duplicates": 0.04},
        ]
        figures["mistakes"] = {"duplicate": 0.01 * key.seed, "missed": 0.2}
    curve = [{"step": 50 * n, "AP": ap * n / 4, "AP_nms": ap * n / 4 + 0.02, "loss": 20.0 / n} for n in (1, 2, 3, 4)]
    cost = {
        "steps": 200,
        "seconds": 120.0,
        "step_seconds": 0.6,
        "cpu_seconds": 180.0,
        "peak_memory_gib": 1.5,
        "parameters": 5_000_000,
        "trainable": 4_000_000,
        "gflops": 1.25,
    }
    provenance = {
        "git": {"commit": "0123456789abcdef", "changed": False},
        "paqdetr": "0.1",
        "python": "3.11",
        "packages": {"torch": "2.9"},
        "machine": {"processor": "a processor", "cores": 2},
    }
    return RunResult(
        key,
        None,
        {"lr": 0.1},
        measure={"split": "test"},
        images={"count": IMAGES, "hash": key.data},
        figures={"last": figures},
        replicates={"last": {"AP": images @ WEIGHTS, "AP_nms": images @ WEIGHTS + 0.04}},
        curve=curve,
        cost=cost,
        provenance=provenance,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all runs but one, which failed, and one that is missing."""
    output = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(1)
    for data in ("digits", "fish-2"):
        difficulty = rng.normal(0.4, 0.2, IMAGES)
        for variant, effect in EFFECTS.items():
            for seed in range(4):
                key = RunKey(data, variant, seed)
                found = result(key, difficulty + effect + rng.normal(0, 0.008) + rng.normal(0, 0.03, IMAGES))
                if key == RunKey("digits", "patterns", 3):
                    found = RunResult(key, "training: error: loss is not finite", {})
                if key == RunKey("fish-2", "both", 0):
                    continue
                path = output / "results" / f"{key.path}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(found.to_text())
    return output


@pytest.fixture(scope="module")
def report(folder: Path) -> StudyReport:
    started = time.process_time()
    written = write_report(
        study(), read_results(folder / "results"), folder, command="paqdetr study x.yaml --output DIR"
    )
    assert time.process_time() - started < 20, "statistics and report take seconds"
    return written


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = result(RunKey("digits", "both", 1), np.linspace(0, 1, IMAGES))
    file = tmp_path / "seed1.json"
    file.write_text(found.to_text())
    assert file.stat().st_size < 10_000
    again = read_result(file)
    assert again is not None and again.key == found.key and again.figures == found.figures
    assert again.curve == found.curve and again.cost == found.cost and again.failed is None
    np.testing.assert_allclose(again.replicates["last"]["AP"], found.replicates["last"]["AP"], atol=5e-6)
    for name in ("duplicates", "copies"):  # the latter in older study files
        assert again.figure(name, "last") == pytest.approx(0.04)
    assert again.figure("queries.gini_positives", "last") == pytest.approx(0.41)
    assert again.figure("queries.nothing", "last") is None and again.figure("AP", "best") is None
    file.write_text(found.to_text().replace('"duplicates":', '"copies":'))  # as earlier versions wrote it
    earlier = read_result(file)
    assert earlier is not None and earlier.figures == found.figures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid json at line 1, column 1"),
        ("[]", "is of format 'list', this version reads 1"),
        ("{}", "is of format None, this version reads 1"),
        ('{"format": 0}', "is of format 0, this version reads 1"),
        ('{"format": 1}', "is no result of a run: data: Field required"),
        ('{"format": 1, "format": 1}', "has the key 'format' twice"),
    ],
)
def test_a_file_that_is_no_result(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "seed0.json").write_text(text)
    with pytest.raises(DataError, match=r"seed0\.json: ") as caught:
        read_result(tmp_path / "seed0.json")
    assert message in caught.value.message and "`paqdetr study --resume`" in caught.value.remedy
    assert read_result(tmp_path / "seed1.json") is None
    (tmp_path / "seed2.json").mkdir()
    with pytest.raises(DataError, match="is a folder, expected a file"):
        read_result(tmp_path / "seed2.json")


def edited(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = json.loads(result(RunKey("digits", "both", 1), np.linspace(0, 1, IMAGES)).to_text())
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(seed="x"), "seed: Input should be a valid integer"),
        (lambda c: c.update(seed=2**63), "seed: Input should be less than or equal to 4294967295"),
        (lambda c: c.update(variant=None), "variant: Input should be a valid string"),
        (lambda c: c.update(settings=[]), "settings: Input should be a valid dictionary"),
        (lambda c: c.update(failed=3), "failed: Input should be a valid string"),
        (lambda c: c["figures"].update(last=[]), "figures.last: Input should be"),
        (lambda c: c["figures"]["last"].update(AP="0.5"), "figures.last.AP: Input should be a valid number"),
        (lambda c: c["figures"]["last"].update(AP=[1]), "figures.last.AP: Input should be a valid number"),
        (lambda c: c["figures"]["last"].update(AP=math.nan), "figures.last.AP: Input should be"),
        (lambda c: c["figures"]["last"].update(AP=10**400), "figures.last.AP: Input should be"),
        (lambda c: c["figures"]["last"].update(queries=None), "figures.last.queries: Input should be"),
        (lambda c: c["figures"]["last"].update(layers=[1]), "figures.last.layers.0: Input should be"),
        (lambda c: c["figures"]["last"]["layers"][0].pop("stage"), "figures.last.layers.0.stage: Field required"),
        (lambda c: c["figures"]["last"].update(mistakes=[]), "figures.last.mistakes: Input should be"),
        (lambda c: c["replicates"].update(last=None), "replicates.last: Input should be"),
        (lambda c: c["replicates"]["last"].update(AP="x"), "replicates.last.AP: Input should be"),
        (lambda c: c["replicates"]["last"]["AP"].pop(), "replicates: not all of one length"),
        (lambda c: c["replicates"]["last"]["AP"].append(0.5), "replicates.last.AP.400: Input should be"),
        (lambda c: c["measure"].update(checkpoints=["best"]), "figures: none of the checkpoint 'best'"),
        (lambda c: c["measure"].update(replicates=7), "replicates: not all of one length, that of `measure`"),
        (lambda c: c["images"].pop("hash"), "images.hash: Field required"),
        (lambda c: c["images"].update(count=0), "images.count: Input should be greater"),
        (lambda c: c["curve"][0].pop("step"), "curve.0.step: Field required"),
        (lambda c: c["curve"][0].update(AP={}), "curve.0.AP: Input should be a valid number"),
        (lambda c: c.update(curve={}), "curve: Input should be a valid list"),
        (lambda c: c["cost"].update(gflops=0), "cost.gflops: Input should be greater than 0"),
        (lambda c: c["cost"].update(seconds=None), "cost.seconds: Input should be a valid number"),
        (lambda c: c["provenance"].update(git={"commit": 3}), "provenance.git.commit: Input should be"),
        (lambda c: c["provenance"].update(machine="x"), "provenance.machine: Input should be"),
        (lambda c: c["provenance"].update(source=[]), "provenance.source: Input should be"),
    ],
)
def test_a_result_that_was_edited_names_the_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    (tmp_path / "seed1.json").write_text(json.dumps(edited(change)))
    with pytest.raises(DataError, match=r"seed1\.json: is no result of a run: ") as caught:
        read_result(tmp_path / "seed1.json")
    assert message in caught.value.message and "\n" not in caught.value.message


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested values, of long lists the first."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:2] if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((value, key), *places(inner))]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([[], {}, [1], {"a": 1}, 10**400, -1, 0]),
)
def test_any_edit_is_a_table_or_one_line(tmp_path: Path, data: st.DataObject, value: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        container, key = data.draw(st.sampled_from(places(content)))
        if isinstance(container, dict) and data.draw(st.booleans()):
            del container[key]
        else:
            container[key] = value

    (tmp_path / "seed1.json").write_text(json.dumps(edited(change)))
    for other in (0, 2):
        key = RunKey("digits", "both", other)
        (tmp_path / f"seed{other}.json").write_text(result(key, np.linspace(0, 1, IMAGES)).to_text())
    with contextlib.suppress(DataError):
        runs = Runs(study(), read_results(tmp_path))
        figure_table(runs, "digits"), query_table(runs, "digits"), layer_table(runs, "digits")
        mistake_table(runs, "digits"), cost_table(runs)
        _facts(runs, "x")
        _mean_curve([run.curve for run in runs.done], "AP")
        runs.mean("digits", "both", "AP")


@pytest.mark.parametrize("file", sorted(RESULTS.rglob("seed0.json"))[::5], ids=str)
def test_results_that_were_kept_are_read(file: Path) -> None:
    found = read_result(file)
    assert found is not None and found.failed is None


def test_json_says_everything(report: StudyReport, folder: Path) -> None:
    content = json.loads((folder / "study.json").read_text())
    outcomes = {(row["claim"], row["data"]): row["outcome"] for row in content["verdicts"]}
    assert outcomes == {("patterns", "digits"): "undecided", ("both", "digits"): "holds", ("both", "fish-2"): "holds"}
    tables = content["tables"]
    assert [row["seeds"] for row in tables["figures_digits"]] == [4, 3, 4]
    baseline, _, both = tables["figures_digits"]
    assert baseline["difference"] is None and both["low"] < both["difference"] < both["high"]
    assert both["difference"] == pytest.approx(both["AP"] - baseline["AP"], abs=1e-5)
    assert both["duplicates"] == pytest.approx(0.04) and both["predictions"] == 9.5
    # The missing seed is left out of the pair, and said.
    verdict = next(row for row in tables["verdicts"] if row["data"] == "fish-2")
    assert verdict["seeds"] == 3 and verdict["note"] == "missing seeds 0"
    states = [row["state"] for row in tables["runs"] if row["state"] != "done"]
    assert states == ["training: error: loss is not finite", "not yet"]
    assert content["facts"]["runs"] == "22 of 24 done, 1 failed" and "0123456789" in content["facts"]["commit"]


def test_seeds_are_planned_from_the_pooled_variances(report: StudyReport) -> None:
    pooled = planning(report.runs, "digits")
    # Two variants, of 3 and of 4 pairs, with one baseline: 4 / (2 + 3) of 2 + 3 degrees of freedom.
    assert pooled is not None and pooled.seeds == 1 + 4
    row = report.tables["planning"].rows[0]
    assert row["degrees"] == 4 and row["needed"] <= row["needed_at_most"]
    effects = [row[f"n{count}"] for count in (2, 3, 5, 8, 12)]
    assert effects == sorted(effects, reverse=True)
    assert row["needed"] == pooled.seeds_needed(0.015)


def test_differences_that_share_a_baseline_know_their_spread_less_well() -> None:
    """The pooled variance of V paired differences scatters as one of 4 V / (V + 3) times n - 1 degrees of freedom."""
    rng, seeds = np.random.default_rng(3), 4
    for variants in (1, 2, 3, 6):
        runs = rng.normal(size=(20_000, variants + 1, seeds))
        pooled = (runs[:, 1:] - runs[:, :1]).var(axis=2, ddof=1).mean(1)
        degrees = 2 * pooled.mean() ** 2 / pooled.var()  # of a scaled chi-squared
        assert degrees == pytest.approx((seeds - 1) * 4 * variants / (variants + 3), rel=0.08)


def test_stages_and_mistakes_are_of_the_runs_that_have_them(report: StudyReport) -> None:
    stages = report.tables["layers_digits"].rows[:2]
    assert [(row["variant"], row["stage"], row["seeds"]) for row in stages] == [
        ("baseline", "proposals", 3),
        ("baseline", "layer 1", 3),
    ]
    assert stages[0]["best_iou"] == pytest.approx(0.2) and stages[0]["AP"] is None
    assert stages[1]["duplicates"] == pytest.approx(0.04)
    patterns = report.tables["mistakes_digits"].rows[1]  # seed 3 failed
    assert (patterns["variant"], patterns["seeds"]) == ("patterns", 2)
    assert patterns["duplicate"] == pytest.approx(0.015) and patterns["missed"] == pytest.approx(0.2)


def test_times_of_different_processors_have_no_mean(folder: Path, tmp_path: Path) -> None:
    for variant in ("baseline", "both"):
        target = tmp_path / "digits" / variant
        shutil.copytree(folder / "results" / "digits" / variant, target)
    file = tmp_path / "digits" / "both" / "seed2.json"
    content = json.loads(file.read_text())
    content["provenance"]["machine"]["processor"] = "another"
    content["cost"]["seconds"], content["cost"]["step_seconds"] = 60.0, 0.3
    file.write_text(json.dumps(content))
    rows = cost_table(Runs(study(), read_results(tmp_path))).rows
    found = [tuple(row[key] for key in ("variant", "processor", "runs", "minutes", "step_seconds")) for row in rows]
    assert found == [
        ("baseline", "a processor", 4, 2.0, 0.6),
        ("both", "a processor", 3, 2.0, 0.6),
        ("both", "another", 1, 1.0, 0.3),
    ]


def test_markdown_and_plots(report: StudyReport, folder: Path) -> None:
    text = (folder / "study.md").read_text()
    assert text.startswith("# Study simulated\n") and "PaQ \\| raises AP." in text and "| holds |" in text
    assert "paqdetr study x.yaml --output DIR" in text and "nan" not in text.lower()
    for name in ("effects", "curves_digits", "curves_fish_2", "smallest_effect"):
        assert f"(plots/{name}.svg)" in text
        root = ElementTree.parse(folder / "plots" / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_page_needs_nothing_else(report: StudyReport, folder: Path) -> None:
    page = (folder / "report" / "index.html").read_text()
    assert "Study simulated" in page and "PaQ | raises AP." in page and "undecided" in page
    assert page.count("data:image/svg+xml") == 4 and "https://" not in page
    data = json.loads((folder / "report" / "data" / "verdicts.json").read_text())
    assert [row["verdict"] for row in data["data"]["rows"]] == ["undecided", "holds", "holds"]


def test_a_table_leaves_out_what_no_row_has() -> None:
    columns = (Column("a", "A", "text"), Column("b", "B"), Column("c", "C", "integer"))
    rows = ({"a": "x|y", "b": None, "c": 1000}, {"a": "z", "c": None})
    assert to_table(make_table("t", "", columns, rows, empty=False)).splitlines() == [
        "| A | C |",
        "| --- | ---: |",
        "| x\\|y | 1\N{NARROW NO-BREAK SPACE}000 |",
        "| z | \N{EN DASH} |",
    ]
