"""What the teachers say of a step's rows: their hidden states at the positions that carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.batching import collate, passes
from perdure.config import TrainConfig
from perdure.rows import phase_of, recurs
from perdure.runlog import LoopState
from perdure.stage import Stage
from perdure.teacher import Teacher
from perdure.types import Rollout
from perdure.update import loss_tokens, own_rows


def score(stage: Stage, config: TrainConfig, rollouts: Sequence[Rollout], kept: dict[Any, Tensor],
          state: LoopState) -> list[Tensor] | None:  # fmt: skip
    """The teacher's hidden states of each of this process's part of the step's rows, [N_i, H]; None when none of them
    needs a teacher.

    What a fixed teacher said of a row that recurs is kept. Such a row is scored alone: its bits then do not depend on
    its neighbours, and a resumed run, which kept nothing, gets the same."""
    rollouts = own_rows(rollouts)
    if stage.teacher is None or all(r.weight == 0 for r in rollouts):
        return None
    fresh = phase_of(state, config) == "re_invoke"  # rows that are new each time
    width = stage.teacher.head.weight_VH.shape[1]
    together: dict[bool, list[int]] = {True: [], False: []}
    result: dict[int, Tensor] = {}
    for index, rollout in enumerate(rollouts):
        teacher = stage.teacher_of(rollout.has_demonstration)
        assert teacher is not None
        if rollout.weight == 0:
            # Its loss does not look at the teacher; the zeros only hold the place.
            result[index] = torch.zeros(
                loss_tokens(rollout, config), width, dtype=stage.dtype, device=stage.working.device
            )
        elif not teacher.moves and not fresh and recurs(stage, config, rollout):
            key = (rollout.teacher_prompt.token_ids, rollout.completion.token_ids, rollout.region)
            if key not in kept:
                (hidden,) = score_group(teacher, stage, config, [rollout], state)
                kept[key] = hidden.cpu()  # they grow with every row: a GPU has better use for its memory
            result[index] = kept[key].to(stage.working.device)
        else:
            together[rollout.has_demonstration or stage.holder is None].append(index)
    for demonstrated, places in together.items():
        teacher = stage.teacher_of(demonstrated)
        assert teacher is not None
        rows = [rollouts[i] for i in places]
        for group in passes(stage.student.model, rows, "teacher", config.micro_batch_tokens):
            scored = score_group(teacher, stage, config, [rows[i] for i in group], state)
            result |= zip([places[i] for i in group], scored, strict=True)
    return [result[i] for i in range(len(rollouts))]


def score_group(teacher: Teacher, stage: Stage, config: TrainConfig, rollouts: Sequence[Rollout],
                state: LoopState) -> list[Tensor]:  # fmt: skip
    """One forward pass of a teacher; the hidden states of each rollout."""
    batch = collate(rollouts, "teacher", stage.student.pad_id, config.skip_first_tokens, stage.working.device)
    state.tokens["teacher"] += int(batch.attention_mask_BT.sum())
    return list(teacher.score(batch).split([loss_tokens(r, config) for r in rollouts]))
