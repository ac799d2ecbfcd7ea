"""One stage while it runs: what it works on, its clock, and its first three parts: check, baseline, training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perdure.adapters import ADAPTER
from perdure.advisor import ABLE, Recommendation, followed, is_known, provisional, recommend, rehearses
from perdure.anchors import make_anchors
from perdure.config import RunConfig, TrainConfig
from perdure.files import read_json, read_jsonl, replace_text
from perdure.forecast import forecast
from perdure.measure import measure_probe, measure_skill, probe_json, score_json, way_of, write_items
from perdure.methods import AUTO, METHODS, method_label
from perdure.monitor import said_of_manner
from perdure.preflight import Preflight, accuracy_of_teacher, preflight
from perdure.processes import followed_by, together
from perdure.reporting import Reporter, Silent, out_of_memory
from perdure.rollout.base import RolloutEngine
from perdure.runlog import LoopState
from perdure.scores import Scores, known_scores, unmeasured
from perdure.session import FOLLOWED, Session, base_as_teacher, open_session
from perdure.skills.base import Skill, load_skill
from perdure.stage import Anchors
from perdure.staging import make_stage, stage_seed
from perdure.subject import Subject, check_marks, check_skipped, check_thinking, check_windows, unthinking
from perdure.train import train
from perdure.types import InputError
from perdure.workspace import BASE, Workspace
from perdure.written import with_written


@dataclass
class Run:
    """One stage while it runs."""

    workspace: Workspace
    asked: RunConfig
    """The settings of the command, by which a stage is found again."""
    config: RunConfig
    """The same, but for a method that was to be chosen."""
    reporter: Reporter
    skill: Skill
    scope: dict[str, Skill]
    """Every skill to measure, by name: those taught before and those of this command."""
    stage: str
    parent: str
    session: Session
    seconds: dict[str, float] = field(default_factory=dict)
    adapter: Path | None = None
    """Where the student's difference to its parent lies as an adapter, once it is trained and if it is to be kept."""
    branch: str | None = None
    """Set where the stage is part of a replay: its version does not become the champion by itself."""

    @property
    def folder(self) -> Path:
        return self.workspace.run_folder(self.stage)

    @property
    def seed(self) -> int:
        return stage_seed(self.config, self.skill)

    @property
    def earlier(self) -> dict[str, Skill]:
        """Skills that the parent was taught, without the one that is taught now."""
        taught = self.workspace.taught(self.parent)
        return {name: self.scope[name] for name in taught if name != self.skill.name}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds to the stage's seconds of ``phase``, kept in a file so that a resumed stage counts all its attempts."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 2)
            replace_text(self.folder / "seconds.json", json.dumps(self.seconds) + "\n")


def open_version(workspace: Workspace, name: str, config: RunConfig) -> Session:
    """Load a version by its full name; the base model has no weights of its own here.

    Raises InputError where the base model is not the one that the workspace was made with."""
    workspace.check_not_erased(name)
    base = workspace.version(BASE)["hashes"]["base"]
    return open_session(config, workspace.weights_folder(name), base)


def preflight_of(workspace: Workspace, parent: str, session: Session, skill: Skill, scope: Mapping[str, Skill],
                 config: RunConfig, reporter: Reporter) -> dict[str, Any]:  # fmt: skip
    """The teacher gap of ``skill``, and what teaching it to ``parent`` will cost: preflight.json."""
    asked, config = config, _with(config, provisional(config.train))
    with reporter.phase("preflight: teacher against student", 0, "rows") as phase:
        original = base_as_teacher(config, session) if config.train.teacher == "original" and parent != BASE else None
        found = preflight(subject_of(session, skill, config, original), config.context, config.preflight, config.train,
                          stage_seed(config, skill), _rows_of(phase))  # fmt: skip
        del original  # the forecast's own steps need its memory
    recommended = _advised(workspace, parent, session, skill, config, found, reporter).to_json()
    advice: dict[str, Any] = {"recommended": recommended}
    other_way = recommended["method"] != "sdft" or "train.teacher" in recommended["settings"]
    if asked.train.method == AUTO and not found.ready and not is_known(found) and other_way:
        advice |= {"ready": True, "advice": recommended["reasons"]}
    chosen = _with(asked, followed(asked.train, recommended))
    if chosen.train.never_samples:
        advice["advice"] = [*advice.get("advice", found.advice), all_warm(chosen.train)]
    if not config.preflight.forecast:
        return found.to_json() | advice | {"cost": {"seconds": {}, "tokens": {}, "priced": {}}}
    try:
        with reporter.phase("preflight: what it will cost", 0, "steps"):
            cost = forecast(workspace, parent, session, skill, scope, chosen, found)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):  # what was found so far took minutes
            reporter.note(describe_preflight(found.to_json() | {"cost": {"seconds": {}}}))
        raise
    return found.to_json() | advice | {"cost": cost}


