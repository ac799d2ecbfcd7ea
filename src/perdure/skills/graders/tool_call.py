"""Tool calls: names and arguments, with the alternatives that the row allows."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from perdure.skills.graders.text import expected_text, json_values, same_json, whole_json
from perdure.types import Example

Call = tuple[str, dict[str, Any]]
"""Name and arguments; the name is empty where a call was begun that none can be."""
Wanted = tuple[str, dict[str, list[Any]]]
"""Name, and the allowed values of each argument."""

_BEGUN = re.compile(r"""\{\s*["'](?:name|function)["']\s*:\s*["'{]|<(?:\|)?tool_call|\[TOOL_CALLS\]""")
"""Where a call begins, whole or not: as JSON, as Python writes it, or with the marks of some models."""


def grade(completion: str, example: Example) -> float:
    """1 when the calls in the answer are the expected ones, in any order.

    Expected are ``metadata.ground_truth`` ([{function: {argument: [allowed values]}}]; an allowed "" makes the argument
    optional; [] means that no call is right), else the demonstration's own calls. Raises ValueError when
    ``metadata.ground_truth`` has another form."""
    wanted = calls_for(example)
    if not wanted and _BEGUN.search(completion):  # also where it is no JSON: whoever begins a call does not refuse
        return 0.0
    return float(_match(calls_in(completion), wanted))


def calls_for(example: Example) -> list[Wanted]:
    """The calls that are right for a row; none where no call is. Raises ValueError as ``grade`` does."""
    if "ground_truth" in example.metadata:
        return _ground_truth(example.metadata["ground_truth"])
    said = example.demonstration or {}
    # Beside calls a text is what is said while they run; it holds none of them.
    right = calls_in(json.dumps(said["tool_calls"]) if said.get("tool_calls") else expected_text(example))
    if any(not name for name, _ in right):
        raise ValueError("the demonstration holds a call without a name, or whose arguments are no JSON object")
    return [(name, {key: [value] for key, value in arguments.items()}) for name, arguments in right]


def _ground_truth(value: Any) -> list[Wanted]:
    wanted = []
    for call in value if isinstance(value, list) else [None]:
        name, arguments = next(iter(call.items())) if isinstance(call, dict) and len(call) == 1 else ("", None)
        if not (isinstance(arguments, dict) and all(isinstance(allowed, list) for allowed in arguments.values())):
            raise ValueError("'metadata.ground_truth' must be [{function: {argument: [allowed values]}}]")
        wanted.append((name, arguments))
    return wanted


def calls_in(text: str) -> list[Call]:
    """Every call in the text, written as {"name", "arguments"}, in a list or one after the other, with or without
    the "function" shell around them. JSON that is no call ("[1]") is just text."""
    values = (value if isinstance(value, list) else [value] for value in json_values(text))
    return [_call(item) for items in values for item in items if isinstance(item, dict) and _begins_call(item)]


def _begins_call(item: dict[str, Any]) -> bool:
    return "name" in item or "function" in item


def _call(item: dict[str, Any]) -> Call:
    shell = item.get("function", item)
    call = shell if isinstance(shell, dict) else {}
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = whole_json(arguments or "{}")
        except ValueError:  # a wrong call, not an error
            arguments = None
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        return "", {}
    return call["name"], arguments


def _match(given: list[Call], wanted: list[Wanted]) -> bool:
    """Whether calls and expectations can be paired one to one; alternatives may overlap, so the pairing is searched."""
    if len(given) != len(wanted):
        return False
    if not wanted:
        return True
    fits = [[name == call and _arguments_match(found, allowed) for call, found in given] for name, allowed in wanted]
    pairing = maximum_bipartite_matching(csr_array(np.array(fits, dtype=np.int8)), perm_type="column")
    return bool((pairing >= 0).all())


def _arguments_match(given: dict[str, Any], allowed: dict[str, list[Any]]) -> bool:
    if given.keys() - allowed.keys():
        return False
    return all(
        any(same_json(given[key], value) for value in values) if key in given else "" in values
        for key, values in allowed.items()
    )
