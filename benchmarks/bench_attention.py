"""Attention inside the sequences of a batch, from the QKV product to the context, without dropout.

Who packs reads the product as it is, `[tokens, 3, heads, head_dim]`; who pads gets it padded, and its mask made, before
the clock starts. So is the block mask of flex_attention made. Our table of tiles is part of every timed call: a model
makes it once for all its layers, but flash-attn does without one. Full batches have no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contest import Case, Contender, Contest, Operands, UnservedError, cases, differentiate, on_rows
from providers import compiled, fresh, on_gpu
from torch import Tensor
from workloads import BYTETRANSFORMER, FLASH_ATTENTION, MIXES

from fastbert.kernels import cost
from fastbert.ops.attention import attention
from fastbert.packing import Packing
from fastbert.rivals.runtimes import installed

SCORES_BYTES = 2**33  # beyond this the scores of a padded batch are not worth an attempt


def operands(case: Case) -> Operands:
    work = case.workload
    packing = Packing.from_lengths(work.lengths, device=case.device)
    shape = (work.tokens, work.heads, work.head_dim)
    return Operands.random(case, {"qkv": (work.tokens, 3, *shape[1:])}, shape, packing)


def one_by_one(qkv: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """softmax(Q K^T / sqrt(head_dim)) V of each sequence, by plain products."""
    contexts = []
    for sequence in qkv.split(lengths):
        query, key, value = sequence.permute(1, 2, 0, 3)
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        contexts.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(contexts)


def exact(case: Case, of: Operands) -> dict[str, Tensor]:
    return differentiate(case, of.to(torch.float64), lambda qkv: one_by_one(qkv, case.workload.lengths))


def plain(case: Case, of: Operands) -> dict[str, Tensor]:
    return differentiate(case, of, lambda qkv: one_by_one(qkv, case.workload.lengths))


def costs(case: Case, of: Operands) -> list[cost.Cost]:
    shape = case.workload.lengths, case.workload.heads, case.workload.head_dim, case.torch_dtype
    return [cost.attention(*shape, lse=case.backward), cost.attention_backward(*shape)][: 1 + case.backward]


def padded(case: Case, of: Operands, forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> Contender:
    """A contender of `forward(query, key, value, mask)`, `[batch, heads, seqlen, head_dim]`.

    `mask` is bool `[batch, 1, 1, seqlen]`, or None where nothing is padded.
    """
    packing: Packing = of.fixed
    qkv = packing.unpack(of.leaves["qkv"].detach()).requires_grad_(case.backward)
    ones = torch.ones(packing.tokens, dtype=torch.bool, device=case.device)
    mask = None if packing.tokens == case.workload.padded_tokens else packing.unpack(ones)[:, None, None, :]

    def on_grid(qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return forward(query, key, value, mask).transpose(1, 2)

    grid = Operands({"qkv": qkv}, packing.unpack(of.dout))

    def pack(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: packing.pack(result) for name, result in results.items()}

    return Contender(lambda: differentiate(case, grid, on_grid), pack, case.workload.padded_tokens)


def fastbert(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, lambda qkv: attention(qkv, fresh(of.fixed)))


def torch_eager(case: Case, of: Operands) -> Contender:
    work = case.workload
    needed = work.batch * work.heads * work.max_seqlen**2 * case.torch_dtype.itemsize
    if needed > SCORES_BYTES:
        raise UnservedError(f"its scores would take {needed / 2**30:.0f} GiB")

    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ value

    return padded(case, of, forward)


def torch_sdpa(case: Case, of: Operands) -> Contender:
    return padded(case, of, lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def torch_varlen(case: Case, of: Operands) -> Contender:
    on_gpu(case)
    varlen_attn: Any = installed("torch.nn.attention.varlen").varlen_attn
    if case.dtype == "fp32":
        raise UnservedError("it has no float32")
    packing: Packing = of.fixed
    where = packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
    return on_rows(case, of, lambda qkv: varlen_attn(*qkv.unbind(1), *where))


def torch_flex(case: Case, of: Operands) -> Contender:
    """flex_attention, compiled, over all tokens as one sequence in which each sees its own only."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.backward and case.device.type == "cpu":
        raise UnservedError("it has no gradient on a CPU")
    packing: Packing = of.fixed
    owner = torch.repeat_interleave(torch.arange(packing.batch, device=case.device), packing.lengths)
    sees = create_block_mask(
        lambda batch, head, row, column: owner[row] == owner[column],
        None, None, packing.tokens, packing.tokens, device=case.device,
    )  # fmt: skip
    attend = compiled(flex_attention)

    def forward(qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(1, 2, 0, 3)[:, None]
        return attend(query, key, value, block_mask=sees)[0].transpose(0, 1)

    return on_rows(case, of, forward)


def flash_attn(case: Case, of: Operands) -> Contender:
    function: Any = installed("flash_attn").flash_attn_varlen_qkvpacked_func
    on_gpu(case)
    if case.dtype == "fp32":
        raise UnservedError("it has no float32")
    packing: Packing = of.fixed
    return on_rows(case, of, lambda qkv: function(qkv, packing.cu_seqlens, packing.max_seqlen))


def xformers(case: Case, of: Operands) -> Contender:
    ops: Any = installed("xformers.ops")
    on_gpu(case)
    bias = ops.fmha.BlockDiagonalMask.from_seqlens(list(case.workload.lengths))

    def forward(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unbind(1)
        return ops.memory_efficient_attention(query[None], key[None], value[None], attn_bias=bias)[0]

    return on_rows(case, of, forward)


PROVIDERS = {
    "fastbert": fastbert,
    "torch eager": torch_eager,
    "torch SDPA": torch_sdpa,
    "torch varlen": torch_varlen,
    "torch flex": torch_flex,
    "flash-attn": flash_attn,
    "xformers": xformers,
}
CONTEST = Contest(PROVIDERS, operands, plain, exact, costs)
WORKLOADS = [*MIXES, *FLASH_ATTENTION, *BYTETRANSFORMER]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", cases("attention", WORKLOADS, passes=("forward", "forward+backward")))
def test_attention(case: Case, provider: str, compete: Any) -> None:
    compete(CONTEST, case, provider)
