"""Loops that numba compiles, kept on disk as machine code: a later process runs that without importing numba, which takes a CPU
second.

They lie where numba would keep its own: in `NUMBA_CACHE_DIR`, else beside this file, else in the user's cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any

from paqdetr.errors import StorageError
from paqdetr.files import whole_file

_HERE = Path(__file__).parent
_compiling = Lock()
_alive: list[Any] = []  # machine code goes with the engine that holds it


def kernel(name: str, *arguments: str | int) -> Callable[..., None]:
    """`compile_{name}(*arguments)` of `numba_kernels.py` as a C function of int64: numbers, and addresses of arrays."""
    with _compiling:  # two threads would compile the same twice
        return _kernel(name, *arguments)


def is_any_kept() -> bool:
    """Whether numba has compiled a loop before in an environment and on a machine like these."""
    return any(True for folder in _folders() if folder.is_dir() for _ in folder.glob("*.o"))


@functools.cache
def _kernel(name: str, *arguments: str | int) -> Callable[..., None]:
    file = "-".join(map(str, (name, *arguments))) + ".o"
    for folder in _folders():
        with suppress(OSError, ValueError):
            return _load((folder / file).read_bytes())
    numba_kernels = import_module("paqdetr.ops.numba_kernels")
    compiled = getattr(numba_kernels, f"compile_{name}")(*arguments)
    if made := _object(compiled):
        for folder in _folders():
            with suppress(StorageError), whole_file(folder / file) as temporary:
                temporary.write_bytes(made)
                break
    _alive.append(compiled)
    return _function(compiled.address, len(compiled.ctypes.argtypes))


def _object(compiled: Any) -> bytes | None:
    """What `_load` reads: a digest, the number of arguments, the name of the function, and an object file. None where the code
    calls what a process without numba does not have."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(compiled.inspect_llvm())
    if any(each.is_declaration and not each.name.startswith("llvm.") for each in module.functions):
        return None
    content = _machine().emit_object(module)
    return f"{_digest(content)} {len(compiled.ctypes.argtypes)} {compiled.native_name}\n".encode() + content


def _load(kept: bytes) -> Callable[..., None]:
    import llvmlite.binding as llvm

    head, _, content = kept.partition(b"\n")
    digest, count, symbol = head.decode().split(" ")
    if digest != _digest(content):
        raise ValueError("damaged")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(content))
    engine.finalize_object()
    _alive.append(engine)
    return _function(engine.get_function_address(symbol), int(count))


def _function(address: int, arguments: int) -> Callable[..., None]:
    """A call of it lets go of the interpreter lock."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(address)


def _machine() -> Any:
    import llvmlite.binding as llvm

    with suppress(RuntimeError):  # later versions do it themselves, and refuse to be asked
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = _processor()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(
        cpu=name, features=features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )


def _processor() -> tuple[str, str]:
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def _made_with() -> str | None:
    """Of all that the machine code depends on; None where the sources are no files, or libraries do not say their version."""
    try:
        parts = [sys.version, *map(version, ("numba", "llvmlite", "numpy")), *_processor()]
        sources = [(_HERE / f"{name}.py").read_bytes() for name in ("compiled", "numba_kernels", "simd")]
    except (OSError, PackageNotFoundError):
        return None
    return _digest(b"\n".join([*(part.encode() for part in parts), *sources]))[:16]


def _folders() -> list[Path]:
    """Where machine code may be kept, the first that can be written first."""
    if (made_with := _made_with()) is None:
        return []
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        places = [Path(named)]
    else:
        places = [_HERE / "__pycache__"]
        with suppress(RuntimeError):  # a user without a home
            user = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or Path.home() / ".cache"
            places.append(Path(user) / "paqdetr")
    return [place / f"kernels-{made_with}" for place in places]


def chunks(channels: int, widest: int) -> list[tuple[int, int]]:
    """(first channel, how many) of vectors that cover a row: as wide as may be, then the halves that fit."""
    found, first = [], 0
    width = widest
    while first < channels:
        while width > channels - first:
            width //= 2
        found.append((first, width))
        first += width
    return found


def _forget_lock() -> None:
    global _compiling
    _compiling = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)
