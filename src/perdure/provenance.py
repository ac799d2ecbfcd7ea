"""What made a record, and when: the code, the packages that compute, the time."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perdure import __version__


def now() -> str:
    """UTC to the second, as written into ledger and versions."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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


def environment() -> dict[str, str]:
    """Versions of what computes, by name, and the machine's kind."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return {"python": platform.python_version(), **packages, "platform": platform.platform()}
