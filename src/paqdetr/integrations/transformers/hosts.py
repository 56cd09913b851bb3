"""The detectors of transformers that PaQ can be attached to, and where each of them keeps what PaQ needs.

One fact holds for all of them: the decoder is a module of its own, called with the content queries as `inputs_embeds` and the
encoder's memory as `encoder_hidden_states`. What differs is written down here, one entry a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from paqdetr.errors import ConfigError
from paqdetr.paq import CostWeights


@dataclass(frozen=True, slots=True)
class Host:
    """How to read one class of detectors.

    Attributes:
        content: what its content queries are, in words; the mixture is added to this, or takes its place.
        dim: the setting that holds the width of tokens and content.
        single_level: the memory is one map, whose size is that of the output of `model.input_projection`.
        padding: the decoder's argument that is True at valid tokens (B, S); None if the host ignores padding.
        criterion: name of the class that its loss function builds, and that matches.
        matcher_prefix: of the settings of the matching cost.
        focal: whether classification is focal loss, which varifocal loss can replace under one-to-many assignment.
    """

    content: str
    dim: str = "d_model"
    single_level: bool = False
    padding: str | None = None
    criterion: str = "DeformableDetrImageLoss"
    matcher_prefix: str = ""
    focal: bool = True

    def num_levels(self, config: Any) -> int:
        """Levels of the memory."""
        return 1 if self.single_level else int(config.num_feature_levels)

    def num_queries(self, config: Any) -> int:
        """Content queries per image, denoising queries left out."""
        if getattr(config, "two_stage", False):
            return int(config.two_stage_num_proposals)
        # DAB-DETR repeats its queries once for each of what it calls patterns.
        return int(config.num_queries) * max(int(getattr(config, "num_patterns", 0)), 1)

    def cost_weights(self, config: Any) -> CostWeights:
        """The host's own matching cost.

        Raises:
            ConfigError: its class cost is not the focal one.
        """
        if not getattr(config, "use_focal_loss", True):
            raise ConfigError(
                "use_focal_loss=False: this model matches by softmax probabilities, quality-aware assignment by sigmoid ones",
                "set model.config.use_focal_loss = True, or attach with assigner='none'",
            )
        prefix = self.matcher_prefix
        return CostWeights(
            classification=float(getattr(config, f"{prefix}class_cost")),
            l1=float(getattr(config, f"{prefix}bbox_cost")),
            giou=float(getattr(config, f"{prefix}giou_cost")),
            alpha=float(getattr(config, "matcher_alpha", 0.25)),
            gamma=float(getattr(config, "matcher_gamma", 2.0)),
        )

    def memory(
        self, called_with: Mapping[str, Any], map_size: tuple[int, int] | None
    ) -> tuple[Tensor, list[tuple[int, int]], Tensor | None]:
        """Tokens (B, S, d), (height, width) of each level, and the padding mask (B, S), True at padding, or None."""
        tokens = called_with["encoder_hidden_states"]
        if self.single_level:
            assert map_size is not None, "the projection runs before the decoder"
            shapes = [map_size]
        else:
            shapes = [(int(height), int(width)) for height, width in called_with["spatial_shapes_list"]]
        valid = called_with.get(self.padding) if self.padding else None
        return tokens, shapes, None if valid is None else ~valid.bool()


# Images come in one size, so that there is no padding: `encoder_attention_mask` is the mask between denoising groups here.
_RT = Host(
    content="the projected encoder tokens of the selected proposals, detached",
    criterion="RTDetrLoss",
    matcher_prefix="matcher_",
    focal=False,
)
HOSTS: dict[str, Host] = {
    "DeformableDetrForObjectDetection": Host(
        content="one-stage: the learned content half of query_position_embeddings; two-stage: that of pos_trans of the proposals",
        padding="encoder_attention_mask",
    ),
    "ConditionalDetrForObjectDetection": Host(content="zeros", single_level=True, padding="encoder_attention_mask"),
    "DabDetrForObjectDetection": Host(
        content="zeros; with num_patterns > 0 its learned table, each row shared by num_queries anchors",
        dim="hidden_size",
        single_level=True,
        padding="memory_key_padding_mask",
    ),
    "RTDetrForObjectDetection": _RT,
    "RTDetrV2ForObjectDetection": _RT,
    "DFineForObjectDetection": replace(_RT, criterion="DFineLoss"),
}


def host_of(model: nn.Module) -> Host:
    """The entry of a model's class, or of the nearest class it derives from.

    Raises:
        ConfigError: PaQ cannot be attached to this class.
    """
    for base in type(model).__mro__:
        if base.__name__ in HOSTS:
            return HOSTS[base.__name__]
    raise ConfigError(
        f"PaQ cannot be attached to a {type(model).__name__}",
        f"give one of {', '.join(HOSTS)}; docs/plugin.md shows how to put PaQ into any other DETR",
    )
