"""A step of self-distillation against a step of SFT, in the same loop on the same rows.

    python benchmarks/vs_sft.py [--rounds 5] [--batch 16] [--json FILE]

Ratios ``vs_sft.cold`` and ``vs_sft.trained`` (on-policy steps from the base and from the trained student) and
``vs_sft.warm_start``; below 1 would be cheaper than SFT. No anchors: every row has a demonstration.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from common import FOLDER, STATES, finish, in_turns, load_state, make_stage, ratios, skill, spread

from perdure.config import RunConfig, TrainConfig
from perdure.session import open_session
from perdure.train import train

STEPS = 3
"""A job's steps; the first one warms up."""
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft"},
    "warm_start": {"warm_start_steps": STEPS},
    "on_policy": {"warm_start_steps": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    session, taught = open_session(RunConfig()), skill()

    def job(kind: str, state: str):
        # So small a rate leaves the student in its state; every other cost is that of a real step.
        config = TrainConfig(steps=STEPS, batch_size=args.batch, anchor_share=0, learning_rate=1e-9, teacher="frozen",
                             **KINDS[kind])  # fmt: skip

        def run(turn: int) -> dict[str, float]:
            load_state(session, state)
            folder = FOLDER / "runs" / "vs_sft"
            shutil.rmtree(folder, ignore_errors=True)
            parts: list[dict[str, float]] = []
            stage = make_stage(session, taught, config, folder, seed=turn)
            train(stage, config, lambda line, timings: parts.append(timings["seconds"]))
            mean = {name: sum(step[name] for step in parts[1:]) / (STEPS - 1) for name in parts[-1]}
            return mean | {"all": sum(mean.values())}

        return run

    for state in STATES:
        load_state(session, state)  # made before anything is timed
    jobs = {f"{kind}.{state}": job(kind, state) for state in ("cold", "trained") for kind in KINDS}
    results = in_turns(jobs, args.rounds)
    seconds = {name: [parts["all"] for parts in rows] for name, rows in results.items()}
    finish({
        "vs_sft": {
            "cold": ratios(seconds["on_policy.cold"], seconds["sft.cold"]),
            "trained": ratios(seconds["on_policy.trained"], seconds["sft.trained"]),
            "warm_start": ratios(seconds["warm_start.cold"], seconds["sft.cold"]),
        },
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "parts": {name: {part: spread([row[part] for row in rows]) for part in rows[0]}
                  for name, rows in results.items()},
    }, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
