"""Graders: one file each, ``grade(completion, example, **options) -> 0..1``. This dict is the registry.

A grader never raises over what a model wrote. It raises ValueError over a row that it cannot grade; the skill's
validation finds those before anything runs. What a user's own grader raises becomes an InputError that names the row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from inspect import Parameter
from typing import Any

from perdure.skills.graders import choice, contains, exact, json_value, number, regex, token_f1, tool_call
from perdure.skills.users import users_code, users_function
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
    """The grader with its options bound. Raises InputError listing everything that is wrong with name and options."""
    if problems := grader_problems(name, options):
        raise InputError("\n".join(f"{where}: {problem}" for _, problem in problems))
    function = _find(name)

    def grade(completion: str, example: Example) -> float:
        """0..1. Raises ValueError for a row that cannot be graded."""
        return float(function(completion, example, **options))

    def by_the_user(completion: str, example: Example) -> float:
        """0..1. Raises InputError for whatever happens in code that is not ours, naming the row."""
        with users_code(example, f"the grader {name!r} failed on an answer to it"):
            score = grade(completion, example)
        if not 0 <= score <= 1:
            raise InputError(f"{example.origin}: the grader {name!r} gave {score}, expected a score from 0 to 1")
        return score

    return grade if name in GRADERS else by_the_user


def grader_problems(name: str, options: dict[str, Any]) -> list[tuple[str, str]]:
    """(key in skill.toml, what is wrong) of each problem; an unknown name is the only one of its skill."""
    try:
        function = _find(name)
    except ValueError as error:
        return [("grader", str(error))]
    parameters = list(inspect.signature(function).parameters.values())[2:]
    known = {p.name: p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    problems = []
    for key, value in options.items():
        if key not in known and not takes_any:
            allowed = ", ".join(sorted(known)) or "none"
            problems.append((key, f"the grader {name!r} has no option {key!r}; it has: {allowed}"))
        elif key in known and not _fits(value, known[key].default):
            problems.append((key, f"the option {key!r} of {name!r} must be {_KINDS[type(known[key].default)]}"))
    for key in known.keys() - options.keys():
        if known[key].default is Parameter.empty:
            problems.append(("grader", f"the grader {name!r} needs the option {key!r}"))
    if name == "regex" and options.get("pattern"):
        problems += _pattern_problem(options["pattern"])
    return problems


_KINDS = {bool: "true or false", int: "a whole number", float: "a number of at least 0", str: "a text"}


def _fits(value: Any, default: Any) -> bool:
    """Whether an option's value is of its default's kind; an option without one, or of another kind, takes anything."""
    if type(default) not in _KINDS:
        return True
    if isinstance(default, float):
        return type(value) in (int, float) and 0 <= value < math.inf
    return type(value) is type(default)


def _pattern_problem(pattern: Any) -> list[tuple[str, str]]:
    if not isinstance(pattern, str):  # reported as a wrong type already
        return []
    try:
        regex.compiled(pattern)
    except ValueError as error:
        return [("pattern", str(error))]
    return []


def _find(name: str) -> Callable[..., Any]:
    """Raises ValueError for an unknown grader."""
    if name.startswith("python:"):
        return _python(name)
    if name not in GRADERS:
        raise ValueError(f"unknown grader {name!r}; use {', '.join(GRADERS)} or python:module:function")
    return GRADERS[name]


def _python(name: str) -> Callable[..., Any]:
    """The user's own function."""
    function = users_function(name, "grader")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the grader {name!r} cannot be used: {error}") from error
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    if [p.kind in positional for p in list(signature.parameters.values())[:2]] != [True, True]:
        raise ValueError(f"the grader {name!r} must take (completion, example) and its options")
    return function
