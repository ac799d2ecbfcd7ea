"""Skills in order: preflight -> train -> evaluate all -> gate -> promote or refuse. Any step can be taken up again."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from perdure.advisor import provisional
from perdure.checkpoint import training_state, trainings
from perdure.config import RunConfig
from perdure.files import read_json
from perdure.footprint import Work, estimate, lengths_renderer, parse_hardware, shape_of, share_of_vllm, work_of
from perdure.gates import USUAL_NOISE, guards_of, least_budget
from perdure.judging import judge, judge_again
from perdure.measure import measure_probe, measure_skill, probe_json, score_json, way_of
from perdure.methods import method_label
from perdure.probe import check_tasks
from perdure.reporting import Reporter
from perdure.rows import row_counts
from perdure.running import Run, baseline, check_before, open_version, preflight_of, train_stage
from perdure.skills.base import Skill, independent, kept_rows, load_skill, prompt_key
from perdure.stages import Outcome, asked_for, begin, differing, finished, holds_nothing, load_all, settle_all
from perdure.subject import candidates
from perdure.types import InputError
from perdure.workspace import Workspace


def learn(workspace: Workspace, folders: Sequence[Path], config: RunConfig, reporter: Reporter, *, force: bool = False,
          restart: bool = False) -> list[Outcome]:  # fmt: skip
    """Teach the skills in ``folders`` one after the other to the champion; the chain stops at nothing but bad input.

    Stages that are finished are not repeated, an unfinished one goes on where it was (``restart`` begins it anew).
    ``force`` trains although the preflight sees no teacher gap. All folders are validated before anything runs.
    """
    skills = load_all(folders)
    kept = {s.name: load_skill(workspace.skills.keep(s.folder, s.name, s.content_hash)) for s in skills}
    settle_all(workspace)
    _tell_of_waiting(workspace, kept, reporter)
    _tell_of_known_rows(workspace, kept.values(), reporter)
    outcomes = []
    for number, skill in enumerate(kept.values(), 1):
        if done := finished(workspace, skill, config):
            reporter.note(f"{skill.name}: {done.decision} already as {done.version}; nothing to do."
                          + _not_as_asked(workspace, done.version, config))  # fmt: skip
            outcomes.append(done)
            continue
        if judged := judge_again(workspace, skill, config, reporter):
            outcomes.append(judged)
            continue
        reporter.stage(f"Skill {number} of {len(kept)}: {skill.name} ({method_label(config.train.method)})")
        taught = {name: load_skill(folder) for name, folder in workspace.taught().items()}
        # What was taught is guarded and rehearsed as it was taught, though this command may bring other rows for it.
        scope = kept | taught | {skill.name: skill}
        outcomes.append(learn_one(workspace, skill, scope, config, reporter,
                                  parent=workspace.resolve("champion"), force=force, restart=restart))  # fmt: skip
    return outcomes


def _not_as_asked(workspace: Workspace, version: str | None, config: RunConfig) -> str:
    """What a finished stage has of other settings than these, and how to teach the skill with these."""
    deciding = ("train.", "context.", "thinking.", "seed ")
    others = differing(asked_for(workspace.version(version)), config) if version else []
    others = [setting for setting in others if setting.startswith(deciding)]  # of the gate another verdict may come
    if not others:
        return ""
    return (f" It was taught with {', '.join(others)}: to teach it otherwise, bring more rows for it, or go back to "
            "the version before it (perdure rollback) and repeat this.")  # fmt: skip


def _tell_of_waiting(workspace: Workspace, skills: Container[str], reporter: Reporter) -> None:
    """A version that waits for a person is not what the next stage starts from."""
    waiting, champion = workspace.aliases()["candidate"], workspace.resolve("champion")
    if waiting and (skill := workspace.version(waiting)["skill"]) not in skills:
        reporter.note(f"{waiting} ({skill}) is held and waits for a decision; this starts from the champion "
                      f"{champion}, without it.")  # fmt: skip


def _tell_of_known_rows(workspace: Workspace, skills: Iterable[Skill], reporter: Reporter) -> None:
    """Test rows that an earlier stage of the champion trained on, when it taught other rows of the same skill."""
    records = workspace.lineage_records()[1:]
    for skill in skills:
        earlier = [record for record in records if record["skill"] == skill.name]
        test = {prompt_key(row) for row in skill.test} if earlier else set[str]()
        for record in earlier:
            folder = workspace.skills.folder_of(skill.name, str(record["hashes"].get("skill")))
            if record["hashes"].get("skill") == skill.content_hash or not folder.is_dir():
                continue
            if known := test & {prompt_key(row) for row in kept_rows(folder, "train.jsonl")}:
                reporter.note(f"{skill.name}: {len(known)} of its {len(skill.test)} test prompts were training rows of "
                              f"{record['version']}, which knows them: they measure memory. Leave rows on their side: "
                              "perdure import with the same --seed does.")  # fmt: skip


def learn_one(
    workspace: Workspace, skill: Skill, scope: dict[str, Skill], config: RunConfig, reporter: Reporter, *, parent: str,
    branch: str | None = None, force: bool = False, restart: bool = False,
) -> Outcome:  # fmt: skip
    """One stage: teach ``skill`` to ``parent``. On a ``branch`` the champion stays what it is."""
    stage, resumed = begin(workspace, skill, config, restart, parent, branch)
    if resumed:
        reporter.note(f"Going on with the unfinished stage {stage}.")
    with _leaving_nothing(workspace, stage):
        check_tasks(config.probe.tasks)
        session = open_version(workspace, parent, config)
        run = Run(workspace, config, config, reporter, skill, scope, stage, parent, session, branch=branch)
        if (run.folder / "seconds.json").is_file():
            run.seconds = read_json(run.folder / "seconds.json")
        check = check_before(run)
    begun = resumed and any(map(training_state, trainings(run.folder)))  # it was forced, then
    if check and not check["ready"] and not force and not begun:
        workspace.append("refuse", stage=stage, skill=skill.name, parent=parent, reason=check["advice"][0])
        workspace.runs.remove(stage)
        hint = "--force trains anyway."
        return Outcome(skill.name, stage, None, "refused", (*check["advice"], hint))
    before = baseline(run)
    state = train_stage(run, check)
    return judge(run, before, check, state)


@contextlib.contextmanager
def _leaving_nothing(workspace: Workspace, stage: str) -> Iterator[None]:
    """Where bad input ends a stage before anything of it was computed, the command is corrected and begins anew."""
    try:
        yield
    except InputError:
        if holds_nothing(workspace.run_folder(stage)):
            workspace.runs.remove(stage)
        raise


def check_skills(
    workspace: Workspace, folders: Sequence[Path], config: RunConfig, reporter: Reporter
) -> list[dict[str, Any]]:
    """The preflight of each skill on the champion; nothing is written."""
    skills = load_all(folders)
    check_tasks(config.probe.tasks)
    champion = workspace.resolve("champion")
    session = open_version(workspace, champion, config)
    taught = {name: load_skill(folder) for name, folder in workspace.taught().items()}
    _tell_of_known_rows(workspace, skills, reporter)
    results = []
    for skill in skills:
        reporter.stage(f"{skill.name}: {len(skill.train)} training rows, {len(skill.test)} test rows, all valid")
        found = preflight_of(workspace, champion, session, skill, taught | {skill.name: skill}, config, reporter)
        earlier = len(taught.keys() - {skill.name})
        results.append(found | {"test": _test_power(workspace, skill, config), "train": _shown(skill, earlier, config)})
    return results


def check_hardware(
    workspace: Workspace, folders: Sequence[Path], config: RunConfig, hardware: str
) -> list[dict[str, Any]]:
    """What teaching each skill needs on ``hardware``, by arithmetic: no weights are loaded, nothing is written."""
    target, skills, train = parse_hardware(hardware), load_all(folders), provisional(config.train)
    shape, renderer, share = shape_of(config.model), lengths_renderer(config.model), share_of_vllm(config.rollout)

    def work(skill: Skill) -> Work:
        templates = candidates(config.context, skill.train)
        return work_of(renderer, skill.train, templates, train, config.eval.batch_tokens)

    return [{"skill": skill.name, **estimate(shape, work(skill), train, target, share)} for skill in skills]


def _shown(skill: Skill, earlier: int, config: RunConfig) -> dict[str, int]:
    """How many of its training rows a stage can show, by its steps; ``earlier``: skills before it."""
    train = config.train
    a_step = row_counts(train, earlier if train.anchor_share else 0, general=bool(train.anchor_share))["taught"]
    return {"rows": len(skill.train), "a_step": a_step, "steps": train.steps}


def _test_power(workspace: Workspace, skill: Skill, config: RunConfig) -> dict[str, Any]:
    """Which loss the gate could see on this skill's test rows, once it is an earlier one."""
    guards = guards_of(1 + len(workspace.taught().keys() - {skill.name}), len(config.probe.tasks))
    rows = config.eval.taken(skill.test)
    units = independent(rows)
    return {"rows": len(rows), "units": units, "budget": skill.settings.retention_budget or config.gate.budget,
            "least_budget": least_budget(units, guards, config.gate, USUAL_NOISE)}  # fmt: skip


def evaluate_version(workspace: Workspace, version: str, folders: Sequence[Path], config: RunConfig, with_probe: bool,
                     reporter: Reporter) -> dict[str, Any]:  # fmt: skip
    """Measure a version on the given skills (default: those taught on the way to it); nothing is written."""
    name = workspace.resolve(version)
    workspace.check_not_erased(name)
    skills = load_all(folders) if folders else [load_skill(folder) for folder in workspace.taught(name).values()]
    if not skills and not with_probe:
        raise InputError(f"{name}: no skill was taught yet; name one with --skill FOLDER, or ask for --probe")
    session = open_version(workspace, name, config)
    way = way_of(config)
    scores = {s.name: score_json(measure_skill(session, s, config, reporter, name), s, way) for s in skills}
    probed = measure_probe(session, config, reporter, name) if with_probe else None
    return {"version": name, "scores": scores, "probe": probe_json(probed, way)}
