from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paqdetr.environment import require_device, usable_devices
from paqdetr.errors import ConfigError

# Every kind that torch has a name for.
KINDS = (
    *("cpu", "cuda", "ipu", "xpu", "mkldnn", "opengl", "opencl", "ideep", "hip", "ve", "fpga", "maia", "xla", "lazy"),
    *("vulkan", "mps", "meta", "hpu", "mtia", "privateuseone"),
)


@pytest.mark.parametrize("name", [*KINDS, "cuda:99", "mps:7", "", "gpu", "cpu:", "cpu:x", "CPU", "\0", "0", "cuda:-1"])
def test_a_device_works_or_is_refused_with_those_that_do(name: str) -> None:
    if name in usable_devices():
        assert require_device(name).type == name
        return
    with pytest.raises(ConfigError) as caught:
        require_device(name)
    assert repr(name) in caught.value.message and "\n" not in caught.value.message
    assert caught.value.message.endswith(f"those that do are {', '.join(usable_devices())}")


def test_a_device_of_torch_is_one() -> None:
    assert require_device(torch.device("cpu")) == torch.device("cpu")  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)  # torch takes long to refuse a name
@given(
    st.text(max_size=12) | st.sampled_from(KINDS).flatmap(lambda kind: st.builds(f"{kind}:{{}}".format, st.integers()))
)
def test_any_name_is_a_device_that_computes_or_one_line(name: str) -> None:
    with contextlib.suppress(ConfigError):
        assert torch.arange(3, device=require_device(name)).sum().item() == 3
