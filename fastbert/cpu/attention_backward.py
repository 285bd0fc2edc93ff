"""The gradient of attention of packed sequences on a CPU, in float32, without bias.

A task is a head of a sequence. `Vectors.queries` queries after as many have their weights made again, as the forward
makes them; with dout these give the gradients of the scores. Those make the gradient of these queries at once, and add
to those of all keys and values, which stay in the worker's memory until the last query has been there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial, reduce

import torch
from torch import Tensor

from fastbert.cpu.attention import LOG2E, tile_products
from fastbert.cpu.code import Code
from fastbert.cpu.dropout import PARAMETERS as DROPOUT_PARAMETERS
from fastbert.cpu.dropout import Draws, drop_arguments
from fastbert.cpu.machine import Machine
from fastbert.cpu.maths import exp2
from fastbert.cpu.memory import FLOAT32, INT32, PerWorker
from fastbert.cpu.program import Call, Kernel, compiled, float_bits
from fastbert.cpu.values import (
    F32,
    I32,
    Value,
    fma,
    greatest_lane,
    maximum,
    minimum,
    select,
    sum_of_lanes,
    to_int32,
    transposed,
    widened,
)
from fastbert.reference import Dropout

PARAMETERS = ("qkv", "dout", "dqkv", "cu_seqlens", "scratch", "worker_bytes", "heads", "scale")


def attention_backward(
    machine: Machine,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dout: Tensor,
    dqkv: Tensor,
    *,
    dropout: Dropout | None = None,
) -> Call:
    """The gradient of `attention_forward` without other options.

    Args:
        qkv: contiguous float32 `[rows, 3, heads, head_dim]`.
        cu_seqlens: int32 `[batch + 1]`.
        scale: positive.
        dout: contiguous float32 `[rows, heads, head_dim]`.
        dqkv: contiguous float32, as `qkv` <- the gradient; rows past the last sequence are not written.
        dropout: that of the forward.
    """
    heads, head_dim = qkv.shape[2:]
    lanes, queries = machine.vectors.lanes, machine.vectors.queries
    width = -(-max_seqlen // (2 * lanes)) * 2 * lanes
    columns = -(-head_dim // lanes) * lanes
    # keys and values, transposed; keys, and the gradients of both; queries and dout; weights and gradients of scores
    worker_bytes = 4 * (2 * width * head_dim + 3 * width * columns + 2 * queries * (columns + width))
    batch = len(cu_seqlens) - 1
    return _kernel(machine, head_dim, dropout is not None)(
        batch * heads,
        qkv=(qkv, FLOAT32, qkv.numel()),
        dout=(dout, FLOAT32, qkv.numel() // 3),
        dqkv=(dqkv, FLOAT32, qkv.numel()),
        cu_seqlens=(cu_seqlens, INT32, batch + 1),
        scratch=PerWorker(worker_bytes),
        worker_bytes=worker_bytes,
        heads=heads,
        scale=float_bits(scale),
        **drop_arguments(dropout),
    )


@cache
def _kernel(machine: Machine, head_dim: int, dropout: bool) -> Kernel:
    parameters = PARAMETERS + DROPOUT_PARAMETERS if dropout else PARAMETERS
    body = partial(_differentiate, head_dim=head_dim, dropout=dropout)
    return compiled(machine, "attention_backward", parameters, body)


def _differentiate(code: Code, head_dim: int, dropout: bool) -> None:
    lanes, rows = code.lanes, code.machine.vectors.queries
    columns = -(-head_dim // lanes)  # vectors of a head
    line = 4 * columns * lanes  # bytes of a row of a head in the worker's memory
    heads = code["heads"]
    sequence, head = code.task // heads, code.task % heads
    first = widened(code.load(code["cu_seqlens"] + sequence * 4, I32))
    length = widened(code.load(code["cu_seqlens"] + sequence * 4 + 4, I32)) - first
    last = length - 1
    out_bytes, row_bytes = heads * (4 * head_dim), heads * (12 * head_dim)
    begin = first * row_bytes + head * (4 * head_dim)
    dout = code["dout"] + first * out_bytes + head * (4 * head_dim)
    query, key, value = (code["qkv"] + begin + out_bytes * i for i in range(3))
    dquery, dkey, dvalue = (code["dqkv"] + begin + out_bytes * i for i in range(3))

    drawn = Draws(code, head, sequence) if dropout else None
    width = ((length + (2 * lanes - 1)) // (2 * lanes)) * (2 * lanes)
    turned_keys = code["scratch"] + code.worker * code["worker_bytes"]  # [width / (2 lanes), head_dim, 2 lanes]
    turned_values = turned_keys + width * (4 * head_dim)
    keys = turned_values + width * (4 * head_dim)  # [width, columns]
    dkeys = keys + width * line
    dvalues = dkeys + width * line
    queries = dvalues + width * line  # [rows, columns]
    douts = queries + rows * line
    weights = douts + rows * line  # [width / lanes, rows, lanes]
    dscores = weights + width * (4 * rows)

    def part_of(start: Value, c: int) -> Value:
        """Vector `c` of the row of a head that begins at an address; past its end 0."""
        return code.load_first(start + 4 * c * lanes, F32, min(lanes, head_dim - c * lanes), lanes)

    def transpose(j: Value) -> None:
        """`lanes` keys and values; past the last they are copies of it, so that they change no row's greatest score."""
        for source, turned in ((key, turned_keys), (value, turned_values)):
            tile = turned + (j // (2 * lanes)) * (8 * head_dim * lanes) + (j % (2 * lanes)) * 4
            for c in range(columns):
                count = min(lanes, head_dim - c * lanes)
                row = [part_of(source + minimum(j + i, last) * row_bytes, c) for i in range(lanes)]
                for i, column in enumerate(transposed(row)[:count]):
                    code.store(column, tile + 8 * lanes * (c * lanes + i))

    def copy(j: Value) -> None:
        for c in range(columns):
            code.store(part_of(key + j * row_bytes, c), keys + j * line + 4 * c * lanes)
            for sums in (dkeys, dvalues):
                code.store(code.vector(), sums + j * line + 4 * c * lanes)

    code.loop(0, width, lanes, transpose)
    code.loop(0, length, 1, copy)

    products = partial(tile_products, code, count=rows, halves=2, dtype=torch.float32, depth=head_dim, line=line)

    def place_of(j: Value, r: int) -> Value:
        """Where the numbers of row `r` and `lanes` keys from j on are among `weights` or `dscores`."""
        return j * (4 * rows) + 4 * r * lanes

    def differentiate_rows(i: Value) -> None:
        for r in range(rows):
            there = i + r < length  # the last row again where there are no more, which nothing comes of
            at = minimum(i + r, last)
            for c in range(columns):
                code.store(part_of(query + at * row_bytes, c), queries + r * line + 4 * c * lanes)
                of_out = select(there, part_of(dout + at * out_bytes, c), code.vector())
                code.store(of_out, douts + r * line + 4 * c * lanes)

        def score(j: Value, *greatest: Value) -> Sequence[Value]:
            totals = products(queries, tile=turned_keys + j * (4 * head_dim))
            following = []
            for r in range(rows):
                two = totals[2 * r : 2 * r + 2]
                for half, vector in enumerate(two):
                    code.store(vector, weights + place_of(j + half * lanes, r))
                following.append(reduce(maximum, two, greatest[r]))
            return following

        greatest = code.loop(0, width, 2 * lanes, score, *[code.vector(-3e38)] * rows)
        shifts = [code.splat(greatest_lane(row)) for row in greatest]
        factor = code.splat(code.float_of("scale") * LOG2E)
        draws = [] if drawn is None else [drawn.of(i + r) for r in range(rows)]

        def kept(x: Value, r: int, j: Value) -> Value:
            """What dropout makes of a vector of row `r` and keys from j on."""
            return draws[r].kept(x, j) if draws else x

        def weigh(j: Value, *sums: Value) -> Sequence[Value]:
            """Powers in the place of scores, 0 past the last key; gradients of weights beside them."""
            totals = products(douts, tile=turned_values + j * (4 * head_dim))
            following = []
            for r in range(rows):
                power_sum, product_sum = sums[2 * r : 2 * r + 2]
                for half in range(2):
                    place = place_of(j + half * lanes, r)
                    power = exp2(code, (code.load(weights + place, F32, lanes) - shifts[r]) * factor)
                    numbers = code.lane_numbers() + code.splat(to_int32(j + half * lanes))
                    power = select(numbers < code.splat(to_int32(length)), power, code.vector())
                    of_weight = kept(totals[2 * r + half], r, j + half * lanes)
                    code.store(power, weights + place)
                    code.store(of_weight, dscores + place)
                    power_sum, product_sum = power_sum + power, fma(power, of_weight, product_sum)
                following += [power_sum, product_sum]
            return following

        sums = code.loop(0, width, 2 * lanes, weigh, *[code.vector()] * (2 * rows))
        inverses = [code.scalar(1.0) / sum_of_lanes(sums[2 * r]) for r in range(rows)]
        means = [code.splat(sum_of_lanes(sums[2 * r + 1]) * inverses[r]) for r in range(rows)]
        scale = code.splat(code.float_of("scale"))

        def finish(j: Value) -> None:
            for r in range(rows):
                weight = code.load(weights + place_of(j, r), F32, lanes) * code.splat(inverses[r])
                code.store(kept(weight, r, j), weights + place_of(j, r))
                away = code.load(dscores + place_of(j, r), F32, lanes) - means[r]
                code.store(weight * away * scale, dscores + place_of(j, r))

        code.loop(0, width, lanes, finish)
        for c in range(0, columns, 2):
            group = range(c, min(c + 2, columns))
            sum_keys(i, group)
            add_rows(group, dscores, queries, dkeys)
            add_rows(group, weights, douts, dvalues)

    def each_key(body: Callable[..., Sequence[Value] | None], *carried: Value) -> list[Value]:
        """`body(k, at, *carried)` of each key: its number, and where it is among the `weights` of row 0."""

        def of_block(j: Value, *states: Value) -> Sequence[Value]:
            def of_key(k: Value, *inner: Value) -> Sequence[Value] | None:
                return body(j + k, place_of(j, 0) + k * 4, *inner)

            return code.loop(0, minimum(length - j, lanes), 1, of_key, *states)

        return code.loop(0, length, lanes, of_block, *carried)

    def sum_keys(i: Value, group: range) -> None:
        """The gradients of these queries: keys times the gradients of their scores."""

        def multiply(k: Value, at: Value, *totals: Value) -> Sequence[Value]:
            vectors = [code.load(keys + k * line + 4 * c * lanes, F32, lanes) for c in group]
            made = []
            for r in range(rows):
                of_score = code.splat(code.load(dscores + at + 4 * r * lanes, F32))
                made += [fma(of_score, x, totals[r * len(group) + n]) for n, x in enumerate(vectors)]
            return made

        totals = each_key(multiply, *[code.vector()] * (rows * len(group)))
        for r in range(rows):

            def write(r: int = r) -> None:
                for n, c in enumerate(group):
                    place = dquery + (i + r) * row_bytes + 4 * c * lanes
                    code.store(totals[r * len(group) + n], place, min(lanes, head_dim - c * lanes))

            code.when(i + r < length, write)

    def add_rows(group: range, factors: Value, of_rows: Value, sums: Value) -> None:
        """To each key's sum these rows, times what they have for that key."""
        held = [[code.load(of_rows + r * line + 4 * c * lanes, F32, lanes) for c in group] for r in range(rows)]

        def add(k: Value, at: Value) -> None:
            places = [sums + k * line + 4 * c * lanes for c in group]
            totals = [code.load(place, F32, lanes) for place in places]
            for r in range(rows):
                one = code.splat(code.load(factors + at + 4 * r * lanes, F32))
                totals = [fma(one, x, total) for x, total in zip(held[r], totals, strict=True)]
            for total, place in zip(totals, places, strict=True):
                code.store(total, place)

        each_key(add)

    code.loop(0, length, rows, differentiate_rows)

    def write_sums(j: Value) -> None:
        for sums, made in ((dkeys, dkey), (dvalues, dvalue)):
            for c in range(columns):
                total = code.load(sums + j * line + 4 * c * lanes, F32, lanes)
                code.store(total, made + j * row_bytes + 4 * c * lanes, min(lanes, head_dim - c * lanes))

    code.loop(0, length, 1, write_sums)
