"""The only renderer of prompts: what the student sees, what the teacher sees, and the completion that both share.

A completion's token ids are made once and appended to either prompt, so they are identical under both by
construction. Nothing is truncated: a row that does not fit is an InputError that names its file and line.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jinja2

from perdure.config import ContextConfig, ThinkingConfig
from perdure.templates import INLINE_CLOSE, INLINE_CLOSE_THINKING, INLINE_LEAD, Template, after_reading
from perdure.thinking import Marks, Part, marks_of
from perdure.types import Completion, Example, InputError, Message, Prompt, Rollout, with_objects


class Renderer:
    """Renders examples with one tokenizer's chat template. ``window`` = most tokens of prompt plus completion.

    Raises InputError for switches that the chat template does not know, or that make the two roles begin the answer
    differently: the same tokens would be thinking for one and answer for the other."""

    def __init__(self, tokenizer: Any, end_ids: Sequence[int], window: int, context: ContextConfig | None = None,
                 thinking: ThinkingConfig | None = None):  # fmt: skip
        self.tokenizer = tokenizer
        self.end_ids = tuple(end_ids)
        """The first closes a demonstration whose template writes no closing token."""
        self.window = window
        context, thinking = context or ContextConfig(), thinking or ThinkingConfig()
        self.switches = {"student": context.student_switches, "teacher": context.teacher_switches}
        self.date = context.date
        self.part: Part = thinking.loss
        self.hesitations = thinking.hesitations
        self.marks: Marks | None = None
        """None for a model that does not think."""
        if any(self.switches.values()) or thinking.enabled:
            self.marks = marks_of(thinking, self._start_of_answer())

    def student_prompt(self, example: Example) -> Prompt:
        """The prompt without the demonstration."""
        return self._prompt(example, example.messages, "student")

    def teacher_prompt(self, example: Example, template: Template) -> Prompt:
        """The prompt with the demonstration; for an anchor row (no demonstration) the student's own prompt."""
        if example.demonstration is None:
            return self.student_prompt(example)
        return self._prompt(example, self.teacher_messages(example, template), "teacher")

    def teacher_messages(self, example: Example, template: Template) -> tuple[Message, ...]:
        """The turns that the teacher sees."""
        assert example.demonstration is not None
        system, turns = _split_system(example.messages)
        if template.kind == "turns":
            shown = example.shown or (*turns, example.demonstration)
            return (*system, *shown * template.repeats, *turns)
        if example.shown:
            raise InputError(f"{example.origin}: a recorded conversation can be shown by the template turns:N only")
        if template.kind == "document":
            return self._with_document(example)
        if template.kind == "document_turns":
            read = _replace_last(turns, f"{_lead(example, template.name)}{_text(turns[-1], example)}")
            again = (*turns, example.demonstration) * (template.repeats - 1)
            return (*system, *read, example.demonstration, *again, *turns)
        question = _text(example.messages[-1], example)
        if template.kind == "jinja":
            assert template.source is not None
            return _replace_last(example.messages, self._fill(template, example, question))
        close = INLINE_CLOSE_THINKING if template.kind == "inline_thinking" else INLINE_CLOSE
        text = f"\n{question}\n\n{INLINE_LEAD}\n{self.demonstration_text(example)}\n\n{close}\n"
        return _replace_last(example.messages, text)

    def _with_document(self, example: Example) -> tuple[Message, ...]:
        question = _text(example.messages[-1], example)
        text = f"{_lead(example, 'document')}{question}\n\n{INLINE_LEAD}\n"
        return _replace_last(example.messages, f"{text}{self.demonstration_text(example)}\n\n{INLINE_CLOSE}")

    def _fill(self, template: Template, example: Example, question: str) -> str:
        assert template.source is not None
        try:
            return template.source.render(
                prompt=question,
                demonstration=self.demonstration_text(example),
                document=example.document,
                messages=example.messages,
                metadata=example.metadata,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{template.name}: cannot be filled for {example.origin}: {error}") from error

    def recorded_turns(self, example: Example) -> list[Example]:
        """An example for each assistant turn of a recorded conversation; any other example is its only one."""
        system, _ = _split_system(example.messages)
        places = [place for place, message in enumerate(example.shown) if message["role"] == "assistant"]
        return [
            replace(example, id=f"{example.id}/{number}", messages=(*system, *example.shown[:place]),
                    demonstration=example.shown[place])
            for number, place in enumerate(places, 1)
        ] or [example]  # fmt: skip

    def each_turn(self, examples: Sequence[Example]) -> list[Example]:
        """The recorded turns of all examples."""
        return [turn for example in examples for turn in self.recorded_turns(example)]

    def demonstration(self, example: Example) -> Completion:
        """The demonstration as completion tokens, its closing token included.

        Raises InputError when the chat template does not render the demonstration after the prompt."""
        assert example.demonstration is not None
        if example.tools or any(message.get("tool_calls") for message in (*example.messages, example.demonstration)):
            self._check_written(example)
        before = self._text(example, example.messages, generate=True)
        after = self._text(example, (*example.messages, example.demonstration), generate=False)
        if self.marks and self.marks.opened and not after.startswith(before):
            after = self._into_opened(before, after, example.demonstration)
        if not after.startswith(before) or len(after) == len(before):
            raise InputError(
                f"{example.origin}: this model's chat template does not write the demonstration after the prompt "
                "(tool calls or thinking it cannot render?); give the answer as text in 'content'"
            )
        ids = self._continuation(before, after)
        ends = [index for index, token in enumerate(ids) if token in self.end_ids]
        if not ends:
            return Completion((*ids, self.end_ids[0]), (), finished=True)
        rest = [token for token in ids[ends[0] :] if token not in self.end_ids]
        if self.tokenizer.decode(rest).strip():
            raise InputError(
                f"{example.origin}: the demonstration contains the model's closing token "
                f"{self.tokenizer.decode(ids[ends[0]])!r}; the model could never write what follows it"
            )
        return Completion(tuple(ids[: ends[0] + 1]), (), finished=True)

    def _into_opened(self, before: str, after: str, demonstration: Message) -> str:
        """``after`` for a template that opens the thinking in its generation prompt but renders an answer as if it had
        not: the demonstration's thinking and the closing mark go between."""
        assert self.marks is not None
        bare = before[: before.rfind(self.marks.open)]
        if not after.startswith(bare):
            return after
        thinking = str(demonstration.get("reasoning_content") or "").strip()
        return f"{before}{thinking}\n{self.marks.close}\n\n{after[len(bare) :]}"

    def demonstration_text(self, example: Example) -> str:
        """The demonstration as the model would write it, without the closing token. Of an answer without thinking only
        the answer: empty thinking, which templates write out, would show the teacher not to think."""
        text = self.text(self.demonstration(example))
        if self.marks is None:
            return text
        thinking, answer = self.marks.split(text)
        return text if thinking else answer

    def lacks_thinking(self, example: Example) -> bool:
        """Whether the model thinks and the demonstration does not: as a label it would teach not to."""
        return self.marks is not None and not self.marks.split(self.text(self.demonstration(example)))[0]

    def text(self, completion: Completion) -> str:
        """A completion as text, without its closing token; other special tokens stay visible."""
        ids = completion.token_ids
        ids = ids[:-1] if ids and ids[-1] in self.end_ids else ids
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def answer(self, completion: Completion) -> str:
        """What a grader sees: the completion's text, without the thinking of a model that thinks."""
        text = self.text(completion)
        return text if self.marks is None else self.marks.split(text)[1]

    def rollout(self, example: Example, completion: Completion, template: Template | None) -> Rollout:
        """Pair a completion with both prompts; without a template the teacher sees the student's.

        Raises InputError when either side does not fit the window."""
        student = self.student_prompt(example)
        teacher = self.teacher_prompt(example, template) if template else student
        for role, prompt in (("student", student), ("teacher", teacher)):
            self.check_window(prompt, len(completion.token_ids), role)
        region = None
        if self.marks and self.part != "all" and example.demonstration is not None:
            region = self.marks.region(self.tokenizer, completion.token_ids, self.part)
        return Rollout(student, teacher, completion, region=region)

    def document_row(self, example: Example) -> Rollout:
        """The row's document as plain text, without the chat template but with the begin token that the tokenizer puts
        before a text: the first token is the prompt of the others.

        Raises InputError for a row without a document and for one that does not fit the window."""
        begin = self.tokenizer("")["input_ids"][:1]  # some tokenizers end a text, too: the model goes on here
        begin = begin if begin == [self.tokenizer.bos_token_id] else []
        ids = (*begin, *self._encode(example.document or ""))
        if len(ids) < 2:
            raise InputError(f'{example.origin}: continued pre-training needs a "document" in every row')
        prompt = Prompt(example, ids[:1])
        self.check_window(prompt, len(ids) - 1, "student")
        return Rollout(prompt, prompt, Completion(ids[1:], (), finished=False))

    def _check_written(self, example: Example) -> None:
        """Raises InputError where the chat template leaves out the row's tools or tool calls: what is left would teach
        an empty answer, or calls of what nobody offered."""
        whole = tuple({**message, "content": message.get("content") or ""}
                      for message in (*example.messages, *filter(None, [example.demonstration])))  # fmt: skip
        silent = tuple({key: value for key, value in message.items() if key != "tool_calls"} for message in whole)
        written, lost = self._text(example, whole, generate=False), []
        if example.tools and self._text(replace(example, tools=()), whole, generate=False) == written:
            lost.append("'tools'")
        if silent != whole and self._text(example, silent, generate=False) == written:
            lost.append("'tool_calls'")
        if lost:
            raise InputError(
                f"{example.origin}: this model's chat template does not write {' and '.join(lost)}; use a model whose "
                "template does, or give what it should read and answer as text in 'content'"
            )

    def check_window(self, prompt: Prompt, completion_tokens: int, role: str) -> None:
        """Raises InputError naming the row when prompt and completion do not fit together."""
        total = len(prompt.token_ids) + completion_tokens
        if total > self.window:
            raise InputError(
                f"{prompt.example.origin}: the {role}'s prompt ({len(prompt.token_ids)} tokens) and its completion "
                f"({completion_tokens}) exceed the window of {self.window} tokens; shorten the row, choose a shorter "
                "context template or raise model.max_window"
            )

    def _start_of_answer(self) -> str:
        """The text with which the chat template begins an answer, the same for both roles."""
        template = str(self.tokenizer.chat_template)
        for role, switches in self.switches.items():
            if unknown := [name for name in switches if not re.search(rf"\b{re.escape(name)}\b", template)]:
                raise InputError(f"context.{role}_switches: this model's chat template knows no {unknown[0]!r}")
        messages = ({"role": "user", "content": "?"},)
        probe = Example("", messages, None, origin="context.student_switches, context.teacher_switches")
        starts = {}
        for role in self.switches:
            before, after = (self._text(probe, messages, generate, role) for generate in (False, True))
            starts[role] = after.removeprefix(before)
        if starts["student"] != starts["teacher"]:
            raise InputError(
                f"the chat template begins the student's answer with {starts['student']!r} and the teacher's with "
                f"{starts['teacher']!r}: what is thinking for one would be answer for the other. Give "
                "context.student_switches and context.teacher_switches the same setting for this"
            )
        return starts["student"]

    def _prompt(self, example: Example, messages: tuple[Message, ...], role: str) -> Prompt:
        return Prompt(example, tuple(self._encode(self._text(example, messages, generate=True, role=role))))

    def _text(self, example: Example, messages: tuple[Message, ...], generate: bool, role: str = "student") -> str:
        tools = list(example.tools) or None
        try:
            return self.tokenizer.apply_chat_template(
                [_with_objects(message) for message in messages],
                tools=tools,
                chat_template=on_date(self.tokenizer.get_chat_template(tools=tools), self.date),
                add_generation_prompt=generate,
                tokenize=False,
                **self.switches[role],
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InputError(f"{example.origin}: this model's chat template cannot render the row: {error}") from error

    def _continuation(self, before: str, after: str) -> list[int]:
        """Tokens of ``after`` beyond ``before``: as they are in the whole text (some tokenizers begin every text with a
        space), unless a token straddles the border, which no model could write; then encoded alone."""
        prompt, whole = self._encode(before), self._encode(after)
        straddles = whole[: len(prompt)] != prompt
        return self._encode(after[len(before) :]) if straddles else whole[len(prompt) :]

    def _encode(self, text: str) -> list[int]:
        # The template writes every special token itself; the tokenizer must not add another begin token.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@lru_cache
def on_date(chat_template: str, date: datetime.date) -> str:
    """The chat template, in which today is ``date`` where it prints today's date."""
    if "strftime_now" not in chat_template:
        return chat_template
    replaced = "".join(
        f"|replace('%{sign}', '{date.strftime('%' + sign)}')" for sign in ("-d", "-m", *"aAbBcdjmuUwWxyY")
    )
    # A macro stands before the function of the same name that transformers gives; "+" keeps what follows as it is.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro +%}}{chat_template}"


def _with_objects(message: Message) -> Message:
    """Chat templates write a call's arguments as JSON themselves: given as text (the API form) they would be quoted."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": with_objects(call["function"])} if "function" in call else with_objects(call)
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _split_system(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    if messages and messages[0].get("role") == "system":
        return messages[:1], messages[1:]
    return (), messages


def _lead(example: Example, template: str) -> str:
    """What comes before a question that has its document with it."""
    if example.document is None:
        raise InputError(f'{example.origin}: the template "{template}" needs a "document" in every row')
    return after_reading(example.document, "")


def _text(message: Message, example: Example) -> str:
    if message.get("role") != "user" or not isinstance(message.get("content"), str):
        raise InputError(
            f"{example.origin}: this context template writes into the last user turn, but the prompt ends in a "
            f"{message.get('role')!r} turn; use turns:N"
        )
    return message["content"]


def _replace_last(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    return (*messages[:-1], {**messages[-1], "content": text})
