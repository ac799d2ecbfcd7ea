"""Adapters: only they train, what they merge into is what was trained, and a plain model comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import tiny_model
from perdure.adapters import adapted, effective_parameters, trainable
from perdure.checkpoint import checkpoints
from perdure.config import TrainConfig
from perdure.models import sync_weights, working_copy
from perdure.teacher import EmaTeacher
from perdure.train import train
from perdure.types import InputError
from perdure.update import make_optimizer
from test_train import equal, lines, make_stage, settings, steps, weights

KINDS = {"lora": {}, "rslora": {"lora_rslora": True}, "dora": {"lora_dora": True}}


def config_of(kind: str = "lora", **options: Any) -> TrainConfig:
    return settings(lora_rank=4, **KINDS[kind], **options)


def shake(model: Any, seed: int = 0) -> None:
    """Give the adapters weights other than their first ones, whose product is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_is_merged(kind: str) -> None:
    model, before = tiny_model(), dict(tiny_model().named_parameters())
    ids = torch.arange(5, 25)[None]
    with adapted(model, config_of(kind), 0):
        assert torch.allclose(model(input_ids=ids).logits, tiny_model()(input_ids=ids).logits, atol=1e-5)
        assert all("lora" in name for name in trainable(model)) and trainable(model)
        shake(model)
        effective = {name: value.clone() for name, value in effective_parameters(model)}
        again = dict(effective_parameters(model))
        assert all(torch.equal(effective[name], again[name]) for name in effective)  # asking changes nothing
        logits = model(input_ids=ids).logits.detach()
    assert list(effective) == list(before) == [name for name, _ in model.named_parameters()]
    after = dict(model.named_parameters())
    assert all(torch.equal(effective[name], after[name]) for name in after)
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if name.endswith("_proj.weight")}


def test_only_the_named_layers_get_one() -> None:
    model = tiny_model()
    with adapted(model, config_of(lora_targets=("q_proj",)), 0):
        assert {name.split(".")[-4] for name in trainable(model)} == {"q_proj"}
    with pytest.raises(InputError, match="lora_targets"), adapted(model, config_of(lora_targets=("nothing",)), 0):
        pass
    with adapted(model, settings(), 0):
        assert len(trainable(model)) == len(list(model.parameters()))


def test_the_same_seed_gives_the_same_first_weights() -> None:
    found = []
    for seed in (0, 0, 1):
        with adapted(model := tiny_model(), config_of(), seed):
            found.append({name: p.clone() for name, p in trainable(model).items()})
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_the_working_copy_has_the_product() -> None:
    model = tiny_model()
    twin = working_copy(model, torch.float32)
    ids = torch.arange(5, 25)[None]
    with adapted(model, config_of(), 0):
        shake(model)
        sync_weights(twin, model)
        torch.testing.assert_close(twin(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert equal(dict(twin.named_parameters()), dict(model.named_parameters()))


def test_a_moving_teacher_averages_products_not_factors() -> None:
    """Against the definition, (1 - r) phi + r (W + B A), over three updates."""
    model, rate = tiny_model(), 0.25
    teacher = EmaTeacher(model, torch.float32, rate)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    with adapted(model, config_of(), 0):
        for seed in range(3):
            shake(model, seed)
            teacher.update(model)
            product = dict(effective_parameters(model))
            expected = {name: (1 - rate) * value + rate * product[name] for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(teacher.average[name], value, rtol=1e-5, atol=1e-6)
    assert teacher.state().keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_learns_with_adapters_and_ends_plain(tmp_path: Path, kind: str) -> None:
    # The copying model has rows of zeros, which have no direction for DoRA to turn.
    stage = make_stage(tmp_path, tiny_model() if kind == "dora" else None)
    before = weights(stage).keys()
    method = "sft" if kind == "dora" else "sdft"
    train(stage, config_of(kind, method=method, steps=60, warm_start_steps=60, validate_every=60, learning_rate=2e-2))
    assert steps(stage)[-1]["loss"] < 0.6 * steps(stage)[0]["loss"]
    assert weights(stage).keys() == before
    assert equal(dict(stage.working.named_parameters()), weights(stage))


def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    config = config_of(steps=8, warm_start_steps=4, checkpoint_every=3, validate_every=4, learning_rate=1e-2)
    whole = make_stage(tmp_path / "whole", kind="ema")
    train(whole, config)

    class Stop(Exception):
        pass

    def stop(line: dict[str, Any], timings: dict[str, Any]) -> None:
        if line["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        train(make_stage(tmp_path / "cut", kind="ema"), config, stop)
    resumed = make_stage(tmp_path / "cut", kind="ema")
    assert checkpoints(resumed.folder)
    train(resumed, config)
    assert equal(weights(resumed), weights(whole)) and lines(resumed) == lines(whole)


def test_the_optimizer_and_the_files_hold_only_the_adapters(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    with adapted(stage.student.model, config_of(), 0):
        held = [p for group in make_optimizer(stage, config_of()).param_groups for p in group["params"]]
        assert len(held) == len(trainable(stage.student.model))
    train(stage, config_of(steps=3, checkpoint_every=3))
    (folder,) = checkpoints(stage.folder)
    plain = make_stage(tmp_path / "plain")
    train(plain, settings(steps=3, checkpoint_every=3))
    (other,) = checkpoints(plain.folder)
    assert (folder / "state.safetensors").stat().st_size < (other / "state.safetensors").stat().st_size / 3


def test_settings_without_an_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="lora_rank above 0"):
        TrainConfig(lora_dora=True)
