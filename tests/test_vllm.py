"""The vLLM engine against one that is played by the own engine, and, where there is one, against a real one."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import stat
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file

from fakes import example, loaded, renderer, tiny_model
from perdure import session
from perdure.config import ModelConfig, RolloutConfig, RunConfig
from perdure.models import sync_weights, working_copy
from perdure.rollout import vllm_colocated
from perdure.rollout.base import SamplingParams
from perdure.rollout.local import LocalEngine
from perdure.rollout.vllm import VllmEngine
from perdure.rollout.vllm_colocated import OURS, ColocatedVllm, colocated
from perdure.rollout.vllm_server import VllmServer
from perdure.rows import batch_rows, sample
from perdure.runlog import LoopState
from perdure.settings import parse
from perdure.train import train
from perdure.types import InputError, Prompt
from test_train import make_stage, settings

OF_IMPORTS = pytest.mark.filterwarnings("ignore")
"""vLLM's own, where it is imported."""
PROMPTS = [renderer().student_prompt(example(f"say {word}", None)) for word in ("north", "south", "east", "west")]


class Server:
    """Answers as vLLM does. ``ignores``: parameters that a reload leaves as they were."""

    def __init__(self, tied: bool = True, raw: bool = False, dev: bool = True, ignores: tuple[str, ...] = ()):
        self.model, self.raw, self.dev, self.ignores = tiny_model(seed=5, tied=False), raw, dev, ignores
        self.engine = LocalEngine(loaded(self.model), self.model)
        self.version, self.reloads, self.requests = "default", 0, []
        self.caches_old_weights = False
        self.keys: set[str | None] = set()
        self.folders: set[Path] = set()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path, body = request.url.path, json.loads(request.content or b"{}")
        self.keys.add(request.headers.get("Authorization"))
        if path == "/v1/completions":
            return httpx2.Response(200, json={"choices": [self.complete(body)]})
        if not self.dev:
            return httpx2.Response(404, text="Not Found")
        if path == "/weight_info":
            return httpx2.Response(200, json={"weight_version": self.version})
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return httpx2.Response(200, json={})
        if path == "/reset_prefix_cache":
            self.caches_old_weights = False
            return httpx2.Response(200)
        assert path == "/collective_rpc" and body["method"] == "reload_weights"
        self.reload(Path(body["kwargs"]["weights_path"]))
        return httpx2.Response(200)

    def reload(self, folder: Path) -> None:
        self.reloads, self.caches_old_weights = self.reloads + 1, True
        self.folders.add(folder)
        found = load_file(folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name not in self.ignores:
                    parameter.copy_(found[name])

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert not self.caches_old_weights
        self.requests.append(body)
        params = SamplingParams(body["max_tokens"], body["temperature"], max(0, body["top_k"]), body["top_p"])
        prompt = Prompt(PROMPTS[0].example, tuple(body["prompt"]))
        (answer,) = self.engine.generate([prompt], params, [body["seed"]])
        logprobs = [value - 3.0 * self.raw for value in answer.sampler_logprobs]
        return {"token_ids": list(answer.token_ids), "logprobs": {"token_logprobs": logprobs},
                "finish_reason": "stop" if answer.finished else "length"}  # fmt: skip


@dataclass
class Sampling:
    """As vllm.SamplingParams, of which it has what is used."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    logprobs: int
    stop_token_ids: list[int]
    detokenize: bool


class Llm:
    """Answers as vllm.LLM does."""

    def __init__(self, server: Server):
        self.server = server

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        self.server.reload(Path(kwargs["weights_path"]))

    def reset_prefix_cache(self) -> None:
        self.server.caches_old_weights = False

    def generate(self, prompts: list[dict[str, Any]], params: list[Sampling], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        return [self.complete(prompt["prompt_token_ids"], by) for prompt, by in zip(prompts, params, strict=True)]

    def complete(self, prompt: list[int], by: Sampling) -> Any:
        assert (by.logprobs, by.detokenize) == (0, False) and by.stop_token_ids
        body = {"prompt": prompt, "max_tokens": by.max_tokens, "temperature": by.temperature, "top_k": by.top_k,
                "top_p": by.top_p, "seed": by.seed}  # fmt: skip
        answer = self.server.complete(body)
        values = zip(answer["token_ids"], answer["logprobs"]["token_logprobs"], strict=True)
        logprobs = [{token: SimpleNamespace(logprob=value)} for token, value in values]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer["token_ids"], logprobs=logprobs)])


def inside(server: Server) -> ColocatedVllm:
    return ColocatedVllm(Llm(server), SimpleNamespace(SamplingParams=Sampling))


def engine_on(server: Any, folder: Path | None, model: Any = None) -> VllmEngine:
    subject = model or tiny_model(seed=1)
    vllm = server if isinstance(server, ColocatedVllm) else served(server)
    return VllmEngine(loaded(subject), working_copy(subject, torch.float32), vllm, str(folder or ""))


def served(server: Any) -> VllmServer:
    return VllmServer(RolloutConfig(engine="vllm", url="http://fake", concurrency=1), httpx2.MockTransport(server))


@pytest.mark.parametrize("place", [served, inside])
def test_vllm_gets_the_weights_and_answers_as_the_own_engine(place: Any, tmp_path: Path) -> None:
    """A tied model: vLLM's head is its own, and gets the embedding."""
    server, seen = Server(), []
    engine = engine_on(server if place is served else inside(server), tmp_path / "new" / "weights")
    own = LocalEngine(loaded(engine.working), engine.working)
    params, seeds = SamplingParams(6, temperature=0.8, top_k=20, top_p=0.9), [3, 2**62, 5, 7]
    found = engine.generate(PROMPTS, params, seeds, lambda tokens, done: seen.append((tokens, done)))
    expected = own.generate(PROMPTS, params, seeds)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [c.finished for c in found] == [c.finished for c in expected]
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.sampler_logprobs == pytest.approx(ours.sampler_logprobs, abs=1e-4)
    assert seen[-1][1] == 4 and sum(tokens for tokens, _ in seen) == sum(len(c.token_ids) for c in found)
    assert engine.generate([], params, []) == [] and server.requests[-1]["top_k"] == 20


@pytest.mark.parametrize("place", [served, inside])
def test_weights_travel_when_they_have_changed_whoever_changed_them(place: Any, tmp_path: Path) -> None:
    server = Server()
    vllm = server if place is served else inside(server)
    engine, other = engine_on(vllm, tmp_path), engine_on(vllm, tmp_path, tiny_model(seed=2))
    params = SamplingParams(3, 0)

    def said(by: VllmEngine) -> list[tuple[int, ...]]:
        return [c.token_ids for c in by.generate(PROMPTS, params, [0] * 4)]

    first = said(engine)
    assert said(engine) == first and server.reloads == 1
    sync_weights(engine.working, tiny_model(seed=3))
    assert said(engine) != first and server.reloads == 2
    said(other)
    assert server.reloads == 3
    sync_weights(engine.working, tiny_model(seed=1))
    assert said(engine) == first and server.reloads == 4
    if place is served:
        server.version = "default"  # it was started anew
    else:
        vllm._version = None
    said(engine)
    assert server.reloads == 5 and {path.name for path in tmp_path.iterdir()} == {"model.safetensors"}


def test_without_a_folder_weights_travel_through_one_that_nobody_else_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret")
    engine = engine_on(server, None)
    engine.generate(PROMPTS, SamplingParams(3, 0), [0] * 4)
    sync_weights(engine.working, tiny_model(seed=3))
    engine.generate(PROMPTS, SamplingParams(3, 0), [0] * 4)
    (folder,) = server.folders
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and server.reloads == 2
    assert server.keys == {"Bearer sk-secret"}
    del engine
    gc.collect()
    assert not folder.exists()


def test_weights_travel_after_a_step_of_adapters_that_train_on_the_working_copy(tmp_path: Path) -> None:
    server, stage = Server(), make_stage(tmp_path / "stage", tiny_model(seed=1), anchors=False)
    config = settings(
        lora_rank=2, anchor_share=0.0, steps=3, warm_start_steps=1, warm_start_until=1.0, learning_rate=0.05
    )
    engine = VllmEngine(stage.student, stage.working, served(server), str(tmp_path / "weights"))
    train(replace(stage, engine=engine), config)
    assert server.reloads >= 2  # in the on-policy steps, of which each follows a change


def test_a_server_samples_from_the_plain_distribution_whatever_the_model_folder_says(tmp_path: Path) -> None:
    server = Server()
    engine_on(server, tmp_path).generate(PROMPTS, SamplingParams(3, 1.0), [0] * 4)
    for body in server.requests:
        assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
        assert (body["presence_penalty"], body["frequency_penalty"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (Server(raw=True), "differ from this model's by 3.00 nats"),
        (Server(dev=False), "VLLM_SERVER_DEV_MODE=1"),
        (Server(ignores=("lm_head.weight",)), "tie_word_embeddings"),
        (lambda request: httpx2.Response(500, text="out of memory"), "500: out of memory"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_used_is_refused(server: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        engine_on(server, tmp_path).generate(PROMPTS, SamplingParams(4), [0] * 4)


def test_the_server_may_stay_some_steps_behind_and_its_answers_are_marked(tmp_path: Path) -> None:
    server = Server()
    stage = make_stage(tmp_path, tiny_model(seed=1), anchors=False)
    stage = replace(stage, engine=engine_on(server, tmp_path / "weights", stage.student.model))
    config = settings(update_sampler_every=3, anchor_share=0.0, batch_size=2)
    marked, reloads = [], []
    for step in range(7):
        with torch.no_grad():
            next(iter(stage.engine.working.parameters())).mul_(1.001)  # as an optimizer step does
        rows = sample(stage, config, batch_rows(stage, config, LoopState(step)), LoopState(step, first_own=0))
        marked.append({row.lagging for row in rows})
        reloads.append(server.reloads)
    assert reloads == [1, 1, 1, 2, 2, 2, 3]
    assert marked == [{False}, {True}, {True}, {False}, {True}, {True}, {False}]
    stage.engine.generate(PROMPTS[:1], SamplingParams(2), [0])  # an evaluation, whatever the step
    assert server.reloads == 3
    with torch.no_grad():
        next(iter(stage.engine.working.parameters())).mul_(1.001)
    stage.engine.generate(PROMPTS[:1], SamplingParams(2), [0])
    assert server.reloads == 4


def test_the_first_own_answers_come_from_what_the_warm_start_taught(tmp_path: Path) -> None:
    """It has the weights of the stage's start since the anchors were answered, and the warm start ends at step 4."""
    server = Server()
    stage = make_stage(tmp_path, tiny_model(seed=1), anchors=False)
    stage = replace(stage, engine=engine_on(server, tmp_path / "weights", stage.student.model))
    stage.engine.generate(PROMPTS, SamplingParams(2), [0] * 4)
    config, state, reloads = settings(update_sampler_every=3, anchor_share=0.0, batch_size=2), LoopState(4), []
    for state.step in range(4, 9):
        with torch.no_grad():
            next(iter(stage.engine.working.parameters())).mul_(1.001)
        sample(stage, config, batch_rows(stage, config, state), state)
        reloads.append(server.reloads)
    assert reloads == [2, 2, 2, 3, 3] and state.first_own == 4


def test_only_a_server_can_stay_behind() -> None:
    with pytest.raises(InputError, match="the own engine is always in step"):
        parse(RunConfig, {"train": {"update_sampler_every": 2}}, where="x")


def test_no_server_is_one_clear_error(tmp_path: Path) -> None:
    subject = tiny_model()
    nobody = VllmServer(RolloutConfig(engine="vllm", url="http://127.0.0.1:9"))
    engine = VllmEngine(loaded(subject), subject, nobody)
    with pytest.raises(InputError, match=r"rollout.url http://127.0.0.1:9: no vLLM server answers there"):
        engine.generate(PROMPTS, SamplingParams(4), [0] * 4)


def test_settings_of_a_server_need_the_engine() -> None:
    with pytest.raises(InputError, match='url: has an effect only with engine = "vllm"'):
        parse(RunConfig, {"rollout": {"url": "http://elsewhere"}}, "test")
    with pytest.raises(InputError, match="needs the url of a running server"):
        parse(RunConfig, {"rollout": {"engine": "vllm"}}, "test")
    with pytest.raises(InputError, match='url: has no effect with mode = "colocate"'):
        parse(RunConfig, {"rollout": {"engine": "vllm", "mode": "colocate", "url": "http://here"}}, "test")
    with pytest.raises(InputError, match='options: has no effect with mode = "server"'):
        parse(RunConfig, {"rollout": {"engine": "vllm", "url": "http://here", "options": {"seed": 1}}}, "test")


class Library(SimpleNamespace):
    """As the module vllm. ``started``: what each LLM was given."""

    def __init__(self) -> None:
        super().__init__(SamplingParams=Sampling, started=[])

    def LLM(self, **given: Any) -> Llm:
        if "tensor_parallel" in given:
            raise TypeError("unexpected keyword argument 'tensor_parallel'")
        self.started.append(given)
        return Llm(Server())


def test_one_vllm_a_process_is_started_with_what_exactness_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, "vllm", library)
    monkeypatch.setattr(vllm_colocated, "_RUNNING", {})
    monkeypatch.setattr(os, "environ", {})
    first = colocated("a-model", ModelConfig(revision="abc"), "bfloat16", 512, {"gpu_memory_utilization": 0.5})
    assert colocated("a-model", ModelConfig(revision="abc"), "bfloat16", 512, {"gpu_memory_utilization": 0.5}) is first
    assert colocated("a-model", ModelConfig(revision="abc"), "float32", 64, {}) is not first
    assert [(given["dtype"], given["max_model_len"], given["gpu_memory_utilization"]) for given in library.started] == [
        ("bfloat16", 512, 0.5), ("float32", 64, 0.3)]  # fmt: skip
    assert all(given.items() >= OURS.items() for given in library.started)
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"  # nothing is sent to its makers
    assert {(given["model"], given["revision"], given["trust_remote_code"]) for given in library.started} == {
        ("a-model", "abc", False)}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logprobs_mode": "raw_logprobs", "max_model_len": 9},
            "rollout.options: logprobs_mode, max_model_len: set by Perdure",
        ),
        ({"tensor_parallel": 2}, "rollout.options: vLLM does not start: .*tensor_parallel"),
    ],
)
def test_options_that_vllm_cannot_have_are_refused(options: dict[str, Any], message: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "vllm", Library())
    monkeypatch.setattr(vllm_colocated, "_RUNNING", {})
    with pytest.raises(InputError, match=message):
        colocated("a-model", ModelConfig(revision="abc"), "bfloat16", 512, options)


class Refusal(Exception):
    """As vllm.exceptions.VLLMClientError."""


@pytest.mark.parametrize("kind", [ValueError, Refusal])
def test_a_prompt_that_vllm_cannot_take_is_one_clear_error(kind: type[Exception], tmp_path: Path) -> None:
    class Short(Llm):
        def generate(self, prompts: list[dict[str, Any]], params: list[Sampling], use_tqdm: bool) -> list[Any]:
            raise kind("The prompt is longer than the maximum model length of 2")

    library = SimpleNamespace(SamplingParams=Sampling, exceptions=SimpleNamespace(VLLMClientError=Refusal))
    vllm = ColocatedVllm(Short(Server()), library)
    with pytest.raises(InputError, match="vLLM in this process: The prompt is longer"):
        engine_on(vllm, tmp_path).generate(PROMPTS, SamplingParams(4), [0] * 4)


def colocating() -> RunConfig:
    return parse(RunConfig, {"rollout": {"engine": "vllm", "mode": "colocate"}}, "test")


def test_vllm_that_is_not_installed_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    subject = tiny_model()
    with pytest.raises(InputError, match=r"vLLM cannot be imported .*vllm>=0"):
        session._remote(loaded(subject), subject, colocating())


def test_several_processes_need_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "GROUP", SimpleNamespace(count=2))
    subject = tiny_model()
    with pytest.raises(InputError, match='"colocate" is for one process'):
        session._remote(loaded(subject), subject, colocating())


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("mode", ["server", pytest.param("colocate", marks=OF_IMPORTS)])
def test_parity_with_a_real_vllm(mode: str, temperature: float) -> None:
    """Serving the embedded model: log-probabilities of both sides over the same samples, before and after an update
    of all weights, within bfloat16's rounding."""
    from perdure.anchors import general_prompts
    from perdure.batching import collate
    from perdure.losses import pick
    from perdure.models import head_of, hidden_at_loss_positions
    from perdure.session import open_session

    place = {"mode": mode}
    if mode == "server":
        if "PERDURE_VLLM_URL" not in os.environ:
            pytest.skip("PERDURE_VLLM_URL names no running vLLM server")
        place = {"url": os.environ["PERDURE_VLLM_URL"]}
    elif importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed beside Perdure")
    model = {"compute_dtype": "bfloat16", "max_window": 512}
    config = {"rollout": {"engine": "vllm"} | place, "model": model}
    subject = open_session(parse(RunConfig, config, "test"))
    prompts = [subject.renderer.student_prompt(row) for row in general_prompts()[:16]]
    for update in (False, True):
        if update:
            with torch.no_grad():
                for parameter in subject.loaded.model.parameters():
                    parameter += 0.02 * parameter.std() * torch.randn(parameter.shape) if parameter.ndim > 1 else 0
            subject.publish()
        answers = subject.engine.generate(prompts, SamplingParams(32, temperature), list(range(16)))
        rollouts = [
            subject.renderer.rollout(p.example, answer, None) for p, answer in zip(prompts, answers, strict=True)
        ]
        batch = collate(rollouts, "student", subject.loaded.pad_id)
        with torch.no_grad():
            hidden_NH = hidden_at_loss_positions(subject.working, batch)
            own_N = pick((head_of(subject.working).logits(hidden_NH) / temperature).log_softmax(-1), batch.targets_N)
        difference_N = own_N - torch.tensor([value for answer in answers for value in answer.sampler_logprobs])
        assert difference_N.abs().mean() < 0.08 and difference_N.mean().abs() < 0.03
