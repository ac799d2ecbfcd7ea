"""What a stage needs on a machine, by arithmetic from the model's configuration alone: nothing is loaded.

Full weights cost, in bytes each: masters 4, gradients 4, AdamW 8, the working copy for decode 2 in bfloat16, as much
again for what mixed precision casts and for a teacher that does not move (an EMA teacher keeps 4 more). Adapters train
on the working copy, which is their frozen teacher, too; the masters then lie in the CPU's memory or, where the CPU is
the device, in a file. Several devices, one process each, share the rows of a step; ``train.fsdp`` divides masters,
gradients, optimizer and an EMA teacher's averages over them, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perdure.config import ModelConfig, RolloutConfig, TrainConfig
from perdure.contexts import Renderer
from perdure.fused import CHUNK_ELEMENTS
from perdure.hub import load_options
from perdure.methods import METHODS
from perdure.models import linear_parameters, load_tokenizer, resolve
from perdure.nf4 import NF4_BYTES
from perdure.rollout.vllm_colocated import DEFAULTS, ONE_PROCESS
from perdure.templates import Template
from perdure.types import Example, InputError

GIGA = 1e9
FREE = 0.1
"""Share of a device's memory that is left for fragments and what is not counted."""
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6
"""Shares of the data sheet's dense bfloat16 peak and memory bandwidth that well-kept trainers reach."""


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind; memory in bytes, dense bfloat16 operations and bytes of memory a second, each of one."""

    name: str
    devices: int
    memory: float
    peak: float
    bandwidth: float


DEVICES: dict[str, tuple[float, float, float]] = {
    "H200-141GB": (141e9, 989e12, 4.8e12),
    "H100-80GB": (80e9, 989e12, 3.35e12),
    "A100-80GB": (80e9, 312e12, 2.04e12),
    "A100-40GB": (40e9, 312e12, 1.56e12),
    "L40S-48GB": (48e9, 362e12, 0.864e12),
    "A10-24GB": (24e9, 125e12, 0.6e12),
    "RTX4090-24GB": (24e9, 165e12, 1.01e12),
}
"""Name -> memory, peak, bandwidth, from the makers' data sheets."""


@dataclass(frozen=True)
class Shape:
    """A decoder in numbers."""

    weights: int
    linear: int
    """Weights of matrices that every token goes through, the head left out."""
    layers: int
    hidden: int
    mlp: int
    keys: int
    """Width of the keys of all heads (and of the values)."""
    vocabulary: int


@dataclass(frozen=True)
class Work:
    """Tokens of a step: rows, and mean lengths."""

    rows: int
    prompt: float
    completion: float
    teacher_prompt: float
    batch_tokens: int = 65536
    """Most tokens whose keys and values are held at once while answers are written (``eval.batch_tokens``)."""


def parse_hardware(text: str) -> Hardware:
    """``8xH100-80GB`` or ``H100-80GB``. Raises InputError naming the known devices."""
    found = re.fullmatch(r"(?:(\d+)x)?([\w-]+)", text)
    if not found or found[2] not in DEVICES or found[1] == "0":
        raise InputError(f"--hardware {text}: expected NUMBERxDEVICE with a device of {', '.join(DEVICES)}")
    return Hardware(text, int(found[1] or 1), *DEVICES[found[2]])


