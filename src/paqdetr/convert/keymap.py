"""Key maps: rules that say where the tensors of another program go, and one function that applies them and loses none."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paqdetr.errors import CheckpointError

_HOLES = {"i": r"\d+", "j": r"\d+", "k": r"\d+", "p": r"weight|bias", "rest": r".+"}
_ARITHMETIC: dict[str, Callable[[int], int]] = {"2k": lambda k: 2 * k, "i+1": lambda i: i + 1, "i-1": lambda i: i - 1}


@dataclass(frozen=True)
class Take:
    """A part of a source tensor, and how a report names it."""

    name: str
    of: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """Where a source tensor goes, or a part of it.

    Attributes:
        target: template of our name.
        take: which part; None for all.
        part: (position, count) if the target is several sources one after the other, by rows.
    """

    target: str
    take: Take | None = None
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Rule:
    """What becomes of the source tensors that a template matches.

    Attributes:
        source: template of their name.
        pieces: where they go; none if they are dropped.
        reason: why they are dropped.
        twin: template of another source that has to hold the same values: the same module under a second name.
    """

    source: str
    pieces: tuple[Piece, ...] = ()
    reason: str = ""
    twin: str | None = None

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The template as a regular expression."""
        parts = re.split(r"\{(\w+)\}", self.source)
        expression = "".join(
            f"(?P<{part}>{_HOLES[part]})" if odd else re.escape(part)
            for part, odd in zip(parts, [False, True] * len(parts), strict=False)
        )
        return re.compile(expression)


def move(source: str, target: str) -> Rule:
    """One tensor under another name."""
    return Rule(source, (Piece(target),))


def split(source: str, *pieces: tuple[str, Take]) -> Rule:
    """One tensor that holds several of ours: (target, which part of it)."""
    return Rule(source, tuple(Piece(target, take) for target, take in pieces))


def pack(sources: Iterable[str], target: str) -> tuple[Rule, ...]:
    """Several tensors that are one of ours, one after the other by rows."""
    names = tuple(sources)
    return tuple(Rule(name, (Piece(target, part=(i, len(names))),)) for i, name in enumerate(names))


def drop(source: str, reason: str) -> Rule:
    """Tensors that we have no use for, and why."""
    return Rule(source, reason=reason)


def same(source: str, twin: str) -> Rule:
    """A second name of the same tensor: the two must be equal, and it counts once. Alone in a file, it stands for its twin."""
    return Rule(source, twin=twin)


FIRST_HALF = Take("first half of each row", lambda tensor: tensor.chunk(2, dim=1)[0])
SECOND_HALF = Take("second half of each row", lambda tensor: tensor.chunk(2, dim=1)[1])


