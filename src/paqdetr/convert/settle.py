"""From renamed tensors to the settings of a model and tensors that fit it: what shapes tell, and what the names left open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from torch import Tensor

from paqdetr.config.model import problem_of
from paqdetr.convert.backbones import backbone_name
from paqdetr.convert.classes import ClassSlots
from paqdetr.convert.keymap import Renamed
from paqdetr.convert.layout import Layout
from paqdetr.errors import CheckpointError
from paqdetr.text import shorten

_HEADS = ("class_head", "box_head")


@dataclass(frozen=True)
class Setting:
    """A setting, and how it is known."""

    value: Any
    known_from: str


def settle_names(renamed: Renamed, layout: Layout, *, where: str) -> None:
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
        if found and max(found) > layers:
            raise CheckpointError(
                f"{where}: {layers} decoder layers, but {max(found) + 1} heads ({kind})",
                "the file is incomplete or of a variant that cannot be built",
            )
        for key in [key for key in renamed.tensors if key.startswith(f"{kind}.")]:
            _, index, rest = key.split(".", 2)
            home = f"start.head.{kind}" if int(index) == layers else f"decoder.{kind}s.{index}"
            renamed.rename(key, f"{home}.{rest}")


def settle_heads(renamed: Renamed, *, layers: int, must_share: bool, where: str) -> bool:
    """Find out whether decoder layers share their heads, and keep one copy if they do.

    Args:
        renamed: after `settle_names`; changed in place.
        layers: of the decoder.
        must_share: the code has one head for all layers, so copies that differ are an error.
        where: the file, for errors.

    Returns:
        whether class and box heads are both shared.
    """
    shared = {}
    for kind in _HEADS:
        home = f"decoder.{kind}s"
        indices = sorted(_numbers(renamed.tensors, home))
        first = _below(renamed.tensors, f"{home}.0.")
        different = [
            index for index in indices[1:] if not _equal(first, _below(renamed.tensors, f"{home}.{index}."))
        ]
        if must_share and different:
            raise CheckpointError(
                f"{where}: its {len(indices)} {kind}s are one and the same in its program, but number {different[0]} differs "
                "from number 0",
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
                    renamed.discard(
                        f"{home}.{index}.{leaf}", f"shared with layer 0, verified equal ({home}.0.{leaf})"
                    )
            elif indices == {0}:  # tied in memory, so the file has it once
                for index in range(1, layers):
                    renamed.copy(f"{home}.0.{leaf}", f"{home}.{index}.{leaf}", "tied to layer 0 in the file")
    return both


def settle_scale(renamed: Renamed, *, layers: int) -> None:
    """Leave out what scales positions where the only decoder layer is the first, which does not; in place."""
    for leaf in list(_below(renamed.tensors, "decoder.position_scale.")) if layers == 1 else ():
        renamed.discard(f"decoder.position_scale.{leaf}", "the first decoder layer does not scale positions")


def infer_settings(
    renamed: Renamed, layout: Layout, hints: Mapping[str, Any], given: Mapping[str, Any], *, where: str
) -> dict[str, Setting]:
    """Settings of the model that the tensors are of, each with its origin.

    What is given wins, then what shapes say, then the file's own arguments, then what the program's code implies.

    Raises:
        CheckpointError: shapes contradict one another, or the file's arguments name something that we cannot build.
    """
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


def settle_classes(renamed: Renamed, slots: ClassSlots, *, agnostic: bool) -> None:
    """Keep the rows that are classes, in our order, in heads and in the labels of denoising; in place.

    Args:
        renamed: after `settle_names`.
        slots: which rows are classes.
        agnostic: proposals are ranked by row 0 of their head, which stands for "an object"; the rest is never read.
    """
    rows = torch.tensor(slots.rows)
    for key, tensor in list(renamed.tensors.items()):
        if re.fullmatch(r"decoder\.class_heads\.\d+\.(weight|bias)", key):
            index, note = rows, f"{len(slots.rows)} of {slots.total} slots"
        elif key.startswith("start.head.class_head."):
            index, note = rows, f"{len(slots.rows)} of {slots.total} slots"
            if agnostic:
                index, note = torch.tensor([0]), "slot 0, by which proposals are ranked"
        elif key == "denoising.label_embed.weight":
            index, note = rows, f"{len(slots.rows)} of {tensor.shape[0]} labels"
            if missing := [row for row in slots.rows if row >= len(tensor)]:
                # The table is smaller than the class head (dn_labelbook_size); new rows as in a new model.
                fresh = torch.randn(max(missing) + 1 - len(tensor), tensor.shape[1])
                tensor = torch.cat([tensor, fresh.to(tensor)])
                note = f"{len(slots.rows) - len(missing)} labels; {len(missing)} start anew, since the file has none for them"
        else:
            continue
        if index.tolist() != list(range(len(renamed.tensors[key]))):
            renamed.change(key, tensor[index].clone(), note)


def class_rows(tensors: Mapping[str, Tensor], *, where: str) -> int:
    """Rows of the class heads."""
    key = "decoder.class_heads.0.weight"
    if key not in tensors:
        raise CheckpointError(f"{where}: no class head", "give a checkpoint of a whole detector")
    return tensors[key].shape[0]


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
        if ours in values and values[ours][1] != hints[theirs]:
            raise CheckpointError(
                f"{where}: {values[ours][0]}={values[ours][1]} and {theirs}={shorten(hints[theirs])}; here both are {ours}",
                "only checkpoints in which they are equal can be converted",
            )
        if problem := problem_of(ours, hints[theirs]):
            raise CheckpointError(
                f"{where}: {theirs}={shorten(hints[theirs])}: {problem}",
                "correct it, or download the file again",
            )
        values[ours] = (theirs, hints[theirs])
    return {ours: value for ours, (_, value) in values.items()}


def _from_shapes(
    tensors: Mapping[str, Tensor], *, heads: int, backbone: str | None, where: str
) -> dict[str, Any]:
    """What shapes say of sizes and of the host."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors:
            raise CheckpointError(
                f"{where}: no tensor for {key}",
                "give a checkpoint of a whole detector, of the program you name",
            )
        return tuple(tensors[key].shape)

    levels, dim = shape("encoder.level_embed")
    samples = _agree(
        {
            part: shape(f"{part}.weight")[0] // levels
            for part in (
                "encoder.layers.0.attention.attention_weights",
                "decoder.layers.0.cross_attention.attention_weights",
            )
        },
        "samples of deformable attention",
        where,
    )
    if samples % heads or dim % heads:
        raise CheckpointError(
            f"{where}: {samples} samples a level and width {dim} do not part into {heads} heads",
            "say how many heads it has: num_heads=N",
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
        "ffn_dim": _agree(
            {
                f"{part}.layers.0.ffn": shape(f"{part}.layers.0.ffn.linear1.weight")[0]
                for part in ("encoder", "decoder")
            },
            "width of the feed-forward block",
            where,
        ),
        "encoder_layers": len(_numbers(tensors, "encoder.layers")),
        "decoder_layers": len(_numbers(tensors, "decoder.layers")),
        "decoder_norm": "decoder.norm.weight" in tensors,
        "scale_positions": "decoder.position_scale.0.weight" in tensors,
        "position_embedding": "refined" if "decoder.position_head.0.weight" in tensors else "fixed",
        "backbone_output_norm": "backbone.norms.0.weight" in tensors,
    }
    settings |= _host(tensors, dim)
    settings["backbone"] = backbone or backbone_name(tensors, where=where)
    settings["backbone_strides"] = _strides(tensors, str(settings["backbone"]), where)
    return settings


def _host(tensors: Mapping[str, Tensor], dim: int) -> dict[str, Any]:
    """Where queries begin, what they contain, what is denoised."""
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
    labels = tensors.get("denoising.label_embed.weight")
    settings["denoising"] = (
        "none" if labels is None else "plain" if labels.shape[1] == dim - 1 else "contrastive"
    )
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
            f"{where}: {what}: {found}; here encoder and decoder have the same",
            "such a model cannot be built",
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
