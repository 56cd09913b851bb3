"""What `import paqdetr` says to torch's threads, and leaves as it is; what our own programs import late."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import ModuleType

import pytest

from paqdetr._threads import _Later

SHOW = "import os, paqdetr; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),  # the other variable would overrule it
    ],
)
def test_idle_threads_sleep_soon_unless_the_user_says_otherwise(given: dict[str, str], found: str) -> None:
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", SHOW], env=kept | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("module://no_such_package.backend_inline", False),
        ("module://", False),
        ("module://json.backend", True),  # the package is installed
        ("svg", True),
    ],
)
def test_a_plot_backend_that_is_not_installed_is_forgotten(
    given: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paqdetr._threads import drop_missing_plot_backend

    monkeypatch.setenv("MPLBACKEND", given)
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    drop_missing_plot_backend()
    assert ("MPLBACKEND" in os.environ) == kept


def test_nothing_is_said_once_torch_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from paqdetr._threads import calm_idle_threads

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setitem(sys.modules, "torch", sys)  # any module: what counts is that it is there
    calm_idle_threads()
    assert "GOMP_SPINCOUNT" not in os.environ


# `is_compile_supported` and `wrap` are what torchvision takes from the compiler, or hides from it.
COMPILER = """
import sys
import warnings
import paqdetr.cli, timm, torch, torchvision.tv_tensors as tv
from torchvision.ops.roi_align import is_compile_supported
print("torch._dynamo" in sys.modules)
from torchvision import models
print("torchvision.models.resnet" in sys.modules, models.resnet18.__module__, hasattr(models, "no_such"))
box = tv.BoundingBoxes([[0, 0, 2, 2]], format="XYXY", canvas_size=(4, 4))
print(type(tv.wrap(torch.ones(1, 4), like=box)).__name__, "torch._dynamo" in sys.modules)
print(is_compile_supported("cpu") is sys.modules["torch._dynamo.utils"].is_compile_supported("cpu"))
print(type(tv.wrap(torch.ones(1, 4), like=box)).__name__, torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


@pytest.mark.integration
def test_parts_of_libraries_are_imported_when_they_are_used() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILER], capture_output=True, text=True, check=True)
    found = ["False", "False torchvision.models.resnet False", "BoundingBoxes False", "True", "BoundingBoxes 2.0"]
    assert done.stdout.splitlines() == found


@pytest.mark.integration
def test_the_libraries_of_another_program_are_whole() -> None:
    code = "import paqdetr, torchvision; print('resnet18' in vars(torchvision.models))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_threads_wait_for_a_module_that_one_of_them_executes() -> None:
    began = Event()

    def execute(module: ModuleType) -> None:
        began.set()
        time.sleep(0.05)
        assert not hasattr(module, "late")  # asked for by what it imports: nothing begins again
        vars(module)["late"] = 1

    module = _Later("late_module")
    vars(module)["__execute__"] = execute
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(lambda: module.late)
        began.wait()
        assert [call.result() for call in (first, *(pool.submit(lambda: module.late) for _ in range(3)))] == [1] * 4
    with pytest.raises(AttributeError, match="'late_module' has no attribute 'never'"):
        module.never  # noqa: B018


def test_a_notebook_without_bars_is_no_matter() -> None:
    """The warning of tqdm when it is imported; every other one is shown."""
    from paqdetr._threads import ignore_missing_bars

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        ignore_missing_bars()
        warnings.warn("IProgress not found. Please update jupyter and ipywidgets.", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(one.message) for one in shown] == ["something else"]
