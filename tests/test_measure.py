"""Scores in parts, by kind of test rows and for facts that changed; and which scores can stand beside each other."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fakes import NUMBERS, ScriptedEngine, renderer, save_tiny_model, toy_skill
from perdure import curriculum
from perdure.compare import compare
from perdure.config import RunConfig
from perdure.curriculum import learn
from perdure.evaluate import evaluate
from perdure.files import write_jsonl
from perdure.measure import score_json, way_of
from perdure.reporting import Silent
from perdure.scores import Scores, Way, guards, known_scores, said_of_kinds, unmeasured
from perdure.skills.base import Skill, load_skill
from perdure.stages import create_workspace
from perdure.types import Example
from perdure.workspace import Workspace
from toy_versions import CONFIG, info

WAY = way_of(CONFIG)
OLD = {"cat": ["black", "grey"], "dog": ["white"]}


def skill(folder: Path) -> Skill:
    """Cats and dogs are direct rows whose colour was another one before, the others are control rows."""
    found = load_skill(toy_skill(folder / "colours"))

    def described(row: Example) -> Example:
        key = row.messages[-1]["content"].split()[-1]
        kind = {"kind": "direct" if key in OLD else "control"}
        return replace(row, metadata=kind | ({"old": OLD[key]} if key in OLD else {}))

    return replace(found, test=tuple(map(described, found.test)))


def scored(found: Skill, **answers: str) -> dict:
    engine = ScriptedEngine(lambda prompt: answers[prompt.example.messages[-1]["content"].split()[-1]])
    return score_json(evaluate(engine, renderer(), "colours", found.test, found.grade, 8), found, WAY)


def test_a_score_holds_its_kinds_and_what_became_of_outdated_answers(tmp_path: Path) -> None:
    found = skill(tmp_path)
    before = scored(found, cat="black", dog="black", cow="green", hen="blue")
    assert before["kinds"] == {"direct": {"accuracy": 0.0, "n": 4}, "control": {"accuracy": 0.5, "n": 4}}
    assert before["changed"] == {"n": 4, "new": 0, "old": 2}  # nobody said that dogs were black
    after = scored(found, cat="red", dog="white", cow="green", hen="blue")
    assert after["changed"] == {"n": 4, "new": 2, "old": 2}
    assert said_of_kinds(before, after) == [
        "direct 0% to 50% (4), control 50% to 50% (4)",
        "of 4 facts that changed, old answers 2 to 2, new ones 0 to 2",
    ]


def test_a_skill_of_one_kind_has_nothing_to_say(tmp_path: Path) -> None:
    found = load_skill(toy_skill(tmp_path / "colours"))
    score = scored(found, cat="red", dog="white", cow="green", hen="blue")
    assert "kinds" not in score and "changed" not in score
    assert said_of_kinds(score, score) == []


def test_metadata_that_means_something_else_to_its_owner_is_left_alone(tmp_path: Path) -> None:
    found = skill(tmp_path)
    for old in (2019, True, "black", ["black", 3]):
        rows = tuple(replace(row, metadata={"old": old}) for row in found.test)
        assert "changed" not in scored(replace(found, test=rows), cat="black", dog="a", cow="b", hen="2")


# Which scores can stand beside each other


def add(workspace: Workspace, rights: dict[str, int], content: str = "c", way: Way = WAY, n: int = 10,
        test_rows: int = 10, seed: int = 3, promote: bool = True, parent: str | None = None) -> str:  # fmt: skip
    """A version that has so many of the first ``n`` test rows of each skill right, and of two prior tasks."""
    name, parent = workspace.next_version(), parent or workspace.resolve("champion")
    scores = {skill: {"accuracy": right / n, "n": n, "test_rows": test_rows, "skill_hash": content,
                      "measured_with": way.skills} for skill, right in rights.items()}  # fmt: skip
    tasks = {"piqa": {"accuracy": 1.0, "n": 2}}

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(name.encode())
        for skill, right in rights.items():
            rows = [{"id": f"test-{place}", "score": float(place <= right)} for place in range(1, n + 1)]
            write_jsonl(folder / "evaluation" / f"{skill}.jsonl", rows)
        items = [{"task": "piqa", "id": f"{seed}/{place}", "correct": True} for place in range(2)]
        write_jsonl(folder / "evaluation" / "probe.jsonl", items)

    probed = {"average": 1.0, "tasks": tasks, "measured_with": way.probe}
    entry = info(name, parent, next(iter(rights)), scores=scores, probe=probed, config={}, cost={"seconds": {}})
    workspace.add_version(entry, write)
    if promote:
        workspace.promote(name, "learned")
    return name


OTHER_WAYS: list[dict[str, Any]] = [
    {"context": {"student_switches": {"enable_thinking": False}}},
    {"thinking": {"enabled": True}},
    {"model": {"compute_dtype": "bfloat16"}},
    {"rollout": {"engine": "vllm", "url": "http://x"}},
]


@pytest.mark.parametrize("changed", OTHER_WAYS, ids=lambda changed: next(iter(changed)))
def test_what_was_measured_under_other_settings_is_measured_again(changed: dict[str, Any], workspace: Workspace,
                                                                  tmp_path: Path) -> None:  # fmt: skip
    made = load_skill(toy_skill(tmp_path / "colours"))
    as_before = {"probe": {"tasks": ["piqa"]}, "seed": 3, "model": {"compute_dtype": "float32"}}
    same, other = (RunConfig.model_validate(as_before | further) for further in ({}, changed))
    add(workspace, {"colours": 5}, made.content_hash, way_of(same), n=len(made.test), test_rows=len(made.test))
    assert unmeasured(known_scores(workspace, "v001", way_of(same)), [made], same) == ([], False)
    missing, wants_probe = unmeasured(known_scores(workspace, "v001", way_of(other)), [made], other)
    assert missing == [made] and wants_probe == ("model" in changed)


def test_what_another_grader_of_the_users_said_is_measured_again(workspace: Workspace, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The module of a ``python:`` grader lies outside of the skill's folder, whose hash stays the same."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "our_grading.py").write_text("def quality(completion, example):\n    return 1.0\n")
    folder = toy_skill(tmp_path / "colours", grader="python:our_grading:quality")
    made = load_skill(folder)
    score = scored(made, cat="red", dog="white", cow="green", hen="blue")
    assert score["code_hash"] == made.code_hash and len(made.code_hash) == 64
    found = Scores()
    found.skills["colours"] = score
    assert unmeasured(found, [made], CONFIG) == ([], bool(CONFIG.probe.tasks))
    (tmp_path / "our_grading.py").write_text("def quality(completion, example):\n    return 0.0\n")
    assert load_skill(folder).code_hash == made.code_hash  # what grades in this process is what was imported
    monkeypatch.delitem(sys.modules, "our_grading")
    importlib.invalidate_caches()
    changed = load_skill(folder)
    assert changed.content_hash == made.content_hash and changed.code_hash != made.code_hash
    assert unmeasured(found, [changed], CONFIG)[0] == [changed]
    taken = found.taken("colours")
    found.skills["colours"] = score | {"code_hash": changed.code_hash}
    assert found.taken("colours") != taken
    assert load_skill(toy_skill(tmp_path / "plain" / "colours")).code_hash == ""


@pytest.mark.parametrize("changed", [{"seed": 4}, {"probe": {"tasks": ["piqa"], "rows": 7}}], ids=["seed", "rows"])
def test_prior_tasks_on_other_items_are_measured_again(changed: dict[str, Any], workspace: Workspace) -> None:
    add(workspace, {"colours": 5})
    config = RunConfig.model_validate({"probe": {"tasks": ["piqa"]}, "seed": 3} | changed)
    assert unmeasured(known_scores(workspace, "v001", way_of(config)), [], config) == ([], True)


def test_scores_of_a_few_rows_do_not_take_the_place_of_those_of_all(workspace: Workspace) -> None:
    add(workspace, {"colours": 9})
    folder = workspace.run_folder("s02-colours")
    few = {"accuracy": 1.0, "n": 4, "test_rows": 10, "skill_hash": "c", "measured_with": WAY.skills}
    entry = {"version": "v001", "probe": None, "scores": {"colours": few}}
    write_jsonl(folder / "baseline" / "colours.jsonl", [{"id": f"test-{place}", "score": 1.0} for place in range(4)])
    (folder / "baseline.json").write_text(json.dumps(entry))
    (folder / "stage.json").write_text("{}")
    for rows, found in ((0, 10), (10, 10), (99, 10), (4, 4)):
        assert len(known_scores(workspace, "v001", replace(WAY, rows=rows)).items["colours"]) == found
    assert "colours" not in known_scores(workspace, "v001", replace(WAY, rows=5)).items


def test_a_later_measurement_on_other_rows_does_not_take_the_place_of_these(workspace: Workspace,
                                                                           tmp_path: Path) -> None:  # fmt: skip
    """A refused stage brought other rows of a skill's name, and measured the champion on them."""
    made = load_skill(toy_skill(tmp_path / "colours"))
    add(workspace, {"colours": 9}, made.content_hash)
    folder = workspace.run_folder("s02-colours")
    other = {"accuracy": 0.4, "n": 10, "test_rows": 10, "skill_hash": "other", "measured_with": WAY.skills}
    write_jsonl(folder / "baseline" / "colours.jsonl",
                [{"id": f"test-{place}", "score": float(place < 4)} for place in range(10)])  # fmt: skip
    (folder / "baseline.json").write_text(json.dumps({"version": "v001", "probe": None, "scores": {"colours": other}}))
    (folder / "stage.json").write_text("{}")
    assert sum(known_scores(workspace, "v001", WAY).items["colours"].values()) == 4
    assert sum(known_scores(workspace, "v001", WAY.of([made])).items["colours"].values()) == 9


