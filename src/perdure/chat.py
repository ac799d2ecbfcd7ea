"""Talking to a version, to see with one's own eyes what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.files import HALVES
from perdure.rollout.base import SamplingParams
from perdure.seeds import derive_seed
from perdure.session import Session
from perdure.skills.base import kept_rows
from perdure.types import Example, InputError, Message
from perdure.workspace import Workspace


def setting_of(workspace: Workspace, skill: str,
               versions: Sequence[str] = ()) -> tuple[str | None, tuple[dict[str, Any], ...]]:  # fmt: skip
    """System prompt and tools of the first test row of a skill that one of ``versions`` was taught, or the champion, or
    what waits for a decision. Raises InputError for one that none of them was."""
    waiting = workspace.aliases()["candidate"]
    taught: dict[str, Path] = {}
    for version in (*([waiting] if waiting else []), "champion", *versions):
        taught |= workspace.taught(version)
    if skill not in taught:
        raise InputError(f"no version here was taught {skill!r}; they know {', '.join(taught) or 'no skill'}")
    row = kept_rows(taught[skill])[0]
    first = row.messages[0]
    return (first["content"] if first["role"] == "system" else None), row.tools


def _check_text(text: str, what: str) -> None:
    """Python keeps what a terminal sends in another encoding as halves of characters, which no tokenizer takes."""
    if HALVES.search(text):
        raise InputError(f"{what} is not UTF-8")


class Chat:
    """A conversation with one version: greedy answers, or with a temperature above 0 samples by a seed. ``tools``: the
    functions that it is told of; no call is carried out."""

    def __init__(self, session: Session, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
                 system: str | None = None, tools: Sequence[dict[str, Any]] = ()):  # fmt: skip
        self.session, self.seed, self.tools = session, seed, tuple(tools)
        self.params = SamplingParams(max_new_tokens, temperature)
        _check_text(system or "", "the system prompt")
        self.messages: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()

    def say(self, text: str) -> str:
        """The answer to the conversation so far and ``text``. Raises InputError where it does not fit the window."""
        _check_text(text, "the question")
        renderer = self.session.renderer
        messages = (*self.messages, {"role": "user", "content": text})
        prompt = renderer.student_prompt(Example("chat", messages, None, self.tools, origin="chat"))
        renderer.check_window(prompt, self.params.max_new_tokens, "model")
        seed = derive_seed(self.seed, "chat", len(messages))
        (completion,) = self.session.engine.generate([prompt], self.params, [seed])
        answer = renderer.text(completion)
        self.messages = (*messages, {"role": "assistant", "content": answer})
        return answer
