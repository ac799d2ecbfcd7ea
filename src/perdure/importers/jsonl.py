"""A JSONL file of your own: one demonstration a line, split into training and test rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from perdure.importers.base import Row, refuse_or_skip, skill_name, tokens_at_most, write_skill
from perdure.settings import parse
from perdure.skills.base import calls_as_text, not_gradable, prompt_key
from perdure.skills.graders import make_grader
from perdure.skills.reading import counted, in_short, read_rows
from perdure.skills.settings import SkillSettings
from perdure.skills.turns import as_shown
from perdure.types import Example, InputError, Message

Turns = Literal["last", "all"]


def build(target: Path, seed: int, file: Path, grader: str, test_share: float, turns: Turns = "last",
          options: dict[str, Any] | None = None, skipped: list[str] | None = None) -> Path:  # fmt: skip
    """Write the skill folder. Rows with the same (first) prompt stay on one side, and so do rows of which one is the
    beginning of another, as in logs that hold a conversation once for each of its answers. Which side that is depends
    on seed and prompt alone: when the file has grown, what was held out of it is so again. Lines that repeat another
    one, whatever their ids, are left out, and ``source`` says how many. ``options``: of the grader.

    Raises InputError listing every bad line; where ``skipped`` is a list they are left out, and it gets what is wrong
    with them."""
    name, options = skill_name(target), options or {}
    settings: dict[str, Any] = {"name": name, "source": str(file.name), "grader": grader, "turns": turns}
    settings |= {"grader_options": options} if options else {}
    problems: list[str] = []
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    data = file.read_bytes()
    of_rows = parse(
        SkillSettings, {"name": name, "grader": grader, "max_new_tokens": 4096, "turns": turns}, str(target)
    )
    grade = make_grader(grader, options, where="--grader")
    examples = read_rows(file, of_rows, problems, data)
    problems += [*calls_as_text(grader, examples), *not_gradable(grader, grade, examples)]

    def line_of(said: str) -> str:
        """``file:line`` of a row's origin, or of a problem with one."""
        found = re.match(re.escape(str(file)) + r":\d+", said)
        return found[0] if found else said

    bad = set(map(line_of, problems))
    if not (good := [example for example in examples if line_of(example.origin) not in bad]):
        skipped = None
    refuse_or_skip(problems, skipped, f"{file}: {counted(problems, 'problem')}:\n" + in_short(problems))
    learned: dict[str, list[Example]] = {}  # of each line
    for example in good:
        learned.setdefault(line_of(example.origin), []).append(example)
    numbered = ((f"{file}:{number}", line) for number, line in enumerate(data.split(b"\n"), 1))
    lines: list[Row] = [json.loads(line) for origin, line in numbered if origin in learned]
    groups: dict[int, dict[str, Row]] = {}  # group -> whole line -> row
    of_line = _groups([*learned.values()])
    for group, row in zip(of_line, lines, strict=True):
        whole = json.dumps({key: value for key, value in row.items() if key != "id"}, sort_keys=True)
        groups.setdefault(group, {}).setdefault(whole, row)
    twice = len(lines) - sum(map(len, groups.values()))  # they would count as independent items
    without = [f"{twice} lines that were there already"] if twice else []
    without += [f"{len(bad)} that could not be used"] if bad else []
    settings["source"] = " ".join([file.name, *(["without", " and ".join(without)] if without else [])])
    if len(groups) < 2:
        raise InputError(f"{file}: {counted(groups, 'distinct prompt')}; at least 2 are needed to hold some out")
    prompts: dict[int, list[str]] = {}
    for group, line in zip(of_line, learned.values(), strict=True):
        prompts.setdefault(group, []).append(prompt_key(_beginning(line[0])))
    train, test = ([row for group in side for row in groups[group].values()]
                   for side in _sides(prompts, seed, test_share))  # fmt: skip
    answers = (json.dumps(example.demonstration, ensure_ascii=False) for example in good)
    settings["max_new_tokens"] = max(16, max(map(tokens_at_most, answers)))
    return write_skill(target, settings, train, test)


def _sides(prompts: Mapping[int, Sequence[str]], seed: int, test_share: float) -> tuple[list[int], list[int]]:
    """Groups to train on and groups to hold out, at least one of each, in an order of no meaning. What decides is the
    shortest of a group's prompts alone, so that a group stays where it is when the file has grown."""
    drawn: dict[int, float] = {}
    for group, those in prompts.items():
        shortest = min(those, key=lambda prompt: (len(prompt), prompt))
        drawn[group] = int(hashlib.sha256(f"{seed}/{shortest}".encode()).hexdigest()[:12], 16) / 16**12
    order = sorted(drawn, key=lambda group: drawn[group])
    held_out = min(len(order) - 1, max(1, sum(place < test_share for place in drawn.values())))
    return order[held_out:], order[:held_out]


def _beginning(example: Example) -> Example:
    """What its whole group shares: a conversation up to its first answer."""
    answers = [place for place, message in enumerate(example.messages) if message["role"] == "assistant"]
    return replace(example, messages=example.messages[: answers[0]]) if answers else example


def _groups(lines: Sequence[Sequence[Example]]) -> list[int]:
    """For each line, given by what is learned of it, the first line with which it must be on one side."""
    of_line = list(range(len(lines)))

    def first(place: int) -> int:
        while of_line[place] != place:
            place = of_line[place]
        return place

    def join(place: int, other: int) -> None:
        one, two = sorted((first(place), first(other)))
        of_line[two] = one

    whole = [[message and as_shown(message) for message in (*line[-1].messages, line[-1].demonstration)]
             for line in lines]  # fmt: skip
    known: dict[str, int] = {}
    for place, line in enumerate(lines):
        for key in (prompt_key(line[0]), _spoken(whole[place])):
            join(place, known.setdefault(key, place))
    for place, messages in enumerate(whole):
        for end, message in enumerate(messages[:-1], 1):
            begun = known.get(_spoken(messages[:end])) if message and message["role"] == "assistant" else None
            if begun is not None:
                join(place, begun)
    return [first(place) for place in range(len(lines))]


def _spoken(messages: Sequence[Message | None]) -> str:
    return json.dumps({"spoken": messages}, sort_keys=True)
