"""Which elements dropout keeps, drawn inside a kernel of a CPU: `reference.keep_mask`, which says how and why."""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from fastbert.cpu.code import Code
from fastbert.cpu.memory import Argument
from fastbert.cpu.program import float_bits
from fastbert.cpu.values import I32, I64, Value, bitcast, exclusive_or, select, to_int32
from fastbert.kernels.dropout import drop_scale, drop_threshold
from fastbert.reference import FOLD_M, LOW, PHILOX_M0, PHILOX_M1, PHILOX_ROUNDS, PHILOX_W0, PHILOX_W1, Dropout

PARAMETERS = ("drop_seed", "drop_threshold", "drop_scale")


def drop_arguments(dropout: Dropout | None) -> dict[str, Argument]:
    """What a kernel is given of it, by the names of `PARAMETERS`; nothing for None."""
    if dropout is None:
        return {}
    return {
        "drop_seed": dropout.seed,
        "drop_threshold": drop_threshold(dropout.probability),
        "drop_scale": float_bits(drop_scale(dropout.probability)),
    }


class Draws:
    """The mask of the rows of a head of a sequence."""

    def __init__(self, code: Code, head: Value, sequence: Value) -> None:
        self.code = code
        seed = code["drop_seed"]
        self.words = _philox(seed & LOW, seed >> 32, head, sequence)

    def of(self, row: Value) -> RowDraws:
        """The mask of a row."""
        word0, word1, word2, word3 = self.words
        word, key = _fold(exclusive_or(row, word0), word1), _fold(exclusive_or(row, word2), word3)
        return RowDraws(self.code, word, key)


class RowDraws(NamedTuple):
    """The mask of a row, and the two words that it is made of."""

    code: Code
    word: Value
    key: Value

    def kept(self, x: Value, column: Value) -> Value:
        """Dropout of a vector that begins at `column`, an even number."""
        code, pairs = self.code, self.code.lanes // 2
        pair = code.splat(column >> 1, pairs) + code.lane_numbers(I64, pairs)
        word = _fold(exclusive_or(code.splat(self.word, pairs), pair), code.splat(self.key, pairs))
        # the low half of a word is the draw of its first column, the high half that of the second
        halves = exclusive_or(word, word << 16) & 0x0000FFFF0000FFFF
        draws = bitcast(halves, ir.VectorType(I32, code.lanes))
        kept = code.splat(to_int32(code["drop_threshold"] - 1)) < draws
        return select(kept, x * code.splat(code.float_of("drop_scale")), code.vector())


def _fold(x: Value, key: Value) -> Value:
    """`reference._fold` of int64 below 2^32."""
    product = x * FOLD_M
    product = exclusive_or(exclusive_or(product >> 32, product) & LOW, key) * FOLD_M
    return exclusive_or(product >> 32, product) & LOW


def _philox(key0: Value, key1: Value, counter2: Value, counter3: Value) -> tuple[Value, Value, Value, Value]:
    """Philox-4x32 of the counter (0, 0, counter2, counter3): four words, int64 below 2^32."""
    c0, c1, c2, c3 = key0 & 0, key0 & 0, counter2, counter3
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c1 = exclusive_or(exclusive_or(product1 >> 32, c1), key0), product1 & LOW
        c2, c3 = exclusive_or(exclusive_or(product0 >> 32, c3), key1), product0 & LOW
        key0, key1 = (key0 + PHILOX_W0) & LOW, (key1 + PHILOX_W1) & LOW
    return c0, c1, c2, c3
