"""The rows of a skill folder: JSON lines as demonstrations, each problem with its file and line."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from perdure.files import HALVES
from perdure.skills.settings import SkillSettings
from perdure.skills.turns import bare, check_calls, check_order, metadata_of_turns, played, positions
from perdure.types import Example, Message

_ROLES = ("system", "user", "assistant", "tool")
_KEYS = {"messages", "tools", "prompt", "completion", "document", "id", "metadata"}
_OF_REQUESTS = {"parallel_tool_calls"}
"""Keys of OpenAI's fine-tuning files that say how a request is made: nothing in a demonstration depends on them."""
_DEPTH = 64
"""Levels of a row's JSON. Far beyond any data, far below what a recursive walk can take."""


def read_rows(
    path: Path, settings: SkillSettings, problems: list[str], data: bytes | None = None
) -> tuple[Example, ...]:
    """The good rows of a file; what is wrong with the others is added to the problems. ``data`` is what the file holds
    where it has been read already."""
    data = path.read_bytes() if data is None else data
    examples: list[Example] = []
    seen: dict[str, int] = {}
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        problems.append(f"{path}:1: UTF-16; save it as UTF-8")
        return ()
    data = data.removeprefix(codecs.BOM_UTF8)
    if path.suffix.lower() in (".csv", ".tsv", ".parquet", ".xlsx"):
        problems.append(f"{path}:1: a {path.suffix} file; expected one JSON object a line (pandas: "
                        "frame.to_json(FILE, orient='records', lines=True))")  # fmt: skip
        return ()
    if data.lstrip().startswith(b"["):
        problems.append(f"{path}:1: a JSON array; expected one JSON object a line (jq -c '.[]' makes that of it)")
        return ()
    rows = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not rows:
        problems.append(f"{path}:1: empty; expected one JSON object a line")
    for number, line in rows:
        origin = f"{path}:{number}"
        try:
            found = parse_row(json_object(line), settings, origin, default_id=f"{path.stem}-{number}")
        except ValueError as error:
            problems.append(f"{origin}: {error}")
            continue
        for example in found:
            if example.id in seen:
                problems.append(f"{origin}: the id {example.id!r} was used in line {seen[example.id]} already")
            seen.setdefault(example.id, number)
        examples += found
    return tuple(examples)


def counted(things: Sized, name: str) -> str:
    """How many there are, for people."""
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


SAME = 3
"""So many rows with the same problem are named."""
LISTED = 50
"""Of so many more the lines are."""


def in_short(problems: Sequence[str]) -> str:
    """Lines for people, in their order: what many rows have in common is said of the first few."""
    rows: dict[str, list[str]] = {}
    lines = []
    for problem in problems:
        rows.setdefault(problem.partition(": ")[2], []).append(problem)
    for what, same in rows.items():
        if (more := len(same) - SAME) > 0:
            places = [problem.partition(": ")[0].rpartition(":")[2] for problem in same[SAME:]]
            where = ", ".join(places[:LISTED]) + (f" ... {places[-1]}" if more > LISTED else "")
            same[SAME:] = [f"... and {more} more, lines {where}: {what}"]
    for problem in problems:
        same = rows[problem.partition(": ")[2]]
        lines += [same.pop(0)] if same else []
    return "\n".join(lines)


def json_object(line: bytes) -> dict[str, Any]:
    """A line of a JSONL file. Raises ValueError saying why it is no object that can be written again."""
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
            if isinstance(value, str) and HALVES.search(value):
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
    if unknown := row.keys() - _KEYS - _OF_REQUESTS:
        raise ValueError(f"unknown keys {sorted(unknown)}; {_other_form(row)}")
    messages = tuple(map(_checked_message, _turns(row)))
    check_order(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the demonstration must be an assistant turn, not {messages[-1]['role']!r}")
    if settings.system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": settings.system}, *messages)
    places = positions(messages)
    if settings.turns == "last" and not settings.environment:
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
    if settings.environment:
        played(messages, settings.max_turns)
        for place in places:
            check_calls(messages[place], tools)
        whole = tuple(map(bare, messages))
        shown = whole[1:] if whole[0]["role"] == "system" else whole
        return [Example(str(name), whole[: places[0]], whole[-1], tuple(tools), document, metadata, origin, shown)]
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
            conversation=str(name) if several else "",
        ))  # fmt: skip
    return examples


def _other_form(row: dict[str, Any]) -> str:
    """What to do about a row of another form: how to bring a common one into ours, else which keys there are."""
    if {"instruction", "output"} <= row.keys():
        return ("rows as Alpaca has them: jq -c '{prompt: ([.instruction, .input] | map(select(. != null and . != "
                "\"\")) | join(\"\\n\\n\")), completion: .output}' makes ours of them")  # fmt: skip
    if isinstance(row.get("conversations"), list):
        return ("rows as ShareGPT has them: jq -c '{messages: [.conversations[] | {role: ({human: \"user\", gpt: "
                "\"assistant\"}[.from] // .from), content: .value}]}' makes ours of them")  # fmt: skip
    for prompt, completion in (("question", "answer"), ("input", "output")):
        if {prompt, completion} <= row.keys():
            return f"jq -c '{{prompt: .{prompt}, completion: .{completion}}}' makes ours of such rows"
    if ours := [key for key in row if key in _KEYS and key != "metadata"]:
        kept, dropped = ", ".join(ours), ", ".join(f".{key}" for key in (*ours, "metadata"))
        return (f"allowed: {', '.join(sorted(_KEYS))}; to keep more: jq -c '{{{kept}, metadata: ((.metadata // {{}}) + "
                f"del({dropped}))}}'")  # fmt: skip
    return f"allowed: {', '.join(sorted(_KEYS))} (what is only to be kept goes into 'metadata')"


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
    hint = "; JSON is written as its text" if isinstance(value, dict) else ""
    turns = "" if key == "prompt" else " with one turn"
    raise ValueError(f"'{key}' must be a text or a list of messages{turns}{hint}")


def _checked_message(message: Any) -> Message:
    """The message as chat templates know it: OpenAI's "developer" is the system role, parts of text are one text.

    Raises ValueError for what is no message."""
    if not isinstance(message, dict):
        raise ValueError(f"every message must be an object, found {type(message).__name__}")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    role = "system" if role == "developer" else role
    content = _joined(content) if isinstance(content, list) else content
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
    return message | {"role": role} | ({"content": content} if "content" in message else {})


def _joined(parts: list[Any]) -> str:
    """Raises ValueError for a part that is no text: pictures and sound cannot be learned from here."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'a part of \'content\' must be {{"type": "text", "text": text}}, found {kind!r}')
    return "".join(part["text"] for part in parts)


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return isinstance(function.get("arguments", {}), (dict, str))
