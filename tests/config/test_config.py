from __future__ import annotations

import contextlib
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paqdetr
from paqdetr.config import (
    AugmentConfig,
    Config,
    LossConfig,
    ModelConfig,
    describe_config,
    files,
    known_figures,
    known_keys,
    list_configs,
    load_config,
    parse_overrides,
    retired_keys,
    validate_config,
)
from paqdetr.data.dataset import open_split
from paqdetr.errors import ConfigError
from paqdetr.training.setup import with_classes


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def changed(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in values.items():
            nested = isinstance(value, dict)
            out |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
        return out

    a, b = flat(first.model_dump()), flat(second.model_dump())
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


def test_what_comes_with_the_package() -> None:
    names = list_configs()
    assert names == sorted(names)
    assert {"dino_nano", "paq_dino_nano", "dino_r50", "paq_dino_r50", "dino_swin_l", "paq_dino_swin_l"} <= set(names)
    assert "paper" not in names  # presets are no models


def test_every_file_of_the_package_loads_and_comes_back_from_yaml(tmp_path: Path) -> None:
    configs = {name: load_config(name) for name in list_configs()}
    assert [name for name, config in configs.items() if config.name != name] == []
    other = [n for n, c in configs.items() if load_config(write(tmp_path, "config.yaml", c.to_yaml())) != c]
    assert other == []


def test_dino_nano_is_paq_dino_nano_without_paqs_lines() -> None:
    differences = changed(load_config("dino_nano"), load_config("paq_dino_nano"))
    assert set(differences) <= {"name", "model.queries", "model.pattern_std", "loss.assigner", "loss.one_to_many_until"}
    assert differences["model.queries"] == ("static", "patterns")
    assert differences["loss.assigner"] == ("one_to_one", "quality_aware")


@pytest.mark.parametrize("size", ["r50", "swin_l"])
def test_paq_changes_queries_assignment_and_loss_of_the_large_hosts(size: str) -> None:
    differences = changed(load_config(f"dino_{size}"), load_config(f"paq_dino_{size}"))
    assert set(differences) == {"name", "model.queries", "loss.assigner", "loss.classification"}


def test_the_host_is_dino() -> None:
    """METHOD of the host: 4 levels, 6 + 6 layers, d 256, 8 heads, 4 points, FFN 2048, dropout 0, 900 queries."""
    config = load_config("dino_r50")
    model, loss = config.model, config.loss
    sizes = (model.num_levels, model.encoder_layers, model.decoder_layers, model.dim, model.num_heads)
    assert sizes == (4, 6, 6, 256, 8)
    assert (model.num_points, model.ffn_dim, model.dropout, model.num_queries) == (4, 2048, 0.0, 900)
    assert (model.denoising_queries, model.label_noise, model.box_noise) == (100, 0.5, 1.0)
    assert model.look_forward_twice and model.position_temperature == 20
    assert (loss.class_weight, loss.l1_weight, loss.giou_weight) == (1, 5, 2)
    assert (loss.class_cost, loss.l1_cost, loss.giou_cost) == (2, 5, 2)
    assert loss.classification == "focal"
    assert (config.lr, config.backbone_lr, config.offsets_lr_scale) == (1e-4, 1e-5, 0.1)
    assert (config.weight_decay, config.clip_norm, config.warmup_steps, config.epochs) == (1e-4, 0.1, 1000, 12)
    assert config.image_size == (800, 1333)


def test_preset_paper_is_the_literal_paper() -> None:
    config = load_config("paq_dino_nano", {"preset": "paper"})
    model, loss = config.model, config.loss
    assert (model.extractor, model.extractor_conv, model.head, model.bias_std) == ("fused", "full", "dense", None)
    assert (model.pattern_std, model.temperature, model.gain) == (1.0, 1.0, 1.0)
    assert (model.mixture_input, model.mixture, model.normalize_summary) == ("image", "replace", False)
    assert (loss.gamma, loss.top_k, loss.min_positives, loss.confidence) == (0.4, 4, 1, "max")
    assert (loss.diversity_weight, loss.div_scale) == (0.2, 1.0)
    assert (loss.one_to_many_from, loss.one_to_many_until, loss.min_iou) == (0.0, 1.0, 0.0)
    assert loss.classification == "varifocal" and loss.assigner == "quality_aware"
    assert (loss.varifocal_alpha, loss.encoder_assigner, loss.encoder_min_positives) == (0.75, "one_to_one", None)
    assert (loss.class_cost, loss.l1_cost, loss.giou_cost) == (2.0, 5.0, 2.0)
    assert model.dim == 128  # the host stays


@pytest.mark.parametrize("name", ["dino_nano", "deformable_detr_r50"])
def test_preset_paper_needs_a_part_of_paq(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: preset=paper on a model without PaQ") as caught:
        load_config(name, {"preset": "paper"})
    assert "take the paq_* model of this host" in caught.value.remedy
    with pytest.raises(ConfigError, match="without PaQ"):
        load_config(name, {"preset": "paper", "model.queries": "static_mixture"})
    for part in ({"model.queries": "patterns"}, {"loss.assigner": "quality_aware"}):
        assert load_config(name, {"preset": "paper", **part}).loss.confidence == "max"
    with pytest.raises(ConfigError, match=r"with loss\.assigner=fixed_k, which the paper does not have"):
        load_config(name, {"preset": "paper", "model.queries": "patterns", "loss.assigner": "fixed_k"})


def test_order_of_precedence(tmp_path: Path) -> None:
    write(tmp_path, "below.yaml", "base: paq_dino_nano\nepochs: 5\nlr: 1.0e-3\nmodel: {dim: 64, num_patterns: 20}\n")
    top = write(tmp_path, "top.yaml", "base: below.yaml\nepochs: 6\nmodel: {num_patterns: 30}\n")
    config = load_config(top, ["epochs=7"])
    assert config.name == "top"
    assert config.model.backbone == "tf_efficientnet_lite0"  # the package's
    assert (config.lr, config.model.dim) == (1e-3, 64)  # the base's
    assert config.model.num_patterns == 30  # the file's
    assert config.epochs == 7  # the override's
    assert config.weight_decay == 1e-4  # the default


def test_a_preset_lies_over_the_base_and_under_the_file(tmp_path: Path) -> None:
    text = "base: paq_dino_nano\npreset: paper\nmodel: {pattern_std: 0.5}\n"
    path = write(tmp_path, "mine.yaml", text)
    config = load_config(path)
    assert config.model.extractor_conv == "full" and config.model.pattern_std == 0.5
    assert load_config(path, ["model.pattern_std=0.7"]).model.pattern_std == 0.7
    off = load_config(path, ["preset=null"])
    assert off.preset is None and off.model.extractor_conv == "depthwise" and off.model.pattern_std == 0.5


def test_a_preset_given_on_the_command_line_lies_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", "base: paq_dino_nano\nmodel: {pattern_std: 0.5}\n")
    assert load_config(path, ["preset=paper"]).model.pattern_std == 1.0
    assert load_config(path, ["model.pattern_std=0.7", "preset=paper"]).model.pattern_std == 0.7


def test_resolved_settings_come_back_whatever_was_laid_over_a_preset(tmp_path: Path) -> None:
    config = load_config("paq_dino_nano", {"preset": "paper", "model.pattern_std": 0.5, "loss.gamma": 0.1})
    path = write(tmp_path, "config.yaml", config.to_yaml())
    assert load_config(path) == config


@given(
    epochs=st.integers(1, 100),
    lr=st.floats(1e-12, 1.0),
    size=st.integers(32, 2000) | st.tuples(st.integers(32, 800), st.integers(800, 2000)),
    max_steps=st.none() | st.integers(1, 10**6),
)
def test_yaml_round_trip(epochs: int, lr: float, size: Any, max_steps: int | None) -> None:
    config = Config(name="x", epochs=epochs, lr=lr, image_size=size, max_steps=max_steps)
    assert validate_config(yaml.safe_load(config.to_yaml()), "x") == config


def test_a_base_is_looked_for_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "below.yaml", "base: dino_nano\nepochs: 3\n")
    write(tmp_path / "sub", "top.yaml", "base: ../below.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("sub/top.yaml").epochs == 3
    monkeypatch.chdir(tmp_path / "sub")
    assert load_config("top.yaml").epochs == 3


@pytest.mark.parametrize("relative", [True, False])
def test_a_circle_of_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    (tmp_path / "sub").mkdir()
    first = write(tmp_path, "a.yaml", "base: sub/b.yaml\n")
    write(tmp_path / "sub", "b.yaml", "base: ../sub/../a.yaml\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_config("a.yaml" if relative else first)
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_config(write(tmp_path, "own.yaml", "base: own.yaml\n"))


@pytest.mark.parametrize(
    ("overrides", "message", "remedy"),
    [
        ({"epohcs": 3}, "unknown setting 'epohcs'", "did you mean 'epochs'?"),
        ({"model.num_querys": 3}, "unknown setting 'model.num_querys'", "did you mean 'model.num_queries'?"),
        ({"num_patterns": 3}, "unknown setting 'num_patterns'", "did you mean 'model.num_patterns'?"),
        ({"qqqq": 3}, "unknown setting 'qqqq'", "config show"),
        ({"epochs": "many"}, "epochs='many': Input should be a valid integer", "config show"),
        ({"lr": float("nan")}, "lr=nan: Input should be a finite number", "config show"),
        ({"model.dim": 130}, "dim=130 must be divisible by 4 and by num_heads=8", "config show"),
        ({"model.num_levels": 2}, r"num_levels=2 is fewer than backbone_strides=(8, 16, 32)", "config show"),
        ({"model.encoder_query_levels": 4}, "encoder_query_levels=4 exceeds num_levels=3", "config show"),
        ({"loss.min_positives": 9}, "min_positives=9 exceeds top_k=4", "config show"),
        ({"loss.encoder_min_positives": 5}, "encoder_min_positives=5 exceeds top_k=4", "config show"),
        (
            {"loss.one_to_many_from": 0.5, "loss.one_to_many_until": 0.5},
            "from=0.5 is not before one_to_many_until=0.5",
            "config show",
        ),
        ({"save_every_minutes": -1}, "save_every_minutes=-1", "config show"),
        ({"image_size": 16}, "image_size=16: expected one number from 32", "config show"),
        ({"image_size": [900, 800]}, "image_size=[900, 800]: expected one number from 32", "config show"),
        ({"image_size": "640,640"}, "image_size='640,640'", "a list is written in brackets: image_size=[640,640]"),
        ({"trackers": "wandb"}, "trackers='wandb'", "a list is written in brackets: trackers=[wandb]"),
        ({"augment.scale": [1.0, 0.5]}, "augment.scale=[1.0, 0.5]: expected 0.01 <= low <= high", "config show"),
        ({"preset": "papr"}, "unknown preset 'papr'", "the only preset is 'paper'"),
    ],
)
def test_each_mistake_names_key_value_and_remedy(overrides: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("dino_nano", overrides)
    assert message in caught.value.message and remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: dino_nano\nepochs: [1\n", "not valid YAML"),
        ("- a\n- b\n", "holds a list, expected keys and values"),
        ("base: dino_nan\n", "unknown model or recipe 'dino_nan'"),
        ("base: absent.yaml\n", "absent.yaml: no such file"),
        ("base: dino_nano\nmodel:\n", "model=None"),
        ("base: dino_nano\npreset: papr\n", "unknown preset 'papr'"),
        ("base: dino_nano\nlearning_rate: 3\n", "mine.yaml: unknown setting 'learning_rate'"),
        ("base: dino_nano\nmodel.dim: 32\nmodel: {dim: 32}\n", "mine.yaml: model.dim is given twice"),
        ("base: dino_nano\nmodel: 5\nmodel.dim: 32\n", "mine.yaml: model is given twice"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "mine.yaml", text))
    assert message in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "make",
    [
        lambda n: "base: dino_nano\n" if n == 0 else f"base: [b{n - 1}.yaml, b{n - 1}.yaml]\n",  # 2^n paths
        lambda n: f"base: b{n + 1}.yaml\n",  # a chain without end
        lambda n: f"base: [{', '.join(['dino_nano'] * 5000)}]\n",
    ],
)
def test_too_many_bases_are_refused_at_once(tmp_path: Path, make: Any) -> None:
    for number in range(150):
        write(tmp_path, f"b{number}.yaml", make(number))
    with pytest.raises(ConfigError, match="more than 64 bases, counting those of bases"):
        load_config(tmp_path / "b40.yaml")


def test_a_link_to_a_file_may_have_another_name(tmp_path: Path) -> None:
    write(tmp_path, "settings", "base: dino_nano\nepochs: 3\n")
    (tmp_path / "mine.yaml").symlink_to(tmp_path / "settings")
    assert load_config(tmp_path / "mine.yaml").epochs == 3
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"zero\.yaml: is a device, expected a file"):
        load_config(tmp_path / "zero.yaml")


def test_a_file_that_several_bases_name_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write(tmp_path, f"b{number}.yaml", f"base: [b{number + 1}.yaml, b{number + 1}.yaml]\nseed: {number}")
    write(tmp_path, "b20.yaml", "base: dino_nano\nepochs: 3")
    read = []
    monkeypatch.setattr(files, "read_text", lambda path, **how: read.append(path.name) or path.read_text())
    config = load_config(tmp_path / "b0.yaml")
    assert (config.seed, config.epochs) == (0, 3)
    assert sorted(read) == sorted(f"b{number}.yaml" for number in range(21))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"base: dino_nano\nepochs: !!int abc\n", "mine.yaml: line 2, column 9: the tag"),
        (b"base: dino_nano\nname: \xe9", "no UTF-8 text at byte 22"),
        ("base: dino_nano".encode("utf-16"), "no UTF-8 text"),
        (b"base: dino_nano\n" + b"# x\n" * 2**15, "has 128 KiB, more than the 64 that are read"),
        (b"base: dino_nano\nepochs: 3\nepochs: 4\n", "line 3, column 1: the key 'epochs' stands there twice"),
        (b"base: dino_nano\nepochs: " + b"1" * 5000, "line 2, column 9: a number of more than 100 digits"),
        (b"base: dino_nano\ninit: 2024-99-99\nepochs: 010\n", "epochs='010': Input should be a valid integer"),
    ],
    ids=range(7),
)
def test_files_that_are_read_in_no_other_way(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "mine.yaml")
    assert message in caught.value.message and "\n" not in caught.value.message


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.sampled_from([b"", b"base: dino_nano\n"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_file_is_a_config_or_one_line(tmp_path: Path, content: bytes, head: bytes) -> None:
    (tmp_path / "mine.yaml").write_bytes(head + content)
    with contextlib.suppress(ConfigError):
        assert load_config(tmp_path / "mine.yaml").model


@given(key=st.sampled_from(known_keys()), typed=st.text(max_size=30) | st.from_regex(r"[-+.0-9eE_:]{1,20}"))
def test_any_typed_value_is_a_config_or_one_line(key: str, typed: str) -> None:
    with contextlib.suppress(ConfigError):
        assert load_config("dino_nano", [f"{key}={typed}"]).model


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="unknown model or recipe 'runs/frist', and no such file or folder"):
        load_config("runs/frist")
    with pytest.raises(ConfigError) as caught:
        load_config("paq_dino_r5")
    assert caught.value.remedy == "did you mean 'paq_dino_r50'?"
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("text", ["", "# later", "epochs: 3\n", "base: below.yaml\n"])
def test_a_file_has_to_say_which_model_it_is_of(tmp_path: Path, text: str) -> None:
    write(tmp_path, "below.yaml", "lr: 0.001\n")
    with pytest.raises(ConfigError, match=r"plain\.yaml: names no model, neither by `base` nor") as caught:
        load_config(write(tmp_path, "plain.yaml", text), ["model.dim=64"])
    assert "base: paq_dino_nano" in caught.value.remedy


def test_a_file_without_a_base_is_all_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "plain.yaml", "model: {}"))
    assert config == Config(name="plain")
    assert (config.model, config.loss, config.augment) == (ModelConfig(), LossConfig(), AugmentConfig())


