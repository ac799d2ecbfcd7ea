"""Code that users bring: graders and environments of their own."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from perdure.types import Example, InputError


@contextmanager
def users_code(example: Example, what: str) -> Iterator[None]:
    """Whatever happens inside, in code that is not ours, becomes an InputError that names the row and ``what``."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{example.origin}: {what}: {error!r}") from error


def users_function(name: str, what: str) -> Callable[..., Any]:
    """What ``python:module:function`` names. Importing it runs the user's code: only ``skill.toml`` can ask for that,
    by name. Raises ValueError where there is nothing to call; ``what`` it is to be stands in the message."""
    parts = name.split(":")
    if len(parts) != 3 or parts[0] != "python" or not all(parts):
        raise ValueError(f"write the {what} as python:module:function, not {name!r}")
    try:
        found = getattr(importlib.import_module(parts[1]), parts[2])
    except Exception as error:  # a module of the user's may fail in any way while it is imported
        hint = "; Python finds modules in installed packages and in the folders of PYTHONPATH"
        hint = hint if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"the {what} {name!r} cannot be used: {error!r}{hint}") from error
    if not callable(found):
        raise ValueError(f"the {what} {name!r} cannot be used: it is not callable")
    return found


_RUNNING: WeakKeyDictionary[ModuleType, bytes] = WeakKeyDictionary()
"""Module -> sha256 of its file when it was first asked for: a file that is edited later is not what grades here."""


def users_code_hash(names: Iterable[str]) -> str:
    """Hex sha256 over the files of the modules that ``python:module:function`` names, as this process runs them; empty
    where none is the user's. What they import in turn is not looked at."""
    modules = [importlib.import_module(name.split(":")[1]) for name in names if name.startswith("python:")]
    hashes = [_hash_of(module, Path(module.__file__)) for module in modules if module.__file__]
    return hashlib.sha256(b"".join(hashes)).hexdigest() if hashes else ""


def _hash_of(module: ModuleType, file: Path) -> bytes:
    if module not in _RUNNING:
        _RUNNING[module] = hashlib.sha256(file.read_bytes()).digest()
    return _RUNNING[module]
