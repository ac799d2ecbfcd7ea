"""Two toy skills on a tiny model through the command line: the whole path, and the same bytes for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fakes import save_tiny_model, toy_skill, two_toy_skills
from perdure.cli import app
from perdure.report.numbers import summary
from test_cli import perdure

TRAIN = ("--set", "train.learning_rate=3e-3", "--set", "train.steps=40", "--set", "train.warm_start_steps=20",
         "--set", "train.anchor_general_tokens=4")  # fmt: skip


def init(folder: Path) -> tuple[str | Path, ...]:
    model = save_tiny_model(folder / "model", copies=True)
    return ("init", folder / "bot", "--model", model, "--set", "probe.tasks=[]",
            "--set", "model.compute_dtype=float32")  # fmt: skip


def run(folder: Path, *settings: str) -> Path:
    skills = two_toy_skills(folder)
    bot = folder / "bot"
    done = perdure(*init(folder))
    assert done.returncode == 0, done.stderr
    done = perdure("learn", *skills, "-w", bot, "--force", *TRAIN, *settings)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    return bot


def run_here(folder: Path, *settings: str) -> Path:
    """The first skill by the same commands, in this process."""
    bot, skill = folder / "bot", toy_skill(folder / "colours")
    for words in (init(folder), ("learn", skill, "-w", bot, "--force", *TRAIN, *settings)):
        assert app([*map(str, words)], standalone_mode=False) in (None, 0, 1)
    return bot


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("first"))


def test_the_first_skill_is_learned_and_every_skill_is_measured_at_every_point(bot: Path):
    numbers = json.loads(perdure("report", bot, "--json").stdout)
    matrix = numbers["accuracy_matrix"]
    assert numbers["skills"] == ["colours", "numbers"]
    assert len(matrix) == 3
    assert all(cell is not None for row in matrix for cell in row)
    assert matrix[0][0] == 0
    assert matrix[1][0] >= 0.75
    assert numbers["accuracy_when_learned"][0] == matrix[1][0]
    assert numbers["final_accuracy"] == matrix[2]
    assert set(numbers["seconds"]) >= {"preflight", "train", "evaluate"}


def test_the_same_seed_gives_the_same_metrics_and_weights(bot: Path, tmp_path: Path):
    again = run(tmp_path)
    for stage in ("s01-colours", "s02-numbers"):
        for name in ("metrics.jsonl", "samples.jsonl"):
            ours, theirs = (place / "runs" / stage / name for place in (bot, again))
            assert ours.read_bytes() == theirs.read_bytes()
    for version in ("v001", "v002"):
        ours, theirs = (
            json.loads((place / "versions" / version / "version.json").read_text()) for place in (bot, again)
        )
        assert ours["hashes"]["weights"] == theirs["hashes"]["weights"]


def test_another_seed_gives_another_run(tmp_path: Path):
    """Two steps of it: one on demonstrations, one on the student's own answers."""
    few = ("--set", "train.steps=2", "--set", "train.warm_start_steps=1")
    runs = [run_here(tmp_path / name, *few, "--set", f"seed={seed}") for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, again, other = ((bot / "runs/s01-colours/metrics.jsonl").read_bytes() for bot in runs)
    assert first == again != other


def test_the_ledger_the_report_and_the_training_state_are_as_promised(bot: Path):
    events = [event["event"] for event in json.loads(perdure("log", bot, "--json").stdout)]
    assert events[:4] == ["init", "candidate", "verdict", "promote"]
    assert not list(bot.glob("runs/*/checkpoint-*"))
    assert not list(bot.glob("runs/*/*.safetensors"))
    html = (bot / "report.html").read_text(encoding="utf-8")
    assert "colours" in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_learning_the_same_again_does_nothing(bot: Path, tmp_path: Path):
    before = (bot / "ledger.jsonl").read_bytes()
    skill = next((bot / "skills").glob("colours@*"))
    done = perdure("learn", skill, "-w", bot, *TRAIN)
    assert done.returncode == 0
    assert "promoted already as v001" in done.stderr
    assert (bot / "ledger.jsonl").read_bytes() == before


def test_rollback_and_promote_move_the_champion_only(bot: Path):
    weights = (bot / "versions/v001/model.safetensors").read_bytes()
    state = json.loads(perdure("status", bot, "--json").stdout)
    assert perdure("rollback", "-w", bot, "--to", "v000").returncode == 0
    assert json.loads(perdure("status", bot, "--json").stdout)["champion"] == "v000"
    assert perdure("promote", state["champion"], "-w", bot, "--reason", "test").returncode == 0
    assert json.loads(perdure("status", bot, "--json").stdout)["champion"] == state["champion"]
    assert (bot / "versions/v001/model.safetensors").read_bytes() == weights


def test_sft_is_the_same_loop(tmp_path: Path):
    bot = run_here(tmp_path, "--set", "train.method=sft", "--set", "gate.enforce=false")
    assert summary(bot)["accuracy_matrix"][1][0] >= 0.75
    lines = [json.loads(line) for line in (bot / "runs/s01-colours/metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines if "phase" in line} == {"sft"}
    assert not (bot / "runs/s01-colours/preflight.json").exists()
