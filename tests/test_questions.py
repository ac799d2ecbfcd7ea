"""Questions that a model writes on documents: read, filtered, asked again; and the pre-test of one's own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes import ScriptedEngine, renderer, save_tiny_model
from perdure.cli import app
from perdure.config import RunConfig
from perdure.importers.docs import Questions, build, holding, read_questions
from perdure.importers.passages import Passage, words
from perdure.question_writers import ATTEMPTS, KEY, Endpoint, Fact, _pause, conversation, parse
from perdure.questions import MAX_ANSWER_WORDS, MIN_WORDS, Student, pretest, write_questions
from perdure.reporting import Silent
from perdure.skills.base import load_skill
from perdure.stages import create_workspace
from perdure.templates import DOCUMENT_LEAD
from perdure.types import InputError, Prompt
from test_cli import assert_one_error, perdure

BRNO = Passage("The plant in Brno is led by Jana Novak and makes pumps since May 2026.", "staff.md line 1", "staff.md")
GATE = Passage("Visitors of the Oslo office register at gate C before noon.", "staff.md line 9", "staff.md")


def test_the_conversation_shows_its_own_form_and_ends_with_the_passage() -> None:
    turns = conversation(BRNO)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[-1]["content"].endswith(BRNO.text)
    for text, reply in zip(turns[:-1:2], turns[1::2], strict=True):
        facts, unread = parse(reply["content"])
        passage = Passage(text["content"].split("Text:\n")[1], "shown", "shown")
        assert unread == 0 and [len(fact.questions) for fact in facts] == [4, 4]
        found, said = write_questions([passage], says(reply["content"]), student({"": ""}, all_found), Silent(), "m")
        assert len(found.rows) == 8 and "dropped" not in said


# Replies


@pytest.mark.parametrize(
    ("reply", "facts", "unread"),
    [
        ("A: Jana\nQ: Who leads?\nQ: Name her.\nA: 2026\nQ: Since when?",
         [("Jana", ["Who leads?", "Name her."]), ("2026", ["Since when?"])], 0),
        ("Here you are:\n**Q1:** Who leads?\n- Q: Name her.\n**A1:** Jana\n\nQuestion: When? Answer: 2026\nQ: Lost?",
         [("Jana", ["Who leads?", "Name her."]), ("2026", ["When?"])], 2),
        ("Q: Who leads?\nA: Jana\nQ: When?\nA: 2026\nQ: Name her.\nA: jana.",
         [("Jana", ["Who leads?", "Name her."]), ("2026", ["When?"])], 0),
        ("A: Jana\nA: 2026\nQ: Since when?", [("2026", ["Since when?"])], 1),
        ('{"answer": "Jana", "questions": ["Who leads?", "Name her."]}\n{"answer": "2026", "question": "When?"}\n',
         [("Jana", ["Who leads?", "Name her."]), ("2026", ["When?"])], 0),
        ('```json\n{"facts": [{"answer": "Jana",\n "questions": {"wh": "Who leads?"}}, {"answer": 3}]}\n```',
         [("Jana", ["Who leads?"])], 1),
        ('[{"answer": "Jana", "question": "Who leads?"}, {"answer": "2026", "questions": ["Si',
         [("Jana", ["Who leads?"])], 1),
        ('{"answer": "half \\ud800", "question": "Who leads?"}', [], 1),
        ("<think>A: no\nQ: no?</think>\nA: Jana\nQ: Who leads?", [("Jana", ["Who leads?"])], 0),
        ("I cannot help with that.", [], 1),
        ("", [], 1),
        ('{"a":' * 5000, [], None),
    ],
)  # fmt: skip
def test_replies_are_read_in_many_forms(reply: str, facts: list[tuple[str, list[str]]], unread: int | None) -> None:
    found, lost = parse(reply)
    assert found == [Fact(*fact) for fact in facts]
    assert lost == unread or (unread is None and lost > 0)


# Filters


def says(*replies: str) -> Callable[..., list[str]]:
    """A writer with these replies."""
    return lambda passages, progress: list(replies)


def student(known: dict[str, str], shown: Callable[[str], str], window: int = 1024) -> Student:
    """Answers ``known`` (else "no idea") to the bare question, and ``shown`` of the prompt where it holds a passage."""

    def answer(prompt: Prompt) -> str:
        text = prompt.example.messages[-1]["content"]
        return shown(text) if text.startswith(DOCUMENT_LEAD) else known.get(text, "no idea")

    return Student(ScriptedEngine(answer), renderer(window))


def all_found(text: str) -> str:
    """The whole passage."""
    return text.split("\n")[1]


def filtered(*replies: str, known: dict[str, str] | None = None, shown: Callable[[str], str] = all_found,
             passages: Sequence[Passage] = (BRNO,)) -> tuple[list[dict[str, Any]], str]:  # fmt: skip
    found, said = write_questions(passages, says(*replies), student(known or {}, shown), Silent(), "writer")
    assert found.place == "the questions of writer"
    assert [number for number, _ in found.rows] == list(range(1, len(found.rows) + 1))
    return [row for _, row in found.rows], said


GOOD = "A: Jana Novak\nQ: Who leads the plant in Brno?\nQ: The plant in Brno is led by"


def test_good_questions_become_rows_of_a_questions_file() -> None:
    rows, said = filtered(GOOD + '\nA: "May 2026."\nQ: Since when are pumps made in Brno?')
    assert rows == [
        {"question": "Who leads the plant in Brno?", "answer": "Jana Novak", "fact": "staff.md line 1, fact 1",
         "source": "staff.md"},
        {"question": "The plant in Brno is led by", "answer": "Jana Novak", "fact": "staff.md line 1, fact 1",
         "source": "staff.md"},
        {"question": "Since when are pumps made in Brno?", "answer": "May 2026", "fact": "staff.md line 1, fact 2",
         "source": "staff.md"},
    ]  # fmt: skip
    assert said == "writer: 3 questions on 1 passage, 3 kept for 2 facts"


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("A: Karel\nQ: Who led the plant before?", "1 (the answer is not in the passage)"),
        ("A: ...\nQ: Who led the plant before?", "1 (the answer is not in the passage)"),
        (f"A: {BRNO.text}\nQ: What does the text say?", f"1 (an answer of more than {MAX_ANSWER_WORDS} words)"),
        ("A: Brno\nQ: In which city does the brno plant stand?", "1 (the answer is in the question)"),
        ("A: Brno\nQ: Where is it?", "1 (fewer than 4 words)"),
        ("A: Jana Novak\nQ: who leads the plant in Brno", "1 (asked before)"),
        ("no label", "1 (not readable)"),
    ],
)
def test_what_cannot_be_used_is_dropped_and_counted(reply: str, reason: str) -> None:
    rows, said = filtered(GOOD, reply, passages=(BRNO, BRNO))
    assert len(rows) == 2
    total = 2 if "readable" in reason else 3
    assert said == f"writer: {total} questions on 2 passages, 2 kept for 1 fact; dropped: {reason}"


def test_the_student_must_find_the_answer_and_must_not_know_it() -> None:
    def shown(text: str) -> str:
        return "no idea" if "led by" in text.rpartition("\n")[2] else all_found(text)

    rows, said = filtered(
        GOOD + "\nQ: Name the head of the Brno plant.",
        known={"Name the head of the Brno plant.": "That is jana novak!"},
        shown=shown,
    )
    assert [row["question"] for row in rows] == ["Who leads the plant in Brno?"]
    assert said.endswith("dropped: 1 (not answered with the passage before it), 1 (known already)")


def test_checked_with_the_passage_that_it_is_taught_with() -> None:
    """Of two passages with the answer a skill takes the one with more of the question's words."""
    other = Passage("Jana Novak likes tea.", "staff.md line 20", "staff.md")
    seen: list[str] = []

    def shown(text: str) -> str:
        seen.append(text)
        return all_found(text)

    filtered("no label", "A: Jana Novak\nQ: Who leads the plant in Brno?", passages=(BRNO, other), shown=shown)
    assert len(seen) == 1 and BRNO.text in seen[0]


