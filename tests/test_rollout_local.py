"""The batched decode against transformers' own, against a training forward, and against the distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import GPT2Config, GPT2LMHeadModel

from fakes import example, loaded, renderer, tiny_model
from perdure.packing import pack
from perdure.rollout.base import RolloutEngine, SamplingParams
from perdure.rollout.generate import GenerateEngine
from perdure.rollout.local import LocalEngine
from perdure.session import make_engine
from perdure.types import Completion, Prompt

QUESTIONS = ("say small cat", "x", "a question that is a good deal longer than the others", "say old dog", "hm?")


def prompts(*questions: str) -> list[Prompt]:
    return [renderer().student_prompt(example(q, None)) for q in questions or QUESTIONS]


def engine(model: Any = None, end_ids: tuple[int, ...] | None = None, batch_tokens: int = 8192) -> RolloutEngine:
    """Random weights hardly ever say <|end|>: ``end_ids`` makes other tokens end a row as well."""
    lm = loaded(model or tiny_model(scale=0.4))
    if end_ids:
        lm = type(lm)(lm.model, lm.tokenizer, end_ids, lm.window)
    return make_engine(lm, lm.model, batch_tokens)


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [c.token_ids for c in completions]


GREEDY = SamplingParams(16, temperature=0)
EARLY_ENDS = tuple(range(0, 285, 9))


def absolute_positions() -> Any:
    """A GPT-2: unlike rotary ones, its positions show when left padding has moved them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=285, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4)
        return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    "model",
    [tiny_model(scale=0.4), tiny_model(scale=0.4, tied=False), absolute_positions()],
    ids=["tied", "untied", "gpt2"],
)
def test_greedy_equals_transformers_token_by_token(model: Any) -> None:
    """Each row alone through ``generate``, with several tokens that end a turn; here all rows in one batch."""
    got = engine(model, EARLY_ENDS).generate(prompts(), GREEDY, [0] * 5)
    for prompt, completion in zip(prompts(), got, strict=True):
        ids = torch.tensor([prompt.token_ids])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
                                eos_token_id=list(EARLY_ENDS), pad_token_id=280)[0, ids.shape[1]:]  # fmt: skip
        assert completion.token_ids == tuple(wanted.tolist())
        assert completion.finished is (wanted[-1].item() in EARLY_ENDS)
    lengths = {len(c.token_ids) for c in got}
    assert len(lengths) > 1 and any(c.finished for c in got)  # rows ended at different places, so some were dropped


def test_the_closing_token_is_kept_and_counts() -> None:
    model = tiny_model(scale=0.4)
    (whole,) = engine(model).generate(prompts("x"), GREEDY, [0])
    end = next(token for token in whole.token_ids if token != whole.token_ids[0])
    (cut,) = engine(model, (end,)).generate(prompts("x"), GREEDY, [0])
    first = whole.token_ids.index(end)
    assert cut.token_ids == whole.token_ids[: first + 1] and cut.finished and not whole.finished
    (exact,) = engine(model, (end,)).generate(prompts("x"), SamplingParams(first + 1, 0), [0])
    assert exact == cut
    (short,) = engine(model, (end,)).generate(prompts("x"), SamplingParams(first, 0), [0])
    assert short.token_ids == cut.token_ids[:-1] and not short.finished


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_a_row_does_not_depend_on_its_neighbours(temperature: float) -> None:
    params, seeds = SamplingParams(16, temperature), [11, 12, 13, 14, 15]
    eng = engine(end_ids=EARLY_ENDS)
    together = eng.generate(prompts(), params, seeds)
    alone = [eng.generate([p], params, [s])[0] for p, s in zip(prompts(), seeds, strict=True)]
    assert tokens(together) == tokens(alone)
    backwards = eng.generate(prompts()[::-1], params, seeds[::-1])
    assert tokens(backwards[::-1]) == tokens(together)
    for small in (64, 1):
        parts = engine(end_ids=EARLY_ENDS, batch_tokens=small).generate(prompts(), params, seeds)
        assert tokens(parts) == tokens(together)
    if temperature:
        other = eng.generate(prompts(), params, [11, 99, 13, 14, 15])
        assert [a == b for a, b in zip(tokens(other), tokens(together), strict=True)] == [True, False, True, True, True]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_sampler_logprobs_are_those_of_a_training_forward(temperature: float) -> None:
    """The whole row, unpadded and without a cache; greedy reports the distribution at temperature 1."""
    model = tiny_model(scale=0.4)
    completions = engine(model, EARLY_ENDS).generate(prompts(), SamplingParams(16, temperature), [1, 2, 3, 4, 5])
    for prompt, completion in zip(prompts(), completions, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1]
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
        wanted = logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(completion.sampler_logprobs), wanted, rtol=1e-4, atol=1e-4)


