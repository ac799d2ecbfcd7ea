"""The moving average: the student's share, exactly, in float32."""

from __future__ import annotations

import pytest
import torch

from perdure.ema import teacher_update


def weights(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=dtype)}


@pytest.mark.parametrize(("rate", "expected"), [(0.0, [4.0, -8.0]), (1.0, [8.0, 0.5]), (0.25, [5.0, -5.875])])
def test_the_rate_is_the_students_share(rate: float, expected: list[float]) -> None:
    # 0.25: 0.75 * 4 + 0.25 * 8 = 5;  0.75 * -8 + 0.25 * 0.5 = -5.875
    teacher, student = weights(4.0, -8.0), weights(8.0, 0.5)
    teacher_update(teacher, student, rate)
    assert teacher["w"].tolist() == expected
    assert student["w"].tolist() == [8.0, 0.5]


def test_a_constant_student_is_approached_geometrically() -> None:
    teacher, student = weights(0.0), weights(1.0)
    for _ in range(10):
        teacher_update(teacher, student, 0.1)
    assert teacher["w"].item() == pytest.approx(1 - 0.9**10, rel=1e-6)


def test_a_slow_teacher_moves_behind_a_bfloat16_student() -> None:
    """In bfloat16 itself the step from 1 to 1.0002 would round away, every time."""
    teacher, student = weights(1.0), weights(1.0078125, dtype=torch.bfloat16)
    teacher_update(teacher, student, 0.02)
    assert teacher["w"].item() == pytest.approx(1.00015625, abs=1e-7)


@pytest.mark.parametrize("rate", [-0.01, 1.01, float("nan")])
def test_refuses_a_rate_that_is_no_share(rate: float) -> None:
    with pytest.raises(ValueError, match="share"):
        teacher_update(weights(1.0), weights(2.0), rate)


def test_refuses_a_low_precision_teacher_before_anything_moves() -> None:
    teacher = {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"b is torch\.bfloat16"):
        teacher_update(teacher, {"a": torch.zeros(1), "b": torch.zeros(1)}, 0.5)
    assert teacher["a"].item() == 1


def test_refuses_other_weights() -> None:
    with pytest.raises(ValueError, match="extra"):
        teacher_update(weights(1.0), weights(1.0) | {"extra": torch.zeros(1)}, 0.5)
