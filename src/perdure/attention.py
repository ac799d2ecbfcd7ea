"""transformers models on packed rows: an attention function that reads a ``packing.Layout``.

Registered with transformers under NAME; without a layout it is what the model had before. Gradients flow through shared
segments, so results are those of separate rows, forward and backward, up to rounding. Dimension letters: packing.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from perdure.packing import Group, KeyValues, Layout, advance, pack

NAME = "perdure_packed"
"""The attention implementation's name in transformers."""


def packed_hidden(model: Any, layout: Layout) -> Tensor:
    """Last hidden states of the packed tokens, [T, hidden]. ``model`` is a backbone that ``enable`` accepted."""
    # A mask with four dimensions is taken as it is; without one, transformers would make [T, T] for every pass, and ask
    # the device what the positions are.
    unread = layout.position_ids_T.new_zeros(1, 1, 1, 1, dtype=torch.bool)
    out = model(
        input_ids=layout.input_ids_T[None], position_ids=layout.position_ids_T[None], attention_mask=unread,
        use_cache=False, layout=layout,
    )  # fmt: skip
    return out.last_hidden_state[0]


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
              dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
              layout: Layout | None = None, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: query [1, heads, T, D], key and value [1, key heads, T, D]."""
    if layout is None and softcap is not None:  # sdpa does not know it
        return _capped_rows(module, query, key, value, attention_mask, scaling, softcap), None
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      sliding_window=sliding_window, **kwargs)  # fmt: skip
    if unknown := [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"packed attention does not know {unknown[0]}")
    kinds = getattr(module.config, "layer_types", None)
    if kinds and (kinds[module.layer_idx] == "sliding_attention") != (sliding_window is not None):
        raise NotImplementedError("this layer's window is in a mask that packed attention never sees")
    # Autocast leaves rotated queries and keys in float32. With gradients a CPU is faster in float32 (docs/log.md).
    dtype = torch.float32 if value.device.type == "cpu" and torch.is_grad_enabled() else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    if layout.keep:
        layout.keep.write(module.layer_idx, key_THD, value_THD)
    outputs = []
    for group in layout.groups:
        if group.keys_SK is not None:
            keys, values = (_rows(x, group.keys_SK).transpose(1, 2) for x in (key_THD, value_THD))
        else:
            assert layout.keep is not None
            kept = layout.keep.store.layers[module.layer_idx]
            keys, values = (x[: len(group.queries_SQ), :, : group.width] for x in kept)
        with torch.autocast(value.device.type, enabled=False):
            out_SQHD = _attend(
                group, _rows(query_THD, group.queries_SQ), keys, values, scaling, sliding_window, softcap
            )
        outputs.append(out_SQHD.flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.back_T)[None], None


def _rows(x_THD: Tensor, index_SK: Tensor) -> Tensor:
    """x[index], [S, K, H, D]; the backward of ``index_select`` is several times faster than that of indexing."""
    return x_THD.index_select(0, index_SK.flatten()).unflatten(0, index_SK.shape)


def _attend(group: Group, query_SQHD: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None,
            softcap: float | None) -> Tensor:  # fmt: skip
    """[S, Q, H, D]; ``key`` and ``value`` are [S, key heads, K, D]."""
    S, Q, H, D = query_SQHD.shape
    key_heads = key.shape[1]
    each = H // key_heads
    if group.plain and softcap is None and (window is None or window >= group.width):
        out = scaled_dot_product_attention(query_SQHD.transpose(1, 2), key, value, is_causal=True, scale=scaling,
                                           enable_gqa=each > 1)  # fmt: skip
        return out.transpose(1, 2)
    # The query heads of one key head become more queries of it: no copy of the keys for each.
    query = query_SQHD.view(S, Q, key_heads, each, D).permute(0, 2, 3, 1, 4).reshape(S, key_heads, each * Q, D)
    mask = group.mask(window, query.dtype).expand(S, each, Q, group.width).reshape(S, 1, each * Q, group.width)
    if softcap is None:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        out = _capped(query, key, value, mask, scaling, softcap)
    return out.view(S, key_heads, each, Q, -1).permute(0, 3, 1, 2, 4).reshape(S, Q, H, -1)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    """Attention whose scores are capped by a tanh before the additive ``mask``."""
    scores = (query @ key.transpose(-1, -2)) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    weights = (torch.tanh(scores / softcap) * softcap + mask).float().softmax(-1)
    return weights.to(value.dtype) @ value


def _capped_rows(module: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scaling: float | None,
                 softcap: float) -> Tensor:  # fmt: skip
    """Without a layout: rows and their mask as transformers gives them to sdpa, [B, T, heads, D]."""
    if seen is None:  # sdpa would be told "causal"; a cached decode asks for its last tokens alone
        queries, keys = query.shape[2], key.shape[2]
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    mask = torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~seen, torch.finfo(query.dtype).min)
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    return _capped(query, key, value, mask, scaling, softcap).transpose(1, 2)


def is_enabled(model: Any) -> bool:
    """Whether ``enable`` has accepted this model (or the one it was copied from)."""
    return model.config.get_text_config()._attn_implementation == NAME


@torch.no_grad()
def enable(model: Any) -> bool:
    """Let a causal language model run packed; False, and nothing changed, where its architecture does not allow it.

    Accepted is what gives the hidden states of separate rows, and whose layers see their window as their settings say.
    The model's results without a layout stay those of sdpa (or of eager attention, where it has a soft cap)."""
    before = model.config._attn_implementation
    if before == NAME:
        return True
    if before not in ("sdpa", "eager") or not _known(model):
        return False
    rows = [[1, 2, 3, 1, 2, 3, 1, 2, 3, 4], [1, 2, 3, 1, 2, 3, 1, 2, 3, 5, 2], [3, 1]]
    backbone, device = model.base_model, model.device
    wanted = [
        backbone(input_ids=torch.tensor([row], device=device), use_cache=False).last_hidden_state[0] for row in rows
    ]
    model.set_attn_implementation(NAME)
    layout = pack(rows, device)
    try:
        hidden = packed_hidden(backbone, layout)
        store = KeyValues(len(rows), 16)
        packed_hidden(backbone, pack([row[:-1] for row in rows], device, store))
        ends = advance(store, [row[-1:] for row in rows], [len(row) - 1 for row in rows], device)
        last = packed_hidden(backbone, ends)
        same = all(
            torch.allclose(hidden[path], states, rtol=1e-2, atol=1e-3) and
            torch.allclose(last[slot], states[-1], rtol=1e-2, atol=1e-3)
            for slot, (path, states) in enumerate(zip(layout.paths, wanted, strict=True))
        )  # fmt: skip
    except (NotImplementedError, TypeError, AttributeError, ValueError, RuntimeError, IndexError):
        same = False  # the architecture passes no layout to its attention, or is none that this attention knows
    if not same:
        model.set_attn_implementation(before)
    return same


def _known(model: Any) -> bool:
    """Rotary positions, and only layers whose mask is causal or a sliding window."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rotary = getattr(config, "rope_parameters", None) is not None
    return rotary and kinds <= {"full_attention", "sliding_attention"} and not model._is_stateful


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
