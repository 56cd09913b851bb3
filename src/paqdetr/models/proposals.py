"""Two-stage start: every token proposes a box, the best become the decoder's first reference boxes.

Source: Deformable DETR (arXiv 2010.04159), appendix A.4, with DINO's mixed query selection (arXiv 2203.03605, section 3.4): only
positions come from the proposals, content does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paqdetr.models.attention import MLP
from paqdetr.models.position import inverse_sigmoid
from paqdetr.models.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Proposals:
    """The n best tokens of every image, best first.

    Attributes:
        logits: (B, n, C).
        boxes: (B, n, 4) cxcywh in [0, 1], with gradient for the encoder's loss.
        indices: (B, n) int64, which token each came from.
    """

    logits: Tensor
    boxes: Tensor
    indices: Tensor


class ProposalHead(nn.Module):
    """Scores every token and regresses a box from an anchor at its place."""

    def __init__(self, *, dim: int, num_classes: int, num_queries: int, class_bias: float) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, num_classes)
        self.box_head = MLP((dim, dim, dim, 4))
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.constant_(self.class_head.bias, class_bias)
        nn.init.zeros_(self.box_head[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.box_head[-1].bias)  # type: ignore[arg-type]

    def forward(self, memory: Tokens) -> Proposals:
        """Tokens -> proposals."""
        anchors = _anchors(memory)  # (B, S, 4)
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1)  # (B, S)
        valid = usable if memory.padding_mask is None else usable & ~memory.padding_mask
        x = self.norm(self.project(memory.values.masked_fill(~valid[..., None], 0.0)))
        logits = self.class_head(x)  # (B, S, C)
        indices = _best_tokens(logits.detach().amax(-1), valid, self.num_queries)  # (B, n)

        def pick(tokens: Tensor) -> Tensor:
            return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))

        # Boxes are regressed for the selected tokens alone: the rest would be thrown away.
        offsets = self.box_head(pick(x)).float()
        boxes = (offsets + inverse_sigmoid(pick(anchors))).sigmoid()
        return Proposals(logits=pick(logits), boxes=boxes, indices=indices)


def _anchors(memory: Tokens) -> Tensor:
    """A square on every token, 5 % of the image on the finest level, doubling with each: (B, S, 4) cxcywh."""
    side = 0.05 * 2.0 ** memory.level_index.to(memory.centers.dtype)  # (S,)
    sides = side[None, :, None].expand(memory.centers.shape[0], -1, 2)
    return torch.cat([memory.centers, sides], dim=-1)


def _best_tokens(scores: Tensor, valid: Tensor, count: int) -> Tensor:
    """Indices of the `count` best valid tokens of each image, (B, S) -> (B, count).

    An image with fewer valid tokens than queries repeats its ranking, so that the result never depends on padding.
    """
    order = scores.masked_fill(~valid, -torch.inf).topk(min(count, scores.shape[1]), dim=1).indices
    available = valid.sum(1, keepdim=True).clamp(1, order.shape[1])
    ranks = torch.arange(count, device=scores.device)[None] % available  # (B, count)
    return order.gather(1, ranks)
