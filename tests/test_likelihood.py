"""Log-likelihoods: shared contexts, one row a continuation and whole logits give the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import MistralConfig, MistralForCausalLM

from fakes import END, tiny_model, tiny_tokenizer
from perdure.attention import enable
from perdure.likelihood import Pair, batches, length, score_pairs
from perdure.lm import ProbedModel
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


LONG = tuple(range(20, 60))
"""Contexts that begin alike, long enough to be shared."""


def scoring_model(packed: bool, **options: Any) -> Any:
    model = tiny_model(scale=0.4, **options)
    assert not packed or enable(model)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 12, 1000])
@pytest.mark.parametrize("packed", [True, False])
def test_every_way_equals_the_naive_one(packed: bool, batch_tokens: int, tied: bool) -> None:
    model = scoring_model(packed, tied=tied)
    own = [((1, 2, 3), greedy(model, (1, 2, 3), 4)), ((4,), greedy(model, (4,), 2))]
    pairs = [*PAIRS, (LONG, (1, 2)), ((*LONG, 7), (1,)), (LONG, (7, 1, 9)), *own]
    got = score_pairs(model, pairs, batch_tokens=batch_tokens)
    wanted = naive(model, pairs)
    assert [g for g, _ in got] == pytest.approx([w for w, _ in wanted], rel=1e-5, abs=1e-4)
    assert [g for _, g in got] == [w for _, w in wanted]
    assert [w for _, w in wanted][-2:] == [True, True] and not wanted[1][1]


@pytest.mark.parametrize("packed", [True, False])
def test_continuations_do_not_see_one_another(packed: bool) -> None:
    """The same continuation beside others and alone: the very same number would differ if a branch leaked."""
    model = scoring_model(packed)
    alone = score_pairs(model, [(LONG, (5, 6, 7))], batch_tokens=1000)
    crowd = [(LONG, (5, 6, 7)), *((LONG, (5, 6, n, n)) for n in range(20, 40))]
    assert score_pairs(model, crowd, batch_tokens=1000)[0][0] == pytest.approx(alone[0][0], abs=1e-5)


def test_a_shared_context_runs_once() -> None:
    model = scoring_model(packed=True)
    fed: list[int] = []
    model.base_model.embed_tokens.register_forward_hook(lambda _module, args, _out: fed.append(args[0].numel()))
    asked: list[int] = []
    score_pairs(model, [(LONG, (n, n, n)) for n in range(5)] * 2, batch_tokens=1000, advance=asked.append)
    assert fed == [len(LONG) + 5 * 2] and asked == [5 * (len(LONG) + 2)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [1, 5, 8, 100])
def test_batches_stay_within_the_budget_and_hold_every_distinct_pair(budget: int, packed: bool) -> None:
    found = batches(PAIRS, budget, packed)
    for batch in found:
        tokens = sum(map(length, batch)) if packed else len(batch) * max(map(length, batch))
        assert tokens <= budget or len(batch) == 1
    assert sorted(pair for batch in found for pair in batch) == sorted(set(PAIRS))


@pytest.mark.parametrize("empty", [((), (1,)), ((1,), ())])
def test_nothing_to_score_is_an_error(empty: Pair) -> None:
    with pytest.raises(ValueError, match="empty"):
        score_pairs(tiny_model(), [empty], batch_tokens=10)


@pytest.mark.parametrize("packed", [True, False])
def test_a_windowed_model_is_scored_right(packed: bool) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": 70, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
                            "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}  # fmt: skip
    model = MistralForCausalLM(MistralConfig(**size, sliding_window=3)).eval()
    pairs = [*PAIRS, (LONG, (1, 2)), (LONG, (7, 1, 9))]
    wanted = [w for w, _ in naive(model, pairs)]
    assert not packed or enable(model)
    assert [g for g, _ in score_pairs(model, pairs, batch_tokens=130)] == pytest.approx(wanted, abs=1e-4)


# As lm-eval sees it


def request(kind: str, *arguments: Any) -> Any:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def test_loglikelihood_scores_texts() -> None:
    model, tokenizer = tiny_model(scale=0.4), tiny_tokenizer()
    heard: list[tuple[int, int]] = []
    lm = ProbedModel(model, tokenizer, progress=lambda done, total: heard.append((done, total)), batch_tokens=20)
    texts = [("the cat is", " red"), ("the cat is", " a small one"), ("", "say cat")]
    got = lm.loglikelihood([request("loglikelihood", *pair) for pair in texts])
    pairs = [(tuple(tokenizer.encode(c)) or (tokenizer.eos_token_id,), tuple(tokenizer.encode(t))) for c, t in texts]
    assert [g for g, _ in got] == pytest.approx([w for w, _ in naive(model, pairs)], rel=1e-4)  # type: ignore[arg-type]
    assert heard[-1][0] == heard[-1][1] == lm.tokens


def test_rolling_scores_every_token_once() -> None:
    """A text of three windows: every token is predicted from what its window holds before it."""
    model, tokenizer = tiny_model(scale=0.4), tiny_tokenizer()
    lm = ProbedModel(model, tokenizer)
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
    lm = ProbedModel(model, tokenizer)
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
    lm = ProbedModel(tiny_model(), tiny_tokenizer())
    lm._window = 10
    with pytest.raises(InputError, match=r"the model takes 10.*begins 'a long"):
        lm.loglikelihood([request("loglikelihood", "a long long context", " yes")])
    with pytest.raises(InputError, match="leave its task out"):
        lm.generate_until([request("generate_until", "short", {"until": [END], "max_gen_toks": 9})])
