"""A version for those who serve it: whole weights in one dtype, or its difference to another version as a LoRA adapter.

What a stage with adapters changed is a product of low rank, and so is what a chain of such stages, or a blend of one,
changed: it is found again by singular values, exactly but for rounding, whether the versions kept their adapters or
not. So a base can be served once, with an adapter for each version (peft, vLLM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perdure.adapters import save_adapter
from perdure.card import model_card
from perdure.files import check_free, file_sha256, new_folder, replace_text, to_json
from perdure.loading import base_name, load_version
from perdure.models import LoadedModel, save
from perdure.types import InputError
from perdure.verify import problems_of_version
from perdure.workspace import BASE, Workspace

MOST_RANK = 128
"""Above it nobody serves an adapter."""
ENOUGH = 0.9999
"""Share of the difference's squares that an adapter must hold where no rank is asked for."""
DTYPES = ("bfloat16", "float16", "float32")
Factors = tuple[Tensor, Tensor]
"""(A [rank, in], B [out, rank]), float32."""


@dataclass(frozen=True)
class Difference:
    """What of a version's difference to another one an adapter can hold."""

    factors: dict[str, Factors]
    """Layer -> factors of rank up to MOST_RANK, largest singular values first."""
    squares: Tensor
    """float64 [MOST_RANK]: of all layers, what each further rank holds of the difference's squares."""
    total: float
    """The difference's squares, all parameters."""

    def share(self, rank: int) -> float:
        return float(self.squares[:rank].sum()) / self.total if self.total else 1.0

    def rank(self) -> int | None:
        """The least that holds ENOUGH; None where none does."""
        return next((rank for rank in range(1, len(self.squares) + 1) if self.share(rank) >= ENOUGH), None)


def export_weights(workspace: Workspace, name: str, folder: Path, dtype: str) -> dict[str, Any]:
    """Write a version as transformers lays a model out, in ``dtype``. Raises InputError when ``folder`` is not free."""
    check_free(folder)
    version = workspace.resolve(name)
    loaded = _version(workspace, version)
    loaded.model.to(getattr(torch, dtype))
    loaded.model.generation_config = _as_measured(loaded.model.generation_config)
    return _written(workspace, version, folder, lambda beside: save(loaded, beside), {"dtype": dtype})


def _as_measured(shipped: Any) -> Any:
    """Of the base model's generation settings the token ids alone. Servers take the rest, such as a repetition penalty,
    for their defaults, and no version was measured with those."""
    from transformers import GenerationConfig

    return GenerationConfig(**{name: getattr(shipped, name, None)
                               for name in ("bos_token_id", "eos_token_id", "pad_token_id")})  # fmt: skip


def export_adapter(workspace: Workspace, name: str, since: str, folder: Path, rank: int | None) -> dict[str, Any]:
    """Write the difference of a version to ``since`` (a version, or the base model) as a peft adapter of ``rank``, or
    of the least that holds it. Both models are in memory for it, 8 bytes a weight.

    Raises InputError where ``folder`` is not free, nothing differs, or no rank asked for and none holds it."""
    check_free(folder)
    version, since = workspace.resolve(name), workspace.resolve(since)
    base, target = _version(workspace, since), _version(workspace, version)
    found = difference(base.model, target.model)
    if not found.total:
        raise InputError(f"{version} and {since} have the same weights: there is nothing to export")
    chosen = rank or found.rank()
    if chosen is None:
        raise InputError(
            f"{version} differs from {since} by no product of rank up to {MOST_RANK} (that holds "
            f"{found.share(MOST_RANK):.1%} of it), as after training all weights: leave --adapter out, or give the "
            "--rank of an adapter that holds a part"
        )
    about = {"since": since, "rank": chosen, "share": round(found.share(chosen), 6)}
    del target
    config = workspace.config().model
    below = workspace.weights_folder(since)
    settings = {"base_model_name_or_path": str(below.absolute()) if below else base_name(config),
                "revision": config.revision or None if since == BASE else None}  # fmt: skip

    def write(beside: Path) -> None:
        _save(base.model, found, chosen, settings, beside)

    return _written(workspace, version, folder, write, about, since)


def difference(base: Any, target: Any) -> Difference:
    """``target`` minus ``base``, factored layer by layer (randomised SVD with a fixed seed)."""
    squares, total, factors = torch.zeros(MOST_RANK, dtype=torch.float64), 0.0, {}
    layers = dict(_linear(base))
    after = dict(target.named_parameters())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, before in base.named_parameters():
            change = after[name] - before
            total += float(change.double().pow(2).sum())
            layer = name.removesuffix(".weight")
            if layer in layers and bool(change.any()):
                most = min(MOST_RANK, *change.shape)
                left, values, right = torch.svd_lowrank(change, q=most, niter=4)
                squares[:most] += values.double().pow(2)
                factors[layer] = (values.sqrt()[:, None] * right.T, left * values.sqrt())
    return Difference(factors, squares, total)


def _linear(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that an adapter may change: every linear one but the head."""
    head = model.get_output_embeddings()
    return ((name, module) for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head)  # fmt: skip


def _save(base: Any, found: Difference, rank: int, below: Mapping[str, Any], folder: Path) -> None:
    """The adapter's two files as peft reads them; layers of a kind that changed but themselves did not get zeros."""
    from peft import LoraConfig

    kinds = sorted({name.rpartition(".")[2] for name in found.factors})
    tensors = {}
    for name, layer in _linear(base):
        if name.rpartition(".")[2] in kinds:
            rows, columns = layer.weight.shape
            down, up = torch.zeros(rank, columns), torch.zeros(rows, rank)
            if pair := found.factors.get(name):
                down[: len(pair[0])], up[:, : pair[1].shape[1]] = pair[0][:rank], pair[1][:, :rank]
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=kinds, task_type="CAUSAL_LM", **below)
    save_adapter(folder, settings, tensors)


def _version(workspace: Workspace, version: str) -> LoadedModel:
    if problems := problems_of_version(workspace, version):
        raise InputError("\n".join(problems))
    config = workspace.config()
    return load_version(
        config.model, workspace.weights_folder(version), torch.device("cpu"), workspace.version(BASE)["hashes"]["base"]
    )


def _written(workspace: Workspace, version: str, folder: Path, write: Callable[[Path], None],
             said: dict[str, Any], below: str | None = None) -> dict[str, Any]:  # fmt: skip
    """What ``write`` puts into the folder, and the version's record and card; ``below``: what an adapter lies on."""
    folder = folder.absolute()
    with new_folder(folder) as beside:
        write(beside)
        if version != BASE:
            info = workspace.version(version) | {"verdict": workspace.verdict(version)}
            card = model_card(info, list(workspace.taught(version)), below)
            replace_text(beside / "README.md", card)
        weights = {path.name: file_sha256(path) for path in sorted(beside.glob("*.safetensors"))}
        record = {"version": version, **said, "files": weights, "exported_from": workspace.version(version)}
        replace_text(beside / "perdure.json", to_json(record) + "\n")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"version": version, "folder": str(folder), **said, "bytes": size}
