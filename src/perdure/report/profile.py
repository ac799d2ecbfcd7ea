"""Where a stage's training time went: ``timings.jsonl`` of its run folder, part by part."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

PARTS: dict[str, tuple[str | None, int]] = {
    "rollout": ("rollout", 2),
    "teacher": ("teacher", 2),
    "forward": ("student", 2),
    "backward": ("student", 4),
    "loss": (None, 0),
    "optimizer": (None, 0),
}
"""Part of a step -> kind of tokens it works on, and operations a token and weight: 2 for reading, 4 for backward."""


def profile(run_folder: Path, peak: float) -> list[dict[str, Any]]:
    """One row for each phase and part: ``phase``, ``part``, ``steps``, ``seconds`` (median a step), ``share`` of the
    step, ``tokens_per_second`` and ``of_peak``; the last two are None where a part has no tokens.

    ``peak``: operations a second of a large matrix product here. ``of_peak`` counts the weights' products for every
    real token, as if each row ran alone: shared prefixes push it up (even above 1), everything else down. A rollout's
    tokens are those it wrote; reading its prompts costs time too."""
    path = run_folder / "timings.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    rows = []
    for phase in dict.fromkeys(line["phase"] for line in lines):
        steps = [(line, before) for line, before in zip(lines, [None, *lines], strict=False) if line["phase"] == phase]
        whole = sum(statistics.median(line["seconds"].get(part, 0.0) for line, _ in steps) for part in PARTS)
        for part, (kind, operations) in PARTS.items():
            seconds = statistics.median(line["seconds"].get(part, 0.0) for line, _ in steps)
            rate = None
            if kind and seconds:
                tokens = [line["tokens"][kind] - (before["tokens"][kind] if before else 0) for line, before in steps]
                rate = statistics.median(tokens) / seconds if any(tokens) else None
            rows.append({
                "phase": phase, "part": part, "steps": len(steps), "seconds": seconds,
                "share": seconds / whole if whole else 0.0, "tokens_per_second": rate,
                "of_peak": None if rate is None else rate * operations * lines[0]["parameters"] / peak,
            })  # fmt: skip
    return rows
