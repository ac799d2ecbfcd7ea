"""Which stage a skill is in: finished, unfinished, refused or new. The workspace's files say so, nothing else does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perdure.checkpoint import drop_training_state, training_state, trainings
from perdure.config import RunConfig
from perdure.files import check_free, read_json, replace_text
from perdure.ledger import SETTLED
from perdure.loading import weights_sha256
from perdure.models import compute_dtype, load
from perdure.provenance import now
from perdure.settings import by_field
from perdure.skills.base import Skill, calls_as_text, load_skill
from perdure.skills.reading import in_short
from perdure.types import InputError
from perdure.workspace import Workspace

NEUTRAL = frozenset(
    ("cost.watts", "cost.price_per_hour", "cost.currency", "eval.batch_tokens", "preflight.forecast",
     "rollout.concurrency", "rollout.timeout", "rollout.url", "rollout.weights_folder",
     "train.activation_checkpointing", "train.micro_batch_tokens")
)  # fmt: skip
"""Settings that decide what a stage takes, and nothing of what comes out but roundings: a stage goes on with others, as
after it ran out of memory."""


@dataclass(frozen=True)
class Outcome:
    """How a skill's stage ended."""

    skill: str
    stage: str
    version: str | None
    """None when the preflight refused and nothing was trained."""
    decision: str
    """``promoted``, ``held`` or ``refused``."""
    reasons: tuple[str, ...]


def create_workspace(folder: Path, config: RunConfig) -> Workspace:
    """Make a workspace whose champion is the configured base model, loaded once to see that it can be.

    Raises InputError for a model that cannot be loaded or a folder that is not empty; nothing is left behind then."""
    check_free(folder)  # before the model is loaded
    return Workspace.create(folder, config, weights_sha256(load(config.model, None, torch.device("cpu")).model))


def load_all(folders: Sequence[Path]) -> list[Skill]:
    problems, skills = [], []
    for folder in folders:
        try:
            skill = load_skill(folder)
        except InputError as error:
            problems.append(str(error))
        else:
            skills.append(skill)
            if calls := calls_as_text(skill.settings.grader, (*skill.train, *skill.test)):
                problems.append(in_short(calls))
    names = [skill.name for skill in skills]
    if twice := {name for name in names if names.count(name) > 1}:
        problems.append(f"the same skill name is given twice: {', '.join(sorted(twice))}")
    if problems:
        raise InputError("\n".join(problems))
    return skills


def settings_hash(config: RunConfig) -> str:
    return hashlib.sha256(json.dumps(deciding(config.model_dump(mode="json")), sort_keys=True).encode()).hexdigest()


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a file's settings those that decide what comes out of a stage, by field. One that the file, of an older
    version, does not have counts as its default."""
    whole = by_field(RunConfig().model_dump(mode="json")) | by_field(settings)
    return {key: value for key, value in whole.items() if key not in NEUTRAL}


def differing(began: Mapping[str, Any], config: RunConfig) -> list[str]:
    """``key = value`` of each deciding setting of a file that is another one now."""
    then, now = deciding(began), deciding(config.model_dump(mode="json"))
    return [f"{key} = {then.get(key)}" for key, value in now.items() if then.get(key) != value]


def asked_for(info: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with which a version's stage was called; where those left a choice open, the stage had others."""
    return info.get("asked") or info["config"]


def settle_all(workspace: Workspace) -> None:
    """Bring every stage to its end that was killed between its version and the ledger's last word on it."""
    events: dict[str, set[str]] = {}
    for event in workspace.ledger():
        events.setdefault(str(event.get("version")), set()).add(event["event"])
    gone = workspace.erased_versions()
    for name in (version for version in workspace.versions()[1:] if version not in gone):
        run = workspace.run_folder(workspace.version(name)["stage"])
        if not events.get(name, set()) & SETTLED or any(map(training_state, trainings(run))):
            settle(workspace, name)


def settle(workspace: Workspace, name: str) -> Outcome:
    """Write into the ledger what a finished version's verdict asks for, and say what became of it. On a branch
    ``promoted`` means accepted: the champion stays.

    Repeating it adds nothing, so it also mends a stage that was killed between its version and its promotion."""
    info = workspace.version(name)
    verdict, known = info["verdict"], {event["event"] for event in workspace.ledger() if event.get("version") == name}
    about = {"parent": info["parent"], "stage": info["stage"], "skill": info["skill"]}
    if "candidate" not in known:
        workspace.append("candidate", version=name, **about)
    if "verdict" not in known:
        workspace.append("verdict", version=name, decision=verdict["decision"], reasons=verdict["reasons"])
    if not known & SETTLED:
        outcome = follow(workspace, info, verdict, info["config"]["gate"]["enforce"])
    else:
        decision = "promoted" if known & {"promote", "accept"} else "held" if "hold" in known else "refused"
        outcome = Outcome(info["skill"], info["stage"], name, decision, tuple(verdict["reasons"]))
    for folder in trainings(workspace.run_folder(info["stage"])):
        drop_training_state(folder)
    return outcome


