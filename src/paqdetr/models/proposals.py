"""Two-stage start: every token proposes a box, the best become the decoder's first reference boxes.

Sources: Deformable DETR (arXiv 2010.04159), appendix A.4; DINO (arXiv 2203.03605, section 3.4), where tokens are ranked by their
likeliest class and only positions come from the proposals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paqdetr.models.attention import MLP
from paqdetr.models.position import at_least_float32, inverse_sigmoid
from paqdetr.models.tokens import Tokens


@dataclass(frozen=True, slots=True)
class AllTokens:
    """What every token says, for a loss over all of them.

    Attributes:
        logits: (B, S, 1).
        boxes: (B, S, 4) cxcywh in [0, 1].
        valid: (B, S) bool; False at padding and where the anchor would leave the image.
    """

    logits: Tensor
    boxes: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class Proposals:
    """The n best tokens of every image, best first.

    Attributes:
        logits: (B, n, C), or (B, n, 1) if class-agnostic.
        boxes: (B, n, 4) cxcywh in [0, 1], with gradient for the encoder's loss.
        indices: (B, n) int64, which token each came from.
        everything: all tokens, where the loss wants them (class-agnostic proposals in training); else None.
    """

    logits: Tensor
    boxes: Tensor
    indices: Tensor
    everything: AllTokens | None = None

    def first(self, count: int) -> Proposals:
        """The best `count` of them."""
        return Proposals(
            self.logits[:, :count], self.boxes[:, :count], self.indices[:, :count], self.everything
        )


class ProposalHead(nn.Module):
    """Scores every token and regresses a box from an anchor at its place.

    Args:
        class_agnostic: tell "an object" from background with a single logit (Deformable DETR); otherwise one for each class, and
            tokens are ranked by the likeliest.
    """

    def __init__(self, *, dim: int, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__()
        self.class_agnostic = class_agnostic
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, 1 if class_agnostic else num_classes)
        self.box_head = MLP((dim, dim, dim, 4))

    def forward(self, memory: Tokens, count: int) -> Proposals:
        """Tokens -> the `count` best proposals of each image."""
        anchors = _anchors(memory)  # (B, S, 4)
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1)  # (B, S)
        valid = usable if memory.padding_mask is None else usable & ~memory.padding_mask
        x = self.norm(self.project(memory.values.masked_fill(~valid[..., None], 0.0)))
        logits = self.class_head(x)  # (B, S, C or 1)
        indices = _best_tokens(logits.detach().amax(-1), valid, count)  # (B, n)

        def pick(tokens: Tensor) -> Tensor:
            return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))

        def regress(tokens: Tensor, starts: Tensor) -> Tensor:
            return (at_least_float32(self.box_head(tokens)) + inverse_sigmoid(starts)).sigmoid()

        if self.class_agnostic and self.training:  # its loss is over all tokens
            boxes = regress(x, anchors)
            everything = AllTokens(logits=logits, boxes=boxes, valid=valid)
            return Proposals(pick(logits), pick(boxes), indices, everything)
        # Boxes are regressed for the selected tokens alone: the rest would be thrown away.
        return Proposals(logits=pick(logits), boxes=regress(pick(x), pick(anchors)), indices=indices)


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
