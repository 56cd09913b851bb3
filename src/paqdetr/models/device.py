"""The device a user names, checked before anything slow begins."""

from __future__ import annotations

import torch

from paqdetr.errors import ConfigError


def require_device(name: str | None) -> torch.device:
    """The device called `name`, such as "cpu" or "cuda"; a CUDA device if there is one, else the CPU, for None.

    Raises:
        ConfigError: torch knows no such device, or it does not work on this machine; the message names those that do.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = usable_devices()
    try:
        device = torch.device(name)
        # Of other kinds, such as meta or lazy, torch makes tensors that hold nothing, or fails later.
        if device.type in there and torch.ones(1, device=device).item() == 1:
            return device
        reason = ""
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f" ({str(error).strip().splitlines()[0]})"
    raise ConfigError(
        f"device {name!r}: it does not work here{reason}; those that do are {', '.join(there)}",
        "use --device cpu",
    )


def usable_devices() -> list[str]:
    """Kinds of devices that work on this machine."""
    others = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    return ["cpu", *(kind for kind, module in others.items() if module.is_available())]
