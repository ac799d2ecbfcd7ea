"""Importers on the pinned data packages: whole skill folders, disjoint by construction, the same for the same seed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from perdure.config import RunConfig
from perdure.contexts import Renderer
from perdure.files import package_file
from perdure.importers import IMPORTERS, base, bfcl_multi, run_importer
from perdure.importers.base import tokens_at_most
from perdure.importers.bfcl import signature
from perdure.importers.facts import spellings
from perdure.importers.tldr import plain
from perdure.session import open_session
from perdure.skills.base import Skill, independent, load_skill
from perdure.skills.doubts import doubts
from perdure.skills.graders.tool_call import calls_for
from perdure.types import InputError


@pytest.fixture(scope="module", params=sorted(IMPORTERS))
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Skill]:
    folder = IMPORTERS[request.param](tmp_path_factory.mktemp("skills") / request.param, 0)
    return request.param, load_skill(folder)


def answer(example) -> str:
    return example.demonstration["content"]


def test_a_skill_has_enough_rows_and_its_own_demonstrations_are_right(imported: tuple[str, Skill]):
    name, skill = imported
    assert len(skill.train) >= (200 if name == "sciq" else 400)
    assert len(skill.test) == {"bfcl": 120, "bfcl-mixed": 160, "bfcl-multi": 180, "sciq": 120, "facts": 222}.get(
        name, 240
    )  # their packages have no more
    assert all(skill.grade(answer(example), example) == 1 for example in (*skill.train, *skill.test))
    assert skill.settings.licence
    assert "==" in skill.settings.source or name.startswith("forms-")


def test_a_wrong_answer_is_wrong(imported: tuple[str, Skill]):
    _, skill = imported
    first = skill.test[0]
    others = [example for example in skill.test if answer(example) != answer(first)]
    assert others
    assert skill.grade(answer(others[0]), first) == 0
    assert skill.grade("I am not sure what you mean.", first) == 0


def test_what_test_rows_hold_out(imported: tuple[str, Skill]):
    """Each source holds out whole groups, so that passing the test rows takes generalisation."""
    source, skill = imported
    group = {
        "bfcl": lambda e: e.messages[-1]["content"].split("(", 1)[0],
        "bfcl-mixed": lambda e: e.messages[-1]["content"].split("(", 1)[0],
        "bfcl-multi": lambda e: e.id.split("/")[0],  # conversation
        "tldr": lambda e: e.metadata["tool"],
        "commands": lambda e: e.metadata["program"],
    }.get(source, lambda e: e.messages[-1]["content"])
    assert not {group(e) for e in skill.train} & {group(e) for e in skill.test}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_rows(imported: tuple[str, Skill], tmp_path: Path):
    source, skill = imported
    assert load_skill(IMPORTERS[source](tmp_path / "again", 0)).content_hash == skill.content_hash
    assert load_skill(IMPORTERS[source](tmp_path / "other", 1)).content_hash != skill.content_hash


@pytest.mark.parametrize(("imported", "most"), [("mmlu", 0.2), ("sst2", 0.6)], indirect=["imported"])
def test_labels_are_balanced_enough_to_be_no_giveaway(imported: tuple[str, Skill], most: float):
    """Of the sources that are a classification."""
    labels = [answer(example) for example in imported[1].test]
    assert max(labels.count(label) for label in set(labels)) / len(labels) <= most


@pytest.mark.slow
def test_every_demonstration_fits_the_skills_own_limit_on_the_embedded_model(imported: tuple[str, Skill]):
    """A demonstration longer than max_new_tokens would stop the first ``learn``."""
    renderer, (_, skill) = embedded_renderer(), imported
    assert max(len(renderer.demonstration(e).token_ids) for e in skill.train) <= skill.settings.max_new_tokens


@cache
def embedded_renderer() -> Renderer:
    return open_session(RunConfig()).renderer


def test_home_assistant_holds_out_sentence_templates():
    from perdure.importers import home_assistant as source

    grammar = json.loads(package_file(source.PACKAGE, "home_assistant_intents", "data/en.json",
                                           source.FILE_SHA256).read_text(encoding="utf-8"))  # fmt: skip
    templates = source.Grammar(grammar).templates("HassTurnOn")
    import random

    held_out = source.hold_out(templates, random.Random(0))
    assert 0 < len(held_out) < len(templates)
    text, slots = source.Grammar(grammar).draw(held_out[0], random.Random(1))
    assert text
    assert all(isinstance(value, (str, int)) for value in slots.values())


def test_a_folder_that_is_there_is_not_overwritten(tmp_path: Path):
    (tmp_path / "skill").mkdir()
    (tmp_path / "skill" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="already there"):
        IMPORTERS["sst2"](tmp_path / "skill", 0)
    assert (tmp_path / "skill" / "mine.txt").read_text() == "keep"


def test_missing_and_changed_packages_say_what_to_install(tmp_path: Path):
    with pytest.raises(InputError, match="pip install --no-deps nothing==1"):
        package_file("nothing==1", "no_such_module", "x", "0")
    with pytest.raises(InputError, match=r"sha256 is .* expected 00.*--force-reinstall"):
        package_file("pytest==9", "pytest", "__init__.py", "00")


def test_overlap_of_train_and_test_is_refused_and_nothing_is_left(tmp_path: Path):
    row = {"prompt": "a", "completion": "b"}
    with pytest.raises(InputError, match="same prompt"):
        base.write_skill(tmp_path / "s", {"name": "s"}, [row], [row])
    assert list(tmp_path.iterdir()) == []


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_keeps_equal_prompts_on_one_side_and_both_row_forms(tmp_path: Path):
    rows: list[dict] = [{"prompt": f"q{i // 2}", "completion": f"a{i}"} for i in range(40)]
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x" * 400}]
    rows.append({"messages": turns})
    run_importer("jsonl", tmp_path / "My Skill", 0, jsonl(tmp_path / "rows.jsonl", rows), "exact", 0.25)
    skill = load_skill(tmp_path / "My Skill")
    assert skill.name == "my-skill"
    assert len(skill.train) + len(skill.test) == 41
    assert 3 <= len(skill.test) <= 18
    assert skill.settings.max_new_tokens >= 100


def test_jsonl_leaves_out_lines_that_are_there_already(tmp_path: Path):
    """They would count as independent items; another answer to the same prompt is another line."""
    rows: list[dict] = [{"prompt": f"q{i % 10}", "completion": f"a{i % 20}"} for i in range(60)]
    run_importer("jsonl", tmp_path / "s", 0, jsonl(tmp_path / "rows.jsonl", rows), "exact", 0.2)
    skill = load_skill(tmp_path / "s")
    assert len(skill.train) + len(skill.test) == 20
    assert skill.settings.source == "rows.jsonl without 40 lines that were there already"


def test_jsonl_knows_a_repeated_line_whatever_its_id(tmp_path: Path):
    rows = [{"id": f"row-{n}", "prompt": f"p{n % 5}", "completion": f"a{n % 5}"} for n in range(20)]
    file = jsonl(tmp_path / "log (turn by turn).jsonl", rows)
    run_importer("jsonl", tmp_path / "skill", 0, file, "exact", 0.4)
    skill = load_skill(tmp_path / "skill")
    assert len(skill.train) + len(skill.test) == 5
    assert "without 15 lines" in skill.settings.source


def test_what_was_held_out_stays_so_when_the_file_grows(tmp_path: Path):
    """Else rows that were trained on would measure the skill when it is taught again."""

    def prompts(name: str, count: int, seed: int = 0) -> list[set[str]]:
        rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(count)]
        run_importer("jsonl", tmp_path / name, seed, jsonl(tmp_path / f"{name}.jsonl", rows[::-1]), "exact", 0.2)
        skill = load_skill(tmp_path / name)
        return [{row.question for row in side} for side in (skill.train, skill.test)]

    train, test = prompts("before", 200)
    more_train, more_test = prompts("after", 500)
    assert train < more_train and test < more_test and 25 <= len(test) <= 55 and 75 <= len(more_test) <= 125
    assert prompts("other", 200, seed=1)[1] != test
    for share in (0.01, 0.9):  # at least one row on each side
        rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(2)]
        run_importer("jsonl", tmp_path / f"s{share}", 0, jsonl(tmp_path / "two.jsonl", rows), "exact", share)
        skill = load_skill(tmp_path / f"s{share}")
        assert len(skill.train) == len(skill.test) == 1


def test_ids_of_calls_and_messages_make_no_other_prompt(tmp_path: Path):
    """Logs number every call and message: the same request twice would stand on both sides."""
    rows = []
    for number in range(120):
        called = {"function": {"name": "look", "arguments": {"n": number % 40}}, "id": f"call_{number}"}
        if number % 2:
            called["function"] |= {"arguments": json.dumps({"n": number % 40})}  # type: ignore[operator]
        rows.append({"messages": [
            {"role": "user", "content": f"q{number % 40}", "id": f"msg_{number}"},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "content": "found", "tool_call_id": f"call_{number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]})  # fmt: skip
    skill = load_skill(run_importer("jsonl", tmp_path / "s", 0, jsonl(tmp_path / "f.jsonl", rows), "exact", 0.2))
    sides = [{row.messages[0]["content"] for row in side} for side in (skill.train, skill.test)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    assert independent(skill.test) == len(sides[1])


def test_a_conversation_stays_when_its_beginning_comes_to_the_file(tmp_path: Path):
    def said(number: int, exchanges: int) -> dict:
        turns = [({"role": "user", "content": f"q{number}.{n}"}, {"role": "assistant", "content": "yes"})
                 for n in range(exchanges)]  # fmt: skip
        return {"messages": [message for pair in turns for message in pair]}

    def held_out(name: str, rows: list[dict]) -> set[str]:
        run_importer("jsonl", tmp_path / name, 0, jsonl(tmp_path / f"{name}.jsonl", rows), "exact", 0.2)
        return {row.messages[0]["content"] for row in load_skill(tmp_path / name).test}

    whole = [said(number, 2) for number in range(50)]
    assert held_out("before", whole) == held_out("after", [*whole, *(said(number, 1) for number in range(50))])


def test_what_cannot_be_used_is_left_out_only_if_asked(tmp_path: Path):
    rows: list[dict] = [{"prompt": f"q{n}", "completion": f"{n}"} for n in range(8)]
    rows[2:2] = [{"prompt": "no answer"}, {"prompt": "x", "completion": "no number"}]
    rows.append({"messages": [{"role": "user", "content": "u"}, {"role": "tool", "content": "ends in a tool turn"}]})
    file = jsonl(tmp_path / "2026-11-27T12:30:05.jsonl", rows)  # whose name looks like a place in it
    file.write_text(file.read_text() + "{broken\n")
    with pytest.raises(InputError, match=r"(?s)05.jsonl:3: .*05.jsonl:11: .*05.jsonl:12: .*05.jsonl:4: "):
        run_importer("jsonl", tmp_path / "s", 0, file, "number", 0.2)
    skipped: list[str] = []
    run_importer("jsonl", tmp_path / "s", 0, file, "number", 0.2, skipped=skipped)
    assert [problem.split(": ")[0] for problem in skipped] == [f"{file}:{line}" for line in (3, 11, 12, 4)]
    skill = load_skill(tmp_path / "s")
    assert sorted(row.question for row in (*skill.train, *skill.test)) == [f"q{n}" for n in range(8)]
    assert skill.settings.source == "2026-11-27T12:30:05.jsonl without 4 that could not be used"
    with pytest.raises(InputError, match="a JSON array"):  # nothing is left
        run_importer("jsonl", tmp_path / "t", 0, jsonl(tmp_path / "list.jsonl", [[1]]), "exact", 0.2, skipped=[])  # type: ignore[list-item]
    with pytest.raises(InputError, match="--skip-bad is for jsonl and docs only"):
        run_importer("mmlu", tmp_path / "m", 0, None, None, None, skipped=[])


def test_options_of_the_grader_come_with_the_import(tmp_path: Path):
    rows = [{"prompt": f"q{n}", "completion": f"id {n}"} for n in range(9)]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="needs a pattern"):
        run_importer("jsonl", tmp_path / "s", 0, file, "regex", 0.2)
    run_importer("jsonl", tmp_path / "s", 0, file, "regex", 0.2, grader_option={"pattern": "id [0-9]+"})
    skill = load_skill(tmp_path / "s")
    assert skill.settings.grader_options == {"pattern": "id [0-9]+"} and skill.grade("id 7", skill.test[0]) == 1
    with pytest.raises(InputError, match="--grader-option is for jsonl only"):
        run_importer("mmlu", tmp_path / "m", 0, None, None, None, grader_option={"pattern": "x"})


def test_an_answer_that_is_a_call_is_graded_as_one(tmp_path: Path):
    """By any other grader it would be wrong whatever the model writes, as each model writes calls in its own form."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    row = {"messages": [{"role": "user", "content": "do"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    file = jsonl(tmp_path / "rows.jsonl", [row, {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    for grader in ("exact", "json"):
        with pytest.raises(InputError, match=r"rows.jsonl:1: the answer is a tool call"):
            run_importer("jsonl", tmp_path / "s", 0, file, grader, 0.2)
    run_importer("jsonl", tmp_path / "s", 0, file, "tool_call", 0.2)
    skill = load_skill(tmp_path / "s")
    assert sorted(bool(calls_for(row)) for row in (*skill.train, *skill.test)) == [False, False, True]


