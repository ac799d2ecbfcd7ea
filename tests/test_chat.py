"""Talking to a version: it answers as it does in an evaluation, and remembers what was said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_workspace import FakeWorkspace
from fakes import save_tiny_model
from perdure.chat import Chat, setting_of
from perdure.config import RunConfig
from perdure.rollout.base import SamplingParams
from perdure.session import Session, open_session
from perdure.types import Example, InputError


@pytest.fixture
def session(tmp_path: Path) -> Session:
    source = str(save_tiny_model(tmp_path / "model"))
    config = {"model": {"source": source, "compute_dtype": "float32", "max_window": 100}}
    return open_session(RunConfig.model_validate(config))


def test_each_answer_follows_the_whole_conversation(session: Session) -> None:
    chat = Chat(session, 4, system="be short")
    said = [chat.say("cat"), chat.say("dog")]
    turns = ({"role": "system", "content": "be short"}, {"role": "user", "content": "cat"},
             {"role": "assistant", "content": said[0]}, {"role": "user", "content": "dog"})  # fmt: skip
    assert chat.messages == (*turns, {"role": "assistant", "content": said[1]})
    prompt = session.renderer.student_prompt(Example("e", turns, None))
    (greedy,) = session.engine.generate([prompt], SamplingParams(4, 0), [0])
    assert session.renderer.text(greedy) == said[1]


def test_it_can_be_asked_as_a_skill_asks(session: Session, tmp_path: Path) -> None:
    workspace = FakeWorkspace(tmp_path / "bot").workspace
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    row = {"messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "cat"},
                        {"role": "assistant", "content": "yes"}], "tools": tools}  # fmt: skip
    kept = workspace.skills.folder_of("pets", "c" * 64)
    kept.mkdir(parents=True)
    (kept / "skill.toml").write_text('name = "pets"\n')
    (kept / "train.jsonl").write_text("")
    (kept / "test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="no version here was taught 'pets'; they know no skill"):
        setting_of(workspace, "pets")
    fake = FakeWorkspace.reopened(workspace)
    fake.candidate(fake.start("pets"), {"pets": 9}, decision="held")
    workspace.hold("v001", reason="cannot tell")  # as one wants to look at it before it is promoted
    system, found = setting_of(workspace, "pets")
    assert system == "be short" and list(found) == tools
    told = Chat(session, 4, system=system, tools=found)
    with pytest.raises(InputError, match="124 tokens"):  # of which the schema of f
        told.say("dog")


def test_samples_are_those_of_the_seed(session: Session) -> None:
    said = [[Chat(session, 8, 1.0, seed).say("cat") for _ in range(2)] for seed in (0, 1)]
    assert said[0][0] == said[0][1] and said[0] != said[1]


def test_a_conversation_that_outgrows_the_window_is_an_error_and_changes_nothing(session: Session) -> None:
    chat = Chat(session, 4)
    with pytest.raises(InputError, match="exceed the window of 100 tokens"):
        chat.say("cat " * 60)
    assert chat.messages == ()
