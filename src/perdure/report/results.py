"""What page and terminal show of what came out: accuracy matrix, methods side by side, prior capabilities, verdicts.
Numbers in, plain dictionaries for ``results.html.jinja`` and ``text.py`` out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from perdure.report.charts import on_axis, share_axis
from perdure.report.record import Record, number
from perdure.report.words import TURNED_AWAY, interval, listed, method_label, percent, points, safe_line, turned_away

CLEAR = 0.025
"""One-sided p-value below which a difference on the same items is called clear (5 % on both sides together)."""


# The accuracy matrix


def matrix(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the heat map: champions, and before the row it did not change each candidate that was turned away."""
    skills = numbers["skills"]
    rows = [_champion_row(numbers, 0, "Base model", None)]
    for row, stage in enumerate(numbers["stages"], 1):
        label = safe_line(stage["skill"] or stage["stage"] or stage["version"])
        if not stage["in_force"]:
            cells = [_cell(stage["scores"].get(skill)) for skill in skills]
            prior = numbers["prior_average"]["versions"].get(stage["version"])
            flag = stage["decision"] if stage["decision"] != "promoted" else "rolled back"
            rows.append({"kind": "candidate", "label": f"Candidate: {label}", "skill": label,
                         "version": stage["version"], "flag": flag or "not judged", "cells": cells,
                         "prior": _plain_cell(prior)})  # fmt: skip
        rows.append(_champion_row(numbers, row, f"After {label}", stage))
    return rows


def _champion_row(numbers: dict[str, Any], row: int, label: str, stage: dict[str, Any] | None) -> dict[str, Any]:
    version = numbers["rows"][row]
    cells = []
    for place, skill in enumerate(numbers["skills"]):
        pair = numbers["intervals"][row][place] or (None, None)
        score = {"accuracy": numbers["accuracy_matrix"][row][place], "low": pair[0], "high": pair[1]}
        taught = bool(stage and stage["in_force"] and stage["skill"] == skill)
        cells.append(_cell(score | {"n": numbers["n_matrix"][row][place]}, taught))
    flag = "stays" if stage and version == numbers["rows"][row - 1] else ""
    if stage and stage["in_force"] and stage["decision"] in TURNED_AWAY:
        flag = f"{stage['decision']}, but served"
    return {"kind": "champion", "label": label, "version": version, "flag": flag,
            "cells": cells, "prior": _plain_cell(numbers["prior_average"]["versions"].get(version))}  # fmt: skip


def _cell(score: Mapping[str, Any] | None, taught: bool = False) -> dict[str, Any]:
    accuracy = score["accuracy"] if score else None
    if score is None or accuracy is None:
        return _plain_cell(None)
    pair = (score["low"], score["high"])
    hover = f"{percent(accuracy, 1)}, 95% interval {interval(pair, 1) or 'unknown'}, n = {score['n'] or 'unknown'}"
    shown = {"text": percent(accuracy), "interval": interval(pair)}
    return _plain_cell(accuracy) | shown | {"title": hover + (", taught in this stage" if taught else ""),
                                            "taught": taught}  # fmt: skip


def _plain_cell(value: float | None) -> dict[str, Any]:
    """``level`` fills the cell; ``tone`` names the strongest fills, on which the text turns."""
    tone = "" if value is None or value < 0.6 else "hot" if value >= 0.75 else "warm"
    return {"text": percent(value, 1), "level": value, "tone": tone, "interval": "", "title": "", "taught": False}


# Methods side by side


def comparison(numbers: dict[str, Any]) -> dict[str, Any] | None:
    """SDFT and the others in the same columns, each mean over the skills that all of them have. None without others."""
    others = numbers["compared"]
    if not others:
        return None
    runs = {"": numbers} | others
    learned = _common(runs, "accuracy_when_learned")
    measured = _common(runs, "final_accuracy")
    rows = [_method_row(run, name, learned, measured) for name, run in runs.items()]
    for key, best in (("learned", max), ("final", max), ("retention", max), ("prior_final", max),
                      ("prior_change", max), ("seconds", min), ("tokens", min)):  # fmt: skip
        values = [row[key] for row in rows if row[key] is not None]
        for row in rows:
            row[f"{key}_best"] = len(values) > 1 and row[key] is not None and math.isclose(row[key], best(values))
    skills = [_skill_row(runs, numbers, place) for place in range(len(numbers["skills"]))]
    partial = [s for s in numbers["skills"] if s not in learned]
    free = [row["label"] for row, run in zip(rows, runs.values(), strict=True) if not run["gate_enforced"]]
    return {"rows": rows, "skills": skills, "methods": [row["label"] for row in rows], "left_out": partial,
            "same_base": len({run["base"] for run in runs.values()}) == 1,
            "not_enforced": listed(free) if free else ""}  # fmt: skip


