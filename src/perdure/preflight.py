"""Will it work here, and what will it cost? Measured before anything is paid for.

Self-distillation rests on one thing: the demonstration in context makes the model better. So the check answers every
sampled training row without a demonstration (student) and with it, under each context template (teacher).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from perdure.config import ContextConfig, PreflightConfig, TrainConfig
from perdure.contexts import Renderer, Template, collate, names_the_example, parse_template
from perdure.evaluate import Grader, score_prompts
from perdure.losses import LossInputs, LossSpec, chunked_loss
from perdure.models import LoadedModel, autocast, head_of, hidden_at_loss_positions
from perdure.rollout.base import Progress, RolloutEngine
from perdure.seeds import derive_seed, permutation
from perdure.train import micro_batches
from perdure.types import Example, InputError, Rollout, SkillScore

IDENTITY_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest KL per token between teacher and student under equal prompts; above it the two are not the same model."""


@dataclass(frozen=True)
class TemplateScore:
    """What the teacher does with one context template."""

    template: str
    accuracy: float
    low: float
    high: float
    tokens: float
    """Mean length of the teacher's prompt."""
    kl: float
    """Mean KL(teacher || student) per demonstration token, nats."""
    demonstration_probability: float
    """Mean probability that the teacher gives a demonstration token."""
    leak_share: float
    """Share of the teacher's answers that talk about the example."""


@dataclass(frozen=True)
class Preflight:
    """The result of ``perdure check``; the fields are those of ``preflight.json``."""

    skill: str
    n: int
    student_accuracy: float
    teacher_accuracy: float
    gap: float
    template: str
    kl_teacher_student: float
    identity_kl: float
    leak_share: float
    window: dict[str, Any]
    templates: tuple[TemplateScore, ...]
    cost: dict[str, Any]
    ready: bool
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """What is checked: a skill's training rows on a loaded model."""

    skill: str
    examples: tuple[Example, ...]
    grader: Grader
    max_new_tokens: int
    student: LoadedModel
    working: Any
    engine: RolloutEngine
    renderer: Renderer
    dtype: torch.dtype


def candidates(context: ContextConfig, examples: Sequence[Example]) -> list[Template]:
    """The templates to measure: the configured one, or all that ``auto`` may choose from."""
    if context.template != "auto":
        return [parse_template(context.template)]
    names = list(context.candidates)
    if all(example.document for example in examples):
        names.append("document")
    return [parse_template(name) for name in names]


def check_windows(subject: Subject, templates: Sequence[Template]) -> tuple[dict[str, Any], list[Template]]:
    """Lengths of every training row under every role, and the templates under which all rows fit.

    Raises InputError listing each row that does not fit the window even without a demonstration."""
    renderer, limit = subject.renderer, subject.renderer.window
    completions = {e.id: len(renderer.demonstration(e).token_ids) for e in subject.examples}
    room = {e.id: max(completions[e.id], subject.max_new_tokens) for e in subject.examples}
    students = {e.id: len(renderer.student_prompt(e).token_ids) + room[e.id] for e in subject.examples}
    if bad := [e for e in subject.examples if students[e.id] > limit]:
        lines = [f"  {e.origin}: {students[e.id]} tokens" for e in bad]
        raise InputError(f"{subject.skill}: {len(bad)} rows exceed the window of {limit} tokens (prompt plus answer); "
                         "shorten them or raise model.max_window:\n" + "\n".join(lines))  # fmt: skip
    cut = [e for e in subject.examples if completions[e.id] > subject.max_new_tokens]
    if cut:
        lines = [f"  {e.origin}: {completions[e.id]} tokens" for e in cut]
        raise InputError(f"{subject.skill}: {len(cut)} demonstrations are longer than max_new_tokens = "
                         f"{subject.max_new_tokens}; raise it in skill.toml:\n" + "\n".join(lines))  # fmt: skip
    fitting, longest = [], {}
    for template in templates:
        lengths = [len(renderer.teacher_prompt(e, template).token_ids) + room[e.id] for e in subject.examples]
        longest[template.name] = max(lengths)
        if max(lengths) <= limit:
            fitting.append(template)
    window = {"limit": limit, "longest_student": max(students.values()), "longest_teacher": longest,
              "too_long": [t.name for t in templates if t not in fitting]}  # fmt: skip
    if not fitting:
        raise InputError(f"{subject.skill}: no context template fits the window of {limit} tokens: longest teacher "
                         f"prompts {longest}; choose a shorter template or raise model.max_window")  # fmt: skip
    return window, fitting


