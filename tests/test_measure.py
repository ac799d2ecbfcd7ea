"""Scores in parts: the accuracy of each kind of test rows, and what is said of facts that changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fakes import ScriptedEngine, renderer, toy_skill
from perdure.evaluate import evaluate
from perdure.measure import said_of_kinds, score_json
from perdure.skills.base import Skill, load_skill
from perdure.types import Example

OLD = {"cat": ["black", "grey"], "dog": ["white"]}


def skill(folder: Path) -> Skill:
    """Cats and dogs are direct rows whose colour was another one before, the others are control rows."""
    found = load_skill(toy_skill(folder / "colours"))

    def described(row: Example) -> Example:
        key = row.messages[-1]["content"].split()[-1]
        kind = {"kind": "direct" if key in OLD else "control"}
        return replace(row, metadata=kind | ({"old": OLD[key]} if key in OLD else {}))

    return replace(found, test=tuple(map(described, found.test)))


def scored(found: Skill, **answers: str) -> dict:
    engine = ScriptedEngine(lambda prompt: answers[prompt.example.messages[-1]["content"].split()[-1]])
    return score_json(evaluate(engine, renderer(), "colours", found.test, found.grade, 8), found)


def test_a_score_holds_its_kinds_and_what_became_of_outdated_answers(tmp_path: Path) -> None:
    found = skill(tmp_path)
    before = scored(found, cat="black", dog="black", cow="green", hen="blue")
    assert before["kinds"] == {"direct": {"accuracy": 0.0, "n": 4}, "control": {"accuracy": 0.5, "n": 4}}
    assert before["changed"] == {"n": 4, "new": 0, "old": 2}  # nobody said that dogs were black
    after = scored(found, cat="red", dog="white", cow="green", hen="blue")
    assert after["changed"] == {"n": 4, "new": 2, "old": 2}
    assert said_of_kinds(before, after) == [
        "direct 0% to 50% (4), control 50% to 50% (4)",
        "of 4 facts that changed, old answers 2 to 2, new ones 0 to 2",
    ]


def test_a_skill_of_one_kind_has_nothing_to_say(tmp_path: Path) -> None:
    found = load_skill(toy_skill(tmp_path / "colours"))
    score = scored(found, cat="red", dog="white", cow="green", hen="blue")
    assert "kinds" not in score and "changed" not in score
    assert said_of_kinds(score, score) == []
