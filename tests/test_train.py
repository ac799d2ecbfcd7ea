"""THE loop on tiny models: what it learns, what it repeats, what it resumes, and who scores what."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import NUMBERS, ScriptedEngine, copying_model, example, loaded, renderer, tiny_model, toy_examples
from perdure.checkpoint import best_of, checkpoints
from perdure.config import TrainConfig
from perdure.evaluate import evaluate
from perdure.losses import forward_kl
from perdure.methods import METHODS
from perdure.models import working_copy
from perdure.monitor import anchor_drift, describe, validate
from perdure.rollout.base import RolloutEngine
from perdure.rollout.local import LocalEngine
from perdure.rows import batch_rows, complete, completed, phase_of, sample, step_rollouts
from perdure.runlog import Clock, LoopState
from perdure.scoring import score
from perdure.skills.graders import exact
from perdure.stage import Anchors, Stage
from perdure.teacher import FixedTeacher, make_teacher
from perdure.templates import parse_template
from perdure.train import train
from perdure.types import Completion, Example, InputError, Rollout
from perdure.update import loss_tokens, make_optimizer, optimise, set_learning_rate
from perdure.written import with_written

TURNS = parse_template("turns:2")
SMALL: dict[str, Any] = {"batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 2, "anchor_share": 0.25}


def settings(**options: Any) -> TrainConfig:
    return TrainConfig(**(SMALL | options))


def anchor(question: str, *ids: int) -> Rollout:
    return renderer().rollout(example(question, None), Completion(ids, (-1.0,) * len(ids), True), None)


def make_anchors(tmp_path: Path) -> Anchors:
    earlier = tuple(replace(anchor(f"say {key}", 260 + place, 279), source="numbers") for place, key in
                    enumerate(NUMBERS))  # fmt: skip
    return Anchors(earlier, tuple(anchor(f"tell me about {n}", 65 + n, 66, 279) for n in range(5)))


def make_stage(folder: Path, model: Any = None, kind: str | None = "frozen", *, anchors: bool = True,
               dtype: torch.dtype = torch.float32, engine: RolloutEngine | None = None, rate: float = 0.25,
               seed: int = 0) -> Stage:  # fmt: skip
    student = loaded(model if model is not None else copying_model())
    working = working_copy(student.model, dtype)
    teacher = kind and make_teacher(kind, student=student.model, working=working, original=tiny_model(seed=9),
                                    dtype=dtype, teacher_update_rate=rate)  # fmt: skip
    rows = toy_examples(folder)
    return Stage(
        student=student, working=working, engine=engine or LocalEngine(student, working), teacher=teacher or None,
        renderer=renderer(), template=TURNS, examples=rows[4:], validation=rows[:4],
        anchors=make_anchors(folder) if anchors else Anchors(), grader=exact.grade, max_new_tokens=4, dtype=dtype,
        seed=seed, folder=folder / "run",
    )  # fmt: skip


def lines(stage: Stage, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage.folder / name).read_text().splitlines()]


def steps(stage: Stage) -> list[dict[str, Any]]:
    return [line for line in lines(stage) if "loss" in line]


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in stage.student.model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def warm_rollouts(stage: Stage, config: TrainConfig) -> list[Rollout]:
    return [complete(stage, config, row) for row in batch_rows(stage, config, LoopState())]


# Rows of a batch


def test_the_batch_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    config, stage = settings(), make_stage(tmp_path)
    forwards = [batch_rows(stage, config, LoopState(step)) for step in range(6)]
    backwards = [batch_rows(make_stage(tmp_path), config, LoopState(step)) for step in reversed(range(6))][::-1]
    assert forwards == backwards
    assert forwards[0] != forwards[1]
    assert batch_rows(replace(stage, seed=1), config, LoopState()) != forwards[0]


def test_every_row_comes_once_an_epoch(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, anchors=False)
    rows = [row.id for step in range(4) for row in batch_rows(stage, settings(batch_size=4), LoopState(step))
            if isinstance(row, Example)]  # fmt: skip
    assert sorted(rows) == sorted(e.id for e in stage.examples)


def test_turns_of_a_conversation_come_in_the_same_step(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, anchors=False)
    talks = tuple(replace(row, conversation=f"talk-{place // 4}") for place, row in enumerate(stage.examples[:8]))
    for step in range(4):
        rows = batch_rows(replace(stage, examples=talks), settings(batch_size=4), LoopState(step))
        assert len({row.conversation for row in rows if isinstance(row, Example)}) == 1


@pytest.mark.parametrize(
    ("earlier", "general", "counts"),
    [(True, True, (6, 1, 1)), (True, False, (7, 1, 0)), (False, True, (7, 0, 1)), (False, False, (8, 0, 0))],
)
def test_anchors_take_their_share_from_what_there_is(tmp_path: Path, earlier: bool, general: bool, counts) -> None:
    stage = make_stage(tmp_path)
    anchors = Anchors(stage.anchors.earlier if earlier else (), stage.anchors.general if general else ())
    rows = batch_rows(replace(stage, anchors=anchors), settings(), LoopState(3))
    found = (sum(isinstance(r, Example) for r in rows), sum(r in stage.anchors.earlier for r in rows),
             sum(r in stage.anchors.general for r in rows))  # fmt: skip
    assert found == counts


# Learning


def test_self_distillation_learns_the_skill(tmp_path: Path) -> None:
    """From the copying model: nothing right alone, all right with the demonstration in context."""
    stage = make_stage(tmp_path, anchors=False)
    test = tuple(replace(e, messages=({"role": "user", "content": e.messages[-1]["content"].replace("small", "big")},))
                 for e in stage.validation)  # fmt: skip

    def accuracy() -> float:
        return evaluate(stage.engine, stage.renderer, "toy", test, stage.grader, 4).accuracy

    assert accuracy() == 0
    train(stage, settings(steps=40, warm_start_steps=25, validate_every=40))
    assert accuracy() == 1
    found = steps(stage)
    assert found[-1]["loss"] < found[0]["loss"] / 20
    assert found[-1]["phase"] == "on_policy" and found[-1]["acceptance"] == 1
    assert found[0]["demonstration_probability"] < 0.1


def test_anchors_hold_the_rest_where_it_was(tmp_path: Path) -> None:
    """KL from the start on general prompts, after the same number of steps with and without anchors in the batch."""
    drifts = []
    for name in ("with", "without"):
        stage = make_stage(tmp_path / name, anchors=name == "with")
        train(replace(stage, validation=()), settings(steps=30, warm_start_steps=30, batch_size=12))
        drift = anchor_drift(replace(stage, anchors=make_anchors(tmp_path)))
        assert drift is not None
        drifts.append(drift)
    assert drifts[0] < drifts[1] / 3 and drifts[1] > 0.1


def test_fine_tuning_learns_the_same_rows_with_the_same_loop(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, tiny_model(), kind=None, anchors=False)
    train(stage, settings(method="sft", steps=60, validate_every=60))
    found = steps(stage)
    assert {line["phase"] for line in found} == {"sft"}
    assert found[-1]["loss"] < found[0]["loss"] / 4 and found[-1]["demonstration_probability"] > 0.5
    assert lines(stage)[-1]["validation_accuracy"] == 1


def test_equal_prompts_are_no_lesson(tmp_path: Path) -> None:
    """Identity: teacher and student are one model, so under one prompt there is nothing between them."""
    config = settings(teacher_temperature=1.0, demonstration_weight=0)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        stage = make_stage(tmp_path, dtype=dtype)
        rollouts = [replace(r, teacher_prompt=r.student_prompt) for r in warm_rollouts(stage, config)]
        metrics = run_optimise(stage, config, rollouts)
        assert abs(metrics["loss"]) < limit
        other = run_optimise(make_stage(tmp_path, dtype=dtype), config, warm_rollouts(stage, config))
        assert other["loss"] > 10 * limit and other["grad_norm"] > 10 * metrics["grad_norm"]


# Phases


def test_phases_follow_method_threshold_and_limit() -> None:
    config = settings(warm_start_steps=3)
    assert phase_of(LoopState(step=0), settings(method="sft")) == "sft"
    assert [phase_of(LoopState(step=n), config) for n in (0, 2, 3)] == ["warm_start", "warm_start", "on_policy"]
    assert phase_of(LoopState(step=1, warm=False), config) == "on_policy"
    assert phase_of(LoopState(step=0), settings(warm_start_steps=0)) == "on_policy"


def test_the_warm_start_ends_when_the_threshold_is_passed(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    train(stage, settings(steps=20, warm_start_steps=19, warm_start_until=0.5))
    found = steps(stage)
    warm = [line for line in found if line["phase"] == "warm_start"]
    assert 1 < len(warm) < 19 and [line["step"] for line in warm] == list(range(1, len(warm) + 1))
    probabilities = [line["demonstration_probability"] for line in warm]
    assert all(p < 0.5 for p in probabilities[:-1]) and probabilities[-1] >= 0.5
    assert all(line["phase"] == "on_policy" for line in found[len(warm) :])
    # Of its own samples the probability is another thing, and has another name.
    assert "demonstration_probability" not in found[-1] and 0 < found[-1]["sample_probability"] <= 1


def test_on_policy_the_student_answers_without_the_demonstration(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda prompt: "north" if prompt.example.messages[-1]["content"].endswith("cat") else "red")
    config, stage = settings(), make_stage(tmp_path, engine=engine)
    rows = batch_rows(stage, config, LoopState())
    state = LoopState()
    rollouts = sample(stage, config, rows, state)
    prompts, params, seeds = engine.calls[0]
    assert prompts == [stage.renderer.student_prompt(row) for row in rows if isinstance(row, Example)]
    assert params.temperature == 1 and params.max_new_tokens == 4
    assert len(set(seeds)) == 6
    assert rollouts[6:] == [row for row in rows if isinstance(row, Rollout)]
    assert all(r.teacher_prompt == stage.renderer.teacher_prompt(r.student_prompt.example, TURNS) for r in rollouts)
    assert state.tokens["rollout"] == 12
    sample(stage, config, rows, LoopState(step=1))
    assert not set(engine.calls[1][2]) & set(seeds)


def test_samples_are_described(tmp_path: Path) -> None:
    said = {"cat": "as in the example above, red", "dog": "blue", "cow": "red", "hen": "grey"}
    engine = ScriptedEngine(lambda prompt: said[prompt.example.messages[-1]["content"].split()[-1]])
    stage = replace(make_stage(tmp_path, engine=engine, anchors=False), max_new_tokens=40)
    rows = [e for e in stage.examples if "old" in e.messages[-1]["content"]]
    found = describe(stage, sample(stage, settings(), rows, LoopState()), "on_policy")
    # The first of four leaks; dog and hen repeat their demonstration.
    assert (found["leak_share"], found["acceptance"], found["truncated_share"]) == (0.25, 0.5, 0)
    engine.finished = False
    assert describe(stage, sample(stage, settings(), rows, LoopState()), "on_policy")["truncated_share"] == 1


# Who is scored by whom


class Recording(FixedTeacher):
    """A fixed teacher that remembers the batches it scored."""

    def __init__(self, model: Any):
        super().__init__(model, is_start=True)
        self.batches: list[Any] = []

    def score(self, batch: Any) -> torch.Tensor:
        self.batches.append(batch)
        return super().score(batch)


def test_fine_tuning_asks_no_teacher_without_anchors_and_only_for_anchors_with_them(tmp_path: Path) -> None:
    teacher = Recording(working_copy(copying_model(), torch.float32))
    for anchors in (False, True):
        stage = replace(make_stage(tmp_path, anchors=anchors), teacher=teacher, folder=tmp_path / f"run-{anchors}")
        train(replace(stage, validation=()), settings(method="sft", steps=3))
        assert bool(teacher.batches) is anchors
    assert not any(batch.demonstrated_N.any() for batch in teacher.batches)


def test_fine_tuning_never_renders_the_teachers_prompt(tmp_path: Path) -> None:
    """A template that does not fit the rows, or their window, is nothing to SFT."""
    stage = replace(make_stage(tmp_path, kind=None, anchors=False), template=parse_template("document"))
    for rollout in warm_rollouts(stage, settings(method="sft")):
        assert rollout.teacher_prompt == rollout.student_prompt and rollout.has_demonstration
    with pytest.raises(InputError, match="document"):
        warm_rollouts(stage, settings())


@pytest.mark.parametrize("skip", [0, 1])
def test_kept_scores_are_the_fresh_ones_to_the_bit(tmp_path: Path, skip: int) -> None:
    """Whatever rows a recurring row came with before, and whether or not its score was kept."""
    config, stage = settings(skip_first_tokens=skip), make_stage(tmp_path)
    kept: dict[Any, torch.Tensor] = {}
    rollouts = [warm_rollouts(stage, config)[:n] for n in (3, 8)]
    for group in rollouts:
        score(stage, config, group, kept, LoopState())
    again = score(stage, config, rollouts[1][::-1], kept, LoopState())
    fresh = score(stage, config, rollouts[1], {}, LoopState())
    assert again is not None and fresh is not None
    assert all(torch.equal(a, b) for a, b in zip(again[::-1], fresh, strict=True))
    assert [len(hidden) for hidden in fresh] == [len(r.completion.token_ids) - skip for r in rollouts[1]]


def test_a_fixed_teacher_scores_a_recurring_row_once_and_keeps_nothing_else(tmp_path: Path) -> None:
    config, state = settings(), LoopState()
    teacher = Recording(working_copy(copying_model(), torch.float32))
    engine = ScriptedEngine(lambda prompt: "red")  # right for the cat, wrong for the others
    stage = replace(make_stage(tmp_path, engine=engine), teacher=teacher)
    kept: dict[Any, torch.Tensor] = {}
    rows = batch_rows(stage, config, LoopState())
    own = sample(stage, config, rows, state)
    answers = {r.student_prompt.token_ids: r.student_prompt.example.demonstration for r in own}
    recurring = [ids for ids, answer in answers.items() if answer is None or answer["content"] == "red"]
    assert 2 < len(recurring) < 8
    score(stage, config, own, kept, state)
    first = len(teacher.batches)
    assert len(kept) == len(recurring) and first == len(recurring) + 1
    before = state.tokens["teacher"]
    score(stage, config, own, kept, state)
    assert len(teacher.batches) == first + 1 and len(kept) == len(recurring)
    assert state.tokens["teacher"] - before == int(teacher.batches[-1].attention_mask_BT.sum())


def test_a_warm_start_shorter_than_an_epoch_keeps_only_the_anchors(tmp_path: Path) -> None:
    """Two steps of 6 demonstrations out of 16: none comes again, so scoring one alone to keep it would only cost."""
    config, stage, kept = settings(warm_start_steps=2), make_stage(tmp_path), {}
    rollouts = warm_rollouts(stage, config)
    score(stage, config, rollouts, kept, LoopState())
    anchors = [r for r in rollouts if not r.has_demonstration]
    assert kept.keys() == {(r.teacher_prompt.token_ids, r.completion.token_ids, r.region) for r in anchors} and anchors


@pytest.mark.parametrize("kind", ["ema", "live"])
def test_a_moving_teachers_scores_are_never_kept(tmp_path: Path, kind: str) -> None:
    config, stage, kept = settings(), make_stage(tmp_path, kind=kind), {}
    score(stage, config, warm_rollouts(stage, config), kept, LoopState())
    assert kept == {}


def test_the_loop_moves_the_teacher_after_each_step(tmp_path: Path) -> None:
    stage = replace(make_stage(tmp_path, kind="ema", rate=1.0), validation=())
    train(stage, settings(steps=2))
    assert stage.teacher is not None and equal(stage.teacher.state(), weights(stage))
    assert equal(dict(stage.working.named_parameters()), weights(stage))


@pytest.mark.parametrize("kind", ["frozen", "ema", "live", "original"])
def test_no_teacher_is_in_the_optimizer(tmp_path: Path, kind: str) -> None:
    stage = make_stage(tmp_path, kind=kind)
    groups = make_optimizer(stage, settings(weight_decay=0.1)).param_groups
    mine = {id(p) for group in groups for p in group["params"]}
    assert mine == {id(p) for p in stage.student.model.parameters()}
    assert not mine & {id(p) for p in stage.teacher.model.parameters()}  # type: ignore[union-attr]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2} and {p.ndim for p in groups[1]["params"]} == {1}


# One step


def run_optimise(stage: Stage, config: TrainConfig, rollouts: list[Rollout], rate: float = 1.0) -> dict[str, Any]:
    """Plain gradient descent, so that the weights show the gradient."""
    hidden = score(stage, config, rollouts, {}, LoopState())
    optimizer = torch.optim.SGD(stage.student.model.parameters(), lr=rate)
    return optimise(stage, config, optimizer, rollouts, hidden, Clock(), LoopState())


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_accumulating_over_micro_batches_is_one_big_batch(tmp_path: Path, method: str) -> None:
    """1 x 8 equals 8 x 1 (64 tokens hold one row): rows differ in length, so means of means would differ."""
    results = []
    for budget in (4096, 64):
        config = settings(method=method, micro_batch_tokens=budget, max_grad_norm=1e6)
        stage = make_stage(tmp_path, tiny_model(), "frozen")
        passes: list[torch.Size] = []
        stage.student.model.model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=passes: seen.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        rollouts = warm_rollouts(stage, config)
        rollouts[0] = anchor("a much longer row, which is nearly as long as the budget", *range(65, 69), 279)
        results.append((run_optimise(stage, config, rollouts), weights(stage), len(passes)))
    (one, whole, few), (many, parts, more) = results
    assert few == 1 and more > 2
    assert one == pytest.approx(many, rel=1e-4)
    for name, tensor in whole.items():
        moved = (tensor - dict(tiny_model().named_parameters())[name]).norm()
        assert (tensor - parts[name]).norm() <= 1e-4 * moved


def test_every_forward_pass_stays_within_the_token_budget(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, kind="live")
    seen: list[int] = []
    for model in (stage.student.model, stage.working):
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
    config = settings(micro_batch_tokens=80)
    rollouts = warm_rollouts(stage, config)
    run_optimise(stage, config, rollouts)
    longest = max(len(r.teacher_prompt.token_ids) + len(r.completion.token_ids) for r in rollouts)
    assert max(seen) <= max(80, longest) and 2 < len(seen) < 2 * len(rollouts)  # several rows in a pass, in several


def test_the_loss_is_the_mean_over_tokens_of_the_divergence(tmp_path: Path) -> None:
    """Against a direct computation with whole models, prompts and logits, anchors and temperature included."""
    config, stage = settings(), make_stage(tmp_path)
    rollouts = warm_rollouts(stage, config)
    values = []
    with torch.no_grad():
        for r in rollouts:
            both = []
            for prompt, temperature in (
                (r.student_prompt, 1.0),
                (r.teacher_prompt, 0.5 if r.has_demonstration else 1.0),
            ):
                ids = torch.tensor([[*prompt.token_ids, *r.completion.token_ids]])
                logits = stage.student.model(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1]
                both.append((logits / temperature).log_softmax(-1))
            values.append(forward_kl(*both))
    metrics = run_optimise(stage, config, rollouts)
    assert metrics["loss"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    assert metrics["loss_tokens"] == sum(map(len, values))


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(tmp_path: Path) -> None:
    config = settings(learning_rate=1.0, warmup_steps=4, steps=104)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)

    def rate(step: int) -> float:
        set_learning_rate(optimizer, config, step)
        return optimizer.param_groups[0]["lr"]

    assert [rate(n) for n in (0, 1, 3, 4)] == pytest.approx([0.25, 0.5, 1.0, 1.0])
    assert rate(54) == pytest.approx(0.55) and rate(103) == pytest.approx(0.1, abs=1e-3)
    assert all(rate(n) > rate(n + 1) for n in range(4, 103))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    config, stage = settings(), make_stage(tmp_path)
    rollouts = warm_rollouts(stage, config)
    before = weights(stage)
    with torch.no_grad():
        stage.teacher.model.model.norm.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(InputError, match="not finite at step 1"):
        run_optimise(stage, config, rollouts)
    assert equal(before, weights(stage))


def test_a_batch_without_loss_tokens_is_an_error(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    with pytest.raises(InputError, match="skip_first_tokens"):
        train(stage, settings(steps=1, skip_first_tokens=50))


# Validation


def scripted_accuracy(values: list[float]) -> Callable[[str, Example], float]:
    """A grader that gives whole validations (4 rows) these scores, one after the other."""
    scores = iter([value for value in values for _ in range(4)])
    return lambda text, row: next(scores)


def test_the_student_ends_with_its_best_weights(tmp_path: Path) -> None:
    """Accuracies 0, 1, 0, 1 (a tie: the later weights count), 0: then patience is out, long before the last step."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    stage = replace(make_stage(tmp_path), grader=scripted_accuracy([0, 1, 0, 1, 0]))
    report = lambda line, timings: seen.setdefault(line["step"], weights(stage))  # noqa: E731
    state = train(stage, settings(steps=50, validate_every=2, patience=3), report)
    assert (state.step, state.best_step, state.best_accuracy, state.stale) == (10, 8, 1.0, 3)
    assert equal(weights(stage), seen[8]) and not equal(weights(stage), seen[10])
    assert equal(dict(stage.working.named_parameters()), seen[8])


