"""Skills in order: preflight -> train -> evaluate all -> gate -> promote or refuse. Any step can be taken up again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perdure.anchors import make_anchors
from perdure.config import RunConfig
from perdure.contexts import parse_template
from perdure.files import code_state, now, read_json, replace_text
from perdure.gates import Items, decide
from perdure.measure import (
    PROBE,
    Scores,
    current,
    known_scores,
    measure_probe,
    measure_skill,
    probe_items,
    probe_json,
    score_json,
    write_items,
)
from perdure.models import save
from perdure.preflight import Subject, check_windows, preflight
from perdure.reporting import Reporter
from perdure.runlog import LoopState
from perdure.seeds import derive_seed, permutation
from perdure.session import Session, open_session
from perdure.skills.base import Skill, load_skill
from perdure.stage import Stage
from perdure.stages import Outcome, begin, finished, load_all, settings_hash, settle
from perdure.teacher import make_teacher
from perdure.train import train
from perdure.types import Example, InputError, Verdict
from perdure.workspace import BASE, Workspace


@dataclass
class _Run:
    """One stage while it runs."""

    workspace: Workspace
    config: RunConfig
    reporter: Reporter
    skill: Skill
    scope: dict[str, Skill]
    """Every skill to measure, by name: those taught before and those of this command."""
    stage: str
    parent: str
    session: Session
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.workspace.run_folder(self.stage)

    @property
    def seed(self) -> int:
        return stage_seed(self.config, self.skill)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds to the stage's seconds of ``phase``, kept in a file so that a resumed stage counts all its attempts."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 2)
            replace_text(self.folder / "seconds.json", json.dumps(self.seconds) + "\n")


def learn(workspace: Workspace, folders: Sequence[Path], config: RunConfig, reporter: Reporter, *, force: bool = False,
          restart: bool = False) -> list[Outcome]:  # fmt: skip
    """Teach the skills in ``folders`` one after the other to the champion; the chain stops at nothing but bad input.

    Stages that are finished are not repeated, an unfinished one goes on where it was (``restart`` begins it anew).
    ``force`` trains although the preflight sees no teacher gap. All folders are validated before anything runs.
    """
    skills = load_all(folders)
    kept = {s.name: load_skill(workspace.keep_skill(s.folder, s.name, s.content_hash)) for s in skills}
    for version in workspace.versions()[1:]:
        settle(workspace, version)
    outcomes = []
    for number, skill in enumerate(kept.values(), 1):
        if done := finished(workspace, skill, config):
            reporter.note(f"{skill.name}: {done.decision} already as {done.version}; nothing to do.")
            outcomes.append(done)
            continue
        reporter.stage(f"Skill {number} of {len(kept)}: {skill.name} ({config.train.method.upper()})")
        taught = {name: load_skill(folder) for name, folder in workspace.taught().items()}
        outcomes.append(_learn_one(workspace, skill, taught | kept, config, reporter, force, restart))
    return outcomes


def _learn_one(workspace: Workspace, skill: Skill, scope: dict[str, Skill], config: RunConfig, reporter: Reporter,
               force: bool, restart: bool) -> Outcome:  # fmt: skip
    stage, resumed = begin(workspace, skill, config, restart)
    parent = workspace.resolve("champion")
    if resumed:
        reporter.note(f"Going on with the unfinished stage {stage}.")
    session = open_version(workspace, parent, config)
    run = _Run(workspace, config, reporter, skill, scope, stage, parent, session)
    if (run.folder / "seconds.json").is_file():
        run.seconds = read_json(run.folder / "seconds.json")
    check = _check(run)
    if check and not check["ready"] and not force:
        workspace.append("refuse", stage=stage, skill=skill.name, parent=parent, reason=check["advice"][0])
        workspace.remove_run(stage)
        hint = "--force trains anyway."
        return Outcome(skill.name, stage, None, "refused", (*check["advice"], hint))
    before = _baseline(run)
    state = _train(run, check)
    return _judge(run, before, check, state)


def _baseline(run: _Run) -> Scores:
    """What the parent scores on everything in scope; measured now where it is not known yet."""
    scores = known_scores(run.workspace, run.parent)
    missing = [skill for skill in run.scope.values() if not current(scores, skill, run.config)]
    wants_probe = scores.probe is None or set(scores.probe["tasks"]) != set(run.config.probe.tasks)
    folder = run.folder / "baseline"
    if missing or (wants_probe and run.config.probe.tasks):
        with run.timed("evaluate"):
            measured = [measure_skill(run.session, s, run.config, run.reporter, run.parent) for s in missing]
        with run.timed("probe"):
            probed = measure_probe(run.session, run.config, run.reporter, run.parent) if wants_probe else None
        write_items(folder, measured, probed)
        entry = {"version": run.parent, "probe": probe_json(probed),
                 "scores": {s.skill: score_json(s, run.scope[s.skill]) for s in measured}}  # fmt: skip
        replace_text(run.folder / "baseline.json", json.dumps(entry, indent=1) + "\n")
        scores = known_scores(run.workspace, run.parent)
    return scores


def open_version(workspace: Workspace, name: str, config: RunConfig) -> Session:
    """Load a version by its full name; the base model has no weights of its own here."""
    return open_session(config, None if name == BASE else workspace.version_folder(name))


def stage_seed(config: RunConfig, skill: Skill) -> int:
    """The seed of a skill's stage: another content is another stage."""
    return derive_seed(config.seed, "stage", skill.name, skill.content_hash)


