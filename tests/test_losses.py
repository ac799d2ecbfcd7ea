"""The divergences against hand sums, and the chunked loss against the naive one, forward and backward, on a CPU."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perdure.losses import (
    Head,
    LossInputs,
    LossSpec,
    chunked_loss,
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

SPECS = {
    "forward": LossSpec("forward_kl"),
    "reverse": LossSpec("reverse_kl"),
    "jsd": LossSpec("generalized_jsd", jsd_beta=0.3),
    "forward-topk": LossSpec("forward_kl", "teacher_topk", topk=4),
    "reverse-topk": LossSpec("reverse_kl", "teacher_topk", topk=4),
    "jsd-topk": LossSpec("generalized_jsd", "teacher_topk", jsd_beta=0.7, topk=1),
    "sampled": LossSpec("reverse_kl", "sampled"),
    "sft-with-anchors": LossSpec("forward_kl", demonstrated="nll"),
}


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


@settings(deadline=None, max_examples=60)
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


# The chunked form


def make_inputs(seed: int, n: int = 13, h: int = 6, v: int = 17, dtype: torch.dtype = torch.float32) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    return LossInputs(
        student_hidden_NH=torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        teacher_hidden_NH=torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype),
        targets_N=torch.randint(v, (n,), generator=generator),
        weights_N=torch.rand(n, generator=generator),
        demonstrated_N=torch.rand(n, generator=generator) < 0.5,
        teacher_temperature=0.5,
    )


def make_head(seed: int, bias: bool, softcap: float | None, h: int = 6, v: int = 17) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, h, generator=generator).requires_grad_()
    return Head(weight, torch.randn(v, generator=generator).requires_grad_() if bias else None, softcap)


def naive(spec: LossSpec, inputs: LossInputs, student: Head, teacher: Head | None) -> Tensor:
    """The loss over full logits, with autograd's own backward: the oracle."""
    student_NV = student.logits(inputs.student_hidden_NH).log_softmax(-1)
    teacher_NV = None
    if teacher is not None and inputs.teacher_hidden_NH is not None:
        logits_NV = teacher.logits(inputs.teacher_hidden_NH).detach()
        scale_N = torch.where(inputs.demonstrated_N, inputs.teacher_temperature, 1.0)
        teacher_NV = (logits_NV / scale_N[:, None]).log_softmax(-1)
    losses_N = position_losses(spec, student_NV, teacher_NV, inputs.targets_N, inputs.demonstrated_N)
    return (losses_N * inputs.weights_N).sum()


def gradients(loss: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [t for t in tensors if t is not None]))


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (True, 3.0)])
@pytest.mark.parametrize("name", SPECS)
def test_chunked_equals_naive(name: str, bias: bool, softcap: float | None, chunk: int) -> None:
    spec, inputs = SPECS[name], make_inputs(0)
    student, teacher = make_head(1, bias, softcap), make_head(2, bias, softcap)
    trained = (inputs.student_hidden_NH, student.weight_VH, student.bias_V)
    expected = naive(spec, inputs, student, teacher)
    loss, _ = chunked_loss(spec, inputs, student, teacher, chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    # An upstream factor checks that backward scales.
    for got, wanted in zip(gradients(0.37 * loss, *trained), gradients(0.37 * expected, *trained), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_tied_head_gets_the_gradients_of_both_uses() -> None:
    """The embedding is also the head: its gradient is the sum over the two paths, as autograd forms it."""
    spec, inputs, teacher = SPECS["forward"], make_inputs(0), make_head(2, False, None)
    embedding = make_head(1, False, None).weight_VH
    got, wanted = [
        gradients(loss_of(replace(inputs, student_hidden_NH=torch.tanh(embedding[inputs.targets_N]))), embedding)[0]
        for loss_of in (
            lambda i: chunked_loss(spec, i, Head(embedding), teacher, 4)[0],
            lambda i: naive(spec, i, Head(embedding), teacher),
        )
    ]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SPECS.keys() - {"sampled"}))
