"""A study's runs: equal budgets, settings laid over one another, and an order in which an early end still says something."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from paqdetr.config import load_config, parse_overrides
from paqdetr.errors import ConfigError, DataError
from paqdetr.runs import flat_settings
from paqdetr.study.measure import Job
from paqdetr.study.runs import Places, PlannedRun, RunKey, plan_runs, require_same_settings
from paqdetr.study.spec import Study


def plan(tmp_path: Path, **changes: Any) -> list[PlannedRun]:
    values = {
        "name": "x",
        "base": "dino_nano",
        "seeds": [3, 5],
        "evaluations": 4,
        "settings": {"batch_size": 4, "lr": 1e-5, "augment.scale": [0.75, 1.0]},
        "data": {"digits": {"make": {"train": 50}, "steps": 100, "settings": {"lr": 2e-5, "image_size": 96}}},
        "variants": {"baseline": {}, "new": {"base": "paq_dino_nano", "settings": {"image_size": 64}}},
    }
    study = Study.model_validate(values | changes)
    return plan_runs(study, file=tmp_path / "x.yaml", places=Places(tmp_path / "out"), root=tmp_path)


def test_all_runs_have_the_same_number_of_steps(tmp_path: Path) -> None:
    runs = plan(tmp_path)
    # Seeds outermost.
    assert [str(run.key) for run in runs] == [
        "digits, baseline, seed 3",
        "digits, new, seed 3",
        "digits, baseline, seed 5",
        "digits, new, seed 5",
    ]
    for run in runs:
        assert (run.steps, run.epoch_steps) == (100, 12)  # 50 images make 12 batches of 4
        assert run.config.max_steps == 100 and run.config.epochs == 9 and run.config.eval_every == 2
        assert run.config.seed == run.key.seed and run.config.model.num_classes == 10


def test_single_variants_may_have_other_steps(tmp_path: Path) -> None:
    """For a comparison at equal cost: the schedule ends where the variant's own budget does."""
    data = {"digits": {"make": {"train": 50}, "steps": 100, "steps_of": {"new": 48}}}
    baseline, new = plan(tmp_path, data=data)[:2]
    assert (baseline.steps, baseline.config.max_steps, baseline.config.epochs) == (100, 100, 9)
    assert (new.steps, new.config.max_steps, new.config.epochs, new.config.eval_every) == (48, 48, 4, 1)


def test_the_split_that_is_measured_is_there_before_anything_is_trained(tmp_path: Path, tiny_digits: Path) -> None:
    folder = shutil.copytree(tiny_digits, tmp_path / "digits")
    data = {"digits": {"folder": "digits", "steps": 10}}
    assert plan(tmp_path, data=data)
    shutil.rmtree(folder / "test")
    with pytest.raises(DataError, match="test"):
        plan(tmp_path, data=data)
    assert plan(tmp_path, data=data, evaluate={"split": "val"})


def test_later_layers_win(tmp_path: Path) -> None:
    baseline, new = plan(tmp_path)[:2]
    assert baseline.config.lr == 2e-5 and baseline.config.image_size == 96
    assert new.config.image_size == 64 and new.config.model.queries == "patterns"
    assert baseline.config.model.queries == "static"


def test_the_command_makes_the_planned_settings(tmp_path: Path) -> None:
    places = Places(tmp_path / "out")
    for run in plan(tmp_path):
        words = run.train_arguments(places.run(run.key), device="cpu")
        assert words[:2] == ["paqdetr", "train"] and words[-2:] == ["--device", "cpu"]
        pairs = [word for word in words if "=" in word]
        config = load_config(words[2], parse_overrides(pairs))
        found, wanted = flat_settings(config), flat_settings(run.config)
        different = {key for key in wanted if found[key] != wanted[key]}
        assert different == {"model.num_classes", "save_every_minutes"}
    assert "lr=2.0e-05" in words and "augment.scale=[0.75, 1.0]" in words
    assert "'augment.scale=[0.75, 1.0]'" in run.command(places.run(run.key))


def test_epochs_are_a_budget_too(tmp_path: Path) -> None:
    data = {"digits": {"make": {"train": 50}}}
    (run, *_) = plan(tmp_path, data=data, epochs=6)
    assert run.config.max_steps is None and run.steps == 72 and run.config.eval_every == 2


