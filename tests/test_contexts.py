"""What each role sees, and that the completion is the same tokens at aligned places under both."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fakes import END, example, renderer, tiny_tokenizer
from perdure.batching import collate, micro_batches
from perdure.config import ContextConfig
from perdure.contexts import Renderer
from perdure.packing import pack
from perdure.templates import names_the_example, parse_template
from perdure.types import Completion, Example, InputError

QUESTION, ANSWER = "say small cat", "red panda"
ASKED = "<|user|>say small cat<|end|><|assistant|>"
TOOLS: tuple[dict[str, Any], ...] = ({"type": "function", "function": {"name": "lamp", "parameters": {}}},)
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}],
}


def plain(**fields: Any) -> Example:
    return example(QUESTION, ANSWER, document="Cats are red.", metadata={"hint": "colour"}, **fields)


def agent() -> Example:
    """A system prompt, tools, an earlier exchange, a tool call and its result; the demonstration answers in text."""
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "light please"},
        CALL,
        {"role": "tool", "content": "done"},
    )
    return Example("agent", messages, {"role": "assistant", "content": "It is on."}, TOOLS, origin="agent.jsonl:7")


def text(ids: tuple[int, ...]) -> str:
    return tiny_tokenizer().decode(list(ids))


@pytest.fixture
def jinja_template(tmp_path: Path) -> str:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ document }} [{{ metadata.hint }}] {{ prompt }} => {{ demonstration }} ({{ messages|length }})")
    return f"jinja:{file}"


# Templates


def test_the_student_sees_the_prompt_and_nothing_else() -> None:
    assert text(renderer().student_prompt(plain()).token_ids) == "<|user|>say small cat<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "inline",
            "<|user|>\nsay small cat\n\nThis is an example for a response to the question:\nred panda\n\n"
            "Now answer with a response of your own.\n<|end|><|assistant|>",
        ),
        (
            "inline_thinking",
            "<|user|>\nsay small cat\n\nThis is an example for a response to the question:\nred panda\n\n"
            "Now answer with a response of your own, including the thinking process.\n<|end|><|assistant|>",
        ),
        ("turns:1", f"{ASKED}red panda<|end|>{ASKED}"),
        ("turns:3", f"{ASKED}red panda<|end|>{ASKED}red panda<|end|>{ASKED}red panda<|end|>{ASKED}"),
        (
            "document",
            "<|user|>Read this first:\nCats are red.\n\nsay small cat\n\nThis is an example for a response to the "
            "question:\nred panda\n\nNow answer with a response of your own.<|end|><|assistant|>",
        ),
        (
            "document_turns:2",
            f"<|user|>Read this first:\nCats are red.\n\nsay small cat<|end|><|assistant|>red panda<|end|>"
            f"{ASKED}red panda<|end|>{ASKED}",
        ),
    ],
)  # fmt: skip
def test_the_teacher_sees_the_demonstration(name: str, expected: str) -> None:
    assert text(renderer().teacher_prompt(plain(), parse_template(name)).token_ids) == expected


def test_a_jinja_file_gets_every_part(jinja_template: str) -> None:
    got = text(renderer().teacher_prompt(plain(), parse_template(jinja_template)).token_ids)
    assert got == "<|user|>Cats are red. [colour] say small cat => red panda (1)<|end|><|assistant|>"


def test_without_a_demonstration_the_teacher_sees_the_students_prompt() -> None:
    anchor = example(QUESTION, None)
    for name in ("inline", "turns:2", "document", "document_turns:1"):
        assert renderer().teacher_prompt(anchor, parse_template(name)) == renderer().student_prompt(anchor)


@pytest.mark.parametrize(
    "name", ["inlines", "turns", "turns:0", "turns:-1", "turns:100", "inline:2", "jinja", "jinja:", ""]
)
def test_unknown_templates_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match="unknown context template"):
        parse_template(name)


def test_broken_jinja_files_are_refused_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("fine\n{% if %}")
    with pytest.raises(InputError, match=r"bad\.jinja:2"):
        parse_template(f"jinja:{tmp_path}/bad.jinja")
    with pytest.raises(InputError, match=r"gone\.jinja"):
        parse_template(f"jinja:{tmp_path}/gone.jinja")


@pytest.mark.parametrize(
    "body", ["{{ nonsense }}", "{{ 1 + prompt }}", "{{ messages.append(1) }}", "{{ ''.__class__.mro() }}"]
)
def test_a_template_that_cannot_be_filled_names_the_row(tmp_path: Path, body: str) -> None:
    """Unknown names, type errors, and what the sandbox forbids."""
    (tmp_path / "t.jinja").write_text(body)
    with pytest.raises(InputError, match=r"toy\.jsonl:1"):
        renderer().teacher_prompt(plain(), parse_template(f"jinja:{tmp_path}/t.jinja"))


# Conversations pass through unflattened


def test_an_agents_conversation_stays_a_conversation() -> None:
    opening = '<|system|>Tools: [{"type": "function", "function": {"name": "lamp", "parameters": {}}}]<|end|>'
    system = "<|system|>Be brief.<|end|>"
    turns = ('<|user|>hello<|end|><|assistant|>hi<|end|><|user|>light please<|end|><|assistant|><tool_call>{"name": '
             '"lamp", "arguments": {"on": true}}</tool_call><|end|><|tool|>done<|end|>')  # fmt: skip
    student = text(renderer().student_prompt(agent()).token_ids)
    teacher = text(renderer().teacher_prompt(agent(), parse_template("turns:1")).token_ids)
    assert student == f"{opening}{system}{turns}<|assistant|>"
    assert teacher == f"{opening}{system}{turns}<|assistant|>It is on.<|end|>{turns}<|assistant|>"


def test_a_demonstrated_tool_call_is_rendered_as_the_model_writes_it() -> None:
    row = Example("t", ({"role": "user", "content": "light"},), CALL, TOOLS, origin="t.jsonl:1")
    written = '<tool_call>{"name": "lamp", "arguments": {"on": true}}</tool_call>'
    assert text(renderer().demonstration(row).token_ids) == written + END
    assert renderer().demonstration_text(row) == written
    assert written in text(renderer().teacher_prompt(row, parse_template("inline")).token_ids)


def test_arguments_in_the_api_form_are_not_quoted_twice() -> None:
    """A call's arguments may come as JSON text; the model is to write an object either way. The row is not changed."""
    call = {"type": "function", "function": {"name": "lamp", "arguments": '{"on": true}'}}
    for calls in ([call], [call["function"]]):
        row = Example("t", ({"role": "user", "content": "light"},), {**CALL, "tool_calls": calls}, TOOLS)
        assert (
            renderer().demonstration_text(row) == '<tool_call>{"name": "lamp", "arguments": {"on": true}}</tool_call>'
        )
    assert call["function"] == {"name": "lamp", "arguments": '{"on": true}'}
    odd = {"name": "lamp", "arguments": "on"}
    row = Example("t", ({"role": "user", "content": "light"},), {**CALL, "tool_calls": [odd]}, TOOLS)
    assert renderer().demonstration_text(row) == '<tool_call>{"name": "lamp", "arguments": "on"}</tool_call>'


