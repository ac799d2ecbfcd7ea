"""The own decode against ``transformers.generate``: training rollouts, and greedy evaluation of the skill.

    python benchmarks/decode.py [--rounds 3] [--json FILE]

The same weights in the compute dtype, the same prompts and limits. ``rollout_vs_generate.<state>``: 16 training prompts
at temperature 1 with their demonstrations as drafts, against ``generate(do_sample=True)``.
``eval_vs_generate.<state>``: the skill's first 120 test rows, greedy, drafted with the expected answers, against
``generate`` in the batch size that serves it best.
Ratios are generate's seconds over the own decode's, and cost a token the other way round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import STATES, finish, in_turns, load_state, ratios, skill, spread

from perdure.config import RunConfig
from perdure.rollout.base import SamplingParams
from perdure.session import Session, open_session
from perdure.types import Prompt

BATCHES = (16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    session, taught = open_session(RunConfig()), skill()
    report: dict[str, Any] = {"rollout_vs_generate": {}, "eval_vs_generate": {}, "seconds": {}, "identical": {}}
    for state in STATES:
        load_state(session, state)
        most = taught.settings.max_new_tokens
        for name, rows, temperature in (("rollout", taught.train[:16], 1.0), ("eval", taught.test[:120], 0.0)):
            prompts = [session.renderer.student_prompt(example) for example in rows]
            drafts = [session.renderer.demonstration(example).token_ids for example in rows]
            params = SamplingParams(most, temperature)
            jobs: dict[str, Callable[[int], dict[str, Any]]] = {
                "own": lambda turn: own(session, prompts, params, turn, drafts),  # noqa: B023
                "own, no draft": lambda turn: own(session, prompts, params, turn, None),  # noqa: B023
            }
            for size in BATCHES[:1] if name == "rollout" else BATCHES:
                jobs[f"generate, batch {size}"] = lambda turn, size=size: generate(session, prompts, params, turn, size)  # noqa: B023
            found = in_turns(jobs, args.rounds)
            seconds = {job: [run["seconds"] for run in runs] for job, runs in found.items()}
            theirs = min((job for job in jobs if job.startswith("generate")), key=lambda job: min(seconds[job]))
            report[f"{name}_vs_generate"][state] = ratios(seconds[theirs], seconds["own"])
            for job in jobs:
                tokens = sum(map(len, found[job][0]["tokens"]))
                report["seconds"][f"{name}.{state}.{job}"] = spread(seconds[job]) | {"tokens": tokens}
            if temperature == 0:
                same = [a == b for a, b in zip(found["own"][0]["tokens"], found[theirs][0]["tokens"], strict=True)]
                report["identical"][state] = f"{sum(same)} of {len(same)}"
    finish(report, args.json)


def own(session: Session, prompts: list[Prompt], params: SamplingParams, seed: int, drafts: Any) -> dict[str, Any]:
    start = time.perf_counter()
    seeds = [1000 * seed + row for row in range(len(prompts))]
    done = session.engine.generate(prompts, params, seeds, references=drafts)
    return {"seconds": time.perf_counter() - start, "tokens": [list(c.token_ids) for c in done]}


@torch.inference_mode()
def generate(session: Session, prompts: list[Prompt], params: SamplingParams, seed: int, size: int) -> dict[str, Any]:
    """Rows sorted by length, left-padded, as a careful user would call it."""
    loaded, model = session.loaded, session.working
    torch.manual_seed(seed)
    start = time.perf_counter()
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].token_ids))
    tokens: dict[int, list[int]] = {}
    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        width = max(len(prompts[row].token_ids) for row in rows)
        ids = torch.full((len(rows), width), loaded.pad_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            length = len(prompts[row].token_ids)
            ids[place, width - length :] = torch.tensor(prompts[row].token_ids)
            mask[place, width - length :] = 1
        sampling = {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        written = model.generate(
            ids, attention_mask=mask, max_new_tokens=params.max_new_tokens, eos_token_id=list(loaded.end_ids),
            pad_token_id=loaded.pad_id, **(sampling if params.temperature else {"do_sample": False}),
        )[:, width:]  # fmt: skip
        for row, said in zip(rows, written.tolist(), strict=True):
            end = next((t for t, token in enumerate(said) if token in loaded.end_ids), len(said) - 1)
            tokens[row] = said[: end + 1]
    return {"seconds": time.perf_counter() - start, "tokens": [tokens[row] for row in range(len(prompts))]}


if __name__ == "__main__":
    main()
