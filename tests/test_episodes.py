"""Conversations in an environment: played turn by turn, graded at their end, learned from recorded and own turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes import COLOURS, ScriptedEngine, renderer, save_tiny_model, toy_skill
from perdure.config import RunConfig
from perdure.curriculum import learn
from perdure.episodes import NO_CALL, Episode, play, transcript
from perdure.evaluate import evaluate
from perdure.files import read_jsonl
from perdure.reporting import Silent
from perdure.rollout.base import SamplingParams
from perdure.rows import acted, completed
from perdure.runlog import LoopState
from perdure.settings import parse
from perdure.skills.base import Skill, load_skill
from perdure.skills.environments import Acting
from perdure.stages import create_workspace
from perdure.templates import parse_template
from perdure.types import Example, InputError, Prompt
from test_train import make_stage, settings

GREEDY = SamplingParams(64, temperature=0)


class Zoo:
    """Knows the colour of each animal; counts its calls."""

    def __init__(self, example: Example, colours: dict[str, str] | None = None):
        self.colours, self.calls = colours or COLOURS, 0

    def step(self, calls: Sequence[dict[str, Any]]) -> list[str]:
        self.calls += len(calls)
        return [self.colours.get(call["arguments"].get("key"), "no such animal") for call in calls]


class Judging(Zoo):
    """Right is who called exactly once."""

    def score(self) -> float:
        return float(self.calls == 1)


class Broken(Zoo):
    def step(self, calls: Sequence[dict[str, Any]]) -> list[str]:
        raise RuntimeError("the zoo is closed")


class Silent_(Zoo):
    def step(self, calls: Sequence[dict[str, Any]]) -> list[str]:
        return []


def call(key: str) -> str:
    return json.dumps({"name": "look", "arguments": {"key": key}})


def conversation(word: str, key: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"say {word} {key}"}, {"role": "assistant", "content": call(key)},
        {"role": "tool", "content": COLOURS[key]}, {"role": "assistant", "content": COLOURS[key]},
    ]  # fmt: skip


def zoo(folder: Path, environment: str = "Zoo", **more: Any) -> Path:
    """A skill folder whose rows are such conversations."""
    toy_skill(folder, max_new_tokens=64, environment=f"python:test_episodes:{environment}", **more)
    for name, words in (("train", ("small", "old", "new", "happy")), ("test", ("big", "fat"))):
        rows = [{"messages": conversation(word, key)} for word in words for key in COLOURS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def skill(tmp_path: Path) -> Skill:
    return load_skill(zoo(tmp_path / "zoo"))


def looks_and_tells(prompt: Prompt) -> str:
    """Calls with the animal of the request, then says what the tool said."""
    last = prompt.example.messages[-1]
    return last["content"] if last["role"] == "tool" else call(last["content"].split()[-1])


def played(skill: Skill, answers: Any = looks_and_tells, acting: Acting | None = None, **options: Any) -> list[Episode]:
    engine, acting = ScriptedEngine(answers, **options), acting or skill.acting
    assert acting
    return play(engine, renderer(), skill.test[:2], acting, GREEDY, lambda place, turn: 10 * place + turn)


# The folder


def test_a_row_is_a_whole_conversation(skill: Skill) -> None:
    row = skill.train[0]
    assert [m["role"] for m in row.messages] == ["user"] and row.demonstration == {
        "role": "assistant",
        "content": "red",
    }
    assert [m["role"] for m in row.shown] == ["user", "assistant", "tool", "assistant"]
    first, second = renderer().recorded_turns(row)
    assert first.messages == row.messages and first.demonstration == row.shown[1]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "tool"]
    assert (first.id, second.id) == (f"{row.id}/1", f"{row.id}/2")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"environment": "Nowhere"}, "the environment 'python:test_episodes:Nowhere' cannot be used"),
        ({"environment": "GREEDY"}, "it is not callable"),
        ({"turns": "all"}, 'leave turns = "all" out'),
    ],
)
def test_a_folder_that_cannot_be_played_is_refused(tmp_path: Path, changed: dict[str, str], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load_skill(zoo(tmp_path / "zoo", **changed))


def test_settings_of_an_environment_without_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only with an environment"):
        load_skill(toy_skill(tmp_path / "colours", max_turns=3))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([*conversation("small", "cat"), {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}],
         "is one request"),
        ([m | ({"weight": 0} if m["role"] == "assistant" and m["content"] != "red" else {})
          for m in conversation("small", "cat")], "no turns of weight 0"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_played_is_refused(tmp_path: Path, messages: Any, problem: str) -> None:
    folder = zoo(tmp_path / "zoo")
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(InputError, match=rf"train\.jsonl:17: .*{problem}"):
        load_skill(folder)


# Playing


def test_the_model_sees_the_results_of_its_own_calls(skill: Skill) -> None:
    episode, _ = played(skill)
    assert transcript(episode) == f"[assistant] {call('cat')}\n[tool] red\n[assistant] red"
    (first, _), (second, _) = episode.turns
    assert [m["role"] for m in first.messages] == ["user"]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "tool"]


def test_a_wrong_call_gets_another_result_than_the_recorded_one(skill: Skill) -> None:
    episode, _ = played(skill, lambda p: "done" if p.example.messages[-1]["role"] == "tool" else call("wolf"))
    assert episode.messages[-2]["content"] == "no such animal"


def test_a_call_that_cannot_be_read_is_answered_as_one(skill: Skill) -> None:
    both = f'[{{"name": 3}}, {call("dog")}]'
    episode, _ = played(skill, lambda p: "done" if p.example.messages[-1]["role"] == "tool" else both)
    assert [m["content"] for m in episode.messages if m["role"] == "tool"] == [NO_CALL, "blue"]


def test_a_conversation_ends_after_so_many_turns_or_where_an_answer_was_cut_off(skill: Skill) -> None:
    assert skill.acting
    episode, _ = played(skill, lambda prompt: call("cat"), replace(skill.acting, max_turns=3))
    assert len(episode.turns) == 3
    episode, _ = played(skill, lambda prompt: call("cat"), finished=False)
    assert len(episode.turns) == 1 and episode.messages[-1]["role"] == "assistant"


def test_a_conversation_that_outgrows_the_window_ends(skill: Skill) -> None:
    small = renderer(window=150)
    assert skill.acting
    engine = ScriptedEngine(lambda prompt: call("cat"))
    (episode,) = play(engine, small, skill.test[:1], skill.acting, SamplingParams(50), lambda *_: 0)
    assert 1 <= len(episode.turns) < skill.acting.max_turns


@pytest.mark.parametrize(
    ("environment", "problem"), [("Broken", "failed: RuntimeError.*the zoo is closed"), ("Silent_", "one text a call")]
)
def test_an_environment_that_fails_is_named_with_its_row(tmp_path: Path, environment: str, problem: str) -> None:
    with pytest.raises(InputError, match=rf"test\.jsonl:1: the environment 'python:test_episodes:{environment}' .*"):
        played(load_skill(zoo(tmp_path / "zoo", environment)))


def test_the_end_is_graded_or_the_world_has_its_say(tmp_path: Path) -> None:
    def accuracy(skill: Skill, answers: Any) -> float:
        return evaluate(ScriptedEngine(answers), renderer(), "zoo", skill.test, skill.grade, 64,
                        acting=skill.acting).accuracy  # fmt: skip

    graded, judged = load_skill(zoo(tmp_path / "zoo")), load_skill(zoo(tmp_path / "judged", "Judging"))
    guesses = lambda prompt: "red"  # noqa: E731
    assert (accuracy(graded, looks_and_tells), accuracy(graded, guesses)) == (1, 0.25)
    assert (accuracy(judged, looks_and_tells), accuracy(judged, guesses)) == (1, 0)


# Training rows


def test_the_teacher_sees_the_recorded_conversation_and_then_the_students(skill: Skill) -> None:
    made, row = renderer(), skill.train[0]
    own = replace(row, messages=(*row.messages, {"role": "assistant", "content": call("hen")},
                                 {"role": "tool", "content": "grey"}))  # fmt: skip
    asked = "<|user|>say small cat<|end|>"
    recorded = f"{asked}<|assistant|>{call('cat')}<|end|><|tool|>red<|end|><|assistant|>red<|end|>"
    now = f"{asked}<|assistant|>{call('hen')}<|end|><|tool|>grey<|end|><|assistant|>"
    seen = made.tokenizer.decode(made.teacher_prompt(own, parse_template("turns:2")).token_ids)
    assert seen == recorded * 2 + now
    with pytest.raises(InputError, match="by the template turns:N only"):
        made.teacher_prompt(own, parse_template("inline"))


def test_recorded_turns_and_own_ones_are_training_rows(skill: Skill, tmp_path: Path) -> None:
    stage = replace(make_stage(tmp_path, engine=ScriptedEngine(looks_and_tells), anchors=False), examples=skill.train,
                    acting=skill.acting, max_new_tokens=64)  # fmt: skip
    config, state = settings(anchor_share=0.0), LoopState()
    given = completed(stage, config, skill.train[:3])
    own = acted(stage, config, skill.train[:3], state)
    assert len(given) == len(own) == 6
    assert [r.completion.token_ids for r in given] == [r.completion.token_ids for r in own]  # it acts as recorded here
    assert [r.student_prompt.token_ids for r in given] == [r.student_prompt.token_ids for r in own]
    assert [r.teacher_prompt.token_ids for r in given] == [r.teacher_prompt.token_ids for r in own]
    assert state.tokens["rollout"] == sum(len(r.completion.token_ids) for r in own)


def test_a_conversation_ends_where_the_teacher_could_not_score_the_next_turn(skill: Skill, tmp_path: Path) -> None:
    """It sees the recorded conversation before: there a student that keeps calling reaches the window first."""
    stage = make_stage(tmp_path, engine=ScriptedEngine(lambda prompt: call("cat")), anchors=False)
    stage = replace(stage, examples=skill.train, acting=skill.acting, max_new_tokens=50, renderer=renderer(window=330))
    assert skill.acting
    (alone,) = play(stage.engine, stage.renderer, skill.train[:1], skill.acting, SamplingParams(50), lambda *_: 0)
    own = acted(stage, settings(anchor_share=0.0), skill.train[:1], LoopState())
    assert 1 <= len(own) < len(alone.turns)
    assert all(len(row.teacher_prompt.token_ids) + 50 <= 330 for row in own)


def config_of(tmp_path: Path, **train: Any) -> RunConfig:
    model = {"source": str(save_tiny_model(tmp_path / "model", copies=True)), "compute_dtype": "float32"}
    options = {"steps": 4, "batch_size": 6, "warm_start_steps": 2, "warm_start_until": 1.0, "anchor_general_tokens": 2}
    return parse(
        RunConfig,
        {
            "model": model,
            "context": {"template": "turns:1"},
            "train": options | train,
            "preflight": {"rows": 4},
            "probe": {"tasks": []},
            "gate": {"enforce": False},
        },
        "test",
    )


def test_a_skill_in_an_environment_goes_the_whole_way(tmp_path: Path) -> None:
    config = config_of(tmp_path, anchor_rehearsal=0.0)  # what was answered wrongly would not be held otherwise
    workspace = create_workspace(tmp_path / "bot", config)
    skills = [zoo(tmp_path / "zoo", max_turns=2), toy_skill(tmp_path / "colours")]
    outcomes = learn(workspace, skills, config, Silent(), force=True)
    assert [outcome.version for outcome in outcomes] == ["v001", "v002"]
    first, second = (read_jsonl(workspace.run_folder(o.stage) / "metrics.jsonl") for o in outcomes)
    assert [line["phase"] for line in first if "phase" in line] == ["warm_start"] * 2 + ["on_policy"] * 2
    assert "zoo" in second[0]["moved"]  # its turns are anchors of the next stage
    items = read_jsonl(workspace.version_folder("v002") / "evaluation" / "zoo.jsonl")
    assert len(items) == 8 and all(item["completion"].startswith("[assistant]") for item in items)


def test_methods_that_write_answers_beforehand_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, method="offline", warm_start_steps=40, warm_start_until=0.98)
    with pytest.raises(InputError, match='zoo: method = "offline" writes single answers beforehand'):
        learn(create_workspace(tmp_path / "bot", config), [zoo(tmp_path / "zoo")], config, Silent())
