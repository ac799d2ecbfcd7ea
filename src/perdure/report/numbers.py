"""The numbers of a workspace, from its files alone: what ``perdure report --json`` prints.

Rows of the accuracy matrix are champions: row 0 is the base model, row i the champion that stage i left behind, that is
the version the next stage started from (for the last stage: the champion now). So a refused candidate repeats the row
above it, and so does a version that was rolled back. What the candidate itself scored stands in ``stages``.

Forgetting, transfer and retention follow the champion's own lineage, in which every version taught one skill: a refused
candidate gave no skill the time to be forgotten, so it must not count as a stage that was survived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perdure import retention
from perdure.compare import together_in
from perdure.gates import Together, unit_of
from perdure.report.record import Probe, Record, Run, Score, Version, read_compared, read_record
from perdure.stats import paired_difference
from perdure.types import InputError
from perdure.workspace import BASE, Workspace

PHASES = ("preflight", "train", "evaluate", "probe")


def summary(folder: Path) -> dict[str, Any]:
    """Every number of the workspace in ``folder`` and of those under its ``compare/``, ready for JSON.

    Accuracies are 0..1, times seconds; what was not measured is None, so there is no NaN. Raises InputError when the
    folder is no workspace or a file is damaged.
    """
    return summarise(read_record(folder), read_compared(folder))


def summarise(record: Record, compared: dict[str, Record]) -> dict[str, Any]:
    """``summary`` of records that are read already."""
    result = _describe(record)
    result["compared"] = {name: _describe(other) | {"compared": {}} for name, other in compared.items()}
    result["differences"] = {name: _differences(record, other, result["skills"]) for name, other in compared.items()}
    return result


def _describe(record: Record) -> dict[str, Any]:
    candidates = [version for version in record.versions.values() if version.version != BASE]
    champions = _champions(record, candidates)
    skills = _skills(record, candidates)
    taught_by = [_taught_by(record, skill) for skill in skills]
    rows = [record.scores(name) for name in champions]
    matrix = [[_accuracy(row.get(skill)) for skill in skills] for row in rows]
    return {
        "workspace": record.folder.resolve().name,
        "model": record.config.model.source,
        "base": record.versions[BASE].hashes.get("base"),
        "method": _method(record, candidates),
        "champion": record.champion,
        "lineage": record.lineage(record.champion)[::-1],
        "skills": skills,
        "stages": [_stage(record, *pair) for pair in zip(candidates, champions[1:], strict=True)],
        "unfinished": [_unfinished(run) for run in _open_runs(record, candidates)],
        "not_started": _not_started(record, candidates),
        "gate_enforced": record.config.gate.enforce,
        "rows": champions,
        "accuracy_matrix": matrix,
        "intervals": [[_interval(row.get(skill)) for skill in skills] for row in rows],
        "n_matrix": [[row[skill].n if skill in row else None for skill in skills] for row in rows],
        "n": [_n(rows, record, skill) for skill in skills],
        "content_changed": [skill for skill in skills if _changed([row.get(skill) for row in rows])],
        "kinds": {
            skill: kinds for skill in skills if len(kinds := _kinds(rows[0].get(skill), rows[-1].get(skill))) > 1
        },
        "taught_by": taught_by,
        "learned_at": [_learned_at(record, version, champions) for version in taught_by],
        "final_accuracy": list(matrix[-1]),
        **_learning(record, skills, taught_by, [_teacher(record, skill, candidates) for skill in skills]),
        **_prior(record),
        **_cost(candidates),
    }


def _kinds(before: Score | None, now: Score | None) -> list[dict[str, Any]]:
    """The kinds of a skill's test rows: accuracy of the base model and now."""
    old = before.kinds if before else {}
    return [{"kind": kind, "base": old[kind].accuracy if kind in old else None, "now": found.accuracy, "n": found.n}
            for kind, found in (now.kinds if now else {}).items()]  # fmt: skip


# Stages and champions


def _champions(record: Record, candidates: Sequence[Version]) -> list[str]:
    """The champion of each row, [S + 1]: what the next stage started from is what a stage left behind."""
    if not candidates:
        return [BASE]
    served = _champion_at_its_time(record)
    later = [served.get(v.version, BASE) if v.branch else v.parent or BASE for v in candidates[1:]]
    if unknown := [name for name in later if name not in record.versions]:
        raise InputError(f"{record.folder}: damaged, a version's parent {unknown[0]!r} does not exist")
    return [BASE, *later, record.champion]


def _champion_at_its_time(record: Record) -> dict[str, str]:
    """Version -> the champion when it was made. Of a replay's versions that is not their parent."""
    champion, found = BASE, {}
    for line in record.ledger:
        if line.get("event") in ("init", "promote", "rollback"):
            champion = str(line.get("version"))
        elif line.get("event") == "candidate":
            found[str(line.get("version"))] = champion
    return found


