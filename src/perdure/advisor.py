"""Which method for this skill on this model: a rule from what the preflight measures, with the evidence it rests on.

The evidence is docs/results.md: small chains of a 135M model, one seed. Where it does not reach, the rule says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from perdure.config import TrainConfig
from perdure.preflight import Preflight

ABLE = 0.8
"""Teacher accuracy from which self-distillation learned about as much as supervised fine-tuning."""
ENOUGH = 300
"""Demonstrations drawn in a stage from which self-distillation kept more (380 did, 120 did not)."""


@dataclass(frozen=True)
class Recommendation:
    """``method`` and ``settings`` as ``perdure learn`` takes them, and why."""

    method: str
    reasons: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys such as ``train.teacher``."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recommend(found: Preflight, taught: int, train: TrainConfig, of_original: float | None = None) -> Recommendation:
    """``taught``: skills that the champion knows; ``train``: steps, batch and anchors that the stage would have.
    ``of_original``: accuracy of the base model as the teacher, where it was measured."""
    accuracy = f"{found.teacher_accuracy:.0%}"
    if found.teacher_accuracy < ABLE or not found.ready:
        lost = " A model that was fine-tuned loses some of its ability to learn from its context." if taught else ""
        if of_original is not None and of_original >= ABLE:
            return Recommendation("sdft", (
                f"The champion, seeing the demonstration, is right on {accuracy} of the rows; the original model on "
                f"{of_original:.0%}: let that teach.{lost}",), {"train.teacher": "original"})  # fmt: skip
        return Recommendation("sft", (
            f"The teacher is right on {accuracy} of the rows only, so self-distillation would teach little; supervised "
            f"fine-tuning needs no teacher, and the anchor rows hold the rest as well.{lost}",))  # fmt: skip
    able = f"The teacher is able ({accuracy})"
    if train.anchor_share == 0:
        return Recommendation("sdft", (
            f"{able} and no anchor rows hold the rest: then self-distillation kept half of an earlier skill where "
            "supervised fine-tuning kept nothing. Anchor rows keep more than either.",))  # fmt: skip
    drawn = round(train.steps * train.batch_size * (1 - train.anchor_share))
    if not taught or drawn < ENOUGH:
        why = "there is no earlier skill to keep" if not taught else f"a stage draws only {drawn} demonstrations"
        return Recommendation("sft", (
            f"{able}, but {why}: then supervised fine-tuning with anchors learned more in the same steps, kept no "
            "less, and took about 60 % of the time.",))  # fmt: skip
    return Recommendation("sdft", (
        f"{able}, there is something to keep, and a stage draws {drawn} demonstrations: then self-distillation kept "
        "more of the earlier skills and learned a few points less.",))  # fmt: skip
