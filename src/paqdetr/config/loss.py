"""Settings of assignment and losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from paqdetr.config.section import Section

AssignerName = Literal["one_to_one", "quality_aware", "fixed_k", "simota"]


class LossConfig(Section):
    """Assignment and losses. `assigner: quality_aware` is PaQ's; `one_to_one` the host's; the others are there to compare.

    `top_k`, `min_positives` and `select` mean the same to all: `fixed_k` gives every box exactly `top_k` positives, and where
    `quality_aware` selects by score, `simota` selects by cost. Settings from `one_to_many_weight` to `normalizer` are remedies
    against what several positives a box cost; none is part of the paper, and docs/method.md names their sources.
    """

    classification: Literal["focal", "varifocal"] = Field(
        default="focal",
        description="focal (the hosts'), or varifocal, whose target for a positive is its IoU",
    )
    assigner: AssignerName = Field(
        default="one_to_one",
        description="of decoder layers 1..L-1; the last is always one-to-one. quality_aware: PaQ; fixed_k, simota: "
        "to compare",
    )
    encoder_assigner: AssignerName = Field(
        default="one_to_one", description="the same, of the encoder's proposals"
    )
    one_to_many_from: float = Field(
        default=0.0, ge=0, lt=1, description="share of the training before several positives a box begin"
    )
    one_to_many_until: float = Field(
        default=1.0, ge=0, le=1, description="share of the training with several positives a box"
    )
    gamma: float = Field(
        default=0.4, ge=0, description="quality of a query for a box: IoU - gamma * confidence"
    )
    top_k: int = Field(default=4, ge=1, description="most positives a box")
    min_positives: int = Field(default=1, ge=1, description="fewest positives a box")
    encoder_min_positives: int | None = Field(
        default=None, ge=1, description="the same, of the encoder's proposals; null: min_positives"
    )
    min_iou: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="IoU that positives of a box beyond its cheapest one need (ours); it comes before min_positives",
    )
    select: Literal["hungarian", "score"] = Field(
        default="hungarian",
        description="which queries become positives. hungarian: one matching; score: the best (simota: least cost)",
    )
    confidence: Literal["gt_class", "max"] = Field(
        default="gt_class", description="probability of the box's class, or of the likeliest"
    )

    one_to_many_weight: float = Field(
        default=1.0, ge=0, description="of the decoder's losses while they have several positives a box"
    )
    one_to_one_weight: float = Field(
        default=0.0,
        ge=0,
        description="of a one-to-one loss beside them, in the same layers (MS-DETR, arXiv 2401.03989, with one set of heads)",
    )
    positives_schedule: Literal["constant", "linear"] = Field(
        default="constant",
        description="linear: the most positives of a box fall from top_k to 1 until one_to_many_until (ours; H-DETR, "
        "arXiv 2207.13080, has the one step)",
    )
    rank_damping: float | None = Field(
        default=None,
        gt=0,
        description="tau: the r-th best positive of a box counts exp(-r / tau) (Align-DETR, arXiv 2304.07527: 1.5)",
    )
    normalizer: Literal["boxes", "positives"] = Field(
        default="boxes",
        description="what a layer's losses are divided by (positives: RetinaNet, arXiv 1708.02002)",
    )

    class_weight: float = Field(default=1.0, ge=0, description="of the classification loss")
    l1_weight: float = Field(default=5.0, ge=0, description="of the L1 loss of boxes")
    giou_weight: float = Field(default=2.0, ge=0, description="of the GIoU loss of boxes")
    diversity_weight: float = Field(
        default=0.2,
        ge=0,
        description="of the diversity loss of patterns (beta of the paper); 0 switches it off",
    )
    div_scale: float = Field(default=1.0, ge=0, description="a further factor on the diversity loss")
    hybrid_weight: float = Field(default=1.0, ge=0, description="of the one-to-many branch of H-DETR")
    hybrid_repeat: int = Field(default=6, ge=1, description="positives a box in that branch")
    class_cost: float = Field(default=2.0, ge=0, description="of the class in the matching")
    l1_cost: float = Field(default=5.0, ge=0, description="of the L1 distance of boxes in the matching")
    giou_cost: float = Field(default=2.0, ge=0, description="of GIoU in the matching")

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        for key in ("min_positives", "encoder_min_positives"):
            if (getattr(self, key) or 1) > self.top_k:
                raise ValueError(f"{key}={getattr(self, key)} exceeds top_k={self.top_k}")
        if 0 < self.one_to_many_from >= self.one_to_many_until:
            raise ValueError(
                f"one_to_many_from={self.one_to_many_from} is not before one_to_many_until={self.one_to_many_until}"
            )
        one = self.assigner == "one_to_one"
        both = one and self.encoder_assigner == "one_to_one"
        either = "an assigner or encoder_assigner"
        for key, wrong, needs in (
            ("one_to_one_weight", one and self.one_to_one_weight > 0, "an assigner"),
            ("one_to_many_weight", one and self.one_to_many_weight != 1, "an assigner"),
            ("positives_schedule", both and self.positives_schedule != "constant", either),
            ("rank_damping", both and self.rank_damping is not None, either),
        ):
            if wrong:
                raise ValueError(f"{key} needs {needs} with several positives a box")
        return self
