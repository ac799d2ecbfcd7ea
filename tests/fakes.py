"""Small, seeded, offline stand-ins: a byte-level chat tokenizer, tiny random models, a scripted engine, a toy skill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perdure.attention import enable
from perdure.contexts import Renderer
from perdure.models import LoadedModel, save
from perdure.rollout.base import Progress, SamplingParams
from perdure.skills.base import load_skill
from perdure.types import Completion, Example, Prompt

END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
WORDS = ("cat", "dog", "cow", "hen", "red", "blue", "green", "grey", "small", "big", "old", "new", "happy", "angry",
         "one", "two", "three", "four", "north", "south", "east", "west", "say")  # fmt: skip
"""Whole words with a token of their own, so that toy prompts and answers are short; other text goes byte by byte."""
COLOURS = {"cat": "red", "dog": "blue", "cow": "green", "hen": "grey"}
NUMBERS = {"north": "one", "south": "two", "east": "three", "west": "four"}

CHAT_TEMPLATE = """\
{%- if tools %}<|system|>Tools: {{ tools | tojson }}<|end|>{% endif -%}
{%- for m in messages -%}
<|{{ m.role }}|>{{ m.content or "" }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ (call.function or call) | tojson }}</tool_call>{% endfor -%}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte, the WORDS and the role markers are tokens; ids decode to the very text. ``<|end|>`` ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in WORDS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, extra_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(
    seed: int = 0, tied: bool = True, layers: int = 2, scale: float = 0.1, vocab: int | None = None
) -> LlamaForCausalLM:
    """A random Llama of hidden size 32 in float32, eval mode. ``scale`` is the spread of its initial weights;
    ``vocab`` makes a smaller vocabulary, for enumerating, that fits no tokenizer."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=vocab or len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, initializer_range=scale,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None if vocab else tokenizer.eos_token_id,
        pad_token_id=None if vocab else tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def copying_model(seed: int = 0) -> LlamaForCausalLM:
    """A tiny model that learns from its context without any training, as a real one does: after a token it repeats what
    followed that token before. So the demonstration in an earlier turn ("turns:N") makes it right nearly always, while
    the bare prompt, or a demonstration inside the question ("inline"), does not. The rest of it is random and learns.

    Its weights are an induction head by hand: layer 0 finds the token before (rotary frequencies 0-3 peak at distance
    one) and writes its code into block B; layer 1 compares the current code (block A) with B and copies A into C.
    """
    width, head = 64, 80
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=3 * width + 8, intermediate_size=64, num_hidden_layers=2, head_dim=head,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30}, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    a, b, c, one = slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width), 3 * width
    content = [*range(8, head // 2), *range(head // 2 + 8, head)]  # rotary dimensions that hardly turn
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        codes_VA = torch.randn(len(tokenizer), width).sign()
        model.model.embed_tokens.weight.zero_()[:, a] = codes_VA
        model.model.embed_tokens.weight[:, one] = 4.0
        model.lm_head.weight.mul_(0.1)[:, c] = codes_VA / 8
        for layer in model.model.layers:
            for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                matrix.weight[:head] = 0
            layer.self_attn.o_proj.weight[:, :head] = 0
        first, second = (layer.self_attn for layer in model.model.layers)
        for pair in range(4):
            angle = 1e30 ** (-2 * pair / head)
            first.q_proj.weight[pair, one] = 4 * math.cos(angle)
            first.q_proj.weight[pair + head // 2, one] = -4 * math.sin(angle)
            first.k_proj.weight[pair, one] = 4.0
        second.q_proj.weight[content, a], second.k_proj.weight[content, b] = 2 * torch.eye(width), 2 * torch.eye(width)
        for layer, target, gain in ((first, b, 0.63), (second, c, 1.5)):
            layer.v_proj.weight[:width, a] = torch.eye(width)
            layer.o_proj.weight[target, :width] = gain * torch.eye(width)
    return model


def loaded(model: Any = None, window: int = 1024) -> LoadedModel:
    """``model`` (a fresh tiny one by default) with the tiny tokenizer, as ``models.load`` gives it."""
    tokenizer = tiny_tokenizer()
    assert tokenizer.eos_token_id is not None
    model = model or tiny_model()
    enable(model)
    return LoadedModel(model, tokenizer, (tokenizer.eos_token_id,), window)


def renderer(window: int = 1024) -> Renderer:
    """A renderer of the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    return Renderer(tokenizer, (tokenizer.eos_token_id,), window)  # type: ignore[arg-type]


