"""A tool call: name and arguments, with the alternatives that the row allows."""

from __future__ import annotations

import json
from typing import Any

from perdure.skills.graders.text import expected_text, first_json, same_json
from perdure.types import Example


def grade(completion: str, example: Example) -> float:
    """1 when the calls in the answer are the expected ones, in any order.

    Expected are ``metadata.ground_truth`` ([{function: {argument: [allowed values]}}]; an allowed "" makes the argument
    optional; [] means that no call is right), else the demonstration's own calls."""
    given = _calls(completion)
    if "ground_truth" in example.metadata:
        wanted = [next(iter(call.items())) for call in example.metadata["ground_truth"]]
        return float(_match(given, wanted))
    right = _calls(expected_text(example))
    wanted = [(name, {key: [value] for key, value in arguments.items()}) for name, arguments in right]
    return float(_match(given, wanted))


def _calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Calls written as {"name", "arguments"}, alone or in a list, with or without the "function" shell around them."""
    try:
        value = first_json(text)
    except ValueError:  # no JSON: no call
        return []
    calls = []
    for item in value if isinstance(value, list) else [value]:
        shell = item.get("function", item) if isinstance(item, dict) else None
        call = shell if isinstance(shell, dict) else {}
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return [("", {})]
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            return [("", {})]
        calls.append((call["name"], arguments))
    return calls


def _match(given: list[tuple[str, dict[str, Any]]], wanted: list[tuple[str, dict[str, list[Any]]]]) -> bool:
    rest = list(given)
    for name, arguments in wanted:
        found = next((call for call in rest if call[0] == name and _arguments_match(call[1], arguments)), None)
        if found is None:
            return False
        rest.remove(found)
    return not rest


def _arguments_match(given: dict[str, Any], allowed: dict[str, list[Any]]) -> bool:
    if given.keys() - allowed.keys():
        return False
    return all(
        any(same_json(given[key], value) for value in values) if key in given else "" in values
        for key, values in allowed.items()
    )
