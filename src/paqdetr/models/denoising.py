"""Contrastive denoising: noisy copies of the ground truth that the decoder learns to repair or to reject.

Source: DINO (arXiv 2203.03605, section 3.3), building on DN-DETR (arXiv 2203.01305).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from paqdetr.structures import Targets


@dataclass(frozen=True, slots=True)
class DenoisingQueries:
    """Queries that precede the matching ones in the decoder.

    A group holds `boxes` slots with a slightly moved copy of each box, then as many with a strongly moved one.

    Attributes:
        content: (B, groups * 2 * boxes, d).
        reference: (B, groups * 2 * boxes, 4) cxcywh in [0, 1].
        groups: how many groups.
        boxes: slots of a kind in a group: the most boxes any image of the batch has, at least 1.
    """

    content: Tensor
    reference: Tensor
    groups: int
    boxes: int

    def __len__(self) -> int:
        return self.groups * 2 * self.boxes

    def positives(self, num_boxes: int) -> tuple[Tensor, Tensor]:
        """(query indices, target indices), each (groups * num_boxes,), of an image with `num_boxes` boxes."""
        target = torch.arange(num_boxes).repeat(self.groups)
        start = torch.arange(self.groups).repeat_interleave(num_boxes) * 2 * self.boxes
        return start + target, target

    def attention_mask(self, num_queries: int, device: torch.device) -> Tensor:
        """(N, N) bool over denoising and matching queries, True where attention is forbidden.

        Matching queries may not see the copies, which would tell them the answer; groups may not see each other.
        """
        total = len(self) + num_queries
        group = torch.full((total,), self.groups, device=device)
        group[: len(self)] = torch.arange(self.groups, device=device).repeat_interleave(2 * self.boxes)
        to_copies = torch.arange(total, device=device) < len(self)
        return to_copies[None, :] & (group[:, None] != group[None, :])


class ContrastiveDenoising(nn.Module):
    """Makes denoising queries from the targets of a batch.

    Args:
        num_queries: positive queries an image, shared out over the groups.
        label_noise: share of copies whose label is drawn anew is half of it, as in DN-DETR.
        box_noise: corners move by up to this times half the side (positives), or up to twice that (negatives).
    """

    def __init__(
        self,
        *,
        num_queries: int,
        num_classes: int,
        dim: int,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_queries, self.num_classes = num_queries, num_classes
        self.label_noise, self.box_noise = label_noise, box_noise
        self.label_embed = nn.Embedding(num_classes, dim)

    def forward(self, targets: Sequence[Targets]) -> DenoisingQueries:
        """Targets of B images -> queries. Without a single box one group of empty slots remains, so
        that the embedding has a gradient."""
        device = self.label_embed.weight.device
        most = max(len(target) for target in targets)
        boxes, groups = max(most, 1), max(self.num_queries // most, 1) if most else 1
        copies = groups * 2
        labels = pad_sequence([t.labels.to(device) for t in targets], batch_first=True)  # (B, G)
        truth = pad_sequence([t.boxes.to(device).float() for t in targets], batch_first=True)  # (B, G, 4)
        if labels.shape[1] == 0:
            labels, truth = labels.new_zeros(len(targets), 1), truth.new_zeros(len(targets), 1, 4)
        counts = torch.tensor([len(target) for target in targets], device=device)
        exists = (torch.arange(boxes, device=device) < counts[:, None]).repeat(1, copies)  # (B, N)
        negative = (torch.arange(copies * boxes, device=device) // boxes % 2).bool()  # (N,)

        noisy_labels = self._flip(labels.repeat(1, copies))
        reference = self._move(truth.repeat(1, copies, 1), negative)
        # Empty slots hold a harmless box in the middle and no content.
        reference = torch.where(exists[..., None], reference, reference.new_full((), 0.5))
        content = self.label_embed(noisy_labels) * exists[..., None]
        return DenoisingQueries(content=content, reference=reference, groups=groups, boxes=boxes)

    def _flip(self, labels: Tensor) -> Tensor:
        flipped = torch.rand(labels.shape, device=labels.device) < self.label_noise * 0.5
        return torch.where(flipped, torch.randint_like(labels, self.num_classes), labels)

    def _move(self, boxes: Tensor, negative: Tensor) -> Tensor:
        """Move both corners of (B, N, 4) boxes, each by a random sign times u times half the side."""
        center, size = boxes[..., :2], boxes[..., 2:]
        corners = torch.cat([center - size / 2, center + size / 2], dim=-1)
        amount = torch.rand_like(boxes) + negative[:, None]  # [0, 1) or [1, 2)
        sign = torch.randint_like(boxes, 2) * 2 - 1
        half = (size / 2).repeat(1, 1, 2)
        moved = (corners + sign * amount * half * self.box_noise).clamp(0, 1)
        # A far move can swap the corners; what counts is a valid box.
        low, high = (
            torch.minimum(moved[..., :2], moved[..., 2:]),
            torch.maximum(moved[..., :2], moved[..., 2:]),
        )
        return torch.cat([(low + high) / 2, high - low], dim=-1)