def test_of_weights_within_one_standard_error_of_the_best_the_latest_are_kept(tmp_path: Path) -> None:
    """Two right rows of four are within one of three (its Wilson end is 0.5), one is not; only what is better is
    progress."""
    rows = iter([float(row < right) for right in (1, 3, 2, 1, 1) for row in range(4)])
    stage = replace(make_stage(tmp_path), grader=lambda text, row: next(rows))
    state = train(stage, settings(steps=50, validate_every=2, patience=3))
    assert (state.step, state.best_step, state.best_accuracy, state.stale) == (10, 6, 0.75, 3)


def test_a_stage_ends_when_every_validation_row_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or at the share that is asked for; whatever comes later would only move the rest."""
    few = replace(make_stage(tmp_path / "few"), grader=scripted_accuracy([1, 1]))
    assert train(few, settings(steps=4, validate_every=2)).step == 4
    monkeypatch.setattr("perdure.train.TELLING_ROWS", len(few.validation))
    half = iter([0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1])
    for until, grader, end in ((1.0, scripted_accuracy([0, 0, 1, 1]), 6), (0.5, lambda text, row: next(half), 4),
                               (1.5, scripted_accuracy([1, 1, 1, 1]), 8)):  # fmt: skip
        stage = replace(make_stage(tmp_path / str(until)), grader=grader)
        state = train(stage, settings(steps=8, validate_every=2, patience=9, validate_until=until))
        assert (state.step, state.best_step) == (end, end)


def test_what_the_base_knows_does_not_end_a_stage_at_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are looked at before the first step where their length is watched; half of them are right."""
    right = iter([1.0, 1.0, 0.0, 0.0] * 3)
    stage = replace(make_stage(tmp_path), grader=lambda text, row: next(right))
    monkeypatch.setattr("perdure.train.TELLING_ROWS", len(stage.validation))
    state = train(stage, settings(steps=6, validate_every=2, validate_until=0.5, max_length_change=1e9))
    assert (state.step, state.best_step) == (2, 2)


