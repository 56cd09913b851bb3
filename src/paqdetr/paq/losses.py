"""Losses of PaQ: IoU-aware classification and the regulariser that keeps patterns apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss


def varifocal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """IoU-aware binary cross-entropy: positives weigh their own target, negatives alpha * p^gamma.

    Source: VarifocalNet (arXiv 2008.13367), equation 2, as PaQ-DETR uses it. A positive of IoU 0 counts as negative.

    Args:
        logits: (..., C) float.
        targets: (..., C) float in [0, 1]: the IoU of the prediction with its box at the matched class, 0 elsewhere.
        alpha: weight of negatives.
        gamma: how strongly easy negatives are played down.

    Returns:
        (..., C) float, at least float32, unreduced.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.dtype).detach()
    probability = logits.detach().sigmoid()
    weight = torch.where(targets > 0, targets, alpha * probability**gamma)
    return weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The DETR family's own classification loss (arXiv 1708.02002): targets are 1 at the matched class, 0 elsewhere.

    Shapes as in `varifocal_loss`; unreduced, at least float32.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return sigmoid_focal_loss(logits, targets.to(logits.dtype), alpha=alpha, gamma=gamma, reduction="none")


def quality_focal_loss(logits: Tensor, targets: Tensor, beta: float = 2.0) -> Tensor:
    """Binary cross-entropy times |target - p|^beta, positives and negatives alike.

    Source: Generalized Focal Loss (arXiv 2006.04388), equation 4. A positive of IoU 0 counts as negative. Unlike that of
    `varifocal_loss`, its weight has a gradient too.

    Args:
        logits: (..., C) float.
        targets: (..., C) float in [0, 1], as of `varifocal_loss`.
        beta: how strongly what is nearly right is played down.

    Returns:
        (..., C) float, at least float32, unreduced.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.dtype).detach()
    weight = (targets - logits.sigmoid()).abs() ** beta
    return weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def pattern_diversity_loss(patterns: Tensor) -> Tensor:
    """Mean absolute cosine between different patterns: 0 if orthogonal, 1 if all are parallel.

    Source: PaQ-DETR (arXiv 2603.06917), L_div.

    Args:
        patterns: (m, d) float, m >= 2.

    Returns:
        scalar in [0, 1].

    Raises:
        ValueError: fewer than two patterns.
    """
    if patterns.ndim != 2 or patterns.shape[0] < 2:
        raise ValueError(f"expected (m, d) patterns with m >= 2, found {tuple(patterns.shape)}")
    count = patterns.shape[0]
    unit = F.normalize(patterns.to(torch.promote_types(patterns.dtype, torch.float32)), dim=1)
    with torch.autocast(patterns.device.type, enabled=False):
        cosine = unit @ unit.T  # (m, m)
    # Not masked_select, whose length is a GPU sync; not the sum less its diagonal, which would round.
    itself = torch.eye(count, dtype=torch.bool, device=patterns.device)
    return cosine.abs().masked_fill(itself, 0.0).sum() / (count * (count - 1))
