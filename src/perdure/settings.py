"""What every file of settings is read with: TOML with places, models that know their keys, errors that say both."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from perdure.types import InputError


class SettingsSection(BaseModel):
    """A part of a settings file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Section = TypeVar("Section", bound=BaseModel)


def parse_toml(data: bytes, path: Path) -> dict[str, Any]:
    """Raises InputError naming the file and the line that is no TOML."""
    try:
        return tomllib.loads(data.decode("utf-8"))
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
        problems = [f"  {key}: {message}" for key, message in problems_of(error)]
        raise InputError(f"{where}: settings that cannot be used:\n" + "\n".join(problems)) from error


def problems_of(error: ValidationError) -> list[tuple[str, str]]:
    """(dotted key, what is wrong) of each problem."""
    return [
        (".".join(map(str, item["loc"])) or "(whole)", item["msg"].removeprefix("Value error, "))
        for item in error.errors()
    ]
