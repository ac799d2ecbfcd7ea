"""What a stage will cost, before it is paid for: a few real steps, answers and probe items are timed and scaled up.

At most: training may stop earlier, when validation no longer improves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from perdure.adapters import adapted
from perdure.anchors import answered, general_for
from perdure.config import CostConfig, RunConfig, TrainConfig
from perdure.evaluate import evaluate
from perdure.measure import way_of
from perdure.methods import METHODS
from perdure.preflight import Preflight
from perdure.probe import probe
from perdure.rows import batch_rows, completed, row_counts
from perdure.runlog import Clock, LoopState
from perdure.scores import known_scores, unmeasured
from perdure.scoring import score
from perdure.session import Session
from perdure.sharding import recomputed
from perdure.skills.base import Skill
from perdure.stage import Anchors
from perdure.staging import make_stage, stage_seed
from perdure.update import loss_tokens, make_optimizer, optimise
from perdure.workspace import Workspace

PROBE_ROWS = 8
"""Items a task that are timed."""
EVALUATED = 48
"""Training rows that are answered as in an evaluation: enough to fill its batches."""
STEPS = 2
"""Steps that are timed."""
WARM_UP = 4
"""One row of so many makes the step before them, which allocates what the timed ones find."""


def forecast(workspace: Workspace, parent: str, session: Session, skill: Skill, scope: Mapping[str, Skill],
             config: RunConfig, found: Preflight) -> dict[str, Any]:  # fmt: skip
    """``method``, ``seconds`` of each phase that follows the preflight (none with train.fsdp, where a step takes
    several processes), ``tokens`` of training at most, and ``priced`` (see there).

    ``scope``: every skill that will be measured. The session's student is used and comes back bit by bit as it was."""
    earlier = [scope[name] for name in workspace.taught(parent) if name in scope and name != skill.name]
    seconds = {}
    if not config.train.fsdp:  # a model that has to be divided cannot be trained by this process alone
        seconds = {
            "train": _train(session, skill, earlier, config, found),
            "evaluate": _evaluate(workspace, parent, session, skill, scope, config),
            "probe": _probe(workspace, parent, session, config),
        }
    seconds = {phase: round(value, 1) for phase, value in seconds.items() if value}
    tokens = expected_tokens(session, skill, config.train, found, len(earlier))
    return {"method": config.train.method, "seconds": seconds, "tokens": tokens,
            "priced": priced(config.cost, sum(seconds.values()))}  # fmt: skip


def _train(session: Session, skill: Skill, earlier: list[Skill], config: RunConfig, found: Preflight) -> float:
    train = config.train
    general = general_for(train)
    count = round(train.batch_size * train.anchor_share)
    start = time.perf_counter()
    few = answered(session, general[:count], train.anchor_general_tokens, stage_seed(config, skill)) if count else []
    a_general_row = (time.perf_counter() - start) / max(1, count)
    anchor_rows = sum(min(train.anchor_rows, len(other.train)) for other in earlier)
    anchors = a_general_row * len(general) + found.row_seconds["teacher"] * anchor_rows if count else 0.0
    rehearsed = [replace(row, source=other.name) for row, other in zip(cycle(few), earlier, strict=False)]
    stage = make_stage(session, skill, config, Anchors(tuple(rehearsed), tuple(few)), found.template, Path())
    a_step = _step_seconds(stage, train)
    demonstrations = row_counts(train, len(stage.anchors.skills), bool(few))["taught"]
    sampled = _decoded(train, demonstrations, len(stage.examples))
    validated = len(stage.validation) * len(
        {*range(train.validate_every, train.steps + 1, train.validate_every), train.steps}
    )
    # Trained, the student answers as the teacher does.
    return anchors + train.steps * a_step + (sampled + validated) * found.row_seconds["teacher"]


def _decoded(train: TrainConfig, demonstrations: int, rows: int) -> int:
    """Answers to write while, or before, the stage trains, at most."""
    method = METHODS[train.method]
    if method.writes_once:
        return min(rows, train.steps * demonstrations)
    sampling = max(0, train.steps - train.warm_start_steps) if method.completions == "student" else 0
    return round(sampling * demonstrations * train.on_policy_share)


