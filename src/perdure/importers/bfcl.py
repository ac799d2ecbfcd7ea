"""Tool calls: a function's signature and a request -> one JSON call, from the Berkeley Function Calling Leaderboard.

``build`` makes rows where the function fits. ``build_mixed`` tests on the same rows and on some where it does not and
no call is right, trains on more functions, and shows the values that an argument may have. Signatures are written in
one line, so that prompts stay short enough for a small model on a laptop. The split is by function: no function of the
test rows occurs in a training row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from perdure.files import package_file
from perdure.importers.base import Row, write_skill
from perdure.skills.graders.tool_call import grade
from perdure.types import Example

PACKAGE = "bfcl-eval==2026.3.23"
FILES = {
    "simple_python": ("82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
                      "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc"),
    "live_simple": ("1af2ac87dca47556db7b7e37e51e28b459a38b594e3c7b3c792b4903598ca0c4",
                    "fec9cfa9744a936f9126981e85a2023da1e63e273eafebc81923a1162fad70ce"),
    "multiple": ("aef168155ebd74b7ac2401198b201343bc7d16d7a3d7e0d4e6d8ee82c6969b2a",
                 "244e00ce9395df948bcafc7bee64e8f9c87ef70887587d83cae45b13699f3047"),
}  # fmt: skip
"""Category -> sha256 of its questions and of its answers."""
MORE = {
    "live_multiple": ("fd8ccfad4d911420d0e3341dbe2fff77d1d341da934248b9bb2bda24ab3a10c8",
                      "97e90d59c5bd76c55a2920ce93e5566e9046307d3f558578f085f9d3a56c3084"),
}  # fmt: skip
"""The same of what ``build_mixed`` trains on besides."""
IRRELEVANCE = ("data/BFCL_v4_irrelevance.json", "2b6ed4c2e992cdcf5f1678a701851f944bef7550ee026ed1ddb89efed5be01a6")
"""Requests that the function at hand cannot serve, and their sha256."""
SYSTEM = "Answer with one tool call."
MIXED_SYSTEM = "Answer with one tool call, or say that no function fits."
NO_CALL = "No function fits."
SETTINGS = {
    "name": "tool-call",
    "description": "A function's signature and a request to one JSON tool call; test functions were never trained.",
    "licence": "Apache-2.0",
    "source": PACKAGE,
    "grader": "tool_call",
    "max_new_tokens": 96,
    "system": SYSTEM,
}
MAX_WORDS = 45
"""Longest request kept, in words."""
MAX_ARGUMENTS = 110
"""Longest arguments kept, in characters of JSON."""


def build(target: Path, seed: int = 0, train_rows: int = 480, test_rows: int = 120) -> Path:
    """Write the skill folder. Raises InputError when the package is missing."""
    train, test = _calls(seed, test_rows)
    return write_skill(target, SETTINGS, train[:train_rows], test[:test_rows])


def build_mixed(target: Path, seed: int = 0, train_rows: int = 1200, test_rows: int = 160) -> Path:
    """Write a skill folder in which a sixth of the training rows, and a quarter of the test rows, want no call.

    Raises InputError when the package is missing."""
    few, fewer = train_rows // 6, test_rows // 4
    train, test = _calls(seed, test_rows - fewer, choices=True)
    held_out = set(map(_function, test))
    train = _without_twins([*train, *(row for name, sums in MORE.items() for row in _rows(name, sums, choices=True))])
    train = [row for row in train if _function(row) not in held_out]
    random.Random(f"{seed}/bfcl more").shuffle(train)
    random.Random(f"{seed}/bfcl mixed").shuffle(none := _irrelevant())
    train, test = train[: train_rows - few], test[: test_rows - fewer]
    test += [row for row in none if _function(row) not in set(map(_function, train))][:fewer]
    train += [row for row in none if _function(row) not in set(map(_function, test))][:few]
    random.Random(f"{seed}/bfcl order").shuffle(train)
    settings = SETTINGS | {
        "name": "tool-use",
        "description": "A function's signature and a request to one JSON call, or to a refusal where it cannot serve.",
        "system": MIXED_SYSTEM,
    }
    return write_skill(target, settings, train, test)


def _function(row: Row) -> str:
    return row["prompt"].split("(", 1)[0]


def _irrelevant() -> list[Row]:
    """Rows where no call is right; their ids begin with "none"."""
    path, sha256 = IRRELEVANCE
    rows: list[Row] = []
    for line in package_file(PACKAGE, "bfcl_eval", path, sha256).read_text("utf-8").splitlines():
        question = json.loads(line)
        (turn,), (function,) = question["question"][0], question["function"]
        rows.append({"id": f"none-{question['id'].rpartition('_')[2]}",
                     "prompt": f"{signature(function, choices=True)}\n{turn['content'].strip()}", "completion": NO_CALL,
                     "metadata": {"ground_truth": [], "kind": "no call"}})  # fmt: skip
    return rows


def _calls(seed: int, test_rows: int, choices: bool = False) -> tuple[list[Row], list[Row]]:
    """Training rows, and at least ``test_rows`` test rows of other functions."""
    by_function: dict[str, list[Row]] = {}
    for row in _without_twins(row for category, sums in FILES.items() for row in _rows(category, sums, choices)):
        by_function.setdefault(_function(row), []).append(row)
    names = sorted(by_function)
    random.Random(f"{seed}/bfcl").shuffle(names)
    test: list[Row] = []
    while len(test) < test_rows:
        test += by_function[names.pop()]
    return [row for name in names for row in by_function[name]], test


def _without_twins(rows: Iterable[Row]) -> list[Row]:
    """The first row of each prompt."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["prompt"], row)
    return list(first.values())


