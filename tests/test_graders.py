"""Graders: (grader, options, completion, expected, score), and answers that try to break them."""

import json
from dataclasses import replace

import pytest

from perdure.skills.graders import GRADERS, make_grader
from perdure.skills.graders.text import expected_text
from perdure.types import Example, InputError

CALL = {"function": {"name": "light", "arguments": {"on": True, "room": "hall"}}}
OTHER = {"function": {"name": "light", "arguments": {"on": False, "room": "hall"}}}
TRUTH = [{"light": {"on": [True], "room": ["hall", "corridor"], "dim": [50, ""]}}]


def example(expected, **metadata) -> Example:
    """``expected``: the demonstration's text, or its tool calls."""
    turn = {"content": expected} if isinstance(expected, str) else {"tool_calls": expected}
    return Example(
        "e", ({"role": "user", "content": "q"},), {"role": "assistant", **turn}, metadata=metadata, origin="t:1"
    )


def text(call: dict) -> str:
    return json.dumps(call["function"])


TABLE = [
    ("exact", {}, "turn on", "turn on", 1),
    ("exact", {}, "  turn \n on ", "turn on", 1),
    ("exact", {}, "Turn on", "turn on", 0),
    ("exact", {}, "turn on.", "turn on", 0),
    ("exact", {"ignore_case": True}, "STRASSE", "straße", 1),
    ("exact", {"ignore_space": False}, "turn  on", "turn on", 0),
    ("exact", {"ignore_space": False}, "turn on", "turn on", 1),
    ("exact", {}, "", "a", 0),
    ("number", {}, "2,5", "5", 0),
    ("number", {}, "9.999.567", "567", 0),
    ("number", {}, "1,234.5", "1234.5", 1),
    # Groups of three, fractions and times are more than their last number.
    ("number", {}, "2 500 000", "0", 0),
    ("number", {}, "5'234", "234", 0),
    ("number", {}, "5_000", "0", 0),
    ("number", {}, "3/2", "2", 0),
    ("number", {}, "at 9:30", "30", 0),
    ("number", {}, "in 2024 500 people", "500", 1),
    ("number", {}, "6 / 2 = 3", "3", 1),
    ("number", {}, "ratio: 3", "3", 1),
    ("number", {}, "on 2024-01-15", "15", 1),
    ("contains", {}, "It costs 15 euros.", "5 euros", 0),
    ("contains", {}, "It costs 5 euros.", "5 euros", 1),
    ("contains", {}, "in 1960", "196", 0),
    ("contains", {}, "1.5 percent", "5 percent", 0),
    ("contains", {}, "\u53175\u4eba", "5", 1),
    ("token_f1", {"threshold": 1}, "\u0915\u093f", "\u0915\u0940", 0),  # Hindi: another vowel
    ("token_f1", {"threshold": 1}, "\u0e01\u0e31\u0e19", "\u0e01\u0e34\u0e19", 0),  # Thai: the same
    ("token_f1", {}, "\u5317\u4eac\u5e02", "\u5317\u4eac", 0.8),
    ("token_f1", {"threshold": 1}, "a_b, C", "c a_b", 1),
    ("token_f1", {"threshold": 1}, "cafe\u0301", "caf\u00e9", 1),
    ("choice", {}, "B", "B", 1),
    ("choice", {}, "(b) because", "B. Paris", 1),
    ("choice", {}, "**B** - Paris", "B", 1),
    ("choice", {}, "The answer is B.", "B", 1),
    ("choice", {}, "The correct answer is: (B)", "B", 1),
    ("choice", {}, "Answer: B", "B", 1),
    ("choice", {}, "B\nA", "B", 1),
    ("choice", {}, "The correct answer is option B.", "B", 1),
    ("choice", {}, "The best answer is B", "B", 1),
    ("choice", {}, "B, C and D", "B", 0),
    ("choice", {}, "B, A is wrong", "B", 1),
    ("choice", {}, "C", "B", 0),
    ("choice", {}, "A dog barks", "A", 0),
    ("choice", {}, "I think B", "I", 0),
    ("choice", {}, "I'd say", "I", 0),
    ("choice", {}, "Because", "B", 0),
    ("choice", {}, "", "B", 0),
    ("json", {}, '{"b": 1.0, "a": [1, 2]}', '{"a": [1, 2], "b": 1}', 1),
    ("json", {}, '```json\n{"a": 1}\n```', '{"a": 1}', 1),
    ("json", {}, '{"a": [2, 1]}', '{"a": [1, 2]}', 0),
    ("json", {}, '{"a": true}', '{"a": 1}', 0),
    ("json", {}, '{"a": "1"}', '{"a": 1}', 0),
    ("json", {}, '{"a": 1, "b": null}', '{"a": 1}', 0),
    ("json", {}, 'Here: {"a": 1}', '{"a": 1}', 0),
    ("json", {"whole": False}, 'Here: {"a": 1} as asked', '{"a": 1}', 1),
    ("json", {"whole": False}, "Here: nothing", '{"a": 1}', 0),
    ("json", {}, "NaN", "1", 0),
    ("json", {}, "", "1", 0),
    ("number", {}, "2 + 3 = 5", "5", 1),
    ("number", {}, "so the total is $1,234.50.", "1234.5", 1),
    ("number", {}, "5 apples, not 6", "5", 0),
    ("number", {}, "x = -5", "-5", 1),
    ("number", {}, "x = \N{MINUS SIGN}5", "-5", 1),
    ("number", {}, "on 2024-01-15", "15", 1),
    ("number", {}, "9-5", "-5", 0),
    ("number", {}, ".5", "0.5", 1),
    ("number", {}, "well...5", "5", 1),
    ("number", {}, "5e2", "500", 1),
    ("number", {}, "3.1416", "3.14159", 0),
    ("number", {"tolerance": 0.001}, "3.1416", "3.14159", 1),
    ("number", {"tolerance": 1}, "4", "5", 1),
    ("number", {"tolerance": 1}, "3.9", "5", 0),
    ("number", {}, "12345678901234567890", "12345678901234567891", 0),
    ("number", {}, "12345678901234567891", "12345678901234567891", 1),
    ("number", {}, "none", "5", 0),
    ("number", {}, "1e999", "1", 0),
    ("regex", {"pattern": "[a-z]+[0-9]"}, " abc1 ", "abc1", 1),
    ("regex", {"pattern": "[a-z]+[0-9]"}, "abc1 x", "abc1", 0),
    ("regex", {"pattern": "[a-z]+[0-9]", "full": False}, "x: abc1 x", "abc1", 1),
    ("contains", {}, "Take the TRAIN.", "the train", 1),
    ("contains", {"ignore_case": False}, "Take the TRAIN.", "the train", 0),
    ("contains", {}, "Take a bus.", "the train", 0),
    ("token_f1", {}, "The cat, sat!", "the cat sat", 1),
    ("token_f1", {}, "the dog", "the cat sat", 0.4),  # 1 shared word: 2 * 1 / (2 + 3)
    ("token_f1", {}, "the the the", "the cat sat", 1 / 3),  # a word counts as often as both hold it
    ("token_f1", {}, "nothing", "the cat sat", 0),
    ("token_f1", {}, "", "the cat sat", 0),
    ("token_f1", {"threshold": 0.4}, "the dog", "the cat sat", 1),
    ("token_f1", {"threshold": 0.41}, "the dog", "the cat sat", 0),
    ("tool_call", {}, text(CALL), [CALL], 1),
    ("tool_call", {}, f"<tool_call>\n{text(CALL)}\n</tool_call>", [CALL], 1),
    ("tool_call", {}, json.dumps([CALL]), [CALL], 1),
    ("tool_call", {}, json.dumps({"name": "light", "parameters": CALL["function"]["arguments"]}), [CALL], 1),
    ("tool_call", {}, json.dumps({"name": "light", "arguments": json.dumps({"room": "hall", "on": True})}), [CALL], 1),
    ("tool_call", {}, text(CALL).replace("true", "1"), [CALL], 0),
    ("tool_call", {}, text(CALL).replace("light", "lights"), [CALL], 0),
    ("tool_call", {}, text(CALL).replace("}", ', "dim": 5}'), [CALL], 0),
    ("tool_call", {}, '{"name": "light", "arguments": {"on": true}}', [CALL], 0),
    ("tool_call", {}, text(CALL) * 2, [CALL], 0),
    ("tool_call", {}, "I switch it on.", [CALL], 0),
    ("tool_call", {}, f"[1] {text(CALL)}", [CALL], 1),  # JSON that is no call is text
    # Two calls as chat templates write them, one after the other, in any order.
    ("tool_call", {}, f"<tool_call>{text(OTHER)}</tool_call>\n<tool_call>{text(CALL)}</tool_call>", [CALL, OTHER], 1),
    ("tool_call", {}, json.dumps([OTHER, CALL]), [CALL, OTHER], 1),
    ("tool_call", {}, text(CALL), [CALL, OTHER], 0),
    ("tool_call", {}, text(CALL), text(CALL), 1),  # the demonstration as text
]