def _step_seconds(stage: Any, train: TrainConfig) -> float:
    """One step on demonstrations and anchors, timed with the loop's own parts at a learning rate of zero."""
    with (
        adapted(stage.student.model, stage.working, train, stage.seed, merge=False) as student,
        recomputed(student, train.activation_checkpointing),
    ):
        return _timed_steps(replace(stage, student=replace(stage.student, model=student)), train)


def _timed_steps(stage: Any, train: TrainConfig) -> float:
    optimizer = make_optimizer(stage, train)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    kept: dict[Any, Any] = {}
    start = 0.0
    for step in range(1 + STEPS):
        if step == 1:
            start = time.perf_counter()
        state = LoopState(step)
        rollouts = completed(stage, train, batch_rows(stage, train, state))
        if step == 0 and any(loss_tokens(row, train) for row in rollouts[::WARM_UP]):
            rollouts = rollouts[::WARM_UP]
        if not any(loss_tokens(row, train) for row in rollouts):
            # The loss is on thinking, and these have none; what the student will write does.
            rollouts = [replace(row, region=None) for row in rollouts]
        hidden = score(stage, train, rollouts, kept, state)
        optimise(stage, train, optimizer, rollouts, hidden, Clock(), state)
    return (time.perf_counter() - start) / STEPS


def _evaluate(workspace: Workspace, parent: str, session: Session, skill: Skill, scope: Mapping[str, Skill],
              config: RunConfig) -> float:  # fmt: skip
    """The candidate on every skill, and the parent on those that it was not measured on yet."""
    known = known_scores(workspace, parent, way_of(config).of(scope.values()))
    missing, _ = unmeasured(known, scope.values(), config)
    rows = {name: len(config.eval.taken(other.test)) for name, other in scope.items()}
    few = skill.train[:EVALUATED]
    start = time.perf_counter()
    evaluate(session.engine, session.renderer, skill.name, few, skill.grade, skill.settings.max_new_tokens,
             acting=skill.acting)  # fmt: skip
    return (time.perf_counter() - start) / len(few) * (sum(rows.values()) + sum(rows[other.name] for other in missing))


def _probe(workspace: Workspace, parent: str, session: Session, config: RunConfig) -> float:
    tasks = config.probe.tasks
    if not tasks:
        return 0.0
    _, before = unmeasured(known_scores(workspace, parent, way_of(config)), (), config)
    taken = []
    for rows in (1, PROBE_ROWS):  # the first one loads data and warms up
        start = time.perf_counter()
        probe(session.working, session.loaded.tokenizer, tasks=tasks, rows=rows, seed=config.seed, key=session.key)
        taken.append(time.perf_counter() - start)
    return (1 + before) * taken[1] * config.probe.rows / PROBE_ROWS


def expected_tokens(session: Session, skill: Skill, train: TrainConfig, found: Preflight,
                    earlier: int) -> dict[str, int]:  # fmt: skip
    """Tokens of training at most, by what reads or writes them; ``earlier``: skills that will be held."""
    rows, renderer = skill.train[: found.n], session.renderer
    turns = renderer.each_turn(rows)
    completion = sum(len(renderer.demonstration(e).token_ids) for e in turns) / len(rows)
    prompt = sum(len(renderer.student_prompt(e).token_ids) for e in turns) / len(rows)
    of_turn = next(score.tokens for score in found.templates if score.template == found.template)
    teacher_prompt = of_turn * len(turns) / len(rows)
    anchored = train.anchor_share > 0
    counts = row_counts(train, earlier if anchored and train.anchor_earlier_share else 0, anchored)
    demonstrations = counts["taught"]
    return {
        "student": round(train.steps * sum(counts.values()) * (prompt + completion)),
        "teacher": round(train.steps * demonstrations * (teacher_prompt + completion)) * METHODS[train.method].shows,
        "rollout": round(_decoded(train, demonstrations, len(skill.train)) * completion),
    }


def priced(config: CostConfig, seconds: float) -> dict[str, Any]:
    """Energy and money of so many seconds at the configured prices, with the prices; empty without any."""
    found: dict[str, Any] = {}
    if config.watts:
        found |= {"watts": config.watts, "energy_kwh": round(config.watts * seconds / 3.6e6, 6)}
    if config.price_per_hour:
        money = round(config.price_per_hour * seconds / 3600, 4)
        found |= {"price_per_hour": config.price_per_hour, "money": money, "currency": config.currency}
    return found
