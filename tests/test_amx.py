"""Products by AMX: the kernels on a model of its tiles, what LLVM makes of them for a CPU with it, and the switch.

What needs the CPU itself is skipped without one: `FASTBERT_AMX=1 make test MARK=cpu` runs it there.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import amx_tiles
import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from amx_tiles import InvalidUseError, TileUnit
from emulated import WIDE
from tiny_bert import random_model
from torch import Tensor

from fastbert import backend, cli, quantize
from fastbert.cpu import amx
from fastbert.cpu import machine as native_machine
from fastbert.cpu.instructions import AMX_BF16, AMX_INT8, AVX512, AVX512_BF16, AVX512_VNNI
from fastbert.cpu.int8 import COLUMNS, Int8Matrix, Int8Rows
from fastbert.cpu.layout import in_blocks
from fastbert.cpu.linear import CHUNK, linear
from fastbert.cpu.linear_int8 import FEW_ROWS, TASK_ROWS, linear_int8
from fastbert.cpu.machine import AMX, Machine, host
from fastbert.cpu.program import Program
from fastbert.errors import ArgumentError, BackendError
from fastbert.ops import common, fastest
from fastbert.packing import Packing
from fastbert.testing import assert_close

pytestmark = pytest.mark.cpu

HOST = host()
if not isinstance(HOST, Machine):
    pytest.skip(f"{HOST}: Linux on x86-64 with AVX2 runs this", allow_module_level=True)

TILES = amx_tiles.MACHINE
SAPPHIRE_RAPIDS = Machine("sapphirerapids", ",".join(f"+{name}" for name in AMX), AVX512, AMX_BF16, AMX_INT8)


@pytest.fixture(autouse=True)
def whole_use() -> Iterator[None]:
    """No instruction was used as the CPU would not have it, and all tiles were given back."""
    amx_tiles.executed.clear()
    yield
    amx_tiles.faults.check()
    assert not amx_tiles.held()


# The model.


def test_the_shapes_of_tiles_are_where_the_manual_has_them() -> None:
    told = np.frombuffer(amx.shapes(20, 5), np.uint8)
    assert len(told) == 64 and told[0] == 1 and not told[1:16].any()
    row_bytes, rows = told[16:32].view("<u2"), told[48:56]
    assert rows.tolist() == [16, 16, 4, 4, 16, 4, 5, 5]
    assert row_bytes.tolist() == [64, 64, 64, 64, 20, 20, 64, 64]
    assert not told[32:48].any() and not told[56:].any()
    few = np.frombuffer(amx.shapes(7, 16), np.uint8)
    assert few[48:56].tolist() == [7, 7, 0, 0, 7, 0, 16, 16]


def unit(rows: int, words: int) -> TileUnit:
    made = TileUnit()
    made.configure(amx.shapes(rows, words))
    return made


def set_floats(made: TileUnit, tile: int, row: int, numbers: list[float], dtype: torch.dtype) -> None:
    """In a row of a tile."""
    made.bytes[tile, row, : len(numbers) * dtype.itemsize] = torch.tensor(numbers, dtype=dtype).view(torch.uint8)


def test_the_model_rounds_as_the_manual_says() -> None:
    """First and second numbers of pairs are summed apart; what is not normal counts as 0, before and after."""
    made = unit(1, 16)

    def product(pairs: list[tuple[float, float]], total: float = 0.0) -> Any:
        numbers = [x for pair in pairs for x in pair]
        made.bytes[:] = 0
        set_floats(made, amx.X[0], 0, numbers, torch.bfloat16)
        for k in range(len(pairs)):
            set_floats(made, amx.WEIGHTS[0], k, [1.0, 1.0], torch.bfloat16)
        set_floats(made, amx.SUMS[0][0], 0, [total], torch.float32)
        made.dpbf16ps(amx.SUMS[0][0], amx.X[0], amx.WEIGHTS[0])
        return made.bytes[amx.SUMS[0][0], 0].view(np.float32)[0]

    big = 2.0**24
    assert product([(1, 2), (3, 4)]) == 10
    assert product([(big, 1), (0, 1)]) == big + 2  # 1 + 1 first; one after another they would both be lost
    assert product([(big, 0), (1, 0), (1, 0)]) == big  # each of these is, to even
    assert product([(big + 2**17, 0), (3, 0)]) == big + 2**17 + 4
    assert product([(1, 0)], total=big) == big
    assert product([(2.0**-130, 0)]) == 0 and product([(0, 1)], total=2.0**-130) == 1
    assert product([(0, 0)], total=2.0**-130) == 0
    assert np.isnan(product([(torch.inf, -torch.inf)])) and product([(torch.inf, 1)]) == torch.inf


def test_the_model_of_int8_is_exact_and_goes_over_the_end(generator: torch.Generator) -> None:
    made = unit(3, 5)
    x = torch.randint(256, (3, 20), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-128, 128, (16, 20), dtype=torch.int8, generator=generator)
    blocks = in_blocks(weight, 16)[0]  # [words, 16, 4]
    made.load(amx.X[0], x.data_ptr(), 20)
    made.load(amx.WEIGHTS[0], blocks.data_ptr(), 64)
    into = amx.SUMS[0][0]
    made.zero(into)
    made.dpbusd(into, amx.X[0], amx.WEIGHTS[0])
    out = torch.zeros(3, 16, dtype=torch.int32)
    made.store(into, out.data_ptr(), 64)
    exact = x.int() @ weight.int().t()
    assert torch.equal(out, exact)
    made.bytes[into].view(np.int32)[:] = 2**31 - 1
    made.dpbusd(into, amx.X[0], amx.WEIGHTS[0])
    made.store(into, out.data_ptr(), 64)
    assert torch.equal(out, (exact.long() + 2**31 - 1).to(torch.int32))


def test_the_model_refuses_what_the_cpu_refuses() -> None:
    """And reads and writes the rows that there are, and no others."""
    good = bytearray(amx.shapes(16, 16))
    for place, byte in ((0, 2), (2, 1), (32, 1), (60, 1), (48, 17), (16, 65), (48, 0)):
        bad = bytearray(good)
        bad[place] = byte
        with pytest.raises(InvalidUseError, match="#GP"):
            TileUnit().configure(bytes(bad))
    made = unit(7, 5)
    for use in (
        lambda: TileUnit().zero(0),
        lambda: made.zero(amx.SUMS[1][0]),
        lambda: made.dpbusd(0, 4, 4),
        lambda: made.dpbusd(0, 6, 4),
        lambda: made.dpbf16ps(4, 0, 6),
    ):
        with pytest.raises(InvalidUseError, match="#UD"):
            use()
    held = torch.arange(100 * 8, dtype=torch.int32).view(100, 8)
    made.load(amx.X[0], held[1].data_ptr(), 64)
    rows = made.bytes[amx.X[0]].view(np.int32)
    assert rows[:7, :5].tolist() == held[1:15:2, :5].tolist() and not rows[7:].any() and not rows[:, 5:].any()
    out = torch.full((20, 8), -1, dtype=torch.int32)
    made.store(amx.X[0], out[2].data_ptr(), 32)
    assert torch.equal(out[2:9, :5], held[1:15:2, :5])
    assert (out[:2] == -1).all() and (out[9:] == -1).all() and (out[:, 5:] == -1).all()


# The kernels on it. Rows, words and outputs around 16 and 32.


def bfloat16_case(rows: int, depth: int, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    weight = torch.randn(width, depth, generator=generator) / depth**0.5
    others = (torch.randn(*shape, generator=generator) for shape in ((rows, depth), (width,), (rows, width)))
    x, bias, residual = others
    return tuple(one.to(torch.bfloat16) for one in (x, weight, bias, residual))


@pytest.mark.parametrize(
    ("depth", "width"),
    [(2, 1), (30, 16), (32, 17), (34, 32), (64, 33), (98, 49), (130, 100), (2 * CHUNK, 20), (2 * CHUNK + 34, 20)],
)
@pytest.mark.parametrize("rows", [0, 1, 3, 15, 16, 17, 31, 32, 33, 70])
def test_linear(rows: int, depth: int, width: int, generator: torch.Generator) -> None:
    x, weight, bias, residual = bfloat16_case(rows, depth, width, generator)
    for activation, added in ((None, None), ("gelu", residual)):

        def compute(to: torch.dtype, activation: str | None = activation, added: Tensor | None = added) -> Tensor:
            total = F.linear(x.to(to), weight.to(to), bias.to(to))
            total = total if activation is None else F.gelu(total)
            return total if added is None else total + added.to(to)

        out = torch.full((rows, width), torch.nan).to(torch.bfloat16)
        call = linear(TILES, x, in_blocks(weight, 32), bias, out, activation=activation, residual=added)
        call.run()
        assert_close(out, compute(torch.float32).to(torch.bfloat16), compute(torch.float64))
    assert bool(amx_tiles.executed["tdpbf16ps"]) == (rows > 0)


def test_linear_over_several_groups_of_rows(generator: torch.Generator) -> None:
    machine = replace(TILES, vectors=replace(TILES.vectors, group_bytes=64 * 4 * 32))
    x, weight, bias, _ = bfloat16_case(131, 64, 96, generator)
    out = torch.full((131, 96), torch.nan).to(torch.bfloat16)
    linear(machine, x, in_blocks(weight, 32), bias, out).run()
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_close(out, F.linear(x.float(), weight.float(), bias.float()).to(torch.bfloat16), exact)


def test_each_thread_has_tiles_of_its_own(generator: torch.Generator) -> None:
    x, weight, bias, _ = bfloat16_case(70, 98, 800, generator)
    matrix, outs = in_blocks(weight, 32), []
    before, had = torch.get_num_threads(), amx_tiles.threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(torch.full((70, 800), torch.nan).to(torch.bfloat16))
            linear(TILES, x, matrix, bias, outs[-1]).run()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs) and amx_tiles.threads() > max(had, 1)


def int8_case(rows: int, depth: int, width: int, generator: torch.Generator) -> tuple[Int8Rows, Int8Matrix, Tensor]:
    """Numbers of all sizes; the scales are random, so that rows and outputs that were swapped would show."""
    values = torch.randint(256, (rows, depth), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-128, 128, (width, depth), dtype=torch.int8, generator=generator)
    x = Int8Rows(values, *torch.rand(2, rows, generator=generator))
    matrix = Int8Matrix(in_blocks(weight, COLUMNS), *torch.randn(2, width, generator=generator))
    return x, matrix, values.int() @ weight.int().t()


@pytest.mark.parametrize(("depth", "width"), [(4, 1), (60, 16), (64, 17), (68, 33), (132, 73), (256, 32)])
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 31, FEW_ROWS, FEW_ROWS + 1, TASK_ROWS, 49, 64, 65, 130])
def test_sums_of_int8_are_exact(rows: int, depth: int, width: int, generator: torch.Generator) -> None:
    """To the bit, in both kernels."""
    x, matrix, exact = int8_case(rows, depth, width, generator)
    x, matrix = replace(x, scale=torch.ones(rows)), replace(matrix, scale=torch.ones(width))
    x = replace(x, zero=torch.zeros(rows))
    out = torch.full((rows, width), torch.nan)
    Program(linear_int8(TILES, x, matrix, torch.zeros(width), out=out)).run()
    assert torch.equal(out, exact.float())
    assert bool(amx_tiles.executed["tdpbusd"]) == (rows > 0)


@pytest.mark.parametrize("step", ["plain", "gelu", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "depth", "width"), [(5, 68, 40), (131, 132, 33)])
def test_what_follows_sums_of_int8_is_what_follows_those_of_vectors(
    rows: int, depth: int, width: int, dtype: torch.dtype, step: str, generator: torch.Generator
) -> None:
    """To the bit, since the sums are."""
    x, matrix, _ = int8_case(rows, depth, width, generator)
    bias, norm_weight, norm_bias = torch.randn(3, width, generator=generator)
    options: dict[str, Any] = {"activation": "gelu"} if step == "gelu" else {}
    if step == "norm":
        residual = torch.randn(rows, width, generator=generator).to(dtype)
        options = {"residual": residual, "norm": (norm_weight, norm_bias, 1e-5)}
    made = []
    for machine in (TILES, WIDE):
        out, int8 = torch.full((rows, width), torch.nan).to(dtype), Int8Rows.empty(rows, width)
        Program(linear_int8(machine, x, matrix, bias, out=out, out_int8=int8, **options)).run()
        made.append((out, int8.values, int8.scale, int8.zero))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    assert amx_tiles.executed["tdpbusd"]


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_an_encoder_by_tiles(form: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights need no other layout: those that vectors have."""
    monkeypatch.setattr(common, "host", lambda: TILES)
    model = random_model(generator).eval()
    packing = Packing.from_lengths([16, 0, 23])
    ids = torch.randint(50, (packing.tokens,), generator=generator)
    with torch.no_grad():
        exact = model.double()(ids, packing=packing).last_hidden_state
        model = model.float()
        if form == "int8":
            plain = exact.float()
            model = quantize(model, dtype="int8")
        else:
            model = model.to(torch.bfloat16)
            with backend.use_backend("torch"):
                plain = model(ids, packing=packing).last_hidden_state
        with backend.use_backend("native"):
            made = model(ids, packing=packing).last_hidden_state
    assert amx_tiles.executed["tdpbf16ps" if form == "bfloat16" else "tdpbusd"] > 0
    if form == "bfloat16":
        exact = model.double()(ids, packing=packing).last_hidden_state
        assert_close(made, plain, exact, factor=3.0)
    else:
        assert F.cosine_similarity(made.double(), exact).min() > 0.99


