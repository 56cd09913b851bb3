"""From a file of another program to a model of ours: read, rename, settle, build, fill, and account for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paqdetr.config import Config, ModelConfig, list_configs, load_config, validate_config
from paqdetr.convert.classes import class_slots
from paqdetr.convert.deformable_detr import DEFORMABLE_DETR
from paqdetr.convert.detrex import DETREX
from paqdetr.convert.dino import DINO
from paqdetr.convert.dn_detr import DN_DETR
from paqdetr.convert.keymap import Renamed, apply_rules, coverage
from paqdetr.convert.layout import Layout
from paqdetr.convert.read import SourceFile, read_source
from paqdetr.convert.relation_detr import RELATION_DETR
from paqdetr.convert.report import ConversionReport, Origin
from paqdetr.convert.settle import (
    Setting,
    class_rows,
    infer_settings,
    settle_classes,
    settle_heads,
    settle_names,
)
from paqdetr.convert.transformers import TRANSFORMERS
from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.models import Detector
from paqdetr.models.zoo import build_model

LAYOUTS: dict[str, Layout] = {
    "dino": DINO,
    "detrex": DETREX,
    "dn_detr": DN_DETR,
    "deformable_detr": DEFORMABLE_DETR,
    "relation_detr": RELATION_DETR,
    "transformers": TRANSFORMERS,
}
"""The programs whose checkpoints can be converted, by the word for --from."""

# What a model named by `model=` decides itself; the rest of its settings has to be the file's, or the weights would mean
# something else.
_QUERY_KEYS = (
    "queries",
    "content_std",
    "num_patterns",
    "pattern_std",
    "extractor",
    "extractor_conv",
    "head",
    "head_rank",
    "temperature",
    "gain",
    "bias_std",
)
_TRAINING_KEYS = (
    "share_heads",
    "look_forward_twice",
    "dropout",
    "frozen_stride",
    "freeze_backbone_norm",
    "denoising_queries",
    "denoising_groups",
    "label_noise",
    "box_noise",
    "hybrid_queries",
)
_HOST_KEYS = (
    "backbone",
    "positions",
    "position_embedding",
    "scale_positions",
    "box_refinement",
    "class_agnostic_proposals",
    "denoising",
)


def convert_checkpoint(
    source: str | Path,
    *,
    origin: str,
    model: str | None = None,
    partial: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Detector, ConversionReport]:
    """Read weights of another program into a model of ours.

    Args:
        source: a .pth, a .safetensors, or a folder that transformers' `save_pretrained` wrote.
        origin: the program that wrote it, a key of `LAYOUTS`.
        model: a model of `list_models()` to become: of the same host and backbone, with its own queries, which start fresh where
            they are others ("paq_dino_r50" from a DINO). The host of the file itself if None.
        partial: accept unknown tensors (dropped) and missing ones (they start fresh) instead of raising.
        settings: settings of the model that the file does not tell (num_heads, num_queries, position_temperature...);
            image_size; `classes` ("coco", "numbered", a COCO json, a text file with a name a line); `weights`, which entry of a
            .pth holds them.

    Returns:
        the model in evaluation mode, on the CPU, and what became of every tensor.

    Raises:
        CheckpointError: the file cannot be read, is of another program, or does not fit; it names the tensors.
        ConfigError: unknown origin, model or setting.
    """
    if origin not in LAYOUTS:
        raise ConfigError(f"--from {origin}: no such program", f"choose among {', '.join(LAYOUTS)}")
    layout, where = LAYOUTS[origin], str(source)
    given = {key.removeprefix("model."): value for key, value in (settings or {}).items()}
    weights, classes = given.pop("weights", None), given.pop("classes", None)
    overrides = {key: given.pop(key) for key in ("image_size", "size_divisor") if key in given}
    _require_known(given)

    file = read_source(source, weights=weights)
    renamed = apply_rules(layout.rules, file.tensors, where=where)
    if renamed.unknown and not partial:
        raise _unknown(renamed, file, origin, where)
    settle_names(renamed, layout, where=where)
    known = infer_settings(renamed, layout, file.hints, given, where=where)
    shared = settle_heads(
        renamed,
        layers=known["decoder_layers"].value,
        must_share=not known.get("box_refinement", Setting(True, "")).value,
        where=where,
    )
    known.setdefault("share_heads", Setting(shared, "tensors"))
    slots = class_slots(
        class_rows(renamed.tensors, where=where),
        given=None if classes is None else str(classes),
        names=_label_names(file.hints),
        where=where,
    )
    agnostic = bool(known.get("class_agnostic_proposals", Setting(False, "")).value)
    settle_classes(renamed, slots, agnostic=agnostic)
    known["num_classes"] = Setting(len(slots.table), slots.note)

    config = _config(known, model, given, overrides, where)
    detector = build_model(config, classes=slots.table)
    _fit_heads(renamed, config.model)
    _fit_queries(renamed, config.model, known["queries"].value)
    fresh = _fill(detector, renamed, config.model, known, partial=partial, where=where)
    report = ConversionReport(
        source=where,
        origin=layout.title,
        model=config.name,
        settings={
            key: Setting(getattr(config.model, key), _origin(key, config.model, known, model))
            for key in ModelConfig.model_fields
            if key in known or (model is not None and key in _QUERY_KEYS)
        },
        kept=tuple(key for key, names in renamed.sources.items() if names == (key,)),
        renamed={
            key: Origin(names, renamed.notes.get(key, ""))
            for key, names in renamed.sources.items()
            if names != (key,)
        },
        dropped=renamed.dropped,
        fresh=fresh,
        notes=tuple(file.notes),
    )
    return detector.eval(), report


def _require_known(given: Mapping[str, Any]) -> None:
    unknown = [key for key in given if key not in ModelConfig.model_fields]
    if unknown:
        raise ConfigError(
            f"unknown setting {unknown[0]!r}",
            "a conversion takes settings of the model, image_size, classes and weights",
        )


def _unknown(renamed: Renamed, file: SourceFile, origin: str, where: str) -> CheckpointError:
    keys = renamed.unknown
    shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    share = {name: coverage(layout.rules, file.tensors) for name, layout in LAYOUTS.items()}
    best = max(share, key=lambda name: share[name])
    if share[best] > share[origin]:
        remedy = f"its names look like --from {best}, which knows {share[best]:.0%} of them"
    else:
        remedy = (
            "if you can do without them, --partial leaves them out; outputs then differ from the original's"
        )
    return CheckpointError(
        f"{where}: {len(keys)} of {len(file.tensors)} tensors are not of {LAYOUTS[origin].title}: {shown}",
        remedy,
    )


def _label_names(hints: Mapping[str, Any]) -> dict[int, str] | None:
    """Names in a config.json of transformers, unless they are the ones it makes up."""
    labels = hints.get("id2label")
    if not isinstance(labels, Mapping):
        return None
    names = {int(row): str(name) for row, name in labels.items()}
    return None if all(name == f"LABEL_{row}" for row, name in names.items()) else names


def _config(
    known: Mapping[str, Setting],
    model: str | None,
    given: Mapping[str, Any],
    overrides: Mapping[str, Any],
    where: str,
) -> Config:
    """Settings of the model to build: the file's, over those of the model it becomes."""
    values = {key: setting.value for key, setting in known.items() if key in ModelConfig.model_fields}
    name = model or _natural_name(values)
    if name in list_configs() or name.endswith((".yaml", ".yml")):
        base = load_config(name)
    elif model is not None:
        base = load_config(model)  # which says that there is no such model, and which is near
    else:
        base = Config(name=name, model=ModelConfig(frozen_stride=0 if "swin" in values["backbone"] else 4))
    if model is not None:
        _require_same_host(values, base, model, where)
        own = {*_QUERY_KEYS, *_TRAINING_KEYS} - set(given)
        values = {key: value for key, value in values.items() if key not in own}
    merged = base.model_dump(mode="json", exclude={"preset"})
    merged["model"] |= values
    merged |= {"name": name if model is None else base.name, **overrides}
    return validate_config(merged, where)


