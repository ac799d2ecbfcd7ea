"""What several processes do together, run by torchrun from test_processes.py.

torchrun --nproc-per-node 2 tests/several.py FOLDER NAME:CASE:KIND ...

The jobs run in turn, each in a folder of its own, FOLDER/NAME; process 0 prints a JSON line when one is through. The
first that fails ends the run, for the processes no longer stand at the same point.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import perdure.running  # noqa: F401  # registers what the others are called for
from fakes import save_tiny_model, two_toy_skills
from perdure import processes
from perdure.config import RunConfig
from perdure.curriculum import learn
from perdure.likelihood import length, score_pairs
from perdure.processes import GROUP
from perdure.reporting import Silent
from perdure.rollout.base import SamplingParams
from perdure.session import open_session
from perdure.skills.base import load_skill
from perdure.stages import create_workspace
from perdure.workspace import Workspace

TRAIN: dict[str, Any] = {
    "method": "sdft", "learning_rate": 3e-3, "steps": 10, "warm_start_steps": 10, "warm_start_until": 1.0,
    "batch_size": 8, "patience": 9, "checkpoint_every": 3, "validate_every": 4, "anchor_general_tokens": 4,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small batches": {"micro_batch_tokens": 64},
    "ema": {"teacher": "ema", "teacher_update_rate": 0.2},
    "original": {"teacher": "original"},
    "lora": {"lora_rank": 4, "lora_merge": False, "learning_rate": 3e-3},
    "offline": {"method": "offline"},
    "on policy": {"warm_start_steps": 0, "steps": 6, "sampling_temperature": 0.05},
}
DIE_AFTER = "PERDURE_TEST_DIE_AFTER"
"""Of the environment: the steps after which process 1 kills itself."""


def settings(model: Path, train: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"source": str(model), "compute_dtype": "float32"}, "probe": {"tasks": []}, "train": TRAIN | train,
         "gate": {"budget": 0.45, "significance": 0.1, "confidence": 0.1, "enforce": False, "repair": 0},
         "preflight": {"forecast": False}}
    )  # fmt: skip


def prepare(folder: Path) -> None:
    """The model and two skills that all cases use."""
    save_tiny_model(folder / "model", copies=True)
    two_toy_skills(folder)


def chain(folder: Path, name: str, case: str, shard: bool = False) -> None:
    """Two skills in a row in ``folder/name``."""
    config = settings(folder / "model", CASES[case] | {"fsdp": shard})
    place = folder / name
    workspace = Workspace.open(place) if (place / "perdure.toml").is_file() else create_workspace(place, config)
    with workspace.lock():
        learn(workspace, [folder / "colours", folder / "numbers"], config, Silent(), force=True)


def _die_after(steps: int) -> None:
    """This process kills itself after that many optimizer steps."""
    real, seen = torch.optim.AdamW.step, 0

    def step(self: Any, *args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)

    torch.optim.AdamW.step = step


def answers(folder: Path) -> dict[str, Any]:
    """What the engine says to the skill's prompts, and what is left after the session is gone."""
    session = open_session(settings(folder / "model", {}))
    skill = load_skill(folder / "numbers")
    prompts = [session.renderer.student_prompt(row) for row in skill.train]
    found = session.engine.generate(prompts, SamplingParams(6), list(range(len(prompts))))
    again = session.engine.generate(prompts[:1], SamplingParams(6), [0])
    assert again[0].token_ids == found[0].token_ids
    with torch.no_grad():
        session.loaded.model.lm_head.weight.mul_(-1)
    session.publish()
    turned = session.engine.generate(prompts, SamplingParams(6, 0), [0] * len(prompts))
    pairs = [(prompt.token_ids, (65 + n, 66)) for n, prompt in enumerate(prompts)]
    told: list[int] = []
    scored = score_pairs(session.working, pairs, batch_tokens=64, advance=told.append, key=session.key)
    assert sum(told) == sum(map(length, pairs))
    return {
        "scored": [[round(value, 3), same] for value, same in scored],
        "sampled": [c.token_ids for c in found],
        "turned": [c.token_ids for c in turned],
    }


def say(what: Any) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    folder, jobs = Path(sys.argv[1]), sys.argv[2:]
    processes.start()
    if not GROUP.lead:
        if steps := os.environ.get(DIE_AFTER):
            _die_after(int(steps))
        try:
            processes.follow()
        except processes.ProcessLost:
            sys.exit(3)
        return
    try:
        for job in jobs:
            name, case, kind = job.split(":")
            said = answers(folder) if case == "answers" else chain(folder, name, case, kind == "shard")
            say({"job": job, "said": said})
    except processes.ProcessLost as error:
        say({"lost": str(error)})
        sys.exit(3)
    processes.stop()


if __name__ == "__main__":
    main()
