"""What can be set when PaQ is attached; written to the model's config.json, so that a saved model can be built again."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from paqdetr.config import LossConfig, ModelConfig
from paqdetr.config.model import Section
from paqdetr.errors import ConfigError
from paqdetr.text import did_you_mean


def _as_in(section: type[Section], key: str) -> Any:
    """Default and range of a setting of ours."""
    return copy(section.model_fields[key])


class PaqSettings(Section):
    """How PaQ is attached. What is not described here is the setting of that name of `paqdetr.config` (docs/settings.md).

    Attributes:
        mode: "residual", content + gate * mixture; "replace", the mixture alone; "none", the host's own content.
        gate: initial value of the gate, a learned factor for each channel. At 0 the model gives what it gave before. Patterns
            then get their first gradient in the second step, once the gate has moved; with gate=1 and pattern_std=0 the output is
            unchanged as well and the patterns move first.
        conv: `model.extractor_conv`.
        assigner: of all decoder layers but the last: "quality_aware", "simota", "fixed_k", or "none" for the host's own.
        classification: loss of the layers under one-to-many assignment: "host"; or, where the host has focal loss, "varifocal",
            the paper's.

    Raises:
        ConfigError: an unknown setting, a value out of its range, or settings that do not go together.
    """

    mode: Literal["residual", "replace", "none"] = "residual"
    gate: float = 0.0
    num_patterns: int = _as_in(ModelConfig, "num_patterns")
    extractor: Literal["fused", "pooled"] = _as_in(ModelConfig, "extractor")
    conv: Literal["depthwise", "full"] = _as_in(ModelConfig, "extractor_conv")
    head: Literal["dense", "factorised"] = _as_in(ModelConfig, "head")
    head_rank: int = _as_in(ModelConfig, "head_rank")
    temperature: float = _as_in(ModelConfig, "temperature")
    gain: float = _as_in(ModelConfig, "gain")
    bias_std: float | None = _as_in(ModelConfig, "bias_std")
    pattern_std: float = _as_in(ModelConfig, "pattern_std")
    assigner: Literal["quality_aware", "simota", "fixed_k", "none"] = "quality_aware"
    gamma: float = _as_in(LossConfig, "gamma")
    top_k: int = _as_in(LossConfig, "top_k")
    min_positives: int = _as_in(LossConfig, "min_positives")
    select: Literal["hungarian", "score"] = _as_in(LossConfig, "select")
    confidence: Literal["gt_class", "max"] = _as_in(LossConfig, "confidence")
    classification: Literal["host", "varifocal"] = "host"
    diversity_weight: float = _as_in(LossConfig, "diversity_weight")
    div_scale: float = _as_in(LossConfig, "div_scale")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explained(error) from None

    @model_validator(mode="after")
    def _consistent(self) -> PaqSettings:
        if self.mode == "none" and self.assigner == "none":
            raise ConfigError("mode and assigner are both 'none': nothing would be attached", "set one of them")
        if self.mode == "residual" and self.gate == 0 and self.pattern_std == 0:
            raise ConfigError(
                "gate=0 and pattern_std=0: neither would ever get a gradient", "start one of them away from zero"
            )
        if self.classification == "varifocal" and self.assigner == "none":
            raise ConfigError(
                "classification='varifocal' is for layers under one-to-many assignment, and assigner='none' makes none",
                "choose an assigner",
            )
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> PaqSettings:
        """Settings by name; `where` names their origin in errors.

        Raises:
            ConfigError: as the class itself.
        """
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.args[0]}", error.remedy) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for json."""
        return self.model_dump()


def _explained(error: ValidationError) -> ConfigError:
    """One line about the first complaint."""
    first = error.errors()[0]
    key, known = ".".join(map(str, first["loc"])), list(PaqSettings.model_fields)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown setting {key!r}", did_you_mean(key, known, f"known are {', '.join(known)}"))
    if first["type"] == "literal_error":
        return ConfigError(f"{key}={first['input']!r} is not known", f"give {first.get('ctx', {})['expected']}")
    return ConfigError(f"{key}={first['input']!r}: {first['msg']}", "docs/settings.md lists the range of each setting")