def test_overrides_are_read_as_yaml() -> None:
    texts = ["epochs=3", "lr=4e-4", "model.bias_std=null", "image_size=[480, 800]", "augment.scale=[0.5,1]"]
    config = load_config("paq_dino_nano", texts)
    assert (config.epochs, config.lr, config.model.bias_std) == (3, 4e-4, None)
    assert config.image_size == (480, 800) and config.augment.scale == (0.5, 1.0)
    assert parse_overrides(["a.b=x=y", "c="]) == {"a.b": "x=y", "c": None}
    assert parse_overrides(["epochs=3", "epochs=4"]) == {"epochs": 4}
    assert parse_overrides(["name=[1"]) == {"name": "[1"}
    config = load_config("dino_nano", ["name=12:30", "init=x #1"])
    assert (config.name, config.init) == ("12:30", "x #1")


@pytest.mark.parametrize("word", ["no", "bf16", "fp16"])
def test_amp_may_be_written_without_quotes(word: str, tmp_path: Path) -> None:
    """YAML 1.1 reads a bare `no` as false."""
    config = load_config("dino_nano", [f"amp={word}"])
    assert config.amp == word
    assert load_config(write(tmp_path, "mine.yaml", f"base: dino_nano\namp: {word}\n")).amp == word
    assert load_config(write(tmp_path, "config.yaml", config.to_yaml())) == config


