"""Geometry of the report's small plots: numbers in, coordinates out. ``charts.html.jinja`` draws them as inline SVG,
so that every label passes through the template's escaping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float]

WIDTH, HEIGHT = 240, 150
"""Of a line chart in SVG units; on the page a unit is about a CSS pixel."""
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 22
"""Margins around the plot."""
MAX_POINTS = 120
"""Of one line; longer runs are thinned, keeping each stretch's extremes."""
MAX_DOTS = 24
"""More points than this are not marked one by one."""


@dataclass(frozen=True)
class Series:
    """One line of a chart, in data units."""

    label: str
    points: Sequence[Point]
    style: str
    """CSS class: ``ours`` or ``theirs``."""
    dotted: bool = False
    """Mark every point: for values measured only now and then."""


@dataclass(frozen=True)
class Tick:
    at: float
    """SVG units, or percent of the width in a bar or dumbbell."""
    label: str


@dataclass(frozen=True)
class Curve:
    """One drawn line: ``points`` as SVG wants them, ``dots`` as (x, y, text on hover)."""

    label: str
    style: str
    points: str
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class LineChart:
    title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    shade: tuple[float, float] | None
    """Left edge and width of the shaded stretch (the warm start), SVG units."""
    last: str
    """The last value of the first series, for the caption."""


@dataclass(frozen=True)
class Segment:
    """Part of a stacked bar: place and width in percent."""

    kind: str
    at: float
    width: float
    value: float


def line_chart(title: str, series: Sequence[Series], *, share: bool, shade_until: float = 0) -> LineChart | None:
    """A chart over steps; ``share`` fixes the y axis to 0..100 %. None when no series has a point."""
    series = [line for line in series if line.points]
    if not series:
        return None
    # A log may hold a negative value (an estimated KL); the axis always starts at zero or below.
    low = 0.0 if share else min(0.0, *(y for line in series for _, y in line.points))
    high = 1.0 if share else max(y for line in series for _, y in line.points)
    y_values = [0.0, 0.5, 1.0] if share else nice_ticks(low, high)
    low, high = min(low, y_values[0]), max(high, y_values[-1])
    x_high = max(1.0, *(x for line in series for x, _ in line.points))

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / x_high
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (point[1] - low) / (high - low)
        return round(x, 1), round(y, 1)

    x_values = sorted({tick for tick in nice_ticks(0, x_high) if tick <= x_high and tick == int(tick)})
    edge = place((min(shade_until, x_high), low))[0]
    return LineChart(
        title,
        tuple(Tick(place((x, low))[0], f"{x:g}") for x in x_values),
        tuple(Tick(place((0, y))[1], _label(y, share)) for y in y_values),
        tuple(_curve(line, place, share) for line in series),
        (LEFT, round(edge - LEFT, 1)) if shade_until > 0 else None,
        _value(series[0].points[-1][1], share),
    )


def _curve(line: Series, place: Any, share: bool) -> Curve:
    places = [place(point) for point in thinned(line.points)]
    marked = line.points if line.dotted and len(line.points) <= MAX_DOTS else line.points[-1:]
    dots = tuple((*place((x, y)), f"{line.label}, step {x:g}: {_value(y, share)}") for x, y in marked)
    return Curve(line.label, line.style, " ".join(f"{x:g},{y:g}" for x, y in places), dots)


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about ``limit`` points: of each stretch the first, the lowest and the highest, and the very last."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 3))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        extremes = {part[0], min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def nice_ticks(low: float, high: float, count: int = 3) -> list[float]:
    """About ``count`` + 1 round values, at least two, that cover [low, high]. A range below 1e-9 counts as none."""
    if high - low < 1e-9:
        high = low + 1.0
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(tick * step, 12) for tick in range(first, last + 1)]


def share_axis(lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float, tuple[Tick, ...]]:
    """An axis of shares around all intervals, in steps of 10 or 20 %: its ends (0..1) and its ticks."""
    low, high = math.floor(10 * min(lows)) / 10, math.ceil(10 * max(highs) - 1e-9) / 10
    tenths = range(round(10 * low), round(10 * high) + 1, 2 if high - low > 0.55 else 1)
    return low, high, tuple(Tick(on_axis(t / 10, low, high), f"{10 * t}%") for t in tenths)


def on_axis(value: float, low: float, high: float) -> float:
    """Percent of the axis' width at which ``value`` lies."""
    return round(100 * (value - low) / (high - low), 2)


def stacked(parts: Mapping[str, float], whole: float) -> tuple[Segment, ...]:
    """``parts`` one after the other, in percent of ``whole`` (the longest bar's sum). Empty parts are left out."""
    segments, at = [], 0.0
    for kind, value in parts.items():
        width = 100 * value / whole if whole else 0.0
        if width > 0:
            segments.append(Segment(kind, round(at, 2), round(width, 2), value))
        at += width
    return tuple(segments)


def _label(value: float, share: bool) -> str:
    return f"{value:.0%}" if share else f"{value:g}"


def _value(value: float, share: bool) -> str:
    return f"{value:.0%}" if share else f"{value:.3g}"
