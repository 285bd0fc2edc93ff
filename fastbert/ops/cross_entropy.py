"""linear_cross_entropy: the loss of a wide output layer, without its matrix of logits ever being whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.errors import ArgumentError
from fastbert.ops.common import autocasts, check_linear, described, gradients, in_full, torch_differentiates
from fastbert.packing import check_dense

IGNORED = -100  # the label that counts for nothing, as in PyTorch and Hugging Face
CHUNK_ELEMENTS = 2**25  # of logits at once: 128 MiB in float32, 1099 rows of BERT's vocabulary


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int = IGNORED
) -> Tensor:
    """Mean of `-log softmax(x @ weight^T + bias)[label]` over the rows whose label is not `ignore_index`.

    Logits are made `CHUNK_ELEMENTS` at a time, forward and again backward. Made twice, because what lives between the
    two is then one float32 a row; and because the gradient of the logits, which is as small as 1 / rows, is rounded to
    a half type after it was multiplied by the upstream gradient, where a GradScaler puts its factor. The price is a
    fourth matrix product of this layer beside three.

    Args:
        x: floating `[rows, hidden]`. Rows with an ignored label are not read.
        weight: `[vocab, hidden]`; bias: `[vocab]`. In the dtype of `x`, except under autocast, which casts all three.
        labels: int64 `[rows]`, each in [0, vocab) or `ignore_index`.

    Returns:
        A float32 scalar (float64 for float64). 0, with zero gradients, where no label counts: PyTorch's NaN would end a
        training run at the first batch in which no token happens to be masked.

    Raises:
        ArgumentError: a shape, dtype or device is wrong; on the CPU also a label that is no row of `weight` (on a
            GPU PyTorch's own assertion on the device ends the process).
    """
    check_linear(x, weight, bias)
    check_labels(labels, x.shape[:1], weight.shape[0], x.device, ignore_index)
    if autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearCrossEntropy.apply(x, weight, bias, labels, ignore_index)  # type: ignore[no-untyped-call]


def cross_entropy(logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """The same loss of logits `[rows, classes]` that are there already: a narrow head's. Errors call the labels `name`.

    Raises:
        ArgumentError: as `linear_cross_entropy`.
    """
    check_labels(labels, logits.shape[:1], logits.shape[1], logits.device, name=name)
    total = F.cross_entropy(in_full(logits), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def check_labels(
    labels: Tensor,
    shape: tuple[int, ...],
    classes: int,
    device: torch.device,
    ignore_index: int = IGNORED,
    name: str = "labels",
) -> None:
    """Raise ArgumentError unless `labels` is int64 of this shape beside the model, with classes or `ignore_index`."""
    check_dense(name, labels)
    if labels.dtype != torch.int64 or tuple(labels.shape) != shape or labels.device != device:
        raise ArgumentError(name, described(labels), f"torch.int64 of shape {tuple(shape)} on {device}")
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
    if wrong.numel():
        raise ArgumentError(name, f"label {int(wrong[0])}", f"labels from 0 to {classes - 1}, or {ignore_index}")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor:
        kept = labels != ignore_index
        count = kept.sum().clamp(min=1)
        lse = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
        losses = torch.empty_like(lse)
        for rows in _chunks(x.shape[0], weight.shape[0]):
            logits = in_full(F.linear(_kept_rows(x, kept, rows), weight, bias))  # [chunk, vocab]
            lse[rows] = logits.logsumexp(1)
            at_label = logits.gather(1, _index(labels, kept, rows)).squeeze(1)
            losses[rows] = torch.where(kept[rows], lse[rows] - at_label, 0.0)
        ctx.save_for_backward(x, weight, bias, labels, kept, count, lse)
        ctx.ignore_index = ignore_index
        return losses.sum() / count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, labels, kept, count, lse = ctx.saved_tensors
        if torch_differentiates(upstream):

            def again(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                logits = in_full(F.linear(_kept_rows(x, kept, slice(None)), weight, bias))
                return F.cross_entropy(logits, labels, ignore_index=ctx.ignore_index, reduction="sum") / count

            return *gradients(again, (x, weight, bias), upstream), None, None
        grad_x = torch.empty_like(x)
        # Chunks are summed in float32, and rounded once.
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype)
        grad_bias = lse.new_zeros(weight.shape[0])
        scale = torch.where(kept, upstream / count, 0.0).unsqueeze(1)
        for rows in _chunks(x.shape[0], weight.shape[0]):
            chunk = _kept_rows(x, kept, rows)
            grad = in_full(F.linear(chunk, weight, bias)).sub_(lse[rows, None]).exp_()  # softmax, [chunk, vocab]
            index = _index(labels, kept, rows)
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0)).mul_(scale[rows])
            grad_bias += grad.sum(0)
            grad = grad.to(x.dtype)
            grad_x[rows] = grad @ weight
            grad_weight += grad.t() @ chunk
        return grad_x, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None, None


def _chunks(rows: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocab)
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def _kept_rows(x: Tensor, kept: Tensor, rows: slice) -> Tensor:
    return x[rows].masked_fill(~kept[rows, None], 0.0)  # 0 times the NaN that may stand there would be NaN


def _index(labels: Tensor, kept: Tensor, rows: slice) -> Tensor:
    """int64 `[chunk, 1]`: the column of each row's label, 0 for ignored ones."""
    return labels[rows].masked_fill(~kept[rows], 0).unsqueeze(1)
