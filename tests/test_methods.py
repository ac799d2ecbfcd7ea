"""Every method of the one loop: which rows, whose completions, which loss, and what it learns and keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from fakes import (
    COLOURS,
    NUMBERS,
    ScriptedEngine,
    document_of,
    example,
    loaded,
    renderer,
    save_tiny_model,
    tiny_model,
    toy_skill,
)
from perdure.anchors import make_anchors
from perdure.config import RunConfig, TrainConfig
from perdure.curriculum import learn
from perdure.files import read_jsonl
from perdure.losses import forward_kl, nll
from perdure.methods import AUTO, METHODS
from perdure.models import working_copy
from perdure.report.html import write_report
from perdure.reporting import Silent
from perdure.rollout.local import LocalEngine
from perdure.rows import batch_rows, complete, phase_of, recurs, sample, step_rollouts
from perdure.runlog import LoopState
from perdure.session import Session
from perdure.settings import parse
from perdure.skills.base import load_skill
from perdure.stages import create_workspace
from perdure.staging import make_stage as staged
from perdure.types import Completion, Example, InputError, Prompt, Rollout
from perdure.written import with_written
from test_train import make_stage, run_optimise, settings, steps, train

LABELLED = sorted(name for name, method in METHODS.items() if method.loss != "divergence")


def documented(stage: Any) -> Any:
    """The stage with a document in every row."""
    rows = (e for e in stage.examples if e.demonstration is not None)
    return replace(stage, examples=tuple(
        replace(e, document=document_of(e.messages[-1]["content"], e.demonstration["content"])) for e in rows
    ))  # fmt: skip


class SaysTokens:
    """An engine that gives every prompt the same tokens."""

    def __init__(self, ids: Sequence[int]):
        self.completion = Completion(tuple(ids), (0.0,) * len(ids), True)

    def generate(self, prompts: Sequence[Prompt], *_: Any, **__: Any) -> list[Completion]:
        return [self.completion for _ in prompts]


def test_every_method_is_a_setting() -> None:
    assert set(get_args(TrainConfig.model_fields["method"].annotation)) == {AUTO, *METHODS}
    assert len({method.label for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_with_the_same_loop(tmp_path: Path, name: str) -> None:
    config = settings(method=name, steps=60, validate_every=60)
    if name == "sdft":
        config = settings(method=name, steps=60, validate_every=60, warm_start_steps=50)
    if name == "reinvoke":
        config = settings(method=name, steps=60, validate_every=60, reinvoke_steps=5)
    stage = documented(make_stage(tmp_path))
    if METHODS[name].writes_once:
        stage = with_written(stage, config)
    train(stage, config)
    found = steps(stage)
    learned = [line for line in found if "demonstration_probability" in line]
    assert learned[-1]["demonstration_probability"] > 0.5 > learned[0]["demonstration_probability"]
    assert {line["phase"] for line in found} == {
        "sdft": {"warm_start", "on_policy"}, "reinvoke": {"reinvoke", "re_invoke"}
    }.get(name, {name})  # fmt: skip


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("sdft", "sft", "sft_replay")])
def test_every_method_goes_the_whole_way(tmp_path: Path, name: str) -> None:
    """Two skills through preflight, training, evaluation and gate; the other methods do so in the bench's tests."""
    model = {"source": str(save_tiny_model(tmp_path / "model", copies=True)), "compute_dtype": "float32"}
    options = {"method": name, "steps": 8, "batch_size": 8, "learning_rate": 3e-3, "anchor_general_tokens": 2}
    options |= {"reinvoke_steps": 3} if name == "reinvoke" else {}
    run = {"model": model, "context": {"template": "turns:2"}, "preflight": {"rows": 4}, "probe": {"tasks": []},
           "train": options, "gate": {"enforce": False}}  # fmt: skip
    config = parse(RunConfig, run, "test")
    workspace = create_workspace(tmp_path / "bot", config)
    documents = name == "cpt"
    skills = [toy_skill(tmp_path / "colours", documents=documents),
              toy_skill(tmp_path / "numbers", NUMBERS, documents=documents)]  # fmt: skip
    outcomes = learn(workspace, skills, config, Silent(), force=True)
    assert [outcome.version for outcome in outcomes] == ["v001", "v002"]
    shown = [(workspace.run_folder(outcome.stage) / "preflight.json").is_file() for outcome in outcomes]
    assert shown == [METHODS[name].shows] * 2
    phases = {line["phase"] for line in read_jsonl(workspace.run_folder(outcomes[1].stage) / "metrics.jsonl")
              if "phase" in line}  # fmt: skip
    assert phases == ({"reinvoke", "re_invoke"} if name == "reinvoke" else {name})
    assert METHODS[name].label in write_report(workspace.folder).read_text(encoding="utf-8")