def _skills(record: Record, candidates: Sequence[Version]) -> list[str]:
    taught = [version.skill for version in candidates] + [run.info.skill for run in _open_runs(record, candidates)]
    measured = [skill for name in record.versions for skill in record.scores(name)]
    return [skill for skill in dict.fromkeys([*taught, *measured]) if skill]


def _taught_by(record: Record, skill: str) -> str | None:
    """The version of the champion's lineage that taught the skill (the last one); None when none did."""
    return next((name for name in record.lineage(record.champion) if record.versions[name].skill == skill), None)


def _learned_at(record: Record, version: str | None, champions: Sequence[str]) -> int | None:
    """The first row whose champion is ``version`` or descends from it."""
    if version is None:
        return None
    return next(row for row, name in enumerate(champions) if version in record.lineage(name))


def _method(record: Record, candidates: Sequence[Version]) -> str:
    used = dict.fromkeys(version.method for version in candidates if version.method)
    return ", ".join(used) or record.config.train.method


def _stage(record: Record, version: Version, champion: str) -> dict[str, Any]:
    """One finished stage. ``in_force``: its candidate is part of the champion that the stage left behind."""
    verdict = version.verdict
    return {
        "stage": version.stage,
        "skill": version.skill,
        "method": version.method,
        "version": version.version,
        "parent": version.parent,
        "decision": verdict.decision if verdict else None,
        "reasons": list(verdict.reasons) if verdict else [],
        "champion": champion,
        "in_force": version.version in record.lineage(champion),
        "scores": {name: score.model_dump() for name, score in record.scores(version.version).items()},
    }


def _open_runs(record: Record, candidates: Sequence[Version]) -> list[Run]:
    """Stages without a version: running, interrupted, or stopped by the preflight."""
    done = {version.stage for version in candidates}
    return [run for stage, run in record.runs.items() if stage not in done]


def _unfinished(run: Run) -> dict[str, Any]:
    steps = [line["step"] for line in run.metrics() if isinstance(line.get("step"), int)]
    planned = run.info.config.get("train", {}).get("steps")
    return {
        "stage": run.stage,
        "skill": run.info.skill,
        "method": run.info.method,
        "parent": run.info.parent,
        "steps": max(steps, default=0),
        "steps_planned": planned if isinstance(planned, int) else None,
    }


def _not_started(record: Record, candidates: Sequence[Version]) -> list[dict[str, Any]]:
    """Skills that the preflight turned away and that were not trained since: the ledger alone tells of them."""
    tried = {version.skill for version in candidates}
    refused = [line for line in record.ledger if line.get("event") == "refuse" and not line.get("version")]
    last = {line["skill"]: str(line.get("reason", "")) for line in refused if isinstance(line.get("skill"), str)}
    return [{"skill": skill, "reason": reason} for skill, reason in last.items() if skill not in tried]


# Cells


def _accuracy(score: Score | None) -> float | None:
    return None if score is None else score.accuracy


def _interval(score: Score | None) -> list[float] | None:
    return None if score is None or score.low is None or score.high is None else [score.low, score.high]


def _changed(cells: Sequence[Score | None]) -> bool:
    """Whether the cells of a column were not all measured on the same content of the skill and as many rows."""
    return len({(cell.skill_hash, cell.n) for cell in cells if cell}) > 1


def _n(rows: Sequence[dict[str, Score]], record: Record, skill: str) -> int | None:
    """Test rows of a skill where it was measured last: in the champion, else in an earlier row, else elsewhere."""
    newest = [*reversed(rows), *(record.scores(name) for name in reversed(record.versions))]
    return next((scores[skill].n for scores in newest if skill in scores), None)


def _teacher(record: Record, skill: str, candidates: Sequence[Version]) -> float | None:
    """What the teacher reached on the skill's training rows before the skill was taught (the last time)."""
    for version in reversed(candidates):
        if version.skill == skill:
            if version.teacher_accuracy is not None:
                return version.teacher_accuracy
            run = record.runs.get(version.stage or "")
            return run.preflight.teacher_accuracy if run and run.preflight else None
    found = [run.preflight for run in record.runs.values() if run.info.skill == skill and run.preflight]
    return found[-1].teacher_accuracy if found else None


# Sums


