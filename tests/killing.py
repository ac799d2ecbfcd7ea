"""Kills whole stages at random moments until they are through, and compares what is left with an unkilled run.

    python tests/killing.py FOLDER KILLS SEED whole|stack        prints one JSON object

Versions have whole weights, or keep adapters on those before them.
A process of its own, which imports everything, computes nothing and forks each victim. A victim dies just before its
n-th change of the file system, or by SIGKILL after a random time, or finds the disk full from its n-th file on; the
same work is then begun again in the same workspace, as a user would repeat the command.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fakes import save_tiny_model, two_toy_skills
from perdure.config import RunConfig
from perdure.curriculum import learn
from perdure.files import read_jsonl
from perdure.forgetting import forget
from perdure.reporting import Silent
from perdure.stages import create_workspace
from perdure.types import InputError
from perdure.verify import verify
from perdure.workspace import Workspace

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}
MODES = ("change", "time", "full disk")
KILLED, FULL = 9, 7
ALLOWED = ("its stage was interrupted", "the next command that opens the workspace mends it")
"""What ``verify`` may say of an interrupted workspace."""


STACK = {"lora_rank": 4, "lora_merge": False, "learning_rate": 3e-2}


def settings(model: Path, changed: dict[str, Any]) -> RunConfig:
    train = {"method": "sft", "learning_rate": 3e-3, "steps": 24, "warm_start_steps": 12, "anchor_share": 0.0,
             "checkpoint_every": 5, "validate_every": 6}  # fmt: skip
    return RunConfig.model_validate(
        {"model": {"source": str(model), "compute_dtype": "float32"}, "probe": {"tasks": []}, "train": train | changed,
         "gate": {"budget": 0.45, "repair": 4, "significance": 0.1, "confidence": 0.1}}
    )  # fmt: skip


def work(folder: Path, skills: list[Path]) -> None:
    """Two stages (training, evaluation, gate, repair, promotion), a rollback, a promotion, and a skill taken out."""
    torch.set_num_threads(1)
    workspace = Workspace.open(folder)
    config = workspace.config()

    def done(event: str) -> bool:
        return any(line["event"] == event for line in workspace.ledger())

    with workspace.lock():
        if not done("rollback"):
            learn(workspace, skills, config, Silent())
            workspace.rollback("v000")
        if not done("forget"):
            workspace.promote("v002", "by hand")
        if "colours" in workspace.taught():
            forget(workspace, "colours", config, Silent())


def victim(action: Callable[[], None], mode: str, point: int) -> int:
    """Fork a process that runs ``action``; with mode "time" the caller kills it. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    calls = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal calls
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES):
            return
        calls += 1
        if mode == "change" and calls > point:
            os._exit(KILLED)
        if mode == "full disk" and calls > point and (writes or event == "os.mkdir"):
            raise OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(audit)
    try:
        action()
    except BaseException as error:
        # An InputError that came of it says what counts although a file could not be written.
        reason = error.__cause__ if isinstance(error, InputError) else error
        if isinstance(reason, OSError) and reason.errno == errno.ENOSPC:
            os._exit(FULL)
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)
    os._exit(0)


def finish(pid: int, mode: str, delay: float) -> int:
    """The victim's exit code, killed after ``delay`` seconds where that is its mode."""
    if mode == "time":
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return KILLED if code == -signal.SIGKILL else code


def state(workspace: Workspace) -> dict[str, Any]:
    """Everything that must not depend on where the kills fell: no times, no seconds."""
    versions = {}
    for name in workspace.versions():
        info = workspace.version(name)
        hashes = {key: value for key, value in info["hashes"].items() if key != "code"}  # somebody may edit meanwhile
        versions[name] = [hashes, *(info[key] for key in ("parent", "stage", "skill", "scores", "verdict"))]
        versions[name].append(info["cost"].get("tokens"))
    runs = {
        str(path.relative_to(workspace.folder)): path.read_text()
        for path in sorted(workspace.folder.glob("runs/**/*.jsonl"))
        if path.name in ("metrics.jsonl", "samples.jsonl") or path.parent.name == "baseline"
    }
    ledger = [{k: v for k, v in line.items() if k not in ("time", "began", "previous_line", "version_sha256")}
              for line in read_jsonl(workspace.folder / "ledger.jsonl")]  # fmt: skip
    return {"versions": versions, "aliases": workspace.aliases(), "runs": runs, "ledger": ledger,
            "left": [str(p) for p in workspace.folder.glob("runs/**/*.safetensors")]}  # fmt: skip


def check_whole(folder: Path) -> None:
    """What is visible after a kill is complete."""
    problems = [p for p in verify(folder) if not any(words in p for words in ALLOWED)]
    assert not problems, problems
    workspace = Workspace.open(folder)
    assert workspace.aliases()["champion"] in workspace.versions()


def main(folder: Path, kills: int, seed: int, kind: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    skills = two_toy_skills(folder)
    rng, changed = random.Random(seed), STACK if kind == "stack" else {}

    def prepare() -> None:
        torch.set_num_threads(1)
        create_workspace(folder / "start", settings(save_tiny_model(folder / "model", copies=True), changed))

    assert finish(victim(prepare, "none", 0), "none", 0) == 0
    reference = shutil.copytree(folder / "start", folder / "reference")
    begun = time.monotonic()
    assert finish(victim(lambda: work(reference, skills), "none", 0), "none", 0) == 0
    whole = time.monotonic() - begun
    wanted, counts, rounds = state(Workspace(reference)), dict.fromkeys(MODES, 0), 0
    while sum(counts.values()) < kills:
        bot = shutil.copytree(folder / "start", folder / "bot")
        while True:
            mode = rng.choice(MODES) if sum(counts.values()) < kills else "none"
            pid = victim(lambda: work(bot, skills), mode, rng.randrange(250))  # noqa: B023
            code = finish(pid, mode, rng.uniform(0, whole))
            assert code in (0, KILLED, FULL), f"{mode}: exit code {code}"
            check_whole(bot)
            if code == 0:
                break
            counts[mode] += 1
        found = state(Workspace.open(bot))
        for key, value in wanted.items():
            assert found[key] == value, f"{key} differs after {counts}: {_first_difference(found[key], value)}"
        shutil.rmtree(bot)
        rounds += 1
    return {"kills": counts, "finished runs": rounds}


def _first_difference(found: Any, wanted: Any) -> str:
    parts = (
        [(found.get(k), wanted.get(k)) for k in wanted]
        if isinstance(wanted, dict)
        else zip(found, wanted, strict=False)
    )
    return str(next((pair for pair in parts if pair[0] != pair[1]), (len(found), len(wanted))))[:3000]


if __name__ == "__main__":
    try:
        print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
    except (AssertionError, InputError):
        traceback.print_exc()
        sys.exit(1)
