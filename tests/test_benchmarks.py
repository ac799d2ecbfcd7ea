"""The benchmarks run to their end, on a tiny model: what they time, they time on the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fakes import save_tiny_model, toy_skill
from perdure.config import RunConfig
from perdure.session import open_session
from perdure.skills.base import load_skill

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("common", "own_steps", "vs_sft"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import own_steps

    settings = {"steps": 2, "batch": 4, "max_new_tokens": 8}
    model, skill = save_tiny_model(tmp_path / "model"), toy_skill(tmp_path / "colours")
    monkeypatch.setattr(sys, "argv", ["own_steps.py", str(model), str(skill), json.dumps(settings)])
    own_steps.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found["seconds"]) == 2 and all(tokens > 0 for tokens in found["tokens"])
    assert {"rollout", "teacher", "forward", "backward"} <= found["parts"].keys()


def test_vs_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import vs_sft

    folder = save_tiny_model(tmp_path / "model")
    monkeypatch.setattr(vs_sft, "open_session", lambda config: open_session(RunConfig(), folder))
    monkeypatch.setattr(vs_sft, "skill", lambda: load_skill(toy_skill(tmp_path / "colours")))
    monkeypatch.setattr(vs_sft, "load_state", lambda session, state: None)  # trains the real model
    monkeypatch.setattr(vs_sft, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["vs_sft.py", "--rounds", "1", "--batch", "4", "--json", str(tmp_path / "r.json")])
    vs_sft.main()
    found = json.loads((tmp_path / "r.json").read_text())
    assert all(found["vs_sft"][name]["median"] > 0 for name in ("cold", "trained", "warm_start"))
