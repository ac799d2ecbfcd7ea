"""``perdure demo``: the embedded model learns three skills in a row, with settings measured for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perdure.config import RunConfig
from perdure.curriculum import learn
from perdure.importers import IMPORTERS
from perdure.methods import METHODS
from perdure.models import EMBEDDED_NAME, EMBEDDED_PACKAGE, embedded_is_ready
from perdure.report.html import write_report
from perdure.report.numbers import summary
from perdure.reporting import Reporter
from perdure.settings import parse
from perdure.stages import create_workspace, differing
from perdure.types import InputError
from perdure.workspace import Workspace

SKILLS = {"commands": "commands", "sentiment": "sst2", "routing": "mmlu"}
"""Skill -> importer, in the order taught."""

SETTINGS: dict[str, Any] = {
    "context": {"candidates": ["turns:1", "turns:2"]},
    "preflight": {"rows": 16},
    "train": {
        "batch_size": 12,
        "steps": 20,
        "warm_start_steps": 14,
        "warm_start_until": 0.98,
        "demonstration_weight": 0.0,
        "validate_every": 10,
        "validation_max": 24,
        "checkpoint_every": 20,
    },
    "eval": {"rows": 120},
    "probe": {"tasks": ["arc_easy", "piqa", "winogrande", "basic_skills"], "rows": 96},
    "gate": {"budget": 0.05, "prior_budget": 0.04},
}
"""Departures from the defaults, so that it takes minutes. docs/log.md says how each was measured; the budgets are what
so few items can judge, the prior tasks those with short texts, the target is the teacher alone: with the demonstration
as half of it a third skill cost the second more in so few steps."""


def run_demo(folder: Path, compare: str | None, reporter: Reporter) -> tuple[dict[str, Any], Path]:
    """Make or continue the demo's workspace; returns the report's numbers and the report.

    With ``compare`` the same chain runs with that method in a workspace below, where the gate records its verdicts but
    does not refuse, so that both methods take all three steps. Raises InputError for an unknown method, and for a
    workspace that is not the demo's."""
    others = [name for name, method in METHODS.items() if name != "sdft" and method.completions != "document"]
    if compare is not None and compare not in others:
        raise InputError(f"--compare {compare}: no such method; one of {', '.join(others)}")
    compared = _compared(compare) if compare else {}
    if not embedded_is_ready():
        reporter.note(f"Preparing {EMBEDDED_NAME} from {EMBEDDED_PACKAGE}: once, about 20 s.")
    workspace = _workspace(folder, SETTINGS)
    sources = [_skill(folder / "imported", name, reporter) for name in SKILLS]
    with workspace.lock():
        learn(workspace, sources, workspace.config(), reporter)
    if compare:
        other = _workspace(folder / "compare" / compare, compared)
        with other.lock():
            learn(other, sources, other.config(), reporter)
    return summary(folder), write_report(folder)


def _compared(method: str) -> dict[str, Any]:
    train = SETTINGS["train"] | {"method": method} | ({"reinvoke_steps": 6} if METHODS[method].reinvoked else {})
    return SETTINGS | {"train": train, "gate": SETTINGS["gate"] | {"enforce": False}}


def _workspace(folder: Path, settings: dict[str, Any]) -> Workspace:
    config = parse(RunConfig, settings, where="the demo's settings")
    if not (folder / "perdure.toml").is_file():
        return create_workspace(folder, config)
    workspace = Workspace.open(folder)
    if others := differing(workspace.config().model_dump(mode="json"), config):
        raise InputError(f"{folder}: not a workspace of this demo ({', '.join(others[:3])}): give another folder by -w")
    return workspace


def _skill(folder: Path, name: str, reporter: Reporter) -> Path:
    """The skill's folder, imported on the first call."""
    target = folder / name
    if not target.is_dir():
        reporter.note(f"Importing {name} ({SKILLS[name]}).")
        IMPORTERS[SKILLS[name]](target, 0)
    return target
