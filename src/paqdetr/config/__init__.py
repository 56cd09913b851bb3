"""Settings: `schema` says what there is, with `model` beside it; `files` where it is read from."""

from paqdetr.config.files import (
    command_to_resume,
    describe_config,
    is_name,
    known_figures,
    known_keys,
    list_configs,
    load_config,
    parse_overrides,
    retired_keys,
    validate_config,
)
from paqdetr.config.model import ModelConfig
from paqdetr.config.schema import AugmentConfig, Config, LossConfig, ResizeRule, describe_idle, idle_settings

__all__ = [
    "AugmentConfig",
    "Config",
    "LossConfig",
    "ModelConfig",
    "ResizeRule",
    "command_to_resume",
    "describe_config",
    "describe_idle",
    "idle_settings",
    "is_name",
    "known_figures",
    "known_keys",
    "list_configs",
    "load_config",
    "parse_overrides",
    "retired_keys",
    "validate_config",
]