@pytest.mark.parametrize(("grader", "options", "completion", "expected", "score"), TABLE, ids=range(len(TABLE)))
def test_table(grader, options, completion, expected, score):
    assert make_grader(grader, options, "skill.toml")(completion, example(expected)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("truth", "completion", "score"),
    [
        (TRUTH, {"on": True, "room": "hall"}, 1),
        (TRUTH, {"on": True, "room": "corridor", "dim": 50}, 1),
        (TRUTH, {"on": True, "room": "hall", "dim": 51}, 0),
        (TRUTH, {"on": True}, 0),
        (TRUTH, {"on": False, "room": "hall"}, 0),
        (TRUTH, {"on": True, "room": "hall", "colour": "red"}, 0),
    ],
)
def test_allowed_values(truth, completion, score):
    answer = json.dumps({"name": "light", "arguments": completion})
    assert make_grader("tool_call", {}, "")(answer, example("x", ground_truth=truth)) == score


def test_no_call_is_right_where_the_ground_truth_is_empty():
    grade, row = make_grader("tool_call", {}, ""), example("I cannot.", ground_truth=[])
    assert grade("I cannot [1] do {this}.", row) == 1.0
    assert grade(text(CALL), row) == 0.0
    # A call was begun, well or not.
    assert grade('{"name": 3}', row) == 0.0
    for begun in ('{"name": "f", "arguments": {"a": 1}', "{'name': 'f', 'arguments': {}}", "<tool_call>f"):
        assert grade(begun, row) == 0.0


