"""Scores of versions: measured once, kept in files, found again.

A version's scores lie in its ``version.json``; what a parent scored before a stage lies in that stage's
``baseline.json``. Items lie beside, one line each, so that two versions can be compared item by item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perdure.config import RunConfig
from perdure.evaluate import evaluate
from perdure.files import read_json, read_jsonl, write_jsonl
from perdure.gates import Guard, Items
from perdure.models import compute_dtype, device_of
from perdure.probe import ProbeResult, probe
from perdure.reporting import Reporter
from perdure.session import Session
from perdure.skills.base import Skill
from perdure.skills.graders import contains
from perdure.types import SkillScore
from perdure.workspace import BASE, Workspace

PROBE = "probe"


@dataclass(frozen=True)
class Way:
    """How scores are taken. Between two ways a difference says nothing of the versions."""

    skills: str
    """Hash of what answers depend on beside weights and rows: precision, prompt switches, thinking, engine."""
    probe: str
    """The same of the prior tasks, with their rows and the seed that draws them."""
    rows: int
    """``eval.rows``."""

    def fits(self, score: Mapping[str, Any]) -> bool:
        """Whether a skill's score was taken this way."""
        whole = score["n"] == score.get("test_rows") and not 0 < self.rows < score["n"]
        return score.get("measured_with") == self.skills and (whole or score["n"] == self.rows)


def way_of(config: RunConfig) -> Way:
    """How scores are taken under these settings on this machine."""
    model = config.model.model_dump(mode="json") | {"compute_dtype": str(compute_dtype(config.model)),
                                                    "device": device_of(config.model).type}  # fmt: skip
    answers = [
        model,
        config.context.student_switches,
        str(config.context.date),
        config.thinking.model_dump(mode="json"),
        config.rollout.engine,
    ]
    return Way(_hash(answers), _hash([model, config.probe.rows, config.seed]), config.eval.rows)


