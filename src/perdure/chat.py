"""Talking to a version, to see with one's own eyes what it says."""

from __future__ import annotations

from perdure.rollout.base import SamplingParams
from perdure.seeds import derive_seed
from perdure.session import Session
from perdure.types import Example, Message


class Chat:
    """A conversation with one version: greedy answers, or with a temperature above 0 samples by a seed."""

    def __init__(self, session: Session, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
                 system: str | None = None):  # fmt: skip
        self.session, self.seed = session, seed
        self.params = SamplingParams(max_new_tokens, temperature)
        self.messages: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()

    def say(self, text: str) -> str:
        """The answer to the conversation so far and ``text``. Raises InputError where it does not fit the window."""
        renderer = self.session.renderer
        messages = (*self.messages, {"role": "user", "content": text})
        prompt = renderer.student_prompt(Example("chat", messages, None, origin="chat"))
        renderer.check_window(prompt, self.params.max_new_tokens, "model")
        seed = derive_seed(self.seed, "chat", len(messages))
        (completion,) = self.session.engine.generate([prompt], self.params, [seed])
        answer = renderer.text(completion)
        self.messages = (*messages, {"role": "assistant", "content": answer})
        return answer