def preflight(subject: Subject, context: ContextConfig, config: PreflightConfig, train: TrainConfig, seed: int,
              progress: Progress | None = None) -> Preflight:  # fmt: skip
    """Measure the teacher gap on ``config.rows`` training rows and choose the context template.

    Raises InputError when rows do not fit, or when the identity check fails (a broken set-up, not a hard skill)."""
    window, templates = check_windows(subject, candidates(context, subject.examples))
    order = permutation(derive_seed(seed, "preflight", subject.skill), len(subject.examples))
    rows = [subject.examples[place] for place in order[: config.rows]]
    start = time.perf_counter()
    student = _answers(subject, rows, None, progress)
    decode_seconds = time.perf_counter() - start
    scores = [_measure(subject, rows, template, progress) for template in templates]
    best = choose_template(scores)
    identity = _identity(subject, rows)
    cost = predict_cost(subject, rows, best, train, student, decode_seconds)
    gap = best.accuracy - student.accuracy
    ready, advice = _judge(subject, config, student, best, scores)
    return Preflight(subject.skill, len(rows), student.accuracy, best.accuracy, gap, best.template, best.kl, identity,
                     best.leak_share, window, tuple(scores), cost, ready, tuple(advice))  # fmt: skip


def choose_template(scores: Sequence[TemplateScore]) -> TemplateScore:
    """The most accurate template; among those within one standard error of it, the one with the shortest prompt."""
    best = max(scores, key=lambda score: score.accuracy)
    # Half of the 95 % interval's width over 1.96 is its standard error.
    error = (best.high - best.low) / 2 / 1.96
    return min((s for s in scores if s.accuracy >= best.accuracy - error), key=lambda score: score.tokens)


def _answers(
    subject: Subject, rows: Sequence[Example], template: Template | None, progress: Progress | None
) -> SkillScore:
    """Graded greedy answers of the student (no template) or of the teacher."""
    renderer = subject.renderer
    prompts = [renderer.teacher_prompt(e, template) if template else renderer.student_prompt(e) for e in rows]
    return score_prompts(
        subject.engine, renderer, subject.skill, prompts, subject.grader, subject.max_new_tokens, progress
    )


def _measure(subject: Subject, rows: Sequence[Example], template: Template, progress: Progress | None) -> TemplateScore:
    answers = _answers(subject, rows, template, progress)
    rollouts = [subject.renderer.rollout(e, subject.renderer.demonstration(e), template) for e in rows]
    kl, probability = _teacher_forced(subject, rollouts)
    tokens = sum(len(r.teacher_prompt.token_ids) for r in rollouts) / len(rollouts)
    leaks = sum(names_the_example(item.completion) for item in answers.items) / len(rows)
    return TemplateScore(template.name, answers.accuracy, answers.low, answers.high, tokens, kl, probability, leaks)


