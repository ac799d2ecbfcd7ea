"""The ledger: one line an event, append-only, each line holding the hash of the line before it.

``ledger.head`` beside it says how many lines there are and the hash of the last one, so that an edited last line and
lines missing at the end are found too. It is written after the line: a kill in between leaves it one line behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from perdure.files import line_sha256, read_json, read_jsonl, replace_text, to_json
from perdure.provenance import now
from perdure.types import InputError

SETTLED = {"promote", "accept", "hold", "refuse"}
"""Events that say what became of a version; ``accept``: it is a step of a replay."""


class Ledger:
    """Whoever appends is inside ``turn``."""

    def __init__(self, folder: Path):
        self.path = folder / "ledger.jsonl"
        self.head_path = folder / "ledger.head"

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One process at a time; others wait. The kernel frees the lock of a process that died."""
        with self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def append(self, event: str, **fields: Any) -> None:
        """Add a line, synced before returning. Raises InputError when the end is not what was written last.

        A last line without its end was torn by a kill before its append returned: it never counted and is cut off."""
        with self.path.open("a+b") as file:
            file.seek(0)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            lines = whole.split(b"\n")[:-1]
            if self._check_end(lines) < len(lines):  # first: a second kill would leave the head two lines behind
                replace_text(self.head_path, _head_text(len(lines), lines[-1]))
            if len(whole) < len(data):
                file.truncate(len(whole))
            before = line_sha256(lines[-1]) if lines else None
            line = to_json({"time": now(), "event": event, **fields, "previous_line": before}).encode()
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
            try:
                replace_text(self.head_path, _head_text(len(lines) + 1, line))
            except OSError:
                # No room for it: then the event did not happen, or whoever repeats it would do it twice. But where
                # the head is there and only its folder could not be synced, the line counts.
                if self._counted() <= len(lines):
                    file.truncate(len(whole))
                    os.fsync(file.fileno())
                raise

    def _counted(self) -> int:
        """Lines that ledger.head counts."""
        return read_json(self.head_path)["lines"] if self.head_path.exists() else 0

    def events(self) -> list[dict[str, Any]]:
        """All events. Raises InputError naming the line that is no JSON object."""
        return read_jsonl(self.path, growing=True)

    def erased(self) -> dict[str, str]:
        """See ``erased_files``."""
        whole = self.path.read_bytes()
        if b'"erase"' not in whole and b'"prune"' not in whole:  # asked of every version: no need to read all lines
            return {}
        return erased_files(self.events())

    def aliases(self) -> dict[str, str | None]:
        """champion, previous and candidate by the ledger. Raises InputError when it names no champion."""
        candidate, refused = None, set()
        for event in reversed(self.events()):
            kind, version, parent = event.get("event"), event.get("version"), event.get("parent")
            if kind == "refuse" and isinstance(version, str):  # held once, and judged again under another gate
                refused.add(version)
            if kind in ("erase", "prune"):  # without its weights
                refused |= without_weights(erased_files([event])).keys()
            if kind == "hold" and candidate is None and isinstance(version, str) and version not in refused:
                candidate = version
            if kind in ("init", "promote", "rollback"):
                if not isinstance(version, str) or not isinstance(parent, str | None):
                    break
                return {"champion": version, "previous": parent, "candidate": candidate}
        raise InputError(f"{self.path}: damaged, it names no champion")

    def verify(self) -> int:
        """Check the chain and its end; returns the number of lines.

        Raises InputError naming the first line where the chain breaks (that line or the one before it was changed,
        added or removed), or saying that the end is not the one written last."""
        events = self.events()
        lines = self.path.read_bytes().split(b"\n")[: len(events)]
        before = None
        for number, (event, line) in enumerate(zip(events, lines, strict=True), 1):
            if event.get("previous_line") != before:
                raise InputError(
                    f"{self.path}:{number}: the chain is broken: this line or the one before it was altered"
                )
            before = line_sha256(line)
        self._check_end(lines)
        return len(events)

    def _check_end(self, lines: list[bytes]) -> int:
        """How many lines the head counts: all of them, or one fewer."""
        if not self.head_path.exists():
            if len(lines) <= 1:  # nothing yet, or killed between the first line and its head
                return 0
            raise InputError(
                f"{self.head_path}: missing, so lines lost at the ledger's end could not be seen; it was removed, or "
                "the workspace is older than this file: bring it back, or make a new workspace"
            )
        head = read_json(self.head_path)
        count = head.get("lines") if isinstance(head, dict) else None
        if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= len(lines) <= count + 1:
            raise InputError(f"{self.path}: has {len(lines)} lines, but ledger.head counts {count}: lines were lost")
        if self.head_path.read_text(encoding="utf-8") != _head_text(count, lines[count - 1]):
            raise InputError(f"{self.path}:{count}: this line was altered, or ledger.head was: its hash is not there")
        return count


def last_words(events: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Version -> the last event that says what became of it, where there is one."""
    return {str(event.get("version")): event["event"] for event in events if event.get("event") in SETTLED}


def aliases_text(aliases: dict[str, str | None]) -> str:
    """What aliases.json holds."""
    return to_json(aliases) + "\n"


def _head_text(count: int, last: bytes) -> str:
    return to_json({"lines": count, "sha256": line_sha256(last)}) + "\n"


def erased_files(events: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """File below the workspace that was removed on record -> the skill with which it was erased; empty where ``prune``
    removed it to make room."""
    return {str(path): str(event.get("skill", "")) for event in events if event.get("event") in ("erase", "prune")
            for path in event.get("files") or ()}  # fmt: skip


def without_weights(erased: Mapping[str, str]) -> dict[str, str]:
    """Version whose weights are among the ``erased_files`` -> as they have it."""
    return {path.split("/")[1]: skill for path, skill in erased.items()
            if path.startswith("versions/") and path.endswith(".safetensors")}  # fmt: skip