def _hash(settings: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def measure_skill(session: Session, skill: Skill, config: RunConfig, reporter: Reporter, who: str) -> SkillScore:
    """Greedy answers to the skill's test rows, graded."""
    rows = skill.test[: config.eval.rows or None]
    with reporter.phase(f"evaluate {who} on {skill.name}", len(rows), "rows") as phase:
        return evaluate(
            session.engine, session.renderer, skill.name, rows, skill.grade, skill.settings.max_new_tokens,
            lambda tokens, done: phase.update(done, tokens=tokens), skill.acting,
        )  # fmt: skip


def measure_probe(session: Session, config: RunConfig, reporter: Reporter, who: str) -> ProbeResult | None:
    """Prior capabilities; None when the settings name no task."""
    if not config.probe.tasks:
        return None
    with reporter.phase(f"prior capabilities of {who}", 0, "tokens") as phase:
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal before
            phase.update(done, total, tokens=done - before)
            before = done

        return probe(
            session.working, session.loaded.tokenizer, tasks=config.probe.tasks, rows=config.probe.rows,
            seed=config.seed, progress=progress, key=session.key,
        )  # fmt: skip


def score_json(score: SkillScore, skill: Skill, way: Way) -> dict[str, Any]:
    """A score without its items, as version.json and baseline.json hold it, with the hashes of what was measured on and
    how; where test rows have a ``metadata.kind``, the accuracy of each kind; where they have a list of texts as
    ``metadata.old``, how many answers give one of these outdated texts."""
    numbers = {key: value for key, value in asdict(score).items() if key not in ("skill", "items")}
    kinds: dict[str, list[bool]] = {}
    changed: list[tuple[bool, bool]] = []
    of_row = {example.id: example.metadata for example in skill.test}
    for item in score.items:
        metadata, right = of_row.get(item.id, {}), item.score >= 1
        if isinstance(kind := metadata.get("kind"), str):
            kinds.setdefault(kind, []).append(right)
        if old := _texts(metadata.get("old")):
            outdated = any(contains.occurs(text, item.completion, whole_words=True) for text in old)
            changed.append((right, not right and outdated))
    found = numbers | {"skill_hash": skill.content_hash, "test_rows": len(skill.test), "measured_with": way.skills}
    if kinds:
        found["kinds"] = {kind: {"accuracy": sum(bits) / len(bits), "n": len(bits)} for kind, bits in kinds.items()}
    if changed:
        found["changed"] = {
            "n": len(changed),
            "new": sum(new for new, _ in changed),
            "old": sum(old for _, old in changed),
        }
    return found


def _texts(value: Any) -> list[str]:
    """Metadata is the user's own: what is no list of texts means something else to them."""
    return value if isinstance(value, list) and all(isinstance(text, str) and text for text in value) else []


def said_of_kinds(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Accuracy by kind of test rows, and answers to what has changed, before and after a stage, the same rows both
    times: phrases for people; none where rows are of one kind and say nothing of the past."""
    said = []
    if len(kinds := after.get("kinds", {})) > 1:
        old = before.get("kinds", kinds)
        said += [", ".join(f"{kind} {old[kind]['accuracy']:.0%} to {new['accuracy']:.0%} ({new['n']})"
                           for kind, new in kinds.items())]  # fmt: skip
    if changed := after.get("changed"):
        was = before.get("changed", changed)
        said += [f"of {changed['n']} facts that changed, old answers {was['old']} to {changed['old']}, new ones "
                 f"{was['new']} to {changed['new']}"]  # fmt: skip
    return said


def probe_json(result: ProbeResult | None, way: Way) -> dict[str, Any] | None:
    tasks = {name: asdict(task) for name, task in result.tasks.items()} if result else {}
    return result and {"average": result.average, "tasks": tasks, "measured_with": way.probe}


def write_items(folder: Path, scores: Sequence[SkillScore], probed: ProbeResult | None) -> None:
    """``<skill>.jsonl`` for each score and ``probe.jsonl``."""
    for score in scores:
        write_jsonl(folder / f"{score.skill}.jsonl", [asdict(item) for item in score.items])
    if probed:
        write_jsonl(folder / f"{PROBE}.jsonl", probed.items)


def skill_items(score: SkillScore) -> Items:
    """A score's items as the gates want them."""
    return {item.id: item.score >= 1 for item in score.items}


def probe_items(rows: Sequence[Mapping[str, Any]]) -> dict[str, Items]:
    """Lines of ``probe.jsonl`` as the gates want them: ``probe/<task>`` -> item id -> right, and ``probe`` for all."""
    items: dict[str, dict[str, bool]] = {}
    for row in rows:
        items.setdefault(f"{PROBE}/{row['task']}", {})[row["id"]] = row["correct"]
        items.setdefault(PROBE, {})[f"{row['task']}/{row['id']}"] = row["correct"]
    return dict(items)


class Scores:
    """What is known of one version: numbers for people, items for the gates."""

    def __init__(self) -> None:
        self.skills: dict[str, dict[str, Any]] = {}
        self.probe: dict[str, Any] | None = None
        self.items: dict[str, Items] = {}
        """Skill name, or ``probe/<task>`` -> item id -> right."""

    def read(self, entry: Mapping[str, Any], folder: Path, way: Way | None = None) -> None:
        """Add the scores of a version.json or baseline.json whose items lie in ``folder``, those taken in this ``way``
        where one is given."""
        for name, score in entry["scores"].items():
            if way and not way.fits(score):
                continue
            self.skills[name] = score
            self.items[name] = {row["id"]: row["score"] >= 1 for row in read_jsonl(folder / f"{name}.jsonl")}
        if entry["probe"] and (way is None or entry["probe"].get("measured_with") == way.probe):
            self.probe = entry["probe"]
            self.items = {name: items for name, items in self.items.items() if name.split("/")[0] != PROBE}
            self.items |= probe_items(read_jsonl(folder / f"{PROBE}.jsonl"))

    def taken(self, name: str) -> tuple[Any, ...]:
        """On which content and in which way the items of ``name`` were taken."""
        score = (self.probe if name.split("/")[0] == PROBE else self.skills.get(name)) or {}
        return score.get("skill_hash"), score.get("measured_with")


def known_scores(workspace: Workspace, version: str, way: Way | None = None) -> Scores:
    """Everything measured of ``version`` (in this ``way``): in its own folder, then in the baselines of stages that
    began at it.

    A baseline is measured later, where the version's own score is missing or of other rows, so it counts."""
    scores = Scores()
    if version != BASE:
        scores.read(workspace.version(version), workspace.version_folder(version) / "evaluation", way)
    for stage in workspace.stages():
        folder = workspace.run_folder(stage)
        if (folder / "baseline.json").is_file():
            entry = read_json(folder / "baseline.json")
            if entry["version"] == version:
                scores.read(entry, folder / "baseline", way)
    return scores


def current(scores: Scores, skill: Skill, config: RunConfig) -> bool:
    """Whether a score is of the rows that would be measured now: content and ``eval.rows`` may have changed since."""
    score = scores.skills.get(skill.name)
    rows = len(skill.test[: config.eval.rows or None])
    return score is not None and score["skill_hash"] == skill.content_hash and score["n"] == rows


def unmeasured(scores: Scores, skills: Iterable[Skill], config: RunConfig) -> tuple[list[Skill], bool]:
    """Which of ``skills`` have no current score, and whether the configured prior tasks have none."""
    tasks = set(config.probe.tasks)
    wants_probe = bool(tasks) and (scores.probe is None or set(scores.probe["tasks"]) != tasks)
    return [skill for skill in skills if not current(scores, skill, config)], wants_probe


def guards(workspace: Workspace, parent: str, before: Scores, skills: Mapping[str, Skill],
           config: RunConfig, way: Way) -> list[Guard]:  # fmt: skip
    """What a candidate that follows ``parent`` must keep: each of the earlier ``skills``, against the parent and
    against its best ever on the same rows; each prior task, and all of them together."""
    gate, found = config.gate, []
    ancestors = {name: known_scores(workspace, name, way) for name in workspace.lineage(parent) if name != parent}
    for name, skill in skills.items():
        items = before.items.get(name)
        budget = skill.settings.retention_budget or gate.budget
        found.append(Guard(name, "skill", parent, items, budget))
        if not items:
            continue
        content = before.skills.get(name, {}).get("skill_hash")  # rows of another content may have the same ids
        known = {version: scores.items[name] for version, scores in ancestors.items()
                 if name in scores.skills and scores.skills[name].get("skill_hash") == content}  # fmt: skip
        right = {version: sum(those.values()) for version, those in known.items() if those.keys() == items.keys()}
        best = max(right, key=lambda version: right[version], default=parent)
        if right.get(best, 0) > sum(items.values()):
            found.append(Guard(name, "best ever", best, known[best], budget, decisive=False, chosen_from=len(right)))
    tasks = [f"{PROBE}/{task}" for task in config.probe.tasks]
    for name in tasks:
        found.append(Guard(name, "prior", parent, before.items.get(name), gate.prior_budget, decisive=len(tasks) == 1))
    if len(tasks) > 1:
        found.append(Guard(PROBE, "priors", parent, before.items.get(PROBE), gate.prior_budget))
    return found