def passes(model: Any) -> tuple[list[int], Any]:
    """Tokens in each forward pass from now on, and the hook to remove."""
    sizes: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return sizes, hook


def test_finished_rows_cost_nothing_more() -> None:
    """Tokens in each forward pass: the packed prompts once, then one for each row that is still unfinished."""
    model = tiny_model(scale=0.4)
    eng = engine(model, EARLY_ENDS)
    sizes, hook = passes(model)
    got = eng.generate(prompts(), GREEDY, [0] * 5)
    hook.remove()
    lengths = [len(c.token_ids) for c in got]
    assert sizes[0] == len(pack([p.token_ids for p in prompts()]).input_ids_T)
    assert sizes[1:] == [sum(length > t for length in lengths) for t in range(1, max(lengths))]


def test_freed_slots_are_refilled_before_the_rest_is_done() -> None:
    """Two slots for five rows: fewer passes than one batch after another would take, and the same tokens."""
    model = tiny_model(scale=0.4)
    wanted = engine(model, EARLY_ENDS).generate(prompts(), GREEDY, [0] * 5)
    capacity = max(len(p.token_ids) for p in prompts()) + GREEDY.max_new_tokens
    sizes, hook = passes(model)
    got = engine(model, EARLY_ENDS, batch_tokens=2 * capacity).generate(prompts(), GREEDY, [0] * 5)
    hook.remove()
    assert tokens(got) == tokens(wanted)
    lengths = sorted(len(c.token_ids) for c in got)
    assert len(sizes) < sum(lengths) - 2  # one row after another
    assert max(sizes[1:]) <= capacity


def references(model: Any, kind: str) -> list[tuple[int, ...]]:
    """Drafts for the prompts: what greedy decoding says, a damaged copy of it, or something else."""
    said = tokens(engine(model, EARLY_ENDS).generate(prompts(), GREEDY, [0] * 5))
    if kind == "right":
        return said
    if kind == "damaged":  # one token replaced, one missing, one too many
        return [(*r[:2], 250, *r[3:6], *r[7:9], 251, *r[9:]) for r in said]
    return [(1, 2, 3, 4, 5, 6, 7, 8), (), (9,), tuple(range(40)), (277,)]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("kind", ["right", "damaged", "wrong"])
def test_a_draft_never_changes_what_is_said(kind: str, temperature: float) -> None:
    """The same tokens from the same seeds, greedy or sampled, whatever the draft; log-probabilities too."""
    model = tiny_model(scale=0.4)
    eng, params = engine(model, EARLY_ENDS), SamplingParams(16, temperature)
    plain = eng.generate(prompts(), params, [1, 2, 3, 4, 5])
    drafted = eng.generate(prompts(), params, [1, 2, 3, 4, 5], references=references(model, kind))
    assert tokens(drafted) == tokens(plain) and [c.finished for c in drafted] == [c.finished for c in plain]
    for a, b in zip(drafted, plain, strict=True):
        torch.testing.assert_close(torch.tensor(a.sampler_logprobs), torch.tensor(b.sampler_logprobs))


def test_a_right_draft_takes_few_passes() -> None:
    """24 tokens that the model says anyway: 8 beside the prompt, then the rest."""
    model, params = tiny_model(scale=0.4), SamplingParams(24, 0)
    said = tokens(engine(model).generate(prompts(), params, [0] * 5))
    sizes, hook = passes(model)
    assert tokens(engine(model).generate(prompts(), params, [0] * 5, references=said)) == said
    hook.remove()
    assert len(sizes) == 2


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="5 prompts but 5 seeds and 1 references"):
        engine().generate(prompts(), GREEDY, [0] * 5, references=[()])


