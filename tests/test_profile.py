"""Where training time went, against hand-made timings."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from perdure.report.profile import PARTS, profile
from perdure.report.text import profile_table


def line(step: int, phase: str, tokens: dict[str, int], **seconds: float) -> dict:
    return {"step": step, "phase": phase, "seconds": seconds, "tokens": tokens, "parameters": 10}


def tokens(rollout: int, teacher: int, student: int) -> dict[str, int]:
    return {"rollout": rollout, "teacher": teacher, "student": student, "evaluate": 7}


REST = {"forward": 1.0, "backward": 2.0, "loss": 1.0, "optimizer": 1.0}
LINES = [
    line(1, "warm_start", tokens(0, 300, 100), rollout=0.01, teacher=3.0, **REST),
    line(2, "on_policy", tokens(40, 500, 200), rollout=2.0, teacher=1.0, **REST),
    line(3, "on_policy", tokens(80, 700, 300), rollout=4.0, teacher=1.0, **REST),
]


def rows(folder: Path) -> list[dict]:
    (folder / "timings.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LINES), encoding="utf-8")
    return profile(folder, peak=10_000.0)


def test_medians_by_hand(tmp_path: Path) -> None:
    found = {(row["phase"], row["part"]): row for row in rows(tmp_path)}
    assert len(found) == 2 * len(PARTS)
    assert found["warm_start", "rollout"]["of_peak"] is None
    teacher = found["warm_start", "teacher"]
    assert (teacher["seconds"], teacher["share"]) == (3.0, pytest.approx(3.0 / 8.01))
    assert teacher["tokens_per_second"] == 100.0 and teacher["of_peak"] == pytest.approx(100 * 2 * 10 / 10_000)
    rollout = found["on_policy", "rollout"]  # 40 tokens in 2 s, 40 in 4 s
    assert (rollout["seconds"], rollout["steps"]) == (3.0, 2) and rollout["tokens_per_second"] == pytest.approx(40 / 3)
    assert found["on_policy", "backward"]["of_peak"] == pytest.approx(100 / 2.0 * 4 * 10 / 10_000)
    assert found["warm_start", "rollout"]["tokens_per_second"] is None  # nothing was sampled
    assert found["on_policy", "loss"]["of_peak"] is None
    for phase in ("warm_start", "on_policy"):
        assert sum(found[phase, part]["share"] for part in PARTS) == pytest.approx(1.0)


def test_the_table_says_it_all(tmp_path: Path) -> None:
    stream = io.StringIO()
    profile_table("s01-toy", rows(tmp_path), 10_000.0, Console(file=stream, width=100))
    text = stream.getvalue()
    for part in ("s01-toy", "on policy, 2 steps", "warm start, 1 step", "backward", "20%", "Peak"):
        assert part in text


def test_a_stage_that_never_trained_has_no_rows(tmp_path: Path) -> None:
    assert profile(tmp_path, 1.0) == []
