"""The losses over hidden states, fused with the language-model head: loss and both gradients, chunk by chunk.

A chunk of positions goes through the head in one matrix product; its logits are then worked off in blocks that stay in
a CPU's cache, with every gradient in closed form, so that neither a [B, T, V] tensor nor a graph over logits exists.
``losses.position_losses`` under autograd is the naive form that this must equal.

Dimension letters: N loss positions, C positions of a chunk, B positions of a block, V vocabulary, H hidden size, K
top-k support. ``student_BV`` and ``teacher_BV`` are log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perdure.losses import NO_TEACHER, LossSpec, pick, with_tail

CHUNK_ELEMENTS = 2**25
"""Most logits of one role in memory at once: 64 MiB in bfloat16."""
BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}
"""Logits worked on at once, in float32: on a CPU a few of these arrays fit its cache."""


@dataclass(frozen=True)
class Head:
    """The language-model head: logits = softcap(hidden @ weight.T + bias)."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None

    def to(self, device: torch.device) -> Head:
        return Head(self.weight_VH.to(device), None if self.bias_V is None else self.bias_V.to(device), self.softcap)

    def product(self, hidden_NH: Tensor) -> Tensor:
        """hidden @ weight.T, [N, V], in the dtype of ``hidden_NH``: logits before bias and soft cap."""
        return hidden_NH @ self.weight_VH.to(hidden_NH.dtype).T

    def finish(self, product_NV: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits from the product, in a tensor of their own."""
        logits_NV = product_NV.to(dtype, copy=True)
        if self.bias_V is not None:
            logits_NV += self.bias_V.detach().to(dtype)
        return logits_NV if self.softcap is None else logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits_NV: Tensor) -> Tensor | None:
        """Derivative of the logits by what the soft cap was applied to; None without one, where it is 1."""
        return None if self.softcap is None else 1 - (logits_NV / self.softcap) ** 2

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits, float32 (or float64) [N, V]; with gradients where those are on."""
        logits_NV = self.product(hidden_NH).to(accumulator(hidden_NH))
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V.to(logits_NV.dtype)
        return logits_NV if self.softcap is None else torch.tanh(logits_NV / self.softcap) * self.softcap


@dataclass(frozen=True)
class LossInputs:
    """What the loss needs at the N loss positions of a micro-batch."""

    student_hidden_NH: Tensor
    teacher_hidden_NH: Tensor | None
    """None where no row asks the teacher: plain SFT without anchors."""
    targets_N: Tensor
    """int64 [N], the completion's tokens."""
    weights_N: Tensor
    """float32 [N]; of the divergence. Where it is 0 the teacher is not asked."""
    demonstrated_N: Tensor
    """bool [N]."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits where ``demonstrated_N``; below 1 sharpens the target."""
    label_weights_N: Tensor | None = None
    """float32 [N]; of the label loss. None = 0 everywhere."""
    labels_N: Tensor | None = None
    """int64 [N], what the label loss asks for. None = the targets."""

    def at(self, rows_C: Tensor) -> LossInputs:
        """The same at some of the positions."""
        return replace(self, **{name: value[rows_C] for name, value in vars(self).items() if isinstance(value, Tensor)})


METRICS = ("entropy", "target_probability", "demonstrated_target_probability", "demonstrated_tokens")


def chunked_loss(
    spec: LossSpec, inputs: LossInputs, student_head: Head, teacher_head: Head | None, chunk: int | None = None,
    divergence_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Weighted sum of the losses over all positions (float32 scalar with gradient) and summed metrics.

    ``chunk`` x V logits of each role exist at a time (by default as many as CHUNK_ELEMENTS allows). Rows without a
    divergence never ask for the teacher's. Divide by the global token count afterwards. ``divergence_N`` (float [N]),
    where given, takes each position's divergence, unweighted; it stays as it is where the teacher is not asked. Raises
    ValueError where a divergence is wanted and there is no teacher."""
    asks_N = inputs.weights_N != 0
    if (inputs.teacher_hidden_NH is None or teacher_head is None) and bool(asks_N.any()):
        raise ValueError(NO_TEACHER)
    chunk = chunk or max(1, CHUNK_ELEMENTS // student_head.weight_VH.shape[0])
    parts = [(rows_C, asks) for asks in (False, True) for rows_C in (asks_N == asks).nonzero().flatten().split(chunk)]
    job = _Job(spec, inputs, student_head, teacher_head, [part for part in parts if len(part[0])],
               dict.fromkeys(METRICS, 0.0), divergence_N)  # fmt: skip
    trained = (inputs.student_hidden_NH, student_head.weight_VH, student_head.bias_V)
    if not torch.is_grad_enabled():  # inside the Function this cannot be seen, and it would form gradients for nobody
        trained = tuple(None if tensor is None else tensor.detach() for tensor in trained)
    total = _FusedLoss.apply(*trained, job)
    assert isinstance(total, Tensor)
    return total, job.metrics


@torch.no_grad()
def target_logprobs(head: Head, hidden_NH: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 [N]: log p of each target at the temperature, chunk by chunk."""
    size = max(1, CHUNK_ELEMENTS // head.weight_VH.shape[0])
    found = [torch.empty(0, device=hidden_NH.device)]
    for rows_CH, targets_C in zip(hidden_NH.split(size), targets_N.split(size), strict=True):
        logits_CV = head.finish(head.product(rows_CH)) / temperature
        found.append(logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(-1))
    return torch.cat(found)


class _Job(NamedTuple):
    """What one call of the Function works on."""

    spec: LossSpec
    inputs: LossInputs
    student_head: Head
    teacher_head: Head | None
    parts: list[tuple[Tensor, bool]]
    """(rows, whether they ask the teacher) of each chunk."""
    metrics: dict[str, float]
    divergence_N: Tensor | None

    def chunk_loss(self, rows_C: Tensor, asks: bool, raw_CV: Tensor, wants: bool) -> Tensor:
        """Weighted loss sum of a chunk from the student's raw logits, which its gradient by them replaces."""
        inputs, exact = self.inputs, accumulator(raw_CV)
        teacher_CV = None
        if asks:
            assert self.teacher_head is not None and inputs.teacher_hidden_NH is not None
            teacher_CV = self.teacher_head.product(inputs.teacher_hidden_NH[rows_C])
        total = torch.zeros((), dtype=exact, device=raw_CV.device)
        block = max(1, BLOCK_ELEMENTS.get(raw_CV.device.type, BLOCK_ELEMENTS["cuda"]) // raw_CV.shape[1])
        for start in range(0, len(rows_C), block):
            part = slice(start, start + block)
            rows_B = rows_C[part]
            student_BV = self.student_head.finish(raw_CV[part], exact)
            slope_BV = self.student_head.slope(student_BV) if wants else None
            student_BV -= student_BV.logsumexp(-1, keepdim=True)
            probabilities_BV = student_BV.exp()
            self._count(rows_B, student_BV, probabilities_BV)
            loss_B, grad_BV = self._weighted(rows_B, student_BV, probabilities_BV,
                                             None if teacher_CV is None else teacher_CV[part], wants)  # fmt: skip
            total += loss_B
            if grad_BV is not None:
                raw_CV[part] = grad_BV if slope_BV is None else grad_BV.mul_(slope_BV)
        return total

    def _weighted(self, rows_B: Tensor, student_BV: Tensor, probabilities_BV: Tensor, teacher_raw_BV: Tensor | None,
                  wants: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Weighted loss sum of a block, and its gradient by the student's logits."""
        inputs, exact = self.inputs, student_BV.dtype
        targets_B = inputs.targets_N[rows_B]
        total, grad_BV = torch.zeros((), dtype=exact, device=student_BV.device), None
        if teacher_raw_BV is not None:
            teacher_BV, weights_B = self._teacher(rows_B, teacher_raw_BV, exact), inputs.weights_N[rows_B].to(exact)
            loss_B, grad_BV = _divergence(self.spec, student_BV, probabilities_BV, teacher_BV, targets_B, wants)
            total = total + torch.dot(loss_B, weights_B)
            if self.divergence_N is not None:
                self.divergence_N[rows_B] = loss_B.to(self.divergence_N.dtype)
            grad_BV = None if grad_BV is None else grad_BV.mul_(weights_B[:, None])
        weights_B = None if inputs.label_weights_N is None else inputs.label_weights_N[rows_B].to(exact)
        if teacher_raw_BV is None or (weights_B is not None and bool((weights_B != 0).any())):
            weights_B = torch.zeros_like(student_BV[:, 0]) if weights_B is None else weights_B
            labels_B = targets_B if inputs.labels_N is None else inputs.labels_N[rows_B]
            if self.spec.label == "dft":  # its weight p_s(y) takes no gradient
                weights_B = weights_B * pick(probabilities_BV, labels_B)
            loss_B, of_label_BV = _nll(student_BV, probabilities_BV, labels_B, wants)  # overwrites the probabilities
            total = total + torch.dot(loss_B, weights_B)
            if of_label_BV is not None:
                of_label_BV *= weights_B[:, None]
                grad_BV = of_label_BV if grad_BV is None else grad_BV.add_(of_label_BV)
        return total, grad_BV

    def _teacher(self, rows_B: Tensor, raw_BV: Tensor, exact: torch.dtype) -> Tensor:
        assert self.teacher_head is not None
        logits_BV = self.teacher_head.finish(raw_BV, exact)
        if self.inputs.teacher_temperature != 1.0:
            demonstrated_B = self.inputs.demonstrated_N[rows_B]
            logits_BV /= torch.where(demonstrated_B, self.inputs.teacher_temperature, 1.0)[:, None].to(exact)
        return logits_BV.sub_(logits_BV.logsumexp(-1, keepdim=True))

    def _count(self, rows_B: Tensor, student_BV: Tensor, probabilities_BV: Tensor) -> None:
        targets_B, demonstrated_B = self.inputs.targets_N[rows_B], self.inputs.demonstrated_N[rows_B]
        probability_B = pick(probabilities_BV, targets_B)
        self.metrics["entropy"] -= float(_expectation(probabilities_BV, student_BV).sum())
        self.metrics["target_probability"] += float(probability_B.sum())
        self.metrics["demonstrated_target_probability"] += float(probability_B[demonstrated_B].sum())
        self.metrics["demonstrated_tokens"] += float(demonstrated_B.sum())


# Loss [B] and gradient by the student's logits [B, V] in closed form. p_s = softmax(z), and for every loss L(p_s):
# dL/dz_v = p_s(v) (q(v) - sum_u p_s(u) q(u)) with q = dL/dp_s.


Form = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def _nll(student_BV: Tensor, probabilities_BV: Tensor, labels_B: Tensor, wants: bool) -> tuple[Tensor, Tensor | None]:
    """p_s - onehot(y). Overwrites ``probabilities_BV``."""
    loss_B = -pick(student_BV, labels_B)
    if not wants:
        return loss_B, None
    probabilities_BV[torch.arange(len(labels_B), device=labels_B.device), labels_B] -= 1
    return loss_B, probabilities_BV


def _forward_kl(
    student_BV: Tensor, probabilities_BV: Tensor, teacher_BV: Tensor, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """q = -p_t / p_s, so p_s - p_t."""
    wanted_BV = teacher_BV.exp()
    loss_B = _expectation(wanted_BV, _difference(teacher_BV, student_BV))
    return loss_B, probabilities_BV - wanted_BV if wants else None


def _reverse_kl(
    student_BV: Tensor, probabilities_BV: Tensor, teacher_BV: Tensor, wants: bool
) -> tuple[Tensor, Tensor | None]:
    """q = log p_s - log p_t + 1; the constant drops out."""
    ratio_BV = _difference(student_BV, teacher_BV)
    loss_B = _expectation(probabilities_BV, ratio_BV)
    return loss_B, ratio_BV.sub_(loss_B[:, None]).mul_(probabilities_BV) if wants else None


def _jsd(beta: float) -> Form:
    """q = (1 - beta) (log p_s - log m): the terms through the mixture m add up to a constant."""

    def form(
        student_BV: Tensor, probabilities_BV: Tensor, teacher_BV: Tensor, wants: bool
    ) -> tuple[Tensor, Tensor | None]:
        mixture_BV = torch.logaddexp(teacher_BV + math.log(beta), student_BV + math.log1p(-beta))
        of_teacher_B = _expectation(teacher_BV.exp(), _difference(teacher_BV, mixture_BV))
        ratio_BV = _difference(student_BV, mixture_BV)
        of_student_B = _expectation(probabilities_BV, ratio_BV)
        loss_B = beta * of_teacher_B + (1 - beta) * of_student_B
        grad_BV = ratio_BV.sub_(of_student_B[:, None]).mul_(probabilities_BV).mul_(1 - beta) if wants else None
        return loss_B, grad_BV

    return form


def _divergence(spec: LossSpec, student_BV: Tensor, probabilities_BV: Tensor, teacher_BV: Tensor, targets_B: Tensor,
                wants: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if spec.support == "sampled":  # losses.sampled_reverse_kl: value * d log p_s(y) / dz
        value_B = pick(student_BV, targets_B) - pick(teacher_BV, targets_B)
        # A copy: a label's loss on the same positions needs the probabilities, too.
        _, grad_BV = _nll(student_BV, probabilities_BV.clone() if wants else probabilities_BV, targets_B, wants)
        return value_B, None if grad_BV is None else grad_BV.mul_(-value_B[:, None])
    forms = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "generalized_jsd": _jsd(spec.jsd_beta)}
    form = forms[spec.divergence]
    if spec.support == "full" or spec.topk >= student_BV.shape[-1]:
        return form(student_BV, probabilities_BV, teacher_BV, wants)
    ids_BK = teacher_BV.topk(spec.topk, dim=-1).indices
    kept_BK = with_tail(student_BV, ids_BK)
    loss_B, grad_BK = form(kept_BK, kept_BK.exp(), with_tail(teacher_BV, ids_BK), wants)
    if grad_BK is None:
        return loss_B, None
    # A bucket's gradient goes to its tokens in proportion to their probability: p_s(v) / p_s(bucket).
    grad_BV = (student_BV - kept_BK[:, -1:]).exp_().mul_(grad_BK[:, -1:])
    return loss_B, grad_BV.scatter_(-1, ids_BK, grad_BK[:, :-1])


def _difference(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """log p - log q; 0 where p is zero, since 0 log 0 = 0 and -inf * 0 would be nan."""
    difference_BV = p_BV - q_BV
    if math.isinf(float(p_BV.amin())):
        difference_BV.masked_fill_(p_BV.isneginf(), 0.0)
    return difference_BV


def _expectation(p_BV: Tensor, x_BV: Tensor) -> Tensor:
    """sum_v p(v) x(v), [B]; infinite x counts nothing where p is zero."""
    sum_B = torch.einsum("bv,bv->b", p_BV, x_BV)
    if bool(sum_B.isnan().any()):
        sum_B = torch.where(p_BV == 0, 0.0, p_BV * x_BV).sum(-1)
    return sum_B


class _FusedLoss(torch.autograd.Function):
    """Runs forward and backward of head and loss chunk by chunk; ``backward`` only scales what is ready."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, job: _Job) -> Tensor:  # type: ignore[override]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.zeros_like(hidden_NH) if wants_hidden else None
        exact = accumulator(hidden_NH)
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V, dtype=exact) if wants_bias and bias_V is not None else None
        head = Head(weight_VH.to(hidden_NH.dtype), bias_V)
        total = torch.zeros((), dtype=exact, device=hidden_NH.device)
        for rows_C, asks in job.parts:
            hidden_CH = hidden_NH[rows_C]
            grad_CV = head.product(hidden_CH)  # logits until chunk_loss has worked on them
            total += job.chunk_loss(rows_C, asks, grad_CV, wants)
            if not wants:
                continue
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0, dtype=exact)
            if grad_hidden is not None:
                grad_hidden[rows_C] = grad_CV @ head.weight_VH
            if wants_weight:
                of_chunk_VH = grad_CV.T @ hidden_CH
                grad_weight = of_chunk_VH.to(exact) if grad_weight is None else grad_weight.add_(of_chunk_VH)
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight_VH, dtype=exact)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        (scale,) = grads
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if scale.item() == 1:  # a pass over the head's gradient saved
            dtypes = (None, weight_dtype, bias_dtype)
            ready = (grad_hidden, grad_weight, grad_bias)
            return *(g if g is None or d is None else g.to(d) for g, d in zip(ready, dtypes, strict=True)), None
        return (
            None if grad_hidden is None else (grad_hidden.to(scale.dtype) * scale).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(weight_dtype),
            None if grad_bias is None else (grad_bias * scale).to(bias_dtype),
            None,
        )


def accumulator(tensor: Tensor) -> torch.dtype:
    """float32; float64 stays float64, so that a gradient check means something."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
