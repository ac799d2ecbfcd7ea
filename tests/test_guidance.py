"""Anchor rows go where the student has moved most, and still reach every earlier skill."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.guidance import Allotments, allot, described, observe

moves = st.lists(st.floats(0, 5), min_size=1, max_size=12)


def allotted_to(moved: list[float]) -> Allotments:
    return {f"skill{n}": {"owed": 0.0, "drawn": 0, "moved": value} for n, value in enumerate(moved)}


@given(moved=moves, count=st.integers(1, 9), focus=st.floats(0, 1), steps=st.integers(1, 40))
def test_every_skill_gets_its_share_to_within_a_row_or_two(moved: list[float], count: int, focus: float, steps: int):
    allotted = allotted_to(moved)
    rows: Counter[str] = Counter()
    for _ in range(steps):
        given = allot(allotted, list(allotted), count, focus)
        assert sum(given.values()) == count
        rows.update(given)
    total = sum(moved)
    for skill, value in zip(allotted, moved, strict=True):
        part = value / total if total > 0 else 1 / len(moved)
        share = (1 - focus) / len(moved) + focus * part
        assert allotted[skill]["drawn"] == rows[skill]
        # Largest debt first keeps each within (number of skills - 1) rows of what is due; in practice within two.
        assert abs(rows[skill] - steps * count * share) <= max(2, len(moved) / 2)


def test_one_row_a_step_reaches_every_skill_in_turn():
    allotted: Allotments = {}
    names = [f"skill{n}" for n in range(5)]
    first = [next(skill for skill, rows in allot(allotted, names, 1, 0.5).items() if rows) for _ in range(5)]
    assert sorted(first) == names


def test_a_skill_that_was_not_seen_counts_as_the_one_that_moved_most():
    allotted: Allotments = {
        "far": {"owed": 0.0, "drawn": 0, "moved": 3.0},
        "near": {"owed": 0.0, "drawn": 0, "moved": 1.0},
    }
    assert allot(allotted, ["far", "near", "new"], 7, 1.0) == {"far": 3, "near": 1, "new": 3}


@pytest.mark.parametrize(("focus", "rows"), [(0.0, (4, 4)), (0.5, (6, 2)), (1.0, (8, 0))])
def test_focus_decides_between_even_and_in_proportion(focus: float, rows: tuple[int, int]):
    assert tuple(allot(allotted_to([1.0, 0.0]), ["skill0", "skill1"], 8, focus).values()) == rows


def test_nothing_moved_is_an_even_share():
    assert set(allot(allotted_to([0.0, 0.0, 0.0]), ["skill0", "skill1", "skill2"], 6, 1.0).values()) == {2}


def test_what_is_seen_is_the_mean_of_a_step_and_half_of_what_was_known():
    allotted: Allotments = {"a": {"owed": 0.0, "drawn": 0}, "b": {"owed": 0.0, "drawn": 0}}
    observe(allotted, [("a", 1.0), ("a", 3.0), ("", 50.0)])
    assert described(allotted) == {"moved": {"a": 2.0}}
    observe(allotted, [("a", 4.0), ("b", 1.0)])
    assert described(allotted) == {"moved": {"a": 3.0, "b": 1.0}}
    assert described({}) == {}
