"""What a stage says of itself while it trains: its samples, its accuracy on validation rows, how far the rest moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from perdure.batching import collate
from perdure.checkpoint import save_best
from perdure.config import TrainConfig
from perdure.evaluate import evaluate
from perdure.fused import LossInputs, chunked_loss
from perdure.losses import LossSpec
from perdure.models import head_of, hidden_at_loss_positions
from perdure.processes import from_lead
from perdure.rows import says_demonstration
from perdure.runlog import LoopState, RunLog
from perdure.stage import Stage
from perdure.stats import one_error_below
from perdure.teacher import Teacher
from perdure.templates import names_the_example
from perdure.thinking import hesitations
from perdure.types import Rollout, SkillScore

DRIFT_ROWS = 16
"""General anchors on which a stage's drift is measured."""


def describe(stage: Stage, rollouts: Sequence[Rollout], phase: str) -> dict[str, Any]:
    """What the student's own samples look like; empty where it sampled nothing."""
    taught = [r for r in rollouts if r.has_demonstration]
    described = {"completion_length": sum(len(r.completion.token_ids) for r in taught) / max(1, len(taught))}
    own = [r for r in taught if r.completion.sampler_logprobs]
    if phase != "on_policy" or not own:
        return described
    leaks = [names_the_example(stage.renderer.text(r.completion)) for r in own]
    return (
        described
        | {
            "truncated_share": sum(not r.completion.finished for r in own) / len(own),
            "leak_share": sum(leaks) / len(own),
        }
        | ({} if stage.acting else {"acceptance": sum(says_demonstration(stage, r) for r in own) / len(own)})
    )


def log_sample(stage: Stage, log: RunLog, rollouts: Sequence[Rollout], state: LoopState, phase: str) -> None:
    """Keep the step's first demonstrated row, for people to read."""
    row = next((r for r in rollouts if r.has_demonstration), None)
    if row is None or phase != "on_policy":
        return
    example = row.student_prompt.example
    log.sample({
        "step": state.step,
        "phase": phase,
        "prompt": example.question,
        "completion": stage.renderer.text(row.completion),
        "demonstration": stage.renderer.demonstration_text(example),
    })  # fmt: skip


def validate(stage: Stage, config: TrainConfig, state: LoopState) -> dict[str, Any]:
    """Accuracy on the validation rows, drift on the general anchors; the best weights so far are kept on disk.

    Of those that so few rows cannot tell from the best, the latest: by one standard error (Breiman et al. 1984), as the
    rows of earlier skills have had more steps there."""
    # Each process grades, and one that graded otherwise (a judge by a model) would save where the others do not.
    result = from_lead(evaluate(stage.engine, stage.renderer, "validation", stage.validation, stage.grader,
                                stage.max_new_tokens, acting=stage.acting))  # fmt: skip
    state.tokens["evaluate"] += sum(item.tokens for item in result.items)
    line = {"step": state.step, "validation_accuracy": result.accuracy, "validation_n": result.n}
    if measures_start(stage, config):
        line |= _manner(stage, result)
        if state.start_length is None:
            state.start_length = line["answer_tokens"]
        change = abs(line["answer_tokens"] / state.start_length - 1)
        state.strayed = 0 < config.max_length_change < change
    if state.strayed:
        line["strayed"] = True
    else:
        _choose(stage, state, result)
    return line | {"kl_start": anchor_drift(stage)}


def _choose(stage: Stage, state: LoopState, result: SkillScore) -> None:
    """Keep this step's weights where validation cannot tell them from the best; only what is better is progress."""
    state.stale = 0 if result.accuracy > state.best_accuracy else state.stale + 1
    state.best_accuracy = max(state.best_accuracy, result.accuracy)
    if result.accuracy >= one_error_below(state.best_accuracy, result.n):
        state.best_step = state.step
        save_best(stage.student.model, stage.folder, state.step)


def measures_start(stage: Stage, config: TrainConfig) -> bool:
    """Whether the answers before the first step are looked at, too: for what must not change by training."""
    return bool(stage.validation) and (config.max_length_change > 0 or stage.renderer.marks is not None)


def _manner(stage: Stage, result: SkillScore) -> dict[str, float]:
    """Mean length of the answers in tokens; of a model that thinks also the words of hesitation in an answer."""
    found = {"answer_tokens": sum(item.tokens for item in result.items) / result.n}
    marks = stage.renderer.marks
    if marks and not stage.acting:  # a played conversation is one text of many turns
        thinking = [marks.split(item.completion)[0] for item in result.items]
        found["hesitations"] = sum(hesitations(text, stage.renderer.hesitations) for text in thinking) / result.n
    return found


def said_of_manner(lines: Sequence[dict[str, Any]], limit: float) -> str | None:
    """One sentence on how the answers to the validation rows changed, from a stage's metrics; None where it was not
    measured."""
    measured = [line for line in lines if "answer_tokens" in line]
    if len(measured) < 2:
        return None
    first, last = measured[0], measured[-1]
    said = f"Answers: {first['answer_tokens']:.0f} tokens before, {last['answer_tokens']:.0f} at step {last['step']}"
    if "hesitations" in last:
        said += f"; words of hesitation in one {first['hesitations']:.1f} and {last['hesitations']:.1f}"
    if last.get("strayed"):
        said += f". The stage ended there: they may change by {limit:.0%} (train.max_length_change)"
    return said + "."


@torch.no_grad()
def anchor_drift(stage: Stage, rows: int = DRIFT_ROWS) -> float | None:
    """Mean KL(start || now) per token on the first general anchors: how far the stage has moved the rest.

    None without anchors."""
    rollouts = stage.anchors.general[:rows]
    start = stage.teacher_of(demonstrated=False)
    if not rollouts or start is None or not start.is_start:
        return None
    return drift(rollouts, stage.working, start, stage.student.pad_id)


@torch.no_grad()
def drift(rollouts: Sequence[Rollout], now: Any, start: Teacher, pad_id: int) -> float:
    """Mean KL(start || now) a token, nats, over the rollouts' completions under the student's prompts."""
    batch = collate(rollouts, "student", pad_id, device=now.device)
    inputs = LossInputs(hidden_at_loss_positions(now, batch), start.score(batch), batch.targets_N, batch.weights_N,
                        batch.demonstrated_N)  # fmt: skip
    total, _ = chunked_loss(LossSpec(), inputs, head_of(now), start.head)
    return float(total) / len(batch.targets_N)
