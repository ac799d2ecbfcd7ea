"""Divergences between teacher and student, as their formulas say: what fused.py, which training runs, is tested
against. It computes the same from hidden states, without a [N, V] tensor.

Pure functions: tensors in, tensors out; no model, no settings object, no logging. Directions are in the names:
``forward_kl`` is KL(teacher || student), ``reverse_kl`` is KL(student || teacher). Sums over tokens are divided once,
by the caller, by the global number of loss tokens.

Dimension letters: N loss positions, V vocabulary, K top-k support.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    return -pick(student_logprobs_NV, targets_N)


def dft(student_logprobs_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Dynamic fine-tuning's loss, float [N]: the NLL times the target's own probability, which takes no gradient
    (Wu et al. 2025, arXiv 2508.05629): what the model finds unlikely pulls less."""
    target_N = pick(student_logprobs_NV, targets_N)
    return -target_N.detach().exp() * target_N


def sampled_reverse_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, targets_N: Tensor) -> Tensor:
    """One-sample estimate of the reverse KL at each position, float [N]; the target must be the student's own sample.

    The value is log p_s(y) - log p_t(y). Its plain gradient has expectation zero, so the gradient is taken from the
    score-function surrogate, which is the exact gradient of the reverse KL in expectation."""
    student_N = pick(student_logprobs_NV, targets_N)
    value_N = (student_N - pick(teacher_logprobs_NV, targets_N)).detach()
    surrogate_N = value_N * student_N
    return value_N + surrogate_N - surrogate_N.detach()


def teacher_topk_with_tail(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both distributions over the teacher's k likeliest tokens plus one bucket for all others, float [N, K + 1].

    With the tail bucket both still sum to one, so every divergence above stays a divergence; it equals the
    full-vocabulary one when k = V."""
    k = min(k, teacher_logprobs_NV.shape[-1])
    ids_NK = teacher_logprobs_NV.topk(k, dim=-1).indices
    return with_tail(student_logprobs_NV, ids_NK), with_tail(teacher_logprobs_NV, ids_NK)


def with_tail(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
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


def pick(logprobs_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The target's entry at each position, [N]."""
    return logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1)


@dataclass(frozen=True)
class LossSpec:
    """Which losses, in words. How much of each a position takes is a weight of its own (see ``position_losses``)."""

    divergence: str = "forward_kl"
    support: str = "full"
    """``sampled`` is right only where every target is the student's own sample."""
    jsd_beta: float = 0.5
    topk: int = 20
    label: str = "nll"
    """Loss of a completion's own tokens: ``nll`` (SFT) or ``dft``."""


def position_losses(spec: LossSpec, student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor | None,
                    targets_N: Tensor, weights_N: Tensor, label_weights_N: Tensor | None = None,
                    labels_N: Tensor | None = None) -> Tensor:  # fmt: skip
    """weight * divergence + label weight * label loss at each position, float [N]; the labels are the targets unless
    given. The naive form that the fused one must equal. Raises ValueError where a divergence is wanted and there is no
    teacher."""
    wanted_N = weights_N != 0
    total_N = torch.zeros_like(student_logprobs_NV[:, 0])
    if bool(wanted_N.any()):
        if teacher_logprobs_NV is None:
            raise ValueError(NO_TEACHER)
        divergence_N = _divergence(spec, student_logprobs_NV, teacher_logprobs_NV, targets_N)
        total_N = torch.where(wanted_N, weights_N * divergence_N, total_N)
    if label_weights_N is not None:
        labels_N = targets_N if labels_N is None else labels_N
        total_N = total_N + label_weights_N * {"nll": nll, "dft": dft}[spec.label](student_logprobs_NV, labels_N)
    return total_N


NO_TEACHER = "a divergence needs the teacher's hidden states; only rows of divergence weight 0 do not"


def _divergence(spec: LossSpec, student: Tensor, teacher: Tensor, targets_N: Tensor) -> Tensor:
    if spec.support == "sampled":
        return sampled_reverse_kl(student, teacher, targets_N)
    if spec.support == "teacher_topk":
        student, teacher = teacher_topk_with_tail(student, teacher, spec.topk)
    if spec.divergence == "generalized_jsd":
        return generalized_jsd(student, teacher, spec.jsd_beta)
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[spec.divergence](student, teacher)
