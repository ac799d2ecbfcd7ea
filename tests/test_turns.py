"""Conversations with tools: each assistant turn a demonstration, and calls that could be made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from fakes import renderer
from perdure.config import ContextConfig
from perdure.importers import run_importer
from perdure.skills.base import load_skill
from perdure.skills.reading import parse_row
from perdure.skills.settings import SkillSettings
from perdure.skills.turns import played
from perdure.stage import by_conversation
from perdure.staging import split_validation
from perdure.subject import candidates
from perdure.templates import parse_template
from perdure.types import InputError

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def call(name: str = "weather", **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def conversation(city: str = "Rome") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"weather in {city}?"},
        call(city=city),
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "and for two days?"},
        call(city=city, days=2),
    ]


def parsed(row: dict[str, Any], **settings: Any) -> list[Any]:
    return parse_row({"tools": [WEATHER]} | row, SkillSettings(name="toy", **settings), "f:1", "train-1")


def test_turns_of_a_conversation_are_drawn_together_and_never_both_learned_and_validated() -> None:
    every = parse_row({"prompt": "hi", "completion": "ho"}, SkillSettings(name="toy", turns="all"), "f:1", "alone")
    for city in ("Rome", "Oslo", "Bonn", "Lima", "Kyiv"):
        every += parsed({"messages": conversation(city), "id": city}, turns="all")
    assert by_conversation(every) == [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [13, 14, 15]]
    for seed in range(5):
        learned, validated = split_validation(tuple(every), 0.45, 32, seed)
        assert len(learned) + len(validated) == len(every)
        assert 4 <= len(validated) <= 7
        assert not {e.conversation for e in learned if e.conversation} & {e.conversation for e in validated}
    long = [replace(turn, conversation="one" if place < 9 else "two") for place, turn in enumerate(every)]
    assert len(split_validation(tuple(long), 0.1, 32, 0)[1]) == 7
    assert not split_validation(tuple(long[:9]), 0.5, 32, 0)[1]


def test_each_assistant_turn_is_a_demonstration_after_what_came_before() -> None:
    turns = conversation()
    found = parsed({"messages": turns}, turns="all", system="Be brief.")
    assert [example.id for example in found] == ["train-1/1", "train-1/2", "train-1/3"]
    assert [example.demonstration for example in found] == [turns[1], turns[3], turns[5]]
    assert [len(example.messages) for example in found] == [2, 4, 6]
    assert all(example.messages[0] == {"role": "system", "content": "Be brief."} for example in found)
    assert found[1].messages[-1] == turns[2] and found[1].tools == (WEATHER,)
    assert found[2].origin == "f:1 (turn 3)"
    (last,) = parsed({"messages": turns})
    assert (last.id, last.origin, last.demonstration) == ("train-1", "f:1", turns[5])
    (single,) = parsed({"messages": turns[:2]}, turns="all")
    assert (single.id, single.origin) == ("train-1", "f:1")


def test_turns_of_weight_0_are_context() -> None:
    turns = conversation()
    turns[1] = turns[1] | {"weight": 0}
    turns[5] = turns[5] | {"weight": 1}
    found = parsed({"messages": turns}, turns="all")
    assert [example.demonstration["content"] for example in found] == ["blue", None]
    assert all("weight" not in message for example in found for message in (*example.messages, example.demonstration))
    turns[5]["weight"] = 0
    with pytest.raises(ValueError, match="last turn has weight 0"):
        parsed({"messages": turns})
    assert len(parsed({"messages": turns}, turns="all")) == 1


def test_each_turn_has_its_own_metadata() -> None:
    own = [{"ground_truth": [{"weather": {"city": ["Rome", "Roma"]}}]}, {}, {"ground_truth": []}]
    found = parsed({"messages": conversation(), "metadata": {"case": 7, "turns": own}}, turns="all")
    assert [example.metadata for example in found] == [{"case": 7} | turn for turn in own]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"messages": conversation()[:3]}, {}, "ends in a tool turn"),
        ({"messages": [conversation()[0], conversation()[2], conversation()[3]]}, {}, "tool turn must follow"),
        ({"messages": [*conversation()[:5], call(town="Rome")]}, {}, "'city' is a required property"),
        ({"messages": [*conversation()[:5], call(city="Rome", days=0)]}, {}, "at days: 0 is less than the minimum"),
        ({"messages": [*conversation()[:5], call(city="Rome", hours=2)]}, {}, "'hours' was unexpected"),
        ({"messages": [*conversation()[:5], call("whether", city="Rome")]}, {}, "not among the tools"),
        ({"messages": [*conversation()[:5], call(city=3)]}, {"turns": "all"}, "at city: 3 is not of type 'string'"),
        ({"messages": conversation(), "metadata": {"turns": [{}]}}, {"turns": "all"}, "each of the 3 turns"),
        ({"messages": [conversation()[0], conversation()[1] | {"weight": 2}]}, {}, "'weight' is 0 or 1"),
        ({"messages": [conversation()[0] | {"weight": 1}, conversation()[1]]}, {}, "assistant turns only"),
        ({"messages": [conversation()[0], conversation()[1] | {"weight": 0}]}, {"turns": "all"}, "nothing is left"),
        ({"messages": [call(city="Rome"), *conversation()[:2]]}, {"turns": "all"}, "not 'nothing'"),
    ],
)  # fmt: skip
def test_bad_conversations_are_named(row: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(row, **settings)


def test_arguments_may_be_text_and_schemas_must_be_schemas() -> None:
    text = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}
    assert len(parsed({"messages": [conversation()[0], text]})) == 1
    text["tool_calls"][0]["function"]["arguments"] = "{city"  # type: ignore[index]
    with pytest.raises(ValueError, match="not valid JSON"):
        parsed({"messages": [conversation()[0], text]})
    odd = {"function": {"name": "weather", "parameters": {"type": "dictionary"}}}
    with pytest.raises(ValueError, match="no JSON Schema"):
        parsed({"messages": conversation()[:2], "tools": [odd]})
    assert len(parsed({"messages": conversation()[:2], "tools": []})) == 1  # nothing is known of the functions


def with_schema(schema: dict[str, Any], **arguments: Any) -> list[Any]:
    tools = [{"function": {"name": "pay", "parameters": {"properties": {"amount": schema}}}}]
    return parsed({"messages": [conversation()[0], call("pay", **arguments)], "tools": tools})


def test_schemas_as_others_write_them() -> None:
    assert with_schema({"multipleOf": 0.01}, amount=19.99)
    with pytest.raises(ValueError, match="not a multiple"):
        with_schema({"multipleOf": 0.01}, amount=19.999)
    assert with_schema({"pattern": r"^\p{L}+$"}, amount="Rome")  # JavaScript's
    with pytest.raises(ValueError, match="does not match"):
        with_schema({"pattern": "^[a-z]+$"}, amount="Rome")
    pair = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "string"}, {"type": "integer"}]}
    tools = [{"function": {"name": "pay", "parameters": {**pair, "type": "object"}}}]
    assert parsed({"messages": [conversation()[0], call("pay", amount=1)], "tools": tools})
    for broken, message in (({"$ref": "#/properties/amount"}, "cannot be compared"), ({"multipleOf": 0.5}, "compared")):
        with pytest.raises(ValueError, match=message):
            with_schema(broken, amount=10**400)
    with pytest.raises(ValueError, match="the name of a tool must be a text"):
        parsed({"messages": [conversation()[0], call()], "tools": [{"function": {"name": ["weather"]}}]})


def test_a_conversation_to_play_fits_its_turns() -> None:
    rows = [{"role": "user", "content": "go"}, *[call(city="Rome"), {"role": "tool", "content": "ok"}] * 3,
            {"role": "assistant", "content": "done"}]  # fmt: skip
    played(rows, 4)
    with pytest.raises(ValueError, match="4 assistant turns, and a conversation is played for 3: raise max_turns"):
        played(rows, 3)


@pytest.mark.parametrize("reference", ["#/definitions/City", "https://example.invalid/city.json"])
def test_a_schema_stands_by_itself(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it refers to must be in it: nothing is fetched."""
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    odd = {"function": {"name": "weather", "parameters": {"properties": {"city": {"$ref": reference}}}}}
    with pytest.raises(ValueError, match=f"refer to '{reference.lstrip('#')}', which is not in them"):
        parsed({"messages": conversation()[:2], "tools": [odd]})
    odd["function"]["parameters"] |= {"definitions": {"City": {"type": "string"}}}  # type: ignore[operator]
    if reference.startswith("#"):
        assert len(parsed({"messages": conversation()[:2], "tools": [odd]})) == 1


