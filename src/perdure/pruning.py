"""Making room: the weights of refused versions are removed, and the checkpoints of unfinished stages that no command
goes on with, as the champion is another one by now or the skill's rows are. What versions scored, their verdicts and
their cards stay, and the ledger says what was removed.

Kept is all that may be served yet: what was promoted or is held, what is on the way to such a version or to where an
unfinished stage starts, and what the ledger has no last word on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.checkpoint import drop_training_state, training_state, trainings
from perdure.files import read_json
from perdure.ledger import last_words
from perdure.workspace import Workspace


@dataclass(frozen=True)
class Pruning:
    """What can be, or was, removed."""

    versions: tuple[str, ...]
    files: tuple[Path, ...]
    """Their weights, below the workspace's folder, relative to it."""
    stages: tuple[str, ...]
    """Unfinished stages whose checkpoints go."""
    size: int
    """Bytes of all of it."""


def prunable(workspace: Workspace) -> Pruning:
    """What ``prune`` will remove."""
    versions: list[str] = []
    files: list[Path] = []
    for name in sorted(_refused(workspace) - _needed(workspace)):
        listed = workspace.version(name).get("files", {})
        there = [Path("versions", name, file) for file in listed if file.endswith(".safetensors")]
        if there := [path for path in there if (workspace.folder / path).is_file()]:
            versions.append(name)
            files += there
    stages = _abandoned(workspace)
    states = [path for stage in stages for path in _state(workspace, stage)]
    inside = [path for state in states for path in (state, *state.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in (*(workspace.folder / path for path in files), *inside))
    return Pruning(tuple(versions), tuple(files), tuple(stages), size)


def prune(workspace: Workspace, **about: Any) -> Pruning:
    """Remove it. ``about`` goes into the ledger, whose line comes first: killed after it, the same call goes on."""
    found = prunable(workspace)
    files = [path.as_posix() for path in found.files]
    if found.stages or not workspace.erased().keys() >= set(files):
        workspace.remove("prune", versions=list(found.versions), files=files, stages=list(found.stages), **about)
    for stage in found.stages:
        for folder in trainings(workspace.run_folder(stage)):
            drop_training_state(folder)
    for path in found.files:
        (workspace.folder / path).unlink(missing_ok=True)
    return found


def _abandoned(workspace: Workspace) -> list[str]:
    """Unfinished stages with checkpoints that ``learn`` does not go on with: they started from a version that is not
    the champion, or a later stage of the skill began there."""
    champion, begun, latest = workspace.resolve("champion"), list[str](), dict[str, str]()
    for stage in workspace.unfinished():
        file = workspace.run_folder(stage) / "stage.json"
        info = read_json(file) if file.is_file() else {}
        if not info or info.get("branch"):  # the replays of a forget may go on
            continue
        begun.append(stage)
        if info["parent"] == champion:
            latest[info["skill"]] = stage
    return [stage for stage in begun if stage not in latest.values() and _state(workspace, stage)]


def _state(workspace: Workspace, stage: str) -> list[Path]:
    return [path for folder in trainings(workspace.run_folder(stage)) for path in training_state(folder)]


def _refused(workspace: Workspace) -> set[str]:
    """Versions that are there, and of which that is the last word."""
    last = last_words(workspace.ledger())
    return {name for name in workspace.versions() if last.get(name) == "refuse"}


def _needed(workspace: Workspace) -> set[str]:
    ends = {*workspace.versions()} - _refused(workspace)
    closed = workspace.closed_stages()
    for stage in workspace.runs.names():
        file = workspace.run_folder(stage) / "stage.json"
        if stage not in closed and file.is_file():
            ends.add(read_json(file)["parent"])
    return {name for end in ends for name in workspace.lineage(end)}
