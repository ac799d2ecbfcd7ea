"""THE loop: self-distillation, and every other method as the same loop with other rows (rows.py) and losses.

Where it departs from the paper's Algorithm 1, and why (docs/log.md has the numbers):
1. A warm start scores the demonstration's own tokens before the student samples: a cold student's samples teach little.
2. Anchor rows carry no demonstration; there the teacher keeps the student where the last promoted version was.
3. The original model teaches by default (the paper: an EMA), and its distribution is sharpened on demonstrated rows.
   Whatever it is, anchor rows are scored by the weights that the stage started from.
4. Forward KL, as in the authors' code and all their numbers; the paper's text prints the reverse.
5. Importance weights only where the sampler lags behind (train.overlap, train.update_sampler_every): else it is the
   student itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perdure.adapters import adapted
from perdure.ahead import Ahead
from perdure.batching import collate, passes
from perdure.checkpoint import BEST, load_checkpoint, load_weights, newest, save_checkpoint
from perdure.config import TrainConfig
from perdure.guidance import described
from perdure.methods import METHODS
from perdure.models import linear_parameters, sync_weights
from perdure.monitor import describe, log_sample, measures_start, validate
from perdure.processes import barrier, from_lead, gather
from perdure.rows import answers_of, phase_of, recurs, step_rollouts
from perdure.runlog import Clock, LoopState, Report, RunLog
from perdure.seeds import derive_seed
from perdure.sharding import recomputed, sharded
from perdure.stage import Stage
from perdure.teacher import Teacher
from perdure.types import InputError, Rollout
from perdure.update import loss_tokens, make_optimizer, optimise, own_rows, set_learning_rate

TELLING_ROWS = 16
"""Validation rows that must be right before a stage ends for it: of fewer, all may be right by chance (all of 16 speak
for an accuracy of at least 0.83, 95 % one-sided)."""


def train(stage: Stage, config: TrainConfig, report: Report | None = None) -> LoopState:
    """Train until ``config.steps`` or until validation stops improving; the student ends with its best weights.

    Goes on from the run folder's checkpoint when there is one. Raises InputError when the loss is not finite.
    """
    masters = stage.student.model
    with (
        adapted(masters, stage.working, config, derive_seed(stage.seed, "adapter"), folder=stage.folder) as model,
        recomputed(model, config.activation_checkpointing),
        sharded(model, config.fsdp, stage.dtype, config.fsdp_offload) as student,
    ):
        if stage.teacher:
            stage.teacher.follow(student)
        state = loop(replace(stage, student=replace(stage.student, model=student)), config, report)
    sync_weights(stage.working, masters)
    return state


def loop(stage: Stage, config: TrainConfig, report: Report | None) -> LoopState:
    """The loop itself, on the student as it is: plain, or with adapters."""
    log = RunLog(stage.folder, report)
    optimizer = make_optimizer(stage, config)
    ahead = Ahead(config.overlap)
    state = resume(stage, optimizer, log, ahead)
    kept_scores: dict[Any, Tensor] = {}
    if stage.acting and (config.overlap or config.update_sampler_every > 1):
        used = "overlap" if config.overlap else "update_sampler_every"
        raise InputError(
            f"train.{used}: in an environment the weights of each step play its conversations; leave it out"
        )
    parameters = linear_parameters(stage.student.model)
    if state.step == 0 and measures_start(stage, config):
        log.metrics(validate(stage, config, state))
        state = from_lead(state)
    while state.step < config.steps and not _done(stage, config, state):
        clock, phase = Clock(), phase_of(state, config)
        if phase == "re_invoke" and state.step == config.steps - config.reinvoke_steps:
            state.best_accuracy = -1.0  # the weights to end with are those of this phase
        rollouts = step_rollouts(stage, config, phase, state, ahead.take(state.step))
        if phase == "on_policy" and state.step + 1 < config.steps:
            ahead.begin(state.step + 1, partial(answers_of, stage, config, state.step + 1, state.first_own))
        clock.lap("rollout")
        own = own_rows(rollouts)
        before = dict(state.tokens)
        teacher_hidden = score(stage, config, own, kept_scores, state)
        clock.lap("teacher")
        set_learning_rate(optimizer, config, state.step)
        metrics = optimise(stage, config, optimizer, own, teacher_hidden, phase, clock, state, rollouts)
        state.tokens = {part: before[part] + sum(tokens[part] - before[part] for tokens in gather(state.tokens))
                        for part in before}  # fmt: skip
        ahead.wait()
        if stage.student.model is not stage.working:  # adapters train on the working copy itself
            sync_weights(stage.working, stage.student.model)
        if stage.teacher:
            stage.teacher.update(stage.student.model)
        clock.lap("optimizer")
        state.step += 1
        knows = metrics.get("demonstration_probability", 0.0) >= config.warm_start_until
        early = config.validate_until <= 1 and knows and not state.known
        due = early or state.step % config.validate_every == 0 or state.step == config.steps
        state.known, state.warm = state.known or knows, state.warm and not (knows and phase == "warm_start")
        line = {"step": state.step, "phase": phase, **metrics, **describe(stage, rollouts, phase)}
        line |= described(state.allotted)
        log.metrics(line, {"step": state.step, "phase": phase, "seconds": clock.seconds, "tokens": dict(state.tokens),
                           "parameters": parameters})  # fmt: skip
        log_sample(stage, log, rollouts, state, phase)
        if stage.validation and due:
            log.metrics(validate(stage, config, state))
            state = from_lead(state)
        if state.step % config.checkpoint_every == 0:
            kept = {"state": asdict(state), "positions": log.positions(), "ahead": ahead.state()}
            save_checkpoint(stage.folder, state.step, stage.student.model, optimizer, teacher_state(stage), kept)
    ahead.close()
    if state.best_step >= 0:
        barrier()  # the lead has written them
        load_weights(stage.student.model, stage.folder / BEST)
    return state


def _done(stage: Stage, config: TrainConfig, state: LoopState) -> bool:
    """Whether validation says that more steps would be of no use, or have gone too far."""
    enough = state.step > 0 and len(stage.validation) >= TELLING_ROWS
    learned = enough and state.best_accuracy >= config.validate_until
    return state.strayed or ((learned or state.stale >= config.patience) and not METHODS[config.method].reinvoked)


def resume(stage: Stage, optimizer: torch.optim.Optimizer, log: RunLog, ahead: Ahead) -> LoopState:
    """The state of the run folder's checkpoint, or a fresh one."""
    found = from_lead(newest(stage.folder))
    if found is None:
        log.rewind({})
        return LoopState()
    loop, teacher = load_checkpoint(found, stage.student.model, optimizer)
    if stage.teacher:
        stage.teacher.load_state(teacher)
    if stage.student.model is not stage.working:
        sync_weights(stage.working, stage.student.model)
    log.rewind(loop["positions"])
    ahead.load_state(loop.get("ahead"))
    return LoopState(**loop["state"])


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
                loss_tokens(rollout, config), width, dtype=stage.dtype, device=stage.working.device
            )
        elif not teacher.moves and not fresh and recurs(stage, config, rollout):
            key = (rollout.teacher_prompt.token_ids, rollout.completion.token_ids)
            if key not in kept:
                (hidden,) = score_group(teacher, stage, config, [rollout], state)
                kept[key] = hidden.cpu()  # they grow with every row: a GPU has better use for its memory
            result[index] = kept[key].to(stage.working.device)
        else:
            together[rollout.has_demonstration or stage.holder is None].append(index)
    for demonstrated, places in together.items():
        teacher = stage.teacher_of(demonstrated)
        assert teacher is not None
        rows = [rollouts[i] for i in places]
        for group in passes(stage.student.model, rows, "teacher", config.micro_batch_tokens):
            scored = score_group(teacher, stage, config, [rows[i] for i in group], state)
            result |= zip([places[i] for i in group], scored, strict=True)
    return [result[i] for i in range(len(rollouts))]


def score_group(teacher: Teacher, stage: Stage, config: TrainConfig, rollouts: Sequence[Rollout],
                state: LoopState) -> list[Tensor]:  # fmt: skip
    """One forward pass of a teacher; the hidden states of each rollout."""
    batch = collate(rollouts, "teacher", stage.student.pad_id, config.skip_first_tokens, stage.working.device)
    state.tokens["teacher"] += int(batch.attention_mask_BT.sum())
    return list(teacher.score(batch).split([loss_tokens(r, config) for r in rollouts]))


def teacher_state(stage: Stage) -> dict[str, Tensor]:
    return stage.teacher.state() if stage.teacher else {}
