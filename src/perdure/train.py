"""THE loop: self-distillation, and every other method as the same loop with other rows (rows.py) and losses.

Where it departs from the paper's Algorithm 1, and why (docs/log.md has the numbers):
1. A warm start scores the demonstration's own tokens before the student samples: a cold student's samples teach little.
2. Anchor rows carry no demonstration; there the teacher keeps the student where the last promoted version was.
3. The teacher is frozen for a stage by default (the paper: EMA) and its distribution sharpened on demonstrated rows.
   Whatever it is, anchor rows are scored by the weights that the stage started from.
4. Forward KL, as in the authors' code and all their numbers; the paper's text prints the reverse.
5. No importance weights: the sampler is the student itself, in step with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from perdure.adapters import adapted, trainable
from perdure.checkpoint import BEST, checkpoints, load_checkpoint, load_weights, save_checkpoint
from perdure.config import TrainConfig
from perdure.contexts import collate, micro_batches
from perdure.fused import METRICS, LossInputs, chunked_loss
from perdure.guidance import described, observe
from perdure.losses import LossSpec
from perdure.methods import METHODS
from perdure.models import autocast, head_of, hidden_at_loss_positions, linear_parameters, sync_weights
from perdure.monitor import describe, log_sample, validate
from perdure.processes import GROUP, add_up, barrier, dealt, from_lead, gather
from perdure.rows import phase_of, recurs, step_rollouts
from perdure.runlog import Clock, LoopState, Report, RunLog
from perdure.seeds import derive_seed
from perdure.stage import Stage
from perdure.teacher import Teacher
from perdure.types import InputError, Rollout


def train(stage: Stage, config: TrainConfig, report: Report | None = None) -> LoopState:
    """Train until ``config.steps`` or until validation stops improving; the student ends with its best weights.

    Goes on from the run folder's checkpoint when there is one. Raises InputError when the loss is not finite.
    """
    with adapted(stage.student.model, config, derive_seed(stage.seed, "adapter")):
        state = loop(stage, config, report)
    sync_weights(stage.working, stage.student.model)
    return state


def loop(stage: Stage, config: TrainConfig, report: Report | None) -> LoopState:
    """The loop itself, on the student as it is: plain, or with adapters."""
    log = RunLog(stage.folder, report)
    optimizer = make_optimizer(stage, config)
    state = resume(stage, optimizer, log)
    kept_scores: dict[Any, Tensor] = {}
    parameters = linear_parameters(stage.student.model)
    while state.step < config.steps and (state.stale < config.patience or METHODS[config.method].reinvoked):
        clock, phase = Clock(), phase_of(state, config)
        if phase == "re_invoke" and state.step == config.steps - config.reinvoke_steps:
            state.best_accuracy = -1.0  # the weights to end with are those of this phase
        rollouts = step_rollouts(stage, config, phase, state)
        clock.lap("rollout")
        own = [rollouts[place] for place in dealt([row_tokens(r) for r in rollouts])[GROUP.rank]]
        before = dict(state.tokens)
        teacher_hidden = score(stage, config, own, kept_scores, state)
        clock.lap("teacher")
        set_learning_rate(optimizer, config, state.step)
        count = sum(loss_tokens(r, config) for r in rollouts)
        metrics = optimise(stage, config, optimizer, own, teacher_hidden, phase, clock, state, count)
        state.tokens = {part: before[part] + sum(tokens[part] - before[part] for tokens in gather(state.tokens))
                        for part in before}  # fmt: skip
        sync_weights(stage.working, stage.student.model)
        if stage.teacher:
            stage.teacher.update(stage.student.model)
        clock.lap("optimizer")
        state.step += 1
        if phase == "warm_start" and metrics["demonstration_probability"] >= config.warm_start_until:
            state.warm = False
        line = {"step": state.step, "phase": phase, **metrics, **describe(stage, rollouts, phase)}
        line |= described(state.held)
        log.metrics(line, {"step": state.step, "phase": phase, "seconds": clock.seconds, "tokens": dict(state.tokens),
                           "parameters": parameters})  # fmt: skip
        log_sample(stage, log, rollouts, state, phase)
        if stage.validation and (state.step % config.validate_every == 0 or state.step == config.steps):
            log.metrics(validate(stage, config, state))
            state = from_lead(state)
        if state.step % config.checkpoint_every == 0 and GROUP.lead:
            loop = {"state": asdict(state), "positions": log.positions()}
            save_checkpoint(stage.folder, state.step, stage.student.model, optimizer, teacher_state(stage), loop)
    if state.best_step >= 0:
        barrier()  # the lead has written them
        load_weights(stage.student.model, stage.folder / BEST)
    return state


def resume(stage: Stage, optimizer: torch.optim.Optimizer, log: RunLog) -> LoopState:
    """The state of the run folder's checkpoint, or a fresh one."""
    found = checkpoints(stage.folder)
    if not found:
        log.rewind({})
        return LoopState()
    loop, teacher = load_checkpoint(found[-1], stage.student.model, optimizer)
    if stage.teacher:
        stage.teacher.load_state(teacher)
    sync_weights(stage.working, stage.student.model)
    log.rewind(loop["positions"])
    return LoopState(**loop["state"])


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


