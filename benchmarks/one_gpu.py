"""SDFT and SFT steps of a large model on one device, with random weights: memory and seconds beside the arithmetic.

    python benchmarks/one_gpu.py --shape Qwen2.5-7B --lora-rank 32 [--steps 4] [--json FILE]

The shape is a published one, the weights are drawn here, so nothing is downloaded. Random weights end no answer and
follow no demonstration: every rollout has its full length and no drafted token is taken, which is the slowest that
decode can be. A stage's first step warms up and is not counted. The float32 masters of adapters, which take no part
in training and lie in the CPU's memory, are left out.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import finish, make_stage
from scaling import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

from perdure.adapters import adapted
from perdure.attention import enable
from perdure.config import ModelConfig, TrainConfig
from perdure.contexts import Renderer
from perdure.footprint import GIGA, Hardware, Shape, memory, parse_hardware, step_seconds, work_of
from perdure.importers.base import write_skill
from perdure.models import LoadedModel, device_of, linear_parameters, load_tokenizer, working_copy
from perdure.rollout.local import LocalEngine
from perdure.session import Session, make_engine
from perdure.sharding import recomputed
from perdure.skills.base import Skill, load_skill
from perdure.templates import parse_template
from perdure.train import loop

HEADS = {"SmolLM2-135M": 9, "Qwen2.5-1.5B": 12, "Qwen2.5-7B": 28, "Qwen2.5-14B": 40, "Qwen2.5-32B": 40}
TIED = {"SmolLM2-135M", "Qwen2.5-1.5B"}
TEMPLATE = "turns:2"
WORDS = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "inlet", "jetty")
TOKENS_A_WORD = 1.55
"""By the embedded model's tokenizer, rounded up: an answer must not be longer than ``--tokens``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-7B")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to try the script")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="of a prompt, about, and of an answer")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["sdft", "sft"])
    parser.add_argument("--hardware", default="H100-80GB")
    parser.add_argument("--tokenizer", default="embedded")
    parser.add_argument("--compare-replay", action="store_true", help="sdft once more, without recorded passes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    session, found = drawn(args.shape, args.layers, args.tokenizer, bool(args.lora_rank)), {}
    with tempfile.TemporaryDirectory() as folder:
        skill = rows(Path(folder) / "skill", args.tokens, args.batch)
        for name in [*args.methods, *(["sdft, no replay"] if args.compare_replay else [])]:
            method, _, plain = name.partition(", ")
            if plain and isinstance(session.engine, LocalEngine):
                session.engine.replays = None
            config = TrainConfig(
                method=method, lora_rank=args.lora_rank, batch_size=args.batch, steps=args.steps, anchor_share=0,
                warm_start_steps=0, activation_checkpointing=True, micro_batch_tokens=args.micro_batch_tokens,
                teacher="frozen", checkpoint_every=10**6,
            )  # fmt: skip
            found[name] = measured(session, skill, config, Path(folder) / name)
            found[name] |= predicted(session, skill, config, parse_hardware(args.hardware))
            print(name, found[name], flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if session.working.device.type == "cuda" else "cpu"
    finish({"shape": args.shape, "lora_rank": args.lora_rank, "device": device, "methods": found}, args.json)


def drawn(name: str, layers: int | None, tokenizer: str, adapters: bool) -> Session:
    """A session of the shape with random weights; with adapters the working copy is all there is."""
    config, shape = ModelConfig(source=tokenizer), SHAPES[name]
    settings = AutoConfig.for_model(
        "qwen2", hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=layers or shape.layers,
        num_attention_heads=HEADS[name], num_key_value_heads=shape.keys * HEADS[name] // shape.hidden,
        vocab_size=shape.vocabulary, tie_word_embeddings=name in TIED, max_position_embeddings=32768,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device_of(config)):
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    if not enable(model):
        raise SystemExit(f"{name} does not run packed here")
    working = working_copy(model, torch.bfloat16)
    reader = load_tokenizer(config)
    loaded = LoadedModel(working if adapters else model, reader, (reader.eos_token_id,), 4096)
    del model
    engine = make_engine(loaded, working, 65536)
    return Session(loaded, working, engine, Renderer(reader, loaded.end_ids, loaded.window), torch.bfloat16)


def rows(folder: Path, tokens: int, count: int) -> Skill:
    """A skill of random words: prompts and answers of equal length."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(round(tokens / TOKENS_A_WORD)))

    train, test = ([{"id": f"{part}{i}", "prompt": f"{part} {text()}", "completion": text()} for i in range(number)]
                   for part, number in (("train", 2 * count), ("test", 4)))  # fmt: skip
    settings = {"name": "words", "grader": "exact", "max_new_tokens": tokens}
    return load_skill(write_skill(folder, settings, train, test))


def measured(session: Session, skill: Skill, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Median seconds by part, tokens a step, and peak memory in GB, of the steps after the first."""
    lines: list[dict[str, Any]] = []
    stage = make_stage(session, skill, config, folder)
    on_gpu = session.working.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with (
        adapted(session.loaded.model, session.working, config, 0, merge=False) as model,
        recomputed(model, True),
    ):
        loop(replace(stage, student=replace(stage.student, model=model)), config,
             lambda line, timings: lines.append(timings | {"loss_tokens": line["loss_tokens"]}))  # fmt: skip
    seconds = [line["seconds"] for line in lines[1:]]
    return {
        "seconds": {part: statistics.median(step[part] for step in seconds) for part in seconds[0]},
        "seconds_a_step": statistics.median(sum(step.values()) for step in seconds),
        "loss_tokens": statistics.median(line["loss_tokens"] for line in lines),
        "peak_gb": torch.cuda.max_memory_allocated() / GIGA if on_gpu else None,
        "reserved_gb": torch.cuda.max_memory_reserved() / GIGA if on_gpu else None,
    }


def predicted(session: Session, skill: Skill, config: TrainConfig, hardware: Hardware) -> dict[str, Any]:
    """The same by the arithmetic of ``perdure check --hardware``."""
    text = session.working.config
    width = text.hidden_size // text.num_attention_heads
    weights, keys = sum(p.numel() for p in session.working.parameters()), width * text.num_key_value_heads
    shape = Shape(weights, linear_parameters(session.working), text.num_hidden_layers, text.hidden_size,
                  text.intermediate_size, keys, text.vocab_size)  # fmt: skip
    work = work_of(session.renderer, skill.train, [parse_template(TEMPLATE)], config)
    parts = memory(shape, work, config)
    return {
        "predicted_gb": {part: round(size / GIGA, 2) for part, size in parts.items()},
        "predicted_peak_gb": round(sum(parts.values()) / GIGA, 2),
        "predicted_seconds": step_seconds(shape, work, config, hardware),
        "tokens": {"prompt": work.prompt, "completion": work.completion, "teacher_prompt": work.teacher_prompt},
    }


if __name__ == "__main__":
    main()