def test_templates_that_write_into_the_last_user_turn_need_one() -> None:
    for name in ("inline", "document"):
        row = Example(**{**vars(agent()), "document": "x"})
        with pytest.raises(InputError, match=r"agent\.jsonl:7.*'tool' turn; use turns:N"):
            renderer().teacher_prompt(row, parse_template(name))
    with pytest.raises(InputError, match=r'toy\.jsonl:1: the template "document" needs'):
        renderer().teacher_prompt(example(QUESTION, ANSWER), parse_template("document"))


# The demonstration as a completion


def test_a_demonstration_ends_with_the_closing_token() -> None:
    completion = renderer().demonstration(plain())
    assert completion == Completion(tuple(tiny_tokenizer()("red panda<|end|>")["input_ids"]), (), finished=True)
    assert renderer().text(completion) == ANSWER


def test_text_round_trips_whatever_is_in_it() -> None:
    for answer in (
        " leading and trailing ",
        "żółć 你好 🙂",
        "a .\n\n b , c",
        '{"a": [1, 2]}',
        "<|user|> stays visible",
    ):
        assert renderer().demonstration_text(example("q", answer)) == answer


def test_without_a_closing_token_in_the_template_the_first_end_id_closes() -> None:
    tokenizer = tiny_tokenizer()
    turns, opening = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}", "a:"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}" + opening + "{% endif %}"
    end, other = tokenizer.eos_token_id, tokenizer.pad_token_id
    completion = Renderer(tokenizer, (other, end), 100).demonstration(plain())
    assert completion.token_ids[-1] == other and text(completion.token_ids[:-1]) == "red panda\n"


def test_a_closing_token_inside_the_demonstration_is_an_error() -> None:
    """Cut there silently, the row would teach half its answer."""
    with pytest.raises(InputError, match=r"toy\.jsonl:1.*closing token '<\|end\|>'"):
        renderer().demonstration(example("q", "one<|end|>two"))