def _common(runs: Mapping[str, dict[str, Any]], key: str) -> list[str]:
    """Skills for which every run has a value of ``key``."""
    found = [dict(zip(run["skills"], run[key], strict=True)) for run in runs.values()]
    return [skill for skill in found[0] if all(values.get(skill) is not None for values in found)]


def _value(run: dict[str, Any], key: str, skill: str) -> float | None:
    return run[key][run["skills"].index(skill)] if skill in run["skills"] else None


def _method_row(run: dict[str, Any], name: str, learned: Sequence[str], measured: Sequence[str]) -> dict[str, Any]:
    def mean(key: str, skills: Sequence[str]) -> float | None:
        return sum(_value(run, key, skill) or 0.0 for skill in skills) / len(skills) if skills else None

    before, after = run["prior_average"]["base"], run["prior_average"]["final"]
    return {
        "label": method_label(name or run["method"]),
        "taught": sum(row is not None for row in run["learned_at"]),
        "turned_away": turned_away(run["stages"]),
        "served": any(stage["decision"] in TURNED_AWAY and stage["in_force"] for stage in run["stages"]),
        "learned": mean("accuracy_when_learned", learned),
        "final": mean("final_accuracy", measured),
        "retention": run["mean_retention"],
        "prior_base": before,
        "prior_final": after,
        "prior_change": None if before is None or after is None else after - before,
        "seconds": run["seconds"]["total"],
        "tokens": run["tokens"]["total"] or None,
    }


def _skill_row(runs: Mapping[str, dict[str, Any]], numbers: dict[str, Any], place: int) -> dict[str, Any]:
    skill = numbers["skills"][place]
    cells = [
        {"learned": _value(run, "accuracy_when_learned", skill), "final": _value(run, "final_accuracy", skill)}
        for run in runs.values()
    ]
    differences = [_reading(numbers["differences"][name][skill]) for name in numbers["compared"]]
    return {"skill": skill, "n": numbers["n"][place], "cells": cells, "differences": differences}


def _reading(found: dict[str, Any] | None) -> dict[str, str]:
    if found is None:
        return {"change": "–", "interval": "", "reading": "no shared test rows"}
    clear = min(found["p_worse"], found["p_better"]) <= CLEAR
    word = ("better" if found["change"] > 0 else "worse") if clear else "no clear difference"
    return {"change": points(found["change"]), "interval": f"{points(found['low'])} to {points(found['high'])}",
            "reading": word}  # fmt: skip


# Prior capabilities


def prior(numbers: dict[str, Any]) -> dict[str, Any] | None:
    """Dumbbells: each task before and now with its interval, on one axis. None when nothing was probed."""
    tasks = numbers["prior"]
    scores = [score for task in tasks.values() for score in (task["base"], task["final"]) if score]
    if not scores:
        return None
    low, high, ticks = share_axis([_low(score) for score in scores], [_high(score) for score in scores])

    def mark(score: dict[str, Any] | None) -> dict[str, Any] | None:
        if score is None:
            return None
        ends = [on_axis(value, low, high) for value in (_low(score), _high(score), score["accuracy"])]
        pair = [_low(score), _high(score)]
        return {"low": ends[0], "high": ends[1], "at": ends[2], "n": score["n"],
                "text": percent(score["accuracy"], 1), "interval": interval(pair)}  # fmt: skip

    rows = [
        {"task": name, "base": mark(task["base"]), "final": mark(task["final"]), "change": _change(task)}
        for name, task in tasks.items()
    ]
    return {"rows": rows, "ticks": ticks, "average": numbers["prior_average"], "champion": numbers["champion"]}


def _low(score: Mapping[str, Any]) -> float:
    return score["accuracy"] if score["low"] is None else score["low"]


def _high(score: Mapping[str, Any]) -> float:
    return score["accuracy"] if score["high"] is None else score["high"]


def _change(task: Mapping[str, Any]) -> float | None:
    return task["final"]["accuracy"] - task["base"]["accuracy"] if task["base"] and task["final"] else None


# Verdicts


def verdicts(record: Record, numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Each candidate's decision, its reasons and the gate's table with unusable cells emptied."""
    shown = []
    for stage in numbers["stages"]:
        verdict = record.versions[stage["version"]].verdict
        rows = [_check(row) for row in (verdict.table if verdict else ())]
        shown.append(stage | {"rows": rows, "method_label": method_label(stage["method"])})
    return shown


def _check(row: Mapping[str, Any]) -> dict[str, Any]:
    numeric = {key: number(row.get(key)) for key in ("before", "after", "change", "n", "p_value", "budget")}
    text = {key: str(row.get(key) or "") for key in ("name", "kind", "reference", "verdict")}
    return numeric | text | {"passed": row.get("passed") is True}
