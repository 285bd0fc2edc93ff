"""Kernels of a CPU touch nothing outside of what they are given: all of it, scratch too, lies between guarded pages.

Each kernel runs in a process of its own, which such a touch ends: `python tests/test_guard_pages.py KERNEL MACHINE`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import amx_tiles
import guard_pages
import pytest
import torch
import torch.nn.functional as F
from emulated import WIDE
from torch import Tensor

from fastbert import reference
from fastbert.cpu import attention as native_attention
from fastbert.cpu import embedding as native_embedding
from fastbert.cpu import int8 as native_int8
from fastbert.cpu import layout as native_layout
from fastbert.cpu import linear as native_linear
from fastbert.cpu import linear_int8 as native_linear_int8
from fastbert.cpu import pooling as native_pooling
from fastbert.cpu import program as native_program
from fastbert.cpu import weight_gradient as native_weight_gradient
from fastbert.cpu.instructions import AVX2, AVX2_INT8
from fastbert.cpu.int8 import Int8Matrix, Int8Rows
from fastbert.cpu.machine import Machine, host
from fastbert.cpu.program import Program
from fastbert.cpu.row_wise import PARAMETERS, row_wise
from fastbert.ops.rotary import angles_of_places
from fastbert.packing import Packing
from fastbert.testing import assert_close

HOST = host()
if not isinstance(HOST, Machine):
    pytest.skip(f"{HOST}: Linux on x86-64 with AVX2 runs this", allow_module_level=True)

# Which is why no lane of a weaker CPU need run this: no mark `cpu`.
MACHINES = {
    "host": HOST,
    "AVX2": Machine("x86-64-v3", "", AVX2, int8=AVX2_INT8),
    "wide": WIDE,
    "tiles": amx_tiles.MACHINE,
}

ROWS = [1, 2, 5, 17, 33]
WIDTHS = [1, 7, 8, 15, 16, 17, 26, 33, 64, 100, 312]
HEAD_DIMS = [1, 13, 26, 32, 64]

# Of the tensor, a copy of it between guarded pages.
Place = Callable[[Tensor], Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def attention(machine: Machine, place: Place) -> None:
    for dtype in machine.dtypes:
        for head_dim in HEAD_DIMS:
            for lengths in [*([rows] for rows in ROWS), [*ROWS, 0, 7, 1]]:
                packing = Packing.from_lengths(lengths)
                qkv = place(randn(packing.tokens, 3, 2, head_dim).to(dtype))
                out = place(torch.full((packing.tokens, 2, head_dim), torch.nan, dtype=dtype))
                cu_seqlens, scale = place(packing.cu_seqlens), head_dim**-0.5
                native_attention.attention_forward(machine, qkv, cu_seqlens, packing.max_seqlen, scale, out).run()
                exact, _ = reference.attention(qkv.double(), packing)
                assert_close(out, reference.attention(qkv, packing)[0], exact)


def attention_of_places(machine: Machine, place: Place) -> None:
    """A table of as many distances as there are, angles of as many places."""
    for dtype in machine.dtypes:
        for head_dim in (26, 32):
            for lengths in [*([rows] for rows in ROWS), [*ROWS, 0, 7, 1]]:
                packing, longest = Packing.from_lengths(lengths), max(lengths)
                qkv = place(randn(packing.tokens, 3, 2, head_dim).to(dtype))
                out = place(torch.full((packing.tokens, 2, head_dim), torch.nan, dtype=dtype))
                slopes, table = place(torch.tensor([0.3, -0.1])), place(randn(2, 2 * longest - 1))
                angles = place(angles_of_places(longest, head_dim, 500.0)[:longest])
                native_attention.attention_forward(
                    machine, qkv, place(packing.cu_seqlens), longest, head_dim**-0.5, out,
                    window=9, alibi_slopes=slopes, relative=table, angles=angles,
                ).run()  # fmt: skip
                plain, exact = (
                    reference.attention(
                        reference.rotary(qkv.to(to), reference.rotary_angles(packing, head_dim, 500.0, wide)),
                        packing, window=9, alibi_slopes=slopes, relative=table,
                    )[0]
                    for to, wide in ((dtype, torch.float32), (torch.float64, torch.float64))
                )  # fmt: skip
                assert_close(out, plain, exact)


def linear(machine: Machine, place: Place) -> None:
    for dtype in machine.dtypes:
        for case, (width, depth) in enumerate(zip(WIDTHS, reversed(WIDTHS), strict=True)):
            depth += depth % 2 if dtype == torch.bfloat16 else 0  # whole words
            weight, bias = (randn(width, depth) / depth**0.5).to(dtype), place(randn(width).to(dtype))
            matrix = place(native_layout.in_blocks(weight, machine.vectors.columns))
            for rows in ROWS:
                x, residual = place(randn(rows, depth).to(dtype)), place(randn(rows, width).to(dtype))
                out = place(torch.full((rows, width), torch.nan, dtype=dtype))
                added = residual if case % 2 else None
                native_linear.linear(machine, x, matrix, bias, out, activation="gelu", residual=added).run()
                plain, exact = (
                    F.gelu(F.linear(x.to(to), weight.to(to), bias.to(to))) + (residual.to(to) if case % 2 else 0.0)
                    for to in (torch.float32, torch.float64)
                )
                assert_close(out, plain.to(dtype), exact)


def guarded_rows(made: Int8Rows, place: Place) -> Int8Rows:
    return Int8Rows(place(made.values), place(made.scale), place(made.zero))


def product(
    x: Int8Rows,
    weight: Int8Matrix,
    bias: Tensor,
    residual: Tensor,
    norm: tuple[Tensor, Tensor, float] | None,
    to: torch.dtype,
) -> Tensor:
    """What `linear_int8` computes of them: gelu, or with `norm` a residual sum and LayerNorm."""
    values = weight.plain()[: x.values.shape[1]]
    total = x.floats().to(to) @ values.to(to) * weight.scale.to(to) + bias.to(to)
    if norm is None:
        return F.gelu(total)
    return F.layer_norm(total + residual.to(to), total.shape[1:], norm[0].to(to), norm[1].to(to), norm[2])


def linear_int8(machine: Machine, place: Place) -> None:
    """Few rows, and with one thread the 33 and 100 that are tasks of rows."""
    depths = [4 * -(-width // 4) for width in reversed(WIDTHS)]
    for dtype in machine.dtypes:
        for case, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
            made = Int8Matrix.of(randn(width, depth) / depth**0.5)
            weight = Int8Matrix(place(made.values), place(made.scale), place(made.sum))
            bias, norm_weight, norm_bias = (place(randn(width)) for _ in range(3))
            for rows in [*ROWS, 100]:
                x = guarded_rows(Int8Rows.empty(rows, depth), place)
                row_wise(machine, place(randn(rows, depth)), out_int8=x).run()
                residual = place(randn(rows, width).to(dtype))
                out = place(torch.full((rows, width), torch.nan, dtype=dtype))
                int8 = guarded_rows(Int8Rows.empty(rows, width), place)
                # LayerNorm of the product and a residual, or gelu alone
                norm = (norm_weight, norm_bias, 1e-5) if case % 2 else None
                steps = {"activation": "gelu"} if norm is None else {"residual": residual, "norm": norm}
                calls = native_linear_int8.linear_int8(machine, x, weight, bias, out=out, out_int8=int8, **steps)
                Program(calls).run()
                plain, exact = (product(x, weight, bias, residual, norm, to) for to in (torch.float32, torch.float64))
                assert_close(out, plain.to(dtype), exact)
                assert ((int8.floats() - exact).abs() <= 0.51 * int8.scale[:, None] + 1e-5).all()


def rows_(machine: Machine, place: Place) -> None:
    """Every step, out as floats and as int8; and int8 alone, whose last store of a row is the narrowest."""
    for dtype in machine.dtypes:
        for width in WIDTHS:
            bias, weight, norm_bias = (place(randn(width)) for _ in range(3))
            for rows in ROWS:
                x, residual = (place(randn(rows, width).to(dtype)) for _ in range(2))
                out = place(torch.full((rows, width), torch.nan, dtype=dtype))
                int8, alone = (guarded_rows(Int8Rows.empty(rows, width), place) for _ in range(2))
                steps = {"bias": bias, "activation": "gelu", "residual": residual, "norm": (weight, norm_bias, 1e-5)}
                row_wise(machine, x, **steps, out=out, out_int8=int8).run()
                row_wise(machine, x, out_int8=alone).run()
                plain, exact = (
                    F.layer_norm(
                        F.gelu(x.to(to) + bias.to(to)) + residual.to(to),
                        (width,),
                        weight.to(to),
                        norm_bias.to(to),
                        1e-5,
                    )
                    for to in (torch.float32, torch.float64)
                )
                assert_close(out, plain.to(dtype), exact)
                gate, halved = place(randn(rows, width).to(dtype)), guarded_rows(Int8Rows.empty(rows, width), place)
                halves = place(torch.cat([x, gate], 1))
                row_wise(machine, halves, activation="gelu", gated=True, out=out, out_int8=halved).run()
                gelu, exact_gelu = (F.gelu(x.to(to)) * gate.to(to) for to in (torch.float32, torch.float64))
                assert_close(out, gelu.to(dtype), exact_gelu)
                for made, expected in ((int8, exact), (alone, x.double()), (halved, exact_gelu)):
                    assert ((made.floats() - expected).abs() <= 0.51 * made.scale[:, None] + 1e-5).all()


def embedding(machine: Machine, place: Place) -> None:
    """Types of each row, and none; the last entry of each table is read."""
    for dtype in machine.dtypes:
        for case, width in enumerate(WIDTHS):
            word, position, token_type = (place(randn(entries, width).to(dtype)) for entries in (31, 17, 2))
            weight, bias = (place(randn(width)) for _ in range(2))
            for rows in ROWS:
                ids = [place(torch.arange(rows).flip(0) % n + n - min(rows, n)) for n in (31, 17, 2)]
                types = ids[2] if case % 2 else None
                out = place(torch.full((rows, width), torch.nan, dtype=dtype))
                norm = weight, bias, 1e-5
                native_embedding.embedding(machine, *ids[:2], types, word, position, token_type, norm, out).run()
                plain, exact = (
                    F.layer_norm(
                        word.to(to)[ids[0]]
                        + position.to(to)[ids[1]]
                        + token_type.to(to)[0 if types is None else types],
                        (width,),
                        weight.to(to),
                        bias.to(to),
                        1e-5,
                    )
                    for to in (torch.float32, torch.float64)
                )
                assert_close(out, plain.to(dtype), exact)


def pooling(machine: Machine, place: Place) -> None:
    for dtype in machine.dtypes:
        for width in WIDTHS:
            for how in ("cls", "mean", "max"):
                for lengths in [*([rows] for rows in ROWS), [*ROWS, 0]]:
                    packing = Packing.from_lengths(lengths)
                    x = place(randn(packing.tokens, width).to(dtype))
                    out = place(torch.full((packing.batch, width), torch.nan))
                    cu_seqlens = place(packing.cu_seqlens)
                    native_pooling.pool_forward(machine, x, cu_seqlens, out, how=how, normalise=True).run()
                    plain = reference.pool(x.float(), packing, how, normalise=True)
                    assert_close(out, plain, reference.pool(x.double(), packing, how, normalise=True))


def weight_gradient(machine: Machine, place: Place) -> None:
    for inputs, outputs in zip(WIDTHS, reversed(WIDTHS), strict=True):
        for rows in [*ROWS, 130]:
            x, dout, before = place(randn(rows, inputs)), place(randn(rows, outputs)), randn(outputs, inputs)
            dweight = place(before)
            native_weight_gradient.weight_gradient(machine, x, dout, dweight).run()
            assert_close(dweight, before + dout.t() @ x, before.double() + dout.t().double() @ x.double())


def row_too_many(machine: Machine, place: Place) -> None:
    """What must end the process: a kernel that was told of one row more than there are."""
    x = place(randn(3, 16))
    call = row_wise(machine, x, out=torch.empty(4, 16))
    call.fields[3 + PARAMETERS.index("rows")] += 1
    call.run()


def element_too_early(machine: Machine, place: Place) -> None:
    """The same on the other side: one that begins to write an element before its memory."""
    out = place(randn(3, 16))
    call = row_wise(machine, randn(3, 16), out=out)
    call.fields[3 + PARAMETERS.index("out")] -= out.itemsize
    call.run()


KERNELS = {
    "attention": attention,
    "attention_of_places": attention_of_places,
    "linear": linear,
    "linear_int8": linear_int8,
    "row_wise": rows_,
    "embedding": embedding,
    "pooling": pooling,
    "weight_gradient": weight_gradient,
}
FAULTS = {"row too many": row_too_many, "element too early": element_too_early}


def run_guarded(run: Callable[[Machine, Place], None], machine: Machine, side: guard_pages.Side) -> None:
    """Run with a place for tensors at the side of a guarded page; there lies what the kernels make for themselves."""
    torch.manual_seed(2018)
    for module in (native_program, native_int8, native_layout, native_linear_int8):
        module.room = partial(guard_pages.room, side=side)  # type: ignore[attr-defined]
    run(machine, partial(guard_pages.placed, side=side))


def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of this file, on one thread: the memory that a kernel works in is then that of one worker."""
    return subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    "machine", ["host", *(pytest.param(name, marks=pytest.mark.long) for name in ("AVX2", "wide"))]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_touches_nothing_outside_of_its_memory(kernel: str, machine: str) -> None:
    if kernel == "linear_int8" and not MACHINES[machine].int8:
        pytest.skip("no products of int8 there: a CPU with them runs this")
    made = ended(kernel, machine)
    assert made.returncode == 0, f"ended with {made.returncode} after:\n{made.stdout}{made.stderr}"
    assert made.stdout.split() == ["front", "end"]


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["linear", "linear_int8"])
def test_tiles_touch_nothing_outside_of_their_memory(kernel: str) -> None:
    """The model of AMX reads and writes where the instructions would."""
    made = ended(kernel, "tiles")
    assert made.returncode == 0, f"ended with {made.returncode} after:\n{made.stdout}{made.stderr}"
    assert made.stdout.split() == ["front", "end"]


@pytest.mark.parametrize(("fault", "sides"), [("row too many", ["front"]), ("element too early", [])])
def test_a_touch_outside_of_memory_ends_the_process(fault: str, sides: list[str]) -> None:
    """The guarded page at the end is what sees a row too many: in front of one, the rest of its page is there."""
    made = ended(fault, "host")
    assert made.returncode == -signal.SIGSEGV, made.stdout + made.stderr
    assert made.stdout.split() == sides


if __name__ == "__main__":
    name, machine_name = sys.argv[1:]
    for side in ("front", "end"):
        run_guarded((KERNELS | FAULTS)[name], MACHINES[machine_name], side)  # type: ignore[arg-type]
        amx_tiles.faults.check()
        print(side, flush=True)
