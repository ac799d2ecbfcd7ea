"""A loaded model as lm-eval sees one. Importing this module imports lm-eval: do it where a probe runs, not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

from perdure.likelihood import CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS, Pair, length, score_pairs
from perdure.types import InputError

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""

NEW_TOKENS = 256
"""lm-eval's own default where a generating task sets no limit."""
GENERATION_ROWS = 16


class ProbedModel(TemplateLM):
    """lm-eval's three requests, answered by a model that is already in memory. ``tokens`` counts what it processed.

    ``key``: of its session, where several processes share the scoring."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        progress: Progress | None = None,
        batch_tokens: int | None = None,
        key: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        on_cpu = model.device.type == "cpu"
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else DEVICE_BATCH_TOKENS)
        self.key = key
        self.tokens = 0
        self._progress = progress
        self._total = 0
        self._device = model.device
        self._window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands in for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that brings its own opening token gets no second one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        for (texts, _, _), pair in zip(requests, pairs, strict=True):
            self._check_window(len(pair[0]) + len(pair[1]), texts[0])
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the model takes."""
        windows: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self._window - 1, 1)
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((tuple(context), tuple(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += logprob
        return totals

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        self._total += sum(map(length, set(pairs)))
        return score_pairs(self.model, pairs, batch_tokens=self.batch_tokens, advance=self._advance, key=self.key)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue each context until one of its stop strings; rows with the same settings go together."""
        groups: dict[str, list[int]] = {}
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        for index, request in enumerate(requests):
            groups.setdefault(repr(_settings(request)), []).append(index)
        self._total += sum(map(len, contexts))
        texts = [""] * len(requests)
        for members in groups.values():
            members.sort(key=lambda index: -len(contexts[index]))
            for start in range(0, len(members), GENERATION_ROWS):
                batch = members[start : start + GENERATION_ROWS]
                settings = _settings(requests[batch[0]])
                written = self._generate([contexts[index] for index in batch], settings, requests[batch[0]].args[0])
                for index, text in zip(batch, written, strict=True):
                    texts[index] = text
        return texts

    @torch.no_grad()
    def _generate(self, contexts: list[list[int]], settings: dict[str, Any], text: str) -> list[str]:
        settings = dict(settings)
        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        new_tokens = settings.pop("max_gen_toks", NEW_TOKENS)
        longest = max(map(len, contexts))
        self._check_window(longest + new_tokens, text)
        ids_BT = torch.zeros((len(contexts), longest), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for b, context in enumerate(contexts):
            ids_BT[b, longest - len(context) :] = torch.tensor(context)
            mask_BT[b, longest - len(context) :] = 1
        model: Any = self.model
        written_BT = model.generate(
            input_ids=ids_BT.to(self.model.device),
            attention_mask=mask_BT.to(self.model.device),
            max_new_tokens=new_tokens,
            pad_token_id=self.eot_token_id,
            **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
            **_sampling(settings),
        )[:, longest:]
        self._advance(sum(map(len, contexts)))
        self.tokens += int((written_BT != self.eot_token_id).sum())
        return [_cut(text, stops) for text in self.tokenizer.batch_decode(written_BT, skip_special_tokens=True)]

    def _check_window(self, length: int, text: str) -> None:
        if length > self._window:
            raise InputError(
                f"a probe item needs {length} tokens, the model takes {self._window}: leave its task out of [probe] "
                f"tasks (the item begins {text[:60]!r})"
            )

    def _advance(self, tokens: int) -> None:
        self.tokens += tokens
        if self._progress is not None:
            self._progress(min(self.tokens, self._total), self._total)


def _settings(request: Any) -> dict[str, Any]:
    """The generation settings of a ``generate_until`` request."""
    return request.args[1]


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's generation settings as ``generate`` takes them: greedy unless a task asks for sampling."""
    if not settings.get("do_sample", False) or settings.get("temperature") == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return settings


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [position for stop in stops if stop and (position := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
