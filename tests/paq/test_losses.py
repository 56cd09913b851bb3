"""Losses of PaQ against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from paqdetr.paq import focal_loss, pattern_diversity_loss, quality_focal_loss, varifocal_loss

HALVES = [torch.float16, torch.bfloat16]


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def bce(logit: float, target: float) -> float:
    """-t log p - (1 - t) log(1 - p), written with softplus."""
    return target * softplus(-logit) + (1 - target) * softplus(logit)


# --- varifocal


def test_varifocal_by_hand() -> None:
    # logit 0: p = .5. Positive of IoU .8: weight .8, BCE log 2. Negative: weight .75 * .25, BCE log 2.
    # logit ln 3: p = .75. Positive of IoU .5: -.5 log .75 - .5 log .25. Negative: .75 * .5625 * -log .25.
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(3)]])
    targets = torch.tensor([[0.8, 0.0], [0.5, 0.0]])
    expected = torch.tensor(
        [
            [0.8 * math.log(2), 0.75 * 0.25 * math.log(2)],
            [0.5 * (-0.5 * math.log(0.75) - 0.5 * math.log(0.25)), 0.75 * 0.5625 * -math.log(0.25)],
        ]
    )
    torch.testing.assert_close(varifocal_loss(logits, targets), expected)
    torch.testing.assert_close(expected, torch.tensor([[0.554518, 0.129965], [0.418494, 0.584843]]), atol=1e-6, rtol=0)


def test_varifocal_settings_act_on_negatives_alone() -> None:
    logits, targets = torch.tensor([math.log(3), math.log(3)]), torch.tensor([0.5, 0.0])
    plain, changed = varifocal_loss(logits, targets), varifocal_loss(logits, targets, alpha=0.3, gamma=1.0)
    assert plain[0] == changed[0]
    assert changed[1].item() == pytest.approx(0.3 * 0.75 * -math.log(0.25))


@given(logit=st.floats(-30, 30), target=st.floats(0, 1))
def test_varifocal_formula(logit: float, target: float) -> None:
    p = 1 / (1 + math.exp(-logit))
    weight = target if target > 0 else 0.75 * p**2
    found = varifocal_loss(torch.tensor(logit, dtype=torch.float64), torch.tensor(target, dtype=torch.float64))
    assert found.item() == pytest.approx(weight * bce(logit, target), rel=1e-9, abs=1e-12)


def test_a_positive_of_iou_0_is_a_negative() -> None:
    """It must be pushed down with the negatives' weight, not left alone with weight 0."""
    logit = torch.tensor([1.3], requires_grad=True)
    loss = varifocal_loss(logit, torch.zeros(1))
    p = 1 / (1 + math.exp(-1.3))
    assert loss.item() == pytest.approx(0.75 * p**2 * -math.log(1 - p), rel=1e-6)
    loss.sum().backward()
    assert logit.grad is not None
    # The weight is detached: its own derivative does not enter.
    assert logit.grad.item() == pytest.approx(0.75 * p**2 * p, rel=1e-6)


def test_varifocal_gradient_is_weight_times_p_minus_t() -> None:
    logits = torch.randn(20, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(20, dtype=torch.float64) * (torch.rand(20) < 0.5)
    targets.requires_grad_()
    varifocal_loss(logits, targets).sum().backward()
    p = logits.detach().sigmoid()
    weight = torch.where(targets > 0, targets, 0.75 * p**2)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (weight * (p - targets)).detach())
    assert targets.grad is None  # the quality is a target, not a prediction


def test_varifocal_is_least_where_the_probability_is_the_iou() -> None:
    logits = torch.linspace(-4, 4, 801, dtype=torch.float64)
    best = varifocal_loss(logits, torch.full_like(logits, 0.7)).argmin()
    assert logits[best].sigmoid().item() == pytest.approx(0.7, abs=0.003)


# --- focal


def test_focal_by_hand() -> None:
    # p = .75: positive .25 * .25^2 * -log .75, negative .75 * .75^2 * -log .25.
    logits, targets = torch.full((2,), math.log(3)), torch.tensor([1.0, 0.0])
    expected = torch.tensor([0.25 * 0.0625 * -math.log(0.75), 0.75 * 0.5625 * -math.log(0.25)])
    torch.testing.assert_close(focal_loss(logits, targets), expected)
    changed = focal_loss(logits, targets, alpha=0.5, gamma=1.0)
    torch.testing.assert_close(changed, torch.tensor([0.5 * 0.25 * -math.log(0.75), 0.5 * 0.75 * -math.log(0.25)]))


def test_focal_gradient() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(3, 4) < 0.3).double()
    assert gradcheck(lambda x: focal_loss(x, targets), (logits,))


# --- quality focal


