"""Load and validate a skill folder: ``skill.toml``, ``train.jsonl``, ``test.jsonl``.

All three files are read to the end before anything is said, and every problem is reported as ``file:line``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from perdure.settings import parse_toml, problems_of
from perdure.skills.graders import GRADERS, grader_problems, make_grader
from perdure.skills.graders.text import expected_text
from perdure.skills.turns import bare, check_calls, check_order, metadata_of_turns, positions
from perdure.types import Example, InputError, Message

FILES = ("skill.toml", "train.jsonl", "test.jsonl")
_ROLES = ("system", "user", "assistant", "tool")
_KEYS = {"messages", "tools", "prompt", "completion", "document", "id", "metadata"}
_DEPTH = 64
"""Levels of a row's JSON. Far beyond any data, far below what a recursive walk can take."""


class SkillSettings(BaseModel):
    """``skill.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    description: str = ""
    licence: str = ""
    source: str = ""
    grader: str = "exact"
    grader_options: dict[str, Any] = {}
    max_new_tokens: int = Field(default=64, ge=1)
    system: str | None = None
    """Goes in front of rows without a system turn."""
    tools: tuple[dict[str, Any], ...] = ()
    """For rows without their own."""
    turns: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation are demonstrations: the last one, or each of them after what came before
    it (those with ``"weight": 0`` left out)."""
    retention_budget: float | None = Field(default=None, gt=0, lt=0.5)
    """Accuracy that this skill may lose when later ones are learned; the workspace's budget where absent."""

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name == "probe":
            raise ValueError('"probe" is what the prior capabilities are called; choose another name')
        return name


@dataclass(frozen=True)
class Skill:
    """A validated skill folder."""

    settings: SkillSettings
    folder: Path
    content_hash: str
    """sha256 over the names and bytes of the three files."""
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    grade: Callable[[str, Example], float]

    @property
    def name(self) -> str:
        return self.settings.name


def load_skill(folder: Path) -> Skill:
    """Read a skill. Raises one InputError that lists every problem of the three files."""
    files = skill_files(folder)
    problems: list[str] = []
    settings = _settings(folder / "skill.toml", files["skill.toml"], problems)
    # Rows are checked whatever the settings: their problems are to be known in the same run.
    of_rows = settings or SkillSettings(name="unknown")
    train, test = (read_rows(folder / name, of_rows, problems, files[name]) for name in FILES[1:])
    problems += _overlap(train, test)
    grade = None
    if settings:
        grade = make_grader(settings.grader, settings.grader_options, where=str(folder / "skill.toml"))
        problems += _not_gradable(settings.grader, grade, (*train, *test))
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise InputError(f"{folder}: {count}:\n" + "\n".join(problems))
    assert settings is not None and grade is not None
    return Skill(settings, folder, content_hash(files), train, test, grade)


def skill_files(folder: Path) -> dict[str, bytes]:
    """The bytes of the three files. Raises InputError for one that is missing or that lies outside the folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such skill folder")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: a skill folder needs {', '.join(FILES)}; missing: {', '.join(missing)}")
    for name in FILES:
        check_inside(folder, folder / name)
    return {name: (folder / name).read_bytes() for name in FILES}


def content_hash(files: Mapping[str, bytes]) -> str:
    """Hex sha256 over the names and bytes of the three files."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return digest.hexdigest()


