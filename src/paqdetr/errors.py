"""Errors a user can cause, each with the one line of advice that ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


class UserError(Exception):
    """Something outside the program is wrong: a path, a file's content, a key.

    Args:
        message: what was found and where: the file, the config key or the image id, and what was expected.
        remedy: the next thing to do, as one sentence.

    The command line prints both and ends with exit code 2.

    Attributes:
        reported_elsewhere: several processes end with this error, and another one of them reports it.
    """

    reported_elsewhere = False

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)  # both, so that it can be pickled
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})"


class ConfigError(UserError):
    """A setting is unknown, has the wrong type or contradicts another."""


class DataError(UserError):
    """Images or annotations are missing or malformed."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or belongs to another model."""


class NonFiniteError(UserError):
    """A prediction or a loss became NaN or infinite.

    Attributes:
        layers: names of the decoder layers concerned, if known.
        images: ids of the images concerned, or "batch position i" where an image has no id.
    """

    def __init__(
        self, message: str, remedy: str, *, layers: Sequence[str] = (), images: Sequence[int | str] = ()
    ) -> None:
        super().__init__(message, remedy)
        self.layers = tuple(layers)
        self.images = tuple(images)


class ExportError(UserError):
    """An exported model does not find what the model finds, or gains nothing; it was not written.

    Attributes:
        parity: the comparison that failed, a `paqdetr.deploy.parity.Parity`; None if it was another.
    """

    parity: Any = None


class BackendError(UserError):
    """What was asked for cannot run here: a library that it needs is missing or does not work, or a kernel does not know the
    device or dtype."""


class StorageError(UserError):
    """A file of a run cannot be written: no space, no permission, a disk that fails."""


class WorkerError(UserError):
    """A process that loads images died."""


class OutOfMemoryError(UserError):
    """A GPU, or the machine, has no room for what a model needs."""


def import_extra(name: str, extra: str | None = None) -> ModuleType:
    """A module that is, or needs, what an extra of this package installs; None: a package that no extra has.

    Raises:
        BackendError: it is not installed.
    """
    remedy = f"pip install {name}" if extra is None else f"pip install 'paqdetr[{extra}]'"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name or name} is not installed", remedy) from None
    except ImportError as error:
        raise BackendError(f"{name} cannot be imported: {error}", remedy) from None


def memory_error(
    error: Exception, remedy: str = "take smaller images or batches, or a smaller model"
) -> OutOfMemoryError | None:
    """What a user can do about a complaint that there is no memory; None for any other error.

    Args:
        error: of torch or numpy. Only on NVIDIA's GPUs torch has a class for it, elsewhere a RuntimeError whose text says so.
        remedy: what helps where the error came from.
    """
    text = str(error).split("\n")[0]
    on_machine = isinstance(error, MemoryError) or "DefaultCPUAllocator" in text
    on_gpu = isinstance(error, RuntimeError) and "out of memory" in text.lower()
    if not on_machine and not on_gpu:
        return None
    asked = re.search(r"(?:tried|unable) to allocate ([\d.]+) (\w+)", text, re.IGNORECASE)
    amount = ""
    if asked:
        size, unit = (f"{int(asked[1]) / 2**30:.2f}", "GiB") if asked[2] == "bytes" else asked.groups()
        amount = f": it was asked for {size} {unit} more"
    return OutOfMemoryError(f"{'the machine' if on_machine else 'the GPU'} has no memory left{amount}", remedy)
