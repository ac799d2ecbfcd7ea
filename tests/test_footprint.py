"""Memory and time by arithmetic: against a hand's sums, against the real shape, and against a real process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes import save_tiny_model, toy_examples, toy_skill
from perdure.config import ModelConfig, RolloutConfig, RunConfig, TrainConfig
from perdure.footprint import (
    DEVICES,
    Shape,
    Work,
    adapter_weights,
    estimate,
    lengths_renderer,
    memory,
    parse_hardware,
    shape_of,
    share_of_vllm,
    step_seconds,
    work_of,
)
from perdure.models import compute_dtype, linear_parameters, load
from perdure.settings import parse
from perdure.skills.base import load_skill
from perdure.stages import create_workspace
from perdure.templates import parse_template
from perdure.types import InputError
from test_cli import assert_refused, perdure

SHAPE = Shape(weights=1000, linear=800, layers=2, hidden=8, mlp=16, keys=4, vocabulary=20)
WORK = Work(rows=4, prompt=10, completion=5, teacher_prompt=30)


def test_hardware_is_number_times_device() -> None:
    found = parse_hardware("8xH100-80GB")
    assert (found.devices, found.memory, found.name) == (8, DEVICES["H100-80GB"][0], "8xH100-80GB")
    assert parse_hardware("A100-40GB").devices == 1
    for wrong in ("0xH100-80GB", "8xH1000", "H100-80GB x 8", ""):
        with pytest.raises(InputError, match="NUMBERxDEVICE"):
            parse_hardware(wrong)


def test_memory_by_hand() -> None:
    train = TrainConfig(anchor_share=0)
    found = memory(SHAPE, WORK, train)
    expected = {"masters": 4000, "gradients": 4000, "optimizer": 8000, "working copy": 2000, "teacher": 2000,
                "weights as mixed precision casts them": 1600, "activations": 2 * (48 + 8 + 48) * 2 * 60,
                "keys and values": 2 * 2 * 4 * 2 * 60}  # fmt: skip
    assert {part: found[part] for part in expected} == expected
    assert found.keys() - expected.keys() == {"loss"}
    assert memory(SHAPE, WORK, train, width=4)["working copy"] == 4000


def test_what_methods_and_teachers_change() -> None:
    def of(**options: object) -> float:
        return memory(SHAPE, WORK, TrainConfig(**options)).get("teacher", 0)  # type: ignore[arg-type]

    kinds = ("frozen", "original", "ema", "live")
    assert [of(teacher=kind, anchor_share=0) for kind in kinds] == [2000, 2000, 6000, 0]
    assert [of(teacher=kind) for kind in kinds] == [2000, 4000, 8000, 2000]  # anchors are held by the start
    assert of(method="sft") == 2000 and of(method="sft", anchor_share=0) == 0  # the anchors ask a teacher
    assert of(method="sft_kl", anchor_share=0) == 2000
    adapters = memory(SHAPE, WORK, TrainConfig(lora_rank=2, teacher="frozen"))
    assert of(lora_rank=2) == 2000  # the original model is another copy, the start is the base without its adapters
    few = adapter_weights(SHAPE, 2)
    assert few == 2 * 2 * (4 * 8 + 2 * 12 + 3 * 24)
    assert adapters["gradients"] == adapters["adapters"] == 4 * few and "masters" not in adapters
    assert "teacher" not in adapters and "weights as mixed precision casts them" not in adapters
    assert memory(SHAPE, WORK, TrainConfig(lora_rank=2, teacher="ema"))["teacher"] == 6000


def test_seconds_by_hand() -> None:
    hardware = replace(parse_hardware("2xH100-80GB"), peak=1e6, bandwidth=1e5)
    found = step_seconds(SHAPE, WORK, TrainConfig(anchor_share=0), hardware)
    rate = 2 * 0.4 * 1e6
    assert found["student"] == pytest.approx((6 * 800 * 60 + 6 * 160 * 20) / rate)
    assert found["teacher"] == pytest.approx((2 * 800 * 4 * 35 + 2 * 160 * 20) / rate)
    assert found["rollout"] == pytest.approx(2 * 800 * 4 * 10 / rate + 5 * 2 * 960 / 6e4)
    assert step_seconds(SHAPE, WORK, TrainConfig(method="sft"), hardware).keys() == {"student"}
    again = step_seconds(SHAPE, WORK, TrainConfig(anchor_share=0, activation_checkpointing=True), hardware)
    assert again["student"] - found["student"] == pytest.approx(2 * 800 * 60 / rate)


def test_the_shape_is_that_of_the_model_and_no_weights_are_read(tmp_path: Path) -> None:
    config = ModelConfig(source=str(save_tiny_model(tmp_path / "model")))
    model = load(config).model
    (tmp_path / "model" / "model.safetensors").unlink()
    found = shape_of(config)
    assert (found.weights, found.linear) == (sum(p.numel() for p in model.parameters()), linear_parameters(model))
    assert (found.layers, found.hidden, found.mlp, found.keys) == (2, 32, 64, 16)
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no configuration"):
        shape_of(config)


def test_lengths_are_those_of_the_rendered_rows(tmp_path: Path) -> None:
    config, rows = ModelConfig(source=str(save_tiny_model(tmp_path / "model"))), toy_examples(tmp_path)
    renderer = lengths_renderer(config)
    templates = [parse_template(name) for name in ("turns:1", "turns:3")]
    found = work_of(renderer, rows, templates, TrainConfig())
    assert found.prompt == sum(len(renderer.student_prompt(e).token_ids) for e in rows) / len(rows)
    assert found.teacher_prompt == sum(len(renderer.teacher_prompt(e, templates[1]).token_ids) for e in rows) / len(
        rows
    )
    assert work_of(renderer, rows, templates, TrainConfig(method="sft")).teacher_prompt == 0


def test_a_template_that_cannot_show_the_rows_is_left_out(tmp_path: Path) -> None:
    """In-line needs a prompt that ends with the user; the preflight leaves it out as well."""
    config = ModelConfig(source=str(save_tiny_model(tmp_path / "model")))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [replace(row, messages=(*row.messages, call, {"role": "tool", "content": "4"}))
            for row in toy_examples(tmp_path)]  # fmt: skip
    inline, turns = parse_template("inline"), parse_template("turns:1")
    renderer, train = lengths_renderer(config), TrainConfig()
    assert work_of(renderer, rows, [inline, turns], train) == work_of(renderer, rows, [turns], train)
    with pytest.raises(InputError, match="turns:N"):
        work_of(renderer, rows, [inline], train)


def test_the_command_says_whether_it_fits(tmp_path: Path) -> None:
    model, skill = save_tiny_model(tmp_path / "model"), toy_skill(tmp_path / "colours")
    config = parse(RunConfig, {"model": {"source": str(model)}, "context": {"template": "turns:1"}}, "test")
    create_workspace(tmp_path / "bot", config)
    done = perdure("check", skill, "-w", tmp_path / "bot", "--hardware", "1xA10-24GB")
    assert done.returncode == 0 and "Fits into 22 GB" in done.stdout, done.stderr
    assert_refused(("check", skill, "-w", tmp_path / "bot", "--hardware", "abacus"), "NUMBERxDEVICE")
    big = estimate(replace(SHAPE, weights=int(7e9)), WORK, TrainConfig(), parse_hardware("1xA10-24GB"))
    assert not big["fits"] and big["devices_needed"] is None  # more devices hold no less each
    divided = estimate(
        replace(SHAPE, weights=int(3e9)), WORK, TrainConfig(fsdp=True, teacher="frozen"), parse_hardware("1xA10-24GB")
    )
    assert divided["devices_needed"] == 6  # 16 bytes a weight divided, 4 not: 48 / n + 12 GB must fit into 21.6


def test_a_vllm_on_the_same_device_takes_its_share() -> None:
    """And holds the keys and values; a server is elsewhere, and on several devices each process would need one."""
    hardware = parse_hardware("1xH100-80GB")

    def found(**rollout: Any) -> dict[str, Any]:
        return estimate(SHAPE, WORK, TrainConfig(), hardware, share_of_vllm(RolloutConfig(**rollout)))

    own, server = found(), found(engine="vllm", url="http://localhost:8000")
    third, half = (found(engine="vllm", mode="colocate", options=options)
                   for options in ({}, {"gpu_memory_utilization": 0.5}))  # fmt: skip
    assert "vLLM" not in own["memory_gb"] and "vLLM" not in server["memory_gb"]
    assert server["memory_gb"] == {k: v for k, v in own["memory_gb"].items() if k != "keys and values"}
    assert third["memory_gb"] == server["memory_gb"] | {"vLLM": 24.0}
    assert (half["memory_gb"]["vLLM"], third["fits"], third["devices_needed"]) == (40.0, True, 1)
    full = found(engine="vllm", mode="colocate", options={"gpu_memory_utilization": 0.95})
    assert not full["fits"] and full["devices_needed"] is None
    with pytest.raises(InputError, match="is for one process"):
        estimate(SHAPE, WORK, TrainConfig(), parse_hardware("2xH100-80GB"), 0.3)
    with pytest.raises(InputError, match="gpu_memory_utilization = 'much'"):
        found(engine="vllm", mode="colocate", options={"gpu_memory_utilization": "much"})


def test_what_is_divided_and_what_is_not() -> None:
    alone, four = (memory(SHAPE, WORK, TrainConfig(fsdp=True), devices=n) for n in (1, 4))
    for part in ("masters", "gradients", "optimizer", "keys and values"):
        assert four[part] == alone[part] / 4
    for part in ("working copy", "teacher"):
        assert four[part] == alone[part]
    assert four["weights as mixed precision casts them"] == 2 * (2 * 20 * 8 + 800)
    away = memory(SHAPE, WORK, TrainConfig(fsdp=True, fsdp_offload=True), devices=4)
    assert four.keys() - away.keys() == {"masters", "gradients", "optimizer"} and away.items() < four.items()
    apart = memory(SHAPE, WORK, TrainConfig(), devices=4)
    assert apart["masters"] == alone["masters"] and apart["activations"] == alone["activations"] / 4
    ema = memory(SHAPE, WORK, TrainConfig(fsdp=True, teacher="ema", anchor_share=0), devices=4)
    assert ema["teacher"] == (2 + 4 / 4) * 1000


def test_in_four_bits_the_layers_below_adapters_take_nine_sixteenths_of_a_byte_a_weight() -> None:
    plain, found = (memory(SHAPE, WORK, TrainConfig(lora_rank=2, lora_nf4=nf4)) for nf4 in (False, True))
    assert found["working copy"] == 800 * 4.5 / 8 + 2 * 200
    assert {**found, "working copy": plain["working copy"]} == plain


def test_activation_checkpointing_keeps_a_layers_input() -> None:
    found = memory(SHAPE, WORK, TrainConfig(activation_checkpointing=True))
    assert found["activations"] == 2 * (2 * 8 + (48 + 8 + 48)) * 60


CHILD = """
import resource, sys
from pathlib import Path
from typing import Any
import torch, transformers, peft
from perdure.attention import NAME
def status(key):
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) * 1024