@torch.no_grad()
def _teacher_forced(subject: Subject, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Mean KL(teacher || student) and the teacher's mean probability over the demonstrations' tokens."""
    kl = probability = count = 0.0
    lengths = [len(r.teacher_prompt.token_ids) + len(r.completion.token_ids) for r in rollouts]
    head = head_of(subject.working)
    for group in micro_batches(range(len(rollouts)), lengths, 4096):
        chosen = [rollouts[i] for i in group]
        hidden = [hidden_at_loss_positions(subject.working, collate(chosen, role, subject.student.pad_id))
                  for role in ("student", "teacher")]  # fmt: skip
        batch = collate(chosen, "student", subject.student.pad_id)
        for student_NH, teacher_NH, into in ((hidden[0], hidden[1], "kl"), (hidden[1], hidden[1], "probability")):
            inputs = LossInputs(student_NH, teacher_NH, batch.targets_N, batch.weights_N, batch.demonstrated_N)
            total, metrics = chunked_loss(LossSpec(), inputs, head, head)
            if into == "kl":
                kl += float(total)
            else:
                probability += metrics["target_probability"]
        count += len(batch.targets_N)
    return kl / count, probability / count


@torch.no_grad()
def _identity(subject: Subject, rows: Sequence[Example]) -> float:
    """Mean KL per token between the working copy and the student in training precision, under the same prompt."""
    template = parse_template("turns:1")
    rollouts = [subject.renderer.rollout(e, subject.renderer.demonstration(e), template) for e in rows[:8]]
    batch = collate(rollouts, "student", subject.student.pad_id)
    with autocast(subject.dtype):
        student_NH = hidden_at_loss_positions(subject.student.model, batch).to(subject.dtype)
    working_NH = hidden_at_loss_positions(subject.working, batch)
    inputs = LossInputs(student_NH, working_NH, batch.targets_N, batch.weights_N, batch.demonstrated_N)
    total, _ = chunked_loss(LossSpec(), inputs, head_of(subject.student.model), head_of(subject.working))
    identity = float(total) / len(batch.targets_N)
    if not identity <= IDENTITY_LIMIT[subject.dtype]:
        raise InputError(f"identity check failed: with equal prompts teacher and student differ by {identity:.3g} nats a "
                         'token; the weights or the precision are broken here (try model.compute_dtype = "float32")')  # fmt: skip
    return identity


def predict_cost(subject: Subject, rows: Sequence[Example], best: TemplateScore, train: TrainConfig, student: SkillScore,
                 decode_seconds: float) -> dict[str, Any]:  # fmt: skip
    """Tokens and seconds of the stage's training, from a short timed pass over some of the rows."""
    renderer = subject.renderer
    lengths = [len(renderer.student_prompt(e).token_ids) + len(renderer.demonstration(e).token_ids) for e in rows]
    mean_student = sum(lengths) / len(lengths)
    mean_completion = sum(len(renderer.demonstration(e).token_ids) for e in rows) / len(rows)
    demonstrations = train.batch_size - round(train.batch_size * train.anchor_share)
    warm = min(train.steps, train.warm_start_steps)
    on_policy = train.steps - warm if train.method == "sdft" else 0
    tokens = {
        "student": round(train.steps * train.batch_size * mean_student),
        "teacher": round(train.steps * demonstrations * (best.tokens + mean_completion))
        if train.method == "sdft"
        else 0,
        "rollout": round(on_policy * demonstrations * mean_completion),
    }
    forward = _forward_rate(subject, rows)
    generated = sum(item.tokens for item in student.items)
    # Backward costs two forwards; head, loss and optimizer about half of one more at this size.
    seconds = (
        tokens["student"] * 3.5 / forward
        + tokens["teacher"] / forward
        + tokens["rollout"] * decode_seconds / max(1, generated)
    )
    return {"seconds": round(seconds, 1), "tokens": tokens, "forward_tokens_per_second": round(forward)}


@torch.inference_mode()
def _forward_rate(subject: Subject, rows: Sequence[Example]) -> float:
    template = parse_template("turns:1")
    rollouts = [subject.renderer.rollout(e, subject.renderer.demonstration(e), template) for e in rows[:16]]
    batch = collate(rollouts, "teacher", subject.student.pad_id)
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        hidden_at_loss_positions(subject.working, batch)
        best = min(best, time.perf_counter() - start)
    return float(batch.attention_mask_BT.sum()) / best


def _judge(subject: Subject, config: PreflightConfig, student: SkillScore, best: TemplateScore,
           scores: Sequence[TemplateScore]) -> tuple[bool, list[str]]:  # fmt: skip
    gap = best.accuracy - student.accuracy
    advice = []
    if best.accuracy < config.min_teacher_accuracy:
        advice.append(
            f"The teacher answers only {best.accuracy:.0%} of the rows rightly although it sees the demonstration: it has "
            "nothing to teach. Try another context template, shorter prompts, a grader that fits the form of the "
            "answers, or a larger model."
        )
    elif gap < config.min_gap:
        advice.append(
            f"The demonstration in context adds only {gap:+.0%} (student {student.accuracy:.0%}, teacher "
            f"{best.accuracy:.0%}): there is little to learn. The skill may be known already, or the grader may not see "
            "the difference."
        )
    if best.leak_share > 0.05:
        advice.append(
            f"{best.leak_share:.0%} of the teacher's answers talk about the example that only it sees; the student would "
            "learn that. Set train.skip_first_tokens = 3 or choose a turns:N template."
        )
    if best.accuracy >= config.min_teacher_accuracy and best.demonstration_probability < 0.5:
        advice.append(
            f"The teacher gives a demonstration token only {best.demonstration_probability:.0%} on average; more repeats "
            "(turns:4) or a lower train.teacher_temperature sharpen it."
        )
    ready = best.accuracy >= config.min_teacher_accuracy and gap >= config.min_gap
    return ready, advice or ["The demonstration in context makes the model clearly better: ready to learn."]
