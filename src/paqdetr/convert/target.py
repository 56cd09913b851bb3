"""The model that a file becomes: its settings, and the file's tensors in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paqdetr.config import Config, ModelConfig, list_configs, load_config, validate_config
from paqdetr.config.section import Role
from paqdetr.convert.keymap import Renamed
from paqdetr.convert.settle import Setting
from paqdetr.errors import CheckpointError
from paqdetr.models import Detector


def target_config(
    known: Mapping[str, Setting],
    model: str | None,
    given: Mapping[str, Any],
    overrides: Mapping[str, Any],
    where: str,
    name: str | None = None,
) -> Config:
    """Settings of the model to build: the file's, over those of the model it becomes.

    Args:
        known: of the file.
        model: what it becomes; None: what it is.
        given: settings that the user gave, which win.
        overrides: of image_size, size_divisor, resize and pad_divisor.
        where: the file, for errors.
        name: what the file calls its model; None: that of its host and backbone.
    """
    values = {key: setting.value for key, setting in known.items() if key in ModelConfig.model_fields}
    name = model or name or _natural_name(values)
    if name in list_configs() or name.endswith((".yaml", ".yml")):
        base = load_config(name)
    elif model is not None:
        base = load_config(model)  # which says that there is no such model, and which is near
    else:
        base = Config(name=name, model=ModelConfig(frozen_stride=0 if "swin" in values["backbone"] else 4))
    if model is not None:
        _require_same_host(values, base, model, where)
        # The rest of its settings has to be the file's, or the weights would mean something else.
        own = set(ModelConfig.with_role(Role.QUERIES, Role.TARGET)) - set(given)
        values = {key: value for key, value in values.items() if key not in own}
    merged = base.model_dump(mode="json", exclude={"preset"})
    merged["model"] |= values
    merged |= {"name": name if model is None else base.name, **overrides}
    return validate_config(merged, where)


def _require_same_host(values: Mapping[str, Any], base: Config, model: str, where: str) -> None:
    for key in ModelConfig.with_role(Role.HOST):
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


def fit_heads(renamed: Renamed, config: ModelConfig) -> None:
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


def fit_queries(renamed: Renamed, config: ModelConfig, kind: str) -> None:
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


def fill_model(
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
    for key in fresh:
        renamed.tensors[key] = own[key]
    with torch.no_grad():
        detector.load_state_dict({key: renamed.tensors[key].to(own[key].dtype) for key in own})
    return fresh
