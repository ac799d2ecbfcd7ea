"""The probe through lm-eval against a naive computation, one choice at a time."""

import math
import sys

import pytest
import torch

import perdure.probe
from fakes import tiny_model, tiny_tokenizer
from perdure.probe import _accuracy_of, _first_filter, probe
from perdure.probe_tasks import Item, sample_indices
from perdure.stats import wilson_interval
from perdure.types import InputError

# Written by hand; choices of unequal length, so that "acc" and "acc_norm" differ.
QUESTIONS = [
    Item(f"{n}", query, choices, gold)
    for n, (query, choices, gold) in enumerate(
        [
            ("Q: what barks?\nA:", ("a dog", "a very old cow indeed", "hen"), 0),
            ("Q: what is the colour of grass?\nA:", ("blue", "green", "grey, or maybe not"), 1),
            ("Q: one and one?\nA:", ("three", "two", "a number greater than four"), 1),
            ("Q: where is the sun at noon?\nA:", ("in the south", "north", "nowhere"), 0),
            ("Q: which is small?\nA:", ("a hen", "the big old cow over there"), 0),
            ("Q: which is big?\nA:", ("a hen", "the big old cow over there"), 1),
            ("Q: is red a colour?\nA:", ("no", "yes", "it depends on whom you ask"), 1),
            ("Q: who says moo?\nA:", ("cats do", "nobody ever", "cows"), 2),
        ]
    )
]
SENTENCES = [
    Item("0", "", ("The cow is bigger than the hen, so the cow", "The cow is bigger than the hen, so the hen"), 1,
         ending="is small."),
    Item("1", "", ("She took the red one, as the red one", "She took the red one, as the blue one"), 0,
         ending="was new."),
    Item("2", "", ("East or west? The east", "East or west? The west"), 0, ending="is where the sun rises."),
    Item("3", "", ("It is cold in the north, so the north", "It is cold in the north, so the south"), 1,
         ending="is warm."),
]  # fmt: skip
LOCAL = {"hellaswag": QUESTIONS, "arc_easy": QUESTIONS, "winogrande": SENTENCES}


@pytest.fixture(autouse=True)
def local_items(monkeypatch):
    asked = []

    def give(name, rows, seed):
        asked.append((name, rows, seed))
        return LOCAL[name][:rows]

    monkeypatch.setattr(perdure.probe, "local_items", give)
    return asked


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Sum of log p over the continuation's tokens: one text, one forward pass, the whole vocabulary."""
    before, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
    assert ids[: len(before)] == before
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs_TV[place - 1, ids[place]]) for place in range(len(before), len(ids)))


def naive(model, tokenizer, name: str, item: Item) -> bool:
    if item.ending:
        scores = [log_likelihood(model, tokenizer, context, " " + item.ending) for context in item.choices]
    else:
        scores = [log_likelihood(model, tokenizer, item.query, " " + choice) for choice in item.choices]
    if name == "hellaswag":  # acc_norm: per character
        scores = [score / len(choice) for score, choice in zip(scores, item.choices, strict=True)]
    return scores.index(max(scores)) == item.gold


@pytest.mark.parametrize("seed", [0, 1])
def test_accuracy_is_the_naive_one(seed, local_items):
    model, tokenizer = tiny_model(seed, scale=0.5), tiny_tokenizer()
    calls = []
    found = probe(model, tokenizer, tasks=list(LOCAL), rows=100, seed=7, progress=lambda *n: calls.append(n))
    right = {(name, item.id): naive(model, tokenizer, name, item) for name, items in LOCAL.items() for item in items}
    assert {(item["task"], item["id"]): item["correct"] for item in found.items} == right
    assert 0 < sum(right.values()) < len(right)
    for name, items in LOCAL.items():
        hits = sum(right[name, item.id] for item in items)
        score = found.tasks[name]
        assert (score.accuracy, score.n) == (hits / len(items), len(items))
        assert (score.low, score.high) == wilson_interval(hits, len(items))
        assert score.metric == ("acc_norm" if name == "hellaswag" else "acc")
    assert found.average == pytest.approx(sum(score.accuracy for score in found.tasks.values()) / 3)
    assert local_items == [(name, 100, 7) for name in LOCAL]
    assert calls[-1][0] == calls[-1][1] == found.tokens > 0


