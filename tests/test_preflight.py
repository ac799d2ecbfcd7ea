"""The check before training: windows, the choice of the template, the advice; a whole run on a model that copies."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes import ScriptedEngine, copying_model, example, loaded, renderer, toy_examples
from perdure.config import ContextConfig, PreflightConfig, TrainConfig
from perdure.models import working_copy
from perdure.preflight import Preflight, TemplateScore, _judge, choose_template, is_decided, preflight
from perdure.rollout.local import LocalEngine
from perdure.stats import wilson_interval
from perdure.subject import Subject, candidates, check_skipped, check_windows
from perdure.templates import parse_template
from perdure.types import InputError

CONFIG = PreflightConfig(rows=20, min_gap=0.1, min_teacher_accuracy=0.3)


def graded_exactly(completion, row) -> float:
    return float(completion == row.demonstration["content"])


def score(name: str, accuracy: float, tokens: float, half: float = 0.1, probability: float = 0.9, leak: float = 0.0):
    return TemplateScore(name, accuracy, accuracy - half, accuracy + half, tokens, 0.5, probability, leak)


def subject(examples, engine=None, model=None, most=4, window=1024) -> Subject:
    loaded_model = loaded(model, window)
    working = working_copy(loaded_model.model, torch.float32)
    engine = engine or LocalEngine(loaded_model, working)
    return Subject("toy", tuple(examples), graded_exactly, most, loaded_model, working, engine, renderer(window),
                   torch.float32)  # fmt: skip


# The choice of the template


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([score("a", 0.9, 100), score("b", 0.5, 10)], "a"),
        ([score("a", 0.9, 100), score("b", 0.9, 10)], "b"),  # as good and shorter
        # The interval's half width is 0.1, so the standard error is 0.1 / 1.96 = 0.051.
        ([score("a", 0.9, 100), score("b", 0.86, 10)], "b"),
        ([score("a", 0.9, 100), score("b", 0.84, 10)], "a"),
        ([score("a", 0.9, 100), score("b", 0.86, 50), score("c", 0.855, 40), score("d", 0.2, 1)], "c"),
        ([score("a", 0.9, 100, half=0.0), score("b", 0.899, 10)], "a"),  # the error of the best counts
        ([score("a", 0.0, 7, half=0.0)], "a"),
    ],
)
def test_the_shortest_template_within_one_standard_error_of_the_best(scores, chosen):
    assert choose_template(scores).template == chosen
    assert choose_template(scores[::-1]).template == chosen


@given(rights=st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_no_template_after_the_first_that_makes_no_mistake_could_be_chosen(rights):
    scores = []
    for place, right in enumerate(rights):
        low, high = wilson_interval(right, 20)
        scores.append(replace(score(f"t{place}", right / 20, 10.0 * place), low=low, high=high))
    tried = next((scores[: n + 1] for n in range(len(scores)) if is_decided(scores[: n + 1])), scores)
    assert choose_template(tried) == choose_template(scores)


def test_auto_measures_document_where_every_row_has_one():
    context, plain = ContextConfig(candidates=("inline", "turns:2")), example("q", "a")
    with_document = replace(plain, document="read")
    names = [t.name for t in candidates(context, [with_document] * 2)]
    assert names == ["inline", "turns:2", "document", "document_turns:2"]
    assert [t.name for t in candidates(context, [with_document, plain])] == ["inline", "turns:2"]
    assert [t.name for t in candidates(ContextConfig(template="turns:3"), [with_document])] == ["turns:3"]
    twice = ContextConfig(candidates=("document", "inline", "document"))
    assert [t.name for t in candidates(twice, [with_document])] == ["document", "inline", "document_turns:2"]
    with pytest.raises(InputError, match="unknown context template"):
        candidates(ContextConfig(template="turns:0"), [plain])


# The advice


@pytest.mark.parametrize(
    ("student", "best", "ready", "words"),
    [
        (0.1, score("t", 0.9, 10), True, ["ready to learn"]),
        (0.1, score("t", 0.29, 10), False, ["nothing to teach"]),
        (0.5, score("t", 0.6, 10), True, ["ready to learn"]),  # the gap is 0.09999999999999998 as a float
        (0.85, score("t", 0.9, 10), False, ["adds only +5%"]),
        (0.9, score("t", 0.8, 10), False, ["adds only -10%"]),
        (0.1, score("t", 0.9, 10, leak=0.06), True, ["6% of the teacher's answers talk about the example"]),
        (0.1, score("t", 0.9, 10, probability=0.4), True, ["only 40% on average"]),
        (0.1, score("t", 0.2, 10, probability=0.1, leak=0.5), False, ["nothing to teach", "50% of the teacher's"]),
    ],
)
def test_advice(student, best, ready, words):
    found, advice = _judge(CONFIG, student, best)
    assert found is ready and len(advice) == len(words)
    assert all(word in line for word, line in zip(words, advice, strict=True))


# Windows


def test_window_lengths_leave_room_for_the_longer_of_answer_and_demonstration():
    rows = [example("cat", "red"), example("dog dog", "blue", origin="toy.jsonl:2")]
    text = renderer()
    window, fitting = check_windows(subject(rows, most=9), [parse_template("turns:1"), parse_template("turns:2")])
    templates = {t.name: t for t in fitting}
    assert window["longest_student"] == max(len(text.student_prompt(e).token_ids) for e in rows) + 9
    for name in ("turns:1", "turns:2"):
        longest = max(len(text.teacher_prompt(e, templates[name]).token_ids) for e in rows) + 9
        assert window["longest_teacher"][name] == longest
    assert window["limit"] == 1024 and window["too_long"] == [] and window["cannot_render"] == {}


def test_a_template_that_is_too_long_is_left_out():
    rows = [example("cat", "red"), example("dog " * 20, "blue")]
    names = ("turns:4", "turns:1", "inline")
    window, fitting = check_windows(subject(rows, window=120), [parse_template(name) for name in names])
    assert [t.name for t in fitting] == ["turns:1"] and window["too_long"] == ["turns:4", "inline"]


def test_every_row_that_does_not_fit_is_named():
    rows = [example("cat" * 30, "red", origin="t:1"), example("cat", "red", origin="t:2"),
            example("x" * 60, "red", origin="t:3"), example("x" * 61, "x" * 5, origin="t:4")]  # fmt: skip
    with pytest.raises(InputError) as caught:
        check_windows(subject(rows, window=50), [parse_template("turns:1")])
    lines = str(caught.value).split("\n")
    assert [line[:5] for line in lines[1:]] == ["  t:1", "  t:3", "  t:4", "  t:4"]
    assert "the window holds 50" in lines[1] and "the demonstration has 6 tokens, max_new_tokens is 4" in lines[4]


def test_tokens_are_not_skipped_beyond_every_answer():
    """Else a stage would train on its anchors alone. Who reads the document does not learn the answer's tokens."""
    rows = [example("cat", "red"), example("dog", "blue")]
    longest = max(len(renderer().demonstration(e).token_ids) for e in rows)
    check_skipped(renderer(), rows, TrainConfig(skip_first_tokens=longest - 1))
    with pytest.raises(InputError, match=f"the longest demonstration has {longest} tokens"):
        check_skipped(renderer(), rows, TrainConfig(skip_first_tokens=longest))
    check_skipped(renderer(), rows, TrainConfig(method="cpt", skip_first_tokens=longest))


