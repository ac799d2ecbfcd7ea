"""Packed sequences against separate ones: hidden states and gradients, for several families; a decode that goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.attention import enable, is_enabled, packed_hidden
from perdure.packing import KeyValues, advance, pack, segments_of

SIZE = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
    bos_token_id=None, eos_token_id=1,
)  # fmt: skip
WINDOW = dict(sliding_window=5)
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
    "mistral, sliding": (tf.MistralConfig, tf.MistralForCausalLM, WINDOW),
    "qwen2, half sliding": (tf.Qwen2Config, tf.Qwen2ForCausalLM,
                            WINDOW | dict(use_sliding_window=True, max_window_layers=1)),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {}),
    "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM, {}),
    "gemma2, soft cap, sliding": (tf.Gemma2Config, tf.Gemma2ForCausalLM, WINDOW | dict(attn_logit_softcapping=20.0)),
    "gemma3, sliding": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, WINDOW),
    "olmo2": (tf.Olmo2Config, tf.Olmo2ForCausalLM, {}),
    "smollm3": (tf.SmolLM3Config, tf.SmolLM3ForCausalLM, {}),
}  # fmt: skip
SHARED = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
ROWS = [
    [*SHARED, 4, 6, 8, 9, 10, 12], [*SHARED, 4, 6, 8, 31, 32, 33], [*SHARED, 34, 35], [36, 37, 38], [*SHARED, 34, 35],
    SHARED, [*SHARED, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18, 20, 21, 22, 24],
]  # fmt: skip
"""A shared beginning, a shorter one inside, equal rows, a row that others go on from, one alone, one much longer."""


def family(name: str, implementation: str | None = None) -> Any:
    config, kind, extra = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = config(**SIZE, **extra)
        model = kind(settings).eval()
        if implementation:
            model.set_attn_implementation(implementation)
        return model


def separately(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    return [model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows]


def accepted(name: str) -> tuple[Any, Any]:
    """The model that runs packed, and an equal one that stays as transformers made it: eager, where sdpa would leave
    out what it does not know (a soft cap)."""
    model, plain = family(name), family(name, "eager")
    assert enable(model) and is_enabled(model) and not is_enabled(plain)
    return model, plain


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_separate_rows(name: str) -> None:
    model, plain = accepted(name)
    layout = pack(ROWS)
    hidden = packed_hidden(model.base_model, layout)
    packed, apart = [hidden[path] for path in layout.paths], separately(plain, ROWS)
    torch.manual_seed(1)
    weights = [torch.randn_like(states) for states in apart]
    for got, wanted in zip(packed, apart, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    for rows in (packed, apart):
        torch.stack([(states * weight).sum() for states, weight in zip(rows, weights, strict=True)]).sum().backward()
    for (label, got), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-3 * float(wanted.grad.abs().max()),
                                       msg=label)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_store_goes_on_where_the_rows_stand(name: str) -> None:
    """Prompts, then blocks of different length for each row, over what an earlier wrong block left behind."""
    model, plain = accepted(name)
    cuts = [3, 11, 1, 2, 11, 9, 12]
    store = KeyValues(8, 40)
    slots = [1, 2, 3, 4, 5, 6, 0]
    first = pack([[*row[:cut], 39, 39] for row, cut in zip(ROWS, cuts, strict=True)], store=store, slots=slots)
    packed_hidden(model.base_model, first)
    by_slot = sorted(range(7), key=lambda row: slots[row])
    lengths = [cuts[row] for row in by_slot]
    for step in (2, 1, 5):
        news = [ROWS[row][at : at + step] or [39] for row, at in zip(by_slot, lengths, strict=True)]
        layout = advance(store, news, lengths)
        hidden = packed_hidden(model.base_model, layout)
        for row, at, path in zip(by_slot, lengths, layout.paths, strict=True):
            whole = separately(plain, [[*ROWS[row][:at], *(ROWS[row][at : at + step] or [39])]])[0]
            torch.testing.assert_close(hidden[path], whole[at:], rtol=1e-3, atol=1e-4)
        lengths = [min(at + step, len(ROWS[row])) for row, at in zip(by_slot, lengths, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_it_is_as_near_to_float32_as_separate_rows(dtype: torch.dtype) -> None:
    model, plain = accepted("llama")
    exact = torch.cat(separately(plain, ROWS))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        layout = pack(ROWS)
        hidden = packed_hidden(model.base_model, layout)
        packed = torch.cat([hidden[path] for path in layout.paths])
        apart = torch.cat(separately(plain, ROWS))
    assert (packed - exact).norm() <= 1.2 * (apart - exact).norm() + 1e-4 * exact.norm()


def test_shared_tokens_are_computed_once() -> None:
    segments, paths = segments_of(ROWS, shared_tokens=3)
    assert [len(s.tokens) for s in segments] == [10, 3, 3, 8, 3, 2, 3]
    assert paths[2] == paths[4] and paths[5] == list(range(10))
    assert sum(len(s.tokens) for s in segments) == 32 < sum(map(len, ROWS))


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 6))
def test_every_row_finds_its_own_tokens(rows: list[list[int]], shared_tokens: int) -> None:
    layout = pack(rows, shared_tokens=shared_tokens)
    ids, positions = layout.input_ids_T.tolist(), layout.position_ids_T.tolist()
    for row, path in zip(rows, layout.paths, strict=True):
        assert [ids[place] for place in path] == row
        assert [positions[place] for place in path] == list(range(len(row)))
    assert len(ids) <= sum(map(len, rows)) and {place for path in layout.paths for place in path} == set(
        range(len(ids))
    )
    outputs = sum(group.queries_SQ.numel() for group in layout.groups)
    queries = torch.cat([group.queries_SQ.flatten() for group in layout.groups])
    assert len(queries) == outputs and queries[layout.back_T].tolist() == list(range(len(ids)))


def test_empty_rows_are_refused() -> None:
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one"):
            pack(rows)


def test_what_it_does_not_know_stays_as_it_was() -> None:
    absolute = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    recurrent = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)).eval()
    for model in (absolute, recurrent):
        before = model.config._attn_implementation
        assert not enable(model) and not is_enabled(model) and model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap, sliding"])
def test_without_a_layout_it_is_what_it_was(name: str) -> None:
    model, plain = family(name), family(name)
    plain.set_attn_implementation("eager")  # its sdpa forgets Gemma 2's soft cap in transformers 5.19
    assert enable(model)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    for seen in (mask, None):
        got, wanted = (m(input_ids=ids, attention_mask=seen).logits for m in (model, plain))
        torch.testing.assert_close(got[mask == 1], wanted[mask == 1])
    for rows, seen in ((ids, mask), (ids, torch.ones_like(mask)), (ids[:1], mask[:1])):  # without padding: no mask
        assert torch.equal(model.generate(rows, attention_mask=seen, max_new_tokens=8, do_sample=False),
                           plain.generate(rows, attention_mask=seen, max_new_tokens=8, do_sample=False))  # fmt: skip