# Losses


@pytest.mark.parametrize("name", LABELLED)
def test_a_supervised_row_has_the_students_prompt_for_both_roles_and_labels(tmp_path: Path, name: str) -> None:
    """Shown to nobody: but what "rewrite_sft" writes was written by a teacher that saw it, before."""
    held = {"kl_weight": 0.3} if name == "sft_kl" else {}
    stage, config = documented(make_stage(tmp_path)), settings(method=name, **held)
    if METHODS[name].writes_once:
        stage = with_written(stage, config)
    rows = [complete(stage, config, row) for row in batch_rows(stage, config, LoopState())]
    taught = [row for row in rows if row.has_demonstration]
    assert taught and all(row.teacher_prompt == row.student_prompt for row in taught)
    assert {(row.weight, row.label_weight) for row in taught} == {(0.3 if name == "sft_kl" else 0.0, 1.0)}
    assert {(row.weight, row.label_weight) for row in rows if not row.has_demonstration} == {(1.0, 0.0)}


def test_the_held_loss_is_the_sum_of_both_without_sharpening(tmp_path: Path) -> None:
    """SFT + KL, by hand: nll + w KL(last version || student), all under the student's prompt, at temperature 1."""
    config = settings(method="sft_kl", kl_weight=0.3, teacher_temperature=0.5, anchor_share=0.0)
    stage = make_stage(tmp_path, tiny_model(), anchors=False)
    # Another student than the teacher, else the divergence is zero.
    moved = tiny_model(seed=3)
    stage = replace(stage, student=replace(stage.student, model=moved))
    rollouts = [complete(stage, config, row) for row in stage.examples[:3]]
    metrics = run_optimise(stage, config, rollouts)
    total, count = 0.0, 0
    for rollout in rollouts:
        ids, prompt = [*rollout.student_prompt.token_ids, *rollout.completion.token_ids], rollout.student_prompt
        with torch.no_grad():
            start = len(prompt.token_ids) - 1
            # run_optimise has stepped the student: its first weights are those of a fresh one.
            student, teacher = (
                model(torch.tensor([ids])).logits[0, start:-1].log_softmax(-1)
                for model in (tiny_model(seed=3), tiny_model())
            )
        targets = torch.tensor(rollout.completion.token_ids)
        total += float((nll(student, targets) + 0.3 * forward_kl(student, teacher)).sum())
        count += len(targets)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-4)


def test_the_demonstration_takes_its_share_of_the_target_as_far_as_the_completion_follows_it(tmp_path: Path) -> None:
    """[(weight of the divergence, label, weight of the label)] of each token: a warm start's, and of four samples."""
    config, stage = settings(demonstration_weight=0.25), make_stage(tmp_path)
    example = stage.examples[0]
    assert isinstance(example, Example)
    ids = stage.renderer.demonstration(example).token_ids

    def terms(*said: int) -> list[tuple[float, int, float]]:
        answered = replace(stage, engine=cast(Any, SaysTokens(said)))
        (row,) = sample(answered, config, [example], LoopState())
        assert row.has_demonstration and row.teacher_prompt != row.student_prompt
        return [row.terms(place) for place in range(len(said))]

    warm = complete(stage, config, example)
    held = [(0.75, token, 0.25) for token in ids]
    assert [warm.terms(place) for place in range(len(ids))] == held == terms(*ids)
    other = ids[0] + 1
    assert terms(other, *ids) == [(0.75, ids[0], 0.25), *((1.0, token, 0.0) for token in ids)]
    assert terms(*ids[:-1], other, 7) == [*held[:-1], (0.75, ids[-1], 0.25), (1.0, 7, 0.0)]
    assert terms(*ids[:-1]) == held[:-1]  # cut off by the length limit
    assert complete(stage, settings(demonstration_weight=0), example).terms(0) == (1.0, ids[0], 0.0)


