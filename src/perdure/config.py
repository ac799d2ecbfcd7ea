"""Every setting, once. Unknown keys are errors; TOML in and out. A folder's ``perdure.toml`` holds one RunConfig."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, model_validator

from perdure.methods import METHODS
from perdure.settings import SettingsSection, parse, parse_toml
from perdure.types import InputError


class ModelConfig(SettingsSection):
    """Which weights, and in which precision they compute."""

    source: str = "embedded"
    """``embedded``, a folder, a GGUF file or a hub id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes the GPU where torch sees one."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of decode, teacher and matrix products; ``auto`` measures once which is faster here. Masters are float32."""
    trust_remote_code: bool = False
    max_window: int = Field(default=4096, ge=32)
    """Longest prompt plus completion in tokens; never more than the model's own limit."""


class ContextConfig(SettingsSection):
    """How the teacher sees the demonstration."""

    template: str = "auto"
    """``auto`` (measured by the preflight), ``inline``, ``inline_thinking``, ``turns:N``, ``document``,
    ``document_turns:N`` (passage with the question in the first of N earlier turns) or ``jinja:FILE``."""
    candidates: tuple[str, ...] = ("inline", "turns:1", "turns:2", "turns:4")
    """What ``auto`` chooses from, with ``document`` and ``document_turns:2`` for skills whose rows carry one."""
    student_switches: dict[str, Any] = Field(default_factory=dict)
    """Variables that the model's chat template takes, for prompts without a demonstration and for demonstrations
    (``enable_thinking``, ``reasoning_effort``...)."""
    teacher_switches: dict[str, Any] = Field(default_factory=dict)
    """The same for the teacher's prompts. Where they make the two begin the answer differently, the run is refused."""

    @model_validator(mode="after")
    def _possible(self) -> ContextConfig:
        if self.template == "auto" and not self.candidates:
            raise ValueError('template = "auto" needs candidates to choose from')
        return self


class ThinkingConfig(SettingsSection):
    """Models that write their thinking before the answer (docs/method.md). Graders then see the answer alone."""

    enabled: bool = False
    open: str = Field(default="<think>", min_length=1)
    """The mark before the thinking, as the model writes it."""
    close: str = Field(default="</think>", min_length=1)
    loss: Literal["all", "thinking", "answer"] = "all"
    """Which part of a taught row's completion carries loss; the closing mark belongs to the thinking."""
    hesitations: tuple[str, ...] = ("wait", "hmm", "maybe", "perhaps", "alternatively", "let me check", "actually")
    """Words that are counted in the thinking, before and after: a teacher that knows the answer hesitates less, and a
    student that copies this loses what its accuracy rests on (arXiv 2603.24472)."""

    @model_validator(mode="after")
    def _used(self) -> ThinkingConfig:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if changed and not self.enabled:
            raise ValueError(f"{', '.join(changed)}: has an effect only with enabled = true")
        return self


