"""Which rows a step trains on, who writes their completions, and which loss they carry: what the methods differ in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from perdure.config import TrainConfig
from perdure.episodes import play
from perdure.guidance import allot
from perdure.methods import METHODS
from perdure.packing import common_prefix
from perdure.rollout.base import Lagging, RolloutEngine, SamplingParams
from perdure.runlog import LoopState
from perdure.seeds import derive_seed, stream_window
from perdure.stage import Stage
from perdure.types import Completion, Example, Prompt, Rollout


def phase_of(state: LoopState, config: TrainConfig) -> str:
    """``warm_start`` or ``on_policy`` for SDFT, ``re_invoke`` for re-invocation's last steps, else the method."""
    method = METHODS[config.method]
    if method.completions == "student":
        return "warm_start" if state.warm and state.step < config.warm_start_steps else "on_policy"
    if method.reinvoked and state.step >= config.steps - config.reinvoke_steps:
        return "re_invoke"
    return config.method


def step_rollouts(stage: Stage, config: TrainConfig, phase: str, state: LoopState,
                  written: list[Completion] | None = None) -> list[Rollout]:  # fmt: skip
    """The rows of one step with their completions and the weights of their losses. ``written``: the student's answers
    where they were written ahead."""
    if phase == "re_invoke":
        return invoke(stage, config, state)
    rows = batch_rows(stage, config, state)
    if phase == "on_policy":
        return sample(stage, config, rows, state, written)
    return completed(stage, config, rows)


def batch_rows(stage: Stage, config: TrainConfig, state: LoopState) -> list[Example | Rollout]:
    """The rows of one step: examples to learn, and rows that come with their completion."""
    counts = _counts(stage, config)
    # Replayed rows carry no divergence, and stay as they are.
    anchors = [replace(row, weight=row.weight * config.anchor_weight) for row in _earlier(stage, config, state)]
    if count := counts["general"]:
        pool, seed = stage.anchors.general, derive_seed(stage.seed, "batch", "general")
        anchors += [pool[place] for place in stream_window(seed, len(pool), state.step * count, count)]
    return [*taught_rows(stage, config, state.step), *anchors]


def row_counts(config: TrainConfig, skills: int, general: bool) -> dict[str, int]:
    """Rows of a step: ``taught``, ``earlier`` and ``general``. Their sum is ``batch_size``, or more where the earlier
    skills are too many for their share of it. ``skills``: earlier ones that have anchors; ``general``: whether there
    are any of those."""
    anchors = round(config.batch_size * config.anchor_share)
    earlier = round(anchors * config.anchor_earlier_share)
    # Where there is no earlier skill yet, its part goes to the demonstrations: there is less to hold.
    return {
        "taught": config.batch_size - (earlier if skills else 0) - (anchors - earlier if general else 0),
        "earlier": max(earlier, math.ceil(skills * config.anchor_per_skill)) if skills else 0,
        "general": anchors - earlier if general else 0,
    }


def _counts(stage: Stage, config: TrainConfig) -> dict[str, int]:
    return row_counts(config, len(stage.anchors.skills), bool(stage.anchors.general))


def taught_rows(stage: Stage, config: TrainConfig, step: int) -> list[Example | Rollout]:
    """The rows to learn of one step; depends on (seed, step) only. Turns of one conversation follow each other, so that
    what they share is computed once."""
    count, pool = _counts(stage, config)["taught"], stage.examples
    places = stream_window(derive_seed(stage.seed, "batch", "demonstrations"), len(pool), step * count, count,
                           stage.conversations)  # fmt: skip
    return [pool[place] for place in places]


def _earlier(stage: Stage, config: TrainConfig, state: LoopState) -> list[Rollout]:
    """The step's anchor rows of earlier skills; of each skill every row comes once an epoch."""
    picked: list[Rollout] = []
    skills, count = stage.anchors.skills, _counts(stage, config)["earlier"]
    drawn = {skill: int(state.allotted[skill]["drawn"]) if skill in state.allotted else 0 for skill in skills}
    for skill, rows in allot(state.allotted, list(skills), count, config.anchor_focus).items() if skills else ():
        pool, seed = skills[skill], derive_seed(stage.seed, "batch", "earlier", skill)
        picked += [pool[place] for place in stream_window(seed, len(pool), drawn[skill], rows)]
    return picked