def test_quality_focal_by_hand() -> None:
    # p = .75 for targets of .25, .75 and 0: weights .5^2, 0 and .75^2.
    logits, targets = torch.full((3,), math.log(3)), torch.tensor([0.25, 0.75, 0.0])
    cross_entropy = [bce(math.log(3), target) for target in targets.tolist()]
    expected = torch.tensor([0.25 * cross_entropy[0], 0.0, 0.5625 * cross_entropy[2]])
    torch.testing.assert_close(quality_focal_loss(logits, targets), expected)
    torch.testing.assert_close(quality_focal_loss(logits, targets, beta=1.0)[0], expected[0] * 2)


def test_quality_focal_gradient() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(3, 4, dtype=torch.float64)
    assert gradcheck(lambda x: quality_focal_loss(x, targets), (logits,))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", [varifocal_loss, focal_loss, quality_focal_loss])
def test_half_precision_gives_float32(loss, dtype: torch.dtype) -> None:
    logits, targets = torch.tensor([[3.0, -14.0]], dtype=dtype), torch.tensor([[0.5, 0.0]], dtype=dtype)
    found = loss(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(logits.float(), targets.float()))


@pytest.mark.parametrize("loss", [varifocal_loss, focal_loss, quality_focal_loss])
def test_extreme_logits_stay_finite(loss) -> None:
    logits = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    found = loss(logits, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    found.sum().backward()
    assert found.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
    assert loss(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)


# --- diversity


def test_diversity_of_orthogonal_and_parallel_patterns() -> None:
    assert pattern_diversity_loss(3 * torch.eye(5, 8)).item() == 0.0
    direction = torch.randn(8)
    lengths = torch.tensor([0.1, 2.0, -3.0, 50.0])[:, None]  # opposite directions count as parallel
    assert pattern_diversity_loss(lengths * direction).item() == pytest.approx(1.0, abs=1e-6)


def test_diversity_by_hand() -> None:
    # Cosines: (1,0)(1,1) 1/sqrt 2; (1,0)(0,-2) 0; (1,1)(0,-2) -1/sqrt 2. Mean of absolutes: 2/3 * .7071.
    patterns = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    assert pattern_diversity_loss(patterns).item() == pytest.approx(2 / 3 / math.sqrt(2), rel=1e-6)


@given(seed=st.integers(0, 2**31), count=st.integers(2, 7), dim=st.integers(1, 6))
def test_diversity_equals_the_double_sum(seed: int, count: int, dim: int) -> None:
    patterns = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    total = 0.0
    for i in range(count):
        for j in range(count):
            if i != j:
                a, b = patterns[i].tolist(), patterns[j].tolist()
                dot = sum(x * y for x, y in zip(a, b, strict=True))
                total += abs(dot) / (math.hypot(*a) * math.hypot(*b))
    assert pattern_diversity_loss(patterns).item() == pytest.approx(total / (count * (count - 1)), rel=1e-9)


def test_diversity_waits_for_no_device() -> None:
    """Of a tensor without content, nothing can be told that depends on it, such as how many entries are chosen."""
    with FakeTensorMode():
        assert pattern_diversity_loss(torch.zeros(5, 8, device="cuda")).shape == ()


def test_diversity_of_random_256d_patterns_is_about_a_twentieth() -> None:
    # E|cos| of random directions in d dimensions is sqrt(2 / (pi d)) = .0499.
    assert pattern_diversity_loss(torch.randn(64, 256)).item() == pytest.approx(0.05, abs=0.003)


def test_diversity_gradient() -> None:
    patterns = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(pattern_diversity_loss, (patterns,))


def test_descending_the_diversity_pulls_patterns_apart() -> None:
    patterns = (torch.randn(1, 16) + 0.1 * torch.randn(8, 16)).requires_grad_()
    before = pattern_diversity_loss(patterns)
    for _ in range(100):
        (gradient,) = torch.autograd.grad(pattern_diversity_loss(patterns), patterns)
        patterns = (patterns - 2.0 * gradient).detach().requires_grad_()
    assert before > 0.9 and pattern_diversity_loss(patterns) < 0.3


def test_diversity_of_zero_patterns_is_0_with_a_finite_gradient() -> None:
    patterns = torch.zeros(3, 4, requires_grad=True)
    loss = pattern_diversity_loss(patterns)
    loss.backward()
    assert loss.item() == 0 and patterns.grad is not None and patterns.grad.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_diversity_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    patterns = torch.randn(6, 32).to(dtype)
    found = pattern_diversity_loss(patterns)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pattern_diversity_loss(patterns.float()))
    alike = torch.randn(1, 32) + 0.01 * torch.randn(400, 32)  # the sum over these pairs is beyond float16
    expected = pattern_diversity_loss(alike)
    with torch.autocast("cpu", dtype):
        assert torch.equal(pattern_diversity_loss(alike), expected)


@pytest.mark.parametrize("shape", [(1, 8), (0, 8), (8,), (2, 3, 8)])
def test_diversity_wants_two_patterns(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="m >= 2"):
        pattern_diversity_loss(torch.zeros(shape))