def _rows(category: str, sums: tuple[str, str], choices: bool) -> Iterator[Row]:
    """A row for every question that fits: one user turn, plain argument values, short."""
    file = f"BFCL_v4_{category}.json"
    questions, answers = (
        [json.loads(line) for line in package_file(PACKAGE, "bfcl_eval", path, sha256).read_text("utf-8").splitlines()]
        for path, sha256 in zip((f"data/{file}", f"data/possible_answer/{file}"), sums, strict=True)
    )
    truth = {answer["id"]: answer["ground_truth"] for answer in answers}
    for question in questions:
        turns = [turn["content"].strip() for turn in question["question"][0] if turn["role"] == "user"]
        wanted = truth[question["id"]]
        (name, allowed), *_ = wanted[0].items()
        arguments = {key: values[0] for key, values in allowed.items() if values and "" not in values}
        plain = not any(isinstance(value, (dict, list)) for value in arguments.values())
        if len(turns) != 1 or len(turns[0].split()) > MAX_WORDS or not plain:
            continue
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        function = next(f for f in question["function"] if f["name"] == name)
        row: Row = {"prompt": f"{signature(function, choices)}\n{turns[0]}", "completion": call,
                    "metadata": {"ground_truth": wanted, "kind": "call"}}  # fmt: skip
        if len(json.dumps(arguments)) <= MAX_ARGUMENTS and _is_right(row):
            yield row


def signature(function: dict[str, Any], choices: bool = False) -> str:
    """``name(required: type, optional?: type)``; with ``choices`` an argument's values, where its schema lists them, in
    the place of its type: ``unit: "celsius" | "fahrenheit"``."""

    def kind(schema: dict[str, Any]) -> str:
        if choices and "enum" in schema:
            return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
        return schema.get("type", "any")

    required = function["parameters"].get("required", [])
    arguments = function["parameters"]["properties"]
    parts = (f"{key}{'' if key in required else '?'}: {kind(schema)}" for key, schema in arguments.items())
    return f"{function['name']}({', '.join(parts)})"


def _is_right(row: Row) -> bool:
    """Whether the demonstration made from the first allowed values is a right answer by the grader itself."""
    return grade(row["completion"], Example("", (), None, metadata=row["metadata"])) == 1