@pytest.mark.parametrize("text", ["epochs", "=3", ""])
def test_an_override_is_a_key_and_a_value(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([text])
    assert repr(text) in caught.value.message and "key=value" in caught.value.remedy


def test_a_whole_section_merges() -> None:
    config = load_config("dino_nano", {"model": {"dim": 64, "num_heads": 4}})
    assert (config.model.dim, config.model.num_heads, config.model.num_levels) == (64, 4, 3)


def test_known_keys() -> None:
    keys = known_keys()
    assert {"epochs", "model.dim", "loss.gamma", "augment.flip"} <= set(keys)
    assert "model" not in keys and len(keys) == len(set(keys))


def test_retired_keys_load_at_the_value_at_which_they_did_nothing(tmp_path: Path) -> None:
    known, retired = load_config("paq_dino_nano"), dict(LossConfig.retired)
    old = yaml.safe_load(known.to_yaml())
    old["loss"] |= retired
    old["model"] |= ModelConfig.retired
    file = write(tmp_path, "old.yaml", yaml.safe_dump(old))
    assert load_config(file) == known and not set(retired_keys()) & set(known_keys())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.rank_damping", 1.5),
        ("loss.positives_schedule", "linear"),
        ("loss.one_to_one_weight", 1.0),
        ("loss.one_to_many_weight", 0.5),
        ("loss.normalizer", "positives"),
        ("model.one_to_many_heads", "all"),
    ],
)
def test_retired_keys_at_other_values_name_the_commit_that_has_them(key: str, value: Any) -> None:
    name = key.partition(".")[2]
    with pytest.raises(ConfigError, match=rf"{name}={value!r} was removed; the last commit that has it is 170e1a7"):
        load_config("paq_dino_nano", {key: value})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config("dino_nano").epochs = 3  # type: ignore[misc]


