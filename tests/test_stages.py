"""Which stage a skill is in, and how a stage that was killed at its end is brought to the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.config import RunConfig
from perdure.erasing import erase
from perdure.judging import judge_again
from perdure.reporting import Silent
from perdure.skills.base import Skill
from perdure.stages import begin, finished, load_all, settings_hash, settle, settle_all
from perdure.types import InputError
from perdure.workspace import Workspace
from toy_versions import CONFIG, info, write_skill, write_weights


def verdict(decision: str) -> dict[str, Any]:
    return {"decision": decision, "reasons": [f"it was {decision}"], "table": []}


def add(workspace: Workspace, skill: Skill, decision: str, config: RunConfig = CONFIG) -> str:
    name, parent = workspace.next_version(), workspace.resolve("champion")
    hashes = {"base": "b", "skill": skill.content_hash, "config": settings_hash(config)}
    entry = info(
        name, parent, skill.name, verdict=verdict(decision), hashes=hashes, config=config.model_dump(mode="json")
    )
    workspace.add_version(entry, write_weights)
    return name


def events(workspace: Workspace) -> list[str]:
    return [event["event"] for event in workspace.ledger()]


def test_a_version_that_was_killed_before_its_promotion_is_promoted_once(workspace: Workspace, skill: Skill):
    name = add(workspace, skill, "promoted")
    assert workspace.resolve("champion") == "v000"
    assert settle(workspace, name).decision == "promoted"
    assert workspace.resolve("champion") == name
    assert events(workspace) == ["init", "candidate", "verdict", "promote"]
    assert settle(workspace, name).decision == "promoted"
    assert events(workspace) == ["init", "candidate", "verdict", "promote"]


def test_a_refused_version_never_becomes_the_champion(workspace: Workspace, skill: Skill):
    assert settle(workspace, add(workspace, skill, "refused")).decision == "refused"
    assert workspace.resolve("champion") == "v000"
    assert events(workspace)[-1] == "refuse"


def test_without_enforcement_a_refused_version_is_promoted_and_the_ledger_says_why(workspace: Workspace, skill: Skill):
    free = RunConfig.model_validate({"gate": {"enforce": False}})
    assert settle(workspace, add(workspace, skill, "refused", free)).decision == "promoted"
    assert workspace.ledger()[-1]["reason"] == "refused, but gate.enforce is off"


def test_a_rolled_back_version_is_not_promoted_again(workspace: Workspace, skill: Skill):
    name = add(workspace, skill, "promoted")
    settle(workspace, name)
    workspace.rollback()
    settle(workspace, name)
    assert workspace.resolve("champion") == "v000"
    found = finished(workspace, skill, CONFIG)
    assert found is not None
    assert found.decision == "refused"
    assert "rolled back" in found.reasons[0]


def test_what_a_person_rolled_back_no_gate_brings_back(workspace: Workspace, skill: Skill):
    settle(workspace, add(workspace, skill, "promoted"))
    workspace.rollback()
    other = CONFIG.model_copy(update={"gate": CONFIG.gate.model_copy(update={"prior_budget": 0.2})})
    found = judge_again(workspace, skill, other, Silent())
    assert found and found.decision == "refused" and "rolled back" in found.reasons[0]
    assert workspace.resolve("champion") == "v000"


def test_a_mended_grader_makes_another_stage(workspace: Workspace, skill: Skill):
    """The grader's module lies outside the skill's folder, whose content is the same."""
    settle(workspace, add(workspace, skill, "refused"))
    assert finished(workspace, skill, CONFIG)
    assert finished(workspace, replace(skill, code_hash="mended"), CONFIG) is None


def test_a_version_whose_weights_were_erased_is_settled(workspace: Workspace, skill: Skill):
    """It was killed before the ledger's last word on it."""
    name = add(workspace, skill, "promoted")
    erase(workspace, skill.name)
    settle_all(workspace)
    assert workspace.resolve("champion") == "v000" and name in workspace.erased_versions()


