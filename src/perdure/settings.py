"""What every file of settings is read with: TOML with places, models that know their keys, errors that say both."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from perdure.types import InputError


class SettingsSection(BaseModel):
    """A part of a settings file: unknown keys are errors. The text below a field says what it means."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def changed(self) -> list[str]:
        """The settings that are not as they are by default."""
        plain = {name: field.get_default(call_default_factory=True) for name, field in type(self).model_fields.items()}
        return [name for name, default in plain.items() if getattr(self, name) != default]


Section = TypeVar("Section", bound=BaseModel)


def parse_toml(data: bytes, path: Path) -> dict[str, Any]:
    """Raises InputError naming the file and the line that is no TOML."""
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8: {error.reason}") from error
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at line (\d+),", str(error))
        line = int(place[1]) if place else data.count(b"\n") + 1  # without a place: at the end of the file
        raise InputError(f"{path}:{line}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}:1: nested too deeply") from error


def parse(model: type[Section], raw: dict[str, Any], where: str) -> Section:
    """Validate ``raw`` as ``model``; one InputError that lists every problem with its key."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = [f"  {key}: {message}" for key, message in problems_of(error, model)]
        raise InputError(f"{where}: settings that cannot be used:\n" + "\n".join(problems)) from error


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """(dotted key, what is wrong) of each problem with settings of ``model``."""
    return [(".".join(map(str, item["loc"])) or "(whole)", _said(item, model)) for item in error.errors()]


def _said(item: Any, model: type[BaseModel]) -> str:
    if item["type"] != "extra_forbidden":
        return item["msg"].removeprefix("Value error, ")
    owner: Any = model
    for part in item["loc"][:-1]:
        fields = getattr(owner, "model_fields", {})  # none below a table of tables, whose keys are the user's
        owner = fields[part].annotation if part in fields else None
    alike = get_close_matches(str(item["loc"][-1]), getattr(owner, "model_fields", {}), 1)
    return "there is no such setting" + (f"; did you mean {alike[0]}?" if alike else "")


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted key, such as ``train.steps``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def by_field(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same for sections and their fields only: a table that is a field's value stays whole."""
    sections = {key: value for key, value in settings.items() if isinstance(value, dict)}
    inner = {f"{section}.{key}": value for section, fields in sections.items() for key, value in fields.items()}
    return {key: value for key, value in settings.items() if key not in sections} | inner
