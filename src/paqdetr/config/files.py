"""Settings from YAML files inside and outside the package, laid over one another.

A YAML file may name a `base` whose settings it changes, or a list of them, the later over the earlier, and
`preset: paper`, the literal paper, laid over its bases. Later wins: defaults < bases < preset of the file < file <
preset among the overrides < other `key=value` overrides.

Names are parsed: a model is `[paq_]{host}_{size}`, put together from `configs/parts/hosts`, `configs/parts/sizes`, what the
host has at this size alone (`configs/parts/{host}_{size}.yaml`, if there is one) and `configs/parts/paq*.yaml`; a recipe trains
a model otherwise, `{model}_{recipe}` with a file in `configs/parts/recipes`, or has a file of its own in `configs/recipes`. So a
host is one file.
"""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from paqdetr.config.model import ModelConfig
from paqdetr.config.schema import Config, LossConfig, known_fields
from paqdetr.errors import ConfigError
from paqdetr.files import read_text
from paqdetr.other_programs import what_to_write
from paqdetr.text import did_you_mean, shorten
from paqdetr.yaml_files import as_mapping, parse_value, parse_yaml

_MAX_FILE = 2**16  # bytes
_MAX_BASES = 64
# What parts say about themselves: a title for `config list`; of a size its training; the sizes of a host, all by default; the
# models that a recipe is listed for.
_ABOUT = ("title", "training", "sizes", "models")


def list_configs(kind: Literal["all", "model", "recipe"] = "all", pattern: str = "*") -> list[str]:
    """Names of the settings that come with the package, sorted: models, and recipes that train one for a certain purpose.

    Args:
        kind: which of them.
        pattern: a wildcard such as "paq_*".
    """
    names = {"model": list(_models()), "recipe": _recipes()}
    return fnmatch.filter(sorted(names.get(kind) or names["model"] + names["recipe"]), pattern)


