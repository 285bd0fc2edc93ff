"""AMX: products of bfloat16 and int8 by tiles, registers of up to 16 rows of 16 words of 4 bytes.

A tile of sums, 16 rows by 16 outputs, takes in the products of a tile of x, 16 rows by 16 words, and a tile of weights,
16 words by 16 outputs. The latter is what lies in a block of `layout.in_blocks`, where the words of one place in a row
follow one another, output by output. A block has 32 outputs, so two tiles of weights lie side by side there, and a row
of either is 128 bytes from the next. They meet two tiles of x in four tiles of sums: all eight tiles are in use, and no
product waits for the one before it.

Nothing is read or written beside what a product is of. Where words don't fill the last tile, it gets fewer. The shapes
of tiles are set anew for that, which empties them, so the sums of those words are kept apart until they are added.

Written by Intel's Software Developer's Manual, volume 2. No CPU has run this yet, so it is off unless FASTBERT_AMX=1 is
set, see `machine.host`. tests/amx_tiles.py is a model of what the instructions do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from fastbert.cpu.code import Code, Sums
from fastbert.cpu.instructions import Tiles
from fastbert.cpu.values import I8, I64, POINTER, Value, called, constant

# Of a tile.
ROWS, WORDS = 16, 16
# Bytes of a row of 32 outputs: of sums, and of words of weights.
LINE = 2 * WORDS * 4

# Which tile is what: sums by the tile of x and that of weights, then these.
SUMS, X, WEIGHTS = ((0, 1), (2, 3)), (4, 5), (6, 7)


class Part(NamedTuple):
    """Words of a row whose products are summed before that sum joins the others, and how many of them a tile holds."""

    begin: int
    end: int
    words: int


class Block(NamedTuple):
    """Rows and 32 outputs whose sums are made together."""

    tiles: Tiles
    rows: int
    parts: list[Part]

    @classmethod
    def of(cls, tiles: Tiles, rows: int, words: int, most: int) -> Block:
        """So many rows of so many words, at most `most` of them to a part, which is a multiple of WORDS."""
        whole = words // WORDS * WORDS
        parts = [Part(begin, min(begin + most, whole), WORDS) for begin in range(0, whole, most)]
        return cls(tiles, rows, [*parts, Part(whole, words, words - whole)] if whole < words else parts)

    @property
    def bytes(self) -> int:
        """Of sums, `[parts, rows, 32]`: the argument "sums" is memory `PerWorker` of so many."""
        return len(self.parts) * self.rows * LINE

    @property
    def row_tiles(self) -> range:
        """The tiles of x."""
        return range(-(-self.rows // ROWS))


def shapes(rows: int, words: int) -> bytes:
    """The 64 bytes that tell the shapes of all tiles, for so many rows of x and words of them.

    A byte that says 1, the one way of dividing the registers that there is; from byte 16 on the bytes of a row, in two
    bytes for each tile; from byte 48 on the rows, in one. What is not told is 0.
    """
    told = bytearray(64)
    told[0] = 1

    def shape(tile: int, rows: int, row_bytes: int) -> None:
        told[16 + 2 * tile] = row_bytes
        told[48 + tile] = rows

    for i in range(-(-rows // ROWS)):
        here = min(rows - i * ROWS, ROWS)
        shape(X[i], here, words * 4)
        for tile in SUMS[i]:
            shape(tile, here, WORDS * 4)
    for tile in WEIGHTS:
        shape(tile, words, WORDS * 4)
    return bytes(told)


def task(code: Code, block: Block, body: Callable[[], None]) -> None:
    """What a task does, in which there may be `sums` of blocks."""
    _set_shapes(code, block, block.parts[0])
    body()
    _do(code, block, "tilerelease")  # Linux need not keep tiles that are empty when the thread rests


def sums(code: Code, block: Block, x: Value, x_bytes: int, weight: Value, count: int, type_: Any) -> Sums:
    """The sums of a block, made at once and kept in "sums".

    Args:
        x: where the first row of the block begins; the next is x_bytes from there.
        weight: where the 32 outputs' weights begin, those of one word after those of another.
        count: vectors of 16 outputs that are wanted, 1 or 2.
        type_: of the sums, float32 or int32.
    """
    kept = code["sums"] + code.worker * block.bytes
    tiles = [(i, j) for i in block.row_tiles for j in range(count)]

    def multiply(k: Value) -> None:
        for j in range(count):
            _on_tile(code, block, "tileloadd64", WEIGHTS[j], weight + k * LINE + j * WORDS * 4, LINE)
        for i in block.row_tiles:
            _on_tile(code, block, "tileloadd64", X[i], x + k * 4 + i * ROWS * x_bytes, x_bytes)
        for i, j in tiles:
            _do(code, block, block.tiles.product, *(constant(I8, tile) for tile in (SUMS[i][j], X[i], WEIGHTS[j])))

    for number, part in enumerate(block.parts):
        if part.words != block.parts[number - 1].words:  # of the first, that is the last of the block before
            _set_shapes(code, block, part)
        for i, j in tiles:
            _do(code, block, "tilezero", constant(I8, SUMS[i][j]))
        code.loop(part.begin, part.end, part.words, multiply)
        for i, j in tiles:
            place = kept + ((number * block.rows + i * ROWS) * LINE + j * WORDS * 4)
            _on_tile(code, block, "tilestored64", SUMS[i][j], place, LINE)

    def over_rows(n: int, body: Callable[[Value | int, Value], None]) -> None:
        def of_row(row: Value) -> None:
            place = kept + row * LINE + n * WORDS * 4
            total = code.load(place, type_, WORDS)
            for number in range(1, len(block.parts)):
                total = total + code.load(place + number * block.rows * LINE, type_, WORDS)
            body(row, total)

        code.loop(0, block.rows, 1, of_row)

    return over_rows


def _set_shapes(code: Code, block: Block, part: Part) -> None:
    """All tiles get the shapes of a part, and are empty."""
    told = shapes(block.rows, part.words)
    module = code.builder.module
    held = ir.GlobalVariable(module, ir.ArrayType(I8, len(told)), module.get_unique_name("shapes"))
    held.linkage, held.global_constant = "private", True
    held.initializer = ir.Constant(held.value_type, bytearray(told))
    _do(code, block, "ldtilecfg", code.builder.bitcast(held, POINTER))


def _on_tile(code: Code, block: Block, name: str, tile: int, address: Value, stride: int) -> None:
    """An instruction that reads or writes a tile's rows, each so many bytes from the one before."""
    pointer = code.builder.inttoptr(address.raw, POINTER)
    _do(code, block, name, constant(I8, tile), pointer, constant(I64, stride))


def _do(code: Code, block: Block, name: str, *operands: Any) -> None:
    called(code.builder, block.tiles.prefix + name, None, operands)
