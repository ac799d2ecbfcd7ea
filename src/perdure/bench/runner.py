"""Runs the chains of a chain file that are not finished, several at a time, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perdure.bench.chain_run import measure_base, run_chain
from perdure.bench.finished import RESULT, chosen_rates, finished, folder_of
from perdure.bench.plan import ChainFile, RunPlan, runs_of, sweeps_of
from perdure.bench.sources import skill_folder
from perdure.files import read_json, replace_text
from perdure.reporting import Reporter
from perdure.skills.base import content_hash, skill_files
from perdure.types import InputError

Job = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""(what it is, function, arguments)."""


def run_bench(chain: ChainFile, file: Path, out: Path, jobs: int, only: Sequence[str], seeds: Sequence[int],
              reporter: Reporter) -> list[dict[str, Any]]:  # fmt: skip
    """Results of all wanted runs, those made before included. ``only`` and ``seeds``: rows and seeds to run, all where
    empty. The same call goes on where it stopped. Raises InputError for an unknown row or seed."""
    if unknown := [
        *(name for name in only if name not in chain.methods),
        *(str(s) for s in seeds if s not in chain.seeds),
    ]:
        raise InputError(f"{file}: has no {', '.join(unknown)}")
    out.mkdir(parents=True, exist_ok=True)
    skills = {name: skill_folder(out, file.parent, name, chain.source(name)) for name in chain.skills}
    _check_data(out, chain, skills)
    threads = _share(jobs)
    base = out / "base.json"

    rows = set(only or chain.methods)
    sweeping = {chain.methods[name].sweep_as or name for name in rows}  # those with a fixed rate have no sweep to run
    sweeps = [plan for plan in sweeps_of(chain) if plan.method in sweeping]
    first = runs_of(chain, {})[0]
    known = base.is_file() and read_json(base).get("identity") == first.base_identity(skills)
    todo: list[Job] = [] if known else [("the base model", measure_base, (base, first, skills, threads))]
    todo += _jobs(sweeps, out, skills, None, threads)
    _work(todo, jobs, "bench: base and learning rates", reporter)
    rates = chosen_rates(chain, sweeps, out)
    plans = [p for p in runs_of(chain, rates) if p.method in rows and p.seed in (seeds or chain.seeds)]
    _work(_jobs(plans, out, skills, base, threads), jobs, "bench: chains", reporter)
    return [read_json(folder_of(out, plan) / RESULT) for plan in plans]


def _check_data(out: Path, chain: ChainFile, skills: Mapping[str, Path]) -> None:
    """Raises InputError where runs in ``out`` were made with other data, or ``skills`` from another source."""
    file = out / "data.json"
    known: dict[str, Any] = read_json(file) if file.is_file() else {}
    now = {name: {"source": chain.source(name).model_dump(mode="json"), "content": content_hash(skill_files(folder))}
           for name, folder in skills.items()}  # fmt: skip
    if others := [name for name in now if known.get(name, now[name]) != now[name]]:
        raise InputError(f"{out}: was run with other data of {', '.join(others)}: give another --out, or remove it")
    if not now.items() <= known.items():
        replace_text(file, json.dumps(known | now, indent=1) + "\n")


def _jobs(plans: Sequence[RunPlan], out: Path, skills: dict[str, Path], base: Path | None, threads: int) -> list[Job]:
    return [(plan.key, run_chain, (folder_of(out, plan), plan, skills, base, threads)) for plan in plans
            if not finished(folder_of(out, plan), plan)]  # fmt: skip


def _work(todo: Sequence[Job], jobs: int, title: str, reporter: Reporter) -> None:
    if not todo:
        return
    # A process serves one run, so that no run inherits memory or state from another.
    context = multiprocessing.get_context("spawn")
    with (
        _threads(jobs),
        reporter.phase(title, len(todo), "runs") as phase,
        ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        running = {pool.submit(function, *arguments): name for name, function, arguments in todo}
        try:
            for done, future in enumerate(as_completed(running), 1):
                future.result()
                phase.update(done)
                reporter.note(f"{running[future]}: done")
        except BrokenProcessPool as error:
            raise InputError("a run's process died, perhaps for want of memory: lower --jobs and repeat the command, "
                             "which goes on where it stopped") from error  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _share(jobs: int) -> int:
    """Cores for each of so many runs at a time."""
    return max(1, (os.cpu_count() or 1) // jobs)


@contextmanager
def _threads(jobs: int) -> Iterator[None]:
    """Within the context processes that are started take their share of the cores: torch reads the variable once."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(_share(jobs))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})
