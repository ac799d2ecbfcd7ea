"""A chain file: which skills, in which orders, by which methods, with which seeds. From it, the list of runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from perdure.config import RunConfig
from perdure.importers import IMPORTERS
from perdure.settings import parse, parse_toml
from perdure.types import InputError

NAME = r"[a-z0-9][a-z0-9-]*"
"""Names become folders."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodRow(_Part):
    """One row of the tables: a method with its settings."""

    label: str
    """For people."""
    settings: dict[str, dict[str, Any]] = {}
    """Sections of a RunConfig, on top of the chain's own."""
    rate: float | None = Field(default=None, gt=0)
    """A fixed learning rate: the row has no sweep."""
    sweep_as: str | None = None
    """Takes the rate found for another row: one that trains on the same rows while there is no earlier skill."""

    @property
    def sweeps(self) -> bool:
        """Whether it has a sweep of its own, where the chain file asks for sweeps."""
        return self.rate is None and self.sweep_as is None


class Source(_Part):
    """Where a skill comes from, and what is done to its training rows to make it harder; test rows stay as they are."""

    of: str
    """An importer, or a skill folder relative to the chain file."""
    rows: int | None = Field(default=None, ge=1)
    """Only so many training rows."""
    noise: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows that get the answer of another row."""

    @property
    def changed(self) -> bool:
        """Whether the skill is not taken as it is."""
        return self.rows is not None or self.noise > 0


class Sweep(_Part):
    """Each row's learning rate: the best validation accuracy on the first skill; of equals the smallest rate."""

    rates: tuple[float, ...] = Field(min_length=1)
    max_drift: float | None = Field(default=None, gt=0)
    """Rates that move the model further than this on general prompts (KL from the start, nats a token) are left out, if
    any rate stays below: the rate that learns one skill best may be one that keeps nothing (docs/results.md). Known
    only for rows with general anchors."""
    seed: int = 0


