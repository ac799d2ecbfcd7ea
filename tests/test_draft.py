"""Following a draft: how far to trust it, finding the place again. That tokens stay: test_rollout_local.py."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from perdure.rollout.draft import FIRST_BLOCK, Draft

TEXT = tuple(range(100, 140))


def follow(reference: tuple[int, ...], said: tuple[int, ...]) -> tuple[int, int]:
    """(passes, draft tokens wasted) when the model says exactly ``said``."""
    draft, tokens, passes, wasted = Draft(reference), [], 0, 0
    while len(tokens) < len(said):
        block = draft.propose(len(said) - len(tokens) - 1)
        rest = said[len(tokens) :]
        accepted = next((i for i, token in enumerate(block) if token != rest[i]), len(block))
        tokens += rest[: accepted + 1]
        passes, wasted = passes + 1, wasted + len(block) - accepted
        draft.saw(tokens, len(block), accepted)
    return passes, wasted


def test_blocks_double_while_the_draft_is_right() -> None:
    draft = Draft(TEXT)
    assert draft.propose(99) == TEXT[:FIRST_BLOCK]
    draft.saw(TEXT[: FIRST_BLOCK + 1], FIRST_BLOCK, FIRST_BLOCK)
    assert draft.propose(99) == TEXT[FIRST_BLOCK + 1 : 3 * FIRST_BLOCK + 1] and len(draft.propose(3)) == 3
    assert follow(TEXT, TEXT) == (3, 0)


def test_a_replaced_token_costs_one_pass_more() -> None:
    said = (*TEXT[:20], 7, *TEXT[21:])
    passes, wasted = follow(TEXT, said)
    assert passes <= 7 and wasted <= 16


def test_inserted_and_missing_tokens_are_found_again() -> None:
    for said in ((*TEXT[:15], 7, 8, 9, *TEXT[15:]), (*TEXT[:15], *TEXT[22:])):
        passes, _ = follow(TEXT, said)
        assert passes < len(said) / 3


def test_nothing_is_proposed_to_a_model_that_says_something_else() -> None:
    passes, wasted = follow(TEXT, tuple(range(30)))
    assert passes == 30 and wasted == FIRST_BLOCK


def test_of_several_places_the_nearest_is_taken() -> None:
    """A form that repeats: after the wrong value the next field is found, not the first one."""
    form = (1, 2, 50, 1, 2, 60, 1, 2, 70, 9)
    draft = Draft(form)
    draft.saw([1, 2, 50, 1, 2, 61], 9, 5)
    draft.saw([1, 2, 50, 1, 2, 61, 1], 1, 0)
    draft.saw([1, 2, 50, 1, 2, 61, 1, 2], 0, 0)
    assert draft.propose(1) == (70,)


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_any_draft_leads_to_the_end(reference: list[int], said: list[int]) -> None:
    passes, _ = follow(tuple(reference), tuple(said))
    assert 1 <= passes <= len(said)


def test_no_reference_proposes_nothing() -> None:
    assert Draft(()).propose(5) == ()