def test_a_stage_goes_on_with_settings_that_decide_nothing_of_what_comes_out(workspace: Workspace, skill: Skill):
    def config(**changes: object) -> RunConfig:
        whole = CONFIG.model_dump(mode="json")
        for key, value in changes.items():
            section, _, name = key.partition("__")
            whole[section][name] = value
        return RunConfig.model_validate(whole)

    stage, resumed = begin(workspace, skill, CONFIG, False, "v000")
    assert not resumed
    (workspace.run_folder(stage) / "preflight.json").write_text("{}")
    smaller = config(train__micro_batch_tokens=512, eval__batch_tokens=512, cost__watts=80.0)
    assert begin(workspace, skill, smaller, False, "v000") == (stage, True)
    assert settings_hash(smaller) == settings_hash(CONFIG) != settings_hash(config(train__steps=3))
    with pytest.raises(InputError, match=r"train.steps = \d+"):
        begin(workspace, skill, config(train__steps=3), False, "v000")


def test_a_setting_that_was_not_there_yet_counts_as_its_default(workspace: Workspace, skill: Skill):
    """A version of an older package is finished under the same settings, though its file has fewer of them."""
    name = add(workspace, skill, "refused")
    settle(workspace, name)
    file = workspace.folder / "versions" / name / "version.json"
    written = json.loads(file.read_text())
    del written["config"]["train"]["overlap"]
    written["hashes"]["config"] = "of another set of settings"
    file.write_text(json.dumps(written))
    found = finished(workspace, skill, CONFIG)
    assert found is not None and (found.version, found.decision) == (name, "refused")


def test_what_is_finished_and_what_is_not(workspace: Workspace, skill: Skill):
    assert finished(workspace, skill, CONFIG) is None
    settle(workspace, add(workspace, skill, "refused"))
    again = finished(workspace, skill, CONFIG)
    assert again is not None
    assert again.decision == "refused"
    other = RunConfig.model_validate({"train": {"steps": 7}})
    assert finished(workspace, skill, other) is None, "other settings are worth another try"
    settle(workspace, add(workspace, skill, "promoted", other))
    taught = finished(workspace, skill, CONFIG)
    assert taught is not None
    assert taught.decision == "promoted", "what the champion knows needs no second stage, whatever the settings"


def test_earlier_rows_of_a_skill_can_be_taught_again(workspace: Workspace, skill: Skill, tmp_path: Path):
    """The champion knows the newer rows, by which it is guarded."""
    settle(workspace, add(workspace, skill, "promoted"))
    assert finished(workspace, skill, CONFIG) is not None
    other = replace(skill, content_hash="d" * 64)
    settle(workspace, add(workspace, other, "promoted"))
    assert finished(workspace, other, CONFIG) is not None and finished(workspace, skill, CONFIG) is None


def test_what_a_repair_needed_for_a_resume_goes_as_well(workspace: Workspace, skill: Skill):
    name = add(workspace, skill, "promoted")
    run = workspace.run_folder(workspace.version(name)["stage"])
    left = [folder / "checkpoint-000005" for folder in (run, run / "repair-more-anchors")]
    for folder in left:
        folder.mkdir(parents=True)
    (run / "repair-more-anchors" / "metrics.jsonl").write_text("")
    settle(workspace, name)
    assert not any(folder.exists() for folder in left)
    assert (run / "repair-more-anchors" / "metrics.jsonl").is_file()


def test_a_step_of_a_replay_that_is_held_is_nothing_to_serve(workspace: Workspace, skill: Skill):
    name = workspace.next_version()
    entry = info(name, "v000", skill.name, verdict=verdict("held"), branch="forget x, instead of v000",
                 config=CONFIG.model_dump(mode="json"))  # fmt: skip
    workspace.add_version(entry, write_weights)
    assert settle(workspace, name).decision == "held"
    assert workspace.aliases()["candidate"] is None and events(workspace)[-1] == "refuse"


def test_an_unfinished_stage_goes_on_with_the_same_settings_only(workspace: Workspace, skill: Skill):
    assert begin(workspace, skill, CONFIG, restart=False, parent="v000") == ("s01-toy", False)
    assert begin(workspace, skill, CONFIG, restart=False, parent="v000") == ("s01-toy", True)
    (workspace.run_folder("s01-toy") / "preflight.json").write_text("{}")
    other = RunConfig.model_validate({"train": {"steps": 7}})
    with pytest.raises(InputError, match=r"other settings.*--restart"):
        begin(workspace, skill, other, restart=False, parent="v000")
    name, resumed = begin(workspace, skill, other, restart=True, parent="v000")
    assert not resumed
    stage = json.loads((workspace.run_folder(name) / "stage.json").read_text())
    assert stage["config"]["train"]["steps"] == 7
    assert workspace.runs.names() == [name]


