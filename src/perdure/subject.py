"""What a preflight looks at, and whether its rows can be used at all: lengths, thinking, context templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perdure.config import ContextConfig, TrainConfig
from perdure.contexts import Renderer
from perdure.evaluate import Grader
from perdure.methods import METHODS
from perdure.models import LoadedModel
from perdure.rollout.base import RolloutEngine
from perdure.skills.environments import Acting
from perdure.templates import Template, parse_template
from perdure.types import Example, InputError

NAMED = 20
"""Rows that an error message names."""


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
    original: tuple[Any, RolloutEngine] | None = None
    """Working copy and engine of the base model, where that is to be the teacher."""

    acting: Acting | None = None
    """Where the rows are conversations that are played."""
    tests: tuple[Example, ...] = ()
    """Test rows that will be answered: an answer to them must fit, too."""

    @property
    def teaching(self) -> tuple[Any, RolloutEngine]:
        """Working copy and engine of who will teach."""
        return self.original or (self.working, self.engine)


def candidates(context: ContextConfig, examples: Sequence[Example], thinks: bool = False) -> list[Template]:
    """The templates to measure: the configured one, or all that ``auto`` may choose from (for a model that thinks, in
    the wording that asks for its thinking)."""
    if context.template != "auto":
        return [parse_template(context.template)]
    names = list(context.candidates)
    if thinks:  # the clause that asks for the thinking: without it a teacher that knows the answer just says it
        names = ["inline_thinking" if name == "inline" else name for name in names]
    if all(example.document for example in examples):
        names += ["document", "document_turns:2"]
    return [parse_template(name) for name in dict.fromkeys(names)]


def check_thinking(renderer: Renderer, examples: Sequence[Example], train: TrainConfig) -> None:
    """Raises InputError for demonstrations that would teach a thinking model not to think: answers without thinking,
    where steps train on the demonstration's own tokens; and for thinking that the chat template does not render."""
    marks = renderer.marks
    if marks is None:
        return
    examples = renderer.each_turn(examples)
    check_marks(renderer, examples)
    bare = [e for e in examples if renderer.lacks_thinking(e)]
    if unwritten := [e for e in bare if e.demonstration and e.demonstration.get("reasoning_content")]:
        raise InputError(f"{unwritten[0].origin}: this model's chat template does not render 'reasoning_content'")
    if problem := unthinking(renderer, examples, train):
        raise InputError(problem)


def check_marks(renderer: Renderer, examples: Sequence[Example]) -> None:
    """Raises InputError for an answer with marks of thinking in its text: where a template has opened the thinking
    itself, a server that does not take replies apart returns the closing mark alone."""
    marks = renderer.marks
    if marks is None:
        return
    for example in renderer.each_turn(examples):
        content = str(example.demonstration and example.demonstration.get("content"))
        if found := [mark for mark in (marks.open, marks.close) if mark in content]:
            raise InputError(
                f"{example.origin}: the answer holds {found[0]}; give the thinking as 'reasoning_content' beside "
                "'content': graders compare answers alone"
            )


def check_skipped(renderer: Renderer, examples: Sequence[Example], train: TrainConfig) -> None:
    """Raises InputError where ``train.skip_first_tokens`` leaves nothing of any demonstration to learn."""
    if METHODS[train.method].completions == "document":
        return
    longest = max(len(renderer.demonstration(e).token_ids) for e in renderer.each_turn(examples))
    if longest <= train.skip_first_tokens:
        raise InputError(
            f"train.skip_first_tokens = {train.skip_first_tokens} leaves nothing to learn: the longest demonstration "
            f"has {longest} tokens"
        )


