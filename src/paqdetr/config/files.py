"""Settings from YAML files inside and outside the package, laid over one another.

A YAML file may name a `base` whose settings it changes, or a list of them, the later over the earlier, and
`preset: paper`, the literal paper, laid over its bases. Later wins: defaults < bases < preset of the file < file <
preset among the overrides < other `key=value` overrides.

Inside the package: `configs/models` one file a model, with its COCO recipe; `configs/parts` what models are put together
from (hosts, sizes, PaQ); `configs/recipes` other trainings of a model; `configs/presets`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from paqdetr.config.loss import LossConfig
from paqdetr.config.model import ModelConfig
from paqdetr.config.schema import Config, known_fields
from paqdetr.errors import ConfigError
from paqdetr.files import read_text
from paqdetr.text import did_you_mean, shorten
from paqdetr.yaml_files import as_mapping, parse_value, parse_yaml

_MAX_FILE = 2**16  # bytes
_MAX_BASES = 64


def list_configs(kind: Literal["all", "model", "recipe"] = "all", pattern: str = "*") -> list[str]:
    """Names of the settings that come with the package, sorted: models, and recipes that train one for a certain purpose.

    Args:
        kind: which of them.
        pattern: a wildcard such as "paq_*".
    """
    folders = {"model": ["models"], "recipe": ["recipes"]}.get(kind, ["models", "recipes"])
    entries = [entry.name for folder in folders for entry in (_config_dir() / folder).iterdir()]
    names = sorted(name.removesuffix(".yaml") for name in entries if name.endswith(".yaml"))
    return fnmatch.filter(names, pattern)


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
    first = _text_of(name).partition("\n")[0]
    return first.removeprefix("#").strip()


def known_figures(kind: Literal["published", "measured", "costs"]) -> dict[str, Any]:
    """Figures by model name: `published` AP on COCO val2017 after 12 epochs; `measured`, rows of data, AP, AP50 (test split);
    `costs`, the parameters, trainable parameters and FLOPs that `model_cost` counts for 800 x 1333 pixels."""
    return _read_yaml((_config_dir() / f"{kind}.yaml").read_text(encoding="utf-8"), kind)


def _config_dir():  # type: ignore[no-untyped-def]  # a Traversable, which typeshed moved between modules
    return files("paqdetr") / "configs"


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
    assigners = (config.loss.assigner, config.loss.encoder_assigner)
    if config.preset and config.model.queries != "patterns" and "quality_aware" not in assigners:
        raise ConfigError(
            f"{where}: preset={config.preset} on a model without PaQ (model.queries={config.model.queries}, "
            f"loss.assigner={config.loss.assigner})",
            "take the paq_* model of this host, or switch on model.queries=patterns or loss.assigner=quality_aware",
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
                f"{source}: `base` leads back to itself ({' -> '.join(self.open)})",
                "remove one of the bases",
            )
        if key not in self.known:
            self.open.append(key)
            self.known[key] = self._read(source)
            self.open.pop()
        return self.known[key]

    def _read(self, source: str) -> dict[str, Any]:
        values = _read_yaml(_text_of(source), source)
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


def _text_of(source: str) -> str:
    """The YAML behind a path, or behind the name of a model, a recipe or a part ("parts/dino")."""
    if source.endswith((".yaml", ".yml")):
        return read_text(Path(source), limit=_MAX_FILE, error=ConfigError)
    folder = Path(source)
    if source.endswith(".safetensors") or (folder.is_dir() and any(folder.glob("*.safetensors"))):
        raise ConfigError(
            f"{source}: a checkpoint, in the place of a model or recipe",
            f"name the model; `paqdetr train MODEL init={source}` starts from these weights",
        )
    for name in (f"models/{source}", f"recipes/{source}", source):
        entry = _config_dir().joinpath(*f"{name}.yaml".split("/"))
        if entry.is_file() and (name != source or source.startswith("parts/")):
            return entry.read_text(encoding="utf-8")
    raise ConfigError(
        f"unknown model or recipe {source!r}",
        did_you_mean(source, list_configs(), "`paqdetr config list` lists what there is"),
    )


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    return as_mapping(parse_yaml(text, where), where)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{shorten(text)} is not a setting", "write settings as key=value, for example epochs=12")
    return key, parse_value(value, key)


def _nest(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


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
    return ConfigError(f"{where}: {detail}", remedy)
