"""Steps as launches of Triton's kernels that are checked, decided and prepared once, for inference.

What the host does for a layer takes longer than what a GPU does for one of a small batch, and nearly all of it depends
on widths and dtypes alone. Of the number of rows only its kind counts, so that batches of ever new sizes are of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.cpu.memory import is_plain as is_plain_tensor
from fastbert.kernels import attention_choices, choices, linear_gelu_choices, precision, target
from fastbert.ops.attention import prepare_attention
from fastbert.ops.common import check_linear, observed, wants_gradient
from fastbert.ops.layer_norm import prepare_linear_layer_norm
from fastbert.ops.linear_activation import APPROXIMATE, prepare_linear_activation
from fastbert.ops.quantize_rows import (
    QuantizedRows,
    prepare_bias_gelu_quantize,
    prepare_layer_norm_quantize,
    prepare_quantize_rows,
)
from fastbert.packing import Packing
from fastbert.run.eager import Registers, formats
from fastbert.run.eight_bits import Fp8Linear, fp8_product
from fastbert.run.parts import eight_bits, in_eight_bits, is_plain, weights
from fastbert.run.steps import Attend, Convolve, Parts, Product, Step, Steps

# A step that is prepared: it reads and writes registers, given its weights.
Prepared = Callable[[Registers, Packing, Any], None]

MOST = 4096  # kinds kept

_kept: dict[tuple[Hashable, ...], list[Prepared]] = {}


def run(steps: Steps, parts: Parts, registers: Registers, packing: Packing) -> bool:
    """Take the steps of a layer, without options; see `eager.run`. False: they are not served, and nothing was done."""
    x = registers.floats["x"]
    if backend.decide(x.device).path != "triton":
        return False
    if _steps_unserved(steps) is not None:
        return False
    operands: list[list[Any]] = []
    said: list[Hashable] = []
    weights: list[Tensor] = []
    widest = 0
    for step in steps.of:
        if type(step) is Attend:
            operands.append(_NONE)
            continue
        given = _weights(step, parts)
        if type(given) is str:
            return False
        tensors, of_step = cast("tuple[list[Any], Hashable]", given)
        operands.append(tensors)
        said.append(of_step)
        weights += tensors if tensors[1] is not None else [tensors[0], *tensors[2:]]
        widest = max(widest, tensors[0].shape[0])
    states = [x, packing.cu_seqlens]
    for rows in cast("dict[str, QuantizedRows]", registers.quantized).values():
        states += rows
    kind = steps, *registers.floats, *registers.quantized, *said, *_sizes(x, packing, widest)
    prepared = of_kind(kind, states, weights, lambda: _prepare(steps, parts, registers, packing))
    if prepared is None:
        return False
    for take, tensors in zip(prepared, operands, strict=True):
        take(registers, packing, tensors)
    registers.keep(steps)
    return True


def of_kind(
    options: tuple[Hashable, ...],
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    prepare: Callable[[], list[Prepared] | None],
) -> list[Prepared] | None:
    """What does the work for tensors of this kind, made by `prepare` for the first of them; None: go the long way.

    That is the way of autograd, autocast, what looks on, and tensors that a kernel would copy first. Ask only where
    `backend.decide` says Triton.

    Args:
        options: what is to be done, and all else that it depends on.
        states: tensors that it reads, of any number of rows; what depends on that number is in `options`.
        weights: the other tensors that it reads. Of one kind are those of the same shapes, dtypes and devices.
        prepare: gives None, or raises, where the kernels can't serve the call.
    """
    tensors = *states, *weights
    if wants_gradient(*tensors) or observed() or torch._C._is_any_autocast_enabled():
        return None
    # All that `_as_it_lies` asks, written out: calls would take a twentieth of a layer's time. The layout is not asked,
    # because what is not strided has no address.
    kinds = [(type(x), x.dtype, x.get_device(), x.data_ptr() & 15, x.is_contiguous(), x.is_neg()) for x in tensors]
    shapes = [*[x.shape[1:] for x in states], *[x.shape for x in weights]]
    asked = tensors[0].dtype == torch.float32 and precision.float32_asked()  # which the kernels' code depends on
    key = options, target.of(tensors[0].device), asked, *kinds, *shapes
    prepared = _kept.get(key)
    if prepared is None and all(map(_as_it_lies, tensors)) and (prepared := prepare()) is not None:
        if len(_kept) >= MOST:
            _kept.clear()
        _kept[key] = prepared
    return prepared


def unserved(steps: Steps, parts: Parts) -> str | None:
    """Why layers of these steps are never prepared; None where they may be, for rows that kernels serve."""
    reason = _steps_unserved(steps)
    refused = (given for step in steps.of if isinstance(given := _weights(step, parts), str))
    return next(refused, None) if reason is None else reason


@cache
def _steps_unserved(steps: Steps) -> str | None:
    for step in steps.of:
        if isinstance(step, Attend):
            if not step.plain:
                return "a window, ALiBi or rotary positions"
        elif isinstance(step, Convolve):
            return "a convolution"
        elif step.gated:
            return "a gated product"
        elif step.sum is not None or (step.add is None) != (step.norm is None) or (step.norm and step.activation):
            return "a sum that is kept or has no LayerNorm, or a LayerNorm or an activation before a sum"
    return None


_NONE: list[Any] = []  # the weights of a step that has none


def _weights(step: Step, parts: Parts) -> tuple[list[Any], Hashable] | str:
    """The tensors of a step's part, a bias that is not there being None, then of its norm; and what else they say.

    Or in words which of the two kernels can't read.
    """
    if isinstance(step, Attend):
        return _NONE, None
    part = parts[step.part]
    kind = type(part)
    if is_plain(part):
        tensors: list[Any] = [*weights(part)]
    elif (in_fp8 := _in_fp8(part)) is not None:
        kind, buffers = Fp8Linear, in_fp8._buffers
        tensors = [buffers["values"], buffers["scale"], in_fp8._parameters["bias"]]
        if tensors[-1] is None:
            return f"{step.part} in fp8 without a bias"
    else:
        return f"{step.part} that is neither an nn.Linear on which nothing looks nor in fp8"
    if step.norm is None:
        return tensors, (kind, tensors[-1] is None)
    norm = parts[step.norm]
    if not is_plain(norm):
        return f"{step.norm} that is not an nn.LayerNorm on which nothing looks"
    parameters = norm._parameters
    if parameters["bias"] is None:
        return f"{step.norm} without a bias"
    said = kind, tensors[-1] is None, cast("nn.LayerNorm", norm).eps
    return [*tensors, parameters["weight"], parameters["bias"]], said


def _in_fp8(part: nn.Module) -> Fp8Linear | None:
    """`part` as one linear layer in fp8, if it is such, and nothing looks on it."""
    one = eight_bits(part) if in_eight_bits(part) else None
    return one if isinstance(one, Fp8Linear) else None


def _sizes(x: Tensor, packing: Packing, widest: int) -> tuple[Hashable, ...]:
    """What prepared launches depend on of the sizes of a batch; `widest` is how many columns a register has at most."""
    rows = x.shape[0]
    return (
        rows_kind(rows, widest * x.element_size()),
        linear_gelu_choices.row_bound(rows),
        attention_choices.attention_regime(packing.max_seqlen, rows=rows, batch=packing.batch),
        rows < packing.tokens,  # which is an error, each time
    )


def _prepare(steps: Steps, parts: Parts, registers: Registers, packing: Packing) -> list[Prepared] | None:
    """Each step as a function of registers and weights of one kind; None: a kernel can't serve one of them."""
    x = registers.floats["x"]
    widths = {name: rows.shape[1] for name, rows in registers.floats.items()}
    in_fp8 = set(registers.quantized)
    prepared: list[Prepared | None] = []
    for i, step in enumerate(steps.of):
        out, quantized = formats(steps, i, parts)
        one = _in_fp8(parts[step.part]) if isinstance(step, Product) else None
        if one is not None and step.x not in in_fp8:
            return None
        in_fp8 = in_fp8 | {step.into} if quantized else in_fp8 - {step.into}
        if isinstance(step, Attend):
            widths[step.into] = widths[step.x] // 3
            prepared.append(_attend(step, x.new_empty((len(x), widths[step.x])), packing, quantized))
            continue
        step = cast("Product", step)  # a convolution is not served
        part = parts[step.part]
        like = x.new_empty((len(x), widths[step.x]))
        if one is not None:
            widths[step.into] = one.out_features
            prepared.append(_fp8_product(step, one, parts, x, out, quantized))
        else:
            widths[step.into] = len(weights(part)[0])
            prepared.append(None if quantized else _product(step, part, parts, like, x))
    return None if None in prepared else cast("list[Prepared]", prepared)