def _advised(workspace: Workspace, parent: str, session: Session, skill: Skill, config: RunConfig, found: Preflight,
             reporter: Reporter) -> Recommendation:  # fmt: skip
    """The method to take; where who would teach is not able to, the other of champion and original model is tried."""
    other = None
    if found.teacher_accuracy < ABLE and parent != BASE and not rehearses(config.train):
        original = config.train.teacher != "original"
        who = "the original model" if original else "the champion"
        with reporter.phase(f"preflight: {who} as the teacher", found.n, "rows") as phase:
            subject = subject_of(session, skill, config, base_as_teacher(config, session) if original else None)
            other = accuracy_of_teacher(subject, config.preflight, stage_seed(config, skill), found.template,
                                        lambda tokens, done: phase.update(done, tokens=tokens))  # fmt: skip
    taught = len(workspace.taught(parent).keys() - {skill.name})
    labels = config.train.model_copy(update={"method": "sft"})
    supervised = unthinking(session.renderer, session.renderer.each_turn(skill.train), labels) is None
    return recommend(found, taught, config.train, other, supervised)


def subject_of(
    session: Session, skill: Skill, config: RunConfig, original: tuple[Any, RolloutEngine] | None = None
) -> Subject:
    """What the preflight looks at; ``original``: working copy and engine of the base model, where that is to teach."""
    return Subject(skill.name, skill.train, skill.grade, skill.settings.max_new_tokens, session.loaded,
                   session.working, session.engine, session.renderer, session.dtype,
                   original, skill.acting, config.eval.taken(skill.test))  # fmt: skip


