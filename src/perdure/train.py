"""THE loop: self-distillation, and supervised fine-tuning as the same loop with another loss and source of completions.

Where it departs from the paper's Algorithm 1, and why (docs/log.md has the numbers):
1. A warm start scores the demonstration's own tokens before the student samples: a cold student's samples teach little.
2. Anchor rows carry no demonstration; there the teacher keeps the student where the last promoted version was.
3. The teacher is frozen for a stage by default (the paper: EMA) and its distribution sharpened on demonstrated rows.
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

from perdure.checkpoint import BEST, checkpoints, load_checkpoint, load_weights, save_checkpoint, save_weights
from perdure.config import TrainConfig
from perdure.contexts import collate, micro_batches, names_the_example
from perdure.evaluate import evaluate
from perdure.fused import LossInputs, chunked_loss
from perdure.losses import LossSpec
from perdure.models import (
    autocast,
    head_of,
    hidden_at_loss_positions,
    linear_parameters,
    sync_weights,
)
from perdure.rollout.base import SamplingParams
from perdure.runlog import Clock, LoopState, Report, RunLog
from perdure.seeds import derive_seed, stream_window
from perdure.stage import Stage
from perdure.types import Example, InputError, Rollout


def train(stage: Stage, config: TrainConfig, report: Report | None = None) -> LoopState:
    """Train until ``config.steps`` or until validation stops improving; the student ends with its best weights.

    Goes on from the run folder's checkpoint when there is one. Raises InputError when the loss is not finite.
    """
    log = RunLog(stage.folder, report)
    optimizer = make_optimizer(stage, config)
    state = resume(stage, optimizer, log)
    kept_scores: dict[Any, Tensor] = {}
    parameters = linear_parameters(stage.student.model)
    while state.step < config.steps and state.stale < config.patience:
        clock, phase = Clock(), phase_of(state, config)
        rows = batch_rows(stage, config, state.step)
        if phase == "on_policy":
            rollouts = sample(stage, config, rows, state)
        else:
            rollouts = [complete(stage, config, row) for row in rows]
        clock.lap("rollout")
        teacher_hidden = score(stage, config, rollouts, kept_scores, state)
        clock.lap("teacher")
        set_learning_rate(optimizer, config, state.step)
        metrics = optimise(stage, config, optimizer, rollouts, teacher_hidden, phase, clock, state)
        sync_weights(stage.working, stage.student.model)
        if stage.teacher:
            stage.teacher.update(stage.student.model)
        clock.lap("optimizer")
        state.step += 1
        if phase == "warm_start" and metrics["demonstration_probability"] >= config.warm_start_until:
            state.warm = False
        line = {"step": state.step, "phase": phase, **metrics, **describe(stage, rollouts, phase)}
        log.metrics(line, {"step": state.step, "phase": phase, "seconds": clock.seconds, "tokens": dict(state.tokens),
                           "parameters": parameters})  # fmt: skip
        log_sample(stage, log, rollouts, state, phase)
        if stage.validation and (state.step % config.validate_every == 0 or state.step == config.steps):
            log.metrics(validate(stage, config, state))
        if state.step % config.checkpoint_every == 0:
            loop = {"state": asdict(state), "positions": log.positions()}
            save_checkpoint(stage.folder, state.step, stage.student.model, optimizer, teacher_state(stage), loop)
    if state.best_step >= 0:
        load_weights(stage.student.model, stage.folder / BEST)
        sync_weights(stage.working, stage.student.model)
    return state


def phase_of(state: LoopState, config: TrainConfig) -> str:
    """``sft``, ``warm_start`` or ``on_policy``."""
    if config.method == "sft":
        return "sft"
    return "warm_start" if state.warm and state.step < config.warm_start_steps else "on_policy"


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


def batch_rows(stage: Stage, config: TrainConfig, step: int) -> list[Example | Rollout]:
    """The rows of one step: examples to learn, and anchors that come with their completion. Depends on (seed, step)."""
    anchors = round(config.batch_size * config.anchor_share)
    # Where there is no earlier skill yet, its part goes to the demonstrations: there is less to hold.
    earlier = round(anchors * config.anchor_earlier_share) if stage.anchors.earlier else 0
    general = anchors - round(anchors * config.anchor_earlier_share) if stage.anchors.general else 0
    picked: list[Example | Rollout] = []
    for name, pool, count in (
        ("demonstrations", stage.examples, config.batch_size - earlier - general),
        ("earlier", stage.anchors.earlier, earlier),
        ("general", stage.anchors.general, general),
    ):
        if count:
            places = stream_window(derive_seed(stage.seed, "batch", name), len(pool), step * count, count)
            picked += [pool[place] for place in places]
    return picked


def complete(stage: Stage, config: TrainConfig, row: Example | Rollout) -> Rollout:
    """The warm start and SFT: the demonstration's own tokens are the completion. SFT has no teacher for such a row."""
    if isinstance(row, Rollout):
        return row
    template = None if config.method == "sft" else stage.template
    return stage.renderer.rollout(row, stage.renderer.demonstration(row), template)


