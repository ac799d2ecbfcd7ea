"""What the benchmarks share: the skill, the three states of the student, timing in turns, the results file.

Everything lies under ``bench-workspace/`` (``PERDURE_BENCH`` names another folder) and is made once.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from perdure.checkpoint import load_weights, save_weights
from perdure.config import RunConfig, TrainConfig
from perdure.importers import IMPORTERS
from perdure.methods import METHODS
from perdure.models import sync_weights
from perdure.session import Session, open_session
from perdure.skills.base import Skill, load_skill
from perdure.stage import Anchors, Stage
from perdure.teacher import make_teacher
from perdure.templates import parse_template
from perdure.train import train

FOLDER = Path(os.environ.get("PERDURE_BENCH", "bench-workspace"))
TEMPLATE = "turns:2"
STATES = {"cold": 0, "half": 14, "trained": 60}
"""State of the student -> optimizer steps of SFT on the skill, from the base."""


def skill() -> Skill:
    """Smart-home commands to intent and slots, as in ``perdure demo``."""
    target = FOLDER / "skills" / "smart-home"
    if not target.is_dir():
        IMPORTERS["home-assistant"](target, 0)
    return load_skill(target)


def make_stage(session: Session, taught: Skill, config: TrainConfig, folder: Path, seed: int = 0,
               anchors: Anchors | None = None) -> Stage:  # fmt: skip
    """A stage on all training rows, without validation."""
    teacher = None
    if METHODS[config.method].shows or anchors:
        teacher = make_teacher(config.teacher, student=session.loaded.model, working=session.working, original=None,
                               dtype=session.dtype, teacher_update_rate=config.teacher_update_rate,
                               adapters=config.lora_rank > 0)  # fmt: skip
    return Stage(session.loaded, session.working, session.engine, teacher, session.renderer, parse_template(TEMPLATE),
                 taught.train, (), anchors or Anchors(), taught.grade, taught.settings.max_new_tokens, session.dtype,
                 seed, folder)  # fmt: skip


def load_state(session: Session, state: str) -> None:
    """Give the session's student the weights of one of STATES; the first call trains them (a few minutes)."""
    if not STATES[state]:
        session.loaded.model.load_state_dict(open_session(RunConfig()).loaded.model.state_dict())
    else:
        path = FOLDER / "states" / f"{state}.safetensors"
        if not path.is_file():
            _train_states(session)
        load_weights(session.loaded.model, path)
    sync_weights(session.working, session.loaded.model)


def _train_states(session: Session) -> None:
    last = max(STATES.values())
    for state, steps in STATES.items():
        if steps:
            load_state(session, "cold")
            print(f"training the student {state!r}: {steps} steps", flush=True)
            config = TrainConfig(method="sft", steps=steps, learning_rate=1e-4, anchor_share=0, warmup_steps=5)
            train(make_stage(session, skill(), config, FOLDER / "runs" / f"{state}-{last}"), config)
            (FOLDER / "states").mkdir(parents=True, exist_ok=True)
            save_weights(session.loaded.model, FOLDER / "states" / f"{state}.safetensors")


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


def in_turns(jobs: Mapping[str, Callable[[int], dict[str, float]]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Each job once a round, one after the other, so that a drifting machine hits all alike. A first round warms up."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for turn in range(-1, rounds):
        for name, job in jobs.items():
            measured = job(max(turn, 0))
            if turn >= 0:
                results[name].append(measured)
    return results


def ratios(top: list[float], bottom: list[float]) -> dict[str, float]:
    """Spread of the ratio, round by round."""
    return spread([a / b for a, b in zip(top, bottom, strict=True)])


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    flags = Path("/proc/cpuinfo").read_text()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "bf16_units": [name for name in ("avx512_bf16", "amx_bf16") if name in flags],
        "commit": commit.stdout.strip(),
    }  # fmt: skip


def finish(report: dict[str, Any], path: Path | None) -> None:
    """Print the report; write it where asked."""
    text = json.dumps({"machine": machine()} | report, indent=1)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    print(text)