@pytest.mark.parametrize(
    "text",
    ["2024-11-03 18:45:22 ref 9948-2213-8837-1029-5561", "\u4eca\u5929\u5929\u6c14\u5f88\u597d" * 6,
     "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! " * 6, "plain English text, as most answers are.",
     '{"a": [1, 2, {"b": null}]}', "\U0001f600" * 9],
)  # fmt: skip
def test_there_is_room_for_every_answer(text: str):
    tokens = embedded_renderer().tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokens) + 1 <= tokens_at_most(text) <= len(text.encode()) + 2


def test_jsonl_as_windows_writes_it(tmp_path: Path):
    text = "".join(json.dumps({"prompt": f"q{i}", "completion": "ä"}, ensure_ascii=False) + "\r\n" for i in range(4))
    (tmp_path / "bom.jsonl").write_bytes(text.encode("utf-8-sig"))
    run_importer("jsonl", tmp_path / "s", 0, tmp_path / "bom.jsonl", "exact", 0.2)
    skill = load_skill(tmp_path / "s")
    assert len(skill.train) + len(skill.test) == 4 and skill.test
    array = "[" + text.replace("\r\n", ",")[:-1] + "]"
    for name, data, message in (("wide", text.encode("utf-16"), "UTF-16"), ("array", array.encode(), "a JSON array")):
        (tmp_path / f"{name}.jsonl").write_bytes(data)
        with pytest.raises(InputError, match=rf"{name}\.jsonl:1: {message}"):
            run_importer("jsonl", tmp_path / name, 0, tmp_path / f"{name}.jsonl", "exact", 0.2)