from perdure.config import RunConfig
from perdure.settings import parse
from perdure.skills.base import load_skill
from perdure.curriculum import learn
from perdure.importers import IMPORTERS
from perdure.reporting import Silent
from perdure.stages import create_workspace
before = status("VmRSS")
folder = Path(sys.argv[1])
skill = IMPORTERS["forms-file"](folder / "file", 0)
train = {"steps": 2, "warm_start_steps": 2, "validation_max": 0, "anchor_general_tokens": 4,
         "lora_rank": int(sys.argv[2])}
config = parse(RunConfig, {"train": train, "context": {"template": "turns:2"}, "probe": {"tasks": []},
               "eval": {"rows": 1}, "preflight": {"rows": 4, "forecast": False}}, "child")
learn(create_workspace(folder / "bot", config), [skill], config, Silent(), force=True)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("rank", [0, 16])
def test_the_embedded_models_real_footprint(tmp_path: Path, rank: int) -> None:
    """Peak memory of a stage beyond what the libraries take, against the arithmetic: within a third."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), str(rank)], capture_output=True, text=True,
                          check=False, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = float(done.stdout.split()[-1])
    train, model = TrainConfig(lora_rank=rank), ModelConfig()
    examples = load_skill(tmp_path / "file").train
    work = work_of(lengths_renderer(model), examples, [parse_template("turns:2")], train)
    # In the dtype that this machine is faster in, which --hardware takes to be bfloat16.
    predicted = sum(memory(shape_of(model), work, train, compute_dtype(model).itemsize).values())
    print(f"rank {rank}: measured {measured / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB")
    assert 0.67 < predicted / measured < 1.5
