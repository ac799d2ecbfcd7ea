"""The report against small workspaces whose every number is known."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_workspace
import pytest
from fake_workspace import FakeWorkspace
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from perdure.report import charts, samples, words
from perdure.report.html import write_report
from perdure.report.numbers import summary
from perdure.report.text import preflight_tables, render, safe_text, score_table
from perdure.types import InputError

PRIOR = {"piqa": 60, "boolq": 50}


@pytest.fixture
def chain(tmp_path: Path) -> FakeWorkspace:
    """Three skills of 10 test rows each: a at 0, 9, 8, 8; b at 5, 4, 9, 6; c at 1, 2, 1, 7 right."""
    fake = FakeWorkspace(tmp_path / "bot")
    add_stage(fake, "a", {"a": 9, "b": 4, "c": 2}, {"piqa": 61, "boolq": 50}, base={"a": 0, "b": 5, "c": 1})
    add_stage(fake, "b", {"a": 8, "b": 9, "c": 1}, {"piqa": 60, "boolq": 48})
    add_stage(fake, "c", {"a": 8, "b": 6, "c": 7}, {"piqa": 58, "boolq": 50})
    return fake


def add_stage(fake: FakeWorkspace, skill: str, right: dict[str, int], prior: dict[str, int] | None = PRIOR, *,
              base: dict[str, int] | None = None, **more: Any) -> str:  # fmt: skip
    """A whole stage; ``base`` is what the base model scores, measured before the first one."""
    stage = fake.start(skill)
    if base is not None:
        fake.baseline(stage, base, PRIOR)
    fake.metrics(stage)
    return fake.candidate(stage, right, prior, **more)


def page_of(fake: FakeWorkspace) -> str:
    return write_report(fake.folder).read_text(encoding="utf-8")


def printed(numbers: dict[str, Any], width: int = 80, color: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=color, color_system="truecolor" if color else None
    )
    render(numbers, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


# Numbers


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


@settings(max_examples=20, deadline=None)
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


# The page


class Outline(HTMLParser):
    """Tags, attributes that load or link, and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "action", "data", "poster", "srcset", "background")
        self.links += [value or "" for name, value in attrs if name in names]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    return found


HOSTILE = (
    '<script>alert(1)</script><img src="http://evil.test/x.png" onerror=alert(2)> \x1b[31mred\x1b[0m \u202egnp.exe'
)


def hostile_chain(folder: Path) -> FakeWorkspace:
    """Every text that a model or a data set may have written tries to break out."""
    fake = FakeWorkspace(folder)
    rows = [row | {"prompt": HOSTILE, "expected": HOSTILE, "completion": HOSTILE + "{{ 7*7 }}"}
            for row in fake_workspace.items("a", 9, 10)]  # fmt: skip
    table = [{"name": HOSTILE, "kind": HOSTILE, "before": "<b>", "after": None, "change": True, "passed": "yes"}]
    add_stage(fake, "a", {"a": 9}, base={"a": 0}, changed={"a": rows}, reasons=[HOSTILE], table=table)
    path = fake.workspace.run_folder("s01-a") / "preflight.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"advice": [HOSTILE], "window": {"limit": HOSTILE}}))
    fake.workspace.append("note", version=HOSTILE, reason=HOSTILE)
    return fake


def test_foreign_text_is_escaped(tmp_path):
    page = page_of(hostile_chain(tmp_path / "bot"))
    found = outline(page)
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert "<script>alert(1)</script>" in found.text  # readable as text
    assert "{{ 7*7 }}" in found.text
    assert "red" in found.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)