def test_nothing_left_is_an_error_with_the_counts() -> None:
    with pytest.raises(InputError, match=r"0 kept for 0 facts; dropped: 1 \(not readable\)\. Let a larger model"):
        filtered("nothing")


def test_the_student_writes_itself() -> None:
    def answer(prompt: Prompt) -> str:
        text = prompt.example.messages[-1]["content"]
        if text.startswith(DOCUMENT_LEAD):
            return all_found(text)
        return GOOD if text.endswith(BRNO.text) else "no idea"

    itself = Student(ScriptedEngine(answer), renderer(8192), seed=3)
    found, _ = write_questions([BRNO], itself, itself, Silent(), "tiny")
    assert len(found.rows) == 2
    narrow = Student(ScriptedEngine(answer), renderer(1024))
    with pytest.raises(InputError, match=r"staff\.md line 1: .*window of 1024"):
        write_questions([BRNO], narrow, narrow, Silent(), "tiny")


# The pre-test

OWN = (
    (1, {"question": "Who leads the plant in Brno?", "answer": "Jana Novak", "fact": "brno"}),
    (2, {"question": "Name the head of the Brno plant.", "answer": "Jana Novak", "fact": "brno"}),
    (4, {"question": "Where do visitors register?", "answer": "gate C", "contains": ["gate"]}),
    (5, {"question": "What is the capital of France?", "answer": "Paris", "kind": "control"}),
)