def sample(stage: Stage, config: TrainConfig, rows: Sequence[Example | Rollout], state: LoopState) -> list[Rollout]:
    """On-policy: the student answers each example itself, seeing only the prompt."""
    examples = [row for row in rows if isinstance(row, Example)]
    params = SamplingParams(stage.max_new_tokens, config.sampling_temperature)
    seeds = [derive_seed(stage.seed, "rollout", state.step, index) for index in range(len(examples))]
    prompts = [stage.renderer.student_prompt(e) for e in examples]
    references = [stage.renderer.demonstration(e).token_ids for e in examples]
    completions = stage.engine.generate(prompts, params, seeds, references=references)
    state.tokens["rollout"] += sum(len(c.token_ids) for c in completions)
    sampled = [stage.renderer.rollout(e, c, stage.template) for e, c in zip(examples, completions, strict=True)]
    return sampled + [row for row in rows if isinstance(row, Rollout)]


def score(stage: Stage, config: TrainConfig, rollouts: Sequence[Rollout], kept: dict[Any, Tensor],
          state: LoopState) -> list[Tensor] | None:  # fmt: skip
    """The teacher's hidden states of each rollout, [N_i, H]; None when no row needs a teacher.

    What a fixed teacher said of a row that recurs is kept. Such a row is scored alone: its bits then do not depend on
    its neighbours, and a resumed run, which kept nothing, gets the same."""
    if stage.teacher is None or (config.method == "sft" and all(r.has_demonstration for r in rollouts)):
        return None
    width, together = stage.teacher.head.weight_VH.shape[1], []
    result: dict[int, Tensor] = {}
    for index, rollout in enumerate(rollouts):
        if config.method == "sft" and rollout.has_demonstration:
            # Its loss does not look at the teacher; the zeros only hold the place.
            result[index] = torch.zeros(loss_tokens(rollout, config), width, dtype=stage.dtype)
        elif not stage.teacher.moves and recurs(stage, config, rollout):
            key = (rollout.teacher_prompt.token_ids, rollout.completion.token_ids)
            if key not in kept:
                (kept[key],) = score_group(stage, config, [rollout], state)
            result[index] = kept[key]
        else:
            together.append(index)
    lengths = [len(r.teacher_prompt.token_ids) + len(r.completion.token_ids) for r in rollouts]
    for group in micro_batches(together, lengths, config.micro_batch_tokens):
        result |= zip(group, score_group(stage, config, [rollouts[i] for i in group], state), strict=True)
    return [result[i] for i in range(len(rollouts))]


def recurs(stage: Stage, config: TrainConfig, rollout: Rollout) -> bool:
    """True for a row that comes again with the same tokens: an anchor, or a completion that is the demonstration where
    the warm start goes through the examples more than once."""
    if not rollout.has_demonstration:
        return True
    warm_rows = config.warm_start_steps * config.batch_size * (1 - config.anchor_share)
    return warm_rows > len(stage.examples) and says_demonstration(stage, rollout)


def says_demonstration(stage: Stage, rollout: Rollout) -> bool:
    """Whether the completion is the demonstration, token by token."""
    demonstration = stage.renderer.demonstration(rollout.student_prompt.example)
    return demonstration.token_ids == rollout.completion.token_ids


def score_group(stage: Stage, config: TrainConfig, rollouts: Sequence[Rollout], state: LoopState) -> list[Tensor]:
    """One forward pass of the teacher; the hidden states of each rollout."""
    assert stage.teacher is not None
    batch = collate(rollouts, "teacher", stage.student.pad_id, config.skip_first_tokens)
    state.tokens["teacher"] += int(batch.attention_mask_BT.sum())
    return list(stage.teacher.score(batch).split([loss_tokens(r, config) for r in rollouts]))


def loss_tokens(rollout: Rollout, config: TrainConfig) -> int:
    """Tokens of the completion that carry loss."""
    return max(0, len(rollout.completion.token_ids) - config.skip_first_tokens)


