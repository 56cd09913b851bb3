"""The device a user names, checked before anything slow begins."""

from __future__ import annotations

import torch

from paqdetr.errors import ConfigError


def require_device(name: str | None) -> torch.device:
    """The device called `name`, such as "cpu" or "cuda"; a CUDA device if there is one, else the CPU, for None.

    Raises:
        ConfigError: torch knows no such device, or cannot use it on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"device {name!r}: torch cannot use it here ({reason})", "use --device cpu"
        ) from None
    return device