class ChainFile(_Part):
    """The whole file. Settings are sections of a RunConfig; stages run without the prior tasks, which are measured on
    the base and on each run's last version, and, unless a row's ``gate`` says otherwise, with a gate that refuses and
    repairs nothing."""

    name: str = Field(pattern=f"^{NAME}$")
    about: str = ""
    seeds: tuple[int, ...] = Field(min_length=1)
    skills: dict[str, str | Source] = Field(min_length=1)
    """Name -> importer or skill folder, or a Source that says more."""
    orders: dict[str, tuple[str, ...]] = Field(min_length=1)
    settings: dict[str, dict[str, Any]] = {}
    methods: dict[str, MethodRow] = Field(min_length=1)
    sweep: Sweep | None = None
    reference: str | None = None
    """The row that the others are compared with; default: the first."""

    def source(self, skill: str) -> Source:
        found = self.skills[skill]
        return Source(of=found) if isinstance(found, str) else found

    @model_validator(mode="after")
    def _known(self) -> ChainFile:
        problems = [f"orders.{name}: no skill {skill!r}" for name, order in self.orders.items() for skill in order
                    if skill not in self.skills]  # fmt: skip
        problems += [f"orders.{name}: needs at least one skill, each once" for name, order in self.orders.items()
                     if not order or len(set(order)) < len(order)]  # fmt: skip
        named = (*self.methods, *self.orders, *self.skills)
        problems += [f"{name}: names of methods, orders and skills are small letters, digits and hyphens"
                     for name in named if not re.fullmatch(NAME, name)]  # fmt: skip
        if self.reference is not None and self.reference not in self.methods:
            problems.append(f"reference: no method {self.reference!r}")
        sweeping = {name for name, row in self.methods.items() if row.sweeps}
        problems += [f"methods.{name}: sweep_as = {row.sweep_as!r} is no other row with a sweep of its own"
                     for name, row in self.methods.items() if row.sweep_as not in {None, *sweeping}]  # fmt: skip
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass(frozen=True)
class RunPlan:
    """One chain to run: a row of the table, an order and a seed; or a row's sweep at one rate."""

    key: str
    """Name of its folder."""
    method: str
    label: str
    order: str
    skills: tuple[str, ...]
    seed: int
    settings: dict[str, dict[str, Any]]
    """Of all stages."""
    rate: float | None = None
    """Set by a sweep."""

    @property
    def config(self) -> RunConfig:
        """Raises InputError for settings that cannot be used."""
        raw = merged({"gate": {"enforce": False, "repair": 0}}, self.settings, {"probe": {"tasks": []}})
        if self.rate is not None:
            raw = merged(raw, {"train": {"learning_rate": self.rate}})
        return parse(RunConfig, raw | {"seed": self.seed}, where=f"{self.method}: settings of the chain file")

    @property
    def probe(self) -> RunConfig:
        """The settings under which the prior tasks are measured, on base and last version."""
        raw = {section: values for section, values in self.settings.items() if section in ("model", "probe")}
        return parse(RunConfig, raw | {"seed": 0}, where=f"{self.method}: settings of the chain file")

    def base_identity(self, skills: Iterable[str]) -> str:
        """Hash of all that decides what the base model scores on ``skills`` but code and data."""
        config = self.config.model_dump(mode="json", include={"model", "context", "thinking", "rollout", "eval"})
        said = [sorted(skills), config, self.probe.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """Hash of all that decides the run's result but code and data. Defaults are in it: one that changed gives other
        results."""
        settings, probe = (config.model_dump(mode="json") for config in (self.config, self.probe))
        said = [self.skills, self.seed, settings, probe]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def load_chain(path: Path) -> ChainFile:
    """Read a chain file. Raises InputError naming the file and every problem, settings of all rows included."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    chain = parse(ChainFile, parse_toml(data, path), where=str(path))
    for name in chain.skills:
        source = chain.source(name).of
        file = path.parent / source / "skill.toml"
        if source in IMPORTERS:
            continue
        if not file.is_file():
            raise InputError(f"{path}: skills.{name}: {source!r} is neither an importer nor a skill folder beside it")
        if (called := parse_toml(file.read_bytes(), file).get("name")) != name and not chain.source(name).changed:
            raise InputError(f"{path}: skills.{name}: the skill in {source} is called {called!r}: call it so here, too")
    try:
        for plan in [*runs_of(chain, {}), *sweeps_of(chain)]:
            _ = plan.config, plan.probe
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return chain


def runs_of(chain: ChainFile, rates: dict[str, float]) -> list[RunPlan]:
    """Every run of the table, seed by seed and order by order, so that what is finished first is a whole table.

    ``rates``: learning rate of each row, from its sweep; rows without one keep their settings'."""
    plans = []
    for seed in chain.seeds:
        for order, skills in chain.orders.items():
            for name, row in chain.methods.items():
                key = f"{name}.{order}.{seed}"
                plans.append(RunPlan(key, name, row.label, order, skills, seed, merged(chain.settings, row.settings),
                                     row.rate or rates.get(row.sweep_as or name)))  # fmt: skip
    return plans


def sweeps_of(chain: ChainFile) -> list[RunPlan]:
    """The first skill of the first order, by each row that has a sweep of its own, at each rate."""
    if chain.sweep is None:
        return []
    order, skills = next(iter(chain.orders.items()))
    return [
        RunPlan(f"sweep.{name}.{rate:g}", name, row.label, order, skills[:1], chain.sweep.seed,
                merged(chain.settings, row.settings, {"eval": {"rows": 1}}), rate)
        for name, row in chain.methods.items() if row.sweeps for rate in chain.sweep.rates
    ]  # fmt: skip


def merged(*parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections of settings, later ones first."""
    whole: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, values in part.items():
            whole[section] = whole.get(section, {}) | values
    return whole
