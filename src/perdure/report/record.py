"""A workspace's files as plain records. Every file is checked when it is read: what is damaged is an InputError that
names the file and the place, never a half-right number. ``docs/formats.md`` describes the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perdure.config import RunConfig
from perdure.files import read_json, read_jsonl
from perdure.types import InputError
from perdure.workspace import BASE, Workspace

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    # Later versions of the package may write more; what is here must be right.
    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)


class KindScore(_Record):
    """Accuracy on the test rows of one kind."""

    accuracy: Share
    n: int


class Score(_Record):
    """Accuracy with its 95 % interval: of a skill, or of one task of the probe."""

    accuracy: Share
    low: Share | None = None
    high: Share | None = None
    n: int | None = None
    skill_hash: str | None = None
    """Of the skill's content that was measured; skills only."""
    kinds: dict[str, KindScore] = {}
    """Where test rows are of several kinds."""


class Probe(_Record):
    """Prior capabilities of one version."""

    tasks: dict[str, Score] = {}
    measured_with: str | None = None
    """Between two that were taken in different ways a difference says nothing of the versions."""


class Verdict(_Record):
    """What the gate said. ``table`` has one row a check."""

    decision: str
    reasons: tuple[str, ...] = ()
    table: tuple[dict[str, Any], ...] = ()


class Cost(_Record):
    seconds: dict[str, Seconds] = {}
    tokens: dict[str, Tokens] = {}
    predicted: dict[str, Seconds] | None = None
    """Seconds by phase, from the preflight; None for a method without one."""


class Version(_Record):
    """One ``versions/<name>/version.json``."""

    version: str
    parent: str | None = None
    stage: str | None = None
    branch: str | None = None
    """Set for a version of a replay."""
    skill: str | None = None
    method: str | None = None
    created: str = ""
    hashes: dict[str, Any] = {}
    config: dict[str, Any] = {}
    scores: dict[str, Score] = {}
    probe: Probe | None = None
    teacher_accuracy: Share | None = None
    verdict: Verdict | None = None
    cost: Cost = Cost()


class Baseline(_Record):
    """``runs/<stage>/baseline.json``: what a stage's parent scored before the stage."""

    version: str
    scores: dict[str, Score] = {}
    probe: Probe | None = None


class TemplateScore(_Record):
    template: str
    accuracy: Share
    low: Share | None = None
    high: Share | None = None
    tokens: float | None = None
    """Mean length of the teacher's prompt."""
    kl: float | None = None
    leak_share: float | None = None


class Preflight(_Record):
    """``runs/<stage>/preflight.json``: what ``perdure check`` measured."""

    student_accuracy: Share | None = None
    teacher_accuracy: Share | None = None
    template: str | None = None
    identity_kl: float | None = None
    window: dict[str, Any] = {}
    n: int | None = None
    templates: tuple[TemplateScore, ...] = ()
    ready: bool | None = None
    advice: tuple[str, ...] = ()


class StageInfo(_Record):
    """``runs/<stage>/stage.json``."""

    skill: str | None = None
    method: str | None = None
    parent: str | None = None
    config: dict[str, Any] = {}


class Item(_Record):
    """One evaluated row of a skill."""

    id: str
    prompt: str = ""
    expected: str = ""
    completion: str = ""
    score: float

    @property
    def right(self) -> bool:
        return self.score >= 1


Kind = TypeVar("Kind", bound=_Record)


