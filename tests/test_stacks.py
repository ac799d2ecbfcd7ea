"""Versions that keep their adapters: the same weights as merged ones, repaired, verified and served like them."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fakes import NUMBERS, save_tiny_model, toy_skill, two_toy_skills
from perdure import judging, repair
from perdure.adapters import add_adapter, save_adapter
from perdure.config import ModelConfig, RunConfig, TrainConfig
from perdure.curriculum import learn
from perdure.erasing import what_holds
from perdure.export import export_adapter, export_weights
from perdure.forgetting import forget
from perdure.loading import load_version, put_adapter, scaled_adapter
from perdure.reporting import Silent
from perdure.running import open_version
from perdure.stacks import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, is_stacked, stack_of
from perdure.stages import create_workspace, settle_all
from perdure.types import InputError, Verdict
from perdure.verify import problems_of_version, verify
from perdure.workspace import Workspace

IDS = torch.arange(5, 25)[None]
Setup = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("made")
    return save_tiny_model(folder / "model", copies=True), two_toy_skills(folder)


def settings(model: Path, train: dict[str, Any], **gate: Any) -> RunConfig:
    plain = {"method": "sft", "learning_rate": 3e-2, "steps": 16, "warm_start_steps": 16, "anchor_share": 0.0,
             "lora_rank": 4, "lora_merge": False, "checkpoint_every": 5}  # fmt: skip
    return RunConfig.model_validate(
        {"model": {"source": str(model), "compute_dtype": "float32"}, "probe": {"tasks": []}, "train": plain | train,
         "gate": {"budget": 0.45, "repair": 0, "enforce": False} | gate}
    )  # fmt: skip


def taught(folder: Path, made: Setup, train: dict[str, Any] | None = None, **gate: Any) -> Workspace:
    config = settings(made[0], train or {}, **gate)
    workspace = create_workspace(folder, config)
    learn(workspace, made[1], config, Silent())
    return workspace


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory, made: Setup) -> Workspace:
    return taught(tmp_path_factory.mktemp("stacked") / "bot", made)


def weights(workspace: Workspace, version: str) -> dict[str, Tensor]:
    return dict(open_version(workspace, version, workspace.config()).loaded.model.named_parameters())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


KINDS = {"lora": {}, "some layers, rslora": {"lora_rslora": True, "lora_targets": ["q_proj", "down_proj"]},
         "dora": {"lora_dora": True}, "nf4": {"lora_nf4": True}}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_has_the_weights_that_merging_gives(tmp_path: Path, made: Setup, kind: str) -> None:
    """Also of a stage that began on a stack: the chains are the same to the last bit."""
    if kind == "dora":  # divides by norms, and a model that copies has layers of zeros
        made = save_tiny_model(tmp_path / "model", copies=False), made[1]
    stack, merged = (taught(tmp_path / str(merge), made, KINDS[kind] | {"lora_merge": merge})
                     for merge in (False, True))  # fmt: skip
    before = weights(stack, "v000")
    for version in ("v001", "v002"):
        got = weights(stack, version)
        assert equal(got, weights(merged, version)) and not equal(got, before)
        assert all(parameter.requires_grad for parameter in got.values())
        assert stack.version(version)["scores"] == merged.version(version)["scores"]
        assert is_stacked(stack.version_folder(version)) and not is_stacked(merged.version_folder(version))
        assert not (stack.version_folder(version) / "model.safetensors").exists()
        before = got
    assert verify(stack.folder) == [] and not list(stack.folder.glob("runs/**/*.safetensors"))


@pytest.mark.parametrize("version", ["v001", "v002"])
def test_peft_reads_what_a_version_keeps(stacked: Workspace, made: Setup, tmp_path: Path, version: str) -> None:
    base = made[0]
    if version == "v002":
        export_weights(stacked, "v001", tmp_path / "below", "float32")
        base = tmp_path / "below"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a name that transformers is about to drop
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(stacked.version_folder(version))
        )
    wanted = open_version(stacked, version, stacked.config()).loaded.model(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_what_an_adapter_lies_on_is_written_in_it(stacked: Workspace, made: Setup) -> None:
    """For peft, and for whoever loads: the base by its own name, another version by where it lies from here."""
    named = [json.loads((stacked.version_folder(name) / ADAPTER_SETTINGS).read_text())["base_model_name_or_path"]
             for name in ("v001", "v002")]  # fmt: skip
    assert named == [str(made[0]), "../v001"]
    folders = [stacked.version_folder(name) for name in ("v001", "v002")]
    assert stack_of(folders[1]) == (None, folders)
    first, second = ((folder / "README.md").read_text(encoding="utf-8") for folder in folders)
    assert "library_name: peft" in second and "perdure export v002" in second and "on the weights of v001;" in second
    assert "base_model:" in first and "base_model:" not in second  # on the base it would be another model
    assert "on the weights of v000 (the base model);" in first


def test_a_base_is_named_by_where_it_is_and_which_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its path looks like from here, and whatever is at the hub by then."""
    kept, model = tmp_path / "kept", save_tiny_model(tmp_path / "v001")
    (tmp_path / "bot").mkdir()
    monkeypatch.chdir(tmp_path / "bot")
    save_adapter(kept, LoraConfig(r=2, target_modules=["q_proj", "k_proj"]), {})
    for config, wanted, revision in (
        (ModelConfig(source="../v001"), str(tmp_path / "bot" / "../v001"), None),
        (ModelConfig(source="some/model", revision="abc"), "some/model", "abc"),
    ):
        put_adapter(kept, tmp_path / "bot", None, config)
        written = json.loads((tmp_path / "bot" / ADAPTER_SETTINGS).read_text())
        assert (written["base_model_name_or_path"], written["revision"]) == (wanted, revision)
        assert written["target_modules"] == ["k_proj", "q_proj"]
        assert stack_of(tmp_path / "bot") == (None, [tmp_path / "bot"])
    assert model.is_dir()


