"""Steps computed by ops, one after another: with gradients, dropout, hooks, adapters, and in any number format.

It serves every plan, and it is the meaning of the others; torch.compile sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import Disentangled, Term
from fastbert.ops.attention import attention
from fastbert.ops.disentangled import disentangled_bias, rows_of_distances
from fastbert.ops.dropout import drop
from fastbert.ops.layer_norm import layer_norm, linear_layer_norm, norm_weights
from fastbert.ops.linear import linear
from fastbert.ops.linear_activation import activated, linear_activation
from fastbert.ops.relative import relative_table
from fastbert.ops.rotary import rotary
from fastbert.packing import Packing
from fastbert.run.eight_bits import After, EightBitLinear, Int8Linear, Rows, int8_attention_dtype
from fastbert.run.parts import call, eight_bits, in_eight_bits, is_plain, reads_grid, weights
from fastbert.run.steps import PROJECTIONS, Attend, Convolve, Parts, Product, Steps, drops, readers, writes


@dataclass
class Registers:
    """What the registers hold: packed rows as floats, in the format of a product in 8 bits that reads them, or both."""

    floats: dict[str, Tensor]
    quantized: dict[str, Rows] = field(default_factory=dict)

    def write(self, name: str, floats: Tensor | None, quantized: Rows | None = None) -> None:
        """Let a register hold this, and nothing of before."""
        self.floats.pop(name, None)
        self.quantized.pop(name, None)
        if floats is not None:
            self.floats[name] = floats
        if quantized is not None:
            self.quantized[name] = quantized

    def take(self, names: Sequence[str], rows: Tensor) -> None:
        """Let these registers hold these rows of what they hold."""
        for name in names:
            self.write(name, self.floats[name].index_select(0, rows))

    def keep(self, steps: Steps) -> None:
        """Let go of what the next layer, of the same steps, does not read."""
        self.floats = {name: self.floats[name] for name in steps.carried}
        if self.quantized:
            self.quantized = {name: rows for name, rows in self.quantized.items() if name in steps.carried}


# The probability that something is dropped, and a seed, int64 `[1]`, where it is not 0.
Dropout = tuple[float, Tensor | None]
NO_DROPOUT: Dropout = 0.0, None


def run(
    steps: Steps,
    parts: Parts,
    registers: Registers,
    packing: Packing,
    *,
    bias: Tensor | None = None,
    dropouts: Sequence[Dropout] = (),
    read: Tensor | None = None,
    unpack: bool = False,
    attention: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Take the steps of a layer; gives what "x" then holds.

    Args:
        parts: by their names in the steps.
        registers: "x", and what else the layer before left; written.
        bias: added to the attention scores; see `ops.attention`.
        dropouts: of the steps that drop, in their order; none by default.
        read: int64 `[reads]`, the rows of the output that are wanted. All rows are attended to, but only these go
            through what comes after attention, unless hooks look on.
        unpack: give "x" in the padded layout; not together with `read`.
        attention: in the place of `attend`, with its arguments.
    """
    layer, left = _Layer(steps, parts, registers, packing, attention or attend), iter(dropouts)
    early = read is not None and not any(map(reads_grid, parts.values()))
    for i, step in enumerate(steps.of):
        of_step = [next(left, NO_DROPOUT) for _ in range(drops(step))]
        dropout = of_step[0] if of_step else NO_DROPOUT
        layout = packing if unpack and i + 1 == len(steps.of) else None
        if isinstance(step, Attend):
            layer.attend(step, bias, *of_step)
        elif isinstance(step, Convolve):
            layer.convolve(step, bias, dropout, layout)
        else:
            layer.product(i, step, dropout, layout)
        if read is not None and early and i == steps.last_look:
            registers.take(steps.late, read)
    if read is not None and not early:
        registers.take(["x"], read)
    registers.keep(steps)
    return registers.floats["x"]


