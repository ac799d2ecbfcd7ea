"""Decode in fixed shapes against decode in the shapes that come, on the CPU; recorded passes in test_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fakes import loaded, tiny_model
from perdure.adapters import adapted, without_adapters
from perdure.config import TrainConfig
from perdure.models import working_copy
from perdure.rollout import replay
from perdure.rollout.base import SamplingParams
from perdure.rollout.local import LocalEngine
from perdure.rollout.replay import can_replay
from perdure.types import Prompt
from test_adapters import shake
from test_packing import FAMILIES, ROWS, accepted
from test_rollout_local import EARLY_ENDS, GREEDY, prompts, references, tokens


def fixed(model: Any, batch_tokens: int = 8192, end_ids: tuple[int, ...] = EARLY_ENDS, replay: bool = True) -> Any:
    lm = loaded(model)
    return LocalEngine(type(lm)(model, lm.tokenizer, end_ids, lm.window), model, batch_tokens, replay=replay)


def shapes_of(engine: Any) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(slots, capacity) of what is kept -> rows and tokens a row of its passes."""
    return {key: list(shapes._passes) for key, shapes in engine.replays._shelf.items()}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["right", "damaged", "wrong", "none"])
@pytest.mark.parametrize("batch_tokens", [8192, 250])
def test_the_same_tokens_and_logprobs(batch_tokens: int, kind: str, temperature: float) -> None:
    model = tiny_model(scale=0.4)
    plain, engine = fixed(model, batch_tokens, replay=False), fixed(model, batch_tokens)
    given = references(model, kind) if kind != "none" else [()] * 5
    for seeds in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]):  # the second call finds the store and its passes there
        params = SamplingParams(16, temperature)
        got, wanted = (one.generate(prompts(), params, seeds, references=given) for one in (engine, plain))
        assert tokens(got) == tokens(wanted) and [c.finished for c in got] == [c.finished for c in wanted]
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(
                torch.tensor(a.sampler_logprobs), torch.tensor(b.sampler_logprobs), rtol=1e-4, atol=1e-4
            )
    assert plain.replays is None and len(shapes_of(engine)) == 1 and shapes_of(engine).popitem()[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    model, _ = accepted(name)
    rows = [Prompt(prompts("x")[0].example, tuple(row)) for row in ROWS]
    drafts = [(5, 6, 7)] * len(ROWS)
    got, wanted = (
        fixed(model, end_ids=(1,), replay=is_fixed).generate(rows, SamplingParams(12, 1.0), range(7), references=drafts)
        for is_fixed in (True, False)
    )
    assert tokens(got) == tokens(wanted)


def test_a_block_too_long_for_every_shape_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(scale=0.4)
    drafts, params = references(model, "right"), SamplingParams(16, 0)
    wanted = tokens(fixed(model, replay=False).generate(prompts(), params, [0] * 5))
    monkeypatch.setattr(replay, "WIDTHS", (1,))
    engine = fixed(model)
    assert tokens(engine.generate(prompts(), params, [0] * 5, references=drafts)) == wanted
    monkeypatch.setattr(replay, "MOST_TOKENS", 1)
    assert tokens(fixed(model).generate(prompts(), params, [0] * 5, references=drafts)) == wanted


def test_shapes_are_few() -> None:
    """Powers of two of rows, steps of capacity, two sizes of batch: any number of calls makes no more."""
    model = tiny_model(scale=0.4)
    engine = fixed(model)
    for count in range(1, 6):
        engine.generate(prompts()[:count], GREEDY, [0] * count, references=references(model, "damaged")[:count])
    kept = shapes_of(engine)
    assert set(kept) == {(slots, replay.CAPACITY_STEP) for slots in (1, 2, 4, 8)}
    for (slots, _), passes in kept.items():
        assert {rows for rows, _ in passes} <= {slots, max(1, slots // 4)}
        assert {each for _, each in passes} <= set(replay.WIDTHS)


def test_what_the_last_call_left_is_not_seen() -> None:
    """Not even where it was NaN."""
    model = tiny_model(scale=0.4)
    engine = fixed(model)
    wanted = tokens(engine.generate(prompts(), GREEDY, [0] * 5))
    with torch.inference_mode():
        for shapes in engine.replays._shelf.values():
            for pair in shapes.store.layers.values():
                for kept in pair:
                    kept.fill_(torch.nan)
    assert tokens(engine.generate(prompts(), GREEDY, [0] * 5)) == wanted


def test_passes_are_dropped_when_weights_move_or_adapters_come_and_go() -> None:
    masters = tiny_model(scale=0.4)
    working = working_copy(masters, torch.float32)
    engine = fixed(working)

    def kept() -> Any:
        engine.generate(prompts(), GREEDY, [0] * 5)
        return engine.replays._shelf.copy().popitem()[1]

    first = kept()
    assert kept() is first
    with torch.no_grad():
        next(working.parameters()).add_(1)  # in place: what is recorded reads the new values
    assert kept() is first
    with adapted(masters, working, TrainConfig(lora_rank=2), 0, merge=False) as model:
        with_adapters = kept()
        shake(model)
        assert with_adapters is not first and kept() is with_adapters
        with without_adapters(model):
            assert kept() is not with_adapters
    last = kept()
    parameter = next(working.parameters())
    parameter.data = parameter.data.clone()
    assert kept() is not last


def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fixed(tiny_model(scale=0.4))
    engine.generate(prompts(), GREEDY, [0] * 5)
    engine.generate(prompts()[:1], GREEDY, [0])
    assert set(shapes_of(engine)) == {(8, 256), (1, 256)}
    monkeypatch.setattr(replay, "KEPT_BYTES", engine.replays._shelf[1, 256].store.bytes)
    engine.generate(prompts()[:1], GREEDY, [0])
    assert set(shapes_of(engine)) == {(1, 256)}
    monkeypatch.setattr(replay, "KEPT_BYTES", 0)
    engine.generate(prompts()[:1], GREEDY, [0])
    assert not shapes_of(engine)


def test_it_is_for_gpus_and_for_rotations_that_stay() -> None:
    model = tiny_model()
    assert not can_replay(model) and fixed(model, replay=False).replays is None
    assert LocalEngine(loaded(model), model).replays is None

    class Elsewhere:
        device = torch.device("cuda")
        config = model.config

    assert can_replay(Elsewhere())
    for kind in replay.CHANGING_ROTATIONS:
        Elsewhere.config = type(model.config)(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0,
                                              "short_factor": [1.0] * 4, "long_factor": [1.0] * 4})  # fmt: skip
        assert not can_replay(Elsewhere())
