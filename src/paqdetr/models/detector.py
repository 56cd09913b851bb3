"""The detector: the parts in the order in which an image passes through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paqdetr.checkpoint import write_checkpoint
from paqdetr.config import ModelConfig
from paqdetr.errors import ConfigError, import_extra
from paqdetr.models.backbone import Backbone
from paqdetr.models.decoder import Decoder, LayerHeads
from paqdetr.models.denoising import Denoising
from paqdetr.models.encoder import DeformableEncoder
from paqdetr.models.inference import detect_batch
from paqdetr.models.outputs import Decoded, DetectorOutput
from paqdetr.models.proposals import Initializer, ProposalStart, QueryInit, query_features
from paqdetr.models.queries import FeatureQueries, QueryGroup, QuerySource, StaticQueries, attention_mask
from paqdetr.models.tokens import Neck, Tokens
from paqdetr.paq import Mixture
from paqdetr.paq.costs import require_targets
from paqdetr.preprocessing import Preprocessing
from paqdetr.runtime.predictor import PredictMixin
from paqdetr.structures import ClassTable, Detections, OperatingPoint, Targets
from paqdetr.text import Summary, some

if TYPE_CHECKING:
    from paqdetr.models.auxiliary import AuxiliaryHeads

TRAINING_ONLY = ("hybrid_source.", "hybrid_heads.", "start.head.hybrid_", "auxiliary.")
"""Beginnings of the names of parameters that nothing reads outside of training, but for those of denoising."""


class Detector(PredictMixin, Summary, nn.Module):
    """A DETR with deformable attention, put together from parts; `create_model` builds one by name.

    `model("photo.jpg")` is `model.predict("photo.jpg")`, and so with everything that `predict` takes but tensors: a batch of
    normalised images as a tensor goes through `forward`, as in any module. `torch.nn.Module.__repr__(model)` lists the layers.

    Attributes:
        config: the architecture.
        name: the model's name.
        classes: contiguous index -> the data set's category id and name.
        preprocessing: what an image goes through before the model sees it.
        operating_point: the threshold and the suppression of duplicates that its evaluation recommends, if there was one.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        name: str,
        classes: ClassTable,
        preprocessing: Preprocessing,
        backbone: Backbone,
        neck: Neck,
        encoder: DeformableEncoder,
        start: Initializer,
        query_source: QuerySource | None,
        decoder: Decoder,
        denoising: Denoising | None,
        hybrid_source: StaticQueries | FeatureQueries | None,
        hybrid_heads: LayerHeads | None,
        auxiliary: AuxiliaryHeads | None = None,
    ) -> None:
        super().__init__()
        self.config, self.name, self.classes, self.preprocessing = config, name, classes, preprocessing
        self.operating_point = OperatingPoint()
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.start = start
        self.query_source = query_source
        self.decoder = decoder
        self.denoising = denoising
        self.hybrid_source = hybrid_source
        self.hybrid_heads = hybrid_heads
        self.auxiliary = auxiliary

    def __call__(self, images: Any, *args: Any, **how: Any) -> Any:
        """`forward` of a batch as a tensor, `predict` of anything else.

        Raises:
            ConfigError: an argument of `predict` beside a tensor.
        """
        if isinstance(images, Tensor):
            for word in (word for word in how if word not in ("padding_mask", "targets")):
                raise ConfigError(
                    f"{word}: called with a tensor, the model does its forward pass, which takes padding_mask and targets",
                    f"model.predict(tensor, {word}=...) takes pictures",
                )
            return super().__call__(images, *args, **how)
        return self.predict(images, *args, **how)

    def train(self, mode: bool = True, **other: object) -> Self:
        """Training mode, or evaluation mode if `mode` is false, as of any module; `paqdetr.train` trains.

        Raises:
            ConfigError: it was called to train the model.
        """
        if other or not isinstance(mode, bool):
            raise ConfigError(
                "Detector.train sets the mode of the layers; it takes no data and no settings",
                f"paqdetr.train({self.name!r}, data=..., output=..., init=CHECKPOINT) trains",
            )
        return super().train(mode)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None, targets: Sequence[Targets] | None = None
    ) -> DetectorOutput:
        """Detect.

        Args:
            images: (B, 3, H, W) of the weights' dtype, normalised as `preprocessing` does.
            padding_mask: (B, H, W) bool, True at padding, which lies right of each image and below it; None if no image has any.
                A `pixel_mask` of transformers says the opposite: give `pixel_mask == 0`.
            targets: of the B images, for denoising in training; ignored in evaluation mode.

        Raises:
            ValueError: images or a mask of another shape or dtype, or not one target of each image; on a CPU also a mask that
                begins with padding. Values of targets are checked by the criterion, where they are matched.
        """
        if self.training and targets is not None:
            require_targets(targets, batch=len(images))
        with _autocast(next(self.parameters())):
            features = self.extract(images, padding_mask)
            return self.detect(features, targets if self.training else None)

    def extract(self, images: Tensor, padding_mask: Tensor | None = None) -> Tokens:
        """Backbone and neck: (B, 3, H, W) -> tokens of all levels. Arguments and errors are those of `forward`, which enters
        autocast where the weights are of half precision: around this and `detect` the caller does.
        """
        if images.ndim != 4:
            raise ValueError(
                f"images: expected a normalised batch (B, 3, H, W), found {tuple(images.shape)}; "
                "model.predict(image) takes a picture as a tensor (C, H, W) with values from 0 to 1, or uint8"
            )
        dtype = next(self.parameters()).dtype
        if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(
                f"images: expected {dtype}, as the weights are, found {images.dtype}; give images.to({dtype})"
            )
        padding_mask = _checked_mask(padding_mask, images)
        maps = self.neck(self.backbone(images), padding_mask)
        return Tokens.from_maps(
            maps, padding_mask, temperature=self.config.position_temperature, offset=self.config.position_offset
        )

    def detect(self, features: Tokens, targets: Sequence[Targets] | None = None) -> DetectorOutput:
        """Encoder to heads. Predictions do not depend on padded tokens, neither their content nor their number; losses of
        auxiliary heads do, as published.

        Args:
            features: of `extract`.
            targets: given, what exists in training alone takes part: denoising and hybrid queries, auxiliary heads and theirs.
        """
        memory = self.encoder(features)
        extra = 0 if targets is None else self.config.num_hybrid
        start = self.start(memory, extra) if isinstance(self.start, ProposalStart) else self.start(memory)
        mixture = self._content(memory, start)

        count = self.config.num_queries
        matching = _group(start, slice(0, count), self._marked(mixture.content))
        groups, denoising = [matching], None
        if self.denoising is not None and targets is not None:
            denoising = self.denoising(targets)
            groups.insert(0, QueryGroup(denoising.content, denoising.reference))
        auxiliary = None if self.auxiliary is None or targets is None else self.auxiliary(memory, targets)
        if auxiliary is not None:
            groups += [customised.queries for customised in auxiliary.customised]
        sizes = [len(group) for group in groups]
        first = 0 if denoising is None else len(denoising)
        further = sizes[1 if denoising is None else 2 :]
        forbidden = attention_mask(denoising, count, further, features.values.device)
        rows = slice(first, first + count)
        decoded = self.decoder(QueryGroup.join(groups), memory, forbidden, matching=rows).split(sizes)

        denoised = None if denoising is None else decoded.pop(0)
        layers, *others = decoded
        proposals, hybrid_proposals = start.proposals, None
        if extra and proposals is not None and self.config.hybrid_heads != "shared":
            hybrid_proposals = proposals.part(count, None)
        return DetectorOutput(
            pred_logits=layers.logits[-1],
            pred_boxes=layers.boxes[-1],
            layers=layers,
            proposals=None if proposals is None else proposals.part(0, count),
            mixture=mixture,
            denoised=denoised,
            denoising=denoising,
            hybrid=self._hybrid(start, memory) if extra else None,
            hybrid_proposals=hybrid_proposals,
            auxiliary=auxiliary,
            customised=tuple(others),
        )

    def checkpoint_activations(self, on: bool = True) -> None:
        """Have the layers of encoder and decoder keep their inputs alone for the backward pass, and compute the rest again: less
        memory, a slower training step, the same gradients."""
        self.encoder.checkpoint_activations = self.decoder.checkpoint_activations = on

    def aux_losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the query source, unweighted, by name."""
        return {} if self.query_source is None else self.query_source.aux_losses()

    def _content(self, memory: Tokens, start: QueryInit) -> Mixture:
        """Content of the matching queries, (B, n, content_dim)."""
        count = self.config.num_queries
        if self.query_source is None:  # the host makes it from the proposals
            assert start.content is not None
            return Mixture(content=start.content[:, :count], weights=None)
        boxes = None if start.proposals is None else start.reference[:, :count]
        features = None
        if self.config.uses_query_features:
            raw = self.config.queries == "tokens"
            features = query_features(start, memory, num_heads=self.config.num_heads, raw=raw)[:, :count]
            features = features.detach() if self.config.detach_query_features else features
        return self.query_source(memory.values, memory.spatial_shapes, memory.padding_mask, boxes, features)

    def _hybrid(self, start: QueryInit, memory: Tokens) -> Decoded:
        """The hybrid queries, which have a pass through the decoder of their own: they and the others do not see each other."""
        count, source = self.config.num_queries, self.hybrid_source
        content = None  # the start's
        if self.config.hybrid_heads == "all":
            tokens = query_features(start, memory, num_heads=self.config.num_heads, raw=True)[:, count:].detach()
            source = source or self.query_source
            assert source is not None
            content = self._marked(source(memory.values, memory.spatial_shapes, query_features=tokens).content)
        elif source is not None:
            content = source(memory.values, memory.spatial_shapes).content
        group = _group(start, slice(count, None), content)
        return self.decoder(group, memory, matching=None, heads=self.hybrid_heads)

    def _marked(self, content: Tensor) -> Tensor:
        """With DN-DETR's indicator channel, 0 for "no denoising query", where the host has one: (B, n, d)."""
        return F.pad(content, (0, self.config.dim - self.config.content_dim))

    def _detect_pixels(
        self,
        pixels: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        *,
        threshold: float = 0.0,
        names: Sequence[int | str] = (),
    ) -> Iterator[Detections]:
        return detect_batch(self, pixels, sizes, threshold=threshold, names=names)

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        first, size = next(self.parameters()), self.preprocessing.image_size
        weights = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        return f"Detector {self.name}", [
            ("classes", f"{len(self.classes)}: {some(self.classes.names, 8)}"),
            (
                "images",
                f"long side {size}" if isinstance(size, int) else "short side {}, long side at most {}".format(*size),
            ),
            ("queries", f"{self.config.num_queries}"),
            ("weights", f"{weights:.1f} M, {str(first.dtype).removeprefix('torch.')} on {first.device}"),
            ("evaluation", self.operating_point.shown),
        ]

    def save(self, path: str | Path, **extra: Any) -> None:
        """Write weights, config, classes and preprocessing as one safetensors file that `paqdetr.load` reads.

        Args:
            path: of the file, which appears whole or not at all.
            extra: metrics, step...: goes into the header as well.

        Raises:
            StorageError: it cannot be written.
        """
        header = {
            "name": self.name,
            "model": self.config.model_dump(mode="json"),
            "classes": [{"id": i, "name": name} for i, name in zip(self.classes.ids, self.classes.names, strict=True)],
            "preprocessing": self.preprocessing.to_dict(),
            **({} if self.operating_point == OperatingPoint() else {"operating_point": asdict(self.operating_point)}),
            **extra,
        }
        write_checkpoint(path, self.state_dict(), header)

    def save_pretrained(self, folder: str | Path, **how: Any) -> None:
        """Write the folder of a model on the Hugging Face Hub: model.safetensors, config.json and a model card.

        Args:
            folder: made if absent.
            how: arguments of huggingface_hub's `ModelHubMixin.save_pretrained`.

        Raises:
            BackendError: huggingface_hub is not installed.
            StorageError: something cannot be written.
        """
        import_extra("paqdetr.models.hub", "hub").SharedDetector(self).save_pretrained(folder, **how)

    def push_to_hub(self, repo: str, **how: Any) -> str:
        """Upload the model to the Hub as "user/name"; the address of the commit.

        Args:
            how: arguments of `ModelHubMixin.push_to_hub`, such as `private=True`.

        Raises:
            BackendError: huggingface_hub is not installed.
            ConfigError: nobody is logged in, or may write there; or it is to be private and is public.
        """
        hub = import_extra("paqdetr.models.hub", "hub")
        with hub.hub_errors(repo):
            hub.make_repository(repo, private=how.get("private"), token=how.get("token"))
            return hub.SharedDetector(self).push_to_hub(repo, **how)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str = "cpu", **how: Any) -> Detector:
        """A model of the Hub, or what `paqdetr.load` finds at a path, in evaluation mode.

        Args:
            name: "user/name", or the path of a folder that `save_pretrained` has written, of a run or of a .safetensors file.
            device: where to put it.
            how: of a model of the Hub: arguments of `ModelHubMixin.from_pretrained`, such as `revision`.

        Raises:
            CheckpointError: there is none, or it is damaged.
            BackendError: huggingface_hub is not installed.
        """
        return import_extra("paqdetr.models.hub", "hub").from_pretrained(name, device=device, **how)


