"""A host's own loss function with other pairs in its intermediate decoder layers.

The functions of transformers build their criterion by name and let it match. The same function runs here, with that name bound
to a criterion that answers the matching of intermediate layers itself. Everything else, be it the last layer, the encoder,
denoising queries, or terms such as D-FINE's FGL and DDF, is the installed release's own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from paqdetr.errors import ConfigError, NonFiniteError
from paqdetr.paq import Assigner, CostWeights, Pairs, Targets, match_layers, varifocal_loss
from paqdetr.paq.costs import iou_and_giou

Labels = Sequence[dict[str, Any]]
Indices = list[tuple[Tensor, Tensor]]


def with_another(
    function: Callable[..., Any], name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """The same function, in which the global `name` means `wrap` of what it meant.

    Raises:
        ConfigError: the function uses no such name.
    """
    plain = inspect.unwrap(function)
    if not isinstance(plain, FunctionType) or name not in plain.__code__.co_names:
        shown = getattr(plain, "__qualname__", repr(plain))
        raise ConfigError(
            f"the loss function {shown} builds no {name}, so its matching cannot be changed",
            "attach with assigner='none', or restore the loss function that transformers gives this model",
        )
    names = {**plain.__globals__, name: wrap(plain.__globals__[name])}
    bound = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    bound.__kwdefaults__ = plain.__kwdefaults__
    return bound


class OneToManyCriterion(nn.Module):
    """A host's criterion whose intermediate decoder layers are matched by another assigner.

    Args:
        criterion: of the host, with a `matcher`.
        assigner: of the intermediate layers.
        cost_weights: of the matching cost.
        encoder_logits: the object that the host hands over as the encoder's logits, or None; its layer is matched as before.
        varifocal: whether intermediate layers take varifocal loss for their classification.

    Attributes:
        positives: matched queries of each intermediate layer, set by `forward`.
    """

    def __init__(
        self,
        criterion: Any,
        *,
        assigner: Assigner,
        cost_weights: CostWeights,
        encoder_logits: Tensor | None,
        varifocal: bool,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.assigner = assigner
        self.cost_weights = cost_weights
        self.encoder_logits = encoder_logits
        self.varifocal = varifocal
        self.positives: list[int] = []

    def forward(self, outputs: dict[str, Any], targets: Labels) -> dict[str, Tensor]:
        """See the host's criterion. The intermediate layers cross to the solver together, in one transfer."""
        layers = [
            layer for layer in outputs.get("auxiliary_outputs") or [] if layer["logits"] is not self.encoder_logits
        ]
        found = self._match(layers, targets) if layers else []
        self.positives = [sum(len(pairs) for pairs in row) for row in found]
        chosen: dict[int, Indices] = {
            id(layer): [(pairs.query_indices, pairs.target_indices) for pairs in row]
            for layer, row in zip(layers, found, strict=True)
        }
        self.criterion.matcher = _Matcher(self.criterion.matcher, chosen)
        if self.varifocal:
            self.criterion.loss_labels = _Classification(self.criterion.loss_labels, chosen)
        return self.criterion(outputs, targets)

    def _match(self, layers: list[dict[str, Tensor]], labels: Labels) -> list[list[Pairs]]:
        logits = torch.stack([layer["logits"] for layer in layers]).detach()  # (K, B, n, C)
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).detach()
        assigners = [self.assigner] * len(layers)

        def match(targets: list[Targets]) -> list[list[Pairs]]:
            return match_layers(logits, boxes, targets, assigners, weights=self.cost_weights)

        try:
            return match([Targets(row["class_labels"], row["boxes"]) for row in labels])
        except (NonFiniteError, ValueError):
            # Ids are tensors on the device: only now are they worth a GPU sync.
            return match([Targets(row["class_labels"], row["boxes"], _image_id(row)) for row in labels])


class _Matcher(nn.Module):
    """Pairs that are known for some layers' outputs, known by identity, and the host's matcher for all others."""

    def __init__(self, host: nn.Module, chosen: dict[int, Indices]) -> None:
        super().__init__()
        self.host = host
        self.chosen = chosen

    def forward(self, outputs: dict[str, Any], targets: Labels) -> Indices:
        return self.chosen[id(outputs)] if id(outputs) in self.chosen else self.host(outputs, targets)


class _Classification:
    """Varifocal loss for some layers' outputs, known by identity, and the host's classification loss for all others."""

    def __init__(self, host: Callable[..., dict[str, Tensor]], chosen: dict[int, Indices]) -> None:
        self.host = host
        self.chosen = chosen

    def __call__(
        self, outputs: dict[str, Tensor], targets: Labels, indices: Indices, num_boxes: float
    ) -> dict[str, Tensor]:
        if id(outputs) not in self.chosen:
            return self.host(outputs, targets, indices, num_boxes)
        logits = outputs["logits"]
        goal = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        for image, ((queries, boxes), row) in enumerate(zip(indices, targets, strict=True)):
            predicted = outputs["pred_boxes"][image, queries].detach()
            quality, _ = iou_and_giou(predicted.float().T, row["boxes"][boxes].float().T)
            goal[image, queries, row["class_labels"][boxes]] = quality.to(goal.dtype)
        return {"loss_ce": varifocal_loss(logits, goal).sum() / num_boxes}


def _image_id(labels: dict[str, Any]) -> int | str | None:
    value = labels.get("image_id")
    if isinstance(value, Tensor):
        return int(value.flatten()[0]) if value.numel() else None
    return value
