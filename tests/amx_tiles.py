"""A model of AMX: what its instructions do to tiles, by the operations that Intel's manual gives, in numpy.

Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS, TDPBUSD.
Where the CPU would raise an exception, the model notes it in `faults`.

`MACHINE` multiplies by it: a kernel that is compiled for it is the same code as for AMX, with calls of the functions
here in the place of the instructions. So all else of the kernel runs as it is: addresses, loops, and what follows sums.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from emulated import WIDE
from numpy.typing import NDArray

from fastbert.cpu.instructions import AVX2, Bfloat16, Int8, Tiles

Array = NDArray[Any]
TILES, ROWS, ROW_BYTES = 8, 16, 64


class InvalidUseError(Exception):
    """The CPU would raise #UD or #GP."""


class TileUnit:
    """The tiles of one thread: bytes, and of each tile how many rows and bytes of a row it has; 0 of both for none."""

    def __init__(self) -> None:
        self.release()

    def release(self) -> None:
        """TILERELEASE."""
        self.shapes = [(0, 0)] * TILES
        self.bytes = np.zeros((TILES, ROWS, ROW_BYTES), np.uint8)

    def configure(self, block: bytes) -> None:
        """LDTILECFG of a block of 64 bytes."""
        palette, start, reserved = block[0], block[1], block[2:16] + block[32:48] + block[56:64]
        if palette == 0:
            self.release()
            return
        if palette != 1 or any(reserved):
            raise InvalidUseError(f"#GP: palette {palette}, reserved bytes {reserved.hex()}")
        if start != 0:
            raise InvalidUseError("an instruction that was interrupted would go on in the middle of a tile")
        shapes = [(block[48 + i], int.from_bytes(block[16 + 2 * i : 18 + 2 * i], "little")) for i in range(TILES)]
        for rows, row_bytes in shapes:
            if rows > ROWS or row_bytes > ROW_BYTES or (rows == 0) != (row_bytes == 0):
                raise InvalidUseError(f"#GP: {rows} rows of {row_bytes} bytes")
        self.release()
        self.shapes = shapes

    def shape(self, tile: int) -> tuple[int, int]:
        """Rows and bytes of a row."""
        rows, row_bytes = self.shapes[tile]
        if rows == 0:
            raise InvalidUseError(f"#UD: tile {tile} has no shape")
        return rows, row_bytes

    def zero(self, tile: int) -> None:
        """TILEZERO."""
        self.shape(tile)
        self.bytes[tile] = 0

    def load(self, tile: int, address: int, stride: int) -> None:
        """TILELOADD: rows past the last one, and bytes past a row's, become 0."""
        rows, row_bytes = self.shape(tile)
        self.bytes[tile] = 0
        for row in range(rows):
            self.bytes[tile, row, :row_bytes] = _memory(address + row * stride, row_bytes)

    def store(self, tile: int, address: int, stride: int) -> None:
        """TILESTORED."""
        rows, row_bytes = self.shape(tile)
        for row in range(rows):
            _memory(address + row * stride, row_bytes)[:] = self.bytes[tile, row, :row_bytes]

    def _factors(self, into: int, a: int, b: int) -> tuple[int, int, int]:
        """How many rows, words and outputs a product has."""
        (rows, row_bytes), (a_rows, a_bytes), (words, b_bytes) = map(self.shape, (into, a, b))
        if len({into, a, b}) < 3:
            raise InvalidUseError(f"#UD: tiles {into}, {a} and {b} are not three")
        if row_bytes % 4 or a_bytes % 4 or b_bytes % 4:
            raise InvalidUseError("#UD: a row is not whole words")
        if rows != a_rows or a_bytes != 4 * words or row_bytes != b_bytes:
            raise InvalidUseError(f"#UD: {self.shapes[a]} times {self.shapes[b]} is not {self.shapes[into]}")
        return rows, words, row_bytes // 4

    def dpbf16ps(self, into: int, a: int, b: int) -> None:
        """TDPBF16PS: the sum of what lies first in each pair and that of what lies second, added at the end."""
        rows, words, outputs = self._factors(into, a, b)
        x = _from_bfloat16(self.bytes[a].view(np.uint16))[:rows].reshape(rows, -1, 2)
        weights = _from_bfloat16(self.bytes[b].view(np.uint16))[:words].reshape(words, -1, 2)
        sums = np.zeros((rows, outputs, 2), np.float32)
        for k in range(words):
            sums = _fma(x[:, None, k], weights[None, k, :outputs], sums)
        total = self.bytes[into].view(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            of_pairs = _flushed(sums[:, :, 0] + sums[:, :, 1])
            total[:rows, :outputs] = _flushed(_flushed(total[:rows, :outputs]) + of_pairs)

    def dpbusd(self, into: int, a: int, b: int) -> None:
        """TDPBUSD: uint8 by int8, in words that go over their end."""
        rows, words, outputs = self._factors(into, a, b)
        x = self.bytes[a, :rows, : 4 * words].astype(np.int64).reshape(rows, words * 4)
        weights = self.bytes[b, :words].view(np.int8).astype(np.int64).reshape(words, ROW_BYTES // 4, 4)
        weights = weights[:, :outputs].transpose(0, 2, 1).reshape(words * 4, outputs)
        total = self.bytes[into].view(np.int32)
        total[:rows, :outputs] = (total[:rows, :outputs] + x @ weights).astype(np.int32)


def _memory(address: int, size: int) -> Array:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _from_bfloat16(bits: Array) -> Array:
    return _flushed((bits.astype(np.uint32) << 16).view(np.float32))


def _flushed(x: Array) -> Array:
    """What is too small to be normal becomes 0 of its sign: DAZ and FTZ."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once to nearest even, and flushed; a and b of bfloat16, c float32.

    In float64 the product is exact. Where the sum is not, the lesser of the two lies too far below the other's last
    place for the result to be near the middle between two float32: to round it again errs in nothing.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _flushed((a.astype(np.float64) * b + c).astype(np.float32))


class Faults(list[InvalidUseError]):
    """Exceptions of the CPU in compiled code, which none of Python's passes through."""

    def check(self) -> None:
        """Raise the first, and forget all."""
        if self:
            first = self[0]
            self.clear()
            raise first


faults = Faults()
# How often each instruction was executed.
executed = Counter[str]()
_units: dict[int, TileUnit] = {}


def _of_thread() -> TileUnit:
    return _units.setdefault(threading.get_ident(), TileUnit())


def held() -> bool:
    """Whether the tiles of any thread have shapes."""
    return any(shape != (0, 0) for unit in _units.values() for shape in unit.shapes)


def threads() -> int:
    """How many threads had tiles so far."""
    return len(_units)


_TILE, _ADDRESS, _STRIDE = ctypes.c_uint8, ctypes.c_void_p, ctypes.c_int64
# Of each instruction, as LLVM has it: its operands, and what it does to a thread's tiles.
INSTRUCTIONS: dict[str, tuple[list[Any], Callable[..., None]]] = {
    "ldtilecfg": ([_ADDRESS], lambda unit, address: unit.configure(_memory(address, 64).tobytes())),
    "tilerelease": ([], TileUnit.release),
    "tilezero": ([_TILE], TileUnit.zero),
    "tileloadd64": ([_TILE, _ADDRESS, _STRIDE], TileUnit.load),
    "tilestored64": ([_TILE, _ADDRESS, _STRIDE], TileUnit.store),
    "tdpbf16ps": ([_TILE, _TILE, _TILE], TileUnit.dpbf16ps),
    "tdpbusd": ([_TILE, _TILE, _TILE], TileUnit.dpbusd),
}
PREFIX = "model_of_"


def _symbol(name: str, operands: list[Any], do: Callable[..., None]) -> Any:
    def call(*numbers: int) -> None:
        executed[name] += 1
        try:
            do(_of_thread(), *numbers)
        except InvalidUseError as error:
            faults.append(error)

    function = ctypes.CFUNCTYPE(None, *operands)(call)
    llvm.add_symbol(PREFIX + name, ctypes.cast(function, ctypes.c_void_p).value)
    return function  # keeps the code alive


_FUNCTIONS = [_symbol(name, *one) for name, one in INSTRUCTIONS.items()]

assert WIDE.bfloat16 is not None and WIDE.int8 is not None
MACHINE = replace(
    WIDE,
    bfloat16=Bfloat16(AVX2.needs, WIDE.bfloat16.dot, Tiles("tdpbf16ps", PREFIX)),
    int8=Int8(AVX2.needs, WIDE.int8.dot, rows=12, tiles=Tiles("tdpbusd", PREFIX)),
)
