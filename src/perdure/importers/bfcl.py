"""Tool calls: a function's signature and a request -> one JSON call, from the Berkeley Function Calling Leaderboard.

``build`` makes rows where the function fits; ``build_mixed`` adds rows where it does not and no call is right.
Signatures are written in one line, so that prompts stay short enough for a small model on a laptop. The split is by
function: no function of the test rows occurs in a training row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perdure.importers.base import Row, package_file, write_skill
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


def build_mixed(target: Path, seed: int = 0, train_rows: int = 600, test_rows: int = 160) -> Path:
    """Write a skill folder in which a fifth of the training rows, and a quarter of the test rows, want no call.

    Raises InputError when the package is missing."""
    few, fewer = train_rows // 5, test_rows // 4
    train, test = _calls(seed, test_rows - fewer)
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
                     "prompt": f"{signature(function)}\n{turn['content'].strip()}", "completion": NO_CALL,
                     "metadata": {"ground_truth": [], "kind": "no call"}})  # fmt: skip
    return rows


def _calls(seed: int, test_rows: int) -> tuple[list[Row], list[Row]]:
    """Training rows, and at least ``test_rows`` test rows of other functions."""
    by_function: dict[str, list[Row]] = {}
    prompts: set[str] = set()
    for category in FILES:
        for function, row in _rows(category):
            if row["prompt"] not in prompts:
                prompts.add(row["prompt"])
                by_function.setdefault(function, []).append(row)
    names = sorted(by_function)
    random.Random(f"{seed}/bfcl").shuffle(names)
    test: list[Row] = []
    while len(test) < test_rows:
        test += by_function[names.pop()]
    return [row for name in names for row in by_function[name]], test


def _rows(category: str) -> Iterator[tuple[str, Row]]:
    """(function, row) for every question that fits: one user turn, plain argument values, short."""
    file = f"BFCL_v4_{category}.json"
    questions, answers = (
        [json.loads(line) for line in package_file(PACKAGE, "bfcl_eval", path, sha256).read_text("utf-8").splitlines()]
        for path, sha256 in zip((f"data/{file}", f"data/possible_answer/{file}"), FILES[category], strict=True)
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
        row: Row = {"prompt": f"{signature(function)}\n{turns[0]}", "completion": call,
                    "metadata": {"ground_truth": wanted, "kind": "call"}}  # fmt: skip
        if len(json.dumps(arguments)) <= MAX_ARGUMENTS and _is_right(row):
            yield name, row


def signature(function: dict[str, Any]) -> str:
    """``name(required: type, optional?: type)``."""
    required = function["parameters"].get("required", [])
    parts = (
        f"{key}{'' if key in required else '?'}: {value.get('type', 'any')}"
        for key, value in function["parameters"]["properties"].items()
    )
    return f"{function['name']}({', '.join(parts)})"


def _is_right(row: Row) -> bool:
    """Whether the demonstration made from the first allowed values is a right answer by the grader itself."""
    return grade(row["completion"], Example("", (), None, metadata=row["metadata"])) == 1
