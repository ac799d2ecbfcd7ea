"""Is every byte of a workspace still what was written? Versions by their lists of files, skills by their content hash,
the ledger by its chain.

The ledger holds the hash of each version's version.json, which holds the hash of every file beside it and of the skill
that was taught: who changes a byte has to change the ledger's lines from there to its end, and its head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from perdure.files import file_sha256, manifest_of, read_json
from perdure.ledger import Ledger, aliases_text, erased_files
from perdure.skills.base import content_hash, skill_files
from perdure.stacks import stack_of
from perdure.types import InputError
from perdure.workspace import MANIFEST, Workspace

Progress = Callable[[int, int], None]
"""Called with (folders checked, folders in all)."""


def verify(folder: Path, progress: Progress | None = None) -> list[str]:
    """Every problem as ``path: what is wrong``, empty when all is as it was written. Changes nothing."""
    problems, recorded, erased = _ledger(folder)
    problems += _aliases(folder)
    versions = sorted(path for path in _children(folder / "versions") if not path.name.startswith("."))
    skills = sorted(path for path in _children(folder / "skills") if not path.name.startswith("."))
    problems += [
        f"{folder / 'versions' / name}: missing; the ledger names it"
        for name in recorded
        if name not in {path.name for path in versions}
    ]
    taught: dict[str, str] = {}
    for done, path in enumerate([*versions, *skills], 1):
        if path.parent.name == "versions":
            problems += _version(path, recorded.get(path.name), taught, erased)
        else:
            problems += _skill(path, taught)
        if progress:
            progress(done, len(versions) + len(skills))
    there = {path.name for path in skills} | {path.split("/")[1] for path in erased if path.startswith("skills/")}
    missing = [name for name in taught if name not in there]
    left = [path for path in erased if path.startswith(("versions/", "runs/")) and (folder / path).exists()]
    problems += [f"{folder / 'skills' / name}: missing; a version was taught it" for name in missing]
    for path in left:
        command = f"erase {erased[path]}" if erased[path] else "prune"
        problems.append(f"{folder / path}: to be removed; repeat perdure {command} --yes")
    return problems


def problems_of_version(workspace: Workspace, name: str) -> list[str]:
    """What was changed of one version since it was written: to be asked before it is served. Raises InputError where
    its weights were erased."""
    workspace.check_not_erased(name)
    events = workspace.ledger()
    recorded, erased, folder = _recorded(events), erased_files(events), workspace.folder / "versions" / name
    problems = _version(folder, recorded.get(name), {}, erased)
    root, above = stack_of(folder) if not problems else (None, [])
    below = [*([root] if root else []), *above]  # what a stack stands on is served with it
    return problems + [said for path in below if path != folder
                       for said in _version(path, recorded.get(path.name), {}, erased)]  # fmt: skip


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _ledger(folder: Path) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """Problems of the ledger, the hash of each version's version.json that it holds, and the files that were erased."""
    ledger = Ledger(folder)
    problems = []
    try:
        ledger.verify()
    except InputError as error:
        problems.append(str(error))
    try:
        events = ledger.events()
    except InputError:
        return problems, {}, {}
    return problems, _recorded(events), erased_files(events)


def _recorded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Version -> the hash of its version.json, as the ledger holds it."""
    return {str(e.get("version")): e[MANIFEST] for e in events if MANIFEST in e}


def _aliases(folder: Path) -> list[str]:
    workspace = Workspace(folder)
    try:
        wanted = workspace.expected_aliases()
        workspace.aliases()
    except InputError as error:
        return [str(error)]
    path = folder / "aliases.json"
    if path.read_text(encoding="utf-8") == aliases_text(wanted):
        return []
    return [f"{path}: not what the ledger says; the next command that opens the workspace mends it"]


def _version(folder: Path, recorded: Any, taught: dict[str, str], erased: Collection[str]) -> list[str]:
    info_path = folder / "version.json"
    if not folder.is_dir() or not info_path.is_file():
        return [f"{folder}: no version (it has no version.json)"]
    if recorded is None:
        return [
            f"{folder}: not in the ledger: its stage was interrupted (repeat its learn command), or it was put here"
        ]
    if file_sha256(info_path) != recorded:
        return [f"{info_path}: altered (its hash is not the one in the ledger)"]
    info = read_json(info_path)
    listed, found = info["files"], manifest_of(folder)
    gone = {name for name in listed if name not in found}
    problems = [f"{folder / name}: missing" for name in listed
                if name in gone and f"versions/{folder.name}/{name}" not in erased]  # fmt: skip
    problems += [f"{folder / name}: altered" for name in listed if name in found and found[name] != listed[name]]
    problems += [f"{folder / name}: not of this version; it was put here later" for name in found if name not in listed]
    if info["skill"] is not None:
        content = info["hashes"]["skill"]
        taught[f"{info['skill']}@{content[:8]}"] = content
    return problems


def _skill(folder: Path, taught: dict[str, str]) -> list[str]:
    """A kept skill that no version was taught (its stage was refused or is under way) still has its short hash."""
    try:
        files = skill_files(folder)
    except InputError as error:
        return [str(error)]
    content = content_hash(files)
    wanted = taught.get(folder.name, "")
    if (wanted and content != wanted) or not re.fullmatch(rf".+@{content[:8]}", folder.name):
        return [f"{folder}: altered: its files are not those of the skill that was kept here"]
    extra = sorted(path.name for path in folder.iterdir() if path.name not in files)
    return [f"{folder / name}: not of this skill; it was put here later" for name in extra]