def test_tokens_are_those_of_the_whole_text() -> None:
    """Some tokenizers put a space before every text: encoded alone, the completion would begin with one."""

    class Spacing:
        """A tokenizer of characters that begins each text with a space."""

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [32, *map(ord, text)]}

        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(map(chr, ids))

        def get_chat_template(self, tools: Any) -> str:
            return ""

        def apply_chat_template(self, messages, tools, **options: Any) -> str:
            return "".join(f"{m['content']}#" for m in messages)

    completion = Renderer(Spacing(), (ord("#"),), 100).demonstration(example("q", "yes"))
    assert "".join(map(chr, completion.token_ids)) == "yes#"


def test_a_template_that_prints_the_date_prints_the_settings_one() -> None:
    """Else a stage that is resumed tomorrow would have other prompts."""
    tokenizer = tiny_tokenizer()
    today = "{% if strftime_now is defined %}{{ strftime_now('%-d %B %Y, %Y-%m-%d') }}{% endif %}\n"
    tokenizer.chat_template = f"\n{today}{tokenizer.chat_template}"
    made = [Renderer(tokenizer, (1,), 200, context) for context in (None, ContextConfig(date=date(2031, 12, 5)))]
    first, second = (tokenizer.decode(each.student_prompt(plain()).token_ids) for each in made)
    assert first.startswith("\n1 January 2026, 2026-01-01") and second == first.replace(
        "1 January 2026, 2026-01-01", "5 December 2031, 2031-12-05"
    )


def test_a_template_that_drops_the_demonstration_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match=r"toy\.jsonl:1.*does not write the demonstration"):
        Renderer(tokenizer, (0,), 100).demonstration(plain())
    tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
    with pytest.raises(InputError, match=r"toy\.jsonl:1.*no tools here"):
        Renderer(tokenizer, (0,), 100).student_prompt(plain())


