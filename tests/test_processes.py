"""Several processes do what one does: the same answers, the same training to rounding, and no less after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.processes import GROUP, add_up, barrier, copy_from_lead, dealt, from_lead, gather, together
from perdure.verify import verify
from perdure.workspace import Workspace
from several import CASES, DIE_AFTER, answers, chain, prepare

HERE = Path(__file__).parent


def kinds(case: str) -> tuple[str, ...]:
    """How the case is run: divided (FSDP2) or not."""
    return {"ema": ("shard",), "plain": ("plain", "shard")}.get(case, ("plain",))


def job(case: str, kind: str = "plain") -> str:
    return f"{case.replace(' ', '-')}-{kind}:{case}:{kind}"


JOBS = [job("answers"), *(job(case, kind) for case in CASES for kind in kinds(case))]
"""What shares a launch."""


def torchrun(folder: Path, *jobs: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               str(HERE / "several.py"), str(folder), *jobs]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | environment
    timeout = 240 + 60 * len(jobs)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("several")
    prepare(place)
    return place


@pytest.fixture(scope="module")
def launched(folder: Path) -> dict[str, dict[str, Any]]:
    """What came of each of JOBS. A launch takes longer than most of them, so they share one. A job that ends it has
    failed, with all that the launch said; those behind it get another launch."""
    found: dict[str, dict[str, Any]] = {}
    left = JOBS
    while left:
        done = torchrun(folder, *left)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"job"')]
        assert [line["job"] for line in lines] == left[: len(lines)]
        found |= {line["job"]: line for line in lines}
        left = left[len(lines) :]
        if left:
            found[left[0]] = {"error": done.stdout + done.stderr}
        else:
            assert done.returncode == 0, done.stderr
        left = left[1:]
    return found


def said(launched: dict[str, dict[str, Any]], job: str) -> Any:
    assert "said" in launched[job], launched[job]["error"]
    return launched[job]["said"]


def alone(folder: Path, case: str) -> str:
    """The name of the case's chain by one process, this one."""
    name = f"{case}-1".replace(" ", "-")
    if not (folder / name).exists():
        chain(folder, name, case)
    return name


def losses(folder: Path, name: str) -> list[tuple[str, int, float, float, int, dict[str, float]]]:
    """(stage, step, loss, gradient norm, loss tokens, moved) of every step."""
    return [
        (path.parent.name, line["step"], line["loss"], line["grad_norm"], line["loss_tokens"], line.get("moved", {}))
        for path in sorted(folder.glob(f"{name}/runs/*/metrics.jsonl"))
        for line in map(json.loads, path.read_text().splitlines())
        if "loss" in line
    ]


def assert_same(folder: Path, one: str, other: str) -> None:
    """The same curve to rounding, the same tokens counted, the same answers of the versions."""
    first, second = losses(folder, one), losses(folder, other)
    assert len(first) == len(second) > 10
    for (stage, step, *values, moved), (stage2, step2, *values2, moved2) in zip(first, second, strict=True):
        assert (stage, step) == (stage2, step2)
        assert values == pytest.approx(values2, rel=2e-2)  # late steps: rounding grows at these rates
        if step < 5 and stage.startswith("s01"):
            assert values == pytest.approx(values2, rel=1e-4)
        assert moved == pytest.approx(moved2, rel=2e-2, abs=2e-4)
    mine, theirs = (Workspace.open(folder / name) for name in (one, other))
    for version in ("v001", "v002"):
        found = [workspace.version(version) for workspace in (mine, theirs)]
        assert found[0]["scores"] == found[1]["scores"]
        for part in ("rollout", "student", "evaluate"):  # a teacher's scores are kept by each process for itself
            assert found[0]["cost"]["tokens"][part] == found[1]["cost"]["tokens"][part]


# One process alone


def test_alone_everything_is_the_thing_itself() -> None:
    tensor = torch.ones(2)
    with together("nothing", 1):
        assert gather(3) == [3] and from_lead(4) == 4
        add_up([tensor]), copy_from_lead([tensor]), barrier()
    assert tensor.tolist() == [1, 1] and not GROUP.shares
    assert dealt([5, 1, 3]) == [[0, 1, 2]]


def test_rows_are_dealt_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GROUP, "count", 3)
    sizes = [9, 1, 8, 2, 7, 3, 6]
    parts = dealt(sizes)
    assert sorted(place for part in parts for place in part) == list(range(7))
    assert [sum(sizes[place] for place in part) for part in parts] == [9 + 2 + 1, 8 + 3, 7 + 6]
    assert dealt([]) == [[], [], []] and dealt([4]) == [[0], [], []]


# Two processes


@pytest.mark.slow
def test_answers_are_those_of_one_process(folder: Path, launched: dict[str, dict[str, Any]]) -> None:
    mine = json.loads(json.dumps(answers(folder)))
    assert said(launched, job("answers")) == mine and mine["sampled"] != mine["turned"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(folder: Path, launched: dict[str, dict[str, Any]], case: str) -> None:
    """Divided (FSDP2) or not, in every way that the loop differs."""
    one = alone(folder, case)
    for kind in kinds(case):
        said(launched, job(case, kind))
        name = job(case, kind).split(":")[0]
        assert_same(folder, one, name)
        assert not verify(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "shard"])
def test_a_killed_process_ends_the_run_clearly_and_any_number_goes_on(folder: Path, kind: str) -> None:
    """Process 1 dies after 14 of 20 steps: in the second stage, behind its first checkpoint."""
    whole, name = alone(folder, "plain"), f"killed-{kind}"
    done = torchrun(folder, f"{name}:plain:{kind}", **{DIE_AFTER: "14"})
    assert done.returncode != 0
    assert '{"lost": "another process of this run is gone' in done.stdout or "SIGTERM" in done.stderr
    stage = folder / name / "runs" / "s02-numbers"
    assert [path.name for path in stage.glob("checkpoint-*")] == ["checkpoint-000003"]
    assert (stage / "checkpoint-000003" / "state.safetensors").is_file() is (kind == "plain")
    if kind == "shard":
        chain(folder, name, "plain", shard=True)  # one process alone
    else:
        done = torchrun(folder, f"{name}:plain:{kind}")
        assert done.returncode == 0, done.stderr
    assert_same(folder, whole, name)
    assert not verify(folder / name)
