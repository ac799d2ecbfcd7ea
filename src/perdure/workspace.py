"""A workspace folder: settings, versions, ledger, aliases. The folder is the truth and is readable without us.

Versions are written beside, synced and renamed: a half-written one is never visible, and none changes afterwards. The
ledger only grows, each line holding the hash of the line before it; it is the truth where ``aliases.json`` differs.
Whoever changes a workspace holds its ``lock``.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perdure.config import RunConfig, load_config, to_toml
from perdure.files import (
    check_free,
    file_sha256,
    files_sha256,
    folder_beside,
    manifest_of,
    only_one,
    put_in_place,
    read_json,
    read_object,
    replace_text,
    to_json,
)
from perdure.ledger import Ledger, aliases_text, without_weights
from perdure.provenance import now
from perdure.run_folders import RunFolders, next_name
from perdure.skill_folders import SkillFolders
from perdure.skills.base import check_inside
from perdure.stacks import is_stacked, stack_of
from perdure.types import InputError

BASE = "v000"
_VERSION = re.compile(r"v[0-9]{3,}")
MANIFEST = "version_sha256"
"""Entry of the ledger lines that introduce a version: the sha256 of its version.json."""
_RECORD = {"version": str, "parent": str | None, "skill": str | None, "hashes": dict}
"""What every command takes for granted in a version.json."""
_SAME = ("version", "parent", "stage", "skill", "method", "seed", "hashes")
"""Entries of version.json that say what a version is; the others say when it was made and what that cost."""


class Workspace:
    """Opened by ``Workspace.open`` or made by ``Workspace.create``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = RunFolders(folder / "runs")
        self.skills = SkillFolders(folder / "skills")

    @classmethod
    def create(cls, folder: Path, config: RunConfig, base_hash: str) -> Workspace:
        """Make a workspace whose champion is the base model. Raises InputError when something is there already."""
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        workspace = cls(folder)
        info = {"version": BASE, "parent": None, "stage": None, "skill": None, "method": None, "created": now(),
                "seed": config.seed, "hashes": {"base": base_hash, "weights": base_hash},
                "config": config.model_dump(mode="json"), "scores": {}, "probe": None, "verdict": None,
                "cost": {"seconds": {}, "tokens": {}}}  # fmt: skip
        workspace.add_version(info, lambda _: None)
        workspace._append("init", version=BASE, base=base_hash)
        workspace._write_aliases()
        # Last: a folder without perdure.toml is no workspace, so an interrupted init can be repeated after removal.
        replace_text(folder / "perdure.toml", to_toml(config))
        return workspace

    @classmethod
    def open(cls, folder: Path) -> Workspace:
        """Open, and mend what a killed process left between ledger and aliases. Raises InputError when ``folder`` is no
        workspace or its ledger is damaged."""
        if not (folder / "perdure.toml").is_file():
            raise InputError(f"{folder}: not a workspace (no perdure.toml); make one with: perdure init {folder}")
        workspace = cls(folder)
        if not workspace._aliases_agree():
            with contextlib.suppress(InputError, OSError), workspace._turn():  # who only reads may not be able to write
                workspace._heal()  # a living writer was between the two writes, and has finished now
        return workspace

    def config(self) -> RunConfig:
        return load_config(self.folder / "perdure.toml")

    # Versions

    def versions(self) -> list[str]:
        """Names of all complete versions, oldest first."""
        found = (path.name for path in (self.folder / "versions").glob("v*") if _VERSION.fullmatch(path.name))
        return sorted(found, key=lambda name: int(name[1:]))

    def version(self, name: str) -> dict[str, Any]:
        """A version's ``version.json``. ``champion``, ``previous`` and ``v1`` for ``v001`` are understood."""
        return _record(self.version_folder(name))

    def version_folder(self, name: str) -> Path:
        """Raises InputError for a name that is no version here, and for one with a link that leads out of it."""
        folder = self.folder / "versions" / self.resolve(name)
        for path in (folder, *folder.rglob("*")):
            if path.is_symlink():
                check_inside(folder.parent if path == folder else folder, path)
        return folder

    def weights_folder(self, name: str) -> Path | None:
        """Where a version's weights, by its full name, are loaded from; None for the base model. Raises InputError as
        ``version_folder`` does, for all that it stands on."""
        if name == BASE:
            return None
        folder = self.version_folder(name)
        root, above = stack_of(folder)
        for below in (*([root] if root else ()), *above[:-1]):
            self.version_folder(below.name)
        return folder

    def resolve(self, name: str) -> str:
        """The version that a name or alias stands for. Raises InputError when it stands for none."""
        if name in ("champion", "previous", "candidate"):
            target = self.aliases()[name]
            if target is None:
                raise InputError(f"{self.folder}: there is no {name} version yet")
            name = target
        match = re.fullmatch(r"v?([0-9]{1,6})", name)
        full = f"v{int(match[1]):03d}" if match else name
        if full not in self.versions():
            raise InputError(f"{self.folder}: no version {name!r}; there are {', '.join(self.versions())}")
        return full

    def verdict(self, name: str) -> dict[str, Any] | None:
        """The last verdict on a version: its own, or a later one under another gate. None for the base model."""
        full = self.resolve(name)
        said = [event for event in self.ledger() if event["event"] == "verdict" and event.get("version") == full]
        return said[-1] if said else self.version(full).get("verdict")

    def next_version(self) -> str:
        """A name that no version has, or had: of one whose folder was removed by hand, the ledger still tells."""
        told = (str(event.get("version")) for event in self.ledger())
        numbers = [int(name[1:]) for name in (*self.versions(), *told) if _VERSION.fullmatch(name)]
        return f"v{max(numbers) + 1:03d}"

    def lineage(self, name: str = "champion") -> list[str]:
        """From the base to ``name``, following parents. Raises InputError when they go in a circle."""
        return [info["version"] for info in self.lineage_records(name)]

    def lineage_records(self, name: str = "champion") -> list[dict[str, Any]]:
        """The version.json of each of ``lineage``; every file is read once."""
        chain: dict[str, dict[str, Any]] = {}
        current: str | None = self.resolve(name)
        known = set(self.versions())
        while current is not None:
            if current in chain:
                raise InputError(f"{self.folder}: damaged, {current} is among its own ancestors")
            if current not in known:
                raise InputError(f"{self.folder}: damaged, there is no version {current}, the parent of another")
            chain[current] = _record(self.folder / "versions" / current)
            current = chain[current]["parent"]
        return list(chain.values())[::-1]

    def add_version(self, info: dict[str, Any], write: Callable[[Path], None],
                    card: Callable[[dict[str, Any]], str] | None = None) -> None:  # fmt: skip
        """Make a version visible in one rename. ``write`` fills the folder beside; the weights' hash is added here, and
        ``card`` makes the text of its README.md from the whole of ``info``.

        Adding the same version again changes nothing. Raises InputError when the name stands for another one."""
        assert _VERSION.fullmatch(info["version"]), info["version"]
        final = self.folder / "versions" / info["version"]
        beside = folder_beside(final)
        write(beside)
        weights = sorted(beside.glob("*.safetensors"))
        if weights:
            below = self.version(info["parent"])["hashes"]["weights"] if is_stacked(beside) else ""
            info = info | {"hashes": info["hashes"] | {"weights": files_sha256(weights, below)}}
        if card:
            (beside / "README.md").write_text(card(info), encoding="utf-8")
        info = info | {"files": manifest_of(beside)}
        (beside / "version.json").write_text(to_json(info, indent=1) + "\n", encoding="utf-8")
        if final.exists():
            self._check_same(final, info)
            shutil.rmtree(beside)
            return
        put_in_place(beside, final)

    def _check_same(self, final: Path, info: dict[str, Any]) -> None:
        there = read_json(final / "version.json")
        if differing := [key for key in _SAME if _of_content(there.get(key)) != _of_content(info.get(key))]:
            raise InputError(
                f"{final}: is there already and differs in {', '.join(differing)}; a version never changes"
            )

    # Aliases and ledger

    def aliases(self) -> dict[str, str | None]:
        """As ``aliases.json`` has them, for readers without us; ``open`` and ``lock`` see to it that it is right."""
        return read_json(self.folder / "aliases.json")

    def promote(self, name: str, reason: str, instead_of: str | None = None, **fields: Any) -> bool:
        """Make a version the champion; the old champion becomes ``previous``. ``fields`` go into the ledger as well.

        False, and nothing done, where the champion is another one than ``instead_of``. Raises InputError for a version
        whose weights were removed."""
        with self._turn():
            self._heal()
            target, champion = self.resolve(name), self.aliases()["champion"]
            self.check_not_erased(target)
            if champion == target:
                return True
            if instead_of not in (None, champion):
                return False
            self._append("promote", version=target, parent=champion, reason=reason, **fields)
            self._write_aliases()
            return True

    def rollback(self, name: str | None = None, **fields: Any) -> str:
        """Go back to ``name``, or to what was the champion before this one; returns the new champion. ``fields`` go
        into the ledger as well.

        Raises InputError when there is nothing to go back to, or when ``name`` was never the champion."""
        with self._turn():
            self._heal()
            champion = self.aliases()["champion"]
            assert champion is not None
            target = self.resolve(name) if name else self._replaced_by(champion)
            if target is None:
                raise InputError(f"{self.folder}: the champion is the base model; there is nothing before it")
            if target == champion:
                raise InputError(f"{self.folder}: {target} is the champion already")
            if not self.was_served(target):
                raise InputError(
                    f"{self.folder}: {target} was never promoted; to serve it all the same: promote {target}"
                )
            self.check_not_erased(target)
            self._append("rollback", version=target, parent=champion, **fields)
            self._write_aliases()
            return target

    def was_served(self, name: str) -> bool:
        """Whether it has ever been the champion."""
        return any(event["event"] in ("init", "promote") and event["version"] == name for event in self.ledger())

    def _replaced_by(self, name: str) -> str | None:
        """The champion in whose place ``name`` was promoted last: its parent, but after a replay or a promotion by
        hand. None for the base model."""
        promoted = [event for event in self.ledger() if event["event"] == "promote" and event["version"] == name]
        return promoted[-1]["parent"] if promoted else None

    def hold(self, name: str, **fields: Any) -> None:
        """Record that a version waits for a person: it becomes the ``candidate`` until the champion changes."""
        with self._turn():
            self._append("hold", version=name, **fields)
            self._write_aliases()

    def refuse(self, name: str, **fields: Any) -> None:
        """Record that a version was turned away; it waits for nobody."""
        with self._turn():
            self._append("refuse", version=name, **fields)
            self._write_aliases()

    def remove(self, event: str, **fields: Any) -> None:
        """Record what is about to be removed; a version that waits for a person without its weights waits no more."""
        with self._turn():
            self._append(event, **fields)
            self._write_aliases()

    def append(self, event: str, **fields: Any) -> None:
        """Add an event to the ledger; one that introduces a version holds the hash of its version.json."""
        with self._turn():
            self._append(event, **fields)

    def _append(self, event: str, **fields: Any) -> None:
        if event in ("init", "candidate"):
            fields[MANIFEST] = file_sha256(self.version_folder(fields["version"]) / "version.json")
        Ledger(self.folder).append(event, **fields)

    def ledger(self) -> list[dict[str, Any]]:
        """All events. Raises InputError naming the line that is no JSON object."""
        return Ledger(self.folder).events()

    def erased(self) -> dict[str, str]:
        """See ``ledger.erased_files``."""
        return Ledger(self.folder).erased()

    def erased_versions(self) -> dict[str, str]:
        """Version without its weights -> the skill with which they were erased; empty where they were pruned."""
        return without_weights(self.erased())

    def check_not_erased(self, version: str) -> None:
        """Raises InputError for a version whose weights, or those that its adapter lies on, were removed: with a skill
        or to make room."""
        root, above = stack_of(self.version_folder(version)) if version != BASE else (None, [])
        for name in dict.fromkeys([version, *(folder.name for folder in (*above, *filter(None, [root])))]):
            if (skill := self.erased_versions().get(name)) is not None:
                how = f"erased with the skill {skill!r}" if skill else "removed by perdure prune"
                below = "" if name == version else f", on which {version} lies,"
                raise InputError(f"{self.folder}: the weights of {name}{below} were {how}")

    def verify_ledger(self) -> int:
        """See Ledger.verify."""
        return Ledger(self.folder).verify()

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        """One process at a time writes ledger and aliases. It is a moment: whoever serves another version need not wait
        for a stage to end."""
        return Ledger(self.folder).turn()

    def _heal(self) -> None:
        """In turn: make the aliases say what the ledger says."""
        if not self._aliases_agree():
            self._write_aliases()

    def _aliases_agree(self) -> bool:
        wanted = self.expected_aliases()
        try:
            return self.aliases() == wanted
        except InputError:  # missing or damaged: it holds nothing that the ledger cannot give back
            return False

    def expected_aliases(self) -> dict[str, str | None]:
        """See Ledger.aliases."""
        return Ledger(self.folder).aliases()

    def _write_aliases(self) -> None:
        path = self.folder / "aliases.json"
        try:
            replace_text(path, aliases_text(self.expected_aliases()))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}). The ledger has what was asked for, so it counts: do not"
                " repeat it; the next command that can write here mends the file"
            ) from error

    # Skills

    def taught(self, name: str = "champion") -> dict[str, Path]:
        """Skills taught on the way to ``name``, in order: name -> kept folder (the latest content of each)."""
        found: dict[str, Path] = {}
        for info in self.lineage_records(name)[1:]:
            skill, content = info["skill"], info["hashes"].get("skill")
            if not isinstance(skill, str) or not isinstance(content, str):
                raise InputError(f"{self.folder}: damaged, {info['version']} does not say which skill it was taught")
            found.pop(skill, None)
            found[skill] = self.skills.folder_of(skill, content)
        return found

    # Stages

    def run_folder(self, stage: str) -> Path:
        return self.runs.folder_of(stage)

    def next_stage(self, skill: str) -> str:
        """A name for a new stage: one more than the last one that has begun or has a version."""
        return next_name(skill, [*self.runs.begun(), *self.closed_stages()])

    def closed_stages(self) -> set[str]:
        """Stages that gave a version."""
        records = (_record(self.folder / "versions" / name) for name in self.versions())
        return {info["stage"] for info in records if info["stage"]}

    def unfinished(self) -> list[str]:
        """Stages that have begun and given no version yet, in order."""
        closed = self.closed_stages()
        return [stage for stage in self.runs.begun() if stage not in closed]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time makes versions, and finds aliases that agree with the ledger. Raises InputError naming
        the holder."""
        with only_one(self.folder / ".lock"):
            with self._turn():
                self._heal()
            yield


def _record(folder: Path) -> dict[str, Any]:
    return read_object(folder / "version.json", _RECORD)


def _of_content(entry: Any) -> Any:
    """An entry of version.json without the state of the code, which may change between two calls."""
    return {key: value for key, value in entry.items() if key != "code"} if isinstance(entry, dict) else entry