def test_test_rows_that_no_answer_can_reach_are_named_as_well():
    tests = (example("cat", "red", origin="test:1"), example("cat", "x" * 5, origin="test:2"),
             example("x" * 60, "red", origin="test:3"))  # fmt: skip
    checked = replace(subject([example("cat", "red")], window=50), tests=tests)
    with pytest.raises(InputError) as caught:
        check_windows(checked, [parse_template("turns:1")])
    assert [line[:8] for line in str(caught.value).split("\n")[1:]] == ["  test:3", "  test:2"]


def test_no_template_left_gives_a_reason_for_each():
    ends_in_tool = replace(example("cat", "red"), messages=({"role": "user", "content": "cat"},
                                                            {"role": "tool", "content": "x"}))  # fmt: skip
    window, fitting = check_windows(subject([ends_in_tool]), [parse_template("inline"), parse_template("turns:1")])
    assert [t.name for t in fitting] == ["turns:1"] and "tool" in window["cannot_render"]["inline"]
    with pytest.raises(InputError, match="no context template fits") as caught:
        check_windows(subject([ends_in_tool], window=20), [parse_template("inline"), parse_template("turns:9")])
    lines = str(caught.value).split("\n")
    assert lines[1].startswith("  inline: toy.jsonl:1") and lines[2].startswith("  turns:9: takes ")


