"""The fused loss against the naive one, forward and backward, on a CPU."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure import fused
from perdure.fused import Head, LossInputs, chunked_loss
from perdure.losses import LossSpec, position_losses

SPECS = {
    "forward": LossSpec("forward_kl"),
    "reverse": LossSpec("reverse_kl"),
    "jsd": LossSpec("generalized_jsd", jsd_beta=0.3),
    "forward-topk": LossSpec("forward_kl", "teacher_topk", topk=4),
    "reverse-topk": LossSpec("reverse_kl", "teacher_topk", topk=4),
    "jsd-topk": LossSpec("generalized_jsd", "teacher_topk", jsd_beta=0.7, topk=1),
    "sampled": LossSpec("reverse_kl", "sampled"),
    "sampled-held": LossSpec("reverse_kl", "sampled"),
    "sft-with-anchors": LossSpec(),
    "dft-with-anchors": LossSpec(label="dft"),
    "sft-held": LossSpec(),
    "corrected-held": LossSpec(),
    "dft-held-by-topk": LossSpec("reverse_kl", "teacher_topk", topk=4, label="dft"),
}


def inputs_of(name: str, *args: Any, **options: Any) -> LossInputs:
    """The inputs of a spec: demonstrated rows take the label loss alone ("with-anchors") or both losses ("held")."""
    inputs = make_inputs(*args, **options)
    if name.endswith("with-anchors"):
        none = torch.zeros_like(inputs.weights_N)
        weights = torch.where(inputs.demonstrated_N, none, inputs.weights_N)
        return replace(inputs, weights_N=weights, label_weights_N=torch.where(inputs.demonstrated_N, 0.7, none))
    if name.startswith("corrected"):
        inputs = replace(inputs, labels_N=inputs.targets_N.roll(1))
    return replace(inputs, label_weights_N=inputs.demonstrated_N * 0.4) if "held" in name else inputs


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
    losses_N = position_losses(spec, student_NV, teacher_NV, inputs.targets_N, inputs.weights_N, inputs.label_weights_N,
                               inputs.labels_N)  # fmt: skip
    return losses_N.sum()


def gradients(loss: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [t for t in tensors if t is not None]))


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (True, 3.0)])
@pytest.mark.parametrize("name", SPECS)
def test_chunked_equals_naive(name: str, bias: bool, softcap: float | None, chunk: int) -> None:
    spec, inputs = SPECS[name], inputs_of(name, 0)
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


@pytest.mark.parametrize("name", sorted(name for name in SPECS if "sampled" not in name and "dft" not in name))
def test_gradcheck_in_float64(name: str) -> None:
    """``sampled`` and ``dft`` are left out: their gradients are by design not the derivatives of their values."""
    inputs, teacher = inputs_of(name, 0, n=5, dtype=torch.float64), make_head(2, True, 3.0)
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
    exact_inputs = inputs_of(name, 0, n, h, v, torch.bfloat16)
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


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd-topk", "sft-with-anchors"])
def test_each_positions_divergence_is_there_unweighted(name: str) -> None:
    spec, inputs = SPECS[name], inputs_of(name, 0)
    student, teacher = make_head(1, False, None), make_head(2, False, None)
    found_N = torch.full((13,), -1.0)
    chunked_loss(spec, inputs, student, teacher, 5, found_N)
    asks_N = inputs.weights_N != 0
    for row in range(13):
        one = inputs.at(torch.tensor([row]))
        one = replace(one, weights_N=torch.ones(1), label_weights_N=None)
        expected = float(naive(spec, one, student, teacher).detach()) if asks_N[row] else -1.0
        assert float(found_N[row]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


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


def test_without_a_teacher_only_sft_can_run() -> None:
    inputs, head = replace(inputs_of("sft-with-anchors", 0), teacher_hidden_NH=None), make_head(1, False, None)
    with pytest.raises(ValueError, match="teacher"):
        chunked_loss(SPECS["sft-with-anchors"], inputs, head, None)
    rows = replace(inputs, weights_N=torch.zeros(13), label_weights_N=torch.ones(13))
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
    original = Head.product
    monkeypatch.setattr(Head, "product", lambda head, hidden: seen.append(len(hidden)) or original(head, hidden))
    inputs = inputs_of("sft-with-anchors", 0)
    chunked_loss(SPECS["forward"], make_inputs(0), make_head(1, False, None), make_head(2, False, None), 4)
    assert seen == list(itertools.chain.from_iterable((n, n) for n in (4, 4, 4, 1)))
    seen.clear()
    chunked_loss(SPECS["sft-with-anchors"], inputs, make_head(1, False, None), make_head(2, False, None))
    learned = int(inputs.demonstrated_N.sum())
    assert seen == [learned, 13 - learned, 13 - learned]  # rows of SFT never ask for the teacher's logits


@pytest.mark.parametrize("name", sorted(SPECS.keys() - {"sampled"}))
def test_what_has_no_probability_counts_nothing(name: str) -> None:
    """Two tokens ruled out by the heads' biases, as padded vocabularies do: finite, and the same as without them."""
    spec, inputs = SPECS[name], inputs_of(name, 0)
    heads = [make_head(seed, True, None) for seed in (1, 2)]
    out = [Head(head.weight_VH, head.bias_V.detach().index_fill(0, torch.tensor([3, 9]), -math.inf).requires_grad_())
           for head in heads if head.bias_V is not None]  # fmt: skip
    keep = torch.tensor([v for v in range(17) if v not in (3, 9)])
    small = [Head(head.weight_VH[keep], head.bias_V[keep]) for head in heads if head.bias_V is not None]
    targets = torch.arange(13) % 15
    labels = None if inputs.labels_N is None else targets.roll(1)
    of_all = replace(inputs, targets_N=keep[targets], labels_N=None if labels is None else keep[labels])
    got, _ = chunked_loss(spec, of_all, *out)
    wanted, _ = chunked_loss(spec, replace(inputs, targets_N=targets, labels_N=labels), *small)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(gradients(loss, inputs.student_hidden_NH) for loss in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_inside_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements in (1, 17 * 4, 2**20):
        monkeypatch.setitem(fused.BLOCK_ELEMENTS, "cpu", elements)
        inputs, student = make_inputs(0), make_head(1, True, 3.0)
        loss, metrics = chunked_loss(SPECS["jsd-topk"], inputs, student, make_head(2, True, 3.0), 7)
        results.append((loss, metrics, gradients(loss, inputs.student_hidden_NH, student.weight_VH)))
    for loss, metrics, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        assert metrics == pytest.approx(results[0][1])
        for got, wanted in zip(grads, results[0][2], strict=True):
            torch.testing.assert_close(got, wanted)
