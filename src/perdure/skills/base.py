"""Load and validate a skill folder: ``skill.toml``, ``train.jsonl``, ``test.jsonl``.

All three files are read to the end before anything is said, and every problem is reported as ``file:line``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from perdure.settings import parse, parse_toml, problems_of
from perdure.skills.environments import Acting
from perdure.skills.graders import GRADERS, grader_problems, make_grader
from perdure.skills.graders.text import expected_text
from perdure.skills.reading import counted, in_short, read_rows
from perdure.skills.settings import SkillSettings
from perdure.skills.turns import as_shown
from perdure.skills.users import users_code_hash, users_function
from perdure.types import Example, InputError

FILES = ("skill.toml", "train.jsonl", "test.jsonl")


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
    acting: Acting | None = None
    """Where conversations are played in an environment."""
    code_hash: str = ""
    """Of the user's own modules that grade or act, which lie outside of the folder; empty where there are none."""

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def together(self) -> dict[str, str]:
        """See ``together``, of the test rows."""
        return together(self.test)


def bound(row: Example) -> Hashable:
    """The same for rows that are no independent items: the turns of one conversation, and rows with the same prompt,
    which get the same answer."""
    return ("turns of", row.conversation) if row.conversation else ("prompt", prompt_key(row))


def together(rows: Sequence[Example]) -> dict[str, str]:
    """Row -> a name for the rows with which it is no independent item (``bound``), where there are any."""
    groups: dict[Hashable, list[str]] = {}
    for row in rows:
        groups.setdefault(bound(row), []).append(row.id)
    return {row: names[0] for names in groups.values() if len(names) > 1 for row in names}


def kept_rows(folder: Path, name: str = "test.jsonl") -> tuple[Example, ...]:
    """The rows of a skill that a workspace keeps, without the code that grades or plays them. Raises InputError where
    they cannot be read."""
    files, problems = skill_files(folder), list[str]()
    settings = parse(SkillSettings, parse_toml(files["skill.toml"], folder / "skill.toml"), where=str(folder))
    rows = read_rows(folder / name, settings, problems, files[name])
    if problems:
        raise InputError("\n".join(problems))
    return rows


def independent(rows: Sequence[Example]) -> int:
    """How many of the rows are independent: those that are ``bound`` together count once."""
    return len(set(map(bound, rows)))


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
        problems += not_gradable(settings.grader, grade, (*train, *test))
    if problems:
        raise InputError(f"{folder}: {counted(problems, 'problem')}:\n" + in_short(problems))
    assert settings is not None and grade is not None
    acting = None
    if settings.environment:
        factory = users_function(settings.environment, "environment")
        acting = Acting(settings.environment, factory, settings.environment_options, settings.max_turns)
    code = users_code_hash((settings.grader, settings.environment))
    return Skill(settings, folder, content_hash(files), train, test, grade, acting, code)


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
        problems += [f"{path}:{_line_of(data, key)}: {key}: {text}" for key, text in problems_of(error, SkillSettings)]
        return None
    except InputError as error:
        problems.append(str(error))
        return None
    found = grader_problems(settings.grader, settings.grader_options)
    if settings.environment:
        try:
            users_function(settings.environment, "environment")
        except ValueError as error:
            found.append(("environment", str(error)))
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


def _overlap(train: tuple[Example, ...], test: tuple[Example, ...]) -> list[str]:
    """Test rows whose prompt is also a training prompt: they would measure memory."""
    known = {prompt_key(example): example.origin for example in train}
    return [
        f"{example.origin}: the same prompt is in the training rows ({known[prompt_key(example)]}); keep it in one file"
        for example in test
        if prompt_key(example) in known
    ]


def prompt_key(example: Example) -> str:
    """Equal for prompts that no chat template tells apart."""
    return json.dumps([list(map(as_shown, example.messages)), example.tools], sort_keys=True, ensure_ascii=False)


def calls_as_text(name: str, examples: Sequence[Example]) -> list[str]:
    """Rows whose answer is a tool call that ``name`` would grade as the text in which this model happens to write it:
    asked of what is new, as a workspace may hold such a skill from before."""
    if name not in GRADERS or name == "tool_call":
        return []
    return [
        f"{example.origin}: the answer is a tool call, and the grader {name!r} does not know the forms in which models "
        "write calls; give rows with calls a skill of their own, graded by tool_call, or bring a python: grader"
        for example in examples
        if example.demonstration and example.demonstration.get("tool_calls")
    ]


def not_gradable(name: str, grade: Callable[[str, Example], float], examples: tuple[Example, ...]) -> list[str]:
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
