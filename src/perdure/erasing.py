"""Erasing a skill: every row of it that the workspace holds, answers to them, and the weights that were trained on it.

``forget`` makes a champion that was never taught the skill; the versions before it, their results and the stored
demonstrations stay. Where they may not stay either, ``erase`` removes them for good and says so in the ledger, so that
``verify`` takes what is missing for what it is.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.files import read_json
from perdure.skills.base import FILES
from perdure.types import InputError
from perdure.workspace import Workspace

_WITHOUT_ROWS = {"stage.json", "seconds.json", "preflight.json", "baseline.json", "metrics.jsonl", "timings.jsonl"}
"""Of a stage's run folder: numbers and settings. All else holds rows, answers or weights."""


@dataclass(frozen=True)
class Erasure:
    """What is erased with a skill."""

    skill: str
    versions: tuple[str, ...]
    """Whose weights were trained on it: on the skill itself, or by a stage that started from such weights."""
    files: tuple[Path, ...]
    """Below the workspace's folder, relative to it."""
    present: int
    """How many of them are there still."""
    size: int
    """Their bytes."""
    weights: tuple[str, ...]
    """Versions whose weights are among them."""
    elsewhere: tuple[Path, ...]
    """Workspaces below ``compare/`` that hold the skill, too: each is one of its own."""


def what_holds(workspace: Workspace, skill: str) -> Erasure:
    """What ``erase`` will remove. Raises InputError for a skill that the workspace does not hold, and for one that the
    champion was taught."""
    versions = tuple(name for name in workspace.versions() if _was_taught(workspace, name, skill))
    if (champion := workspace.resolve("champion")) in versions:
        raise InputError(
            f"{workspace.folder}: the champion {champion} was taught {skill!r}; take it out of the model first: "
            f"perdure forget {skill} -w {workspace.folder}"
        )
    kept = [path for path in (workspace.folder / "skills").glob("*@*") if path.name.rpartition("@")[0] == skill]
    if not versions and not kept and skill not in workspace.erased().values():
        raise InputError(f"{workspace.folder}: holds no skill {skill!r}; see: perdure log {workspace.folder}")
    files = [*_kept(workspace, skill, kept), *_of_versions(workspace, skill, versions),
             *_of_runs(workspace, skill, versions), workspace.folder / "report.html"]  # fmt: skip
    files += [path for path in (workspace.folder / "imported" / skill).rglob("*") if path.is_file()]
    there = {path for path in files if path.is_file()}
    relative = sorted({path.relative_to(workspace.folder) for path in files}, key=_rows_first)
    with_weights = {path.parent for path in there if path.suffix == ".safetensors"}
    weights = tuple(name for name in versions if workspace.version_folder(name) in with_weights)
    elsewhere = {path.parents[1] for path in (workspace.folder / "compare").glob(f"*/skills/{skill}@*")}
    return Erasure(skill, versions, tuple(relative), len(there), sum(path.stat().st_size for path in there), weights,
                   tuple(sorted(elsewhere)))  # fmt: skip


def _rows_first(path: Path) -> tuple[bool, Path]:
    """What is left by a kill then lies in versions/ or runs/, where ``verify`` finds it."""
    return path.parts[0] in ("versions", "runs"), path


def erase(workspace: Workspace, skill: str, **about: Any) -> Erasure:
    """Remove it. ``about`` goes into the ledger, whose line comes first: killed after it, the same call goes on.

    Raises InputError as ``what_holds`` does."""
    found = what_holds(workspace, skill)
    files = [path.as_posix() for path in found.files]
    known = {path for path, name in workspace.erased().items() if name == skill}
    if not known.issuperset(files):
        workspace.remove("erase", skill=skill, versions=list(found.versions), files=files, **about)
    for left in _left_by_kills(workspace):
        shutil.rmtree(left)
    folders: set[Path] = set()
    for path in found.files:
        (workspace.folder / path).unlink(missing_ok=True)
        folders |= set(path.parents[:-1])
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        whole = workspace.folder / folder
        if len(folder.parts) > 1 and whole.is_dir() and not any(whole.iterdir()):
            whole.rmdir()
    return found


def _left_by_kills(workspace: Workspace) -> list[Path]:
    """What was being written, or removed, when a process was killed: nobody sees it, and it may hold the skill."""
    patterns = ("versions/.*.tmp", "skills/.*.tmp", "runs/.*.removed")
    return [path for pattern in patterns for path in workspace.folder.glob(pattern) if path.is_dir()]


def _was_taught(workspace: Workspace, version: str, skill: str) -> bool:
    return any(info["skill"] == skill for info in workspace.lineage_records(version))


def _kept(workspace: Workspace, skill: str, kept: list[Path]) -> list[Path]:
    """Files of the skill's copies; those of copies that are gone already, by the versions that were taught them."""
    records = [info for name in workspace.versions() if (info := workspace.version(name))["skill"] == skill]
    taught = {workspace.skills.folder_of(skill, str(info["hashes"].get("skill"))) for info in records}
    return [
        *(folder / file for folder in taught for file in FILES),
        *(path for folder in kept for path in folder.rglob("*") if path.is_file()),
    ]


def _of_versions(workspace: Workspace, skill: str, taught: tuple[str, ...]) -> list[Path]:
    """Answers to its rows in every version, the weights of those that were trained on them."""
    files = []
    for name in workspace.versions():
        folder = workspace.folder / "versions" / name
        listed = workspace.version(name).get("files", {})
        wanted = {f"evaluation/{skill}.jsonl"}
        wanted |= {file for file in listed if file.endswith(".safetensors")} if name in taught else set()
        files += [folder / file for file in listed if file in wanted]
    return files


def _of_runs(workspace: Workspace, skill: str, taught: tuple[str, ...]) -> list[Path]:
    """Answers to its rows in every stage's baseline; of stages that trained on them all but numbers and settings."""
    files = []
    for stage in workspace.runs.names():
        folder = workspace.run_folder(stage)
        files += [path for path in (folder / "baseline").glob("*.jsonl") if path.stem == skill]
        info = read_json(folder / "stage.json") if (folder / "stage.json").is_file() else {}
        if info.get("skill", skill) == skill or info.get("parent") in taught:
            files += [path for path in folder.rglob("*") if path.is_file() and path.name not in _WITHOUT_ROWS
                      and path.parent.name != "baseline"]  # fmt: skip
    return files