class _Layer:
    """A layer that is being run."""

    def __init__(
        self, steps: Steps, parts: Parts, registers: Registers, packing: Packing, attention: Callable[..., Tensor]
    ) -> None:
        self.steps, self.parts, self.registers, self.packing = steps, parts, registers, packing
        self.attention = attention
        self.x = registers.floats["x"]  # whose dtype all have

    def attend(self, step: Attend, bias: Tensor | None, *dropouts: Dropout) -> None:
        qkv = self.registers.floats[step.x]
        self.registers.write(step.into, self.attention(step, self.parts, qkv, self.packing, bias, *dropouts))

    def convolve(self, step: Convolve, bias: Tensor | None, dropout: Dropout, layout: Packing | None) -> None:
        """With a layout the result is unpacked."""
        floats, (probability, seed) = self.registers.floats, dropout
        made = convolved(self.parts[step.part], floats[step.x], self.packing, bias)
        if seed is not None and probability > 0.0:
            made = drop(made, seed, probability)
        total = floats[step.add] + (torch.tanh(made) if step.activation == "tanh" else activated(made, step.activation))
        made = normalised(self.parts[step.norm], total, self.packing)
        self.registers.write(step.into, made if layout is None else layout.unpack(made))

    def product(self, i: int, step: Product, dropout: Dropout, layout: Packing | None) -> None:
        """Step `i`; with a layout the result is unpacked."""
        part, norm = self.parts[step.part], None if step.norm is None else self.parts[step.norm]
        if in_eight_bits(part):
            self._in_eight_bits(i, step, eight_bits(part), cast("nn.LayerNorm | None", norm))
        elif step.add is None or step.sum is not None or step.activation or not (is_plain(part) and is_plain(norm)):
            self._one_by_one(step, part, norm, dropout)
        else:
            floats, (weight, x_bias), plain = self.registers.floats, weights(part), cast("nn.LayerNorm", norm)
            probability, seed = dropout
            made = linear_layer_norm(
                floats[step.x], weight, x_bias, floats[step.add], *norm_weights(plain),
                dropout=probability, seed=seed, eps=plain.eps, unpack=layout,
            )  # fmt: skip
            self.registers.write(step.into, made)
            return
        if layout is not None:
            self.registers.write(step.into, layout.unpack(self.registers.floats[step.into]))

    def _one_by_one(self, step: Product, part: nn.Module, norm: nn.Module | None, dropout: Dropout) -> None:
        floats, (probability, seed) = self.registers.floats, dropout
        total = self._linear(step, part, floats[step.x])
        if seed is not None and probability > 0.0:
            total = drop(total, seed, probability)
        if step.add is not None:
            total = floats[step.add] + total
        made = total if norm is None else normalised(norm, total, self.packing)
        if step.sum is not None:
            self.registers.write(step.sum, total)
        self.registers.write(step.into, made)

    def _linear(self, step: Product, part: nn.Module, x: Tensor) -> Tensor:
        if is_plain(part):
            return linear_activation(x, *weights(part), step.activation, gated=step.gated)
        return activated(call(part, x, self.packing), step.activation, gated=step.gated)

    def _in_eight_bits(self, i: int, step: Product, part: EightBitLinear, norm: nn.LayerNorm | None) -> None:
        floats = self.registers.floats
        rows = self.registers.quantized.get(step.x)
        rows = part.quantize(floats[step.x]) if rows is None else rows
        dtype = made_dtype(self.steps, i, self.x, int8=isinstance(part, Int8Linear))
        residual = None if step.add is None else floats[step.add]
        if not step.gated and step.sum is None and (norm is None or is_plain(norm)):
            out, quantized = formats(self.steps, i, self.parts)
            after = After(step.activation, residual, norm, out, quantized)
            self.registers.write(step.into, *part.product(rows, dtype, after))
            return
        total, _ = part.product(rows, dtype, After(None if step.gated else step.activation))
        assert total is not None
        total = activated(total, step.activation, gated=True) if step.gated else total
        total = total if residual is None else residual + total
        if step.sum is not None:
            self.registers.write(step.sum, total)
        self.registers.write(step.into, total if norm is None else normalised(norm, total, self.packing))


def normalised(norm: nn.Module, x: Tensor, packing: Packing) -> Tensor:
    """What a LayerNorm, or what is in its place, makes of `[rows, hidden]`."""
    if not is_plain(norm):
        return call(norm, x, packing)
    plain = cast("nn.LayerNorm", norm)
    return layer_norm(x, *norm_weights(plain), eps=plain.eps)


def convolved(part: nn.Module, x: Tensor, packing: Packing, bias: Tensor | None = None) -> Tensor:
    """`[rows, hidden]` -> `[rows, hidden]`: a convolution over the padded grid, which is 0 where there is no token.

    A token that `bias` hides from all others is none.
    """
    if not packing.tokens:
        return x  # no rows, and a grid that may be narrower than the convolution
    grid = packing.unpack(x)
    if bias is not None:
        hidden = bias.isneginf().all(1).all(1)
        hidden = F.pad(hidden, (0, grid.shape[1] - hidden.shape[1]))
        grid = grid.masked_fill(hidden[:, :, None], 0.0)
    return packing.pack(cast("Tensor", part(grid.transpose(1, 2))).transpose(1, 2), len(x))