def test_jsonl_reports_every_bad_line(tmp_path: Path):
    file = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c"}, {"x": 1}])
    with pytest.raises(InputError, match=r"(?s)rows.jsonl:2.*rows.jsonl:3"):
        run_importer("jsonl", tmp_path / "s", 0, file, "exact", 0.2)
    with pytest.raises(InputError, match="at least 2"):
        run_importer("jsonl", tmp_path / "s", 0, jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b"}]),
                     "exact", 0.2)  # fmt: skip
    with pytest.raises(InputError, match="--file"):
        run_importer("jsonl", tmp_path / "s", 0, None, "exact", 0.2)


def test_how_functions_and_commands_are_written():
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]}}
    assert signature(function) == "f(a: integer, b?: any)"
    function["parameters"]["properties"]["b"] = {"type": "string", "enum": ["x", "y"]}
    assert signature(function, choices=True) == 'f(a: integer, b?: "x" | "y")'
    assert plain("tar {{[-x|--extract]}} {{path/to/file}}") == "tar --extract <path/to/file>"
    assert plain("jj {{[b|bookmark]}} list") == "jj bookmark list"


def test_where_no_function_fits_a_call_is_wrong_and_silence_right(tmp_path: Path):
    skill = load_skill(IMPORTERS["bfcl-mixed"](tmp_path / "tools", 0))
    none = [example for example in skill.test if example.id.startswith("none-")]
    assert len(none) == 40 and sum(e.id.startswith("none-") for e in skill.train) == len(skill.train) // 6
    called = answer(next(example for example in skill.test if example not in none))
    for example in none:
        assert skill.grade(called, example) == 0 and skill.grade("I cannot do that.", example) == 1


