"""A checkpoint brings everything back to the bit, and a half-written one is never seen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import tiny_model
from perdure import checkpoint
from perdure.checkpoint import (
    checkpoints,
    drop_training_state,
    load_checkpoint,
    load_weights,
    newest,
    save_best,
    save_checkpoint,
    save_weights,
)


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
    ids = torch.arange(number, number + 6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tied", [True, False])
def test_going_on_is_the_same_to_the_bit(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tied=tied)
    optimizer = adam(model)
    for number in range(3):
        step(model, optimizer, number)
    teacher = {"w": torch.randn(3)}
    save_checkpoint(tmp_path, 3, model, optimizer, teacher, {"state": {"step": 3}})
    for number in range(3, 6):
        step(model, optimizer, number)

    fresh = tiny_model(seed=5, tied=tied)
    fresh_optimizer = adam(fresh)
    loop, found = load_checkpoint(checkpoints(tmp_path)[-1], fresh, fresh_optimizer)
    assert loop == {"step": 3, "state": {"step": 3}} and same(found, teacher)
    for number in range(3, 6):
        step(fresh, fresh_optimizer, number)
    assert same(weights(model), weights(fresh))
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert same(optimizer.state[mine], fresh_optimizer.state[theirs])


def test_only_the_newest_stays(tmp_path: Path) -> None:
    model = tiny_model()
    for number in (5, 10, 100):
        save_checkpoint(tmp_path, number, model, adam(model), {}, {})
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-000100"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    model = tiny_model()
    save_checkpoint(tmp_path, 5, model, adam(model), {}, {"a": 1})
    save_checkpoint(tmp_path, 5, model, adam(model), {}, {"a": 2})
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-000005"]
    assert load_checkpoint(checkpoints(tmp_path)[0], model, adam(model))[0] == {"step": 5, "a": 2}


@pytest.mark.parametrize("at", ["save_file", "put_in_place", "os.replace", "shutil.rmtree"])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Whatever is visible can be loaded, and the next save clears up."""
    model = tiny_model()
    optimizer = adam(model)
    save_checkpoint(tmp_path, 5, model, optimizer, {}, {})

    class Killed(BaseException):
        pass

    def kill(*args: Any, **options: Any) -> None:
        if at != "shutil.rmtree" or not options:  # cleaning up with ignore_errors comes before anything is written
            raise Killed

    owner, _, name = at.rpartition(".")
    monkeypatch.setattr(getattr(checkpoint, owner) if owner else checkpoint, name, kill)
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, 10, model, optimizer, {}, {})
    monkeypatch.undo()
    for folder in checkpoints(tmp_path):
        load_checkpoint(folder, model, optimizer)
    assert checkpoints(tmp_path)
    save_checkpoint(tmp_path, 10, model, optimizer, {}, {})
    assert os.listdir(tmp_path) == ["checkpoint-000010"]


def test_a_kill_before_the_older_checkpoint_is_gone_leaves_one_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an attempt at repair begins at a checkpoint that an unkilled run has not."""
    assert newest(tmp_path) is None
    model = tiny_model()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_remove", lambda folder: None)
        for step in (5, 10):
            save_checkpoint(tmp_path, step, model, adam(model), {}, {})
    assert len(checkpoints(tmp_path)) == 2
    found = newest(tmp_path)
    assert found is not None and found.name == "checkpoint-000010" and checkpoints(tmp_path) == [found]


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = tiny_model(layers=1)
    save_checkpoint(tmp_path, 1, model, adam(model), {}, {})
    other = tiny_model(layers=2, seed=3)
    before = weights(other)
    with pytest.raises(ValueError, match="other weights"):
        load_checkpoint(checkpoints(tmp_path)[0], other, adam(other))
    assert same(before, weights(other))


def test_weights_round_trip(tmp_path: Path) -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert same(weights(model), weights(other))
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_the_best_weights_that_a_checkpoint_speaks_of_stay_until_the_next(tmp_path: Path) -> None:
    model = tiny_model()

    def kept() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("best-*"))

    save_best(model, tmp_path, 2)
    save_best(model, tmp_path, 4)
    assert kept() == ["best-000004.safetensors"]
    save_checkpoint(tmp_path, 4, model, adam(model), {}, {"state": {"best_step": 4}})
    for step in (6, 8):  # a run killed here goes on from step 4, whose best are those of step 4
        save_best(model, tmp_path, step)
        assert kept() == ["best-000004.safetensors", f"best-{step:06d}.safetensors"]
    save_checkpoint(tmp_path, 8, model, adam(model), {}, {"state": {"best_step": 8}})
    save_best(model, tmp_path, 10)
    assert kept() == ["best-000008.safetensors", "best-000010.safetensors"]


def test_training_state_goes_and_the_record_stays(tmp_path: Path) -> None:
    model = tiny_model()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}))
    save_checkpoint(tmp_path, 5, model, adam(model), {}, {})
    save_best(model, tmp_path, 5)
    drop_training_state(tmp_path)
    drop_training_state(tmp_path)  # twice is fine
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
