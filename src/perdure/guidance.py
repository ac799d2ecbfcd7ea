"""Anchor rows where they are needed: earlier skills that the student has moved away from get more of them.

A new skill seldom hurts all earlier ones: a few that look like it lose, the rest stay. The rows of a step that hold
earlier skills are therefore divided by how far the student was from the stage's first weights on each skill's anchors
when they were last drawn. The same idea as maximally interfered retrieval (Aljundi et al. 2019, arXiv 1908.04742), by
skill and without a pass of its own: the divergence is the loss that these rows carry anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

Allotments = dict[str, dict[str, float]]
"""Skill -> ``owed`` (rows that it is still to get), ``drawn`` (rows so far); once seen, ``moved`` (nats a token)."""
MEMORY = 0.5
"""Share of the old value that ``moved`` keeps at each new one."""


def allot(allotted: Allotments, skills: Sequence[str], count: int, focus: float) -> dict[str, int]:
    """How many of ``count`` rows each skill gets; enters them in ``allotted``.

    A share ``1 - focus`` is divided evenly, the rest in proportion to ``moved`` (a skill that was not seen yet counts
    as the one that moved most). What a share leaves over is owed to the skill, so that even a few rows a step reach
    all of them in turn; nothing is random."""
    for skill in skills:
        allotted.setdefault(skill, {"owed": 0.0, "drawn": 0})
    known = [allotted[skill]["moved"] for skill in skills if "moved" in allotted[skill]]
    moved = {skill: allotted[skill].get("moved", max(known, default=1.0)) for skill in skills}
    total = sum(moved.values())
    for skill in skills:
        guided = moved[skill] / total if total > 0 else 1 / len(skills)
        allotted[skill]["owed"] += count * ((1 - focus) / len(skills) + focus * guided)
    rows = dict.fromkeys(skills, 0)
    for _ in range(count):
        first = max(skills, key=lambda skill: allotted[skill]["owed"])
        allotted[first]["owed"] -= 1
        allotted[first]["drawn"] += 1
        rows[first] += 1
    return rows


def described(allotted: Allotments) -> dict[str, dict[str, float]]:
    """``moved`` of each skill seen so far, for a step's metrics; empty where there is none."""
    moved = {skill: round(entry["moved"], 5) for skill, entry in allotted.items() if "moved" in entry}
    return {"moved": moved} if moved else {}


def observe(allotted: Allotments, divergences: Sequence[tuple[str, float]]) -> None:
    """Takes in (skill, divergence in nats a token) of the rows of a step; rows of no earlier skill are left out."""
    found: dict[str, list[float]] = {}
    for skill, divergence in divergences:
        if skill in allotted:
            found.setdefault(skill, []).append(divergence)
    for skill, values in found.items():
        now = sum(values) / len(values)
        allotted[skill]["moved"] = MEMORY * allotted[skill].get("moved", now) + (1 - MEMORY) * now
