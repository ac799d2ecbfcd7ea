"""New knowledge from documents: questions with answers, each beside the passage that holds the answer.

The teacher sees passage and answer (template ``document``), the student only the question. What is tested is not what
was taught: another phrasing of a taught fact (``direct``), a question that takes a fact from another side or two facts
together (``indirect``), and questions on what was not taught (``control``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from perdure.importers.base import Row, refuse_or_skip, skill_name, tokens_at_most, write_skill
from perdure.importers.passages import Passage, read_passages
from perdure.skills.base import not_gradable
from perdure.skills.graders import contains, make_grader
from perdure.skills.reading import json_object
from perdure.types import Example, InputError

KINDS = ("direct", "indirect", "control")
_KEYS = {"question", "answer", "fact", "kind", "source", "contains", "old"}
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Questions:
    """Questions with their answers, each as a line of a questions file says it."""

    place: str
    """The file, or who wrote them: what an error message begins with."""
    rows: tuple[tuple[int, dict[str, Any]], ...]
    """(line or number, question): error messages and the rows' ids name the number."""


def build(target: Path, documents: Path, questions: Path | Questions, grader: str = "contains",
          skipped: list[str] | None = None) -> Path:  # fmt: skip
    """Write the skill folder from documents and a JSONL file of questions, or questions read or made before.

    A line is ``{"question", "answer"}`` with, where wanted, ``fact`` (lines of the same fact are phrasings of one
    question; the last is held out as a test), ``kind`` (direct, indirect or control; the last two are tests only),
    ``source`` (the document that holds the answer), ``contains`` (texts that a right answer must contain; default:
    the answer) and ``old`` (texts that were right once: how often they are still said is counted apart). Raises one
    InputError that lists every bad document or line; where ``skipped`` is a list they are left out, and it gets what is
    wrong with them."""
    asked = questions if isinstance(questions, Questions) else read_questions(questions, skipped)
    asked = gradable(asked, grader, skipped)
    train, test = divided(asked, read_passages(documents, skipped), skipped)
    settings = {
        "name": skill_name(target),
        "description": f"Facts of {documents.name}.",
        "source": documents.name,
        "grader": grader,
        "max_new_tokens": room([str(row["completion"]) for row in (*train, *test)]),
    }
    return write_skill(target, settings, train, test)


def room(answers: Sequence[str]) -> int:
    """Tokens that each of the answers fits into."""
    return max(MAX_NEW_TOKENS, max(map(tokens_at_most, answers)))  # a model may say more than the bare answer


def read_questions(path: Path, skipped: list[str] | None = None) -> Questions:
    """The questions of a file. Raises InputError listing the bad lines, or leaves them out (``build``)."""
    if not path.is_file():
        raise InputError(f'{path}: no such file; it should hold one {{"question", "answer"}} a line')
    found, problems = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json_object(line)
            if row.get("fact") == "":  # exports of tables write an empty text where there is nothing
                del row["fact"]
            _check(row)
            found.append((number, row))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    refuse_or_skip(problems, skipped if found else None)
    return Questions(str(path), tuple(found))


def _check(row: Any) -> None:
    if not {"question", "answer"} <= row.keys():
        raise ValueError("expected an object with 'question' and 'answer'")
    if unknown := row.keys() - _KEYS:
        raise ValueError(f"unknown keys {sorted(unknown)}; allowed: {sorted(_KEYS)}")
    if empty := [key for key in ("question", "answer") if not (isinstance(row[key], str) and row[key].strip())]:
        raise ValueError(f"{empty[0]!r} must be a text that is not empty")
    old = row.get("old", ["-"])
    if not (isinstance(old, list) and old and all(isinstance(text, str) and text.strip() for text in old)):
        raise ValueError("'old' must be a list of texts that were right once")
    if row.get("kind", "direct") not in KINDS:
        raise ValueError(f"'kind' must be one of {', '.join(KINDS)}, not {row['kind']!r}")
    # Whatever asks before the skill folder is checked can rely on a row that can be graded.
    contains.grade("", Example("", (), {"role": "assistant", "content": row["answer"]}, metadata=wanted(row)))


