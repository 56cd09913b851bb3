"""What can be set when PaQ is attached; written to the model's config.json, so that a saved model can be built again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from paqdetr.errors import ConfigError
from paqdetr.paq import Assigner, CostWeights, FixedKAssigner, QualityAwareAssigner, SimOTAAssigner
from paqdetr.text import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class PaqSettings:
    """How PaQ is attached.

    Attributes:
        mode: "residual", content + gate * mixture; "replace", the mixture alone; "none", the host's own content.
        gate: initial value of the gate, a learned factor for each channel. At 0 the model gives what it gave before. Patterns
            then get their first gradient in the second step, once the gate has moved; with gate=1 and pattern_std=0 the output is
            unchanged as well and the patterns move first.
        num_patterns, extractor, conv, head, head_rank, temperature, gain, bias_std, pattern_std: of `paqdetr.paq.PatternQueries`.
        assigner: of all decoder layers but the last: "quality_aware", "simota", "fixed_k", or "none" for the host's own.
        gamma, top_k, min_positives, select, confidence: of the assigner. `fixed_k` gives every box top_k positives; where
            `quality_aware` selects by score, `simota` selects by cost.
        classification: loss of the layers with several positives: "host"; or, where the host has focal loss, "varifocal", the
            paper's.
        diversity_weight, div_scale: the loss gains their product times L_div.
    """

    mode: Literal["residual", "replace", "none"] = "residual"
    gate: float = 0.0
    num_patterns: int = 64
    extractor: Literal["fused", "pooled"] = "fused"
    conv: Literal["depthwise", "full"] = "depthwise"
    head: Literal["dense", "factorised"] = "dense"
    head_rank: int = 32
    temperature: float = 1.0
    gain: float = 1.0
    bias_std: float | None = 2.0
    pattern_std: float = 1.0
    assigner: Literal["quality_aware", "simota", "fixed_k", "none"] = "quality_aware"
    gamma: float = 0.4
    top_k: int = 4
    min_positives: int = 1
    select: Literal["hungarian", "score"] = "hungarian"
    confidence: Literal["gt_class", "max"] = "gt_class"
    classification: Literal["host", "varifocal"] = "host"
    diversity_weight: float = 0.2
    div_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(PaqSettings).items():
            allowed, value = get_args(hint), getattr(self, name)
            if allowed and isinstance(allowed[0], str) and value not in allowed:
                raise ConfigError(f"{name}={value!r} is not known", f"give one of {', '.join(allowed)}")
        if self.mode == "none" and self.assigner == "none":
            raise ConfigError("mode and assigner are both 'none': nothing would be attached", "set one of them")
        if self.mode == "residual" and self.gate == 0 and self.pattern_std == 0:
            raise ConfigError(
                "gate=0 and pattern_std=0: neither would ever get a gradient",
                "start one of them away from zero",
            )
        if self.classification == "varifocal" and self.assigner == "none":
            raise ConfigError(
                "classification='varifocal' is for layers with several positives, and assigner='none' makes none",
                "choose an assigner",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> PaqSettings:
        """Settings by name; `where` names their origin in errors.

        Raises:
            ConfigError: an unknown name or value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{where}: unknown setting {name!r}",
                    did_you_mean(name, known, f"known are {', '.join(known)}"),
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for json."""
        return dataclasses.asdict(self)

    def build_assigner(self, cost_weights: CostWeights) -> Assigner | None:
        """The assigner of the layers before the last; None leaves them to the host."""
        if self.assigner == "quality_aware":
            return QualityAwareAssigner(
                self.gamma,
                self.top_k,
                self.min_positives,
                self.select,
                self.confidence,
                cost_weights=cost_weights,
            )
        if self.assigner == "simota":
            select = "cost" if self.select == "score" else "hungarian"
            return SimOTAAssigner(self.top_k, self.min_positives, select, cost_weights=cost_weights)
        if self.assigner == "fixed_k":
            return FixedKAssigner(self.top_k, cost_weights=cost_weights)
        return None