# --- several bases, and the files of the package


def test_of_several_bases_the_later_wins(tmp_path: Path) -> None:
    write(tmp_path, "first.yaml", "base: dino_nano\nepochs: 3\nlr: 0.5\nmodel: {num_queries: 7}\n")
    write(tmp_path, "second.yaml", "epochs: 4\nmodel: {dim: 64}\n")
    config = load_config(write(tmp_path, "top.yaml", "base: [first.yaml, second.yaml]\nseed: 3\n"))
    assert (config.epochs, config.lr, config.seed) == (4, 0.5, 3)
    assert (config.model.num_queries, config.model.dim) == (7, 64)


def test_a_part_alone_is_no_model_but_can_be_a_base(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "mine.yaml", "base: [parts/dn_detr, parts/nano, parts/paq]\n"))
    assert (config.model.denoising, config.model.backbone) == ("plain", "tf_efficientnet_lite0")
    with pytest.raises(ConfigError, match="unknown model or recipe 'dino'"):
        load_config("dino")


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("dino_nano", "DINO, the size of two CPU cores."),
        ("paq_dn_detr_r50", "DN-Deformable-DETR with PaQ, ResNet-50, 12 epochs of COCO."),
        ("paq_dino_r50_24e", "DINO with PaQ, ResNet-50, 24 epochs of COCO."),
        ("dino_r50_12e", "DINO, ResNet-50, 12 epochs of COCO, trained as by its authors."),
    ],
)
def test_descriptions_are_put_together_from_host_size_and_recipe(name: str, description: str) -> None:
    assert describe_config(name) == description


