"""Every setting, once. Unknown keys are errors; TOML in and out. A folder's ``perdure.toml`` holds one RunConfig."""

from __future__ import annotations

import datetime
import textwrap
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import Field, model_validator

from perdure.settings import SettingsSection, parse, parse_toml
from perdure.train_config import TrainConfig
from perdure.types import InputError

Row = TypeVar("Row")


class ModelConfig(SettingsSection):
    """Which weights, and in which precision they compute."""

    source: str = "embedded"
    """``embedded``, a folder, a GGUF file or a hub id."""
    revision: str = ""
    """Of a hub id: branch, tag or commit; a commit pins weights and code. Empty: what the hub has now."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes the GPU where torch sees one."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of decode, teacher and matrix products; ``auto`` measures once which is faster here. Masters are float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models that you would run code from."""
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
    date: datetime.date = datetime.date(2026, 1, 1)
    """Today, for chat templates that print it: a prompt is the same tomorrow."""

    @model_validator(mode="after")
    def _possible(self) -> ContextConfig:
        if self.template == "auto" and not self.candidates:
            raise ValueError('template = "auto" needs candidates to choose from')
        return self


class ThinkingConfig(SettingsSection):
    """Models that write their thinking before the answer (docs/method.md). Graders then see the answer alone."""

    enabled: bool = False
    """The model writes its thinking between the two marks before it answers."""
    open: str = Field(default="<think>", min_length=1)
    """The mark before the thinking, as the model writes it."""
    close: str = Field(default="</think>", min_length=1)
    """The mark after it."""
    loss: Literal["all", "thinking", "answer"] = "all"
    """Which part of a taught row's completion carries loss; the closing mark belongs to the thinking."""
    hesitations: tuple[str, ...] = ("wait", "hmm", "maybe", "perhaps", "alternatively", "let me check", "actually")
    """Words that are counted in the thinking, before and after: a teacher that knows the answer hesitates less, and a
    student that copies this loses what its accuracy rests on (arXiv 2603.24472)."""

    @model_validator(mode="after")
    def _used(self) -> ThinkingConfig:
        if (changed := self.changed()) and not self.enabled:
            raise ValueError(f"{', '.join(changed)}: has an effect only with enabled = true")
        return self


class PreflightConfig(SettingsSection):
    """What is measured before a skill is trained, and what it takes to begin."""

    rows: int = Field(default=32, ge=4)
    """Training rows on which student and teacher are compared."""
    min_gap: float = Field(default=0.1, ge=0, le=1)
    """Least difference of accuracy, teacher minus student, to train at all."""
    min_teacher_accuracy: float = Field(default=0.3, ge=0, le=1)
    """Least accuracy of the teacher to train at all."""
    forecast: bool = True
    """Times a few steps, answers and prior items to say what the stage will cost. Off: nothing is predicted."""


class RolloutConfig(SettingsSection):
    """Who writes the model's answers, in training and in evaluations of skills."""

    engine: Literal["own", "vllm"] = "own"
    """``vllm``: for GPUs (docs/scaling.md)."""
    mode: Literal["server", "colocate"] = "server"
    """Of ``vllm``: a running server, or inside this process, on the device that trains."""
    url: str = ""
    """Of the server, such as http://localhost:8000."""
    model: str = "perdure"
    """The name under which the server serves it."""
    weights_folder: str = ""
    """Where changed weights are handed over; both sides must see it. Empty: a temporary folder of this machine."""
    concurrency: int = Field(default=64, ge=1)
    """Requests to the server under way at once."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that one request to the server may take."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of ``colocate``: what ``vllm.LLM`` takes beside what it is given, such as gpu_memory_utilization (0.3)."""

    @model_validator(mode="after")
    def _used(self) -> RolloutConfig:
        if (changed := self.changed()) and self.engine == "own":
            raise ValueError(f'{", ".join(changed)}: has an effect only with engine = "vllm"')
        other = {"server": {"options"}, "colocate": {"url", "model", "concurrency", "timeout"}}[self.mode]
        if idle := [name for name in changed if name in other]:
            raise ValueError(f'{", ".join(idle)}: has no effect with mode = "{self.mode}"')
        if self.engine == "vllm" and self.mode == "server" and not self.url:
            raise ValueError('engine = "vllm" needs the url of a running server, or mode = "colocate"')
        return self


class EvalConfig(SettingsSection):
    """How versions answer test rows."""

    rows: int = Field(default=0, ge=0)
    """Test rows per skill, the first ones; 0 = all."""
    batch_tokens: int = Field(default=8192, ge=64)
    """Most prompt tokens in one batch of the decode."""

    def taken(self, test: tuple[Row, ...]) -> tuple[Row, ...]:
        """Those of a skill's test rows that are answered."""
        return test[: self.rows or None]


class ProbeConfig(SettingsSection):
    """Prior capabilities, through lm-eval."""

    tasks: tuple[str, ...] = ("hellaswag", "arc_easy", "piqa", "boolq", "winogrande", "basic_skills")
    """Names of local tasks (data package) or of any lm-eval task where the hub is reachable; empty = no probe."""
    rows: int = Field(default=128, ge=1)
    """Items a task, sampled with the run's seed; six tasks of 128 can show a loss of 4 points over all of them."""


class GateConfig(SettingsSection):
    """What a candidate must keep to become the champion (docs/gate.md)."""

    budget: float = Field(default=0.02, gt=0, lt=0.5)
    """Accuracy that an earlier skill may lose, against the champion and against its best ever; a skill's own
    ``retention_budget`` goes before it."""
    prior_budget: float = Field(default=0.02, gt=0, lt=0.5)
    """The same for each prior capability, and for all of them together."""
    enforce: bool = True
    """Off: the verdict is recorded, but the candidate is promoted all the same (research runs that compare methods)."""
    significance: float = Field(default=0.05, gt=0, lt=1)
    """Chance that a stage without any harm is refused."""
    confidence: float = Field(default=0.9, gt=0, lt=1)
    """With which the items of an earlier skill, and of all prior tasks together, must show that less than twice the
    budget was lost; else the version is held."""
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
    """What stands beside amounts."""


class RunConfig(SettingsSection):
    """All of it."""

    seed: int = 0
    """Of every random choice."""
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

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.train.update_sampler_every > 1 and self.rollout.engine != "vllm":
            raise ValueError('train.update_sampler_every: the own engine is always in step; it is for engine = "vllm"')
        return self


def load_config(path: Path) -> RunConfig:
    """Read a TOML file. Raises InputError naming the file and every wrong key."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return parse(RunConfig, parse_toml(data, path), where=str(path))


def to_toml(config: RunConfig) -> str:
    """The config as TOML text, what each setting means above it; ``load_config`` of it gives an equal config."""
    fields, lines = type(config).model_fields, []
    for line in tomli_w.dumps(config.model_dump(mode="json")).splitlines():
        name = line.strip("[]") if line.startswith("[") else line.partition(" = ")[0]
        if line.startswith("["):
            section, _, table = name.partition(".")
            fields = type(getattr(config, section)).model_fields
            lines += _comment(fields[table].description if table else type(getattr(config, section)).__doc__)
            fields = {} if table else fields
        elif name in fields:
            lines += _comment(fields[name].description)
        lines.append(line)
    return "\n".join(lines) + "\n"


def _comment(said: str | None) -> list[str]:
    text = " ".join((said or "").replace("``", "`").split())
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")


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
        section[last] = toml_value(value)
    return parse(RunConfig, raw, where="--set")


def toml_value(text: str) -> Any:
    """A value as TOML has it; a bare word, such as turns:4, is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
