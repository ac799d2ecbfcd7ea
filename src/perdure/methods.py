"""The methods of the one loop: each is another loss, another source of completions or another choice of rows.

``METHODS`` is the registry; a key is the value of ``train.method``. docs/method.md says where each comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """What a method does with the rows to learn, and how it keeps what the model knew."""

    label: str
    """For people."""
    completions: Literal["student", "demonstration", "teacher", "rewritten", "document"]
    """Who writes the answers that are trained on: the student as it is now (after the warm start), the demonstration
    itself, the teacher once before the first step, the teacher where the grader passes its answer (else the
    demonstration), or nobody: the row's document is trained on as plain text."""
    loss: Literal["divergence", "nll", "dft"]
    """On the rows to learn: the divergence from the teacher, or a loss of the completion's own tokens."""
    earlier: Literal["answers", "demonstrations", "accepted"] = "answers"
    """What the anchor rows of earlier skills carry: the last version's answers under the divergence (anchors), or as
    supervised rows the stored demonstrations, or the last version's answers that the grader passes (replay)."""
    kl_to_last: bool = False
    """Adds the divergence from the last version under the same prompt on the rows to learn."""
    reinvoked: bool = False
    """The last steps are on-policy distillation from the last version on general prompts."""

    @property
    def shows(self) -> bool:
        """Whether the teacher sees the demonstration; the preflight then says if that helps it."""
        return self.completions not in ("demonstration", "document")

    def scored(self, anchored: bool) -> bool:
        """Whether a teacher scores rows; ``anchored``: there are anchor rows, which the last version scores."""
        return self.shows or self.kl_to_last or self.reinvoked or anchored

    @property
    def writes_once(self) -> bool:
        """Whether the teacher's answers are made before the first step."""
        return self.completions in ("teacher", "rewritten")


AUTO = "auto"
"""In the place of a method: the one that the preflight recommends."""
METHODS: dict[str, Method] = {
    "sdft": Method("SDFT", "student", "divergence"),
    "sft": Method("SFT", "demonstration", "nll"),
    "dft": Method("DFT", "demonstration", "dft"),
    "sft_kl": Method("SFT + KL", "demonstration", "nll", kl_to_last=True),
    "sft_replay": Method("SFT + replay", "demonstration", "nll", earlier="demonstrations"),
    "onpolicy_replay": Method("SFT + own replay", "demonstration", "nll", earlier="accepted"),
    "reinvoke": Method("SFT, re-invoked", "demonstration", "nll", reinvoked=True),
    "rewrite_sft": Method("Rewritten SFT", "rewritten", "nll"),
    "offline": Method("Offline distillation", "teacher", "divergence"),
    "cpt": Method("Continued pre-training", "document", "nll"),
}


def method_label(name: str) -> str:
    """``sdft`` as people write it."""
    if name == AUTO:
        return "the method that the preflight recommends"
    return METHODS[name].label if name in METHODS else name