@dataclass(frozen=True)
class Run:
    """One folder under ``runs/``; what is not written yet is None."""

    folder: Path
    info: StageInfo
    baseline: Baseline | None
    preflight: Preflight | None

    @property
    def stage(self) -> str:
        return self.folder.name

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``, steps and validations in the order written; empty when there are none."""
        path = self.folder / "metrics.jsonl"
        return read_jsonl(path, growing=True) if path.exists() else []


@dataclass(frozen=True)
class Record:
    """A workspace as its files say."""

    folder: Path
    config: RunConfig
    aliases: dict[str, str | None]
    versions: dict[str, Version]
    """By name, oldest first; the base model is the first."""
    runs: dict[str, Run]
    """By stage, in the order of the stages."""
    ledger: tuple[dict[str, Any], ...]

    @property
    def champion(self) -> str:
        name = self.aliases.get("champion") or BASE
        if name not in self.versions:
            raise InputError(f"{self.folder / 'aliases.json'}: damaged, the champion {name!r} is no version here")
        return name

    def lineage(self, name: str) -> list[str]:
        """From ``name`` back to the base, following parents. Raises InputError when the chain is broken."""
        chain = [name]
        while parent := self.versions[chain[-1]].parent:
            if parent in chain or parent not in self.versions:
                raise InputError(f"{self.folder}: damaged, the parent of {chain[-1]} is {parent!r}")
            chain.append(parent)
        return chain

    def scores(self, version: str) -> dict[str, Score]:
        """Every skill's score of a version: its own, then what a later stage measured of it anew."""
        found = dict(self.versions[version].scores)
        for baseline in self._baselines(version):
            found |= baseline.scores
        return found

    def probe(self, version: str, like: Probe | None = None) -> Probe | None:
        """Prior capabilities of a version, measured as ``like`` was where it is given; None where nobody did."""
        probes = [self.versions[version].probe, *(b.probe for b in self._baselines(version))]
        return next((found for found in reversed(probes)
                     if found and (like is None or found.measured_with == like.measured_with)), None)  # fmt: skip

    def items(self, version: str, skill: str) -> dict[str, Item]:
        """Per-item results of a version on a skill by id; empty where none were kept."""
        folders = [self.folder / "versions" / version / "evaluation"]
        folders += [run.folder / "baseline" for run in self._baseline_runs(version)]
        for folder in reversed(folders):
            # Looked up, not joined: a skill's name in a damaged file must not lead out of the folder.
            path = {p.stem: p for p in folder.glob("*.jsonl")}.get(skill)
            if path is not None:
                return {item.id: item for item in (checked(Item, row, path) for row in read_jsonl(path))}
        return {}

    def _baseline_runs(self, version: str) -> Iterator[Run]:
        return (run for run in self.runs.values() if run.baseline and run.baseline.version == version)

    def _baselines(self, version: str) -> Iterator[Baseline]:
        return (run.baseline for run in self._baseline_runs(version) if run.baseline)


def read_record(folder: Path) -> Record:
    """Read a workspace. Raises InputError when it is none, or naming the file that is damaged."""
    workspace = Workspace.open(folder)
    names = workspace.versions()
    if BASE not in names:
        raise InputError(f"{folder}: damaged, the base model's versions/{BASE} is missing")
    versions = {name: _read(Version, folder / "versions" / name / "version.json") for name in names}
    runs, ledger = _read_runs(folder / "runs"), workspace.ledger()
    for event in ledger:  # a version that was judged again, under another gate
        name = event.get("version")
        if event.get("event") == "verdict" and "table" in event and name in versions:
            later = checked(Verdict, event, folder / "ledger.jsonl")
            versions[name] = versions[name].model_copy(update={"verdict": later})
    return Record(folder, workspace.config(), workspace.aliases(), versions, runs, tuple(ledger))


def read_compared(folder: Path) -> dict[str, Record]:
    """The workspaces under ``compare/``, by method. Empty where nothing was compared."""
    folders = sorted((folder / "compare").glob("*/perdure.toml"))
    return {path.parent.name: read_record(path.parent) for path in folders}


def read_version(workspace: Workspace, name: str) -> Version:
    """One version.json. Raises InputError where it is damaged."""
    return _read(Version, workspace.folder / "versions" / name / "version.json")


def checked(kind: type[Kind], raw: Any, path: Path) -> Kind:
    """``raw`` as ``kind``. Raises InputError naming the file and every wrong field."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, item['loc'])) or '(whole)'}: {item['msg']}" for item in error.errors()]
        raise InputError(f"{path}: damaged:\n" + "\n".join(problems)) from error


def _read(kind: type[Kind], path: Path) -> Kind:
    return checked(kind, read_json(path), path)


def _read_optional(kind: type[Kind], path: Path) -> Kind | None:
    return _read(kind, path) if path.exists() else None


def _read_runs(folder: Path) -> dict[str, Run]:
    if not folder.is_dir():
        return {}
    # A hidden one is being removed.
    paths = sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=_stage_order)
    return {path.name: _read_run(path) for path in paths}


def _read_run(folder: Path) -> Run:
    return Run(
        folder,
        _read_optional(StageInfo, folder / "stage.json") or StageInfo(),
        _read_optional(Baseline, folder / "baseline.json"),
        _read_optional(Preflight, folder / "preflight.json"),
    )


def _stage_order(path: Path) -> tuple[int, str]:
    """``s02-...`` before ``s10-...`` before ``s100-...``; anything else last."""
    number = path.name.split("-", 1)[0].removeprefix("s")
    return (int(number) if number.isdecimal() else 10**9, path.name)


def number(value: Any) -> float | None:
    """A finite number as it is; anything else that a file may hold in its place as None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None
