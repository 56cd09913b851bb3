"""Names of backbones in other programs, and which timm model a set of weights is.

All of them are the same two networks. ResNets are torchvision's (stride in the 3x3 convolution), whose names timm keeps; frozen
batch norms have no step counter. Swin's official code ends a stage with the merging that timm begins the next one with, and packs
query, key and value in that order as timm does; its detectors norm every output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from paqdetr.convert.keymap import Rule, Take, drop, move, split
from paqdetr.errors import CheckpointError

BODY = "backbone.body."
_COUNTER = "a step counter of batch norm, which frozen norms have no use for"
_INDEX = "follows from the window size"

# (bottlenecks?, blocks of each stage) and (width, blocks, window side) -> timm name.
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_SWINS: dict[tuple[int, tuple[int, ...], int], str] = {
    (96, (2, 2, 6, 2), 7): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), 7): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), 7): "swin_base_patch4_window7_224",
    (128, (2, 2, 18, 2), 12): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2), 7): "swin_large_patch4_window7_224",
    (192, (2, 2, 18, 2), 12): "swin_large_patch4_window12_384.ms_in22k",
}


def resnet(prefix: str) -> tuple[Rule, ...]:
    """torchvision's names behind a prefix; also timm's."""
    return (
        drop(f"{prefix}{{rest}}.num_batches_tracked", _COUNTER),
        move(f"{prefix}conv1.weight", f"{BODY}conv1.weight"),
        move(f"{prefix}bn1.{{rest}}", f"{BODY}bn1.{{rest}}"),
        move(f"{prefix}layer{{i}}.{{rest}}", f"{BODY}layer{{i}}.{{rest}}"),
    )


def detectron2_resnet(prefix: str) -> tuple[Rule, ...]:
    """detectron2's names: stages res2..res5, each norm inside its convolution, `shortcut` for the projection."""
    source, block = f"{prefix}res{{i}}.{{j}}.", f"{BODY}layer{{i-1}}.{{j}}."
    return (
        drop(f"{prefix}{{rest}}.num_batches_tracked", _COUNTER),
        move(f"{prefix}stem.conv1.weight", f"{BODY}conv1.weight"),
        move(f"{prefix}stem.conv1.norm.{{rest}}", f"{BODY}bn1.{{rest}}"),
        move(f"{source}conv{{k}}.weight", f"{block}conv{{k}}.weight"),
        move(f"{source}conv{{k}}.norm.{{rest}}", f"{block}bn{{k}}.{{rest}}"),
        move(f"{source}shortcut.weight", f"{block}downsample.0.weight"),
        move(f"{source}shortcut.norm.{{rest}}", f"{block}downsample.1.{{rest}}"),
    )


def swin(prefix: str) -> tuple[Rule, ...]:
    """The names of Swin's official detection code, which detectron2 keeps."""
    return (
        drop(f"{prefix}layers.{{i}}.blocks.{{j}}.attn.relative_position_index", _INDEX),
        move(f"{prefix}patch_embed.{{rest}}", f"{BODY}patch_embed.{{rest}}"),
        move(f"{prefix}layers.{{i}}.blocks.{{rest}}", f"{BODY}layers_{{i}}.blocks.{{rest}}"),
        move(f"{prefix}layers.{{i}}.downsample.{{rest}}", f"{BODY}layers_{{i+1}}.downsample.{{rest}}"),
        move(f"{prefix}norm{{i}}.{{p}}", "backbone.stage_norms.{i}.{p}"),
    )


# mmdetection merges patches with nn.Unfold, whose columns are ordered by channel, then row by row; the official code has one cell
# after the other, column by column.
_UNFOLDED = Take(
    "the four merged cells in Swin's official order",
    lambda tensor: tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2),
)