def write(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "skill.toml").write_text('name = "weather"\ngrader = "tool_call"\nturns = "all"\n')
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_skill_of_conversations_through_the_renderer(tmp_path: Path) -> None:
    """Calls are graded as calls, text as no call; both roles see the tools and the recorded results."""
    rows = [{"messages": conversation(city), "tools": [WEATHER]} for city in ("Rome", "Oslo", "Bonn")]
    skill = load_skill(write(tmp_path / "weather", rows[:2], rows[2:]))
    assert (len(skill.train), len(skill.test)) == (6, 3)
    text = renderer()
    for example in skill.test:
        assert skill.grade(text.demonstration_text(example), example) == 1
    assert skill.grade('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>', skill.test[0]) == 0
    assert skill.grade(text.demonstration_text(skill.test[0]), skill.test[1]) == 0  # a call where none is right
    after_tool = skill.test[1]
    student = text.tokenizer.decode(text.student_prompt(after_tool).token_ids)
    teacher = text.tokenizer.decode(text.teacher_prompt(after_tool, parse_template("turns:1")).token_ids)
    assert "Tools: " in student and '{"sky": "blue"}' in student and "blue<|end|>" not in student
    assert teacher.count("weather in Bonn?") == 2 and "<|assistant|>blue<|end|>" in teacher
    assert teacher.endswith(student.rsplit("<|user|>", 1)[1])
    assert [template.name for template in candidates(ContextConfig(), skill.train)][1:] == [
        "turns:1",
        "turns:2",
        "turns:4",
    ]