def test_a_template_that_drops_tools_or_calls_is_an_error() -> None:
    """What is left would teach an empty answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    renderer = Renderer(tokenizer, (0,), 100)
    called = Example("c", ({"role": "user", "content": "light"},), {**CALL, "content": ""}, origin="toy.jsonl:1")
    spoken = replace(called, demonstration={**CALL, "content": "Let me see."})
    without = {key: value for key, value in CALL.items() if key != "content"}
    for row in (called, spoken, replace(called, demonstration=without)):
        with pytest.raises(InputError, match=r"toy\.jsonl:1.*does not write 'tool_calls'"):
            renderer.demonstration(row)
    with pytest.raises(InputError, match=r"agent\.jsonl:7.*does not write 'tools' and 'tool_calls'"):
        renderer.demonstration(agent())


# Windows


def test_a_row_that_does_not_fit_is_an_error_with_its_place() -> None:
    row, template = plain(origin="toy.jsonl:12"), parse_template("turns:2")
    completion = renderer().demonstration(row)
    teacher = len(renderer().teacher_prompt(row, template).token_ids) + len(completion.token_ids)
    assert renderer(window=teacher).rollout(row, completion, template).completion == completion
    with pytest.raises(InputError, match=rf"toy\.jsonl:12: the teacher's prompt.*window of {teacher - 1} tokens"):
        renderer(window=teacher - 1).rollout(row, completion, template)
    with pytest.raises(InputError, match=r"the student's prompt"):
        renderer(window=5).rollout(row, completion, template)


def test_without_a_template_only_the_students_prompt_must_fit() -> None:
    row = plain()
    completion = renderer().demonstration(row)
    window = len(renderer().student_prompt(row).token_ids) + len(completion.token_ids)
    rollout = renderer(window).rollout(row, completion, None)
    assert rollout.teacher_prompt == rollout.student_prompt and rollout.has_demonstration


# Collating and alignment


@pytest.mark.parametrize("name", ["inline", "inline_thinking", "turns:1", "turns:4", "document", "jinja"])
def test_the_completion_is_aligned_under_both_prompts(name: str, jinja_template: str) -> None:
    template = parse_template(jinja_template if name == "jinja" else name)
    rows = [plain(), example("a longer question than that", "blue", document="d", metadata={"hint": "h"}),
            example("anchor", None)]  # fmt: skip
    rollouts = []
    for row in rows:
        completion = renderer().demonstration(row) if row.demonstration else Completion((5, 6, 7), (-1.0,) * 3, False)
        rollouts.append(renderer().rollout(row, completion, template))
    student, teacher = (collate(rollouts, role, pad_id=280) for role in ("student", "teacher"))
    wanted = [token for r in rollouts for token in r.completion.token_ids]
    for batch in (student, teacher):
        assert batch.targets_N.tolist() == wanted
        # The token after each loss position is the target.
        assert batch.input_ids_BT[batch.loss_rows_N, batch.loss_positions_N + 1].tolist() == wanted
    assert student.loss_rows_N.tolist() == teacher.loss_rows_N.tolist()
    for batch, prompts in (
        (student, [r.student_prompt for r in rollouts]),
        (teacher, [r.teacher_prompt for r in rollouts]),
    ):
        for index, prompt in enumerate(prompts):
            size = len(prompt.token_ids) + len(rollouts[index].completion.token_ids)
            assert batch.input_ids_BT[index, :size].tolist() == [
                *prompt.token_ids,
                *rollouts[index].completion.token_ids,
            ]
            assert batch.attention_mask_BT[index].tolist() == [1] * size + [0] * (batch.input_ids_BT.shape[1] - size)
            assert (batch.input_ids_BT[index, size:] == 280).all()
    assert ANSWER not in text(rollouts[0].student_prompt.token_ids) and ANSWER in text(
        rollouts[0].teacher_prompt.token_ids
    )
    assert student.demonstrated_N.tolist() == [True] * (len(wanted) - 3) + [False] * 3


def test_skipped_tokens_carry_no_loss_on_either_side() -> None:
    rollouts = [renderer().rollout(plain(), Completion(ids, (), True), parse_template("turns:1"))
                for ids in ((1, 2, 3, 4), (5, 6), ())]  # fmt: skip
    for role in ("student", "teacher"):
        batch = collate(rollouts, role, 0, skip_first_tokens=3)
        assert batch.targets_N.tolist() == [4] and batch.loss_rows_N.tolist() == [0]
        assert batch.input_ids_BT[0, batch.loss_positions_N[0] + 1] == 4
        assert collate(rollouts[1:], role, 0, 3).targets_N.shape == (0,)


def test_weights_travel_with_their_rows() -> None:
    from dataclasses import replace

    rollout = renderer().rollout(plain(), Completion((1, 2), (), True), parse_template("turns:1"))
    batch = collate([rollout, replace(rollout, weight=0.5, label_weight=0.25)], "student", 0)
    torch.testing.assert_close(batch.weights_N, torch.tensor([1.0, 1.0, 0.5, 0.5]))
    torch.testing.assert_close(batch.label_weights_N, torch.tensor([0.0, 0.0, 0.25, 0.25]))


def test_an_empty_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([], "student", 0)


def test_micro_batches_stay_within_their_padded_budget() -> None:
    lengths = [10, 50, 7, 30, 31, 200, 7, 8]
    groups = micro_batches([tuple(range(length)) for length in lengths], 100, packed=False)
    assert groups == [[5], [1, 4], [3, 0, 7], [2, 6]]
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 100


def test_packed_micro_batches_count_what_rows_share_once_and_keep_those_rows_together() -> None:
    talks = [tuple(range(100 * talk, 100 * talk + 90)) for talk in range(1, 4)]
    rows = [talk[:end] for end in (30, 60, 90) for talk in talks]
    groups = micro_batches(rows, 100, packed=True)
    assert sorted(map(sorted, groups)) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert len(micro_batches(rows, 100, packed=False)) == 7


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple), min_size=1, max_size=12),
       st.integers(1, 60))  # fmt: skip
def test_packed_micro_batches_hold_every_row_once_within_the_packed_budget(
    rows: list[tuple[int, ...]], budget: int
) -> None:
    groups = micro_batches(rows, budget, packed=True)
    assert sorted(place for group in groups for place in group) == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or len(pack([rows[place] for place in group]).input_ids_T) <= budget


# Leaks


@pytest.mark.parametrize(
    "said",
    [
        "As in the example above, the answer is red.",
        "Following the example, I turn on the lamp.",
        "Based on the given example: red",
        "Similar to the demonstration, red.",
        "As shown in the example, red.",
        "according to your previous answer it is red",
        "In the above example the colour was red.",
        "The example response says red.",
        "like the earlier turn",
    ],
)
def test_talk_about_the_demonstration_is_detected(said: str) -> None:
    assert names_the_example(said)


@pytest.mark.parametrize(
    "said",
    [
        "red",
        "For example, a cat can be red.",
        "In this example we use a list.",
        "Here is an example of a loop.",
        "This demonstrates the principle.",
        "Follow the road; it turns right.",
        "the counterexample above",
        '{"example": "above"}',
    ],
)
def test_ordinary_text_is_not(said: str) -> None:
    assert not names_the_example(said)
