"""The report's numbers for a terminal. Foreign text passes ``safe_text`` and is never read as rich markup: every cell
is a ``Text``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from perdure.report import results
from perdure.report.record import Version
from perdure.report.words import (
    count,
    interval,
    percent,
    points,
    safe_line,
    safe_text,
    seconds,
    sentences,
)

__all__ = [
    "cost_table",
    "diff_tables",
    "ledger_table",
    "profile_table",
    "render",
    "safe_text",
    "score_table",
]

NAME_WIDTH, LABEL_WIDTH = 16, 26
"""Longest skill name and row label in characters; longer ones are cut with an ellipsis."""
LEDGER_WIDTH = 100
"""Characters from which the ledger's table has room for all its columns."""


def render(summary: dict[str, Any], console: Console) -> None:
    """Print accuracy matrix, methods side by side, prior capabilities and the three closing sentences."""
    if summary["skills"]:
        _matrix(summary, console)
    if comparison := results.comparison(summary):
        _comparison(comparison, console)
    if summary["prior"]:
        _prior(summary, console)
    console.print()
    for sentence in sentences(summary):
        console.print(Text(sentence))


def skill_table(numbers: Mapping[str, Any], skills: Sequence[str], console: Console) -> None:
    """Print how well the champion knows ``skills``: ``numbers`` as ``summary`` gives them."""
    table = table_of("Skills", ["", "Right now", "When learned", "Test rows"])
    for skill in skills:
        place = numbers["skills"].index(skill)
        shares = [numbers[key][place] for key in ("final_accuracy", "accuracy_when_learned")]
        add_row(table, [skill, *(percent(share) for share in shares), str(numbers["n"][place] or "-")])
    console.print(table)


def score_table(result: Mapping[str, Any], console: Console) -> None:
    """Print one version's scores: ``result`` is ``{"version", "scores", "probe"}``, as ``perdure eval --json`` says."""
    table = table_of(str(result["version"]), ["Measured on", "Right", "95% interval", "Rows"])
    tasks = (result["probe"] or {"tasks": {}})["tasks"]
    for name, score in (result["scores"] | {f"prior: {task}": score for task, score in tasks.items()}).items():
        cells = [percent(score["accuracy"], 1), interval([score["low"], score["high"]]), str(score["n"])]
        add_row(table, [name, *cells])
    if result["probe"]:
        add_row(table, ["prior, average", percent(result["probe"]["average"], 1)], "bold")
    console.print(table)


