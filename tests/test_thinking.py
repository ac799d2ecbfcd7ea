"""Models that think: what graders see, what carries loss, what is refused, and a whole stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes import (
    ScriptedEngine,
    copying_model,
    example,
    loaded,
    tiny_model,
    tiny_tokenizer,
    toy_examples,
    toy_skill,
)
from perdure.anchors import make_anchors
from perdure.batching import collate
from perdure.config import ContextConfig, PreflightConfig, RunConfig, ThinkingConfig, TrainConfig, with_settings
from perdure.contexts import Renderer
from perdure.curriculum import learn
from perdure.evaluate import evaluate
from perdure.files import read_jsonl
from perdure.models import save, working_copy
from perdure.preflight import preflight
from perdure.reporting import Silent
from perdure.rollout.base import SamplingParams
from perdure.rollout.local import LocalEngine
from perdure.rows import complete, corrected
from perdure.runlog import Clock, LoopState
from perdure.session import Session
from perdure.settings import parse
from perdure.skills.base import load_skill
from perdure.skills.graders import exact
from perdure.stages import create_workspace
from perdure.subject import Subject, candidates, check_marks, check_thinking
from perdure.templates import parse_template
from perdure.thinking import Marks, hesitations, marks_of
from perdure.train import train
from perdure.types import Completion, InputError
from perdure.update import make_optimizer, optimise
from test_train import lines, make_stage, settings, weights

# As Qwen3's: thinking of the last turn only, written out even where it is empty; switched off by an empty one up front.
TEMPLATE = """\
{%- for m in messages -%}
<|{{ m.role }}|>
{%- if m.role == "assistant" and loop.last -%}
<think>
{{ m.reasoning_content or "" }}
</think>

