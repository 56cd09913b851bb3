"""Settings of the architecture, and which of them go together; before them, what every group of settings has in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

Made = TypeVar("Made")


def lists_are_tuples(value: Any) -> Any:
    """Sequences of settings are tuples; YAML and json know lists alone."""
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Needs:
    """At a field: what the setting needs to have an effect.

    Attributes:
        text: the settings that would do, such as "model.queries=patterns".
        holds: whether a `Config` has them.
    """

    text: str
    holds: Callable[[Any], bool]


class Role(Enum):
    """At a field of a model: what another value of the setting means for weights."""

    FREE = (
        "a training may start from weights that were made with another value: a size that is changed on the way, an initial "
        "value that the weights replace, or what acts in training or on detections alone"
    )
    QUERIES = "part of the source of content queries, which a conversion takes from a model that has another source"
    TARGET = "something else that a conversion takes from the model it converts to"
    HOST = "decides which host it is: weights made with another value are another host's"


class Section(BaseModel):
    """Settings that refuse unknown keys, changes, and values of another type: `true` is no number and "3" is none.

    Attributes:
        retired: settings that older versions had -> the value at which they did nothing. Old files may still carry them so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)
    retired: ClassVar[Mapping[str, Any]] = {}

    _lists = field_validator("*", mode="before")(lists_are_tuples)

    def build(self, make: Callable[..., Made], **given: Any) -> Made:
        """`make(...)`, where each argument that is not given is the setting of the same name, if there is one.

        So a setting is written down where it is declared and where it is used, and nowhere between.
        """
        names = inspect.signature(make).parameters.keys() - given.keys()
        return make(**{name: getattr(self, name) for name in names if hasattr(self, name)}, **given)

    @classmethod
    def with_role(cls, *roles: Role) -> tuple[str, ...]:
        """The settings whose fields say one of these."""
        return tuple(key for key, field in cls.model_fields.items() if any(role in field.metadata for role in roles))

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        for key in cls.retired.keys() & values.keys():
            if values[key] != cls.retired[key]:
                raise ValueError(
                    f"{key}={values[key]!r} was removed; the last commit that has it is 170e1a7 "
                    "(docs/decisions/0016-remedies-as-settings.md)"
                )
        return {key: value for key, value in values.items() if key not in cls.retired}


MIXED = Needs("model.queries=patterns or static_mixture", lambda c: c.model.queries in ("patterns", "static_mixture"))
_PATTERNS = Needs("model.queries=patterns", lambda c: c.model.queries == "patterns")
_IMAGE_MIXTURES = Needs("model.mixture_input=image or both", lambda c: c.model.mixture_input != "query")
_QUERY_FEATURES = Needs(
    "model.mixture_input=query or both, or model.queries=features", lambda c: c.model.uses_query_features
)
_STATIC_CONTENT = Needs(
    "model.queries=static, model.mixture=residual, or hybrid queries with learned content",
    lambda c: c.model.queries == "static" or c.model.mixture == "residual" or c.model.has_hybrid_table,
)
HYBRID = Needs("model.hybrid_queries or model.hybrid_ratio above 0", lambda c: c.model.num_hybrid > 0)
AUXILIARY = Needs("model.auxiliary_heads not empty", lambda c: bool(c.model.auxiliary_heads))
_DENOISING = Needs("model.denoising=plain or contrastive", lambda c: c.model.denoising != "none")
SEVERAL_LAYERS = Needs("model.decoder_layers above 1", lambda c: c.model.decoder_layers > 1)