# The whole of it


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return toy_examples(tmp_path_factory.mktemp("preflight"))


@pytest.fixture(scope="module")
def copier(examples) -> Subject:
    return subject(examples, model=copying_model())


def run(copier, context=None, train=None, progress=None, seed=0) -> Preflight:
    context = context or ContextConfig(candidates=("turns:20", "turns:12", "inline"))
    return preflight(copier, context, CONFIG, train or TrainConfig(), seed, progress)


def test_a_model_that_copies_has_a_teacher_gap_by_turns(copier, examples):
    calls = []
    found = run(copier, progress=lambda *numbers: calls.append(numbers))
    by_name = {s.template: s for s in found.templates}
    assert list(by_name) == ["inline", "turns:12"]  # the shortest first; nothing can be better than no mistake
    assert found.student_accuracy < 0.2 and found.teacher_accuracy > 0.8 and found.ready
    assert found.gap == found.teacher_accuracy - found.student_accuracy
    assert found.template.startswith("turns") and by_name["inline"].accuracy < 0.5
    assert by_name["inline"].tokens < by_name["turns:12"].tokens
    chosen = by_name[found.template]
    assert found.kl_teacher_student == chosen.kl > 0.1
    assert chosen.demonstration_probability > by_name["inline"].demonstration_probability
    assert found.identity_kl < 1e-6 and found.n == 20
    assert json.loads(json.dumps(found.to_json())) == found.to_json() | {
        "templates": [vars(s) for s in found.templates], "advice": list(found.advice)}  # fmt: skip
    # One decode of the student and one a template, 20 rows each; the longest was not tried.
    assert calls[-1][1:] == (60, 80) and {total for _, _, total in calls} == {80}
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_the_same_seed_measures_the_same_rows(copier, examples):
    few = PreflightConfig(rows=4)
    context = ContextConfig(template="turns:1")

    def measured(seed: int) -> tuple[list[str], Preflight]:
        engine = ScriptedEngine(lambda prompt: str(prompt.example.demonstration))
        found = preflight(replace(copier, engine=engine), context, few, TrainConfig(), seed)
        return [prompt.example.id for prompt in engine.calls[0][0]], replace(found, row_seconds={})

    assert measured(1) == measured(1) and measured(1)[0] != measured(2)[0] and len(measured(1)[0]) == 4


def test_answers_that_talk_about_the_example_are_counted(copier):
    engine = ScriptedEngine(lambda prompt: "red, as in the example above" if len(prompt.token_ids) > 12 else "red")
    found = run(replace(copier, engine=engine), ContextConfig(template="turns:2"))
    assert found.leak_share == 1.0 and found.teacher_accuracy == 0.0 and found.student_accuracy == pytest.approx(0.25)
    assert not found.ready


def test_teacher_and_student_of_different_weights_are_found(copier):
    other = copy.deepcopy(copier.working)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.05)
    engine = ScriptedEngine({})  # it is found before anything is decoded
    with pytest.raises(InputError, match="identity check failed"):
        run(replace(copier, working=other, engine=engine))
    with torch.no_grad():
        other.lm_head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="identity check failed"):
        run(replace(copier, working=other, engine=engine))


def test_only_the_measured_templates_have_to_fit():
    # A long prompt: "turns" holds it twice and is too long here, "inline" adds its own words and fits.
    rows = [example("x" * 200 + word, "red", origin=f"t:{word}") for word in ("cat", "dog", "cow", "hen")]
    found = subject(rows, ScriptedEngine(lambda prompt: "red"), window=380)
    result = preflight(found, ContextConfig(candidates=("inline", "turns:1")), CONFIG, TrainConfig(), 0)
    assert result.template == "inline" and result.window["too_long"] == ["turns:1"]