def check_before(run: Run) -> dict[str, Any] | None:
    """The preflight's result; None for a method that has no teacher with a demonstration. Every row must fit. Where
    the method was to be chosen, ``run.config`` has it from then on."""
    name = provisional(run.config.train).method
    method = METHODS[name]
    if run.skill.acting and method.writes_once:
        raise InputError(
            f'{run.skill.name}: method = "{name}" writes single answers beforehand; a conversation '
            "in an environment is learned by sdft, sft and the methods that train on demonstrations"
        )
    if not method.shows:
        check_skipped(run.session.renderer, run.skill.train, run.config.train)
        check_thinking(run.session.renderer, run.skill.train, run.config.train)
        check_marks(run.session.renderer, run.skill.test)
        check_windows(subject_of(run.session, run.skill, run.config), [])
        for row in run.skill.train if method.completions == "document" else ():
            run.session.renderer.document_row(row)
        return None
    file = run.folder / "preflight.json"
    if not file.is_file():
        with run.timed("preflight"):
            result = preflight_of(run.workspace, run.parent, run.session, run.skill, run.scope, run.config,
                                  run.reporter)  # fmt: skip
        replace_text(file, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    found = read_json(file)
    run.reporter.note(describe_preflight(found))
    if run.config.train.method == AUTO:
        run.config = _with(run.config, followed(run.config.train, found["recommended"]))
        told = read_json(run.folder / "stage.json") | {"method": run.config.train.method}
        replace_text(run.folder / "stage.json", json.dumps(told, indent=1) + "\n")
        run.reporter.note(f"{method_label(run.config.train.method)}: {' '.join(found['recommended']['reasons'])}")
        for problem in run.config.train.ignored():
            run.reporter.note(f"train.{problem}; it rests in this stage.")
    if run.config.train.never_samples:
        run.reporter.note(all_warm(run.config.train))
    return found


def all_warm(train: TrainConfig) -> str:
    """What a stage is in which the student never answers by itself."""
    return (f"All {train.steps} steps are warm start (train.warm_start_steps = {train.warm_start_steps}): nothing is "
            "on-policy.")  # fmt: skip


def _with(config: RunConfig, train: TrainConfig) -> RunConfig:
    return config.model_copy(update={"train": train})


def _rows_of(phase: Any) -> Callable[[int, int, int], None]:
    return lambda tokens, done, total: phase.update(done, total, tokens=tokens)


def describe_preflight(check: dict[str, Any]) -> str:
    """One line for people."""
    total = sum(check["cost"]["seconds"].values())
    return (
        f"Teacher {check['teacher_accuracy']:.0%} with {check['template']}, student {check['student_accuracy']:.0%}, "
        f"gap {check['gap']:+.0%} on {check['n']} rows"
        + (f"; the stage will take about {total:.0f} s." if total else ".")
    )


def baseline(run: Run) -> Scores:
    """What the parent scores on everything in scope; measured now where it is not known yet, beside what an earlier
    attempt at this stage measured."""
    way = way_of(run.config).of(run.scope.values())
    scores = known_scores(run.workspace, run.parent, way)
    missing, wants_probe = unmeasured(scores, run.scope.values(), run.config)
    folder = run.folder / "baseline"
    if missing or wants_probe:
        with run.timed("evaluate"):
            measured = [measure_skill(run.session, s, run.config, run.reporter, run.parent) for s in missing]
        with run.timed("probe"):
            probed = measure_probe(run.session, run.config, run.reporter, run.parent) if wants_probe else None
        write_items(folder, measured, probed)
        path = run.folder / "baseline.json"
        known = read_json(path) if path.is_file() else {"probe": None, "scores": {}}
        new = {s.skill: score_json(s, run.scope[s.skill], way) for s in measured}
        entry = {"version": run.parent, "probe": probe_json(probed, way) or known["probe"],
                 "scores": known["scores"] | new}  # fmt: skip
        replace_text(path, json.dumps(entry, indent=1) + "\n")
        scores = known_scores(run.workspace, run.parent, way)
    return scores


def train_stage(run: Run, check: dict[str, Any] | None, train_config: TrainConfig | None = None,
                subfolder: str = "") -> LoopState:  # fmt: skip
    """Train the session's student; ``train_config`` and ``subfolder`` make another attempt beside the first."""
    train_config = train_config or run.config.train
    with run.timed("train"):
        with run.reporter.phase("anchors: what the model says now", 0, "rows") as phase:
            anchors = make_anchors(run.session, list(run.earlier.values()), train_config, run.seed, _rows_of(phase))
        template = check["template"] if check else "turns:1"
        config = _with(run.config, train_config)
        work = (config, anchors, template, run.folder / subfolder)
        with together("train", run.session.key, run.skill.folder, *work):
            state = _train(run.session, run.skill, *work, run.reporter)
    run.adapter = run.folder / subfolder / ADAPTER if train_config.keeps_adapters else None
    lines = read_jsonl(run.folder / subfolder / "metrics.jsonl")
    if said := said_of_manner(lines, train_config.max_length_change):
        run.reporter.note(said)
    return state


def _train(session: Session, skill: Skill, config: RunConfig, anchors: Anchors, template: str, folder: Path,
           reporter: Reporter) -> LoopState:  # fmt: skip
    """What every process does of a stage's training."""
    stage = make_stage(session, skill, config, anchors, template, folder)
    if METHODS[config.train.method].writes_once:
        with reporter.phase("answers that the teacher writes", 0, "rows") as phase:
            stage = with_written(stage, config.train, _rows_of(phase))
    with reporter.phase(f"train on {len(stage.examples)} rows", config.train.steps, "steps") as phase:
        return train(stage, config.train, _steps_of(phase))


@followed_by("train")
def _follow_train(key: int, skill: Path, config: RunConfig, anchors: Anchors, template: str, folder: Path) -> None:
    _train(FOLLOWED[key], load_skill(skill), config, anchors, template, folder, Silent())


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