def test_gradcheck_in_float64(name: str) -> None:
    """``sampled`` is left out: its gradient is by design not the derivative of its value."""
    inputs, teacher = make_inputs(0, n=5, dtype=torch.float64), make_head(2, True, 3.0)
    spec = replace(SPECS[name], topk=min(SPECS[name].topk, 3))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_loss(spec, replace(inputs, student_hidden_NH=hidden), Head(weight, bias, 3.0), teacher, 2)[0]

    head = make_head(1, True, 3.0)
    tensors = [t.detach().double().requires_grad_() for t in (inputs.student_hidden_NH, head.weight_VH, head.bias_V)]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(loss, tensors)


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_is_no_worse_than_the_naive_bfloat16(name: str) -> None:
    """Errors of loss and gradients, each measured against float32 on the same numbers."""
    n, h, v = 64, 32, 300
    exact_inputs = make_inputs(0, n, h, v, torch.bfloat16)
    head = Head(torch.randn(v, h, generator=torch.Generator().manual_seed(1)).mul(0.3).bfloat16())
    teacher = Head(torch.randn(v, h, generator=torch.Generator().manual_seed(2)).mul(0.3).bfloat16())

    def run(dtype: torch.dtype, function) -> list[Tensor]:
        hidden, weight = (
            t.detach().to(dtype).requires_grad_() for t in (exact_inputs.student_hidden_NH, head.weight_VH)
        )
        assert exact_inputs.teacher_hidden_NH is not None
        inputs = replace(
            exact_inputs, student_hidden_NH=hidden, teacher_hidden_NH=exact_inputs.teacher_hidden_NH.to(dtype)
        )
        loss = function(SPECS[name], inputs, Head(weight), Head(teacher.weight_VH.to(dtype)))
        return [loss.detach().float(), *(g.float() for g in gradients(loss, hidden, weight))]

    truth = run(torch.float32, naive)
    plain = run(torch.bfloat16, naive)
    ours = run(torch.bfloat16, lambda *args: chunked_loss(*args, 16)[0])
    for exact, low, got in zip(truth, plain, ours, strict=True):
        error, allowed = (got - exact).norm() / exact.norm(), (low - exact).norm() / exact.norm()
        assert error <= 1.2 * allowed + 2e-3
        assert error < 0.1


def test_backward_scales_in_full_precision() -> None:
    """1 / 3 in bfloat16 is off by 0.1 %: the hidden states' gradient must not inherit that."""
    inputs = make_inputs(0, dtype=torch.bfloat16)
    head, teacher = make_head(1, False, None), make_head(2, False, None)
    hidden = inputs.student_hidden_NH
    (whole,) = gradients(chunked_loss(SPECS["forward"], inputs, head, teacher)[0], hidden)
    (third,) = gradients(chunked_loss(SPECS["forward"], inputs, head, teacher)[0] / 3, hidden)
    torch.testing.assert_close(third, (whole.float() / 3).bfloat16(), rtol=0, atol=0)


def test_the_gradient_stays_off_masked_rows_and_off_the_teacher() -> None:
    inputs, student, teacher = make_inputs(0), make_head(1, True, None), make_head(2, True, None)
    assert inputs.teacher_hidden_NH is not None
    inputs.teacher_hidden_NH.requires_grad_()
    inputs.weights_N[4:6] = 0
    loss, _ = chunked_loss(SPECS["forward"], inputs, student, teacher, 3)
    loss.backward()
    grad = inputs.student_hidden_NH.grad
    assert grad is not None
    assert grad[4:6].abs().max() == 0 and grad[[0, 1, 2, 3, 6]].abs().min(dim=0).values.max() > 0
    assert inputs.teacher_hidden_NH.grad is None and teacher.weight_VH.grad is None
    assert teacher.bias_V is not None and teacher.bias_V.grad is None


def test_everything_masked_is_a_finite_zero() -> None:
    for inputs in (replace(make_inputs(0), weights_N=torch.zeros(13)), make_inputs(0, n=0)):
        student = make_head(1, False, None)
        loss, metrics = chunked_loss(SPECS["forward"], inputs, student, make_head(2, False, None))
        loss.backward()
        assert loss.item() == 0 and all(map(math.isfinite, metrics.values()))
        assert student.weight_VH.grad is not None and student.weight_VH.grad.abs().max() == 0


