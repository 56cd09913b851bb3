"""Layers that keep nothing but their inputs for the backward pass, and compute the rest once more when it comes.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """A stack of layers that can do so.

    Attributes:
        checkpoint_activations: whether it does, in training. The second pass sees the dropout of the first, so gradients are the
            same to the last bit where the layers' kernels are deterministic.
    """

    checkpoint_activations: bool = False

    def run(self, layer: Callable[..., Tensor], *inputs: object) -> Tensor:
        """`layer(*inputs)`."""
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return layer(*inputs)