def test_a_corrected_sample_moves_to_the_mixture_of_teacher_and_demonstration(tmp_path: Path) -> None:
    """(1 - w) KL(teacher || student) + w nll(demonstration) at the first token, where the sample leaves it."""
    stage = make_stage(tmp_path, model=tiny_model(seed=3), anchors=False)
    config, example = settings(demonstration_weight=0.25, teacher_temperature=1.0), stage.examples[0]
    assert isinstance(example, Example)
    wanted = stage.renderer.demonstration(example).token_ids[0]
    said = wanted + 1
    (row,) = sample(replace(stage, engine=cast(Any, SaysTokens((said,)))), config, [example], LoopState())
    student, teacher = (
        tiny_model(seed=3)(torch.tensor([prompt.token_ids])).logits[:, -1].log_softmax(-1)
        for prompt in (row.student_prompt, row.teacher_prompt)
    )
    expected = 0.75 * forward_kl(student, teacher.detach()) + 0.25 * nll(student, torch.tensor([wanted]))
    assert run_optimise(stage, config, [row])["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_on_policy_a_share_of_the_rows_keeps_the_demonstrations(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda prompt: "north")
    stage, config = make_stage(tmp_path, engine=engine), settings(on_policy_share=0.5)
    rows = batch_rows(stage, config, LoopState())
    rollouts = sample(stage, config, rows, LoopState())
    said = [stage.renderer.text(row.completion) for row in rollouts if row.has_demonstration]
    assert said[:3] == ["north"] * 3 and "north" not in said[3:] and len(said) == 6
    assert len(rollouts) == len(rows)


# Re-invocation


def test_re_invocation_ends_with_own_answers_to_general_prompts(tmp_path: Path) -> None:
    config = settings(method="reinvoke", steps=6, reinvoke_steps=2, anchor_share=0.0)
    stage = make_stage(tmp_path)
    assert [phase_of(LoopState(step=n), config) for n in (0, 3, 4, 5)] == ["reinvoke"] * 2 + ["re_invoke"] * 2
    rollouts = step_rollouts(stage, config, "re_invoke", LoopState(step=4))
    general = {row.student_prompt.token_ids for row in stage.anchors.general}
    assert len(rollouts) == config.batch_size and {r.student_prompt.token_ids for r in rollouts} <= general
    assert all(r.teacher_prompt == r.student_prompt and r.weight == 1 and not r.label_weight for r in rollouts)
    first = [row.completion for row in rollouts]
    assert first == [row.completion for row in step_rollouts(stage, config, "re_invoke", LoopState(step=4))]
    assert first != [row.completion for row in step_rollouts(stage, config, "re_invoke", LoopState(step=5))]


def test_re_invocation_keeps_the_best_of_its_last_phase_and_is_never_skipped(tmp_path: Path) -> None:
    config = settings(method="reinvoke", steps=8, reinvoke_steps=3, validate_every=1, patience=1)
    stage = make_stage(tmp_path)
    state = train(stage, config)
    assert state.step == 8 and state.best_step > 5


# Answers written once


def test_the_teacher_writes_offline_answers_once_and_only_those_that_are_drawn(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda prompt: "north")
    stage, config = make_stage(tmp_path, engine=engine), settings(method="offline", steps=1)
    written = with_written(stage, config)
    prompts, params, _ = engine.calls[0]
    drawn = [row for row in batch_rows(stage, config, LoopState()) if isinstance(row, Example)]
    assert {p.example.id for p in prompts} == {row.id for row in drawn} and len(engine.calls) == 1
    assert all(p == stage.renderer.teacher_prompt(p.example, stage.template) for p in prompts)
    assert params.temperature == 1
    rows = [row for row in batch_rows(written, config, LoopState())
            if isinstance(row, Rollout) and row.has_demonstration]  # fmt: skip
    assert len(rows) == len(drawn)
    assert all(stage.renderer.text(row.completion) == "north" and row.weight == 1 for row in rows)
    assert all(row.teacher_prompt != row.student_prompt for row in rows)
    # One that is trained on twice is scored once; of a single pass nothing comes again.
    assert not recurs(written, config, rows[0]) and recurs(written, settings(method="offline", steps=50), rows[0])


def test_a_rewritten_answer_counts_only_where_the_grader_passes_it(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda prompt: "red")  # right for the cat alone
    stage, config = make_stage(tmp_path, engine=engine), settings(method="rewrite_sft", steps=4)
    written = with_written(stage, config)
    rows = {row.student_prompt.example.id: row for row in written.examples if isinstance(row, Rollout)}
    assert rows
    for row in rows.values():
        expected = stage.renderer.demonstration_text(row.student_prompt.example)
        assert stage.renderer.text(row.completion) == expected
        # The cat's answer was sampled, the others are the demonstration's own tokens.
        assert bool(row.completion.sampler_logprobs) is (expected == "red")


# Rows of earlier skills


def a_session(answer: Any) -> Session:
    student = loaded(tiny_model())
    working = working_copy(student.model, torch.float32)
    engine = ScriptedEngine(answer) if answer else LocalEngine(student, working)
    return Session(student, working, engine, renderer(), torch.float32)


def test_replay_rows_are_labels_and_only_right_answers_are_replayed(tmp_path: Path) -> None:
    skill = load_skill(toy_skill(tmp_path / "skill"))
    session = a_session(lambda prompt: "red")
    config = {"anchor_earlier_share": 1.0, "anchor_rows": 8}
    stored = make_anchors(session, [skill], settings(method="sft_replay", **config), 0)
    assert len(stored.earlier) == 8 and not stored.general and not session.engine.calls  # type: ignore[attr-defined]
    said = {row.student_prompt.example.id: renderer().text(row.completion) for row in stored.earlier}
    truth = {row.id: renderer().demonstration_text(row) for row in skill.train}
    assert said == {key: truth[key] for key in said}
    accepted = make_anchors(session, [skill], settings(method="onpolicy_replay", **config), 0)
    right = {key for key, text in said.items() if text == "red"}
    assert right and {row.student_prompt.example.id for row in accepted.earlier} == right
    for row in (*stored.earlier, *accepted.earlier):
        assert (row.weight, row.label_weight, row.has_demonstration) == (0.0, 1.0, False)
    anchors = make_anchors(session, [skill], settings(method="sft", anchor_rehearsal=0.0, **config), 0)
    assert {(row.weight, row.label_weight) for row in anchors.earlier} == {(1.0, 0.0)} and len(anchors.earlier) == 8


def test_a_share_of_the_anchors_is_rehearsed(tmp_path: Path) -> None:
    """Stored demonstrations as labels, spread over the pool, and held only where the model's own answer was right; the
    rest are anchors as without, where that answer was right."""
    skill = load_skill(toy_skill(tmp_path / "skill"))
    config = {"anchor_earlier_share": 1.0, "anchor_rows": 8}
    plain, half, all_of_them, replayed = (
        make_anchors(a_session(lambda prompt: "red"), [skill], settings(**config, **options), 0).earlier
        for options in ({"anchor_rehearsal": 0.0}, {"anchor_rehearsal": 0.5}, {"anchor_rehearsal": 1.0},
                        {"method": "sft_replay"})
    )  # fmt: skip
    right = [renderer().text(row.completion) == "red" for row in replayed]
    rehearsed = tuple(replace(row, weight=float(passes)) for row, passes in zip(replayed, right, strict=True))
    assert set(right) == {True, False} and {row.weight for row in plain} == {1.0}
    wanted = [rehearsed[place] if place % 2 else plain[place] for place in range(8) if place % 2 or right[place]]
    assert half == tuple(wanted) and len(wanted) < 8 and all_of_them == rehearsed
    assert {row.label_weight for row in all_of_them} == {1.0} and {row.source for row in half} == {skill.name}


def test_without_anchors_only_re_invocation_wants_general_prompts(tmp_path: Path) -> None:
    skill, session = load_skill(toy_skill(tmp_path / "skill")), a_session(lambda prompt: "red")
    for name in METHODS:
        found = make_anchors(session, [skill], settings(method=name, anchor_share=0.0), 0)
        assert not found.earlier and bool(found.general) is (name == "reinvoke")


def test_supervised_rows_ask_no_teacher(tmp_path: Path) -> None:
    """Plain replay needs no second forward pass: the stage has no teacher at all where nothing asks one."""
    skill, session = load_skill(toy_skill(tmp_path / "skill")), a_session(None)
    for name, has_teacher in (("sft", False), ("dft", False), ("sft_kl", True), ("reinvoke", True), ("offline", True)):
        run = parse(RunConfig, {"train": {"method": name, "anchor_share": 0.0}}, "test")
        anchors = make_anchors(session, [], short_answers(run.train), 0)
        stage = staged(session, skill, run, replace(anchors, general=()), "turns:1", tmp_path)
        assert (stage.teacher is not None) is has_teacher, name


def short_answers(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"anchor_general_tokens": 2})


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": 0.1}, "sft_kl"),
        ({"anchor_focus": 0.9, "method": "sft_replay"}, "anchor_focus goes by a divergence"),
        ({"anchor_rehearsal": 0.5, "method": "sft_replay"}, "what all of these rows carry"),
        ({"anchor_rehearsal": 0.5, "anchor_share": 0.0}, "anchor_rehearsal has an effect only with rows of earlier"),
        ({"anchor_focus": 0.9, "anchor_share": 0.0}, "anchor_focus has an effect only with rows of earlier"),
        ({"anchor_per_skill": 2, "anchor_earlier_share": 0.0}, "anchor_per_skill has an effect only with rows"),
        ({"reinvoke_steps": 3}, "reinvoke"),
        ({"method": "sft", "demonstration_weight": 0.1}, "sdft"),
        ({"method": "sft", "on_policy_share": 0.5}, "sdft"),
        ({"method": "reinvoke", "steps": 20}, "leaves no step to learn in"),
    ],
)
def test_settings_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(TrainConfig, options, "test")


