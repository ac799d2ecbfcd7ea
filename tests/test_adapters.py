"""Adapters: only they train, what they merge into is what was trained, and a plain model comes out."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import tiny_model
from perdure.adapters import adapted, effective_parameters, set_aside, trainable, without_adapters
from perdure.batching import collate
from perdure.checkpoint import checkpoints
from perdure.config import TrainConfig
from perdure.models import hidden_at_loss_positions, linear_parameters, sync_weights, working_copy
from perdure.nf4 import is_nf4, weight_of
from perdure.teacher import BareTeacher, EmaTeacher, make_teacher
from perdure.train import train
from perdure.types import InputError
from perdure.update import make_optimizer
from test_train import equal, lines, make_stage, settings, steps, warm_rollouts, weights

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
    masters, before = tiny_model(), dict(tiny_model().named_parameters())
    working = working_copy(masters, torch.float32)
    ids = torch.arange(5, 25)[None]
    with adapted(masters, working, config_of(kind), 0) as model:
        assert model is working
        assert torch.allclose(model(input_ids=ids).logits, tiny_model()(input_ids=ids).logits, atol=1e-5)
        assert all("lora" in name for name in trainable(model)) and trainable(model)
        shake(model)
        effective = {name: value.clone() for name, value in effective_parameters(model)}
        again = dict(effective_parameters(model))
        assert all(torch.equal(effective[name], again[name]) for name in effective)  # asking changes nothing
        logits = model(input_ids=ids).logits.detach()
        with without_adapters(model):
            assert torch.equal(model(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)
        assert torch.equal(model(input_ids=ids).logits, logits) and trainable(model)
    assert list(effective) == list(before) == [name for name, _ in masters.named_parameters()]
    after = dict(masters.named_parameters())
    assert all(torch.equal(effective[name], after[name]) for name in after)
    assert all(parameter.requires_grad for parameter in masters.parameters())
    torch.testing.assert_close(masters(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if name.endswith("_proj.weight")}
    # The working copy is plain again; its owner brings it in step.
    assert [name for name, _ in working.named_parameters()] == list(before) and not trainable(working)
    assert torch.equal(working(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_masters_get_the_exact_product_not_rounded_weights(kind: str) -> None:
    """The working copy is bfloat16; merging it and casting back would lose what the masters hold beyond it."""
    masters, before = tiny_model(), dict(tiny_model().named_parameters())
    with adapted(masters, working_copy(masters, torch.bfloat16), config_of(kind), 0) as model:
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}
        layer, name = model.model.layers[0].mlp.up_proj, "model.layers.0.mlp.up_proj.weight"
        if kind != "dora":
            shake(model)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            expected = before[name] + layer.scaling["default"] * b @ a
        else:  # nothing learned: direction and magnitude are what they were
            expected = before[name]
    torch.testing.assert_close(masters.model.layers[0].mlp.up_proj.weight, expected, rtol=1e-5, atol=1e-6)
    for same in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(dict(masters.named_parameters())[same], before[same])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_four_bits_only_the_product_reaches_the_masters(dtype: torch.dtype) -> None:
    masters, before = tiny_model(), {name: p.clone() for name, p in tiny_model().named_parameters()}
    working, ids = working_copy(masters, dtype), torch.arange(5, 25)[None]
    exact = working(input_ids=ids).logits
    with adapted(masters, working, config_of(lora_nf4=True), 0) as model:
        layer = model.model.layers[0].mlp.down_proj
        base = layer.get_base_layer()
        rounded = weight_of(base)
        assert not is_nf4(model.model.layers[0].mlp.up_proj.get_base_layer())  # half a block a row
        assert is_nf4(base) and rounded.dtype == dtype and not is_nf4(model.lm_head)
        scale = before["model.layers.0.mlp.down_proj.weight"].abs().max()
        assert 0 < (rounded - before["model.layers.0.mlp.down_proj.weight"]).abs().max() < 0.2 * scale
        assert linear_parameters(model) == linear_parameters(masters) + sum(
            p.numel() for p in trainable(model).values()
        )
        shake(model)
        logits = model(input_ids=ids).logits.detach()
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        student = dict(effective_parameters(model))
        torch.testing.assert_close(student["model.layers.0.mlp.down_proj.weight"], rounded.float() + delta)
        assert list(student) == list(before)
    got = dict(masters.named_parameters())
    torch.testing.assert_close(
        got["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"] + delta
    )
    assert [name for name, _ in working.named_parameters()] == list(before) and not trainable(working)
    assert not hasattr(working, "is_loaded_in_4bit") and not (exact == logits).all()
    # Plain again: the working copy computes with the masters' weights, before its owner has brought it in step.
    same = working_copy(masters, dtype)
    assert torch.equal(working(input_ids=ids).logits, same(input_ids=ids).logits)


def test_a_trial_in_four_bits_leaves_both_models_as_they_were() -> None:
    masters, working, ids = tiny_model(), working_copy(tiny_model(), torch.float32), torch.arange(5, 25)[None]
    before = working(input_ids=ids).logits
    with pytest.raises(ZeroDivisionError), adapted(masters, working, config_of(lora_nf4=True), 0) as model:
        shake(model)
        1 / 0  # noqa: B018
    assert torch.equal(working(input_ids=ids).logits, before)
    assert torch.equal(masters(input_ids=ids).logits, before)


def test_without_bitsandbytes_four_bits_are_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    masters = tiny_model()
    working = working_copy(masters, torch.float32)
    config = config_of(lora_nf4=True)
    with pytest.raises(InputError, match=r"bitsandbytes>=0\.50"), adapted(masters, working, config, 0):
        pass
    assert [name for name, _ in working.named_parameters()] == [name for name, _ in masters.named_parameters()]


def test_an_error_or_a_trial_leaves_the_masters_alone() -> None:
    masters, before = tiny_model(), dict(tiny_model().named_parameters())
    working = working_copy(masters, torch.float32)
    with adapted(masters, working, config_of(), 0, merge=False) as model:
        shake(model)
    with pytest.raises(ZeroDivisionError), adapted(masters, working, config_of(), 0) as model:
        shake(model)
        1 / 0  # noqa: B018
    assert all(torch.equal(p, before[name]) for name, p in masters.named_parameters())
    assert not any("lora" in name for name, _ in working.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_set_aside_reads_the_same_and_comes_back(tmp_path: Path, fails: bool, dtype: torch.dtype) -> None:
    model, ids = tiny_model().to(dtype), torch.arange(5, 25)[None]
    odd = torch.nn.Parameter(torch.randn(6, 4, dtype=dtype).T)  # does not lie in one piece
    model.register_parameter("odd", odd)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    logits, places = model(input_ids=ids).logits, {p.data_ptr() for p in model.parameters()}
    with pytest.raises(RuntimeError, match="on purpose") if fails else nullcontext(), set_aside(model, tmp_path):
        assert not places & {parameter.data_ptr() for parameter in model.parameters()}
        assert torch.equal(model(input_ids=ids).logits, logits) and not list(tmp_path.iterdir())
        if fails:
            raise RuntimeError("on purpose")
    after = dict(model.named_parameters())
    assert after["odd"] is odd and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        after["odd"] += 1  # ordinary memory again
    assert not list(tmp_path.iterdir())


def test_only_the_named_layers_get_one() -> None:
    masters = tiny_model()
    working = working_copy(masters, torch.float32)
    with adapted(masters, working, config_of(lora_targets=("q_proj",)), 0) as model:
        assert {name.split(".")[-4] for name in trainable(model)} == {"q_proj"}
    with (
        pytest.raises(InputError, match="lora_targets"),
        adapted(masters, working, config_of(lora_targets=("nothing",)), 0),
    ):
        pass
    for outside in ("lm_head", "embed_tokens"):  # loss and decode read these as plain matrices
        with (
            pytest.raises(InputError, match=f"lora_targets: '{outside}' is no layer inside"),
            adapted(masters, working, config_of(lora_targets=("q_proj", outside)), 0),
        ):
            pass
    with adapted(masters, working, settings(), 0) as model:
        assert model is masters


def test_the_same_seed_gives_the_same_first_weights() -> None:
    found = []
    for seed in (0, 0, 1):
        masters = tiny_model()
        with adapted(masters, working_copy(masters, torch.float32), config_of(), seed) as model:
            found.append({name: p.clone() for name, p in trainable(model).items()})
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_another_copy_gets_the_product() -> None:
    masters = tiny_model()
    twin, ids = working_copy(masters, torch.float32), torch.arange(5, 25)[None]
    with adapted(masters, working_copy(masters, torch.float32), config_of(), 0) as model:
        shake(model)
        sync_weights(twin, model)
        torch.testing.assert_close(twin(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert equal(dict(twin.named_parameters()), dict(masters.named_parameters()))


def test_the_frozen_teacher_is_the_same_model_with_its_adapters_off(tmp_path: Path) -> None:
    """No copy of the weights; scores as a copy made beforehand would give them, whatever the adapters learn."""
    stage = make_stage(tmp_path)
    plain = make_teacher("frozen", student=stage.student.model, working=stage.working, original=None,
                         dtype=torch.float32, teacher_update_rate=0)  # fmt: skip
    teacher = make_teacher("frozen", student=stage.student.model, working=stage.working, original=None,
                           dtype=torch.float32, teacher_update_rate=0, adapters=True)  # fmt: skip
    assert teacher.is_start and not teacher.moves and isinstance(teacher, BareTeacher)
    batch = collate(warm_rollouts(stage, settings()), "teacher", 0)
    expected = plain.score(batch)
    with adapted(stage.student.model, stage.working, config_of(), 0) as model:
        shake(model)
        assert torch.equal(teacher.score(batch), expected)
        assert not torch.allclose(hidden_at_loss_positions(model, batch), expected)
        assert trainable(model)


def test_a_moving_teacher_averages_products_not_factors() -> None:
    """Against the definition, (1 - r) phi + r (W + B A), over three updates."""
    masters, rate = tiny_model(), 0.25
    teacher = EmaTeacher(masters, torch.float32, rate)
    expected = {name: p.detach().clone() for name, p in masters.named_parameters()}
    with adapted(masters, working_copy(masters, torch.float32), config_of(), 0) as model:
        for seed in range(3):
            shake(model, seed)
            teacher.update(model)
            product = dict(effective_parameters(model))
            expected = {name: (1 - rate) * value + rate * product[name] for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(teacher.average[name], value, rtol=1e-5, atol=1e-6)
    assert teacher.state().keys() == dict(masters.named_parameters()).keys()


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


def test_a_stage_learns_above_four_bits(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    train(stage, config_of(lora_nf4=True, method="sft", steps=60, validate_every=60, learning_rate=2e-2))
    losses = [line["loss"] for line in steps(stage)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert equal(dict(stage.working.named_parameters()), weights(stage))


@pytest.mark.parametrize("nf4", [False, True])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, nf4: bool) -> None:
    config = config_of(
        lora_nf4=nf4, steps=8, warm_start_steps=4, checkpoint_every=3, validate_every=4, learning_rate=1e-2
    )
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
    with adapted(stage.student.model, stage.working, config_of(), 0) as model:
        inside = replace(stage, student=replace(stage.student, model=model))
        held = [p for group in make_optimizer(inside, config_of()).param_groups for p in group["params"]]
        assert len(held) == len(trainable(model))
    train(stage, config_of(steps=3, checkpoint_every=3))
    (folder,) = checkpoints(stage.folder)
    plain = make_stage(tmp_path / "plain")
    train(plain, settings(steps=3, checkpoint_every=3))
    (other,) = checkpoints(plain.folder)
    assert (folder / "state.safetensors").stat().st_size < (other / "state.safetensors").stat().st_size / 3


def test_settings_without_an_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="lora_rank above 0"):
        TrainConfig(lora_dora=True)
    with pytest.raises(ValueError, match="lora_rank above 0"):
        TrainConfig(lora_nf4=True)
    with pytest.raises(ValueError, match="leave it or lora_nf4 out"):
        config_of("dora", lora_nf4=True)


def test_what_has_no_adapter_is_in_plain_numbers_too() -> None:
    """In 4 bits all layers lie, also those that ``lora_targets`` leaves out."""
    masters = tiny_model()
    working = working_copy(masters, torch.float32)
    with adapted(masters, working, config_of(lora_nf4=True, lora_targets=("q_proj",)), 0) as model:
        found = dict(effective_parameters(model))
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in masters.named_parameters()
    }
    assert all(value.dtype == torch.float32 for value in found.values())