def _require_same_host(values: Mapping[str, Any], base: Config, model: str, where: str) -> None:
    for key in _HOST_KEYS:
        wanted = getattr(base.model, key)
        if key in values and _plain(values[key]) != _plain(wanted):
            raise CheckpointError(
                f"{where}: it has {key}={values[key]!r}, and {model} has {key}={wanted!r}: another host",
                f"its own host is {_natural_name(values)}; choose the model that is built on it",
            )


def _plain(value: Any) -> Any:
    """A timm name without the tag of its weights."""
    return value.split(".")[0] if isinstance(value, str) else value


def _natural_name(values: Mapping[str, Any]) -> str:
    """What we call the host and the backbone of the file."""
    if values["positions"] == "points":
        host = "deformable_detr_refine" if values.get("box_refinement") else "deformable_detr_one_stage"
    elif values["positions"] == "anchors":
        host = "dab_deformable_detr" if values["denoising"] == "none" else "dn_detr"
    elif values["position_embedding"] == "fixed":
        host = "deformable_detr"
    else:
        host = "dino_5scale" if len(values["backbone_strides"]) == 4 else "dino"
    short = {"resnet50": "r50", "swin_large_patch4_window12_384": "swin_l"}
    backbone = _plain(values["backbone"])
    return f"{host}_{short.get(backbone, backbone)}"