def test_there_is_a_validation_when_the_demonstrations_are_known(tmp_path: Path) -> None:
    """Once, at the step whose mean probability of their tokens passes the limit."""
    stage = make_stage(tmp_path)
    watched = {"validate_every": 50, "warm_start_until": 0.001, "validate_until": 1.0}
    train(stage, settings(steps=6, warm_start_steps=6, **watched))
    assert [line["step"] for line in lines(stage) if "validation_accuracy" in line] == [1, 6]
    assert [line["phase"] for line in steps(stage)] == ["warm_start"] + ["on_policy"] * 5
    other = make_stage(tmp_path / "sft")
    train(other, settings(method="sft", steps=4, **watched))
    assert [line["step"] for line in lines(other) if "validation_accuracy" in line] == [1, 4]
    plain = make_stage(tmp_path / "plain")
    train(plain, settings(method="sft", steps=4, **(watched | {"validate_until": 2.0})))
    assert [line["step"] for line in lines(plain) if "validation_accuracy" in line] == [4]


def test_a_warm_start_that_never_ends_early_knows_the_demonstrations_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.train.LIKELY", 0.001)
    stage = make_stage(tmp_path)
    train(stage, settings(steps=6, warm_start_steps=5, validate_every=50, validate_until=1.0))
    assert [line["step"] for line in lines(stage) if "validation_accuracy" in line] == [1, 6]
    assert [line["phase"] for line in steps(stage)] == ["warm_start"] * 5 + ["on_policy"]


