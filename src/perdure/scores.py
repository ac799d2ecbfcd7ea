"""Scores of versions as the workspace's files hold them, and what a candidate must keep of them.

A version's scores lie in its ``version.json``; what a parent scored before a stage lies in that stage's
``baseline.json``. Items lie beside, one line each, so that two versions can be compared item by item. measure.py takes
them; reading them needs no model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.config import RunConfig
from perdure.files import read_json, read_jsonl
from perdure.gates import Guard, Items
from perdure.workspace import BASE, Workspace

if TYPE_CHECKING:
    from perdure.skills.base import Skill

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
    tasks: frozenset[str]
    """The prior tasks, all of them."""
    contents: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Skill -> (hash of its content, of the user's code that grades it), of those of which no other will do: a later
    stage may have measured the version on other rows of that name."""

    def of(self, skills: Iterable[Skill]) -> Way:
        """This way, on the contents that these skills have now."""
        return replace(self, contents={skill.name: (skill.content_hash, skill.code_hash) for skill in skills})

    def fits(self, name: str, score: Mapping[str, Any]) -> bool:
        """Whether a skill's score was taken this way."""
        whole = score["n"] == score.get("test_rows") and not 0 < self.rows < score["n"]
        same = self.contents.get(name) in (None, _content(score))
        return same and score.get("measured_with") == self.skills and (whole or score["n"] == self.rows)

    def fits_probe(self, probe: Mapping[str, Any]) -> bool:
        return probe.get("measured_with") == self.probe and set(probe["tasks"]) == self.tasks


def _content(score: Mapping[str, Any]) -> tuple[str, str]:
    return score.get("skill_hash") or "", score.get("code_hash", "")


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


def probe_items(rows: Iterable[Mapping[str, Any]]) -> dict[str, Items]:
    """Lines of ``probe.jsonl`` as the gates want them: ``probe/<task>`` -> item id -> right, and ``probe`` for all."""
    items: dict[str, dict[str, bool]] = {}
    for row in rows:
        items.setdefault(f"{PROBE}/{row['task']}", {})[row["id"]] = row["correct"]
        items.setdefault(PROBE, {})[f"{row['task']}/{row['id']}"] = row["correct"]
    return dict(items)


class Scores:
    """What is known of one version: numbers for people, items for the gates."""

    def __init__(self, erased: Collection[str] = ()) -> None:
        self.erased = erased
        """Skills whose items were erased in some versions: a score without items is left out."""
        self.skills: dict[str, dict[str, Any]] = {}
        self.probe: dict[str, Any] | None = None
        self.items: dict[str, Items] = {}
        """Skill name, or ``probe/<task>`` -> item id -> right."""

    def read(self, entry: Mapping[str, Any], folder: Path, way: Way | None = None) -> None:
        """Add the scores of a version.json or baseline.json whose items lie in ``folder``, those taken in this ``way``
        where one is given."""
        for name, score in entry["scores"].items():
            path = folder / f"{name}.jsonl"
            if (way and not way.fits(name, score)) or (name in self.erased and not path.is_file()):
                continue
            self.skills[name] = score
            self.items[name] = {row["id"]: row["score"] >= 1 for row in read_jsonl(path)}
        if entry["probe"] and (way is None or way.fits_probe(entry["probe"])):
            self.probe = entry["probe"]
            self.items = {name: items for name, items in self.items.items() if name.split("/")[0] != PROBE}
            self.items |= probe_items(read_jsonl(folder / f"{PROBE}.jsonl"))

    def taken(self, name: str) -> tuple[Any, ...]:
        """On which content, by which code of the user's and in which way the items of ``name`` were taken: rows of
        another content may have the same ids."""
        score = (self.probe if name.split("/")[0] == PROBE else self.skills.get(name)) or {}
        return score.get("skill_hash"), score.get("code_hash", ""), score.get("measured_with")


