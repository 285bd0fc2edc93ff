"""attention of packed sequences on a CPU: forward, without a bias of pairs.

A task is a head of a sequence. Its keys are transposed once, so that scores are made for a vector of keys at a time;
then `Vectors.queries` queries after as many go through scores, softmax and the sum of values, all of it in the nearest
cache. bfloat16 is multiplied by pairs: two neighbours of a head for the scores, two keys for the sum of values.

What else a score depends on is compiled in where it is asked for: `Places`. Keys that no query of a block sees through
a window are not visited. Queries and keys are turned by rotary positions as they are copied. Products with positions
are made for each distance of two tokens, so that those of neighbours are neighbours: nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial, reduce
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from fastbert.cpu.code import Code
from fastbert.cpu.dropout import PARAMETERS as DROPOUT_PARAMETERS
from fastbert.cpu.dropout import Draws, drop_arguments
from fastbert.cpu.machine import Machine
from fastbert.cpu.maths import exp2
from fastbert.cpu.memory import FLOAT32, INT32, Argument, PerWorker
from fastbert.cpu.program import Call, Kernel, compiled, float_bits
from fastbert.cpu.values import (
    F32,
    I16,
    I32,
    Value,
    absolute,
    bitcast,
    fma,
    from_bfloat16,
    greatest_lane,
    interleaved,
    maximum,
    minimum,
    select,
    sum_of_lanes,
    to_bfloat16,
    to_float,
    to_int32,
    transposed,
    widened,
)
from fastbert.errors import ArgumentError
from fastbert.reference import Dropout

PARAMETERS = ("qkv", "out", "cu_seqlens", "scratch", "worker_bytes", "heads", "scale", "threads")
LOG2E = math.log2(math.e)
# Powers of 2 from which on down a weight beside the greatest is 0, and so are those of keys that may not be seen.
UNSEEN = 126.0


class Places(NamedTuple):
    """What the kernel is compiled for beside content: in which ways a score depends on where its query and key are."""

    window: bool = False
    alibi: bool = False
    relative: bool = False
    rotary: bool = False
    position_key: bool = False
    position_query: bool = False
    dropout: bool = False

    @property
    def added(self) -> bool:
        """Whether something is added to the scaled scores."""
        return self.alibi or self.relative

    @property
    def positions(self) -> bool:
        """Whether queries or keys are multiplied by positions."""
        return self.position_key or self.position_query

    @property
    def scored(self) -> bool:
        """Whether a score is other than its query and key make it."""
        return self.window or self.added or self.positions

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arguments that are read for them."""
        read = {
            "window": self.window,
            "slopes": self.alibi,
            "table": self.relative,
            "table_places": self.relative,
            "angles": self.rotary,
            "position_key": self.position_key,
            "position_query": self.position_query,
            "positions": self.positions,
        }
        return tuple(name for name, wanted in read.items() if wanted) + (DROPOUT_PARAMETERS if self.dropout else ())