def shape_of(config: ModelConfig) -> Shape:
    """From the configuration file; the weights stay where they are. Raises InputError when there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source, options = resolve(config), load_options(config)
    try:
        settings = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source}: has no configuration of a language model: {error}") from error
    text = settings.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(sum(p.numel() for p in model.parameters()), linear_parameters(model), text.num_hidden_layers,
                 text.hidden_size, text.intermediate_size, heads * width, text.vocab_size)  # fmt: skip


def lengths_renderer(config: ModelConfig) -> Renderer:
    """A renderer that only counts: the tokenizer without the model."""
    tokenizer = load_tokenizer(config)
    return Renderer(tokenizer, (tokenizer.eos_token_id,), config.max_window)


def work_of(renderer: Renderer, examples: Sequence[Example], templates: Sequence[Template],
            train: TrainConfig, batch_tokens: int = 65536) -> Work:  # fmt: skip
    """Mean lengths of the rows, rendered as training renders them; of several templates the longest counts."""
    turns = renderer.each_turn(examples)
    rows = train.batch_size * len(turns) // len(examples)
    prompts = [len(renderer.student_prompt(e).token_ids) for e in turns]
    answers = [len(renderer.demonstration(e).token_ids) for e in turns]
    teachers = [0.0]
    if METHODS[train.method].shows:
        teachers = _teacher_lengths(renderer, turns, templates)
    prompt, answer = (sum(lengths) / len(lengths) for lengths in (prompts, answers))
    return Work(rows, prompt, answer, max(teachers), batch_tokens)


def _teacher_lengths(renderer: Renderer, turns: Sequence[Example], templates: Sequence[Template]) -> list[float]:
    """Mean length of the teacher's prompts by each template that can show these rows. Raises InputError where none
    can."""
    lengths, why = [], None
    for template in templates:
        try:
            lengths.append(sum(len(renderer.teacher_prompt(e, template).token_ids) for e in turns) / len(turns))
        except InputError as error:  # one that cannot, the preflight leaves out as well
            why = error
    if why and not lengths:
        raise why
    return lengths


def share_of_vllm(rollout: RolloutConfig) -> float | None:
    """The share of a device's memory that a colocated vLLM takes for itself, 0 for a server, which is elsewhere; None
    where the own decode writes the answers. Raises InputError for a share that is none."""
    if rollout.engine == "own":
        return None
    share = (DEFAULTS | rollout.options)["gpu_memory_utilization"] if rollout.mode == "colocate" else 0.0
    if not isinstance(share, int | float):
        raise InputError(f"rollout.options.gpu_memory_utilization = {share!r}: a share of the memory, 0 to 1")
    return share


def memory(shape: Shape, work: Work, train: TrainConfig, width: int = 2, devices: int = 1,
           vllm: float | None = None) -> dict[str, float]:  # fmt: skip
    """Bytes by part on each of ``devices`` while a stage trains. ``width``: bytes of a number in the compute dtype;
    ``vllm``: bytes that a vLLM has there, which then writes the answers."""
    rows, parts_of_student = -(-work.rows // devices), devices if train.fsdp else 1
    trained = shape.weights if not train.lora_rank else adapter_weights(shape, train.lora_rank)
    length = work.prompt + work.completion
    tokens = min(train.micro_batch_tokens, rows * length)
    of_layer = 6 * shape.hidden + 2 * shape.keys + 3 * shape.mlp
    kept = shape.layers * of_layer
    if train.activation_checkpointing:  # each layer's input, and one layer whole while it is computed again
        kept = shape.layers * shape.hidden + of_layer
    method = METHODS[train.method]
    teachers = {"frozen": width, "original": width, "ema": width + 4 / parts_of_student, "live": 0}
    if train.lora_rank:
        teachers["frozen"] = 0
    kind = train.teacher if method.shows else "frozen"
    a_teacher = teachers[kind] if method.scored(train.anchor_share > 0) else 0
    if method.shows and train.teacher != "frozen" and train.anchor_share > 0 and not train.lora_rank:
        a_teacher += width  # anchor rows are scored by the weights that the stage starts from, another copy
    whole = 0 if train.lora_rank else 4 * shape.vocabulary * shape.hidden  # the head's gradient before it is added
    parts = {
        "masters": 4 * shape.weights / parts_of_student if not train.lora_rank else 0,
        "adapters": 4 * trained if train.lora_rank else 0,
        "gradients": 4 * trained / parts_of_student,
        "optimizer": 8 * trained / parts_of_student,
        "working copy": width * shape.weights - ((width - NF4_BYTES) * shape.linear if train.lora_nf4 else 0),
        "weights as mixed precision casts them": 0 if train.lora_rank else _cast(shape, width, parts_of_student),
        "teacher": a_teacher * shape.weights,
        "activations": width * kept * tokens,
        "loss": 2 * width * CHUNK_ELEMENTS + whole,
        "keys and values": 2 * width * shape.keys * shape.layers * min(rows * length, max(length, work.batch_tokens)),
    }
    if train.fsdp_offload and devices > 1:  # in the CPUs' memory
        parts |= dict.fromkeys(("masters", "gradients", "optimizer"), 0)
    if vllm is not None:
        del parts["keys and values"]
        parts["vLLM"] = vllm
    return {part: float(size) for part, size in parts.items() if size}


def _cast(shape: Shape, width: int, parts_of_student: int) -> float:
    """What a step's weights take in the compute dtype: all of them, or, divided, embedding, head and two layers."""
    if parts_of_student > 1:
        return width * (2 * shape.vocabulary * shape.hidden + 2 * shape.linear / shape.layers)
    return 2 * shape.linear if width == 2 else 0


