"""The studies of the repository: every file loads, and each of its rows is a model of its own."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from paqdetr.config import Config, load_config
from paqdetr.losses import build_criterion
from paqdetr.models.zoo import build_model
from paqdetr.study.spec import Study, load_study

FOLDER = Path(__file__).resolve().parents[1] / "studies"
FILES = sorted(FOLDER.glob("*.yaml"))


def config_of(study: Study, data: str, variant: str) -> Config:
    row = study.variants[variant]
    settings = {**study.settings, **study.data[data].settings, **row.settings}
    return load_config(row.base or study.base, settings)


def rows(study: Study) -> list[tuple[str, str]]:
    return [(data, variant) for data in study.data for variant in study.variants_of(data)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_row_is_valid_and_none_is_another(file: Path) -> None:
    study = load_study(file)
    assert study.name == file.stem
    for data in study.data:
        configs = {v: config_of(study, data, v) for v in study.variants_of(data)}
        for (one, a), (other, b) in combinations(configs.items(), 2):
            plain = [config.model_copy(update={"name": "", "preset": None}) for config in (a, b)]
            same = plain[0] == plain[1] and study.budget_of(data, one) == study.budget_of(data, other)
            assert not same, f"{one} and {other} on {data} are the same training"
        for config in configs.values():
            build_criterion(config.loss)


def test_three_and_six_layers_are_the_pilots_trainings_but_for_the_depth() -> None:
    pilot, depth = (load_study(FOLDER / f"{name}.yaml") for name in ("pilot", "pilot_depth"))
    for data in depth.data:
        assert (depth.data[data].make, depth.data[data].epochs) == (pilot.data[data].make, pilot.data[data].epochs)
        for ours, its in (("layers3", "baseline"), ("paq_layers3", "both")):
            three = config_of(depth, data, ours)
            assert three == config_of(pilot, data, its) and three.model.decoder_layers == 3
            six = config_of(depth, data, ours.replace("3", "6"))
            assert six.model == three.model.model_copy(update={"decoder_layers": 6}) and six.loss == three.loss


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("ablation", "paper"),
        ("ablation", "static_mixture"),
        ("hosts", "paq_dab"),
        ("ablation", "both_m192"),
        ("distinct", "paq_token_distinct"),
        ("pilot_depth", "paq_layers6"),
    ],
)
def test_models_of_some_rows(file: str, variant: str) -> None:
    study = load_study(FOLDER / f"{file}.yaml")
    with torch.device("meta"):  # shapes without weights
        model = build_model(config_of(study, next(iter(study.data)), variant))
    assert sum(p.numel() for p in model.parameters()) > 1e6


def test_paper_rows_are_the_literal_paper() -> None:
    study = load_study(FOLDER / "ablation.yaml")
    config, paper = config_of(study, "digits", "paper"), load_config("paq_dino_nano", {"preset": "paper"})
    assert config.loss == paper.loss
    duplicates = {"distinct_proposals": None, "distinct_queries": None}
    assert config.model == paper.model.model_copy(update={"num_queries": 60, **duplicates})
