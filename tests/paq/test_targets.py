"""Targets that are not what they should be are named where they enter, without another wait for a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paqdetr.errors import NonFiniteError
from paqdetr.paq import OneToOneAssigner, QualityAwareAssigner, Targets
from paqdetr.paq.costs import matching_costs, require_targets

BOX = [0.5, 0.5, 0.2, 0.2]
GOOD = Targets(torch.tensor([0]), torch.tensor([BOX]), "good.jpg")


def match(targets: Any) -> None:
    torch.manual_seed(0)
    matching_costs(torch.randn(2, 2, 5, 3), torch.rand(2, 2, 5, 4), targets)


def wrong(labels: Any, boxes: Any, image_id: str | None = "bad.jpg") -> Callable[[], list[Targets]]:
    return lambda: [GOOD, Targets(torch.as_tensor(labels), torch.as_tensor(boxes), image_id)]


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "label too large": (wrong([1, 3], [BOX] * 2), r"image 'bad.jpg' hold 3, and there are 3 classes: .* 0 to 2"),
    "label negative": (wrong([-1], [BOX]), r"image 'bad.jpg' hold -1"),
    "no id": (wrong([7], [BOX], None), r"labels of batch position 1 hold 7"),
    "int32": (wrong(torch.tensor([1], dtype=torch.int32), [BOX]), r"image 'bad.jpg' are torch.int32 .* give int64"),
    "labels of two axes": (wrong([[1]], [BOX]), r"shape \(1, 1\): give int64 of shape \(G,\)"),
    "one box too many": (wrong([1], [BOX] * 2), r"shape \(2, 4\): give floats of shape \(1, 4\)"),
    "whole numbers": (wrong([1], [[10, 20, 30, 40]]), r"boxes of image 'bad.jpg' are torch.int64"),
    "pixels": (wrong([0, 1], [BOX, [10.0, 20.0, 30.0, 40.0]]), r"\[10.0, 20.0, 30.0, 40.0\]: .* cxcywh in \[0, 1\]"),
    "NaN": (wrong([1], [[0.5, math.nan, 0.2, 0.2]]), r"boxes of image 'bad.jpg' hold \[0.5, nan"),
    "negative": (wrong([1], [[0.5, 0.5, -0.1, 0.2]]), r"boxes of image 'bad.jpg' hold"),
    "too few": (lambda: [GOOD], "1 targets for 2 images"),
    "too many": (lambda: [GOOD] * 3, "3 targets for 2 images"),
    "dict": (lambda: [GOOD, {"labels": [], "boxes": []}], "batch position 1 is a dict: give paqdetr.paq.Targets"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named_with_its_remedy(case: str) -> None:
    targets, message = CASES[case]
    with pytest.raises(ValueError, match=message) as caught:
        match(targets())
    assert ": give" in str(caught.value) or ": number them" in str(caught.value)


@pytest.mark.parametrize("assigner", [OneToOneAssigner(), QualityAwareAssigner()])
def test_assigners_called_directly_check_too(assigner: Any) -> None:
    with pytest.raises(ValueError, match="hold 3, and there are 3 classes"):
        assigner(torch.zeros(1, 5, 3), torch.rand(1, 5, 4), [Targets(torch.tensor([3]), torch.tensor([BOX]))])


def test_rounding_and_empty_images_are_no_mistake() -> None:
    empty = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    match([empty, Targets(torch.tensor([2]), torch.tensor([[1.0005, -0.0005, 1.0, 0.0]]))])


def test_a_wrong_target_is_told_before_a_broken_prediction() -> None:
    logits, boxes = torch.full((1, 1, 5, 3), math.nan), torch.rand(1, 1, 5, 4)
    with pytest.raises(ValueError, match="hold 9"):
        matching_costs(logits, boxes, [Targets(torch.tensor([9]), torch.tensor([BOX]))])
    with pytest.raises(NonFiniteError):
        matching_costs(logits, boxes, [GOOD])


def test_of_another_device() -> None:
    elsewhere = Targets(torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1, 4, device="meta"), 7)
    with pytest.raises(ValueError, match=r"labels of image 7 are on meta, the predictions on cpu: move them with"):
        require_targets([elsewhere], batch=1, device=torch.device("cpu"))
    require_targets([elsewhere], batch=1)


def test_one_transfer_of_no_more_bytes_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs cross once, as they were computed; values of targets are checked with them."""
    crossed: list[torch.dtype] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: crossed.append(tensor.dtype) or cpu(tensor))
    monkeypatch.setattr(Tensor, "__bool__", None)
    monkeypatch.setattr(Tensor, "item", None)
    monkeypatch.setattr(Tensor, "tolist", None)
    match([GOOD, GOOD])
    assert crossed == [torch.float32]
