"""How often the gate promotes, holds and refuses candidates whose true losses are known.

    python benchmarks/gate_rates.py [--runs 2000] [--json FILE]

``rates.<n>.<guards>.<noise>.<loss>``: shares of the verdicts. Every guard has n items, of which 80 % were right; each
item changes by noise each way, and the first guard loses on top of that. The new skill is always learned.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import finish

from perdure.config import GateConfig
from perdure.gates import Guard, decide

CASES = (
    (120, 3, 0.02),
    (240, 7, 0.02),
    (240, 7, 0.05),
    (300, 1, 0.0),
    (300, 9, 0.02),
    (1000, 9, 0.02),
    (1000, 50, 0.02),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates: dict[str, Any] = {}
    print("| items | guards | noise | true loss | promoted | held | refused |\n|---|---|---|---|---|---|---|")
    for n, guards, noise in CASES:
        for loss in (0.0, 0.04):
            found = shares(n, guards, noise, loss, args.runs)
            rates[f"{n}.{guards}.{noise}.{loss}"] = found
            cells = " | ".join(f"{found[decision]:.1%}" for decision in ("promoted", "held", "refused"))
            print(f"| {n} | {guards} | {noise:.0%} | {loss:.0%} | {cells} |", flush=True)
    finish({"runs": args.runs, "rates": rates}, args.json)


def shares(n: int, guards: int, noise: float, loss: float, runs: int, seed: int = 0) -> dict[str, float]:
    rng, config = np.random.default_rng(seed), GateConfig()
    before = np.arange(n) < round(0.8 * n)
    old = {str(i): bool(right) for i, right in enumerate(before)}
    learned = {str(i): True for i in range(20)}
    kept = [Guard(f"g{number}", "skill", "v001", old, config.budget) for number in range(guards)]
    counts = dict.fromkeys(("promoted", "held", "refused"), 0)
    for _ in range(runs):
        after = {"new": learned}
        for number in range(guards):
            lost = (noise + (loss if number == 0 else 0.0)) / 0.8
            flip = rng.random(n) < np.where(before, lost, noise / 0.2)
            after[f"g{number}"] = {str(i): bool(right) for i, right in enumerate(before ^ flip)}
        counts[decide(config, "new", dict.fromkeys(learned, False), after, kept).decision] += 1
    return {decision: count / runs for decision, count in counts.items()}


if __name__ == "__main__":
    main()