class TrainConfig(SettingsSection):
    """The distillation step and its schedule."""

    method: Literal[
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
    """See ``methods.METHODS`` and docs/method.md."""
    divergence: Literal["forward_kl", "reverse_kl", "generalized_jsd"] = "forward_kl"
    """forward_kl = KL(teacher || student); reverse_kl = KL(student || teacher)."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """generalized_jsd only: the teacher's share of the mixture."""
    support: Literal["full", "teacher_topk", "sampled"] = "full"
    topk: int = Field(default=20, ge=1)
    """teacher_topk only; the rest of the vocabulary is one tail bucket."""
    teacher: Literal["frozen", "ema", "original", "live"] = "frozen"
    """frozen = the last promoted version, for the whole stage."""
    teacher_update_rate: float = Field(default=0.02, gt=0, le=1)
    """ema only: the student's share per step."""
    teacher_temperature: float = Field(default=0.5, gt=0)
    """Divides the teacher's logits on rows with a demonstration; below 1 sharpens."""
    steps: int = Field(default=60, ge=1)
    """At most this many optimizer steps a stage."""
    batch_size: int = Field(default=16, ge=1)
    """Rows a step, anchors included."""
    micro_batch_tokens: int = Field(default=4096, ge=64)
    """Most padded tokens in one forward pass."""
    anchor_share: float = Field(default=0.375, ge=0, lt=1)
    """Share of each batch without a demonstration: earlier skills' prompts and general ones."""
    anchor_earlier_share: float = Field(default=0.67, ge=0, le=1)
    """Of the anchors, the share from earlier skills; before there are any, these rows are demonstrations."""
    anchor_per_skill: float = Field(default=0.5, ge=0)
    """At least so many rows a step for each earlier skill; what that takes beyond their share is added to the batch."""
    anchor_focus: float = Field(default=0.5, ge=0, le=1)
    """Share of the earlier skills' rows that goes where the student has moved most; the rest is divided evenly."""
    anchor_rows: int = Field(default=64, ge=1)
    """At most this many prompts of each earlier skill are anchors; their answers are sampled once, before training."""
    anchor_weight: float = Field(default=1.0, gt=0)
    """Of the divergence on earlier skills' rows, against 1 for a row to learn and for general anchors."""
    anchor_general_tokens: int = Field(default=32, ge=1)
    """Longest answer to a general prompt, in tokens."""
    warm_start_steps: int = Field(default=40, ge=0)
    """At most this many first steps score the demonstration's own tokens instead of sampling."""
    warm_start_until: float = Field(default=0.98, gt=0, le=1)
    """The warm start ends early when the student's mean probability of a demonstration token passes this."""
    demonstration_weight: float = Field(default=0.0, ge=0, le=1)
    """sdft only: share of the demonstration's own token in the target, where the completion is the demonstration."""
    on_policy_share: float = Field(default=1.0, gt=0, le=1)
    """sdft only: share of the rows to learn that the student answers itself after the warm start; the others go on with
    the demonstration's own tokens."""
    overlap: bool = False
    """sdft only: the student answers the next step's rows while this step trains, one step behind, which pays where
    another machine writes the answers (rollout.engine = "vllm")."""
    max_importance: float = Field(default=2.0, gt=1)
    """overlap only: p(token) now over p(token) when it was sampled weighs its loss, up to this."""
    kl_weight: float = Field(default=0.5, ge=0)
    """sft_kl only: weight of the divergence from the last version on the rows to learn."""
    reinvoke_steps: int = Field(default=20, ge=1)
    """reinvoke only: this many last steps distil from the last version on general prompts."""
    skip_first_tokens: int = Field(default=0, ge=0)
    """Completion tokens at the start of each row that carry no loss (the paper's code: 3)."""
    sampling_temperature: float = Field(default=1.0, gt=0)
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup_steps: int = Field(default=5, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    fsdp: bool = False
    """With several processes (torchrun, accelerate): masters, gradients and optimizer state are divided over them
    (FSDP2), not held by each."""
    fsdp_offload: bool = False
    """What is divided lies in the CPU's memory, and each layer comes to the GPU when it is its turn."""
    activation_checkpointing: bool = False
    """Activation checkpointing: less memory for a third more computation in the student's passes."""
    lora_rank: int = Field(default=0, ge=0)
    """Above 0 the stage trains low-rank adapters of this rank, merged into full weights at its end; they want a higher
    learning rate (about ten times)."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The adapters' product is scaled by alpha / rank (rslora: by alpha / sqrt(rank))."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get an adapter, such as q_proj; empty = every linear layer but the head."""
    lora_rslora: bool = False
    lora_dora: bool = False
    """Weight-decomposed adapters: direction by the product, magnitude learned beside."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    validation_share: float = Field(default=0.1, ge=0, lt=1)
    validation_max: int = Field(default=32, ge=0)
    validate_every: int = Field(default=20, ge=1)
    patience: int = Field(default=2, ge=1)
    """Validations without a better accuracy before the stage stops."""
    checkpoint_every: int = Field(default=20, ge=1)
    max_length_change: float = Field(default=0.0, ge=0)
    """Share by which the mean length of the answers to the validation rows may move from where the stage began, up or
    down; weights beyond it are not kept, and the stage ends there. 0 = no limit."""

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if problems := [*self._ignored(), *self._unsampled(), *self._without_rows()]:
            raise ValueError("; ".join(problems))
        return self

    def _ignored(self) -> list[str]:
        """Settings that were changed and would have no effect: better said than silently accepted."""
        uses = (
            ("jsd_beta", "divergence", "generalized_jsd"),
            ("topk", "support", "teacher_topk"),
            ("fsdp_offload", "fsdp", True),
            ("teacher_update_rate", "teacher", "ema"),
            ("demonstration_weight", "method", "sdft"),
            ("on_policy_share", "method", "sdft"),
            ("overlap", "method", "sdft"),
            ("max_importance", "overlap", True),
            ("kl_weight", "method", "sft_kl"),
            ("reinvoke_steps", "method", "reinvoke"),
        )
        found = [
            f'{name} has an effect only with {owner} = "{value}"'
            for name, owner, value in uses
            if self._changed(name) and getattr(self, owner) != value
        ]
        if self.anchor_share == 0 or self.anchor_earlier_share == 0:
            reason = "has an effect only with rows of earlier skills: anchor_share and anchor_earlier_share above 0"
            found += [f"{name} {reason}" for name in ("anchor_per_skill", "anchor_focus", "anchor_weight")
                      if self._changed(name)]  # fmt: skip
        elif METHODS[self.method].earlier != "answers" and self._changed("anchor_focus"):
            found += [f'anchor_focus goes by a divergence, which method = "{self.method}" does not take of these rows']
        if self.fsdp and self.lora_rank:
            found.append("fsdp divides full fine-tuning; with lora_rank the base is in use whole: leave it out")
        if self.overlap and self.lora_rank:
            found.append("overlap needs a working copy beside what trains; adapters train on it: leave one of them out")
        of_lora = ("lora_alpha", "lora_targets", "lora_rslora", "lora_dora")
        return found + [f"{name} has an effect only with lora_rank above 0" for name in of_lora
                        if self._changed(name) and not self.lora_rank]  # fmt: skip

    def _changed(self, name: str) -> bool:
        return getattr(self, name) != type(self).model_fields[name].default

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
        }
        missing = [setting for setting, met in wanted.items() if not met]
        return [f'support = "sampled" needs the student\'s own samples: set {", ".join(missing)}'] if missing else []

    def _without_rows(self) -> list[str]:
        if self.method == "reinvoke" and self.reinvoke_steps >= self.steps:
            return [f"reinvoke_steps = {self.reinvoke_steps} of steps = {self.steps} leaves no step to learn in"]
        if round(self.batch_size * self.anchor_share) < self.batch_size:
            return []
        return [f"anchor_share = {self.anchor_share} of batch_size = {self.batch_size} leaves no row to learn from"]


class PreflightConfig(SettingsSection):
    rows: int = Field(default=32, ge=4)
    """Training rows on which student and teacher are compared."""
    min_gap: float = Field(default=0.1, ge=0, le=1)
    """Least difference of accuracy, teacher minus student, to train at all."""
    min_teacher_accuracy: float = Field(default=0.3, ge=0, le=1)
    forecast: bool = True
    """Times a few steps, answers and prior items to say what the stage will cost. Off: nothing is predicted."""


class RolloutConfig(SettingsSection):
    """Who writes the model's answers, in training and in evaluations of skills."""

    engine: Literal["own", "vllm"] = "own"
    """``vllm``: a running server (docs/scaling.md), for GPUs."""
    url: str = ""
    """Of the server, such as http://localhost:8000."""
    model: str = "perdure"
    """The name under which the server serves it."""
    weights_folder: str = ""
    """Where changed weights are handed over; both sides must see it. Empty: a temporary folder of this machine."""
    concurrency: int = Field(default=64, ge=1)
    """Requests under way at once."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that one request may take."""

    @model_validator(mode="after")
    def _used(self) -> RolloutConfig:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.engine == "own" and changed:
            raise ValueError(f'{", ".join(changed)}: has an effect only with engine = "vllm"')
        if self.engine == "vllm" and not self.url:
            raise ValueError('engine = "vllm" needs the url of a running server')
        return self


class EvalConfig(SettingsSection):
    rows: int = Field(default=0, ge=0)
    """Test rows per skill, the first ones; 0 = all."""
    batch_tokens: int = Field(default=8192, ge=64)
    """Most prompt tokens in one batch of the decode."""


class ProbeConfig(SettingsSection):
    """Prior capabilities, through lm-eval."""

    tasks: tuple[str, ...] = ("hellaswag", "arc_easy", "piqa", "boolq", "winogrande", "basic_skills")
    """Names of local tasks (data package) or of any lm-eval task where the hub is reachable; empty = no probe."""
    rows: int = Field(default=128, ge=1)
    """Items a task, sampled with the run's seed; six tasks of 128 can show a loss of 4 points over all of them."""


class GateConfig(SettingsSection):
    budget: float = Field(default=0.02, gt=0, lt=0.5)
    """Accuracy that an earlier skill may lose, against the champion and against its best ever; a skill's own
    ``retention_budget`` goes before it."""
    prior_budget: float = Field(default=0.02, gt=0, lt=0.5)
    """The same for each prior capability, and for all of them together."""
    enforce: bool = True
    """Off: the verdict is recorded, but the candidate is promoted all the same (research runs that compare methods)."""
    significance: float = Field(default=0.05, gt=0, lt=1)
    """Chance that a stage without any harm is refused."""
    power: float = Field(default=0.9, gt=0, lt=1)
    """Chance to find a loss of twice the budget; a comparison whose items give less is held."""
    repair: int = Field(default=4, ge=0, le=6)
    """Attempts to save a candidate that learned but hurt something: an earlier checkpoint of the stage, where there is
    one, three blends of its weights with its parent's (an evaluation each), then more anchors, then a smaller rate (a
    training each); 0 = none."""


class CostConfig(SettingsSection):
    """Prices with which seconds become energy and money; without them only seconds and tokens are recorded."""

    watts: float = Field(default=0.0, ge=0)
    """Power that the machine draws while it works, all devices together; 0 = not known."""
    price_per_hour: float = Field(default=0.0, ge=0)
    """Of the machine; 0 = not known."""
    currency: str = "EUR"


class RunConfig(SettingsSection):
    """All of it."""

    seed: int = 0
    model: ModelConfig = ModelConfig()
    context: ContextConfig = ContextConfig()
    thinking: ThinkingConfig = ThinkingConfig()
    train: TrainConfig = TrainConfig()
    preflight: PreflightConfig = PreflightConfig()
    rollout: RolloutConfig = RolloutConfig()
    eval: EvalConfig = EvalConfig()
    probe: ProbeConfig = ProbeConfig()
    gate: GateConfig = GateConfig()
    cost: CostConfig = CostConfig()


def load_config(path: Path) -> RunConfig:
    """Read a TOML file. Raises InputError naming the file and every wrong key."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return parse(RunConfig, parse_toml(data, path), where=str(path))


def to_toml(config: RunConfig) -> str:
    """The config as TOML text; ``load_config`` of it gives an equal config."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def with_settings(config: RunConfig, settings: list[str]) -> RunConfig:
    """``config`` with ``key.path=value`` applied; values are TOML, bare words count as text.

    Raises InputError naming the ``--set`` that cannot be used."""
    raw = config.model_dump(mode="json")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected key=value, such as train.steps=80")
        *path, last = key.strip().split(".")
        section = raw
        for part in path:
            section = section.get(part)
            if not isinstance(section, dict):
                raise InputError(f"--set {setting}: there is no section {part!r} (see perdure.toml)")
        section[last] = _toml_value(value)
    return parse(RunConfig, raw, where="--set")


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:  # a bare word, such as turns:4
        return text
