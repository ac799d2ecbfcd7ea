"""What ``perdure check`` found, in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from perdure.report.text import add_row, table_of
from perdure.report.words import count, interval, method_label, percent, points, safe_line, seconds


def preflight_tables(checks: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what ``perdure check`` measured: ``checks`` are contents of ``preflight.json``."""
    for found in checks:
        chosen = found["template"]
        table = table_of(found["skill"], ["Context template", "Right", "95% interval", "Tokens", "KL", "Leaks"])
        for row in found["templates"]:
            style = "bold" if row["template"] == chosen else ""
            name = row["template"] + (" (chosen)" if row["template"] == chosen else "")
            cells = [percent(row["accuracy"]), interval([row["low"], row["high"]]), f"{row['tokens']:.0f}",
                     f"{row['kl']:.2f}", percent(row["leak_share"])]  # fmt: skip
            add_row(table, [name, *cells], style)
        console.print(table)
        console.print(Text(_preflight_line(found)))
        if train := found.get("train"):
            console.print(Text(_rows_line(train)))
        if test := found.get("test"):
            console.print(Text(_test_line(test), style="yellow" if test["budget"] < test["least_budget"] else ""))
        for line in found["advice"]:
            console.print(Text(safe_line(line), style="" if found["ready"] else "yellow"))
        if advised := found.get("recommended"):
            options = "".join(f" --set {key}={value}" for key, value in advised["settings"].items())
            line = f"Recommended: --method {advised['method']}{options}. {' '.join(advised['reasons'])}"
            console.print(Text(safe_line(line), style="bold"))


def _preflight_line(found: Mapping[str, Any]) -> str:
    student, teacher = percent(found["student_accuracy"]), percent(found["teacher_accuracy"])
    text = f"Without the demonstration {student}, with it {teacher}, gap {points(found['gap'])} points"
    text += f" on {found['n']} training rows."
    cost = found.get("cost") or {}
    phases = cost.get("seconds") or {}
    if phases:
        parts = ", ".join(f"{phase} {seconds(value)}" for phase, value in phases.items())
        total = count(sum(cost["tokens"].values()))
        by = f" by {method_label(cost['method'])}" if cost.get("method") else ""
        text += f" The stage will take about {seconds(sum(phases.values()))}{by} ({parts}) and {total} training tokens."
    priced = cost.get("priced") or {}
    if "energy_kwh" in priced:
        text += f" About {priced['energy_kwh']:.3f} kWh at {priced['watts']:.0f} W."
    if "money" in priced:
        text += f" About {priced['money']:.2f} {priced['currency']} at {priced['price_per_hour']:.2f} an hour."
    return text


def _rows_line(train: Mapping[str, int]) -> str:
    rows, shown = train["rows"], train["steps"] * train["a_step"]
    text, of = f"{train['steps']} steps show", f"of the {count(rows)} rows to learn from"
    if shown >= rows:
        return f"{text} each {of} about {shown / rows:.1f} times."
    return f"{text} {count(shown)} {of}; to show all of them: train.steps = {math.ceil(rows / train['a_step'])}."


def _test_line(test: Mapping[str, Any]) -> str:
    least, budget = percent(test["least_budget"], 1), percent(test["budget"], 1)
    rows, units = test["rows"], test.get("units", test["rows"])
    what = f"{rows} test rows" if units == rows else f"{rows} test rows, {units} of them independent,"
    text = f"{what} can judge a retention budget of about {least} or more; the budget is {budget}"
    if test["budget"] >= test["least_budget"]:
        return f"{text}."
    return f"{text}, so later versions would be held: add test rows, or set retention_budget in skill.toml."


def hardware_tables(estimates: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what ``perdure check --hardware`` found."""
    for found in estimates:
        table = table_of(f"{found['skill']} on {found['hardware']}", ["Memory of each device", "GB"])
        for part, size in found["memory_gb"].items():
            add_row(table, [part, f"{size:.2f}"])
        add_row(table, ["all", f"{found['needed_gb']:.1f}"], "bold")
        console.print(table)
        fits = f"Fits into {found['room_gb']:.0f} GB (a tenth of each device is left free)."
        if not found["fits"]:
            several = f"{found['devices_needed']} such devices, or " if found["devices_needed"] else ""
            fits = (f"Does not fit into {found['room_gb']:.0f} GB: it takes {several}train.fsdp over several devices, "
                    "train.activation_checkpointing, train.lora_rank, a smaller train.micro_batch_tokens or a smaller "
                    "model.")  # fmt: skip
        console.print(Text(fits, style="" if found["fits"] else "yellow"))
        parts = ", ".join(f"{part} {value:.2g} s" for part, value in found["step_seconds"].items())
        total = sum(found["step_seconds"].values())
        line = f"A step of {found['rows']} rows: {total:.2g} s at the least ({parts}). {ARITHMETIC}"
        console.print(Text(line))


ARITHMETIC = (
    "From data sheets; steps that were measured on a GPU took 1.4 to 5 times as long, small models the most "
    "(docs/scaling.md). One process a device, started by torchrun."
)
