"""Conversations: which of their turns are demonstrations, and whether their tool calls are ones that could be made.

A row with ``turns = "all"`` in ``skill.toml`` teaches every assistant turn: each is a demonstration of its own, after
the conversation so far as it was recorded, tool results included.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, DecimalException
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, SchemaError, ValidationError
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from perdure.types import Message, with_objects


def positions(messages: Sequence[Message]) -> list[int]:
    """Places of the assistant turns to learn: all but those with ``"weight": 0`` (context only, as in OpenAI's files).

    Raises ValueError where there is none, or for a weight that is neither 0 nor 1."""
    places = []
    for place, message in enumerate(messages):
        weight = message.get("weight", 1)
        if weight not in (0, 1) or ("weight" in message and message["role"] != "assistant"):
            raise ValueError(f"'weight' is 0 or 1, and of assistant turns only, not {weight!r} of {message['role']!r}")
        if message["role"] == "assistant" and weight:
            places.append(place)
    if not places:
        raise ValueError("every assistant turn has weight 0: nothing is left to learn")
    return places


def played(messages: Sequence[Message], max_turns: int) -> None:
    """Raises ValueError for a conversation that cannot be played from its beginning to its end in so many turns."""
    if any(message.get("weight", 1) == 0 for message in messages):
        raise ValueError("a conversation that is played in an environment has no turns of weight 0")
    roles = [message["role"] for message in messages]
    if (turns := roles.count("assistant")) > max_turns:
        raise ValueError(f"{turns} assistant turns, and a conversation is played for {max_turns}: raise max_turns")
    first = roles.index("assistant")
    if first == 0 or roles[first - 1] != "user" or "user" in roles[first:]:
        raise ValueError("a conversation that is played is one request: user, then assistant and tool turns only")


def bare(message: Message) -> Message:
    """A message as chat templates take it: without its weight."""
    return {key: value for key, value in message.items() if key != "weight"}


_SHOWN = ("role", "content", "reasoning_content", "name")
"""What chat templates show of a message beside its calls."""


def as_shown(message: Message) -> Message:
    """What of a message chat templates show: neither ids, which differ each time the same is said, nor the API's own
    keys. Arguments are objects, whichever of the two forms they came in."""
    shown = {key: message[key] for key in _SHOWN if message.get(key) is not None}
    if calls := message.get("tool_calls"):
        functions = [call.get("function", call) for call in calls]
        shown["tool_calls"] = [[function.get("name"), with_objects(function).get("arguments", {})]
                               for function in functions]  # fmt: skip
    return shown


def metadata_of_turns(metadata: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The metadata of each of ``count`` turns: that of the row, with ``metadata.turns[k]`` over it.

    Raises ValueError when ``turns`` has another length."""
    common = {key: value for key, value in metadata.items() if key != "turns"}
    own = metadata.get("turns", [{}] * count)
    if not (isinstance(own, list) and len(own) == count and all(isinstance(turn, dict) for turn in own)):
        raise ValueError(f"'metadata.turns' must be a list with an object for each of the {count} turns to learn")
    return [common | turn for turn in own]


def check_order(messages: Sequence[Message]) -> None:
    """Raises ValueError for a tool turn that answers no assistant turn, or a conversation that ends in one."""
    for before, message in zip((None, *messages), messages, strict=False):
        if message["role"] == "tool" and (before is None or before["role"] not in ("assistant", "tool")):
            raise ValueError("a tool turn must follow the assistant turn that called it, or another tool turn")
    if messages[-1]["role"] == "tool":
        raise ValueError("the conversation ends in a tool turn; the assistant's answer to it is missing")


def check_calls(message: Message, tools: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError for a call of a function that ``tools`` do not hold, or whose arguments do not fit its schema.

    Without tools nothing is known of the functions, and nothing is checked."""
    functions = [function for function in map(_function, tools) if "name" in function]
    if unnamed := [function["name"] for function in functions if not isinstance(function["name"], str)]:
        raise ValueError(f"the name of a tool must be a text, not {unnamed[0]!r}")
    known = {function["name"]: function for function in functions}
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        name, arguments = function["name"], function.get("arguments", {})
        if not known:
            continue
        if name not in known:
            raise ValueError(f"calls {name!r}, which is not among the tools ({', '.join(sorted(known))})")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except json.JSONDecodeError as error:
                raise ValueError(f"the arguments of {name!r} are not valid JSON: {error.msg}") from error
            except RecursionError as error:
                raise ValueError(f"the arguments of {name!r} are nested too deeply") from error
        if problem := next(_problems(known[name].get("parameters") or {}, arguments, name), None):
            raise ValueError(problem)


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}


def _problems(schema: Any, arguments: Any, name: str) -> Any:
    try:
        # Of the version that the schema names, by default of the newest.
        validator = _lenient(validator_for(schema, Draft202012Validator))
        validator.check_schema(schema, format_checker=FormatChecker(()))  # patterns: see _pattern
    except (SchemaError, RecursionError) as error:
        said = error.message if isinstance(error, SchemaError) else "nested too deeply"
        raise ValueError(f"the parameters of the tool {name!r} are no JSON Schema: {said}") from error
    try:
        # A registry of its own: the default one would fetch what a "$ref" names from the network.
        for error in validator(schema, registry=Registry()).iter_errors(arguments):
            place = ".".join(map(str, error.absolute_path))
            yield f"the arguments of {name!r} do not fit its schema{f' at {place}' if place else ''}: {error.message}"
    except Unresolvable as error:
        raise ValueError(f"the parameters of the tool {name!r} refer to {error.ref!r}, which is not in them") from error
    except (RecursionError, OverflowError, DecimalException, re.error) as error:
        raise ValueError(f"the arguments of {name!r} cannot be compared with its schema: {error}") from error


@lru_cache  # a class of its own, for each call of each row
def _lenient(validator: Any) -> Any:
    return extend(validator, {"pattern": _pattern, "multipleOf": _multiple_of})


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    """A pattern of JavaScript's that Python does not know ("\\p{L}") is not checked."""
    with contextlib.suppress(re.error):
        if validator.is_type(value, "string") and not re.search(pattern, value):
            yield ValidationError(f"{value!r} does not match {pattern!r}")


def _multiple_of(validator: Any, step: float, value: Any, schema: Any) -> Iterator[ValidationError]:
    """In decimals, as they are written: 19.99 is a multiple of 0.01."""
    if validator.is_type(value, "number") and Decimal(str(value)) % Decimal(str(step)):
        yield ValidationError(f"{value!r} is not a multiple of {step!r}")
