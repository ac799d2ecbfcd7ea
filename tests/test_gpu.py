"""The same numbers on a GPU: the fused loss, packed passes, decode and whole steps, each against the CPU in float32.

Skipped where torch sees no GPU; ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import copying_model, example, loaded, renderer, save_tiny_model, tiny_model, toy_skill
from perdure.adapters import adapted
from perdure.batching import collate
from perdure.config import ModelConfig, TrainConfig
from perdure.curriculum import learn
from perdure.fused import Head, chunked_loss
from perdure.loading import weights_sha256
from perdure.models import compute_dtype, device_of, hidden_at_loss_positions, working_copy
from perdure.reporting import Silent
from perdure.rollout.base import SamplingParams
from perdure.rollout.local import LocalEngine
from perdure.running import open_version
from perdure.stages import create_workspace
from perdure.types import InputError
from several import settings as run_settings
from test_fused import SPECS, gradients, inputs_of, make_head, naive
from test_train import make_stage, settings, steps, train

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = pytest.mark.gpu


def there(value: Any) -> Any:
    return value.detach().cuda().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


@gpu
@pytest.mark.parametrize("name", SPECS)
def test_the_fused_loss_on_a_gpu_equals_the_naive_one_on_the_cpu(name: str) -> None:
    inputs = inputs_of(name, 0)
    heads = make_head(1, True, 3.0), make_head(2, True, 3.0)
    expected = naive(SPECS[name], inputs, *heads)
    wanted = gradients(expected, inputs.student_hidden_NH, heads[0].weight_VH, heads[0].bias_V)
    moved = replace(inputs, **{field: there(value) for field, value in vars(inputs).items()})
    student, teacher = (Head(there(head.weight_VH), there(head.bias_V), head.softcap) for head in heads)
    loss, _ = chunked_loss(SPECS[name], moved, student, teacher, 4)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-4)
    for got, exact in zip(
        gradients(loss, moved.student_hidden_NH, student.weight_VH, student.bias_V), wanted, strict=True
    ):
        torch.testing.assert_close(got.cpu(), exact, rtol=1e-3, atol=1e-4)


@gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decode_says_the_same_tokens(temperature: float) -> None:
    rows = [renderer().student_prompt(example(f"say {word}", "red")) for word in ("cat", "dog", "old hen")]
    said = []
    for device in ("cpu", "cuda"):
        student = loaded(copying_model().to(device))
        engine = LocalEngine(student, working_copy(student.model, torch.float32))
        answers = engine.generate(rows, SamplingParams(8, temperature), [0, 1, 2], references=[(1, 2, 3)] * 3)
        said.append([answer.token_ids for answer in answers])
    assert said[0] == said[1]


@torch.no_grad()
def shake(model: Any, seed: int) -> None:
    """Other weights in the same place, drawn on the CPU; an adapter's first ones differ by device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.copy_(0.05 * noise + (0 if "lora_" in name else parameter))


@gpu
@pytest.mark.parametrize("rank", [0, 4])
def test_recorded_passes_follow_the_weights(rank: int) -> None:
    """Many short calls, weights that change in place between them: the tokens of the CPU, from graphs, not eager."""
    rows = [renderer().student_prompt(example(f"say {word}", "red")) for word in ("cat", "dog", "old hen", "x")]
    said: dict[str, list[Any]] = {"cpu": [], "cuda": []}
    for device, found in said.items():
        student = loaded(tiny_model(scale=0.4).to(device))  # runs packed from here on, and so does its copy
        masters, working = student.model, working_copy(student.model, torch.float32)
        engine = LocalEngine(student, working)
        with adapted(masters, working, TrainConfig(lora_rank=rank), 0, merge=False):
            for call in range(4):
                shake(working, call)
                answers = engine.generate(rows, SamplingParams(12, 1.0), range(4), references=[(1, 2, 3)] * 4)
                found.append([answer.token_ids for answer in answers])
    assert said["cuda"] == said["cpu"] and said["cpu"][0] != said["cpu"][1]
    assert engine.replays is not None
    recorded = [each.graph for shapes in engine.replays._shelf.values() for each in shapes._passes.values()]
    assert any(graph is not None for graph in recorded)


@gpu
def test_a_batch_and_its_hidden_states_are_on_the_models_device() -> None:
    student = loaded(copying_model().cuda())
    row = example("say cat", "red")
    rollout = renderer().rollout(row, renderer().demonstration(row), None)
    batch = collate([rollout], "student", student.pad_id, device=student.device)
    assert {tensor.device.type for tensor in vars(batch).values()} == {"cuda"}
    there = hidden_at_loss_positions(student.model, batch)
    here = hidden_at_loss_positions(loaded(copying_model()).model, collate([rollout], "student", student.pad_id))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)


@gpu
@pytest.mark.parametrize("method", ["sdft", "sft", "sft_kl", "reinvoke"])
def test_a_stage_takes_the_same_path_on_a_gpu(tmp_path: Path, method: str) -> None:
    """Losses of the first steps, CPU against GPU; later ones drift apart with the order of sums."""
    found = []
    extra = {"reinvoke_steps": 2} if method == "reinvoke" else {}
    for device in ("cpu", "cuda"):
        stage = make_stage(tmp_path / device, copying_model().to(device))
        train(stage, settings(method=method, steps=6, warm_start_steps=3, checkpoint_every=3, **extra))
        found.append([line["loss"] for line in steps(stage)])
    assert found[1][:3] == pytest.approx(found[0][:3], rel=1e-2)


@gpu
def test_bfloat16_is_what_auto_takes() -> None:
    assert device_of(ModelConfig()).type == "cuda"
    assert compute_dtype(ModelConfig()) == torch.bfloat16


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(ModelConfig()).type == "cpu" and device_of(ModelConfig(device="cpu")).type == "cpu"
    with pytest.raises(InputError, match="sees no GPU"):
        device_of(ModelConfig(device="cuda"))


@gpu
@pytest.mark.parametrize("teacher", ["frozen", "ema", "original"])
@pytest.mark.parametrize("options", [{}, {"lora_rank": 4, "learning_rate": 1e-2}, {"activation_checkpointing": True},
                                     {"lora_rank": 4, "lora_nf4": True, "learning_rate": 1e-2}])  # fmt: skip
def test_a_whole_stage_on_the_device(tmp_path: Path, options: dict[str, Any], teacher: str) -> None:
    """Preflight to gate; with adapters the masters stay in the CPU's memory and still end as what was trained."""
    model = save_tiny_model(tmp_path / "model", copies=True)
    config = run_settings(model, {"teacher": teacher} | options)
    config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cuda"})})
    workspace = create_workspace(tmp_path / "bot", config)
    with workspace.lock():
        learn(workspace, [toy_skill(tmp_path / "colours")], config, Silent(), force=True)
    session = open_version(workspace, "v001", config)
    assert session.working.device.type == "cuda"
    assert session.loaded.device.type == ("cpu" if "lora_rank" in options else "cuda")
    base = open_version(workspace, "v000", config)
    assert weights_sha256(session.loaded.model) != weights_sha256(base.loaded.model)
