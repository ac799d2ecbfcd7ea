"""A workspace folder: settings, versions, ledger, aliases. The folder is the truth and is readable without us.

Versions are written beside, synced and renamed: a half-written one is never visible, and none changes afterwards. The
ledger only grows, each line holding the hash of the line before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perdure import __version__
from perdure.checkpoint import sync_folder, sync_path
from perdure.config import RunConfig, load_config, to_toml
from perdure.types import InputError

BASE = "v000"
_VERSION = re.compile(r"v\d{3,}")


class Workspace:
    """Opened by ``Workspace.open`` or made by ``Workspace.create``."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, config: RunConfig, base_hash: str) -> Workspace:
        """Make a workspace whose champion is the base model. Raises InputError when something is there already."""
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: already there and not empty; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        workspace = cls(folder)
        info = {"version": BASE, "parent": None, "stage": None, "skill": None, "method": None, "created": now(),
                "seed": config.seed, "hashes": {"base": base_hash, "weights": base_hash},
                "config": config.model_dump(mode="json"), "scores": {}, "probe": None, "verdict": None,
                "cost": {"seconds": {}, "tokens": {}}}  # fmt: skip
        workspace.add_version(info, lambda _: None)
        workspace.append("init", version=BASE, base=base_hash)
        workspace._write_json("aliases.json", {"champion": BASE, "previous": None, "candidate": None})
        # Last: a folder without perdure.toml is no workspace, so an interrupted init can be repeated after removal.
        replace_text(folder / "perdure.toml", to_toml(config))
        return workspace

    @classmethod
    def open(cls, folder: Path) -> Workspace:
        """Raises InputError when ``folder`` is no workspace."""
        if not (folder / "perdure.toml").is_file():
            raise InputError(f"{folder}: not a workspace (no perdure.toml); make one with: perdure init {folder}")
        return cls(folder)

    def config(self) -> RunConfig:
        return load_config(self.folder / "perdure.toml")

    # Versions

    def versions(self) -> list[str]:
        """Names of all complete versions, oldest first."""
        found = (path.name for path in (self.folder / "versions").glob("v*") if _VERSION.fullmatch(path.name))
        return sorted(found, key=lambda name: int(name[1:]))

    def version(self, name: str) -> dict[str, Any]:
        """A version's ``version.json``. ``champion``, ``previous`` and ``v1`` for ``v001`` are understood."""
        return read_json(self.version_folder(name) / "version.json")

    def version_folder(self, name: str) -> Path:
        """Raises InputError for a name that is no version here."""
        return self.folder / "versions" / self.resolve(name)

    def resolve(self, name: str) -> str:
        if name in ("champion", "previous", "candidate"):
            target = self.aliases()[name]
            if target is None:
                raise InputError(f"{self.folder}: there is no {name} version yet")
            return target
        match = re.fullmatch(r"v?(\d{1,6})", name)
        full = f"v{int(match[1]):03d}" if match else name
        if full not in self.versions():
            raise InputError(f"{self.folder}: no version {name!r}; there are {', '.join(self.versions())}")
        return full

    def next_version(self) -> str:
        return f"v{int(self.versions()[-1][1:]) + 1:03d}"

    def lineage(self, name: str = "champion") -> list[str]:
        """From the base to ``name``, following parents."""
        chain = [self.resolve(name)]
        while parent := self.version(chain[-1])["parent"]:
            chain.append(parent)
        return chain[::-1]

    def add_version(self, info: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Make a version visible in one rename. ``write`` fills the folder beside; the weights' hash is added here."""
        final = self.folder / "versions" / info["version"]
        beside = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write(beside)
        weights = sorted(beside.glob("*.safetensors"))
        if weights:
            info = info | {"hashes": info["hashes"] | {"weights": files_sha256(weights)}}
        (beside / "version.json").write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync_folder(beside)
        os.replace(beside, final)
        sync_path(final.parent)

    # Aliases and ledger

    def aliases(self) -> dict[str, str | None]:
        return read_json(self.folder / "aliases.json")

    def promote(self, name: str, reason: str) -> None:
        """Make a version the champion; the old champion becomes ``previous``."""
        target, aliases = self.resolve(name), self.aliases()
        if aliases["champion"] == target:
            return
        self.append("promote", version=target, parent=aliases["champion"], reason=reason)
        self._write_json("aliases.json", {"champion": target, "previous": aliases["champion"], "candidate": None})

    def rollback(self, name: str | None = None) -> str:
        """Go back to ``name``, or to the champion's parent; returns the new champion."""
        aliases = self.aliases()
        champion = aliases["champion"]
        assert champion is not None
        target = self.resolve(name) if name else self.version(champion)["parent"]
        if target is None:
            raise InputError(f"{self.folder}: the champion is the base model; there is nothing before it")
        if target == champion:
            raise InputError(f"{self.folder}: {target} is the champion already")
        self.append("rollback", version=target, parent=champion)
        self._write_json("aliases.json", {"champion": target, "previous": champion, "candidate": None})
        return target

    def set_candidate(self, name: str | None) -> None:
        self._write_json("aliases.json", self.aliases() | {"candidate": name})

    def append(self, event: str, **fields: Any) -> None:
        """Add a line to the ledger, chained to the line before by its hash, synced before returning."""
        path = self.folder / "ledger.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        before = hashlib.sha256(lines[-1]).hexdigest() if lines else None
        line = json.dumps({"time": now(), "event": event, **fields, "previous_line": before}, ensure_ascii=False)
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def ledger(self) -> list[dict[str, Any]]:
        """All events. Raises InputError naming the line that is no JSON object."""
        return read_jsonl(self.folder / "ledger.jsonl")

    # Skills

    def keep_skill(self, source: Path, name: str, content_hash: str) -> Path:
        """Copy a skill's three files into the workspace, once per content; returns the copy."""
        final = self.folder / "skills" / f"{name}@{content_hash[:8]}"
        if final.is_dir():
            return final
        beside = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for file in ("skill.toml", "train.jsonl", "test.jsonl"):
            shutil.copyfile(source / file, beside / file)
        sync_folder(beside)
        os.replace(beside, final)
        return final

    def taught(self, name: str = "champion") -> dict[str, Path]:
        """Skills taught on the way to ``name``, in order: name -> kept folder (the latest content of each)."""
        found: dict[str, Path] = {}
        for version in self.lineage(name)[1:]:
            info = self.version(version)
            found.pop(info["skill"], None)
            found[info["skill"]] = self.folder / "skills" / f"{info['skill']}@{info['hashes']['skill'][:8]}"
        return found

    def run_folder(self, stage: str) -> Path:
        return self.folder / "runs" / stage

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time. The kernel frees the lock of a process that died. Raises InputError naming the holder."""
        path = self.folder / ".lock"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = path.read_text(encoding="utf-8").strip() or "unknown"
                raise InputError(
                    f"{self.folder}: another perdure works here (process {holder}); wait for it"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def _write_json(self, name: str, value: Any) -> None:
        replace_text(self.folder / name, json.dumps(value) + "\n")


def now() -> str:
    """UTC to the second, as written into ledger and versions."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, never half of either."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    sync_path(beside)
    os.replace(beside, path)
    sync_path(path.parent)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Raises InputError naming file and place when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged, not valid JSON: {error}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Raises InputError naming the first line that is no JSON object."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: damaged, not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: damaged, expected a JSON object")
        rows.append(row)
    return rows


def files_sha256(paths: Sequence[Path]) -> str:
    """One sha256 over several files' names and bytes."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def code_state() -> dict[str, Any]:
    """Version of this package and, in a checkout, its commit and whether files differ from it."""
    state: dict[str, Any] = {"perdure": __version__, "commit": None, "dirty": None}
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return state
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(root)]
        state["commit"] = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        state["dirty"] = bool(status.strip())
    return state
