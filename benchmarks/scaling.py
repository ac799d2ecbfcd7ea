"""What a larger model would need, by arithmetic: memory and seconds of a step by part (the tables of docs/scaling.md).

    python benchmarks/scaling.py [--timings WORKSPACE/runs/STAGE/timings.jsonl]

Nothing here was run on a GPU. The same arithmetic is set against the embedded model's measured steps where a run's
timings are given, so that a reader sees how far it can be trusted.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP; numbers from the models' public configs."""

    name: str
    weights: float
    """All of them."""
    linear: float
    """Those in matrices that every token goes through, the head left out."""
    layers: int
    hidden: int
    mlp: int
    keys: int
    """Width of keys (and of values) over all their heads."""
    vocabulary: int


SHAPES = (
    Shape("SmolLM2-135M (embedded)", 134.5e6, 106.2e6, 30, 576, 1536, 192, 49152),
    Shape("Qwen2.5-1.5B", 1.54e9, 1.31e9, 28, 1536, 8960, 256, 151936),
    Shape("Qwen2.5-7B", 7.62e9, 6.53e9, 28, 3584, 18944, 512, 152064),
    Shape("Qwen2.5-14B", 14.77e9, 13.2e9, 48, 5120, 13824, 1024, 152064),
)


@dataclass(frozen=True)
class Machine:
    name: str
    devices: int
    memory: float
    """Bytes of a device."""
    flops: float
    """Matrix products a second that a device reaches, bfloat16."""
    bandwidth: float
    """Bytes a second that a device reads weights with."""


H100 = Machine("H100-80GB", 1, 80e9, 0.4 * 989e12, 0.6 * 3.35e12)
"""40 % of the data sheet's dense bfloat16 peak and 60 % of its bandwidth: what well-kept trainers report."""
NODE = Machine("8 x H100-80GB", 8, 80e9, H100.flops, H100.bandwidth)


@dataclass(frozen=True)
class Work:
    """One step: rows, and tokens of a row."""

    rows: int
    prompt: int
    completion: int
    turns: int
    """Earlier turns that the teacher sees."""
    micro_batch: int = 4096


def memory(shape: Shape, work: Work) -> dict[str, float]:
    """Bytes by part, full fine-tuning as train.py does it, on one device."""
    of_layer = 2 * (6 * shape.hidden + 2 * shape.keys + 3 * shape.mlp)
    tokens = min(work.micro_batch, work.rows * (work.prompt + work.completion))
    return {
        "masters, float32": 4 * shape.weights,
        "gradients, float32": 4 * shape.weights,
        "AdamW, two float32": 8 * shape.weights,
        "working copy, bfloat16": 2 * shape.weights,
        "frozen teacher, bfloat16": 2 * shape.weights,
        "activations of a micro-batch": of_layer * shape.layers * tokens,
        "keys and values of a decode": 4 * shape.keys * shape.layers * work.rows * (work.prompt + work.completion),
    }


def step(shape: Shape, work: Work, machine: Machine) -> dict[str, float]:
    """Seconds by part, work split evenly over the devices; communication is not counted."""
    head = shape.hidden * shape.vocabulary
    learned = work.rows * work.completion
    student = work.rows * (work.prompt + work.completion)
    teacher = work.rows * (work.prompt + work.completion) * (1 + work.turns)
    rate = machine.flops * machine.devices
    passes = work.completion * 2 * (shape.linear + head)  # bytes: every pass reads the bfloat16 weights
    return {
        "rollout, no drafts": 2 * shape.linear * work.rows * work.prompt / rate + passes / machine.bandwidth,
        "rollout, drafts all taken": 2 * (shape.linear + head) * student / rate,
        "teacher": (2 * shape.linear * teacher + 2 * head * learned) / rate,
        "student, forward and backward": (6 * shape.linear * student + 6 * head * learned) / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timings", type=Path, help="timings.jsonl of a run of the embedded model")
    parser.add_argument("--gflops", type=float, default=205.0, help="of the threads that the run had")
    args = parser.parse_args()
    work = Work(rows=32, prompt=200, completion=200, turns=2)
    print(f"Work: {work.rows} rows of {work.prompt} + {work.completion} tokens, {work.turns} earlier turns.\n")
    print("| part, GB | " + " | ".join(shape.name for shape in SHAPES) + " |\n" + "|---" * (1 + len(SHAPES)) + "|")
    parts = [memory(shape, work) for shape in SHAPES]
    for part in parts[0]:
        print(f"| {part} | " + " | ".join(f"{found[part] / 1e9:.1f}" for found in parts) + " |")
    sums = [sum(found.values()) / 1e9 for found in parts]
    print("| **all** | " + " | ".join(f"**{total:.1f}**" for total in sums) + " |")
    print("| devices of 80 GB, 15 % left free | " + " | ".join(f"{-(-total // 68):.0f}" for total in sums) + " |\n")
    print(
        "| seconds a step | " + " | ".join(shape.name for shape in SHAPES) + " |\n" + "|---" * (1 + len(SHAPES)) + "|"
    )
    for machine in (H100, NODE):
        steps = [step(shape, work, machine) for shape in SHAPES]
        for part in steps[0]:
            print(f"| {machine.name}: {part} | " + " | ".join(f"{found[part]:.3f}" for found in steps) + " |")
    if args.timings:
        check(args.timings, args.gflops)


def check(path: Path, gflops: float) -> None:
    """Predicted against measured: the linear layers' part of the embedded model's own steps."""
    shape, lines = SHAPES[0], [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found: dict[str, list[float]] = {"teacher": [], "student": []}
    for before, line in itertools.pairwise(lines):
        spent = {role: line["tokens"][role] - before["tokens"][role] for role in found}
        seconds = line["seconds"]
        if line["phase"] == "warm_start" and all(spent.values()):
            flops = {"teacher": 2 * shape.linear * spent["teacher"], "student": 6 * shape.linear * spent["student"]}
            measured = {"teacher": seconds["teacher"], "student": seconds["forward"] + seconds["backward"]}
            for role in found:
                found[role].append(flops[role] / (gflops * 1e9) / measured[role])
    print(f"\nPredicted over measured on {path.name} at {gflops:.0f} GFLOP/s: " + ", ".join(
        f"{role} {median(ratios):.2f} ({len(ratios)} steps)" for role, ratios in found.items() if ratios))  # fmt: skip


if __name__ == "__main__":
    main()
