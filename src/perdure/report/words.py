"""How the report says a number, and its three closing sentences: shared by the page and the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from perdure import methods

NOT_MEASURED = "–"
TURNED_AWAY = ("refused", "held")
"""Decisions of the gate that keep a candidate from becoming the champion."""

# Escape sequences of terminals as ECMA-48 has them: control strings (title, clipboard, links) with their text, then
# control sequences (colours, cursor), then the short forms. The one-byte C1 forms count as well.
_SEQUENCES = re.compile(
    r"(?:\x1b[PX\]^_]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\x9c|\Z)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|\x1b[ -/]*[0-~]?",
    re.DOTALL,
)
# Control characters but tab and newline; marks that turn the direction of the text around; halves of surrogate pairs.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb]")


def safe_text(text: str) -> str:
    """Foreign text without anything that steers a terminal or reverses the reading direction.

    Escape sequences vanish with their parameters; other control characters but tab and newline become U+FFFD.
    """
    return _CONTROLS.sub("\ufffd", _SEQUENCES.sub("", text.replace("\r\n", "\n")))


def safe_line(text: str) -> str:
    """``safe_text`` on one line."""
    return " ".join(safe_text(text).split())


def percent(value: float | None, digits: int = 0) -> str:
    """0.936 as ``94%``. Never rounds a miss up to 100 % nor a hit down to 0 %."""
    if value is None:
        return NOT_MEASURED
    step = 10.0 ** -(digits + 2)
    if 1 - step / 2 <= value < 1:
        value = 1 - step
    elif 0 < value < step / 2:
        value = step
    return f"{value:.{digits}%}"


def interval(pair: Sequence[float | None] | None, digits: int = 0) -> str:
    """(0.8, 0.95) as ``80–95%``; nothing where an end is missing."""
    if pair is None or pair[0] is None or pair[1] is None:
        return ""
    return f"{100 * pair[0]:.{digits}f}–{100 * pair[1]:.{digits}f}%"


def points(value: float | None, digits: int = 1) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    if value is None:
        return NOT_MEASURED
    shown = f"{abs(100 * value):.{digits}f}"
    if float(shown) == 0:
        return shown
    return ("+" if value > 0 else "−") + shown


def seconds(value: float | None) -> str:
    """A duration as a person says it: ``38 s``, ``42 min``, ``1 h 12 min``."""
    if value is None:
        return NOT_MEASURED
    if value < 90:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float | None) -> str:
    """A number of tokens: ``812``, ``45.3 k``, ``1.24 M``."""
    if value is None:
        return NOT_MEASURED
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * size:  # 999 600 is 1 M, not 1000 k
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def method_label(name: str | None) -> str:
    """``sdft`` as people write it."""
    return methods.method_label(safe_line(name or "")) or NOT_MEASURED


def model_label(source: str) -> str:
    """The model as people know it; ``embedded`` says little."""
    return "SmolLM2-135M-Instruct (embedded)" if source == "embedded" else safe_line(source)


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentences(summary: dict[str, Any]) -> tuple[str, str, str]:
    """What was learned, what was kept, what it cost: one or two plain sentences each. Foreign text is made safe."""
    return _learned(summary), _kept(summary), _cost(summary)


def _learned(summary: dict[str, Any]) -> str:
    names = [safe_line(name) for name in summary["skills"]]
    taught = [i for i, row in enumerate(summary["learned_at"]) if row is not None]
    base, learned = summary["accuracy_matrix"][0], summary["accuracy_when_learned"]
    tail = _refused(summary) + _running(summary)
    if not taught:
        return f"Nothing has been learned yet: the champion is {_champion(summary)}.{tail}"
    if len(taught) <= 4:
        return f"The model learned {listed([_gain(names[i], base[i], learned[i]) for i in taught])}.{tail}"
    mean = percent(_mean([learned[i] for i in taught]))
    weakest = min(taught, key=lambda i: 2 if learned[i] is None else learned[i])
    worst = f"the weakest, {names[weakest]}, to {percent(learned[weakest])}"
    return f"The model learned {len(taught)} skills, on average to {mean} when taught and {worst}.{tail}"


def _gain(name: str, base: float | None, learned: float | None) -> str:
    if learned is None:
        return f"{name} (not measured)"
    return f"{name} to {percent(learned)}" if base is None else f"{name} from {percent(base)} to {percent(learned)}"


def _champion(summary: dict[str, Any]) -> str:
    return "the base model" if len(summary["lineage"]) == 1 else summary["champion"]


def _refused(summary: dict[str, Any]) -> str:
    lost = [safe_line(s["skill"] or s["version"]) for s in summary["stages"] if not s["in_force"]]
    lost = [name for name in dict.fromkeys(lost) if name not in _taught_names(summary)]
    if not lost:
        return ""
    verb = "was" if len(lost) == 1 else "were"
    return f" {listed(lost)} {verb} tried and did not become part of the champion."


def _taught_names(summary: dict[str, Any]) -> set[str]:
    pairs = zip(summary["skills"], summary["learned_at"], strict=True)
    return {safe_line(name) for name, row in pairs if row is not None}


def _running(summary: dict[str, Any]) -> str:
    parts = [
        f" {safe_line(skill['skill'])} was not trained: the check before training advised against it."
        for skill in summary["not_started"]
    ]
    for run in summary["unfinished"]:
        most = f" of at most {run['steps_planned']}" if run["steps_planned"] else ""
        parts.append(f" {safe_line(run['skill'] or run['stage'])} is under way, {run['steps']}{most} steps done.")
    return "".join(parts)


def _kept(summary: dict[str, Any]) -> str:
    earlier = [i for i, by in enumerate(summary["taught_by"]) if by not in (None, summary["champion"])]
    ratios = {i: summary["retention"][i] for i in earlier if summary["retention"][i] is not None}
    if summary["mean_retention"] is None or not ratios:
        skills = "There is no earlier skill to forget yet"
    else:
        i = min(ratios, key=lambda i: ratios[i])
        then, now = percent(summary["accuracy_when_learned"][i]), percent(summary["final_accuracy"][i])
        what = f"{safe_line(summary['skills'][i])}, {then} when taught, {now} now"
        share = f"{100 * summary['mean_retention']:.0f}%"
        if len(ratios) == 1:
            skills = f"The earlier skill keeps {share} of its accuracy ({what})"
        else:
            skills = f"Earlier skills keep {share} of their accuracy on average (lowest: {what})"
    return f"{skills}; {_prior(summary)}."


def _prior(summary: dict[str, Any]) -> str:
    before, after = summary["prior_average"]["base"], summary["prior_average"]["final"]
    if before is None or after is None:
        return "prior capabilities were not measured before and after"
    if len(summary["lineage"]) == 1:
        return f"prior capabilities average {percent(before, 1)}"
    tasks = sum(1 for task in summary["prior"].values() if task["base"] and task["final"])
    return (
        f"prior capabilities average {percent(before, 1)} before and {percent(after, 1)} now "
        f"({points(after - before)} points over {plural(tasks, 'task')})"
    )


def _cost(summary: dict[str, Any]) -> str:
    if not summary["stages"]:
        return "No stage is finished, so nothing has been paid for yet."
    total, tokens = summary["seconds"], summary["tokens"]["total"]
    text = f"It took {seconds(total['total'])}, {seconds(total['train'])} of it training,"
    text += f" and {count(tokens)} tokens" if tokens else ""
    stages = summary["stages"]
    served = any(stage["in_force"] and stage["decision"] in TURNED_AWAY for stage in stages)
    verdict = turned_away(stages) or ("not refused" if len(stages) == 1 else "none of them refused")
    but = " but served all the same" if served else ""
    repaired = sum(any(reason.startswith("Repaired") for reason in stage["reasons"][:1]) for stage in stages)
    after = f"; {repaired} passed after a repair" if repaired else ""
    return f"{text} for {plural(len(stages), 'stage')}, {verdict} by the gate{but}{after}."


def turned_away(stages: Sequence[Mapping[str, Any]]) -> str:
    """``1 refused and 2 held``; empty where every stage's candidate passed."""
    counts = {decision: sum(stage["decision"] == decision for stage in stages) for decision in TURNED_AWAY}
    parts = [f"{number} {decision}" for decision, number in counts.items() if number]
    return listed(parts) if parts else ""


def _mean(values: list[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None
