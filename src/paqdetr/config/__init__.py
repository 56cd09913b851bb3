"""Settings: `schema` says what there is, `files` where it is read from."""

from paqdetr.config.files import (
    known_figures,
    known_keys,
    list_configs,
    load_config,
    parse_overrides,
    validate_config,
)
from paqdetr.config.schema import AugmentConfig, Config, LossConfig, ModelConfig

__all__ = [
    "AugmentConfig",
    "Config",
    "LossConfig",
    "ModelConfig",
    "known_figures",
    "known_keys",
    "list_configs",
    "load_config",
    "parse_overrides",
    "validate_config",
]