def test_a_call_without_arguments_as_logs_have_it_and_one_that_is_none():
    call = {"function": {"name": "list_files", "arguments": ""}}
    row = Example("r", (), {"role": "assistant", "tool_calls": [call]})
    grade = make_grader("tool_call", {}, "")
    assert grade('{"name": "list_files", "arguments": {}}', row) == 1
    assert grade('{"name": "list_files", "arguments": {"all": true}}', row) == 0
    for arguments in ("[1]", "{'city': 'Paris'}"):
        call["function"]["arguments"] = arguments
        with pytest.raises(ValueError, match="whose arguments are no JSON object"):
            grade('{"name": "delete_all", "arguments": "garbage"}', row)


def test_overlapping_alternatives_find_their_pairing():
    # Taken in order, the first would take x = 1 and leave x = 2 for the second, which does not allow it.
    row = example("x", ground_truth=[{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}])
    grade = make_grader("tool_call", {}, "")
    for values, score in (((1, 2), 1), ((2, 1), 1), ((2, 2), 0), ((1, 1), 1)):
        answer = "".join(json.dumps({"name": "f", "arguments": {"x": value}}) for value in values)
        assert grade(answer, row) == score


def test_metadata_of_the_row():
    contains = make_grader("contains", {}, "")
    assert contains("Red and BLUE", example("x", contains=["red", "blue"])) == 1
    assert contains("red", example("x", contains=["red", "blue"])) == 0
    assert contains("navy red", example("x", contains=["red", ["blue", "navy"]])) == 1
    assert contains("red", example("x", contains=["red", ["blue", "navy"]])) == 0
    with pytest.raises(ValueError, match="none of them empty"):
        contains("red", example("x", contains=["red", []]))


@pytest.mark.parametrize(
    ("text", "part", "score"),
    [
        ("It is 11.", "11", 1), ("In 1911", "11", 0), ("11,000 people", "11", 0), ("1.11 times", "11", 0),
        ("fog", "fo", 0), ("The Air is thin", "Air", 1), ("Airbus", "Air", 0), ("(Au)", "Au", 1),
    ],
)  # fmt: skip
def test_whole_words_are_not_found_inside_others(text: str, part: str, score: float) -> None:
    assert make_grader("contains", {"whole_words": True}, "")(text, example("x", contains=[part])) == score
    regex = make_grader("regex", {"pattern": "a"}, "")
    assert regex("b", example("x", pattern="b")) == 1 and regex("a", example("x", pattern="b")) == 0