@pytest.mark.parametrize("split", [[13], [6, 7], [1, 5, 7]])
def test_splitting_the_batch_changes_nothing(split: list[int]) -> None:
    """Sums over the parts, divided once by the global count: loss, metrics and gradients of the whole."""
    inputs, student, teacher = make_inputs(0), make_head(1, False, None), make_head(2, False, None)
    whole, whole_metrics = chunked_loss(SPECS["reverse"], inputs, student, teacher)
    (whole_grad,) = gradients(whole / 13, student.weight_VH)
    total, metrics, start = torch.zeros(()), dict.fromkeys(whole_metrics, 0.0), 0
    for size in split:
        rows = slice(start, start + size)
        start += size
        assert inputs.teacher_hidden_NH is not None
        part = replace(
            inputs, student_hidden_NH=inputs.student_hidden_NH[rows], teacher_hidden_NH=inputs.teacher_hidden_NH[rows],
            targets_N=inputs.targets_N[rows], weights_N=inputs.weights_N[rows],
            demonstrated_N=inputs.demonstrated_N[rows],
        )  # fmt: skip
        loss, found = chunked_loss(SPECS["reverse"], part, student, teacher)
        total = total + loss
        metrics = {key: metrics[key] + found[key] for key in metrics}
    (grad,) = gradients(total / 13, student.weight_VH)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(grad, whole_grad)
    assert metrics == pytest.approx(whole_metrics)


def test_metrics_are_sums_over_tokens() -> None:
    inputs, student, teacher = make_inputs(0), make_head(1, False, None), make_head(2, False, None)
    _, metrics = chunked_loss(SPECS["forward"], inputs, student, teacher, 4)
    p_NV = student.logits(inputs.student_hidden_NH).softmax(-1).detach()
    p_N = p_NV[torch.arange(13), inputs.targets_N]
    assert metrics["entropy"] == pytest.approx(float(-(p_NV * p_NV.log()).sum()), rel=1e-5)
    assert metrics["target_probability"] == pytest.approx(float(p_N.sum()), rel=1e-5)
    assert metrics["demonstrated_target_probability"] == pytest.approx(
        float(p_N[inputs.demonstrated_N].sum()), rel=1e-5
    )
    assert metrics["demonstrated_tokens"] == int(inputs.demonstrated_N.sum())


def test_the_teacher_is_sharpened_on_demonstrated_rows_only() -> None:
    """With equal hidden states an anchor's KL is zero and a demonstrated row's is not."""
    inputs, head = make_inputs(0), make_head(1, False, None)
    same = replace(inputs, teacher_hidden_NH=inputs.student_hidden_NH.detach(), weights_N=torch.ones(13))
    for demonstrated in (True, False):
        rows = replace(same, demonstrated_N=torch.full((13,), demonstrated))
        loss, _ = chunked_loss(SPECS["forward"], rows, head, head)
        assert (loss.item() > 0.1) is demonstrated
        if not demonstrated:
            assert abs(loss.item()) < 1e-5


def test_sft_with_anchors_mixes_the_two_losses_row_by_row() -> None:
    student, teacher = logprobs(0), logprobs(1)
    targets, demonstrated = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([True, False, True, False, False])
    got = position_losses(SPECS["sft-with-anchors"], student, teacher, targets, demonstrated)
    torch.testing.assert_close(got[demonstrated], nll(student, targets)[demonstrated])
    torch.testing.assert_close(got[~demonstrated], forward_kl(student, teacher)[~demonstrated])


def test_without_a_teacher_only_sft_can_run() -> None:
    inputs, head = replace(make_inputs(0), teacher_hidden_NH=None), make_head(1, False, None)
    with pytest.raises(ValueError, match="teacher"):
        chunked_loss(SPECS["forward"], inputs, head, None)
    with pytest.raises(ValueError, match="teacher"):
        chunked_loss(SPECS["sft-with-anchors"], inputs, head, None)
    rows = replace(inputs, demonstrated_N=torch.ones(13, dtype=torch.bool))
    loss, _ = chunked_loss(SPECS["sft-with-anchors"], rows, head, None, 5)
    expected = naive(SPECS["sft-with-anchors"], rows, head, None)
    torch.testing.assert_close(loss, expected)
    trained = (rows.student_hidden_NH, head.weight_VH)
    for got, wanted in zip(gradients(loss, *trained), gradients(expected, *trained), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_without_gradients_none_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring under no_grad or inference mode with a head that trains elsewhere: same value, no gradient work."""
    inputs, student, teacher = make_inputs(0), make_head(1, False, None), make_head(2, False, None)
    expected = chunked_loss(SPECS["forward"], inputs, student, teacher)[0].item()
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: pytest.fail("formed a gradient"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert chunked_loss(SPECS["forward"], inputs, student, teacher)[0].item() == expected


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Head.raw_logits
    monkeypatch.setattr(Head, "raw_logits", lambda head, hidden: seen.append(len(hidden)) or original(head, hidden))
    chunked_loss(SPECS["forward"], make_inputs(0), make_head(1, False, None), make_head(2, False, None), 4)
    assert seen == list(itertools.chain.from_iterable((n, n) for n in (4, 4, 4, 1)))
