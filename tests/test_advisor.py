"""The method advisor: what it recommends for what the preflight measured; and that the original model is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fakes import NUMBERS, copying_model, loaded, save_tiny_model, toy_skill
from perdure.advisor import ABLE, recommend
from perdure.config import RunConfig, TrainConfig
from perdure.curriculum import check_skills, learn
from perdure.files import read_json, read_jsonl
from perdure.models import save
from perdure.preflight import Preflight
from perdure.reporting import Silent
from perdure.settings import parse
from perdure.stages import create_workspace
from perdure.types import Example

FOUND = Preflight(
    skill="s", n=16, student_accuracy=0.0, teacher_accuracy=1.0, gap=1.0, template="turns:2", kl_teacher_student=1.0,
    demonstration_probability=0.1, style_distance=2.0, identity_kl=0.0, leak_share=0.0, window={}, templates=(),
    row_seconds={}, ready=True, advice=(),
)  # fmt: skip

HELD = TrainConfig(anchor_rehearsal=0.0)


@pytest.mark.parametrize(
    ("teacher", "ready", "taught", "other", "method", "settings"),
    [
        (1.0, True, 3, None, "sdft", {}),
        (ABLE, True, 1, None, "sdft", {}),
        (1.0, True, 0, None, "sft", {}),
        (0.5, True, 3, None, "sft", {}),
        (0.5, True, 3, 0.95, "sdft", {"train.teacher": "frozen"}),
        (0.5, True, 3, 0.6, "sft", {}),
        (1.0, False, 3, None, "sft", {}),  # the student knows it already, or the grader sees no difference
    ],
)
def test_the_rule(teacher: float, ready: bool, taught: int, other: float | None, method: str,
                  settings: dict[str, str]) -> None:  # fmt: skip
    """Without the earlier skills' demonstrations; with them a teacher adds nothing."""
    measured = replace(FOUND, teacher_accuracy=teacher, ready=ready)
    found = recommend(measured, taught, HELD, other)
    assert (found.method, found.settings) == (method, settings) and found.reasons
    assert recommend(measured, taught, TrainConfig(), other).method == "sft"


def test_the_other_teacher_is_the_one_that_would_not_teach() -> None:
    lost = replace(FOUND, teacher_accuracy=0.5)
    for teacher in ("frozen", "ema"):
        config = HELD.model_copy(update={"teacher": teacher})
        assert recommend(lost, 3, config, 0.95).settings == {"train.teacher": "original"}
    assert "the champion on 95%" in recommend(lost, 3, HELD, 0.95).reasons[0]


def test_of_a_teacher_that_errs_it_says_what_may_help_unless_that_is_done() -> None:
    errs, alone = replace(FOUND, teacher_accuracy=0.9), TrainConfig(anchor_rehearsal=0.0, demonstration_weight=0)
    said = [" ".join(recommend(found, 3, train).reasons) for found, train in
            ((errs, alone), (errs, HELD), (FOUND, alone))]  # fmt: skip
    assert ["Where the teacher errs" in text for text in said] == [True, False, False]


def test_answers_without_thinking_are_no_labels_for_a_model_that_thinks() -> None:
    assert recommend(FOUND, 0, TrainConfig(), supervised=False).method == "sdft"
    assert recommend(replace(FOUND, teacher_accuracy=0.5), 3, TrainConfig(), supervised=False).method == "sdft"


def test_missing_anchors_change_the_rule() -> None:
    assert recommend(FOUND, 0, TrainConfig(anchor_share=0.0)).method == "sdft"
    assert recommend(FOUND, 3, TrainConfig(anchor_share=0.0, steps=5)).method == "sdft"
    unable = recommend(replace(FOUND, teacher_accuracy=0.7), 3, TrainConfig(anchor_share=0.0))
    assert unable.method == "sft" and "nothing holds the rest" in unable.reasons[0]