def attend(
    step: Attend,
    parts: Parts,
    qkv: Tensor,
    packing: Packing,
    bias: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    of_positions: Dropout = NO_DROPOUT,
) -> Tensor:
    """`[rows, 3 * heads * head_dim]` -> `[rows, heads * head_dim]`."""
    heads, (probability, seed), scale = step.split(qkv), dropout, None
    if step.disentangled is not None:
        scale = step.scale(heads.shape[3])
        terms = _disentangled(step.disentangled, parts, heads, packing, scale, of_positions)
        bias = terms if bias is None else bias + terms
    turned = heads if step.rotary is None else rotary(heads, packing, step.rotary, step.rotary_scale)
    relative = None if step.relative is None else _relative(parts[step.relative], packing)
    return attention(
        turned, packing,
        scale=scale, bias=bias, alibi_slopes=step.slopes(qkv.device), relative=relative, window=step.window,
        dropout=probability, seed=seed,
    ).flatten(1)  # fmt: skip


def _relative(part: nn.Module, packing: Packing) -> Tensor:
    return relative_table(cast("Tensor", part._parameters["weight"]), packing)


def _disentangled(
    asked: Disentangled, parts: Parts, qkv: Tensor, packing: Packing, scale: float, dropout: Dropout
) -> Tensor:
    """The terms of relative positions, `[batch, heads, max_seqlen, max_seqlen]`, of `[rows, 3, heads, head_dim]`.

    Only those rows of the table are read that the longest sequence needs, unless hooks look on.
    """
    hooked = any(reads_grid(parts[PROJECTIONS[term]]) for term in asked.terms)
    first, last = (0, 2 * asked.span - 1) if hooked else rows_of_distances(packing.max_seqlen, asked)
    made = {term: rows.to(qkv.dtype) for term, rows in of_positions(asked, parts, first, last, dropout).items()}
    made = {term: rows.unflatten(1, qkv.shape[2:]) for term, rows in made.items()}
    return disentangled_bias(qkv, packing, made.get("c2p"), made.get("p2c"), asked, first=first, scale=scale)


def of_positions(
    asked: Disentangled, parts: Parts, first: int, last: int, dropout: Dropout = NO_DROPOUT
) -> dict[Term, Tensor]:
    """Of each term the keys or queries of these rows of the table, `[last + 1 - first, heads * head_dim]`."""
    rows = cast("Tensor", parts["relative"]._parameters["weight"])[first : last + 1]
    if asked.normalised:
        norm = cast("nn.LayerNorm", parts["relative_norm"])
        rows = layer_norm(rows, *norm_weights(norm), eps=norm.eps) if is_plain(norm) else norm(rows)
    probability, seed = dropout
    rows = rows if seed is None or probability == 0.0 else drop(rows, seed, probability)
    projections = {term: parts[PROJECTIONS[term]] for term in asked.terms}
    return {
        term: linear(rows, *weights(part)) if is_plain(part) else part(rows[None])[0]
        for term, part in projections.items()
    }


def made_dtype(steps: Steps, i: int, x: Tensor, *, int8: bool) -> torch.dtype:
    """Of the floats that step `i`, a product, in int8 or not, makes in a layer whose input is `x`."""
    attends = any(isinstance(reader, Attend) for reader in readers(steps.of, i))
    return int8_attention_dtype(x) if int8 and attends else x.dtype


def formats(steps: Steps, i: int, parts: Parts) -> tuple[bool, bool]:
    """Whether what step `i` leaves in `into` is read as floats, and whether as a product in 8 bits takes it.

    What a layer ends with is given as floats too.
    """
    into, floats, quantized = steps.of[i].into, False, False
    for reader in readers(steps.of, i):
        if isinstance(reader, Product):
            in_8_bits = reader.x == into and in_eight_bits(parts[reader.part])
            quantized |= in_8_bits
            floats |= reader.add == into or not in_8_bits
        else:
            floats = True
    last = all(into not in writes(step) for step in steps.of[i + 1 :]) and into == "x"
    return floats or last, quantized
