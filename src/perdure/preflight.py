"""Will it work here, and what will it cost? Measured before anything is paid for.

Self-distillation rests on one thing: the demonstration in context makes the model better. So the check answers every
sampled training row without a demonstration (student) and with it, under the context templates (teacher).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from perdure.batching import collate, passes
from perdure.config import ContextConfig, PreflightConfig, TrainConfig
from perdure.evaluate import evaluate
from perdure.fused import LossInputs, chunked_loss
from perdure.losses import LossSpec
from perdure.models import autocast, head_of, hidden_at_loss_positions
from perdure.rollout.base import Progress, TotalProgress, part_of
from perdure.runlog import Clock
from perdure.seeds import derive_seed, permutation
from perdure.subject import Subject, candidates, check_marks, check_skipped, check_thinking, check_windows
from perdure.templates import Template, names_the_example, parse_template
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
    demonstration_probability: float
    """Mean probability that the student gives a demonstration token without seeing the demonstration."""
    style_distance: float
    """How much worse than its own expectation the student predicts the demonstrations, nats a token: its negative
    log-likelihood of their tokens minus its entropy there. About 0 for text in the model's own manner."""
    identity_kl: float
    leak_share: float
    window: dict[str, Any]
    templates: tuple[TemplateScore, ...]
    """Those that were tried, the shortest first: none is after the first that makes no mistake."""
    row_seconds: dict[str, float]
    """Seconds to answer one row: as ``student``, and as ``teacher`` with the chosen template."""
    ready: bool
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def preflight(subject: Subject, context: ContextConfig, config: PreflightConfig, train: TrainConfig, seed: int,
              progress: TotalProgress | None = None) -> Preflight:  # fmt: skip
    """Measure the teacher gap on ``config.rows`` training rows and choose the context template.

    Raises InputError when rows do not fit, or when the identity check fails (a broken set-up, not a hard skill)."""
    check_thinking(subject.renderer, subject.examples, train)
    check_marks(subject.renderer, subject.tests)
    check_skipped(subject.renderer, subject.examples, train)
    thinks = subject.renderer.marks is not None
    window, templates = check_windows(subject, candidates(context, subject.examples, thinks))
    rows = _rows(subject, config, seed)
    identity = _identity(subject, rows)
    decodes = 1 + len(templates)
    parts = [part_of(progress, number * len(rows), len(rows) * decodes) for number in range(decodes)]
    clock = Clock()
    student = _answers(subject, rows, None, parts[0])
    clock.lap("student")
    scores: list[TemplateScore] = []
    for template, part in zip(_shortest_first(subject, rows, templates), parts[1:], strict=True):
        answers = _answers(subject, rows, template, part)
        clock.lap(template.name)
        scores.append(_measure(subject, rows, template, train.micro_batch_tokens, answers))
        clock.lap("teacher-forced")
        if is_decided(scores):
            break
    best = choose_template(scores)
    probability, distance = _as_the_student_sees_it(subject, rows, train.micro_batch_tokens)
    taken = {"student": clock.seconds["student"] / len(rows), "teacher": clock.seconds[best.template] / len(rows)}
    ready, advice = _judge(config, student.accuracy, best, thinks)
    return Preflight(
        skill=subject.skill,
        n=len(rows),
        student_accuracy=student.accuracy,
        teacher_accuracy=best.accuracy,
        gap=best.accuracy - student.accuracy,
        template=best.template,
        kl_teacher_student=best.kl,
        demonstration_probability=probability,
        style_distance=distance,
        identity_kl=identity,
        leak_share=best.leak_share,
        window=window,
        templates=tuple(scores),
        row_seconds=taken,
        ready=ready,
        advice=tuple(advice),
    )


def accuracy_of_teacher(subject: Subject, config: PreflightConfig, seed: int, template: str,
                        progress: Progress | None = None) -> float:  # fmt: skip
    """How often who will teach ``subject`` is right under one template, on the rows of the preflight."""
    return _answers(subject, _rows(subject, config, seed), parse_template(template), progress).accuracy


