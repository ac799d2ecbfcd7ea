"""Times some steps of TRL's SDFTTrainer; runs in TRL's own environment, called by vs_trl.py.

    python benchmarks/trl_steps.py MODEL_FOLDER ROWS.jsonl SETTINGS_JSON

A row holds the rendered prompt of the student, and what follows it in the teacher's. TRL at its best: no gradient
checkpointing, one generation, no importance weights. Prints one JSON object: seconds and completion tokens of each
step, seconds by part, peak resident memory.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import logging

warnings.filterwarnings("ignore")  # TRL says at import that its trainer is experimental
from trl.experimental.sdft import SDFTConfig, SDFTTrainer  # noqa: E402

logging.set_verbosity_error()


class Timer(TrainerCallback):
    """Wall-clock of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.parts: list[dict[str, float]] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start = time.perf_counter()

    def part(self, name: str, seconds: float) -> None:
        if len(self.parts) == len(self.steps):
            self.parts.append({})
        self.parts[-1][name] = self.parts[-1].get(name, 0.0) + seconds

    def on_step_end(self, *args, **kwargs) -> None:
        self.steps.append(time.perf_counter() - self.start)

    def wrap(self, owner, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.part(part, time.perf_counter() - start)

        setattr(owner, name, timed)


def main() -> None:
    folder, rows_path, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    rows = [json.loads(line) for line in rows_path.read_text(encoding="utf-8").splitlines()]
    dtype = settings["weights"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", truncation_side="left")
    timer, tokens = Timer(), []
    with tempfile.TemporaryDirectory() as out:
        args = SDFTConfig(
            output_dir=out, max_steps=settings["steps"], per_device_train_batch_size=settings["batch"],
            gradient_accumulation_steps=1, num_generations=1, max_completion_length=settings["max_new_tokens"],
            max_prompt_length=None, distillation_mode="full_logits", distillation_alpha=0.0, distillation_is_clip=None,
            teacher_model_kind="base", teacher_prompt_template="{prompt}{privileged_context}", temperature=1.0,
            gradient_checkpointing=False, bf16=settings["autocast"], use_cpu=True, learning_rate=1e-9,
            lr_scheduler_type="constant", max_grad_norm=1.0, report_to="none", save_strategy="no", logging_steps=10**9,
            disable_tqdm=True, shuffle_dataset=False, seed=0, model_init_kwargs={"dtype": dtype},
        )  # fmt: skip
        trainer = SDFTTrainer(folder, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                              callbacks=[timer])  # fmt: skip
        timer.wrap(trainer, "_generate", "rollout")
        timer.wrap(trainer, "_prepare_inputs", "prepare")
        timer.wrap(trainer, "compute_loss", "forward_and_loss")
        prepared = trainer._prepare_training_batch

        def counted(inputs):
            batch = prepared(inputs)
            tokens.append(int(batch["completion_mask"].sum()))
            return batch

        trainer._prepare_training_batch = counted
        trainer.train()
    print(json.dumps({
        "seconds": timer.steps, "tokens": tokens,
        "parts": {part: statistics.median(step[part] for step in timer.parts[1:]) for part in timer.parts[0]},
        "peak_rss_mb": peak_rss_mb(), "threads": torch.get_num_threads(),
    }))  # fmt: skip


def peak_rss_mb() -> float:
    """Of this program alone: ru_maxrss would also count what its parent held when it forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
