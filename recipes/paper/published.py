"""Rows of published data files, each with its place, so that a bad one can be named."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from perdure.importers.base import Row
from perdure.types import InputError

Record = tuple[str, Any]
"""A row after its place: ``file:line``, or ``file: row N`` where a file has no lines."""
Made = Iterator[Row | str]
"""What a record gives: rows, and for each that is left out the reason."""
SHOWN = 20
"""At most so many bad rows are listed."""
BOOKKEEPING = ("dataset_info.json", "state.json")
"""What ``datasets`` writes beside the rows of a folder."""


def convert(records: Sequence[Record], make: Callable[[dict[str, Any]], Made]) -> tuple[list[Row], Counter[str]]:
    """The rows that ``make`` gives, and how many were left out for which reason.

    Raises one InputError that names every record with which ``make`` raises ValueError."""
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    problems: list[str] = []
    for place, record in records:
        try:
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {type(record).__name__}")
            for made in make(record):
                if isinstance(made, str):
                    left_out[made] += 1
                else:
                    rows.append(made)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if len(problems) > SHOWN:
        problems[SHOWN:] = [f"... and {len(problems) - SHOWN} more rows"]
    if problems:
        raise InputError("\n".join(problems))
    return rows, left_out


def text_of(record: dict[str, Any], key: str) -> str:
    """Raises ValueError where the record has no text under ``key``."""
    if key not in record:
        raise ValueError(f"no {key!r}; its keys are {', '.join(map(str, record))}")
    if not isinstance(record[key], str):
        raise ValueError(f"{key!r} must be a text, found {type(record[key]).__name__}")
    return record[key].strip()


def read(path: Path) -> list[Record]:
    """The rows of a file, or of all data files below a folder in the order of their names.

    Raises InputError for a file that is missing, or that is not what its name says."""
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.suffix in READERS and file.name not in BOOKKEEPING)
        # Hidden: the cache that `hf download --local-dir` keeps beside the files.
        files = sorted(file for file in below if not any(p.startswith(".") for p in file.relative_to(path).parts))
    else:
        files = [path]
    if not files or not files[0].is_file():
        raise InputError(f"{path}: no such file, or no {', '.join(READERS)} below it")
    if unknown := [file for file in files if file.suffix not in READERS]:
        raise InputError(f"{unknown[0]}: expected one of {', '.join(READERS)}")
    return [record for file in files for record in READERS[file.suffix](file)]


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8: {error.reason}") from error


def _lines(path: Path) -> list[Record]:
    """One JSON value a line."""
    found: list[Record] = []
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        try:
            if line.strip():
                found.append((f"{path}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from error
    return found


def _array(path: Path) -> list[Record]:
    """One JSON list, each element with the line it begins in; a file that begins otherwise holds a value a line."""
    text = _decoded(path)
    if not text.lstrip().startswith("["):
        return _lines(path)
    decoder, found, line, counted = json.JSONDecoder(), [], 1, 0
    place = _after_space(text, text.index("[") + 1)
    try:
        while text[place : place + 1] != "]":
            line, counted = line + text.count("\n", counted, place), place
            value, end = decoder.raw_decode(text, place)
            found.append((f"{path}:{line}", value))
            place = _after_space(text, end)
            if text[place : place + 1] not in (",", "]"):
                raise json.JSONDecodeError("expected a comma or the end of the list", text, place)
            if text[place] == ",":
                place = _after_space(text, place + 1)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    return found


def _after_space(text: str, place: int) -> int:
    match = re.compile(r"\s*").match(text, place)
    return match.end() if match else place


def _table(path: Path) -> list[Record]:
    """Parquet, or the Arrow stream that ``datasets`` writes."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            with pyarrow.ipc.open_stream(path) as stream:
                rows = stream.read_all().to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
    return [(f"{path}: row {number}", row) for number, row in enumerate(rows, 1)]


READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".jsonl": _lines,
    ".json": _array,
    ".parquet": _table,
    ".arrow": _table,
}
