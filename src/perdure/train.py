"""THE loop: self-distillation, and every other method as the same loop with other rows (rows.py) and losses.

Where it departs from the paper's Algorithm 1, and why (docs/log.md has the numbers):
1. A warm start scores the demonstration's own tokens before the student samples: a cold student's samples teach little.
2. Anchor rows carry no demonstration; there the teacher keeps the student where the last promoted version was.
3. The original model teaches by default (the paper: an EMA), and its distribution is sharpened on demonstrated rows.
   Whatever it is, anchor rows are scored by the weights that the stage started from. The demonstration's next token is
   half of the target as long as the completion follows the demonstration.
4. Forward KL, as in the authors' code and all their numbers; the paper's text prints the reverse.
5. Importance weights only where the sampler lags behind (train.overlap, train.update_sampler_every): else it is the
   student itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perdure.adapters import adapted
from perdure.ahead import Ahead
from perdure.checkpoint import best_of, load_checkpoint, load_weights, newest, save_checkpoint
from perdure.config import TrainConfig
from perdure.guidance import described
from perdure.methods import METHODS
from perdure.models import linear_parameters, sync_weights
from perdure.monitor import describe, log_sample, measures_start, validate
from perdure.processes import barrier, from_lead, gather
from perdure.rows import answers_of, phase_of, step_rollouts
from perdure.runlog import Clock, LoopState, Report, RunLog
from perdure.scoring import score
from perdure.seeds import derive_seed
from perdure.sharding import recomputed, sharded
from perdure.stage import Stage
from perdure.types import InputError, Rollout
from perdure.update import make_optimizer, optimise, set_learning_rate

LIKELY = 0.98
"""Mean probability of a demonstration token at which a stage that may end early looks whether its rows are right."""
TELLING_ROWS = 16
"""Validation rows that must be right before a stage ends for it: of fewer, all may be right by chance (all of 16 speak
for an accuracy of at least 0.83, 95 % one-sided)."""


def train(stage: Stage, config: TrainConfig, report: Report | None = None) -> LoopState:
    """Train until ``config.steps`` or until validation stops improving; the student ends with its best weights
    (``monitor.validate``).

    Goes on from the run folder's checkpoint when there is one. Raises InputError when the loss is not finite.
    """
    _check_environment(stage, config)
    masters = stage.student.model
    with (
        adapted(masters, stage.working, config, derive_seed(stage.seed, "adapter"), folder=stage.folder) as model,
        recomputed(model, config.activation_checkpointing),
        sharded(model, config.fsdp, stage.dtype, config.fsdp_offload, stage.working.device) as student,
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
    parameters = linear_parameters(stage.student.model)
    if state.step == 0 and measures_start(stage, config):
        state = _validate(stage, config, state, log)
    while state.step < config.steps and not _done(stage, config, state):
        clock, phase = Clock(), phase_of(state, config)
        rollouts = _rollouts(stage, config, phase, state, ahead)
        clock.lap("rollout")
        before = dict(state.tokens)
        teacher_hidden = score(stage, config, rollouts, kept_scores, state)
        clock.lap("teacher")
        set_learning_rate(optimizer, config, state.step)
        metrics = optimise(stage, config, optimizer, rollouts, teacher_hidden, clock, state)
        _count_everywhere(state, before)
        ahead.wait()
        _follow(stage)
        clock.lap("optimizer")
        due = _advance(state, config, phase, metrics)
        timings = {"seconds": clock.seconds, "tokens": dict(state.tokens), "parameters": parameters}
        _record(stage, log, state, phase, rollouts, metrics, timings)
        if stage.validation and due:
            state = _validate(stage, config, state, log)
        if state.step % config.checkpoint_every == 0:
            kept = {"state": asdict(state), "positions": log.positions(), "ahead": ahead.state()}
            teacher = stage.teacher.state() if stage.teacher else {}
            save_checkpoint(stage.folder, state.step, stage.student.model, optimizer, teacher, kept)
    ahead.close()
    if state.best_step >= 0:
        barrier()  # the lead has written them
        load_weights(stage.student.model, best_of(stage.folder, state.best_step))
    return state


def _rollouts(stage: Stage, config: TrainConfig, phase: str, state: LoopState, ahead: Ahead) -> list[Rollout]:
    """The rows of this step; those of the next begin to be answered where the student answers ahead."""
    if phase == "re_invoke" and state.step == config.steps - config.reinvoke_steps:
        state.best_accuracy = -1.0  # the weights to end with are those of this phase
    rollouts = step_rollouts(stage, config, phase, state, ahead.take(state.step))
    if phase == "on_policy" and state.step + 1 < config.steps:
        ahead.begin(state.step + 1, partial(answers_of, stage, config, state.step + 1, state.first_own))
    return rollouts


def _count_everywhere(state: LoopState, before: Mapping[str, int]) -> None:
    """Each process counted the tokens of its own rows since ``before``: the sum over all."""
    every = gather(state.tokens)
    state.tokens = {part: count + sum(tokens[part] - count for tokens in every) for part, count in before.items()}


def _follow(stage: Stage) -> None:
    """Those that follow the student, once its weights have moved: its copy for decoding, and a teacher that moves."""
    if stage.student.model is not stage.working:  # adapters train on the working copy itself
        sync_weights(stage.working, stage.student.model)
    if stage.teacher:
        stage.teacher.update(stage.student.model)


def _advance(state: LoopState, config: TrainConfig, phase: str, metrics: Mapping[str, float]) -> bool:
    """Count the step, and end the warm start once the demonstrations are likely; whether validation is due."""
    state.step += 1
    probability = metrics.get("demonstration_probability", 0.0)
    knows = probability >= min(LIKELY, config.warm_start_until)
    early = config.validate_until <= 1 and knows and not state.known
    state.known = state.known or knows
    state.warm = state.warm and not (phase == "warm_start" and probability >= config.warm_start_until)
    return early or state.step % config.validate_every == 0 or state.step == config.steps


def _record(stage: Stage, log: RunLog, state: LoopState, phase: str, rollouts: Sequence[Rollout],
            metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> None:  # fmt: skip
    """A line of metrics, one of timings, and a sample to read."""
    line = {"step": state.step, "phase": phase}
    about = {**describe(stage, rollouts, phase), **described(state.allotted)}
    log.metrics({**line, **metrics, **about}, {**line, **timings})
    log_sample(stage, log, rollouts, state, phase)


def _validate(stage: Stage, config: TrainConfig, state: LoopState, log: RunLog) -> LoopState:
    log.metrics(validate(stage, config, state))
    return from_lead(state)


def _check_environment(stage: Stage, config: TrainConfig) -> None:
    if stage.acting and (config.overlap or config.update_sampler_every > 1):
        used = "overlap" if config.overlap else "update_sampler_every"
        raise InputError(
            f"train.{used}: in an environment the weights of each step play its conversations; leave it out"
        )

    if config.max_length_change and not stage.validation:
        raise InputError(
            f"train.max_length_change is measured on validation rows, and {len(stage.examples)} training rows leave "
            "none: bring more, or raise train.validation_share"
        )


def _done(stage: Stage, config: TrainConfig, state: LoopState) -> bool:
    """Whether validation says that more steps would be of no use, or have gone too far."""
    enough = state.best_step > 0 and len(stage.validation) >= TELLING_ROWS
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