def test_a_stack_speaks_by_its_own_tokenizer(stacked: Workspace, made: Setup, tmp_path: Path) -> None:
    """Not by one that the base model's folder got since."""
    other = tmp_path / "model"
    shutil.copytree(made[0], other)
    (other / "chat_template.jinja").write_text("something else")
    loaded = load_version(settings(other, {}).model, stacked.version_folder("v002"))
    before = load_version(stacked.config().model, stacked.version_folder("v002"))
    assert loaded.tokenizer.chat_template == before.tokenizer.chat_template != "something else"
    assert loaded.end_ids == before.end_ids


def test_a_link_below_that_leads_out_of_the_workspace_is_refused(stacked: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(shutil.copytree(stacked.folder, tmp_path / "bot"))
    path = workspace.folder / "versions" / "v001" / ADAPTER_WEIGHTS
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="outside"):
        open_version(workspace, "v002", workspace.config())


def test_what_a_kill_left_of_a_finished_stage_goes_with_the_next_command(stacked: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(shutil.copytree(stacked.folder, tmp_path / "bot"))
    for place in ("s01-colours", "s02-numbers/repair-blend-0.5"):
        shutil.copytree(workspace.version_folder("v001"), workspace.folder / "runs" / place / "adapter")
    shutil.rmtree(workspace.folder / "runs" / "s01-colours" / "baseline")
    settle_all(workspace)
    assert not list(workspace.folder.glob("runs/**/*.safetensors"))
    assert not (workspace.folder / "runs/s02-numbers/repair-blend-0.5").exists()


def test_stages_of_both_kinds_follow_each_other(stacked: Workspace, made: Setup, tmp_path: Path) -> None:
    """Whole weights on a stack end it; a stack begins on them."""
    workspace = Workspace(shutil.copytree(stacked.folder, tmp_path / "bot"))
    others = [toy_skill(tmp_path / "whole"), toy_skill(tmp_path / "top", NUMBERS)]
    learn(workspace, others[:1], settings(made[0], {"lora_rank": 0, "lora_merge": True}), Silent())
    learn(workspace, others[1:], settings(made[0], {}), Silent())
    whole, top = (workspace.version_folder(name) for name in ("v003", "v004"))
    assert stack_of(top) == (whole, [top]) and stack_of(whole) == (whole, [])
    by_hand = load_version(workspace.config().model, whole).model
    add_adapter(by_hand, top)
    got = weights(workspace, "v004")
    assert equal(got, dict(by_hand.named_parameters())) and not equal(got, weights(workspace, "v003"))
    shutil.rmtree(workspace.version_folder("v001"))  # nothing of it is needed for them
    assert equal(weights(workspace, "v004"), got)


def test_the_hash_of_an_adapters_weights_is_that_of_the_stack(stacked: Workspace, tmp_path: Path) -> None:
    """The same adapter on another version is another version."""
    info = stacked.version("v002")
    folder = stacked.version_folder("v002")
    twin = Workspace(shutil.copytree(stacked.folder, tmp_path / "bot"))

    def write(beside: Path) -> None:
        for name in (ADAPTER_WEIGHTS, ADAPTER_SETTINGS):
            shutil.copy(folder / name, beside / name)

    for version, parent in (("v003", "v001"), ("v004", "v002")):
        twin.add_version(info | {"version": version, "parent": parent}, write)
    same, other = (twin.version(name)["hashes"]["weights"] for name in ("v003", "v004"))
    assert same == info["hashes"]["weights"] != other


# Repairs


HARMED = (
    {"name": "numbers", "kind": "new skill", "verdict": "learned"},
    {"name": "colours", "kind": "skill", "verdict": "worse"},
)
ATTEMPTS = ("checkpoint 15", "blend 0.75", "blend 0.5", "blend 0.25", "more anchors", "smaller rate")


def repaired(
    folder: Path, made: Setup, patched: pytest.MonkeyPatch, wanted: str, **train: Any
) -> tuple[Workspace, Any]:
    """Two stages of which the second is said to have hurt the first until the attempt ``wanted``, and the parameters
    that were measured last."""
    measured, seen = judging.measure_candidate, {}

    def said(run: Any, *others: Any) -> Any:
        found = measured(run, *others)
        seen.update({name: p.detach().clone() for name, p in run.session.loaded.model.named_parameters()})
        last = (Workspace(folder).ledger()[-1].get("attempt") if len(others) == 4 else None) or ""
        labels = [label for label in ATTEMPTS if not (train.get("lora_dora") and label.startswith("blend"))]
        now = labels[labels.index(last) + 1 if last else 0] if len(others) == 4 else None
        harmed = run.skill.name == "numbers" and now != wanted
        verdict = Verdict("refused", ("Hurt.",), HARMED) if harmed else Verdict("promoted", ("Fine.",), ())
        return replace(found, verdict=verdict)

    for place in (judging, repair):
        patched.setattr(place, "measure_candidate", said)
    return taught(folder, made, train, repair=6, enforce=True), seen


def attempts(workspace: Workspace) -> list[str]:
    return [event["attempt"] for event in workspace.ledger() if event["event"] == "repair"]


@pytest.mark.parametrize("wanted", ATTEMPTS)
def test_whichever_attempt_at_repair_passes_what_was_measured_is_what_is_kept(
    tmp_path: Path, made: Setup, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    workspace, seen = repaired(tmp_path / "bot", made, monkeypatch, wanted)
    assert attempts(workspace) == [*ATTEMPTS[: ATTEMPTS.index(wanted) + 1]] and workspace.resolve("champion") == "v002"
    assert equal(weights(workspace, "v002"), seen) and is_stacked(workspace.version_folder("v002"))
    assert verify(workspace.folder) == [] and not list(workspace.folder.glob("runs/**/*.safetensors"))
    assert not list(workspace.folder.glob("runs/*/repair-blend*")) and stack_of(workspace.version_folder("v002"))[1]


def test_a_blend_is_kept_as_a_share_of_the_adapter(
    tmp_path: Path, made: Setup, stacked: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _ = repaired(tmp_path / "bot", made, monkeypatch, "blend 0.25")
    whole, part = (load_file(place.version_folder("v002") / ADAPTER_WEIGHTS) for place in (stacked, workspace))
    for name, value in part.items():
        assert torch.equal(value, whole[name] * 0.25 if ".lora_B." in name else whole[name])
    parent, candidate = weights(stacked, "v001"), weights(stacked, "v002")
    for name, value in weights(workspace, "v002").items():
        torch.testing.assert_close(value, torch.lerp(parent[name], candidate[name], 0.25))


def test_where_a_dora_adapter_is_kept_nothing_is_blended(
    tmp_path: Path, made: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = save_tiny_model(tmp_path / "model", copies=False), made[1]
    workspace, seen = repaired(tmp_path / "bot", made, monkeypatch, "smaller rate", lora_dora=True)
    assert attempts(workspace) == ["checkpoint 15", "more anchors", "smaller rate"]
    assert equal(weights(workspace, "v002"), seen)


def test_where_no_repair_passes_the_version_is_what_was_trained(
    tmp_path: Path, made: Setup, stacked: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _ = repaired(tmp_path / "bot", made, monkeypatch, "none")
    assert attempts(workspace) == [*ATTEMPTS] and workspace.resolve("champion") == "v001"
    assert equal(weights(workspace, "v002"), weights(stacked, "v002"))


def test_a_stage_that_was_killed_after_its_training_goes_on_to_the_same_version(
    tmp_path: Path, made: Setup, stacked: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stacked.config()
    workspace = create_workspace(tmp_path / "bot", config)
    with monkeypatch.context() as patched:
        patched.setattr("perdure.judging.measure_candidate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(workspace, made[1], config, Silent())
    assert list(workspace.folder.glob("runs/s01-colours/adapter/*"))
    learn(workspace, made[1], config, Silent())
    for version in ("v001", "v002"):
        assert workspace.version(version)["hashes"]["weights"] == stacked.version(version)["hashes"]["weights"]


# Around it


def test_whole_weights_and_one_adapter_can_be_exported(stacked: Workspace, tmp_path: Path) -> None:
    export_weights(stacked, "champion", tmp_path / "out", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert equal(dict(model.named_parameters()), weights(stacked, "v002"))
    assert export_adapter(stacked, "v002", "v000", tmp_path / "adapter", None)["rank"] == 8  # 4 and 4
    whole, adapter = ((tmp_path / name / "README.md").read_text(encoding="utf-8") for name in ("out", "adapter"))
    assert "library_name: transformers" in whole and "holds an adapter" not in whole
    assert "library_name: peft" in adapter and "on the weights of v000 (the base model);" in adapter


def test_forgetting_and_erasing_know_stacks(tmp_path: Path, made: Setup, stacked: Workspace) -> None:
    workspace = Workspace(shutil.copytree(stacked.folder, tmp_path / "bot"))
    done = forget(workspace, "colours", workspace.config(), Silent())
    assert stack_of(workspace.version_folder(str(done.version))) == (None, [workspace.version_folder("v003")])
    workspace.promote("v003", "by hand")
    files = {path.as_posix() for path in what_holds(workspace, "colours").files}
    assert {f"versions/{name}/{ADAPTER_WEIGHTS}" for name in ("v001", "v002")} <= files
    assert f"versions/v003/{ADAPTER_WEIGHTS}" not in files


def test_a_change_below_is_found_before_a_version_is_served(stacked: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(shutil.copytree(stacked.folder, tmp_path / "bot"))
    path = workspace.version_folder("v001") / ADAPTER_WEIGHTS
    assert problems_of_version(workspace, "v002") == []
    tensors = load_file(path)
    save_file({name: value + 1 for name, value in tensors.items()}, path, metadata={"format": "pt"})
    (problem,) = problems_of_version(workspace, "v002")
    assert problem == f"{path}: altered"
    with pytest.raises(InputError, match="altered"):
        export_weights(workspace, "v002", tmp_path / "out", "float32")


def test_another_base_model_is_refused(stacked: Workspace, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", copies=False)
    with pytest.raises(InputError, match="is not the base model that this workspace was made with"):
        open_version(stacked, "v002", settings(other, {}))


def test_damaged_stacks_are_one_error(stacked: Workspace, tmp_path: Path) -> None:
    config, versions = stacked.config().model, tmp_path / "versions"
    shutil.copytree(stacked.folder / "versions", versions)
    top, below = versions / "v002", versions / "v001"
    written = json.loads((top / ADAPTER_SETTINGS).read_text())

    def said(**changed: Any) -> str:
        (top / ADAPTER_SETTINGS).write_text(json.dumps(written | changed))
        with pytest.raises(InputError) as error:
            load_version(config, top)
        return str(error.value)

    assert "its adapter lies on itself" in said(base_model_name_or_path="../v002")
    assert "lies on v007" in said(base_model_name_or_path="../v007")
    assert "cannot be loaded as an adapter" in said(target_modules=["nothing"])
    assert "cannot be loaded as an adapter" in said(r=3)
    assert "has no counterpart" in said(target_modules=["q_proj"])
    assert "no LoRA adapter" in said(peft_type="IA3")
    (top / ADAPTER_SETTINGS).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_version(config, top)
    (below / ADAPTER_WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="v001: cannot be loaded as an adapter"):
        load_version(config, below)


def test_a_share_of_an_adapter_is_that_share_of_its_product(stacked: Workspace, tmp_path: Path) -> None:
    folder = stacked.version_folder("v001")
    scaled_adapter(folder, 0.5, tmp_path)
    models = [load_version(stacked.config().model, None).model for _ in range(3)]
    before, whole, half = (dict(model.named_parameters()) for model in models)
    add_adapter(models[1], folder), add_adapter(models[2], tmp_path)
    for name in before:
        torch.testing.assert_close(half[name], torch.lerp(before[name], whole[name], 0.5))


def test_adding_an_adapter_draws_nothing_and_leaves_a_plain_model(stacked: Workspace) -> None:
    model, state = load_version(stacked.config().model, None).model, torch.random.get_rng_state()
    before = [name for name, _ in model.named_parameters()]
    add_adapter(model, stacked.version_folder("v001"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [name for name, _ in model.named_parameters()] == before and not hasattr(model, "peft_config")


def test_the_setting_means_nothing_without_adapters() -> None:
    with pytest.raises(ValueError, match="lora_merge has an effect only with lora_rank above 0"):
        TrainConfig(lora_merge=False)
    assert TrainConfig(lora_rank=2, lora_merge=False).keeps_adapters and not TrainConfig(lora_rank=2).keeps_adapters
