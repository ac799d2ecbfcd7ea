"""Divergences between teacher and student, and their chunked form over hidden states.

Pure functions: tensors in, tensors out; no model, no settings object, no logging. Directions are in the names:
``forward_kl`` is KL(teacher || student), ``reverse_kl`` is KL(student || teacher). Sums over tokens are divided once,
by the caller, by the global number of loss tokens.

Dimension letters: N loss positions, V vocabulary, H hidden size, K top-k support.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def forward_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(teacher || student) at each position, float [N]: sum_v p_t (log p_t - log p_s).

    The loss behind every published number of SDFT (its code's ``alpha = 0``; the authors confirm it)."""
    return _kl(teacher_logprobs_NV, student_logprobs_NV)


def reverse_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(student || teacher) at each position, float [N]: sum_v p_s (log p_s - log p_t). Equation 1 of the paper."""
    return _kl(student_logprobs_NV, teacher_logprobs_NV)


def generalized_jsd(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, beta: float) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student, float [N]."""
    mixture_NV = torch.logaddexp(teacher_logprobs_NV + math.log(beta), student_logprobs_NV + math.log1p(-beta))
    return beta * _kl(teacher_logprobs_NV, mixture_NV) + (1 - beta) * _kl(student_logprobs_NV, mixture_NV)


def nll(student_logprobs_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood of the target token, float [N]: supervised fine-tuning's loss."""
    return -_pick(student_logprobs_NV, targets_N)


def sampled_reverse_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, targets_N: Tensor) -> Tensor:
    """One-sample estimate of the reverse KL at each position, float [N]; the target must be the student's own sample.

    The value is log p_s(y) - log p_t(y). Its plain gradient has expectation zero, so the gradient is taken from the
    score-function surrogate, which is the exact gradient of the reverse KL in expectation."""
    student_N = _pick(student_logprobs_NV, targets_N)
    value_N = (student_N - _pick(teacher_logprobs_NV, targets_N)).detach()
    surrogate_N = value_N * student_N
    return value_N + surrogate_N - surrogate_N.detach()


