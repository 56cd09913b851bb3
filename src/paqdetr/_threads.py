"""What has to be done before other libraries are imported: variables that they read once, and imports that they need not make."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from threading import RLock
from types import ModuleType
from typing import Any

# GNU OpenMP's own number is 300,000 looks, up to 15 ms: far longer than any pause between two operators. Where another process
# wants the core meanwhile, threads wait for one that waits in vain, and a step takes several times as long (docs/performance.md).
_LOOKS = "10000"


def calm_idle_threads() -> None:
    """Let threads sleep sooner, unless the user has set it otherwise. Torch reads it once, when it is imported."""
    chosen = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    if not chosen and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = _LOOKS


def drop_missing_plot_backend() -> None:
    """Forget a back end of matplotlib whose package is not installed here, as programs that Jupyter starts inherit it: otherwise
    matplotlib cannot be imported."""
    kind, _, module = os.environ.get("MPLBACKEND", "").partition("://")
    if kind == "module" and "matplotlib" not in sys.modules and find_spec(module.partition(".")[0] or "?") is None:
        del os.environ["MPLBACKEND"]


def ignore_missing_bars() -> None:
    """No warning of tqdm, which other libraries import, that a notebook has not the package for its bars: we draw our own."""
    warnings.filterwarnings("ignore", message="IProgress not found")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import libraries without Python's search for unreachable cycles, and leave what they made out of later searches: it stays,
    and to go through it again and again takes a fifth of the time. For our own programs: what is garbage now stays, too."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


# torch's compiler takes 1.3 CPU seconds to import, nearly as much as torch itself. These import it for functions that are
# seldom called.
_COMPILER, _HASTY = "torch._dynamo", ("torchvision", "torchvision.tv_tensors", "timm")
# What `import torchvision` imports and we do not use: its own models.
_UNUSED = ("torchvision.datasets", "torchvision.models")
_EXECUTION = RLock()


def postpone_compiler() -> None:
    """Let torchvision and timm be imported without torch's compiler; it is imported when something of it is used. For our own
    programs: another's may look into modules that are empty until then."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds these where they are, and has them executed beside the stand-ins below."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        unused = name in _UNUSED
        if not unused and (name not in _HASTY or _COMPILER in sys.modules):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        loader = spec.loader
        execute = loader.exec_module
        if unused:
            loader.create_module = lambda spec: _Later(name)  # type: ignore[method-assign]
            loader.exec_module = lambda module: vars(module).update(__execute__=execute)  # type: ignore[method-assign]
            return spec

        def without_compiler(module: ModuleType) -> None:
            with _compiler_stands_in():
                execute(module)

        loader.exec_module = without_compiler  # type: ignore[method-assign]
        return spec


class _Later(ModuleType):
    """A module whose file is executed when something of it is asked for; its submodules can be imported before."""

    def __getattr__(self, name: str) -> Any:
        with _EXECUTION:  # other threads wait for its end; what it imports asks in the same thread
            execute = vars(self).pop("__execute__", None)
            if execute is not None:
                execute(self)
                self.__class__ = ModuleType  # type: ignore[assignment]
            return ModuleType.__getattribute__(self, name)


@contextmanager
def _compiler_stands_in() -> Iterator[None]:
    """Put modules in the compiler's place that know what the two libraries ask for, and import it for anything else."""

    def compiler(part: str = "") -> ModuleType:
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        return import_module(_COMPILER + part)

    def disable(function: Callable[..., Any] | None = None, recursive: bool = True, **how: Any) -> Any:
        if function is None:
            return partial(disable, recursive=recursive, **how)
        plain: Callable[..., Any] = function

        disabled = cache(lambda: compiler().disable(plain, recursive, **how))

        @wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            # Nothing is being compiled before the compiler is imported.
            return (disabled() if _COMPILER in sys.modules else plain)(*args, **kwargs)

        return call

    def otherwise(part: str, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(compiler(part), name)

    package, utils = ModuleType(_COMPILER), ModuleType(f"{_COMPILER}.utils")
    modules = {package.__name__: package, utils.__name__: utils}
    found = None if _COMPILER in sys.modules else find_spec("torch")
    if found is None:  # it is there, or a stand-in for it is
        yield
        return
    package.__path__ = [f"{folder}/_dynamo" for folder in found.submodule_search_locations or ()]
    vars(package).update(disable=disable, utils=utils, __getattr__=partial(otherwise, ""))
    vars(utils).update(
        is_compile_supported=lambda device: compiler(".utils").is_compile_supported(device),
        __getattr__=partial(otherwise, ".utils"),
    )
    sys.modules |= modules
    try:
        yield
    finally:
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
