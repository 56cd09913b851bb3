"""Collaborative hybrid assignments: auxiliary heads on the encoder's output, and their positives as queries of the decoder.

Source: Co-DETR (arXiv 2211.12860), sections 3.2 and 3.3. Nothing of it takes part outside of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from paqdetr.models.auxiliary_heads import BACKGROUND, AtssHead, FasterRcnn, Maps, Samples, Truth
from paqdetr.models.queries import QueryGroup
from paqdetr.models.tokens import Tokens, sine_proposals
from paqdetr.paq import Pairs
from paqdetr.paq.extractor import norm_groups
from paqdetr.structures import Targets

# So many queries a head has at least, as published.
_FEWEST = 9


@dataclass(frozen=True, slots=True)
class CustomisedQueries:
    """Queries of the decoder that begin at what a head learned from, each of which knows its box.

    Attributes:
        name: of the head.
        queries: content (B, N, d) and boxes (B, N, 4).
        pairs: which query learns which box, of each image; the others learn background.
        counted: (B, N) bool, False for empty slots, which nothing is learned from.
    """

    name: str
    queries: QueryGroup
    pairs: list[Pairs]
    counted: Tensor


@dataclass(frozen=True, slots=True)
class Auxiliary:
    """What the auxiliary heads give in a training step.

    Attributes:
        losses: scalars by name, each a mean over what its head learned from, weighted among each other as published.
        customised: the queries of each head; empty if there shall be none.
    """

    losses: dict[str, Tensor]
    customised: list[CustomisedQueries]


class AuxiliaryHeads(nn.Module):
    """The heads, the further level that they see, and the position embedding of their queries.

    Args:
        names: heads of `HEADS`.
        strides: of the encoder's levels, in pixels.
        samples: proposals an image that the second stage of Faster R-CNN learns from.
        queries: positive queries an image and head at most; 0 for none.
    """

    def __init__(
        self, *, names: Sequence[str], dim: int, num_classes: int, strides: Sequence[int], samples: int, queries: int
    ) -> None:
        super().__init__()
        self.dim, self.num_classes, self.queries = dim, num_classes, queries
        self.strides = (*strides, 2 * strides[-1])
        self.downsample = nn.Sequential(
            nn.Conv2d(dim, dim, 3, stride=2, padding=1), nn.GroupNorm(norm_groups(dim), dim)
        )
        self.heads = nn.ModuleDict({name: HEADS[name](dim, num_classes, self.strides, samples) for name in names})
        self.embed = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(2 * dim, dim), nn.LayerNorm(dim)) for name in names if queries}
        )

    def forward(self, memory: Tokens, targets: Sequence[Targets]) -> Auxiliary:
        """Losses of the heads, and the queries that they give.

        Args:
            memory: the encoder's tokens.
            targets: of the B images.
        """
        maps = self._maps(memory)
        rows, columns = maps.valid[0][:, :, 0].sum(1), maps.valid[0][:, 0].sum(1)
        sizes = (torch.stack([rows, columns], dim=1) * self.strides[0]).tolist()
        truth = [self._truth(target, size, memory.centers) for target, size in zip(targets, sizes, strict=True)]
        losses: dict[str, Tensor] = {}
        customised = []
        for name, head in self.heads.items():
            own, samples = head(maps, truth)
            losses |= own
            if name in self.embed:
                customised.append(self._customise(name, samples, truth))
        return Auxiliary(losses, customised)

    def _truth(self, target: Targets, size: Sequence[float], like: Tensor) -> Truth:
        """Boxes in pixels, where the tokens are."""
        height, width = size
        scale = like.new_tensor([width, height, width, height])
        boxes = box_convert(target.boxes.to(scale), "cxcywh", "xyxy") * scale
        # A wrong label must not end a GPU's program before the matching can name it.
        labels = target.labels.to(like.device).clamp(0, self.num_classes - 1)
        return Truth(labels, boxes, (height, width))

    def _maps(self, memory: Tokens) -> Maps:
        """The levels as maps, and the further one."""
        areas = [height * width for height, width in memory.spatial_shapes]
        padding = memory.padding_mask
        if padding is None:
            padding = torch.zeros(memory.values.shape[:2], dtype=torch.bool, device=memory.values.device)
        values = memory.values.masked_fill(padding[..., None], 0.0)
        features = [
            x.transpose(1, 2).unflatten(2, shape)
            for x, shape in zip(values.split(areas, dim=1), memory.spatial_shapes, strict=True)
        ]
        valid = [
            ~x.unflatten(1, shape) for x, shape in zip(padding.split(areas, dim=1), memory.spatial_shapes, strict=True)
        ]
        last = valid[-1][:, ::2, ::2]
        further = self.downsample(features[-1]).masked_fill(~last[:, None], 0.0)
        return Maps([*features, further], [*valid, last], self.strides)

    def _customise(self, name: str, samples: Sequence[Samples], truth: Sequence[Truth]) -> CustomisedQueries:
        """All positives of a head, drawn at random where they are too many, and random background beside them where an image has
        fewer than the fullest of its batch."""
        positives = [(image.matched >= 0).nonzero()[:, 0] for image in samples]
        count = min(max(_FEWEST, *map(len, positives)), self.queries)
        references, pairs, filled = [], [], []
        for image, positive, target in zip(samples, positives, truth, strict=True):
            kept = _some(positive, count).sort().values if len(positive) > count else positive
            background = _some((image.matched == BACKGROUND).nonzero()[:, 0], count - len(kept))
            rows = torch.cat([kept, background])
            height, width = target.size
            boxes = image.boxes[rows] / image.boxes.new_tensor([width, height, width, height])
            boxes = box_convert(boxes, "xyxy", "cxcywh").clamp(0, 1)
            references.append(torch.cat([boxes, boxes.new_full((count - len(rows), 4), 0.5)]))
            pairs.append(Pairs(torch.arange(len(kept), device=kept.device), image.matched[kept]))
            filled.append(len(rows))
        reference = torch.stack(references)  # (B, N, 4)
        slots = torch.arange(count, device=reference.device)
        counted = slots < torch.tensor(filled, device=reference.device)[:, None]
        sine = sine_proposals(reference, self.dim // 2)  # (B, N, 2 d)
        embed = self.embed[name]
        content = embed(sine.to(next(embed.parameters()).dtype)) * counted[..., None]
        return CustomisedQueries(name, QueryGroup(content, reference), pairs, counted)


HEADS: dict[str, Callable[[int, int, Sequence[int], int], nn.Module]] = {
    "faster_rcnn": lambda dim, num_classes, strides, samples: FasterRcnn(
        dim=dim, num_classes=num_classes, strides=strides, samples=samples
    ),
    "atss": lambda dim, num_classes, strides, samples: AtssHead(dim=dim, num_classes=num_classes, strides=strides),
}


def _some(rows: Tensor, count: int) -> Tensor:
    """So many of them at random, or all if there are fewer."""
    return rows[torch.randperm(len(rows), device=rows.device)[:count]]
