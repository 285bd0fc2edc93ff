"""Products of floats on a CPU otherwise than by torch's BLAS: by its oneDNN, and by kernels of our own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.cpu.layout import in_blocks
from fastbert.cpu.machine import Machine
from fastbert.cpu.memory import as_kernels_read, room
from fastbert.reference import Approximate


def by_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gelu: Approximate | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer and GELU or a residual sum, `[rows, out]`, on tensors for which `fastest.onednn_serves`.

    The weight may be laid out for oneDNN, as `mkldnn._reorder_linear_weight` does.
    """
    rows = len(x)
    bias = None if bias is None else bias.contiguous()  # oneDNN's form reads it as if it were
    slack = onednn_rows(rows) - rows
    if slack:
        x, residual = with_slack(x, slack), None if residual is None else with_slack(residual, slack)
    if residual is not None:
        made = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    else:
        after: tuple[str, list[Any], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu)
        made = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *after)
    return made[:rows] if slack else made


def onednn_rows(rows: int) -> int:
    """How many rows oneDNN gets for so many: rounded up to one of 16 numbers from a power of two to the next.

    It keeps half a megabyte for each product of other sizes, 1,024 of them. So no two batches may each bring their own.
    """
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step


def with_slack(x: Tensor, rows: int) -> Tensor:
    """`x` with so many rows of zeros after its own."""
    return F.pad(x, (0, 0, 0, rows))


def by_kernel(machine: Machine, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight^T + bias`, float32 `[rows, out]`; the weight is laid out for it each time."""
    from fastbert.cpu import linear as kernel

    bias = x.new_zeros(len(weight)) if bias is None else as_kernels_read(bias)
    out = room((len(x), len(weight)), x.dtype)
    kernel.linear(machine, as_kernels_read(x), in_blocks(weight, machine.vectors.columns), bias, out).run()
    return out


def weight_gradient(machine: Machine, x: Tensor, dout: Tensor) -> Tensor:
    """`dout^T @ x`, float32 `[out, in]`."""
    from fastbert.cpu import weight_gradient as kernel

    dweight = room((dout.shape[1], x.shape[1]), x.dtype).zero_()
    kernel.weight_gradient(machine, as_kernels_read(x), as_kernels_read(dout), dweight).run()
    return dweight