def check_inside(folder: Path, path: Path) -> None:
    """Raises InputError for a path that leads out of ``folder``, be it through a symbolic link."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise InputError(f"{path}: cannot be followed: {error}") from error
    if not target.is_relative_to(folder.resolve()):
        raise InputError(f"{path}: leads out of its folder, to {target}; put the file itself there")


def _settings(path: Path, data: bytes, problems: list[str]) -> SkillSettings | None:
    """None where they cannot be used; the reasons are then among the problems."""
    try:
        settings = SkillSettings.model_validate(parse_toml(data, path))
    except ValidationError as error:
        problems += [f"{path}:{_line_of(data, key)}: {key}: {text}" for key, text in problems_of(error)]
        return None
    except InputError as error:
        problems.append(str(error))
        return None
    found = grader_problems(settings.grader, settings.grader_options)
    problems += [f"{path}:{_line_of(data, key)}: {text}" for key, text in found]
    return None if found else settings


def _line_of(data: bytes, key: str) -> int:
    """The line of ``skill.toml`` that sets a (dotted) key, or the nearest one above it that is written; else 1."""
    lines = data.decode("utf-8").split("\n")
    for part in reversed(key.split(".")):
        pattern = re.compile(rf"(?:^|[\s{{,.\[\"']){re.escape(part)}[\"']?\s*[=\]]")
        for number, line in enumerate(lines, 1):
            if pattern.search(line):
                return number
    return 1


def read_rows(
    path: Path, settings: SkillSettings, problems: list[str], data: bytes | None = None
) -> tuple[Example, ...]:
    """The good rows of a file; what is wrong with the others is added to the problems. ``data`` is what the file holds
    where it has been read already."""
    data = path.read_bytes() if data is None else data
    examples: list[Example] = []
    seen: dict[str, int] = {}
    rows = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not rows:
        problems.append(f"{path}:1: empty; expected one JSON object a line")
    for number, line in rows:
        origin = f"{path}:{number}"
        try:
            found = parse_row(_json(line), settings, origin, default_id=f"{path.stem}-{number}")
        except ValueError as error:
            problems.append(f"{origin}: {error}")
            continue
        for example in found:
            if example.id in seen:
                problems.append(f"{origin}: the id {example.id!r} was used in line {seen[example.id]} already")
            seen.setdefault(example.id, number)
        examples += found
    return tuple(examples)


def _json(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    _check_values(row)
    # Tables exported to JSON write null where a row has nothing.
    return {key: value for key, value in row.items() if value is not None}


def _no_constant(name: str) -> None:
    raise ValueError(f"not valid JSON: {name} is no number")


def _check_values(row: dict[str, Any]) -> None:
    """Raises ValueError for what JSON can say and nothing can write again: infinities, half characters, depth."""
    level: list[Any] = [row]
    for _ in range(_DEPTH):
        for value in level:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number is too large")
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                raise ValueError("a text holds half of a surrogate pair, which is no character")
        inner = [list(v.keys()) + list(v.values()) if isinstance(v, dict) else v for v in level
                 if isinstance(v, (dict, list))]  # fmt: skip
        level = [value for values in inner for value in values]
        if not level:
            return
    raise ValueError(f"nested too deeply; at most {_DEPTH} levels")


def parse_row(row: dict[str, Any], settings: SkillSettings, origin: str, default_id: str) -> list[Example]:
    """The demonstrations of one row in either form: one, or with ``turns = "all"`` one for each assistant turn.

    Raises ValueError saying what is wrong and what was expected."""
    if unknown := row.keys() - _KEYS:
        raise ValueError(f"unknown keys {sorted(unknown)}; allowed: {sorted(_KEYS)}")
    messages = _turns(row)
    for message in messages:
        _check_message(message)
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the demonstration must be an assistant turn, not {messages[-1]['role']!r}")
    if settings.system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": settings.system}, *messages)
    places = positions(messages)
    if settings.turns == "last":
        if places[-1] != len(messages) - 1:
            raise ValueError("the last turn has weight 0, and skill.toml teaches the last turn only")
        places = places[-1:]
    document, metadata = row.get("document"), row.get("metadata", {})
    if document is not None and not (isinstance(document, str) and document):
        raise ValueError("'document' must be a text that is not empty")
    if not isinstance(metadata, dict):
        raise ValueError("'metadata' must be an object")
    tools = row.get("tools", list(settings.tools))
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("'tools' must be a list of objects")
    name = row.get("id", default_id)
    if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
        raise ValueError("'id' must be a text or a whole number")
    of_turns = metadata_of_turns(metadata, len(places)) if settings.turns == "all" else [metadata]
    examples = []
    for number, (place, its_metadata) in enumerate(zip(places, of_turns, strict=True), 1):
        before = messages[place - 1]["role"] if place else "nothing"
        if before not in ("user", "tool"):
            raise ValueError(f"the turn before the demonstration must be a user or tool turn, not {before!r}")
        check_calls(messages[place], tools)
        several = settings.turns == "all" and len(places) > 1
        examples.append(Example(
            f"{name}/{number}" if several else str(name), tuple(map(bare, messages[:place])), bare(messages[place]),
            tuple(tools), document, its_metadata, f"{origin} (turn {number})" if several else origin,
        ))  # fmt: skip
    return examples


def _turns(row: dict[str, Any]) -> tuple[Message, ...]:
    """The whole conversation."""
    if "messages" in row:
        if "prompt" in row or "completion" in row:
            raise ValueError("give either 'messages' or 'prompt' and 'completion', not both")
        turns = row["messages"]
        if not (isinstance(turns, list) and len(turns) >= 2):
            raise ValueError("'messages' must be a list of at least a user and an assistant turn")
        if not isinstance(turns[-1], dict) or turns[-1].get("role") not in ("assistant", "tool"):
            raise ValueError("the last message must be the assistant turn to learn (no assistant turn found there)")
        return tuple(turns)
    if "prompt" not in row or "completion" not in row:
        raise ValueError("expected 'messages', or 'prompt' and 'completion'")
    return (*_as_turns(row["prompt"], "prompt", "user"), *_as_turns(row["completion"], "completion", "assistant"))


def _as_turns(value: Any, key: str, role: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if isinstance(value, list) and value and (key == "prompt" or len(value) == 1):
        return tuple(value)
    raise ValueError(f"'{key}' must be a text or a list of messages" + ("" if key == "prompt" else " with one turn"))


def _check_message(message: Any) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"every message must be an object, found {type(message).__name__}")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in _ROLES:
        raise ValueError(f"unknown role {role!r}; expected one of {', '.join(_ROLES)}")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"'content' must be a text, found {type(content).__name__}")
    if calls is not None and role != "assistant":
        raise ValueError(f"only an assistant turn may hold 'tool_calls', not a {role} turn")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        raise ValueError('\'tool_calls\' must be a list of {"function": {"name": text, "arguments": object or text}}')
    # A tool may have nothing to say.
    if not content and not calls and not (role == "tool" and content == ""):
        raise ValueError(f"the {role} turn is empty; expected text in 'content'")


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return isinstance(function.get("arguments", {}), (dict, str))


def _overlap(train: tuple[Example, ...], test: tuple[Example, ...]) -> list[str]:
    """Test rows whose prompt is also a training prompt: they would measure memory."""
    known = {prompt_key(example): example.origin for example in train}
    return [
        f"{example.origin}: the same prompt is in the training rows ({known[prompt_key(example)]}); keep it in one file"
        for example in test
        if prompt_key(example) in known
    ]


def prompt_key(example: Example) -> str:
    return json.dumps([example.messages, example.tools], sort_keys=True, ensure_ascii=False)


def _not_gradable(name: str, grade: Callable[[str, Example], float], examples: tuple[Example, ...]) -> list[str]:
    """Rows whose own demonstration would not be graded as right: no answer to them ever could be."""
    if name not in GRADERS:  # the user's own code may cost money a call, or judge otherwise
        return []
    problems = []
    for example in examples:
        try:
            score = grade(expected_text(example), example)
        except ValueError as error:
            problems.append(f"{example.origin}: the grader {name!r} cannot grade this row: {error}")
            continue
        if score < 1:
            problems.append(f"{example.origin}: the grader {name!r} gives the demonstration itself {score:g}, not 1")
    return problems
