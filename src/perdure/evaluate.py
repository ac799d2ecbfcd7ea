"""A version on a skill: greedy answers, graded item by item, accuracy with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from perdure.contexts import Renderer
from perdure.episodes import play, transcript
from perdure.rollout.base import Progress, RolloutEngine, SamplingParams
from perdure.skills.base import bound
from perdure.skills.environments import Acting
from perdure.stats import clustered_interval
from perdure.templates import Template
from perdure.types import Example, ItemResult, Prompt, SkillScore

Grader = Callable[[str, Example], float]


def evaluate(engine: RolloutEngine, renderer: Renderer, name: str, examples: Sequence[Example], grader: Grader,
             max_new_tokens: int, progress: Progress | None = None, acting: Acting | None = None,
             template: Template | None = None) -> SkillScore:  # fmt: skip
    """Answer every example without a demonstration, or as the teacher with ``template``, and grade it. ``acting``: the
    answer is a whole conversation that is played.

    Raises ValueError for no examples and InputError for one that does not fit the window."""
    if not examples:
        raise ValueError(f"{name}: nothing to evaluate")
    if acting:
        return _played(engine, renderer, name, examples, grader, max_new_tokens, progress, acting, template)
    prompts = [renderer.teacher_prompt(e, template) if template else renderer.student_prompt(e) for e in examples]
    return score_prompts(engine, renderer, name, prompts, grader, max_new_tokens, progress)


def _played(engine: RolloutEngine, renderer: Renderer, name: str, examples: Sequence[Example], grader: Grader,
            max_new_tokens: int, progress: Progress | None, acting: Acting,
            template: Template | None) -> SkillScore:  # fmt: skip
    """Conversations judged by their environment, or by the grader at their last turn."""
    params = SamplingParams(max_new_tokens, temperature=0)
    items = []
    for episode in play(engine, renderer, examples, acting, params, lambda *_: 0, template, progress):
        example, (_, last) = episode.example, episode.turns[-1]
        score = acting.score(episode.world, example)
        score = grader(renderer.answer(last), example) if score is None else score
        expected = renderer.demonstration_text(renderer.recorded_turns(example)[-1])
        tokens = sum(len(completion.token_ids) for _, completion in episode.turns)
        items.append(ItemResult(example.id, example.question, expected, transcript(episode), score, tokens))
    return _summarise(name, items, examples)


def score_prompts(engine: RolloutEngine, renderer: Renderer, name: str, prompts: Sequence[Prompt], grader: Grader,
                  max_new_tokens: int, progress: Progress | None = None) -> SkillScore:  # fmt: skip
    """Greedy completions of rendered prompts (the student's or a teacher's), graded.

    Raises ValueError for no prompts and InputError for one that does not fit the window."""
    if not prompts:
        raise ValueError(f"{name}: nothing to evaluate")
    for prompt in prompts:
        renderer.check_window(prompt, max_new_tokens, "evaluated")
    params = SamplingParams(max_new_tokens, temperature=0)
    references = [renderer.demonstration(p.example).token_ids if p.example.demonstration else () for p in prompts]
    completions = engine.generate(prompts, params, [0] * len(prompts), progress, references)
    items = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text, example = renderer.text(completion), prompt.example
        expected = renderer.demonstration_text(example) if example.demonstration else ""
        score = grader(renderer.answer(completion), example)
        items.append(ItemResult(example.id, example.question, expected, text, score, len(completion.token_ids)))
    return _summarise(name, items, (prompt.example for prompt in prompts))


def _summarise(name: str, items: list[ItemResult], examples: Iterable[Example]) -> SkillScore:
    right = [item.score >= 1 for item in items]
    low, high = clustered_interval(right, list(map(bound, examples)))
    mean = sum(item.score for item in items) / len(items)
    return SkillScore(name, sum(right) / len(items), mean, low, high, len(items), tuple(items))
