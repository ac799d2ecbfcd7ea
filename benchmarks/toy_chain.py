"""Two toy skills in a row, by four methods: does the loop learn, and what is kept? (First light's table.)

    python benchmarks/toy_chain.py [--steps 40] [--methods sft sft+anchors ...] [--json FILE]

Both skills are generated, with words of the test rows held out: a verdict on a sentence, and a sentence's number and
thing in a fixed form. Accuracy of A when learned, of A after B, of B (64 test rows each), and the mean KL from the base
to the final version, a token, on what the base says to 16 general prompts. The gate refuses nothing here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, finish, general_anchors

from perdure.config import RunConfig, TrainConfig, parse
from perdure.contexts import collate
from perdure.curriculum import learn
from perdure.fused import LossInputs, chunked_loss
from perdure.losses import LossSpec
from perdure.models import head_of, hidden_at_loss_positions
from perdure.report.numbers import summary
from perdure.reporting import Silent
from perdure.session import open_session
from perdure.stages import create_workspace
from perdure.workspace import Workspace

THINGS = ("soup", "film", "hotel", "phone", "chair", "coat", "garden", "train", "song", "lamp", "bread", "shop", "book",
          "road", "coffee", "game", "boat", "room", "tent", "bike")  # fmt: skip
GOOD, BAD = ("lovely", "great", "superb", "pleasant"), ("awful", "poor", "dreadful", "dull")
FRUITS = ("apples", "plums", "pears", "lemons", "cherries", "figs", "grapes", "melons", "dates", "limes", "kiwis",
          "berries")  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft", "anchor_share": 0.0},
    "sft+anchors": {"method": "sft"},
    "sdft, no anchors": {"anchor_share": 0.0},
    "sdft+anchors": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    skills = [write_skill("verdict", verdicts()), write_skill("count", counts())]
    report: dict[str, Any] = {}
    for name in args.methods:
        folder = FOLDER / "toy" / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        train = {"steps": args.steps, "warm_start_steps": args.steps * 2 // 3, "warm_start_until": 0.99, "patience": 99}
        config = parse(RunConfig, {
            "train": train | METHODS[name], "context": {"template": "turns:3"}, "probe": {"tasks": []},
            "gate": {"enforce": False},
        }, "toy settings")  # fmt: skip
        workspace = create_workspace(folder, config)
        with workspace.lock():
            learn(workspace, skills, config, Silent(), force=True)
        matrix = summary(folder)["accuracy_matrix"]
        row = {"A when learned": matrix[1][0], "A after B": matrix[2][0], "B": matrix[2][1], "KL": drift(folder)}
        report[name] = row
        print(name, json.dumps(row), flush=True)
    finish({"steps": args.steps, "toy_chain": report}, args.json)


def verdicts() -> dict[str, list[tuple[str, str]]]:
    rows = {"train": [], "test": []}
    for place, thing in enumerate(THINGS):
        for words, verdict in ((GOOD, "good"), (BAD, "bad")):
            for word in words:
                part = "test" if place % 5 >= 3 else "train"
                rows[part].append((f"The {thing} was {word}.", f"verdict={verdict}"))
    return rows


def counts() -> dict[str, list[tuple[str, str]]]:
    rows = {"train": [], "test": []}
    for place, fruit in enumerate(FRUITS):
        for number in NUMBERS:
            part = "test" if place % 2 else "train"
            rows[part].append((f"I bought {number} {fruit}.", f"count={number}; thing={fruit}"))
    return rows


def write_skill(name: str, rows: dict[str, list[tuple[str, str]]]) -> Path:
    folder = FOLDER / "toy-skills" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = [f'name = "{name}"', 'description = "toy"', 'grader = "exact"', "max_new_tokens = 16"]
    (folder / "skill.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for part, pairs in rows.items():
        chosen = pairs if part == "train" else pairs[:64]
        text = "".join(json.dumps({"prompt": prompt, "completion": said}) + "\n" for prompt, said in chosen)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return folder


@torch.no_grad()
def drift(folder: Path) -> float:
    """Mean KL(base || champion) a token, on the base's own answers to 16 general prompts."""
    base = open_session(RunConfig())
    rollouts = general_anchors(base, TrainConfig()).general[:16]
    workspace = Workspace.open(folder)
    final = open_session(RunConfig(), workspace.version_folder("champion"))
    batch = collate(rollouts, "student", base.loaded.pad_id)
    hidden = [hidden_at_loss_positions(session.working, batch) for session in (final, base)]
    inputs = LossInputs(*hidden, batch.targets_N, batch.weights_N, batch.demonstrated_N)
    total, _ = chunked_loss(LossSpec(), inputs, head_of(final.working), head_of(base.working))
    return float(total) / len(batch.targets_N)


if __name__ == "__main__":
    main()
