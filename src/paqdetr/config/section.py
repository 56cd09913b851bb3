"""What every group of settings has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Settings that refuse unknown keys and changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
