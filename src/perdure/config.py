"""Every setting, once. Unknown keys are errors; TOML in and out. A folder's ``perdure.toml`` holds one RunConfig."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from perdure.types import InputError

Section = TypeVar("Section", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """Which weights, and in which precision they compute."""

    source: str = "embedded"
    """``embedded``, a folder, a GGUF file or a hub id."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of decode, teacher and matrix products; ``auto`` measures once which is faster here. Masters are float32."""
    trust_remote_code: bool = False
    max_window: int = Field(4096, ge=32)
    """Longest prompt plus completion in tokens; never more than the model's own limit."""


class ContextConfig(_Section):
    """How the teacher sees the demonstration."""

    template: str = "auto"
    """``auto`` (measured by the preflight), ``inline``, ``inline_thinking``, ``turns:N``, ``document`` or ``jinja:FILE``."""
    candidates: tuple[str, ...] = ("inline", "turns:1", "turns:2", "turns:4")
    """What ``auto`` chooses from, with ``document`` added for skills whose rows carry one."""


class TrainConfig(_Section):
    """The distillation step and its schedule."""

    method: Literal["sdft", "sft"] = "sdft"
    divergence: Literal["forward_kl", "reverse_kl", "generalized_jsd"] = "forward_kl"
    """forward_kl = KL(teacher || student); reverse_kl = KL(student || teacher)."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """generalized_jsd only: the teacher's share of the mixture."""
    support: Literal["full", "teacher_topk", "sampled"] = "full"
    topk: int = Field(20, ge=1)
    """teacher_topk only; the rest of the vocabulary is one tail bucket."""
    teacher: Literal["frozen", "ema", "original", "live"] = "frozen"
    """frozen = the last promoted version, for the whole stage."""
    teacher_update_rate: float = Field(0.02, gt=0, le=1)
    """ema only: the student's share per step."""
    teacher_temperature: float = Field(0.5, gt=0)
    """Divides the teacher's logits on rows with a demonstration; below 1 sharpens."""
    steps: int = Field(60, ge=1)
    """At most this many optimizer steps a stage."""
    batch_size: int = Field(16, ge=1)
    """Rows a step, anchors included."""
    micro_batch_tokens: int = Field(4096, ge=64)
    """Most padded tokens in one forward pass."""
    anchor_share: float = Field(0.25, ge=0, lt=1)
    """Share of each batch without a demonstration: earlier skills' prompts and general ones."""
    anchor_earlier_share: float = Field(0.5, ge=0, le=1)
    """Of the anchors, the share from earlier skills (when there are any)."""
    warm_start_steps: int = Field(40, ge=0)
    """At most this many first steps score the demonstration's own tokens instead of sampling."""
    warm_start_until: float = Field(0.8, gt=0, le=1)
    """The warm start ends early when the student's mean probability of a demonstration token passes this."""
    skip_first_tokens: int = Field(0, ge=0)
    """Completion tokens at the start of each row that carry no loss (the paper's code: 3)."""
    sampling_temperature: float = Field(1.0, gt=0)
    learning_rate: float = Field(3e-5, gt=0)
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    validation_share: float = Field(0.1, ge=0, lt=1)
    validation_max: int = Field(32, ge=0)
    validate_every: int = Field(20, ge=1)
    patience: int = Field(2, ge=1)
    """Validations without a better accuracy before the stage stops."""
    checkpoint_every: int = Field(20, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.support == "sampled" and self.divergence != "reverse_kl":
            raise ValueError('support = "sampled" estimates the reverse KL only: set divergence = "reverse_kl"')
        return self


class PreflightConfig(_Section):
    rows: int = Field(32, ge=4)
    """Training rows on which student and teacher are compared."""
    min_gap: float = Field(0.1, ge=0, le=1)
    """Least difference of accuracy, teacher minus student, to train at all."""
    min_teacher_accuracy: float = Field(0.3, ge=0, le=1)


class EvalConfig(_Section):
    rows: int = Field(0, ge=0)
    """Test rows per skill, the first ones; 0 = all."""
    batch_tokens: int = Field(8192, ge=64)
    """Most prompt tokens in one batch of the decode."""


class ProbeConfig(_Section):
    """Prior capabilities, through lm-eval."""

    tasks: tuple[str, ...] = ("hellaswag", "arc_easy", "piqa", "boolq", "winogrande", "basic_skills")
    """Names of local tasks (data package) or of any lm-eval task where the hub is reachable; empty = no probe."""
    rows: int = Field(100, ge=1)
    """Items a task, sampled with the run's seed."""


class GateConfig(_Section):
    budget: float = Field(0.02, ge=0, le=1)
    """Accuracy that an earlier skill or a prior capability may lose."""
    significance: float = Field(0.05, gt=0, lt=1)


class RunConfig(_Section):
    """All of it."""

    seed: int = 0
    model: ModelConfig = ModelConfig()
    context: ContextConfig = ContextConfig()
    train: TrainConfig = TrainConfig()
    preflight: PreflightConfig = PreflightConfig()
    eval: EvalConfig = EvalConfig()
    probe: ProbeConfig = ProbeConfig()
    gate: GateConfig = GateConfig()


def load_config(path: Path) -> RunConfig:
    """Read a TOML file. Raises InputError naming the file and every wrong key."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    return parse(RunConfig, raw, where=str(path))


def parse(model: type[Section], raw: dict[str, Any], where: str) -> Section:
    """Validate ``raw`` as ``model``; one InputError that lists every problem with its key."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, item['loc'])) or '(whole)'}: {item['msg']}" for item in error.errors()]
        raise InputError(f"{where}: settings that cannot be used:\n" + "\n".join(problems)) from error


def to_toml(config: RunConfig) -> str:
    """The config as TOML text; ``load_config`` of it gives an equal config."""
    return tomli_w.dumps(config.model_dump(mode="json"))
