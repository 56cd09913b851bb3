"""The device of a training or an evaluation, as models know it."""

from paqdetr.models.device import require_device

__all__ = ["require_device"]