def _learning(
    record: Record, skills: Sequence[str], taught_by: Sequence[str | None], teacher: list[float | None]
) -> dict[str, Any]:
    """What perdure.retention says along the champion's lineage; lists are [J], None for a skill that is not taught."""
    lineage = record.lineage(record.champion)[::-1]
    taught = [place for place, version in enumerate(taught_by) if version]
    rows = [lineage.index(version) for version in taught_by if version]
    matrix = [[_or_nan(record.scores(name).get(skills[place])) for place in taught] for name in lineage]
    for column, place in enumerate(taught):  # when learned: not what a later stage measured of it on other rows
        row = lineage.index(taught_by[place] or "")
        if own := record.versions[lineage[row]].scores.get(skills[place]):
            matrix[row][column] = own.accuracy

    def single(measure: Callable[..., Any]) -> float | None:
        return _plain(measure(matrix, rows)) if taught else None

    def each(measure: Callable[..., Any]) -> list[float | None]:
        values = dict(zip(taught, measure(matrix, rows), strict=True)) if taught else {}
        return [_plain(values[place]) if place in values else None for place in range(len(skills))]

    learned = each(retention.accuracy_when_learned)
    now = [score.accuracy for score in record.scores(record.champion).values()]
    return {
        "accuracy_when_learned": learned,
        "teacher_accuracy": teacher,
        "student_share_of_teacher": [_ratio(*pair) for pair in zip(learned, teacher, strict=True)],
        "forgetting": each(retention.forgetting),
        "retention": each(retention.retention),
        "mean_retention": single(retention.mean_retention),
        "backward_transfer": single(retention.backward_transfer),
        "forward_transfer": single(retention.forward_transfer),
        "average_accuracy": _plain(retention.average_accuracy([now])) if now else None,
    }


def _prior(record: Record) -> dict[str, Any]:
    """Prior capabilities: each task in the base, in the champion and in every version that was probed."""
    final = record.probe(record.champion)
    probes = {name: probe for name in record.versions if (probe := record.probe(name, final))}
    base = probes.get(BASE)
    tasks = dict.fromkeys(task for probe in probes.values() for task in probe.tasks)
    return {
        "prior": {
            task: {
                "base": _task(base, task),
                "final": _task(final, task),
                "versions": {name: _task(probe, task) for name, probe in probes.items()},
            }
            for task in tasks
        },
        "prior_average": {
            # Base and champion are compared on the tasks that both were probed on.
            "base": _mean_of(base, final or base),
            "final": _mean_of(final, base or final),
            "versions": {name: _mean_of(probe, base or probe) for name, probe in probes.items()},
        },
    }


def _task(probe: Probe | None, task: str) -> dict[str, Any] | None:
    score = probe.tasks.get(task) if probe else None
    return score.model_dump() if score else None


def _mean_of(probe: Probe | None, reference: Probe | None) -> float | None:
    """Unweighted mean over the tasks of ``probe`` that ``reference`` has too."""
    if probe is None or reference is None:
        return None
    values = [score.accuracy for task, score in probe.tasks.items() if task in reference.tasks]
    return sum(values) / len(values) if values else None


def _cost(candidates: Sequence[Version]) -> dict[str, Any]:
    """Seconds and tokens of all finished stages, refused ones included: they were paid for too."""
    seconds = _by_stage(candidates, [version.cost.seconds for version in candidates])
    tokens = _by_stage(candidates, [version.cost.tokens for version in candidates])
    return {
        "seconds": _total([*seconds.values(), dict.fromkeys(PHASES, 0)]),
        "seconds_by_stage": seconds,
        "tokens": _total(list(tokens.values())),
        "tokens_by_stage": tokens,
    }


def _by_stage(candidates: Sequence[Version], costs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for version, cost in zip(candidates, costs, strict=True):
        grouped.setdefault(version.stage or version.version, []).append(cost)
    return {stage: _total(parts) for stage, parts in grouped.items()}


def _total(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum by kind, and ``total`` over all kinds."""
    kinds = sorted({kind for part in parts for kind in part} - {"total"}, key=_phase_order)
    sums = {kind: sum(part.get(kind, 0) for part in parts) for kind in kinds}
    return sums | {"total": sum(sums.values())}


def _phase_order(kind: str) -> tuple[int, str]:
    return (PHASES.index(kind) if kind in PHASES else len(PHASES), kind)


def _differences(record: Record, other: Record, skills: Sequence[str]) -> dict[str, Any]:
    """By skill, our champion minus the other's on the test rows that both answered; None where they share none."""
    workspace, measured = Workspace.open(record.folder), record.scores(record.champion)
    contents = {skill: measured[skill].skill_hash if skill in measured else None for skill in skills}
    return {skill: _difference(record, other, skill, together_in(workspace, skill, contents[skill]))
            for skill in skills}  # fmt: skip


def _difference(record: Record, other: Record, skill: str, together: Together) -> dict[str, Any] | None:
    ours, theirs = record.items(record.champion, skill), other.items(other.champion, skill)
    shared = [key for key, item in ours.items() if key in theirs and theirs[key].prompt == item.prompt]
    if not shared:
        return None
    found = paired_difference([theirs[key].right for key in shared], [ours[key].right for key in shared],
                              clusters=[unit_of(key, together) for key in shared])  # fmt: skip
    return {key: asdict(found)[key] for key in ("n", "change", "low", "high", "p_worse", "p_better")}


def _or_nan(score: Score | None) -> float:
    return math.nan if score is None else score.accuracy


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _plain(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