def test_a_host_is_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(Path(paqdetr.__file__).parent / "configs", configs)
    host = "title: DINO with few queries\nsizes: [nano]\nbase: parts/dino\nmodel: {num_points: 3}\n"
    (configs / "parts" / "hosts" / "small_dino.yaml").write_text(host)
    shutil.copy(configs / "parts" / "dino_nano.yaml", configs / "parts" / "small_dino_nano.yaml")  # at one size alone
    monkeypatch.setattr(files, "_config_dir", lambda: configs)
    for cached in (files._models, files._part):
        monkeypatch.setattr(files, cached.__name__, cache(cached.__wrapped__))
    assert list_configs("model", "*small_dino*") == ["paq_small_dino_nano", "small_dino_nano"]
    assert changed(load_config("paq_small_dino_nano"), load_config("paq_dino_nano")) == {
        "name": ("paq_small_dino_nano", "paq_dino_nano"),
        "model.num_points": (3, 4),
    }
    assert load_config("small_dino_nano_24e").epochs == 24  # a recipe for any model
    with pytest.raises(ConfigError, match="unknown model or recipe 'small_dino_r50'"):
        load_config("small_dino_r50")


@pytest.mark.parametrize("folder", ["parts/sizes", "parts/recipes", "recipes"])
def test_files_of_sizes_and_recipes_say_what_hardware_they_are_for(folder: str) -> None:
    files = list((Path(paqdetr.__file__).parent / "configs" / folder).glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert "hardware" in " ".join(head).lower() or "two CPU cores" in head[0], file.name
        if folder == "recipes":
            assert any(f"paqdetr train {file.stem} --data" in line for line in head)


def test_published_figures_are_of_models() -> None:
    assert set(known_figures("published")) <= set(list_configs("model"))
    assert set(known_figures("measured")) <= set(list_configs("model"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.queries": "proposals"}, "queries=proposals needs position_embedding=fixed"),
        ({"model.positions": "points"}, "position_embedding=refined needs positions=proposals or anchors"),
        (
            {"model.positions": "anchors", "model.position_embedding": "fixed", "model.denoising": "none"},
            "position_embedding=fixed needs positions=proposals or points",
        ),
        ({"model.box_refinement": False}, "box_refinement=false needs positions=points"),
        ({"model.position_embedding": "fixed"}, "denoising=contrastive needs position_embedding=refined"),
        (
            {"model.positions": "anchors", "model.class_agnostic_proposals": True},
            "class_agnostic_proposals=true needs positions=proposals",
        ),
        ({"model.positions": "anchors", "model.hybrid_queries": 5}, "hybrid_queries=5 needs positions=proposals"),
        (
            {"model.auxiliary_heads": ["atss"], "model.denoising": "none", "model.position_embedding": "fixed"},
            "auxiliary_heads=['atss'] needs position_embedding=refined",
        ),
        ({"model.auxiliary_heads": ["atss", "atss"]}, "auxiliary_heads=['atss', 'atss'] needs each head once"),
        (
            {
                "model.positions": "points",
                "model.position_embedding": "fixed",
                "model.denoising": "none",
                "model.box_refinement": False,
            },
            "look_forward_twice=true needs box_refinement=true",
        ),
        (
            {"model.scale_positions": True, "model.position_embedding": "fixed", "model.denoising": "none"},
            "scale_positions=true needs position_embedding=refined",
        ),
        (
            {"model.queries": "patterns", "model.mixture": "residual", "model.pattern_std": 0.0},
            "mixture=residual needs pattern_std above 0",
        ),
        ({"model.hybrid_ratio": 0.001}, "hybrid_ratio=0.001 needs num_queries * hybrid_ratio of at least 1"),
    ],
)
def test_combinations_that_no_host_has(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("dino_r50", overrides)
    assert message in raised.value.message


# --- numbers past a type


def test_every_whole_number_has_a_range() -> None:
    """A setting of 10^9 layers, positives or workers would take all memory, or never end."""
    for section in (Config, ModelConfig, LossConfig, AugmentConfig):
        for name, field in section.model_fields.items():
            if field.annotation in (int, int | None):
                bounds = {key for rule in field.metadata for key in ("ge", "le") if hasattr(rule, key)}
                assert bounds == {"ge", "le"}, name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=9223372036854775808", "seed=9223372036854775808: Input should be less than or equal to 4294967295"),
        ("epochs='3'", "epochs='3': Input should be a valid integer"),
        ("lr=1e400", "lr: 1e400 is beyond the largest number"),
        (f"epochs={'9' * 90}", "Input should be less than or equal to 1000000"),
        ("image_size=1000000000", "expected one number from 32 to 16384"),
        ("augment.flip=1", ""),
        ("pretrained_backbone=0", "pretrained_backbone=0: Input should be a valid boolean"),
        ("model.backbone_strides=[0,8]", "expected at least one stride from 1 to 1024"),
    ],
)
def test_numbers_past_their_type_or_range(setting: str, message: str) -> None:
    if not message:
        assert load_config("dino_nano", [setting]).augment.flip == 1
        return
    with pytest.raises(ConfigError) as caught:
        load_config("dino_nano", [setting])
    assert message in caught.value.message and "\n" not in caught.value.message


def test_dotted_keys_of_a_file_mean_the_same_as_sections(tmp_path: Path) -> None:
    text = "base: dino_nano\nmodel.num_queries: 50\nmodel: {num_classes: 3}\nloss.gamma: 0.2\n"
    config = load_config(write(tmp_path, "mine.yaml", text))
    assert (config.model.num_queries, config.model.num_classes, config.loss.gamma) == (50, 3, 0.2)


def test_a_checkpoint_to_start_from_may_be_a_path(tmp_path: Path) -> None:
    assert load_config("dino_nano", {"init": tmp_path / "best.safetensors"}).init == str(tmp_path / "best.safetensors")


def test_settings_written_down_train_on_any_data(tmp_path: Path, tiny_digits: Path) -> None:
    data = open_split(tiny_digits, "train")
    path = write(tmp_path, "config.yaml", load_config("dino_nano").to_yaml())
    assert with_classes(load_config(path), data).model.num_classes == 10
    path = write(tmp_path, "config.yaml", load_config("dino_nano", ["model.num_classes=80"]).to_yaml())
    with pytest.raises(ConfigError, match="num_classes=80"):  # whoever writes the default means it
        with_classes(load_config(path), data)
