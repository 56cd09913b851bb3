"""Settings that somebody gave and that change nothing, because another setting switches off what they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from paqdetr.config.schema import Config

_MIXED = ("patterns", "static_mixture")
_ALL_ASSIGNERS = ("quality_aware", "fixed_k", "simota")


def _several(config: Config, *names: str) -> bool:
    """Whether one of these assigners is at work."""
    encoder = config.model.positions == "proposals" and config.loss.encoder_assigner in names
    return encoder or (config.model.decoder_layers > 1 and config.loss.assigner in names)


# (settings, what they need, whether a config has it). A setting may stand in several rows, and needs them all.
_NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[Config], bool]], ...] = (
    (
        (
            "model.num_patterns",
            "model.pattern_std",
            "model.temperature",
            "model.bias_std",
            "loss.diversity_weight",
            "loss.div_scale",
        ),
        "model.queries=patterns or static_mixture",
        lambda config: config.model.queries in _MIXED,
    ),
    (
        (
            "model.extractor",
            "model.extractor_conv",
            "model.head",
            "model.head_rank",
            "model.gain",
            "model.normalize_summary",
            "model.mixture_input",
        ),
        "model.queries=patterns",
        lambda config: config.model.queries == "patterns",
    ),
    (
        (
            "model.extractor",
            "model.extractor_conv",
            "model.head",
            "model.head_rank",
            "model.normalize_summary",
        ),
        "model.mixture_input=image or both",
        lambda config: config.model.mixture_input != "query",
    ),
    (
        ("model.detach_query_features",),
        "model.mixture_input=query or both, or model.queries=features",
        lambda config: config.model.uses_query_features,
    ),
    (("model.extractor_conv",), "model.extractor=fused", lambda config: config.model.extractor == "fused"),
    (("model.head_rank",), "model.head=factorised", lambda config: config.model.head == "factorised"),
    (
        ("model.content_std",),
        "model.queries=static, or model.mixture=residual",
        lambda config: config.model.queries == "static" or config.model.mixture == "residual",
    ),
    (
        ("model.denoising_queries",),
        "model.denoising=contrastive",
        lambda config: config.model.denoising == "contrastive",
    ),
    (("model.denoising_groups",), "model.denoising=plain", lambda config: config.model.denoising == "plain"),
    (
        ("model.label_noise", "model.box_noise"),
        "model.denoising=plain or contrastive",
        lambda config: config.model.denoising != "none",
    ),
    (
        ("loss.encoder_assigner", "loss.encoder_min_positives"),
        "model.positions=proposals",
        lambda config: config.model.positions == "proposals",
    ),
    (
        ("loss.assigner",),
        "model.decoder_layers above 1, since the last layer is always one-to-one",
        lambda config: config.model.decoder_layers > 1,
    ),
    (
        ("loss.top_k", "loss.one_to_many_from", "loss.one_to_many_until"),
        "an assigner with several positives a box (loss.assigner or loss.encoder_assigner)",
        lambda config: _several(config, *_ALL_ASSIGNERS),
    ),
    (
        ("loss.select", "loss.min_positives"),
        "loss.assigner or loss.encoder_assigner=quality_aware or simota",
        lambda config: _several(config, "quality_aware", "simota"),
    ),
    (
        ("loss.encoder_min_positives",),
        "loss.encoder_assigner=quality_aware or simota",
        lambda config: config.loss.encoder_assigner in ("quality_aware", "simota"),
    ),
    (
        ("loss.gamma", "loss.confidence", "loss.min_iou"),
        "loss.assigner or loss.encoder_assigner=quality_aware",
        lambda config: _several(config, "quality_aware"),
    ),
    (
        ("loss.hybrid_weight", "loss.hybrid_repeat"),
        "model.hybrid_queries above 0",
        lambda config: config.model.hybrid_queries > 0,
    ),
    (("drop_at",), "schedule=step", lambda config: config.schedule == "step"),
    (("lr_reference_batch",), "lr_rule=linear or sqrt", lambda config: config.lr_rule != "none"),
)


def idle_settings(config: Config, keys: Iterable[str]) -> dict[str, str]:
    """Which of these settings change nothing in a config, and what each would need.

    Args:
        config: as resolved.
        keys: dotted keys, such as those somebody gave on the command line.

    Returns:
        key -> the setting that would make it count, such as "model.queries=patterns".
    """
    given = list(keys)
    idle: dict[str, str] = {}
    for names, needs, has in _NEEDS:
        if not has(config):
            idle |= {key: needs for key in given if key in names and key not in idle}
    return idle


def describe_idle(config: Config, given: Mapping[str, Any]) -> list[str]:
    """A sentence on each of the given settings (dotted key -> value) that changes nothing."""
    return [
        f"{key}={given[key]} changes nothing here: it needs {needs}"
        for key, needs in idle_settings(config, given).items()
    ]
