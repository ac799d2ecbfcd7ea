"""The kinds of teacher: which weights they score with, after the student has moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fakes import example, renderer, tiny_model
from perdure.batching import collate
from perdure.models import head_of, hidden_at_loss_positions, sync_weights, working_copy
from perdure.teacher import KINDS, EmaTeacher, Teacher, make_teacher
from perdure.templates import parse_template
from perdure.types import Batch


def batch() -> Batch:
    rows = [example("say small cat", "red"), example("say old dog", "blue")]
    template = parse_template("turns:1")
    return collate([renderer().rollout(r, renderer().demonstration(r), template) for r in rows], "teacher", 280)


def make(kind: str, student: Any, rate: float = 0.25, dtype: torch.dtype = torch.float32) -> tuple[Teacher, Any]:
    working = working_copy(student, dtype)
    teacher = make_teacher(kind, student=student, working=working, original=tiny_model(seed=9), dtype=dtype,
                           teacher_update_rate=rate)  # fmt: skip
    return teacher, working


def step(student: Any, teacher: Teacher, working: Any) -> None:
    """What the loop does: the student moves, its working copy and the teacher follow."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.linspace(-0.1, 0.3, parameter.numel()).view_as(parameter))
    sync_weights(working, student)
    teacher.update(student)


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return hidden_at_loss_positions(model, batch())


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_every_kind_scores_as_its_weights_do(kind: str) -> None:
    student = tiny_model()
    teacher, _ = make(kind, student)
    origin = tiny_model(seed=9) if kind == "original" else student
    assert torch.equal(teacher.score(batch()), hidden(origin))
    assert torch.equal(teacher.head.weight_VH, head_of(origin).weight_VH)
    assert teacher.is_start is (kind == "frozen")
    assert teacher.moves is (kind in ("ema", "live"))


@pytest.mark.parametrize(("kind", "seed"), [("frozen", 0), ("original", 9)])
def test_fixed_teachers_stay_as_the_student_moves(kind: str, seed: int) -> None:
    student = tiny_model()
    teacher, working = make(kind, student)
    for _ in range(3):
        step(student, teacher, working)
    assert torch.equal(teacher.score(batch()), hidden(tiny_model(seed)))
    assert not torch.equal(teacher.score(batch()), hidden(student))


def test_the_live_teacher_is_the_student_of_now() -> None:
    student = tiny_model()
    teacher, working = make("live", student)
    before = teacher.score(batch())
    step(student, teacher, working)
    assert torch.equal(teacher.score(batch()), hidden(student))
    assert not torch.equal(teacher.score(batch()), before)


def test_the_moving_average_is_what_it_scores_with() -> None:
    """Three steps with a quarter for the student of then, recomputed beside it."""
    student = tiny_model()
    teacher, working = make("ema", student, rate=0.25)
    expected = {name: p.detach().clone() for name, p in student.named_parameters()}
    for _ in range(3):
        step(student, teacher, working)
        expected = {name: 0.75 * expected[name] + 0.25 * p.detach() for name, p in student.named_parameters()}
    reference = tiny_model()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(expected[name])
    torch.testing.assert_close(teacher.score(batch()), hidden(reference))
    torch.testing.assert_close(teacher.head.weight_VH, head_of(reference).weight_VH)
    torch.testing.assert_close(teacher.state(), expected)


def test_the_average_moves_in_float32_below_a_bfloat16_copy() -> None:
    """Steps far below bfloat16's resolution add up: after 100 of them the low-precision copy has moved as well."""
    student = tiny_model()
    teacher = EmaTeacher(student, torch.bfloat16, 0.01)
    name, parameter = next(iter(student.named_parameters()))
    start = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(0.1)
    for _ in range(100):
        teacher.update(student)
    share = 1 - 0.99**100
    torch.testing.assert_close(teacher.state()[name], start + share * 0.1, rtol=0, atol=1e-5)
    copy = dict(teacher.model.named_parameters())[name]
    assert copy.dtype == torch.bfloat16
    torch.testing.assert_close(copy.float(), start + share * 0.1, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_a_teacher(kind: str) -> None:
    student = tiny_model()
    teacher, _ = make(kind, student)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.model.parameters())  # type: ignore[attr-defined]
    assert not any(t.requires_grad for t in teacher.state().values())
    assert not teacher.score(batch()).requires_grad
    mine = {id(p) for p in student.parameters()}
    assert not mine & {id(p) for p in teacher.model.parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_brings_a_moved_teacher_back(kind: str) -> None:
    student = tiny_model()
    teacher, working = make(kind, student)
    step(student, teacher, working)
    saved = {name: t.clone() for name, t in teacher.state().items()}
    assert bool(saved) is (kind == "ema")
    fresh, fresh_working = make(kind, tiny_model())
    fresh.load_state(saved)
    sync_weights(fresh_working, student)
    assert torch.equal(fresh.score(batch()), teacher.score(batch()))
    step(student, teacher, working)
    sync_weights(fresh_working, student)
    fresh.update(student)
    assert torch.equal(fresh.score(batch()), teacher.score(batch()))


def test_a_state_of_another_teacher_is_refused() -> None:
    student = tiny_model()
    ema, frozen = make("ema", student)[0], make("frozen", student)[0]
    with pytest.raises(ValueError, match="weights of its own"):
        frozen.load_state(ema.state())
    with pytest.raises(ValueError, match="other weights"):
        ema.load_state({"strange": torch.zeros(1)})


def test_unknown_kinds_and_a_missing_original_are_errors() -> None:
    student = tiny_model()
    with pytest.raises(ValueError, match="unknown teacher 'slow'"):
        make("slow", student)
    with pytest.raises(ValueError, match="needs the base model"):
        make_teacher("original", student=student, working=student, original=None, dtype=torch.float32,
                     teacher_update_rate=0.1)  # fmt: skip