def completed(stage: Stage, config: TrainConfig, rows: Sequence[Example | Rollout]) -> list[Rollout]:
    """``complete`` of each row; of a recorded conversation each assistant turn is one."""
    turns = ([row] if isinstance(row, Rollout) else stage.renderer.recorded_turns(row) for row in rows)
    return [complete(stage, config, turn) for row in turns for turn in row]


def complete(stage: Stage, config: TrainConfig, row: Example | Rollout) -> Rollout:
    """The demonstration's own tokens, or the row's document, as the completion. A method that does not show the
    demonstration to the teacher gives both roles the student's prompt."""
    if isinstance(row, Rollout):
        return row
    if METHODS[config.method].completions == "document":
        return weighted(stage.renderer.document_row(row), config)
    shown = stage.template if METHODS[config.method].shows else None
    rollout = weighted(stage.renderer.rollout(row, stage.renderer.demonstration(row), shown), config)
    return corrected(stage, config, rollout) if METHODS[config.method].completions == "student" else rollout


def corrected(stage: Stage, config: TrainConfig, rollout: Rollout) -> Rollout:
    """Where the completion has been the demonstration so far, the demonstration's next token takes a share of the
    target: also where the student leaves it, and where the teacher, for all that it was shown, would have."""
    if not config.demonstration_weight:
        return rollout
    example, said = rollout.student_prompt.example, rollout.completion.token_ids
    demonstration = stage.renderer.demonstration(example).token_ids
    sampled = said != demonstration or rollout.completion.sampler_logprobs
    if sampled and stage.renderer.lacks_thinking(example):
        return rollout  # as a sample's label it would teach not to think
    known = min(common_prefix(demonstration, said) + 1, len(demonstration), len(said))
    return replace(rollout, labels=demonstration[:known], label_weight=config.demonstration_weight)


def weighted(rollout: Rollout, config: TrainConfig) -> Rollout:
    """A row whose completion is not the student's own, with the weights of its method's losses."""
    method = METHODS[config.method]
    if method.loss == "divergence":
        return rollout
    return replace(rollout, weight=config.kl_weight if method.kl_to_last else 0.0, label_weight=1.0)


def sample(stage: Stage, config: TrainConfig, rows: Sequence[Example | Rollout], state: LoopState,
           written: list[Completion] | None = None) -> list[Rollout]:  # fmt: skip
    """On-policy: the student answers each example itself, seeing only the prompt; of the examples beyond
    ``on_policy_share`` the demonstration's tokens are the completion."""
    if state.first_own < 0:
        state.first_own = state.step
    examples = [row for row in rows if isinstance(row, Example)]
    own = _own(examples, config)
    given = completed(stage, config, examples[len(own) :])
    anchors = [row for row in rows if isinstance(row, Rollout)]
    if stage.acting:
        return acted(stage, config, own, state) + given + anchors
    completions = written or answer(stage, config, own, state.step, state.first_own)
    state.tokens["rollout"] += sum(len(c.token_ids) for c in completions)
    lagging = written is not None or lags(config, state.step, state.first_own)
    sampled = [corrected(stage, config, replace(stage.renderer.rollout(e, c, stage.template), lagging=lagging))
               for e, c in zip(own, completions, strict=True)]  # fmt: skip
    return sampled + given + anchors


def _own(examples: Sequence[Example], config: TrainConfig) -> Sequence[Example]:
    """Those that the student answers itself."""
    return examples[: max(1, round(len(examples) * config.on_policy_share))] if examples else []


