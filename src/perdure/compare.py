"""Two versions side by side: scores on the same items, settings that differ, and the way from one to the other."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from perdure.gates import Together, unit_of
from perdure.scores import PROBE, Scores, known_scores
from perdure.settings import dotted
from perdure.skills.base import kept_rows, together
from perdure.stats import paired_difference
from perdure.workspace import Workspace


def compare(workspace: Workspace, first: str, second: str) -> dict[str, Any]:
    """``scores``: name -> paired difference with its 95 % bootstrap interval and one-sided p-values, None where the two
    were not measured on the same items. ``config``: dotted key -> [value of first, value of second]. ``between``: the
    versions from one to the other where one descends from the other, else None.

    Raises InputError for a name that is no version."""
    names = [workspace.resolve(name) for name in (first, second)]
    records = [workspace.version(name) for name in names]
    scores = [known_scores(workspace, name) for name in names]
    measured = sorted(
        scores[0].items.keys() | scores[1].items.keys(), key=lambda name: (name.split("/")[0] == PROBE, name)
    )
    before, after = (dotted(record["config"]) for record in records)
    return {
        "first": names[0],
        "second": names[1],
        "between": _between(workspace, *names),
        "scores": {name: _difference(workspace, name, *scores) for name in measured},
        "config": {key: [before.get(key), after.get(key)] for key in sorted(before.keys() | after.keys())
                   if before.get(key) != after.get(key)},
        "weights": [record["hashes"].get("weights") for record in records],
        "seconds": [sum(record["cost"]["seconds"].values()) for record in records],
    }  # fmt: skip


def _between(workspace: Workspace, first: str, second: str) -> list[str] | None:
    for start, end in ((first, second), (second, first)):
        chain = workspace.lineage(end)
        if start in chain:
            return chain[chain.index(start) :]
    return None


def _difference(workspace: Workspace, name: str, first: Scores, second: Scores) -> dict[str, Any] | None:
    before, after = first.items.get(name), second.items.get(name)
    if not before or not after or before.keys() != after.keys() or first.taken(name) != second.taken(name):
        return None
    groups = together_in(workspace, name, first.skills.get(name, {}).get("skill_hash"))
    clusters = [unit_of(item, groups) for item in before]
    return asdict(paired_difference(list(before.values()), [after[item] for item in before], clusters=clusters))


def together_in(workspace: Workspace, name: str, content: str | None) -> Together:
    """Which items of a skill's ``content`` are no independent ones; none where that is not kept here any more."""
    folder = workspace.skills.folder_of(name, content) if content else None
    return together(kept_rows(folder)) if folder and folder.is_dir() else {}