def gradable(questions: Questions, grader: str, skipped: list[str] | None = None) -> Questions:
    """The questions whose own answer the grader finds right. Raises InputError listing the others, or leaves them out
    (``build``)."""
    grade = make_grader(grader, {}, where="--grader")
    problems: list[str] = []
    kept: list[tuple[int, dict[str, Any]]] = []
    for number, row in questions.rows:
        answer = {"role": "assistant", "content": row["answer"].strip()}
        example = Example("", (), answer, metadata=wanted(row), origin=f"{questions.place}:{number}")
        wrong = not_gradable(grader, grade, (example,))
        problems += wrong
        kept += [] if wrong else [(number, row)]
    refuse_or_skip(problems, skipped if kept else None)
    return replace(questions, rows=tuple(kept))


def divided(questions: Questions, passages: Sequence[Passage],
            skipped: list[str] | None = None) -> tuple[list[Row], list[Row]]:  # fmt: skip
    """Rows to teach and rows to test. Raises InputError for a side that is empty, and listing the questions without a
    passage, or leaves these out (``build``)."""
    problems: list[str] = []
    found: dict[int, Passage | None] = {}
    last: dict[str, int] = {}  # fact -> line of its last phrasing, where it has several
    count: dict[str, int] = {}
    for number, row in questions.rows:
        direct = row.get("kind", "direct") == "direct"
        passage = holding(row, passages) if direct else None
        if direct and passage is None:
            where = f" of {row['source']}" if "source" in row else ""
            problems.append(f"{questions.place}:{number}: no passage{where} contains the answer {row['answer']!r}")
            continue
        found[number] = passage
        if direct and "fact" in row:
            fact = str(row["fact"])
            last[fact], count[fact] = number, count.get(fact, 0) + 1
    train: list[Row] = []
    test: list[Row] = []
    for number, row in questions.rows:
        if number not in found:
            continue
        kind, fact, passage = row.get("kind", "direct"), fact_of(number, row), found[number]
        held_out = kind != "direct" or (count.get(fact, 0) > 1 and last[fact] == number)
        made: Row = {
            "id": f"{kind}-{number}", "prompt": row["question"].strip(), "completion": row["answer"].strip(),
            "metadata": {"kind": kind, "fact": fact} | wanted(row) | ({"old": row["old"]} if "old" in row else {}),
        }  # fmt: skip
        if passage:
            made |= {"document": passage.text}
            made["metadata"]["source"] = passage.source
        (test if held_out else train).append(made)
    taught = {row["prompt"]: row["id"].rpartition("-")[2] for row in train}
    for row in (row for row in test if row["prompt"] in taught):
        number = row["id"].rpartition("-")[2]
        problems.append(f"{questions.place}:{number}: asks what line {taught[row['prompt']]} teaches")
    test = [row for row in test if row["prompt"] not in taught]
    if not train:
        problems.append(
            f"{questions.place}: no question is left to teach; a fact needs two phrasings to be taught and tested"
        )
    if not test:
        problems.append(f"{questions.place}: nothing to test with; give facts a second phrasing, or indirect questions")
    refuse_or_skip(problems, skipped if train and test else None)
    return train, test


def wanted(row: dict[str, Any]) -> dict[str, Any]:
    """What the grader ``contains`` looks for, as a row's metadata say it."""
    return {"contains": row.get("contains", [row["answer"].strip()])}


def fact_of(number: int, row: dict[str, Any]) -> str:
    """The fact that a question asks for; a question without one is a fact by itself."""
    return str(row.get("fact", f"line {number}"))


def holding(row: dict[str, Any], passages: Sequence[Passage]) -> Passage | None:
    """The passage that contains the answer; of several the one that has most of the question's words."""
    answer = plain(row["answer"])
    if not answer:  # an answer of signs only would be found everywhere
        return None
    fits = [p for p in passages if row.get("source", p.file) == p.file and contains.occurs(answer, plain(p.text))]
    words = set(plain(row["question"]).split())
    return max(fits, key=lambda p: len(words & set(plain(p.text).split())), default=None)


_SIGNS = ".,;:!?\"'()[]\u3001\u3002\u300c\u300d\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f"


@lru_cache(8192)  # every question looks through the same passages
def plain(text: str) -> str:
    """Lower case, without punctuation at the ends of words, single spaces: how a quotation is looked for."""
    words = (word.strip(_SIGNS) for word in text.casefold().split())
    return " ".join(word for word in words if word)