def _attend(step: Attend, qkv: Tensor, packing: Packing, quantized: bool) -> Prepared | None:
    name, into = step.x, step.into
    attend = prepare_attention(step.split(qkv), packing)
    if attend is None:
        return None
    context = qkv.new_empty((len(qkv), qkv.shape[1] // 3))
    if not quantized:

        def take(registers: Registers, packing: Packing, _: Any) -> None:
            floats = registers.floats
            floats[into] = attend(floats[name], packing)

        return take
    quantize = prepare_quantize_rows(context)
    if quantize is None:
        return None

    def take_quantized(registers: Registers, packing: Packing, _: Any) -> None:
        registers.quantized[into] = quantize(attend(registers.floats[name], packing))

    return take_quantized


def _product(step: Product, part: nn.Module, parts: Parts, like: Tensor, x: Tensor) -> Prepared | None:
    (weight, bias), name, into = weights(part), step.x, step.into
    check_linear(like, weight, bias)
    if step.add is None or step.norm is None:
        run = prepare_linear_activation(like, weight, bias, step.activation)
        if run is None:
            return None

        def take(registers: Registers, packing: Packing, tensors: Any) -> None:
            floats = registers.floats
            floats[into] = run(floats[name], *tensors)

        return take
    norm, add = cast("nn.LayerNorm", parts[step.norm]), step.add
    residual = x.new_empty((len(x), len(weight)))
    add_norm = prepare_linear_layer_norm(like, weight, bias, residual, norm.weight, norm.bias, eps=norm.eps)
    if add_norm is None:
        return None

    def take_norm(registers: Registers, packing: Packing, tensors: Any) -> None:
        weight, bias, norm_weight, norm_bias = tensors
        floats = registers.floats
        floats[into] = add_norm(floats[name], weight, bias, floats[add], norm_weight, norm_bias)

    return take_norm


def _fp8_product(
    step: Product, part: Fp8Linear, parts: Parts, x: Tensor, out: bool, quantized: bool
) -> Prepared | None:
    """The tensors of a step in fp8 are values, scale and bias, then weight and bias of the norm."""
    dtype, name, into = x.dtype, step.x, step.into
    product = x.new_empty((len(x), len(part.values)))
    if step.add is not None and step.norm is not None:
        norm, add, bias = cast("nn.LayerNorm", parts[step.norm]), step.add, cast("Tensor", part.bias)
        if not quantized:
            return None
        add_norm = prepare_layer_norm_quantize(product, product, bias, eps=norm.eps)
        if add_norm is None:
            return None

        def take_norm(registers: Registers, packing: Packing, tensors: Any) -> None:
            values, scale, bias, norm_weight, norm_bias = tensors
            made = fp8_product(cast("QuantizedRows", registers.quantized[name]), values, scale, None, dtype)
            floats = registers.floats
            floats[into], registers.quantized[into] = add_norm(made, norm_weight, norm_bias, floats[add], bias)

        return take_norm
    if step.activation is None and not quantized:

        def take(registers: Registers, packing: Packing, tensors: Any) -> None:
            values, scale, bias = tensors
            registers.floats[into] = fp8_product(
                cast("QuantizedRows", registers.quantized[name]), values, scale, bias, dtype
            )

        return take
    if step.activation not in APPROXIMATE or out or not quantized:
        return None
    activate = prepare_bias_gelu_quantize(product, cast("Tensor", part.bias), approximate=APPROXIMATE[step.activation])
    if activate is None:
        return None

    def take_gelu(registers: Registers, packing: Packing, tensors: Any) -> None:
        values, scale, bias = tensors
        made = fp8_product(cast("QuantizedRows", registers.quantized[name]), values, scale, None, dtype)
        registers.quantized[into] = activate(made, bias)

    return take_gelu


def rows_kind(rows: int, row_bytes: int) -> Hashable:
    """What prepared launches depend on of a number of rows, those of the widest tensor of so many bytes each.

    Beyond 2 GiB each number is a kind by itself: AMD's code knows whether a tensor's offsets fit 32 bits.
    """
    return choices.number_kind(rows) if rows * row_bytes < 1 << 31 else rows


def _as_it_lies(x: Tensor) -> bool:
    """Whether kernels take a tensor as it is: an ordinary one, contiguous, in 16-byte pieces."""
    return x.data_ptr() % 16 == 0 and is_plain_tensor(x) and x.is_contiguous()