def test_both_metrics_decide_somewhere():
    """The questions above tell "acc" from "acc_norm": else the test before would not notice a swap."""
    model, tokenizer = tiny_model(0, scale=0.5), tiny_tokenizer()
    assert [naive(model, tokenizer, "arc_easy", item) for item in QUESTIONS] != [
        naive(model, tokenizer, "hellaswag", item) for item in QUESTIONS
    ]


def test_items_of_a_smaller_probe_are_answered_alike():
    model, tokenizer = tiny_model(1, scale=0.5), tiny_tokenizer()
    few, many = (probe(model, tokenizer, tasks=["arc_easy"], rows=rows, seed=0) for rows in (3, 8))
    assert few.items == many.items[:3] and few.tasks["arc_easy"].n == 3


def test_a_task_named_twice_counts_once():
    found = probe(tiny_model(), tiny_tokenizer(), tasks=["arc_easy", "arc_easy"], rows=2, seed=0)
    assert list(found.tasks) == ["arc_easy"] and len(found.items) == 2


def test_items_longer_than_the_model_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(LOCAL, "arc_easy", [Item("0", "Q" * 1200, ("a", "b"), 0)])
    with pytest.raises(InputError, match="the model takes 1024: leave its task out"):
        probe(tiny_model(), tiny_tokenizer(), tasks=["arc_easy"], rows=2, seed=0)


class FakeManager:
    """In place of lm-eval's TaskManager, which reads thousands of files."""

    all_tasks = ("quiz", "offline")

    def load(self, name: str) -> dict:
        if name == "offline":
            raise OSError("no route to the hub\nand more")
        leaves = {"quiz_a": QUESTIONS[:5], "quiz_b": QUESTIONS[5:]}
        return {"tasks": {leaf: perdure.probe._local_task("arc_easy", items) for leaf, items in leaves.items()}}


@pytest.mark.parametrize("rows", [100, 4])
def test_a_group_of_lm_evals_own_is_sampled_as_one(monkeypatch, rows):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", FakeManager)
    model, tokenizer = tiny_model(0, scale=0.5), tiny_tokenizer()
    found = probe(model, tokenizer, tasks=["quiz", "arc_easy"], rows=rows, seed=0)
    places = {f"quiz_a/{n}": n for n in range(5)} | {f"quiz_b/{n}": n + 5 for n in range(3)}
    chosen = sample_indices(8, rows, 0, "quiz")
    answers = {item["id"]: item["correct"] for item in found.items if item["task"] == "quiz"}
    assert sorted(places[id_] for id_ in answers) == chosen
    assert all(naive(model, tokenizer, "arc_easy", QUESTIONS[places[id_]]) == ok for id_, ok in answers.items())
    assert found.tasks["quiz"].metric == "acc" and found.tasks["quiz"].n == len(chosen)


def test_tasks_that_are_not_there(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", FakeManager)
    with pytest.raises(InputError, match="'moose' is neither a local task"):
        probe(tiny_model(), tiny_tokenizer(), tasks=["arc_easy", "moose"], rows=2, seed=0)
    with pytest.raises(InputError, match=r"'offline' cannot be loaded \(no route to the hub\); it needs the Hugging"):
        probe(tiny_model(), tiny_tokenizer(), tasks=["offline"], rows=2, seed=0)


def test_no_tasks_and_no_lm_eval(monkeypatch):
    with pytest.raises(InputError, match="no tasks"):
        probe(tiny_model(), tiny_tokenizer(), tasks=[], rows=2, seed=0)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs lm-eval, which is not installed"):
        probe(tiny_model(), tiny_tokenizer(), tasks=["arc_easy"], rows=2, seed=0)


def test_other_tasks_count_by_the_first_metric_that_says_right_or_wrong():
    answers = [{"metrics": ["acc", "f1"], "acc": 1.0, "f1": 0.3}, {"metrics": ["acc", "f1"], "acc": 0.0, "f1": 0.5}]
    assert _accuracy_of("t", answers) == "acc"
    assert _accuracy_of("t", [answer | {"acc_norm": 0} for answer in answers]) == "acc_norm"
    assert _accuracy_of("t", [answer | {"acc_norm": 0.5} for answer in answers]) == "acc"
    with pytest.raises(InputError, match=r"'t' does not say right or wrong .*f1"):
        _accuracy_of("t", [{"metrics": ["f1"], "f1": math.pi}])


def test_the_first_filter_of_a_task_counts():
    answers = [{"filter": "strict", "n": 1}, {"filter": "strict", "n": 2}, {"filter": "loose", "n": 1}]
    assert _first_filter(answers) == answers[:2]