def teacher_topk_with_tail(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both distributions over the teacher's k likeliest tokens plus one bucket for all others, float [N, K + 1].

    With the tail bucket both still sum to one, so every divergence above stays a divergence; it equals the
    full-vocabulary one when k = V."""
    k = min(k, teacher_logprobs_NV.shape[-1])
    ids_NK = teacher_logprobs_NV.topk(k, dim=-1).indices
    return _with_tail(student_logprobs_NV, ids_NK), _with_tail(teacher_logprobs_NV, ids_NK)


def _with_tail(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """log p of the chosen tokens and of all others together; without the tail where everything is chosen.

    The tail is summed, not taken as 1 - sum: of a sharp distribution that difference is rounding noise, and its
    gradient with it."""
    kept_NK = logprobs_NV.gather(-1, ids_NK)
    if ids_NK.shape[-1] == logprobs_NV.shape[-1]:
        return kept_NK
    tail_N = logprobs_NV.scatter(-1, ids_NK, -math.inf).logsumexp(-1)
    return torch.cat((kept_NK, tail_N[:, None]), dim=-1)


def _kl(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    # 0 log 0 = 0: where p is exactly zero its log is -inf, and -inf * 0 would be nan.
    difference = torch.where(p_logprobs.isneginf(), 0.0, p_logprobs - q_logprobs)
    return (p_logprobs.exp() * difference).sum(-1)


def _pick(logprobs_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1)


@dataclass(frozen=True)
class LossSpec:
    """Which loss, in words. Rows without a demonstration (anchors) always use the divergence, SFT's included."""

    divergence: str = "forward_kl"
    support: str = "full"
    """``sampled`` is right only where every target is the student's own sample."""
    jsd_beta: float = 0.5
    topk: int = 20
    demonstrated: str = "divergence"
    """Loss of rows with a demonstration: ``divergence`` (SDFT) or ``nll`` (SFT)."""


@dataclass(frozen=True)
class Head:
    """The language-model head: logits = softcap(hidden @ weight.T + bias)."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None

    def raw_logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits before the soft cap, float32 (or float64) [N, V]; the product runs in the dtype of ``hidden_NH``."""
        logits_NV = (hidden_NH @ self.weight_VH.to(hidden_NH.dtype).T).to(_accumulator(hidden_NH))
        return logits_NV if self.bias_V is None else logits_NV + self.bias_V.to(logits_NV.dtype)

    def cap(self, raw_logits_NV: Tensor) -> Tensor:
        if self.softcap is None:
            return raw_logits_NV
        return torch.tanh(raw_logits_NV / self.softcap) * self.softcap

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits, float32 [N, V]."""
        return self.cap(self.raw_logits(hidden_NH))


@dataclass(frozen=True)
class LossInputs:
    """What the loss needs at the N loss positions of a micro-batch."""

    student_hidden_NH: Tensor
    teacher_hidden_NH: Tensor | None
    """None where no row has a teacher: plain SFT without anchors."""
    targets_N: Tensor
    """int64 [N], the completion's tokens."""
    weights_N: Tensor
    """float32 [N]."""
    demonstrated_N: Tensor
    """bool [N]."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits where ``demonstrated_N``; below 1 sharpens the target."""


METRICS = ("entropy", "target_probability", "demonstrated_target_probability", "demonstrated_tokens")


def position_losses(spec: LossSpec, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor | None,
                    targets_N: Tensor, demonstrated_N: Tensor) -> Tensor:  # fmt: skip
    """The loss at each position, float [N], before weights. The naive form that the chunked one must equal."""
    if teacher_logprobs_NV is None:
        if spec.demonstrated != "nll" or not bool(demonstrated_N.all()):
            raise ValueError("a divergence needs the teacher's hidden states; only nll on demonstrated rows does not")
        return nll(student_logprobs_NV, targets_N)
    divergence_N = _divergence(spec, student_logprobs_NV, teacher_logprobs_NV, targets_N)
    if spec.demonstrated == "nll":
        return torch.where(demonstrated_N, nll(student_logprobs_NV, targets_N), divergence_N)
    return divergence_N


def _divergence(spec: LossSpec, student: Tensor, teacher: Tensor, targets_N: Tensor) -> Tensor:
    if spec.support == "sampled":
        return sampled_reverse_kl(student, teacher, targets_N)
    if spec.support == "teacher_topk":
        student, teacher = teacher_topk_with_tail(student, teacher, spec.topk)
    if spec.divergence == "generalized_jsd":
        return generalized_jsd(student, teacher, spec.jsd_beta)
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[spec.divergence](student, teacher)


def chunked_loss(
    spec: LossSpec, inputs: LossInputs, student_head: Head, teacher_head: Head | None, chunk: int = 256
) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of the losses over all positions (float32 scalar with gradient) and summed metrics.

    Only ``chunk`` x V logits of each role exist at a time, and the gradient is formed inside the chunk, so neither a
    [B, T, V] tensor nor a graph over logits is ever kept. Divide by the global token count afterwards.
    """
    metrics: dict[str, float] = {name: 0.0 for name in METRICS}
    of_chunk = _chunk_function(spec, inputs, student_head, teacher_head, metrics)
    trained = (inputs.student_hidden_NH, student_head.weight_VH, student_head.bias_V)
    if not torch.is_grad_enabled():  # inside the Function this cannot be seen, and it would form gradients for nobody
        trained = tuple(None if tensor is None else tensor.detach() for tensor in trained)
    total = _ChunkedLoss.apply(*trained, of_chunk, chunk)
    assert isinstance(total, Tensor)
    return total, metrics


ChunkFunction = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]
"""(rows, raw student logits of these rows, whether a gradient is wanted) -> weighted loss sum, its gradient [C, V]."""


def _chunk_function(spec: LossSpec, inputs: LossInputs, student_head: Head, teacher_head: Head | None,
                    metrics: dict[str, float]) -> ChunkFunction:  # fmt: skip
    """The loss of some rows. Where the gradient is known in closed form it is written down, else autograd forms it."""
    closed = spec.support == "full" and spec.divergence == "forward_kl" and student_head.softcap is None

    def teacher_logprobs(rows: slice) -> Tensor | None:
        if inputs.teacher_hidden_NH is None or teacher_head is None:
            return None
        logits_CV = teacher_head.logits(inputs.teacher_hidden_NH[rows])
        if inputs.teacher_temperature != 1.0:
            demonstrated_C1 = inputs.demonstrated_N[rows, None]
            logits_CV = torch.where(demonstrated_C1, logits_CV / inputs.teacher_temperature, logits_CV)
        return torch.log_softmax(logits_CV, dim=-1)

    def of_chunk(rows: slice, raw_CV: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        targets_C, demonstrated_C = inputs.targets_N[rows], inputs.demonstrated_N[rows]
        teacher_CV = teacher_logprobs(rows)
        with torch.set_grad_enabled(wants_gradient and not closed):
            raw_CV.requires_grad_(torch.is_grad_enabled())
            student_CV = torch.log_softmax(student_head.cap(raw_CV), dim=-1)
            losses_C = position_losses(spec, student_CV, teacher_CV, targets_C, demonstrated_C)
            loss = (losses_C * inputs.weights_N[rows]).sum()
        probabilities_CV = student_CV.detach().exp()
        _count(metrics, student_CV.detach(), probabilities_CV, targets_C, demonstrated_C)
        if not wants_gradient:
            return loss, None
        if not closed:
            return loss.detach(), torch.autograd.grad(loss, raw_CV)[0]
        nll_C = demonstrated_C & (spec.demonstrated == "nll")
        return loss, _closed_gradient(probabilities_CV, teacher_CV, targets_C, nll_C) * inputs.weights_N[rows, None]

    return of_chunk


def _closed_gradient(probabilities_CV: Tensor, teacher_CV: Tensor | None, targets_C: Tensor, nll_C: Tensor) -> Tensor:
    """d loss / d logits, [C, V]: p_s - p_t for the forward KL, p_s - onehot(target) where ``nll_C`` or with no teacher.

    Overwrites ``probabilities_CV``: at a large vocabulary these arrays are what the loss costs."""
    rows_C = torch.arange(len(targets_C), device=targets_C.device)
    if teacher_CV is None:
        probabilities_CV[rows_C, targets_C] -= 1
        return probabilities_CV
    wanted_CV = teacher_CV.exp()
    if bool(nll_C.any()):
        wanted_CV[nll_C] = 0
        wanted_CV[rows_C[nll_C], targets_C[nll_C]] = 1
    return probabilities_CV.sub_(wanted_CV)


def _count(metrics: dict[str, float], student_CV: Tensor, probabilities_CV: Tensor, targets_C: Tensor,
           demonstrated_C: Tensor) -> None:  # fmt: skip
    probability_C = _pick(probabilities_CV, targets_C)
    metrics["entropy"] -= float(torch.dot(probabilities_CV.flatten(), student_CV.flatten()))
    metrics["target_probability"] += float(probability_C.sum())
    metrics["demonstrated_target_probability"] += float(probability_C[demonstrated_C].sum())
    metrics["demonstrated_tokens"] += float(demonstrated_C.sum())


class _ChunkedLoss(torch.autograd.Function):
    """Runs forward and backward of head and loss chunk by chunk; ``backward`` only scales what is ready."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None,  # type: ignore[override]
                of_chunk: ChunkFunction, chunk: int) -> Tensor:  # fmt: skip
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden_NH) if wants_hidden else None
        exact = _accumulator(hidden_NH)
        grad_weight = torch.zeros_like(weight_VH, dtype=exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=exact) if wants_bias and bias_V is not None else None
        head = Head(weight_VH.to(hidden_NH.dtype), bias_V)
        total = torch.zeros((), dtype=exact, device=hidden_NH.device)
        for start in range(0, hidden_NH.shape[0], chunk):
            rows = slice(start, start + chunk)
            loss, grad_CV = of_chunk(rows, head.raw_logits(hidden_NH[rows]), any(ctx.needs_input_grad[:3]))
            total += loss
            if grad_CV is None:
                continue
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_NH.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_CV @ head.weight_VH
            if grad_weight is not None:
                grad_weight += grad_CV.T @ hidden_NH[rows]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        (scale,) = grads
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else (grad_hidden.to(scale.dtype) * scale).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(weight_dtype),
            None if grad_bias is None else (grad_bias * scale).to(bias_dtype),
            None,
            None,
        )


def _accumulator(hidden_NH: Tensor) -> torch.dtype:
    """float32; float64 stays float64, so that a gradient check means something."""
    return torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