def score(stage: Stage, config: TrainConfig, rollouts: Sequence[Rollout], kept: dict[Any, Tensor],
          state: LoopState) -> list[Tensor] | None:  # fmt: skip
    """The teacher's hidden states of each rollout, [N_i, H]; None when no row needs a teacher.

    What a fixed teacher said of a row that recurs is kept. Such a row is scored alone: its bits then do not depend on
    its neighbours, and a resumed run, which kept nothing, gets the same."""
    if stage.teacher is None or all(r.weight == 0 for r in rollouts):
        return None
    fresh = phase_of(state, config) == "re_invoke"  # rows that are new each time
    width = stage.teacher.head.weight_VH.shape[1]
    together: dict[bool, list[int]] = {True: [], False: []}
    result: dict[int, Tensor] = {}
    for index, rollout in enumerate(rollouts):
        teacher = stage.teacher_of(rollout.has_demonstration)
        assert teacher is not None
        if rollout.weight == 0:
            # Its loss does not look at the teacher; the zeros only hold the place.
            result[index] = torch.zeros(
                loss_tokens(rollout, config), width, dtype=stage.dtype, device=stage.student.device
            )
        elif not teacher.moves and not fresh and recurs(stage, config, rollout):
            key = (rollout.teacher_prompt.token_ids, rollout.completion.token_ids)
            if key not in kept:
                (kept[key],) = score_group(teacher, stage, config, [rollout], state)
            result[index] = kept[key]
        else:
            together[rollout.has_demonstration or stage.holder is None].append(index)
    lengths = [len(r.teacher_prompt.token_ids) + len(r.completion.token_ids) for r in rollouts]
    for demonstrated, rows in together.items():
        teacher = stage.teacher_of(demonstrated)
        assert teacher is not None
        for group in micro_batches(rows, lengths, config.micro_batch_tokens):
            scored = score_group(teacher, stage, config, [rollouts[i] for i in group], state)
            result |= zip(group, scored, strict=True)
    return [result[i] for i in range(len(rollouts))]


def score_group(teacher: Teacher, stage: Stage, config: TrainConfig, rollouts: Sequence[Rollout],
                state: LoopState) -> list[Tensor]:  # fmt: skip
    """One forward pass of a teacher; the hidden states of each rollout."""
    batch = collate(rollouts, "teacher", stage.student.pad_id, config.skip_first_tokens, stage.student.device)
    state.tokens["teacher"] += int(batch.attention_mask_BT.sum())
    return list(teacher.score(batch).split([loss_tokens(r, config) for r in rollouts]))


def row_tokens(rollout: Rollout) -> int:
    """Tokens that the student reads, and a teacher with a longer prompt more."""
    return len(rollout.teacher_prompt.token_ids) + len(rollout.completion.token_ids)


def loss_tokens(rollout: Rollout, config: TrainConfig) -> int:
    """Tokens of the completion that carry loss."""
    return max(0, len(rollout.completion.token_ids) - config.skip_first_tokens)


