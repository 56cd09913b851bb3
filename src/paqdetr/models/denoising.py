"""Denoising: noised ground-truth boxes that the decoder learns to repair, or to reject.

Sources: DN-DETR (arXiv 2203.01305, section 4) for `PlainDenoising`; DINO (arXiv 2203.03605, section 3.3) for
`ContrastiveDenoising`. Noised boxes stand in groups, which see the matching queries but not each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from paqdetr.models.tokens import inverse_sigmoid
from paqdetr.structures import Targets

# The published codes of DN-DETR and DINO pass noised boxes through the logit: none of their numbers comes nearer to 0 or 1.
_EPS = 1e-3


@dataclass(frozen=True, slots=True)
class DenoisingQueries:
    """Queries that precede the matching ones in the decoder.

    A group holds `boxes` slots with each box moved slightly, then, if `kinds` is 2, as many with each box moved strongly.

    Attributes:
        content: (B, groups * kinds * boxes, d).
        reference: (B, groups * kinds * boxes, 4) cxcywh in [0, 1].
        groups: how many groups.
        boxes: slots of a kind in a group: the most boxes any image of the batch has, at least 1.
        kinds: 1, positives alone; 2, positives and negatives.
        counted: (B, groups * kinds * boxes) bool, whose class loss counts; None: all. DN-DETR leaves out empty slots. DINO counts
            them, unless the whole batch has no box: then neither has a denoising loss.
    """

    content: Tensor
    reference: Tensor
    groups: int
    boxes: int
    kinds: int = 2
    counted: Tensor | None = None

    def __len__(self) -> int:
        return self.groups * self.kinds * self.boxes

    def positives(self, num_boxes: int) -> tuple[Tensor, Tensor]:
        """(query indices, target indices), each (groups * num_boxes,), of an image with `num_boxes` boxes."""
        target = torch.arange(num_boxes).repeat(self.groups)
        start = torch.arange(self.groups).repeat_interleave(num_boxes) * self.kinds * self.boxes
        return start + target, target

    def attention_mask(self, num_queries: int, device: torch.device) -> Tensor:
        """(N, N) bool over denoising and matching queries, True where attention is forbidden.

        Matching queries may not see noised boxes, which would give them the answer; groups may not see each other.
        """
        total = len(self) + num_queries
        group = torch.full((total,), self.groups, device=device)
        members = torch.arange(self.groups, device=device).repeat_interleave(self.kinds * self.boxes)
        group[: len(self)] = members
        to_denoising = torch.arange(total, device=device) < len(self)
        return to_denoising[None, :] & (group[:, None] != group[None, :])


class ContrastiveDenoising(nn.Module):
    """DINO's: boxes moved a little are to be repaired, boxes moved more are to be rejected.

    Args:
        num_queries: positive queries per image, shared out over the groups.
        label_noise: twice the share of labels that are drawn anew, as in DINO's code.
        box_noise: corners move by up to this times half the side (positives), or up to twice that (negatives).
    """

    def __init__(
        self, *, num_queries: int, num_classes: int, dim: int, label_noise: float = 0.5, box_noise: float = 1.0
    ) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.label_noise, self.box_noise = label_noise, box_noise
        self.label_embed = nn.Embedding(num_classes, dim)

    def forward(self, targets: Sequence[Targets]) -> DenoisingQueries:
        """Targets of B images -> queries. Without a single box one group of empty slots remains, so
        that the embedding has a gradient, of zero."""
        most = max(len(target) for target in targets)
        groups = max(self.num_queries // most, 1) if most else 1
        labels, boxes, exists = _repeated(targets, groups * 2, self.label_embed.weight)
        slots = max(most, 1)
        negative = (torch.arange(boxes.shape[1], device=boxes.device) // slots % 2).bool()  # (N,)
        noisy_labels = _flip(labels, self.label_noise * 0.5, self.label_embed.num_embeddings)
        return DenoisingQueries(
            content=self.label_embed(noisy_labels) * exists[..., None],
            reference=_references(self._move(boxes, negative), exists),
            groups=groups,
            boxes=slots,
            counted=None if most else exists,
        )

    def _move(self, boxes: Tensor, negative: Tensor) -> Tensor:
        """Move both corners of (B, N, 4) boxes, each by a random sign times u times half the side.

        Corners of a negative can pass each other, which they do on both axes independently with probability 1/4 at
        `box_noise` 1. As in DINO's code (`models/dino/dn_components.py`) such a side then has no length: sorted corners would
        lay a box of full size over the object, to be learnt as background.
        """
        center, size = boxes[..., :2], boxes[..., 2:]
        corners = torch.cat([center - size / 2, center + size / 2], dim=-1)
        amount = torch.rand_like(boxes) + negative[:, None]  # [0, 1) or [1, 2)
        sign = torch.randint_like(boxes, 2) * 2 - 1
        half = (size / 2).repeat(1, 1, 2)
        low, high = (corners + sign * amount * half * self.box_noise).clamp(0, 1).chunk(2, dim=-1)
        return torch.cat([(low + high) / 2, (high - low).clamp(min=0)], dim=-1)


class PlainDenoising(nn.Module):
    """DN-DETR's: every group holds each box once, moved, to be repaired. The last channel of the content marks denoising queries
    (1) against matching ones (0).

    Args:
        groups: noised boxes per ground-truth box.
        dim: width of a query; labels have one channel less.
        label_noise: share of labels that are drawn anew.
        box_noise: centres move by up to this times half the side, sides by up to this times themselves.
    """

    def __init__(
        self, *, groups: int, num_classes: int, dim: int, label_noise: float = 0.2, box_noise: float = 0.4
    ) -> None:
        super().__init__()
        self.groups = groups
        self.label_noise, self.box_noise = label_noise, box_noise
        self.label_embed = nn.Embedding(num_classes, dim - 1)

    def forward(self, targets: Sequence[Targets]) -> DenoisingQueries:
        """Targets of B images -> queries; without a single box, empty slots."""
        labels, boxes, exists = _repeated(targets, self.groups, self.label_embed.weight)
        noisy_labels = _flip(labels, self.label_noise, self.label_embed.num_embeddings)
        content = F.pad(self.label_embed(noisy_labels), (0, 1), value=1.0) * exists[..., None]
        reach = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1)
        moved = boxes + (torch.rand_like(boxes) * 2 - 1) * reach * self.box_noise
        return DenoisingQueries(
            content=content,
            reference=_references(moved.clamp(0, 1), exists),
            groups=self.groups,
            boxes=boxes.shape[1] // self.groups,
            kinds=1,
            counted=exists,
        )


Denoising = ContrastiveDenoising | PlainDenoising


def _repeated(targets: Sequence[Targets], times: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (B, N), boxes (B, N, 4) and whether there is one (B, N), each image's repeated `times` times; at least one slot."""
    device = like.device
    labels = pad_sequence([t.labels.to(device) for t in targets], batch_first=True)  # (B, G)
    # A wrong label must not end a GPU's program before the matching can name it.
    labels = labels.clamp(0, len(like) - 1)
    boxes = pad_sequence(
        [t.boxes.to(device, torch.promote_types(like.dtype, torch.float32)) for t in targets], batch_first=True
    )
    if labels.shape[1] == 0:
        labels, boxes = labels.new_zeros(len(targets), 1), boxes.new_zeros(len(targets), 1, 4)
    counts = torch.tensor([len(target) for target in targets], device=device)
    exists = torch.arange(labels.shape[1], device=device) < counts[:, None]
    return labels.repeat(1, times), boxes.repeat(1, times, 1), exists.repeat(1, times)


def _flip(labels: Tensor, share: float, num_classes: int) -> Tensor:
    """Draw a share of the labels anew."""
    flipped = torch.rand(labels.shape, device=labels.device) < share
    return torch.where(flipped, torch.randint_like(labels, num_classes), labels)


def _references(boxes: Tensor, exists: Tensor) -> Tensor:
    """Noised boxes as the decoder starts from them: held away from 0 and 1 as published; for empty slots, one in the middle."""
    held = inverse_sigmoid(boxes, _EPS).sigmoid()
    return torch.where(exists[..., None], held, held.new_full((), 0.5))
