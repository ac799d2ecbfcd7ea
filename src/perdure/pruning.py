"""Making room: the weights of refused versions are removed. What they scored, their verdicts and their cards stay, and
the ledger says what was removed.

Kept is all that may be served yet: what was promoted or is held, what is on the way to such a version or to where an
unfinished stage starts, and what the ledger has no last word on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.files import read_json
from perdure.ledger import last_words
from perdure.workspace import Workspace


@dataclass(frozen=True)
class Pruning:
    """What can be, or was, removed."""

    versions: tuple[str, ...]
    files: tuple[Path, ...]
    """Their weights, below the workspace's folder, relative to it."""
    size: int
    """Bytes."""


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
    return Pruning(tuple(versions), tuple(files), sum((workspace.folder / path).stat().st_size for path in files))


def prune(workspace: Workspace, **about: Any) -> Pruning:
    """Remove it. ``about`` goes into the ledger, whose line comes first: killed after it, the same call goes on."""
    found = prunable(workspace)
    files = [path.as_posix() for path in found.files]
    if not workspace.erased().keys() >= set(files):
        workspace.append("prune", versions=list(found.versions), files=files, **about)
    for path in found.files:
        (workspace.folder / path).unlink(missing_ok=True)
    return found


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