def follow(workspace: Workspace, info: dict[str, Any], verdict: dict[str, Any], enforce: bool) -> Outcome:
    """Do what a verdict on the version ``info`` asks for, or promote it all the same where it is not enforced. The gate
    compared it with its parent: where that is not the champion any more, it is held for a person."""
    name, decision, reason = info["version"], verdict["decision"], verdict["reasons"][0]
    about = {"parent": info["parent"], "stage": info["stage"], "skill": info["skill"]}
    accepted = decision == "promoted"
    if (accepted or not enforce) and info.get("branch"):
        workspace.append("accept", version=name, **about, branch=info["branch"], reason=reason)
    elif accepted or not enforce:
        why = reason if accepted else f"{decision}, but gate.enforce is off"
        if late := promote_or_hold(workspace, name, why, about):
            return Outcome(info["skill"], info["stage"], name, "held", (late, *verdict["reasons"]))
    elif decision == "held" and not info.get("branch"):  # a step of a replay is nothing to serve
        workspace.hold(name, **about, reason=reason)
    else:
        workspace.refuse(name, **about, reason=reason)
    return Outcome(info["skill"], info["stage"], name, decision if enforce else "promoted", tuple(verdict["reasons"]))


def promote_or_hold(workspace: Workspace, name: str, why: str, about: dict[str, Any]) -> str | None:
    """Promote a version that was judged against ``about["parent"]``. Where that is not the champion any more, the
    version is held for a person, and what is returned says so; ``about`` is what the ledger then holds."""
    parent = about["parent"]
    if workspace.promote(name, why, instead_of=parent):
        return None
    force = ' --force --reason "..."' if workspace.taught().keys() - workspace.taught(name).keys() else ""
    late = (f"it was judged against {parent}, and {workspace.resolve('champion')} is the champion by now; to serve it: "
            f"perdure promote {name}{force}")  # fmt: skip
    workspace.hold(name, **about, reason=late)
    return late


def turned_away(info: dict[str, Any], verdict: dict[str, Any]) -> Outcome:
    """How a version outside the champion's lineage stands."""
    decision, reasons = verdict["decision"], tuple(verdict["reasons"])
    if decision == "promoted":
        decision, reasons = "refused", (f"it was rolled back; perdure promote {info['version']} brings it back",)
    return Outcome(info["skill"], info["stage"], info["version"], decision, reasons)


def taught_this(workspace: Workspace, skill: Skill, pruned: bool = False) -> Iterator[dict[str, Any]]:
    """The version.json of each version that was taught this very content, the newest first: of those that have their
    weights, or with ``pruned`` also of those whose weights were removed to make room."""
    gone = workspace.erased_versions()
    for name in reversed(workspace.versions()[1:]):
        info = workspace.version(name)
        there = name not in gone or (pruned and not gone[name])
        if there and info["hashes"]["skill"] == skill.content_hash and info["skill"] == skill.name:
            yield info


def finished(workspace: Workspace, skill: Skill, config: RunConfig) -> Outcome | None:
    """The stage that taught this very content: on the champion's lineage, or turned away under the same settings."""
    champion = workspace.resolve("champion")
    lineage, latest = workspace.lineage(), workspace.taught().get(skill.name)
    for info in taught_this(workspace, skill, pruned=True):
        if info["version"] in lineage and latest == workspace.skills.folder_of(skill.name, skill.content_hash):
            return Outcome(skill.name, info["stage"], info["version"], "promoted", tuple(info["verdict"]["reasons"]))
        graded = info["scores"].get(skill.name, {}).get("code_hash", "") == skill.code_hash
        same = info["parent"] == champion and not info.get("branch") and graded
        if same and not differing(asked_for(info), config):
            return turned_away(info, info["verdict"])
    return None


def holds_nothing(run: Path) -> bool:
    """Whether a stage ended, by bad input or a kill, before anything of it was kept but its settings."""
    return {path.name for path in run.iterdir()} <= {"stage.json", "seconds.json"}


def begin(workspace: Workspace, skill: Skill, config: RunConfig, restart: bool, parent: str,
          branch: str | None = None) -> tuple[str, bool]:  # fmt: skip
    """The stage's name and whether it goes on from an earlier attempt. Raises InputError when settings differ."""
    closed, precision = workspace.closed_stages(), str(compute_dtype(config.model)).removeprefix("torch.")
    for stage in workspace.runs.names():
        folder = workspace.run_folder(stage)
        if stage in closed or not (folder / "stage.json").is_file():
            continue
        info = read_json(folder / "stage.json")
        if (info["skill_hash"], info["parent"], info["branch"]) != (skill.content_hash, parent, branch):
            continue
        others, began = differing(info["config"], config), info.get("compute_dtype", precision)
        if not others and began == precision and not restart:
            return stage, True
        if restart or holds_nothing(folder):
            workspace.runs.remove(stage)
        elif others:
            raise InputError(
                f"{folder}: an unfinished run of {skill.name} has other settings ({', '.join(others)}); give the "
                "same ones to go on with it, or --restart to begin anew"
            )
        else:
            raise InputError(
                f"{folder}: this unfinished run of {skill.name} computes in {began}, and here {precision} was "
                "measured to be faster (model.compute_dtype, by machine and number of threads); go on where it "
                "began, or --restart to begin anew"
            )
    name = workspace.next_stage(skill.name)
    folder = workspace.run_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"stage": name, "skill": skill.name, "skill_hash": skill.content_hash, "method": config.train.method,
            "parent": parent, "branch": branch, "seed": config.seed, "created": now(),
            "compute_dtype": precision, "config": config.model_dump(mode="json")}  # fmt: skip
    replace_text(folder / "stage.json", json.dumps(info, indent=1) + "\n")
    return name, False
