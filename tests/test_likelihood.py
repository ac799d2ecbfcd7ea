"""Log-likelihoods: shared contexts, one row a continuation and whole logits give the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM

from fakes import END, tiny_model, tiny_tokenizer
from perdure.likelihood import Pair, can_share_contexts, make_rows, score_pairs
from perdure.lm import LoadedModel
from perdure.types import InputError

PAIRS: list[Pair] = [
    ((1, 2, 3), (4,)),
    ((1, 2, 3), (5, 6, 7)),
    ((9, 8, 7, 6, 5, 4, 3), (2, 1)),
    ((1, 2, 3), (5, 6, 9)),
    ((4,), (4, 4, 4, 4, 4, 4)),
    ((1, 2, 3), (5, 6, 7)),
    ((9, 8, 7, 6, 5, 4, 3), (30,)),
]


def naive(model: Any, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """One unpadded forward pass a pair, over all logits: the oracle."""
    results = []
    for context, continuation in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
        targets = torch.tensor(continuation)
        logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])
        results.append((float(logprobs.sum()), bool((logits.argmax(-1) == targets).all())))
    return results


def greedy(model: Any, context: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = torch.tensor([context])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                         pad_token_id=280, eos_token_id=None)  # fmt: skip
    return tuple(out[0, len(context) :].tolist())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 12, 1000])
@pytest.mark.parametrize("share", [True, False])
def test_every_way_equals_the_naive_one(share: bool, batch_tokens: int, tied: bool) -> None:
    model = tiny_model(scale=0.4, tied=tied)
    pairs = [*PAIRS, ((1, 2, 3), greedy(model, (1, 2, 3), 4)), ((4,), greedy(model, (4,), 2))]
    got = score_pairs(model, pairs, batch_tokens=batch_tokens, share_contexts=share)
    wanted = naive(model, pairs)
    assert [g for g, _ in got] == pytest.approx([w for w, _ in wanted], rel=1e-5, abs=1e-4)
    assert [g for _, g in got] == [w for _, w in wanted]
    assert [w for _, w in wanted][-2:] == [True, True] and not wanted[1][1]


def test_continuations_do_not_see_one_another() -> None:
    """The same continuation beside others and alone: the very same number would differ if a branch leaked."""
    model = tiny_model(scale=0.4)
    alone = score_pairs(model, [PAIRS[1]], batch_tokens=1000, share_contexts=True)
    crowd = [PAIRS[1], *(((1, 2, 3), (5, 6, n, n)) for n in range(20, 40))]
    assert score_pairs(model, crowd, batch_tokens=1000, share_contexts=True)[0][0] == pytest.approx(
        alone[0][0], abs=1e-5
    )


def test_sharing_feeds_each_context_once() -> None:
    fed: dict[bool, list[int]] = {True: [], False: []}
    for share, tokens in fed.items():
        score_pairs(tiny_model(), PAIRS, batch_tokens=1000, share_contexts=share, advance=tokens.append)
    # contexts 3 + 7 + 1, continuations without their last token 0 + 2 + 2, 1 + 0, 5 (the repeated pair once)
    assert sum(fed[True]) == 11 + 4 + 1 + 5
    assert sum(fed[False]) == 3 * 3 + 7 * 2 + 1 + 4 + 1 + 5


def test_rows_stay_within_the_budget_and_hold_every_distinct_pair() -> None:
    for share in (True, False):
        for budget in (1, 5, 8, 100):
            rows = make_rows(PAIRS, share, budget)
            assert all(row.length <= budget or len(row.continuations) == 1 for row in rows)
            assert share or all(len(row.continuations) == 1 for row in rows)
            held = [(row.context, continuation) for row in rows for continuation in row.continuations]
            assert sorted(held) == sorted(set(PAIRS))
    for empty in (((), (1,)), ((1,), ())):
        with pytest.raises(ValueError, match="empty"):
            make_rows([empty], True, 10)


def test_who_can_share_contexts() -> None:
    assert can_share_contexts(tiny_model())
    size: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    assert not can_share_contexts(MistralForCausalLM(MistralConfig(**size, sliding_window=4)))
    assert isinstance(tiny_model().config, LlamaConfig)


def test_a_windowed_model_is_scored_row_by_row() -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
                            "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}  # fmt: skip
    model = MistralForCausalLM(MistralConfig(**size, sliding_window=3)).eval()
    got = score_pairs(model, PAIRS, batch_tokens=30, share_contexts=can_share_contexts(model))
    assert [g for g, _ in got] == pytest.approx([w for w, _ in naive(model, PAIRS)], abs=1e-4)


# As lm-eval sees it


def request(kind: str, *arguments: Any) -> Any:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def test_loglikelihood_scores_texts() -> None:
    model, tokenizer = tiny_model(scale=0.4), tiny_tokenizer()
    heard: list[tuple[int, int]] = []
    lm = LoadedModel(model, tokenizer, progress=lambda done, total: heard.append((done, total)), batch_tokens=20)
    texts = [("the cat is", " red"), ("the cat is", " a small one"), ("", "say cat")]
    got = lm.loglikelihood([request("loglikelihood", *pair) for pair in texts])
    pairs = [(tuple(tokenizer.encode(c)) or (tokenizer.eos_token_id,), tuple(tokenizer.encode(t))) for c, t in texts]
    assert [g for g, _ in got] == pytest.approx([w for w, _ in naive(model, pairs)], rel=1e-4)  # type: ignore[arg-type]
    assert heard[-1][0] == heard[-1][1] == lm.tokens


def test_rolling_scores_every_token_once() -> None:
    """A text of three windows: every token is predicted from what its window holds before it."""
    model, tokenizer = tiny_model(scale=0.4), tiny_tokenizer()
    lm = LoadedModel(model, tokenizer)
    lm._window = 8
    text = "abcdefghijklmnopqrst"  # 20 bytes
    ids = tokenizer.encode(text)
    (got,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    # Windows of 7 predicted tokens: the first after <|end|>, the second after its predecessor, the last filled up from
    # the left, so that tokens 14-19 see tokens 12 and on.
    pairs = [((279,), tuple(ids[:7])), ((ids[6],), tuple(ids[7:14])), (tuple(ids[12:14]), tuple(ids[14:]))]
    assert got == pytest.approx(sum(w for w, _ in naive(model, pairs)), rel=1e-4)


def test_generation_stops_at_its_stop_strings_alone_and_in_a_batch() -> None:
    model, tokenizer = tiny_model(scale=0.4), tiny_tokenizer()
    lm = LoadedModel(model, tokenizer)
    contexts = ["say small cat", "x", "something longer than the others"]
    options: dict[str, Any] = {"until": [], "max_gen_toks": 12}
    whole = lm.generate_until([request("generate_until", c, options) for c in contexts])
    for context, text in zip(contexts, whole, strict=True):
        ids = greedy(model, tuple(tokenizer.encode(context)), 12)
        assert text == tokenizer.decode(ids, skip_special_tokens=True) and text
        stop = text[len(text) // 2]
        cut = lm.generate_until([request("generate_until", context, {"until": [stop], "max_gen_toks": 12})])
        assert cut == [text[: text.index(stop)]]


def test_what_exceeds_the_window_is_an_error() -> None:
    lm = LoadedModel(tiny_model(), tiny_tokenizer())
    lm._window = 10
    with pytest.raises(InputError, match=r"the model takes 10.*begins 'a long"):
        lm.loglikelihood([request("loglikelihood", "a long long context", " yes")])
    with pytest.raises(InputError, match="leave its task out"):
        lm.generate_until([request("generate_until", "short", {"until": [END], "max_gen_toks": 9})])
