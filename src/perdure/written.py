"""Answers that the teacher writes once, before the first step: offline distillation and rewritten demonstrations."""

from __future__ import annotations

from dataclasses import replace

from perdure.config import TrainConfig
from perdure.methods import METHODS
from perdure.processes import from_lead
from perdure.rollout.base import SamplingParams, TotalProgress, part_of
from perdure.rows import taught_rows, weighted
from perdure.seeds import derive_seed
from perdure.stage import Stage
from perdure.types import Completion, Example, Rollout


def with_written(stage: Stage, config: TrainConfig, progress: TotalProgress | None = None) -> Stage:
    """The stage with the teacher's answers in the place of the demonstrations that its steps will draw.

    To be called before the first step: the engines still hold the weights that teach. Where
    demonstrations are rewritten, the teacher's answer is taken if the grader passes it, else the demonstration."""
    drawn = {row.id for step in range(config.steps) for row in taught_rows(stage, config, step)
             if isinstance(row, Example)}  # fmt: skip
    rows = [row for row in stage.examples if isinstance(row, Example) and row.id in drawn]
    prompts = [stage.renderer.teacher_prompt(row, stage.template) for row in rows]
    demonstrations = [stage.renderer.demonstration(row) for row in rows]
    params = SamplingParams(stage.max_new_tokens, config.sampling_temperature)
    seeds = [derive_seed(stage.seed, "written", row.id) for row in rows]
    answers = (stage.writer or stage.engine).generate(prompts, params, seeds, part_of(progress, 0, len(rows)),
                                    [d.token_ids for d in demonstrations])  # fmt: skip
    if METHODS[config.method].completions == "rewritten":
        answers = [answer if stage.grader(stage.renderer.answer(answer), row) >= 1 else demonstration
                   for row, answer, demonstration in zip(rows, answers, demonstrations, strict=True)]  # fmt: skip
    # Each process may have written and graded for itself: other hardware, or a judge by a model, gives other answers.
    answers = from_lead(answers)
    written = {row.id: _row(stage, config, row, answer) for row, answer in zip(rows, answers, strict=True)}
    return replace(stage, examples=tuple(written.get(row.id, row) if isinstance(row, Example) else row
                                         for row in stage.examples))  # fmt: skip


def _row(stage: Stage, config: TrainConfig, row: Example, answer: Completion) -> Rollout:
    shown = stage.template if METHODS[config.method].loss == "divergence" else None
    return weighted(stage.renderer.rollout(row, answer, shown), config)
