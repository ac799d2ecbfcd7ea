"""One optimizer step: the student's passes over a step's rows, the loss, the sum over processes, AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.adapters import trainable
from perdure.batching import collate, passes
from perdure.config import TrainConfig
from perdure.fused import METRICS, LossInputs, chunked_loss, target_logprobs
from perdure.guidance import observe
from perdure.losses import LossSpec
from perdure.methods import METHODS
from perdure.models import autocast, head_of, hidden_at_loss_positions
from perdure.processes import GROUP, add_up, dealt, gather
from perdure.rows import phase_of
from perdure.runlog import Clock, LoopState
from perdure.sharding import is_sharded, run_in, whole
from perdure.stage import Stage
from perdure.types import Batch, InputError, Rollout


def make_optimizer(stage: Stage, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the float32 masters. Norms and biases are not decayed."""
    parameters = [p for p in stage.student.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Linear warmup, then cosine to a tenth."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    rate = config.learning_rate * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def own_rows(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """This process's part of a step's rows."""
    return _parts(rollouts)[GROUP.rank]


def _parts(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Every process's part of a step's rows."""
    return [[rollouts[place] for place in part] for part in dealt([row_tokens(r) for r in rollouts])]


def row_tokens(rollout: Rollout) -> int:
    """Tokens that the student reads, and a teacher with a longer prompt more."""
    return len(rollout.teacher_prompt.token_ids) + len(rollout.completion.token_ids)


def loss_tokens(rollout: Rollout, config: TrainConfig) -> int:
    """Tokens of the completion that carry loss."""
    return len(rollout.loss_places(config.skip_first_tokens))


def optimise(stage: Stage, config: TrainConfig, optimizer: torch.optim.Optimizer,
             rollouts: Sequence[Rollout], teacher_hidden: list[Tensor] | None, clock: Clock,
             state: LoopState) -> dict[str, Any]:  # fmt: skip
    """One optimizer step: sums over all tokens, divided once by their number, whatever the micro-batches and processes.

    ``rollouts`` are all rows of the step, ``teacher_hidden`` what ``score`` gives for this process's part of them."""
    count = sum(loss_tokens(r, config) for r in rollouts)
    if count == 0:
        raise InputError("no token of this batch carries loss: lower train.skip_first_tokens, or, where loss is on the "
                         "answer after the thinking alone, raise max_new_tokens (skill.toml)")  # fmt: skip
    sums: dict[str, float] = dict.fromkeys(("loss", *METRICS), 0.0)
    moved: list[tuple[str, float]] = []
    own = own_rows(rollouts)
    for rows in _passes(stage, own, config):
        teacher_NH = torch.cat([teacher_hidden[i] for i in rows]) if teacher_hidden is not None else None
        group = [own[i] for i in rows]
        batch = collate(group, "student", stage.student.pad_id, config.skip_first_tokens, stage.working.device)
        divergence_N = torch.zeros_like(batch.weights_N)
        loss, metrics = _pass(stage, config, batch, teacher_NH, 1 / count, divergence_N, clock)
        taken = divergence_N.split([loss_tokens(row, config) for row in group])
        moved += [(row.source, float(d_N.mean())) for row, d_N in zip(group, taken, strict=True)
                 if row.source and row.weight and len(d_N)]  # fmt: skip
        sums = {key: value + (metrics | {"loss": loss})[key] for key, value in sums.items()}
        state.tokens["student"] += int(batch.attention_mask_BT.sum())
    _sum_gradients(stage, config, rollouts)
    parts = gather((sums, moved))
    sums = {key: sum(part[key] for part, _ in parts) for key in sums}
    norm = float(whole(torch.nn.utils.clip_grad_norm_(stage.student.model.parameters(), config.max_grad_norm)))
    if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
        raise InputError(f"the loss is not finite at step {state.step + 1}: lower train.learning_rate")
    optimizer.step()
    # The fused optimizer changes weights without counting their versions up, by which an engine knows what is new.
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.zero_grad(set_to_none=True)
    observe(state.allotted, [pair for _, pairs in parts for pair in pairs])
    found = {
        "loss": sums["loss"],
        "entropy": sums["entropy"] / count,
        "grad_norm": norm,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "loss_tokens": count,
    }
    if tokens := sums["demonstrated_tokens"]:
        of_whom = "sample" if phase_of(state, config) == "on_policy" else "demonstration"
        found[f"{of_whom}_probability"] = sums["demonstrated_target_probability"] / tokens
    return found


def _passes(stage: Stage, rollouts: Sequence[Rollout], config: TrainConfig) -> list[list[int]]:
    return passes(stage.student.model, rollouts, "student", config.micro_batch_tokens)


def _pass(stage: Stage, config: TrainConfig, batch: Batch, teacher_NH: Tensor | None, scale: float,
          divergence_N: Tensor, clock: Clock) -> tuple[float, dict[str, float]]:  # fmt: skip
    """The student's forward and backward pass over one micro-batch: loss and summed metrics.

    ``scale`` is one over the step's loss tokens, applied before the sum, once: the head's gradient then needs no pass
    of its own for it."""
    method = METHODS[config.method]
    spec = LossSpec(config.divergence, config.support, config.jsd_beta, config.topk,
                    "dft" if method.loss == "dft" else "nll")  # fmt: skip
    sharpness = config.teacher_temperature if method.shows else 1.0

    def forward() -> tuple[Tensor, dict[str, float]]:
        with autocast(stage.dtype, stage.working.device):
            student_NH = hidden_at_loss_positions(stage.student.model, batch).to(stage.dtype)
        clock.lap("forward")
        scale_N = importance(stage, config, batch, student_NH) * scale
        inputs = LossInputs(student_NH, teacher_NH, batch.targets_N, batch.weights_N * scale_N, batch.demonstrated_N,
                            sharpness, batch.label_weights_N * scale_N, batch.labels_N)  # fmt: skip
        return loss_of(stage, spec, inputs, divergence_N)

    loss, metrics = run_in(stage.student.model, forward)
    clock.lap("loss")
    loss.backward()
    clock.lap("backward")
    return float(loss.detach()), metrics


@torch.no_grad()
def importance(stage: Stage, config: TrainConfig, batch: Batch, student_NH: Tensor) -> Tensor:
    """float32 [N]: min(p now / p then, ``max_importance``) of a token that earlier weights sampled, both at the
    sampling temperature; 1 elsewhere. Truncated importance sampling (Ionides 2008).

    A divergence over the vocabulary depends on the tokens before its position, not on the one there, whose own ratio
    would be noise: it is weighted by the ratio of the token before it, the last factor of the exact weight. (All
    factors together vary too much on long answers.) The estimate from the sampled token takes that token's."""
    lagging_N = ~batch.sampler_logprobs_N.isnan()
    if not lagging_N.any():
        return torch.ones_like(batch.weights_N)
    now_N = target_logprobs(head_of(stage.student.model), student_NH, batch.targets_N, config.sampling_temperature)
    ratio_N = (now_N - batch.sampler_logprobs_N).exp().clamp(max=config.max_importance)
    if config.support != "sampled":
        goes_on_N = batch.loss_rows_N == batch.loss_rows_N.roll(1)
        goes_on_N[0] = False
        ratio_N = torch.where(goes_on_N, ratio_N.roll(1), 1.0)
    return torch.where(lagging_N, ratio_N, 1.0)


def _sum_gradients(stage: Stage, config: TrainConfig, rollouts: Sequence[Rollout]) -> None:
    """Every process gets the sum of all processes' gradients (or its part of the sum, where they are divided)."""
    if not GROUP.shares:
        return
    if is_sharded(stage.student.model):
        # The passes themselves sum, so each process must run as many: those with fewer rows add some of no weight.
        many = [len(_passes(stage, part, config)) for part in _parts(rollouts)]
        one, device = rollouts[:1], stage.working.device
        for _ in range(max(many) - many[GROUP.rank]):
            batch = collate(one, "student", stage.student.pad_id, config.skip_first_tokens, device)
            _pass(stage, config, batch, None, 0.0, torch.zeros_like(batch.weights_N), Clock())
        return
    parameters = list(trainable(stage.student.model).values())
    for parameter in parameters:
        if parameter.grad is None:  # a process without a row
            parameter.grad = torch.zeros_like(parameter)
    add_up([parameter.grad for parameter in parameters if parameter.grad is not None])


def loss_of(stage: Stage, spec: LossSpec, inputs: LossInputs, divergence_N: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch; where two teachers scored it, each part goes through its own teacher's head. Each
    position's divergence goes into ``divergence_N``."""
    head = head_of(stage.student.model)
    if stage.holder is None or inputs.teacher_hidden_NH is None or not len(inputs.targets_N):
        of_teacher = stage.teacher.head if stage.teacher else None
        return chunked_loss(spec, inputs, head, of_teacher, divergence_N=divergence_N)
    total, sums = torch.zeros((), device=inputs.student_hidden_NH.device), dict[str, float]()
    for demonstrated in (True, False):
        rows_C = (inputs.demonstrated_N == demonstrated).nonzero().flatten()
        teacher = stage.teacher_of(demonstrated)
        if not len(rows_C) or teacher is None:
            continue
        found_C = torch.zeros_like(divergence_N[rows_C])
        loss, metrics = chunked_loss(spec, inputs.at(rows_C), head, teacher.head, divergence_N=found_C)
        divergence_N[rows_C] = found_C
        total = total + loss
        sums |= {key: sums.get(key, 0.0) + value for key, value in metrics.items()}
    return total, sums
