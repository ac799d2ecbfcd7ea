"""The forecast of a stage's cost, on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fakes import NUMBERS, save_tiny_model, toy_skill
from perdure.anchors import general_prompts
from perdure.config import CostConfig, RunConfig
from perdure.forecast import expected_tokens, forecast, priced
from perdure.preflight import preflight
from perdure.running import open_version, subject_of
from perdure.skills.base import Skill, load_skill
from perdure.stages import create_workspace


@pytest.fixture
def skill(tmp_path: Path) -> Skill:
    return load_skill(toy_skill(tmp_path / "colours"))


def config_of(folder: Path, **train: object) -> RunConfig:
    model = {"source": str(save_tiny_model(folder / "model", copies=True)), "compute_dtype": "float32"}
    settings = {"batch_size": 8, "steps": 10, "warm_start_steps": 4, "anchor_general_tokens": 4, "anchor_share": 0.25}
    settings |= train
    return RunConfig.model_validate(
        {"model": model, "probe": {"tasks": []}, "preflight": {"rows": 8}, "train": settings}
    )


@pytest.mark.parametrize("train", [{}, {"anchor_share": 0.0}, {"teacher": "ema"}])
def test_the_student_comes_back_bit_by_bit(tmp_path: Path, skill: Skill, train: dict):
    config = config_of(tmp_path, **train)
    workspace = create_workspace(tmp_path / "bot", config)
    session = open_version(workspace, "v000", config)
    before = [p.detach().clone() for p in (*session.loaded.model.parameters(), *session.working.parameters())]
    found = preflight(subject_of(session, skill, config), config.context, config.preflight, config.train, 0)
    other = load_skill(toy_skill(tmp_path / "numbers", NUMBERS))
    cost = forecast(workspace, "v000", session, skill, {"colours": skill, "numbers": other}, config, found)
    after = (*session.loaded.model.parameters(), *session.working.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in session.loaded.model.parameters())
    assert set(cost["seconds"]) == {"train", "evaluate"} and cost["priced"] == {}


@pytest.mark.parametrize("steps", ["some", "all"])
def test_rows_without_a_loss_token_can_be_timed(tmp_path: Path, skill: Skill, steps: str):
    """Answers without thinking, where the loss is on the thinking that the student will write; and a first batch of
    which every fourth row is too short."""
    train = {"some": {"skip_first_tokens": 2}, "all": {"warm_start_steps": 0, "anchor_share": 0.0}}[steps]
    thinking = {"some": {}, "all": {"thinking": {"enabled": True, "loss": "thinking"}}}[steps]
    config = config_of(tmp_path, **train)
    config = RunConfig.model_validate(config.model_dump() | thinking)
    session = open_version(workspace := create_workspace(tmp_path / "bot", config), "v000", config)
    if steps == "some":
        longer = replace(skill.train[0], demonstration={"role": "assistant", "content": "red red"})
        skill = replace(skill, train=(longer, *skill.train[1:]))
    found = preflight(subject_of(session, skill, config), config.context, config.preflight, config.train, 0)
    assert forecast(workspace, "v000", session, skill, {"colours": skill}, config, found)["seconds"]["train"] > 0


class Ticks:
    """A clock that is a second later whenever it is read."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


def test_more_work_is_predicted_to_take_longer(tmp_path: Path, skill: Skill, monkeypatch: pytest.MonkeyPatch):
    """Whatever is timed takes a second here, two general anchors or two steps; an answer takes two."""
    monkeypatch.setattr("perdure.forecast.time", Ticks())
    config = config_of(tmp_path)
    workspace = create_workspace(tmp_path / "bot", config)
    session = open_version(workspace, "v000", config)
    found = preflight(subject_of(session, skill, config), config.context, config.preflight, config.train, 0)
    found = replace(found, row_seconds={"student": 1.0, "teacher": 2.0})
    # Two of 20 rows validate, every 20 steps and at the end.
    for steps, validations in ((10, 1), (300, 15)):
        longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
        taken = forecast(workspace, "v000", session, skill, {"colours": skill}, longer, found)["seconds"]
        answers = (steps - 4) * 7 + 2 * validations  # after four of warm start, 7 rows of 8 are taught
        # One row of 8 is a general prompt; the drift is measured on 16 of them.
        general = min(len(general_prompts()), max(16, steps))
        assert taken["train"] == general / 2 + steps / 2 + 2 * answers


def test_expected_tokens(tmp_path: Path, skill: Skill):
    config = config_of(tmp_path)
    session = open_version(create_workspace(tmp_path / "bot", config), "v000", config)
    found = preflight(subject_of(session, skill, config), config.context, config.preflight, config.train, 0)
    rows, text = skill.train[: found.n], session.renderer
    completion = sum(len(text.demonstration(e).token_ids) for e in rows) / len(rows)
    prompt = sum(len(text.student_prompt(e).token_ids) for e in rows) / len(rows)
    teacher = next(score.tokens for score in found.templates if score.template == found.template)
    for earlier, taught, rows_of_step in ((0, 7, 8), (1, 6, 8), (2, 6, 8), (9, 6, 12)):
        # 2 of 8 rows are anchors, one of them of earlier skills; nine skills at half a row each need five.
        assert expected_tokens(session, skill, config.train, found, earlier) == {
            "student": round(10 * rows_of_step * (prompt + completion)),
            "teacher": round(10 * taught * (teacher + completion)),
            "rollout": round(6 * taught * completion),  # 10 - 4 steps are on-policy
        }
        labels = config.train.model_copy(update={"method": "sft"})
        found_for_labels = expected_tokens(session, skill, labels, found, earlier)
        assert (found_for_labels["teacher"], found_for_labels["rollout"]) == (0, 0)


def test_prices():
    assert priced(CostConfig(), 3600) == {}
    assert priced(CostConfig(watts=50, price_per_hour=2, currency="USD"), 1800) == {
        "watts": 50, "energy_kwh": 0.025, "price_per_hour": 2, "money": 1.0, "currency": "USD"}  # fmt: skip
