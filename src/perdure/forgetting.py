"""Taking a skill out again: the skills taught after it are taught anew to the version before it, and the result is
judged against the champion like any other candidate.

The replay is a branch: its stages publish versions, and the champion changes once, at the end, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from perdure.config import RunConfig
from perdure.curriculum import learn_one
from perdure.gates import decide_kept
from perdure.ledger import last_words
from perdure.measure import measure_probe, measure_skill, probe_json, score_json, skill_items, way_of
from perdure.reporting import Reporter
from perdure.running import open_version
from perdure.scores import Scores, guards, known_scores, probe_items, unmeasured
from perdure.skills.base import Skill, load_skill
from perdure.stages import asked_for, differing, promote_or_hold, settle_all, taught_this
from perdure.types import InputError, Verdict
from perdure.workspace import Workspace


@dataclass(frozen=True)
class Forgotten:
    """How taking out a skill ended."""

    skill: str
    version: str
    """The version without it."""
    decision: str
    reasons: tuple[str, ...]
    before: float
    """The champion's accuracy on the skill, 0..1."""
    after: float
    n: int


def forget(workspace: Workspace, name: str, config: RunConfig, reporter: Reporter, restart: bool = False) -> Forgotten:
    """Make the champion a version that was never taught ``name`` (in any of its contents) and knows the other skills.
    ``restart`` begins an unfinished stage of the replay anew.

    Stages of the replay that are finished are not repeated. Raises InputError when the skill was not taught."""
    settle_all(workspace)  # first: it may promote what a kill left, and with it change what was taught
    taught = {skill: load_skill(folder) for skill, folder in workspace.taught().items()}
    if name not in taught:
        raise InputError(
            f"{workspace.folder}: the champion was not taught {name!r}; it knows {', '.join(taught) or '-'}"
        )
    champion, records = workspace.resolve("champion"), workspace.lineage_records()
    first = next(place for place, record in enumerate(records) if record["skill"] == name)
    version, branch = records[first - 1]["version"], f"forget {name}, instead of {champion}"
    again = list(dict.fromkeys(record["skill"] for record in records[first:] if record["skill"] != name))
    for place, skill in enumerate(again, 1):
        reporter.stage(f"Replay {place} of {len(again)}: {skill}, without {name}")
        version = _replay(workspace, taught[skill], version, branch, config, reporter, taught, restart)
    return _judge(workspace, name, champion, version, taught, config, reporter)


def _replay(workspace: Workspace, skill: Skill, parent: str, branch: str, config: RunConfig, reporter: Reporter,
            scope: dict[str, Skill], restart: bool) -> str:  # fmt: skip
    """The version that teaches ``skill`` to ``parent`` on the branch; made now where it is not there yet."""
    for info in taught_this(workspace, skill):
        same = (info["parent"], info.get("branch")) == (parent, branch)
        if same and not differing(asked_for(info), config):
            return info["version"]
    # Whatever its own gate says, the last version of the branch is judged as a whole.
    outcome = learn_one(workspace, skill, scope, config, reporter, parent=parent, branch=branch, force=True,
                        restart=restart)  # fmt: skip
    assert outcome.version is not None, "a forced stage always gives a version"
    return outcome.version


def _judge(workspace: Workspace, name: str, champion: str, version: str, taught: dict[str, Skill], config: RunConfig,
           reporter: Reporter) -> Forgotten:  # fmt: skip
    others = {skill: content for skill, content in taught.items() if skill != name}
    before, after = (_scores(workspace, who, taught, config, reporter) for who in (champion, version))
    kept = guards(workspace, champion, before, others, config, way_of(config))
    verdict: Verdict = decide_kept(config.gate, after.items, kept)
    accuracies = [sum(s.items[name].values()) / len(s.items[name]) for s in (before, after)]
    gate = config.gate.model_dump(mode="json")
    key = {"event": "forget", "version": version, "parent": champion, "skill": name, "decision": verdict.decision,
           "gate": gate}  # fmt: skip
    # What is there already was written before a kill. The verdict is on the whole replay, and takes the place of its
    # last stage's.
    known, of_replay = workspace.ledger(), {"event": "verdict", "version": version, "decision": verdict.decision,
                                            "gate": gate}  # fmt: skip
    if workspace.version(version).get("branch") and not any(event | of_replay == event for event in known):
        workspace.append(**of_replay, reasons=list(verdict.reasons), table=list(verdict.table))
    if not any(event | key == event for event in known):
        workspace.append(**key, before=accuracies[0], after=accuracies[1], reasons=list(verdict.reasons))
    decision, reasons = verdict.decision if config.gate.enforce else "promoted", verdict.reasons
    about = {"parent": champion, "skill": name}
    if decision == "promoted" and (late := promote_or_hold(workspace, version, f"without {name}", about)):
        decision, reasons = "held", (late, *reasons)
    elif decision == "held" and last_words(workspace.ledger()).get(version) != "hold":
        workspace.hold(version, **about, reason=reasons[0])
    return Forgotten(name, version, decision, reasons, *accuracies, n=len(before.items[name]))


def _scores(workspace: Workspace, version: str, skills: dict[str, Skill], config: RunConfig,
            reporter: Reporter) -> Scores:  # fmt: skip
    """What ``version`` scores on ``skills`` and the prior tasks; measured now where no file says it."""
    way = way_of(config).of(skills.values())
    scores = known_scores(workspace, version, way)
    missing, wants_probe = unmeasured(scores, skills.values(), config)
    if missing or wants_probe:
        session = open_version(workspace, version, config)
        for skill in missing:
            score = measure_skill(session, skill, config, reporter, version)
            scores.skills[skill.name] = score_json(score, skill, way)
            scores.items[skill.name] = skill_items(score)
        if wants_probe and (probed := measure_probe(session, config, reporter, version)):
            scores.probe = probe_json(probed, way)
            scores.items |= probe_items(probed.items)
    return scores
