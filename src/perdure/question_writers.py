"""Who writes questions on documents, what they are asked, and how their replies are read.

A writer gets one request a passage: facts, each an answer quoted from the passage and several ways to ask for it. The
loaded model is one (questions.Student), an OpenAI-compatible endpoint another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, Protocol, TypeGuard

import httpx2

from perdure.files import HALVES, read_jsonl, replace_text
from perdure.importers.docs import plain
from perdure.importers.passages import Passage
from perdure.rollout.base import Progress
from perdure.servers import headers_for, without_key
from perdure.types import InputError, Message

KEY = "OPENAI_API_KEY"
PATH = "/v1/chat/completions"
AT_ONCE = 4
"""Requests to an endpoint that are under way together."""
BUSY = (429, 500, 502, 503, 504)
"""Statuses of an endpoint that may answer a little later."""
ATTEMPTS, LONGEST_WAIT = 5, 60.0
"""So often a request is made while the endpoint is busy, with so many seconds between two attempts at most."""
SHOWN_OF_A_REPLY = 300
"""Characters of what an endpoint answered in an error message."""

INSTRUCTION = """\
Write down up to 5 facts that the text below states, each as one line that begins with "A:" and four lines that begin \
with "Q:".
A: is the answer, copied word for word from the text and short: a name, a number, a date, a few words.
Q: asks for it: first a question, then the same in other words, then a request that begins with a verb, then a \
sentence to complete. Whoever is asked does not see the text: every question names what it is about, and none contains \
the answer.

Text:
"""
EXAMPLES = (
    (
        "The Halden observatory was opened in 1931 by the astronomer Ingrid Moe. Its telescope weighs 40 tons.",
        "A: Ingrid Moe\n"
        "Q: Who opened the Halden observatory?\n"
        "Q: Which astronomer was it that opened the Halden observatory?\n"
        "Q: Name the astronomer who opened the Halden observatory.\n"
        "Q: The Halden observatory was opened by\n"
        "A: 40 tons\n"
        "Q: How much does the telescope of the Halden observatory weigh?\n"
        "Q: What is the weight of the Halden observatory's telescope?\n"
        "Q: Give the weight of the telescope in the Halden observatory.\n"
        "Q: The telescope of the Halden observatory weighs",
    ),
    (
        "Parcels for the Lindow depot are handed in at counter 6 by 15:30. Damaged ones go to Tove Brandt.",
        "A: counter 6\n"
        "Q: Where are parcels for the Lindow depot handed in?\n"
        "Q: In which place can a parcel for the Lindow depot be left?\n"
        "Q: Say where to take a parcel that goes to the Lindow depot.\n"
        "Q: A parcel for the Lindow depot is handed in at\n"
        "A: Tove Brandt\n"
        "Q: Who gets the damaged parcels of the Lindow depot?\n"
        "Q: To whom does a damaged parcel for the Lindow depot go?\n"
        "Q: Name the person who takes damaged parcels for the Lindow depot.\n"
        "Q: Damaged parcels for the Lindow depot go to",
    ),
)
"""Invented texts and what to write about them, shown as earlier turns of the conversation."""


class Writer(Protocol):
    """Whoever can be asked for questions."""

    def __call__(self, passages: Sequence[Passage], progress: Progress) -> list[str]:
        """One reply a passage, in the passages' order."""
        ...