def _rows(subject: Subject, config: PreflightConfig, seed: int) -> list[Example]:
    order = permutation(derive_seed(seed, "preflight", subject.skill), len(subject.examples))
    return [subject.examples[place] for place in order[: config.rows]]


def choose_template(scores: Sequence[TemplateScore]) -> TemplateScore:
    """The most accurate template; among those within one standard error of it, the one with the shortest prompt."""
    best = max(scores, key=lambda score: score.accuracy)
    # Half of the 95 % interval's width over 1.96 is its standard error.
    error = (best.high - best.low) / 2 / 1.96
    return min((s for s in scores if s.accuracy >= best.accuracy - error), key=lambda score: score.tokens)


def is_decided(scores: Sequence[TemplateScore]) -> bool:
    """Whether ``choose_template`` can choose none of the longer templates that are still to be tried: no answer of the
    last one was wrong."""
    return scores[-1].accuracy == 1


def _shortest_first(subject: Subject, rows: Sequence[Example], templates: Sequence[Template]) -> list[Template]:
    return sorted(templates, key=lambda template: _prompt_tokens(_demonstrated(subject, rows, template)))


def _prompt_tokens(rollouts: Sequence[Rollout]) -> float:
    """Mean length of the teacher's prompts."""
    return sum(len(r.teacher_prompt.token_ids) for r in rollouts) / len(rollouts)


def _answers(
    subject: Subject, rows: Sequence[Example], template: Template | None, progress: Progress | None
) -> SkillScore:
    """Graded greedy answers of the student (no template) or of the teacher."""
    engine = subject.teaching[1] if template else subject.engine
    return evaluate(engine, subject.renderer, subject.skill, rows, subject.grader, subject.max_new_tokens, progress,
                    subject.acting, template)  # fmt: skip


def _demonstrated(subject: Subject, rows: Sequence[Example], template: Template | None) -> list[Rollout]:
    """Every recorded turn of the rows with the demonstration's own tokens, all of them, whatever part carries loss."""
    renderer = subject.renderer
    rollouts = [renderer.rollout(e, renderer.demonstration(e), template) for e in renderer.each_turn(rows)]
    return [replace(rollout, region=None) for rollout in rollouts]


def _measure(subject: Subject, rows: Sequence[Example], template: Template, budget: int,
             answers: SkillScore) -> TemplateScore:  # fmt: skip
    rollouts = _demonstrated(subject, rows, template)
    kl, probability = _teacher_forced(subject, rollouts, budget)
    leaks = sum(names_the_example(item.completion) for item in answers.items) / len(rows)
    return TemplateScore(
        template.name, answers.accuracy, answers.low, answers.high, _prompt_tokens(rollouts), kl, probability, leaks
    )


@torch.no_grad()
def _teacher_forced(subject: Subject, rollouts: Sequence[Rollout], budget: int) -> tuple[float, float]:
    """Mean KL(teacher || student) and the teacher's mean probability over the demonstrations' tokens.

    ``budget``: most tokens in one forward pass."""
    kl = probability = count = 0.0
    models = {"student": subject.working, "teacher": subject.teaching[0]}
    heads, device = {role: head_of(model) for role, model in models.items()}, subject.working.device
    for group in passes(subject.working, rollouts, "teacher", budget):
        batches = {role: collate([rollouts[i] for i in group], role, subject.student.pad_id, device=device)
                   for role in ("student", "teacher")}  # fmt: skip
        hidden = {role: hidden_at_loss_positions(models[role], batch) for role, batch in batches.items()}
        batch = batches["student"]
        rest = (hidden["teacher"], batch.targets_N, batch.weights_N, batch.demonstrated_N)
        total, _ = chunked_loss(LossSpec(), LossInputs(hidden["student"], *rest), heads["student"], heads["teacher"])
        _, of_teacher = chunked_loss(LossSpec(), LossInputs(hidden["teacher"], *rest), heads["teacher"],
                                     heads["teacher"])  # fmt: skip
        kl += float(total)
        probability += of_teacher["target_probability"]
        count += len(batch.targets_N)
    return kl / count, probability / count


