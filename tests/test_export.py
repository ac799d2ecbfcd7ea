"""Versions for serving: what is written gives the version's own logits, whole or as an adapter on another version."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fakes import save_tiny_model, toy_skill
from perdure.cli_changes import export
from perdure.curriculum import learn
from perdure.export import MOST_RANK, difference, export_adapter, export_weights
from perdure.models import load
from perdure.reporting import Silent
from perdure.stages import create_workspace
from perdure.types import InputError
from perdure.workspace import Workspace
from several import settings
from test_cli import assert_refused, perdure

IDS = torch.arange(5, 25)[None]


def bot(folder: Path, **train: Any) -> Workspace:
    """Two stages, of adapters unless ``train`` says otherwise."""
    model = save_tiny_model(folder / "model", copies=True)
    config = settings(model, {"lora_rank": 2, "learning_rate": 1e-2, "steps": 4, "warm_start_steps": 4} | train)
    workspace = create_workspace(folder / "bot", config)
    with workspace.lock():
        for name in ("colours", "sizes"):
            learn(workspace, [toy_skill(folder / name)], config, Silent(), force=True)
    return workspace


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return bot(tmp_path_factory.mktemp("adapted"))


def logits(workspace: Workspace, version: str) -> torch.Tensor:
    folder = None if version == "v000" else workspace.version_folder(version)
    with torch.no_grad():
        return load(workspace.config().model, folder).model(input_ids=IDS).logits


@torch.no_grad()
def with_adapter(workspace: Workspace, since: str, folder: Path) -> torch.Tensor:
    base = workspace.config().model.source if since == "v000" else workspace.version_folder(since)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a name that transformers is about to drop
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(("since", "rank"), [("v001", 2), ("v000", 4)])
def test_an_adapter_gives_the_versions_logits(adapted: Workspace, tmp_path: Path, since: str, rank: int) -> None:
    """One stage of rank 2, and two in a row, whose ranks add up; found from the weights alone."""
    found = export_adapter(adapted, "v002", since, tmp_path / "out", None)
    assert (found["rank"], found["since"], found["version"]) == (rank, since, "v002") and found["share"] >= 0.9999
    got = with_adapter(adapted, since, tmp_path / "out")
    wanted, before = logits(adapted, "v002"), logits(adapted, since)
    assert (got - wanted).norm() < 0.02 * (wanted - before).norm()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == rank and config["base_model_name_or_path"].endswith("model" if since == "v000" else "v001")
    record = json.loads((tmp_path / "out" / "perdure.json").read_text())
    assert record["exported_from"]["version"] == "v002" and list(record["files"]) == ["adapter_model.safetensors"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_higher_rank_holds_more_and_a_lower_one_less(adapted: Workspace, tmp_path: Path) -> None:
    shares = [export_adapter(adapted, "v2", "v0", tmp_path / str(rank), rank)["share"] for rank in (1, 2, 4, 8)]
    assert shares == sorted(shares) and shares[0] < 0.9 and shares[-1] == pytest.approx(1, abs=1e-6)


def test_all_weights_are_no_adapter(tmp_path: Path) -> None:
    """Unless the user asks for a rank, and is told what it holds."""
    workspace = bot(tmp_path, lora_rank=0)
    with pytest.raises(InputError, match="no product of rank up to"):
        export_adapter(workspace, "v001", "v000", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    assert 0 < export_adapter(workspace, "v001", "v000", tmp_path / "out", 4)["share"] < 0.9999
    with pytest.raises(InputError, match="the same weights"):
        export_adapter(workspace, "v001", "v001", tmp_path / "other", None)


def test_servers_get_no_sampling_settings_that_were_not_measured(adapted: Workspace, tmp_path: Path) -> None:
    """And may read what safetensors writes for its owner alone."""
    model = Path(adapted.config().model.source)
    shipped = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(shipped | {"repetition_penalty": 1.3, "do_sample": True}))
    try:
        export_weights(adapted, "champion", tmp_path / "out", "float32")
    finally:
        (model / "generation_config.json").write_text(json.dumps(shipped))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "repetition_penalty" not in written and "do_sample" not in written
    assert written.get("eos_token_id") == shipped.get("eos_token_id")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_whole_weights(adapted: Workspace, tmp_path: Path, dtype: str) -> None:
    found = export_weights(adapted, "champion", tmp_path / "out", dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(model.dtype) == f"torch.{dtype}" and found["dtype"] == dtype
    wanted = logits(adapted, found["version"])
    with torch.no_grad():
        difference = (model.float()(input_ids=IDS).logits - wanted).norm() / wanted.norm()
    assert difference == 0 if dtype == "float32" else difference < 0.02
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_the_base_model_can_be_exported(adapted: Workspace, tmp_path: Path) -> None:
    export_weights(adapted, "v0", tmp_path / "out", "float32")
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS).logits
    assert torch.equal(got, logits(adapted, "v000"))


def test_another_base_model_than_the_ledger_has_is_not_exported(adapted: Workspace, tmp_path: Path) -> None:
    place = Workspace(shutil.copytree(adapted.folder, tmp_path / "bot"))
    other = save_tiny_model(tmp_path / "other", copies=False)
    settings = place.folder / "perdure.toml"
    settings.write_text(settings.read_text().replace(adapted.config().model.source, str(other)))
    for write in (lambda: export_weights(place, "v0", tmp_path / "out", "float32"),
                  lambda: export_adapter(place, "v1", "v0", tmp_path / "out", None)):  # fmt: skip
        with pytest.raises(InputError, match="is not the base model that this workspace was made with"):
            write()


def test_singular_values_are_those_of_the_difference(adapted: Workspace) -> None:
    base, target = (load(adapted.config().model, folder).model
                    for folder in (None, adapted.version_folder("v002")))  # fmt: skip
    found = difference(base, target)
    before, after = dict(base.named_parameters()), dict(target.named_parameters())
    for name, (a, b) in found.factors.items():
        change = (after[f"{name}.weight"] - before[f"{name}.weight"]).detach()
        assert (b @ a - change).norm() < 1e-2 * change.norm()
    assert found.share(MOST_RANK) == pytest.approx(1, abs=1e-6)


def test_the_command(adapted: Workspace, tmp_path: Path) -> None:
    here = ("-w", adapted.folder)
    done = perdure("export", "v2", tmp_path / "adapter", "--adapter", "--since", "v1", *here)
    assert done.returncode == 0 and "adapter of rank 2 on v001" in done.stdout, done.stderr
    assert_refused(("export", "v2", tmp_path / "adapter", *here), "already there and not empty")


def test_a_folder_that_is_not_free_is_said_before_anything_is_loaded(
    adapted: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    monkeypatch.setattr("perdure.export._version", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match="not empty"):
        export_weights(adapted, "v1", tmp_path / "x", "float32")
    with pytest.raises(InputError, match="not empty"):
        export_adapter(adapted, "v1", "v0", tmp_path / "x", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v9"}, "no version 'v9'"),
        ({"rank": 4}, "add --adapter"),
        ({"since": "v1"}, "add --adapter"),
        ({"dtype": "int8"}, "bfloat16, float16"),
        ({"adapter": True, "rank": 999}, "at most 128"),
    ],
)
def test_what_cannot_be_exported(adapted: Workspace, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    defaults = {"version": "v2", "adapter": False, "since": "v0", "rank": None, "dtype": "bfloat16", "as_json": False}
    with pytest.raises(InputError, match=message):
        export(folder=tmp_path / "x", workspace=adapted.folder, **(defaults | options))
    assert not (tmp_path / "x").exists()