def adapter_weights(shape: Shape, rank: int) -> int:
    """Of adapters on every linear layer of a gated decoder: four of attention, three of the MLP."""
    attention = 4 * shape.hidden + 2 * (shape.hidden + shape.keys)  # query and output; key and value
    return rank * shape.layers * (attention + 3 * (shape.hidden + shape.mlp))


def step_seconds(shape: Shape, work: Work, train: TrainConfig, hardware: Hardware) -> dict[str, float]:
    """Seconds of an on-policy step by part, without communication, attention scores and the optimizer.

    ``rollout`` is the worst case, no drafted token taken: every token reads all weights once."""
    head = shape.hidden * shape.vocabulary
    rate = OF_PEAK * hardware.peak * hardware.devices
    taught = work.rows * (1 - train.anchor_share)
    student, learned = work.rows * (work.prompt + work.completion), work.rows * work.completion
    backward = 4 if not train.lora_rank else 2  # adapters spare the gradients of the weights
    if train.activation_checkpointing:
        backward += 2  # the layers' forward pass once more
    method = METHODS[train.method]
    parts = {"student": ((2 + backward) * shape.linear * student + 6 * head * learned) / rate}
    if method.shows:
        read = taught * (work.teacher_prompt + work.completion)
        parts["teacher"] = (2 * shape.linear * read + 2 * head * learned) / rate
    if method.completions == "student":
        a_pass = 2 * (shape.linear + head) / (OF_BANDWIDTH * hardware.bandwidth)
        parts["rollout"] = 2 * shape.linear * taught * work.prompt / rate + work.completion * a_pass
    return parts


def _least(shape: Shape, work: Work, train: TrainConfig, room: float, vllm: float | None) -> int | None:
    """The least number of devices that would do; None where no number does."""
    counts = (1,) if vllm else (*range(1, 65), 128, 256, 512, 1024)  # a colocated vLLM is for one process
    return next((count for count in counts
                 if sum(memory(shape, work, train, devices=count, vllm=vllm).values()) <= room), None)  # fmt: skip


def estimate(shape: Shape, work: Work, train: TrainConfig, hardware: Hardware,
             share: float | None = None) -> dict[str, Any]:  # fmt: skip
    """All of it as ``perdure check --hardware --json`` prints it; ``share``: see ``share_of_vllm``. Raises InputError
    for a colocated vLLM on several devices."""
    if share and hardware.devices > 1:
        raise InputError(ONE_PROCESS)
    vllm = None if share is None else share * hardware.memory
    parts = memory(shape, work, train, devices=hardware.devices, vllm=vllm)
    room, needed = hardware.memory * (1 - FREE), sum(parts.values())
    return {
        "hardware": hardware.name,
        "memory_gb": {part: round(size / GIGA, 2) for part, size in parts.items()},
        "needed_gb": round(needed / GIGA, 1),
        "room_gb": round(room / GIGA, 1),
        "fits": needed <= room,
        "devices_needed": _least(shape, work, train, room, vllm),
        "step_seconds": {part: round(value, 4) for part, value in step_seconds(shape, work, train, hardware).items()},
        "weights": shape.weights,
        "rows": work.rows,
        "tokens": {"prompt": round(work.prompt, 1), "completion": round(work.completion, 1),
                   "teacher_prompt": round(work.teacher_prompt, 1)},
    }  # fmt: skip
