"""A bench's plots, as SVG: a dot and its interval for each row of a metric, and how the chains went."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from perdure.report.charts import nice_ticks

Cell = Sequence[float | None] | None
"""(mean, low, high), as summarise gives it."""
TITLES = {"learned": "accuracy when learned", "final": "accuracy at the end", "retention": "retention",
          "forgetting": "forgetting", "backward_transfer": "backward transfer", "forward_transfer": "forward transfer",
          "prior_change": "prior tasks, points", "drift": "KL from the base", "minutes": "minutes of training",
          "tokens": "tokens, millions"}  # fmt: skip
PANEL, GAP, ROW, TOP, LETTER = 200, 56, 24, 58, 7
"""SVG units: width of a panel, space between panels, height of a row, room for titles, width of a letter."""


def plot(title: str, metrics: Sequence[str], found: dict[str, Any]) -> str:
    """A row a method, a panel a metric: mean as a dot, interval as a line. The reference is drawn darker."""
    rows = found["rows"]
    left = 24 + LETTER * max(len(found["labels"][name]) for name in rows)
    height, width = TOP + ROW * len(rows) + 34, left + len(metrics) * (PANEL + GAP)
    parts = _frame(title, width, height)
    for place, name in enumerate(rows):
        y = TOP + ROW * place + ROW / 2
        weight = ' font-weight="600"' if name == found["reference"] else ""
        parts.append(f'<text x="{left - 12}" y="{y + 4:g}" text-anchor="end"{weight}>'
                     f"{html.escape(found['labels'][name])}</text>")  # fmt: skip
    for place, metric in enumerate(metrics):
        parts += _panel(left + place * (PANEL + GAP), metric, found)
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: float, metric: str, found: dict[str, Any]) -> list[str]:
    cells = {name: row[metric] for name, row in found["rows"].items()}
    cells = {name: in_millions(cell) if metric == "tokens" else cell for name, cell in cells.items()}
    values = [value for cell in cells.values() if cell for value in cell if value is not None]
    if not values:
        return []
    spread = max(values) - min(values)
    ticks = nice_ticks(min(values) - (0.0 if spread > 1e-9 else 0.1), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    foot = TOP + ROW * len(cells)
    percent = metric in ("learned", "final", "prior_change")

    def at(value: float) -> float:
        return round(left + PANEL * (value - low) / (high - low), 1)

    parts = [f'<text x="{left}" y="{TOP - 12}" fill="#555">{html.escape(TITLES[metric])}</text>']
    for tick in ticks:
        said = f"{100 * tick:g}" + (" %" if metric != "prior_change" else "") if percent else f"{tick:g}"
        parts.append(f'<line x1="{at(tick)}" x2="{at(tick)}" y1="{TOP}" y2="{foot}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{at(tick)}" y="{foot + 18}" text-anchor="middle" fill="#777">{said}</text>')
    for place, (name, cell) in enumerate(cells.items()):
        y, colour = TOP + ROW * place + ROW / 2, "#1f4e79" if name == found["reference"] else "#4c78a8"
        places = [at(value) for value in cell or () if value is not None]
        if len(places) == 3:
            _, start, end = places
            parts.append(f'<line x1="{start}" x2="{end}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{place}" cy="{y}" r="4" fill="{colour}"/>' for place in places[:1]]
    return parts


def in_millions(cell: Cell) -> Cell:
    return cell and [None if value is None else value / 1e6 for value in cell]


LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800")
"""Colours that people with any colour vision can tell apart (Okabe and Ito), again from the first beyond eight rows."""
WIDE, HIGH, LEFT = 440, 230, 52
"""SVG units: width and height of the plot of chains, and room for its y axis."""


def chain_plot(title: str, found: dict[str, Any]) -> str:
    """A line a method over the number of skills taught: the mean accuracy, after that stage, on all of them. The lines
    are named at their right ends, in their order there."""
    lines = {name: [place["average"] or 0.0 for place in row] for name, row in found["growth"].items()}
    most = max(map(len, lines.values()))
    labels, floor = found["labels"], TOP + HIGH
    width = LEFT + WIDE + 24 + LETTER * max(len(labels[name]) for name in lines)
    parts = _frame(title, width, floor + 44)

    def at(skills: int, value: float) -> tuple[float, float]:
        return round(LEFT + WIDE * (skills - 1) / max(1, most - 1), 1), round(floor - HIGH * value, 1)

    for percent in (0, 25, 50, 75, 100):
        y = at(1, percent / 100)[1]
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDE}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" fill="#777">{percent} %</text>')
    for skills in range(1, most + 1):
        parts.append(f'<text x="{at(skills, 0)[0]}" y="{floor + 18}" text-anchor="middle" fill="#777">{skills}</text>')
    parts.append(f'<text x="{LEFT + WIDE / 2}" y="{floor + 36}" text-anchor="middle" fill="#555">skills taught</text>')
    ends = _apart({name: at(1, values[-1])[1] for name, values in lines.items()})
    for place, (name, values) in enumerate(lines.items()):
        colour, points = LINES[place % len(LINES)], [at(skills, value) for skills, value in enumerate(values, 1)]
        drawn = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{LEFT + WIDE + 12}" y="{ends[name] + 4:g}" fill="{colour}" font-weight="600">'
                     f"{html.escape(labels[name])}</text>")  # fmt: skip
    return "\n".join([*parts, "</svg>", ""])


def _apart(heights: dict[str, float]) -> dict[str, float]:
    """The same heights, moved down where two labels would overlap."""
    placed: dict[str, float] = {}
    for name in sorted(heights, key=lambda name: heights[name]):
        placed[name] = max(heights[name], max(placed.values(), default=0.0) + 16)
    return placed


def _frame(title: str, width: float, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="22" font-size="15" font-weight="600">{html.escape(title)}</text>',
    ]
