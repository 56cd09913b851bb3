from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from paqdetr.errors import BackendError
from paqdetr.ops import backends_run, choice, choose_backend, ms_deform_attn, use_backend

SHAPES = [(2, 3)]


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Whether libraries are there is asked again, in the test and after it."""
    for ask in (choice.numba_missing, choice.triton_missing):
        vars(ask)["cache_clear"]()
    yield monkeypatch
    monkeypatch.undo()
    for ask in (choice.numba_missing, choice.triton_missing):
        vars(ask)["cache_clear"]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_cpu_takes_numba(dtype: torch.dtype) -> None:
    assert choose_backend("cpu", dtype) == "numba"
    assert choose_backend(torch.device("cpu"), dtype, tokens=2**24) == "numba"


def test_what_numba_cannot_count_is_left_to_the_reference() -> None:
    assert choose_backend("cpu", tokens=2**24 + 1) == "reference"


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices_take_the_reference(device: str) -> None:
    assert choose_backend(device) == "reference"


def test_cuda_takes_triton_where_its_compiler_is(anew: pytest.MonkeyPatch) -> None:
    anew.setattr(choice.importlib.util, "find_spec", lambda name: object())
    anew.setenv("CC", "cc")
    assert choose_backend("cuda:1") == "triton"
    assert choose_backend("cuda", torch.float64) == "reference"
    vars(choice.triton_missing)["cache_clear"]()
    anew.delenv("CC")
    anew.setenv("PATH", "")
    assert choose_backend("cuda") == "reference"
    with pytest.raises(BackendError, match=r"'triton'.*compiler"):
        choice.require_backend("triton", "cuda")


def test_cuda_without_triton(anew: pytest.MonkeyPatch) -> None:
    anew.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert choose_backend("cuda") == "reference"


def test_cuda_adds_in_order_when_told_to_be_deterministic(anew: pytest.MonkeyPatch) -> None:
    anew.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_backend("cuda") == "gather"
    assert choose_backend("cpu") == "numba"


def test_without_numba_the_reference_runs_and_numba_says_why(anew: pytest.MonkeyPatch, problem: Any) -> None:
    anew.setitem(sys.modules, "numba", None)
    assert choose_backend("cpu") == "reference"
    value, locations, weights = problem(SHAPES)
    assert ms_deform_attn(value, SHAPES, locations, weights).shape == (2, 3, 6)
    with pytest.raises(BackendError, match=r"'numba'.*(reference|gather)"):
        ms_deform_attn(value, SHAPES, locations, weights, "numba")


def test_a_broken_numba_is_said_once(anew: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "numba":
                raise ImportError("Numba needs NumPy 1.0 or less")

    anew.delitem(sys.modules, "numba")
    anew.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.warns(RuntimeWarning, match="NumPy 1.0 or less"):
        assert choose_backend("cpu") == "reference"
    assert choose_backend("cpu") == "reference"  # a second warning would be an error


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_kernels_say_where_they_run(backend: Any, problem: Any) -> None:
    device = {"numba": "meta", "triton": "cpu"}[backend]
    value, locations, weights = (x.to(device) for x in problem(SHAPES))
    with pytest.raises(BackendError, match=f"'{backend}'.*values are on {device}"):
        ms_deform_attn(value, SHAPES, locations, weights, backend)


def test_use_backend_is_for_auto_and_for_a_while(problem: Any) -> None:
    value, locations, weights = problem(SHAPES)
    with use_backend("gather"):
        assert choose_backend("cpu") == choose_backend("meta") == "gather"
        with use_backend("reference"):
            assert choose_backend("cpu") == "reference"
        assert choose_backend("cpu") == "gather"
        expected = ms_deform_attn(value, SHAPES, locations, weights, "gather")
        assert torch.equal(ms_deform_attn(value, SHAPES, locations, weights), expected)
        ms_deform_attn(value, SHAPES, locations, weights, "numba")  # by name, it is what was named
    assert choose_backend("cpu") == "numba"
    with pytest.raises(ValueError, match=r"'fast'.*gather"), use_backend("fast"):
        pass
    with use_backend("triton"), pytest.raises(BackendError, match="'triton'"):
        choose_backend("cpu")


def test_onnx_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format knows grid_sample and not the operator."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert choose_backend("cpu") == choose_backend("cuda") == "reference"


def test_what_ran_is_known(problem: Any) -> None:
    value, locations, weights = problem(SHAPES)
    for backend in ("numba", "reference"):
        ms_deform_attn(value, SHAPES, locations, weights, backend)  # type: ignore[arg-type]
        assert backend in backends_run()
    assert len(set(backends_run())) == len(backends_run())
