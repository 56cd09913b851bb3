"""Models by name, built from settings, and what every parameter starts with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from paqdetr.config import Config, ModelConfig, list_configs, load_config
from paqdetr.errors import ConfigError
from paqdetr.models.backbone import Backbone, normalization_of
from paqdetr.models.decoder import Decoder, LayerHeads
from paqdetr.models.denoising import ContrastiveDenoising, Denoising, PlainDenoising
from paqdetr.models.detector import Detector
from paqdetr.models.encoder import MLP, DeformableAttention, DeformableEncoder
from paqdetr.models.proposals import Initializer, LearnedAnchors, LearnedPoints, ProposalHead, ProposalStart
from paqdetr.models.queries import FeatureQueries, QuerySource, ResidualMixtures, StaticQueries
from paqdetr.models.tokens import Neck
from paqdetr.paq import PatternQueries, StaticMixtures
from paqdetr.preprocessing import Preprocessing
from paqdetr.structures import ClassTable
from paqdetr.text import some
from paqdetr.values import is_whole

if TYPE_CHECKING:
    from paqdetr.models.auxiliary import AuxiliaryHeads

# So that the many background queries do not drown the first steps.
_CLASS_BIAS = -math.log((1 - 0.01) / 0.01)


def init_weights(model: Detector) -> None:
    """Initialise every parameter outside the backbone and the query source: boxes start at their references."""
    for part in (model.encoder, model.decoder.layers, model.decoder.position_head, model.decoder.position_scale):
        if part is not None:
            _xavier(part)
    for part in model.neck.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
            _zero(part.bias)
    class_heads, box_heads = list(model.decoder.class_heads), list(model.decoder.box_heads)
    start = model.start
    if isinstance(start, ProposalStart):
        nn.init.xavier_uniform_(start.head.project.weight)
        if start.embed is not None:
            _xavier(start.embed)
        class_heads.append(start.head.class_head)
        box_heads.append(start.head.box_head)
        class_heads += [start.head.hybrid_class_head] if start.head.hybrid_class_head is not None else []
        box_heads += [start.head.hybrid_box_head] if start.head.hybrid_box_head is not None else []
    if model.hybrid_heads is not None:
        class_heads += model.hybrid_heads.class_heads
        box_heads += model.hybrid_heads.box_heads
    for head in class_heads:
        nn.init.constant_(head.bias, _CLASS_BIAS)  # type: ignore[arg-type]
    for head in box_heads:
        last = _last(head)
        nn.init.zeros_(last.weight)
        _zero(last.bias)
    if not isinstance(start, ProposalStart):
        nn.init.constant_(_last(model.decoder.box_heads[0]).bias[2:], -2.0)
    if isinstance(start, LearnedPoints):
        nn.init.xavier_uniform_(start.point_head.weight)
        _zero(start.point_head.bias)
    if model.auxiliary is not None:
        _init_auxiliary(model.auxiliary)


def _init_auxiliary(auxiliary: AuxiliaryHeads) -> None:
    """As the published code of Co-DETR: small numbers for what predicts."""
    from paqdetr.models.auxiliary_heads import AtssHead, FasterRcnn

    _xavier(auxiliary)
    for part in reversed(list(auxiliary.modules())):  # what is inside of a head before the head
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=0.01)
            _zero(part.bias)
        elif isinstance(part, AtssHead):
            nn.init.constant_(part.class_head.bias, _CLASS_BIAS)  # type: ignore[arg-type]
        elif isinstance(part, FasterRcnn):
            for linear, std in ((part.class_head, 0.01), (part.background_head, 0.01), (part.box_head, 0.001)):
                nn.init.normal_(linear.weight, std=std)
                _zero(linear.bias)
    nn.init.xavier_uniform_(auxiliary.downsample[0].weight)  # type: ignore[arg-type]


def _xavier(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            nn.init.xavier_uniform_(module.in_proj_weight)
    for module in part.modules():
        if isinstance(module, DeformableAttention):
            module.init_weights()


def _last(head: nn.Module) -> nn.Linear:
    assert isinstance(head, MLP)
    layer = head[-1]
    assert isinstance(layer, nn.Linear)
    return layer


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)


def _static_queries(config: ModelConfig) -> StaticQueries:
    return config.build(StaticQueries, dim=config.content_dim, std=config.content_std)


def _as_mixture(
    config: ModelConfig, mixtures: PatternQueries | StaticMixtures | FeatureQueries
) -> PatternQueries | StaticMixtures | FeatureQueries | ResidualMixtures:
    """The mixtures themselves, or added to static content."""
    if config.mixture == "replace":
        return mixtures
    return ResidualMixtures(static=_static_queries(config), mixtures=mixtures)


def _pattern_queries(config: ModelConfig) -> QuerySource:
    patterns = config.build(PatternQueries, pattern_dim=config.content_dim, conv=config.extractor_conv)
    return _as_mixture(config, patterns)


# None: the start makes the content itself.
QUERY_SOURCES: dict[str, Callable[[ModelConfig], QuerySource | None]] = {
    "static": _static_queries,
    "patterns": _pattern_queries,
    "static_mixture": lambda config: _as_mixture(config, config.build(StaticMixtures, dim=config.content_dim)),
    "features": lambda config: _as_mixture(config, config.build(FeatureQueries)),
    "tokens": lambda config: config.build(FeatureQueries, norm=False),
    "proposals": lambda config: None,
}


def _proposal_start(config: ModelConfig) -> ProposalStart:
    return config.build(
        ProposalStart,
        head=config.build(
            ProposalHead,
            class_agnostic=config.class_agnostic_proposals,
            distinct=config.distinct_proposals,
            hybrid=config.num_hybrid > 0 and config.hybrid_heads != "shared",
        ),
        fixed_position=config.position_embedding == "fixed",
        with_content=config.queries == "proposals",
    )


QUERY_INITS: dict[str, Callable[[ModelConfig], Initializer]] = {
    "proposals": _proposal_start,
    "anchors": lambda config: config.build(LearnedAnchors),
    "points": lambda config: config.build(LearnedPoints),
}

DENOISING: dict[str, Callable[[ModelConfig], Denoising | None]] = {
    "none": lambda config: None,
    "plain": lambda config: config.build(PlainDenoising, groups=config.denoising_groups),
    "contrastive": lambda config: config.build(ContrastiveDenoising, num_queries=config.denoising_queries),
}


def _auxiliary_heads(config: ModelConfig) -> AuxiliaryHeads | None:
    if not config.auxiliary_heads:
        return None
    from paqdetr.models.auxiliary import AuxiliaryHeads  # needs torchvision's models, which take long to import

    return AuxiliaryHeads(
        names=config.auxiliary_heads,
        dim=config.dim,
        num_classes=config.num_classes,
        strides=config.level_strides,
        samples=config.roi_samples,
        queries=config.customised_queries,
    )


def preprocessing_of(config: Config) -> Preprocessing:
    """What the settings do to an image."""
    return Preprocessing.of(config, normalization_of(config.model.backbone))


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that `create_model` knows, by a wildcard such as "paq_*"."""
    return list_configs("model", pattern)


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of the recipes that `train` takes beside models, by a wildcard such as "*_finetune"."""
    return list_configs("recipe", pattern)


def as_class_table(classes: ClassTable | Sequence[str] | int) -> ClassTable:
    """A table from itself, from names, or from a number.

    Raises:
        ConfigError: no class, or two of one name.
    """
    if isinstance(classes, str | bool):
        raise ConfigError(f"classes={classes!r}: expected names or a number", f"give [{classes!r}], for one class")
    if is_whole(classes):
        count = int(cast(int, classes))  # of numpy too
        if count < 1:
            raise ConfigError(f"classes={count}: expected at least one", "give a positive number, or names")
        return ClassTable.numbered(count)
    if not isinstance(classes, ClassTable):
        names = tuple(str(name) for name in cast(Sequence[str], classes))
        classes = ClassTable(tuple(range(len(names))), names)
    folded = [name.casefold() for name in classes.names]
    if not folded or len(set(folded)) < len(folded):
        raise ConfigError(f"classes: {some(classes.names, 5)}", "give at least one class, each name once")
    return classes


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    classes: ClassTable | Sequence[str] | int | None = None,
    pretrained_backbone: bool = False,
    **overrides: Any,
) -> Detector:
    """A model by name, with random weights outside the backbone.

    Args:
        name: one of `list_models()`, or a YAML file of settings.
        num_classes: C; the settings' own if None.
        classes: a table, names (ids are then 0, 1, ...), or as num_classes.
        pretrained_backbone: start the backbone from ImageNet weights.
        overrides: any setting of the model, for example `backbone="resnet18"`, `num_queries=300`, also as `model.num_queries`;
            `preset="paper"`.

    Raises:
        ConfigError: unknown name or setting, with the nearest known one; `init`, which is a training's.
    """
    for key in ("init", "pretrained"):
        if key in overrides:
            raise ConfigError(
                f"create_model: {key}={overrides[key]!r}: its models have random weights outside the backbone",
                "paqdetr.load(path) gives a checkpoint's model; pretrained_backbone=True the ImageNet weights of the backbone",
            )
    keys = set(Config.model_fields) - {"model"}
    dotted = {key if key in keys or "." in key else f"model.{key}": value for key, value in overrides.items()}
    table = None if classes is None else as_class_table(classes)
    if num_classes is not None:
        dotted["model.num_classes"] = num_classes
    if table is not None:
        dotted.setdefault("model.num_classes", len(table))
    config = load_config(name, dotted)
    return build_model(config, classes=table, pretrained_backbone=pretrained_backbone)


def build_model(config: Config, *, classes: ClassTable | None = None, pretrained_backbone: bool = False) -> Detector:
    """The model that the settings describe.

    Args:
        config: of model and preprocessing.
        classes: of the data set; numbered ones if None.
        pretrained_backbone: start the backbone from ImageNet weights.
    """
    model = config.model
    classes = classes or ClassTable.numbered(model.num_classes)
    if len(classes) != model.num_classes:
        raise ConfigError(
            f"model.num_classes={model.num_classes}, but there are {len(classes)} classes",
            "leave num_classes out: it is the number of the classes",
        )
    backbone = model.build(
        Backbone,
        name=model.backbone,
        strides=model.backbone_strides,
        freeze_norm=model.freeze_backbone_norm,
        output_norm=model.backbone_output_norm,
        pretrained=pretrained_backbone,
    )
    # The order decides which random numbers each part gets.
    decoder = model.build(
        Decoder,
        num_layers=model.decoder_layers,
        norm=model.decoder_norm,
        fixed_position=model.position_embedding == "fixed",
        distinct=model.distinct_queries,
        relation=model.position_relation,
    )
    hybrid_source, hybrid_heads = None, None
    if model.num_hybrid and model.hybrid_heads == "all":
        hybrid_heads = LayerHeads(num_layers=model.decoder_layers, dim=model.dim, num_classes=model.num_classes)
        if model.queries != "tokens":  # where it is, the queries share the linear layer
            hybrid_source = FeatureQueries(dim=model.dim, content_dim=model.content_dim, norm=False)
    elif model.has_hybrid_table:
        hybrid_source = StaticQueries(num_queries=model.num_hybrid, dim=model.dim, std=model.content_std)
    detector = Detector(
        config=model,
        name=config.name,
        classes=classes,
        preprocessing=preprocessing_of(config),
        backbone=backbone,
        neck=model.build(Neck, in_channels=backbone.channels, masked_norm=model.masked_neck_norm),
        encoder=model.build(
            DeformableEncoder,
            num_layers=model.encoder_layers,
            query_levels=model.encoder_query_levels,
            fusion=model.encoder_fusion,
        ),
        start=QUERY_INITS[model.positions](model),
        query_source=QUERY_SOURCES[model.queries](model),
        decoder=decoder,
        denoising=DENOISING[model.denoising](model),
        hybrid_source=hybrid_source,
        hybrid_heads=hybrid_heads,
        auxiliary=_auxiliary_heads(model),
    )
    init_weights(detector)
    return detector
