import pytest
import torch
from torch import Tensor

from paqdetr.convert.keymap import FIRST_HALF, SECOND_HALF, apply_rules, coverage, drop, move, pack, same, split
from paqdetr.errors import CheckpointError

RULES = (
    drop("old.{rest}", "out of use"),
    move("layers.{i}.fc{k}.{p}", "blocks.{i+1}.{2k}.{p}"),
    move("stage{i}.{rest}", "body.{i-1}.{rest}"),
    split("both.weight", ("left", FIRST_HALF), ("right", SECOND_HALF)),
    *pack(("q.weight", "k.weight", "v.weight"), "qkv"),
    same("again.{rest}", "once.{rest}"),
    move("once.{rest}", "ours.{rest}"),
)


def _apply(**tensors: Tensor) -> dict[str, Tensor]:
    renamed = apply_rules(RULES, {key.replace("_", "."): value for key, value in tensors.items()}, where="f")
    assert not renamed.unknown
    return renamed.tensors


def test_numbers_go_over_with_their_arithmetic() -> None:
    x, y = torch.randn(2), torch.randn(3)
    found = apply_rules(RULES, {"layers.4.fc2.bias": x, "stage3.a.b": y}, where="f")
    assert {key: value.tolist() for key, value in found.tensors.items()} == {
        "blocks.5.4.bias": x.tolist(),
        "body.2.a.b": y.tolist(),
    }
    assert found.sources == {"blocks.5.4.bias": ("layers.4.fc2.bias",), "body.2.a.b": ("stage3.a.b",)}


def test_rows_are_split_and_packed_in_the_order_named() -> None:
    both = torch.arange(8.0).view(2, 4)
    found = _apply(both_weight=both, v_weight=torch.ones(1, 2), q_weight=torch.zeros(1, 2), k_weight=-torch.ones(1, 2))
    assert found["left"].tolist() == [[0, 1], [4, 5]]
    assert found["right"].tolist() == [[2, 3], [6, 7]]
    assert found["qkv"].tolist() == [[0, 0], [-1, -1], [1, 1]]


def test_incomplete_packing_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"qkv is made of 3 tensors, and only q\.weight is there"):
        _apply(q_weight=torch.zeros(1))


def test_a_second_name_is_verified_and_counts_once() -> None:
    x = torch.randn(2)
    found = apply_rules(RULES, {"again.w": x, "once.w": x.clone()}, where="f")
    assert found.sources == {"ours.w": ("once.w",)}
    assert found.dropped == {"again.w": "the same tensor as once.w, verified equal"}
    with pytest.raises(CheckpointError, match=r"again\.w and once\.w .* different values"):
        apply_rules(RULES, {"again.w": x, "once.w": x + 1}, where="f")


def test_a_second_name_alone_stands_for_the_first() -> None:
    x = torch.randn(2)
    assert apply_rules(RULES, {"again.w": x}, where="f").sources == {"ours.w": ("again.w",)}


def test_unknown_tensors_are_listed_and_dropped_ones_say_why() -> None:
    found = apply_rules(RULES, {"new.w": torch.zeros(1), "old.w": torch.zeros(1)}, where="f")
    assert found.unknown == ["new.w"]
    assert found.dropped == {"old.w": "out of use"}
    assert coverage(RULES, ["new.w", "old.w"]) == 0.5


def test_two_sources_of_one_tensor_are_an_error() -> None:
    rules = (move("a.{p}", "x.{p}"), move("b.{p}", "x.{p}"))
    with pytest.raises(CheckpointError, match=r"b\.weight and a\.weight are both x\.weight"):
        apply_rules(rules, {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)}, where="f")


def test_discarding_a_tensor_drops_the_sources_that_nothing_else_uses() -> None:
    found = apply_rules(RULES, {"both.weight": torch.zeros(1, 2)}, where="f")
    found.discard("left", "not wanted")
    assert found.dropped == {}
    found.discard("right", "nor this")
    assert found.dropped == {"both.weight": "nor this"}