{% endif -%}
{{ m.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}
{%- if opened is defined and opened %}<think>
{% endif %}
{%- endif -%}
"""
ON = ThinkingConfig(enabled=True)
MARKS = Marks("<think>", "</think>", opened=False)


def tokenizer() -> Any:
    found = tiny_tokenizer()
    found.chat_template = TEMPLATE
    return found


def renderer(thinking: ThinkingConfig = ON, **context: Any) -> Renderer:
    found = tokenizer()
    return Renderer(found, (found.eos_token_id,), 1024, ContextConfig(**context), thinking)


def completion(text: str) -> Completion:
    ids = tuple(tokenizer()(text + "<|end|>", add_special_tokens=False)["input_ids"])
    return Completion(ids, (-1.0,) * len(ids), True)


def thought(question: str, thinking: str, answer: str) -> Any:
    row = example(question, answer)
    assert row.demonstration is not None
    return replace(row, demonstration=row.demonstration | {"reasoning_content": thinking})


# Thinking and answer


@pytest.mark.parametrize(
    ("text", "opened", "parts"),
    [
        ("<think>\nsums\n</think>\n\n42", False, ("sums", "42")),
        ("sums\n</think>42", True, ("sums", "42")),
        ("<think>sums without end", False, ("sums without end", "")),
        ("sums without end", True, ("sums without end", "")),
        ("42", False, ("", "42")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
    ],
)
def test_a_completion_is_thinking_and_answer(text: str, opened: bool, parts: tuple[str, str]) -> None:
    assert replace(MARKS, opened=opened).split(text) == parts


def test_marks_know_whether_the_prompt_opens_the_thinking() -> None:
    assert marks_of(ThinkingConfig(), "<|assistant|>") is None
    for start, opened in (("<|assistant|>", False), ("<|assistant|><think>\n", True), ("<think>\n\n</think>", False)):
        found = marks_of(ON, start)
        assert found and found.opened == opened


@given(st.text("ab <", max_size=12), st.text("ab <", max_size=12), st.booleans(), st.booleans())
def test_thinking_and_answer_together_are_the_whole_completion(a: str, b: str, closed: bool, opened: bool) -> None:
    text = ("" if opened else "<think>") + a + ("</think>" + b if closed else "")
    ids, marks, coder = completion(text).token_ids, replace(MARKS, opened=opened), tokenizer()
    thinking, answer = (marks.region(coder, ids, part) for part in ("thinking", "answer"))
    assert thinking[0] == 0 and thinking[1] == answer[0] and answer[1] == len(ids)
    assert marks.region(coder, ids, "all") == (0, len(ids))
    assert coder.decode(ids[: thinking[1]]).endswith("</think>" if closed else "<|end|>")


def test_a_completion_that_does_not_think_is_all_answer() -> None:
    ids = completion("42").token_ids
    assert MARKS.region(tokenizer(), ids, "thinking") == (0, 0)
    assert MARKS.region(tokenizer(), ids, "answer") == (0, len(ids))


def test_words_of_hesitation_are_whole_words_in_any_case() -> None:
    assert hesitations("Wait, maybe not. Waiter! let me check: wait", ("wait", "maybe", "let me check")) == 4
    assert hesitations("Wait", ()) == 0


# Prompts


def test_each_role_has_its_own_switches() -> None:
    found = tokenizer()
    found.chat_template = "{{ effort | default('') }}" + TEMPLATE
    made = Renderer(found, (found.eos_token_id,), 1024, ContextConfig(teacher_switches={"effort": "high"}), ON)
    row, template = example("q", "a"), parse_template("inline_thinking")
    assert not found.decode(made.student_prompt(row).token_ids).startswith("high")
    assert found.decode(made.teacher_prompt(row, template).token_ids).startswith("high")


def test_roles_that_begin_the_answer_differently_are_refused() -> None:
    with pytest.raises(InputError, match=r"begins the student's answer with.*Give context.student_switches"):
        renderer(student_switches={"enable_thinking": False}, teacher_switches={"enable_thinking": True})
    both = {"enable_thinking": False}
    assert renderer(student_switches=both, teacher_switches=both).marks == MARKS


def test_a_switch_that_the_template_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match=r"context.teacher_switches: .* knows no 'enable_thinkin'"):
        renderer(teacher_switches={"enable_thinkin": True})


def test_the_teacher_sees_an_answer_without_the_empty_thinking_that_templates_write() -> None:
    made, template = renderer(), parse_template("inline_thinking")
    seen = made.tokenizer.decode(made.teacher_prompt(example("q", "forty-two"), template).token_ids)
    assert "forty-two" in seen and "including the thinking process" in seen and "<think>" not in seen
    full = made.tokenizer.decode(made.teacher_prompt(thought("q", "six by seven", "42"), template).token_ids)
    assert "<think>\nsix by seven\n</think>" in full


@pytest.mark.parametrize("thinking", ["", "six by seven"])
def test_a_template_that_opens_the_thinking_by_itself_gets_it_closed(thinking: str) -> None:
    found = tiny_tokenizer()
    found.chat_template = str(found.chat_template).replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    made = Renderer(found, (found.eos_token_id,), 1024, None, ON)
    row = thought("q", thinking, "42")
    assert made.marks and made.marks.opened
    assert made.text(made.demonstration(row)) == f"{thinking}\n</think>\n\n42"
    assert made.answer(made.demonstration(row)) == "42"
    check_thinking(made, [row], TrainConfig(warm_start_steps=0))


def test_auto_asks_for_the_thinking_where_there_is_some() -> None:
    names = [t.name for t in candidates(ContextConfig(), [example("q", "a")], thinks=True)]
    assert names == ["inline_thinking", "turns:1", "turns:2", "turns:4"]


def test_a_grader_sees_the_answer_alone_and_an_unfinished_thought_is_wrong() -> None:
    engine = ScriptedEngine({"a": "<think>is it 41?</think>42", "b": "<think>42", "c": "42"})
    engine.tokenizer = tokenizer()
    found = evaluate(engine, renderer(), "s", [example(q, "42") for q in "abc"], exact.grade, 64)
    assert [item.score for item in found.items] == [1, 0, 1]
    assert found.items[0].completion == "<think>is it 41?</think>42"


# Loss


def test_loss_over_thinking_and_over_the_answer_add_up_to_loss_over_all(tmp_path: Path) -> None:
    row, answer = example("q", "red"), completion("<think>big cat</think>red")
    sums = {}
    for part in ("all", "thinking", "answer"):
        made = renderer(ThinkingConfig(enabled=True, loss=part))
        stage = replace(make_stage(tmp_path / part, anchors=False, kind=None), renderer=made)
        rollout = replace(made.rollout(row, answer, None), weight=0.0, label_weight=1.0)
        batches = [collate([rollout], role, 0, skip_first_tokens=1) for role in ("student", "teacher")]
        assert torch.equal(batches[0].targets_N, batches[1].targets_N)
        config = settings(method="sft", anchor_share=0.0, skip_first_tokens=1)
        found = optimise(stage, config, make_optimizer(stage, config), [rollout], None, Clock(), LoopState())
        sums[part] = (found["loss_tokens"], found["loss"] * found["loss_tokens"])
        assert found["loss_tokens"] == len(batches[0].targets_N) > 0
    assert sums["all"][0] == sums["thinking"][0] + sums["answer"][0] == len(answer.token_ids) - 1
    assert sums["all"][1] == pytest.approx(sums["thinking"][1] + sums["answer"][1], rel=1e-5)


def test_rows_that_hold_earlier_skills_carry_loss_everywhere() -> None:
    made = renderer(ThinkingConfig(enabled=True, loss="answer"))
    assert made.rollout(example("q", None), completion("<think>a</think>b"), None).region is None


def test_a_demonstration_without_thinking_corrects_no_sample_and_mixes_into_its_own_tokens(tmp_path: Path) -> None:
    stage = replace(make_stage(tmp_path, anchors=False, kind=None), renderer=renderer())
    config = settings(demonstration_weight=0.25)
    for thinking, labels in (("a cat", 0.25), ("", 0.0)):
        row = thought("q", thinking, "red")
        own = complete(stage, config, row)
        assert own.labels == own.completion.token_ids
        sampled = stage.renderer.rollout(row, completion("<think>a dog</think>red"), None)
        assert corrected(stage, config, sampled).label_weight == labels
        # Nor where the sample does not think, either: that is what must not be learned.
        same = stage.renderer.rollout(row, completion(stage.renderer.text(own.completion)), None)
        assert same.completion.token_ids == own.completion.token_ids
        assert corrected(stage, config, same).label_weight == labels


def test_an_answer_without_thinking_is_held_but_not_rehearsed(tmp_path: Path) -> None:
    skill = load_skill(toy_skill(tmp_path / "skill"))
    rows = [thought(f"q{place}", "a cat" if place % 2 else "", "red") for place in range(6)]
    engine, student = ScriptedEngine(lambda prompt: "<think>a dog</think>red"), loaded(tiny_model())
    engine.tokenizer = tokenizer()
    session = Session(student, student.model, engine, renderer(), torch.float32)
    for marks, most in ((ON, 3), (ThinkingConfig(), 6)):
        found = make_anchors(replace(session, renderer=renderer(marks)), [replace(skill, train=tuple(rows))],
                             TrainConfig(anchor_earlier_share=1.0), 0).earlier  # fmt: skip
        rehearsed = [row for row in found if row.label_weight]
        assert len(found) == 6 and len(rehearsed) == most
        for row in found:
            said = renderer().text(row.completion)
            assert ("dog" in said) is (row not in rehearsed) and (marks is not ON or row.weight == 1)


# What is refused


@pytest.mark.parametrize(
    ("row", "config", "part", "problem"),
    [
        (example("q", "42"), {}, "all", "would unlearn to think"),
        (example("q", "42"), {"method": "sft"}, "all", "answer without thinking \\(1 of 1 rows\\)"),
        (example("q", "42"), {"method": "rewrite_sft"}, "thinking", "would unlearn to think"),
        (example("q", "42"), {"warm_start_steps": 0, "on_policy_share": 0.5}, "all", "would unlearn to think"),
        (example("q", "<think>a</think>42"), {}, "all", "give the thinking as 'reasoning_content'"),
    ],
)
def test_demonstrations_that_would_unteach_thinking(row: Any, config: dict[str, Any], part: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check_thinking(renderer(ThinkingConfig(enabled=True, loss=part)), [row], TrainConfig(**config))


@pytest.mark.parametrize(
    ("row", "config", "part"),
    [
        (example("q", "42"), {"warm_start_steps": 0}, "all"),
        (example("q", "42"), {"method": "offline"}, "all"),
        (example("q", "42"), {"method": "sft"}, "answer"),
        (thought("q", "six by seven", "42"), {"method": "sft"}, "all"),
    ],
)
def test_demonstrations_that_leave_thinking_alone(row: Any, config: dict[str, Any], part: Any) -> None:
    check_thinking(renderer(ThinkingConfig(enabled=True, loss=part)), [row], TrainConfig(**config))


def test_a_template_that_drops_the_thinking_is_refused() -> None:
    found = tiny_tokenizer()
    made = Renderer(found, (found.eos_token_id,), 1024, None, ON)
    with pytest.raises(InputError, match="does not render 'reasoning_content'"):
        check_thinking(made, [thought("q", "six by seven", "42")], TrainConfig(warm_start_steps=0))


@pytest.mark.parametrize("mark", ["<think>", "</think>"])
def test_an_answer_with_a_mark_in_it_is_refused(mark: str) -> None:
    """A template that opens the thinking itself leaves the closing mark alone in what a server returns."""
    rows = [example("q", f"six by seven{mark} 42")]
    with pytest.raises(InputError, match=rf"the answer holds {mark}; give the thinking as 'reasoning_content'"):
        check_marks(renderer(ON), rows)
    check_marks(renderer(ThinkingConfig()), rows)


def test_settings_of_thinking_without_thinking_are_refused() -> None:
    with pytest.raises(InputError, match="thinking: loss: has an effect only with enabled = true"):
        parse(RunConfig, {"thinking": {"loss": "answer"}}, where="x")
    config = with_settings(RunConfig(), ["thinking.enabled=true", "context.student_switches.enable_thinking=true"])
    assert config.context.student_switches == {"enable_thinking": True}


# Length of answers


class Growing(ScriptedEngine):
    """Answers that become longer with every call."""

    def generate(self, prompts: Any, params: SamplingParams, *rest: Any, **more: Any) -> Any:
        self.answers = lambda prompt: "red " * (len(self.calls) + 1)
        return super().generate(prompts, params, *rest, **more)


def test_a_stage_whose_answers_grow_too_long_ends_with_the_last_weights_within_the_limit(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, engine=Growing({}), anchors=False)
    begin = weights(stage)
    state = train(stage, settings(steps=8, validate_every=2, max_length_change=0.3, warm_start_steps=8, patience=99))
    validated = [line for line in lines(stage) if "validation_accuracy" in line]
    assert [line["step"] for line in validated] == [0, 2] and validated[-1]["strayed"]
    assert (state.step, state.best_step, state.strayed) == (2, 0, True)
    assert all(torch.equal(begin[name], weight) for name, weight in weights(stage).items())


def test_a_limit_without_rows_to_measure_it_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length_change is measured on validation rows"):
        TrainConfig(max_length_change=0.3, validation_share=0.0)
    few = make_stage(tmp_path, anchors=False)
    few = replace(few, examples=(*few.examples, *few.validation), validation=())
    with pytest.raises(InputError, match=f"{len(few.examples)} training rows leave none"):
        train(few, settings(max_length_change=0.3))


def test_without_a_limit_nothing_is_measured_before_the_first_step(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, engine=Growing({}), anchors=False)
    train(stage, settings(steps=2, validate_every=2, warm_start_steps=2))
    (validated,) = [line for line in lines(stage) if "validation_accuracy" in line]
    assert validated["step"] == 2 and "answer_tokens" not in validated


def test_the_preflight_measures_whole_demonstrations_whatever_part_carries_loss(tmp_path: Path) -> None:
    """Answers alone, loss on the thinking, and a template that writes no empty thinking: no token carries loss."""
    found = tokenizer()
    found.chat_template = TEMPLATE.replace("and loop.last", "and loop.last and m.reasoning_content")
    made = Renderer(found, (found.eos_token_id,), 1024, None, ThinkingConfig(enabled=True, loss="thinking"))
    rows = toy_examples(tmp_path)
    assert made.rollout(rows[0], made.demonstration(rows[0]), None).region == (0, 0)
    student = loaded(copying_model())
    working = working_copy(student.model, torch.float32)
    subject = Subject("toy", rows, exact.grade, 8, student, working, LocalEngine(student, working), made, torch.float32)
    context, few = ContextConfig(template="turns:1"), PreflightConfig(rows=4)
    result = preflight(subject, context, few, settings(warm_start_steps=0), 0)
    assert 0 < result.demonstration_probability < 1


def test_replay_leaves_out_answers_without_thinking(tmp_path: Path) -> None:
    """As labels they would teach a model that thinks not to."""
    skill = load_skill(toy_skill(tmp_path / "skill"))
    student = loaded(copying_model())
    working = working_copy(student.model, torch.float32)
    session = Session(student, working, LocalEngine(student, working), renderer(), torch.float32)
    config = settings(method="sft_replay", anchor_earlier_share=1.0)
    assert make_anchors(session, [skill], config, 0).earlier == ()


# A stage


def test_a_thinking_model_learns_from_answers_alone(tmp_path: Path) -> None:
    made = replace(loaded(copying_model()), tokenizer=tokenizer())
    save(made, tmp_path / "model")
    config = parse(RunConfig, {
        "model": {"source": str(tmp_path / "model"), "compute_dtype": "float32"},
        "thinking": {"enabled": True, "hesitations": ["red", "blue"]},
        "context": {"template": "turns:2"},
        "train": {"steps": 6, "batch_size": 8, "warm_start_steps": 0, "learning_rate": 3e-3, "validation_share": 0.2,
                  "validate_every": 6},
        "preflight": {"rows": 8, "forecast": False},
        "probe": {"tasks": []},
        "gate": {"enforce": False},
    }, where="test")  # fmt: skip
    said: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    workspace = create_workspace(tmp_path / "bot", config)
    (outcome,) = learn(workspace, [toy_skill(tmp_path / "colours", max_new_tokens=32)], config, Noting(), force=True)
    metrics = read_jsonl(workspace.run_folder(outcome.stage) / "metrics.jsonl")
    assert [line["step"] for line in metrics if "hesitations" in line] == [0, 6]
    assert {line["phase"] for line in metrics if "loss" in line} == {"on_policy"}
    assert any("words of hesitation in one" in text for text in said)
    check = json.loads((workspace.run_folder(outcome.stage) / "preflight.json").read_text())
    assert check["teacher_accuracy"] > check["student_accuracy"]