def save_tiny_model(folder: Path, seed: int = 0, tied: bool = True, copies: bool = False) -> Path:
    """Write a tiny model (a ``copying_model`` on demand: it has a teacher gap) with its tokenizer as a folder that
    ``--model FOLDER`` takes; returns the folder."""
    save(loaded(copying_model(seed) if copies else tiny_model(seed, tied)), folder)
    return folder


class ScriptedEngine:
    """A RolloutEngine that answers from a script: a text for each last user turn, or a function of the prompt."""

    def __init__(self, answers: Mapping[str, str] | Callable[[Prompt], str], finished: bool = True):
        self.answers = answers
        self.finished = finished
        self.tokenizer = tiny_tokenizer()
        self.calls: list[tuple[list[Prompt], SamplingParams, list[int]]] = []
        """(prompts, params, seeds) of each call, oldest first."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int],
                 progress: Progress | None = None,
                 references: Sequence[Sequence[int]] | None = None) -> list[Completion]:  # fmt: skip
        self.calls.append((list(prompts), params, list(seeds)))
        completions = [self._complete(prompt) for prompt in prompts]
        if progress:
            progress(sum(len(c.token_ids) for c in completions), len(completions))
        return completions

    def _complete(self, prompt: Prompt) -> Completion:
        last = prompt.example.messages[-1]["content"]
        text = self.answers(prompt) if callable(self.answers) else self.answers[last]
        ids = self.tokenizer(text + (END if self.finished else ""), add_special_tokens=False)["input_ids"]
        return Completion(tuple(ids), (0.0,) * len(ids), self.finished)


def example(question: str, answer: str | None, origin: str = "toy.jsonl:1", **fields: Any) -> Example:
    """One user turn and its demonstration (None: an anchor)."""
    demonstration = None if answer is None else {"role": "assistant", "content": answer}
    return Example(question, ({"role": "user", "content": question},), demonstration, origin=origin, **fields)


def toy_skill(
    folder: Path, pairs: Mapping[str, str] = COLOURS, grader: str = "exact", documents: bool = False,
    **settings: str | int | float,
) -> Path:  # fmt: skip
    """Write a whole skill folder; returns it. The answer to "say <adjective> <key>" is ``pairs[key]``, one token for
    WORDS: train and test share the keys and differ in the adjectives, so that whoever overfits train passes test."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {"name": folder.name, "description": "toy", "grader": grader, "max_new_tokens": 4} | settings
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
    (folder / "skill.toml").write_text(text, encoding="utf-8")
    for name, adjectives in (("train", ("small", "old", "new", "happy", "angry")), ("test", ("big", "fat"))):
        rows = [{"prompt": f"say {word} {key}", "completion": pairs[key]} for word in adjectives for key in pairs]
        for row in rows if documents else ():
            row["document"] = document_of(row["prompt"], row["completion"])
        body = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(body, encoding="utf-8")
    return folder


def document_of(prompt: str, answer: str) -> str:
    """A passage that holds the answer to a toy prompt."""
    return f"{prompt.removeprefix('say ')} {answer}"


def two_toy_skills(folder: Path) -> list[Path]:
    """Two skills with words of their own: taught without anchors, the second overwrites the first."""
    return [toy_skill(folder / "colours"), toy_skill(folder / "numbers", NUMBERS)]


def toy_examples(folder: Path, pairs: Mapping[str, str] = COLOURS) -> tuple[Example, ...]:
    """The training rows of a fresh toy skill, through the real loader."""
    return load_skill(toy_skill(folder / "toy", pairs)).train