def test_the_last_step_is_validated(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    train(stage, settings(steps=3, validate_every=2))
    assert [line["step"] for line in lines(stage) if "validation_accuracy" in line] == [2, 3]
    assert [line["step"] for line in steps(stage)] == [1, 2, 3]


def test_drift_is_the_kl_from_the_start_on_general_prompts(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    assert anchor_drift(stage) == pytest.approx(0, abs=1e-7)
    with torch.no_grad():
        stage.working.lm_head.weight.mul_(1.3)
        values = []
        for r in stage.anchors.general:
            ids = torch.tensor([[*r.student_prompt.token_ids, *r.completion.token_ids]])
            start, now = (m(input_ids=ids).logits[0, len(r.student_prompt.token_ids) - 1 : -1].log_softmax(-1)
                          for m in (stage.student.model, stage.working))  # fmt: skip
            values.append(forward_kl(now, start))
    assert anchor_drift(stage) == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    stage.folder.mkdir()
    assert validate(stage, settings(), LoopState())["kl_start"] == anchor_drift(stage)
    others = [make_stage(tmp_path, kind=kind) for kind in ("original", "ema", None)]
    assert [anchor_drift(other) for other in (*others, make_stage(tmp_path, anchors=False))] == [None] * 4


def test_how_far_an_earlier_skill_moved_is_the_kl_of_its_rows(tmp_path: Path) -> None:
    config, stage, state = settings(anchor_share=0.75), make_stage(tmp_path), LoopState()
    rollouts = step_rollouts(stage, config, "warm_start", state)
    held = [row for row in rollouts if row.source]
    assert len(held) == round(6 * config.anchor_earlier_share) == state.allotted["numbers"]["drawn"]
    values = []
    with torch.no_grad():
        stage.student.model.lm_head.weight.mul_(1.3)
        for r in held:
            ids = torch.tensor([[*r.student_prompt.token_ids, *r.completion.token_ids]])
            start, now = (m(input_ids=ids).logits[0, len(r.student_prompt.token_ids) - 1 : -1].log_softmax(-1)
                          for m in (stage.working, stage.student.model))  # fmt: skip
            values.append(forward_kl(now, start).mean().item())
    hidden = score(stage, config, rollouts, {}, state)
    optimise(stage, config, make_optimizer(stage, config), rollouts, hidden, Clock(), state)
    assert state.allotted["numbers"]["moved"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_of_each_earlier_skill_every_row_comes_once_an_epoch(tmp_path: Path) -> None:
    stage, state = make_stage(tmp_path), LoopState()
    rows = [replace(row, source=name) for name in ("a", "b", "c") for row in stage.anchors.earlier[:2]]
    stage = replace(stage, anchors=Anchors(tuple(rows)))
    config = settings(anchor_share=0.5, anchor_earlier_share=0.75)  # three rows a step
    drawn = [row for step in range(2) for row in batch_rows(stage, config, replace(state, step=step))
             if isinstance(row, Rollout)]  # fmt: skip
    assert sorted(map(rows.index, drawn)) == list(range(6))


# The same run again


RUN: dict[str, Any] = {"steps": 12, "warm_start_steps": 5, "warm_start_until": 1.0, "validate_every": 3, "patience": 9,
                       "checkpoint_every": 4}  # fmt: skip


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        stage = make_stage(tmp_path / name, seed=seed)
        best = best_of(stage.folder, train(stage, settings(**RUN)).best_step)
        runs.append(
            [path.read_bytes() for path in (stage.folder / "metrics.jsonl", stage.folder / "samples.jsonl", best)]
        )
    for a, b, c in zip(*runs, strict=True):
        assert a == b != c


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Stage, LoopState]]:
    """A whole run of this kind and method, made once."""

    @cache
    def run(kind: str, method: str) -> tuple[Stage, LoopState]:
        config = run_settings(method)
        stage = prepared(make_stage(tmp_path_factory.mktemp("whole"), kind=kind), config)
        return stage, train(stage, config)

    return run


def run_settings(method: str) -> TrainConfig:
    return settings(method=method, **RUN | ({"reinvoke_steps": 5} if method == "reinvoke" else {}))


def prepared(stage: Stage, config: TrainConfig) -> Stage:
    """With the answers that the teacher writes once, as a resumed process makes them again."""
    return with_written(stage, config) if METHODS[config.method].writes_once else stage


@pytest.mark.parametrize(
    ("kind", "method", "at"),
    [("frozen", "sdft", 2), ("frozen", "sdft", 5), ("frozen", "sdft", 8), ("frozen", "sdft", 12), ("ema", "sdft", 6),
     ("live", "sdft", 9), ("original", "sdft", 11), ("frozen", "sft", 6), ("frozen", "sft_kl", 6),
     ("frozen", "reinvoke", 6), ("frozen", "reinvoke", 11), ("frozen", "offline", 6), ("frozen", "rewrite_sft", 9)],
)  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, uninterrupted: Any, kind: str, method: str, at: int
) -> None:
    """Killed after step ``at`` (before its validation and checkpoint), then taken up by a new process's objects."""
    config = run_settings(method)
    whole, expected = uninterrupted(kind, method)

    def kill(line: dict[str, Any], timings: dict[str, Any]) -> None:
        if line["step"] == at:
            raise Killed

    with pytest.raises(Killed):
        train(prepared(make_stage(tmp_path / "cut", kind=kind), config), config, kill)
    resumed = prepared(make_stage(tmp_path / "cut", kind=kind), config)
    assert len(checkpoints(resumed.folder)) == min(1, (at - 1) // 4)
    found = train(resumed, config)
    assert equal(weights(resumed), weights(whole))
    assert equal(dict(resumed.working.named_parameters()), dict(whole.working.named_parameters()))
    assert resumed.teacher is not None and whole.teacher is not None
    assert equal(resumed.teacher.state(), whole.teacher.state())
    for name in ("metrics.jsonl", "samples.jsonl", best_of(whole.folder, expected.best_step).name):
        if method == "sdft" or name != "samples.jsonl":
            assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert [t["step"] for t in lines(resumed, "timings.jsonl")] == list(range(1, 13))
    # What a fixed teacher had kept is gone with the process, so only its count of tokens may differ.
    mine, theirs = asdict(found), asdict(expected)
    assert mine["tokens"].pop("teacher") >= theirs["tokens"].pop("teacher")
    assert mine == theirs


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = settings(**RUN)
    train(make_stage(tmp_path), config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = make_stage(tmp_path)
    report = lambda line, timings: pytest.fail("trained again")  # noqa: E731
    assert train(again, config, report).step == 12
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_recomputed_blocks_give_the_same_training_and_come_back_as_they_were(tmp_path: Path) -> None:
    found, seen = [], []
    for name, recompute in (("a", False), ("b", True)):
        stage = make_stage(tmp_path / name)
        backbone = stage.student.model.base_model
        hook = backbone.layers[0].mlp.register_forward_pre_hook(lambda *args, name=name: seen.append(name))
        train(stage, settings(steps=4, activation_checkpointing=recompute))
        hook.remove()
        found.append((weights(stage), lines(stage)))
        assert not any(module.training for module in stage.student.model.modules())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in stage.student.model.modules())
    assert seen.count("b") == 2 * seen.count("a")  # the student's passes are the only ones through this model
    assert equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_the_weight_of_anchors_is_that_of_their_divergence(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    rows = batch_rows(stage, settings(anchor_share=0.5, anchor_weight=4.0), LoopState())
    assert (
        sorted((row.source, row.weight) for row in rows if isinstance(row, Rollout))
        == [("", 1.0)] + [("numbers", 4.0)] * 3
    )
    label = replace(stage.anchors.earlier[0], weight=0.0, label_weight=1.0)
    replayed = replace(stage, anchors=Anchors((label,)))
    rows = batch_rows(replayed, settings(anchor_share=0.5, anchor_weight=4.0), LoopState())
    assert {(row.weight, row.label_weight) for row in rows if isinstance(row, Rollout)} == {(0.0, 1.0)}


def test_rows_without_a_token_that_carries_loss_are_no_fault_where_two_teachers_score(tmp_path: Path) -> None:
    """As where an answer is shorter than the tokens to skip, in a micro-batch of its own."""
    stage = make_stage(tmp_path, tiny_model(), kind="original")
    start = FixedTeacher(working_copy(stage.student.model, torch.float32), is_start=True)
    config = settings(skip_first_tokens=2, micro_batch_tokens=64, warm_start_steps=4, steps=1)
    found = replace(stage, holder=start)
    rows = batch_rows(found, config, LoopState())
    rollouts = completed(found, config, rows)
    assert {loss_tokens(row, config) for row in rollouts if row.has_demonstration} == {0}
    assert any(loss_tokens(row, config) for row in rollouts)
    hidden = score(found, config, rollouts, {}, LoopState())
    metrics = optimise(found, config, make_optimizer(found, config), rollouts, hidden, Clock(), LoopState())
    assert metrics["loss"] == pytest.approx(0, abs=1e-6)  # what is held has not moved yet