def test_what_a_method_does_not_have_may_be_off_by_name() -> None:
    """The settings of older workspaces name the weight, which was 0 by default."""
    assert parse(TrainConfig, {"method": "sft", "demonstration_weight": 0.0}, "test").method == "sft"


def test_a_colour_is_what_the_toy_rows_ask_for() -> None:
    """The scripted answers above lean on it."""
    assert COLOURS["cat"] == "red" and example("say", "red").demonstration == {"role": "assistant", "content": "red"}
    assert Completion((1,), (), True).sampler_logprobs == ()


def test_a_document_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    """Gemma and Llama have seen no text without their begin token; an end token would end the document."""
    stage, config = documented(make_stage(tmp_path)), settings(method="cpt", anchor_share=0.0)
    (row, *_) = batch_rows(stage, config, LoopState())
    bare = complete(stage, config, row)
    tokenizer = stage.renderer.tokenizer
    end = tokenizer.eos_token
    tokenizer.bos_token = "<|user|>"
    special = [("<|user|>", tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(f"<|user|> $A {end}", special_tokens=special)
    made = complete(stage, config, row)
    assert made.student_prompt.token_ids == (tokenizer.bos_token_id,)
    assert made.completion.token_ids == (*bare.student_prompt.token_ids, *bare.completion.token_ids)


def test_continued_pre_training_reads_the_document_as_plain_text(tmp_path: Path) -> None:
    stage, config = documented(make_stage(tmp_path)), settings(method="cpt", anchor_share=0.0)
    (row, *_) = batch_rows(stage, config, LoopState())
    made = complete(stage, config, row)
    tokens = [*made.student_prompt.token_ids, *made.completion.token_ids]
    assert isinstance(row, Example) and stage.renderer.tokenizer.decode(tokens) == row.document
    assert made.teacher_prompt == made.student_prompt and (made.weight, made.label_weight) == (0.0, 1.0)


def test_continued_pre_training_without_documents_is_refused_before_it_begins(tmp_path: Path) -> None:
    model = {"source": str(save_tiny_model(tmp_path / "model")), "compute_dtype": "float32"}
    config = parse(RunConfig, {"model": model, "train": {"method": "cpt"}, "probe": {"tasks": []}}, "test")
    with pytest.raises(InputError, match=r'train\.jsonl:1: continued pre-training needs a "document" in every row'):
        learn(create_workspace(tmp_path / "bot", config), [toy_skill(tmp_path / "colours")], config, Silent())
