"""Which method for this skill on this model: a rule from what the preflight measures, with the evidence it rests on.

The evidence is docs/results.md: small chains of a 135M model, one to three seeds. Where it does not reach, the rule
says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from perdure.config import TrainConfig
from perdure.methods import AUTO
from perdure.preflight import Preflight

ABLE = 0.8
"""Teacher accuracy from which self-distillation learned about as much as supervised fine-tuning."""


MEASURED_ON = ('That was on a model of 135M. The paper has self-distillation ahead from 7B on: there, measure '
               'train.method = "sdft" beside it.')  # fmt: skip
"""What the evidence does not cover."""


@dataclass(frozen=True)
class Recommendation:
    """``method`` and ``settings`` as ``perdure learn`` takes them, and why."""

    method: str
    reasons: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys such as ``train.teacher``."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def provisional(train: TrainConfig) -> TrainConfig:
    """What is checked while the method is still to be chosen: SDFT, the one that the check is about."""
    return train.model_copy(update={"method": "sdft"}) if train.method == AUTO else train


def followed(train: TrainConfig, recommended: Mapping[str, Any]) -> TrainConfig:
    """The settings to train with, where ``recommended`` is a Recommendation as JSON: the same ones, but for ``auto``.
    Settings that only SDFT uses may be given with that, and rest where it is not taken."""
    if train.method != AUTO:
        return train
    settings = {key.removeprefix("train."): value for key, value in recommended["settings"].items()}
    return train.model_copy(update={"method": recommended["method"]} | settings)


def rehearses(train: TrainConfig) -> bool:
    """Whether earlier skills' own demonstrations are taught again: there the evidence has nothing for a teacher."""
    return train.anchors_earlier and train.anchor_rehearsal > 0


def is_known(found: Preflight) -> bool:
    """Whether there is nothing to learn by any method: the student is right without the demonstration, and hardly less
    often than with it."""
    return not found.ready and found.student_accuracy >= ABLE


def recommend(found: Preflight, taught: int, train: TrainConfig, other: float | None = None,
              supervised: bool = True) -> Recommendation:  # fmt: skip
    """``taught``: skills that the champion knows; ``train``: teacher and anchors that the stage would have. ``other``:
    accuracy of another teacher, where it was measured: of the original model, or of the champion where the original
    model is to teach; only of interest where earlier skills are not rehearsed. ``supervised``: whether the
    demonstrations may be labels, which answers without thinking may not be for a model that thinks."""
    if not supervised:
        return _sdft(found, train, (
            "The demonstrations are answers without thinking, and supervised fine-tuning would unlearn to think; the "
            "teacher thinks for itself."))  # fmt: skip
    accuracy = f"{found.teacher_accuracy:.0%}"
    if found.teacher_accuracy < ABLE or not found.ready:
        asked, else_, setting = "The champion", "the original model", "original"
        if train.teacher == "original":
            asked, else_, setting = "The original model", "the champion", "frozen"
        if other is not None and other >= ABLE and not rehearses(train):
            return Recommendation("sdft", (
                f"{asked}, seeing the demonstration, is right on {accuracy} of the rows; {else_} on {other:.0%}: let "
                "that teach.",), {"train.teacher": setting})  # fmt: skip
        why = f"The teacher is right on {accuracy} of the rows only"
        if found.teacher_accuracy >= ABLE:
            why = f"The demonstration adds little (student {found.student_accuracy:.0%}, teacher {accuracy})"
        rest = "the anchor rows hold the rest as well"
        if train.anchor_share == 0:
            rest = "but without anchor rows (train.anchor_share) nothing holds the rest: it kept 4 to 15 % of a chain"
        return Recommendation("sft", (
            f"{why}: there is little to learn from it. Supervised fine-tuning needs no teacher, and {rest}.",
        ))  # fmt: skip
    able = f"The teacher is able ({accuracy})"
    if train.anchor_share == 0:
        return _sdft(found, train, (
            f"{able} and no anchor rows hold the rest: then self-distillation kept 0, 12 and 48 % of what was "
            "learned before (three chains, one seed each), supervised fine-tuning 0 to 4 %. Anchor rows keep nearly "
            f"all.{_measured_alone(train)}"))  # fmt: skip
    if not taught:
        return Recommendation("sft", (
            f"{able}, but there is no earlier skill to keep: then supervised fine-tuning with anchors learned "
            f"{_more(train)} in the same steps, and took about 60 % of the time.", MEASURED_ON))  # fmt: skip
    if rehearses(train):
        return Recommendation("sft", (
            f"{able}; but where earlier skills are rehearsed, supervised fine-tuning kept as much over chains of six "
            f"skills, learned {_more(train)}, and took 70 % of the time.",
            MEASURED_ON))  # fmt: skip
    return _sdft(found, train, (
        f"{able}, and earlier skills are held by the model's own answers alone (anchor_rehearsal = 0): then "
        "self-distillation kept 92 % of six skills where supervised fine-tuning kept 84 % (8 more; 95 %: -2 to +18), "
        "and learned 3 points less. Where the earlier demonstrations may be used, rehearse them."
        f"{_measured_alone(train)}"))  # fmt: skip


def _more(train: TrainConfig) -> str:
    """What supervised fine-tuning learned, against self-distillation."""
    return "about as much" if train.demonstration_weight else "3.4 points more (95 %: 1.2 to 5.5)"


def _measured_alone(train: TrainConfig) -> str:
    return " (Measured with train.demonstration_weight = 0.)" if train.demonstration_weight else ""


def _sdft(found: Preflight, train: TrainConfig, reason: str) -> Recommendation:
    """Self-distillation; and where its teacher is not always right, what might keep the student from learning that."""
    if found.teacher_accuracy == 1 or train.demonstration_weight:
        return Recommendation("sdft", (reason,))
    return Recommendation("sdft", (
        reason, "Where the teacher errs in spite of what it is shown, train.demonstration_weight = 0.5, the default, "
        "helps: one skill was learned to 98 and 100 % that had stopped at 89 %.",
    ))  # fmt: skip
