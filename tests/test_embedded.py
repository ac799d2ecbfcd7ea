"""The real embedded model, end to end, for a few steps. Slow: some two minutes on two cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perdure.config import RunConfig
from perdure.curriculum import learn
from perdure.importers import IMPORTERS
from perdure.report.numbers import summary
from perdure.reporting import Silent
from perdure.session import open_session
from perdure.settings import parse
from perdure.skills.base import load_skill
from perdure.stages import create_workspace
from perdure.templates import parse_template

pytestmark = pytest.mark.slow

SETTINGS = {
    "context": {"template": "turns:2"},
    "train": {"steps": 4, "batch_size": 8, "learning_rate": 1e-4, "warm_start_steps": 3, "warmup_steps": 1,
              "validation_max": 8, "validate_every": 4, "anchor_general_tokens": 4},
    "preflight": {"rows": 12, "forecast": False},
    "eval": {"rows": 12},
    "probe": {"tasks": ["piqa"], "rows": 6},
}  # fmt: skip


def test_the_embedded_model_learns_from_a_real_skill(tmp_path: Path):
    config = parse(RunConfig, SETTINGS, where="test")
    workspace = create_workspace(tmp_path / "bot", config)
    skill = IMPORTERS["sst2"](tmp_path / "sentiment", 0)
    (outcome,) = learn(workspace, [skill], config, Silent())
    numbers = summary(workspace.folder)
    assert numbers["accuracy_matrix"][0] == [0.0]
    assert numbers["teacher_accuracy"][0] >= 0.8
    assert numbers["prior_average"]["base"] is not None

    metrics = workspace.run_folder(outcome.stage) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    warm = [line["demonstration_probability"] for line in lines if line.get("phase") == "warm_start"]
    assert warm[-1] > warm[0] + 0.3
    assert {line["phase"] for line in lines if "phase" in line} == {"warm_start", "on_policy"}

    taught = open_session(config, workspace.version_folder("v001"))
    rollout = taught.renderer.rollout(
        load_skill(skill).train[0], taught.renderer.demonstration(load_skill(skill).train[0]), parse_template("turns:2")
    )
    assert taught.renderer.text(rollout.completion).startswith('{"sentiment"')
    check = json.loads((workspace.run_folder(outcome.stage) / "preflight.json").read_text())
    assert check["identity_kl"] < 0.02
