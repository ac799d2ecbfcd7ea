"""Times some steps of Perdure on the same rows as trl_steps.py; called by vs_trl.py.

python benchmarks/own_steps.py MODEL_FOLDER SKILL_FOLDER SETTINGS_JSON
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import make_stage

from perdure.config import RunConfig, TrainConfig
from perdure.session import open_session
from perdure.skills.base import load_skill
from perdure.train import train


def main() -> None:
    folder, skill_folder, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    config = TrainConfig(steps=settings["steps"], batch_size=settings["batch"], anchor_share=0, warm_start_steps=0,
                         demonstration_weight=0, learning_rate=1e-9, teacher="frozen",
                         teacher_temperature=1.0)  # fmt: skip
    session = open_session(RunConfig(), folder)
    taught = load_skill(skill_folder)
    run = Path(tempfile.mkdtemp())
    stage = replace(make_stage(session, taught, config, run), max_new_tokens=settings["max_new_tokens"])
    steps: list[dict[str, float]] = []
    tokens: list[int] = []

    def heard(line: dict, timings: dict) -> None:
        steps.append(timings["seconds"])
        tokens.append(line["loss_tokens"])

    train(stage, config, heard)
    shutil.rmtree(run)
    print(json.dumps({
        "seconds": [sum(step.values()) for step in steps], "tokens": tokens,
        "parts": {part: statistics.median(step[part] for step in steps[1:]) for part in steps[0]},
        "peak_rss_mb": peak_rss_mb(), "threads": torch.get_num_threads(),
    }))  # fmt: skip


def peak_rss_mb() -> float:
    """Of this program alone: ru_maxrss would also count what its parent held when it forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
