"""The settings of a stage's training: method, loss, teacher, rows, schedule, adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from perdure.methods import AUTO, METHODS
from perdure.settings import SettingsSection

_OFF_AT_0 = ("demonstration_weight", "anchor_rehearsal")
"""On by default; off by name, they fit settings that have no use for them."""


class TrainConfig(SettingsSection):
    """The distillation step and its schedule."""

    method: Literal[
        "auto",
        "sdft",
        "sft",
        "dft",
        "sft_kl",
        "sft_replay",
        "onpolicy_replay",
        "reinvoke",
        "rewrite_sft",
        "offline",
        "cpt",
    ] = "sdft"
    """sdft, sft, dft, sft_kl, sft_replay, onpolicy_replay, reinvoke, rewrite_sft, offline or cpt (docs/method.md); or
    auto: sdft or sft, as the preflight recommends (``perdure check``)."""
    divergence: Literal["forward_kl", "reverse_kl", "generalized_jsd"] = "forward_kl"
    """forward_kl = KL(teacher || student); reverse_kl = KL(student || teacher); generalized_jsd = a mixture of both."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """generalized_jsd only: the teacher's share of the mixture."""
    support: Literal["full", "teacher_topk", "sampled"] = "full"
    """Of the divergence: full = the whole vocabulary; teacher_topk = the teacher's likeliest tokens and the rest as
    one; sampled = an estimate from the sampled token."""
    topk: int = Field(default=20, ge=1)
    """teacher_topk only; the rest of the vocabulary is one tail bucket."""
    teacher: Literal["frozen", "ema", "original", "live"] = "original"
    """original = the base model, which keeps its ability to learn from a context through a whole chain; frozen = the
    version promoted last, for the whole stage (at the first stage the two are the same); ema = a slow average of the
    student; live = the student itself."""
    teacher_update_rate: float = Field(default=0.02, gt=0, le=1)
    """ema only: the student's share per step."""
    teacher_temperature: float = Field(default=0.5, gt=0)
    """Divides the teacher's logits on rows with a demonstration; below 1 sharpens."""
    steps: int = Field(default=60, ge=1)
    """At most this many optimizer steps a stage."""
    batch_size: int = Field(default=16, ge=1)
    """Rows a step, anchors included."""
    micro_batch_tokens: int = Field(default=4096, ge=64)
    """Most tokens in one forward pass. Where a model runs packed, a prefix that rows share counts once; else padding
    counts, too."""
    anchor_share: float = Field(default=0.375, ge=0, lt=1)
    """Share of each batch that keeps what is known: earlier skills' prompts and general ones."""
    anchor_earlier_share: float = Field(default=0.67, ge=0, le=1)
    """Of the anchors, the share from earlier skills; before there are any, these rows are demonstrations."""
    anchor_per_skill: float = Field(default=0.5, ge=0)
    """At least so many rows a step for each earlier skill on average (``anchor_focus`` says which get more); what that
    takes beyond their share is added to the batch."""
    anchor_focus: float = Field(default=0.5, ge=0, le=1)
    """Share of the earlier skills' rows that goes where the student has moved most; the rest is divided evenly."""
    anchor_rehearsal: float = Field(default=1.0, ge=0, le=1)
    """Of each earlier skill's anchor rows the share that carries the stored demonstration as a supervised row, not the
    model's own answer; where that answer was right, the divergence holds the row, too. 0 = hold own answers only."""
    anchor_rows: int = Field(default=64, ge=1)
    """At most this many prompts of each earlier skill are anchors; their answers are sampled once, before training."""
    anchor_weight: float = Field(default=1.0, gt=0)
    """Of the divergence on earlier skills' rows, against 1 for a row to learn and for general anchors."""
    anchor_general_tokens: int = Field(default=32, ge=1)
    """Longest answer to a general prompt, in tokens."""
    warm_start_steps: int = Field(default=40, ge=0)
    """At most this many first steps score the demonstration's own tokens instead of sampling."""
    warm_start_until: float = Field(default=1.0, gt=0, le=1)
    """The warm start ends early when the student gives a demonstration token this much on average. 1 = never."""
    demonstration_weight: float = Field(default=0.5, ge=0, le=1)
    """sdft only: weight of the demonstration's next token in the target while the completion equals the demonstration,
    including the first token that differs; 0 = the teacher alone, as in the paper. Turns that the student plays in an
    environment have none."""
    on_policy_share: float = Field(default=1.0, gt=0, le=1)
    """sdft only: share of the rows to learn that the student answers itself after the warm start; the others go on with
    the demonstration's own tokens."""
    overlap: bool = False
    """sdft only: the student answers the next step's rows while this step trains, one step behind, which pays where
    another machine writes the answers (rollout.engine = "vllm")."""
    update_sampler_every: int = Field(default=1, ge=1)
    """sdft with rollout.engine = "vllm" only: steps between updates of the server's weights. A resumed stage updates
    them at once, so above 1 it is not the uninterrupted one to the bit."""
    max_importance: float = Field(default=2.0, gt=1)
    """overlap or update_sampler_every only: cap on p(token now) / p(token when sampled). A token's ratio weighs the
    loss at the next position; with support = "sampled", at its own."""
    kl_weight: float = Field(default=0.5, ge=0)
    """sft_kl only: weight of the divergence from the last version on the rows to learn."""
    reinvoke_steps: int = Field(default=20, ge=1)
    """reinvoke only: this many last steps distil from the last version on general prompts."""
    skip_first_tokens: int = Field(default=0, ge=0)
    """Completion tokens at the start of each row that carry no loss (the paper's code: 3)."""
    sampling_temperature: float = Field(default=1.0, gt=0)
    """At which the student answers while it trains; 1 = as its probabilities are."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Of AdamW: reached by a linear warm-up, from there on a cosine down to a tenth."""
    warmup_steps: int = Field(default=5, ge=0)
    """Steps over which the learning rate rises to its value."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW, decoupled."""
    fsdp: bool = False
    """With several processes (torchrun, accelerate): masters, gradients and optimizer state are divided over them
    (FSDP2), not held by each."""
    fsdp_offload: bool = False
    """What is divided lies in the CPU's memory, and each layer comes to the GPU when it is its turn."""
    activation_checkpointing: bool = False
    """Activation checkpointing: less memory for a third more computation in the student's passes."""
    lora_rank: int = Field(default=0, ge=0)
    """Above 0 the stage trains low-rank adapters of this rank; they want a higher learning rate (about ten times)."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The adapters' product is scaled by alpha / rank (rslora: by alpha / sqrt(rank))."""
    lora_merge: bool = True
    """A version has whole weights, the adapters merged. Off: it keeps the adapters, on top of the version before it (a
    stack: small files, added up whenever it is loaded)."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get an adapter, such as q_proj; empty = every linear layer but the head."""
    lora_rslora: bool = False
    """The product is scaled by alpha / sqrt(rank), not by alpha / rank."""
    lora_dora: bool = False
    """Weight-decomposed adapters: direction by the product, magnitude learned beside."""
    lora_nf4: bool = False
    """The layers below the adapters lie in 4 bits while a stage trains (QLoRA; bitsandbytes), a quarter of bfloat16's
    memory. Versions are not rounded by it."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """A step's gradient is scaled down to this norm."""
    validation_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training rows that validate instead. Of the weights that they cannot tell from the best (by one
    standard error) the latest are kept."""
    validation_max: int = Field(default=32, ge=0)
    """At most so many validation rows; 0 = no validation."""
    validate_every: int = Field(default=20, ge=1)
    """Steps between validations; there is one at the end, too."""
    patience: int = Field(default=2, ge=1)
    """Validations without a better accuracy before the stage stops."""
    validate_until: float = Field(default=2.0, gt=0)
    """The stage ends when the accuracy on at least 16 validation rows reaches this; one more validation is taken when
    the student's mean probability of a demonstration token first reaches 0.98, or ``warm_start_until`` where that is
    less. Above 1 = never."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints, from which a stage that was stopped goes on."""
    max_length_change: float = Field(default=0.0, ge=0)
    """Share by which the mean length of the answers to the validation rows may move from where the stage began, up or
    down; weights beyond it are not kept, and the stage ends there. 0 = no limit."""

    @property
    def keeps_adapters(self) -> bool:
        """Whether a version is a stack: its adapter on the version before it."""
        return bool(self.lora_rank) and not self.lora_merge

    @property
    def never_samples(self) -> bool:
        """Whether every step of ``sdft`` is warm start."""
        return self.method == "sdft" and self.warm_start_steps >= self.steps

    @property
    def anchors_earlier(self) -> bool:
        """Whether a step has rows of earlier skills, once there are any."""
        return self.anchor_share > 0 and self.anchor_earlier_share > 0

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if problems := [*self.ignored(), *self._unsampled(), *self._without_rows()]:
            raise ValueError("; ".join(problems))
        return self

    def ignored(self) -> list[str]:
        """Settings that were changed and would have no effect: better said than silently accepted."""
        # 0 is what there is without them.
        changed = [name for name in self.changed() if name not in _OFF_AT_0 or getattr(self, name)]
        uses = (
            ("jsd_beta", "divergence", "generalized_jsd"),
            ("topk", "support", "teacher_topk"),
            ("fsdp_offload", "fsdp", True),
            ("teacher_update_rate", "teacher", "ema"),
            ("demonstration_weight", "method", "sdft"),
            ("on_policy_share", "method", "sdft"),
            ("overlap", "method", "sdft"),
            ("update_sampler_every", "method", "sdft"),
            ("kl_weight", "method", "sft_kl"),
            ("reinvoke_steps", "method", "reinvoke"),
        )
        found = [
            f'{name} has an effect only with {owner} = "{value}"'
            for name, owner, value in uses
            if name in changed and getattr(self, owner) not in (value, *((AUTO,) if value == "sdft" else ()))
        ]
        if not self.anchors_earlier:
            reason = "has an effect only with rows of earlier skills: anchor_share and anchor_earlier_share above 0"
            names = ("anchor_per_skill", "anchor_focus", "anchor_weight", "anchor_rehearsal")
            found += [f"{name} {reason}" for name in names if name in changed]
        elif self.method != AUTO and METHODS[self.method].earlier != "answers":
            found += [
                f'{name} {does} a divergence, which method = "{self.method}" does not take of these rows'
                for name, does in (("anchor_focus", "goes by"), ("anchor_weight", "weighs"))
                if name in changed
            ]
            if "anchor_rehearsal" in changed:
                found.append(f'method = "{self.method}" says what all of these rows carry: leave anchor_rehearsal out')
        if self.fsdp and self.lora_rank:
            found.append("fsdp divides full fine-tuning; with lora_rank the base is in use whole: leave it out")
        if "max_importance" in changed and not self.overlap and self.update_sampler_every == 1:
            found.append("max_importance has an effect only with overlap or update_sampler_every above 1")
        if self.never_samples:
            found += [f"{name} has an effect only after the warm start: set warm_start_steps below steps"
                      for name in ("on_policy_share", "sampling_temperature", "overlap", "update_sampler_every")
                      if name in changed]  # fmt: skip
        if self.max_length_change and not (self.validation_share and self.validation_max):
            found.append("max_length_change is measured on validation rows: set validation_share and validation_max")
        if self.overlap and self.lora_rank:
            found.append("overlap needs a working copy beside what trains; adapters train on it: leave one of them out")
        if self.lora_nf4 and self.lora_dora:
            found.append("lora_dora takes the norms of exact weights: leave it or lora_nf4 out")
        of_lora = ("lora_alpha", "lora_merge", "lora_targets", "lora_rslora", "lora_dora", "lora_nf4")
        return found + [f"{name} has an effect only with lora_rank above 0" for name in of_lora
                        if name in changed and not self.lora_rank]  # fmt: skip

    def _unsampled(self) -> list[str]:
        """``sampled`` is an estimate from the student's own samples; over any other tokens it is another loss."""
        if self.support != "sampled":
            return []
        wanted = {
            'method = "sdft"': self.method == "sdft",
            'divergence = "reverse_kl"': self.divergence == "reverse_kl",
            "warm_start_steps = 0": self.warm_start_steps == 0,
            "anchor_share = 0": self.anchor_share == 0,
            "sampling_temperature = 1": self.sampling_temperature == 1,
            "on_policy_share = 1": self.on_policy_share == 1,
            "demonstration_weight = 0": self.demonstration_weight == 0,
        }
        missing = [setting for setting, met in wanted.items() if not met]
        return [f'support = "sampled" needs the student\'s own samples: set {", ".join(missing)}'] if missing else []

    def _without_rows(self) -> list[str]:
        if self.method == "reinvoke" and self.reinvoke_steps >= self.steps:
            return [f"reinvoke_steps = {self.reinvoke_steps} of steps = {self.steps} leaves no step to learn in"]
        if round(self.batch_size * self.anchor_share) < self.batch_size:
            return []
        return [f"anchor_share = {self.anchor_share} of batch_size = {self.batch_size} leaves no row to learn from"]
