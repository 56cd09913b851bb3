"""From a file of another program to a model of ours: read, rename, settle, build, fill, and account for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paqdetr.checkpoint import describe_checkpoint, find_checkpoint, is_own, read_checkpoint
from paqdetr.config import ModelConfig
from paqdetr.config.model import Role, problem_of
from paqdetr.convert import target
from paqdetr.convert.classes import class_slots
from paqdetr.convert.co_detr import CO_DETR
from paqdetr.convert.ddq import DDQ
from paqdetr.convert.deformable_detr import DEFORMABLE_DETR
from paqdetr.convert.detrex import DETREX
from paqdetr.convert.dino import DINO
from paqdetr.convert.dn_detr import DN_DETR
from paqdetr.convert.keymap import Layout, Renamed, apply_rules, coverage
from paqdetr.convert.mmdet import MMDET_DINO
from paqdetr.convert.read import SourceFile, read_source
from paqdetr.convert.relation_detr import RELATION_DETR
from paqdetr.convert.target import Setting
from paqdetr.convert.transformers import TRANSFORMERS
from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.models import Detector
from paqdetr.models.zoo import build_model
from paqdetr.serialize import fields_of
from paqdetr.text import shorten, some


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the model comes from.

    Attributes:
        sources: the file's tensors it was made of.
        note: how, where it is more than another name.
    """

    sources: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """Every tensor of the file is in `kept`, `renamed` (among the sources) or `dropped`; every tensor of the model is in `kept`,
    `renamed` or `fresh`.

    Attributes:
        source: the file or folder.
        origin: the program it is of.
        model: the name of the model it became.
        settings: of the model, with their origins.
        kept: tensors that keep their name.
        renamed: our name -> what it was made of.
        dropped: the file's name -> why it is not used.
        fresh: our name -> why it starts anew.
        notes: what else a user should know.
    """

    source: str
    origin: str
    model: str
    settings: Mapping[str, Setting]
    kept: tuple[str, ...] = ()
    renamed: Mapping[str, Origin] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    fresh: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def used(self) -> set[str]:
        """The file's tensors that the model holds."""
        return set(self.kept) | {source for origin in self.renamed.values() for source in origin.sources}

    def counts(self) -> dict[str, int]:
        """How many tensors of each kind."""
        return {kind: len(getattr(self, kind)) for kind in ("kept", "renamed", "dropped", "fresh")}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return fields_of(self)