def load_config(source: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Settings from a model's name or a YAML file, with overrides.

    Args:
        source: a name of `list_configs()` or a path that ends in .yaml.
        overrides: `key=value` strings (dotted keys, see `parse_overrides`), or a mapping of dotted keys to values.

    Raises:
        ConfigError: a file that cannot be read, or not as YAML; more than 64 bases; unknown name, key or value, naming it and
            the nearest known one; a file that says no model; `preset=paper` without any part of PaQ.
    """
    pairs = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    where = str(source)
    merged = _Bases(with_presets="preset" not in pairs).settings(where)
    if "model" not in merged:  # every model of the package has settings of its own
        raise ConfigError(
            f"{where}: names no model, neither by `base` nor by settings under `model`",
            "begin it with a line such as base: paq_dino_nano",
        )
    merged = _merge(merged, _read_preset(pairs.get("preset")))
    for key, value in pairs.items():
        merged = _merge(merged, _nest(key, value))
    merged.setdefault("name", Path(source).stem)
    config = validate_config(merged, where)
    _require_paq_under_preset(config, where)
    return config


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """`key=value` strings -> dotted keys and values: numbers, true, false, null, YAML lists and mappings, or else text as typed.

    Raises:
        ConfigError: a string without a key or an equals sign, or a list or mapping that `paqdetr.yaml_files` refuses.
    """
    return dict(map(_parse_override, texts))


def validate_config(values: Mapping[str, Any], where: str) -> Config:
    """A `Config` from nested values; `where` names their origin in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from None


def command_to_resume(run: Path, *, names_data: bool = True) -> str:
    """The command that goes on with the run in a folder, with its own settings, and with its own data if it names them."""
    return f"paqdetr train {shlex.quote(str(run))} --resume{'' if names_data else ' --data DIR'}"


def known_keys() -> list[str]:
    """Every dotted key that can be set."""
    return list(known_fields())


def retired_keys() -> list[str]:
    """Dotted keys of older versions, which files may still carry at the value at which they did nothing."""
    sections = {"": Config, "model.": ModelConfig, "loss.": LossConfig}
    return [prefix + key for prefix, section in sections.items() for key in section.retired]


def describe_config(name: str) -> str:
    """One line on a model or recipe that comes with the package: what it is, and what it is trained on.

    Raises:
        ConfigError: unknown name.
    """
    if name in _files("recipes"):
        return _files("recipes")[name].read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
    model, _ = _parse(name)
    return f"{_part(_models()[model][0])['title']}{' with PaQ' if model.startswith('paq_') else ''}, {describe_training(name)}."


def is_name(text: str) -> bool:
    """Whether a model or recipe that comes with the package is called so."""
    try:
        return text in _files("recipes") or bool(_parse(text))
    except ConfigError:
        return False


def describe_training(name: str) -> str:
    """What sets a model or recipe apart from others of its host: its size, and what it is trained on."""
    if name in _files("recipes"):
        return describe_config(name).removesuffix(".")
    model, recipe = _parse(name)
    size = _models()[model][1]
    training = _part(recipe)["title"] if recipe else _part(size).get("training")
    return ", ".join(filter(None, (_part(size)["title"], training)))


def hosts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Title of each host -> those of the models and recipes that are built on it, in their order."""
    hosts: dict[str, list[str]] = {}
    for name in names:
        model: Any = name
        while model in _files("recipes"):
            base = _settings_of(model)["base"]
            model = base if isinstance(base, str) else base[0]
        hosts.setdefault(_part(_models()[_parse(model)[0]][0])["title"], []).append(name)
    return hosts


@cache
def known_figures(kind: Literal["published", "measured", "costs"]) -> dict[str, Any]:
    """Figures by model name: `published` AP on COCO val2017 after 12 epochs; `measured`, rows of data, AP, AP50 (test split) and
    settings in which the run differed from today's model; `costs`, the parameters, trainable parameters and FLOPs that
    `model_cost` counts for 800 x 1333 pixels."""
    return _read_yaml((_config_dir() / f"{kind}.yaml").read_text(encoding="utf-8"), kind)


def _config_dir():  # type: ignore[no-untyped-def]  # a Traversable, which typeshed moved between modules
    return files("paqdetr") / "configs"


def _files(folder: str) -> dict[str, Any]:
    """Files of `configs/{folder}` by name."""
    entries = {entry.name: entry for entry in (_config_dir() / folder).iterdir()}
    return {name.removesuffix(".yaml"): entry for name, entry in entries.items() if name.endswith(".yaml")}


@cache
def _part(name: str) -> dict[str, Any]:
    """The file of a host, a size, a recipe for any model, or another part."""
    for folder in ("hosts", "sizes", "recipes", ""):
        found = _files(f"parts/{folder}")
        if name in found:
            return _read_yaml(found[name].read_text(encoding="utf-8"), f"parts/{name}")
    raise ConfigError(f"unknown part 'parts/{name}'", "docs/hosts.md lists hosts and sizes")


@cache
def _models() -> dict[str, tuple[str, ...]]:
    """Name of each model -> the parts it is put together from."""
    sizes, others, models = _files("parts/sizes"), _files("parts"), {}
    for host in _files("parts/hosts"):
        for size in _part(host).get("sizes", sizes):
            name = f"{host}_{size}"
            models[name] = (host, size, *([name] if name in others else []))
            models[f"paq_{name}"] = (*models[name], f"paq_{size}" if f"paq_{size}" in others else "paq")
    return models


def _recipes() -> list[str]:
    """Recipes with a file of their own, and those that a recipe for any model is listed for."""
    names = list(_files("recipes"))
    for recipe in _files("parts/recipes"):
        for model in _part(recipe)["models"]:
            names += [f"{model}_{recipe}", f"paq_{model}_{recipe}"]
    return names


def _parse(name: str) -> tuple[str, str | None]:
    """`[paq_]{host}_{size}[_{recipe}]` -> model and recipe.

    Raises:
        ConfigError: it is no such name.
    """
    for recipe in (None, *_files("parts/recipes")):
        model = name.removesuffix(f"_{recipe}")
        if model in _models() and (recipe is None or model != name):
            return model, recipe
    no_path = ", and no such file or folder" if len(Path(name).parts) > 1 else ""
    raise ConfigError(
        f"unknown model or recipe {name!r}{no_path}",
        did_you_mean(name, list_configs(), "`paqdetr config list` lists what there is"),
    )


def _read_preset(name: Any) -> dict[str, Any]:
    """The settings of a preset; none if the name is None."""
    if name is None:
        return {}
    entry = _config_dir() / "presets" / f"{name}.yaml"
    if not entry.is_file():
        raise ConfigError(f"preset: unknown preset {name!r}", "the only preset is 'paper'")
    return _read_yaml(entry.read_text(encoding="utf-8"), f"preset {name}")


def _require_paq_under_preset(config: Config, where: str) -> None:
    """The preset changes PaQ's settings; a host without PaQ would get another loss and keep the name of the paper."""
    if config.preset and config.model.queries != "patterns" and config.loss.assigner != "quality_aware":
        raise ConfigError(
            f"{where}: preset={config.preset} on a model without PaQ (model.queries={config.model.queries}, "
            f"loss.assigner={config.loss.assigner})",
            "take the paq_* model of this host, or switch on model.queries=patterns or loss.assigner=quality_aware",
        )
    if config.preset and config.loss.assigner not in ("one_to_one", "quality_aware"):
        raise ConfigError(
            f"{where}: preset={config.preset} with loss.assigner={config.loss.assigner}, which the paper does not have",
            "leave out one of the two, or set loss.assigner=quality_aware",
        )


class _Bases:
    """Reads settings files and their bases, each file once."""

    def __init__(self, *, with_presets: bool) -> None:
        self.with_presets = with_presets
        self.known: dict[str, dict[str, Any]] = {}
        self.open: list[str] = []
        self.count = 0

    def settings(self, source: str) -> dict[str, Any]:
        """The settings of `source` laid over those of its preset and its bases."""
        # The same file by whatever name.
        key = str(Path(source).resolve()) if source.endswith((".yaml", ".yml")) else source
        if key in self.open:
            raise ConfigError(
                f"{source}: `base` leads back to itself ({' -> '.join(self.open)})", "remove one of the bases"
            )
        if key not in self.known:
            self.open.append(key)
            self.known[key] = self._read(source)
            self.open.pop()
        return self.known[key]

    def _read(self, source: str) -> dict[str, Any]:
        values = _nested(_settings_of(source), source)
        bases = values.pop("base", None) or []
        inherited: dict[str, Any] = {}
        for base in bases if isinstance(bases, list) else [bases]:
            self.count += 1
            if self.count > _MAX_BASES:
                raise ConfigError(
                    f"{source}: more than {_MAX_BASES} bases, counting those of bases",
                    "write settings of several files into one",
                )
            base = str(base)
            if base.endswith((".yaml", ".yml")):  # beside the file that names it, wherever the program runs
                base = str(Path(source).parent / base)
            below = {key: value for key, value in self.settings(base).items() if key != "name"}
            inherited = _merge(inherited, below)
        if self.with_presets:
            inherited = _merge(inherited, _read_preset(values.get("preset")))
        return _merge(inherited, values)


def _settings_of(source: str) -> dict[str, Any]:
    """What stands behind a path, or the name of a model, a recipe or a part ("parts/dino"), without its bases' settings."""
    if source.endswith((".yaml", ".yml")):
        return _read_yaml(read_text(Path(source), limit=_MAX_FILE, error=ConfigError), source)
    if (advice := _to_train_from(source)) is not None:
        raise ConfigError(f"{source}: a checkpoint, in the place of a model or recipe", advice)
    if source.startswith("parts/"):
        part = _part(source.removeprefix("parts/"))
        return {key: value for key, value in part.items() if key not in _ABOUT}
    if source in _files("recipes"):
        return _read_yaml(_files("recipes")[source].read_text(encoding="utf-8"), source)
    model, recipe = _parse(source)
    return {"base": [model, f"parts/{recipe}"] if recipe else [f"parts/{part}" for part in _models()[model]]}


def _to_train_from(source: str) -> str | None:
    """How a training begins from, or goes on with, the checkpoint or run at a path; None if there is none."""
    path, is_folder = Path(source), False
    with suppress(OSError):  # of a text that is too long for a path
        is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    if not source.endswith(".safetensors") and not (is_folder and any(path.glob("*.safetensors"))):
        return None
    starts = f"`paqdetr train MODEL init={source}` starts from these weights"
    is_run = (folder / "config.yaml").is_file() and (folder / "environment.json").is_file()
    if not is_run:
        return f"name the model; {starts}"
    return f"`{command_to_resume(folder)}` goes on with the run; {starts}; its settings are in {folder / 'config.yaml'}"


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    return as_mapping(parse_yaml(text, where), where)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        if not equals and (advice := _to_train_from(text)) is not None:
            raise ConfigError(f"{text}: a checkpoint, in the place of a setting", advice)
        raise ConfigError(f"{shorten(text)} is not a setting", "write settings as key=value, for example epochs=12")
    return key, parse_value(value, key)


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _nested(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a file, whose dotted keys mean the same as sections.

    Raises:
        ConfigError: one is given both ways.
    """
    nested: dict[str, Any] = {}
    for key, value in values.items():
        nested = _joined(nested, _nest(key, value) if isinstance(key, str) else {key: value}, where)
    return nested


def _joined(one: Mapping[str, Any], other: Mapping[str, Any], where: str, section: str = "") -> dict[str, Any]:
    joined = dict(one)
    for key, value in other.items():
        if key not in joined:
            joined[key] = value
        elif isinstance(old := joined[key], Mapping) and isinstance(value, Mapping):
            joined[key] = _joined(old, value, where, f"{section}{key}.")
        else:
            raise ConfigError(f"{where}: {section}{key} is given twice", "give it in its section or as a dotted key")
    return joined


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explain(error: ValidationError, where: str) -> ConfigError:
    """One line about the first of pydantic's complaints."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part not in ("int", "tuple[int, int]"))
    if first["type"] == "extra_forbidden":
        known = known_keys()
        if (advice := what_to_write(key)) is not None:
            return ConfigError(f"{where}: unknown setting {key!r}", advice)
        leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        remedy = (
            f"did you mean {leaf[0]!r}?"
            if leaf
            else did_you_mean(key, known, "`paqdetr config show MODEL` lists what there is")
        )
        return ConfigError(f"{where}: unknown setting {key!r}", remedy)
    message = first["msg"].removeprefix("Value error, ")
    subject = f"{key}={shorten(first['input'])}" if key and not isinstance(first["input"], Mapping) else key
    detail = f"{subject}: {message}" if subject else message
    remedy = "`paqdetr config show MODEL` prints every setting as resolved; docs/settings.md says what each takes"
    lists = [other["input"] for other in error.errors() if other["type"] == "tuple_type"]
    if isinstance(given := first["input"], str) and given in lists and ("," in given or first["type"] == "tuple_type"):
        remedy = f"a list is written in brackets: {key}=[{given}]"
    return ConfigError(f"{where}: {detail}", remedy)
