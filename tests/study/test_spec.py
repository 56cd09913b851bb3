"""A study's file: what it may say, and which key is named if it is wrong."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from paqdetr.errors import ConfigError, DataError
from paqdetr.study.spec import Study, load_study

REPO = Path(__file__).resolve().parents[2]

GOOD: dict[str, Any] = {
    "base": "dino_nano",
    "epochs": 2,
    "seeds": [0, 1],
    "data": {"digits": {"make": {"train": 8}}, "fish": {"folder": "fish", "steps": 10, "variants": ["baseline"]}},
    "variants": {
        "baseline": {},
        "new": {"base": "paq_dino_nano", "settings": {"model": {"num_patterns": 8}, "loss.gamma": 0.5}},
    },
    "claims": {"better": {"variant": "new", "published": {"effect": 0.01, "where": "COCO"}}},
}


def written(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_a_file_says_what_is_compared(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, GOOD))
    assert study.name == "study"
    # Nested and dotted keys mean the same.
    assert study.variants["new"].settings == {"model.num_patterns": 8, "loss.gamma": 0.5}
    assert study.variants_of("digits") == ("baseline", "new") and study.variants_of("fish") == ("baseline",)
    # A claim is decided where both variants run.
    assert study.data_of(study.claims["better"]) == ("digits",)
    assert study.split_of("fish") == "test" and study.seeds_of("fish", "baseline") == (0, 1)


@pytest.mark.parametrize("file", sorted((REPO / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_studies_of_the_project_are_valid(file: Path) -> None:
    study = load_study(file)
    assert study.name == file.stem and study.data and study.baseline in study.variants


def test_the_study_of_the_documentation_is_valid(tmp_path: Path) -> None:
    page = (REPO / "docs" / "own_studies.md").read_text(encoding="utf-8")
    file = tmp_path / "my_study.yaml"
    file.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    assert list(load_study(file).claims) == ["paq", "large"]


def set_(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for parent in parents:
            values = values[parent]
        if value is None:
            del values[last]
        else:
            values[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "said", "helped"),
    [
        ("sedes", [1], "unknown key 'sedes'", "did you mean 'seeds'?"),
        ("data/digits/folds_", 3, "unknown key 'folds_' in data.digits", "did you mean 'folds'?"),
        ("data/digits/make/trian", 3, "unknown key 'trian' in data.digits.make", "did you mean 'train'?"),
        ("claims/better/published/were", 3, "in claims.better.published", "did you mean 'where'?"),
        ("base", None, "base is missing", "docs/own_studies.md"),
        ("variants/new/settings", {"model.num_paterns": 8}, "unknown setting", ""),
        ("variants/new/settings", {"seed": 8}, "variants.new.settings: seed is the study's to set", ""),
        ("variants/new/settings", {"epochs": 8}, "epochs is the study's to set", ""),
        ("variants/new/settings", {"batch_size": 8}, "settings.batch_size is not a variant's to set", ""),
        ("variants/a b", {}, "names a folder", ""),
        ("data", {"d.1": {"make": {}}, "d-1": {"make": {}}}, "'d-1' and another name differ in _ . + - alone", ""),
        ("baseline", "old", "baseline: 'old' is not a variant of this study; there are baseline, new", ""),
        ("seeds", [1, 1], "seeds: a seed is listed twice", ""),
        ("seeds", [], "seeds:", ""),
        ("epochs", None, "data.digits: has no budget", ""),
        ("steps", 10, "both steps and epochs", ""),
        ("data/digits/folder", "x", "data.digits: needs either `folder: DIR` or `make: {...}`", ""),
        ("data/fish/variants", ["no"], "data.fish.variants: 'no' is not a variant", ""),
        ("data/fish/steps_of", {"no": 4}, "data.fish.steps_of: 'no' is not a variant", ""),
        ("data/fish/steps_of", {"baseline": 0}, "greater than or equal to 1", ""),
        ("data/fish/more_seeds", {"no": [4]}, "data.fish.more_seeds: 'no' is not a variant", ""),
        ("data/fish/more_seeds", {"baseline": [1]}, "listed twice", ""),
        ("data/fish/more_seeds", {"new": [4]}, "'new' is not a variant that runs there", ""),
        ("claims/better/data", ["digits", "fish"], "not both of its variants run on 'fish'", ""),
        ("data/digits/variants", ["baseline"], "claims.better: there is no data set on which both", ""),
        ("claims/better/variant", "no", "claims.better.variant: 'no' is not a variant", ""),
        ("claims/better/against", "new", "claims.better: compares 'new' with itself", ""),
        ("claims/better/data", ["sea"], "claims.better.data: 'sea' is not a data set", ""),
        ("claims/better/figure", "APP", "unknown figure 'APP', did you mean 'AP'?", ""),
        ("claims/better/threshold", 1.5, "threshold: 1.5 of AP, which lies in [0, 1]: one point is 0.01", ""),
        ("claims/better/published/effect", 1.6, "published.effect: 1.6 of AP", ""),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, path: str, value: Any, said: str, helped: str) -> None:
    values = copy.deepcopy(GOOD)
    set_(path, value)(values)
    with pytest.raises(ConfigError) as caught:
        load_study(written(tmp_path, values))
    assert said in caught.value.message and helped in caught.value.remedy
    assert "study.yaml" in caught.value.message


def test_a_seed_holds_out_one_part_whatever_the_variant() -> None:
    values = copy.deepcopy(GOOD)
    values["data"]["digits"] |= {"folds": 3, "more_seeds": {"baseline": [3, 4], "new": [4, 7]}}
    study = Study.model_validate({"name": "x", **values})
    assert [study.fold_of("digits", seed) for seed in (0, 1, 3, 4, 7)] == [0, 1, 2, 0, 1]
    assert study.fold_of("fish", 1) is None


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such study"):
        load_study(tmp_path / "nothing.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(DataError, match="is a pipe, expected a file"):
        load_study(tmp_path / "pipe.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"line \d, column \d: not valid YAML"):
        load_study(tmp_path / "broken.yaml")


def test_a_claim_may_be_about_query_use() -> None:
    values = copy.deepcopy(GOOD)
    values["claims"]["few"] = {
        "variant": "new",
        "figure": "queries.per_image_over_30",
        "direction": "lower",
        "threshold": 2,
    }
    assert Study.model_validate({"name": "x", **values}).claims["few"].threshold == 2
    values["claims"]["few"]["figure"] = "queries.gini_positives"
    with pytest.raises(ValueError, match=r"2.* of queries\.gini_positives, which lies in \[0, 1\]"):
        Study.model_validate({"name": "x", **values})
