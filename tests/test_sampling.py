"""Drawing a token: exact on small vocabularies that can be enumerated, and across block borders on larger ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.rollout.base import SamplingParams
from perdure.rollout.sampling import BLOCK, choose, truncated, uniforms

SAMPLE = SamplingParams(1)


def naive(logits_V: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """The first token whose cumulative probability exceeds the uniform number, in float64."""
    probabilities = (logits_V.double() / params.temperature).softmax(-1)
    return int((probabilities.cumsum(-1) <= uniform * probabilities.sum()).sum())


def test_choosing_inverts_the_cumulative_distribution() -> None:
    # upper edges 0, 0.2, 0.2, 0.7, 1: what has no probability is never chosen, not even at 0
    logits = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3]]).log().repeat(6, 1)
    edges = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 1e-16], dtype=torch.float64)
    chosen, logprobs = choose(logits, SAMPLE, edges)
    assert chosen.tolist() == [1, 1, 3, 3, 4, 4]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]))


@pytest.mark.parametrize("vocabulary", [3, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_it_is_what_a_plain_cumulative_sum_chooses(vocabulary: int, temperature: float) -> None:
    torch.manual_seed(0)
    logits, params = torch.randn(200, vocabulary) * 3, SamplingParams(1, temperature)
    numbers = uniforms(7, 200)
    chosen, logprobs = choose(logits.clone(), params, numbers)
    assert chosen.tolist() == [naive(row, params, float(u)) for row, u in zip(logits, numbers, strict=True)]
    wanted = (logits / temperature).log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.floats(0, 1, exclude_max=True))
def test_what_has_no_weight_is_never_chosen(seed: int, uniform: float) -> None:
    """Most of three blocks is -inf, both ends included; the number may lie on any edge."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((1, 3 * BLOCK), -torch.inf)
    alive = torch.randint(0, 3 * BLOCK, (5,), generator=generator)
    logits[0, alive] = torch.randn(5, generator=generator)
    (chosen,), (logprob,) = choose(logits, SAMPLE, torch.tensor([uniform], dtype=torch.float64))
    assert int(chosen) in alive.tolist() and torch.isfinite(logprob)


def test_greedy_takes_the_likeliest_at_temperature_one() -> None:
    chosen, logprobs = choose(torch.tensor([[0.2, 0.5, 0.3]]).log(), SamplingParams(1, 0), torch.zeros(1))
    assert chosen.tolist() == [1]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5]))


def test_truncation_keeps_the_likeliest_and_renormalises() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert truncated(logits, 2, 1.0).isfinite().tolist() == [[False, True, False, True]]
    assert truncated(logits, 0, 0.69).isfinite().tolist() == [[False, True, False, True]]
    assert truncated(logits, 0, 0.71).isfinite().tolist() == [[False, True, True, True]]
    assert truncated(logits, 0, 1e-9).isfinite().tolist() == [[False, True, False, False]]
    assert truncated(logits, 9, 1.0) is logits
    edge = torch.tensor([0.5], dtype=torch.float64)
    _, logprob = choose(logits.clone(), SamplingParams(1, top_k=2), edge)
    torch.testing.assert_close(logprob.exp(), torch.tensor([0.4 / 0.7]))


def test_numbers_come_from_the_seed_alone() -> None:
    assert torch.equal(uniforms(3, 5), uniforms(3, 9)[:5]) and not torch.equal(uniforms(3, 5), uniforms(4, 5))
    assert uniforms(-1, 2).dtype == torch.float64