def test_rows_of_another_content_are_not_the_same_rows_whatever_their_ids(workspace: Workspace, tmp_path: Path) -> None:
    """The skill was taught again with other rows: its best before is no measure for what it is now."""
    made = load_skill(toy_skill(tmp_path / "colours"))
    for right, content in ((10, "0" * 64), (7, "f" * 64), (6, "f" * 64)):
        add(workspace, {"colours": right}, content)
    before = known_scores(workspace, "v003", WAY)
    found = guards(workspace, "v003", before, {"colours": made}, CONFIG, WAY)
    best = [guard for guard in found if guard.kind == "best ever"]
    assert [(guard.reference, sum(guard.before.values())) for guard in best if guard.before] == [("v002", 7)]
    assert compare(workspace, "v001", "v003")["scores"]["colours"] is None
    assert compare(workspace, "v002", "v003")["scores"]["colours"]["change"] == pytest.approx(-0.1)


def test_a_loss_that_was_accepted_is_no_best_ever_any_more(workspace: Workspace, tmp_path: Path) -> None:
    """v002 was promoted in spite of its verdict, so that its successors are not refused for what it lost."""
    made = load_skill(toy_skill(tmp_path / "colours"))
    for right in (10, 6, 5):
        add(workspace, {"colours": right}, made.content_hash)

    def best() -> list[str]:
        found = guards(workspace, "v003", known_scores(workspace, "v003", WAY), {"colours": made}, CONFIG, WAY)
        return [guard.reference for guard in found if guard.kind == "best ever"]

    assert best() == ["v001"]
    workspace.append("verdict", version="v002", decision="refused", reasons=["got worse"])
    assert best() == ["v002"]