def test_several_processes_share_an_epoch(tmp_path: Path) -> None:
    (run, *_) = plan(tmp_path, processes=2)
    assert run.epoch_steps == 6 and run.steps == 100
    words = run.train_arguments(Places(tmp_path).run(run.key))
    assert words[:4] == ["paqdetr.study.launch", "--nproc_per_node=2", "-m", "paqdetr"]


def test_single_variants_may_have_more_seeds(tmp_path: Path) -> None:
    data = {"digits": {"make": {}, "epochs": 1, "more_seeds": {"new": [7]}}}
    assert [run.key.seed for run in plan(tmp_path, data=data)] == [3, 3, 5, 5, 7]


def test_an_error_names_the_layer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"variants\.new\.settings: .*dim=30"):
        plan(tmp_path, variants={"baseline": {}, "new": {"settings": {"model.dim": 30}}})
    with pytest.raises(ConfigError, match=r"x\.yaml: base: unknown model"):
        plan(tmp_path, base="dinosaur")
    with pytest.raises(ConfigError, match=r"variants\.new\.base: .*nothing\.yaml: no such file"):
        plan(tmp_path, variants={"baseline": {}, "new": {"base": "nothing.yaml"}})
    with pytest.raises(DataError, match="no such data folder"):
        plan(tmp_path, data={"fish": {"folder": "fish", "epochs": 1}})


def test_a_base_may_be_a_file_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: dino_nano\nlr: 0.5\n")
    (run, *_) = plan(tmp_path, base="mine.yaml", data={"digits": {"make": {}, "epochs": 1}}, settings={})
    assert run.config.lr == 0.5 and Path(run.base).is_absolute()


@pytest.mark.parametrize("line", ["batch_size: 8", "accumulate: 2", "patience: 3", "max_steps: 50"])
def test_a_base_brings_no_budget_of_its_own(tmp_path: Path, line: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: dino_nano\n{line}\n")
    variants = {"baseline": {}, "new": {"base": "mine.yaml"}}
    data = {"digits": {"make": {}, "epochs": 1}}
    key, value = line.split(": ")
    with pytest.raises(ConfigError, match=rf"variants\.new: .*mine\.yaml: has {key}={value}, but") as caught:
        plan(tmp_path, variants=variants, data=data, settings={})
    assert f"take {key} out of the base" in caught.value.remedy
    # What the study says for all runs goes over every base.
    if key == "batch_size":
        assert len(plan(tmp_path, variants=variants, data=data, settings={"batch_size": 4})) == 4


def test_runs_made_with_other_settings_are_told_apart(tmp_path: Path) -> None:
    (run, *_) = plan(tmp_path)
    same = flat_settings(run.config)
    require_same_settings(run, same | {"workers": 7}, tmp_path)  # changes no figure
    require_same_settings(run, {key: same[key] for key in list(same)[:5]}, tmp_path)  # of an older version
    with pytest.raises(ConfigError, match=r"was made with lr=1.0, the study now says 2e-05"):
        require_same_settings(run, same | {"lr": 1.0}, tmp_path)


def test_a_result_keeps_what_was_asked_to_be_measured(tmp_path: Path) -> None:
    evaluate = {"split": "val", "checkpoints": ["best", "last"], "replicates": 60, "seed": 4}
    values = {"name": "x", "base": "dino_nano", "steps": 4, "data": {"digits": {"make": {}}}, "evaluate": evaluate}
    study, places = Study.model_validate(values | {"variants": {"baseline": {}}}), Places(tmp_path)
    run = plan_runs(study, file=tmp_path / "x.yaml", places=places, root=tmp_path)[0]
    measure = Job.of(study, run, places, device=None).measure
    assert study.measure_of("digits") == evaluate == {k: v for k, v in measure.items() if k != "version"}


def test_where_things_lie(tmp_path: Path) -> None:
    places, key = Places(tmp_path), RunKey("digits", "new", 3)
    assert places.run(key).output == tmp_path / "runs/digits/new/seed3"
    assert places.result(key) == tmp_path / "results/digits/new/seed3.json"