def _autocast(weight: Tensor) -> AbstractContextManager[object]:
    """Positions and boxes are float32 in a model of half precision, too: autocast brings the two together."""
    device = weight.device.type
    if weight.dtype not in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, weight.dtype)


def _checked_mask(mask: Tensor | None, images: Tensor) -> Tensor | None:
    """The mask itself, or None where it is known to mark nothing; other sizes, dtypes and meanings would silently give other
    boxes."""
    if mask is None:
        return None
    wanted = (images.shape[0], *images.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) != wanted:
        raise ValueError(
            f"padding_mask: expected {wanted} bool, True at padding, found {tuple(mask.shape)} {mask.dtype}; "
            "a pixel_mask with 1 at the image becomes one by `pixel_mask == 0`"
        )
    if mask.device.type != "cpu":
        return mask  # looking at its values would be a GPU sync
    if mask[:, 0, 0].any():
        first = int(mask[:, 0, 0].int().argmax())
        raise ValueError(
            f"padding_mask: True at the first pixel of image {first} of the batch, but True is padding, which lies right of an "
            "image and below it; invert a mask that is True at the image"
        )
    return mask if mask.any() else None


def _group(start: QueryInit, rows: slice, content: Tensor | None) -> QueryGroup:
    """Some rows of a start, with content of their own or the start's."""
    if content is None:
        assert start.content is not None
        content = start.content[:, rows]
    position = None if start.position is None else start.position[:, rows]
    return QueryGroup(content=content, reference=start.reference[:, rows], position=position)