def ledger_table(events: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the ledger's events; in a narrow terminal without their parents, so that the reasons can be read."""
    parts = ["version", "parent", "skill"] if console.width >= LEDGER_WIDTH else ["version", "skill"]
    table = Table("time (UTC)", "event", *parts, "why", box=None, pad_edge=False)
    for event in events:
        gone = [*event.get("versions", ()), *event.get("stages", ())]  # of prune and erase
        why = event.get("reason") or event.get("decision") or (", ".join(map(str, gone)))
        why += f" ({event['by']})" if event.get("by") else ""
        what = f"{event.get('event', '')}{', forced' if event.get('forced') else ''}"
        when = str(event.get("time") or "")[:16].replace("T", " ")
        cells = [when, what, *(event.get(key) or "" for key in parts), why]
        table.add_row(*(Text(safe_line(str(cell))) for cell in cells))
    console.print(table)


def cost_table(versions: Sequence[Version], console: Console) -> None:
    """Print what each stage was predicted to take, and took."""
    known = [(version, version.cost.predicted) for version in versions if version.cost.predicted]
    if not known:
        return
    phases = ("train", "evaluate", "probe")
    table = table_of("Seconds, predicted and actual", ["Stage", *phases, "In all", "Ratio"])
    for version, predicted in known:
        actual = {phase: version.cost.seconds.get(phase, 0.0) for phase in phases}
        cells = [f"{predicted.get(phase, 0.0):.0f} / {actual[phase]:.0f}" for phase in phases]
        totals = sum(predicted.values()), sum(actual.values())
        ratio = f"{totals[1] / totals[0]:.2f}" if totals[0] else "–"
        add_row(table, [safe_line(str(version.stage)), *cells, f"{totals[0]:.0f} / {totals[1]:.0f}", ratio])
    console.print(table)


def diff_tables(found: Mapping[str, Any], console: Console) -> None:
    """Print what ``compare.compare`` gives."""
    first, second = found["first"], found["second"]
    table = table_of(
        f"{first} and {second}", ["Measured on", first, second, "Change", "95% interval", "Lost", "Gained", "n"]
    )
    for name, score in found["scores"].items():
        if score is None:
            add_row(table, [name, *["–"] * 7])
            continue
        style = "green" if score["low"] > 0 else "red" if score["high"] < 0 else ""
        add_row(table, [name, percent(score["before"], 1), percent(score["after"], 1), points(score["change"]),
                     f"{points(score['low'])} to {points(score['high'])}", str(score["lost"]), str(score["gained"]),
                     str(score["n"])], style)  # fmt: skip
    console.print(table)
    between = found["between"]
    way = f"The way: {' > '.join(between)}." if between else "Neither descends from the other."
    console.print(Text(f"{way} –: not measured on the same items."))
    for key, (before, after) in found["config"].items():
        console.print(Text(safe_line(f"{key}: {before} in {first}, {after} in {second}")))


def profile_table(stage: str, rows: Sequence[Mapping[str, Any]], peak: float, console: Console) -> None:
    """Print where a stage's training time went: ``rows`` as ``report.profile.profile`` gives them."""
    table = table_of(f"{stage}: training, median step", ["Part", "Seconds", "Share", "Tokens/s", "Of peak"])
    for phase in dict.fromkeys(row["phase"] for row in rows):
        parts = [row for row in rows if row["phase"] == phase]
        total = sum(row["seconds"] for row in parts)
        steps = parts[0]["steps"]
        title = f"{phase.replace('_', ' ')}, {steps} step{'s' if steps != 1 else ''}"
        add_row(table, [title, f"{total:.2f}", "", "", ""], "bold")
        for row in parts:
            rate, of_peak = row["tokens_per_second"], row["of_peak"]
            cells = [f"{row['seconds']:.2f}", percent(row["share"]), "" if rate is None else count(round(rate)),
                     "" if of_peak is None else percent(of_peak)]  # fmt: skip
            add_row(table, ["  " + row["part"], *cells])
    console.print(table)
    note = "shared prefixes count for every row, so a part may pass 100%"
    console.print(Text(f"Peak: {peak / 1e9:,.0f} GFLOP/s, a matrix product timed now; {note}.", style="dim"))


# Sections of ``render``


def _matrix(summary: dict[str, Any], console: Console) -> None:
    rows = results.matrix(summary)
    names = [*summary["skills"], *(["prior"] if summary["prior"] else [])]
    for number, places in enumerate(_fitting(names, console.width)):
        title = "Accuracy after each stage" + (" (continued)" if number else "")
        table = table_of(title, ["Served model", *(names[place] for place in places)], label_width=LABEL_WIDTH)
        for row in rows:
            cells = [*row["cells"], row["prior"]]
            turned_away = row["kind"] == "candidate"
            table.add_row(_label(row), *(_cell(cells[place], turned_away) for place in places))
        console.print(table)
    key = "[ ] taught in this stage"
    if any(row["kind"] == "candidate" for row in rows):
        key += "; struck: a candidate that did not become the champion"
    console.print(Text(key, style="dim"))


def _label(row: Mapping[str, Any]) -> Text:
    """The version first, as it is what the other commands ask for."""
    label = Text(f"{row['version']} ", style="dim")
    if row["kind"] == "candidate":
        return label.append(safe_line(row["skill"]), style="strike").append(f" {row['flag']}", style="red")
    if row["flag"] == "stays":
        return label.append("stays")
    label.append(safe_line(row["label"][0].lower() + row["label"][1:]), style="not dim")
    return label.append(f", {row['flag']}") if row["flag"] else label


def _fitting(names: Sequence[str], width: int) -> Iterable[list[int]]:
    """Columns in groups that fit ``width`` characters beside the row labels; at least one in each."""
    group: list[int] = []
    room = width - LABEL_WIDTH - 3
    for place, name in enumerate(names):
        need = max(7, min(len(safe_line(name)), NAME_WIDTH)) + 2
        if group and need > room:
            yield group
            group, room = [], width - LABEL_WIDTH - 3
        group.append(place)
        room -= need
    yield group


def _cell(cell: Mapping[str, Any], turned_away: bool) -> Text:
    text = f"[{cell['text']}]" if cell["taught"] else f" {cell['text']} "
    if cell["level"] is None:
        return Text(text, style="dim")
    if turned_away:  # appended, so that the padding of the cell is not struck too
        return Text(" ").append(cell["text"], style="dim strike").append(" ")
    return Text(text, style=_heat(cell["level"], bold=cell["taught"]))


def _heat(level: float, bold: bool) -> Style:
    """One hue from pale to deep, dark text turning to white where the fill gets deep."""
    pale, deep = (236, 242, 248), (18, 86, 143)
    red, green, blue = (round(p + (d - p) * level) for p, d in zip(pale, deep, strict=True))
    return Style(color="white" if level > 0.6 else "black", bgcolor=f"#{red:02x}{green:02x}{blue:02x}", bold=bold)


def _comparison(comparison: Mapping[str, Any], console: Console) -> None:
    columns = ["Method", "Skills", "Taught", "Now", "Retention", "Prior", "Change", "Time", "Tokens"]
    table = table_of("Methods side by side (bold: best of its column)", columns)
    for row in comparison["rows"]:
        shown = {"learned": percent(row["learned"], 1), "final": percent(row["final"], 1),
                 "retention": percent(row["retention"], 1), "prior_final": percent(row["prior_final"], 1),
                 "prior_change": points(row["prior_change"]), "seconds": seconds(row["seconds"]),
                 "tokens": count(row["tokens"])}  # fmt: skip
        cells = [Text(text, style="bold" if row[f"{key}_best"] else "") for key, text in shown.items()]
        table.add_row(Text(row["label"]), Text(str(row["taught"])), *cells)
    console.print(table)
    if comparison["not_enforced"]:
        note = f"For {comparison['not_enforced']} the gate records its verdicts but turns nothing away."
        console.print(Text(note, style="dim"))


def _prior(summary: dict[str, Any], console: Console) -> None:
    table = table_of("Prior capabilities", ["Task", "Base", "95% interval", "Now", "95% interval", "Change", "Items"])
    for task, scores in summary["prior"].items():
        base, final = scores["base"], scores["final"]
        change = final["accuracy"] - base["accuracy"] if base and final else None
        n = str((final or base or {}).get("n") or "–")
        add_row(table, [task, *_score(base), *_score(final), points(change), n])
    before, after = summary["prior_average"]["base"], summary["prior_average"]["final"]
    change = None if before is None or after is None else after - before
    add_row(table, ["average", percent(before, 1), "", percent(after, 1), "", points(change), ""], "bold")
    console.print(table)


def _score(score: Mapping[str, Any] | None) -> tuple[str, str]:
    if score is None:
        return percent(None), ""
    return percent(score["accuracy"], 1), interval([score["low"], score["high"]])


# Tables


def table_of(title: str, columns: Sequence[str], label_width: int | None = None) -> Table:
    """A plain table after an empty line, numbers to the right of a left-aligned first column."""
    heading = Text("\n" + safe_line(title), style="bold")
    table = Table(title=heading, title_justify="left", title_style="not italic", box=None, padding=(0, 1),
                  pad_edge=False, collapse_padding=True)  # fmt: skip
    for place, name in enumerate(columns):
        header = Text(safe_line(name), style="dim", overflow="ellipsis", no_wrap=True)
        if place == 0:
            table.add_column(header, width=label_width, min_width=8, overflow="fold")
        else:
            table.add_column(header, justify="right", max_width=NAME_WIDTH, no_wrap=True)
    return table


def add_row(table: Table, cells: Sequence[str], style: str = "") -> None:
    table.add_row(*(Text(safe_line(cell)) for cell in cells), style=style)