@torch.no_grad()
def _as_the_student_sees_it(subject: Subject, rows: Sequence[Example], budget: int) -> tuple[float, float]:
    """The student's mean probability of a demonstration token, and the demonstrations' style distance."""
    rollouts = _demonstrated(subject, rows, None)
    sums, nll, count = {"target_probability": 0.0, "entropy": 0.0}, 0.0, 0
    for group in passes(subject.working, rollouts, "student", budget):
        batch = collate([rollouts[i] for i in group], "student", subject.student.pad_id, device=subject.working.device)
        none, ones = torch.zeros_like(batch.weights_N), torch.ones_like(batch.weights_N)
        inputs = LossInputs(hidden_at_loss_positions(subject.working, batch), None, batch.targets_N, none,
                            batch.demonstrated_N, label_weights_N=ones)  # fmt: skip
        total, metrics = chunked_loss(LossSpec(), inputs, head_of(subject.working), None)
        sums = {key: value + metrics[key] for key, value in sums.items()}
        nll, count = nll + float(total), count + len(batch.targets_N)
    return sums["target_probability"] / count, (nll - sums["entropy"]) / count


@torch.no_grad()
def _identity(subject: Subject, rows: Sequence[Example]) -> float:
    """Mean KL per token between the working copy and the student in training precision, under the same prompt.

    Raises InputError when it is not about zero."""
    rollouts = _demonstrated(subject, rows[:8], None)
    there, here = subject.student.device, subject.working.device  # masters of adapters lie in the CPU's memory
    batch = collate(rollouts, "student", subject.student.pad_id, device=there)
    with autocast(subject.dtype, there):
        student_NH = hidden_at_loss_positions(subject.student.model, batch).to(here, subject.dtype)
    batch = collate(rollouts, "student", subject.student.pad_id, device=here)
    working_NH = hidden_at_loss_positions(subject.working, batch)
    inputs = LossInputs(student_NH, working_NH, batch.targets_N, batch.weights_N, batch.demonstrated_N)
    total, _ = chunked_loss(LossSpec(), inputs, head_of(subject.student.model).to(here), head_of(subject.working))
    identity = float(total) / len(batch.targets_N)
    if not identity <= IDENTITY_LIMIT[subject.dtype]:  # NaN fails, too
        raise InputError(
            f"identity check failed: with equal prompts teacher and student differ by {identity:.3g} nats a token; the "
            'weights or the precision are broken here (try model.compute_dtype = "float32")'
        )
    return identity


def _judge(
    config: PreflightConfig, student_accuracy: float, best: TemplateScore, thinks: bool = False
) -> tuple[bool, list[str]]:
    """Whether to train, and what to do: sentences for people, the deciding one first."""
    gap = best.accuracy - student_accuracy
    able = best.accuracy >= config.min_teacher_accuracy
    wide = gap >= config.min_gap - 1e-9  # 0.6 - 0.5 is a little less than 0.1
    advice = []
    if not able:
        advice.append(
            f"The teacher answers only {best.accuracy:.0%} of the rows rightly although it sees the demonstration: it "
            "has nothing to teach. Try another context template, shorter prompts, a grader that fits the form of the "
            "answers, or a larger model."
        )
    elif not wide:
        advice.append(
            f"The demonstration in context adds only {gap:+.0%} (student {student_accuracy:.0%}, teacher "
            f"{best.accuracy:.0%}): there is little to learn. The skill may be known already, or the grader may not "
            "see the difference."
        )
    if best.leak_share > 0.05:
        advice.append(
            f"{best.leak_share:.0%} of the teacher's answers talk about the example that only it sees; the student "
            "would learn that. Set train.skip_first_tokens = 3 or choose a turns:N template."
        )
    if able and best.demonstration_probability < 0.5 and not thinks:  # who thinks does not begin with the answer
        advice.append(
            f"The teacher gives a demonstration token only {best.demonstration_probability:.0%} on average; more "
            "repeats (turns:4) or a lower train.teacher_temperature sharpen it."
        )
    return able and wide, advice or ["The demonstration in context makes the model clearly better: ready to learn."]
