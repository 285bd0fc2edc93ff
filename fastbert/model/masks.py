"""Every form of attention mask that Hugging Face hands to an encoder, turned into a Packing and, if need be, a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbert.backend import say_once
from fastbert.errors import ArgumentError, BackendError
from fastbert.packing import Packing, check_dense, check_has_values

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def read_mask(
    mask: Tensor | BlockMask | None,
    batch: int,
    seqlen: int,
    device: torch.device,
    *,
    by_distance: bool = False,
    zeros_at_padding: bool = False,
) -> tuple[Packing, Tensor | None]:
    """The packing of a `[batch, seqlen]` grid under `mask`, and an additive bias if padding is not all there is to it.

    Args:
        mask: None (no padding); 2-D `[batch, seqlen]` of 0/1 or bool; `[1|batch, 1|heads, 1|seqlen, seqlen]` (or the
            same without heads), bool or integer (0 hides a key) or floating (added to the scores; -inf or the dtype's
            minimum hides a key); or flex attention's BlockMask. A mask that only hides keys, the same for each row, is
            padding and gets packed. Any other keeps the whole grid and comes back as bias. One host sync on a GPU.
        by_distance: attention depends on how far apart tokens are. Then a mask that hides a key between others keeps
            the whole grid too, since without that key the others would be nearer.
        zeros_at_padding: what is computed goes, with zeros at padding, to code that may read column 0 as a sequence's
            first token: a warning, once, where a sequence begins behind it.

    Raises:
        ArgumentError: the mask has another shape or device, or a 2-D mask holds values other than 0 and 1.
        BackendError: `torch.jit.trace` or `torch.export` records the call.
    """
    _refuse_recorders()
    if mask is None:
        return Packing.from_lengths([seqlen] * batch, seqlen=seqlen, device=device), None
    if not isinstance(mask, Tensor):
        mask = _dense(mask, batch, seqlen, device)
    check_dense("attention_mask", mask)
    if mask.device != device:
        raise ArgumentError("attention_mask", f"on {mask.device}", f"on {device}, the device of the inputs")
    check_has_values("attention_mask", mask)
    facts = [*([_begins_late] if zeros_at_padding else []), *([_has_holes] if by_distance else [])]
    if mask.dim() == 2:
        _check_shape(mask, (batch,), (seqlen,))
        packing, found = Packing.from_mask_and(mask, *facts)
        if not (by_distance and found.pop()):
            _warn_of_zeros(found)
            return packing, None
        mask = mask[:, None, None] != 0
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)
    if mask.dim() != 4:
        raise ArgumentError("attention_mask", f"shape {tuple(mask.shape)}", "a mask of 2, 3 or 4 dimensions")
    _check_shape(mask[:, 0], (1, batch), (1, seqlen), (seqlen,))
    if mask.is_floating_point():
        hidden = mask <= torch.finfo(mask.dtype).min
        only_hides = (hidden | (mask == 0)).all()
    else:
        hidden = mask == 0
        only_hides = torch.ones((), dtype=torch.bool, device=mask.device)
    same_for_all = (hidden == hidden[:, :1, :1]).all()
    kept = ~hidden[:, 0, 0].expand(batch, seqlen)
    packing, (is_padding, *found) = Packing.from_kept(kept, only_hides & same_for_all, *(fact(kept) for fact in facts))
    if is_padding and not (by_distance and found.pop()):
        _warn_of_zeros(found)
        return packing, None
    bias = (mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=torch.float32)).masked_fill(
        hidden, -torch.inf
    )
    return Packing.from_lengths([seqlen] * batch, seqlen=seqlen, device=device), bias.expand(-1, -1, seqlen, -1)


def _has_holes(kept: Tensor) -> Tensor:
    """Whether a row of bool `[batch, seqlen]` has a False between two True."""
    return (kept[:, 1:] & ~kept[:, :-1]).sum(1).add(kept[:, :1].sum(1)).gt(1).any()


def _begins_late(kept: Tensor) -> Tensor:
    """Whether there is a sequence with tokens, and none in column 0."""
    return (kept[:, 1:] & ~kept[:, :1]).any()


def _warn_of_zeros(late: list[bool]) -> None:
    if any(late):
        say_once(
            "attention_mask: a sequence is padded on the left, and fastbert's encoder gives 0 at padding. What reads "
            "column 0 as its first token, as BERT's pooler and classifiers do, reads 0. Pad on the right."
        )


def _refuse_recorders() -> None:
    """Raise BackendError where a call is recorded for other batches: how many tokens there are would be taken over."""
    for recorder, on in (
        ("torch.jit.trace", torch.jit.is_tracing()),  # type: ignore[attr-defined, no-untyped-call]
        ("torch.export", torch.compiler.is_exporting()),
    ):
        if on:
            raise BackendError(
                recorder,
                "a fastbert encoder on padded inputs",
                "a call",
                "Its work depends on where the padding is. Record transformers' own model, or use torch.compile.",
            )


def _check_shape(mask: Tensor, *sizes: tuple[int, ...]) -> None:
    if any(size not in allowed for size, allowed in zip(mask.shape, sizes, strict=True)):
        expected = ", ".join("|".join(str(size) for size in sorted(set(allowed))) for allowed in sizes)
        raise ArgumentError("attention_mask", f"shape {tuple(mask.shape)} (heads aside)", f"[{expected}]")


def _dense(mask: BlockMask, batch: int, seqlen: int, device: torch.device) -> Tensor:
    """A flex attention BlockMask as bool `[batch, heads, seqlen, seqlen]`: it keeps the rule it was made from."""
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(mask, BlockMask):
        raise ArgumentError("attention_mask", type(mask).__name__, "a tensor, a BlockMask or None")
    return create_mask(mask.mask_mod, batch, mask.shape[1], seqlen, seqlen, device=device)