def mmdet_swin(prefix: str) -> tuple[Rule, ...]:
    """mmdetection's names: stages instead of layers, `w_msa` around the attention, `ffn` for the MLP."""
    source, target = f"{prefix}stages.{{i}}.blocks.{{j}}.", f"{BODY}layers_{{i}}.blocks.{{j}}."
    merging, home = f"{prefix}stages.{{i}}.downsample.", f"{BODY}layers_{{i+1}}.downsample."
    return (
        drop(f"{source}attn.w_msa.relative_position_index", _INDEX),
        move(f"{prefix}patch_embed.projection.{{p}}", f"{BODY}patch_embed.proj.{{p}}"),
        move(f"{prefix}patch_embed.norm.{{p}}", f"{BODY}patch_embed.norm.{{p}}"),
        move(f"{source}attn.w_msa.{{rest}}", f"{target}attn.{{rest}}"),
        move(f"{source}ffn.layers.0.0.{{p}}", f"{target}mlp.fc1.{{p}}"),
        move(f"{source}ffn.layers.1.{{p}}", f"{target}mlp.fc2.{{p}}"),
        move(f"{source}norm{{k}}.{{p}}", f"{target}norm{{k}}.{{p}}"),
        split(f"{merging}reduction.weight", (f"{home}reduction.weight", _UNFOLDED)),
        split(f"{merging}norm.{{p}}", (f"{home}norm.{{p}}", _UNFOLDED)),
        move(f"{prefix}norm{{i}}.{{p}}", "backbone.stage_norms.{i}.{p}"),
    )


def torchvision_swin(prefix: str) -> tuple[Rule, ...]:
    """torchvision's names: features.0 is the patches, 1, 3, 5, 7 the stages, 2, 4, 6 the mergings between them."""
    rules = [
        drop(f"{prefix}features.{{i}}.{{j}}.attn.relative_position_index", _INDEX),
        move(f"{prefix}features.0.0.{{p}}", f"{BODY}patch_embed.proj.{{p}}"),
        move(f"{prefix}features.0.2.{{p}}", f"{BODY}patch_embed.norm.{{p}}"),
    ]
    for stage in range(4):
        source, target = f"{prefix}features.{2 * stage + 1}.{{j}}.", f"{BODY}layers_{stage}.blocks.{{j}}."
        rules += [
            move(f"{source}mlp.0.{{p}}", f"{target}mlp.fc1.{{p}}"),
            move(f"{source}mlp.3.{{p}}", f"{target}mlp.fc2.{{p}}"),
            move(f"{source}{{rest}}", f"{target}{{rest}}"),
        ]
        if stage:
            merging = f"{prefix}features.{2 * stage}.{{rest}}"
            rules.append(move(merging, f"{BODY}layers_{stage}.downsample.{{rest}}"))
    return tuple(rules)


def backbone_name(tensors: Mapping[str, Tensor], *, where: str) -> str:
    """The timm model whose weights these are, by blocks and widths.

    Raises:
        CheckpointError: none of those we know.
    """
    if f"{BODY}conv1.weight" in tensors:
        blocks = _blocks(tensors, f"{BODY}layer{{}}.", range(1, 5))
        plain = tuple(tensors[f"{BODY}conv1.weight"].shape) == (64, 3, 7, 7)
        inner = tensors.get(f"{BODY}layer1.0.conv2.weight")
        name = _RESNETS.get((f"{BODY}layer1.0.conv3.weight" in tensors, blocks))
        if name is not None and plain and inner is not None and tuple(inner.shape) == (64, 64, 3, 3):
            return name
        raise CheckpointError(
            f"{where}: a ResNet with {blocks} blocks, which is none we know", "name it: backbone=TIMM_NAME"
        )
    if f"{BODY}patch_embed.proj.weight" in tensors:
        width = tensors[f"{BODY}patch_embed.proj.weight"].shape[0]
        blocks = _blocks(tensors, f"{BODY}layers_{{}}.blocks.", range(4))
        table = tensors.get(f"{BODY}layers_0.blocks.0.attn.relative_position_bias_table")
        window = 0 if table is None else (round(table.shape[0] ** 0.5) + 1) // 2
        name = _SWINS.get((width, blocks, window))
        if name is not None:
            return name
        raise CheckpointError(
            f"{where}: a Swin of width {width} with {blocks} blocks and window {window}, which is none we know",
            "name it: backbone=TIMM_NAME",
        )
    raise CheckpointError(
        f"{where}: no ResNet and no Swin among its tensors",
        "other backbones have no key map yet: convert with --partial and backbone=TIMM_NAME, its weights then start anew",
    )


def _blocks(tensors: Mapping[str, Tensor], stage: str, numbers: Sequence[int]) -> tuple[int, ...]:
    """How many blocks each stage has."""
    counts = []
    for number in numbers:
        prefix = stage.format(number)
        counts.append(len({key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)}))
    return tuple(counts)
