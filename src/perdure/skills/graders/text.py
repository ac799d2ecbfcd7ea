"""What graders share: the expected answer as text, and JSON found in an answer.

A model may write anything, so nothing here lets an answer raise more than ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from perdure.types import Example

SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts that write no spaces between words, for a class of a pattern: Thai, Lao, Burmese, Khmer, kana, Han."""


def expected_text(example: Example) -> str:
    """The demonstration's text, and its tool calls as compact JSON."""
    assert example.demonstration is not None
    content, calls = example.demonstration.get("content") or "", example.demonstration.get("tool_calls")
    if content and not calls:
        return content
    written = json.dumps(calls or [], separators=(",", ":"))
    return f"{content}\n{written}" if content else written


def whole_json(text: str) -> Any:
    """The text as one JSON value, a Markdown fence around it allowed. Raises ValueError when it is not."""
    stripped = text.strip()
    if stripped.startswith("```") and stripped.endswith("```"):
        stripped = stripped[3:-3].removeprefix("json").strip()
    try:
        return json.loads(stripped, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_values(text: str) -> Iterator[Any]:
    """Every JSON object or list in the text, one after the other; those inside another are not repeated."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    start = 0
    while start < len(text):
        if text[start] in "{[":
            try:
                value, start = decoder.raw_decode(text, start)
            except ValueError:  # a bracket that opens no JSON
                start += 1
                continue
            except RecursionError:  # no call and no demonstration is as deep; every next bracket would take as long
                return
            yield value
        else:
            start += 1


def first_json(text: str) -> Any:
    """The first JSON object or list in the text. Raises ValueError when there is none."""
    for value in json_values(text):
        return value
    raise ValueError("no JSON object or list in the text")


def same_json(a: Any, b: Any) -> bool:
    """Equal values whatever the order of keys; true and 1 are different, 1 and 1.0 are the same."""
    try:
        return json.dumps(_plain(a), sort_keys=True) == json.dumps(_plain(b), sort_keys=True)
    except RecursionError:  # the parser allows more levels than the comparison: no demonstration is as deep
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")