def test_import_keeps_conversations_whole(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": conversation(f"City{n}"), "tools": [WEATHER]} for n in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_importer("jsonl", tmp_path / "chats", 0, file, "tool_call", 0.2, "all")
    skill = load_skill(tmp_path / "chats")
    assert len(skill.train) + len(skill.test) == 30 and len(skill.test) % 3 == 0 and skill.settings.turns == "all"


@pytest.mark.parametrize("turns", ["last", "all"])
def test_import_keeps_a_log_of_growing_conversations_together(tmp_path: Path, turns: Literal["last", "all"]) -> None:
    """Each row is a conversation so far: what one asks for stands in the context of the next."""
    file = tmp_path / "log.jsonl"
    talks = [[{"role": role, "content": f"{role} {talk}/{turn}"} for turn in range(3) for role in ("user", "assistant")]
             for talk in range(10)]  # fmt: skip
    rows = [{"messages": talk[:end]} for end in (4, 2, 6) for talk in talks]
    rows += [{"messages": [talk[0], talk[1] | {"weight": 0}, *talk[2:4]]} for talk in talks]  # the first is context
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_importer("jsonl", tmp_path / "log", 0, file, "exact", 0.3, turns)
    skill = load_skill(tmp_path / "log")
    sides = [{str(e.messages[0]["content"]) for e in side} for side in (skill.train, skill.test)]
    assert sum(map(len, sides)) == 10 and all(sides) and not sides[0] & sides[1]


def test_turns_are_an_option_of_jsonl_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--turns is for jsonl only"):
        run_importer("mmlu", tmp_path / "other", 0, None, None, None, "all")