def attention_forward(
    machine: Machine,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    out: Tensor,
    *,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    relative: Tensor | None = None,
    angles: Tensor | None = None,
    position_key: Tensor | None = None,
    position_query: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Call:
    """Softmax(q k^T scale) v of each head of each sequence.

    Args:
        qkv: contiguous `[rows, 3, heads, head_dim]`, float32, or bfloat16 where the machine multiplies it.
        cu_seqlens: int32 `[batch + 1]`.
        scale: positive.
        out: contiguous `[rows, heads, head_dim]` <- the result; rows past the last sequence are not written.
        window: only keys at most this many places away are seen, 0 or more.
        alibi_slopes: contiguous float32 `[heads]`; `slope * |row - column|` is taken off the scaled scores of its head.
        relative: contiguous float32 `[heads, 2 * places - 1]`, places >= max_seqlen; its number
            `places - 1 + column - row` is added to the scaled score of a row and a column. -inf hides a key from a row.
        angles: contiguous float32 `[places, 2, head_dim / 2]`, places >= max_seqlen, head_dim even; queries and keys
            are turned by them first, see `ops.rotary.angles_of_places`.
        position_key, position_query: in the dtype of `qkv`, `layout.in_blocks` for two vectors of outputs, of
            `[heads * 2 * positions, head_dim]`, positions >= max_seqlen and whole pairs of vectors. Before it is
            scaled a score is added query . its position_key `positions - 1 + column - row`, and key . its
            position_query `positions - 1 + row - column`. Not together with `angles`.
        dropout: of the weights.
    """
    heads, head_dim = qkv.shape[2:]
    lanes = machine.vectors.lanes
    width = -(-max_seqlen // (2 * lanes)) * 2 * lanes + 2 * lanes
    columns = -(-head_dim // lanes) * lanes
    # the transposed keys, the values, the queries and the scores
    worker_bytes = 4 * (2 * width * columns + machine.vectors.queries * (columns + width))
    options = window, alibi_slopes, relative, angles, position_key, position_query, dropout
    places = Places(*(x is not None for x in options))
    given: dict[str, Argument] = drop_arguments(dropout)
    if window is not None:
        given["window"] = min(window, max_seqlen)
    if alibi_slopes is not None:
        given["slopes"] = (alibi_slopes, FLOAT32, heads)
    if relative is not None:
        given["table_places"] = known = (relative.shape[1] + 1) // 2
        given["table"] = (relative, FLOAT32, heads * (2 * max(known, max_seqlen) - 1))
    if angles is not None:
        given["angles"] = (angles, FLOAT32, max_seqlen * head_dim)
    for name, table in (("position_key", position_key), ("position_query", position_query)):
        if table is not None:
            given["positions"] = positions = table.numel() // (2 * heads * table.shape[1] * table.shape[3])
            given[name] = (table, (qkv.dtype,), table.numel())
            if positions < max_seqlen or positions % (2 * lanes):
                wanted = f"a multiple of {2 * lanes}, at least {max_seqlen}"
                raise ArgumentError(name, f"{positions} positions", wanted)
    if places.rotary or places.position_query:
        worker_bytes += 4 * lanes * columns  # keys that are not transposed
    if places.positions:
        # products with positions of some rows, and all those of keys
        worker_bytes += 4 * max(lanes, machine.vectors.queries) * (width + 6 * lanes)
        worker_bytes += 4 * width * width if places.position_query else 0
    batch = len(cu_seqlens) - 1
    return _kernel(machine, head_dim, qkv.dtype, places)(
        batch * heads,
        qkv=(qkv, machine.dtypes, qkv.numel()),
        out=(out, (qkv.dtype,), qkv.numel() // 3),
        cu_seqlens=(cu_seqlens, INT32, batch + 1),
        scratch=PerWorker(worker_bytes),
        worker_bytes=worker_bytes,
        heads=heads,
        scale=float_bits(scale * LOG2E),
        threads=torch.get_num_threads(),
        **given,
    )


@cache
def _kernel(machine: Machine, head_dim: int, dtype: torch.dtype, places: Places) -> Kernel:
    body = partial(_attend, head_dim=head_dim, dtype=dtype, places=places)
    return compiled(machine, "attention_forward", PARAMETERS + places.parameters, body)


def tile_products(
    code: Code, left: Value, count: int, tile: Value, halves: int, *, dtype: torch.dtype, depth: int, line: int
) -> list[Value]:
    """Of so many rows of words and so many vectors of columns of a tile, `[count, halves, lanes]`.

    Args:
        left: where the rows lie, each `line` bytes from the one before, `depth` words of it.
        tile: where words `[depth, 2 * lanes]` lie, of which the first `halves` vectors are multiplied.
    """
    lanes, word, dot = code.lanes, F32 if dtype == torch.float32 else I32, code.dot(dtype)

    def multiply(d: Value, *totals: Value) -> Sequence[Value]:
        vectors = [code.load(tile + d * (8 * lanes) + 4 * half * lanes, word, lanes) for half in range(halves)]
        made = []
        for r in range(count):
            one = code.splat(code.load(left + d * 4 + r * line, word))
            made += [dot(totals[halves * r + half], one, vector) for half, vector in enumerate(vectors)]
        return made

    return code.loop(0, depth, 1, multiply, *[code.vector()] * (halves * count))


def _attend(code: Code, head_dim: int, dtype: torch.dtype, places: Places) -> None:
    lanes, rows, dot = code.lanes, code.machine.vectors.queries, code.dot(dtype)
    bfloat16, size = dtype == torch.bfloat16, dtype.itemsize
    depth = -(-head_dim // 2) if bfloat16 else head_dim  # 32-bit words of a head
    word = I32 if bfloat16 else F32
    blocks = -(-depth // lanes)  # vectors of words of a head
    columns = -(-head_dim // lanes)  # vectors of float32 of a head
    heads = code["heads"]
    sequence, head = code.task // heads, code.task % heads
    first = widened(code.load(code["cu_seqlens"] + sequence * 4, I32))
    length = widened(code.load(code["cu_seqlens"] + sequence * 4 + 4, I32)) - first
    row_bytes = heads * (3 * head_dim * size)
    query = code["qkv"] + first * row_bytes + head * (head_dim * size)
    key, value = query + heads * (head_dim * size), query + heads * (2 * head_dim * size)
    out_bytes = heads * (head_dim * size)
    out = code["out"] + first * out_bytes + head * (head_dim * size)
    width = ((length + (lanes - 1)) // lanes) * lanes
    # The next task of this thread is most often a head of the same rows, of which no cache guesses where they lie.
    following = head + code["threads"]
    ahead = select(following < heads, following - head, code.number(0)) * (head_dim * size)

    keys = code["scratch"] + code.worker * code["worker_bytes"]
    pairs = width // (2 * lanes) * (2 * lanes)  # keys in whole tiles of two vectors
    queries = keys + (pairs + 2 * lanes) * (4 * blocks * lanes)
    scores = queries + 4 * rows * blocks * lanes
    values = scores + width * (4 * rows)
    last = length - 1
    drawn = Draws(code, head, sequence) if places.dropout else None
    # What is added to a score before it is scaled; added after, it would be to one that is rounded once more.
    unscaled = code.scalar(LOG2E) / code.float_of("scale") if places.added else None
    slope = code.load(code["slopes"] + head * 4, F32) * unscaled if unscaled is not None and places.alibi else None
    # What only some need lies at the end: `lanes` keys that are not transposed; products with positions, a line for
    # each of the rows that are made together; those of keys, [length, width].
    plain_keys = keys + code["worker_bytes"] - 4 * lanes * blocks * lanes
    line_bytes = (width + 6 * lanes) * 4
    lines = (plain_keys if places.position_query else keys + code["worker_bytes"]) - line_bytes * max(lanes, rows)
    of_keys = lines - width * width * 4

    def words_of(start: Value, block: int) -> Value:
        """Words `[lanes]` of the head that begins at an address; past its end 0."""
        place = start + 4 * block * lanes
        if not bfloat16:
            return code.load_first(place, F32, min(lanes, head_dim - block * lanes), lanes)
        # as bfloat16, since a head of an odd number of them ends in half a word
        halves = code.load_first(place, I16, min(2 * lanes, head_dim - 2 * block * lanes), 2 * lanes)
        return bitcast(halves, ir.VectorType(I32, lanes))

    def turn(head_at: Value, place: Value, turned_at: Value) -> None:
        """A query or key, as rotary positions turn it at its place in the sequence, rounded once -> at an address."""
        half = head_dim // 2
        for c in range(0, half, lanes):
            count = min(lanes, half - c)
            at = [c, c + half]  # which columns turn together
            cos, sin = (code.load_first(code["angles"] + place * (8 * half) + 4 * n, F32, count, lanes) for n in at)
            if bfloat16:
                one, other = (from_bfloat16(code.load_first(head_at + 2 * n, I16, count, lanes)) for n in at)
            else:
                one, other = (code.load_first(head_at + 4 * n, F32, count, lanes) for n in at)
            for n, x in zip(at, (fma(-other, sin, one * cos), fma(one, sin, other * cos)), strict=True):
                code.store(to_bfloat16(x) if bfloat16 else x, turned_at + size * n, count)

    def transpose(j: Value) -> None:
        """Words `[lanes keys, depth]` -> `[j / (2 lanes), depth, 2 lanes]` of all keys."""
        tile = keys + (j // (2 * lanes)) * (4 * blocks * lanes * 2 * lanes) + (j % (2 * lanes)) * 4
        if places.rotary:
            for i in range(lanes):
                place = minimum(j + i, last)
                turn(key + place * row_bytes, place, plain_keys + 4 * i * blocks * lanes)
        for block in range(blocks):
            count = min(lanes, depth - block * lanes)
            if places.rotary:
                words = [words_of(plain_keys + 4 * i * blocks * lanes, block) for i in range(lanes)]  # [lanes, count]
            else:
                words = [words_of(key + minimum(j + i, last) * row_bytes, block) for i in range(lanes)]
            for i, column in enumerate(transposed(words)[:count]):
                code.store(column, tile + 4 * 2 * lanes * (block * lanes + i))

    def pair(j: Value) -> None:
        """Values of keys j and j + 1 -> int32 `[j / 2, columns]`, each column's two in a word."""
        for c in range(columns):
            count = min(lanes, head_dim - c * lanes)
            two = (
                code.load_first(value + minimum(j + i, last) * row_bytes + 2 * c * lanes, I16, count, lanes)
                for i in range(2)
            )
            for half, words in enumerate(interleaved(*two)):
                place = values + j * (2 * columns * lanes) + 4 * c * lanes + 2 * half * lanes
                code.store(words, place)

    def copy(j: Value) -> None:
        """Values of key j -> float32 `[j, columns]`: rows of qkv lie so far apart that they would share a few lines."""
        for c in range(columns):
            count = min(lanes, head_dim - c * lanes)
            vector = code.load_first(value + j * row_bytes + 4 * c * lanes, F32, count, lanes)
            code.store(vector, values + (j * columns + c) * (4 * lanes))

    code.loop(0, width, lanes, transpose)
    if bfloat16:
        code.loop(0, length, 2, pair)
    else:
        code.loop(0, length, 1, copy)

    products = partial(tile_products, code, dtype=dtype, depth=depth, line=4 * blocks * lanes)

    def of_positions(left: Value, count: int, name: str, start: Value, end: Value, halves: int) -> None:
        """Products of so many rows and the positions from `start` to `end` -> `lines`."""
        table = code[name] + head * (code["positions"] * (8 * depth))

        def multiply(n: Value) -> None:
            tile = table + n // (2 * lanes) * (8 * lanes * depth) + n % (2 * lanes) * 4
            for i, total in enumerate(products(left, count, tile, halves)):
                code.store(total, lines + line_bytes * (i // halves) + (n - start) * 4 + 4 * lanes * (i % halves))

        code.loop(start, end, halves * lanes, multiply)

    def of_lanes_keys(j: Value) -> None:
        """Products of `lanes` keys from j on and the positions of all rows -> their columns of `of_keys`."""
        for i in range(lanes):
            for block in range(blocks):
                words = words_of(key + minimum(j + i, last) * row_bytes, block)
                code.store(words, plain_keys + 4 * (i * blocks + block) * lanes)
        start = code["positions"] - j - lanes  # of the last of these keys and row 0
        of_positions(plain_keys, lanes, "position_query", start, start + width + lanes, halves=1)

        def turn_over(i: Value) -> None:
            made = [code.load(lines + line_bytes * n + (i + (lanes - 1 - n)) * 4, F32, lanes) for n in range(lanes)]
            for n, row in enumerate(transposed(made)):
                code.store(row, of_keys + ((i + n) * width + j) * 4)

        code.loop(0, width, lanes, turn_over)

    if places.position_query:
        code.loop(0, width, lanes, of_lanes_keys)

    def attend_rows(i: Value) -> None:
        here = [minimum(i + r, last) for r in range(rows)]  # the last row again where there are no more
        for place in here:
            for start in (query, key, value):
                for line in range(0, head_dim * size, 64):
                    code.prefetch(start + place * row_bytes + ahead + line)
        for r, place in enumerate(here):
            if places.rotary:
                turn(query + place * row_bytes, place, queries + 4 * r * blocks * lanes)
                continue
            for block in range(blocks):
                words = words_of(query + place * row_bytes, block)
                code.store(words, queries + 4 * (r * blocks + block) * lanes)

        begin: Value | int
        if places.window:
            window = code["window"]
            begin = select(i < window, code.number(0), i - window) // (2 * lanes) * (2 * lanes)
            end = minimum((i + window + (rows + lanes - 1)) // lanes * lanes, width)
            middle = begin + (end - begin) // (2 * lanes) * (2 * lanes)
        else:
            begin, middle, end = 0, pairs, width

        start = code.number(0)
        if places.position_key:
            zero = code["positions"] - 1
            start = (zero - here[-1]) // (2 * lanes) * (2 * lanes)  # of the last of these rows and key 0
            end_of_line = (zero + width - i + (2 * lanes - 1)) // (2 * lanes) * (2 * lanes)
            of_positions(queries, rows, "position_key", start, end_of_line, halves=2)

        def placed(vector: Value, j: Value, r: int) -> Value:
            """Scores of row `r` and keys from j on with what is added; -inf where there is none to be seen."""
            column = code.splat(to_int32(j)) + code.lane_numbers()
            away = to_float(column) - code.splat(to_float(to_int32(here[r])))
            there = column < code.splat(to_int32(length))
            if slope is not None:
                vector = fma(-absolute(away), code.splat(slope), vector)
            if unscaled is not None and places.relative:
                known = code["table_places"]
                at = code["table"] + (head * (known * 2 - 1) + known - 1 + j - here[r]) * 4
                vector = fma(code.load_where(at, F32, there), code.splat(unscaled), vector)
            if places.position_key:
                at = lines + line_bytes * r + (code["positions"] - 1 + j - here[r] - start) * 4
                vector = vector + code.load(at, F32, lanes)
            if places.position_query:
                vector = vector + code.load(of_keys + (here[r] * width + j) * 4, F32, lanes)
            if places.window:
                vector = select(code.splat(to_float(to_int32(code["window"]))) < absolute(away), -math.inf, vector)
            return select(there, vector, code.vector(-math.inf))

        def score(j: Value, *greatest: Value, halves: int) -> Sequence[Value]:
            """Scores of so many vectors of keys, `[j / lanes, rows, lanes]`, and the greatest in each lane of a row."""
            tile = keys + j * (4 * blocks * lanes)

            totals = products(queries, rows, tile, halves)
            following = []
            for r in range(rows):
                row = totals[halves * r : halves * r + halves]
                if places.scored:
                    row = [placed(vector, j + half * lanes, r) for half, vector in enumerate(row)]
                for half, vector in enumerate(row):
                    code.store(vector, scores + j * (4 * rows) + 4 * (half * rows + r) * lanes)
                following.append(reduce(maximum, row, greatest[r]))
            return following

        # keys past the last are copies of it, so that they change no row's greatest score; `placed` makes them -inf
        lowest = [code.vector(-math.inf)] * rows
        greatest = code.loop(begin, middle, 2 * lanes, partial(score, halves=2), *lowest)
        greatest = code.loop(middle, end, lanes, partial(score, halves=1), *greatest)
        scale = code.splat(code.float_of("scale"))
        numbers = code.lane_numbers()
        shifts = [code.splat(greatest_lane(row)) for row in greatest]
        draws = [] if drawn is None else [drawn.of(place) for place in here]
        if places.scored:  # a row that may attend nothing: 0, not NaN, everywhere
            shifts = [maximum(shift, -3e38) for shift in shifts]

        def exponentials(j: Value, *totals: Value, masked: bool) -> Sequence[Value]:
            """Of `lanes` keys of each row, in the place of their scores; 0 past the last key, if there are such."""
            following = []
            for r in range(rows):
                place = scores + j * (4 * rows) + 4 * r * lanes
                # The difference first: the rounding of a product of scores in the billions is more than 2^x can take.
                exponent = (code.load(place, F32, lanes) - shifts[r]) * scale
                power = exp2(code, exponent, coarse=bfloat16)
                if places.scored:
                    power = select(exponent < -UNSEEN, 0.0, power)
                elif masked:
                    power = select(numbers < code.splat(to_int32(length - j)), power, code.vector())
                weight = draws[r].kept(power, j) if draws else power
                code.store(to_bfloat16(weight) if bfloat16 else weight, place)
                following.append(totals[r] + power)
            return following

        zeros = [code.vector()] * rows
        if places.scored:
            sums = code.loop(begin, end, lanes, partial(exponentials, masked=False), *zeros)
            beyond = minimum(end, length)
        else:
            whole, beyond = length // lanes * lanes, length
            totals = code.loop(0, whole, lanes, partial(exponentials, masked=False), *zeros)
            sums = code.loop(whole, width, lanes, partial(exponentials, masked=True), *totals)

        for c in range(0, columns, 2):
            group = range(c, min(c + 2, columns))

            def sum_values(j: Value, *totals: Value, group: range = group) -> Sequence[Value]:
                """The values of `lanes` keys, times their weights."""
                block = scores + j * (4 * rows)

                def multiply(k: Value, *totals: Value) -> Sequence[Value]:
                    row = values + (j + k * (4 // size)) * (size * columns * lanes)
                    vectors = [code.load(row + 4 * c * lanes, word, lanes) for c in group]
                    made = []
                    for r in range(rows):
                        weight = code.splat(code.load(block + k * 4 + 4 * r * lanes, word))
                        made += [dot(totals[r * len(group) + n], weight, vector) for n, vector in enumerate(vectors)]
                    return made

                count = minimum(length - j, lanes)
                return code.loop(0, (count + 1) // 2 if bfloat16 else count, 1, multiply, *totals)

            totals = code.loop(begin, beyond, lanes, sum_values, *[code.vector()] * (rows * len(group)))
            for r, place in enumerate(here):
                total = sum_of_lanes(sums[r])
                factor = code.scalar(1.0) / total
                factor = code.splat(select(total < 0.5, 0.0, factor) if places.scored else factor)
                for n, column in enumerate(group):
                    result = totals[r * len(group) + n] * factor
                    if bfloat16:
                        result = to_bfloat16(result)
                    lanes_left = min(lanes, head_dim - column * lanes)
                    code.store(result, out + place * out_bytes + size * column * lanes, lanes_left)

    code.loop(0, length, rows, attend_rows)
