"""Graders: one file each, ``grade(completion, example, **options) -> 0..1``. This dict is the registry."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from perdure.skills.graders import choice, contains, exact, json_value, number, regex, token_f1, tool_call
from perdure.types import Example, InputError

GRADERS: dict[str, Callable[..., float]] = {
    "exact": exact.grade,
    "choice": choice.grade,
    "json": json_value.grade,
    "tool_call": tool_call.grade,
    "number": number.grade,
    "regex": regex.grade,
    "contains": contains.grade,
    "token_f1": token_f1.grade,
}


def make_grader(name: str, options: dict[str, Any], where: str) -> Callable[[str, Example], float]:
    """The grader with its options bound. Raises InputError for an unknown grader or option, naming the allowed ones."""
    function = _python(name, where) if name.startswith("python:") else GRADERS.get(name)
    if function is None:
        raise InputError(f"{where}: unknown grader {name!r}; use {', '.join(GRADERS)} or python:module:function")
    parameters = list(inspect.signature(function).parameters.values())[2:]
    allowed = {p.name for p in parameters}
    if unknown := options.keys() - allowed:
        raise InputError(f"{where}: the grader {name!r} has no option {sorted(unknown)}; it has {sorted(allowed)}")
    for parameter in parameters:
        value = options.get(parameter.name)
        if value is not None and not _fits(value, parameter.default):
            raise InputError(f"{where}: the option {parameter.name!r} of {name!r} must be like {parameter.default!r}")
    if name == "regex" and options.get("pattern"):
        regex.compiled(options["pattern"], where)
    return lambda completion, example: float(function(completion, example, **options))


def _fits(value: Any, default: Any) -> bool:
    if default is inspect.Parameter.empty or default is None:
        return True
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)


def _python(name: str, where: str) -> Callable[..., float]:
    """The user's own function. Importing it runs the user's code: only ``skill.toml`` can ask for that, by name."""
    parts = name.split(":")
    if len(parts) != 3:
        raise InputError(f"{where}: write the grader as python:module:function, not {name!r}")
    try:
        function = getattr(importlib.import_module(parts[1]), parts[2])
    except (ImportError, AttributeError) as error:
        raise InputError(f"{where}: the grader {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise InputError(f"{where}: {name!r} is not a function")
    return function
