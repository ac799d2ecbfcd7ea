"""Results of a bench's runs as their files hold them: which runs are finished, and which rate a sweep chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.bench.plan import ChainFile, RunPlan, runs_of, sweeps_of
from perdure.files import read_json
from perdure.types import InputError

RESULT = "result.json"


def folder_of(out: Path, plan: RunPlan) -> Path:
    return out / "runs" / plan.key


def finished(folder: Path, plan: RunPlan) -> dict[str, Any] | None:
    """The run's result, where it is there. Raises InputError when it was made with other settings."""
    if not (folder / RESULT).is_file():
        return None
    result = read_json(folder / RESULT)
    if result["identity"] != plan.identity:
        raise InputError(
            f"{folder}: was run with other settings than the chain file has now; remove it, or give another --out"
        )
    return result


def results_so_far(chain: ChainFile, out: Path) -> list[dict[str, Any]]:
    """Results of the chain file's finished runs, in the order of the tables."""
    rates = chosen_rates(chain, [p for p in sweeps_of(chain) if finished(folder_of(out, p), p)], out)
    found = (finished(folder_of(out, plan), plan) for plan in runs_of(chain, rates))
    return [result for result in found if result]


def chosen_rates(chain: ChainFile, sweeps: Sequence[RunPlan], out: Path) -> dict[str, float]:
    """Row -> the rate of best validation accuracy on the first skill among those that stay below ``sweep.max_drift``;
    of equals the smallest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for plan in sweeps:
        found.setdefault(plan.method, []).append(read_json(folder_of(out, plan) / RESULT))
    limit = chain.sweep.max_drift if chain.sweep else None
    return {method: best_rate(results, limit) for method, results in found.items()}


def best_rate(results: Sequence[dict[str, Any]], max_drift: float | None) -> float:
    """See ``chosen_rates``; where every rate drifts too far, the one that drifts least."""
    stages = {result["rate"]: result["stages"][0] for result in results}
    drifts = {rate: stage["kl_start"] or 0.0 for rate, stage in stages.items()}
    if max_drift is not None and min(drifts.values()) > max_drift:
        return min(drifts, key=lambda rate: drifts[rate])
    allowed = [rate for rate in sorted(stages) if max_drift is None or drifts[rate] <= max_drift]
    return max(allowed, key=lambda rate: stages[rate]["validation"] or 0.0)  # the first of equals is the smallest
