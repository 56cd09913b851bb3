"""What is said when memory runs out."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from paqdetr.errors import ConfigError, NonFiniteError, memory_error


def test_a_gpus_complaint_is_told_in_short() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.19 GiB is free. "
        "Including non-PyTorch memory, this process has 14.57 GiB memory in use."
    )
    found = memory_error(error, "take less")
    assert found is not None
    assert str(found) == "the GPU has no memory left: it was asked for 2.50 GiB more (take less)"


@pytest.mark.parametrize("text", ["CUDA error: out of memory\nCompile with ...", "MPS backend out of memory (MPS ...)"])
def test_other_complaints_of_gpus_name_no_amount(text: str) -> None:
    found = memory_error(RuntimeError(text))
    assert found is not None and found.message == "the GPU has no memory left"


@pytest.mark.parametrize(("allocate", "amount"), [(torch.empty, "3725290.30 GiB"), (np.empty, "7.11 PiB")])
def test_torch_and_numpy_really_run_out(allocate: Callable[[int], object], amount: str) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate(10**15)  # numbers of 4 bytes, and of 8
    found = memory_error(caught.value)
    assert found is not None
    assert found.message == f"the machine has no memory left: it was asked for {amount} more"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError(1)])
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert memory_error(error) is None


@pytest.mark.parametrize("error", [ConfigError("here", "do that"), NonFiniteError("here", "do that", images=["a", 3])])
def test_errors_cross_between_processes(error: ConfigError | NonFiniteError) -> None:
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error) and str(other) == "here (do that)" and vars(other) == vars(error)
