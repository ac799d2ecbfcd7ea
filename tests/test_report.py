"""The report's numbers, against small workspaces whose every number is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_workspace
from fake_workspace import FakeWorkspace, add_stage, chain_of_three, page_of, printed
from perdure.report import words
from perdure.report.html import write_report
from perdure.report.numbers import summary
from perdure.types import InputError


@pytest.fixture
def chain(tmp_path: Path) -> FakeWorkspace:
    return chain_of_three(tmp_path / "bot")


def test_a_chain_of_three(chain):
    found = summary(chain.folder)
    assert found["skills"] == ["a", "b", "c"]
    assert found["rows"] == found["lineage"] == ["v000", "v001", "v002", "v003"]
    assert found["accuracy_matrix"] == [[0, 0.5, 0.1], [0.9, 0.4, 0.2], [0.8, 0.9, 0.1], [0.8, 0.6, 0.7]]
    assert found["learned_at"] == [1, 2, 3]
    assert found["n"] == [10, 10, 10]
    assert found["accuracy_when_learned"] == [0.9, 0.9, 0.7]
    assert found["final_accuracy"] == [0.8, 0.6, 0.7]
    assert found["forgetting"] == pytest.approx([0.1, 0.3, 0])
    # (8/9 + 6/9) / 2; the last skill had no time to be forgotten
    assert found["mean_retention"] == pytest.approx(7 / 9)
    assert found["backward_transfer"] == pytest.approx(-0.2)
    # b: 0.4 - 0.5 just before it was taught, c: 0.1 - 0.1
    assert found["forward_transfer"] == pytest.approx(-0.05)
    assert found["average_accuracy"] == pytest.approx(0.7)
    assert found["teacher_accuracy"] == [0.9, 0.9, 0.9]
    assert found["student_share_of_teacher"] == pytest.approx([1, 1, 7 / 9])


def test_intervals_are_those_of_the_files(chain):
    low, high = summary(chain.folder)["intervals"][1][0]
    assert (low, high) == pytest.approx((0.5958, 0.9821), abs=5e-5)  # Wilson, 9 of 10


def test_stages_prior_and_cost(chain):
    found = summary(chain.folder)
    assert [stage["version"] for stage in found["stages"]] == ["v001", "v002", "v003"]
    assert found["stages"][1] | {"scores": None} == {
        "stage": "s02-b", "skill": "b", "method": "sdft", "version": "v002", "parent": "v001", "decision": "promoted",
        "reasons": ["it is better."], "champion": "v002", "in_force": True, "scores": None}  # fmt: skip
    assert found["prior"]["piqa"]["base"]["accuracy"] == 0.6
    assert found["prior"]["piqa"]["final"]["accuracy"] == 0.58
    assert [score["accuracy"] for score in found["prior"]["boolq"]["versions"].values()] == [0.5, 0.5, 0.48, 0.5]
    assert found["prior_average"]["base"] == pytest.approx(0.55)
    assert found["prior_average"]["final"] == pytest.approx(0.54)
    assert found["seconds"] == {"preflight": 30, "train": 300, "evaluate": 75, "probe": 60, "total": 465}
    assert found["seconds_by_stage"]["s02-b"]["total"] == 155
    assert found["tokens"] == {"rollout": 3000, "teacher": 9000, "student": 12000, "evaluate": 1500, "total": 25500}
    assert found["tokens_by_stage"]["s03-c"]["teacher"] == 3000


def test_a_refused_candidate_repeats_the_champion(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    add_stage(fake, "a", {"a": 9, "b": 4}, base={"a": 0, "b": 5})
    add_stage(fake, "b", {"a": 2, "b": 9}, decision="refused", reasons=["a: got worse."])
    found = summary(fake.folder)
    assert found["accuracy_matrix"] == [[0, 0.5], [0.9, 0.4], [0.9, 0.4]]
    assert found["rows"] == ["v000", "v001", "v001"]
    assert found["champion"] == "v001"
    assert found["learned_at"] == [1, None]
    assert found["accuracy_when_learned"] == [0.9, None]
    assert found["forgetting"] == [0, None]
    assert found["teacher_accuracy"] == [0.9, 0.9]
    assert found["mean_retention"] is None  # nothing was trained on top of a: a refusal is no stage survived
    refused = found["stages"][1]
    assert (refused["decision"], refused["in_force"], refused["champion"]) == ("refused", False, "v001")
    assert refused["scores"]["a"]["accuracy"] == 0.2
    assert found["seconds"]["train"] == 200  # it was paid for all the same


def test_a_skill_taught_after_a_refusal(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    add_stage(fake, "a", {"a": 3, "b": 4}, base={"a": 0, "b": 5}, decision="refused")
    add_stage(fake, "b", {"a": 0, "b": 9})
    add_stage(fake, "a", {"a": 9, "b": 8})
    found = summary(fake.folder)
    assert found["skills"] == ["a", "b"]
    assert found["rows"] == ["v000", "v000", "v002", "v003"]
    assert found["learned_at"] == [3, 2]
    assert found["taught_by"] == ["v003", "v002"]
    assert found["retention"] == pytest.approx([1, 8 / 9])


def test_rollback_takes_the_last_row_back(chain):
    chain.workspace.rollback("v002")
    found = summary(chain.folder)
    assert found["rows"] == ["v000", "v001", "v002", "v002"]
    assert found["learned_at"] == [1, 2, None]
    assert found["final_accuracy"] == [0.8, 0.9, 0.1]
    assert [stage["in_force"] for stage in found["stages"]] == [True, True, False]
    assert "rolled back" in page_of(chain)


def test_a_replay_leaves_the_champion_what_it_was_until_its_end(chain):
    for parent in ("v001", "v004"):
        stage = chain.start("c")
        chain.candidate(stage, {"a": 8, "c": 6}, promote=False, parent=parent, branch="forget b, instead of v003")
    chain.workspace.promote("v005", "without b")
    found = summary(chain.folder)
    assert found["rows"] == ["v000", "v001", "v002", "v003", "v003", "v005"]
    assert [stage["in_force"] for stage in found["stages"]] == [True, True, True, False, True]


def test_a_verdict_that_was_not_enforced(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot", enforce=False)
    add_stage(fake, "a", {"a": 9}, base={"a": 0}, decision="refused", promote=True)
    found = summary(fake.folder)
    assert found["learned_at"] == [1]
    assert found["gate_enforced"] is False
    assert "refused by the gate but served all the same" in words.sentences(found)[2]
    assert "refused, but served" in page_of(fake)


def test_only_the_base(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    found = summary(fake.folder)
    assert (found["skills"], found["stages"], found["accuracy_matrix"]) == ([], [], [[]])
    assert (found["champion"], found["mean_retention"], found["average_accuracy"]) == ("v000", None, None)
    assert found["seconds"]["total"] == 0
    assert words.sentences(found)[0] == "Nothing has been learned yet: the champion is the base model."
    assert "No skill has been measured" in page_of(fake)
    printed(found)


def test_a_chain_in_progress_without_a_probe(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    stage = fake.start("a")
    fake.baseline(stage, {"a": 1, "b": 5}, None)
    fake.metrics(stage, steps=20)
    with (fake.workspace.run_folder(stage) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 0.')  # being written
    found = summary(fake.folder)
    assert found["skills"] == ["a", "b"]
    assert found["accuracy_matrix"] == [[0.1, 0.5]]
    assert found["learned_at"] == [None, None]
    assert found["unfinished"] == [{"stage": "s01-a", "skill": "a", "method": "sdft", "parent": "v000", "steps": 20,
                                    "steps_planned": 60}]  # fmt: skip
    assert found["prior"] == {}
    assert found["prior_average"] == {"base": None, "final": None, "versions": {}}
    assert "a is under way, 20 of at most 60 steps done." in words.sentences(found)[0]
    assert "under way" in page_of(fake)


def test_a_skill_that_the_preflight_turned_away(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    fake.workspace.append("refuse", stage="s01-a", skill="a", parent="v000", reason="The teacher is no better.")
    found = summary(fake.folder)
    assert found["not_started"] == [{"skill": "a", "reason": "The teacher is no better."}]
    assert "a was not trained" in words.sentences(found)[0]
    assert "The teacher is no better." in page_of(fake)


def test_a_skill_measured_first_when_it_came(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    add_stage(fake, "a", {"a": 9}, base={"a": 0})
    stage = fake.start("b")
    fake.baseline(stage, {"b": 4}, None, version="v001")
    fake.candidate(stage, {"a": 9, "b": 8})
    found = summary(fake.folder)
    assert found["accuracy_matrix"] == [[0, None], [0.9, 0.4], [0.9, 0.8]]
    assert found["intervals"][0][1] is None
    assert found["n_matrix"] == [[10, None], [10, 10], [10, 10]]
    assert found["forward_transfer"] is None  # needs the base on b


def test_optional_files_may_be_missing(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    stage = fake.start("a", teacher=None)
    (fake.workspace.run_folder(stage) / "stage.json").unlink()
    fake.candidate(stage, {"a": 9}, None, teacher=None)
    for file in fake.folder.glob("versions/v001/evaluation/*"):
        file.unlink()
    found = summary(fake.folder)
    assert found["accuracy_matrix"] == [[None], [0.9]]
    assert (found["teacher_accuracy"], found["student_share_of_teacher"]) == ([None], [None])
    assert "a to 90%" in words.sentences(found)[0]
    page = page_of(fake)
    assert 'id="curves"' not in page
    assert 'id="samples"' not in page
    printed(found)


def test_numbers_are_json_without_nan(chain):
    text = json.dumps(summary(chain.folder), allow_nan=False)
    assert json.loads(text)["rows"] == ["v000", "v001", "v002", "v003"]


def test_another_method_in_the_same_words(chain):
    rival = FakeWorkspace(chain.folder / "compare" / "sft", "sft")
    add_stage(rival, "a", {"a": 10, "b": 3, "c": 1}, base={"a": 0, "b": 5, "c": 1}, seconds=60)
    add_stage(rival, "b", {"a": 4, "b": 9, "c": 1}, seconds=60)
    add_stage(rival, "c", {"a": 2, "b": 5, "c": 9}, {"piqa": 40, "boolq": 40}, seconds=60)
    found = summary(chain.folder)
    other = found["compared"]["sft"]
    assert other.keys() == found.keys() - {"differences"}
    assert other["method"] == "sft"
    assert other["final_accuracy"] == [0.2, 0.5, 0.9]
    assert other["forgetting"] == pytest.approx([0.8, 0.4, 0])
    difference = found["differences"]["sft"]["a"]
    assert (difference["n"], difference["change"]) == (10, pytest.approx(0.6))
    assert difference["p_better"] == pytest.approx(2**-6)  # six items gained, none lost
    text = printed(found)
    assert re.search(r"SDFT +3 +83.3% +70.0% +77.8% +54.0% +−1.0", text)
    assert re.search(r"SFT +3 +93.3% +53.3% +37.8% +40.0% +−15.0", text)


def test_rows_with_the_same_prompt_are_one_item_of_the_comparison(chain):
    rival = FakeWorkspace(chain.folder / "compare" / "sft", "sft")
    add_stage(rival, "a", {"a": 10, "b": 3, "c": 1}, base={"a": 0, "b": 5, "c": 1}, seconds=60)
    add_stage(rival, "b", {"a": 4, "b": 9, "c": 1}, seconds=60)
    add_stage(rival, "c", {"a": 2, "b": 5, "c": 9}, {"piqa": 40, "boolq": 40}, seconds=60)
    apart = summary(chain.folder)["differences"]["sft"]["a"]
    kept = chain.workspace.skills.folder_of("a", "c" * 64)
    kept.mkdir(parents=True)
    (kept / "skill.toml").write_text('name = "a"\ngrader = "exact"\n')
    (kept / "train.jsonl").write_text("")
    rows = [{"id": f"a-{i}", "prompt": f"question {i // 5}", "completion": "answer"} for i in range(10)]
    (kept / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = chain.folder / "versions" / "v003" / "version.json"
    info = json.loads(path.read_text())
    info["scores"]["a"]["skill_hash"] = "c" * 64
    path.write_text(json.dumps(info))
    found = summary(chain.folder)["differences"]["sft"]["a"]
    assert (found["n"], found["change"]) == (apart["n"], apart["change"])
    assert found["p_better"] == 1 / 4 > apart["p_better"]  # two prompts, both gained


def test_best_of_a_column_is_marked_for_every_method(chain):
    rival = FakeWorkspace(chain.folder / "compare" / "sft", "sft")
    add_stage(rival, "a", {"a": 10, "b": 3, "c": 1}, base={"a": 0, "b": 5, "c": 1}, seconds=60)
    page = page_of(chain)
    table = page[page.index('id="comparison"') : page.index("Skill by skill")]
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', table, re.DOTALL)
    best = {name: re.findall(r'class="best">([^<]+)<', row) for name, row in rows}
    # Only a is taught by both: 90 % against 100 %. "Now" is the mean over all three, as both measured them.
    assert best["SFT"][0] == "100.0%"
    assert best["SDFT"][0] == "70.0%"
    assert "left out of “when taught”: b, c" in page


def test_changed_content_is_said(chain):
    path = chain.folder / "versions" / "v003" / "version.json"
    info = json.loads(path.read_text())
    info["scores"]["a"]["n"] = 20
    path.write_text(json.dumps(info))
    assert summary(chain.folder)["content_changed"] == ["a"]
    assert "The test rows of a were not the same at every stage" in page_of(chain)


rights = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=20)
@given(rights)
def test_any_chain_has_clean_numbers(tmp_path_factory, stages):
    fake = FakeWorkspace(tmp_path_factory.mktemp("w") / "bot")
    for number, (a, b, good) in enumerate(stages):
        base = None if number else {"a": 0, "b": 5}
        add_stage(fake, "ab"[number % 2], {"a": a, "b": b}, base=base, decision="promoted" if good else "refused")
    found = summary(fake.folder)
    json.dumps(found, allow_nan=False)
    assert len(found["accuracy_matrix"]) == len(stages) + 1
    for skill, row in enumerate(found["learned_at"]):
        if row is not None:
            taught = found["accuracy_matrix"][row][skill]
            assert found["accuracy_when_learned"][skill] == taught
            assert found["forgetting"][skill] == pytest.approx(taught - found["accuracy_matrix"][-1][skill])
    page_of(fake)
    assert max(map(len, printed(found).splitlines())) <= 80


# Damaged files


def break_version(folder: Path, **changes: Any) -> None:
    path = folder / "versions" / "v002" / "version.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes, says", [
    ({"scores": {"a": {"accuracy": 7}}}, "scores.a.accuracy"),
    ({"scores": {"a": {"accuracy": float("nan")}}}, "scores.a.accuracy"),
    ({"scores": []}, "scores"),
    ({"parent": "v007"}, "v007"),
    ({"cost": {"seconds": {"train": "long"}}}, "cost.seconds.train"),
])  # fmt: skip
def test_a_damaged_version_is_named(chain, changes, says):
    break_version(chain.folder, **changes)
    with pytest.raises(InputError, match=re.escape(says)):
        summary(chain.folder)


def test_a_damaged_line_is_named(chain):
    (chain.folder / "runs" / "s02-b" / "metrics.jsonl").write_text('{"step": 1}\nnothing\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        write_report(chain.folder)


def test_no_workspace(tmp_path):
    with pytest.raises(InputError, match="not a workspace"):
        summary(tmp_path)


def test_names_in_files_do_not_lead_out_of_the_workspace(chain):
    outside = chain.folder.parent / "outside.jsonl"
    outside.write_text('{"id": "x", "prompt": "secret", "score": 1}\n')
    (chain.folder.parent / "preflight.json").write_text('{"teacher_accuracy": 0.123}')
    score = fake_workspace.score(5, 10)
    break_version(chain.folder, stage="../..", skill="../../../../outside", teacher_accuracy=None,
                  scores={"../../../../outside": score})  # fmt: skip
    assert summary(chain.folder)["teacher_accuracy"][1] is None
    assert "secret" not in page_of(chain)


def test_prior_tasks_that_were_measured_in_another_way_are_not_compared(tmp_path: Path) -> None:
    fake = chain_of_three(tmp_path / "bot")
    assert summary(fake.folder)["prior_average"]["base"] is not None
    file = fake.workspace.version_folder(fake.workspace.resolve("champion")) / "version.json"
    info = json.loads(file.read_text())
    info["probe"]["measured_with"] = "other"
    file.write_text(json.dumps(info))
    found = summary(fake.folder)["prior_average"]
    assert found["base"] is None and found["final"] is not None


def test_when_learned_is_what_the_version_scored_then(tmp_path: Path) -> None:
    """A later stage brought other rows of that name, was refused, and had measured the champion on them."""
    fake = FakeWorkspace(tmp_path / "bot")
    add_stage(fake, "a", {"a": 9})
    before = summary(fake.folder)["accuracy_when_learned"]
    stage = fake.start("a")
    fake.baseline(stage, {"a": 6}, None, version="v001")
    fake.candidate(stage, {"a": 5}, decision="refused")
    assert summary(fake.folder)["accuracy_when_learned"] == before == [0.9]