@dataclass
class Renamed:
    """Tensors under our names, and what became of every source.

    Attributes:
        tensors: by our name.
        sources: our name -> the source tensors it was made of.
        notes: our name -> how, where it was more than renaming.
        dropped: source -> why.
        unknown: sources that no rule knows.
        where: the file, for errors.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    where: str = ""

    @property
    def all_sources(self) -> set[str]:
        """Every tensor of the file."""
        used = {source for sources in self.sources.values() for source in sources}
        return used | set(self.dropped) | set(self.unknown)

    def rename(self, old: str, new: str) -> None:
        """One of ours under another name of ours."""
        for table in (self.tensors, self.sources, self.notes):
            if old in table:
                table[new] = table.pop(old)  # type: ignore[assignment]

    def change(self, key: str, tensor: Tensor, note: str) -> None:
        """Other values for one of ours."""
        self.tensors[key] = tensor
        self.notes[key] = f"{self.notes[key]}; {note}" if key in self.notes else note

    def copy(self, old: str, new: str, note: str) -> None:
        """The same values for another of ours."""
        self.tensors[new], self.sources[new] = self.tensors[old], self.sources[old]
        self.notes[new] = note

    def discard(self, key: str, reason: str) -> None:
        """Leave one of ours out after all."""
        del self.tensors[key]
        self.notes.pop(key, None)
        sources = self.sources.pop(key)
        used = {source for others in self.sources.values() for source in others}
        self.dropped |= {source: reason for source in sources if source not in used}


def apply_rules(rules: Iterable[Rule], tensors: Mapping[str, Tensor], *, where: str) -> Renamed:
    """Put every source tensor where the first rule that knows it says.

    Args:
        rules: of the program that wrote the file.
        tensors: of the file.
        where: the file, for errors.

    Raises:
        CheckpointError: two names of one tensor hold different values; two sources want to be the same tensor of ours; one of
            ours is made of several sources and some are missing.
    """
    rules = tuple(rules)
    result = Renamed(where=where)
    parts: dict[str, dict[tuple[int, int], tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        rule, match = _find(rules, key)
        name = key
        while rule is not None and match is not None and rule.twin is not None:
            twin = _fill(rule.twin, match)
            if twin in tensors:
                if tensor.shape != tensors[twin].shape or not torch.equal(tensor, tensors[twin]):
                    raise CheckpointError(
                        f"{where}: {key} and {twin} are two names of one tensor, but hold different values",
                        "the file was edited or is damaged; use the one its program wrote",
                    )
                result.dropped[key] = f"the same tensor as {twin}, verified equal"
                rule = None
                break
            name = twin  # alone in the file: it stands for its twin
            rule, match = _find(rules, name)
        if rule is None or match is None:
            if key not in result.dropped:
                result.unknown.append(key)
            continue
        if not rule.pieces:
            result.dropped[key] = rule.reason
        for piece in rule.pieces:
            target = _fill(piece.target, match)
            value = tensor if piece.take is None else piece.take.of(tensor)
            slot = parts.setdefault(target, {})
            if piece.part in slot:
                raise CheckpointError(
                    f"{where}: {key} and {slot[piece.part][0]} are both {target}",
                    "the file holds two models or two versions of one; take out the other",
                )
            slot[piece.part] = (key, value)
            if piece.take is not None:
                result.notes[target] = piece.take.name
    for target, slot in parts.items():
        _assemble(result, target, slot)
    return result


def coverage(rules: Iterable[Rule], keys: Iterable[str]) -> float:
    """The share of keys that some rule knows, in [0, 1]."""
    rules, keys = tuple(rules), list(keys)
    return sum(_find(rules, key)[0] is not None for key in keys) / max(len(keys), 1)


def _find(rules: tuple[Rule, ...], key: str) -> tuple[Rule, re.Match[str]] | tuple[None, None]:
    for rule in rules:
        if match := rule.pattern.fullmatch(key):
            return rule, match
    return None, None


def _fill(template: str, match: re.Match[str]) -> str:
    groups = match.groupdict()

    def value(hole: re.Match[str]) -> str:
        name = hole.group(1)
        if name in groups:
            return groups[name]
        return str(_ARITHMETIC[name](int(groups[name.strip("2+-1")])))

    return re.sub(r"\{([\w+-]+)\}", value, template)


def _assemble(result: Renamed, target: str, slot: dict[tuple[int, int], tuple[str, Tensor]]) -> None:
    """One of ours from its parts, all of which have to be there."""
    ordered = sorted(slot.items())
    count = ordered[0][0][1]
    if len(ordered) != count:
        names = ", ".join(key for _, (key, _) in ordered)
        raise CheckpointError(
            f"{result.where}: {target} is made of {count} tensors, and only {names} is there",
            "the file is incomplete; use the one its program wrote",
        )
    result.sources[target] = tuple(key for _, (key, _) in ordered)
    pieces = [value for _, (_, value) in ordered]
    result.tensors[target] = pieces[0] if count == 1 else torch.cat(pieces)
    if count > 1:
        result.notes[target] = f"{count} tensors packed by rows"


@dataclass(frozen=True)
class Layout:
    """A program whose checkpoints we read.

    Attributes:
        title: its name, for people.
        rules: where its tensors go.
        settings: our settings that its code implies, given (names of the tensors in the file, hints).
        hints: name of a setting in the file's arguments or config -> our setting; several names must agree.
        required: argument -> the only value of it that we can build.
        num_queries: what published models have, where the file does not say.
        level_bias: whether the convolutions that make the levels have a bias.
        preprocessing: what it does to images: `resize`, `pad_divisor`.
        unsupported: part of a tensor's name -> what we lack, where it is known.
    """

    title: str
    rules: tuple[Rule, ...]
    settings: Callable[[Collection[str], Mapping[str, Any]], dict[str, Any]]
    hints: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    num_queries: int = 300
    level_bias: bool = True
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)


def encoder_and_decoder(prefix: str) -> tuple[Rule, ...]:
    """Layers as in Deformable DETR's code: norm2 follows self-attention in the decoder, norm1 cross-attention."""
    encoder, decoder = f"{prefix}encoder.layers.{{i}}.", f"{prefix}decoder.layers.{{i}}."
    ours, theirs = "encoder.layers.{i}.", "decoder.layers.{i}."
    return (
        move(f"{encoder}self_attn.{{rest}}", f"{ours}attention.{{rest}}"),
        move(f"{encoder}norm1.{{p}}", f"{ours}norm.{{p}}"),
        move(f"{encoder}linear{{k}}.{{p}}", f"{ours}ffn.linear{{k}}.{{p}}"),
        move(f"{encoder}norm2.{{p}}", f"{ours}ffn.norm.{{p}}"),
        move(f"{decoder}self_attn.{{rest}}", f"{theirs}self_attention.{{rest}}"),
        move(f"{decoder}norm2.{{p}}", f"{theirs}self_norm.{{p}}"),
        move(f"{decoder}cross_attn.{{rest}}", f"{theirs}cross_attention.{{rest}}"),
        move(f"{decoder}norm1.{{p}}", f"{theirs}cross_norm.{{p}}"),
        move(f"{decoder}linear{{k}}.{{p}}", f"{theirs}ffn.linear{{k}}.{{p}}"),
        move(f"{decoder}norm3.{{p}}", f"{theirs}ffn.norm.{{p}}"),
    )


