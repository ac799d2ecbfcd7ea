"""Anchor rows: prompts without a demonstration, with what the stage's first weights answer to them.

They are sampled once, before the first step, from the version promoted last. Training then holds the student to that
version's own distribution there: on earlier skills' prompts and on general ones that the project writes itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources

from perdure.config import TrainConfig
from perdure.rollout.base import Progress, SamplingParams, TotalProgress, part_of
from perdure.seeds import derive_seed, permutation
from perdure.session import Session
from perdure.skills.base import Skill
from perdure.stage import Anchors
from perdure.types import Example, Rollout


def make_anchors(session: Session, earlier: Sequence[Skill], config: TrainConfig, seed: int,
                 progress: TotalProgress | None = None) -> Anchors:  # fmt: skip
    """Sample the answers at temperature 1; empty where ``anchor_share`` is 0."""
    if config.anchor_share == 0:
        return Anchors()
    pools = [("general", general_prompts(), config.anchor_general_tokens)]
    for skill in earlier:
        chosen = permutation(derive_seed(seed, "anchors", skill.name), len(skill.train))[: config.anchor_rows]
        rows = [replace(skill.train[place], demonstration=None) for place in chosen]
        pools.append((skill.name, rows, skill.settings.max_new_tokens))
    total, done, sampled = sum(len(rows) for _, rows, _ in pools), 0, []
    for name, rows, most in pools:
        part = part_of(progress, done, total)
        sampled.append(answered(session, rows, most, derive_seed(seed, "anchors of", name), part))
        done += len(rows)
    general, *of_earlier = sampled
    return Anchors(earlier=tuple(rollout for rollouts in of_earlier for rollout in rollouts), general=tuple(general))


def general_prompts() -> list[Example]:
    """The prompts of data/general_prompts.txt, one a line."""
    text = resources.files("perdure").joinpath("data/general_prompts.txt").read_text(encoding="utf-8")
    return [
        Example(f"general-{number}", ({"role": "user", "content": line},), None, origin=f"general_prompts.txt:{number}")
        for number, line in enumerate(text.splitlines(), 1)
    ]


def answered(
    session: Session, rows: Sequence[Example], most: int, seed: int, progress: Progress | None = None
) -> list[Rollout]:
    """Each row with the model's own answer, sampled at temperature 1, of at most ``most`` tokens."""
    prompts = [session.renderer.student_prompt(row) for row in rows]
    seeds = [derive_seed(seed, row.id) for row in rows]
    completions = session.engine.generate(prompts, SamplingParams(most), seeds, progress)
    # No template: without a demonstration both roles see the same prompt.
    return [session.renderer.rollout(row, completion, None) for row, completion in zip(rows, completions, strict=True)]
