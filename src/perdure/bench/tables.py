"""Numbers as pages: results.md, one SVG a question and results.json, all from the files of finished runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perdure.bench.numbers import summarise
from perdure.bench.plan import ChainFile
from perdure.bench.plots import Cell, chain_plot, in_millions, plot
from perdure.files import read_json, replace_text
from perdure.provenance import now
from perdure.types import InputError

PLOTS = {
    "kept.svg": ("What was learned, and what is left at the end", ("learned", "final", "retention")),
    "rest.svg": ("What became of the rest", ("prior_change", "drift")),
    "cost.svg": ("What it cost to train", ("minutes", "tokens")),
}
"""File -> title and metrics, a panel each."""


def write_tables(chain: ChainFile, out: Path, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write and return the numbers. Raises InputError when no run is finished."""
    if not results:
        raise InputError(f"{out}: no finished run yet; run perdure bench without --tables")
    reference = chain.reference or next(iter(chain.methods))
    found = summarise(results, read_json(out / "base.json"), reference) | {
        "chain": chain.name, "reference": reference, "written": now(), "machine": platform.platform(),
        "labels": {name: row.label for name, row in chain.methods.items()},
        "rates": {result["method"]: result["rate"] for result in results},
        "commits": sorted({str(result["code"]["commit"])[:7] for result in results}),
        "threads": sorted({result["threads"] for result in results}),
    }  # fmt: skip
    replace_text(out / "results.json", json.dumps(found, indent=1) + "\n")
    replace_text(out / "results.md", page(chain, found))
    for name, (title, metrics) in PLOTS.items():
        replace_text(out / name, plot(title, metrics, found))
    replace_text(out / "chain.svg", chain_plot("Mean accuracy on the skills taught so far", found))
    return found


def page(chain: ChainFile, found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    items, orders = found["base"]["items"], len(chain.orders)
    wanted, runs = len(chain.seeds) * orders, [row["runs"] for row in found["rows"].values()]
    lines = [
        f"# {chain.name}",
        "",
        chain.about,
        "",
        f"`perdure bench` at {', '.join(found['commits'])}, {found['written'][:10]}, {found['machine']}, "
        f"{_listed(found['threads'])} thread a run. Finished: {min(runs)} to {max(runs)} of {wanted} runs a row (order "
        f"times seed); {_listed(items.values())} test rows a skill. In brackets 95 % intervals: over runs by "
        "Student's t, with the items' variance (bootstrap) added; with one run over items alone.",
        "",
        "| method | rate | runs | learned | final | retention | forward transfer | prior, points | KL | min | Mtok |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(found["labels"][name], found["rates"][name], row) for name, row in found["rows"].items()),
        "",
        "Retention is what is left of the earlier skills together: the sum of their accuracies at the end over that "
        "when learned; forgetting and backward transfer are in results.json." + _of_base(found["base"]["prior"]),
        "",
        f"Paired difference to {found['labels'][found['reference']]}, in points; retention in hundredths:",
        "",
        "| method | learned | final | retention | prior |",
        "|---|---|---|---|---|",
        *(f"| {found['labels'][name]} | " + " | ".join(_points(row[m]) for m in ("learned", "final", "retention",
          "prior_change")) + " |" for name, row in found["differences"].items()),
        "",
        "Accuracy of each skill when learned, and at the end, in percent:",
        "",
        "| method | " + " | ".join(chain.skills) + " |",
        "|---" * (1 + len(chain.skills)) + "|",
        *(f"| {found['labels'][name]} | " + " | ".join(_pair(row.get(skill)) for skill in chain.skills) + " |"
          for name, row in found["skills"].items()),
    ]  # fmt: skip
    if len(chain.skills) > 2:
        lines += _growth(found)
    if (fit := found["calibration"]) and fit["rank_correlation"] is not None:
        lines += ["", f"Preflight: teacher gap against realised gain over {fit['n']} stages, rank correlation "
                  f"{fit['rank_correlation']:.2f} (p = {fit['p_value']:.2g})."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _growth(found: dict[str, Any]) -> list[str]:
    """How retention and cost go with the number of skills."""
    places = max(found["growth"].values(), key=len)
    title = "By number of skills taught: retention of the first / of all earlier skills; seconds of training + rest:"
    lines = ["", title, "",
             "| method | " + " | ".join(str(place["skills"]) for place in places) + " |",
             "|---" * (1 + len(places)) + "|"]  # fmt: skip
    for name, row in found["growth"].items():
        cells = [" / ".join("-" if value is None else f"{value:.2f}" for value in (p["first"], p["earlier"]))
                 + f"; {p['train']:.0f} + {p['rest']:.0f}" for p in row]  # fmt: skip
        lines.append(f"| {found['labels'][name]} | " + " | ".join(cells) + " |")
    return lines


def _of_base(prior: float | None) -> str:
    return "" if prior is None else f" The base model has {100 * prior:.1f} % on the prior tasks."


def _listed(numbers: Iterable[int]) -> str:
    return "/".join(map(str, sorted(set(numbers))))


def _row(label: str, rate: float, row: dict[str, Any]) -> str:
    cells = [_percent(row["learned"]), _percent(row["final"]), _plain(row["retention"], 2),
             _points(row["forward_transfer"]), _points(row["prior_change"]), _plain(row["drift"], 3),
             _plain(row["minutes"], 1), _plain(in_millions(row["tokens"]), 2)]  # fmt: skip
    return f"| {label} | {rate:g} | {row['runs']} | " + " | ".join(cells) + " |"


def _plain(cell: Cell, digits: int, factor: float = 1.0, sign: str = "") -> str:
    if cell is None or cell[0] is None:
        return "-"
    mean, *ends = (None if value is None else f"{value * factor:{sign}.{digits}f}" for value in cell)
    return f"{mean}" if ends[0] is None else f"{mean} [{ends[0]}, {ends[1]}]"


def _percent(cell: Cell) -> str:
    """An accuracy; where few runs differ much, their t interval reaches beyond what one can be."""
    if cell is not None and None not in cell:
        cell = [min(1.0, max(0.0, value)) for value in cell if value is not None]
    return _plain(cell, 1, 100)


def _points(cell: Cell) -> str:
    return _plain(cell, 1, 100, "+")


def _pair(cell: dict[str, float] | None) -> str:
    return "-" if cell is None else f"{100 * cell['learned']:.0f} / {100 * cell['final']:.0f}"