def test_a_fact_is_known_when_every_phrasing_is_answered() -> None:
    own = Questions("q.jsonl", OWN)
    half = {"Who leads the plant in Brno?": "Jana Novak.", "What is the capital of France?": "Paris"}
    found, said = pretest(own, student(half | {"Where do visitors register?": "at the gate"}, str), Silent())
    assert [number for number, _ in found.rows] == [1, 2, 5]
    assert said == "q.jsonl: 1 of 2 facts known already and left out (1 question)"
    found, said = pretest(own, student(half | {"Name the head of the Brno plant.": "Jana Novak"}, str), Silent())
    assert [number for number, _ in found.rows] == [4, 5] and "(2 questions)" in said
    every = {row["question"]: row["answer"] for _, row in OWN}
    with pytest.raises(InputError, match=r"q\.jsonl: 2 of 2 facts .*: nothing is left to teach"):
        pretest(own, student(every, str), Silent())


# The endpoint


class Handler(BaseHTTPRequestHandler):
    """Answers with what the test's server says; keeps the requests."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        self.server.hold.wait(self.server.delay)  # type: ignore[attr-defined]
        status, text = self.server.answer(body)  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(answer: Callable[[dict[str, Any]], tuple[int, str]], delay: float = 0) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer, server.requests, server.delay, server.hold = answer, [], delay, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


def completion(content: object) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


def echo(body: dict[str, Any]) -> tuple[int, str]:
    return 200, completion(body["messages"][-1]["content"].split("Text:\n")[1])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.question_writers.LONGEST_WAIT", 0.0)


def ask(url: str, **settings: Any) -> list[str]:
    return Endpoint(url, "big", **settings)([BRNO, GATE, BRNO], lambda tokens, done: None)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_endpoint_gets_one_request_a_passage(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, " sk-secret\n")
    with serving(echo) as server:
        assert ask(server.url + suffix) == [BRNO.text, GATE.text, BRNO.text]
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
    assert body.keys() == {"model", "messages"} and body["model"] == "big" and len(body["messages"]) == 5


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with serving(echo) as server:
        ask(server.url)
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (500, "overloaded " * 90, r"/v1/chat/completions: status 500: overloaded"),
        (401, "Incorrect API key provided: sk-secret", r"status 401: Incorrect API key provided: \*\*\*"),
        (302, "moved", "status 302: moved"),
        (200, "<html>sk-secret", r"expected a chat completion in JSON, but got: <html>\*\*\*"),
        (200, "[" * 100_000, "expected a chat completion in JSON"),
        (200, '{"choices": []}', r"expected a chat completion in JSON, but got: {\"choices\": \[\]}"),
        (200, '"text"', "expected a chat completion in JSON"),
        (200, completion(None), "the message holds no text"),
    ],
)
def test_what_an_endpoint_says_wrong_is_one_error(
    status: int, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "sk-secret")
    with serving(lambda body: (status, text)) as server, pytest.raises(InputError, match=message) as caught:
        ask(server.url)
    assert server.url in str(caught.value) and "sk-secret" not in str(caught.value) and len(str(caught.value)) < 450


def test_an_endpoint_that_does_not_answer() -> None:
    with serving(echo, delay=30) as server, pytest.raises(InputError, match=r"no answer within 0\.2 seconds"):
        ask(server.url, timeout=0.2)
    with pytest.raises(InputError, match=rf"{server.url}/v1/chat/completions: no answer: "):
        ask(server.url)  # gone
    with pytest.raises(InputError, match="no answer: "):
        ask("http://x..y")


def test_a_busy_endpoint_is_asked_again_and_a_refusing_one_is_not() -> None:
    for status, requests in ((429, 2), (503, 2), (400, 1)):
        said = iter([(status, "no"), *[echo] * 9])

        def answer(body: dict[str, Any], said: Iterator[Any] = said) -> tuple[int, str]:
            now = next(said)
            return now(body) if callable(now) else now

        with serving(answer) as server:
            if status == 400:
                with pytest.raises(InputError, match="status 400: no"):
                    Endpoint(server.url, "big")([BRNO], lambda tokens, done: None)
            else:
                assert Endpoint(server.url, "big")([BRNO], lambda tokens, done: None) == [BRNO.text]
        assert len(server.requests) == requests
    with serving(lambda body: (503, "no")) as server, pytest.raises(InputError, match="status 503"):
        Endpoint(server.url, "big")([BRNO], lambda tokens, done: None)
    assert len(server.requests) == ATTEMPTS


def test_an_endpoint_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.question_writers.LONGEST_WAIT", 60.0)
    for said, seconds in (("7", 7), ("3600", 60), ("", 8), ("Fri, 27 Nov 2026 12:00:00 GMT", 8)):
        assert _pause(httpx2.Response(429, headers={"retry-after": said}), 3) == seconds


def test_replies_that_came_are_not_asked_for_again(tmp_path: Path) -> None:
    kept = tmp_path / "new" / "replies.jsonl"

    def only_brno(body: dict[str, Any]) -> tuple[int, str]:
        if BRNO.text in body["messages"][-1]["content"]:
            return echo(body)
        time.sleep(0.5)  # until the others are there
        return 401, "no"

    with serving(only_brno) as server:
        with pytest.raises(InputError, match="status 401"):
            ask(server.url, kept=kept)
        assert kept.read_text().count(BRNO.text[:20]) >= 1
        with kept.open("a") as file:
            file.write('{"asked": "cut o')  # as a kill leaves it
        server.answer = echo
        before = len(server.requests)
        assert ask(server.url, kept=kept) == [BRNO.text, GATE.text, BRNO.text]
        assert [body["messages"][-1]["content"].endswith(GATE.text) for *_, body in server.requests[before:]] == [True]
        assert ask(server.url, kept=kept) == [BRNO.text, GATE.text, BRNO.text]
        assert len(server.requests) == before + 1
        with pytest.raises(InputError):  # another model has said nothing yet
            server.answer = lambda body: (401, "no")
            Endpoint(server.url, "small", kept=kept)([BRNO], lambda tokens, done: None)


def test_a_reply_with_half_a_character_is_kept(tmp_path: Path) -> None:
    text = json.dumps({"choices": [{"message": {"content": "half \ud800"}}]})
    with serving(lambda body: (200, text)) as server:
        for _ in range(2):
            kept = tmp_path / "replies.jsonl"
            assert Endpoint(server.url, "big", kept=kept)([BRNO], lambda tokens, done: None) == ["half \ud800"]
    assert len(server.requests) == 1


def test_an_error_ends_the_asking() -> None:
    with serving(lambda body: (500, "no")) as server, pytest.raises(InputError):
        Endpoint(server.url, "big")([BRNO] * 500, lambda tokens, done: None)
    assert len(server.requests) < 400


def test_urls_and_keys_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    for url in ("modle", "ftp://host", "http://", "http://host:port"):
        with pytest.raises(InputError, match=r"expected a URL such as|not a URL"):
            Endpoint(url, "big")
    for url in ("https://me:secret@host/v1", "https://secret@host"):
        with pytest.raises(InputError, match=rf"^https://host: the URL holds a name or a password.*{KEY}") as caught:
            Endpoint(url, "big")
        assert "secret" not in str(caught.value)
    monkeypatch.setenv(KEY, "sk-\nsecret")
    with pytest.raises(InputError, match=KEY) as caught:
        Endpoint("http://host", "big")
    assert "secret" not in str(caught.value)


def test_a_key_does_not_cross_the_internet_in_clear_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-secret")
    for url in ("http://api.example.com/v1", "http://8.8.8.8:8000"):
        with pytest.raises(InputError, match=f"would send the key in {KEY} in clear text; use https") as caught:
            Endpoint(url, "big")
        assert "sk-secret" not in str(caught.value)
    for url in ("http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000", "http://10.0.0.7", "http://vllm:8000",
                "http://llm.svc", "https://api.example.com"):  # fmt: skip
        Endpoint(url, "big")
    monkeypatch.delenv(KEY)
    Endpoint("http://api.example.com/v1", "big")


# The command: a tiny model that repeats what followed its turn's mark before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", copies=True)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "cats.md"
    file.write_text("The old cat is <|assistant|>red<|end|> all over.\n")
    return file


REPLY = """\
A: red
Q: Which colour has the old cat?
Q: Name the colour of the old cat.
Q: Short.
Q: Which colour is it? <|assistant|>red<|end|>
Q: Say <|assistant|>re<|assistant|>d<|end|> of the cat."""
"""The fourth holds its answer; the last leads the model astray."""


def test_the_command_asks_an_endpoint(model: Path, document: Path, tmp_path: Path) -> None:
    saved = tmp_path / "new" / "q.jsonl"
    with serving(lambda body: (200, completion(REPLY))) as server:
        done = perdure("import", "docs", tmp_path / "cats", "--file", document, "--ask", server.url, "--ask-model",
                       "big", "--model", model, "--save-questions", saved, OPENAI_API_KEY="sk-secret")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "big: 5 questions on 1 passage, 2 kept for 1 fact; dropped: " in done.stdout
    for reason in ("1 (fewer than 4 words)", "1 (the answer is in the question)", "1 (not answered with the passage"):
        assert reason in done.stdout
    assert f"{saved}: read and mend" in done.stdout and "sk-secret" not in done.stdout + done.stderr
    skill = load_skill(tmp_path / "cats")
    assert [e.messages[-1]["content"] for e in skill.train] == ["Which colour has the old cat?"]
    assert [e.messages[-1]["content"] for e in skill.test] == ["Name the colour of the old cat."]
    assert skill.train[0].document and "red" in skill.train[0].document
    assert len(read_questions(saved).rows) == 2
    again = load_skill(build(tmp_path / "again" / "cats", document, saved))
    assert again.content_hash == skill.content_hash


def test_the_command_leaves_out_what_is_known(model: Path, document: Path, tmp_path: Path) -> None:
    rows = [
        {"question": question, "answer": "red", "fact": fact}
        for fact, question in (
            ("told", "It is <|assistant|>red<|end|>: which colour?"),
            ("new", "Which colour has the old cat?"),
            ("new", "Name the colour of the old cat."),
        )
    ]
    questions, saved = tmp_path / "q.jsonl", tmp_path / "left.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": {"source": str(model), "compute_dtype": "float32"}}
    create_workspace(tmp_path / "bot", RunConfig.model_validate(settings))
    done = perdure("import", "docs", tmp_path / "cats", "--file", document, "--questions", questions, "--pretest",
                   "-w", tmp_path / "bot", "--save-questions", saved)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "q.jsonl: 1 of 2 facts known already and left out (1 question)" in done.stdout
    assert [row for _, row in read_questions(saved).rows] == rows[1:]
    skill = load_skill(tmp_path / "cats")
    assert [e.id for e in (*skill.train, *skill.test)] == ["direct-2", "direct-3"]


def test_questions_as_tables_export_them(document: Path, tmp_path: Path) -> None:
    """null is nothing: three questions without a fact are three facts, not one called None."""
    rows = [{"question": f"Question number {n}?", "answer": "red", "fact": None, "old": None} for n in range(3)]
    file = tmp_path / "table.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in read_questions(file).rows] == [
        {"question": row["question"], "answer": "red"} for row in rows]  # fmt: skip


def test_questions_in_a_script_without_spaces_stand_the_checks() -> None:
    text = "\u5317\u4eac\u662f\u4e2d\u56fd\u7684\u9996\u90fd\u3002"
    reply = "A\uff1a\u5317\u4eac\nQ\uff1a\u4e2d\u56fd\u7684\u9996\u90fd\u662f\u54ea\u4e2a\u57ce\u5e02\uff1f"
    (fact,), unread = parse(reply)
    assert unread == 0 and holding({"question": fact.questions[0], "answer": fact.answer}, [Passage(text, "a", "a")])
    assert len(words(fact.questions[0])) >= MIN_WORDS


def test_a_number_inside_another_is_no_answer_in_a_passage() -> None:
    passage = Passage("It was opened in 1960 with 6.5 rooms.", "guide", "guide")
    for answer, there in (("6", False), ("1960", True), ("6.5 rooms", True), ("5 rooms", False)):
        assert (holding({"question": "?", "answer": answer}, [passage]) is not None) is there


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("jsonl", "T", "--pretest"), ("import jsonl: --pretest is for docs only",)),
        (("sst2", "T", "--grader", "exact"), ("import sst2: --grader is for jsonl and docs only",)),
        (("sst2", "T", "--test-share", "0.5"), ("import sst2: --test-share is for jsonl only",)),
        (("sst2", "T", "--file", "F"), ("import sst2: --file is for jsonl and docs only",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--test-share", "0.5"), ("--test-share is for jsonl only",)),
        (("ssst2", "T"), ("unknown source 'ssst2'",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--questions", "F"), ("--questions or --ask, not both",)),
        (("docs", "T", "--file", "F", "--pretest"), ("--pretest needs --questions",)),
        (("docs", "T", "--file", "F", "--ask", "modle"), ("--ask takes 'model', or a URL with --ask-model",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--ask-model", "big"), ("--ask-model goes with --ask URL",)),
        (("docs", "T", "--file", "F", "--questions", "F", "--save-questions", "F"), ("go with --ask or --pretest",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--model", "F", "-w", "F"), ("--model or --workspace",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--turns", "all"), ("--turns is for jsonl only",)),
        (("docs", "T", "--ask", "model"), ("--file",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--save-questions", "F"), ("cats.md: already there",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--save-questions", "T/q.jsonl"), ("its own files only",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--grader", "vibes"), ("--grader", "vibes")),
        (("docs", "T", "--file", "N", "--ask", "model"), ("none.md: no such document",)),
        (("docs", "T", "--file", "F", "--ask", "ftp://x", "--ask-model", "big"), ("ftp://x: expected a URL such as",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--model", "N"), ("none.md",)),
        (("docs", "T", "--file", "F", "--ask", "model", "--model", "M"), ("cats.md line 1", "window of 1024")),
    ],
)
def test_the_command_says_what_does_not_go(
    words: tuple[str, ...], parts: tuple[str, ...], model: Path, document: Path, tmp_path: Path
) -> None:
    places = {"T": tmp_path / "cats", "T/q.jsonl": tmp_path / "cats" / "q.jsonl", "F": document, "M": model,
              "N": tmp_path / "none.md"}  # fmt: skip
    with pytest.raises(InputError) as caught:
        app(["import", *(str(places.get(word, word)) for word in words)], standalone_mode=False)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not (tmp_path / "cats").exists()


def test_an_error_of_the_command_is_one_message(document: Path, tmp_path: Path) -> None:
    done = perdure("import", "docs", tmp_path / "cats", "--file", document, "--ask", "modle")
    assert_one_error(done, 2, "--ask takes 'model', or a URL with --ask-model")
