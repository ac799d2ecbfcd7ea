"""The command that compares methods. Heavy imports wait until it needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from perdure.cli_common import JsonOption, app, out, reporter


@app.command()
def bench(
    chain: Annotated[Path, typer.Argument(help="Chain file: skills, orders, methods, seeds, settings (TOML).")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where runs and tables go; default: bench-workspace/NAME.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each on its share of the cores.", min=1)] = 1,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this row of the chain file; may be repeated.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; may be repeated.")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="Run nothing: tables of what is finished.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Chains of skills by several methods, side by side.

    Accuracy, retention, priors, drift and cost. The same command goes on where it stopped."""
    from perdure.bench.finished import results_so_far
    from perdure.bench.plan import load_chain
    from perdure.bench.tables import write_tables

    plan = load_chain(chain)
    place = folder or Path("bench-workspace") / plan.name
    if not tables:
        from perdure.bench.runner import run_bench

        run_bench(plan, chain, place, jobs, method or [], seed or [], reporter())
    found = write_tables(plan, place, results_so_far(plan, place))
    if as_json:
        out.print_json(json.dumps(found))
    else:
        out.print((place / "results.md").read_text(encoding="utf-8"), soft_wrap=True)
        out.print(f"Tables, plots and numbers: {place}", soft_wrap=True)
