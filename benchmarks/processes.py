"""Two processes against one, one thread each: tokens a second in training and rollouts, and what each process holds.

    python benchmarks/processes.py [--rounds 3] [--rows 32] [--json FILE]

Alternates the runs; each is an SDFT stage of the embedded model, started as a user would, by torchrun. ``divided`` is
train.fsdp. Ratios, because this machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

STEPS, SKIPPED = 5, 2
KINDS = {"one": (1, False), "two": (2, False), "two, divided": (2, True)}
"""Name -> processes, divided."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="of a step, over all processes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "DIVIDED", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), args.child[1] == "True", int(args.child[2]))
        return
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind, (count, divided) in KINDS.items():
            found[kind].append(run(count, divided, args.rows))
            print(f"round {number + 1}, {kind}: {found[kind][-1]}", flush=True)
    ratios = {
        f"processes.{part.replace(' ', '_')}.{kind.replace(', ', '_')}": statistics.median(
            other[part] / one[part] for other, one in zip(found[kind], found["one"], strict=True))
        for part in ("all", "rollout", "training", "student and optimizer bytes") for kind in ("two", "two, divided")
    }  # fmt: skip
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    if args.json:
        args.json.write_text(json.dumps(ratios | {"runs": found}, indent=1) + "\n")


def run(count: int, divided: bool, rows: int) -> dict[str, Any]:
    """Tokens a second of the steps after the first ones, and bytes of process 0's masters and optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone",
                   __file__, "--child", folder, str(divided), str(rows)]  # fmt: skip
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        (path,) = Path(folder).glob("bot/runs/*/timings.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()][SKIPPED - 1 :]
        tokens = {part: lines[-1]["tokens"][part] - lines[0]["tokens"][part] for part in lines[0]["tokens"]}
        seconds = {part: sum(line["seconds"][part] for line in lines[1:]) for part in lines[-1]["seconds"]}
        rest = sum(seconds.values()) - seconds["rollout"]
        return {
            "rollout": round(tokens["rollout"] / seconds["rollout"], 1),
            "training": round((tokens["student"] + tokens["teacher"]) / rest, 1),
            "all": round(sum(tokens.values()) / sum(seconds.values()), 1),
            "student and optimizer bytes": json.loads((Path(folder) / "bytes.json").read_text()),
        }


def child(folder: Path, divided: bool, rows: int) -> None:
    """What each process runs."""
    import perdure.train
    from perdure import processes, running  # noqa: F401  # registers what the others are called for
    from perdure.config import RunConfig
    from perdure.curriculum import learn
    from perdure.importers import IMPORTERS
    from perdure.reporting import Silent
    from perdure.stages import create_workspace

    torch.set_num_threads(1)
    processes.start()
    if not processes.GROUP.lead:
        processes.follow()
        return
    real = perdure.train.optimise

    def watched(stage: Any, config: Any, optimizer: torch.optim.Optimizer, *rest: Any) -> Any:
        result = real(stage, config, optimizer, *rest)
        held = [*stage.student.model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
        size = sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in held)
        (folder / "bytes.json").write_text(str(size))
        return result

    perdure.train.optimise = watched
    skill = IMPORTERS["home-assistant"](folder / "smart-home", 0)
    train = {"steps": STEPS, "warm_start_steps": 0, "batch_size": rows, "anchor_share": 0.0, "validation_max": 0,
             "checkpoint_every": 1000, "fsdp": divided}  # fmt: skip
    config = RunConfig.model_validate(
        {"train": train, "context": {"template": "turns:3"}, "probe": {"tasks": []}, "eval": {"rows": 4},
         "preflight": {"rows": 4, "forecast": False}, "gate": {"enforce": False, "repair": 0}}
    )  # fmt: skip
    learn(create_workspace(folder / "bot", config), [skill], config, Silent(), force=True)
    processes.stop()


if __name__ == "__main__":
    main()
