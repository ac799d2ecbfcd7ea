"""The teacher that follows slowly: an exponential moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def teacher_update(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], teacher_update_rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student, in place, for every named tensor.

    ``teacher_update_rate`` is the student's share (the paper's alpha): 0 leaves the teacher, 1 copies the student.
    The teacher must be float32: in bfloat16 a rate of 0.01 rounds away and the average never moves.
    Raises ValueError on a rate outside 0..1, on unequal names or on a teacher that is not float32.
    """
    if not 0 <= teacher_update_rate <= 1:
        raise ValueError(f"teacher_update_rate is the student's share, 0..1, not {teacher_update_rate}")
    if teacher.keys() != student.keys():
        raise ValueError(f"teacher and student differ in weights: {sorted(teacher.keys() ^ student.keys())[:5]}")
    if low := [f"{name} is {tensor.dtype}" for name, tensor in teacher.items() if tensor.dtype != torch.float32]:
        raise ValueError(f"the moving teacher must be float32 to move at all, but {low[0]}")
    for name, tensor in teacher.items():
        tensor.lerp_(student[name].to(torch.float32), teacher_update_rate)
