"""Answers written ahead: the same rows one step behind, weighted for it; a resumed run is the uninterrupted one."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import ScriptedEngine, example, renderer, tiny_model
from perdure.ahead import Ahead
from perdure.batching import collate
from perdure.config import TrainConfig
from perdure.fused import Head, target_logprobs
from perdure.models import head_of, hidden_at_loss_positions
from perdure.rollout.base import SamplingParams
from perdure.runlog import Clock, LoopState
from perdure.train import train
from perdure.types import Completion, InputError, Rollout
from perdure.update import importance, make_optimizer, optimise
from test_train import equal, lines, make_stage, settings, steps, weights

OVERLAP: dict[str, Any] = {"steps": 6, "warm_start_steps": 2, "warm_start_until": 1.0, "overlap": True,
                           "checkpoint_every": 2, "validate_every": 3}  # fmt: skip
ANSWERS = [Completion((1, 2), (-0.5, -0.25), True), Completion((3,), (-0.125,), False)]


# The thread


def test_answers_are_taken_once_and_in_their_step() -> None:
    ahead = Ahead(True)
    ahead.begin(3, lambda: ANSWERS)
    assert ahead.take(2) is None
    assert ahead.take(3) == ANSWERS
    assert ahead.take(3) is None
    ahead.close()


def test_nothing_is_written_ahead_unless_wanted() -> None:
    ahead = Ahead(False)
    ahead.begin(0, lambda: pytest.fail("not wanted"))
    ahead.wait()
    assert ahead.take(0) is None and ahead.state() is None
    ahead.close()


def test_what_goes_wrong_in_the_thread_is_raised_where_the_answers_are_needed() -> None:
    def fails() -> list[Completion]:
        raise InputError("the server is gone")

    ahead = Ahead(True)
    ahead.begin(0, fails)
    with pytest.raises(InputError, match="the server is gone"):
        ahead.take(0)
    ahead.close()


def test_answers_that_are_under_way_are_kept_in_a_checkpoint() -> None:
    ahead, later = Ahead(True), Ahead(True)
    ahead.begin(3, lambda: ANSWERS)
    later.load_state(ahead.state())
    later.begin(3, lambda: pytest.fail("they are there"))
    assert later.take(3) == ANSWERS
    ahead.close(), later.close()


# The weights


def test_target_logprobs_are_those_of_the_whole_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.fused.CHUNK_ELEMENTS", 3 * 11)  # three rows a chunk
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(11, 8, generator=generator), torch.randn(11, generator=generator), softcap=5.0)
    hidden_NH, targets_N = torch.randn(7, 8, generator=generator), torch.randint(11, (7,), generator=generator)
    naive_NV = (head.logits(hidden_NH) / 0.7).log_softmax(-1)
    found_N = target_logprobs(head, hidden_NH, targets_N, temperature=0.7)
    assert torch.allclose(found_N, naive_NV[torch.arange(7), targets_N], atol=1e-6)
    assert target_logprobs(head, hidden_NH[:0], targets_N[:0]).shape == (0,)


def test_a_lagging_token_weighs_on_the_next_position_what_it_has_become_likelier_up_to_a_limit(tmp_path: Path) -> None:
    stage, config = make_stage(tmp_path, tiny_model(), anchors=False), settings(anchor_share=0.0, max_importance=1.5,
                                                                                 overlap=True)  # fmt: skip
    made = renderer()
    fresh = made.rollout(example("q", "red cat"), made.demonstration(example("q", "red cat")), None)
    batch = collate([fresh], "student", 0)
    hidden_NH = hidden_at_loss_positions(stage.student.model, batch)
    assert importance(stage, config, batch, hidden_NH).tolist() == [1.0] * len(batch.targets_N)
    now = target_logprobs(head_of(stage.student.model), hidden_NH, batch.targets_N).tolist()
    then = tuple(value - math.log(ratio) for value, ratio in zip(now, (0.5, 1.2, 4.0, 1.0), strict=False))
    lagging = replace(fresh, completion=replace(fresh.completion, sampler_logprobs=then), lagging=True)
    both = collate([fresh, lagging], "student", 0)
    found = importance(stage, config, both, hidden_at_loss_positions(stage.student.model, both)).tolist()
    count = len(batch.targets_N)
    assert found[:count] == [1.0] * count
    assert count >= 3 and found[count:] == pytest.approx([1.0, 0.5, 1.2, 1.5][:count], rel=1e-4)
    own = settings(anchor_share=0.0, max_importance=1.5, overlap=True, support="sampled", divergence="reverse_kl",
                   warm_start_steps=0, demonstration_weight=0)  # fmt: skip
    found = importance(stage, own, both, hidden_at_loss_positions(stage.student.model, both)).tolist()
    assert found[count:] == pytest.approx([0.5, 1.2, 1.5, 1.0][:count], rel=1e-4)


def test_the_last_factor_of_the_weight_makes_the_mean_right_where_the_own_ratio_does_not() -> None:
    """By enumeration, vocabulary 5: the mean divergence at the second position, under what the student samples now,
    from samples of what it was."""
    generator = torch.Generator().manual_seed(0)
    now_V, then_V = (torch.randn(5, generator=generator).softmax(-1) for _ in range(2))
    now_VV, then_VV = (torch.randn(5, 5, generator=generator).softmax(-1) for _ in range(2))
    divergence_V = torch.rand(5, generator=generator)  # after each first token
    wanted = now_V @ divergence_V
    samples_VV = then_V[:, None] * then_VV
    own = (samples_VV * now_VV / then_VV * divergence_V[:, None]).sum()
    before = (samples_VV * (now_V / then_V * divergence_V)[:, None]).sum()
    torch.testing.assert_close(before, wanted)
    torch.testing.assert_close(own, then_V @ divergence_V)  # as if it were not weighted
    assert abs(own - wanted) > 0.01


def test_the_weights_multiply_the_loss(tmp_path: Path) -> None:
    """After tokens half as likely now as when they were sampled a loss counts half."""
    stage, config = make_stage(tmp_path, tiny_model(), anchors=False), settings(anchor_share=0.0, overlap=True)
    made = renderer()
    row = made.rollout(example("q", "red"), made.demonstration(example("q", "red")), stage.template)
    batch = collate([row], "student", 0)
    now_N = target_logprobs(head_of(stage.student.model), hidden_at_loss_positions(stage.student.model, batch),
                            batch.targets_N)  # fmt: skip
    then = tuple((now_N + math.log(2)).tolist())
    lagging = replace(row, completion=replace(row.completion, sampler_logprobs=then), lagging=True)
    assert stage.teacher
    scored = [stage.teacher.score(collate([row], "teacher", 0))]

    def loss(rollout: Rollout, skip: int = 0) -> float:
        """Summed over the positions."""
        skipping = config.model_copy(update={"skip_first_tokens": skip})
        optimizer = make_optimizer(stage, skipping)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
        of_part = [scored[0][skip:]]
        found = optimise(stage, skipping, optimizer, [rollout], of_part, Clock(), LoopState())
        return found["loss"] * found["loss_tokens"]

    first = loss(row) - loss(row, skip=1)
    assert first > 0 and loss(row, skip=1) > 0
    assert loss(lagging) == pytest.approx(first + loss(row, skip=1) / 2, rel=1e-4)
    # The demonstration's share of the target is part of that loss.
    label = {"labels": row.completion.token_ids, "label_weight": 0.5}
    mixed, mixed_lagging = replace(row, **label), replace(lagging, **label)
    first = loss(mixed) - loss(mixed, skip=1)
    assert loss(mixed) != pytest.approx(loss(row), rel=1e-2)
    assert loss(mixed_lagging) == pytest.approx(first + loss(mixed, skip=1) / 2, rel=1e-4)


# The loop


def test_the_first_on_policy_step_is_in_step_and_the_rest_one_behind(tmp_path: Path) -> None:
    """The prompts of each step are those of the run without overlap; the weights that answer are one step older."""
    plain, ahead = make_stage(tmp_path / "a"), make_stage(tmp_path / "b")
    train(plain, settings(**OVERLAP | {"overlap": False, "steps": 4}))
    train(ahead, settings(**OVERLAP | {"steps": 4}))
    first, second = steps(plain), steps(ahead)
    assert first[:3] == second[:3]  # two steps of warm start, and the first on-policy one
    assert first[3] != second[3] and second[3]["loss"] == second[3]["loss"]


def test_a_run_with_overlap_repeats_itself_and_learns(tmp_path: Path) -> None:
    a, b = make_stage(tmp_path / "a"), make_stage(tmp_path / "b")
    for stage in (a, b):
        train(stage, settings(**OVERLAP | {"steps": 10}))
    assert lines(a) == lines(b) and equal(weights(a), weights(b))
    assert steps(a)[-1]["sample_probability"] > steps(a)[3]["sample_probability"]


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_run_takes_the_answers_that_were_under_way(tmp_path: Path, stop: int) -> None:
    whole, cut = make_stage(tmp_path / "whole"), make_stage(tmp_path / "cut")
    train(whole, settings(**OVERLAP))

    class Stop(Exception):
        pass

    def stops(line: dict[str, Any], timings: dict[str, Any]) -> None:
        if line["step"] == stop and "loss" in line:
            raise Stop

    with pytest.raises(Stop):
        train(cut, settings(**OVERLAP), stops)
    again = make_stage(tmp_path / "cut")
    train(again, settings(**OVERLAP))
    assert lines(again) == lines(whole) and equal(weights(again), weights(whole))


def test_the_answers_are_written_while_the_step_trains(tmp_path: Path) -> None:
    threads: list[str] = []

    class Watching(ScriptedEngine):
        def generate(self, prompts: Any, params: SamplingParams, *rest: Any, **more: Any) -> Any:
            if params.temperature:
                threads.append(threading.current_thread().name)
            return super().generate(prompts, params, *rest, **more)

    stage = make_stage(tmp_path, engine=Watching(lambda prompt: "red"), anchors=False)
    train(stage, settings(**OVERLAP | {"steps": 4, "anchor_share": 0.0}))
    assert threads[0] == "MainThread" and all(name.startswith("rollouts-ahead") for name in threads[1:])
    assert len(threads) == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"overlap": True, "method": "sft"}, 'overlap has an effect only with method = "sdft"'),
        ({"max_importance": 3.0}, "max_importance has an effect only with overlap or update_sampler_every"),
        ({"update_sampler_every": 2, "method": "sft"}, 'update_sampler_every has an effect only with method = "sdft"'),
        ({"overlap": True, "lora_rank": 4}, "adapters train on it"),
    ],
)
def test_settings_that_overlap_cannot_go_with_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TrainConfig(**options)
