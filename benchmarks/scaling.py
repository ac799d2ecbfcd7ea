"""What larger models would need, by the arithmetic of ``perdure check --hardware``: the tables of docs/scaling.md.

    python benchmarks/scaling.py [--timings WORKSPACE/runs/STAGE/timings.jsonl]

The same arithmetic is set against the embedded model's measured steps where a run's timings are given; one_gpu.py sets
it against a large shape on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from statistics import median

from perdure.config import TrainConfig
from perdure.footprint import GIGA, Shape, Work, estimate, parse_hardware

SHAPES = {
    "SmolLM2-135M": Shape(134_515_008, 106_168_320, 30, 576, 1536, 192, 49152),
    "Qwen2.5-1.5B": Shape(1_543_714_304, 1_310_199_808, 28, 1536, 8960, 256, 151936),
    "Qwen2.5-7B": Shape(7_615_616_512, 6_525_288_448, 28, 3584, 18944, 512, 152064),
    "Qwen2.5-14B": Shape(14_770_033_664, 13_212_057_600, 48, 5120, 13824, 1024, 152064),
    "Qwen2.5-32B": Shape(32_763_876_352, 31_206_604_800, 64, 5120, 27648, 1024, 152064),
}
"""From the models' public configurations: weights, those in matrices without the head, layers, widths, vocabulary."""
WORK = Work(rows=32, prompt=200, completion=200, teacher_prompt=1000)
KINDS = {
    "full weights, FSDP2": TrainConfig(fsdp=True, activation_checkpointing=True),
    "LoRA, rank 32": TrainConfig(lora_rank=32, activation_checkpointing=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timings", type=Path, help="timings.jsonl of a run of the embedded model")
    parser.add_argument("--gflops", type=float, default=205.0, help="of the threads that the run had")
    args = parser.parse_args()
    for kind, train in KINDS.items():
        found = [estimate(shape, WORK, train, parse_hardware("8xH100-80GB")) for shape in SHAPES.values()]
        print(f"\n| {kind} | " + " | ".join(SHAPES) + " |\n" + "|---" * (1 + len(SHAPES)) + "|")
        for part in found[0]["memory_gb"]:
            print(f"| {part}, GB | " + " | ".join(f"{one['memory_gb'].get(part, 0):.1f}" for one in found) + " |")
        print("| **all, GB** | " + " | ".join(f"**{one['needed_gb']:.1f}**" for one in found) + " |")
        print("| devices of 80 GB | " + " | ".join(str(one["devices_needed"]) for one in found) + " |")
        for part in found[0]["step_seconds"]:
            print(
                f"| {part}, s a step on 8 | " + " | ".join(f"{one['step_seconds'][part]:.3f}" for one in found) + " |"
            )
    if args.timings:
        check(args.timings, args.gflops)


def check(path: Path, gflops: float) -> None:
    """Predicted against measured: the linear layers' part of the embedded model's own warm-start steps."""
    shape, lines = SHAPES["SmolLM2-135M"], [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found: dict[str, list[float]] = {"teacher": [], "student": []}
    for before, line in itertools.pairwise(lines):
        spent = {role: line["tokens"][role] - before["tokens"][role] for role in found}
        seconds = line["seconds"]
        if line["phase"] == "warm_start" and all(spent.values()):
            flops = {"teacher": 2 * shape.linear * spent["teacher"], "student": 6 * shape.linear * spent["student"]}
            measured = {"teacher": seconds["teacher"], "student": seconds["forward"] + seconds["backward"]}
            for role in found:
                found[role].append(flops[role] / (gflops * GIGA) / measured[role])
    print(f"\nPredicted over measured at {gflops:.0f} GFLOP/s: " + ", ".join(
        f"{role} {median(ratios):.2f} ({len(ratios)} steps)" for role, ratios in found.items() if ratios))  # fmt: skip


if __name__ == "__main__":
    main()
