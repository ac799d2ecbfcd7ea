"""The divergences against hand sums and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perdure.losses import (
    LossSpec,
    dft,
    forward_kl,
    generalized_jsd,
    nll,
    position_losses,
    reverse_kl,
    sampled_reverse_kl,
    teacher_topk_with_tail,
)

STUDENT = torch.tensor([[0.5, 0.25, 0.25]]).log()
TEACHER = torch.tensor([[0.8, 0.1, 0.1]]).log()


def logprobs(seed: int, n: int = 5, v: int = 11, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, v, generator=generator, dtype=dtype)).log_softmax(-1)


# Divergences


def test_directions_by_hand() -> None:
    # KL(teacher || student) = 0.8 ln(0.8/0.5) + 2 * 0.1 ln(0.1/0.25) = 0.376003 - 0.183258 = 0.192745
    assert forward_kl(STUDENT, TEACHER).item() == pytest.approx(0.192745, abs=1e-6)
    # KL(student || teacher) = 0.5 ln(0.5/0.8) + 2 * 0.25 ln(0.25/0.1) = -0.235002 + 0.458145 = 0.223144
    assert reverse_kl(STUDENT, TEACHER).item() == pytest.approx(0.223144, abs=1e-6)


def test_jsd_by_hand() -> None:
    # beta = 0.25: m = 0.25 teacher + 0.75 student = (0.575, 0.2125, 0.2125)
    # KL(t || m) = 0.8 ln(0.8/0.575) + 0.2 ln(0.1/0.2125) = 0.264194 - 0.150754 = 0.113440
    # KL(s || m) = 0.5 ln(0.5/0.575) + 0.5 ln(0.25/0.2125) = -0.069881 + 0.081259 = 0.011378
    # 0.25 * 0.113440 + 0.75 * 0.011378 = 0.036894
    assert generalized_jsd(STUDENT, TEACHER, 0.25).item() == pytest.approx(0.036894, abs=1e-6)


@pytest.mark.parametrize(("beta", "share", "limit"), [(1e-5, 1e-5, forward_kl), (1 - 1e-5, 1e-5, reverse_kl)])
def test_jsd_limits(beta: float, share: float, limit) -> None:
    """JSD / beta tends to the forward KL for beta to 0, JSD / (1 - beta) to the reverse KL for beta to 1."""
    student, teacher = logprobs(0, dtype=torch.float64), logprobs(1, dtype=torch.float64)
    torch.testing.assert_close(
        generalized_jsd(student, teacher, beta) / share, limit(student, teacher), rtol=1e-3, atol=0
    )


def test_a_token_without_probability_counts_nothing() -> None:
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log().requires_grad_()
    loss = forward_kl(student, teacher).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert student.grad is not None and student.grad.tolist() == [[-0.5, -0.5, 0.0]]


def test_nll_picks_the_target() -> None:
    assert nll(STUDENT, torch.tensor([1])).item() == pytest.approx(math.log(4))


distributions = st.tuples(st.integers(0, 2**31), st.integers(2, 12), st.floats(0.1, 8.0))


@settings(max_examples=60)
@given(distributions, st.integers(0, 2**31), st.floats(0.01, 0.99), st.integers(1, 12))
def test_divergences_are_never_negative_and_zero_at_equality(shape, other: int, beta: float, k: int) -> None:
    seed, v, scale = shape
    student = logprobs(seed, 3, v, scale, torch.float64)
    teacher = logprobs(other, 3, v, scale, torch.float64)
    for pair in ((student, teacher), teacher_topk_with_tail(student, teacher, k)):
        for value_N in (forward_kl(*pair), reverse_kl(*pair), generalized_jsd(*pair, beta)):
            assert value_N.min() > -1e-12
            if seed != other:
                assert value_N.max() < math.inf
    for pair in ((student, student), teacher_topk_with_tail(student, student.clone(), k)):
        for value_N in (forward_kl(*pair), reverse_kl(*pair), generalized_jsd(*pair, beta)):
            torch.testing.assert_close(value_N, torch.zeros_like(value_N), atol=1e-12, rtol=0)


# Top-k with a tail


def test_topk_by_hand() -> None:
    # k = 1 keeps the teacher's first token: teacher (0.8, 0.2), student (0.5, 0.5)
    # forward: 0.8 ln(0.8/0.5) + 0.2 ln(0.2/0.5) = 0.376003 - 0.183258 = 0.192745
    # reverse: 0.5 ln(0.5/0.8) + 0.5 ln(0.5/0.2) = -0.235002 + 0.458145 = 0.223144
    student, teacher = teacher_topk_with_tail(STUDENT, TEACHER, 1)
    torch.testing.assert_close(teacher.exp(), torch.tensor([[0.8, 0.2]]))
    torch.testing.assert_close(student.exp(), torch.tensor([[0.5, 0.5]]))
    assert forward_kl(student, teacher).item() == pytest.approx(0.192745, abs=1e-6)
    assert reverse_kl(student, teacher).item() == pytest.approx(0.223144, abs=1e-6)


def test_topk_of_everything_is_the_full_divergence() -> None:
    student, teacher = logprobs(0), logprobs(1)
    for k in (11, 50):
        pair = teacher_topk_with_tail(student, teacher, k)
        torch.testing.assert_close(forward_kl(*pair), forward_kl(student, teacher))
        torch.testing.assert_close(reverse_kl(*pair), reverse_kl(student, teacher))
        torch.testing.assert_close(generalized_jsd(*pair, 0.4), generalized_jsd(student, teacher, 0.4))


def test_topk_never_exceeds_the_full_divergence() -> None:
    """Merging outcomes loses information (data processing), and more so the fewer are kept apart."""
    student, teacher = logprobs(0), logprobs(1)
    values = [forward_kl(*teacher_topk_with_tail(student, teacher, k)).sum() for k in (1, 3, 6, 11)]
    assert values == sorted(values) and values[0] < values[-1]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_with_the_tail_bucket_both_sum_to_one(k: int) -> None:
    for part in teacher_topk_with_tail(logprobs(0), logprobs(1, scale=20.0), k):
        torch.testing.assert_close(part.exp().sum(-1), torch.ones(5))


def test_the_tail_of_a_sharp_distribution_is_exact_in_value_and_gradient() -> None:
    """1 - sum would be rounding noise here: the tail has a probability of 3e-13 in float32."""
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]], requires_grad=True)
    student, _ = teacher_topk_with_tail(logits.log_softmax(-1), TEACHER.new_tensor([[3.0, 2.0, 1.0, 0.0]]), 1)
    assert student[0, 1].item() == pytest.approx(math.log(3) - 30, rel=1e-6)
    student[0, 1].backward()
    # d log(tail) / d logits = softmax within the tail minus softmax over all
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1 / 3, 1 / 3, 1 / 3]]))


# The one-sample estimate


def test_sampled_reverse_kl_is_right_in_expectation() -> None:
    """Enumerated over a vocabulary of three: sum_y p(y) value(y) and sum_y p(y) grad(y) are the exact ones."""
    logits = torch.tensor([[0.3, -1.0, 0.8]], dtype=torch.float64, requires_grad=True)
    teacher = logprobs(3, 1, 3, dtype=torch.float64)
    exact = reverse_kl(logits.log_softmax(-1), teacher).sum()
    (exact_grad,) = torch.autograd.grad(exact, logits)
    value, grad = 0.0, torch.zeros_like(logits)
    for y in range(3):
        student = logits.log_softmax(-1)
        estimate = sampled_reverse_kl(student, teacher, torch.tensor([y])).sum()
        (estimate_grad,) = torch.autograd.grad(estimate, logits)
        probability = student[0, y].exp().item()
        value += probability * estimate.item()
        grad += probability * estimate_grad
    assert value == pytest.approx(exact.item(), rel=1e-12)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-10, atol=1e-12)
    assert exact_grad.abs().max() > 0.1  # the comparison says something


def test_each_position_takes_its_own_share_of_the_two_losses() -> None:
    student, teacher = logprobs(0), logprobs(1)
    targets, weights = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0.0, 1.0, 0.0, 0.5, 0.0])
    labels = torch.tensor([1.0, 0.0, 2.0, 0.25, 0.0])
    for label, loss in (("nll", nll), ("dft", dft)):
        got = position_losses(LossSpec(label=label), student, teacher, targets, weights, labels)
        torch.testing.assert_close(got, weights * forward_kl(student, teacher) + labels * loss(student, targets))
        assert got[4] == 0
    with pytest.raises(ValueError, match="teacher"):
        position_losses(LossSpec(), student, None, targets, weights)
    torch.testing.assert_close(
        position_losses(LossSpec(), student, None, targets, torch.zeros(5), labels), labels * nll(student, targets)
    )


def test_dft_weighs_a_token_by_its_own_probability_without_a_gradient_of_that() -> None:
    logits = torch.tensor([[0.3, -1.0, 0.8]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1])
    probability = logits.softmax(-1)[0, 1].item()
    (of_dft,) = torch.autograd.grad(dft(logits.log_softmax(-1), target).sum(), logits)
    (of_nll,) = torch.autograd.grad(nll(logits.log_softmax(-1), target).sum(), logits)
    torch.testing.assert_close(of_dft, probability * of_nll)
