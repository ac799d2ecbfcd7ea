"""New knowledge from documents: questions with answers, each beside the passage that holds the answer.

The teacher sees passage and answer (template ``document``), the student only the question. What is tested is not what
was taught: another phrasing of a taught fact (``direct``), a question that takes a fact from another side or two facts
together (``indirect``), and questions on what was not taught (``control``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.importers.base import Row, skill_name, write_skill
from perdure.importers.passages import Passage, read_passages
from perdure.types import InputError

KINDS = ("direct", "indirect", "control")
_KEYS = {"question", "answer", "fact", "kind", "source", "contains"}
MAX_NEW_TOKENS = 48


def build(target: Path, documents: Path, questions: Path, grader: str = "contains") -> Path:
    """Write the skill folder from documents and a JSONL file of questions.

    A line is ``{"question", "answer"}`` with, where wanted, ``fact`` (lines of the same fact are phrasings of one
    question; the last is held out as a test), ``kind`` (direct, indirect or control; the last two are tests only),
    ``source`` (the document that holds the answer) and ``contains`` (texts that a right answer must contain; default:
    the answer). Raises one InputError that lists every bad document or line."""
    passages = read_passages(documents)
    asked = _read(questions)
    problems: list[str] = []
    train, test = _divided(asked, passages, questions, problems)
    if not train:
        problems.append(
            f"{questions}: no question is left to teach; a fact needs two phrasings to be taught and tested"
        )
    if not test:
        problems.append(f"{questions}: nothing to test with; give facts a second phrasing, or indirect questions")
    if problems:
        raise InputError("\n".join(problems))
    longest = max(len(str(row["completion"])) for row in (*train, *test))
    settings = {
        "name": skill_name(target),
        "description": f"Facts of {documents.name}.",
        "source": documents.name,
        "grader": grader,
        # A token is at least one byte of the answer; a model may say more than the bare answer.
        "max_new_tokens": max(MAX_NEW_TOKENS, longest // 2),
    }
    return write_skill(target, settings, train, test)


def _read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, question) of each line. Raises InputError listing the bad ones."""
    if not path.is_file():
        raise InputError(f'{path}: no such file; it should hold one {{"question", "answer"}} a line')
    found, problems = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check(row)
            found.append((number, row))
        except ValueError as error:  # of JSON, of the encoding, or ours
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise InputError("\n".join(problems))
    return found


def _check(row: Any) -> None:
    if not isinstance(row, dict) or not {"question", "answer"} <= row.keys():
        raise ValueError("expected an object with 'question' and 'answer'")
    if unknown := row.keys() - _KEYS:
        raise ValueError(f"unknown keys {sorted(unknown)}; allowed: {sorted(_KEYS)}")
    if empty := [key for key in ("question", "answer") if not (isinstance(row[key], str) and row[key].strip())]:
        raise ValueError(f"{empty[0]!r} must be a text that is not empty")
    if row.get("kind", "direct") not in KINDS:
        raise ValueError(f"'kind' must be one of {', '.join(KINDS)}, not {row['kind']!r}")


def _divided(asked: Sequence[tuple[int, dict[str, Any]]], passages: Sequence[Passage], questions: Path,
             problems: list[str]) -> tuple[list[Row], list[Row]]:  # fmt: skip
    """Rows to teach and rows to test."""
    last: dict[str, int] = {}  # fact -> line of its last phrasing, where it has several
    count: dict[str, int] = {}
    for number, row in asked:
        if row.get("kind", "direct") == "direct" and "fact" in row:
            fact = str(row["fact"])
            last[fact], count[fact] = number, count.get(fact, 0) + 1
    train: list[Row] = []
    test: list[Row] = []
    for number, row in asked:
        kind, fact = row.get("kind", "direct"), str(row.get("fact", f"line {number}"))
        held_out = kind != "direct" or (count.get(fact, 0) > 1 and last[fact] == number)
        passage = None
        if kind == "direct" and (passage := holding(row, passages)) is None:
            where = f" of {row['source']}" if "source" in row else ""
            problems.append(f"{questions}:{number}: no passage{where} contains the answer {row['answer']!r}")
            continue
        made: Row = {
            "id": f"{kind}-{number}", "prompt": row["question"].strip(), "completion": row["answer"].strip(),
            "metadata": {"kind": kind, "fact": fact, "contains": row.get("contains", [row["answer"].strip()])},
        }  # fmt: skip
        if passage:
            made |= {"document": passage.text}
            made["metadata"]["source"] = passage.source
        (test if held_out else train).append(made)
    return train, test


def holding(row: dict[str, Any], passages: Sequence[Passage]) -> Passage | None:
    """The passage that contains the answer; of several the one that has most of the question's words."""
    wanted = _plain(row["answer"])
    fits = [p for p in passages if row.get("source", p.file) == p.file and wanted in _plain(p.text)]
    words = set(_plain(row["question"]).split())
    return max(fits, key=lambda p: len(words & set(_plain(p.text).split())), default=None)


def _plain(text: str) -> str:
    """Lower case, without punctuation at the ends of words, single spaces: how a quotation is looked for."""
    return " ".join(word.strip(".,;:!?\"'()[]") for word in text.casefold().split()).strip()
