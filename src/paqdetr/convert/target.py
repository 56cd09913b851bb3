"""From renamed tensors to the settings of a model, and to tensors that fit it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from torch import Tensor

from paqdetr.config import Config, ModelConfig, list_configs, load_config, validate_config
from paqdetr.config.model import Role, problem_of
from paqdetr.convert.backbones import backbone_name
from paqdetr.convert.classes import ClassSlots
from paqdetr.convert.keymap import Layout, Renamed
from paqdetr.errors import CheckpointError
from paqdetr.models import Detector
from paqdetr.models.detector import TRAINING_ONLY
from paqdetr.text import shorten, some


@dataclass(frozen=True)
class Setting:
    """A setting, and how it is known."""

    value: Any
    known_from: str


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
    if model is not None or name in list_configs() or name.endswith((".yaml", ".yml")):
        base = load_config(name)  # of an unknown model it raises which are near
    else:
        base = Config(name=name, model=ModelConfig(frozen_stride=0 if "swin" in values["backbone"] else 4))
    if model is not None:
        _require_same_host(values, base, model, where)
        # The rest of its settings has to be the file's, or the weights would mean something else.
        own = set(ModelConfig.with_role(Role.TARGET)) - set(given)
        if values["queries"] != base.model.queries:
            own |= set(ModelConfig.with_role(Role.QUERIES)) - set(given)
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
    elif values["queries"] == "tokens":
        host = "ddq_detr"
    elif values["encoder_fusion"] and values["position_relation"]:
        host = "relation_detr"
    else:
        host = "dino_5scale" if len(values["backbone_strides"]) == 4 else "dino"
        host = "co_dino" if values.get("auxiliary_heads") else host
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
    for key in [key for key in renamed.tensors if key.startswith("query_source.")]:
        if kind == "tokens" and config.hybrid_heads == "all":  # the dense queries shared the layer, and keep it
            renamed.rename(key, key.replace("query_source.", "hybrid_source."))
        else:
            renamed.discard(key, f"content queries become {config.queries}")
    if kind == "proposals":
        for key in [key for key in renamed.tensors if key.startswith("start.embed.")]:
            half = renamed.tensors[key][: config.dim].clone()
            note = "the position half; its norm now sees that half alone, so positions are a start, not the same"
            renamed.change(key, half, note)


def fill_model(detector: Detector, renamed: Renamed, known: Mapping[str, Setting], *, partial: bool) -> dict[str, str]:
    """Put the tensors into the model.

    Returns:
        tensors of the model that start anew, and why.
    """
    own, queries = detector.state_dict(), detector.config.queries
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
        elif key.startswith("query_source.") and queries != known["queries"].value:
            fresh[key] = f"{queries} instead of the file's {known['queries'].value} queries"
        elif key.startswith(TRAINING_ONLY):
            fresh[key] = "a part of training alone that the file does not have"
        else:
            missing.append(key)
            fresh[key] = "not in the file"
    for key in [key for key in renamed.tensors if key not in own and key.startswith(TRAINING_ONLY)]:
        renamed.discard(key, f"a part of training alone that {detector.name} does not have")
    left = [key for key in renamed.tensors if key not in own]
    problems = {"lacks": missing, "has other shapes for": misfit, "has tensors without a place:": left}
    for problem, keys in problems.items():
        if keys and not partial:
            raise CheckpointError(
                f"{renamed.where}: for a {detector.name} it {problem} {some(keys)}",
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


_HEADS = ("class_head", "box_head")


def settle_names(renamed: Renamed, layout: Layout) -> None:
    """Give levels, stage norms and heads their final names, in place.

    Raises:
        CheckpointError: there are heads of another number of layers.
    """
    _settle_levels(renamed, layout)
    for position, stage in enumerate(sorted(_numbers(renamed.tensors, "backbone.stage_norms"))):
        for leaf in ("weight", "bias"):
            renamed.rename(f"backbone.stage_norms.{stage}.{leaf}", f"backbone.norms.{position}.{leaf}")
    layers = len(_numbers(renamed.tensors, "decoder.layers"))
    for kind in _HEADS:
        found = _numbers(renamed.tensors, kind)
        # DDQ has one more, for the proposals of dense queries.
        dense = "hybrid_heads.class_heads.0.weight" in renamed.tensors
        if found and max(found) > layers + dense:
            raise CheckpointError(
                f"{renamed.where}: {layers} decoder layers, but {max(found) + 1} heads ({kind})",
                "the file is incomplete or of a variant that cannot be built",
            )
        for key in [key for key in renamed.tensors if key.startswith(f"{kind}.")]:
            _, index, rest = key.split(".", 2)
            past = int(index) - layers
            home = f"decoder.{kind}s.{index}" if past < 0 else f"start.head.{'hybrid_' * past}{kind}"
            renamed.rename(key, f"{home}.{rest}")


def settle_heads(renamed: Renamed, *, layers: int, must_share: bool) -> bool:
    """Find out whether decoder layers share their heads, and keep one copy if they do.

    Args:
        renamed: after `settle_names`; changed in place.
        layers: of the decoder.
        must_share: the code has one head for all layers, so heads that differ are an error.

    Returns:
        whether class and box heads are both shared.
    """
    shared = {}
    for kind in _HEADS:
        home = f"decoder.{kind}s"
        indices = sorted(_numbers(renamed.tensors, home))
        first = _below(renamed.tensors, f"{home}.0.")
        different = [index for index in indices[1:] if not _equal(first, _below(renamed.tensors, f"{home}.{index}."))]
        if must_share and different:
            raise CheckpointError(
                f"{renamed.where}: its {len(indices)} {kind}s are one and the same in its program, but number {different[0]} "
                "differs from number 0",
                "the file was edited or is damaged; use the one its program wrote",
            )
        shared[kind] = not different
    both = all(shared.values())
    for kind in _HEADS:
        home = f"decoder.{kind}s"
        indices = _numbers(renamed.tensors, home)
        for leaf in list(_below(renamed.tensors, f"{home}.0.")):
            if both:
                for index in sorted(indices - {0}):
                    renamed.discard(f"{home}.{index}.{leaf}", f"shared with layer 0, verified equal ({home}.0.{leaf})")
            elif indices == {0}:  # tied in memory, so the file has it once
                for index in range(1, layers):
                    renamed.copy(f"{home}.0.{leaf}", f"{home}.{index}.{leaf}", "tied to layer 0 in the file")
    return both


def settle_scale(renamed: Renamed, *, layers: int) -> None:
    """Leave out what the first decoder layer does not use where it is the only one; in place."""
    unused = {"position_scale": "does not scale positions", "relation": "has no relation of boxes"}
    for part, reason in unused.items() if layers == 1 else ():
        for leaf in list(_below(renamed.tensors, f"decoder.{part}.")):
            renamed.discard(f"decoder.{part}.{leaf}", f"the first decoder layer {reason}")


def infer_settings(
    renamed: Renamed, layout: Layout, hints: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Setting]:
    """Settings of the model that the tensors are of, each with its origin.

    What is given wins, then what shapes say, then the file's own arguments, then what the program's code implies.

    Raises:
        CheckpointError: shapes contradict one another, or the file's arguments name something that we cannot build.
    """
    where = renamed.where
    _require(layout, hints, where)
    settings = {
        key: Setting(value, f"code of {layout.title}")
        for key, value in layout.settings(renamed.all_sources, hints).items()
    }
    for key, value in _hinted(layout, hints, where).items():
        settings[key] = Setting(value, "arguments in the file")
    heads = given.get("num_heads", settings["num_heads"].value if "num_heads" in settings else None)
    if heads is None:
        settings["num_heads"] = Setting(8, "published models; the file does not say")
    if "num_queries" not in settings:
        settings["num_queries"] = Setting(layout.num_queries, "published models; the file does not say")
    for key, value in _from_shapes(
        renamed.tensors, heads=int(heads or 8), backbone=given.get("backbone"), where=where
    ).items():
        settings[key] = Setting(value, "tensors")
    for key, value in given.items():
        settings[key] = Setting(value, "given")
    return settings


_CLASS_HEAD = re.compile(
    r"((decoder|hybrid_heads)\.class_heads\.\d+|start\.head\.(hybrid_)?class_head|auxiliary\.heads\.\w+\.class_head)"
    r"\.(weight|bias)"
)


def settle_classes(renamed: Renamed, slots: ClassSlots, *, agnostic: bool) -> None:
    """Keep the rows that are classes, in our order, in heads and in the labels of denoising; in place.

    Args:
        renamed: after `settle_names`.
        slots: which rows are classes.
        agnostic: proposals are ranked by row 0 of their head, which stands for "an object"; the rest is never read.
    """
    rows = torch.tensor(slots.rows)
    for key, tensor in list(renamed.tensors.items()):
        index, note = rows, f"{len(slots.rows)} of {slots.total} slots"
        if agnostic and key.startswith("start.head.class_head."):
            index, note = torch.tensor([0]), "slot 0, by which proposals are ranked"
        elif key.startswith("auxiliary.heads.faster_rcnn.box_head."):
            index = (rows[:, None] * 4 + torch.arange(4)).flatten()
        elif key == "denoising.label_embed.weight":
            note = f"{len(slots.rows)} of {tensor.shape[0]} labels"
            if missing := [row for row in slots.rows if row >= len(tensor)]:
                # The table is smaller than the class head (dn_labelbook_size); new rows as in a new model.
                fresh = torch.randn(max(missing) + 1 - len(tensor), tensor.shape[1])
                tensor = torch.cat([tensor, fresh.to(tensor)])
                note = f"{len(slots.rows) - len(missing)} labels; {len(missing)} start anew, since the file has none for them"
        elif not _CLASS_HEAD.fullmatch(key):
            continue
        if index.tolist() != list(range(len(renamed.tensors[key]))):
            renamed.change(key, tensor[index].clone(), note)


def class_rows(renamed: Renamed) -> int:
    """Rows of the class heads."""
    key = "decoder.class_heads.0.weight"
    if key not in renamed.tensors:
        raise CheckpointError(f"{renamed.where}: no class head", "give a checkpoint of a whole detector")
    return renamed.tensors[key].shape[0]


def _settle_levels(renamed: Renamed, layout: Layout) -> None:
    """A 1x1 convolution is a lateral, a 3x3 one makes an extra level."""
    laterals = 0
    for index in sorted(_numbers(renamed.tensors, "level")):
        weight = renamed.tensors.get(f"level.{index}.0.weight")
        lateral = weight is None or weight.shape[-1] == 1
        home = f"neck.lateral.{index}" if lateral else f"neck.extra.{index - laterals}"
        laterals += lateral
        for key in [key for key in renamed.tensors if key.startswith(f"level.{index}.")]:
            renamed.rename(key, f"{home}.{key.split('.', 2)[2]}")
    if layout.level_bias:
        return
    for key in [key for key in renamed.tensors if re.fullmatch(r"neck\.\w+\.\d+\.0\.weight", key)]:
        bias = key.removesuffix("weight") + "bias"
        if bias not in renamed.tensors:
            renamed.tensors[bias] = torch.zeros(renamed.tensors[key].shape[0])
            renamed.sources[bias] = ()
            renamed.notes[bias] = "zero: the convolution had no bias"


def _require(layout: Layout, hints: Mapping[str, Any], where: str) -> None:
    for key, allowed in layout.required.items():
        if key in hints and hints[key] not in list(allowed):
            raise CheckpointError(
                f"{where}: it was made with {key}={shorten(hints[key])}, which cannot be built here",
                f"checkpoints with {key}={allowed[0]!r} can be converted",
            )


def _hinted(layout: Layout, hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, tuple[str, Any]] = {}
    for theirs, ours in layout.hints.items():
        if theirs not in hints:
            continue
        if ours in ("denoising_queries", "denoising_groups") and hints[theirs] == 0:
            continue  # a training without denoising, whose labels are in the file all the same
        if ours in values and values[ours][1] != hints[theirs]:
            raise CheckpointError(
                f"{where}: {values[ours][0]}={values[ours][1]} and {theirs}={shorten(hints[theirs])}; here both are {ours}",
                "only checkpoints in which they are equal can be converted",
            )
        if problem := problem_of(ours, hints[theirs]):
            raise CheckpointError(
                f"{where}: {theirs}={shorten(hints[theirs])}: {problem}", "correct it, or download the file again"
            )
        values[ours] = (theirs, hints[theirs])
    return {ours: value for ours, (_, value) in values.items()}


def _from_shapes(tensors: Mapping[str, Tensor], *, heads: int, backbone: str | None, where: str) -> dict[str, Any]:
    """Sizes and host, from shapes."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors:
            raise CheckpointError(
                f"{where}: no tensor for {key}", "give a checkpoint of a whole detector, of the program you name"
            )
        return tuple(tensors[key].shape)

    levels, dim = shape("encoder.level_embed")
    weights = ("encoder.layers.0.attention.attention_weights", "decoder.layers.0.cross_attention.attention_weights")
    samples = {part: shape(f"{part}.weight")[0] // levels for part in weights}
    samples = _agree(samples, "samples of deformable attention", where)
    widths = {
        f"{part}.layers.0.ffn": shape(f"{part}.layers.0.ffn.linear1.weight")[0] for part in ("encoder", "decoder")
    }
    if samples % heads or dim % heads:
        raise CheckpointError(
            f"{where}: {samples} samples per level and width {dim} do not divide into {heads} heads",
            "give its number of heads: num_heads=N",
        )
    if dim % 32 or dim < 128:
        raise CheckpointError(
            f"{where}: width {dim}: levels are normed in 32 groups there, and in fewer here",
            "models of width 128, 160, ... can be converted",
        )
    settings: dict[str, Any] = {
        "dim": dim,
        "num_levels": levels,
        "num_points": samples // heads,
        "ffn_dim": _agree(widths, "width of the feed-forward block", where),
        "encoder_layers": len(_numbers(tensors, "encoder.layers")),
        "decoder_layers": len(_numbers(tensors, "decoder.layers")),
        "decoder_norm": "decoder.norm.weight" in tensors,
        "scale_positions": "decoder.position_scale.0.weight" in tensors,
        "position_relation": "decoder.relation.project.weight" in tensors,
        "encoder_fusion": "encoder.fusion.0.weight" in tensors,
        "position_embedding": "refined" if "decoder.position_head.0.weight" in tensors else "fixed",
        "backbone_output_norm": "backbone.norms.0.weight" in tensors,
    }
    settings |= _host(tensors, dim)
    settings["backbone"] = backbone or backbone_name(tensors, where=where)
    settings["backbone_strides"] = _strides(tensors, str(settings["backbone"]), where)
    return settings


def _host(tensors: Mapping[str, Tensor], dim: int) -> dict[str, Any]:
    """Where queries begin, what they contain, what is denoised, and which auxiliary heads there are."""
    settings: dict[str, Any] = {"queries": "static"}
    if "start.boxes" in tensors:
        settings |= {"positions": "anchors", "num_queries": tensors["start.boxes"].shape[0]}
    elif "start.position" in tensors:
        settings |= {"positions": "points", "num_queries": tensors["start.position"].shape[0]}
    else:
        settings["positions"] = "proposals"
        if "query_source.table" in tensors:
            settings["num_queries"] = tensors["query_source.table"].shape[0]
        elif "start.embed.0.weight" in tensors:
            settings["queries"] = "proposals"
        elif "query_source.linear.weight" in tensors:
            settings["queries"] = "tokens"
    if "hybrid_source.table" in tensors:
        settings["hybrid_queries"] = tensors["hybrid_source.table"].shape[0]
    heads = tuple(x for x in ("faster_rcnn", "atss") if f"auxiliary.heads.{x}.class_head.weight" in tensors)
    if heads:
        settings["auxiliary_heads"] = heads
    if heads and not any(key.startswith("auxiliary.embed.") for key in tensors):
        settings["customised_queries"] = 0
    labels = tensors.get("denoising.label_embed.weight")
    settings["denoising"] = "none" if labels is None else "plain" if labels.shape[1] == dim - 1 else "contrastive"
    return settings


def _strides(tensors: Mapping[str, Tensor], backbone: str, where: str) -> tuple[int, ...]:
    """Strides of the maps that the laterals read, by their widths."""
    count = len(_numbers(tensors, "neck.lateral"))
    widths = [tensors[f"neck.lateral.{i}.0.weight"].shape[1] for i in range(count)]
    if not timm.is_model(backbone):
        raise CheckpointError(f"backbone={backbone}: timm has no such model", "give the name of a timm model")
    body = timm.create_model(backbone, features_only=True, pretrained=False)
    infos: list[dict[str, Any]] = list(cast(Any, body.feature_info).info)
    by_width = {int(info["num_chs"]): int(info["reduction"]) for info in infos}
    if not count or not all(width in by_width for width in widths):
        raise CheckpointError(
            f"{where}: levels read maps of {widths} channels; {backbone} has {sorted(by_width)}",
            "name the backbone: backbone=TIMM_NAME",
        )
    return tuple(by_width[width] for width in widths)


def _agree(values: Mapping[str, int], what: str, where: str) -> int:
    if len(set(values.values())) > 1:
        found = ", ".join(f"{value} in {part}" for part, value in values.items())
        raise CheckpointError(
            f"{where}: {what}: {found}; here encoder and decoder have the same", "such a model cannot be built"
        )
    return next(iter(values.values()))


def _numbers(keys: Iterable[str], prefix: str) -> set[int]:
    """The numbers that follow a prefix."""
    found = (re.match(re.escape(prefix) + r"\.(\d+)\.", key) for key in keys)
    return {int(match.group(1)) for match in found if match}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].shape == other[key].shape and torch.equal(one[key], other[key]) for key in one
    )
