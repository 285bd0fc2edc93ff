"""The attention implementation `fastbert` of transformers: our attention in models that are of none of the families.

Such a model calls it once a layer, on queries, keys and values in the padded layout; all else is the model's own code.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastbert.errors import BackendError
from fastbert.model.outputs import collected_by_transformers
from fastbert.ops.attention import attention
from fastbert.packing import Packing

NAME = "fastbert"

# Arguments that transformers passes on to attention, and that change nothing in it.
HARMLESS = {
    "cache_position", "layer_idx", "num_items_in_batch", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "use_cache",
}  # fmt: skip

# Of a mask that `padding_mask` made, and that only hides padding, its packing. Nobody can write to such a mask.
_packings: Any = WeakIdKeyDictionary()


def register_attention() -> None:
    """Let transformers know the attention implementation `fastbert`: `model.set_attn_implementation("fastbert")`.

    It computes bidirectional attention, and what a mask makes of it, a causal one say: of equally many queries and
    keys, with grouped heads of keys and values, a bias of positions, dropout and gradients. Padding that transformers
    makes a mask of is dropped for the attention, whose output there is 0. A call that asks for something else raises
    BackendError: attention weights, causal attention without a mask, a cache or cross-attention (another number of
    keys), a soft cap, sinks.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """A mask as transformers' `sdpa_mask` makes it, but never None where attention is causal.

    Of one that only hides padding the packing is made here, once for all layers.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    kept = attention_mask if mask_function is bidirectional_mask_function and q_length == kv_length else None
    if kept is None or kept.shape != (batch_size, kv_length) or _is_recorded():
        kwargs |= {"mask_function": mask_function, "attention_mask": attention_mask, "allow_is_causal_skip": False}
        return sdpa_mask(batch_size, q_length, kv_length, *args, **kwargs)
    mask = kept.bool()[:, None, None].expand(batch_size, 1, q_length, kv_length)
    _packings[mask] = Packing.from_mask(kept.bool())
    return mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; see `ops.attention`.

    Args:
        module: the model's module of attention; says whether it is causal where `is_causal` does not, as for sdpa.
        query: `[batch, heads, seqlen, head_dim]`.
        key, value: the same, or with fewer heads, each of which serves as many of the query's.
        attention_mask: `[batch, seqlen]`, 0 at padding; or `[1|batch, 1|heads, 1|seqlen, seqlen]`, bool (False hides)
            or floating (added to the scores).
        dropout: probability that a weight is dropped.
        scaling: factor on the scores.
        position_bias: floating `[1|batch, 1|heads, seqlen, seqlen]`, added to the scores.
        sliding_window: is in the mask already.

    Returns:
        `[batch, seqlen, heads, head_dim]`, 0 at padding; and None, in the place of the weights.

    Raises:
        BackendError: see `register_attention`.
    """
    batch, heads, seqlen, _ = query.shape
    _check(module, query, key, value, kwargs)
    packing, bias = _layout(attention_mask, batch, seqlen, query)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if bias is None and is_causal and seqlen > 1:
        _refuse(module, "causal attention without a mask that says so")
    if bias is None and sliding_window is not None and sliding_window < seqlen:
        _refuse(module, "a sliding window without a mask that says so")
    if position_bias is not None:
        if packing.tokens < batch * seqlen:  # places in the sequences are no columns there
            bias, packing = _added(attention_mask, query), _whole(batch, seqlen, query)
        bias = position_bias if bias is None else bias + position_bias
    groups = heads // key.shape[1]
    states = [query, *(x if groups == 1 else x.repeat_interleave(groups, 1) for x in (key, value))]
    qkv = torch.stack([x.transpose(1, 2) for x in states], 2)
    padded = packing.tokens < batch * seqlen
    seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout else None
    packed = packing.pack(qkv) if padded else qkv.flatten(0, 1)
    out = attention(packed, packing, scale=scaling, bias=bias, dropout=dropout, seed=seed)
    return packing.unpack(out) if padded else out.unflatten(0, (batch, seqlen)), None


def _check(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, others: dict[str, Any]) -> None:
    """Raise BackendError for what can't be served."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined, no-untyped-call]
        _refuse(module, "torch.jit.trace or torch.export, which record for other batches")
    if others.pop("output_attentions", False) or "attentions" in collected_by_transformers():
        _refuse(module, "output_attentions: no kernel holds attention weights")
    asked = [
        name for name, given in others.items() if name not in HARMLESS and given is not None and given is not False
    ]
    if asked:
        _refuse(module, ", ".join(asked))
    if key.shape[2] != query.shape[2]:
        _refuse(module, f"{query.shape[2]} queries of {key.shape[2]} keys, as with a cache or in cross-attention")
    heads = query.shape[1] % max(key.shape[1], 1) == 0 and key.shape[0] == query.shape[0]
    if not heads or key.shape != value.shape or key.shape[3] != query.shape[3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        _refuse(module, f"queries, keys and values of shapes {shapes}")


def _refuse(module: nn.Module, got: str) -> NoReturn:
    mend = 'Call model.set_attn_implementation("sdpa").'
    raise BackendError(f"attention of {type(module).__name__}", got, "what fastbert.register_attention names", mend)


def _layout(mask: Tensor | None, batch: int, seqlen: int, like: Tensor) -> tuple[Packing, Tensor | None]:
    """The packing, and a bias where the mask is more than padding."""
    if mask is None:
        return _whole(batch, seqlen, like), None
    if not torch.compiler.is_compiling():
        made = _packings.get(mask)
        if made is None and mask.dim() == 2:
            made = Packing.from_mask(mask)
        if made is not None:
            return made, None
    return _whole(batch, seqlen, like), _added(mask, like)


def _whole(batch: int, seqlen: int, like: Tensor) -> Packing:
    return Packing.from_lengths([seqlen] * batch, seqlen=seqlen, device=like.device)


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers that are added to the scores, `[1|batch, 1|heads, seqlen, seqlen]`."""
    if mask is None:
        return None
    mask = mask[:, None, None] != 0 if mask.dim() == 2 else mask
    mask = mask.expand(-1, -1, like.shape[2], -1)
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask == 0, -torch.inf)


def _is_recorded() -> bool:
    """Whether something records the call, and the numbers of a mask can't be looked at."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return bool(torch.compiler.is_compiling() or torch.compiler.is_exporting() or tracing)
