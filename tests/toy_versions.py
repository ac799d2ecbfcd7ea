"""Small versions and skills for the tests of the workspace: made-up weights, no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perdure.config import GateConfig, RunConfig
from perdure.workspace import Workspace

CONFIG = RunConfig(seed=3, gate=GateConfig(budget=0.1))
WEIGHTS = bytes(range(256)) * 16


def new_workspace(folder: Path) -> Workspace:
    return Workspace.create(folder, CONFIG, "base-hash")


def info(version: str, parent: str, skill: str = "toy", content: str = "c" * 64, **changed: Any) -> dict[str, Any]:
    """A version.json before its weights are hashed."""
    return {"version": version, "parent": parent, "stage": f"s{int(version[1:]):02d}-{skill}", "skill": skill,
            "method": "sdft", "seed": 0, "created": "2026-01-01T00:00:00Z", "scores": {},
            "hashes": {"base": "b", "skill": content}} | changed  # fmt: skip


def write_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "toy.jsonl").write_text('{"id": "1"}\n', encoding="utf-8")


def grown_workspace(folder: Path) -> Workspace:
    """v001 and v002 promoted one after the other, v003 not."""
    workspace = new_workspace(folder)
    for number in (1, 2, 3):
        workspace.add_version(info(f"v00{number}", f"v00{number - 1}", f"skill{number}"), write_weights)
        if number < 3:
            workspace.promote(f"v00{number}", "learned")
    return workspace


def write_skill(folder: Path) -> Path:
    """A skill folder of one row a side; returns it."""
    folder.mkdir()
    (folder / "skill.toml").write_text('name = "toy"\n', encoding="utf-8")
    for file in ("train", "test"):
        (folder / f"{file}.jsonl").write_text(f'{{"prompt": "{file}", "completion": "a"}}\n', encoding="utf-8")
    return folder