def _origin(key: str, config: ModelConfig, known: Mapping[str, Setting], model: str | None) -> str:
    if key in known and known[key].value == getattr(config, key):
        return known[key].known_from
    return f"model {model}" if model else "default"


def _fit_heads(renamed: Renamed, config: ModelConfig) -> None:
    """One head for all layers becomes a copy for each where the model has heads of its own for each."""
    if config.share_heads:
        return
    for kind in ("class_heads", "box_heads"):
        for key in [key for key in renamed.tensors if key.startswith(f"decoder.{kind}.0.")]:
            rest = key.removeprefix(f"decoder.{kind}.0.")
            for layer in range(1, config.decoder_layers):
                target = f"decoder.{kind}.{layer}.{rest}"
                if target not in renamed.tensors:
                    renamed.copy(key, target, "a copy of the head that all layers share")


def _fit_queries(renamed: Renamed, config: ModelConfig, kind: str) -> None:
    """Another source of content: what the file has for the purpose goes, and positions that were made with content stay alone."""
    if config.queries == kind:
        return
    if "query_source.table" in renamed.tensors:
        renamed.discard("query_source.table", f"content queries become {config.queries}")
    if kind == "proposals":
        for key in [key for key in renamed.tensors if key.startswith("start.embed.")]:
            half = renamed.tensors[key][: config.dim].clone()
            note = (
                "the position half; its norm now sees that half alone, so positions are a start, not the same"
            )
            renamed.change(key, half, note)


def _fill(
    detector: Detector,
    renamed: Renamed,
    config: ModelConfig,
    known: Mapping[str, Setting],
    *,
    partial: bool,
    where: str,
) -> dict[str, str]:
    """Put the tensors into the model.

    Returns:
        tensors of the model that start anew, and why.
    """
    own = detector.state_dict()
    fresh: dict[str, str] = {}
    missing, misfit = [], []
    for key, value in own.items():
        tensor = renamed.tensors.get(key)
        if tensor is not None and tensor.shape == value.shape:
            continue
        if tensor is not None:
            misfit.append(f"{key} {tuple(tensor.shape)} instead of {tuple(value.shape)}")
            fresh[key] = f"the file has shape {tuple(tensor.shape)}"
        elif key.endswith("num_batches_tracked"):
            fresh[key] = "a counter that frozen norms do not keep"
        elif key.startswith("query_source.") and config.queries != known["queries"].value:
            fresh[key] = f"{config.queries} instead of the file's {known['queries'].value} queries"
        elif key.startswith("hybrid_source."):
            fresh[key] = "queries that exist in training alone"
        else:
            missing.append(key)
            fresh[key] = "not in the file"
    left = [key for key in renamed.tensors if key not in own]
    if not partial:
        for problem, keys in (
            ("lacks", missing),
            ("has other shapes for", misfit),
            ("has tensors without a place:", left),
        ):
            if keys:
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                raise CheckpointError(
                    f"{where}: for a {detector.name} it {problem} {', '.join(keys[:3])}{more}",
                    "correct the settings given, or start those parts anew with --partial",
                )
    for key in [*left, *(key for key in fresh if key in renamed.tensors)]:
        renamed.discard(key, "no place in the model" if key in left else "another shape than the model's")
    for key in renamed.unknown:
        renamed.dropped[key] = "unknown"
    values: dict[str, Tensor] = {
        key: renamed.tensors.get(key, value).to(value.dtype) for key, value in own.items()
    }
    with torch.no_grad():
        detector.load_state_dict(values)
    return fresh
