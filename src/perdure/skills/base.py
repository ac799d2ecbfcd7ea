"""Load and validate a skill folder: ``skill.toml``, ``train.jsonl``, ``test.jsonl``.

Both files are read to the end before anything is said, and every bad line is reported as ``file:line``.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from perdure.config import parse
from perdure.skills.graders import make_grader
from perdure.types import Example, InputError, Message

FILES = ("skill.toml", "train.jsonl", "test.jsonl")
_ROLES = ("system", "user", "assistant", "tool")
_KEYS = {"messages", "tools", "prompt", "completion", "document", "id", "metadata"}


class SkillSettings(BaseModel):
    """``skill.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    description: str = ""
    licence: str = ""
    source: str = ""
    grader: str = "exact"
    grader_options: dict[str, Any] = {}
    max_new_tokens: int = Field(64, ge=1)
    system: str | None = None
    """Goes in front of rows without a system turn."""
    tools: tuple[dict[str, Any], ...] = ()
    """For rows without their own."""
    retention_budget: float | None = Field(None, ge=0, le=1)
    """Accuracy that this skill may lose when later ones are learned; the workspace's budget where absent."""


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
    """Read a skill. Raises one InputError that lists every bad line of both files."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such skill folder")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: a skill folder needs {', '.join(FILES)}; missing: {', '.join(missing)}")
    settings = _settings(folder / "skill.toml")
    grade = make_grader(settings.grader, settings.grader_options, where=str(folder / "skill.toml"))
    problems: list[str] = []
    parts = [_read_rows(folder / name, settings, problems) for name in FILES[1:]]
    if not problems:
        problems += _overlap(*parts)
    if problems:
        raise InputError(f"{folder}: {len(problems)} problems:\n" + "\n".join(problems))
    digest = hashlib.sha256()
    for name in FILES:
        data = (folder / name).read_bytes()
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return Skill(settings, folder, digest.hexdigest(), *parts, grade)


def _settings(path: Path) -> SkillSettings:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    return parse(SkillSettings, raw, where=str(path))


def _read_rows(path: Path, settings: SkillSettings, problems: list[str]) -> tuple[Example, ...]:
    examples: list[Example] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            example = parse_row(_json(line), settings, origin, default_id=f"{path.stem}-{number}")
        except ValueError as error:
            problems.append(f"{origin}: {error}")
            continue
        if example.id in seen:
            problems.append(f"{origin}: the id {example.id!r} was used in line {seen[example.id]} already")
        seen[example.id] = number
        examples.append(example)
    if not examples and not any(problem.startswith(f"{path}:") for problem in problems):
        problems.append(f"{path}: empty; expected one JSON object a line")
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
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def parse_row(row: dict[str, Any], settings: SkillSettings, origin: str, default_id: str) -> Example:
    """One row in either form as an Example. Raises ValueError saying what is wrong and what was expected."""
    if unknown := row.keys() - _KEYS:
        raise ValueError(f"unknown keys {sorted(unknown)}; allowed: {sorted(_KEYS)}")
    messages, demonstration = _turns(row)
    for message in (*messages, demonstration):
        _check_message(message)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"the turn before the demonstration must be a user or tool turn, not {messages[-1]['role']!r}")
    if not demonstration.get("content") and not demonstration.get("tool_calls"):
        raise ValueError("the demonstration is empty; expected text in 'content' or 'tool_calls'")
    if settings.system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": settings.system}, *messages)
    document, metadata = row.get("document"), row.get("metadata", {})
    if document is not None and not (isinstance(document, str) and document):
        raise ValueError("'document' must be a text that is not empty")
    if not isinstance(metadata, dict):
        raise ValueError("'metadata' must be an object")
    tools = row.get("tools", list(settings.tools))
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("'tools' must be a list of objects")
    name = row.get("id", default_id)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise ValueError("'id' must be a text or a whole number")
    return Example(str(name), messages, demonstration, tuple(tools), document, metadata, origin)


def _turns(row: dict[str, Any]) -> tuple[tuple[Message, ...], Message]:
    if "messages" in row:
        if "prompt" in row or "completion" in row:
            raise ValueError("give either 'messages' or 'prompt' and 'completion', not both")
        turns = row["messages"]
        if not (isinstance(turns, list) and len(turns) >= 2):
            raise ValueError("'messages' must be a list of at least a user and an assistant turn")
        if not isinstance(turns[-1], dict) or turns[-1].get("role") != "assistant":
            raise ValueError("the last message must be the assistant turn to learn (no assistant turn found there)")
        return tuple(turns[:-1]), turns[-1]
    if "prompt" not in row or "completion" not in row:
        raise ValueError("expected 'messages', or 'prompt' and 'completion'")
    return _as_turns(row["prompt"], "prompt", "user"), _as_turns(row["completion"], "completion", "assistant")[-1]


def _as_turns(value: Any, key: str, role: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if isinstance(value, list) and value and (key == "prompt" or len(value) == 1):
        return tuple(value)
    raise ValueError(f"'{key}' must be a text or a list of messages" + ("" if key == "prompt" else " with one turn"))


def _check_message(message: Any) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"every message must be an object, found {type(message).__name__}")
    if message.get("role") not in _ROLES:
        raise ValueError(f"unknown role {message.get('role')!r}; expected one of {', '.join(_ROLES)}")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"'content' must be a text, found {type(content).__name__}")
    if not content and not message.get("tool_calls"):
        raise ValueError(f"the {message['role']} turn is empty; expected text in 'content'")


def _overlap(train: tuple[Example, ...], test: tuple[Example, ...]) -> list[str]:
    """Test rows whose prompt is also a training prompt: they would measure memory."""
    known = {_key(example): example.origin for example in train}
    return [
        f"{example.origin}: the same prompt is in the training rows ({known[_key(example)]}); keep it in one file"
        for example in test
        if _key(example) in known
    ]


def _key(example: Example) -> str:
    return json.dumps([example.messages, example.tools], sort_keys=True, ensure_ascii=False)
