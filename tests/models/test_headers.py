"""Headers of checkpoints that do not hold what they should."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paqdetr.checkpoint import describe_checkpoint
from paqdetr.config import ModelConfig
from paqdetr.errors import CheckpointError
from paqdetr.preprocessing import Normalization, Preprocessing

GOOD: dict[str, Any] = {
    "name": "dino_nano",
    "model": ModelConfig(num_classes=2).model_dump(mode="json"),
    "classes": [{"id": 7, "name": "cat"}, {"id": -1, "name": "no"}],
    "preprocessing": Preprocessing((480, 800), 32, Normalization((1, 2.5, 3), (4, 5, 6))).to_dict(),
    "metrics": {"AP": None},
}


def test_a_good_header() -> None:
    config, classes, preprocessing = describe_checkpoint(GOOD, "x")
    assert (config.model, config.name, config.image_size) == (ModelConfig(num_classes=2), "dino_nano", (480, 800))
    assert (classes.ids, classes.names) == ((7, -1), ("cat", "no"))
    assert preprocessing.normalization == Normalization((1, 2.5, 3), (4, 5, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("name"), "its header lacks 'name'"),
        (lambda h: h["preprocessing"].pop("normalization"), "its header lacks 'normalization'"),
        (lambda h: h.update(classes=[{"id": "x", "name": "cat"}]), "its header is malformed: classes.0.id: Input"),
        (lambda h: h.update(classes=[]), "its header is malformed: classes: List should have at least 1"),
        (lambda h: h.update(classes=h["classes"][:1] * 3), "classes: Value error, two classes have one id"),
        (lambda h: h["preprocessing"].update(image_size=10**9), "image_size=1000000000: expected one number from 32"),
        (lambda h: h["preprocessing"].update(size_divisor=True), "its header is malformed: size_divisor: Input"),
        (lambda h: h["preprocessing"]["normalization"].update(std=[1, 1, 0]), "normalization.std.2: Input should be"),
        (lambda h: h["model"].update(backbone_strides=[]), "expected at least one stride"),
        (lambda h: h["model"].update(dim="128"), "dim='128': Input should be a valid integer"),
        (lambda h: h["model"].update(wings=2), "unknown setting 'model.wings'"),
    ],
)
def test_the_field_that_is_wrong_is_named(change: Callable[[dict[str, Any]], object], message: str) -> None:
    header = copy.deepcopy(GOOD)
    change(header)
    with pytest.raises(CheckpointError) as caught:
        describe_checkpoint(header, "x.safetensors")
    assert caught.value.message.startswith("x.safetensors: its header") and message in caught.value.message
    assert "\n" not in str(caught.value)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((value, key), *places(inner))]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**9, 2**64, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data(), value=VALUES)
def test_any_header_is_a_model_or_one_line(data: st.DataObject, value: Any) -> None:
    header = copy.deepcopy(GOOD)
    container, key = data.draw(st.sampled_from(places(header)))
    container[key] = value
    with contextlib.suppress(CheckpointError):
        describe_checkpoint(header, "x.safetensors")