def test_a_lone_surrogate_does_not_stop_the_report(chain):
    path = chain.folder / "versions" / "v003" / "evaluation" / "a.jsonl"
    rows = [json.loads(line) | {"completion": "\ud800 half"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "\ufffd half" in page_of(chain)


def test_the_page_needs_nothing_else(chain):
    page = page_of(chain)
    found = outline(page)
    assert all(link.startswith("#") for link in found.links)
    assert {"script", "link", "img", "iframe", "object", "embed", "form"}.isdisjoint(found.tags)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page)


def test_every_section_is_there_and_every_link_has_its_target(chain):
    rival = FakeWorkspace(chain.folder / "compare" / "sft", "sft")
    add_stage(rival, "a", {"a": 10, "b": 3, "c": 1}, base={"a": 0, "b": 5, "c": 1})
    page = page_of(chain)
    ids = re.findall(r'<section id="(\w+)"', page)
    assert ids == ["matrix", "comparison", "prior", "verdicts", "samples", "curves", "preflight", "cost", "versions",
                   "settings"]  # fmt: skip
    assert {link.removeprefix("#") for link in outline(page).links} == set(ids)
    # 3 stages of 4 curves, 2 dumbbells, 3 + 1 cost bars
    assert page.count("<svg") == 12 + 2 + 4


def test_refused_candidates_are_struck_and_flagged(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    add_stage(fake, "a", {"a": 9, "b": 4}, base={"a": 0, "b": 5})
    add_stage(fake, "b", {"a": 2, "b": 9}, decision="refused", reasons=["a: got worse."])
    page = page_of(fake)
    row = re.search(r'<tr class="candidate">.*?</tr>', page, re.DOTALL)
    assert row is not None
    assert "refused" in row[0]
    assert "20%" in row[0]
    assert "a: got worse." in page
    taught = re.findall(r'class="heat \w* taught[^>]*><b>([^<]+)</b>', page)
    assert taught == ["90%"]


def test_same_files_same_page(chain):
    assert page_of(chain) == page_of(chain)


def test_target(chain, tmp_path):
    target = tmp_path / "out.html"
    assert write_report(chain.folder, target) == target
    assert target.stat().st_size > 10_000
    assert not (chain.folder / "report.html").exists()
    with pytest.raises(InputError, match="cannot be written"):
        write_report(chain.folder, tmp_path / "missing" / "out.html")


def test_a_long_chain_stays_small(tmp_path):
    names = [f"skill-{number}" for number in range(12)]
    fake = FakeWorkspace(tmp_path / "bot", n=100)
    for number, name in enumerate(names):
        stage = fake.start(name)
        if number == 0:
            fake.baseline(stage, dict.fromkeys(names, 3), PRIOR)
        fake.metrics(stage, steps=1000)
        fake.candidate(stage, dict.fromkeys(names[: number + 1], 90) | dict.fromkeys(names[number + 1 :], 4), PRIOR)
    assert write_report(fake.folder).stat().st_size < 500_000


# The terminal


def test_terminal_at_80_columns(chain):
    text = printed(summary(chain.folder))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"v002 after b +80% +\[90%\] +10% +54.0%", text)
    assert "Earlier skills keep 78% of their accuracy on average (lowest: b, 90% when taught, 60%" in text


def test_terminal_with_many_skills_splits_the_matrix(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    names = [f"a-rather-long-name-{number}" for number in range(6)]
    add_stage(fake, names[0], dict.fromkeys(names, 9), base=dict.fromkeys(names, 1))
    text = printed(summary(fake.folder))
    assert max(map(len, text.splitlines())) <= 80
    assert "(continued)" in text
    assert text.count("v001 after") == 3


def test_terminal_is_safe_from_foreign_text(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    add_stage(fake, "a", {"a": 9, "[bold]x\x1b]0;title\x07\x1b[2J": 3}, {"[link=evil]piqa\r": 60}, base={"a": 0})
    text = printed(summary(fake.folder))
    assert "[bold]x" in text
    assert "[link=evil]piqa" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "title" not in text
    colored = printed(summary(fake.folder), color=True)
    assert set(re.findall(r"\x1b(?!\[[0-9;]*m)", colored)) == set()  # nothing but colours of our own


def test_preflight_and_score_tables(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    preflight_tables([fake_workspace.preflight("a[red]", 0.9, ready=True)], console)
    score_table({"version": "v001", "scores": {"a": fake_workspace.score(9, 10)},
                 "probe": fake_workspace.probe(PRIOR)}, console)  # fmt: skip
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a[red]" in text
    assert re.search(r"turns:2 \(chosen\) +90% +80–98% +260 +2.80 +0%", text)
    assert "with it 90%, gap +90.0 points on 32 training rows" in text
    assert re.search(r"a +90.0% +60–98% +10", text)
    assert re.search(r"prior, average +55.0%", text)


# Words, charts, samples


@pytest.mark.parametrize("text, safe", [
    ("plain\ttext\nsecond", "plain\ttext\nsecond"),
    ("\x1b[1;31mred\x1b[0m", "red"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "link"),
    ("\x1b]52;c;cGF3bmVk\x07after", "after"),
    ("\x1bPdevice\x1b\\after", "after"),
    ("\x9b31mred", "red"),
    ("\x9d0;title\x9cafter", "after"),
    ("\x1b(Bcharset\x1bc", "charset"),
    ("end\x1b", "end"),
    ("a\rb\x08c\x00", "a\ufffdb\ufffdc\ufffd"),
    ("line\r\nend", "line\nend"),
    ("\u202eabc\u2066", "\ufffdabc\ufffd"),
    ("\ud83d", "\ufffd"),
    ("grüße 漢字 👍 \u200f", "grüße 漢字 👍 \u200f"),
])  # fmt: skip
def test_safe_text(text, safe):
    assert safe_text(text) == safe


@given(st.text(alphabet=st.sampled_from("\x1b[]()P\\;mABc0189\x07\x9b\x9c\x9d\x90\n x")))
def test_safe_text_leaves_no_control_and_is_stable(text):
    once = safe_text(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", once)
    assert safe_text(once) == once


@pytest.mark.parametrize("value, digits, shown", [
    (None, 0, "–"), (0.936, 0, "94%"), (1.0, 0, "100%"), (0.999, 0, "99%"), (0.001, 0, "1%"), (0.0, 0, "0%"),
    (0.9996, 1, "99.9%"), (0.5249, 1, "52.5%"), (1.02, 0, "102%"),
])  # fmt: skip
def test_percent(value, digits, shown):
    assert words.percent(value, digits) == shown


def test_other_words():
    assert [words.points(value) for value in (0.021, -0.021, 0.0001, None)] == ["+2.1", "−2.1", "0.0", "–"]
    assert [words.seconds(value) for value in (0.4, 38, 2520, 4320, 5399)] == [
        "0.4 s", "38 s", "42 min", "72 min", "1 h 30 min"]  # fmt: skip
    assert [words.count(value) for value in (812, 45_300, 999_600, 1_240_000)] == ["812", "45.3 k", "1 M", "1.24 M"]


def test_thinning_keeps_extremes():
    line = [(float(x), 1.0) for x in range(10_000)]
    line[4321], line[8765] = (4321.0, 9.0), (8765.0, -9.0)
    kept = charts.thinned(line)
    assert len(kept) <= charts.MAX_POINTS + 1
    assert {line[0], line[4321], line[8765], line[-1]} <= set(kept)
    assert kept == sorted(kept)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_cover_the_range(low, size):
    ticks = charts.nice_ticks(low, low + size)
    assert 2 <= len(ticks) <= 6
    assert ticks[0] <= low + 1e-6 * max(1, abs(low))
    assert ticks[-1] >= low + size - 1e-6 * max(1, abs(low) + size)


def test_a_line_chart_in_known_places():
    series = charts.Series("SDFT", [(0, 0.0), (10, 1.0)], "ours")
    chart = charts.line_chart("Accuracy", [series], share=True, shade_until=5)
    assert chart is not None
    assert chart.curves[0].points == "40,128 232,8"
    assert chart.shade == (40, 96)
    assert chart.last == "100%"
    assert charts.line_chart("Nothing", [charts.Series("SDFT", [], "ours")], share=True) is None


def test_stacked_bar():
    found = charts.stacked({"train": 30.0, "probe": 0.0, "evaluate": 10.0}, 80)
    assert [(part.kind, part.at, part.width) for part in found] == [("train", 0, 37.5), ("evaluate", 37.5, 12.5)]


def test_samples_show_failures_and_changes():
    def pairs(change: str, number: int) -> list[samples.Sample]:
        return [samples.Sample(change, f"{change} {i}", "", "", "", False, False) for i in range(number)]

    shown = samples.choose([*pairs("right", 50), *pairs("gained", 40), *pairs("lost", 1), *pairs("wrong", 9)])
    assert [pair.change for pair in shown] == ["gained", "gained", "lost", "wrong", "right"]
    assert [pair.prompt for pair in shown[:2]] == ["gained 0", "gained 20"]
    assert len(samples.choose(pairs("gained", 40))) == 4
    assert len(samples.choose(pairs("gained", 1))) == 1
    assert samples.clipped("x" * 705).endswith("… (5 more characters)")