def proposal_projection(prefix: str) -> tuple[Rule, ...]:
    """The linear layer and the norm in front of the proposals' heads."""
    return (
        move(f"{prefix}enc_output.{{p}}", "start.head.project.{p}"),
        move(f"{prefix}enc_output_norm.{{p}}", "start.head.norm.{p}"),
    )


def heads(decoder: str = "transformer.decoder.") -> tuple[Rule, ...]:
    """Heads in a list, which the decoder knows under a second name."""
    return (
        same(f"{decoder}class_embed.{{rest}}", "class_embed.{rest}"),
        same(f"{decoder}bbox_embed.{{rest}}", "bbox_embed.{rest}"),
        move("class_embed.{i}.{p}", "class_head.{i}.{p}"),
        move("bbox_embed.{i}.layers.{k}.{p}", "box_head.{i}.{2k}.{p}"),
    )


def mlp(source: str, target: str) -> Rule:
    """An MLP whose layers are numbered without the activations between them."""
    return move(f"{source}.layers.{{k}}.{{p}}", f"{target}.{{2k}}.{{p}}")


def original_rules(*backbones: Rule) -> tuple[Rule, ...]:
    """What Deformable DETR's code and its descendants share: backbone, levels, layers of encoder and decoder, heads."""
    return (
        *backbones,
        move("input_proj.{i}.0.{p}", "level.{i}.0.{p}"),
        move("input_proj.{i}.1.{p}", "level.{i}.1.{p}"),
        move("transformer.level_embed", "encoder.level_embed"),
        *encoder_and_decoder("transformer."),
        *heads(),
    )


# Arguments of their command lines.
ORIGINAL_HINTS = {
    "nheads": "num_heads",
    "enc_n_points": "num_points",
    "dec_n_points": "num_points",
    "dropout": "dropout",
    "num_queries": "num_queries",
}

# What the code of a program implies: how positions are made of boxes, how boxes are refined, the noise of denoising, and how
# many detections of an image are kept. Only detectron2 cuts boxes off at the border.
DEFORMABLE_MAP: dict[str, Any] = {"position_temperature": 10000.0, "position_offset": -0.5}
DEFORMABLE_CODE = DEFORMABLE_MAP | {
    "box_eps": 1e-5,
    "look_forward_twice": False,
    "max_detections": 100,
    "clamp_boxes": False,
}
# DAB-DETR's descendants: positions on the padded image, boxes clamped at 1e-3.
DN_CODE = DEFORMABLE_CODE | {"padded_positions": True, "box_eps": 1e-3, "label_noise": 0.2, "box_noise": 0.4}
DINO_CODE = DN_CODE | {
    "position_temperature": 20.0,
    "position_offset": 0.0,
    "refine_from": "raw",
    "look_forward_twice": True,
    "label_noise": 0.5,
    "box_noise": 1.0,
    "max_detections": 300,
}
