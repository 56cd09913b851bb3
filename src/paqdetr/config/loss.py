"""Settings of assignment and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from paqdetr.config.model import HYBRID, MIXED
from paqdetr.config.section import Needs, Section

AssignerName = Literal["one_to_one", "quality_aware", "fixed_k", "simota"]


def _assigner_among(*names: str) -> Callable[[Any], bool]:
    """Whether one of these assigners has an effect."""

    def holds(config: Any) -> bool:
        encoder = config.model.positions == "proposals" and config.loss.encoder_assigner in names
        return encoder or (config.model.decoder_layers > 1 and config.loss.assigner in names)

    return holds


_TWO_STAGE = Needs("model.positions=proposals", lambda c: c.model.positions == "proposals")
_SEVERAL_LAYERS = Needs(
    "model.decoder_layers above 1, since the last layer is always one-to-one", lambda c: c.model.decoder_layers > 1
)
_ONE_TO_MANY = Needs(
    "one-to-many assignment (loss.assigner or loss.encoder_assigner)",
    _assigner_among("quality_aware", "fixed_k", "simota"),
)
_COUNTED = Needs(
    "loss.assigner or loss.encoder_assigner=quality_aware or simota", _assigner_among("quality_aware", "simota")
)
_ENCODER_COUNTED = Needs(
    "loss.encoder_assigner=quality_aware or simota", lambda c: c.loss.encoder_assigner in ("quality_aware", "simota")
)
_QUALITY_AWARE = Needs("loss.assigner or loss.encoder_assigner=quality_aware", _assigner_among("quality_aware"))
_VARIFOCAL = Needs("loss.classification=varifocal", lambda c: c.loss.classification == "varifocal")
_AUXILIARY = Needs("model.auxiliary_heads not empty", lambda c: bool(c.model.auxiliary_heads))
_CUSTOMISED = Needs(
    "model.auxiliary_heads not empty and model.customised_queries above 0",
    lambda c: bool(c.model.auxiliary_heads) and c.model.customised_queries > 0,
)


class LossConfig(Section):
    """Assignment and losses. `assigner: quality_aware` is PaQ's; `one_to_one` the host's; the others are there to compare.

    `top_k`, `min_positives` and `select` mean the same to all: `fixed_k` gives every box exactly `top_k` positives, and where
    `quality_aware` selects by score, `simota` selects by cost.
    """

    retired: ClassVar[Mapping[str, Any]] = {
        "one_to_many_weight": 1.0,
        "one_to_one_weight": 0.0,
        "positives_schedule": "constant",
        "rank_damping": None,
        "normalizer": "boxes",
    }

    classification: Literal["focal", "varifocal", "quality_focal"] = Field(
        default="focal",
        description="focal (the hosts'); varifocal (PaQ's) or quality_focal (Co-DETR's): a positive's target is its IoU",
    )
    varifocal_alpha: Annotated[float, _VARIFOCAL] = Field(
        default=0.75, ge=0, le=1, description="weight of negatives in the varifocal loss (Relation-DETR: 0.25)"
    )
    assigner: Annotated[AssignerName, _SEVERAL_LAYERS] = Field(
        default="one_to_one",
        description="of decoder layers 1..L-1; the last is always one-to-one. quality_aware: PaQ; fixed_k, simota: "
        "to compare",
    )
    encoder_assigner: Annotated[AssignerName, _TWO_STAGE] = Field(
        default="one_to_one", description="the same, of the encoder's proposals"
    )
    one_to_many_from: Annotated[float, _ONE_TO_MANY] = Field(
        default=0.0, ge=0, lt=1, description="share of the training before one-to-many assignment begins"
    )
    one_to_many_until: Annotated[float, _ONE_TO_MANY] = Field(
        default=1.0, ge=0, le=1, description="share of the training after which one-to-many assignment ends"
    )
    gamma: Annotated[float, _QUALITY_AWARE] = Field(
        default=0.4, ge=0, description="quality of a query for a box: IoU - gamma * confidence"
    )
    top_k: Annotated[int, _ONE_TO_MANY] = Field(default=4, ge=1, le=1000, description="most positives per box")
    min_positives: Annotated[int, _COUNTED] = Field(default=1, ge=1, le=1000, description="fewest positives per box")
    encoder_min_positives: Annotated[int | None, _TWO_STAGE, _ENCODER_COUNTED] = Field(
        default=None,
        ge=1,
        le=1000,
        description="fewest positives per box among the encoder's proposals; null: min_positives",
    )
    min_iou: Annotated[float, _QUALITY_AWARE] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="least IoU of a positive that is not the cheapest of its box, also where the box then has fewer than "
        "min_positives (ours)",
    )
    select: Annotated[Literal["hungarian", "score"], _COUNTED] = Field(
        default="hungarian",
        description="which queries become positives. hungarian: one matching; score: the best (simota: least cost)",
    )
    confidence: Annotated[Literal["gt_class", "max"], _QUALITY_AWARE] = Field(
        default="gt_class", description="probability of the box's class, or of the likeliest"
    )

    class_weight: float = Field(default=1.0, ge=0, description="of the classification loss")
    l1_weight: float = Field(default=5.0, ge=0, description="of the L1 loss of boxes")
    giou_weight: float = Field(default=2.0, ge=0, description="of the GIoU loss of boxes")
    diversity_weight: Annotated[float, MIXED] = Field(
        default=0.2, ge=0, description="of the diversity loss of patterns (beta of the paper); 0 switches it off"
    )
    div_scale: Annotated[float, MIXED] = Field(default=1.0, ge=0, description="a further factor on the diversity loss")
    hybrid_weight: Annotated[float, HYBRID] = Field(
        default=1.0, ge=0, description="of the losses of the hybrid queries"
    )
    hybrid_repeat: Annotated[int, HYBRID] = Field(default=6, ge=1, le=1000, description="positives per box among them")
    hybrid_loss: Annotated[Literal["repeated", "aligned"], HYBRID] = Field(
        default="repeated",
        description="of hybrid queries. repeated: the usual losses, of each box hybrid_repeat times (H-DETR, Relation-DETR); "
        "aligned: quality focal loss and GIoU, both weighted by how well a query fits its box in class and place (DDQ)",
    )
    auxiliary_weight: Annotated[float, _AUXILIARY] = Field(
        default=2.0,
        ge=0,
        description="of the auxiliary heads of Co-DETR (lambda_2 of the paper), for each decoder layer",
    )
    customised_weight: Annotated[float, _CUSTOMISED] = Field(
        default=1.0, ge=0, description="of the queries that they give to the decoder (lambda_1)"
    )
    class_cost: float = Field(default=2.0, ge=0, description="of the class in the matching")
    l1_cost: float = Field(default=5.0, ge=0, description="of the L1 distance of boxes in the matching")
    giou_cost: float = Field(default=2.0, ge=0, description="of GIoU in the matching")

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        for key in ("min_positives", "encoder_min_positives"):
            if (getattr(self, key) or 1) > self.top_k:
                raise ValueError(f"{key}={getattr(self, key)} exceeds top_k={self.top_k}")
        begin, end = self.one_to_many_from, self.one_to_many_until
        if 0 < begin >= end:
            raise ValueError(f"one_to_many_from={begin} is not before one_to_many_until={end}")
        return self
