"""From a session and a skill to the live objects of a stage."""

from __future__ import annotations

from pathlib import Path

from perdure.config import RunConfig
from perdure.methods import METHODS
from perdure.rollout.base import RolloutEngine
from perdure.seeds import derive_seed, permutation
from perdure.session import Session, base_model, make_engine
from perdure.skills.base import Skill
from perdure.stage import Anchors, Stage, by_conversation
from perdure.teacher import FixedTeacher, Teacher, make_teacher, start_teacher
from perdure.templates import parse_template
from perdure.types import Example


def stage_seed(config: RunConfig, skill: Skill) -> int:
    """The seed of a skill's stage: another content is another stage."""
    return derive_seed(config.seed, "stage", skill.name, skill.content_hash)


def split_validation(
    examples: tuple[Example, ...], share: float, most: int, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training and validation rows: a seeded choice, at least one row left to train on. Turns of one conversation go
    the same way, as each holds the answers of those before it; where all conversations are longer than the share, the
    shortest validates."""
    count, groups = min(most, int(len(examples) * share)), by_conversation(examples)
    chosen: set[int] = set()
    for group in permutation(derive_seed(seed, "validation"), len(groups)):
        if len(chosen) + len(groups[group]) <= count:
            chosen |= set(groups[group])
    if count and not chosen and len(groups) > 1:
        chosen = set(min(groups, key=len))
    rest = tuple(e for i, e in enumerate(examples) if i not in chosen)
    return rest, tuple(e for i, e in enumerate(examples) if i in chosen)


def make_stage(session: Session, skill: Skill, config: RunConfig, anchors: Anchors, template: str,
               folder: Path) -> Stage:  # fmt: skip
    """The stage that trains the session's student on the skill; a frozen teacher is the student as it is now."""
    train, seed = config.train, stage_seed(config, skill)
    rows, validation = split_validation(skill.train, train.validation_share, train.validation_max, seed)
    teacher = _teacher(session, config, anchored=bool(anchors.general or anchors.earlier))
    start = None
    if teacher and not teacher.is_start and (anchors.general or anchors.earlier):
        start = start_teacher(session.loaded.model, session.working, session.dtype, bool(train.lora_rank))
    return Stage(
        student=session.loaded,
        working=session.working,
        engine=session.engine,
        teacher=teacher,
        holder=start,
        acting=skill.acting,
        writer=_writer(session, config, teacher),
        renderer=session.renderer,
        template=parse_template(template),
        examples=rows,
        validation=validation,
        anchors=anchors,
        grader=skill.grade,
        max_new_tokens=skill.settings.max_new_tokens,
        dtype=session.dtype,
        seed=seed,
        folder=folder,
    )


def _writer(session: Session, config: RunConfig, teacher: Teacher | None) -> RolloutEngine:
    """The engine of who teaches, where answers are written before the first step."""
    if METHODS[config.train.method].writes_once and isinstance(teacher, FixedTeacher) and not teacher.is_start:
        return make_engine(session.loaded, teacher.model, config.eval.batch_tokens)
    return session.engine


def _teacher(session: Session, config: RunConfig, anchored: bool) -> Teacher | None:
    method = METHODS[config.train.method]
    if not method.scored(anchored):
        return None
    kind = config.train.teacher if method.shows else "frozen"
    if kind == "original" and session.is_base:
        kind = "frozen"  # the same weights, and one copy fewer
    original = base_model(config, session) if kind == "original" else None
    return make_teacher(kind, student=session.loaded.model, working=session.working, original=original,
                        dtype=session.dtype, teacher_update_rate=config.train.teacher_update_rate,
                        adapters=bool(config.train.lora_rank), divided=config.train.fsdp)  # fmt: skip