HOSTILE = [
    "[" * 100_000,
    "[" * 600 + "]" * 600,  # the parser takes it, a recursive comparison does not
    '{"a":' * 5_000 + "1" + "}" * 5_000,
    '{"a":' * 700 + "1" + "}" * 700,
    "1e999", "-1e999", "1e999999999999999999999999", "9" * 10_000, '{"a": ' + "9" * 10_000 + "}",
    '{"a": 1e999}', '{"a": NaN}', "[Infinity]", "\ud800", "\x00", "\u0664\u0665", "²", "", " ",
    "```", "``````", "```json```",
    '{"name": null}', '{"name": "f", "arguments": null}', '{"function": []}', '[{"function": 1}, null, []]',
    '{"name": "f", "arguments": "' + "[" * 3_000 + '"}', '{"name": "f", "arguments": "{"}',
    '{"name": "light", "arguments": {"on": ' + "[" * 600 + "]" * 600 + "}}",
    "(" * 1000, "\\", "A" * 100_000, ("1," * 50_000), "the " * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("grader", GRADERS)
@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_and_nothing_else(grader, completion):
    grade = make_grader(grader, {"pattern": "[xyz]"} if grader == "regex" else {}, "")
    expected = {"choice": "Q", "json": '{"on": 1}', "number": "77", "tool_call": [CALL]}.get(grader, "zebra")
    assert grade(completion, example(expected)) == 0
    if grader == "tool_call":
        assert grade(completion, example("x", ground_truth=TRUTH)) == 0


def quality(completion: str, example: Example, strict: bool = False) -> float:
    """A user's grader; ``python:test_graders:quality``."""
    return {"good": 1, "fair": 0.0 if strict else 0.5}.get(completion, 2)


def failing(completion: str, example: Example) -> float:
    """A user's grader that trips over what a model may write; ``python:test_graders:failing``."""
    return float(json.loads(completion)["score"])


def test_a_python_grader_that_fails_is_named_with_the_row():
    grade = make_grader("python:test_graders:failing", {}, "")
    assert grade('{"score": 1}', example("x")) == 1
    for answer in ("not json", "[1]", "{}"):
        with pytest.raises(InputError, match=r"t:1: the grader 'python:test_graders:failing' failed on an answer"):
            grade(answer, example("x"))


def test_a_text_beside_the_demonstrated_calls_is_no_call():
    """The usual form of an agent's turn: it says what it does, and calls."""
    calls = [{"type": "function", "function": {"name": "light", "arguments": '{"on": true}'}}]
    row = example("x")
    row = replace(row, demonstration={"role": "assistant", "content": "Let me see [1].", "tool_calls": calls})
    grade = make_grader("tool_call", {}, "")
    assert grade('{"name": "light", "arguments": {"on": true}}', row) == 1
    assert grade("I cannot know.", row) == 0
    assert grade(expected_text(row), row) == 1


def test_python_graders():
    grade = make_grader("python:test_graders:quality", {}, "")
    assert grade("good", example("x")) == 1.0 and grade("fair", example("x")) == 0.5
    assert make_grader("python:test_graders:quality", {"strict": True}, "")("fair", example("x")) == 0
    with pytest.raises(InputError, match=r"t:1: .*gave 2\.0, expected a score from 0 to 1"):
        grade("bad", example("x"))
    with pytest.raises(InputError, match="must be true or false"):
        make_grader("python:test_graders:quality", {"strict": "yes"}, "skill.toml")
    with pytest.raises(InputError, match=r"skill\.toml: .*has no option 'slow'; it has: strict"):
        make_grader("python:test_graders:quality", {"slow": True}, "skill.toml")


def test_rows_that_cannot_be_graded_raise_in_words():
    with pytest.raises(ValueError, match="needs a pattern"):
        make_grader("regex", {}, "")("a", example("a"))
    with pytest.raises(ValueError, match="ground_truth"):
        make_grader("tool_call", {}, "")("a", example("a", ground_truth="f()"))
