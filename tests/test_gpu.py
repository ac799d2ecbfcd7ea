"""The same numbers on a GPU: the fused loss, packed passes, decode and whole steps, each against the CPU in float32.

Skipped where torch sees no GPU; ``pytest -m gpu`` on a machine that has one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import copying_model, example, loaded, renderer
from perdure.config import ModelConfig
from perdure.contexts import collate
from perdure.fused import Head, chunked_loss
from perdure.models import compute_dtype, device_of, hidden_at_loss_positions, working_copy
from perdure.rollout.base import SamplingParams
from perdure.rollout.local import LocalEngine
from perdure.types import InputError
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
