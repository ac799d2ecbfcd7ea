"""Making room: the weights of versions that nothing stands on any more, such as refused ones, are removed.

What they scored, their verdicts and their cards stay, and the ledger says what was removed. What ``prune`` keeps: every
version on the way to the champion, the one before it and the one that waits for a person, and what an unfinished stage
starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.files import read_json
from perdure.workspace import BASE, Workspace


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
    kept = _needed(workspace)
    versions: list[str] = []
    files: list[Path] = []
    for name in workspace.versions():
        listed = workspace.version(name).get("files", {}) if name not in kept else {}
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


def _needed(workspace: Workspace) -> set[str]:
    ends = {BASE, *(name for name in workspace.aliases().values() if name)}
    closed = workspace.closed_stages()
    for stage in workspace.runs.names():
        file = workspace.run_folder(stage) / "stage.json"
        if stage not in closed and file.is_file():
            ends.add(read_json(file)["parent"])
    return {name for end in ends for name in workspace.lineage(end)}
