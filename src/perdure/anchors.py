"""Anchor rows: prompts without a demonstration, with what the stage's first weights answer to them.

They are sampled once, before the first step, from the version promoted last. Training then holds the student to that
version's own distribution there: on earlier skills' prompts and on general ones that the project writes itself. An
earlier skill's row carries its stored demonstration instead where it is rehearsed: taught once more, and held, too, if
the version had it right. The replay methods put supervised rows in the place of the earlier skills' anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources

from perdure.config import TrainConfig
from perdure.methods import METHODS
from perdure.monitor import DRIFT_ROWS
from perdure.rollout.base import Progress, SamplingParams, TotalProgress, part_of
from perdure.rows import row_counts
from perdure.seeds import derive_seed, permutation
from perdure.session import Session
from perdure.skills.base import Skill
from perdure.stage import Anchors
from perdure.types import Example, Rollout


def make_anchors(session: Session, earlier: Sequence[Skill], config: TrainConfig, seed: int,
                 progress: TotalProgress | None = None) -> Anchors:  # fmt: skip
    """General prompts with answers sampled at temperature 1, and rows of ``earlier`` skills as the method wants them.

    Without anchors in the batch (``anchor_share`` 0) there are none, but for the general prompts of re-invocation."""
    method = METHODS[config.method]
    wants_general = method.reinvoked or (config.anchor_share > 0 and config.anchor_earlier_share < 1)
    general = general_for(config) if wants_general else []
    wants_earlier = config.anchors_earlier
    chosen = {skill.name: session.renderer.each_turn(_chosen(skill, config, seed))
              for skill in (earlier if wants_earlier else ())}  # fmt: skip
    total, done = len(general) + sum(map(len, chosen.values())), len(general)
    answers = answered(session, general, config.anchor_general_tokens, derive_seed(seed, "anchors of", "general"),
                       part_of(progress, 0, total))  # fmt: skip
    found: list[Rollout] = []
    for skill in (skill for skill in earlier if skill.name in chosen):
        rows = chosen[skill.name]
        made = _earlier(session, skill, rows, config, derive_seed(seed, "anchors of", skill.name),
                        part_of(progress, done, total))  # fmt: skip
        found += [replace(row, source=skill.name) for row in made]
        done += len(rows)
    return Anchors(tuple(found), tuple(answers))


def _chosen(skill: Skill, config: TrainConfig, seed: int) -> list[Example]:
    places = permutation(derive_seed(seed, "anchors", skill.name), len(skill.train))[: config.anchor_rows]
    return [skill.train[place] for place in places]


def _earlier(session: Session, skill: Skill, rows: Sequence[Example], config: TrainConfig, seed: int,
             progress: Progress | None) -> list[Rollout]:  # fmt: skip
    """Rows of an earlier skill: anchors, or replay (of the demonstrations, or of own answers that are right)."""
    renderer, method = session.renderer, METHODS[config.method]
    bare = [replace(row, demonstration=None) for row in rows]
    demonstrations = [renderer.demonstration(row) for row in rows]

    def stored(place: int) -> Rollout:
        return _label(renderer.rollout(bare[place], demonstrations[place], None))

    if method.earlier == "demonstrations":
        # An answer without thinking is no example for a model that thinks.
        return [stored(place) for place, row in enumerate(rows) if not renderer.lacks_thinking(row)]
    drafts = [demonstration.token_ids for demonstration in demonstrations]
    answers = answered(session, bare, skill.settings.max_new_tokens, seed, progress, drafts)
    if method.earlier == "answers" and config.anchor_rehearsal == 0:
        return answers
    right = [
        skill.grade(renderer.answer(answer.completion), row) >= 1 for answer, row in zip(answers, rows, strict=True)
    ]
    if method.earlier == "accepted":
        return [_label(answer) for answer, passes in zip(answers, right, strict=True) if passes]

    def rehearsed(place: int) -> bool:
        share = config.anchor_rehearsal  # spread over the rows, so that every stretch of them has its part
        return int((place + 1) * share) > int(place * share) and not renderer.lacks_thinking(rows[place])

    # What the last version had right is held, too; what it had wrong must not be.
    return [replace(stored(place), weight=float(right[place])) if rehearsed(place) else answer
            for place, answer in enumerate(answers) if rehearsed(place) or right[place]]  # fmt: skip


def _label(rollout: Rollout) -> Rollout:
    return replace(rollout, weight=0.0, label_weight=1.0)


def general_prompts() -> list[Example]:
    """The prompts of data/general_prompts.txt, one a line."""
    text = resources.files("perdure").joinpath("data/general_prompts.txt").read_text(encoding="utf-8")
    return [
        Example(f"general-{number}", ({"role": "user", "content": line},), None, origin=f"general_prompts.txt:{number}")
        for number, line in enumerate(text.splitlines(), 1)
    ]


def general_for(config: TrainConfig) -> list[Example]:
    """The general prompts that a stage has a use for: what its steps take, and its drift is measured on; all of them
    for re-invocation."""
    if METHODS[config.method].reinvoked:
        return general_prompts()
    return general_prompts()[: max(DRIFT_ROWS, config.steps * row_counts(config, 0, general=True)["general"])]


def answered(
    session: Session, rows: Sequence[Example], most: int, seed: int, progress: Progress | None = None,
    drafts: Sequence[Sequence[int]] | None = None,
) -> list[Rollout]:  # fmt: skip
    """Each row with the model's own answer, sampled at temperature 1, of at most ``most`` tokens. ``drafts``: what it
    probably says, which makes it faster and changes nothing else."""
    if not rows:
        return []
    prompts = [session.renderer.student_prompt(row) for row in rows]
    seeds = [derive_seed(seed, row.id) for row in rows]
    completions = session.engine.generate(prompts, SamplingParams(most), seeds, progress, drafts)
    # No template: without a demonstration both roles see the same prompt.
    return [session.renderer.rollout(row, completion, None) for row, completion in zip(rows, completions, strict=True)]
