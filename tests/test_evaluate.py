"""Greedy answers, graded: accuracy, interval, and what is kept of each item."""

from dataclasses import replace

import pytest

from fakes import ScriptedEngine, copying_model, example, loaded, renderer
from perdure.evaluate import evaluate, score_prompts
from perdure.rollout.local import LocalEngine
from perdure.stats import clustered_interval, wilson_interval
from perdure.templates import parse_template
from perdure.types import InputError

ROWS = [example("cat", "red"), example("dog", "blue"), example("cow", "green"), example("hen", "grey")]
ANSWERS = {"cat": "red", "dog": "red", "cow": "green or so", "hen": "grey"}


def lenient(completion: str, row) -> float:
    """Half a point for an answer that begins well."""
    right = row.demonstration["content"]
    return 1.0 if completion == right else 0.5 * completion.startswith(right)


def test_accuracy_counts_full_scores_only():
    engine = ScriptedEngine(ANSWERS)
    score = evaluate(engine, renderer(), "toy", ROWS, lenient, 8)
    assert score.skill == "toy" and score.n == 4
    assert score.accuracy == 0.5  # cat, hen
    assert score.mean_score == 0.625  # (1 + 0 + 0.5 + 1) / 4
    assert (score.low, score.high) == wilson_interval(2, 4)


def test_the_turns_of_a_conversation_are_no_independent_items():
    rows = [replace(row, conversation=talk) for row, talk in zip(ROWS, ("first", "first", "second", ""), strict=True)]
    score = evaluate(ScriptedEngine(ANSWERS), renderer(), "toy", rows, lenient, 8)
    assert (score.low, score.high) == clustered_interval([True, False, False, True], ["a", "a", "b", "c"])
    assert score.high - score.low > wilson_interval(2, 4)[1] - wilson_interval(2, 4)[0]


def test_items_in_order_with_what_people_read():
    score = evaluate(ScriptedEngine(ANSWERS), renderer(), "toy", ROWS, lenient, 8)
    assert [item.id for item in score.items] == ["cat", "dog", "cow", "hen"]
    assert [item.score for item in score.items] == [1.0, 0.0, 0.5, 1.0]
    third = score.items[2]
    assert (third.prompt, third.expected, third.completion) == ("cow", "green", "green or so")
    assert third.tokens == len(" or so") + 2  # one token for the word, one a byte, one that ends the turn


def test_decoding_is_greedy_without_the_demonstration():
    engine = ScriptedEngine(ANSWERS)
    evaluate(engine, renderer(), "toy", ROWS, lenient, 8)
    ((prompts, params, _),) = engine.calls
    assert params.temperature == 0 and params.max_new_tokens == 8
    assert [p.token_ids for p in prompts] == [renderer().student_prompt(e).token_ids for e in ROWS]


def test_a_teachers_prompts_are_graded_alike():
    text, model = renderer(), loaded(copying_model())
    template = parse_template("turns:2")
    prompts = [text.teacher_prompt(e, template) for e in ROWS]
    by_copying = score_prompts(LocalEngine(model, model.model), text, "toy", prompts, lenient, 4)
    assert by_copying.accuracy == 1.0
    assert evaluate(LocalEngine(model, model.model), text, "toy", ROWS, lenient, 4).accuracy < 1.0


def test_progress_reaches_the_caller():
    calls = []
    evaluate(ScriptedEngine(ANSWERS), renderer(), "toy", ROWS, lenient, 8, lambda *numbers: calls.append(numbers))
    assert calls[-1][1] == 4


def test_prompts_that_end_in_a_tool_turn_or_hold_no_text():
    turns = ({"role": "user", "content": "cat"}, {"role": "tool", "content": ""})
    engine = ScriptedEngine(lambda prompt: "red")
    (item,) = evaluate(engine, renderer(), "toy", [replace(ROWS[0], messages=turns)], lenient, 4).items
    assert item.prompt == "" and item.score == 1.0


def test_nothing_to_evaluate_and_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="toy: nothing to evaluate"):
        evaluate(ScriptedEngine(ANSWERS), renderer(), "toy", [], lenient, 4)
    engine = ScriptedEngine(ANSWERS)
    with pytest.raises(InputError, match=r"t:9: .*exceed the window of 32"):
        evaluate(engine, renderer(32), "toy", [ROWS[0], example("x" * 30, "red", origin="t:9")], lenient, 8)
    assert engine.calls == []  # nothing is decoded before every row is known to fit
