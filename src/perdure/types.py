"""The words that travel between floors: frozen dataclasses, each field with its shape, dtype and unit.

Dimension letters used all over the package:
B sequences, T positions of one sequence, N loss positions of a batch (flattened), H hidden size, V vocabulary,
K top-k support, S stages, J skills.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Message = dict[str, Any]
"""One chat turn as people write it: ``{"role": ..., "content": ..., "tool_calls": ...}``; passed on unflattened."""


def with_objects(function: Mapping[str, Any]) -> dict[str, Any]:
    """A called function with its arguments as an object, where they are the text of one (the API's form; of a function
    without arguments logs have an empty text)."""
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # no JSON text: as it is
            return {**function, "arguments": json.loads(arguments or "{}")}
    return dict(function)


class InputError(ValueError):
    """The user's input cannot be used. ``str(error)`` says where, what is wrong and what to do. Exit code 2."""


@dataclass(frozen=True)
class Example:
    """One row of a skill: a prompt and, for rows that teach, a demonstration."""

    id: str
    """Unique within its file."""
    messages: tuple[Message, ...]
    """The student's prompt: every turn before the demonstration, a system turn too. Ends in a user or tool turn."""
    demonstration: Message | None
    """The assistant turn to learn. None for an anchor row: teacher and student then see the same prompt."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the tools on offer, as the chat template takes them."""
    document: str | None = None
    """What the teacher may read beside the demonstration."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Anything a grader needs, such as allowed alternatives."""
    origin: str = ""
    """``file:line``, for error messages."""
    shown: tuple[Message, ...] = ()
    """Of a row that is played in an environment: the whole recorded conversation but its system turn. The prompt is
    what comes before its first assistant turn, the demonstration its last turn."""
    conversation: str = ""
    """Of a turn that is learned with others of its conversation: the row that they are from."""

    @property
    def question(self) -> str:
        """The prompt's last turn, for reading."""
        return str(self.messages[-1].get("content") or "")


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt, ready for the model. Made only by contexts.py."""

    example: Example
    token_ids: tuple[int, ...]
    """Ends with the generation prompt of the assistant's turn."""


@dataclass(frozen=True)
class Completion:
    """Tokens of one assistant turn, the closing token included when the model wrote it."""

    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    """log p of each token under the distribution it was sampled from (after temperature and truncation). Empty
    where nothing was sampled: a demonstration's own tokens."""
    finished: bool
    """False: stopped by the length limit."""


@dataclass(frozen=True)
class Rollout:
    """One training row: the same completion under the student's and under the teacher's prompt."""

    student_prompt: Prompt
    teacher_prompt: Prompt
    completion: Completion
    weight: float = 1.0
    """Multiplies the divergence from the teacher at each of its tokens; 0 asks no teacher."""
    label_weight: float = 0.0
    """Multiplies the loss of its labels (nll or dft): its own tokens, or ``labels``."""
    labels: tuple[int, ...] = ()
    """Demonstration tokens that label the completion's first places, up to and with the first token that differs.
    There ``label_weight`` is taken off the divergence's weight; later places have no label."""
    source: str = ""
    """The earlier skill that the row holds; empty for rows to learn and for general anchors."""
    lagging: bool = False
    """The completion was sampled by the weights of an earlier step: its loss is weighted by importance."""
    region: tuple[int, int] | None = None
    """First and one past the last token of the completion that carry loss; None: all do."""

    def loss_places(self, skip_first_tokens: int = 0) -> range:
        """The places of the completion's tokens that carry loss."""
        start, end = self.region or (0, len(self.completion.token_ids))
        return range(max(start, skip_first_tokens), end)

    def terms(self, place: int) -> tuple[float, int, float]:
        """Weight of the divergence, label, and weight of the label at a place of the completion."""
        own = self.completion.token_ids[place]
        if not self.labels:
            return self.weight, own, self.label_weight
        if place >= len(self.labels):
            return self.weight, own, 0.0
        return self.weight - self.label_weight, self.labels[place], self.label_weight

    @property
    def has_demonstration(self) -> bool:
        return self.student_prompt.example.demonstration is not None


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors of one micro-batch under ONE role's prompts."""

    input_ids_BT: torch.Tensor
    """int64 [B, T]; padding after each row's end."""
    attention_mask_BT: torch.Tensor
    """int64 [B, T]; 1 at real tokens."""
    loss_rows_N: torch.Tensor
    """int64 [N]; row of each loss position."""
    loss_positions_N: torch.Tensor
    """int64 [N]; position whose hidden state predicts the target token (one before it)."""
    targets_N: torch.Tensor
    """int64 [N]; the completion's token ids at the loss positions. Equal for both roles, in the same order."""
    weights_N: torch.Tensor
    """float32 [N]; weight of the divergence at each loss position."""
    labels_N: torch.Tensor
    """int64 [N]; the label at each loss position: the target, but where a demonstration corrects a sample."""
    label_weights_N: torch.Tensor
    """float32 [N]; weight of the label loss at each loss position."""
    demonstrated_N: torch.Tensor
    """bool [N]; True where the row has a demonstration (teacher temperature applies there only)."""
    sampler_logprobs_N: torch.Tensor
    """float32 [N]; of rows sampled by earlier weights the log p of each token then, NaN elsewhere."""


@dataclass(frozen=True)
class ItemResult:
    """One evaluated row, as saved in ``evaluation/<skill>.jsonl``."""

    id: str
    prompt: str
    """The last turn of the prompt, for reading."""
    expected: str
    completion: str
    score: float
    """0..1; an item counts as right when it is 1."""
    tokens: int
    """Generated tokens."""


@dataclass(frozen=True)
class SkillScore:
    """Accuracy of one version on one skill."""

    skill: str
    accuracy: float
    """Share of items with score 1, 0..1."""
    mean_score: float
    low: float
    """Lower end of the 95 % interval of the accuracy (``stats.clustered_interval``)."""
    high: float
    n: int
    items: tuple[ItemResult, ...]


@dataclass(frozen=True)
class Verdict:
    """What a gate says about a candidate."""

    decision: str
    """``promoted``, ``held`` (the items cannot tell) or ``refused``."""
    reasons: tuple[str, ...]
    """Sentences for people, the deciding one first."""
    table: tuple[dict[str, Any], ...]
    """One row a check: name, kind, reference, before, after, change, n, p_value, budget, needed, verdict, passed,
    reason. What was not measured is None; ``needed`` is the number of items that could tell, where these cannot."""
