"""The report on the terminal, and its words."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import fake_workspace
from fake_workspace import PRIOR, FakeWorkspace, add_stage, chain_of_three, printed
from perdure.report import words
from perdure.report.check import preflight_tables
from perdure.report.numbers import summary
from perdure.report.text import safe_text, score_table


@pytest.fixture
def chain(tmp_path: Path) -> FakeWorkspace:
    return chain_of_three(tmp_path / "bot")


def test_terminal_at_80_columns(chain):
    text = printed(summary(chain.folder))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"v002 after b +80% +\[90%\] +10% +54.0%", text)
    assert "keep 78% of their accuracy on average (lowest: b, 90% when taught, 60% now)" in " ".join(text.split())


def test_terminal_with_many_skills_splits_the_matrix(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    names = [f"a-rather-long-name-{number}" for number in range(6)]
    add_stage(fake, names[0], dict.fromkeys(names, 9), base=dict.fromkeys(names, 1))
    text = printed(summary(fake.folder))
    assert max(map(len, text.splitlines())) <= 80
    assert "(continued)" in text
    assert text.count("v001 after") == 3


def test_terminal_is_safe_from_foreign_text(tmp_path):
    fake = FakeWorkspace(tmp_path / "bot")
    add_stage(fake, "a", {"a": 9, "[bold]x\x1b]0;title\x07\x1b[2J": 3}, {"[link=evil]piqa\r": 60}, base={"a": 0})
    text = printed(summary(fake.folder))
    assert "[bold]x" in text
    assert "[link=evil]piqa" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "title" not in text
    colored = printed(summary(fake.folder), color=True)
    assert set(re.findall(r"\x1b(?!\[[0-9;]*m)", colored)) == set()  # nothing but colours of our own


def test_preflight_and_score_tables(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    preflight_tables([fake_workspace.preflight("a[red]", 0.9, ready=True)], console)
    score_table({"version": "v001", "scores": {"a": fake_workspace.score(9, 10)},
                 "probe": fake_workspace.probe(PRIOR)}, console)  # fmt: skip
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a[red]" in text
    assert re.search(r"turns:2 \(chosen\) +90% +80–98% +260 +2.80 +0%", text)
    assert "with it 90%, gap +90.0 points on 32 training rows" in text
    assert re.search(r"a +90.0% +60–98% +10", text)
    assert re.search(r"prior, average +55.0%", text)


@pytest.mark.parametrize(
    ("rows", "a_step", "said"),
    [
        (1600, 14, "60 steps show 840 of the 1.6 k rows to learn from; to show all of them: train.steps = 115."),
        (840, 14, "60 steps show each of the 840 rows to learn from about 1.0 times."),
        (100, 14, "60 steps show each of the 100 rows to learn from about 8.4 times."),
    ],
)
def test_check_says_how_many_of_the_rows_a_stage_shows(rows: int, a_step: int, said: str):
    console = Console(file=io.StringIO(), width=200)
    found = fake_workspace.preflight("a", 0.9, ready=True) | {"train": {"rows": rows, "a_step": a_step, "steps": 60}}
    preflight_tables([found], console)
    assert said in console.file.getvalue()  # type: ignore[attr-defined]


# Words


@pytest.mark.parametrize("text, safe", [
    ("plain\ttext\nsecond", "plain\ttext\nsecond"),
    ("\x1b[1;31mred\x1b[0m", "red"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "link"),
    ("\x1b]52;c;cGF3bmVk\x07after", "after"),
    ("\x1bPdevice\x1b\\after", "after"),
    ("\x9b31mred", "red"),
    ("\x9d0;title\x9cafter", "after"),
    ("\x1b(Bcharset\x1bc", "charset"),
    ("end\x1b", "end"),
    ("a\rb\x08c\x00", "a\ufffdb\ufffdc\ufffd"),
    ("line\r\nend", "line\nend"),
    ("\u202eabc\u2066", "\ufffdabc\ufffd"),
    ("\ud83d", "\ufffd"),
    ("grüße 漢字 👍 \u200f", "grüße 漢字 👍 \u200f"),
])  # fmt: skip
def test_safe_text(text, safe):
    assert safe_text(text) == safe


@given(st.text(alphabet=st.sampled_from("\x1b[]()P\\;mABc0189\x07\x9b\x9c\x9d\x90\n x")))
def test_safe_text_leaves_no_control_and_is_stable(text):
    once = safe_text(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", once)
    assert safe_text(once) == once


@pytest.mark.parametrize("value, digits, shown", [
    (None, 0, "–"), (0.936, 0, "94%"), (1.0, 0, "100%"), (0.999, 0, "99%"), (0.001, 0, "1%"), (0.0, 0, "0%"),
    (0.9996, 1, "99.9%"), (0.5249, 1, "52.5%"), (1.02, 0, "102%"),
])  # fmt: skip
def test_percent(value, digits, shown):
    assert words.percent(value, digits) == shown


def test_other_words():
    assert [words.points(value) for value in (0.021, -0.021, 0.0001, None)] == ["+2.1", "−2.1", "0.0", "–"]
    assert [words.seconds(value) for value in (0.4, 38, 2520, 4320, 5399)] == [
        "0.4 s", "38 s", "42 min", "72 min", "1 h 30 min"]  # fmt: skip
    assert [words.count(value) for value in (812, 45_300, 999_600, 1_240_000)] == ["812", "45.3 k", "1 M", "1.24 M"]