def conversation(passage: Passage) -> tuple[Message, ...]:
    """What the writer is asked about a passage."""
    turns: list[Message] = []
    for text, reply in EXAMPLES:
        turns += [{"role": "user", "content": INSTRUCTION + text}, {"role": "assistant", "content": reply}]
    return (*turns, {"role": "user", "content": INSTRUCTION + passage.text})


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint as a Writer. Its key comes from the environment, and is never shown.

    Raises InputError for a URL or a key that cannot be used."""

    url: str
    """With or without ``/v1`` at its end."""
    model: str
    timeout: float = 600.0
    """Seconds that one request may take."""
    kept: Path | None = None
    """Where replies are kept as they come, so that another attempt asks for the rest alone; they cost money."""

    def __post_init__(self) -> None:
        headers_for(self.url, KEY)

    def __call__(self, passages: Sequence[Passage], progress: Progress) -> list[str]:
        """See Writer. Raises InputError naming the URL and what came back."""
        known = self._known()
        names = [self._name(passage) for passage in passages]
        replies = {place: known[name] for place, name in enumerate(names) if name in known}
        stop = Event()
        with (
            httpx2.Client(headers=headers_for(self.url, KEY), timeout=self.timeout) as client,
            ThreadPoolExecutor(AT_ONCE) as pool,
        ):
            jobs = {pool.submit(self._ask, client, passage, stop): place
                    for place, passage in enumerate(passages) if place not in replies}  # fmt: skip
            try:
                for job in as_completed(jobs):
                    replies[jobs[job]] = job.result()
                    self._keep(names[jobs[job]], job.result())
                    progress(0, len(replies))
            except BaseException:  # an error, or Ctrl-C: what has not begun is not asked any more
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [replies[place] for place in range(len(passages))]

    def _name(self, passage: Passage) -> str:
        return hashlib.sha256(json.dumps([self.url, self.model, conversation(passage)]).encode()).hexdigest()

    def _known(self) -> dict[str, str]:
        """Replies of earlier attempts, by what was asked; a last line that was cut off is dropped."""
        if self.kept is None or not self.kept.is_file():
            return {}
        lines = read_jsonl(self.kept, growing=True)
        replace_text(self.kept, "".join(json.dumps(line) + "\n" for line in lines))
        return {line["asked"]: line["reply"] for line in lines}

    def _keep(self, asked: str, reply: str) -> None:
        if self.kept is not None:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            with self.kept.open("a", encoding="utf-8") as file:
                # In ASCII, as a reply may hold half a character, which UTF-8 cannot.
                file.write(json.dumps({"asked": asked, "reply": reply}) + "\n")

    def _ask(self, client: httpx2.Client, passage: Passage, stop: Event) -> str:
        # Nothing but these two: every further parameter is refused by some server.
        body = {"model": self.model, "messages": conversation(passage)}
        url = self.url.rstrip("/").removesuffix("/v1") + PATH
        try:
            response = client.post(url, json=body)
            for attempt in range(1, ATTEMPTS):
                if response.status_code not in BUSY or stop.wait(_pause(response, attempt)):
                    break
                response = client.post(url, json=body)
        except httpx2.TimeoutException as error:
            raise InputError(f"{url}: no answer within {self.timeout:g} seconds") from error
        except (httpx2.HTTPError, UnicodeError) as error:  # the latter: a host that no name can have
            raise InputError(without_key(f"{url}: no answer: {error}", KEY)) from error
        came = without_key(response.text, KEY)[:SHOWN_OF_A_REPLY]
        if not response.is_success:
            raise InputError(f"{url}: status {response.status_code}: {came} (asked about {passage.source})")
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise InputError(f"{url}: expected a chat completion in JSON, but got: {came}") from error
        if not isinstance(content, str):
            raise InputError(f"{url}: the message holds no text: {came} (asked about {passage.source})")
        return content


def _pause(response: httpx2.Response, attempt: int) -> float:
    """Seconds until the next attempt: what the endpoint says, else twice as long each time."""
    said = response.headers.get("retry-after", "")
    return min(LONGEST_WAIT, float(said) if said.isdecimal() else 2.0**attempt)


# What came back


class Fact(NamedTuple):
    """An answer and the ways to ask for it."""

    answer: str
    questions: list[str]


_LABEL = re.compile(r"(?:[-•]\s*|\d+[.)]\s*)?(q|question|a|answer)\s*\d*\s*[:\uff1a]\s*(\S.*)", re.IGNORECASE)
_INNER_LABEL = re.compile(r"(?<=\S)\s+(?=(?:A|Answer)\s*\d*(?::\s|\uff1a))")


def parse(reply: str) -> tuple[list[Fact], int]:
    """The facts of a reply, and how many parts of it could not be read: JSON objects with ``answer`` and ``questions``
    (or ``question``), wherever they stand, else lines that begin with ``A:`` and ``Q:``, whichever comes first."""
    text = reply.rpartition("</think>")[2]  # before it: the thinking of models that think
    text = HALVES.sub("\ufffd", text)
    objects, unread = _objects(text)
    facts: list[Fact] = []
    pairs: list[tuple[str, str]] = []
    for found in objects:
        answer: Any = found.get("answer")
        questions: Any = found.get("questions", found.get("question"))
        if isinstance(questions, dict):
            questions = list(questions.values())
        if _is_text(answer) and _is_text(questions):
            pairs.append((answer, questions))
        elif isinstance(questions, list) and questions and all(map(_is_text, [answer, *questions])):
            facts.append(Fact(answer, questions))
        else:
            unread += 1
    if not objects:
        pairs, unread = _labelled(text)
    facts += _gathered(pairs)
    return facts, unread or int(not facts)


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip()) and HALVES.search(value) is None


def _objects(text: str) -> tuple[list[dict[str, Any]], int]:
    """Every JSON object of the text, those in lists and in an object around them too; and how many begin but cannot be
    read."""
    decoder, found, broken, start = json.JSONDecoder(), [], 0, 0
    while (start := text.find("{", start)) >= 0:
        try:
            value, start = decoder.raw_decode(text, start)
            found += _unwrapped(value)
        except (ValueError, RecursionError):
            broken, start = broken + 1, start + 1
    return found, broken


def _unwrapped(value: dict[str, Any]) -> list[dict[str, Any]]:
    lists = [inner for inner in value.values() if isinstance(inner, list)] if "answer" not in value else []
    return [entry for inner in lists for entry in inner if isinstance(entry, dict)] or [value]


def _labelled(text: str) -> tuple[list[tuple[str, str]], int]:
    """(answer, question) pairs of lines with labels, and how many lines belong to none."""
    lines = [line.strip(" \t\r#>*") for line in _INNER_LABEL.sub("\n", re.sub(r"\*\*|`", "", text)).split("\n")]
    found = [_LABEL.fullmatch(line) for line in lines if line]
    entries = [(match[1][0].lower(), match[2].strip()) for match in found if match]
    turn = 1 if entries and entries[0][0] == "a" else -1  # from the end, an answer always comes before its questions
    pairs: list[tuple[str, str]] = []
    answer, unread, lone = None, found.count(None), False
    for label, content in [*entries[::turn], ("a", "")]:
        if label == "a":
            answer, unread, lone = content, unread + lone, True
        elif answer is None:
            unread += 1
        else:
            pairs.append((answer, content))
            lone = False
    return pairs[::turn], unread


def _gathered(pairs: Sequence[tuple[str, str]]) -> list[Fact]:
    """Questions that came one by one, those with the same answer as one fact."""
    facts: dict[str, Fact] = {}
    for answer, question in pairs:
        facts.setdefault(plain(answer), Fact(answer, [])).questions.append(question)
    return list(facts.values())