def _preflight(session: Session, skill: Skill, config: RunConfig, reporter: Reporter) -> dict[str, Any]:
    with reporter.phase("preflight: teacher against student", 0, "rows") as phase:
        found = preflight(subject_of(session, skill), config.context, config.preflight, config.train,
                          stage_seed(config, skill), _rows_of(phase))  # fmt: skip
    return found.to_json()


def subject_of(session: Session, skill: Skill) -> Subject:
    """What the preflight looks at."""
    return Subject(skill.name, skill.train, skill.grade, skill.settings.max_new_tokens, session.loaded,
                   session.working, session.engine, session.renderer, session.dtype)  # fmt: skip


def _check(run: _Run) -> dict[str, Any] | None:
    """The preflight's result; None for a method that has no teacher with a demonstration. Every row must fit."""
    if run.config.train.method != "sdft":
        check_windows(subject_of(run.session, run.skill), [])
        return None
    file = run.folder / "preflight.json"
    if not file.is_file():
        with run.timed("preflight"):
            result = _preflight(run.session, run.skill, run.config, run.reporter)
        replace_text(file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    found = read_json(file)
    run.reporter.note(describe_preflight(found))
    return found


def _rows_of(phase: Any) -> Callable[[int, int, int], None]:
    return lambda tokens, done, total: phase.update(done, total, tokens=tokens)


def describe_preflight(check: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"Teacher {check['teacher_accuracy']:.0%} with {check['template']}, student {check['student_accuracy']:.0%}, "
        f"gap {check['gap']:+.0%} on {check['n']} rows; training is predicted to take {check['cost']['seconds']:.0f} s."
    )


def split_validation(
    examples: tuple[Example, ...], share: float, most: int, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training and validation rows: a seeded choice, at least one row left to train on."""
    count = min(most, int(len(examples) * share))
    chosen = set(permutation(derive_seed(seed, "validation"), len(examples))[:count])
    rest = tuple(e for i, e in enumerate(examples) if i not in chosen)
    return rest, tuple(e for i, e in enumerate(examples) if i in chosen)


def _train(run: _Run, check: dict[str, Any] | None) -> LoopState:
    config, session = run.config, run.session
    rows, validation = split_validation(run.skill.train, config.train.validation_share, config.train.validation_max,
                                        run.seed)  # fmt: skip
    with run.timed("train"):
        earlier = [run.scope[name] for name in run.workspace.taught(run.parent) if name != run.skill.name]
        with run.reporter.phase("anchors: what the model says now", 0, "rows") as phase:
            anchors = make_anchors(session, earlier, config.train, run.seed, _rows_of(phase))
        stage = Stage(
            student=session.loaded,
            working=session.working,
            engine=session.engine,
            teacher=_teacher(run, anchored=bool(anchors.general or anchors.earlier)),
            renderer=session.renderer,
            template=parse_template(check["template"] if check else "turns:1"),
            examples=rows,
            validation=validation,
            anchors=anchors,
            grader=run.skill.grade,
            max_new_tokens=run.skill.settings.max_new_tokens,
            dtype=session.dtype,
            seed=run.seed,
            folder=run.folder,
        )
        with run.reporter.phase(f"train on {len(rows)} rows", config.train.steps, "steps") as phase:
            return train(stage, config.train, _steps_of(phase))


def _teacher(run: _Run, anchored: bool) -> Any:
    config, session = run.config, run.session
    if config.train.method == "sft" and not anchored:
        return None
    kind = config.train.teacher if config.train.method == "sdft" else "frozen"
    original = open_session(config).loaded.model if kind == "original" else None
    return make_teacher(kind, student=session.loaded.model, working=session.working, original=original,
                        dtype=session.dtype, teacher_update_rate=config.train.teacher_update_rate)  # fmt: skip


def _steps_of(phase: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Turns the loop's lines into progress: what a step processed, and the last validation's accuracy."""
    seen, accuracy = 0, ""

    def report(line: dict[str, Any], timings: dict[str, Any]) -> None:
        nonlocal seen, accuracy
        if "validation_accuracy" in line:
            accuracy = f", validation {line['validation_accuracy']:.0%}"
            phase.update(line["step"], note=accuracy.removeprefix(", "))
            return
        tokens = sum(timings["tokens"].values())
        note = f"{line['phase'].replace('_', ' ')}, loss {line['loss']:.3f}{accuracy}"
        phase.update(line["step"], tokens=tokens - seen, note=note)
        seen = tokens

    return report


def _judge(run: _Run, before: Scores, check: dict[str, Any] | None, state: LoopState) -> Outcome:
    """Measure the candidate on everything, let the gate decide, publish the version with its verdict."""
    workspace, config, name = run.workspace, run.config, run.workspace.next_version()
    with run.timed("evaluate"):
        scores = [measure_skill(run.session, skill, config, run.reporter, name) for skill in run.scope.values()]
    with run.timed("probe"):
        probed = measure_probe(run.session, config, run.reporter, name)
    after: dict[str, Items] = {s.skill: {item.id: item.score >= 1 for item in s.items} for s in scores}
    after |= probe_items(probed.items if probed else [])
    earlier = [skill for skill in workspace.taught(run.parent) if skill != run.skill.name]
    kept = dict.fromkeys(earlier, "skill") | {f"{PROBE}/{task}": "prior" for task in config.probe.tasks}
    budgets = {n: b for n, s in run.scope.items() if (b := s.settings.retention_budget) is not None}
    verdict = decide(config.gate, run.skill.name, before.items, after, kept, budgets)
    info = _describe(run, name, check, state, verdict) | {
        "scores": {s.skill: score_json(s, run.scope[s.skill]) for s in scores},
        "probe": probe_json(probed),
    }

    def write(folder: Path) -> None:
        save(run.session.loaded, folder)
        write_items(folder / "evaluation", scores, probed)

    workspace.add_version(info, write)
    promoted = settle(workspace, name)
    for reason in verdict.reasons:
        run.reporter.note(reason)
    return Outcome(run.skill.name, run.stage, name, "promoted" if promoted else "refused", verdict.reasons)


def _describe(run: _Run, name: str, check: dict[str, Any] | None, state: LoopState, verdict: Verdict) -> dict[str, Any]:
    config = run.config
    base = run.workspace.version(BASE)["hashes"]["base"]
    hashes = {"base": base, "skill": run.skill.content_hash, "config": settings_hash(config), "code": code_state()}
    return {
        "version": name,
        "parent": run.parent,
        "stage": run.stage,
        "skill": run.skill.name,
        "method": config.train.method,
        "created": now(),
        "seed": config.seed,
        "hashes": hashes,
        "config": config.model_dump(mode="json"),
        "teacher_accuracy": check["teacher_accuracy"] if check else None,
        "verdict": asdict(verdict),
        "cost": {"seconds": run.seconds, "tokens": state.tokens, "steps": state.step, "best_step": state.best_step},
    }


def check_skills(
    workspace: Workspace, folders: Sequence[Path], config: RunConfig, reporter: Reporter
) -> list[dict[str, Any]]:
    """The preflight of each skill on the champion; nothing is written."""
    skills = load_all(folders)
    session = open_version(workspace, workspace.resolve("champion"), config)
    results = []
    for skill in skills:
        reporter.stage(f"{skill.name}: {len(skill.train)} training rows, {len(skill.test)} test rows, all valid")
        results.append(_preflight(session, skill, config, reporter))
    return results


def evaluate_version(workspace: Workspace, version: str, folders: Sequence[Path], config: RunConfig, with_probe: bool,
                     reporter: Reporter) -> dict[str, Any]:  # fmt: skip
    """Measure a version on the given skills (default: those taught on the way to it); nothing is written."""
    name = workspace.resolve(version)
    skills = load_all(folders) if folders else [load_skill(folder) for folder in workspace.taught(name).values()]
    if not skills and not with_probe:
        raise InputError(f"{name}: no skill was taught yet; name one with --skill FOLDER, or ask for --probe")
    session = open_version(workspace, name, config)
    scores = {s.name: score_json(measure_skill(session, s, config, reporter, name), s) for s in skills}
    probed = measure_probe(session, config, reporter, name) if with_probe else None
    return {"version": name, "scores": scores, "probe": probe_json(probed)}
