"""Position relation: how boxes lie to one another, as a bias of the decoder's self-attention.

Source: Relation-DETR (arXiv 2407.11699), section 4.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from paqdetr.models.position import at_least_float32, sine_proposals

_EPS = 1e-5
_WIDTH = 16  # channels of each of the four numbers that relate two boxes
_SCALE = 100.0


class PositionRelation(nn.Module):
    """From pairs of boxes to a number for each head of an attention, at least 0.

    Query i attends to query j with the bias ReLU(linear(sine(r_ij))), where r_ij = (log(|x_i - x_j| / w_i + 1),
    log(|y_i - y_j| / h_i + 1), log(w_i / w_j), log(h_i / h_j)). Its gradient reaches the linear layer, not the boxes.
    """

    def __init__(self, *, num_heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(4 * _WIDTH, num_heads)

    def forward(self, boxes: Tensor, others: Tensor) -> Tensor:
        """Boxes of the queries (B, N, 4), and of those they attend to (B, M, 4), cxcywh in [0, 1] -> (B, heads, N, M)."""
        with torch.no_grad():
            related = relate(at_least_float32(boxes), at_least_float32(others))
            embedded = sine_proposals(related * (_SCALE / (2 * math.pi)), _WIDTH)  # (B, N, M, 64)
        return self.project(embedded.to(self.project.weight.dtype)).relu().permute(0, 3, 1, 2)


def relate(boxes: Tensor, others: Tensor) -> Tensor:
    """r_ij of (B, N, 4) and (B, M, 4) boxes: (B, N, M, 4)."""
    center, size = boxes[:, :, None].split(2, dim=-1)  # (B, N, 1, 2)
    other_center, other_size = others[:, None].split(2, dim=-1)  # (B, 1, M, 2)
    distance = ((center - other_center).abs() / (size + _EPS) + 1).log()
    return torch.cat([distance, ((size + _EPS) / (other_size + _EPS)).log()], dim=-1)