LAYOUTS: dict[str, Layout] = {
    "dino": DINO,
    "detrex": DETREX,
    "dn_detr": DN_DETR,
    "deformable_detr": DEFORMABLE_DETR,
    "relation_detr": RELATION_DETR,
    "mmdet_dino": MMDET_DINO,
    "co_detr": CO_DETR,
    "ddq": DDQ,
    "transformers": TRANSFORMERS,
}
"""The programs whose checkpoints can be converted, by the word for --from."""
_PREPROCESSING = ("image_size", "size_divisor", "resize", "pad_divisor")
OWN = "paqdetr"
"""The word for our own checkpoints, which can become other models of their host too."""


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
        origin: the program that wrote it, a key of `LAYOUTS`; "paqdetr" for a checkpoint or a run of ours.
        model: a model of `list_models()` to become: of the same host and backbone, with its own queries, which start fresh,
            where the file's are of another kind ("paq_dino_r50" from a DINO). The host of the file itself if None.
        partial: accept unknown tensors (dropped) and missing ones (they start fresh) instead of raising.
        settings: settings of the model that the file does not have (num_heads, num_queries, position_temperature...);
            image_size, resize, pad_divisor; `classes` ("coco", "numbered", a COCO json, a text file with a name a line);
            `weights`, which entry of a .pth holds them.

    Returns:
        the model in evaluation mode, on the CPU, and what became of every tensor.

    Raises:
        CheckpointError: the file cannot be read, is of another program, or does not fit; it names the tensors.
        ConfigError: unknown origin, model or setting.
    """
    given = {key.removeprefix("model."): value for key, value in (settings or {}).items()}
    weights, classes = given.pop("weights", None), given.pop("classes", None)
    overrides = {key: given.pop(key) for key in _PREPROCESSING if key in given}
    _require_known(given)
    if origin == OWN:
        if weights is not None or classes is not None:
            raise ConfigError(
                f"{'classes' if weights is None else 'weights'}: a checkpoint of ours holds them itself",
                "leave it out; for other classes, convert first and then paqdetr.load(..., classes=...)",
            )
        return _from_own(source, model, partial, given, overrides)
    if origin not in LAYOUTS:
        raise ConfigError(f"--from {origin}: no such program", f"choose among {', '.join([*LAYOUTS, OWN])}")
    layout, where = LAYOUTS[origin], str(source)
    if is_own(Path(source)):
        raise CheckpointError(
            f"{where}: a checkpoint of paqdetr, not of {layout.title}",
            f"it needs no conversion to train from (init={where}); --from {OWN} makes another model of it",
        )

    file = read_source(source, weights=weights)
    renamed = apply_rules(layout.rules, file.tensors, where=where)
    if renamed.unknown and (not partial or not renamed.tensors):
        raise _unknown(renamed, file, origin, where)
    target.settle_names(renamed, layout)
    known = target.infer_settings(renamed, layout, file.hints, given)
    layers, refined = known["decoder_layers"].value, known.get("box_refinement", Setting(True, "")).value
    target.settle_scale(renamed, layers=layers)
    shared = target.settle_heads(renamed, layers=layers, must_share=not refined)
    known.setdefault("share_heads", Setting(shared, "tensors"))
    wanted = None if classes is None else str(classes)
    rows, names = target.class_rows(renamed), _label_names(file.hints, where)
    slots = class_slots(rows, given=wanted, names=names, where=where)
    agnostic = bool(known.get("class_agnostic_proposals", Setting(False, "")).value)
    target.settle_classes(renamed, slots, agnostic=agnostic)
    known["num_classes"] = Setting(len(slots.table), slots.note)

    config = target.target_config(known, model, given, {**layout.preprocessing, **overrides}, where)
    detector = build_model(config, classes=slots.table)
    report = _finish(detector, renamed, known, model, partial=partial)
    labels = report.renamed.get("denoising.label_embed.weight")
    if labels is not None and "start anew" in labels.note:
        file.notes.append(f"labels of denoising: {labels.note}")
    resizing = {
        key: Setting(getattr(config, key), "given" if key in overrides else f"code of {layout.title}")
        for key in ("resize", "pad_divisor")
    }
    settings = {**report.settings, **resizing}
    return detector.eval(), replace(report, origin=layout.title, notes=tuple(file.notes), settings=settings)


def _from_own(
    source: str | Path, model: str | None, partial: bool, given: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[Detector, ConversionReport]:
    """A checkpoint of ours: names stay, and its header knows all settings."""
    file = find_checkpoint(source)
    where = str(file)
    tensors, header = read_checkpoint(file)
    old, table, preprocessing = describe_checkpoint(header, where)
    known = {key: Setting(getattr(old.model, key), "header of the file") for key in ModelConfig.model_fields}
    known |= {key: Setting(value, "given") for key, value in given.items()}
    sizes = preprocessing.settings() | dict(overrides)
    config = target.target_config(known, model, given, sizes, where, name=old.name)
    detector = build_model(config, classes=table)
    renamed = Renamed(tensors=dict(tensors), sources={key: (key,) for key in tensors}, where=where)
    report = _finish(detector, renamed, known, model, partial=partial)
    return detector.eval(), report


def _finish(
    detector: Detector, renamed: Renamed, known: Mapping[str, Setting], model: str | None, *, partial: bool
) -> ConversionReport:
    """Fit the tensors to the model, fill it, and account for them."""
    config = detector.config
    target.fit_heads(renamed, config)
    target.fit_queries(renamed, config, known["queries"].value)
    fresh = target.fill_model(detector, renamed, known, partial=partial)
    settings = {}
    for key in ModelConfig.model_fields:
        if key in known or (model is not None and key in ModelConfig.with_role(Role.QUERIES)):
            setting = Setting(getattr(config, key), f"model {model}" if model else "default")
            settings[key] = known[key] if key in known and known[key].value == setting.value else setting
    return ConversionReport(
        source=renamed.where,
        origin=OWN,
        model=detector.name,
        settings=settings,
        kept=tuple(key for key, names in renamed.sources.items() if names == (key,)),
        renamed={
            key: Origin(names, renamed.notes.get(key, "")) for key, names in renamed.sources.items() if names != (key,)
        },
        dropped=renamed.dropped,
        fresh=fresh,
    )


def _require_known(given: Mapping[str, Any]) -> None:
    unknown = [key for key in given if key not in ModelConfig.model_fields]
    if unknown:
        raise ConfigError(
            f"unknown setting {unknown[0]!r}",
            f"a conversion takes settings of the model, {', '.join(_PREPROCESSING)}, classes and weights",
        )
    for key, value in given.items():
        if problem := problem_of(key, value):
            raise ConfigError(f"{key}={shorten(value)}: {problem}", "docs/settings.md says what each setting takes")


def _unknown(renamed: Renamed, file: SourceFile, origin: str, where: str) -> CheckpointError:
    keys = renamed.unknown
    for part, lack in LAYOUTS[origin].unsupported.items():
        if any(part in key for key in keys):
            raise CheckpointError(f"{where}: {lack}", "--partial leaves these tensors out all the same")
    share = {name: coverage(layout.rules, file.tensors) for name, layout in LAYOUTS.items()}
    best = max(share, key=lambda name: share[name])
    if share[best] > share[origin]:
        remedy = f"its names look like --from {best}, which knows {share[best]:.0%} of them"
    elif not renamed.tensors:
        remedy = f"none of the programs that --from knows has such names ({', '.join(LAYOUTS)})"
    else:
        remedy = "if you can do without them, --partial leaves them out; outputs then differ from the original's"
    return CheckpointError(
        f"{where}: {len(keys)} of {len(file.tensors)} tensors are not of {LAYOUTS[origin].title}: {some(keys, 4)}",
        remedy,
    )


def _label_names(hints: Mapping[str, Any], where: str) -> dict[int, str] | None:
    """Names in a config.json of transformers, unless they are the ones it makes up."""
    labels = hints.get("id2label")
    if not isinstance(labels, Mapping):
        return None
    if not all(row.isdecimal() and len(row) < 9 for row in map(str, labels)):
        raise CheckpointError(
            f"{where}: id2label has the keys {shorten(list(labels))}, expected row numbers", "correct config.json"
        )
    names = {int(row): str(name) for row, name in labels.items()}
    return None if all(name == f"LABEL_{row}" for row, name in names.items()) else names