# The instructions.


@pytest.fixture
def assembly(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of each kernel that is compiled."""
    make, made = llvm.create_mcjit_compiler, list[str]()

    def kept(module: Any, target: Any) -> Any:
        made.append(target.emit_assembly(module))
        return make(module, target)

    monkeypatch.setattr(llvm, "create_mcjit_compiler", kept)
    return made


INSTRUCTION = re.compile(r"^\s+(ldtilecfg|tile\w+|tdp\w+)\s*(.*)", re.MULTILINE)


def of_tiles(code: str) -> list[tuple[str, list[int]]]:
    """Instructions and their tiles, the destination first, as they follow one another in a task; without the last."""
    assert not re.search(r"^\s+call", code, re.MULTILINE)  # what is called may use tiles itself
    assert "\ttilerelease" in code  # LLVM puts the end of a loop before its beginning
    found = [(name, operands) for name, operands in INSTRUCTION.findall(code) if name != "tilerelease"]
    assert found[0][0] == "ldtilecfg"
    return [(name, [int(tile) for tile in re.findall(r"%tmm(\d)", operands)][::-1]) for name, operands in found]


@pytest.mark.parametrize("words", [16, 17])
def test_llvm_makes_these_instructions_of_a_product_of_bfloat16(words: int, assembly: list[str]) -> None:
    x, weight, bias, _ = bfloat16_case(40, 2 * words, 32, torch.Generator())
    linear(SAPPHIRE_RAPIDS, x, in_blocks(weight, 32), bias, torch.empty(40, 32, dtype=torch.bfloat16))
    [code] = assembly
    multiply = [
        ("tilezero", [0]), ("tilezero", [1]), ("tilezero", [2]), ("tilezero", [3]),
        ("tileloadd", [6]), ("tileloadd", [7]), ("tileloadd", [4]), ("tileloadd", [5]),
        ("tdpbf16ps", [0, 4, 6]), ("tdpbf16ps", [1, 4, 7]), ("tdpbf16ps", [2, 5, 6]), ("tdpbf16ps", [3, 5, 7]),
        ("tilestored", [0]), ("tilestored", [1]), ("tilestored", [2]), ("tilestored", [3]),
    ]  # fmt: skip
    again = [("ldtilecfg", []), *multiply]
    assert of_tiles(code) == [("ldtilecfg", []), *(multiply if words == 16 else again + again)]


def test_llvm_makes_these_instructions_of_a_product_of_int8(assembly: list[str]) -> None:
    matrix = Int8Matrix.of(torch.ones(32, 64))
    for rows in (16, FEW_ROWS * torch.get_num_threads() + 1):
        x, out = Int8Rows.empty(rows, 64), torch.empty(rows, 32)
        linear_int8(SAPPHIRE_RAPIDS, x, matrix, torch.zeros(32), out=out)
    few, many = ([one for one in of_tiles(code) if one[1]] for code in assembly if "tdpbusd" in code)
    assert few == [
        ("tilezero", [0]), ("tilezero", [1]),
        ("tileloadd", [6]), ("tileloadd", [7]), ("tileloadd", [4]),
        ("tdpbusd", [0, 4, 6]), ("tdpbusd", [1, 4, 7]),
        ("tilestored", [0]), ("tilestored", [1]),
    ]  # fmt: skip
    assert [one for one in many if one[0] == "tdpbusd"] == [
        ("tdpbusd", [0, 4, 6]), ("tdpbusd", [1, 4, 7]), ("tdpbusd", [2, 5, 6]), ("tdpbusd", [3, 5, 7]),
    ]  # fmt: skip
    assert len(many) == 16


# A CPU that has it.


def test_the_cpu_does_what_the_model_does(generator: torch.Generator) -> None:
    """To the bit: the steps after the sums are few here, and the same."""
    if HOST.tiles(torch.bfloat16) is None:
        pytest.skip("no AMX here, or it is off: FASTBERT_AMX=1 on a CPU with it runs this")
    for rows, depth, width in itertools.product((1, 16, 33, 70), (34, 128, 2 * CHUNK + 34), (16, 73)):
        x, weight, bias, _ = bfloat16_case(rows, depth, width, generator)
        outs = [torch.full((rows, width), torch.nan).to(torch.bfloat16) for _ in range(2)]
        for machine, out in zip((HOST, TILES), outs, strict=True):
            linear(machine, x, in_blocks(weight, 32), bias, out).run()
        assert torch.equal(*outs)
        x_int8, matrix, _ = int8_case(rows, 4 * (depth // 4), width, generator)
        floats = [torch.full((rows, width), torch.nan) for _ in range(2)]
        for machine, out in zip((HOST, TILES), floats, strict=True):
            Program(linear_int8(machine, x_int8, matrix, torch.zeros(width), out=out)).run()
        assert torch.equal(*floats)


# The switch.


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Of a Sapphire Rapids, which Linux gives AMX; they may be changed."""
    found = llvm.get_host_cpu_features()
    needed = AMX_BF16.needs | AMX_INT8.needs | set(native_machine.LANES["avx512"])
    found.update(dict.fromkeys(needed, True))
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: type(found)(found))
    monkeypatch.setattr(native_machine, "host", native_machine.host.__wrapped__)
    monkeypatch.setattr(native_machine, "amx_refused", lambda: None)
    for name in ("FASTBERT_CPU", "FASTBERT_AMX"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_amx_is_off_until_it_is_asked_for(features: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> str | None:
        raise AssertionError("Linux was asked")

    with monkeypatch.context() as patch:
        patch.setattr(native_machine, "amx_refused", never)
        for said in (None, "", "0"):
            if said is not None:
                patch.setenv("FASTBERT_AMX", said)
            machine = native_machine.host()
            assert isinstance(machine, Machine)
            assert machine.bfloat16 is AVX512_BF16 and machine.int8 is AVX512_VNNI
            assert "+amx" not in machine.features and "AMX" not in machine.described
            assert "FASTBERT_AMX=1" in str(native_machine.amx_unused())
    monkeypatch.setenv("FASTBERT_AMX", "1")
    machine = native_machine.host()
    assert isinstance(machine, Machine) and machine.bfloat16 is AMX_BF16 and machine.int8 is AMX_INT8
    assert {f"+{name}" for name in AMX} <= set(machine.features.split(","))
    assert machine.described.endswith("products of float32 and bfloat16 and int8, of bfloat16 and int8 by AMX")
    assert native_machine.amx_unused() is None


def test_amx_that_is_asked_for_and_can_not_be_is_an_error(
    features: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBERT_AMX", "1")
    monkeypatch.setattr(native_machine, "amx_refused", lambda: "Linux has none left")
    with pytest.raises(BackendError, match="FASTBERT_AMX: got 1; expected permission to use it: Linux has none left"):
        native_machine.host()
    monkeypatch.setenv("FASTBERT_CPU", "avx512")
    with pytest.raises(BackendError, match=r"this one with FASTBERT_CPU=avx512 lacks amx-tile, amx-bf16, amx-int8"):
        native_machine.host()
    monkeypatch.delenv("FASTBERT_AMX")
    assert native_machine.amx_unused() == "FASTBERT_CPU=avx512 is set"
    monkeypatch.delenv("FASTBERT_CPU")
    features["amx-int8"] = False
    assert native_machine.amx_unused() is None
    monkeypatch.setenv("FASTBERT_AMX", "1")
    with pytest.raises(BackendError, match=r"expected a CPU with AMX: this one lacks amx-int8\."):
        native_machine.host()
    monkeypatch.setenv("FASTBERT_AMX", "yes")
    with pytest.raises(ArgumentError, match="FASTBERT_AMX: got 'yes'; expected 1 for products by AMX, 0 or nothing"):
        native_machine.host()


def test_linux_is_asked_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it answers here; and what it may say elsewhere, in words."""
    refused = native_machine.amx_refused()
    permitted = ctypes.c_uint64()
    arch_get_xcomp_perm = 0x1022
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall(
        ctypes.c_long(native_machine.ARCH_PRCTL), ctypes.c_long(arch_get_xcomp_perm), ctypes.byref(permitted)
    )
    assert bool(permitted.value >> native_machine.XFEATURE_XTILEDATA & 1) == (refused is None)
    if not llvm.get_host_cpu_features().get("amx-tile"):
        assert str(refused).startswith("Linux does not give this process AMX's tiles (")

    asked, answers = list[tuple[int, ...]](), list[int]()

    class Library:
        def __init__(self, name: None, *, use_errno: bool) -> None:
            assert use_errno

        def syscall(self, *numbers: ctypes.c_long) -> int:
            asked.append(tuple(number.value for number in numbers))
            ctypes.set_errno(answers[-1])
            return -1 if answers[-1] else 0

    monkeypatch.setattr(ctypes, "CDLL", Library)
    for answer, words in (
        (0, None),
        (errno.EINVAL, "before 5.16"),
        (errno.EPERM, "sandbox"),
        (errno.ENOSPC, "stack for signals"),
        (errno.EOPNOTSUPP, "switched off"),
        (errno.EIO, "error"),
    ):
        answers.append(answer)
        said = native_machine.amx_refused()
        assert said is None if words is None else words in str(said)
    assert set(asked) == {(158, 0x1023, 18)}


def test_info_says_that_amx_is_left_alone(
    features: dict[str, bool], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        backend._decide.cache_clear()
        monkeypatch.setattr(backend, "host", native_machine.host)
        cli.info()
        return capsys.readouterr().out

    try:
        off = said()
        assert "AMX is left alone, because no CPU has run our products by AMX yet; FASTBERT_AMX=1 allows them" in off
        assert "by AMX\n" not in off
        monkeypatch.setenv("FASTBERT_AMX", "1")
        on = said()
        assert "left alone" not in on and "of bfloat16 and int8 by AMX\n" in on
        monkeypatch.delenv("FASTBERT_AMX")
        features["amx-tile"] = False
        assert "AMX is" not in said()
    finally:
        backend._decide.cache_clear()


def test_times_of_products_with_amx_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTBERT_AMX", raising=False)
    without = fastest._machine()
    monkeypatch.setenv("FASTBERT_AMX", "1")
    assert fastest._machine() != without and fastest._limited()
