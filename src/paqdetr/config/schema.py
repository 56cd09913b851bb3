"""Every setting of a model and its training, with its default and its range."""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Settings that refuse unknown keys and changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The architecture. Two models with equal values here have equal state dicts."""

    num_classes: int = Field(default=80, ge=1)

    # Backbone: any timm name. Strides are pixels a token; frozen_stride freezes all up to the feature of that stride.
    backbone: str = "resnet50"
    backbone_strides: tuple[int, ...] = (8, 16, 32)
    frozen_stride: int = Field(default=4, ge=0, description="0 trains the whole backbone")
    freeze_backbone_norm: bool = True

    backbone_output_norm: bool = Field(
        default=False, description="a LayerNorm on each feature map, as official Swin detectors have"
    )

    # Transformer
    dim: int = Field(default=256, ge=8)
    num_levels: int = Field(default=4, ge=1)
    num_heads: int = Field(default=8, ge=1)
    num_points: int = Field(default=4, ge=1)
    ffn_dim: int = Field(default=2048, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    encoder_layers: int = Field(default=6, ge=1)
    encoder_query_levels: int | None = Field(
        default=None, ge=1, description="only the N coarsest levels are updated; None: all"
    )
    decoder_layers: int = Field(default=6, ge=1)
    one_to_many_heads: Literal["none", "intermediate", "all"] = Field(
        default="none",
        description="decoder layers with further heads, in training alone, that have the several positives a box in place of the "
        "layer's own (MS-DETR, arXiv 2401.03989: all)",
    )
    decoder_norm: bool = Field(default=True, description="a LayerNorm between a decoder layer and its heads")
    share_heads: bool = Field(
        default=False, description="one class head and one box head for all decoder layers"
    )

    # Where queries begin. `proposals`: boxes chosen among the encoder's tokens (two-stage); `anchors`: learned boxes (DAB);
    # `points`: places computed from learned position embeddings (Deformable DETR, one-stage).
    positions: Literal["proposals", "anchors", "points"] = "proposals"
    class_agnostic_proposals: bool = Field(
        default=False, description="tokens are ranked and trained as object or not"
    )
    distinct_proposals: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="proposals that overlap a better one by more than this IoU come last (DDQ, arXiv 2303.12776: 0.8)",
    )
    # How a query's place is told to the decoder: `refined`, from its current box in every layer (DAB, DINO), or `fixed`, once.
    position_embedding: Literal["refined", "fixed"] = "refined"
    scale_positions: bool = Field(
        default=False, description="from layer 2 on, positions are scaled by the content (DAB)"
    )
    box_refinement: bool = Field(default=True, description="each layer starts from the boxes of the last")
    look_forward_twice: bool = True

    # Content of queries: `static`, a learned table; `proposals`, computed from the proposal; `patterns` is PaQ;
    # `static_mixture`, an ablation, mixes patterns by learned weights that no image changes.
    num_queries: int = Field(default=900, ge=1)
    queries: Literal["static", "proposals", "patterns", "static_mixture"] = "static"
    content_std: float | None = Field(
        default=1.0, ge=0, description="initial std of static content; None: Xavier-uniform"
    )
    mixture: Literal["replace", "residual"] = Field(
        default="replace",
        description="residual: static content, to which mixtures are added through a gate that starts at 0 (ours)",
    )
    num_patterns: int = Field(default=64, ge=2)
    pattern_std: float = Field(default=1.0, ge=0)
    extractor: Literal["fused", "pooled"] = "fused"
    extractor_conv: Literal["depthwise", "full"] = "depthwise"
    head: Literal["dense", "factorised"] = "dense"
    head_rank: int = Field(default=32, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    gain: float = Field(default=1.0, ge=0, description="0: mixtures start as static ones")
    bias_std: float | None = Field(
        default=2.0, ge=0, description="None: the plain initialisation of a linear layer"
    )
    normalize_summary: bool = Field(default=False, description="mix by what sets an image apart (ours)")

    # Denoising. `contrastive` is DINO's, with about `denoising_queries` positives an image; `plain` is DN-DETR's, with
    # `denoising_groups` copies of each box and an indicator channel.
    denoising: Literal["none", "plain", "contrastive"] = "contrastive"
    denoising_queries: int = Field(default=100, ge=1)
    denoising_groups: int = Field(default=5, ge=1)
    label_noise: float = Field(default=0.5, ge=0, le=1)
    box_noise: float = Field(default=1.0, ge=0)

    # H-DETR's second set of queries, in training alone, with several positives a box. Any two-stage host can have it.
    hybrid_queries: int = Field(default=0, ge=0)

    # Conventions in which published codes differ; docs/convert.md names who does what.
    position_temperature: float = Field(
        default=20.0, gt=0, description="of the sine embedding of feature maps"
    )
    position_offset: float = Field(
        default=0.0, ge=-0.5, le=0, description="-0.5 counts cells from their centres"
    )
    refine_from: Literal["normed", "raw"] = Field(
        default="normed",
        description="`raw`: the next layer's boxes come from the output before the decoder's norm",
    )
    box_eps: float = Field(
        default=1e-5, gt=0, lt=0.5, description="boxes are kept so far from 0 and 1 in logits"
    )
    padded_positions: bool = Field(
        default=False, description="positions of boxes are those in the padded image"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"dim={self.dim} must be divisible by 4 and by num_heads={self.num_heads}")
        if self.num_levels < len(self.backbone_strides):
            raise ValueError(
                f"num_levels={self.num_levels} is fewer than backbone_strides={self.backbone_strides}"
            )
        if self.encoder_query_levels is not None and self.encoder_query_levels > self.num_levels:
            raise ValueError(
                f"encoder_query_levels={self.encoder_query_levels} exceeds num_levels={self.num_levels}"
            )
        for key, wrong, needs in self._contradictions():
            if wrong:
                raise ValueError(f"{key} needs {needs}")
        return self

    def _contradictions(self) -> list[tuple[str, bool, str]]:
        """Settings that no host combines: which, whether it is so here, what would be needed."""
        two_stage, points = self.positions == "proposals", self.positions == "points"
        anchors, refined = self.positions == "anchors", self.position_embedding == "refined"
        from_proposals = self.queries == "proposals"
        return [
            ("queries=proposals", from_proposals and not two_stage, "positions=proposals"),
            ("queries=proposals", from_proposals and refined, "position_embedding=fixed"),
            ("position_embedding=refined", refined and points, "positions=proposals or anchors"),
            ("position_embedding=fixed", anchors and not refined, "positions=proposals or points"),
            ("scale_positions=true", self.scale_positions and not refined, "position_embedding=refined"),
            ("box_refinement=false", not self.box_refinement and not points, "positions=points"),
            (
                "look_forward_twice=true",
                self.look_forward_twice and not self.box_refinement,
                "box_refinement=true",
            ),
            (
                f"denoising={self.denoising}",
                self.denoising != "none" and not refined,
                "position_embedding=refined",
            ),
            (
                "class_agnostic_proposals=true",
                self.class_agnostic_proposals and not two_stage,
                "positions=proposals",
            ),
            (
                f"distinct_proposals={self.distinct_proposals}",
                self.distinct_proposals is not None and not two_stage,
                "positions=proposals",
            ),
            (
                "mixture=residual",
                self.mixture == "residual" and self.queries not in ("patterns", "static_mixture"),
                "queries=patterns or static_mixture",
            ),
            (
                f"hybrid_queries={self.hybrid_queries}",
                self.hybrid_queries > 0 and not two_stage,
                "positions=proposals",
            ),
        ]

    @property
    def content_dim(self) -> int:
        """Width of the content that a query source makes: one less than `dim` where an indicator channel follows it."""
        return self.dim - 1 if self.denoising == "plain" else self.dim


AssignerName = Literal["one_to_one", "quality_aware", "fixed_k", "simota"]


class LossConfig(Section):
    """Assignment and losses. `assigner: quality_aware` is PaQ's; `one_to_one` the host's; the others are there to compare.

    `top_k`, `min_positives` and `select` mean the same to all: `fixed_k` gives every box exactly `top_k` positives, and where
    `quality_aware` selects by score, `simota` selects by cost. Settings from `one_to_many_weight` to `normalizer` are remedies
    against what several positives a box cost; none is part of the paper, and docs/method.md names their sources.
    """

    classification: Literal["focal", "varifocal"] = "focal"
    assigner: AssignerName = "one_to_one"
    encoder_assigner: AssignerName = "one_to_one"
    one_to_many_until: float = Field(
        default=1.0, ge=0, le=1, description="share of the training with several positives a box"
    )
    gamma: float = Field(default=0.4, ge=0)
    top_k: int = Field(default=4, ge=1)
    min_positives: int = Field(default=1, ge=1)
    select: Literal["hungarian", "score"] = "hungarian"
    confidence: Literal["gt_class", "max"] = "gt_class"

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

    class_weight: float = Field(default=1.0, ge=0)
    l1_weight: float = Field(default=5.0, ge=0)
    giou_weight: float = Field(default=2.0, ge=0)
    diversity_weight: float = Field(
        default=0.2, ge=0, description="beta of the paper; 0 switches the term off"
    )
    div_scale: float = Field(default=1.0, ge=0)
    hybrid_weight: float = Field(default=1.0, ge=0, description="of the one-to-many branch of H-DETR")
    hybrid_repeat: int = Field(default=6, ge=1, description="positives a box in that branch")
    class_cost: float = Field(default=2.0, ge=0)
    l1_cost: float = Field(default=5.0, ge=0)
    giou_cost: float = Field(default=2.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if self.min_positives > self.top_k:
            raise ValueError(f"min_positives={self.min_positives} exceeds top_k={self.top_k}")
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


class AugmentConfig(Section):
    """What training does to an image. Scales are relative to `image_size`."""

    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    scale: tuple[float, float] = Field(
        default=(0.6, 1.0), description="the long side is resized to a size in this range"
    )
    crop: float = Field(default=0.5, ge=0, le=1, description="probability of a random crop before the resize")
    crop_size: tuple[float, float] = Field(
        default=(0.5, 1.0), description="side of the crop, relative to the image's"
    )
    color: float = Field(
        default=0.0, ge=0, le=1, description="strength of brightness, contrast and saturation jitter"
    )
    crop_style: Literal["aspect", "detr"] = Field(
        default="aspect",
        description="aspect: a part of the image's aspect; detr: the published recipe's crop",
    )
    keep_small: float = Field(
        default=0.0,
        ge=0,
        description="the crop grows until it cuts no box whose side is below so many pixels",
    )
    mosaic: float = Field(default=0.0, ge=0, le=1, description="probability of four images in one")

    @field_validator("scale", "crop_size")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"expected 0 < low <= high, got {value}")
        return value


class Config(Section):
    """A model with its training recipe, as written to `config.yaml` of a run."""

    name: str
    preset: Literal["paper"] | None = None
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()

    # One number: the long side. Two: the short side, and the most the long side may have.
    image_size: int | tuple[int, int] = (800, 1333)
    size_divisor: int = Field(
        default=1, ge=1, description="sides are rounded to multiples of it, aspect ratios a little off"
    )
    pretrained_backbone: bool = Field(default=True, description="start from ImageNet weights")
    init: str | None = Field(
        default=None, description="start from this checkpoint; its classes and number of queries may differ"
    )

    epochs: int = Field(default=12, ge=1)
    max_steps: int | None = Field(
        default=None, ge=1, description="stop after so many optimiser steps, whatever `epochs` says"
    )
    batch_size: int = Field(default=2, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    backbone_lr: float = Field(default=1e-5, gt=0)
    accumulate: int = Field(
        default=1, ge=1, description="batches whose gradients make one step, as if they were one batch"
    )
    # Rates are for a step over `lr_reference_batch` images; the rule says what other numbers of them do to the rates.
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    lr_reference_batch: int = Field(default=16, ge=1)
    # Sampling offsets and the layer that makes reference points learn slower in the published recipes.
    offsets_lr_scale: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: Literal["step", "cosine"] = "step"
    drop_at: float = Field(
        default=10 / 12, gt=0, le=1, description="step schedule: x0.1 after this share of the training"
    )
    warmup_steps: int = Field(default=1000, ge=0)
    clip_norm: float = Field(default=0.1, gt=0)
    ema_decay: float = Field(default=0.9998, ge=0, lt=1, description="0 switches the moving average off")
    amp: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    checkpoint_activations: bool = Field(default=False, description="layers compute twice and keep less")
    sync_batch_norm: bool = Field(
        default=False, description="batch norms that train see the images of all processes"
    )
    nan_policy: Literal["raise", "skip-step"] = Field(
        default="raise",
        description="what a loss or gradient that is not finite does: end, or leave out the step",
    )
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=2, ge=0)
    cache_images: float = Field(default=2.0, ge=0, description="GiB of decoded images that workers share")
    eval_every: int = Field(
        default=1, ge=1, description="epochs between evaluations; the last epoch always has one"
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations without a better AP"
    )
    log_every: int = Field(default=20, ge=1, description="steps between records in metrics.jsonl")
    save_every_steps: int | None = Field(
        default=None, ge=1, description="save the state within an epoch too, after so many steps"
    )
    save_every_minutes: float | None = Field(default=None, gt=0, description="likewise, by the clock")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), description="where records go besides metrics.jsonl"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.loss.one_to_one_weight and self.model.one_to_many_heads != "none":
            raise ValueError(
                "loss.one_to_one_weight needs model.one_to_many_heads=none: with them, the other heads are one-to-one"
            )
        return self

    @field_validator("amp", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # what YAML makes of a bare no

    @field_validator("image_size")
    @classmethod
    def _positive(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        sides = (value,) if isinstance(value, int) else value
        if min(sides) < 32 or (len(sides) == 2 and sides[0] > sides[1]):
            raise ValueError("expected one number >= 32, or [short, long] with 32 <= short <= long")
        return value

    def to_yaml(self) -> str:
        """The resolved settings; `load_config` of this text gives an equal `Config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