def test_what_cannot_run_packed_goes_through_generate(caplog: pytest.LogCaptureFixture) -> None:
    lm = loaded(absolute_positions())
    assert isinstance(make_engine(lm, lm.model), GenerateEngine)
    assert "GPT2LMHeadModel cannot run packed" in caplog.text
    assert isinstance(make_engine(loaded(), loaded().model), LocalEngine) and caplog.text.count("packed") == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_engines_draw_the_same(temperature: float) -> None:
    lm = loaded(tiny_model(scale=0.4))
    lm = type(lm)(lm.model, lm.tokenizer, EARLY_ENDS, lm.window)
    params, seeds = SamplingParams(16, temperature, top_k=50, top_p=0.9), [1, 2, 3, 4, 5]
    own, theirs = (kind(lm, lm.model).generate(prompts(), params, seeds) for kind in (LocalEngine, GenerateEngine))
    assert tokens(own) == tokens(theirs) and [c.finished for c in own] == [c.finished for c in theirs]
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(
            torch.tensor(a.sampler_logprobs), torch.tensor(b.sampler_logprobs), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("reference", [(), (3, 2), (5, 5, 5)], ids=["plain", "drafted", "wrongly-drafted"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_distribution(temperature: float, reference: tuple[int, ...]) -> None:
    """2,000 seeds on a vocabulary of 8: counts of the first two tokens against the enumerated probabilities."""
    model = tiny_model(scale=0.3, vocab=8)
    eng = engine(model, end_ids=(7,))
    prompt = Prompt(example("x", None), (1, 2, 3))
    n = 2000
    got = eng.generate([prompt] * n, SamplingParams(2, temperature), list(range(n)), references=[reference] * n)
    counts = Counter(c.token_ids for c in got)

    def distribution(*ids: int) -> list[float]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        return (logits / temperature).softmax(-1).tolist()

    expected: dict[tuple[int, ...], float] = {}
    for first, p in enumerate(distribution(*prompt.token_ids)):
        if first == 7:
            expected[(7,)] = p
            continue
        for second, q in enumerate(distribution(*prompt.token_ids, first)):
            expected[(first, second)] = p * q
    assert counts.keys() <= expected.keys()
    common = [key for key, p in expected.items() if p * n >= 5]
    observed = [counts[key] for key in common] + [n - sum(counts[key] for key in common)]
    wanted = [expected[key] * n for key in common]
    assert len(common) > 10
    assert chisquare(observed, [*wanted, n - sum(wanted)]).pvalue > 0.01


def test_order_and_progress() -> None:
    heard: list[tuple[int, int]] = []
    got = engine(batch_tokens=64).generate(prompts(), GREEDY, [0] * 5, lambda new, done: heard.append((new, done)))
    assert [done for _, done in heard] == sorted({done for _, done in heard}) and heard[-1][1] == 5
    assert len(heard) > 1 and sum(new for new, _ in heard) == sum(len(c.token_ids) for c in got)
    assert engine().generate([], GREEDY, []) == []


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="5 prompts but 1 seeds"):
        engine().generate(prompts(), GREEDY, [0])
    for bad in (
        {"max_new_tokens": 0},
        {"max_new_tokens": 1, "temperature": -1.0},
        {"max_new_tokens": 1, "top_k": -1},
        {"max_new_tokens": 1, "top_p": 0.0},
    ):
        with pytest.raises(ValueError, match="must be"):
            SamplingParams(**bad)  # type: ignore[arg-type]


def test_decoding_follows_the_weights_it_was_given() -> None:
    """The engine holds no copy: when its owner syncs the working copy, the next answer is the new model's."""
    first, second = tiny_model(scale=0.4), tiny_model(seed=1, scale=0.4)
    eng = engine(first)
    before = tokens(eng.generate(prompts(), GREEDY, [0] * 5))
    first.load_state_dict(second.state_dict())
    after = tokens(eng.generate(prompts(), GREEDY, [0] * 5))
    assert after == tokens(engine(second).generate(prompts(), GREEDY, [0] * 5)) != before