def known_scores(workspace: Workspace, version: str, way: Way | None = None) -> Scores:
    """Everything measured of ``version`` (in this ``way``): in its own folder, then in the baselines of stages that
    began at it.

    A baseline is measured later, where the version's own score is missing or of other rows, so it counts."""
    scores = Scores(set(workspace.erased().values()))
    if version != BASE:
        scores.read(workspace.version(version), workspace.version_folder(version) / "evaluation", way)
    for stage in workspace.runs.names():
        folder = workspace.run_folder(stage)
        if (folder / "baseline.json").is_file():
            entry = read_json(folder / "baseline.json")
            if entry["version"] == version:
                scores.read(entry, folder / "baseline", way)
    return scores


def current(scores: Scores, skill: Skill, config: RunConfig) -> bool:
    """Whether a score is of the rows that would be measured now, by the same code: content, ``eval.rows`` and a user's
    own grader may have changed since."""
    score = scores.skills.get(skill.name)
    rows = len(config.eval.taken(skill.test))
    by = (skill.content_hash, skill.code_hash, rows)
    return score is not None and (score["skill_hash"], score.get("code_hash", ""), score["n"]) == by


def unmeasured(scores: Scores, skills: Iterable[Skill], config: RunConfig) -> tuple[list[Skill], bool]:
    """Which of ``skills`` have no current score, and whether the configured prior tasks have none."""
    tasks = set(config.probe.tasks)
    wants_probe = bool(tasks) and (scores.probe is None or set(scores.probe["tasks"]) != tasks)
    return [skill for skill in skills if not current(scores, skill, config)], wants_probe


def known_budget(workspace: Workspace, parent: str, skill: Skill, config: RunConfig) -> float | None:
    """What a skill that ``parent`` was taught already may lose when it is taught again; None for one that is new."""
    return (skill.settings.retention_budget or config.gate.budget) if skill.name in workspace.taught(parent) else None


def guards(workspace: Workspace, parent: str, before: Scores, skills: Mapping[str, Skill],
           config: RunConfig, way: Way) -> list[Guard]:  # fmt: skip
    """What a candidate that follows ``parent`` must keep: each of the earlier ``skills``, against the parent and
    against its best ever on the same rows; each prior task, and all of them together. A version that was promoted in
    spite of its verdict was accepted with its losses: from there on, nothing before it is a best."""
    gate, found, lineage = config.gate, [], workspace.lineage(parent)
    # A step of a replay is not judged by itself.
    accepted = [name for name in lineage if (workspace.verdict(name) or {}).get("decision", "promoted") != "promoted"
                and workspace.was_served(name)]  # fmt: skip
    since = lineage.index(accepted[-1]) if accepted else 0
    way = replace(way, contents={name: _content(score) for name, score in before.skills.items()})
    ancestors = {name: known_scores(workspace, name, way) for name in lineage[since:] if name != parent}
    for name, skill in skills.items():
        items = before.items.get(name)
        budget = skill.settings.retention_budget or gate.budget
        found.append(Guard(name, "skill", parent, items, budget, together=skill.together))
        if not items:
            continue
        known = {version: scores.items[name] for version, scores in ancestors.items()
                 if name in scores.items and scores.taken(name) == before.taken(name)}  # fmt: skip
        right = {version: sum(those.values()) for version, those in known.items() if those.keys() == items.keys()}
        best = max(right, key=lambda version: right[version], default=parent)
        if right.get(best, 0) > sum(items.values()):
            found.append(Guard(name, "best ever", best, known[best], budget, decisive=False, chosen_from=len(right),
                               together=skill.together))  # fmt: skip
    tasks = [f"{PROBE}/{task}" for task in config.probe.tasks]
    for name in tasks:
        found.append(Guard(name, "prior", parent, before.items.get(name), gate.prior_budget, decisive=len(tasks) == 1))
    if len(tasks) > 1:
        found.append(Guard(PROBE, "priors", parent, before.items.get(PROBE), gate.prior_budget))
    return found