def test_a_stage_that_computed_nothing_holds_nobody_to_its_settings(workspace: Workspace, skill: Skill):
    """It ended by bad input, which is corrected now."""
    begin(workspace, skill, CONFIG, restart=False, parent="v000")
    other = RunConfig.model_validate({"train": {"steps": 7}})
    assert begin(workspace, skill, other, restart=False, parent="v000") == ("s01-toy", False)
    assert workspace.runs.names() == ["s01-toy"]


def test_a_setting_that_is_new_since_counts_as_its_default(workspace: Workspace, skill: Skill):
    begin(workspace, skill, CONFIG, restart=False, parent="v000")
    (workspace.run_folder("s01-toy") / "preflight.json").write_text("{}")
    path = workspace.run_folder("s01-toy") / "stage.json"
    info = json.loads(path.read_text())
    del info["config"]["train"]["overlap"]
    info["config"]["train"]["gone"] = 3
    path.write_text(json.dumps(info))
    assert begin(workspace, skill, CONFIG, restart=False, parent="v000") == ("s01-toy", True)
    other = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"overlap": True})})
    with pytest.raises(InputError, match=r"other settings \(train\.overlap = False\)"):
        begin(workspace, skill, other, restart=False, parent="v000")
    info["config"]["context"]["student_switches"] = {"enable_thinking": False}  # and one that is given up is another
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"other settings \(context\.student_switches = "):
        begin(workspace, skill, CONFIG, restart=False, parent="v000")


def test_all_skills_are_validated_before_anything_runs(tmp_path: Path):
    good = write_skill(tmp_path / "good")
    with pytest.raises(InputError, match=r"(?s)nowhere.*given twice: toy"):
        load_all([good, tmp_path / "nowhere", good])


def test_a_version_that_was_killed_before_its_promotion_waits_where_the_champion_is_another_by_now(
    workspace: Workspace, skill: Skill
):
    """Its gate compared it with its parent, and that was rolled back meanwhile."""
    settle(workspace, add(workspace, skill, "promoted"))
    late = add(workspace, skill, "promoted")
    workspace.rollback()
    assert settle(workspace, late).decision == "held"
    assert workspace.aliases() == {"champion": "v000", "previous": "v001", "candidate": late}
    assert "perdure promote v002" in workspace.ledger()[-1]["reason"]
    lines = len(workspace.ledger())
    assert settle(workspace, late).decision == "held" and len(workspace.ledger()) == lines


def test_going_back_need_not_wait_for_a_stage_whose_version_is_held_then(workspace: Workspace, skill: Skill):
    settle(workspace, add(workspace, skill, "promoted"))
    with workspace.lock():  # a stage is training
        assert Workspace.open(workspace.folder).rollback() == "v000"
        late = workspace.next_version()
        entry = info(late, "v001", skill.name, verdict=verdict("promoted"), config=CONFIG.model_dump(mode="json"))
        workspace.add_version(entry, write_weights)
        assert settle(workspace, late).decision == "held"
    assert workspace.aliases() == {"champion": "v000", "previous": "v001", "candidate": "v002"}


def test_an_unfinished_stage_does_not_change_its_precision(
    workspace: Workspace, skill: Skill, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("perdure.stages.compute_dtype", lambda _: torch.bfloat16)
    begin(workspace, skill, CONFIG, restart=False, parent="v000")
    (workspace.run_folder("s01-toy") / "preflight.json").write_text("{}")
    monkeypatch.setattr("perdure.stages.compute_dtype", lambda _: torch.float32)
    with pytest.raises(InputError, match=r"computes in bfloat16, and here float32 was.*--restart"):
        begin(workspace, skill, CONFIG, restart=False, parent="v000")
    assert begin(workspace, skill, CONFIG, restart=True, parent="v000") == ("s01-toy", False)