class ModelConfig(Section):
    """The architecture. Two models with equal values here have equal state dicts."""

    retired: ClassVar[Mapping[str, Any]] = {"one_to_many_heads": "none"}

    num_classes: Annotated[int, Role.FREE] = Field(
        default=80, ge=1, le=100_000, description="taken from the data in a training"
    )

    backbone: Annotated[str, Role.HOST] = Field(
        default="resnet50", description="any timm model that has features of these strides"
    )
    backbone_strides: tuple[int, ...] = Field(
        default=(8, 16, 32), description="pixels per token, one for each feature map that is used"
    )
    frozen_stride: Annotated[int, Role.FREE, Role.TARGET] = Field(
        default=4,
        ge=0,
        le=1024,
        description="the backbone is frozen up to the feature of this stride; 0 trains all of it",
    )
    freeze_backbone_norm: Annotated[bool, Role.FREE, Role.TARGET] = Field(
        default=True, description="batch norms of the backbone keep their statistics and weights"
    )

    backbone_output_norm: bool = Field(
        default=False, description="a LayerNorm on each feature map, as official Swin detectors have"
    )

    # Transformer
    dim: int = Field(
        default=256, ge=8, le=8192, description="width of the transformer (d); a multiple of 4 and of num_heads"
    )
    num_levels: int = Field(
        default=4,
        ge=1,
        le=16,
        description="feature maps that encoder and decoder see; those beyond the backbone's are made by strided "
        "convolutions",
    )
    num_heads: int = Field(default=8, ge=1, le=1024, description="heads of every attention")
    num_points: int = Field(
        default=4, ge=1, le=256, description="points that a head of deformable attention reads on each level"
    )
    ffn_dim: int = Field(default=2048, ge=1, le=131_072, description="hidden width of the feed-forward blocks")
    dropout: Annotated[float, Role.FREE, Role.TARGET] = Field(
        default=0.0, ge=0, lt=1, description="in encoder and decoder layers"
    )
    encoder_layers: int = Field(default=6, ge=1, le=100, description="layers of the encoder")
    encoder_query_levels: int | None = Field(
        default=None, ge=1, le=16, description="only the N coarsest levels are updated; null: all"
    )
    encoder_fusion: Annotated[bool, Role.HOST] = Field(
        default=False, description="memory is computed from the tokens after every encoder layer (Relation-DETR)"
    )
    decoder_layers: int = Field(default=6, ge=1, le=100, description="layers of the decoder (L)")
    decoder_norm: bool = Field(default=True, description="a LayerNorm between a decoder layer and its heads")
    share_heads: Annotated[bool, SEVERAL_LAYERS, Role.TARGET] = Field(
        default=False, description="one class head and one box head for all decoder layers"
    )

    positions: Annotated[Literal["proposals", "anchors", "points"], Role.HOST] = Field(
        default="proposals",
        description="where queries begin. proposals: boxes chosen among the encoder's tokens (two-stage); anchors: "
        "learned boxes (DAB); points: read off learned position embeddings (one-stage Deformable DETR)",
    )
    class_agnostic_proposals: Annotated[bool, Role.HOST] = Field(
        default=False, description="tokens are ranked and trained as object or not"
    )
    distinct_proposals: Annotated[float | None, Role.FREE] = Field(
        default=None,
        gt=0,
        le=1,
        description="proposals that overlap a better one by more than this IoU come last (DDQ, arXiv 2303.12776: 0.8)",
    )
    distinct_queries: Annotated[float | None, SEVERAL_LAYERS, Role.FREE] = Field(
        default=None,
        gt=0,
        le=1,
        description="after each decoder layer, queries that overlap a better one by more than this IoU leave: no match, no "
        "detection (DDQ: 0.8)",
    )
    distinct_restart: Annotated[
        bool, Needs("model.distinct_queries", lambda c: c.model.distinct_queries is not None), SEVERAL_LAYERS, Role.FREE
    ] = Field(
        default=False,
        description="in an image whose first query has not left, all queries take part again, as in DDQ's code",
    )
    position_embedding: Annotated[Literal["refined", "fixed"], Role.HOST] = Field(
        default="refined",
        description="how the position of a query is embedded for the decoder. refined: from its current box in every layer (DAB, "
        "DINO); fixed: once",
    )
    scale_positions: Annotated[bool, SEVERAL_LAYERS, Role.HOST] = Field(
        default=False, description="from layer 2 on, positions are scaled by the content (DAB)"
    )
    box_refinement: Annotated[bool, Role.HOST] = Field(
        default=True, description="each layer starts from the boxes of the last"
    )
    position_relation: Annotated[bool, SEVERAL_LAYERS, Role.HOST] = Field(
        default=False,
        description="from layer 2 on, self-attention has a bias made from pairs of boxes (Relation-DETR, arXiv 2407.11699)",
    )
    look_forward_twice: Annotated[bool, SEVERAL_LAYERS, Role.FREE, Role.TARGET] = Field(
        default=True, description="a layer's box offsets are trained by the next layer's loss too (DINO)"
    )

    num_queries: Annotated[int, Role.FREE] = Field(default=900, ge=1, le=100_000, description="queries (n)")
    queries: Annotated[
        Literal["static", "proposals", "tokens", "patterns", "static_mixture", "features"], Role.QUERIES
    ] = Field(
        default="static",
        description="content of queries. static: a learned table; proposals: computed from the proposal's box; tokens: a linear "
        "layer of the token that proposed it (DDQ); patterns: PaQ; and two ablations: static_mixture, patterns mixed by learned "
        "weights that no image changes; features, a linear layer of the query's features, without patterns",
    )
    content_std: Annotated[float | None, _STATIC_CONTENT, Role.FREE, Role.QUERIES] = Field(
        default=1.0, ge=0, description="initial std of static content; null: Xavier-uniform"
    )
    mixture: Annotated[Literal["replace", "residual"], Role.QUERIES] = Field(
        default="replace",
        description="residual: static content, to which mixtures (or features) are added through a gate that starts at 0 (ours)",
    )
    mixture_input: Annotated[Literal["image", "query", "both"], _PATTERNS, Role.QUERIES] = Field(
        default="image",
        description="what the weights of the mixtures are computed from. image: one vector for the image (the paper's); query: "
        "the features of each query, which are the token of its proposal, or in one-stage hosts the encoder's memory at its "
        "reference point; both: the sum of the two logits (ours)",
    )
    detach_query_features: Annotated[bool, _QUERY_FEATURES, Role.FREE, Role.QUERIES] = Field(
        default=True, description="content queries send no gradient through the features of queries"
    )
    num_patterns: Annotated[int, MIXED, Role.QUERIES] = Field(
        default=64, ge=2, le=100_000, description="patterns that contents are mixed from (m)"
    )
    pattern_std: Annotated[float, MIXED, Role.FREE, Role.QUERIES] = Field(
        default=1.0, ge=0, description="initial std of the patterns"
    )
    extractor: Annotated[Literal["fused", "pooled"], _PATTERNS, _IMAGE_MIXTURES, Role.QUERIES] = Field(
        default="fused",
        description="what makes one vector of an image for the mixtures. fused: dilated convolutions and top-down "
        "fusion; pooled: the mean of the tokens",
    )
    extractor_conv: Annotated[
        Literal["depthwise", "full"],
        _PATTERNS,
        _IMAGE_MIXTURES,
        Needs("model.extractor=fused", lambda c: c.model.extractor == "fused"),
        Role.QUERIES,
    ] = Field(default="depthwise", description="3x3 convolutions of the fused extractor; full is the paper's")
    head: Annotated[Literal["dense", "factorised"], _PATTERNS, _IMAGE_MIXTURES, Role.QUERIES] = Field(
        default="dense",
        description="from that vector to the mixtures' weights. dense: one linear layer; factorised: a product of "
        "rank head_rank",
    )
    head_rank: Annotated[
        int,
        _PATTERNS,
        _IMAGE_MIXTURES,
        Needs("model.head=factorised", lambda c: c.model.head == "factorised"),
        Role.QUERIES,
    ] = Field(default=32, ge=1, le=8192, description="rank of the factorised head")
    temperature: Annotated[float, MIXED, Role.QUERIES] = Field(
        default=1.0, gt=0, description="of the softmax over patterns; lower is sharper"
    )
    gain: Annotated[float, _PATTERNS, Role.FREE, Role.QUERIES] = Field(
        default=1.0, ge=0, description="factor on the head's initial weights; 0: mixtures start as static ones"
    )
    bias_std: Annotated[float | None, MIXED, Role.FREE, Role.QUERIES] = Field(
        default=2.0,
        ge=0,
        description="initial std of the bias of the mixtures' logits, with mixture_input=query of the logits; null: that of a "
        "plain linear layer",
    )
    normalize_summary: Annotated[bool, _PATTERNS, _IMAGE_MIXTURES, Role.QUERIES] = Field(
        default=False, description="mix by what sets an image apart (ours)"
    )

    denoising: Annotated[Literal["none", "plain", "contrastive"], Role.HOST] = Field(
        default="contrastive",
        description="noised boxes as further queries in training. contrastive: DINO's; plain: DN-DETR's",
    )
    denoising_queries: Annotated[
        int, Needs("model.denoising=contrastive", lambda c: c.model.denoising == "contrastive"), Role.FREE, Role.TARGET
    ] = Field(default=100, ge=1, le=10_000, description="contrastive: about so many positives per image")
    denoising_groups: Annotated[
        int, Needs("model.denoising=plain", lambda c: c.model.denoising == "plain"), Role.FREE, Role.TARGET
    ] = Field(default=5, ge=1, le=1000, description="plain: noised boxes per ground-truth box")
    label_noise: Annotated[float, _DENOISING, Role.FREE, Role.TARGET] = Field(
        default=0.5,
        ge=0,
        le=1,
        description="plain: share of the noised boxes whose class is drawn anew; contrastive: twice that share",
    )
    box_noise: Annotated[float, _DENOISING, Role.FREE, Role.TARGET] = Field(
        default=1.0, ge=0, description="1: noised boxes move by up to half a side"
    )

    hybrid_queries: Annotated[int, Role.TARGET] = Field(
        default=0,
        ge=0,
        le=100_000,
        description="H-DETR's second set of queries, in training alone, under one-to-many assignment; any two-stage host",
    )
    hybrid_ratio: Annotated[
        float, Needs("model.hybrid_queries=0", lambda c: c.model.hybrid_queries == 0), Role.TARGET
    ] = Field(
        default=0.0,
        ge=0,
        le=100,
        description="where hybrid_queries is 0: their number as a multiple of num_queries (DDQ: 1.5)",
    )
    hybrid_heads: Annotated[Literal["shared", "encoder", "all"], HYBRID, Role.TARGET] = Field(
        default="shared",
        description="class and box heads of that set. shared: the next best proposals, and the decoder's heads (H-DETR); "
        "encoder: proposals by heads of its own, which have a loss (Relation-DETR); all: also heads of its own in every decoder "
        "layer, and content from its tokens (DDQ's dense queries)",
    )

    # Co-DETR's heads with an assignment of their own on the encoder's output, in training alone.
    auxiliary_heads: Annotated[tuple[Literal["faster_rcnn", "atss"], ...], Role.FREE, Role.TARGET] = Field(
        default=(),
        description="Co-DETR's auxiliary heads on the encoder's output, in training alone; any host whose positions are refined",
    )
    roi_samples: Annotated[
        int,
        Needs("faster_rcnn among model.auxiliary_heads", lambda c: "faster_rcnn" in c.model.auxiliary_heads),
        Role.FREE,
        Role.TARGET,
    ] = Field(
        default=512,
        ge=4,
        le=4096,
        description="proposals an image that the second stage of Faster R-CNN learns from; the first keeps twice as many, "
        "1000 at most",
    )
    customised_queries: Annotated[int, AUXILIARY, Role.FREE, Role.TARGET] = Field(
        default=300,
        ge=0,
        le=10_000,
        description="positives of an image that each auxiliary head gives to the decoder as queries, at most; 0: none",
    )

    # From queries to detections; nothing of it changes weights.
    max_detections: Annotated[int, Role.FREE] = Field(
        default=300,
        ge=1,
        le=100_000,
        description="detections kept of an image, by score; DINO keeps 300, Deformable DETR 100",
    )
    clamp_boxes: Annotated[bool, Role.FREE] = Field(
        default=True, description="predicted boxes are cut off at the image's border, as in detectron2"
    )

    # Conventions in which published codes differ; docs/convert.md names who does what.
    position_temperature: float = Field(default=20.0, gt=0, description="of the sine embedding of feature maps")
    position_offset: float = Field(default=0.0, ge=-0.5, le=0, description="-0.5 counts cells from their centres")
    refine_from: Annotated[
        Literal["normed", "raw"],
        Needs("model.box_refinement=true", lambda c: c.model.box_refinement),
        Needs("model.decoder_norm=true", lambda c: c.model.decoder_norm),
        SEVERAL_LAYERS,
    ] = Field(
        default="normed", description="`raw`: the next layer's boxes come from the output before the decoder's norm"
    )
    box_eps: float = Field(default=1e-5, gt=0, lt=0.5, description="boxes are kept so far from 0 and 1 in logits")
    report_eps: float | None = Field(
        default=None, gt=0, lt=0.5, description="the same of the boxes that a layer reports; null: box_eps"
    )
    padded_positions: Annotated[
        bool, Needs("model.position_embedding=refined", lambda c: c.model.position_embedding == "refined")
    ] = Field(default=False, description="positions of boxes are those in the padded image")
    masked_neck_norm: Annotated[bool, Role.FREE] = Field(
        default=False, description="the neck's norms leave padding out, which published codes count in"
    )

    @field_validator("backbone_strides")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or not 1 <= value[0] <= value[-1] <= 1024 or list(value) != sorted(set(value)):
            raise ValueError("expected at least one stride from 1 to 1024, each larger than the one before")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"dim={self.dim} must be divisible by 4 and by num_heads={self.num_heads}")
        if self.num_levels < len(self.backbone_strides):
            raise ValueError(f"num_levels={self.num_levels} is fewer than backbone_strides={self.backbone_strides}")
        if self.encoder_query_levels is not None and self.encoder_query_levels > self.num_levels:
            raise ValueError(f"encoder_query_levels={self.encoder_query_levels} exceeds num_levels={self.num_levels}")
        for key, wrong, needs in self._contradictions():
            if wrong:
                raise ValueError(f"{key} needs {needs}")
        return self

    def _contradictions(self) -> list[tuple[str, bool, str]]:
        """Settings that no host combines: which, whether it is so here, what would be needed."""
        two_stage, points = self.positions == "proposals", self.positions == "points"
        anchors, refined = self.positions == "anchors", self.position_embedding == "refined"
        from_proposals, residual = self.queries == "proposals", self.mixture == "residual"
        denoised, distinct = self.denoising != "none", self.distinct_proposals is not None
        agnostic, hybrid = self.class_agnostic_proposals, self.hybrid_queries > 0
        return [
            ("queries=proposals", from_proposals and not two_stage, "positions=proposals"),
            ("queries=proposals", from_proposals and refined, "position_embedding=fixed"),
            ("position_embedding=refined", refined and points, "positions=proposals or anchors"),
            ("position_embedding=fixed", anchors and not refined, "positions=proposals or points"),
            ("scale_positions=true", self.scale_positions and not refined, "position_embedding=refined"),
            ("box_refinement=false", not self.box_refinement and not points, "positions=points"),
            ("look_forward_twice=true", self.look_forward_twice and not self.box_refinement, "box_refinement=true"),
            (f"denoising={self.denoising}", denoised and not refined, "position_embedding=refined"),
            ("class_agnostic_proposals=true", agnostic and not two_stage, "positions=proposals"),
            (f"distinct_proposals={self.distinct_proposals}", distinct and not two_stage, "positions=proposals"),
            (
                "mixture=residual",
                residual and self.queries in ("static", "proposals", "tokens"),
                "queries=patterns, static_mixture or features",
            ),
            (
                "mixture=residual",
                residual and self.queries in ("patterns", "static_mixture") and self.pattern_std == 0,
                "pattern_std above 0: of the gate, which starts at 0, and the patterns neither would ever get a gradient",
            ),
            ("queries=tokens", self.queries == "tokens" and not two_stage, "positions=proposals"),
            (f"hybrid_queries={self.hybrid_queries}", hybrid and not two_stage, "positions=proposals"),
            (f"hybrid_ratio={self.hybrid_ratio}", self.hybrid_ratio > 0 and not two_stage, "positions=proposals"),
            (
                f"hybrid_ratio={self.hybrid_ratio}",
                self.hybrid_ratio > 0 and not self.num_hybrid,
                f"num_queries * hybrid_ratio of at least 1 (num_queries={self.num_queries}); hybrid_ratio=0 makes none",
            ),
            (
                f"hybrid_heads={self.hybrid_heads}",
                self.hybrid_heads != "shared" and self.class_agnostic_proposals,
                "class_agnostic_proposals=false",
            ),
            ("hybrid_heads=all", self.hybrid_heads == "all" and not refined, "position_embedding=refined"),
            (
                f"distinct_queries={self.distinct_queries}",
                self.distinct_queries is not None and not self.box_refinement,
                "box_refinement=true",
            ),
            ("position_relation=true", self.position_relation and not self.box_refinement, "box_refinement=true"),
            (
                f"auxiliary_heads={list(self.auxiliary_heads)}",
                len(set(self.auxiliary_heads)) < len(self.auxiliary_heads),
                "each head once",
            ),
            (
                f"auxiliary_heads={list(self.auxiliary_heads)}",
                bool(self.auxiliary_heads) and not refined,
                "position_embedding=refined",
            ),
        ]

    @property
    def uses_query_features(self) -> bool:
        """Whether content is computed from what each query looks at."""
        return self.queries in ("features", "tokens") or (self.queries == "patterns" and self.mixture_input != "image")

    @property
    def level_strides(self) -> list[int]:
        """Pixels per cell of each level; those beyond the backbone's double from level to level."""
        last, further = self.backbone_strides[-1], self.num_levels - len(self.backbone_strides)
        return [*self.backbone_strides, *(last * 2**i for i in range(1, further + 1))]

    @property
    def num_hybrid(self) -> int:
        """Queries of the second set, in training."""
        return self.hybrid_queries or int(self.hybrid_ratio * self.num_queries)

    @property
    def has_hybrid_table(self) -> bool:
        """Whether the second set has learned content of its own."""
        return self.num_hybrid > 0 and self.hybrid_heads != "all" and self.queries != "proposals"

    @property
    def content_dim(self) -> int:
        """Width of the content that a query source makes: one less than `dim` where an indicator channel follows it."""
        return self.dim - 1 if self.denoising == "plain" else self.dim


def problem_of(key: str, value: Any) -> str:
    """Why a single setting of the model cannot have a value; empty if it can."""
    rules = ModelConfig.model_fields[key].rebuild_annotation()
    try:
        TypeAdapter(rules, config=ConfigDict(strict=True)).validate_python(lists_are_tuples(value))
    except ValidationError as error:
        return error.errors()[0]["msg"]
    return ""
