"""PaQ inside a detector of transformers: a module of the model with two seams, the decoder's input and the loss function; and its
settings, which are written to the model's config.json, so that a saved model can be built again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, Literal

import torch
from pydantic import ValidationError, model_validator
from torch import Tensor, nn

from paqdetr.config import LossConfig, ModelConfig
from paqdetr.config.model import Section
from paqdetr.errors import ConfigError
from paqdetr.integrations.transformers.hosts import Host
from paqdetr.integrations.transformers.losses import OneToManyCriterion, with_another
from paqdetr.paq import Mixture, PatternQueries
from paqdetr.paq.assignment import ASSIGNERS
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
        if self.assigner in ("quality_aware", "simota") and self.min_positives > self.top_k:
            raise ConfigError(
                f"min_positives={self.min_positives} exceeds top_k={self.top_k}", "lower min_positives, or raise top_k"
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


class PaqPlugin(nn.Module):
    """What `attach` puts at `model.paq`: the patterns, their network, the gate, and how the loss matches.

    Its methods are registered as they are, bound: a deep copy or a pickle of the model keeps its own.

    Attributes:
        queries: the pattern queries; None with mode="none".
        gate: (d,) parameter of the residual form; None otherwise.
        one_to_many: whether intermediate layers use the assigner now; `OneToManyUntil` switches it off during a training.
        positives_per_box: of each intermediate layer, in the last step that computed a loss; empty if the batch had no boxes.
    """

    gate: nn.Parameter | None

    def __init__(self, host: Host, config: Any, settings: PaqSettings) -> None:
        super().__init__()
        if settings.classification == "varifocal" and not host.focal:
            raise ConfigError(
                "classification='varifocal': this model has varifocal loss already, in all of its layers",
                "leave the setting out",
            )
        self.host = host
        self.settings = settings
        self.one_to_many = settings.assigner != "none"
        self.positives_per_box: list[float] = []
        self._host_loss: Callable[..., Any] | None = None
        self._loss_was_set = False
        self._map_size: tuple[int, int] | None = None
        self._handles: list[Any] = []
        self.cost_weights = host.cost_weights(config) if self.one_to_many else None
        self.assigner = None
        if self.cost_weights is not None:
            self.assigner = ASSIGNERS[settings.assigner](settings, self.cost_weights)
        self.queries = None
        self.register_parameter("gate", None)
        if settings.mode == "none":
            return
        dim = int(getattr(config, host.dim))
        self.queries = settings.build(
            PatternQueries, num_queries=host.num_queries(config), dim=dim, num_levels=host.num_levels(config)
        )
        if settings.mode == "residual":
            self.gate = nn.Parameter(torch.full((dim,), float(settings.gate)))

    def extra_repr(self) -> str:
        return f"mode={self.settings.mode}, assigner={self.settings.assigner}"

    def insert(self, model: Any) -> None:
        """Take both seams of the model; `remove` gives them back.

        Raises:
            ConfigError: the loss of this model has no place for the assigner.
        """
        if self.assigner is not None:
            with_another(model.loss_function, self.host.criterion, lambda original: original)  # or an error
            if not model.config.auxiliary_loss:
                raise ConfigError(
                    "auxiliary_loss=False: this model has no loss for intermediate layers, so there is nothing to assign",
                    "set model.config.auxiliary_loss = True, or attach with assigner='none'",
                )
        if self.queries is not None:
            decoder = model.model.decoder
            self._handles.append(decoder.register_forward_pre_hook(self.mix_into_content, with_kwargs=True))
            if self.host.single_level:
                projection = model.model.input_projection
                self._handles.append(projection.register_forward_hook(self.remember_map_size))
        self._host_loss = model.loss_function
        self._loss_was_set = "_loss_function" in model.__dict__
        model.loss_function = self.loss

    def remove(self, model: Any) -> None:
        """Undo `insert`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        del model._loss_function  # its class finds its own again
        if self._loss_was_set:
            model.loss_function = self._host_loss

    def remember_map_size(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the projection of single-level hosts: (B, d, h, w) -> (h, w)."""
        self._map_size = (output.shape[-2], output.shape[-1])

    def mix_into_content(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the decoder: its content queries (B, N, d), of which the last n are not for denoising."""
        if "inputs_embeds" not in kwargs or "encoder_hidden_states" not in kwargs:
            raise ConfigError(
                f"this release of transformers calls {type(decoder).__name__} in a way that is not known here",
                "install a release that paqdetr's `transformers` extra allows",
            )
        assert self.queries is not None
        content, own = kwargs["inputs_embeds"], self.queries.num_queries
        if self.host.num_queries(decoder.config) != own:
            raise ConfigError(
                f"the model now has {self.host.num_queries(decoder.config)} queries, PaQ was attached with {own}",
                "call model.paq.queries.resize(n), with ranked=True if the model is two-stage, then make the optimiser",
            )
        if content.shape[1] < own:
            raise ConfigError(
                f"the decoder is given {content.shape[1]} content queries, PaQ and the model's config have {own}",
                "resize the model's own query embeddings to that number as well",
            )
        mixture: Mixture = self.queries(*self.host.memory(kwargs, self._map_size))
        first = content.shape[1] - own
        if self.gate is None:
            mixed = mixture.content.to(content.dtype)
        else:
            mixed = content[:, first:] + (self.gate * mixture.content).to(content.dtype)
        if first:
            mixed = torch.cat([content[:, :first], mixed], dim=1)
        return args, {**kwargs, "inputs_embeds": mixed}

    def loss(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        """The host's loss function, with the assigner's pairs in the intermediate layers, plus the diversity of the patterns."""
        assert self._host_loss is not None
        function, built = self._host_loss, list[OneToManyCriterion]()
        if self.one_to_many and self.assigner is not None and self.cost_weights is not None:
            settings: dict[str, Any] = dict(
                assigner=self.assigner,
                cost_weights=self.cost_weights,
                encoder_logits=kwargs.get("enc_topk_logits"),
                varifocal=self.settings.classification == "varifocal",
            )

            def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
                def build(*inner: Any, **options: Any) -> OneToManyCriterion:
                    built.append(OneToManyCriterion(original(*inner, **options), **settings))
                    return built[-1]

                return build

            function = with_another(function, self.host.criterion, wrap)
        total, terms, auxiliary = function(*args, **kwargs)
        boxes = sum(len(row["class_labels"]) for row in args[1])
        self.positives_per_box = [count / boxes for criterion in built for count in criterion.positives if boxes]
        weight = self.settings.diversity_weight * self.settings.div_scale
        if self.queries is not None and weight:
            terms = {**terms, "loss_diversity": weight * self.queries.aux_losses()["diversity"]}
            total = total + terms["loss_diversity"]
        return total, terms, auxiliary