def test_recorded_conversations_hold_what_their_worlds_answer() -> None:
    class World:
        def __init__(self) -> None:
            self.notes: list[str] = []

        def add(self, text: str, tags: list[str]) -> dict[str, int]:
            tags.append("seen")  # a world may keep and change what it is given
            self.notes.append(text)
            return {"notes": len(self.notes)}

        def read(self) -> str:
            return "; ".join(self.notes) * 200

    functions = [{"name": name, "parameters": {"properties": {key: {} for key in keys}, "required": keys}}
                 for name, keys in (("add", ["text", "tags"]), ("read", []))]  # fmt: skip
    question = {
        "id": "q",
        "question": [[{"role": "user", "content": " note a, then b "}], [{"role": "user", "content": "read"}]],
    }
    row = bfcl_multi.conversation(
        question, [["add('a', tags=['x'])", "add(text='b',tags=[])"], ["read()"]], functions, [World()]
    )
    said = [(message["role"], message["content"]) for message in row["messages"][1:]]
    assert (
        said[0] == ("user", "note a, then b")
        and said[2] == ("tool", '{"notes": 1}')
        and said[4] == ("tool", '{"notes": 2}')
    )
    assert json.loads(said[1][1]) == {"name": "add", "arguments": {"text": "a", "tags": ["x"]}}
    assert (
        said[5] == said[-1] == ("assistant", "Done.") and said[-2][1].startswith("a; ba; b") and len(said[-2][1]) == 240
    )
    assert [turn["kind"] for turn in row["metadata"]["turns"]] == ["call", "call", "done", "call", "done"]
    assert row["metadata"]["turns"][0]["ground_truth"] == [{"add": {"text": ["a"], "tags": [["x"]]}}]


