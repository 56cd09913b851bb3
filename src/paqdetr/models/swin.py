"""Swin as published detectors use it.

timm's Swin agrees with them on images whose every stage is a multiple of the window. Elsewhere it shifts first and pads after,
where Swin's own detection code, and all that followed it, pads first; it leaves out the shift in stages that were no larger than
a window when the model was built; and it refuses sides that are no multiple of 4. Weights trained there want their way.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

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