def optimise(stage: Stage, config: TrainConfig, optimizer: torch.optim.Optimizer,
             rollouts: Sequence[Rollout], teacher_hidden: list[Tensor] | None, phase: str, clock: Clock,
             state: LoopState, count: int | None = None) -> dict[str, Any]:  # fmt: skip
    """One optimizer step: sums over all tokens, divided once by their number, whatever the micro-batches and processes.

    ``count``: loss tokens of the whole step, where ``rollouts`` are only this process's part of it."""
    model = stage.student.model
    method = METHODS[config.method]
    spec = LossSpec(config.divergence, config.support, config.jsd_beta, config.topk,
                    "dft" if method.loss == "dft" else "nll")  # fmt: skip
    sharpness = config.teacher_temperature if method.shows else 1.0
    count = sum(loss_tokens(r, config) for r in rollouts) if count is None else count
    if count == 0:
        raise InputError("no token of this batch carries loss: lower train.skip_first_tokens")
    sums: dict[str, float] = dict.fromkeys(("loss", *METRICS), 0.0)
    divergences: dict[int, float] = {}
    lengths = [len(r.student_prompt.token_ids) + len(r.completion.token_ids) for r in rollouts]
    for group in micro_batches(range(len(rollouts)), lengths, config.micro_batch_tokens):
        batch = collate([rollouts[i] for i in group], "student", stage.student.pad_id, config.skip_first_tokens,
                        stage.student.device)  # fmt: skip
        with autocast(stage.dtype, stage.student.device):
            student_NH = hidden_at_loss_positions(model, batch).to(stage.dtype)
        clock.lap("forward")
        teacher_NH = torch.cat([teacher_hidden[i] for i in group]) if teacher_hidden is not None else None
        # Divided before the sum, once, by the global count: the head's gradient then needs no pass of its own for it.
        inputs = LossInputs(student_NH, teacher_NH, batch.targets_N, batch.weights_N / count, batch.demonstrated_N,
                            sharpness, batch.label_weights_N / count)  # fmt: skip
        divergence_N = torch.zeros_like(batch.weights_N)
        loss, metrics = loss_of(stage, spec, inputs, divergence_N)
        clock.lap("loss")
        loss.backward()
        clock.lap("backward")
        taken = divergence_N.split([loss_tokens(rollouts[i], config) for i in group])
        divergences |= {i: float(d_N.mean()) if len(d_N) else 0.0 for i, d_N in zip(group, taken, strict=True)}
        sums["loss"] += float(loss.detach())
        sums |= {key: sums[key] + value for key, value in metrics.items()}
        state.tokens["student"] += int(batch.attention_mask_BT.sum())
    sum_gradients(model)
    every = gather((sums, [(r.source, divergences[i]) for i, r in enumerate(rollouts) if r.weight]))
    sums = {key: sum(part[key] for part, _ in every) for key in sums}
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
        raise InputError(f"the loss is not finite at step {state.step + 1}: lower train.learning_rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    observe(state.held, [pair for _, pairs in every for pair in pairs])
    found = {
        "loss": sums["loss"],
        "entropy": sums["entropy"] / count,
        "grad_norm": norm,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "loss_tokens": count,
    }
    if tokens := sums["demonstrated_tokens"]:
        own = "sample_probability" if phase == "on_policy" else "demonstration_probability"
        found[own] = sums["demonstrated_target_probability"] / tokens
    return found


def sum_gradients(model: Any) -> None:
    """Every process gets the sum of all processes' gradients."""
    parameters = list(trainable(model).values())
    if GROUP.shares:
        for parameter in parameters:
            if parameter.grad is None:  # a process without a row
                parameter.grad = torch.zeros_like(parameter)
        add_up([parameter.grad for parameter in parameters if parameter.grad is not None])


def loss_of(stage: Stage, spec: LossSpec, inputs: LossInputs, divergence_N: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch; where two teachers scored it, each part goes through its own teacher's head. Each
    position's divergence goes into ``divergence_N``."""
    head = head_of(stage.student.model)
    if stage.holder is None or inputs.teacher_hidden_NH is None:
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


def teacher_state(stage: Stage) -> dict[str, Tensor]:
    return stage.teacher.state() if stage.teacher else {}