def test_a_changed_simulator_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bfcl_multi._simulator.cache_clear()
    monkeypatch.setitem(bfcl_multi.WORLDS, "TicketAPI", (*bfcl_multi.WORLDS["TicketAPI"][:2], "0" * 64))
    with pytest.raises(InputError, match=r"ticket_api.py: sha256 is"):
        bfcl_multi.build(tmp_path / "skill")
    assert not list(tmp_path.iterdir())


def rows_of(completions: list[str], prompts: int) -> list[dict]:
    return [{"prompt": f"question {place % prompts}", "completion": text} for place, text in enumerate(completions)]


@pytest.mark.parametrize(
    ("completions", "prompts", "grader", "said"),
    [
        ([f"word {n} " * 10 for n in range(40)], 40, "exact", ["have 20 words or more"]),
        ([f"word {n} " * 10 for n in range(40)], 40, "token_f1", []),
        (["yes " * 20, "no " * 20] * 20, 40, "exact", []),  # labels, long ones
        (["yes"] * 20 + ["no"] * 20, 20, "exact", ["Of 20 prompts 20 have several different answers, and at most 50%"]),
        ([*["yes"] * 40, "no"], 40, "exact", ["Of 40 prompts 1 have several"]),
    ],
)
def test_what_is_seldom_meant_is_said(
    tmp_path: Path, completions: list[str], prompts: int, grader: str, said: list[str]
):
    file = jsonl(tmp_path / "rows.jsonl", rows_of(completions, prompts))
    found = doubts(load_skill(run_importer("jsonl", tmp_path / "s", 0, file, grader, 0.3)))
    assert len(found) == len(said) and all(part in text for part, text in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"question": "q", "answer": "a"}, "jq -c '{prompt: .question, completion: .answer}'"),
        ({"prompt": "q", "completion": "a", "category": "x"},
         "jq -c '{prompt, completion, metadata: ((.metadata // {}) + del(.prompt, .completion, .metadata))}'"),
    ],
)  # fmt: skip
def test_rows_of_another_form_are_told_the_way(tmp_path: Path, row: dict, part: str):
    with pytest.raises(InputError) as caught:
        run_importer("jsonl", tmp_path / "s", 0, jsonl(tmp_path / "rows.jsonl", [row]), "exact", 0.2)
    assert part in str(caught.value)


def test_facts_are_held_out_by_phrasing_and_their_passages_hold_the_answers(tmp_path: Path):
    skill = load_skill(IMPORTERS["facts"](tmp_path / "facts", 0))
    taught = {e.metadata["fact"] for e in skill.train}
    kinds = {kind: [e for e in skill.test if e.metadata["kind"] == kind] for kind in ("direct", "indirect", "control")}
    assert {kind: len(rows) for kind, rows in kinds.items()} == {"direct": 81, "indirect": 81, "control": 60}
    assert {e.metadata["fact"] for e in (*kinds["direct"], *kinds["indirect"])} == taught
    control = {e.document for e in kinds["control"]}
    assert not control & {e.document for e in skill.train}
    for row in (*skill.train, *kinds["direct"]):
        assert row.document and answer(row).casefold() in row.document.casefold()
        assert skill.grade(row.messages[-1]["content"], row) == 0  # no question gives its answer away


@pytest.mark.parametrize(
    ("written", "also"),
    [
        ("The New York Times", "New York Times"), ("6,333", "6333"), ("six", "6"), ("6", "six"), ("eighth", "8th"),
        ("8 May 2025", "May 8"), ("July 1, 2026", "1 July"), ("spider", "spiders"), ("Brasília", "Brasilia"),
    ],
)  # fmt: skip
def test_answers_have_other_spellings(written: str, also: str):
    assert written in spellings(written) and also in spellings(written)