def unthinking(renderer: Renderer, turns: Sequence[Example], train: TrainConfig) -> str | None:
    """What is wrong where a stage would train a model that thinks on answers without thinking; None where it would
    not."""
    if renderer.marks is None:
        return None
    bare = [e for e in turns if renderer.lacks_thinking(e)]
    completions = METHODS[train.method].completions
    sampled_first = completions == "student" and train.warm_start_steps == 0 and train.on_policy_share == 1
    trained = completions in ("demonstration", "rewritten") or (completions == "student" and not sampled_first)
    if not bare or not trained or renderer.part == "answer":
        return None
    return (
        f"{bare[0].origin}: an answer without thinking ({len(bare)} of {len(turns)} rows), and steps that train "
        'on the demonstrations as they stand: the model would unlearn to think. With method = "sdft" set '
        "train.warm_start_steps = 0; or set thinking.loss = \"answer\", or give the thinking as 'reasoning_content'"
    )


def _lengths(renderer: Renderer, rows: Sequence[Example], most: int) -> tuple[list[int], list[int], list[str]]:
    """Tokens of each row's prompt as the student sees it, the room that its answer needs, and what does not fit."""
    completions = [len(renderer.demonstration(e).token_ids) for e in rows]
    room = [max(length, most) for length in completions]
    prompts = [len(renderer.student_prompt(e).token_ids) for e in rows]
    problems = [f"  {e.origin}: prompt and answer take {p + r} tokens, the window holds {renderer.window}"
                for e, p, r in zip(rows, prompts, room, strict=True) if p + r > renderer.window]  # fmt: skip
    problems += [f"  {e.origin}: the demonstration has {length} tokens, max_new_tokens is {most}"
                 for e, length in zip(rows, completions, strict=True) if length > most]  # fmt: skip
    return prompts, room, problems


def check_windows(subject: Subject, templates: Sequence[Template]) -> tuple[dict[str, Any], list[Template]]:
    """Lengths of every training row under every role (tokens, with room for the answer), and the templates that all
    rows can be written in and fit under.

    Raises InputError listing the rows, of training or test, that do not fit even without a demonstration, or whose
    demonstration is longer than an answer may be; else, when no template is left, one reason for each of them."""
    renderer, limit, most = subject.renderer, subject.renderer.window, subject.max_new_tokens
    rows = renderer.each_turn(subject.examples)
    prompts, room, problems = _lengths(renderer, rows, most)
    tests = renderer.each_turn(subject.tests)
    problems += _lengths(renderer, tests, most)[2]
    if problems:
        answer = max(len(renderer.demonstration(e).token_ids) for e in (*rows, *tests))
        advice = f"raise max_new_tokens (skill.toml) to {answer}"
        if answer <= most:
            advice = f"lower max_new_tokens (skill.toml; the longest answer takes {answer}), or raise model.max_window"
        named = [*problems[:NAMED], *([f"  ... and {len(problems) - NAMED} more"] if len(problems) > NAMED else [])]
        raise InputError(f"{subject.skill}: rows that do not fit; shorten them, or {advice}:\n" + "\n".join(named))
    longest: dict[str, int] = {}
    cannot: dict[str, str] = {}
    for template in templates:
        try:
            teachers = [len(renderer.teacher_prompt(e, template).token_ids) for e in rows]
        except InputError as error:  # such as "inline" where a prompt ends in a tool turn: another may do
            cannot[template.name] = str(error)
        else:
            longest[template.name] = max(p + r for p, r in zip(teachers, room, strict=True))
    fitting = [t for t in templates if longest.get(t.name, limit + 1) <= limit]
    if templates and not fitting:
        reasons = [f"  {name}: {reason}" for name, reason in cannot.items()]
        reasons += [f"  {name}: takes {length} tokens, the window holds {limit}" for name, length in longest.items()]
        raise InputError(f"{subject.skill}: no context template fits all rows; choose another one "
                         "(context.template) or raise model.max_window:\n" + "\n".join(reasons))  # fmt: skip
    longest_student = max(p + r for p, r in zip(prompts, room, strict=True))
    too_long = [name for name, length in longest.items() if length > limit]
    window = {"limit": limit, "longest_student": longest_student, "longest_teacher": longest, "too_long": too_long,
              "cannot_render": cannot}  # fmt: skip
    return window, fitting