def test_a_step_of_a_replay_takes_no_best_away(workspace: Workspace, tmp_path: Path) -> None:
    """Its own gate held it, which nobody overruled: the replay was judged as a whole."""
    made = load_skill(toy_skill(tmp_path / "colours"))
    add(workspace, {"colours": 10}, made.content_hash)
    step = add(workspace, {"colours": 6}, made.content_hash, promote=False)
    add(workspace, {"colours": 5}, made.content_hash, parent=step)
    workspace.append("verdict", version="v002", decision="held", reasons=["too few rows"])
    found = guards(workspace, "v003", known_scores(workspace, "v003", WAY), {"colours": made}, CONFIG, WAY)
    assert [guard.reference for guard in found if guard.kind == "best ever"] == ["v001"]


def test_a_resumed_stage_keeps_what_its_first_attempt_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in training, repeated with one skill more: what was measured then is still what the gate compares with."""
    model = save_tiny_model(tmp_path / "model", copies=True)
    config = RunConfig.model_validate(
        {"model": {"source": str(model), "compute_dtype": "float32"}, "probe": {"tasks": []},
         "train": {"method": "sft", "steps": 1, "anchor_share": 0.0, "warm_start_steps": 1, "warmup_steps": 0},
         "gate": {"enforce": False, "repair": 0}}
    )  # fmt: skip
    workspace = create_workspace(tmp_path / "bot", config)
    skills = [toy_skill(tmp_path / "colours"), toy_skill(tmp_path / "numbers", NUMBERS)]

    class Killed(BaseException):
        pass

    def dying(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("perdure.curriculum.train_stage", dying)
        learn(workspace, skills[:1], config, Silent())
    (outcome, _) = learn(workspace, skills, config, Silent())
    table = workspace.version(outcome.version or "")["verdict"]["table"]
    assert [row["verdict"] != "not measured" for row in table] == [True]
    entry = json.loads((workspace.run_folder(outcome.stage) / "baseline.json").read_text())
    assert set(entry["scores"]) == {"colours", "numbers"}


def test_a_forced_stage_that_was_killed_goes_on_without_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``status`` says to repeat the command: what was trained must not go because the preflight still says no."""
    model = save_tiny_model(tmp_path / "model", copies=True)
    config = RunConfig.model_validate(
        {"model": {"source": str(model), "compute_dtype": "float32"}, "probe": {"tasks": []},
         "train": {"steps": 2, "anchor_share": 0.0, "warm_start_steps": 2, "warmup_steps": 0, "checkpoint_every": 1},
         "preflight": {"rows": 4, "forecast": False}, "gate": {"enforce": False, "repair": 0}}
    )  # fmt: skip
    workspace, skill = create_workspace(tmp_path / "bot", config), toy_skill(tmp_path / "colours")
    checked = curriculum.check_before
    monkeypatch.setattr(
        curriculum, "check_before", lambda run: {**(checked(run) or {}), "ready": False, "advice": ["no"]}
    )
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(curriculum, "judge", Mock(side_effect=KeyboardInterrupt))
        learn(workspace, [skill], config, Silent(), force=True)
    (outcome,) = learn(workspace, [skill], config, Silent())
    assert outcome.version == "v001"
    (other,) = learn(workspace, [toy_skill(tmp_path / "numbers", NUMBERS)], config, Silent())
    assert (other.version, other.decision) == (None, "refused")
