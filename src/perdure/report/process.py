"""What the page shows of how it came about: learning curves, preflights, cost, versions, settings. Records and numbers
in, plain dictionaries for ``process.html.jinja`` out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perdure.config import RunConfig
from perdure.report.charts import LineChart, Series, line_chart, stacked
from perdure.report.numbers import PHASES
from perdure.report.record import Record, Run, number
from perdure.report.words import method_label
from perdure.settings import by_field
from perdure.workspace import BASE

CURVES = (
    ("Validation accuracy", "validation_accuracy", True, True),
    ("Demonstration probability", "demonstration_probability", True, False),
    ("Loss", "loss", False, False),
    ("KL from the start", "kl_start", False, True),
    ("Length of answers, tokens", "answer_tokens", False, True),
    ("Words of hesitation an answer", "hesitations", False, True),
)
"""Title, key in metrics.jsonl, a share?, measured only now and then?"""


# Learning curves


def curves(record: Record, compared: Mapping[str, Record]) -> list[dict[str, Any]]:
    """The charts of each stage; what another method measured while it learned the same skill is drawn beside."""
    shown = []
    for run in record.runs.values():
        lines = run.metrics()
        rivals = {name: _rival(other, run.info.skill) for name, other in compared.items()}
        warm = max((number(line.get("step")) or 0 for line in lines if line.get("phase") == "warm_start"), default=0.0)
        charts = [_chart(spec, run, lines, rivals, warm) for spec in CURVES]
        if any(charts):
            shown.append({"stage": run.stage, "method": method_label(run.info.method), "skill": run.info.skill,
                          "charts": [chart for chart in charts if chart], "warm": warm,
                          "pulled": pulled(lines)})  # fmt: skip
    return shown


def pulled(lines: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Earlier skills with the most nats a token by which their anchor rows had moved at any step, most first."""
    most: dict[str, float] = {}
    for line in lines:
        moved = line.get("moved")
        for skill, value in moved.items() if isinstance(moved, dict) else ():
            if (found := number(value)) is not None:
                most[skill] = max(most.get(skill, 0.0), found)
    return sorted(most.items(), key=lambda pair: -pair[1])


def _rival(other: Record, skill: str | None) -> list[dict[str, Any]]:
    runs = [run for run in other.runs.values() if skill and run.info.skill == skill]
    return runs[-1].metrics() if runs else []


def _chart(
    spec: tuple[str, str, bool, bool], run: Run, lines: Sequence[dict[str, Any]],
    rivals: Mapping[str, Sequence[dict[str, Any]]], warm: float,
) -> LineChart | None:  # fmt: skip
    title, key, share, dotted = spec
    ours = Series(method_label(run.info.method), _points(lines, key), "ours", dotted)
    if not ours.points:
        return None
    # The losses of two methods are different quantities; they do not share an axis.
    others = {} if key == "loss" else rivals
    theirs = [Series(method_label(name), _points(found, key), "theirs", dotted) for name, found in others.items()]
    return line_chart(title, [ours, *theirs], share=share, shade_until=warm)


def _points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = [(number(line.get("step")), number(line.get(key))) for line in lines]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


# Cost


def costs(numbers: dict[str, Any]) -> dict[str, Any] | None:
    """Stacked bars of seconds by stage, every method on the same scale. None when no stage is finished."""
    runs = {numbers["method"]: numbers} | numbers["compared"]
    longest = max((s["total"] for run in runs.values() for s in run["seconds_by_stage"].values()), default=0)
    if not numbers["stages"]:
        return None
    groups = [{"label": method_label(name), "rows": _cost_rows(run, longest), "total": run["seconds"],
               "tokens": run["tokens"]} for name, run in runs.items()]  # fmt: skip
    kinds = dict.fromkeys(kind for group in groups for kind in group["tokens"] if kind != "total")
    phases = dict.fromkeys([*PHASES, *(kind for group in groups for kind in group["total"] if kind != "total")])
    return {"groups": groups, "phases": list(phases), "kinds": list(kinds)}


def _cost_rows(run: dict[str, Any], longest: float) -> list[dict[str, Any]]:
    rows = []
    for stage, parts in run["seconds_by_stage"].items():
        spent = {kind: value for kind, value in parts.items() if kind != "total"}
        rows.append({"stage": stage, "segments": stacked(spent, longest), "seconds": parts,
                     "tokens": run["tokens_by_stage"][stage]})  # fmt: skip
    return rows


# Versions and settings


def versions(record: Record) -> list[dict[str, Any]]:
    """Newest first; ``marks`` are the aliases, ``kept`` says that the champion descends from it."""
    kept = set(record.lineage(record.champion))
    rows = []
    for name, version in reversed(record.versions.items()):
        decision = version.verdict.decision if version.verdict else ("base" if name == BASE else "not judged")
        marks = [alias for alias, target in record.aliases.items() if target == name]
        rows.append({"name": name, "parent": version.parent, "skill": version.skill, "decision": decision,
                     "method": method_label(version.method) if version.method else "", "created": version.created,
                     "weights": str(version.hashes.get("weights") or ""), "marks": marks,
                     "kept": name in kept})  # fmt: skip
    return rows


def settings(config: RunConfig) -> list[dict[str, Any]]:
    """Every setting by section; ``changed`` marks those that are not the default."""
    now, default = config.model_dump(mode="json"), RunConfig().model_dump(mode="json")
    top = {"general": {key: value for key, value in now.items() if not isinstance(value, dict)}}
    plain = {"general": default}
    sections = top | {key: value for key, value in now.items() if isinstance(value, dict)}
    return [
        {"section": section, "rows": [
            {"key": key, "value": _setting(value), "changed": value != (plain.get(section) or default[section])[key]}
            for key, value in values.items()]}
        for section, values in sections.items()
    ]  # fmt: skip


def overrides(record: Record) -> list[dict[str, Any]]:
    """Versions that were made with other settings than perdure.toml has now: their values that differ."""
    now = by_field(record.config.model_dump(mode="json"))
    found = []
    for name, version in record.versions.items():
        used = by_field(version.config)
        differing = [f"{key} = {_setting(value)}" for key, value in used.items() if now.get(key, value) != value]
        if differing:
            found.append({"version": name, "settings": differing})
    return found


def preflights(record: Record) -> dict[str, Any]:
    """Runs with a preflight, and its advice: a line once, with the skills it is about."""
    runs = [run for run in record.runs.values() if run.preflight]
    advice: dict[str, list[str]] = {}
    for run in runs:
        for line in run.preflight.advice if run.preflight else ():
            advice.setdefault(line, []).append(run.info.skill or run.stage)
    return {"runs": runs, "advice": {line: list(dict.fromkeys(skills)) for line, skills in advice.items()}}


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
