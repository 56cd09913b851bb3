"""A claim's verdict follows from the runs: planted effects are found, absent ones are not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paqdetr.errors import DataError
from paqdetr.study.results import RunResult
from paqdetr.study.runs import RunKey
from paqdetr.study.spec import Study
from paqdetr.study.tables import verdict_table
from paqdetr.study.verdicts import Runs, verdicts

IMAGES = 50
WEIGHTS = np.random.default_rng(0).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=100).T / IMAGES
SIMULATIONS = 500


def study(seeds: int = 3, **claims: dict[str, Any]) -> Study:
    return Study.model_validate(
        {
            "name": "simulated",
            "base": "dino_nano",
            "epochs": 1,
            "seeds": list(range(seeds)),
            "data": {"digits": {"make": {}}},
            "variants": {"baseline": {}, "new": {}, "other": {}},
            "claims": claims or {"better": {"variant": "new"}},
        }
    )


def result(variant: str, seed: int, images: np.ndarray, *, kind: str = "a") -> RunResult:
    """A run whose AP is the mean of what its images say."""
    replicates = {"AP": images @ WEIGHTS, "AP_nms": images @ WEIGHTS + 0.05}
    figures = {"AP": float(images.mean()), "AP_nms": float(images.mean()) + 0.05, "queries": {"gini": 0.5 + seed / 10}}
    return RunResult(
        RunKey("digits", variant, seed),
        None,
        {},
        images={"count": IMAGES, "hash": kind},
        figures={"last": figures},
        replicates={"last": replicates},
    )


def simulated(rng: np.random.Generator, seeds: int, **effects: float) -> list[RunResult]:
    """Runs of a baseline and of variants that are better by so much; images are hard or easy for all, seeds good or bad."""
    root = math.sqrt(IMAGES)
    difficulty = 0.4 + rng.normal(0, 0.03 * root, IMAGES)
    found = []
    for variant, effect in ({"baseline": 0.0} | effects).items():
        taste = rng.normal(0, 0.004 * root, IMAGES)
        for seed in range(seeds):
            own = rng.normal(0, 0.003 * root, IMAGES) + rng.normal(0, 0.008)
            found.append(result(variant, seed, difficulty + effect + taste + own))
    return found


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_claim_without_effect_is_decided_in_one_of_twenty_studies_at_most(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    plan = study(seeds)
    outcomes = [verdicts(Runs(plan, simulated(rng, seeds, new=0.0)))[0].outcome for _ in range(SIMULATIONS)]
    assert sum(outcome != "undecided" for outcome in outcomes) <= 0.05 * SIMULATIONS


def test_any_of_two_wrong_verdicts_is_as_rare() -> None:
    rng = np.random.default_rng(9)
    plan = study(3, first={"variant": "new"}, second={"variant": "other", "direction": "lower"})
    wrong = 0
    for _ in range(SIMULATIONS):
        found = verdicts(Runs(plan, simulated(rng, 3, new=0.0, other=0.0)))
        wrong += any(verdict.outcome != "undecided" for verdict in found)
    assert wrong <= 0.05 * SIMULATIONS


def test_planted_effects_are_found_with_their_sign() -> None:
    rng = np.random.default_rng(4)
    plan = study(
        5,
        better={"variant": "new"},
        worse={"variant": "other", "direction": "lower"},
        wrong={"variant": "other"},
        much={"variant": "new", "threshold": 0.2},
        against={"variant": "new", "against": "other"},
        duplicates={"variant": "new", "figure": "duplicates"},
    )
    found = {v.claim: v for v in verdicts(Runs(plan, simulated(rng, 5, new=0.1, other=-0.1)))}
    assert {name: verdict.outcome for name, verdict in found.items()} == {
        "better": "holds",
        "worse": "holds",
        "wrong": "does not hold",
        "much": "does not hold",
        "against": "holds",
        "duplicates": "undecided",
    }
    effects = {name: verdict.effect.mean for name, verdict in found.items() if verdict.effect}
    assert effects["better"] == pytest.approx(0.1, abs=0.03) == -effects["worse"], "variant minus the other, always"
    assert effects["worse"] == effects["wrong"]
    assert effects["against"] == pytest.approx(effects["better"] - effects["worse"])
    assert effects["duplicates"] == pytest.approx(0)


def test_a_difference_is_paired_by_seed_and_image() -> None:
    """Hard images and bad seeds are as hard and bad for both: what is left is the effect alone."""
    rng = np.random.default_rng(5)
    images = rng.normal(0.4, 0.2, (3, IMAGES))
    runs = [result("baseline", seed, images[seed]) for seed in range(3)]
    runs += [result("new", seed, images[seed] + 0.01) for seed in range(3)]
    found = Runs(study(), runs).difference("digits", "new", "baseline", "AP")
    assert found is not None and found.mean == pytest.approx(0.01) and found.standard_error < 1e-9
    alone = Runs(study(), runs).mean("digits", "new", "AP")
    assert alone is not None and alone.standard_error > 0.01


def test_seeds_that_one_variant_lacks_are_left_out_and_named() -> None:
    rng = np.random.default_rng(6)
    runs = simulated(rng, 4, new=0.05)
    failed = RunResult(RunKey("digits", "new", 2), "training: error: NaN", {})
    runs = [run for run in runs if (run.key.variant, run.key.seed) not in {("new", 2), ("baseline", 1)}]
    found = Runs(study(4), [*runs, failed])
    (verdict,) = verdicts(found)
    assert verdict.missing == (1, 2) and verdict.effect is not None and verdict.effect.seeds == 2
    assert found.failed == [failed] and len(found.done) == 6 and len(found.keys) == 12


def test_a_figure_without_resamples_is_judged_over_seeds_alone() -> None:
    rng = np.random.default_rng(7)
    (verdict,) = verdicts(Runs(study(3, even={"variant": "new", "figure": "queries.gini"}), simulated(rng, 3, new=0.0)))
    assert not verdict.over_images and verdict.effect is not None and verdict.effect.image_variance == 0


def test_a_figure_that_no_run_has_is_told_from_runs_that_are_not_there() -> None:
    claims = {"patterns": {"variant": "new", "figure": "queries.gini_patterns"}, "other": {"variant": "other"}}
    runs = Runs(study(2, **claims), simulated(np.random.default_rng(8), 2, new=0.0))
    rows = verdict_table(runs, verdicts(runs)).rows
    assert [row["note"] for row in rows] == ["runs without this figure", "no runs yet"]


def test_what_is_detectable_is_so_after_holms_adjustment() -> None:
    claims = {name: {"variant": "new", "threshold": share} for name, share in (("a", 0.0), ("b", 0.01), ("c", 0.02))}
    runs = Runs(study(3, **claims), simulated(np.random.default_rng(9), 3, new=0.0))
    decided = verdicts(runs)
    effect = decided[0].effect
    assert effect is not None
    row = verdict_table(runs, decided).rows[0]
    assert row["smallest"] == pytest.approx(replace(effect, level=0.05 / 3).smallest_effect(), abs=1e-6)
    assert row["smallest"] > effect.smallest_effect()


def test_nothing_is_said_of_runs_that_are_not_there() -> None:
    (verdict,) = verdicts(Runs(study(), []))
    assert verdict.outcome == "undecided" and verdict.effect is None and verdict.missing == (0, 1, 2)


def test_runs_on_other_images_are_not_compared() -> None:
    images = np.full(IMAGES, 0.5)
    runs = [result("baseline", 0, images), result("new", 0, images, kind="b")]
    with pytest.raises(DataError, match="other images"):
        verdicts(Runs(study(1), runs))


def test_results_of_another_measurement_are_not_shown_as_this_one() -> None:
    images = np.full(IMAGES, 0.5)
    old = replace(result("new", 0, images), measure={"version": 1, "split": "val", "replicates": 100})
    with pytest.raises(DataError, match=r"was measured with split='val', the study now says 'test'") as caught:
        Runs(study(1), [result("baseline", 0, images), old])
    assert "--resume" in caught.value.remedy
    Runs(study(1), [replace(old, failed="training: error: NaN")])  # has nothing to be shown


def test_results_of_other_settings_are_not_shown_as_these() -> None:
    images = np.full(IMAGES, 0.5)
    wanted = study(1).model_dump(mode="json")
    wanted["variants"]["new"]["settings"] = {"loss.gamma": 0.3, "augment.scale": [0.5, 1]}
    changed = Study.model_validate(wanted)
    same = {"loss.gamma": 0.3, "augment.scale": [0.5, 1.0], "epochs": 1}
    Runs(changed, [replace(result("new", 0, images), settings=same)])
    for other in ({"loss.gamma": 0.2}, {"augment.scale": [0.6, 1.0]}, {"epochs": 2}):
        with pytest.raises(DataError, match=f"was made with {next(iter(other))}="):
            Runs(changed, [replace(result("new", 0, images), settings=same | other)])
    with pytest.raises(DataError, match="was made with name='dino_r50', the study now says"):
        Runs(changed, [replace(result("new", 0, images), settings=same | {"name": "dino_r50"})])


def test_runs_with_steps_of_their_own_are_held_against_these() -> None:
    images = np.full(IMAGES, 0.5)
    wanted = study(1).model_dump(mode="json")
    wanted["data"]["digits"] |= {"steps": 100, "steps_of": {"new": 48}}
    equal_cost = Study.model_validate(wanted)
    Runs(
        equal_cost,
        [replace(result(name, 0, images), settings={"max_steps": n}) for name, n in (("new", 48), ("other", 100))],
    )
    with pytest.raises(DataError, match="was made with max_steps=100, the study now says 48"):
        Runs(equal_cost, [replace(result("new", 0, images), settings={"max_steps": 100})])


def test_seeds_that_lack_the_figure_are_missing() -> None:
    images = np.full(IMAGES, 0.5)
    runs = [result(variant, seed, images) for variant in ("baseline", "new") for seed in (0, 1)]
    (verdict,) = verdicts(Runs(study(2, even={"variant": "new", "figure": "queries.none"}), runs))
    assert verdict.effect is None and verdict.missing == (0, 1)
