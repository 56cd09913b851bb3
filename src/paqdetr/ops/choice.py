"""Which back end of deformable attention runs where."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator

import torch

from paqdetr.errors import BackendError
from paqdetr.ops.compiled import is_any_kept

BACKENDS = ("reference", "gather", "numba", "triton")

# The kernels count rows in float32, which is exact up to here.
_MAX_TOKENS = 2**24
_HALVES = (torch.bfloat16, torch.float16)
_DTYPES = {"numba": (torch.float32, torch.float64, *_HALVES), "triton": (torch.float32, *_HALVES)}
_DEVICES = {"numba": "cpu", "triton": "cuda"}

_forced: str | None = None


def choose_backend(device: torch.device | str, dtype: torch.dtype = torch.float32, *, tokens: int = 0) -> str:
    """The back end that `ms_deform_attn(..., backend="auto")` takes.

    "numba" on a CPU and "triton" on CUDA, which both need a library and no compiler of the user's: numba brings its own, and
    Triton is taken only where the compiler it calls is there. On CUDA under `torch.use_deterministic_algorithms` it is
    "gather": the other two add gradients in no fixed order there. "reference" otherwise, and while a model is traced for ONNX.

    Args:
        device: of the values.
        dtype: of the values.
        tokens: S, how many tokens the levels have together.
    """
    if _forced is not None:
        require_backend(_forced, device, dtype, tokens=tokens)
        return _forced
    if torch.onnx.is_in_onnx_export() or torch.jit.is_tracing():
        return "reference"
    kind = torch.device(device).type
    if kind == "cuda" and torch.are_deterministic_algorithms_enabled():
        return "gather"
    for name in ("numba", "triton"):
        if _DEVICES[name] == kind and _obstacle(name, kind, dtype, tokens) is None:
            return name
    return "reference"


def require_backend(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.float32, *, tokens: int = 0
) -> None:
    """Raise if a back end cannot run on these values.

    Raises:
        ValueError: there is no back end of this name.
        BackendError: it cannot run here, and why.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown back end {name!r}: expected 'auto' or one of {sorted(BACKENDS)}")
    if name in _DEVICES:
        reason = _obstacle(name, torch.device(device).type, dtype, tokens)
        if reason is not None:
            raise BackendError(f"attention back end {name!r}: {reason}", "choose 'auto', 'reference' or 'gather'")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this, "auto" means `name`, in all threads: to export a model with "reference", say.

    Raises:
        ValueError: there is no back end of this name.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"unknown back end {name!r}: expected one of {sorted(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _obstacle(name: str, device: str, dtype: torch.dtype, tokens: int) -> str | None:
    """Why a back end with kernels cannot run, or None."""
    if device != _DEVICES[name]:
        return f"runs on {_DEVICES[name]}, and the values are on {device}"
    if dtype not in _DTYPES[name]:
        return f"knows no {dtype}"
    if tokens > _MAX_TOKENS:
        return f"knows up to {_MAX_TOKENS} tokens, and there are {tokens}"
    return numba_missing() if name == "numba" else triton_missing()


def _constant(ask: Callable[[], str | None]) -> Callable[[], str | None]:
    """Ask once, and have `torch.compile` take the answer for a constant.

    `torch.compiler.assume_constant_result` sets the same mark, but it imports the compiler, which takes a second.
    """
    once = functools.cache(ask)

    @functools.wraps(ask)
    def answer() -> str | None:
        return once()

    vars(answer).update(_dynamo_marked_constant=True, cache_clear=once.cache_clear)
    return answer


@_constant
def numba_missing() -> str | None:
    """Why numba cannot be used in this process, or None. Imports it, at the first call, unless it has been of use before."""
    try:
        if importlib.util.find_spec("numba") and is_any_kept():
            return None
        import numba  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        if error.name == "numba":
            return "numba is not installed"
        reason = str(error)
    except Exception as error:  # whatever its parts raise, such as over a numpy they do not know
        reason = str(error)
    else:
        return None
    warnings.warn(f"numba is installed but cannot be imported: {reason}", RuntimeWarning, stacklevel=5)
    return f"numba cannot be imported: {reason}"


@_constant
def triton_missing() -> str | None:
    """Why Triton cannot be used in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "triton needs a C compiler for its launcher, and none was found"
