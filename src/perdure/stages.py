"""Which stage a skill is in: finished, unfinished, refused or new. The workspace's files say so, nothing else does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perdure.checkpoint import drop_training_state
from perdure.config import RunConfig
from perdure.files import check_free, now, read_json, replace_text
from perdure.models import load
from perdure.session import weights_sha256
from perdure.skills.base import Skill, load_skill
from perdure.types import InputError
from perdure.workspace import Workspace


@dataclass(frozen=True)
class Outcome:
    """How a skill's stage ended."""

    skill: str
    stage: str
    version: str | None
    """None when the preflight refused and nothing was trained."""
    decision: str
    """``promoted`` or ``refused``."""
    reasons: tuple[str, ...]


def create_workspace(folder: Path, config: RunConfig) -> Workspace:
    """Make a workspace whose champion is the configured base model, loaded once to see that it can be.

    Raises InputError for a model that cannot be loaded or a folder that is not empty; nothing is left behind then."""
    check_free(folder)  # before the model is loaded
    return Workspace.create(folder, config, weights_sha256(load(config.model).model))


def load_all(folders: Sequence[Path]) -> list[Skill]:
    problems, skills = [], []
    for folder in folders:
        try:
            skills.append(load_skill(folder))
        except InputError as error:
            problems.append(str(error))
    names = [skill.name for skill in skills]
    if twice := {name for name in names if names.count(name) > 1}:
        problems.append(f"the same skill name is given twice: {', '.join(sorted(twice))}")
    if problems:
        raise InputError("\n".join(problems))
    return skills


def settings_hash(config: RunConfig) -> str:
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def settle(workspace: Workspace, name: str) -> bool:
    """Write into the ledger what a finished version's verdict asks for; True when it is (or was) promoted.

    Repeating it adds nothing, so it also mends a stage that was killed between its version and its promotion."""
    info = workspace.version(name)
    verdict, known = info["verdict"], {event["event"] for event in workspace.ledger() if event.get("version") == name}
    about = {"version": name, "parent": info["parent"], "stage": info["stage"], "skill": info["skill"]}
    if "candidate" not in known:
        workspace.append("candidate", **about)
    if "verdict" not in known:
        workspace.append("verdict", version=name, decision=verdict["decision"], reasons=verdict["reasons"])
    accepted = verdict["decision"] == "promoted"
    promoted = accepted or not info["config"]["gate"]["enforce"]
    if not known & {"promote", "refuse"}:
        if promoted:
            workspace.promote(name, verdict["reasons"][0] if accepted else "refused, but gate.enforce is off")
        else:
            workspace.append("refuse", **about, reason=verdict["reasons"][0])
    drop_training_state(workspace.run_folder(info["stage"]))
    return promoted


def finished(workspace: Workspace, skill: Skill, config: RunConfig) -> Outcome | None:
    """The stage that taught this very content: on the champion's lineage, or turned away under the same settings."""
    champion = workspace.resolve("champion")
    lineage = workspace.lineage()
    for name in reversed(workspace.versions()):
        info = workspace.version(name)
        if info["skill"] != skill.name or info["hashes"]["skill"] != skill.content_hash:
            continue
        reasons = tuple(info["verdict"]["reasons"])
        if name in lineage:
            return Outcome(skill.name, info["stage"], name, "promoted", reasons)
        if info["parent"] == champion and info["hashes"]["config"] == settings_hash(config):
            if info["verdict"]["decision"] == "promoted":
                reasons = (f"it was rolled back; perdure promote {name} brings it back",)
            return Outcome(skill.name, info["stage"], name, "refused", reasons)
    return None


def begin(workspace: Workspace, skill: Skill, config: RunConfig, restart: bool) -> tuple[str, bool]:
    """The stage's name and whether it goes on from an earlier attempt. Raises InputError when settings differ."""
    parent = workspace.resolve("champion")
    closed = {workspace.version(name)["stage"] for name in workspace.versions()}
    for stage in workspace.stages():
        folder = workspace.run_folder(stage)
        if stage in closed or not (folder / "stage.json").is_file():
            continue
        info = read_json(folder / "stage.json")
        if info["skill_hash"] != skill.content_hash or info["parent"] != parent:
            continue
        if restart:
            workspace.remove_run(stage)
        elif info["config"] == config.model_dump(mode="json"):
            return stage, True
        else:
            raise InputError(
                f"{folder}: an unfinished run of {skill.name} has other settings; give the same ones to go on with it, "
                "or --restart to begin anew"
            )
    name = workspace.next_stage(skill.name)
    folder = workspace.run_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"stage": name, "skill": skill.name, "skill_hash": skill.content_hash, "method": config.train.method,
            "parent": parent, "seed": config.seed, "created": now(),
            "config": config.model_dump(mode="json")}  # fmt: skip
    replace_text(folder / "stage.json", json.dumps(info, indent=1) + "\n")
    return name, False