def answer(stage: Stage, config: TrainConfig, examples: Sequence[Example], step: int,
           first: int) -> list[Completion]:  # fmt: skip
    """The student's own answers in step ``step``, with the weights that its engine holds now. ``first``: see
    ``lags``."""
    references = [stage.renderer.demonstration(e).token_ids for e in examples]
    prompts = [stage.renderer.student_prompt(e) for e in examples]
    params = SamplingParams(stage.max_new_tokens, config.sampling_temperature)
    with lagging(stage.engine, lags(config, step, first)):
        return stage.engine.generate(prompts, params, _seeds(stage, step, len(examples)), references=references)


def lags(config: TrainConfig, step: int, first: int) -> bool:
    """Whether the sampler keeps its weights in this step; counted from the ``first`` step with own answers, which is to
    begin with what the warm start has taught."""
    return (step - first) % config.update_sampler_every != 0


@contextmanager
def lagging(engine: RolloutEngine, wanted: bool) -> Iterator[None]:
    """Inside, an engine that can answers with the weights that it was sent last."""
    inner = cast("Lagging", getattr(engine, "engine", engine))  # below one that divides prompts over processes
    if wanted:
        inner.lags = True
    try:
        yield
    finally:
        if wanted:
            inner.lags = False


def answers_of(stage: Stage, config: TrainConfig, step: int, first: int) -> list[Completion]:
    """All answers that ``sample`` will ask for in step ``step``."""
    examples = [row for row in taught_rows(stage, config, step) if isinstance(row, Example)]
    return answer(stage, config, _own(examples, config), step, first)


def acted(stage: Stage, config: TrainConfig, examples: Sequence[Example], state: LoopState) -> list[Rollout]:
    """On-policy in an environment: every turn of the conversations that the student plays, after what its own calls
    brought about. The teacher sees the recorded conversation, and then the student's."""
    assert stage.acting
    params = SamplingParams(stage.max_new_tokens, config.sampling_temperature)
    episodes = play(stage.engine, stage.renderer, examples, stage.acting, params,
                    lambda place, turn: derive_seed(stage.seed, "rollout", state.step, place, turn),
                    scored_by=stage.template)  # fmt: skip
    turns = [turn for episode in episodes for turn in episode.turns]
    state.tokens["rollout"] += sum(len(completion.token_ids) for _, completion in turns)
    return [stage.renderer.rollout(example, completion, stage.template) for example, completion in turns]


def invoke(stage: Stage, config: TrainConfig, state: LoopState) -> list[Rollout]:
    """Re-invocation: the student answers general prompts, where the last version, seeing the same, is the teacher."""
    pool: list[Prompt] = [row.student_prompt for row in stage.anchors.general]
    places = stream_window(derive_seed(stage.seed, "batch", "invoke"), len(pool), state.step * config.batch_size,
                           config.batch_size)  # fmt: skip
    prompts = [pool[place] for place in places]
    params = SamplingParams(config.anchor_general_tokens, config.sampling_temperature)
    completions = stage.engine.generate(prompts, params, _seeds(stage, state.step, len(prompts)))
    state.tokens["rollout"] += sum(len(c.token_ids) for c in completions)
    return [stage.renderer.rollout(p.example, c, None) for p, c in zip(prompts, completions, strict=True)]


def _seeds(stage: Stage, step: int, count: int) -> list[int]:
    return [derive_seed(stage.seed, "rollout", step, index) for index in range(count)]


def says_demonstration(stage: Stage, rollout: Rollout) -> bool:
    """Whether the completion is the demonstration, token by token."""
    demonstration = stage.renderer.demonstration(rollout.student_prompt.example)
    return demonstration.token_ids == rollout.completion.token_ids


def recurs(stage: Stage, config: TrainConfig, rollout: Rollout) -> bool:
    """True for a row that comes again with the same tokens: an anchor, or a completion that does not change where the
    steps that train on such go through the examples more than once."""
    if not rollout.has_demonstration:
        return True
    student = METHODS[config.method].completions == "student"
    fixed_rows = (config.warm_start_steps if student else config.steps) * config.batch_size * (1 - config.anchor_share)
    return fixed_rows > len(stage.examples) and (not student or says_demonstration(stage, rollout))
