"""All settings of a training: `model`, which has a file of its own, assignment and losses, augmentation, and the recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from paqdetr.config.model import AUXILIARY, HYBRID, MIXED, SEVERAL_LAYERS, ModelConfig, Needs, Section
from paqdetr.values import MAX_BATCH, MAX_SEED, MAX_WORKERS
from paqdetr.yaml_files import dump_yaml

ResizeRule = Literal["detr", "detectron2", "transformers", "relation_detr", "nearest"]
"""How the sides of a resized image become whole pixels: as the program of that name does it, or to the nearest pixel."""


AssignerName = Literal["one_to_one", "quality_aware", "fixed_k", "simota"]


def _assigner_among(*names: str) -> Callable[[Any], bool]:
    """Whether one of these assigners has an effect."""

    def holds(config: Any) -> bool:
        encoder = config.model.positions == "proposals" and config.loss.encoder_assigner in names
        return encoder or (config.model.decoder_layers > 1 and config.loss.assigner in names)

    return holds


_TWO_STAGE = Needs("model.positions=proposals", lambda c: c.model.positions == "proposals")
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
_AT_TIMES = Needs("loss.one_to_many_until above 0", lambda c: c.loss.one_to_many_until > 0)
_VARIFOCAL = Needs("loss.classification=varifocal", lambda c: c.loss.classification == "varifocal")
_CUSTOMISED = Needs(
    "model.auxiliary_heads not empty and model.customised_queries above 0",
    lambda c: bool(c.model.auxiliary_heads) and c.model.customised_queries > 0,
)


class LossConfig(Section):
    """Assignment and losses. `assigner: quality_aware` is PaQ's; `one_to_one` the host's; the others are there to compare.

    `top_k`, `min_positives` and `select` mean the same to all: `fixed_k` gives every box `top_k` positives, and where
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
    assigner: Annotated[AssignerName, SEVERAL_LAYERS, _AT_TIMES] = Field(
        default="one_to_one",
        description="of decoder layers 1..L-1; the last is always one-to-one. quality_aware: PaQ; fixed_k, simota: "
        "to compare",
    )
    encoder_assigner: Annotated[AssignerName, _TWO_STAGE, _AT_TIMES] = Field(
        default="one_to_one", description="the same, of the encoder's proposals"
    )
    one_to_many_from: Annotated[float, _ONE_TO_MANY, _AT_TIMES] = Field(
        default=0.0, ge=0, lt=1, description="share of the training before one-to-many assignment begins"
    )
    one_to_many_until: Annotated[float, _ONE_TO_MANY] = Field(
        default=1.0, ge=0, le=1, description="share of the training after which one-to-many assignment ends"
    )
    gamma: Annotated[float, _QUALITY_AWARE, _AT_TIMES] = Field(
        default=0.4, ge=0, description="quality of a query for a box: IoU - gamma * confidence"
    )
    top_k: Annotated[int, _ONE_TO_MANY, _AT_TIMES] = Field(
        default=4, ge=1, le=1000, description="most positives per box"
    )
    min_positives: Annotated[int, _COUNTED, _AT_TIMES] = Field(
        default=1, ge=1, le=1000, description="fewest positives per box"
    )
    encoder_min_positives: Annotated[int | None, _TWO_STAGE, _ENCODER_COUNTED, _AT_TIMES] = Field(
        default=None,
        ge=1,
        le=1000,
        description="fewest positives per box among the encoder's proposals; null: min_positives",
    )
    min_iou: Annotated[float, _QUALITY_AWARE, _AT_TIMES] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="least IoU of a positive that is not the cheapest of its box, also where the box then has fewer than "
        "min_positives (ours)",
    )
    select: Annotated[Literal["hungarian", "score"], _COUNTED, _AT_TIMES] = Field(
        default="hungarian",
        description="which queries become positives. hungarian: one matching; score: the best (simota: least cost)",
    )
    confidence: Annotated[Literal["gt_class", "max"], _QUALITY_AWARE, _AT_TIMES] = Field(
        default="gt_class", description="probability of the box's class, or of the likeliest"
    )

    class_weight: float = Field(default=1.0, ge=0, description="of the classification loss")
    l1_weight: float = Field(default=5.0, ge=0, description="of the L1 loss of boxes")
    giou_weight: float = Field(default=2.0, ge=0, description="of the GIoU loss of boxes")
    diversity_weight: Annotated[float, MIXED, Needs("loss.div_scale above 0", lambda c: c.loss.div_scale > 0)] = Field(
        default=0.2, ge=0, description="of the diversity loss of patterns (beta of the paper); 0 switches it off"
    )
    div_scale: Annotated[
        float, MIXED, Needs("loss.diversity_weight above 0", lambda c: c.loss.diversity_weight > 0)
    ] = Field(default=1.0, ge=0, description="a further factor on the diversity loss")
    hybrid_weight: Annotated[float, HYBRID] = Field(
        default=1.0, ge=0, description="of the losses of the hybrid queries"
    )
    hybrid_repeat: Annotated[int, HYBRID] = Field(default=6, ge=1, le=1000, description="positives per box among them")
    hybrid_loss: Annotated[Literal["repeated", "aligned"], HYBRID] = Field(
        default="repeated",
        description="of hybrid queries. repeated: the usual losses, of each box hybrid_repeat times (H-DETR, Relation-DETR); "
        "aligned: quality focal loss and GIoU, both weighted by how well a query fits its box in class and place (DDQ)",
    )
    auxiliary_weight: Annotated[float, AUXILIARY] = Field(
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


_CROP = Needs("augment.crop above 0", lambda c: c.augment.crop > 0)
_ASPECT_CROP = Needs(
    "augment.crop above 0 and augment.crop_style=aspect",
    lambda c: c.augment.crop > 0 and c.augment.crop_style == "aspect",
)


class AugmentConfig(Section):
    """What training does to an image. Scales are relative to `image_size`."""

    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    scale: tuple[float, float] = Field(
        default=(0.6, 1.0), description="the long side is resized to a size in this range"
    )
    crop: float = Field(default=0.5, ge=0, le=1, description="probability of a random crop before the resize")
    crop_size: Annotated[tuple[float, float], _ASPECT_CROP] = Field(
        default=(0.5, 1.0), description="side of the crop, relative to the image's"
    )
    color: float = Field(default=0.0, ge=0, le=1, description="strength of brightness, contrast and saturation jitter")
    crop_style: Annotated[Literal["aspect", "detr"], _CROP] = Field(
        default="aspect", description="aspect: a part of the image's aspect; detr: the published recipe's crop"
    )
    keep_small: Annotated[float, _CROP] = Field(
        default=0.0, ge=0, description="the crop grows until it cuts no box whose side is below so many pixels"
    )
    mosaic: float = Field(default=0.0, ge=0, le=1, description="probability of four images in one")

    @field_validator("scale", "crop_size")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.01 <= value[0] <= value[1] <= 10:
            raise ValueError(f"expected 0.01 <= low <= high <= 10, got {value}")
        return value


class Config(Section):
    """A model with its training recipe, as written to `config.yaml` of a run."""

    name: str = Field(description="of the model; the source's if not given")
    preset: Literal["paper"] | None = Field(
        default=None, description="paper: the literal paper, laid over the model's own settings"
    )
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()

    image_size: int | tuple[int, int] = Field(
        default=(800, 1333),
        description="one number: the long side in pixels; two: the short side, and the most the long side may have",
    )
    size_divisor: int = Field(
        default=1, ge=1, le=1024, description="sides are rounded to multiples of it, aspect ratios a little off"
    )
    resize: Annotated[
        ResizeRule,
        Needs("image_size of two numbers", lambda c: not isinstance(c.image_size, int)),
        Needs("size_divisor=1", lambda c: c.size_divisor == 1),
    ] = Field(
        default="detr",
        description="how sides become whole pixels where image_size has two numbers and size_divisor is 1: as in DETR's code "
        "(the long side truncated) or that of the named program; nearest: rounded",
    )
    pad_divisor: int = Field(
        default=1, ge=1, le=1024, description="sides of a batch are padded to multiples of it; 1: to its largest image"
    )
    pretrained_backbone: bool = Field(default=True, description="start from ImageNet weights")
    init: str | None = Field(
        default=None, description="start from this checkpoint; its classes and number of queries may differ"
    )

    epochs: int = Field(default=12, ge=1, le=1_000_000, description="passes over the training images")
    max_steps: int | None = Field(
        default=None, ge=1, le=10**9, description="stop after so many optimiser steps, if `epochs` are not over before"
    )
    batch_size: int = Field(default=2, ge=1, le=MAX_BATCH, description="images per batch, of one process")
    lr: float = Field(default=1e-4, gt=0, description="learning rate of the transformer")
    backbone_lr: float = Field(default=1e-5, gt=0, description="learning rate of the backbone")
    accumulate: int = Field(
        default=1, ge=1, le=MAX_BATCH, description="batches whose gradients make one step, as if they were one batch"
    )
    lr_rule: Literal["none", "linear", "sqrt"] = Field(
        default="none",
        description="what another number of images per step does to all rates: nothing, in proportion, or by the root",
    )
    lr_reference_batch: Annotated[int, Needs("lr_rule=linear or sqrt", lambda c: c.lr_rule != "none")] = Field(
        default=16,
        ge=1,
        le=10**9,
        description="images per step that the rates are meant for, where lr_rule is not none",
    )
    offsets_lr_scale: float = Field(
        default=0.1, gt=0, description="factor on lr for sampling offsets and the layer that makes reference points"
    )
    weight_decay: float = Field(default=1e-4, ge=0, description="of AdamW")
    decay_norms: bool = Field(
        default=False, description="norms and biases decay too, as in the codes of Deformable DETR, DN-DETR and DINO"
    )
    schedule: Literal["step", "cosine"] = Field(default="step", description="of the learning rate, after the warm-up")
    drop_at: Annotated[float, Needs("schedule=step", lambda c: c.schedule == "step")] = Field(
        default=10 / 12, gt=0, le=1, description="step schedule: x0.1 after this share of the training"
    )
    warmup_steps: int = Field(
        default=1000, ge=0, le=10**9, description="steps of linear warm-up, at most a tenth of the training"
    )
    clip_norm: float = Field(default=0.1, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(
        default=0.9998,
        ge=0,
        lt=1,
        description="of the moving average of weights, which is what is evaluated and saved; 0 switches it off",
    )
    amp: Literal["no", "bf16", "fp16"] = Field(default="no", description="mixed precision; fp16 needs a GPU")
    channels_last: bool = Field(default=False, description="memory layout of the backbone")
    checkpoint_activations: bool = Field(
        default=False, description="layers of encoder and decoder compute twice and keep less"
    )
    sync_batch_norm: bool = Field(default=False, description="batch norms that train see the images of all processes")
    nan_policy: Literal["raise", "skip-step"] = Field(
        default="raise", description="what a loss or gradient that is not finite does: end, or leave out the step"
    )
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of weights, order, augmentation and noise")
    val_fraction: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="share of the training images that validates instead, for data without a val split; near-duplicates stay "
        "together, and `seed` decides which",
    )
    workers: int = Field(
        default=2, ge=0, le=MAX_WORKERS, description="processes that load images, for each training process"
    )
    cache_images: float = Field(default=2.0, ge=0, le=1_000_000, description="GiB of decoded images that workers share")
    eval_every: int = Field(
        default=1, ge=1, le=10**9, description="epochs between evaluations; the last epoch always has one"
    )
    patience: int | None = Field(
        default=None, ge=1, le=10**9, description="stop after so many evaluations without a better AP"
    )
    log_every: int = Field(
        default=20, ge=1, le=10**9, description="steps between records in metrics.jsonl; each epoch ends with one too"
    )
    save_every_steps: int | None = Field(
        default=None, ge=1, le=10**9, description="save the state within an epoch too, after so many steps"
    )
    save_every_minutes: float | None = Field(
        default=None, gt=0, description="save the state within an epoch too, after so many minutes"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), description="where records go besides metrics.jsonl"
    )

    @field_validator("init", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("image_size")
    @classmethod
    def _positive(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        sides = (value,) if isinstance(value, int) else value
        if not 32 <= sides[0] <= sides[-1] <= 16_384:
            raise ValueError("expected one number from 32 to 16384, or [short, long] with 32 <= short <= long <= 16384")
        return value

    def to_yaml(self) -> str:
        """The resolved settings; `load_config` of this text gives an equal `Config`.

        `model.num_classes` is there if it was set: its default, written down, would refuse data with other classes.
        """
        data_decide = "num_classes" not in self.model.model_fields_set
        return dump_yaml(self.model_dump(mode="json", exclude={"model": {"num_classes"}} if data_decide else None))


def known_fields() -> dict[str, FieldInfo]:
    """Every setting by its dotted key."""
    fields: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            fields |= {f"{name}.{inner}": own for inner, own in section.model_fields.items()}
        else:
            fields[name] = field
    return fields


def idle_settings(config: Config, keys: Iterable[str]) -> dict[str, str]:
    """Which of these settings change nothing in a config, because another one switches off what they belong to.

    Args:
        config: as resolved.
        keys: dotted keys, such as those given on the command line.

    Returns:
        key -> the setting that would make it count, such as "model.queries=patterns".
    """
    fields, idle = known_fields(), {}
    for key in keys:
        for needs in fields[key].metadata if key in fields else ():
            if isinstance(needs, Needs) and not needs.holds(config):
                idle.setdefault(key, needs.text)
    return idle


def describe_idle(config: Config, given: Mapping[str, Any]) -> list[str]:
    """A sentence on each of the given settings (dotted key -> value) that changes nothing."""
    return [
        f"{key}={given[key]} changes nothing here: it needs {needs}"
        for key, needs in idle_settings(config, given).items()
    ]