def test_the_original_model_is_asked_where_the_champion_cannot_teach(tmp_path: Path) -> None:
    """The base model copies from its context; a champion whose heads are overwritten does not."""
    model = save_tiny_model(tmp_path / "model", copies=True)
    run = {"model": {"source": str(model), "compute_dtype": "float32"}, "context": {"template": "turns:2"},
           "preflight": {"rows": 8, "forecast": False}, "probe": {"tasks": []}, "gate": {"enforce": False},
           "train": {"method": "sft", "steps": 1, "learning_rate": 1e-9, "anchor_share": 0.0}}  # fmt: skip
    config = parse(RunConfig, run, "test")
    workspace = create_workspace(tmp_path / "bot", config)
    learn(workspace, [toy_skill(tmp_path / "colours")], config, Silent(), force=True)
    skill = toy_skill(tmp_path / "numbers", NUMBERS)
    config = parse(RunConfig, run | {"train": {"method": "sdft", "teacher": "frozen", "anchor_rehearsal": 0.0}}, "test")
    (able,) = check_skills(workspace, [skill], config, Silent())
    assert able["teacher_accuracy"] >= ABLE and able["recommended"]["method"] == "sdft"
    assert able["recommended"]["settings"] == {}
    broken = copying_model()
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight.zero_()
    save(loaded(broken), workspace.version_folder("champion"))
    (lost,) = check_skills(workspace, [skill], config, Silent())
    assert lost["teacher_accuracy"] < ABLE
    assert lost["recommended"]["settings"] == {"train.teacher": "original"}
    config = config.model_copy(update={"train": config.train.model_copy(update={"teacher": "original"})})
    (found,) = check_skills(workspace, [skill], config, Silent())
    assert found["teacher_accuracy"] == able["teacher_accuracy"]  # the preflight measures who will teach
    assert found["student_accuracy"] == lost["student_accuracy"] and found["recommended"]["method"] == "sdft"


def test_auto_trains_as_the_preflight_recommends(tmp_path: Path) -> None:
    """The first skill by SFT, as there is nothing to keep; the second, whose anchors are not rehearsed, by SDFT."""
    model = save_tiny_model(tmp_path / "model", copies=True)
    run = {"model": {"source": str(model), "compute_dtype": "float32"}, "context": {"template": "turns:2"},
           "preflight": {"rows": 8}, "probe": {"tasks": []}, "gate": {"enforce": False},
           "train": {"method": "auto", "steps": 2, "batch_size": 4, "warm_start_steps": 1, "anchor_general_tokens": 4,
                     "anchor_rehearsal": 0.0, "on_policy_share": 0.5}}  # fmt: skip
    config = parse(RunConfig, run, "test")
    workspace = create_workspace(tmp_path / "bot", config)
    folders = [toy_skill(tmp_path / "colours"), toy_skill(tmp_path / "numbers", NUMBERS)]
    (checked,) = check_skills(workspace, folders[:1], config, Silent())
    assert checked["recommended"]["method"] == checked["cost"]["method"] == "sft" and checked["ready"]
    learn(workspace, folders, config, Silent())
    methods = {name: workspace.version(name)["method"] for name in workspace.versions()[1:]}
    assert methods == {"v001": "sft", "v002": "sdft"}
    for name, stage in (("v001", "s01-colours"), ("v002", "s02-numbers")):
        told = read_json(workspace.run_folder(stage) / "stage.json")
        assert told["method"] == methods[name]
        info = workspace.version(name)
        assert told["config"]["train"]["method"] == info["asked"]["train"]["method"] == "auto"
        assert info["config"]["train"]["method"] == methods[name]
    lines = read_jsonl(workspace.run_folder("s01-colours") / "metrics.jsonl")
    assert {line["phase"] for line in lines if "phase" in line} == {"sft"}
    again = learn(workspace, folders, config, Silent())  # found again by the settings of the command
    assert [outcome.version for outcome in again] == ["v001", "v002"] and len(workspace.versions()) == 3


def anything(completion: str, example: Example) -> float:
    """A grader by which whoever answers knows the skill already."""
    return 1.0


@pytest.mark.parametrize(("broken", "decision"), [(True, "promoted"), (False, "refused")])
def test_auto_needs_no_teacher_but_something_to_learn(broken: bool, decision: str, tmp_path: Path) -> None:
    """Who cannot learn from its context has no teacher: then the demonstrations are the labels. Where the teacher is
    able and the gap too narrow, the skill is known, and nothing is trained."""
    tiny = copying_model()
    with torch.no_grad():
        if broken:
            tiny.model.layers[1].self_attn.q_proj.weight.zero_()
    save(loaded(tiny), tmp_path / "model")
    run = {"model": {"source": str(tmp_path / "model"), "compute_dtype": "float32"}, "context": {"template": "turns:2"},
           "preflight": {"rows": 8, "forecast": False}, "probe": {"tasks": []}, "gate": {"enforce": False},
           "train": {"method": "auto", "steps": 1, "anchor_share": 0.0}}  # fmt: skip
    workspace = create_workspace(tmp_path / "bot", parse(RunConfig, run, "test"))
    skill = toy_skill(tmp_path / "numbers", NUMBERS, "exact" if broken else "python:test_advisor:anything")
    (outcome,) = learn(workspace, [skill], workspace.config(), Silent())
    assert outcome.decision == decision
    assert (outcome.version is None) == (decision == "refused")