def optimise(stage: Stage, config: TrainConfig, optimizer: torch.optim.Optimizer,
             rollouts: Sequence[Rollout], teacher_hidden: list[Tensor] | None, phase: str, clock: Clock,
             state: LoopState) -> dict[str, Any]:  # fmt: skip
    """One optimizer step: sums over all tokens, divided once by their number, whatever the micro-batches."""
    model = stage.student.model
    spec = LossSpec(config.divergence, config.support, config.jsd_beta, config.topk,
                    "nll" if config.method == "sft" else "divergence")  # fmt: skip
    count = sum(loss_tokens(r, config) for r in rollouts)
    if count == 0:
        raise InputError("no token of this batch carries loss: lower train.skip_first_tokens")
    sums: dict[str, float] = {"loss": 0.0}
    lengths = [len(r.student_prompt.token_ids) + len(r.completion.token_ids) for r in rollouts]
    for group in micro_batches(range(len(rollouts)), lengths, config.micro_batch_tokens):
        batch = collate([rollouts[i] for i in group], "student", stage.student.pad_id, config.skip_first_tokens)
        with autocast(stage.dtype):
            student_NH = hidden_at_loss_positions(model, batch).to(stage.dtype)
        clock.lap("forward")
        teacher_NH = torch.cat([teacher_hidden[i] for i in group]) if teacher_hidden is not None else None
        if spec.demonstrated == "nll" and bool(batch.demonstrated_N.all()):
            teacher_NH = None
        # Divided before the sum, once, by the global count: the head's gradient then needs no pass of its own for it.
        inputs = LossInputs(student_NH, teacher_NH, batch.targets_N, batch.weights_N / count, batch.demonstrated_N,
                            config.teacher_temperature)  # fmt: skip
        loss, metrics = chunked_loss(spec, inputs, head_of(model), stage.teacher.head if stage.teacher else None)
        clock.lap("loss")
        loss.backward()
        clock.lap("backward")
        sums["loss"] += float(loss.detach())
        sums |= {key: sums.get(key, 0.0) + value for key, value in metrics.items()}
        state.tokens["student"] += int(batch.attention_mask_BT.sum())
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
    if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
        raise InputError(f"the loss is not finite at step {state.step + 1}: lower train.learning_rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    own = "sample_probability" if phase == "on_policy" else "demonstration_probability"
    return {
        "loss": sums["loss"],
        "entropy": sums["entropy"] / count,
        own: sums["demonstrated_target_probability"] / max(1.0, sums["demonstrated_tokens"]),
        "grad_norm": norm,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "loss_tokens": count,
    }


def describe(stage: Stage, rollouts: Sequence[Rollout], phase: str) -> dict[str, Any]:
    """What the student's own samples look like; empty where it sampled nothing."""
    own = [r for r in rollouts if r.has_demonstration]
    described = {"completion_length": sum(len(r.completion.token_ids) for r in own) / max(1, len(own))}
    if phase != "on_policy" or not own:
        return described
    same = [says_demonstration(stage, r) for r in own]
    leaks = [names_the_example(stage.renderer.text(r.completion)) for r in own]
    return described | {
        "truncated_share": sum(not r.completion.finished for r in own) / len(own),
        "acceptance": sum(same) / len(own),
        "leak_share": sum(leaks) / len(own),
    }


def log_sample(stage: Stage, log: RunLog, rollouts: Sequence[Rollout], state: LoopState, phase: str) -> None:
    """Keep the step's first demonstrated row, for people to read."""
    row = next((r for r in rollouts if r.has_demonstration), None)
    if row is None or phase != "on_policy":
        return
    example = row.student_prompt.example
    log.sample({
        "step": state.step,
        "phase": phase,
        "prompt": str(example.messages[-1].get("content") or ""),
        "completion": stage.renderer.text(row.completion),
        "demonstration": stage.renderer.demonstration_text(example),
    })  # fmt: skip


def teacher_state(stage: Stage) -> dict[str, Tensor]:
    return stage.teacher.state() if stage.teacher else {}


def validate(stage: Stage, config: TrainConfig, state: LoopState) -> dict[str, Any]:
    """Accuracy on the validation rows, drift on the general anchors; the best weights so far are kept on disk."""
    result = evaluate(stage.engine, stage.renderer, "validation", stage.validation, stage.grader, stage.max_new_tokens)
    state.tokens["evaluate"] += sum(item.tokens for item in result.items)
    if result.accuracy >= state.best_accuracy:
        # On a tie the later weights are kept, but only a better accuracy counts as progress.
        state.stale = 0 if result.accuracy > state.best_accuracy else state.stale + 1
        state.best_accuracy, state.best_step = result.accuracy, state.step
        save_weights(stage.student.model, stage.folder / BEST)
    else:
        state.stale += 1
    drift = anchor_drift(stage)
    return {"step": state.step, "validation_accuracy": result.accuracy, "validation_n": result.n, "kl_start": drift}


@torch.no_grad()
def anchor_drift(stage: Stage, rows: int = 16) -> float | None:
    """Mean KL(start || now) per token on the first general anchors: how far the stage has moved the rest.

    None without anchors or with a teacher that is not the stage's first weights."""
    rollouts = stage.anchors.general[:rows]
    if not rollouts or stage.teacher is None or not stage.teacher.is_start:
        return None
    batch = collate(rollouts, "student", stage.student.pad_id)
    inputs = LossInputs(hidden_at_loss_positions(stage.working, batch), stage.teacher.score(batch), batch.targets_N,
                        batch.weights_N, batch.demonstrated_N)  # fmt: skip
    total, _ = chunked_loss(LossSpec(), inputs, head_of(stage.working), stage.teacher.head)
    return float(total) / len(batch.targets_N)
